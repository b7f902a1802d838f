"""From a recipe to a trained checkpoint: data, Lightning's trainer, resuming."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from datetime import timedelta
from functools import partial
from io import BytesIO
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import lightning as L
import torch
from filelock import FileLock, Timeout
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.console import Console
from torch import Tensor
from torch.utils.data import default_collate

from crowdexit.data.augment import Conditions
from crowdexit.data.dataset import CrowdDataset
from crowdexit.errors import CrowdExitError
from crowdexit.models import zoo
from crowdexit.models.backbones.weights import apply_weights
from crowdexit.models.network import FINAL, MultiExitNetwork
from crowdexit.training.branches import BranchTraining, add_branches, trials
from crowdexit.training.cache import CachedDataset, FeatureCache
from crowdexit.training.data import RecipeData, class_names, make_data
from crowdexit.training.fit import fit_exits
from crowdexit.training.joint import JointTraining
from crowdexit.training.losses import Batch
from crowdexit.training.modules import BackboneTraining, Diverged, Experiment, TrainingError
from crowdexit.training.norms import start_norms
from crowdexit.training.recipe import Recipe
from crowdexit.utils.checksum import checksum
from crowdexit.utils.files import atomic_write, sync, write_problem
from crowdexit.utils.machine import has_bfloat16
from crowdexit.utils.memory import keep_freed_memory

LAST, BEFORE = "last.ckpt", "before-last.ckpt"  # checkpoints of the last two epochs
_TRAILER = b"crowdexit crc32 "  # after a checkpoint's data, followed by its checksum in 8 hex digits


class RunCheckpoints(TorchCheckpointIO):
    """Lightning's last two checkpoints, with checksums, synced to disk before they are renamed into place."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint; the previous one becomes :data:`BEFORE`.

        Raises:
            TrainingError: if it cannot be written; existing ones are unchanged.
        """
        path = Path(path)
        buffer = BytesIO()
        torch.save(checkpoint, buffer)
        data = buffer.getbuffer()
        try:
            with atomic_write(path, len(data)) as part:
                with part.open("wb") as file:
                    file.write(data)
                    file.write(_TRAILER + checksum(data).encode())
                sync(part)
                if path.exists():
                    path.replace(path.with_name(BEFORE))
        except OSError as error:
            kept = "the previous epoch's checkpoint is kept; free some space and resume the run"
            if not (path.exists() or path.with_name(BEFORE).exists()):
                kept = "nothing is kept"
            raise TrainingError(write_problem(path, error, needed=len(data), kept=kept)) from None

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint, verified.

        Raises:
            TrainingError: if it is damaged.
        """
        content: dict[str, Any] = torch.load(BytesIO(_verified(Path(path))), map_location or "cpu", weights_only=True)
        return content


def _verified(path: Path) -> memoryview:
    """The data of a run's checkpoint, without its trailer.

    Raises:
        TrainingError: if it cannot be read, or is damaged.
    """
    try:
        content = memoryview(path.read_bytes())
    except OSError as error:
        raise TrainingError(f"{path}: cannot be read ({error.strerror})") from None
    size = len(content) - len(_TRAILER) - 8
    if size < 0 or bytes(content[size:]) != _TRAILER + checksum(content[:size]).encode():
        what = "its checksum does not match" if size > 0 else f"it has {len(content)} bytes"
        raise TrainingError(f"{path}: damaged ({what})")
    return content[:size]


def checkpoint_to_resume(out: Path, console: Console) -> Path | None:
    """The newest undamaged checkpoint of a run, or None without any; damaged ones are reported.

    Raises:
        TrainingError: if all are damaged.
    """
    damaged: list[str] = []
    for path in (out / LAST, out / BEFORE):
        if not path.exists():
            continue
        try:
            _verified(path)
        except TrainingError as error:
            damaged.append(str(error))
            continue
        if damaged:
            console.print(f"{damaged[0]}; going on from {path.name}, an epoch before", highlight=False, soft_wrap=True)
            with suppress(OSError):  # so that the next checkpoint does not replace the good one
                (out / LAST).replace(out / f"{LAST}.damaged")
        return path
    if damaged:
        raise TrainingError(f"{damaged[0]}, and there is no other checkpoint; delete {out} and train again")
    return None


class _Lines(Callback):
    """One progress line per epoch, with the time left."""

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
    """SIGTERM ends the run at once, like Ctrl-C; Lightning would finish the batch and exit with 0."""

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if threading.current_thread() is not threading.main_thread():
            return

        def stop(number: int, _: FrameType | None) -> None:
            if trainer.strategy.launcher is not None:
                trainer.strategy.launcher.kill(number)  # child processes
            raise SIGTERMException

        signal.signal(signal.SIGTERM, stop)  # Lightning restores the former handler


def starting_network(recipe: Recipe) -> tuple[MultiExitNetwork, zoo.Spec]:
    """The recipe's initial network without its new exits, and the description with them.

    Raises:
        CrowdExitError: for a model, a checkpoint or weights that do not fit.
    """
    added = tuple(zoo.ExitSpec(e.name, e.place, e.kind, e.options) for e in recipe.exits)
    if recipe.start is None:
        network = zoo.build(zoo.Spec(recipe.model, changes=recipe.changes))
        if recipe.senses is not None:
            start_senses(network, recipe.senses)
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


def start_senses(network: MultiExitNetwork, model: str) -> None:
    """Load a transformer's audio encoder and VGG stem from an AudioCSRNet.

    Raises:
        CrowdExitError: if it is no transformer with these, or the other is no AudioCSRNet of equal widths.
    """
    path = zoo.checkpoint_path(model)
    parts = network.parts_of_audiocsrnet
    if not parts or not zoo.read_spec(path).model.startswith("audiocsrnet"):
        raise TrainingError(
            f"senses: a transformer with an audio encoder or a VGG stem takes them from an AudioCSRNet, not {path}"
        )
    read = zoo.read_tensors(path)
    named = {
        ours + key.removeprefix(theirs): v
        for ours, theirs in parts.items()
        for key, v in read.items()
        if key.startswith(theirs)
    }
    own = network.state_dict().keys()
    wanted = {key: value for key, value in named.items() if key in own}
    zoo.fill(network, wanted, str(path), optional=lambda key: not key.startswith(tuple(parts)))


def start_branches(network: MultiExitNetwork, recipe: Recipe, path: Path) -> None:
    """Load the recipe's branches from another checkpoint.

    Raises:
        CrowdExitError: if it lacks one, or has another branch under that name.
    """
    path = zoo.checkpoint_path(path)
    there = zoo.read_spec(path).exits
    for e in recipe.exits:
        if zoo.ExitSpec(e.name, e.place, e.kind, e.options) not in there:
            raise TrainingError(f"{path}: no branch {e.name!r} of kind {e.kind} at {e.place}")
    read = zoo.read_tensors(path)
    tensors: dict[str, Tensor] = {}
    for trial in trials(recipe):
        theirs = f"branches.{trial.exit.name}."
        own = {key.removeprefix(theirs): value for key, value in read.items() if key.startswith(theirs)}
        tensors |= {f"branches.{trial.name}.{key}": value for key, value in own.items()}
    new = tuple(f"branches.{trial.name}." for trial in trials(recipe))
    zoo.fill(network, tensors, str(path), optional=lambda key: not key.startswith(new))


def start_exits(network: MultiExitNetwork, recipe: Recipe) -> None:
    """Load the recipe's exits that start from another exit of the checkpoint.

    Raises:
        CrowdExitError: if the checkpoint has no such exit, or one of another shape.
    """
    wanted = [trial for trial in trials(recipe) if trial.exit.start is not None]
    if not wanted or recipe.start is None:
        return
    path = zoo.checkpoint_path(recipe.start)
    read = zoo.read_tensors(path)
    tensors: dict[str, Tensor] = {}
    for trial in wanted:
        theirs = f"branches.{trial.exit.start}."
        found = {key.removeprefix(theirs): value for key, value in read.items() if key.startswith(theirs)}
        if not found:
            raise TrainingError(f"{path}: it has no exit {trial.exit.start!r} for {trial.exit.name!r} to start from")
        tensors |= {f"branches.{trial.name}.{key}": value for key, value in found.items()}
    new = tuple(f"branches.{trial.name}." for trial in wanted)
    # Audio fusion starts as the identity, context at zero.
    fresh = (".fuse.", ".context.")
    zoo.fill(
        network,
        tensors,
        str(path),
        optional=lambda key: not key.startswith(new) or any(part in key for part in fresh),
    )


def start_rest(network: MultiExitNetwork, recipe: Recipe) -> None:
    """Layer-wise: initialise the stages after the first branch, and the final exit.

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


def make_experiment(
    network: MultiExitNetwork, spec: zoo.Spec, recipe: Recipe, out: Path, median_count: float
) -> Experiment:
    """The initial network in the training loop of the recipe's stage.

    Args:
        median_count: count at which branches start.

    Raises:
        TrainingError: for an exit that does not fit, stage one of a network without a density map, or stage two
            of one without its dense layer.
    """
    add_branches(network, recipe, median_count)
    if recipe.branches_from is not None:
        start_branches(network, recipe, recipe.branches_from)
    start_exits(network, recipe)
    _check_loss(network, recipe)
    if recipe.stage == "branches":
        return BranchTraining(network, spec, recipe, out)
    if recipe.stage in ("end-to-end", "layer-wise"):
        start_rest(network, recipe)
        return JointTraining(network, spec, recipe, out)
    if recipe.stage == "density" and not network.final.has_density:
        raise TrainingError(f"{recipe.model} makes no density map: its stage is 'count'")
    if recipe.stage == "count" and not network.final.has_count_weights:
        raise TrainingError("stage two needs the regressor: set changes: {regressor: true}")
    return BackboneTraining(network, spec, recipe, out)


def _check_loss(network: MultiExitNetwork, recipe: Recipe) -> None:
    """Check that densities are non-negative for the Poisson likelihood.

    Raises:
        TrainingError: for the loss ``poisson`` if an exit outputs negative density.
    """
    if recipe.loss == "poisson":
        for name in network.exit_names:
            if getattr(network.exit_module(name), "activation", None) == "none":
                raise TrainingError(
                    f"poisson: the density of the exit {name!r} can be negative; "
                    "set changes: {density_activation: softplus}"
                )


def some_batches(recipe: Recipe, data: RecipeData) -> Iterator[Batch]:
    """The first samples of the plan, as many as exits are fitted to, without degradations."""
    whole = data.train_set
    assert isinstance(whole, CrowdDataset)
    lit = CrowdDataset(whole.store, whole.split, whole.ids, replace(whole.setting, conditions=Conditions()), whole.seed)
    return _first_batches(lit, recipe, data, recipe.fit)


def _first_batches(dataset: Any, recipe: Recipe, data: RecipeData, samples: int) -> Iterator[Batch]:
    """The first samples of the plan from a data set."""
    plan = data.plan().plan()[:samples]
    for start in range(0, len(plan), recipe.batch):
        yield default_collate([dataset[key] for key in plan[start : start + recipe.batch]])


def keep_features(recipe: Recipe, experiment: BranchTraining, data: RecipeData, folder: Path) -> FeatureCache:
    """Set up the recipe's feature cache between data and branches.

    Raises:
        TrainingError: if the folder is unusable.
    """
    assert recipe.cache is not None
    assert recipe.data.views is not None
    assert not isinstance(data.train_set, CachedDataset)
    network = experiment.network
    cache = FeatureCache(
        folder,
        network,
        data.train_set,
        views=recipe.data.views,
        places={network.stage_of(name) for name in experiment.names},
        limit=int(recipe.cache.gigabytes * 1e9),
        precision=_precision(recipe),
    )
    data.train_set = CachedDataset(data.train_set, cache)
    experiment.train()
    return cache


def _precision(recipe: Recipe) -> Literal["bf16-mixed", "32-true"]:
    """The recipe's precision, else bfloat16 if the hardware supports it (emulation is far slower than float32)."""
    if recipe.precision != "auto":
        return recipe.precision
    return "bf16-mixed" if has_bfloat16() or torch.cuda.is_available() else "32-true"


def _processes(devices: int) -> tuple[int, int]:
    """(processes per machine, machines): as requested, or as started by torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return devices, 1
    here = int(os.environ["LOCAL_WORLD_SIZE"])
    return here, int(os.environ["WORLD_SIZE"]) // here


def _one_line(error: CrowdExitError) -> CrowdExitError:
    """The same error without the traceback of a data-loading worker."""
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

    With several learning rates, branches try all at once; other stages train one after the other, in
    ``OUT/lr-RATE``.

    Args:
        out: folder of the run: the checkpoint, Lightning's ``last.ckpt`` (each epoch) and ``before-last.ckpt`` (of
            the epoch before), TensorBoard's events.
        resume: continue from ``last.ckpt``, if there is one; if damaged, from the one before.
        devices: GPUs, or processes on the CPU. Those after the first run the calling script again; under
            torchrun its processes are used.

    Raises:
        CrowdExitError: for an unusable recipe, data or folder, or a run that diverged.
        KeyboardInterrupt: on Ctrl-C; SystemExit with 143 on SIGTERM. At most the running epoch is lost.
    """
    console = console or Console(stderr=True)
    if recipe.optimiser.rates and recipe.stage != "branches":
        here, machines = _processes(devices)
        if here * machines > 1:
            raise TrainingError("learning rates are tried one after the other by one process: no --devices")
        return _best_rate(recipe, out, resume, devices, accelerator, console)
    model = out / "model.safetensors"
    devices, machines = _processes(devices)
    first = os.environ.get("LOCAL_RANK", "0") == "0" and os.environ.get("GROUP_RANK", "0") == "0"
    if first and not resume and any(path.exists() for path in (out / LAST, out / BEFORE, model)):
        raise TrainingError(f"{out}: already holds a run; continue it with --resume")
    if recipe.batch % (devices * machines):
        raise TrainingError(f"a batch of {recipe.batch} cannot be shared evenly by {devices * machines} processes")
    keep_freed_memory()
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_float32_matmul_precision("high")
    L.seed_everything(recipe.seed, workers=True, verbose=False)
    names: list[str] = []
    if recipe.loss == "cross-entropy":
        names = class_names(recipe)
        recipe = recipe.model_copy(update={"changes": {**recipe.changes, "outputs": len(names)}})
    network, spec = starting_network(recipe)
    if names:
        spec = replace(spec, meta={**spec.meta, "classes": names})
    data = make_data(recipe, network)
    if data.note:
        console.print(data.note, highlight=False)
    if len(data.val_set) < devices * machines:
        raise TrainingError(f"fewer validation samples ({len(data.val_set)}) than processes")
    L.seed_everything(recipe.seed, workers=True, verbose=False)
    experiment = make_experiment(network, spec, recipe, out, data.median_count)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"{out}: cannot create the folder ({error.strerror})") from None
    with _alone(out) if first else nullcontext():
        _fit(recipe, experiment, data, out, resume, devices, machines, accelerator, console)
    return model


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Lock a run's folder for this process.

    Raises:
        TrainingError: if another process has locked it.
    """
    try:
        with FileLock(out / "training.lock", timeout=0):
            yield
    except Timeout:
        raise TrainingError(f"{out}: another training is writing to it") from None


def _fit(
    recipe: Recipe,
    experiment: Experiment,
    data: RecipeData,
    out: Path,
    resume: bool,
    devices: int,
    machines: int,
    accelerator: str,
    console: Console,
) -> None:
    """Initialise the exits, and train with Lightning."""
    network = experiment.network
    last = checkpoint_to_resume(out, console) if resume else None
    if last is not None and (out / "model.safetensors").exists():
        _check_best(out / "model.safetensors")
    if recipe.fit and last is None:
        with torch.autocast("cpu", torch.bfloat16, enabled=_precision(recipe) == "bf16-mixed"):
            names = [trial.name for trial in trials(recipe)] or [FINAL]
            fit_exits(network, names, partial(some_batches, recipe, data), recipe)
        experiment.train()
    if recipe.norm_batches and last is None:
        samples = recipe.norm_batches * recipe.batch
        with torch.autocast("cpu", torch.bfloat16, enabled=_precision(recipe) == "bf16-mixed"):
            start_norms(network, partial(_first_batches, data.train_set, recipe, data, samples))
        experiment.train()
    if recipe.cache is not None and isinstance(experiment, BranchTraining):
        if devices * machines > 1:
            raise TrainingError("the feature cache is filled by one process: no --devices")
        experiment.cache = keep_features(recipe, experiment, data, recipe.cache.folder or out / "features")
    strategy: Any = "auto"
    if devices * machines > 1:
        # Buffers are averaged before each validation. Stopped branches do not run.
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
            precision=_precision(recipe),
            max_epochs=recipe.epochs * (len(experiment.phases) if isinstance(experiment, JointTraining) else 1),
            gradient_clip_val=recipe.optimiser.clip if recipe.stage != "branches" else None,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            log_every_n_steps=10,
            enable_model_summary=False,
            logger=TensorBoardLogger(out, name=None, version="tensorboard"),
            plugins=[RunCheckpoints()],
            callbacks=[
                ModelCheckpoint(out, filename="last", enable_version_counter=False, save_on_train_epoch_end=True),
                _Lines(console),
                _Termination(),
                *([bar] if console.is_terminal else []),
            ],
            enable_progress_bar=console.is_terminal,
        )
        try:
            trainer.fit(experiment, data, ckpt_path=last, weights_only=True)
        except SIGTERMException:
            raise SystemExit(128 + signal.SIGTERM) from None
        except SystemExit:
            if trainer.interrupted:  # what Lightning makes of Ctrl-C
                raise KeyboardInterrupt from None
            raise
        except CrowdExitError as error:
            raise _one_line(error) from None
        except OSError as error:  # of what Lightning writes besides checkpoints
            raise TrainingError(write_problem(out, error, kept="the last checkpoint is kept")) from None


def _check_best(model: Path) -> None:
    """Refuse to resume a run whose best network so far is damaged.

    Raises:
        TrainingError: if it is.
    """
    try:
        zoo.read_spec(model)
        zoo.read_tensors(model)
    except zoo.ZooError as error:
        raise TrainingError(f"{error}; it is the best network so far: delete {model.parent} and train again") from None


def _best_rate(recipe: Recipe, out: Path, resume: bool, devices: int, accelerator: str, console: Console) -> Path:
    """Train with each learning rate, and return the checkpoint with the best validation error."""
    model = out / "model.safetensors"
    if model.exists():
        if not resume:
            raise TrainingError(f"{out}: already holds a run; continue it with --resume")
        _check_best(model)
        return model
    errors: dict[Path, float] = {}
    for rate in recipe.optimiser.rates:
        part = recipe.optimiser.model_copy(update={"lr": rate, "rates": ()})
        console.print(f"learning rate {rate:g}", highlight=False)
        one = recipe.model_copy(update={"optimiser": part})
        try:
            path = train(
                one, out / f"lr-{rate:g}", resume=resume, devices=devices, accelerator=accelerator, console=console
            )
        except Diverged as error:
            console.print(str(error), highlight=False)
            continue
        errors[path] = float(zoo.read_spec(path).meta["error"])
    if not errors:
        raise TrainingError("the network diverged with every learning rate")
    best = min(errors, key=lambda path: errors[path])
    console.print(f"{best.parent.name} is the best, error {errors[best]:.4g}", highlight=False)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        try:
            with atomic_write(model, best.stat().st_size) as part_file:
                shutil.copyfile(best, part_file)
        except OSError as error:
            raise TrainingError(write_problem(model, error, kept=f"it is kept as {best}")) from None
    return model
