"""From a recipe to a trained checkpoint: data, Lightning's trainer, resuming."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
import warnings
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.console import Console
from torch.utils.data import DataLoader, Subset

from crowdexit import zoo
from crowdexit.backbones.audiocsrnet import AudioCSRNet
from crowdexit.backbones.weights import apply_weights
from crowdexit.data.augment import ConditionRange, View
from crowdexit.data.dataset import CrowdDataset, EpochPlan, Setting
from crowdexit.data.store import Store
from crowdexit.errors import CrowdExitError
from crowdexit.memory import keep_freed_memory
from crowdexit.network import Config, MultiExitNetwork
from crowdexit.training.branches import BranchTraining, add_branches
from crowdexit.training.joint import JointTraining
from crowdexit.training.modules import BackboneTraining, Experiment, TrainingError
from crowdexit.training.recipe import Recipe

LAST = "last.ckpt"


class CrowdData(L.LightningDataModule):
    """The recipe's samples, dealt out to the processes so that each is seen as the plan says."""

    def __init__(self, recipe: Recipe, config: Config) -> None:
        super().__init__()
        data = recipe.data
        if data.store is None:
            raise TrainingError("no data: give a prepared file with --data")
        self.recipe = recipe
        native = config.size
        canvas = data.canvas or native
        if recipe.stage not in ("hearing", "density") and canvas != native:
            raise TrainingError(f"the stage {recipe.stage!r} needs the model's native size as canvas")
        view = None if data.whole else View(canvas, config.scene, data.scale, data.flip, data.jitter)
        setting = Setting(
            canvas,
            view,
            flip=data.flip,
            takes=True,
            conditions=ConditionRange(**data.conditions.model_dump()),
            hear=1.0 if recipe.stage == "hearing" else data.hear,
            stride=data.stride,
        )
        with Store(data.store) as store:
            ids = store.ids(data.train, data.train_ids)
            counts = store.counts(data.train)
            val_ids = store.ids(data.val, data.val_ids)
            if recipe.stage == "hearing" and not any("log_mel" in store.file[data.val][id] for id in val_ids):
                raise TrainingError(f"{data.store}: no sample of {data.val} has sound to validate with")
            for id in ids:
                sample = store.file[data.train][id]
                if recipe.stage == "hearing" and "log_mel" not in sample:
                    raise TrainingError(f"{data.store}: {data.train}/{id} has no sound to learn from")
                if not data.whole and "density" in sample and len(sample["points"]) == 0 and counts[id] > 0:
                    raise TrainingError(
                        f"{data.store}: {data.train}/{id} has only a density map and cannot be cropped; "
                        "set data.whole: true"
                    )
        self.median = float(np.median([counts[id] for id in ids]))
        self.train_set = CrowdDataset(store, data.train, ids, setting, recipe.seed)
        self.val_set = CrowdDataset(store, data.val, val_ids, Setting(native, tiles=config.view == "tiles"))

    def _processes(self) -> tuple[int, int]:
        trainer = self.trainer
        return (trainer.global_rank, trainer.world_size) if trainer else (0, 1)

    def plan(self) -> EpochPlan:
        """This process's part of each epoch."""
        rank, world = self._processes()
        data, seed = self.recipe.data, self.recipe.seed
        return EpochPlan(self.train_set.ids, balance=data.balance, length=data.draws, seed=seed, rank=rank, world=world)

    def train_dataloader(self) -> DataLoader[Any]:
        workers, (_, world) = self.recipe.data.workers, self._processes()
        return DataLoader(
            self.train_set,
            batch_size=self.recipe.batch // world,
            sampler=self.plan(),
            num_workers=workers,
            persistent_workers=workers > 0,
            multiprocessing_context="forkserver" if workers else None,
        )

    def val_dataloader(self) -> DataLoader[Any]:
        rank, world = self._processes()
        mine = Subset(self.val_set, range(rank, len(self.val_set), world))
        # Pictures differ in their number of tiles.
        return DataLoader(mine, batch_size=1 if self.val_set.setting.tiles else 4, num_workers=0)


class _WholeFiles(TorchCheckpointIO):
    """Lightning's checkpoints, renamed into place: a kill while writing leaves the one before."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        part = Path(f"{path}.part")
        super().save_checkpoint(checkpoint, part, storage_options)
        part.replace(path)


class _Lines(Callback):
    """One line an epoch with the time left, for logs and for the record."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.started, self.first = 0.0, 0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.started, self.first = time.monotonic(), trainer.current_epoch

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not trainer.is_global_zero or not isinstance(module, Experiment):
            return
        done, epochs = trainer.current_epoch + 1, trainer.max_epochs or 0
        left = (time.monotonic() - self.started) / (done - self.first) * (epochs - done)
        self.console.print(
            f"epoch {done}/{epochs}  {module.summary}  {timedelta(seconds=round(left))} left",
            soft_wrap=True,
            highlight=False,
        )


class _Termination(Callback):
    """SIGTERM ends the run at once, like Ctrl-C; Lightning would wait for the end of a batch and leave with 0."""

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if threading.current_thread() is not threading.main_thread():
            return

        def stop(number: int, _: FrameType | None) -> None:
            if trainer.strategy.launcher is not None:
                trainer.strategy.launcher.kill(number)  # the processes that this one started
            raise SIGTERMException

        signal.signal(signal.SIGTERM, stop)  # Lightning restores the former handler


def starting_network(recipe: Recipe) -> tuple[MultiExitNetwork, zoo.Spec]:
    """The network that the recipe starts from, without its new exits, and the description with them.

    Raises:
        CrowdExitError: for a model, a checkpoint or weights that do not fit.
    """
    added = tuple(zoo.ExitSpec(e.name, e.place, e.kind) for e in recipe.exits)
    if recipe.start is None:
        network = zoo.build(zoo.Spec(recipe.model, changes=recipe.changes))
        if recipe.weights:
            apply_weights(network, recipe.weights)
        elif recipe.stage == "branches":
            raise TrainingError("classifier-wise training needs a trained backbone: set start")
        return network, zoo.Spec(recipe.model, added, recipe.changes)
    path = zoo.checkpoint_path(recipe.start)
    begun = zoo.read_spec(path)
    if begun.model != recipe.model:
        raise TrainingError(f"{path}: weights of {begun.model}, but the recipe trains {recipe.model}")
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
    return network, spec


def start_branches(network: MultiExitNetwork, recipe: Recipe, path: Path) -> None:
    """Fill the recipe's branches from those that stand on another checkpoint.

    Raises:
        CrowdExitError: if it lacks one, or has another branch under that name.
    """
    path = zoo.checkpoint_path(path)
    there = zoo.read_spec(path).exits
    for e in recipe.exits:
        if zoo.ExitSpec(e.name, e.place, e.kind) not in there:
            raise TrainingError(f"{path}: it has no branch {e.name!r} of kind {e.kind} at {e.place}")
    own = tuple(f"branches.{e.name}." for e in recipe.exits)
    tensors = {key: value for key, value in zoo.read_tensors(path).items() if key.startswith(own)}
    zoo.fill(network, tensors, str(path), optional=lambda key: not key.startswith(own))


def start_rest(network: MultiExitNetwork, recipe: Recipe) -> None:
    """Layer-wise: what the stages behind the first branch, and the final exit, start from.

    Raises:
        CrowdExitError: for a checkpoint of another architecture.
    """
    if recipe.rest == "kept":
        return
    if recipe.rest == "fresh":
        other = zoo.build(zoo.Spec(recipe.model, changes=recipe.changes))
    else:
        other, _ = zoo.load(recipe.rest)
    first = min(network.stage_of(e.name) for e in recipe.exits) + 1
    behind = (*(f"stages.{index}." for index in range(first, len(network.stages))), "final.")
    tensors = {key: value for key, value in other.state_dict().items() if key.startswith(behind)}
    zoo.fill(network, tensors, str(recipe.rest), optional=lambda key: not key.startswith(behind))


def make_experiment(network: MultiExitNetwork, spec: zoo.Spec, recipe: Recipe, out: Path, median: float) -> Experiment:
    """The starting network in the loop that the recipe's stage wants.

    Args:
        median: count of the training pictures, at which branches start.

    Raises:
        TrainingError: for an exit that does not fit, stage one of a network without a density map, or stage two
            of one without its dense layer.
    """
    add_branches(network, recipe, median)
    if recipe.branches_from is not None:
        start_branches(network, recipe, recipe.branches_from)
    if recipe.stage == "branches":
        return BranchTraining(network, spec, recipe, out)
    if recipe.stage in ("end-to-end", "layer-wise"):
        start_rest(network, recipe)
        return JointTraining(network, spec, recipe, out)
    if recipe.stage == "density" and not isinstance(network, AudioCSRNet):
        raise TrainingError(f"{recipe.model} makes no density map: its stage is 'count'")
    if recipe.stage == "count" and isinstance(network, AudioCSRNet) and network.final.regressor is None:
        raise TrainingError("stage two needs the regressor: set changes: {regressor: true}")
    return BackboneTraining(network, spec, recipe, out)


def _processes(devices: int) -> tuple[int, int]:
    """(processes a machine, machines): as asked for, or as torchrun has started them."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return devices, 1
    here = int(os.environ["LOCAL_WORLD_SIZE"])
    return here, int(os.environ["WORLD_SIZE"]) // here


def _one_line(error: CrowdExitError) -> CrowdExitError:
    """The same error without the trace that a data-loading worker sends along."""
    last = str(error).strip().splitlines()[-1]
    kind, _, message = last.partition(": ")
    return type(error)(message if kind.endswith(type(error).__name__) else last)


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
        devices: GPUs, or processes on the CPU. Those after the first run the calling script anew; under
            torchrun its processes are taken.

    Raises:
        CrowdExitError: anything wrong with recipe, data or folder, or a run that came to nothing.
        KeyboardInterrupt: on Ctrl-C; SystemExit with 143 on SIGTERM. At most the running epoch is lost.
    """
    console = console or Console(stderr=True)
    last, model = out / LAST, out / "model.safetensors"
    devices, machines = _processes(devices)
    first = os.environ.get("LOCAL_RANK", "0") == "0" and os.environ.get("GROUP_RANK", "0") == "0"
    if first and not resume and (last.exists() or model.exists()):
        raise TrainingError(f"{out}: there is a run already; --resume goes on with it")
    if recipe.batch % (devices * machines):
        raise TrainingError(f"a batch of {recipe.batch} cannot be shared evenly by {devices * machines} processes")
    keep_freed_memory()
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_float32_matmul_precision("high")
    L.seed_everything(recipe.seed, workers=True, verbose=False)
    network, spec = starting_network(recipe)
    data = CrowdData(recipe, network.config)
    if len(data.val_set) < devices * machines:
        raise TrainingError(f"fewer validation samples ({len(data.val_set)}) than processes")
    L.seed_everything(recipe.seed, workers=True, verbose=False)
    experiment = make_experiment(network, spec, recipe, out, data.median)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"{out}: no folder can be made there ({error.strerror})") from None
    strategy: Any = "auto"
    if devices * machines > 1:
        # Buffers are made one before each validation. A branch that has stopped takes no part in the pass.
        strategy = DDPStrategy(broadcast_buffers=False, find_unused_parameters=bool(recipe.exits))
    bar = RichProgressBar(refresh_rate=1, console_kwargs={"stderr": console.stderr})
    with warnings.catch_warnings():
        # Lightning's advice on workers, logging intervals and the like.
        for category in (UserWarning, DeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)
        trainer = L.Trainer(
            accelerator=accelerator,
            devices=devices,
            num_nodes=machines,
            strategy=strategy,
            precision=recipe.precision,
            max_epochs=recipe.epochs * (len(experiment.phases) if isinstance(experiment, JointTraining) else 1),
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
                _Termination(),
                *([bar] if console.is_terminal else []),
            ],
            enable_progress_bar=console.is_terminal,
        )
        try:
            trainer.fit(experiment, data, ckpt_path=last if resume and last.exists() else None, weights_only=True)
        except SIGTERMException:
            raise SystemExit(128 + signal.SIGTERM) from None
        except SystemExit:
            if trainer.interrupted:  # what Lightning makes of Ctrl-C
                raise KeyboardInterrupt from None
            raise
        except CrowdExitError as error:
            raise _one_line(error) from None
    return model
