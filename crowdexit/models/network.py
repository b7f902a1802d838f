"""Stages and exits put together: the multi-exit network."""

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
    """Everything that shapes a network; a frozen dataclass of plain values."""

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the image that the network sees at once, in pixels."""

    @property
    def scene(self) -> tuple[int, int]:
        """(width, height) at which a whole image is looked at, in one view or in several tiles."""

    @property
    def view(self) -> Literal["fit", "tiles", "scale"]:
        """How an image is laid before the network: fitted into one view of ``size``; cut into several, which are added;
        or in a view of its own shape, scaled down to no more pixels than ``size`` has."""

    @property
    def step(self) -> int:
        """What the sides of ``size`` have to be multiples of, every kind of branch considered."""

    @property
    def bare_step(self) -> int:
        """What they have to be multiples of where there is no branch."""

    @property
    def branch_fields(self) -> tuple[str, ...]:
        """The fields that shape a branch and nothing else: what may differ from branch to branch."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for a checkpoint's header."""


@dataclass(frozen=True)
class ActivationRange:
    """What quantising a layer to int8 needs, measured on training images.

    Attributes:
        low, high: of what it takes.
        steps: of the way from zero to ``high``, where nothing is below zero: 255, or 127.
        shifts: to add to what it gives, by output channel, for rounded weights move its mean; empty: nothing.
    """

    low: float
    high: float
    steps: int = 255
    shifts: tuple[float, ...] = ()


class MultiExitNetwork(nn.Module):
    """A chain of stages with any number of early exits at the end of each, and the final exit after the last.

    Args:
        stages: the backbone f = f_L ∘ … ∘ f_1, cut at the places of the branches.
        final: reads the record after the last stage.
        places: the names of the places where branches may stand, each with the index of the stage it follows.
        config: what shapes it.

    Attributes:
        final_uses_audio: whether sound reaches the final exit.
        classifies: whether the exits tell classes apart rather than count.
        token_dim: D of its tokens, or 0: it makes maps.
        published_kinds: the kinds of published weights that it can take (:mod:`crowdexit.models.backbones.weights`).
        torchvision_name: torchvision's name of what it has its images encoded by.
        parts_of_audiocsrnet: the beginnings of its tensors' names → those of an AudioCSRNet's that they can start from.
        branch_options: of each early exit that was made here, the options of its own.
        activation_ranges: what int8 needs of layers, by name; empty where not measured.
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
        """What a branch finds at a place, in ``config``'s shape."""
        raise NotImplementedError  # abstract

    def branch_kinds(self, place: str) -> tuple[str, ...]:
        """The kinds of branches (:mod:`crowdexit.models.exits.registry`) that fit a place."""
        at = self.exit_location(place, self.config)
        return tuple(name for name, kind in exit_kinds().items() if kind.fits(at))

    def add_branch(self, name: str, place: str, kind: str, options: Mapping[str, Any] | None = None) -> None:
        """Put a fresh branch of a kind at a place.

        Args:
            options: fields of the configuration that shape branches (``branch_fields``), and options of the kind's
                own, for this one alone.

        Raises:
            ValueError: for a place, a kind or an option that this network does not have, or a name that is taken.
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
        """Put an early exit called ``name`` at a place.

        Raises:
            ValueError: if the place is not one of this network's, or the name is taken.
        """
        self._check_place(place)
        if name in self.branches or name == FINAL:
            raise ValueError(f"exit {name!r} already exists")
        self.branches[name] = branch
        self._stage_of[name] = self.places[place]

    @property
    def audio_encoder(self) -> Any:
        """Its stage that encodes the audio (:class:`crowdexit.models.backbones.fronts.AudioEncoder`), or None."""
        return next((stage for stage in self.stages if cast(Stage, stage).encodes_audio), None)

    def published_problem(self, kind: str) -> str | None:
        """Why published weights of a kind do not fit this configuration, or None."""
        return None

    @property
    def exit_names(self) -> list[str]:
        """All exits in the order in which they answer, ``final`` last."""
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
        """The index of the stage after which an exit stands."""
        return len(self.stages) - 1 if name == FINAL else self._stage_of[name]

    def uses_audio(self, name: str) -> bool:
        """Whether an exit's answer depends on the audio."""
        before = self.stages[: self.stage_of(name) + 1]
        return self.exit_module(name).uses_audio or any(cast(Stage, stage).fuses_audio for stage in before)

    def advance(self, index: int, state: Features) -> Features:
        """Run one stage."""
        out: Features = self.stages[index](state)
        return out

    def run_exit(self, name: str, state: Features) -> ExitOutput:
        """Run one exit on what its stage handed over."""
        answer: ExitOutput = self.exit_module(name)(state)
        return answer

    def stream(self, features: Features, exits: Collection[str] | None = None) -> Iterator[tuple[str, ExitOutput]]:
        """Each wanted exit's answer as soon as it is there; see :func:`crowdexit.models.chain.iter_outputs`."""
        return iter_outputs(self, features, exits)

    def forward(self, features: Features, exits: Collection[str] | None = None) -> dict[str, ExitOutput]:
        """The answers of the wanted exits (default: all) by name."""
        return dict(self.stream(features, exits))

    def backbone_modules(self) -> list[nn.Module]:
        """The stages and the final exit: what classifier-wise training leaves as it is."""
        return [*self.stages, self.final]
