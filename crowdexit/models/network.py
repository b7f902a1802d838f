"""The multi-exit network: stages and exits."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, cast

from torch import nn

from crowdexit.models.chain import iter_outputs
from crowdexit.models.exits.registry import ExitLocation, exit_kinds, make_exit
from crowdexit.models.stages import Exit, ExitOutput, Features, Stage

FINAL = "final"


class Config(Protocol):
    """The configuration of a network; a frozen dataclass of plain values."""

    @property
    def size(self) -> tuple[int, int]:
        """Input size (width, height) of the network, in pixels."""

    @property
    def scene(self) -> tuple[int, int]:
        """(width, height) of a whole image, in one view or several tiles."""

    @property
    def view(self) -> Literal["fit", "tiles", "scale"]:
        """Resize mode: ``fit`` into one view of ``size``; cut into ``tiles``, whose counts are added; or ``scale`` to
        a view of the image's shape with no more pixels than ``size``."""

    @property
    def step(self) -> int:
        """Divisor of the sides of ``size``, for every kind of branch."""

    @property
    def bare_step(self) -> int:
        """Divisor of the sides without branches."""

    @property
    def branch_fields(self) -> tuple[str, ...]:
        """The fields that only affect branches, and may differ between them."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for a checkpoint's header."""


@dataclass(frozen=True)
class ActivationRange:
    """Int8 range of a layer, measured on training images.

    Attributes:
        low, high: range of its input.
        steps: between zero and ``high`` for a non-negative input: 255, or 127.
        shifts: added to its output, by channel, to correct the mean for rounded weights; empty: none.
    """

    low: float
    high: float
    steps: int = 255
    shifts: tuple[float, ...] = ()


class MultiExitNetwork(nn.Module):
    """A chain of stages with any number of early exits at the end of each, and the final exit after the last.

    Args:
        stages: the backbone f = f_L ∘ … ∘ f_1, split at the exit locations.
        final: the exit after the last stage.
        places: names of the exit locations, each with the index of the stage before it.
        config: its configuration.

    Attributes:
        final_uses_audio: whether audio reaches the final exit.
        classifies: whether the exits classify rather than count.
        token_dim: D of its tokens; 0: it uses maps.
        published_kinds: the kinds of published weights that it can load (:mod:`crowdexit.models.backbones.weights`).
        torchvision_name: torchvision's name of its image encoder.
        parts_of_audiocsrnet: prefixes of its tensor names → those of an AudioCSRNet to initialise them from.
        branch_options: the own options of each early exit that was added.
        activation_ranges: int8 ranges by layer name; empty if not measured.
    """

    final_uses_audio = False
    classifies = False
    token_dim = 0
    published_kinds: tuple[str, ...] = ()
    torchvision_name = "vgg16"
    parts_of_audiocsrnet: Mapping[str, str] = {}

    def __init__(self, stages: Sequence[Stage], final: Exit, places: dict[str, int], config: Config) -> None:
        super().__init__()
        self.config = config
        self.stages = nn.ModuleList(stages)
        self.final = final
        self.places = dict(places)
        self.branches = nn.ModuleDict()
        self._stage_of: dict[str, int] = {}
        self.branch_options: dict[str, dict[str, Any]] = {}
        self.activation_ranges: dict[str, ActivationRange] = {}

    def exit_location(self, place: str, config: Any) -> ExitLocation:
        """Input of a branch at a location, with this ``config``."""
        raise NotImplementedError  # abstract

    def branch_kinds(self, place: str) -> tuple[str, ...]:
        """The kinds of branches (:mod:`crowdexit.models.exits.registry`) that fit a location."""
        at = self.exit_location(place, self.config)
        return tuple(name for name, kind in exit_kinds().items() if kind.fits(at))

    def add_branch(self, name: str, place: str, kind: str, options: Mapping[str, Any] | None = None) -> None:
        """Add an untrained branch of a kind at a location.

        Args:
            options: fields of the configuration for branches (``branch_fields``), and options of the kind, for this
                branch only.

        Raises:
            ValueError: for an unknown location, kind or option, or a name in use.
        """
        self._check_place(place)
        kinds = self.branch_kinds(place)
        if kind not in kinds:
            raise ValueError(
                f"no branch of kind {kind!r} fits location {place} of this network ({', '.join(kinds)} do)"
            )
        options = dict(options or {})
        own = exit_kinds()[kind].options
        fields = (*self.config.branch_fields, *own)
        for option in options:
            if option not in fields:
                raise ValueError(f"a branch of this network has no option {option!r} (it has {', '.join(fields)})")
        shared = {option: value for option, value in options.items() if option not in own}
        config = replace(self.config, **shared) if shared else self.config  # type: ignore[type-var]
        at = self.exit_location(place, config)
        self.add_exit(name, place, make_exit(kind, at, {key: options[key] for key in options if key in own}))
        self.branch_options[name] = options

    def _check_place(self, place: str) -> None:
        if place not in self.places:
            raise ValueError(f"no exit location {place!r} in this network (it has {', '.join(self.places)})")

    def add_exit(self, name: str, place: str, branch: Exit) -> None:
        """Add an early exit called ``name`` at a location.

        Raises:
            ValueError: for an unknown location, or a name in use.
        """
        self._check_place(place)
        if name in self.branches or name == FINAL:
            raise ValueError(f"exit {name!r} already exists")
        self.branches[name] = branch
        self._stage_of[name] = self.places[place]

    @property
    def audio_encoder(self) -> Any:
        """The stage that encodes audio (:class:`crowdexit.models.backbones.fronts.AudioEncoder`), or None."""
        return next((stage for stage in self.stages if cast(Stage, stage).encodes_audio), None)

    def published_problem(self, kind: str) -> str | None:
        """Why published weights of a kind do not fit this configuration, or None."""
        return None

    @property
    def exit_names(self) -> list[str]:
        """All exits in their order, ``final`` last."""
        return [*sorted(self.branches, key=lambda name: self._stage_of[name]), FINAL]

    def exit_module(self, name: str) -> Exit:
        """The exit of that name.

        Raises:
            KeyError: if there is none.
        """
        module = self.final if name == FINAL else self.branches[name]
        assert isinstance(module, Exit)
        return module

    def stage_of(self, name: str) -> int:
        """The index of the stage before an exit."""
        return len(self.stages) - 1 if name == FINAL else self._stage_of[name]

    def uses_audio(self, name: str) -> bool:
        """Whether an exit's output depends on audio."""
        before = self.stages[: self.stage_of(name) + 1]
        return self.exit_module(name).uses_audio or any(cast(Stage, stage).fuses_audio for stage in before)

    def advance(self, index: int, state: Features) -> Features:
        """Run one stage."""
        out: Features = self.stages[index](state)
        return out

    def run_exit(self, name: str, state: Features) -> ExitOutput:
        """Run one exit on the output of its stage."""
        answer: ExitOutput = self.exit_module(name)(state)
        return answer

    def stream(self, features: Features, exits: Collection[str] | None = None) -> Iterator[tuple[str, ExitOutput]]:
        """Yield each wanted exit's output early; see :func:`crowdexit.models.chain.iter_outputs`."""
        return iter_outputs(self, features, exits)

    def forward(self, features: Features, exits: Collection[str] | None = None) -> dict[str, ExitOutput]:
        """The outputs of the wanted exits (default: all) by name."""
        return dict(self.stream(features, exits))

    def backbone_modules(self) -> list[nn.Module]:
        """The stages and the final exit, which classifier-wise training does not change."""
        return [*self.stages, self.final]
