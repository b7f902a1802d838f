"""A recipe: one YAML file per experiment, validated before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from crowdexit.errors import CrowdExitError

BUNDLED = Path(__file__).parent / "recipes"


class RecipeError(CrowdExitError):
    """A recipe that is missing, not YAML, or invalid."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ConditionsPart(_Part):
    """Extreme conditions of Hu et al.; see :class:`crowdexit.data.augment.ConditionRange`."""

    share: float = Field(0.0, ge=0, le=1)
    brightness: tuple[float, float] = (0.05, 0.5)
    noise: float = Field(50.0, ge=0, le=255)
    black: float = Field(0.3, ge=0, lt=1)
    dark: float = Field(0.8, ge=0, le=1)
    covered: float = Field(0.3, ge=0, le=1)

    @model_validator(mode="after")
    def _in_order(self) -> ConditionsPart:
        if not 0 <= self.brightness[0] <= self.brightness[1] or self.brightness[1] == 0:
            raise ValueError("brightness is a lowest and a highest factor, from 0 up")
        return self


Share = Annotated[float, Field(ge=0, le=1)]


class DegradationsPart(_Part):
    """Degradations of training images, each by its probability; see :class:`crowdexit.data.augment.Degradations`."""

    tone: Share = 0.0
    grey: Share = 0.0
    cast: Share = 0.0
    dark: Share = 0.0
    blur: Share = 0.0
    noise: Share = 0.0
    jpeg: Share = 0.0

    @model_validator(mode="after")
    def _colour(self) -> DegradationsPart:
        if self.grey + self.cast > 1:
            raise ValueError("grey images have no colour cast: the two shares add up to 1 at most")
        return self


class NegativesPart(_Part):
    """Images without people instead of a ``share`` of the draws; see :class:`crowdexit.data.negatives.Negatives`.

    Beside drawn patterns and empty parts of the training images: mosaics of ``images``, a prepared classification set
    (its ``split``) or a folder, and parts of ``background``, an image of a place; neither may show people.
    """

    share: Share = 0.0
    images: Path | None = None
    split: str = "train"
    background: Path | None = None


class ValConditionsPart(_Part):
    """Conditions of validation images; see :class:`crowdexit.data.augment.Conditions`."""

    brightness: float = Field(1.0, gt=0, allow_inf_nan=False)
    noise: float = Field(0.0, ge=0, le=255)
    black: float = Field(0.0, ge=0, lt=1)


class DataPart(_Part):
    """The samples, and how they are presented to the network.

    ``store`` may be set on the command line instead. ``canvas`` is the (width, height) of training images
    (None: the model's native size). ``whole`` shows each image whole and at most flips it (the papers).
    Images of classes know of these ``store``, ``train``, ``val``, ``draws``, ``whole`` and ``workers``: they are
    shifted by up to an eighth of their side and flipped, or, with ``whole``, left as they are.
    ``leave_out`` is a fold of the training samples to leave out, ``0/3`` the first of three
    (:mod:`crowdexit.evaluation.cross_fit`). ``balance`` gives groups of ids (shell patterns) their share of the draws.
    ``hear`` is the probability that a sample with audio is shown with it; ``voices`` is a folder of voice recordings,
    from which the audio of each training crop is simulated for the heads that it shows, instead of the sample's own.
    ``stride`` is the density map's (1 is the
    papers'). ``val_conditions`` are applied to every validation image. ``views`` is the number of different draws of
    each sample, which then repeat; None draws a new one every time. ``scale``, ``wide_scale`` (of ``wide_share``
    of the draws), ``aspect``, ``flip`` and ``jitter`` are those of :class:`crowdexit.data.augment.View`.
    """

    store: Path | None = None
    train: str = "train"
    val: str = "val"
    train_ids: str = "*"
    leave_out: str | None = Field(None, pattern=r"^\d+/[1-9]\d*$")
    val_ids: str = "*"
    balance: dict[str, float] | None = None
    draws: int | None = Field(None, gt=0, description="draws an epoch; default: each sample once")
    canvas: tuple[int, int] | None = None
    whole: bool = False
    scale: tuple[float, float] = (0.75, 1.3)
    wide_scale: tuple[float, float] = (0.3, 4.0)
    wide_share: Share = 0.0
    aspect: float = Field(0.0, ge=0, le=1)
    flip: bool = True
    jitter: float = Field(0.2, ge=0, lt=1)
    degradations: DegradationsPart = DegradationsPart()
    negatives: NegativesPart = NegativesPart()
    conditions: ConditionsPart = ConditionsPart()
    val_conditions: ValConditionsPart = ValConditionsPart()
    hear: float = Field(0.5, ge=0, le=1, description="probability")
    voices: Path | None = None
    stride: Literal[1, 8] = 8
    views: int | None = Field(None, gt=0)
    workers: int = Field(1, ge=0)

    @model_validator(mode="after")
    def _of_use(self) -> DataPart:
        if self.canvas is not None and (min(self.canvas) < 64 or any(side % 8 for side in self.canvas)):
            raise ValueError("canvas sides have to be multiples of 8, 64 at least")
        for name in ("scale", "wide_scale"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} is a lowest and a highest factor above 0")
        degraded = self.degradations != DegradationsPart()
        if self.whole and self.voices is not None:
            raise ValueError("voices need crops: a whole image has the sample's own audio")
        if self.whole and (self.negatives.share or self.wide_share or self.aspect or degraded):
            raise ValueError("whole images are only flipped: no negatives, degradations, wide_share or aspect")
        if self.balance is not None and (not self.balance or min(self.balance.values()) <= 0):
            raise ValueError("balance: each group of ids needs a share above 0")
        return self


class OptimiserPart(_Part):
    """``plateau`` multiplies by ``factor`` after ``patience`` epochs without a better validation error (as Keras
    counts, which the papers use: 0 is the same as 1);
    ``exponential`` by ``factor`` each epoch; ``cosine`` falls to ``floor`` of the rate over the whole run.
    ``rates`` are tried all in place of ``lr``, and what validates best is kept (of branches, each one's best).
    ``groups`` give parameters a factor of the rate by name or pattern (``stages.1.*: 0.3``); the last pattern that
    matches counts, and 0 freezes them. ``clip`` is of each group by itself."""

    name: Literal["adam", "adamw"] = "adamw"
    lr: float = Field(1e-3, gt=0)
    rates: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] = ()
    weight_decay: float = Field(0.0, ge=0)
    schedule: Literal["plateau", "exponential", "cosine", "constant"] = "constant"
    factor: float = Field(0.6, gt=0, le=1)
    patience: int = Field(2, ge=0)
    warmup: int = Field(0, ge=0, description="steps")
    floor: float = Field(0.01, ge=0, le=1)
    clip: float | None = Field(None, gt=0, description="largest norm of the gradient")
    groups: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = {}

    @model_validator(mode="after")
    def _several(self) -> OptimiserPart:
        if len(set(self.rates)) < len(self.rates):
            raise ValueError("rates: duplicate rate")
        return self


class CachePart(_Part):
    """Where the frozen backbone's features are kept (default: ``features`` in the run's folder), and how much."""

    folder: Path | None = None
    gigabytes: float = Field(16.0, gt=0, allow_inf_nan=False)


class CopycatPart(_Part):
    """Copycat (SL-ViT paper, III-C): unlabelled images, labelled by the final exit of a teacher.

    ``pictures`` is a folder, or a prepared file whose own truth in ``split`` is not looked at. ``ratio`` is fake to
    real: how many unlabelled images there are for each labelled one (the paper's 2 to 1 on CIFAR-10). ``teacher`` is
    a shipped name or a checkpoint; None: the run's own frozen backbone. The paper labels with one teacher, its
    InceptionV3, for all backbones.
    """

    pictures: Path
    split: str = "train"
    ratio: float = Field(2.0, gt=0, allow_inf_nan=False)
    teacher: Path | None = None


class ExitPart(_Part):
    """A branch to train: its name, place and kind; ``options`` are fields of the model's configuration for it alone.

    ``start`` names an exit of the recipe's ``start`` whose weights are its own start. If that exit has none, what fuses
    the audio starts as the identity, and the context at zero.
    """

    name: str = Field(pattern="^[A-Za-z0-9_-]+$")
    place: Annotated[str, BeforeValidator(lambda place: str(place) if type(place) is int else place)]
    kind: str
    options: dict[str, Any] = {}
    start: str | None = None


def every_exit(exits: Any) -> Any:
    """``{kinds: [mlp, vit], places: [3, 6]}`` → the exits 3-mlp, 3-vit, 6-mlp, 6-vit; a list stays as it is."""
    if not isinstance(exits, dict):
        return exits
    if set(exits) != {"kinds", "places"} or not all(isinstance(part, list) for part in exits.values()):
        raise ValueError("exits are a list, or a mapping with lists of kinds and places")
    pairs = [(place, kind) for place in exits["places"] for kind in exits["kinds"]]
    return [{"name": f"{place}-{kind}", "place": place, "kind": kind} for place, kind in pairs]


class Recipe(_Part):
    """One experiment.

    Attributes:
        stage: what is trained. ``hearing``: the audio encoder (of YAMNet, its projection) alone, on the logarithm of
            the count. ``density``: stage one, the whole backbone on density maps. ``count``: stage two, the backbone
            with its dense layer on MAE. ``classes``: the backbone of a classifier. ``branches``: classifier-wise, all
            branches side by side on the frozen backbone. ``end-to-end``, ``layer-wise``: backbone and branches.
        model: a name of the zoo; ``changes`` its configuration's fields.
        start: checkpoint whose weights are the start.
        exits: the branches to train: each with name, place and kind, or ``kinds`` and ``places`` for every pair.
        weights: published weights to start from in its place, by kind (``vgg16``, ``vggish`` …): a file, or
            ``torchvision`` for its download.
        loss: ``l2`` (density) and ``mae`` (counts) are the papers'; ``balanced`` weighs dense and sparse
            images alike, both on maps and on counts; ``poisson`` is the likelihood of the heads in cells of 8 pixels
            and larger ones, unbiased in its sum (:func:`crowdexit.training.losses.poisson_loss`); ``cross-entropy`` is
            a classifier's.
        even: how far ``balanced`` goes: 1 weighs errors relative to the crowd, 0 as they are.
        least: what ``balanced`` adds to an image's count before it divides by it. Of tiles that are added less than
            of whole pictures: an error of five on each of six is one of thirty.
        map: weight of the density map's squared error in ``balanced``, beside the count's own error. Exact
            positions of heads are noise once the count is learned: lower it late in training.
        guess: use only the unweighted count error for darkened images: their count comes from the audio, and
            balanced errors would bias it low.
        frozen: modules and parameters of the backbone that stay as they are, by name or pattern (``stages.0``,
            ``*.bias``) or a module's class (``Conv2d``: what is trained are the normalisations and dense layers); of
            modules their running statistics too. In ``branches``, parameters of the branches.
        norms: of batch normalisations: ``trained``, as usual; ``frozen``, they keep their running statistics and use
            them in training too, so that a batch of unlike crops is seen as a single image is. Their weights are
            trained.
        norm_batches: take the running statistics of freshly initialised batch normalisations from so many batches
            before the first step; 0: leave them.
        freeze_depthwise: leave the kernels of depthwise convolutions as they are. Their gradients are most of the time
            of a step on a CPU; without them a step is up to three times as fast.
        batch: of all processes together.
        ema: decay of the averaged weights that are validated and kept; 0: none.
        ema_warmup: at step n the decay is (1 + n) / (this + n) at most; 0: the same from the first step.
        stop: early stopping after so many epochs without a better validation error.
        watch: the condition whose validation error the plateau, early stopping and the best checkpoint go by:
            ``audio``, over the samples that have audio, with it (the published setting of AudioCSRNet);
            ``no-audio``, over all samples without; ``mean``, of both.
        lambdas: weights λ of the exits' losses where several are added; 1 for branches, 2 for the final exit.
        detached: exits, in ``end-to-end``, whose loss trains the exit alone and not the stages before it.
        detach_until: step until which this holds for every early exit, so that fresh ones do not disturb a trained
            backbone.
        rest: what the backbone's stages behind the first branch start from, layer-wise: ``kept``, what ``start``
            or ``weights`` gave them; ``fresh``, nothing; or a checkpoint of the same model.
        branches_from: checkpoint whose branches of the same names, places and kinds are the start of the new ones;
            they were trained on another backbone, or on an earlier state of this one.
        cache: keep the frozen backbone's features of ``data.views`` views of each training sample on disk, for
            ``branches``; validation images pass it each time.
        copycat: unlabelled images, labelled by a teacher, among the real ones, for ``branches``.
        fit: start exits from regressions of the count on what they see, over so many samples (see
            :func:`crowdexit.training.fit.fit_exits`); 0: at random.
        tied: start the branches' heads as a mean over positions.
        local: weight of a further loss on the parts of an image: of branches, the error of each token's local
            count; of a transformer in ``count``, that of a density map read off its patches.
        senses: shipped name or checkpoint of an AudioCSRNet of the same widths, from which a transformer takes the
            audio encoder and the convolutions of its VGG stem.
    """

    stage: Literal["hearing", "density", "count", "classes", "branches", "end-to-end", "layer-wise"]
    model: str
    changes: dict[str, Any] = {}
    start: Path | None = None
    weights: dict[str, str] = {}
    exits: Annotated[tuple[ExitPart, ...], BeforeValidator(every_exit)] = ()
    data: DataPart = DataPart()
    optimiser: OptimiserPart = OptimiserPart()
    loss: Literal["l2", "mae", "balanced", "poisson", "cross-entropy"] = "balanced"
    even: float = Field(1.0, ge=0, le=1)
    least: float = Field(10.0, gt=0, allow_inf_nan=False)
    map: float = Field(1.0, ge=0)
    guess: bool = False
    frozen: tuple[str, ...] = ()
    norms: Literal["trained", "frozen"] = "trained"
    norm_batches: int = Field(0, ge=0)
    freeze_depthwise: bool = False
    epochs: int = Field(100, gt=0)
    batch: int = Field(8, gt=0)
    ema: float = Field(0.0, ge=0, lt=1)
    ema_warmup: int = Field(0, ge=0)
    stop: int | None = Field(None, gt=0)
    watch: Literal["audio", "no-audio", "mean"] = "mean"
    lambdas: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = {}
    detached: tuple[str, ...] = ()
    detach_until: int = Field(0, ge=0)
    rest: Literal["kept", "fresh"] | Path = "kept"
    branches_from: Path | None = None
    cache: CachePart | None = None
    copycat: CopycatPart | None = None
    fit: int = Field(0, ge=0)
    tied: bool = False
    local: float = Field(0.0, ge=0)
    senses: str | None = None
    precision: Literal["auto", "bf16-mixed", "32-true"] = "auto"
    seed: int = 0

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        with_exits = self.stage in ("branches", "end-to-end", "layer-wise")
        if with_exits and not self.exits:
            raise ValueError(f"the stage {self.stage!r} needs exits")
        if not with_exits and self.exits:
            raise ValueError(f"the stage {self.stage!r} trains no exits")
        if self.branches_from and not with_exits:
            raise ValueError(f"the stage {self.stage!r} trains no exits; branches_from does not apply")
        if self.cache and (self.stage != "branches" or self.data.views is None):
            raise ValueError("a feature cache needs the stage 'branches' and repeated data.views")
        if self.copycat and (self.stage != "branches" or self.cache):
            raise ValueError("copycat is for the stage 'branches', and not for a feature cache")
        if self.lambdas and self.stage not in ("end-to-end", "layer-wise"):
            raise ValueError(f"the stage {self.stage!r} adds no losses; lambdas do not apply")
        if self.rest != "kept" and self.stage != "layer-wise":
            raise ValueError(f"the stage {self.stage!r} knows no 'rest'")
        if self.frozen and self.stage not in ("density", "count", "classes", "branches"):
            raise ValueError(f"the stage {self.stage!r} freezes what it freezes by itself: no 'frozen'")
        if self.stage in ("end-to-end", "layer-wise") and (self.stop or self.optimiser.schedule == "plateau"):
            raise ValueError(f"the stage {self.stage!r} runs all its epochs: no stop, no plateau")
        if len({e.name for e in self.exits}) < len(self.exits):
            raise ValueError("two exits have the same name")
        wrong = {
            "hearing": ("poisson", "cross-entropy"),
            "density": ("mae", "cross-entropy"),
            "count": ("l2", "cross-entropy"),
            "classes": ("l2", "mae", "balanced", "poisson"),
            "branches": ("l2",),
        }
        if self.loss in wrong.get(self.stage, ()):
            raise ValueError(f"the loss {self.loss!r} is not for the stage {self.stage!r}")
        if self.loss == "poisson" and self.data.stride != 8:
            raise ValueError("the loss 'poisson' counts heads in cells: data.stride 8")
        if self.stage in ("hearing", "branches"):
            for name, chosen in (
                ("optimiser.groups", self.optimiser.groups),
                ("freeze_depthwise", self.freeze_depthwise),
                ("norm_batches", self.norm_batches),
                ("norms", self.norms != "trained"),
            ):
                if chosen:
                    raise ValueError(f"the stage {self.stage!r} knows no {name}")
        if self.norm_batches and self.norms != "frozen":
            raise ValueError("norm_batches need norms: frozen")
        if (self.detached or self.detach_until) and self.stage != "end-to-end":
            raise ValueError(f"the stage {self.stage!r} knows no 'detached' and no 'detach_until'")
        if any(e.start for e in self.exits) and self.start is None:
            raise ValueError("an exit that starts from another needs a checkpoint: set start")
        if self.fit and (self.loss == "cross-entropy" or self.stage in ("hearing", "density")):
            raise ValueError("fit needs heads that output a count")
        if self.loss == "cross-entropy" and self.local:
            raise ValueError("'local' applies to counting only")
        if self.watch != "mean" and self.loss == "cross-entropy":
            raise ValueError("a classifier is validated without audio: no 'watch'")
        if self.data.voices is not None and self.stage == "hearing":
            raise ValueError("the stage 'hearing' learns from whole images and their own audio: no data.voices")
        if self.watch == "no-audio" and self.stage == "hearing":
            raise ValueError("the stage 'hearing' is validated with audio alone")
        if self.start is not None and self.weights:
            raise ValueError("start and weights exclude each other")
        if self.senses is not None and (self.start is not None or self.weights):
            raise ValueError("senses are for a transformer trained from scratch")
        return self

    def described(self) -> dict[str, Any]:
        """The recipe as plain data for a checkpoint's header: files by name, without their folders."""

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: plain(item) for key, item in value.items()}
            if isinstance(value, Path):
                return "/".join(value.parts[-2:]) if value.name == "model.safetensors" else value.name
            return list(value) if isinstance(value, tuple) else value

        weights = {kind: Path(path).name for kind, path in self.weights.items()}
        senses = None if self.senses is None else plain(Path(self.senses))
        settings = {key: plain(value) for key, value in self.model_dump().items()}
        return {**settings, "weights": weights, "senses": senses}


def bundled() -> list[str]:
    """The names of the recipes that come with the project."""
    return sorted(path.stem for path in BUNDLED.glob("*.yaml"))


def read_recipe(name: str | Path, changes: dict[str, Any] | None = None) -> Recipe:
    """Read a recipe file, or a bundled one by its name.

    Args:
        changes: values by dotted key (``data.workers``) that replace the file's.

    Raises:
        RecipeError: no such file, not YAML, an unknown key or a value out of range; names key and problem.
    """
    path = Path(name)
    if not path.is_file():
        path = BUNDLED / f"{name}.yaml"
    if not path.is_file():
        raise RecipeError(f"{name}: no such recipe (bundled are {', '.join(bundled())})")
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys to values")
    for key, value in (changes or {}).items():
        *parents, last = key.split(".")
        part: Any = content
        for parent in parents:
            part = part.setdefault(parent, {})
            if not isinstance(part, dict):
                raise RecipeError(f"{path}: {key}: {parent!r} is not a group of keys")
        part[last] = value
    return checked(content, str(path))


def checked(content: Any, source: str) -> Recipe:
    """Plain data as a recipe.

    Raises:
        RecipeError: for an unknown key or a value out of range; names source, key and problem.
    """
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise RecipeError(f"{source}: {first_problem(error, 'recipe')}") from None


def first_problem(error: ValidationError, whole: str) -> str:
    """The first key that is wrong (``whole`` where it is none) and what is wrong with it, in one line."""
    first = error.errors()[0]
    where = ".".join(str(place) for place in first["loc"]) or whole
    what = "unknown key" if first["type"] == "extra_forbidden" else first["msg"].removeprefix("Value error, ")
    return f"{where}: {what}"
