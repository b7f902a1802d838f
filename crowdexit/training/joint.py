"""Backbone and branches together: end-to-end, or layer by layer (multi-exit ViT paper, III-C)."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from crowdexit.models import zoo
from crowdexit.models.network import FINAL, MultiExitNetwork
from crowdexit.models.stages import ExitOutput
from crowdexit.training.losses import Batch, exit_loss
from crowdexit.training.modules import (
    Diverged,
    Experiment,
    TrainingError,
    averaged,
    freeze,
    grouped,
    make_optimiser,
    rate_at,
    record,
    validated,
)
from crowdexit.training.recipe import Recipe

FINAL_WEIGHT = 2.0


@dataclass(frozen=True)
class Phase:
    """A phase of training.

    Attributes:
        exits: whose losses are added.
        first, last: the trained stages, inclusive; none if ``first`` is after ``last``.
    """

    exits: tuple[str, ...]
    first: int
    last: int


def phases(network: MultiExitNetwork, recipe: Recipe) -> list[Phase]:
    """One phase for end-to-end; for layer-wise one for each location with branches, and one for the final exit."""
    names = [e.name for e in recipe.exits]
    end = len(network.stages) - 1
    if recipe.stage == "end-to-end":
        return [Phase((*sorted(names, key=network.stage_of), FINAL), 0, end)]
    made, first = [], 0
    for stage in sorted({network.stage_of(name) for name in names}):
        made.append(Phase(tuple(n for n in names if network.stage_of(n) == stage), first, stage))
        first = stage + 1
    return [*made, Phase((FINAL,), first, end)]


class JointTraining(Experiment):
    """Train with the loss l_t = l + Σ λ_b l_b over the exits of a phase; everything else is frozen.

    A phase starts from the best weights of the previous one. ``OUT/model.safetensors`` holds the best of the current
    phase, so the network is complete only after the last phase.
    """

    def __init__(self, network: MultiExitNetwork, spec: zoo.Spec, recipe: Recipe, out: Path) -> None:
        super().__init__(network, spec, recipe, out)
        self.phases = phases(network, recipe)
        self.weights = {name: FINAL_WEIGHT if name == FINAL else 1.0 for phase in self.phases for name in phase.exits}
        unknown = [name for name in recipe.lambdas if name not in self.weights]
        if unknown:
            raise TrainingError(f"lambdas: no exit {unknown[0]!r} is trained (there are {', '.join(self.weights)})")
        self.weights.update(recipe.lambdas)
        there = list(network.branches)
        for name in recipe.detached:
            if name not in there:
                raise TrainingError(f"detached: no early exit {name!r} is trained (there are {', '.join(there)})")
        freeze(network, recipe)
        for phase in self.phases:
            if not any(self.weights[name] for name in phase.exits):
                raise TrainingError(f"lambdas: the weights of {', '.join(phase.exits)} are all zero")
        self.best, self.begun = math.inf, -1
        self.average = averaged(network, recipe)

    @property
    def number(self) -> int:
        """Of the running phase."""
        return min(self.current_epoch // self.recipe.epochs, len(self.phases) - 1)

    def finished(self) -> bool:
        return self.current_epoch >= self.recipe.epochs * len(self.phases)

    def learning(self, phase: Phase) -> list[nn.Module]:
        """The modules that a phase trains."""
        stages = list(self.network.stages)[phase.first : phase.last + 1]
        return [*stages, *(self.network.exit_module(name) for name in phase.exits if self.weights[name])]

    def configure_optimizers(self) -> Any:
        part = self.recipe.optimiser
        # Frozen parameters have no gradient, and the optimiser skips them.
        optimiser = make_optimiser(grouped(self.network.named_parameters(), part), part)
        steps = int(self.trainer.estimated_stepping_batches) // len(self.phases)
        an_epoch = max(1, steps // self.recipe.epochs)
        schedule = LambdaLR(optimiser, lambda step: rate_at(part, step % steps, steps, step % steps // an_epoch))
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def train(self, mode: bool = True) -> JointTraining:
        """Keep frozen parts in evaluation mode, with frozen running statistics."""
        super().train(mode)
        if self.begun >= 0:
            self.network.eval()
            for module in self.learning(self.phases[self.begun]):
                module.train(mode)
            self.keep_norms()
        if self.average is not None:
            self.average.eval()
        return self

    def on_train_epoch_start(self) -> None:
        if self.begun == self.number:
            return
        starts = self.current_epoch % self.recipe.epochs == 0
        if starts and self.number:
            # From the best of the previous phase; a resumed run has loaded its own state.
            path = self.out / "model.safetensors"
            for network in (self.network, self.average.module if self.average is not None else self.network):
                zoo.fill(network, zoo.read_tensors(path), str(path))
        if starts:
            self.best = math.inf
        self.begun = self.number
        self.network.requires_grad_(False)
        for module in self.learning(self.phases[self.begun]):
            module.requires_grad_(True)
        freeze(self.network, self.recipe)
        self.train()

    def training_step(self, batch: Batch, _: int) -> Tensor:
        phase = self.phases[self.begun]
        with self.quick_depthwise():
            answers = dict(self.answers(batch, phase.exits))
        losses = [self.weights[name] * exit_loss(answers[name], batch, self.recipe) for name in phase.exits]
        for name, loss in zip(phase.exits, losses, strict=True):
            self.log(f"train/{name}", loss)
        return sum(losses[1:], losses[0])

    def answers(self, batch: Batch, exits: Collection[str]) -> Iterator[tuple[str, ExitOutput]]:
        """The outputs of these exits by name; stages before a detached exit get no gradient from it."""
        network, features = self.network, record(batch)
        early = [name for name in exits if name != FINAL]
        detached = early if self.global_step < self.recipe.detach_until else self.recipe.detached
        for index in range(max(map(network.stage_of, exits)) + 1):
            features = network.advance(index, features)
            for name in exits:
                if network.stage_of(name) == index:
                    yield name, network.run_exit(name, features.detach() if name in detached else features)

    def on_train_batch_end(self, *_: Any) -> None:
        if self.average is not None:
            self.average.update_parameters(self.network)

    def validation_step(self, batch: Batch, _: int) -> None:
        """The outputs of each exit in the watched condition."""
        network: Any = self.average.module if self.average is not None else self.network
        wanted = self.phases[self.number].exits
        network.eval()
        exits = {name: network.exit_module(name) for name in wanted}
        for outputs in validated(network, batch, exits, network.stage_of, self.recipe.watch):
            self.validation.add(*outputs)

    def on_validation_epoch_end(self) -> None:
        tables = self.validation.collect()
        total = sum(self.weights[name] for name in tables)
        error = sum(self.weights[name] * table["error"] for name, table in tables.items()) / total
        self.log("val/error", error, prog_bar=True)
        self.log_table(tables)
        if not math.isfinite(error):
            raise Diverged(f"epoch {self.current_epoch + 1}: the network diverged; try a lower optimiser.lr")
        if error < self.best:
            self.best = error
            network: Any = self.average.module if self.average is not None else self.network
            self.write(network, error, epoch=self.current_epoch, **tables)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["crowdexit_best"] = self.best

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.best = checkpoint["crowdexit_best"]
