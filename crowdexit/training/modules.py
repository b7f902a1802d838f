"""What all training loops share, and the loop for stage zero to two of a backbone, as Lightning modules."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from crowdexit import zoo
from crowdexit.backbones.vgg import VGGish
from crowdexit.errors import CrowdExitError
from crowdexit.network import FINAL, MultiExitNetwork
from crowdexit.stages import Features, inputs
from crowdexit.training.losses import Batch, count_loss, exit_loss
from crowdexit.training.recipe import OptimiserPart, Recipe


class TrainingError(CrowdExitError):
    """A run that cannot start or go on."""


def record(batch: Batch) -> Features:
    """The network's input of a collated batch, channels last; of tiles, one picture's as a batch of their own."""
    image, log_mel, heard, inside = (batch[key] for key in ("image", "log_mel", "heard", "inside"))
    if image.dim() == 5:  # B×T×3×H×W
        tiles = image.shape[1]
        image, inside = image.flatten(0, 1), inside.flatten(0, 1)
        log_mel, heard = log_mel.repeat_interleave(tiles, 0), heard.repeat_interleave(tiles, 0)
    return inputs(image.contiguous(memory_format=torch.channels_last), log_mel, heard, inside)


def of_pictures(counts: Tensor, batch: Batch) -> Tensor:
    """Counts B of the batch's pictures, from those of all their tiles."""
    return counts.view(len(batch["id"]), -1).sum(1)


def heard_and_silent(network: MultiExitNetwork, features: Features) -> dict[str, Features]:
    """The record after the first stage, as it is heard and as if it were not.

    A first stage that only looks is run once for both.
    """
    seen = network.stages[0](features)
    silence = torch.zeros_like(features.heard)
    if isinstance(network.stages[0], VGGish):
        return {"sound": seen, "silent": network.stages[0](replace(features, heard=silence))}
    return {"sound": seen, "silent": replace(seen, heard=silence)}


def make_optimiser(parameters: Iterable[nn.Parameter], part: OptimiserPart) -> torch.optim.Optimizer:
    """The recipe's optimiser over these parameters."""
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[part.name]
    return kind(parameters, lr=part.lr, weight_decay=part.weight_decay, foreach=True)


def rate_at(part: OptimiserPart, step: int, steps: int, epoch: int) -> float:
    """The learning rate's factor at a step out of ``steps``; plateau schedules are kept by their scheduler."""
    warm = min(1.0, (step + 1) / part.warmup) if part.warmup else 1.0
    if part.schedule == "cosine":
        return warm * (part.floor + (1 - part.floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))
    if part.schedule == "exponential":
        return warm * float(part.factor**epoch)
    return warm


def listed(one_or_more: Any) -> list[Any]:
    """Lightning hands over one optimiser or scheduler bare, several as a list."""
    return one_or_more if isinstance(one_or_more, list) else [one_or_more]


def ears(network: MultiExitNetwork) -> VGGish:
    """The network's VGGish.

    Raises:
        TrainingError: if it has none.
    """
    for stage in network.stages:
        if isinstance(stage, VGGish):
            return stage
    raise TrainingError("this network does not hear: there is no VGGish to train")


class Validation:
    """Collects counts over an epoch, over all processes, and sums them up by group of ids.

    A group is what stands before the first ``_`` of an id (the part of a data set), or ``all``.
    """

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, float, float]] = []

    def add(self, name: str, ids: list[str], counts: Tensor, heads: Tensor) -> None:
        """Counts B and true heads B of one exit (or state of hearing) called ``name``."""
        for id, count, true in zip(ids, counts.float().tolist(), heads.float().tolist(), strict=True):
            self.rows.append((name, id.split("_")[0] if "_" in id else "all", count, true))

    def collect(self) -> dict[str, dict[str, float]]:
        """By name: ``mae/GROUP`` for each group, and ``error``, the groups' mean of MAE over mean count."""
        rows = self.rows
        if dist.is_available() and dist.is_initialized():
            everywhere: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everywhere, rows)
            rows = [row for part in everywhere for row in part]
        self.rows = []
        rows = sorted(rows)  # the figures do not depend on who counted what
        groups: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
        for name, group, count, true in rows:
            groups[name][group].append((count, true))
        result = {}
        for name, by_group in groups.items():
            table, relative = {}, []
            for group, pairs in sorted(by_group.items()):
                mae = sum(abs(c - t) for c, t in pairs) / len(pairs)
                table[f"mae/{group}"] = mae
                relative.append(mae / max(sum(t for _, t in pairs) / len(pairs), 1.0))
            table["error"] = sum(relative) / len(relative)
            result[name] = table
        return result


class Experiment(L.LightningModule):
    """What all loops share: the network, its description, where results go, and the best so far.

    ``OUT/model.safetensors`` always holds the best network by validation.
    """

    def __init__(self, network: MultiExitNetwork, spec: zoo.Spec, recipe: Recipe, out: Path) -> None:
        super().__init__()
        self.network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.spec, self.recipe, self.out = spec, recipe, out
        self.validation = Validation()
        self.summary = ""

    def finished(self) -> bool:
        """Whether early stopping has ended the run."""
        raise NotImplementedError  # abstract

    def on_fit_start(self) -> None:
        # A run that had stopped early and is resumed has nothing left to do.
        self.trainer.should_stop = self.finished()

    def log_table(self, tables: dict[str, dict[str, float]]) -> None:
        """Log every figure, and keep one line of them for the console."""
        flat = {f"val/{name}/{key}": value for name, table in tables.items() for key, value in table.items()}
        self.log_dict(flat, rank_zero_only=True)
        self.summary = "  ".join(
            f"{name}: " + " ".join(f"{k.removeprefix('mae/')} {v:.4g}" for k, v in table.items())
            for name, table in tables.items()
        )

    def write(self, network: MultiExitNetwork, **figures: Any) -> None:
        """Write the checkpoint, from the first process; it tells of this run and of those before it."""
        if not self.trainer.is_global_zero:
            return
        known = dict(self.spec.meta)
        earlier = [*known.pop("before", [])]
        if "recipe" in known:
            earlier.append({key: known.get(key) for key in ("recipe", "validation")})
        meta = {**known, "before": earlier, "recipe": self.recipe.described(), "validation": figures}
        spec = zoo.Spec(self.spec.model, self.spec.exits, self.spec.changes, meta)
        zoo.save(network, spec, self.out / "model.safetensors")


def averaged(network: nn.Module, recipe: Recipe) -> AveragedModel | None:
    """The recipe's running average of a network over its steps, buffers too."""
    if not recipe.ema:
        return None
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema), use_buffers=True)
    average.requires_grad_(False)
    return average.eval()


class BackboneTraining(Experiment):
    """Stage zero (``hearing``), one (``density``) and two (``count``) of a backbone; TransCrowd has ``count`` alone."""

    def __init__(self, network: MultiExitNetwork, spec: zoo.Spec, recipe: Recipe, out: Path) -> None:
        super().__init__(network, spec, recipe, out)
        self.best, self.best_epoch, self.stale = math.inf, -1, 0
        self.listener: nn.Module | None = None
        if recipe.stage == "hearing":
            # Thrown away afterwards: VGGish has to find what the sound says, not how it is said.
            vggish = ears(network)
            self.listener = nn.Linear(vggish.channels, 1)
            nn.init.constant_(self.listener.bias, 5.0)  # about the logarithm of 150
            self.network.requires_grad_(False)
            vggish.layers.requires_grad_(True)
        known = dict(network.named_modules())
        for name in recipe.frozen:
            if name not in known:
                raise TrainingError(f"frozen: the network has no module {name!r} (it has stages.0, final …)")
        self.frozen = [known[name] for name in recipe.frozen]
        for module in self.frozen:
            module.requires_grad_(False)
        self.average = averaged(self.network, recipe)
        self.train()  # Lightning leaves the modes as they are

    def train(self, mode: bool = True) -> BackboneTraining:
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    def trained(self) -> Iterable[nn.Parameter]:
        if self.listener is not None:
            return [*ears(self.network).layers.parameters(), *self.listener.parameters()]
        return [p for p in self.network.parameters() if p.requires_grad]

    def finished(self) -> bool:
        return self.recipe.stop is not None and self.stale >= self.recipe.stop

    def evaluated(self) -> MultiExitNetwork:
        """The averaged network where there is one."""
        return cast(MultiExitNetwork, self.average.module) if self.average is not None else self.network

    def configure_optimizers(self) -> Any:
        part = self.recipe.optimiser
        optimiser = make_optimiser(self.trained(), part)
        if part.schedule == "plateau":
            plateau = ReduceLROnPlateau(optimiser, factor=part.factor, patience=part.patience)
            return {"optimizer": optimiser, "lr_scheduler": {"scheduler": plateau, "monitor": "val/error"}}
        steps = int(self.trainer.estimated_stepping_batches)
        an_epoch = max(1, steps // self.recipe.epochs)
        schedule = LambdaLR(optimiser, lambda step: rate_at(part, step, steps, step // an_epoch))
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        # Lightning asks after the checkpoint is written; a plateau is stepped with the validation instead.
        if not isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step()

    def training_step(self, batch: Batch, _: int) -> Tensor:
        if self.listener is not None:
            log_count = self.listener(ears(self.network).embed(batch["log_mel"])).squeeze(1)
            loss = F.smooth_l1_loss(log_count.float(), torch.log1p(batch["total"]))
        else:
            answer = self.network(record(batch), [FINAL])[FINAL]
            if self.recipe.stage == "count":
                loss = count_loss(answer.value, batch, self.recipe)
            else:
                loss = exit_loss(answer, batch, self.recipe)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        if self.average is not None:
            self.average.update_parameters(self.network)

    def on_validation_start(self) -> None:
        if self.trainer.world_size == 1:
            return
        # The processes saw different samples: their running statistics become one again.
        for module in (self.network, self.average):
            for buffer in module.buffers() if module is not None else ():
                if buffer.is_floating_point():
                    dist.all_reduce(buffer)
                    buffer /= self.trainer.world_size

    def validation_step(self, batch: Batch, _: int) -> None:
        network = self.evaluated().eval()
        if self.listener is not None:
            counts = torch.expm1(self.listener(ears(network).embed(batch["log_mel"])).squeeze(1).float())
            self._note("sound", batch, counts, batch["heard"])
            return
        ways = heard_and_silent(network, record(batch))
        heard = batch["heard"]
        for name, of in (("silent", torch.ones_like(heard)), ("sound", heard & network.hears)):
            if not of.any():
                continue
            features = ways[name]
            for stage in network.stages[1:]:
                features = stage(features)
            self._note(name, batch, of_pictures(network.final(features).value, batch), of)

    def _note(self, name: str, batch: Batch, counts: Tensor, of: Tensor) -> None:
        """Note the counts B of some samples of a batch (B bool)."""
        ids = [id for id, wanted in zip(batch["id"], of.tolist(), strict=True) if wanted]
        self.validation.add(name, ids, counts[of], batch["count"][of])

    def on_validation_epoch_end(self) -> None:
        tables = self.validation.collect()
        error = sum(table["error"] for table in tables.values()) / len(tables)
        self.log("val/error", error, prog_bar=True)
        self.log_table(tables)
        if not math.isfinite(error):
            raise TrainingError(f"epoch {self.current_epoch + 1}: the network diverged; try a lower optimiser.lr")
        for scheduler in listed(self.lr_schedulers()):
            if isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step(error)
        self.stale += 1
        if error < self.best:
            self.best, self.best_epoch, self.stale = error, self.current_epoch, 0
            self.write(self.evaluated(), epoch=self.current_epoch, **tables)
        self.trainer.should_stop = self.finished()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["crowdexit_best"] = (self.best, self.best_epoch)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.best, self.best_epoch = checkpoint["crowdexit_best"]
        self.stale = checkpoint["epoch"] - self.best_epoch
