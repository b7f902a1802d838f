"""Classifier-wise training: every branch on the frozen backbone."""

from __future__ import annotations

import copy
import math
import zlib
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from crowdexit import zoo
from crowdexit.exits import Branch
from crowdexit.network import MultiExitNetwork
from crowdexit.training.losses import Batch, count_loss, local_error
from crowdexit.training.modules import (
    Experiment,
    TrainingError,
    averaged,
    heard_and_silent,
    listed,
    make_optimiser,
    of_pictures,
    rate_at,
    record,
)
from crowdexit.training.recipe import Recipe


def branch_of(network: MultiExitNetwork, name: str) -> Branch:
    """The early exit of that name."""
    return cast(Branch, network.branches[name])


def add_branches(network: MultiExitNetwork, recipe: Recipe, median: float) -> None:
    """Add the recipe's branches, their weights fixed by name and seed.

    The output starts at the training pictures' median count, not at zero.

    Raises:
        TrainingError: for a place or kind that the network does not have.
    """
    for e in recipe.exits:
        torch.manual_seed(zlib.crc32(f"{e.name} {recipe.seed}".encode()))
        try:
            network.add_branch(e.name, e.place, e.kind)
        except ValueError as error:
            raise TrainingError(f"exit {e.name!r}: {error}") from None
        branch = branch_of(network, e.name)
        with torch.no_grad():
            cast(nn.Linear, branch.head[-1]).bias.fill_(median / branch.scale)
        if recipe.tied:
            branch.head.start_tied(branch.cells)


class BranchTraining(Experiment):
    """Classifier-wise (multi-exit ViT paper, III): the backbone frozen, all branches on one pass of it.

    Each branch has its own optimiser, plateau and early stopping, and its own random numbers (by its name and
    the step), so that it comes out the same whichever branches are trained beside it.
    """

    def __init__(self, network: MultiExitNetwork, spec: zoo.Spec, recipe: Recipe, out: Path) -> None:
        super().__init__(network, spec, recipe, out)
        self.automatic_optimization = False
        self.names = [e.name for e in recipe.exits]
        for module in network.backbone_modules():
            module.requires_grad_(False)
        for name, branch in network.branches.items():
            branch.requires_grad_(name in self.names)
        self.average = averaged(network.branches, recipe)
        # Thrown away afterwards: one reading of each token, so that every part of a picture teaches its count.
        self.readouts = nn.ModuleDict()
        if recipe.local:
            for name in self.names:
                if branch_of(network, name).token_grid is None:
                    continue  # its one token stands for the whole picture
                torch.manual_seed(zlib.crc32(f"{name} {recipe.seed} readout".encode()))
                self.readouts[name] = nn.Linear(branch_of(network, name).dim, 1)
        self.best_of = dict.fromkeys(self.names, math.inf)
        self.stale = dict.fromkeys(self.names, 0)
        self.kept: dict[str, dict[str, Tensor]] = {}
        self.kept_tables: dict[str, dict[str, float]] = {}
        self.train()  # Lightning leaves the modes as they are

    def active(self) -> list[str]:
        """The branches that have not stopped."""
        limit = self.recipe.stop
        return [name for name in self.names if limit is None or self.stale[name] < limit]

    def finished(self) -> bool:
        return not self.active()

    def train(self, mode: bool = True) -> BranchTraining:
        """The backbone stays in evaluation mode: its running statistics are frozen too."""
        super().train(mode)
        for module in self.network.backbone_modules():
            module.eval()
        if self.average is not None:
            self.average.eval()
        return self

    def configure_optimizers(self) -> Any:
        part = self.recipe.optimiser
        optimisers = [make_optimiser(self.parameters_of(name), part) for name in self.names]
        if part.schedule == "plateau":
            return [
                {"optimizer": o, "lr_scheduler": ReduceLROnPlateau(o, factor=part.factor, patience=part.patience)}
                for o in optimisers
            ]
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
        """All that is trained for one branch."""
        readout = self.readouts[name].parameters() if name in self.readouts else []
        return [*self.network.branches[name].parameters(), *readout]

    def training_step(self, batch: Batch, index: int) -> None:
        network, active = self.network, self.active()
        optimisers = dict(zip(self.names, listed(self.optimizers()), strict=True))
        losses = []
        step = self.current_epoch * int(self.trainer.num_training_batches) + index
        features = record(batch)
        for stage in range(max(network.stage_of(name) for name in active) + 1):
            with torch.no_grad():
                features = network.stages[stage](features)
            for name in active:
                if network.stage_of(name) != stage:
                    continue
                torch.manual_seed(zlib.crc32(f"{name} {self.recipe.seed} {step} {self.global_rank}".encode()))
                branch = branch_of(network, name)
                tokens = branch.tokens(features)
                count = branch.answer(tokens).value
                losses.append(count_loss(count, batch, self.recipe))
                if name in self.readouts:
                    assert branch.token_grid is not None
                    rows, columns = branch.token_grid
                    local = self.readouts[name](tokens[:, : rows * columns]).squeeze(2).float()
                    losses.append(
                        self.recipe.local * local_error(local, batch["density"], batch["count"], branch.token_grid)
                    )
                self.log(f"train/{name}", (count.detach() - batch["count"]).abs().mean())
        # The branches share no weights: the gradient of the sum is each one's own.
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
        """The averaged branches where there are some."""
        return cast(nn.ModuleDict, self.average.module) if self.average is not None else self.network.branches

    def validation_step(self, batch: Batch, _: int) -> None:
        """Each branch's counts with the sound there is and, where there is some, without it too."""
        network, active, branches = self.network, self.active(), self.evaluated()
        last = max(network.stage_of(name) for name in active)
        ways = heard_and_silent(network, record(batch))
        for features in ways.values() if batch["heard"].any() else (ways["sound"],):
            for stage in range(last + 1):
                features = network.stages[stage](features) if stage else features
                for name in active:
                    if network.stage_of(name) == stage:
                        counts = of_pictures(branches[name](features).value, batch)
                        self.validation.add(name, batch["id"], counts, batch["count"])

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
        for name in self.names:
            if name not in self.kept:
                raise TrainingError(f"the exit {name!r} diverged at once; try a lower optimiser.lr")
        if any(self.stale[name] == 0 for name in tables):
            best = copy.deepcopy(self.network)
            for name, state in self.kept.items():
                best.branches[name].load_state_dict(state)
            self.write(best, **self.kept_tables)
        self.trainer.should_stop = self.finished()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["crowdexit_branches"] = (self.best_of, self.stale, self.kept, self.kept_tables)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.best_of, self.stale, self.kept, self.kept_tables = checkpoint["crowdexit_branches"]
