"""From a recipe to a trained checkpoint: data, Lightning's trainer, resuming."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from torch.utils.data import DataLoader, Subset

from crowdexit import zoo
from crowdexit.data.augment import ConditionRange, View
from crowdexit.data.dataset import CrowdDataset, EpochPlan, Setting
from crowdexit.data.store import Store
from crowdexit.errors import CrowdExitError
from crowdexit.memory import keep_freed_memory
from crowdexit.training.modules import BackboneTraining, BranchTraining, Experiment
from crowdexit.training.recipe import Recipe

LAST = "last.ckpt"


class TrainingError(CrowdExitError):
    """A run that cannot start or go on."""


class CrowdData(L.LightningDataModule):
    """The recipe's samples, dealt out to the processes so that each is seen as the plan says."""

    def __init__(self, recipe: Recipe, native: tuple[int, int]) -> None:
        super().__init__()
        data = recipe.data
        if data.store is None:
            raise TrainingError("no data: give a prepared file with --data")
        store = Store(data.store)
        self.recipe = recipe
        canvas = data.canvas or native
        if recipe.stage in ("branches", "count") and canvas != native:
            raise TrainingError(f"the stage {recipe.stage!r} needs the model's native size as canvas")
        view = View(
            canvas,
            native,
            (1.0, 1.0) if data.whole else data.scale,
            data.flip,
            0.0 if data.whole else data.jitter,
        )
        conditions = ConditionRange(**data.conditions.model_dump())
        hear = 1.0 if recipe.stage == "hearing" else data.hear
        setting = Setting(canvas, view, conditions, hear=hear, stride=data.stride)
        self.train_set = CrowdDataset(store, data.train, store.ids(data.train, data.train_ids), setting, recipe.seed)
        self.val_set = CrowdDataset(store, data.val, store.ids(data.val, data.val_ids), Setting(native))
        counts = store.counts(data.train)
        self.median = float(np.median([counts[id] for id in self.train_set.ids]))
        if recipe.stage == "hearing":
            silent = [id for id in self.train_set.ids if store.read(data.train, id).log_mel is None]
            if silent:
                raise TrainingError(f"{data.store}: {len(silent)} training samples have no sound to hear")
        store.close()

    def _processes(self) -> tuple[int, int]:
        trainer = self.trainer
        return (trainer.global_rank, trainer.world_size) if trainer else (0, 1)

    def train_dataloader(self) -> DataLoader[Any]:
        data, (rank, world) = self.recipe.data, self._processes()
        plan = EpochPlan(
            self.train_set.ids,
            balance=data.balance,
            length=data.draws,
            seed=self.recipe.seed,
            rank=rank,
            world=world,
        )
        return DataLoader(
            self.train_set,
            batch_size=self.recipe.batch,
            sampler=plan,
            num_workers=data.workers,
            persistent_workers=data.workers > 0,
            drop_last=len(plan) > self.recipe.batch,
            multiprocessing_context="forkserver" if data.workers else None,
        )

    def val_dataloader(self) -> DataLoader[Any]:
        rank, world = self._processes()
        mine = Subset(self.val_set, range(rank, len(self.val_set), world))
        return DataLoader(mine, batch_size=4, num_workers=0)


class _WholeFiles(TorchCheckpointIO):
    """Lightning's checkpoints, renamed into place: a kill while writing leaves the one before."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        part = Path(f"{path}.part")
        super().save_checkpoint(checkpoint, part, storage_options)
        part.replace(path)


class _Lines(Callback):
    """One line an epoch, for logs and for the record."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.is_global_zero and isinstance(module, Experiment):
            self.console.print(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  {module.summary}")


def make_experiment(recipe: Recipe, out: Path, median: float = 0.0) -> Experiment:
    """The network with its starting weights, in the loop that the recipe's stage wants.

    Raises:
        CrowdExitError: for a model, an exit or a starting checkpoint that does not fit.
    """
    spec = zoo.Spec(recipe.model, changes=recipe.changes)
    if recipe.start is not None:
        path = zoo.checkpoint_path(recipe.start)
        begun = zoo.read_spec(path)
        if begun.model != recipe.model:
            raise TrainingError(f"{path}: weights of {begun.model}, but the recipe trains {recipe.model}")
        added = tuple(zoo.ExitSpec(e.name, e.place, e.kind) for e in recipe.exits)
        old = tuple(e for e in begun.exits if e.name not in {a.name for a in added})
        spec = zoo.Spec(recipe.model, (*old, *added), {**begun.changes, **recipe.changes}, begun.meta)
        network = zoo.build(replace(spec, exits=old))
        replaced = tuple(f"branches.{a.name}." for a in added)
        zoo.fill(
            network,
            {k: v for k, v in zoo.read_tensors(path).items() if not (replaced and k.startswith(replaced))},
            str(path),
            optional=lambda key: key.startswith("final.regressor."),
        )
    else:
        if recipe.stage == "branches":
            raise TrainingError("classifier-wise training needs a trained backbone: set start")
        network = zoo.build(spec)
    if recipe.stage == "branches":
        BranchTraining.start_branches(network, recipe, median)
        return BranchTraining(network, spec, recipe, out)
    if recipe.stage == "count" and network.final.regressor is None:
        raise TrainingError("stage two needs the regressor: set changes: {regressor: true}")
    return BackboneTraining(network, spec, recipe, out)


def _strategy(recipe: Recipe, devices: int) -> str:
    if devices == 1:
        return "auto"
    # A branch that has stopped takes no part in the pass.
    return "ddp_find_unused_parameters_true" if recipe.stage == "branches" else "ddp"


def train(
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = False,
    devices: int = 1,
    accelerator: str = "auto",
    console: Console | None = None,
) -> Path:
    """Run a recipe; ``OUT/model.safetensors`` is the best network by validation.

    Args:
        out: folder of the run: the checkpoint, Lightning's ``last.ckpt`` (each epoch), TensorBoard's events.
        resume: go on from ``last.ckpt``, where there is one.
        devices: GPUs, or processes on the CPU.

    Raises:
        CrowdExitError: anything wrong with recipe, data or folder, before training starts.
    """
    console = console or Console(stderr=True)
    last = out / LAST
    if last.exists() and not resume:
        raise TrainingError(f"{out}: there is a run already; --resume goes on with it")
    keep_freed_memory()
    L.seed_everything(recipe.seed, workers=True, verbose=False)
    torch.set_float32_matmul_precision("high")
    data = CrowdData(recipe, zoo.build(zoo.Spec(recipe.model, changes=recipe.changes)).config.size)
    L.seed_everything(recipe.seed, workers=True, verbose=False)
    experiment = make_experiment(recipe, out, data.median)
    out.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
        trainer = L.Trainer(
            accelerator=accelerator,
            devices=devices,
            strategy=_strategy(recipe, devices),
            precision=recipe.precision,
            max_epochs=recipe.epochs,
            gradient_clip_val=recipe.optimiser.clip if recipe.stage != "branches" else None,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            log_every_n_steps=10,
            enable_model_summary=False,
            logger=TensorBoardLogger(out, name=None, version="tensorboard"),
            plugins=[_WholeFiles()],
            callbacks=[
                ModelCheckpoint(out, filename="last", enable_version_counter=False, save_on_train_epoch_end=True),
                _Lines(console),
                *([RichProgressBar()] if console.is_terminal else []),
            ],
            enable_progress_bar=console.is_terminal,
        )
        trainer.fit(experiment, data, ckpt_path=last if last.exists() else None, weights_only=True)
    if trainer.interrupted:
        raise KeyboardInterrupt
    return out / "model.safetensors"
