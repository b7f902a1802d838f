"""The registry of early exits: each kind is registered beside its code, with where it fits.

@register_exit("mean", reads=("map",), any_size=True, options={"width": 8})
def mean(at: ExitLocation) -> Exit:
    return MeanExit(at.channels, at.outputs, **at.settings_for("width"))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from crowdexit.models.stages import Exit
from crowdexit.utils.modules import import_modules


@dataclass(frozen=True)
class ExitLocation:
    """What an early exit finds where it is to stand, and how the network's configuration shapes exits there.

    Attributes:
        channels: C of the feature map, or D of the tokens.
        grid: (rows, columns) of the map, or of the patch tokens, at the network's own image size.
        tokens: whether the features are tokens, the classification token first, rather than a map.
        any_size: whether images have any size, so that no weights may belong to positions.
        audio: A, the length of the audio's vector there; 0: none.
        fuses_audio: whether every exit there takes the audio (AV1).
        heads: of the backbone's encoder layers; 0: it has none.
        takes_density: whether exits with density maps belong there.
        outputs: classes, or 1 for a count.
        settings: what shapes exits, by the names of their arguments.
    """

    channels: int
    grid: tuple[int, int]
    tokens: bool = False
    any_size: bool = False
    audio: int = 0
    fuses_audio: bool = False
    heads: int = 0
    takes_density: bool = False
    outputs: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def fused_audio(self) -> int:
        """The length of the audio's vector where every exit takes it, else 0."""
        return self.audio if self.fuses_audio else 0

    def settings_for(self, *names: str) -> dict[str, Any]:
        """Those of the settings that are there, as arguments."""
        return {name: self.settings[name] for name in names if name in self.settings}


@dataclass(frozen=True)
class ExitKind:
    """A kind of early exit.

    Attributes:
        make: a fresh one for a location.
        reads: the features that it can read.
        any_size: whether it works on images of any size.
        has_density: whether its answers have density maps.
        adds_audio: whether it brings the audio to where other exits take none.
        options: what shapes this kind alone, with defaults, beside the fields of the network's configuration.
    """

    make: Callable[[ExitLocation], Exit]
    reads: tuple[Literal["map", "tokens"], ...]
    any_size: bool = False
    has_density: bool = False
    adds_audio: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def fits(self, at: ExitLocation) -> bool:
        """Whether such an exit can stand there."""
        return (
            ("tokens" if at.tokens else "map") in self.reads
            and (self.any_size or not at.any_size)
            and (at.takes_density or not self.has_density)
            and (not self.adds_audio or (at.audio > 0 and not at.fuses_audio))
        )


_KINDS: dict[str, ExitKind] = {}


def register_exit(
    name: str,
    *,
    reads: Sequence[Literal["map", "tokens"]],
    any_size: bool = False,
    has_density: bool = False,
    adds_audio: bool = False,
    options: Mapping[str, Any] | None = None,
) -> Callable[[Callable[[ExitLocation], Exit]], Callable[[ExitLocation], Exit]]:
    """Make a kind of exits known by name; for a function that makes one for a location. See :class:`ExitKind`."""

    def register(make: Callable[[ExitLocation], Exit]) -> Callable[[ExitLocation], Exit]:
        _KINDS[name] = ExitKind(make, tuple(reads), any_size, has_density, adds_audio, dict(options or {}))
        return make

    return register


def exit_kinds() -> Mapping[str, ExitKind]:
    """All kinds of exits by name."""
    import_modules("crowdexit.models.exits")
    return _KINDS


def make_exit(name: str, at: ExitLocation, options: Mapping[str, Any]) -> Exit:
    """A fresh exit of a kind.

    Args:
        name: one of :func:`exit_kinds`.
        options: of the kind's own, in place of their defaults.
    """
    kind = exit_kinds()[name]
    made = kind.make(replace(at, settings={**at.settings, **kind.options, **options}))
    made.kind = name
    return made
