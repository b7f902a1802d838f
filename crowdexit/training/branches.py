"""Classifier-wise training: every branch on the frozen backbone."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from crowdexit.models import zoo
from crowdexit.models.exits import Branch
from crowdexit.models.network import FINAL, MultiExitNetwork
from crowdexit.models.stages import Exit
from crowdexit.training.cache import FeatureCache, iter_features
from crowdexit.training.losses import Batch, exit_loss, local_error
from crowdexit.training.modules import (
    Experiment,
    TrainingError,
    averaged,
    listed,
    make_optimiser,
    plateau,
    rate_at,
    record,
    validated,
)
from crowdexit.training.recipe import ExitPart, Recipe


@dataclass(frozen=True)
class Trial:
    """A branch at one learning rate: its name during training, and its exit."""

    name: str
    exit: ExitPart
    lr: float


def trials(recipe: Recipe) -> list[Trial]:
    """The recipe's branches; classifier-wise, each at every learning rate."""
    part = recipe.optimiser
    if recipe.stage != "branches" or not part.rates:
        return [Trial(e.name, e, part.lr) for e in recipe.exits]
    # Module names must not contain dots: 0.001 becomes 1e-03.
    return [Trial(f"{e.name}@{_plain(lr)}", e, lr) for e in recipe.exits for lr in part.rates]


def _plain(lr: float) -> str:
    return f"{lr:e}".replace(".", "_")


def add_branches(network: MultiExitNetwork, recipe: Recipe, median_count: float) -> None:
    """Add the recipe's branches, their weights fixed by name and seed.

    Counts start at the median count; class scores start at zero, and density maps nearly empty.

    Raises:
        TrainingError: for an unknown location, kind or option.
    """
    for trial in trials(recipe):
        e = trial.exit
        torch.manual_seed(zlib.crc32(f"{e.name} {recipe.seed}".encode()))
        try:
            network.add_branch(trial.name, e.place, e.kind, e.options)
        except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
            raise TrainingError(f"exit {e.name!r}: {error}") from None
        exit = network.exit_module(trial.name)
        exit.start_at(median_count)
        if recipe.tied:
            exit.start_tied()


@torch.no_grad()
def taught(teacher: MultiExitNetwork, batch: Batch) -> Batch:
    """Label the unlabelled samples of a batch with the teacher's outputs (copycat).

    For counting the final exit's count and, if available, density map; for classification the most likely class.
    """
    if "unlabelled" not in batch:
        return batch
    unlabelled = cast(Tensor, batch.pop("unlabelled"))
    if not unlabelled.any():
        return batch
    some = {key: value[unlabelled] for key, value in batch.items() if isinstance(value, Tensor)}
    answer = teacher(record(some), [FINAL])[FINAL]
    if "label" in batch:
        batch["label"][unlabelled] = answer.value.argmax(1)
        return batch
    batch["count"][unlabelled] = answer.value.clamp(min=0).float()
    if answer.density is not None:
        batch["density"][unlabelled] = answer.density.float()
    return batch


def load_teacher(name: Path, network: MultiExitNetwork, spec: zoo.Spec) -> MultiExitNetwork:
    """The network that labels images for branches on ``network`` (copycat).

    Args:
        name: a shipped name or a checkpoint.
        spec: of ``network``, with the names of its classes.

    Raises:
        CrowdExitError: if there is no such checkpoint, or its image size or classes differ.
    """
    teacher, own = zoo.load(name)
    if teacher.classifies != network.classifies:
        counts = "sorts into classes, the run counts" if teacher.classifies else "counts, the run sorts into classes"
        raise TrainingError(f"copycat.teacher: {name} {counts}")
    if network.classifies and own.meta.get("classes") != spec.meta.get("classes"):
        raise TrainingError(f"copycat.teacher: {name} was not trained on the same classes as the data has")
    if teacher.config.size != network.config.size:
        theirs, ours = ("{}x{}".format(*config.size) for config in (teacher.config, network.config))
        raise TrainingError(f"copycat.teacher: {name} takes images of {theirs}, the run's are {ours}")
    out: MultiExitNetwork = teacher.requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return out


class BranchTraining(Experiment):
    """Classifier-wise (multi-exit ViT paper, III): all branches train on one pass of the frozen backbone.

    With a ``cache``, the features of each view of a sample are computed once and then read from disk.

    Each branch has its own optimiser, plateau schedule, early stopping and random numbers (by name and step), so that
    results do not depend on the other branches. With several learning rates, each branch is trained once for each, and
    the best is kept.
    """

    def __init__(self, network: MultiExitNetwork, spec: zoo.Spec, recipe: Recipe, out: Path) -> None:
        super().__init__(network, spec, recipe, out)
        self.automatic_optimization = False
        self.trials = {trial.name: trial for trial in trials(recipe)}
        self.names = list(self.trials)
        for module in network.backbone_modules():
            module.requires_grad_(False)
        for name, branch in network.branches.items():
            branch.requires_grad_(name in self.names)
        for pattern in recipe.frozen:
            stay = [weight for name, weight in network.branches.named_parameters() if fnmatchcase(name, pattern)]
            if not stay:
                there = next(name for name, _ in network.branches.named_parameters())
                raise TrainingError(f"frozen: no branch has {pattern!r} (they have {there} …)")
            for weight in stay:
                weight.requires_grad_(False)
        self.average = averaged(network.branches, recipe)
        # Auxiliary head, not saved: predicts a local count from each token.
        self.readouts = nn.ModuleDict()
        if recipe.local:
            for name in self.names:
                branch = network.exit_module(name)
                if branch.token_grid is None:
                    continue  # it has one token for the whole image, or its loss is local already
                torch.manual_seed(zlib.crc32(f"{self.trials[name].exit.name} {recipe.seed} readout".encode()))
                self.readouts[name] = nn.Linear(cast(Branch, branch).dim, 1)
        # In a list, to exclude it from checkpoints.
        self._teachers: list[MultiExitNetwork] = []
        if recipe.copycat and recipe.copycat.teacher is not None:
            self._teachers = [load_teacher(recipe.copycat.teacher, network, spec)]
        if recipe.copycat and self.readouts and not self.teacher.final.has_density:
            labels = recipe.copycat.teacher or recipe.model
            raise TrainingError(f"{labels}: its final exit makes no density map to teach the parts by: local: 0")
        self.best_of = dict.fromkeys(self.names, math.inf)
        self.stale = dict.fromkeys(self.names, 0)
        self.kept: dict[str, dict[str, Tensor]] = {}
        self.kept_tables: dict[str, dict[str, float]] = {}
        self.cache: FeatureCache | None = None
        self.train()  # Lightning does not change the modes

    @property
    def teacher(self) -> MultiExitNetwork:
        """The network that labels unlabelled images: the recipe's teacher, or the backbone itself."""
        return self._teachers[0] if self._teachers else self.network

    def on_fit_start(self) -> None:
        super().on_fit_start()
        for teacher in self._teachers:
            teacher.to(self.device)

    def with_statistics(self) -> list[nn.Module | None]:
        """The trained branches only; the backbone is bitwise unchanged."""
        return [*(self.network.branches[name] for name in self.names), self.average]

    def active(self) -> list[str]:
        """The branches that have not stopped."""
        limit = self.recipe.stop
        return [name for name in self.names if limit is None or self.stale[name] < limit]

    def finished(self) -> bool:
        return not self.active()

    def train(self, mode: bool = True) -> BranchTraining:
        """Keep the backbone in evaluation mode, with frozen running statistics."""
        super().train(mode)
        for module in self.network.backbone_modules():
            module.eval()
        if self.average is not None:
            self.average.eval()
        return self

    def configure_optimizers(self) -> Any:
        part = self.recipe.optimiser
        optimisers = [make_optimiser(self.parameters_of(name), part, trial.lr) for name, trial in self.trials.items()]
        if part.schedule == "plateau":
            return [{"optimizer": o, "lr_scheduler": plateau(o, part)} for o in optimisers]
        steps = int(self.trainer.estimated_stepping_batches)
        an_epoch = max(1, steps // self.recipe.epochs)
        return [
            {
                "optimizer": o,
                "lr_scheduler": LambdaLR(o, lambda step: rate_at(part, step, steps, step // an_epoch)),
            }
            for o in optimisers
        ]

    def parameters_of(self, name: str) -> list[nn.Parameter]:
        """All trained modules of one branch."""
        readout = self.readouts[name].parameters() if name in self.readouts else []
        return [*self.network.branches[name].parameters(), *readout]

    def training_step(self, batch: Batch, index: int) -> None:
        network, active = self.network, self.active()
        batch = taught(self.teacher, batch)
        optimisers = dict(zip(self.names, listed(self.optimizers()), strict=True))
        losses = []
        step = self.current_epoch * int(self.trainer.num_training_batches) + index
        places = {network.stage_of(name) for name in active}
        for stage, features in iter_features(network, batch, places, self.cache):
            for name in active:
                if network.stage_of(name) != stage:
                    continue
                own = self.trials[name].exit.name
                torch.manual_seed(zlib.crc32(f"{own} {self.recipe.seed} {step} {self.global_rank}".encode()))
                exit = network.exit_module(name)
                if name not in self.readouts:
                    losses.append(exit_loss(exit(features), batch, self.recipe))
                else:
                    branch = cast(Branch, exit)
                    tokens = branch.tokens(features)
                    losses.append(exit_loss(branch.answer(tokens), batch, self.recipe))
                    assert branch.token_grid is not None
                    rows, columns = branch.token_grid
                    local = self.readouts[name](tokens[:, : rows * columns]).squeeze(2).float()
                    losses.append(
                        self.recipe.local * local_error(local, batch["density"], batch["count"], branch.token_grid)
                    )
                self.log(f"train/{name}", losses[-1].detach())
        # Branches share no weights, so the sum gives each its own gradient.
        self.manual_backward(torch.stack(losses).sum())
        for name in active:
            if self.recipe.optimiser.clip:
                nn.utils.clip_grad_norm_(self.parameters_of(name), self.recipe.optimiser.clip)
            optimisers[name].step()
            optimisers[name].zero_grad()
        if self.recipe.optimiser.schedule != "plateau":
            for scheduler in listed(self.lr_schedulers()):
                scheduler.step()
        if self.average is not None:
            self.average.update_parameters(network.branches)

    def evaluated(self) -> nn.ModuleDict:
        """The averaged branches, if any."""
        return cast(nn.ModuleDict, self.average.module) if self.average is not None else self.network.branches

    def validation_step(self, batch: Batch, _: int) -> None:
        """The outputs of each branch in the watched condition."""
        branches = self.evaluated()
        exits = {name: cast(Exit, branches[name]) for name in self.active()}
        for outputs in validated(self.network, batch, exits, self.network.stage_of, self.recipe.watch):
            self.validation.add(*outputs)

    def on_validation_epoch_end(self) -> None:
        collected = self.validation.collect()
        tables = {name: collected[name] for name in self.names if name in collected}
        self.log_table(tables)
        branches = self.evaluated()
        for name, scheduler in zip(self.names, listed(self.lr_schedulers()), strict=True):
            if name not in tables:
                continue  # it has stopped
            error = tables[name]["error"]
            if isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step(error)
            self.stale[name] += 1
            if error < self.best_of[name]:
                self.best_of[name], self.stale[name] = error, 0
                self.kept[name] = {k: v.detach().cpu().clone() for k, v in branches[name].state_dict().items()}
                self.kept_tables[name] = {"epoch": self.current_epoch, **tables[name]}
        best: dict[str, str] = {}
        for name in sorted(self.kept, key=lambda name: self.best_of[name], reverse=True):
            best[self.trials[name].exit.name] = name
        for e in self.recipe.exits:
            if e.name not in best:
                raise TrainingError(f"the exit {e.name!r} diverged at once; try a lower optimiser.lr")
        if any(self.stale[name] == 0 for name in tables):
            self._write_best(best)
        self.trainer.should_stop = self.finished()

    def _write_best(self, best: dict[str, str]) -> None:
        """Write the checkpoint with the best trial (by name) of each exit."""
        tried = tuple(f"branches.{name}." for name in self.trials)
        others = {key: value for key, value in self.network.state_dict().items() if not key.startswith(tried)}
        network = zoo.build(zoo.Spec(self.spec.model, self.spec.exits, self.spec.changes))
        for exit, name in best.items():
            others |= {f"branches.{exit}.{key}": value for key, value in self.kept[name].items()}
        zoo.fill(network, others, "the branches")
        tables = {}
        for e in self.recipe.exits:
            trial = self.trials[best[e.name]]
            rate = {"lr": trial.lr} if self.recipe.optimiser.rates else {}
            tables[e.name] = {**self.kept_tables[trial.name], **rate}
        self.write(network, sum(self.best_of[name] for name in best.values()) / len(best), **tables)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["crowdexit_branches"] = (self.best_of, self.stale, self.kept, self.kept_tables)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.best_of, self.stale, self.kept, self.kept_tables = checkpoint["crowdexit_branches"]
