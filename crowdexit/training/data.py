"""A recipe's samples as Lightning wants them: crowds, or images of classes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from torch.utils.data import DataLoader, Subset

from crowdexit.data.augment import ConditionRange, Conditions, Degradations, View
from crowdexit.data.classes import ClassDataset, ClassStore
from crowdexit.data.dataset import CrowdDataset, EpochPlan, Kernel, MixedDataset, MixedPlan, Setting
from crowdexit.data.folds import in_fold
from crowdexit.data.image import read_pixels
from crowdexit.data.negatives import Negatives
from crowdexit.data.store import Store
from crowdexit.data.unlabelled import ImageFolder, unlabelled_folder
from crowdexit.data.voices import read_voices
from crowdexit.models.network import Config, MultiExitNetwork
from crowdexit.training.cache import CachedDataset, collate
from crowdexit.training.modules import TrainingError
from crowdexit.training.recipe import NegativesPart, Recipe


def store_of(recipe: Recipe) -> Path:
    """The recipe's prepared file.

    Raises:
        TrainingError: if it names none.
    """
    if recipe.data.store is None:
        raise TrainingError("no data: name a prepared file with --data")
    return recipe.data.store


def negatives_of(part: NegativesPart) -> Negatives | None:
    """The recipe's images without anybody, or None where it wants none.

    Raises:
        CrowdExitError: for images or a background that cannot be read.
    """
    if not part.share:
        return None
    images: ImageFolder | ClassStore | None = None
    if part.images is not None:
        images = ImageFolder(part.images) if part.images.is_dir() else ClassStore(part.images)
        images.labels(part.split)
        if isinstance(images, ClassStore):
            images.close()
    background = None if part.background is None else read_pixels(part.background)
    return Negatives(part.share, images, part.split, background)


class RecipeData(L.LightningDataModule):
    """The recipe's samples, dealt out to the processes so that each is seen as the plan says.

    Attributes:
        train_set, val_set: the samples. val_batch: how many of the latter at once.
        unlabelled: samples that a teacher labels, seen as the training samples are.
        median_count: count at which an untrained exit starts.
        note: what there is to say of the unlabelled samples, in a line.
    """

    note = ""
    train_set: CrowdDataset | ClassDataset | CachedDataset
    val_set: CrowdDataset | ClassDataset
    unlabelled: CrowdDataset | ClassDataset | None = None
    val_batch: int
    median_count: float

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe, self.path = recipe, store_of(recipe)

    def _processes(self) -> tuple[int, int]:
        trainer = self.trainer
        return (trainer.global_rank, trainer.world_size) if trainer else (0, 1)

    def plan(self) -> EpochPlan:
        """This process's part of each epoch."""
        rank, world = self._processes()
        data, seed = self.recipe.data, self.recipe.seed
        return EpochPlan(
            self.train_set.ids,
            balance=data.balance,
            length=data.draws,
            views=data.views,
            seed=seed,
            rank=rank,
            world=world,
        )

    def mixed_plan(self, unlabelled: CrowdDataset | ClassDataset, ratio: float) -> MixedPlan:
        """The same with unlabelled samples among them, ``ratio`` for each labelled one."""
        rank, world = self._processes()
        plan, seed = self.plan(), self.recipe.seed
        length = max(1, round(plan.length * ratio))
        others = EpochPlan(unlabelled.ids, length=length, views=plan.views, seed=seed, rank=rank, world=world)
        return MixedPlan(plan, others, len(self.train_set))

    def train_dataloader(self) -> DataLoader[Any]:
        workers, (_, world) = self.recipe.data.workers, self._processes()
        copycat = self.recipe.copycat
        shown: Any = self.train_set
        plan: EpochPlan | MixedPlan = self.plan()
        if copycat is not None and self.unlabelled is not None:
            shown = MixedDataset(self.train_set, self.unlabelled)
            plan = self.mixed_plan(self.unlabelled, copycat.ratio)
        return DataLoader(
            shown,
            batch_size=self.recipe.batch // world,
            sampler=plan,
            collate_fn=collate if isinstance(self.train_set, CachedDataset) else None,
            num_workers=workers,
            persistent_workers=workers > 0,
            multiprocessing_context="forkserver" if workers else None,
        )

    def val_dataloader(self) -> DataLoader[Any]:
        rank, world = self._processes()
        mine = Subset(self.val_set, range(rank, len(self.val_set), world))
        return DataLoader(mine, batch_size=self.val_batch, num_workers=0)


class CrowdData(RecipeData):
    """A crowd set's samples as the recipe wants them."""

    def __init__(self, recipe: Recipe, config: Config) -> None:
        super().__init__(recipe)
        data = recipe.data
        native = config.size
        canvas = data.canvas or native
        any_shape = config.view == "scale"
        if not any_shape and recipe.stage not in ("hearing", "density") and canvas != native:
            raise TrainingError(f"the stage {recipe.stage!r} needs the model's native size as canvas")
        if any(side % config.bare_step for side in canvas):
            raise TrainingError(f"canvas: the sides have to be multiples of {config.bare_step} for {recipe.model}")
        view = None
        if not data.whole:
            view = View(
                canvas,
                config.scene,
                data.scale,
                data.flip,
                data.jitter,
                own_size=any_shape,
                wide_scale=data.wide_scale,
                wide_share=data.wide_share,
                aspect=data.aspect,
                cubic=0.5 if any_shape else 0.0,
                degradations=Degradations(**data.degradations.model_dump()),
            )
        setting = Setting(
            canvas,
            view,
            flip=data.flip,
            takes=True,
            conditions=ConditionRange(**data.conditions.model_dump()),
            hear=1.0 if recipe.stage == "hearing" else data.hear,
            voices=None if data.voices is None else read_voices(data.voices)["train"],
            stride=data.stride,
            kernel=Kernel("points") if recipe.loss == "poisson" else Kernel(),
        )
        with Store(self.path) as store:
            fold = data.leave_out
            ids = [id for id in store.ids(data.train, data.train_ids) if fold is None or not in_fold(id, fold)]
            if not ids:
                raise TrainingError(f"leave_out {fold}: no sample of {data.train} is left")
            known = {id: store.info(data.train, id) for id in ids}
            val_ids = store.ids(data.val, data.val_ids)
            needs_audio = recipe.stage == "hearing" or recipe.watch == "audio"
            if needs_audio and not any("log_mel" in store.info(data.val, id).parts for id in val_ids):
                raise TrainingError(f"{self.path}: no sample of {data.val} has audio to validate with")
            for id, sample in known.items():
                if recipe.stage == "hearing" and "log_mel" not in sample.parts:
                    raise TrainingError(f"{self.path}: {data.train}/{id} has no audio to learn from")
                if not data.whole and "density" in sample.parts and sample.heads == 0 and sample.count > 0:
                    raise TrainingError(
                        f"{self.path}: {data.train}/{id} has only a density map and cannot be cropped; "
                        "set data.whole: true"
                    )
        self.median_count = float(np.median([sample.count for sample in known.values()]))
        self.train_set = CrowdDataset(store, data.train, ids, setting, recipe.seed, negatives_of(data.negatives))
        if recipe.copycat is not None:
            path, split = recipe.copycat.pictures, recipe.copycat.split
            others = ImageFolder(path) if path.is_dir() else Store(path)
            self.note = others.describe() if isinstance(others, ImageFolder) else ""
            # In daylight: what the backbone says of the dark is no truth.
            lit = replace(setting, conditions=Conditions())
            self.unlabelled = CrowdDataset(others, split, others.ids(split), lit, recipe.seed)
        shown = Setting(
            native,
            tiles=config.view == "tiles",
            own_shape=any_shape,
            conditions=Conditions(**data.val_conditions.model_dump()),
            # Who never hears in training has not learned to: what it answers with audio is no figure of it.
            hear=1.0 if setting.hear else 0.0,
        )
        self.val_set = CrowdDataset(store, data.val, val_ids, shown)
        self.val_batch = 4 if config.view == "fit" else 1  # images differ in their shape or number of tiles


class ClassData(RecipeData):
    """A classification set's images as the recipe wants them."""

    median_count = 0.0

    def __init__(self, recipe: Recipe, config: Config) -> None:
        super().__init__(recipe)
        data = recipe.data
        with ClassStore(self.path) as store:
            there = store.splits()
            if data.val not in there:
                raise TrainingError(f"{self.path}: no split {data.val!r} to validate with (it has {', '.join(there)})")
            size, seed = config.size, recipe.seed
            # Half of a spectrogram's images would run backwards.
            augment = not data.whole and store.spectrogram is None
            self.train_set = ClassDataset(store, data.train, size=size, augment=augment, seed=seed)
            if recipe.copycat is not None:
                path, split = recipe.copycat.pictures, recipe.copycat.split
                others = unlabelled_folder(path, store.spectrogram) if path.is_dir() else ClassStore(path)
                self.note = "" if isinstance(others, ClassStore) else others.describe()
                self.unlabelled = ClassDataset(others, split, size=size, augment=augment, seed=seed)
            self.val_set = ClassDataset(store, data.val, size=size)
        self.val_batch = recipe.batch


def class_names(recipe: Recipe) -> list[str]:
    """The classes of the recipe's prepared file."""
    with ClassStore(store_of(recipe)) as store:
        return store.classes


def make_data(recipe: Recipe, network: MultiExitNetwork) -> RecipeData:
    """What the recipe trains the network on.

    Raises:
        CrowdExitError: for a set that is not what the network is for, or cannot be read.
    """
    if network.classifies != (recipe.loss == "cross-entropy"):
        wanted = "the loss 'cross-entropy'" if network.classifies else "a loss of counts"
        raise TrainingError(f"{recipe.model} wants {wanted}, not {recipe.loss!r}")
    return ClassData(recipe, network.config) if network.classifies else CrowdData(recipe, network.config)
