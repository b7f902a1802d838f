"""Lightning modules: the base of all training loops, and the training of backbones."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Self, cast

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from crowdexit.errors import CrowdExitError
from crowdexit.models import zoo
from crowdexit.models.backbones.fronts import AudioEncoder
from crowdexit.models.network import FINAL, MultiExitNetwork
from crowdexit.models.stages import Exit, Features, inputs
from crowdexit.training.depthwise import QuickFrozenDepthwise, is_depthwise
from crowdexit.training.losses import Batch, density_loss, exit_loss, value_loss
from crowdexit.training.recipe import OptimiserPart, Recipe


class TrainingError(CrowdExitError):
    """A run that cannot start or continue."""


class Diverged(TrainingError):
    """A run whose network no longer returns finite values."""


def record(batch: Batch) -> Features:
    """The network's input of a collated batch, channels last; tiles of one image form a batch."""
    image, log_mel, has_audio, valid_mask = (batch.get(key) for key in ("image", "log_mel", "has_audio", "valid_mask"))
    assert image is not None
    if log_mel is None or has_audio is None or valid_mask is None:  # images of classes
        return inputs(image.contiguous(memory_format=torch.channels_last))
    if image.dim() == 5:  # B×T×3×H×W
        tiles = image.shape[1]
        image, valid_mask = image.flatten(0, 1), valid_mask.flatten(0, 1)
        log_mel, has_audio = log_mel.repeat_interleave(tiles, 0), has_audio.repeat_interleave(tiles, 0)
    return inputs(image.contiguous(memory_format=torch.channels_last), log_mel, has_audio, valid_mask)


def of_images(values: Tensor, batch: Batch) -> Tensor:
    """Counts B of the batch's images, summed over their tiles; class scores B×K are unchanged."""
    return values.view(len(batch["id"]), -1).sum(1) if values.dim() == 1 else values


def truth(batch: Batch) -> Tensor:
    """The targets of a batch: counts B, or classes B."""
    return cast(Tensor, batch["label"] if "label" in batch else batch["count"])


def with_and_without_audio(network: MultiExitNetwork, features: Features) -> dict[str, Features]:
    """The record after the first stage, with and without audio.

    A purely visual first stage runs only once.
    """
    seen = network.stages[0](features)
    silence = torch.zeros_like(features.has_audio)
    if network.stages[0] is network.audio_encoder:
        return {"sound": seen, "silent": network.stages[0](replace(features, has_audio=silence))}
    return {"sound": seen, "silent": replace(seen, has_audio=silence)}


def validated(
    network: MultiExitNetwork, batch: Batch, exits: Mapping[str, Exit], stage_of: Callable[[str], int], watch: str
) -> Iterator[tuple[str, list[str], Tensor, Tensor]]:
    """The outputs of exits for a batch in the watched condition, see :class:`Recipe`.

    Parts that do not depend on audio are computed and, with ``mean``, counted once.

    Yields:
        arguments of :meth:`Validation.add`: an exit's name, and for N samples their ids, counts N or class scores N×K,
        and the truth N. With ``audio``, only samples with audio.
    """
    features = record(batch)
    ids, true = batch["id"], truth(batch)
    some = batch["has_audio"] if watch == "audio" else torch.ones_like(true, dtype=torch.bool)
    if not some.any():
        return
    ids = [id for id, wanted in zip(ids, some.tolist(), strict=True) if wanted]
    both = with_and_without_audio(network, features)
    if watch == "audio":
        ways = [both["sound"]]
    elif watch == "mean" and features.has_audio.any():
        ways = list(both.values())
    else:
        ways = [both["silent"]]
    for stage in range(max(map(stage_of, exits)) + 1):
        if stage and network.final_uses_audio and network.stages[stage].uses_audio:
            ways = [network.stages[stage](way) for way in ways]
        elif stage:
            seen = network.stages[stage](ways[0])
            ways = [replace(seen, has_audio=way.has_audio, audio=way.audio) for way in ways]
        for name, module in exits.items():
            if stage_of(name) == stage:
                for way in ways if network.final_uses_audio or module.uses_audio else ways[:1]:
                    yield name, ids, of_images(module(way).value, batch)[some], true[some]


def make_optimiser(
    parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]], part: OptimiserPart, lr: float | None = None
) -> torch.optim.Optimizer:
    """The recipe's optimiser over these parameters or groups, with another learning rate if one is given."""
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[part.name]
    out: torch.optim.Optimizer = kind(parameters, lr=lr or part.lr, weight_decay=part.weight_decay, foreach=True)
    return out


def plateau(optimiser: torch.optim.Optimizer, part: OptimiserPart) -> ReduceLROnPlateau:
    """The recipe's plateau schedule, counting epochs as Keras does.

    With a patience of 2 the rate falls after two epochs without improvement; PyTorch by itself waits for a third.
    """
    return ReduceLROnPlateau(optimiser, factor=part.factor, patience=max(part.patience - 1, 0))


def rate_factor(name: str, part: OptimiserPart) -> float:
    """The learning-rate factor of a parameter by the recipe's groups."""
    factor = 1.0
    for pattern, of_group in part.groups.items():
        if fnmatchcase(name, pattern):
            factor = of_group
    return factor


def grouped(parameters: Iterable[tuple[str, nn.Parameter]], part: OptimiserPart) -> list[dict[str, Any]]:
    """Named parameters as optimiser groups, one for each learning-rate factor; those at 0 are excluded."""
    groups: dict[float, list[nn.Parameter]] = defaultdict(list)
    for name, parameter in parameters:
        groups[rate_factor(name, part)].append(parameter)
    return [{"params": of, "lr": part.lr * factor} for factor, of in groups.items() if factor]


def freeze(network: nn.Module, recipe: Recipe) -> None:
    """Freeze parameters with learning-rate factor 0, and depthwise kernels if the recipe says so.

    Raises:
        TrainingError: for a pattern of the groups that matches nothing.
    """
    names = [name for name, _ in network.named_parameters()]
    for pattern in recipe.optimiser.groups:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise TrainingError(f"optimiser.groups: no parameter matches {pattern!r} (there are {names[0]} …)")
    for name, parameter in network.named_parameters():
        if rate_factor(name, recipe.optimiser) == 0:
            parameter.requires_grad_(False)
    if recipe.freeze_depthwise:
        for module in network.modules():
            if is_depthwise(module):
                module.get_parameter("weight").requires_grad_(False)


def rate_at(part: OptimiserPart, step: int, steps: int, epoch: int) -> float:
    """The learning-rate factor at a step out of ``steps``; plateau schedules have their own scheduler."""
    warm = min(1.0, (step + 1) / part.warmup) if part.warmup else 1.0
    if part.schedule == "cosine":
        return warm * (part.floor + (1 - part.floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))
    if part.schedule == "exponential":
        return warm * float(part.factor**epoch)
    return warm


def listed(one_or_more: Any) -> list[Any]:
    """As a list: Lightning returns a single optimiser or scheduler without one."""
    return one_or_more if isinstance(one_or_more, list) else [one_or_more]


def audio_encoder(network: MultiExitNetwork) -> AudioEncoder:
    """The network's audio encoder.

    Raises:
        TrainingError: if it has none.
    """
    encoder: AudioEncoder | None = network.audio_encoder
    if encoder is None:
        raise TrainingError("this network takes no audio: it has no audio encoder to train")
    return encoder


class Validation:
    """Collects exit outputs over an epoch and all processes, and computes metrics."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, float, float]] = []

    def add(self, name: str, ids: list[str], values: Tensor, truths: Tensor) -> None:
        """Add outputs of one exit (or audio condition) ``name``: counts B or class scores B×K, and the truth B."""
        predictions = values
        if values.dim() == 2:  # no class without finite scores
            predictions = torch.where(values.isfinite().all(1), values.argmax(1).float(), math.nan)
        self.rows += [
            (name, *row) for row in zip(ids, predictions.float().tolist(), truths.float().tolist(), strict=True)
        ]

    def collect(self) -> dict[str, dict[str, float]]:
        """The metrics of :meth:`table` by name; clears the collected outputs."""
        rows = self.rows
        if dist.is_available() and dist.is_initialized():
            everywhere: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everywhere, rows)
            rows = [row for part in everywhere for row in part]
        self.rows = []
        by_name: dict[str, list[tuple[str, float, float]]] = defaultdict(list)
        for name, *row in sorted(rows):  # metrics do not depend on the distribution over processes
            by_name[name].append(cast(Any, row))
        return {name: self.table(of_name) for name, of_name in by_name.items()}

    def table(self, rows: list[tuple[str, float, float]]) -> dict[str, float]:
        """Metrics of (id, output, truth), including ``error``, which selects the best network."""
        raise NotImplementedError  # abstract


class CountValidation(Validation):
    """``mae/GROUP`` for each group of ids, and ``error``, the groups' mean of MAE over mean count.

    A group is the prefix of an id before the first ``_`` (the part of a data set), or ``all``.
    """

    def table(self, rows: list[tuple[str, float, float]]) -> dict[str, float]:
        groups: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for id, count, true in rows:
            groups[id.split("_")[0] if "_" in id else "all"].append((count, true))
        table, relative = {}, []
        for group, pairs in sorted(groups.items()):
            mae = sum(abs(c - t) for c, t in pairs) / len(pairs)
            table[f"mae/{group}"] = mae
            relative.append(mae / max(sum(t for _, t in pairs) / len(pairs), 1.0))
        return {**table, "error": sum(relative) / len(relative)}


class ClassValidation(Validation):
    """``accuracy`` in percent, and ``error``, the share of wrong classes; not finite if some score is not."""

    def table(self, rows: list[tuple[str, float, float]]) -> dict[str, float]:
        wrong = sum(predictions != true for _, predictions, true in rows) / len(rows)
        if any(math.isnan(predictions) for _, predictions, _ in rows):
            wrong = math.nan
        return {"accuracy": 100 * (1 - wrong), "error": wrong}


_CONDITIONS = {"audio": "sound", "no-audio": "silent"}  # names in recipes → in the validation
_SHOWN = {"sound": "with audio", "silent": "without audio"}  # on the console
_NAMED = 12  # exits on the progress line


class Experiment(L.LightningModule):
    """Base of all training loops: the network, its description, the output folder and the best result so far.

    ``OUT/model.safetensors`` always holds the best network by validation.
    """

    def __init__(self, network: MultiExitNetwork, spec: zoo.Spec, recipe: Recipe, out: Path) -> None:
        super().__init__()
        self.network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.spec, self.recipe, self.out = spec, recipe, out
        self.average: AveragedModel | None = None
        self.validation = ClassValidation() if recipe.loss == "cross-entropy" else CountValidation()
        self.summary = ""

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.keep_norms()
        return self

    def keep_norms(self) -> None:
        """Keep batch normalisations in evaluation mode if the recipe freezes them."""
        if self.recipe.norms == "frozen":
            for module in self.network.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()

    def quick_depthwise(self) -> AbstractContextManager[Any]:
        """The context of the forward pass of a training step."""
        return QuickFrozenDepthwise() if self.recipe.freeze_depthwise else nullcontext()

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip each parameter group separately, as new exits have larger gradients than a pretrained backbone."""
        if gradient_clip_val:
            for group in optimizer.param_groups:
                nn.utils.clip_grad_norm_(group["params"], gradient_clip_val)

    def finished(self) -> bool:
        """Whether early stopping has ended the run."""
        raise NotImplementedError  # abstract

    def on_fit_start(self) -> None:
        # A resumed run that had stopped early has nothing to do.
        self.trainer.should_stop = self.finished()

    def with_statistics(self) -> list[nn.Module | None]:
        """The modules whose running statistics training changes."""
        return [self.network, self.average]

    def on_validation_start(self) -> None:
        if self.trainer.world_size == 1:
            return
        # The processes saw different samples: average their running statistics.
        for module in self.with_statistics():
            for buffer in module.buffers() if module is not None else ():
                if buffer.is_floating_point():
                    dist.all_reduce(buffer)
                    buffer /= self.trainer.world_size

    def log_table(self, tables: dict[str, dict[str, float]]) -> None:
        """Log all metrics, and make the progress line."""
        flat = {f"val/{name}/{key}": value for name, table in tables.items() for key, value in table.items()}
        self.log_dict(flat, rank_zero_only=True)
        first = sorted(tables, key=lambda name: tables[name]["error"])[:_NAMED]
        more = f"  … and {len(tables) - _NAMED} with more error" if len(tables) > _NAMED else ""
        named = (
            f"{_SHOWN.get(name, name)}: " + " ".join(f"{k.removeprefix('mae/')} {v:.4g}" for k, v in table.items())
            for name, table in tables.items()
            if name in first
        )
        self.summary = "  ".join(named) + more

    def write(self, network: MultiExitNetwork, error: float, **figures: Any) -> None:
        """Write the checkpoint from the first process, with the records of this and earlier runs.

        Args:
            error: the validation error. figures: metrics of the exits, by name.
        """
        if not self.trainer.is_global_zero:
            return
        of_weights = (*zoo.CALIBRATION, zoo.RANGES)
        known = {key: value for key, value in self.spec.meta.items() if key not in of_weights}
        earlier = [*known.pop("before", [])]
        if "recipe" in known:
            earlier.append({key: known.get(key) for key in ("recipe", "validation")})
        own = {"recipe": self.recipe.described(), "validation": figures, "error": error}
        meta = {**known, "before": earlier, **own}
        spec = zoo.Spec(self.spec.model, self.spec.exits, self.spec.changes, meta)
        zoo.save(network, spec, self.out / "model.safetensors")


def averaged(network: nn.Module, recipe: Recipe) -> AveragedModel | None:
    """The recipe's moving average of a network, including buffers."""
    if not recipe.ema:
        return None

    def update(averages: Any, current: Any, number: Tensor | int) -> None:
        decay = recipe.ema
        if recipe.ema_warmup:
            decay = min(decay, (1 + int(number)) / (recipe.ema_warmup + int(number)))
        get_ema_multi_avg_fn(decay)(averages, current, number)

    average = AveragedModel(network, multi_avg_fn=update, use_buffers=True)
    average.requires_grad_(False)
    return average.eval()


class PatchReadout(nn.Module):
    """A density map from patch tokens by one shared linear layer.

    Tokens B×(1+N)×D → B×1×h×w, heads per cell, spread evenly over each patch's cells.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.linear = nn.Linear(dim, 1)
        nn.init.constant_(self.linear.bias, 0.1)

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        assert features.token_grid is not None
        patches = F.relu(self.linear(self.norm(features.tokens()[:, 1:])).float()) / 100
        return F.interpolate(patches.transpose(1, 2).unflatten(2, features.token_grid), size)


class BackboneTraining(Experiment):
    """Stage zero (``hearing``), one (``density``) and two (``count``) of a backbone, or ``classes``.

    TransCrowd has ``count`` alone.
    """

    def __init__(self, network: MultiExitNetwork, spec: zoo.Spec, recipe: Recipe, out: Path) -> None:
        super().__init__(network, spec, recipe, out)
        if recipe.watch == "audio" and not network.final_uses_audio:
            raise TrainingError(f"watch: audio does not reach the final exit of {recipe.model}")
        self.best, self.best_epoch, self.stale = math.inf, -1, 0
        self.listener: nn.Module | None = None
        if recipe.stage == "hearing":
            # Auxiliary head, not saved: it lets the encoder learn features of the count.
            encoder = audio_encoder(network)
            self.listener = nn.Linear(encoder.channels, 1)
            nn.init.constant_(self.listener.bias, 5.0)  # about the logarithm of 150
            self.network.requires_grad_(False)
            encoder.trained_on_audio.requires_grad_(True)
        self.frozen: list[nn.Module] = []
        for pattern in recipe.frozen:
            modules = [
                module
                for name, module in network.named_modules()
                if fnmatchcase(name, pattern) or type(module).__name__ == pattern
            ]
            weights = [weight for name, weight in network.named_parameters() if fnmatchcase(name, pattern)]
            if not modules and not weights:
                raise TrainingError(f"frozen: the network has no {pattern!r} (it has stages.0, final.conv.weight …)")
            self.frozen += modules
            for part in (*modules, *weights):
                part.requires_grad_(False)
        freeze(network, recipe)
        # Auxiliary head, not saved: a density map from the patches, for supervision of every part of an image.
        self.readout: PatchReadout | None = None
        if recipe.local:
            if not network.token_dim:
                raise TrainingError(f"local: {recipe.model} has no patches to read counts off")
            self.readout = PatchReadout(network.token_dim)
        self.average = averaged(self.network, recipe)
        self.train()  # Lightning does not change the modes

    def train(self, mode: bool = True) -> BackboneTraining:
        super().train(mode)
        if self.listener is not None:
            self.network.eval()
            audio_encoder(self.network).trained_on_audio.train(mode)
        for module in self.frozen:
            module.eval()
        return self

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters that are trained, by name."""
        if self.listener is not None:
            trained = audio_encoder(self.network).trained_on_audio
            return [*trained.named_parameters(), *self.listener.named_parameters()]
        readout = self.readout.named_parameters("readout") if self.readout is not None else []
        return [*((name, p) for name, p in self.network.named_parameters() if p.requires_grad), *readout]

    def finished(self) -> bool:
        return self.recipe.stop is not None and self.stale >= self.recipe.stop

    def evaluated(self) -> MultiExitNetwork:
        """The averaged network, if there is one."""
        return cast(MultiExitNetwork, self.average.module) if self.average is not None else self.network

    def configure_optimizers(self) -> Any:
        part = self.recipe.optimiser
        optimiser = make_optimiser(grouped(self.trained(), part), part)
        if part.schedule == "plateau":
            scheduler = plateau(optimiser, part)
            return {"optimizer": optimiser, "lr_scheduler": {"scheduler": scheduler, "monitor": "val/error"}}
        steps = int(self.trainer.estimated_stepping_batches)
        an_epoch = max(1, steps // self.recipe.epochs)
        schedule = LambdaLR(optimiser, lambda step: rate_at(part, step, steps, step // an_epoch))
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        # Lightning steps after writing the checkpoint; plateau schedules step with the validation instead.
        if not isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step()

    def training_step(self, batch: Batch, _: int) -> Tensor:
        if self.listener is not None:
            log_count = self.listener(audio_encoder(self.network).embed(batch["log_mel"])).squeeze(1)
            loss = F.smooth_l1_loss(log_count.float(), torch.log1p(batch["total"]))
        else:
            features = record(batch)
            with self.quick_depthwise():
                for stage in self.network.stages:
                    features = stage(features)
            answer = self.network.final(features)
            if self.recipe.stage == "density":
                loss = exit_loss(answer, batch, self.recipe)
            else:
                loss = value_loss(answer.value, batch, self.recipe)
            if self.readout is not None:
                density = self.readout(features, batch["density"].shape[2:])
                loss = loss + self.recipe.local * density_loss(density, density.sum((1, 2, 3)), batch, self.recipe)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        if self.average is not None:
            self.average.update_parameters(self.network)

    def validation_step(self, batch: Batch, _: int) -> None:
        network = self.evaluated().eval()
        if self.listener is not None:
            counts = torch.expm1(self.listener(audio_encoder(network).embed(batch["log_mel"])).squeeze(1).float())
            self._note("sound", batch, counts, batch["has_audio"])
            return
        ways = with_and_without_audio(network, record(batch))
        every = torch.ones(len(batch["id"]), dtype=torch.bool, device=self.device)
        for name, of in (("silent", every), ("sound", batch.get("has_audio", ~every) & network.final_uses_audio)):
            if not of.any():
                continue
            features = ways[name]
            for stage in network.stages[1:]:
                features = stage(features)
            name = FINAL if network.classifies else name
            self._note(name, batch, of_images(network.final(features).value, batch), of)

    def _note(self, name: str, batch: Batch, values: Tensor, of: Tensor) -> None:
        """Record the values B or B×K of some samples of a batch (B bool)."""
        ids = [id for id, wanted in zip(batch["id"], of.tolist(), strict=True) if wanted]
        self.validation.add(name, ids, values[of], truth(batch)[of])

    def on_validation_epoch_end(self) -> None:
        tables = self.validation.collect()
        watched = list(tables) if self.recipe.watch == "mean" else [_CONDITIONS[self.recipe.watch]]
        error = sum(tables[name]["error"] for name in watched) / len(watched)
        self.log("val/error", error, prog_bar=True)
        self.log_table(tables)
        if not math.isfinite(error):
            raise Diverged(f"epoch {self.current_epoch + 1}: the network diverged; try a lower optimiser.lr")
        for scheduler in listed(self.lr_schedulers()):
            if isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step(error)
        self.stale += 1
        if error < self.best:
            self.best, self.best_epoch, self.stale = error, self.current_epoch, 0
            self.write(self.evaluated(), error, epoch=self.current_epoch, **tables)
        self.trainer.should_stop = self.finished()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["crowdexit_best"] = (self.best, self.best_epoch)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.best, self.best_epoch = checkpoint["crowdexit_best"]
        self.stale = checkpoint["epoch"] - self.best_epoch
