"""The one door for callers: a picture and perhaps a sound go in, counts come out as the exits answer."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from crowdexit import zoo
from crowdexit.backbones.audiocsrnet import STRIDE
from crowdexit.data.log_mel import log_mel, read_audio
from crowdexit.data.picture import MIN_SIDE, PictureError, Placement, normalise, read_picture, views
from crowdexit.errors import CrowdExitError
from crowdexit.inference.runtime import Runtime, pick
from crowdexit.intervals import Intervals
from crowdexit.memory import keep_freed_memory
from crowdexit.network import FINAL, MultiExitNetwork
from crowdexit.stages import Features, inputs

Picture = NDArray[np.uint8] | str | Path
Sound = tuple[NDArray[np.float32], int] | NDArray[np.float32] | str | Path

# A picture that would shrink by more than this to fit is cut into tiles: its people would be lost.
LEAST_SCALE = 1 / 4
TILES_AT_ONCE = 4


class CounterError(CrowdExitError):
    """A request that this counter cannot serve."""


@dataclass(frozen=True)
class ExitResult:
    """What one exit says.

    Attributes:
        exit: its name.
        count: people.
        interval: (low, high), or None where the checkpoint is not calibrated.
        latency_ms: from the request to this answer, preparing the picture included.
        density: (h, w) heads per cell of 8×8 network pixels over the picture without padding, from the
            final exit; None from early exits.
    """

    exit: str
    count: float
    interval: tuple[float, float] | None
    latency_ms: float
    density: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class CountResult:
    """All answers to one request, and the one that was chosen."""

    model: str
    chosen: ExitResult
    exits: tuple[ExitResult, ...]

    @property
    def count(self) -> float:
        return self.chosen.count

    def to_dict(self, source: str) -> dict[str, Any]:
        """The JSON form (DESIGN.md, section 4)."""
        return {
            "source": source,
            "model": self.model,
            "count": round(self.count, 2),
            "chosen_exit": self.chosen.exit,
            "latency_ms": round(self.chosen.latency_ms, 2),
            "exits": [
                {
                    "exit": e.exit,
                    "count": round(e.count, 2),
                    "interval": None if e.interval is None else [round(bound, 2) for bound in e.interval],
                    "latency_ms": round(e.latency_ms, 2),
                }
                for e in self.exits
            ],
        }


@dataclass(frozen=True)
class _Tile:
    """A rectangle of the picture, (x, y, width, height), laid on the network's canvas."""

    box: tuple[int, int, int, int]
    placement: Placement


def tile_boxes(width: int, height: int, native: tuple[int, int]) -> list[tuple[int, int, int, int]]:
    """Cut a picture into the fewest equal rectangles (x, y, w, h) of which none shrinks below a quarter."""
    columns = max(1, math.ceil(width * LEAST_SCALE / native[0]))
    rows = max(1, math.ceil(height * LEAST_SCALE / native[1]))
    xs = [round(i * width / columns) for i in range(columns + 1)]
    ys = [round(i * height / rows) for i in range(rows + 1)]
    return [(xs[c], ys[r], xs[c + 1] - xs[c], ys[r + 1] - ys[r]) for r in range(rows) for c in range(columns)]


def hear(sound: Sound | None) -> NDArray[np.float32] | None:
    """Any form of sound as a log-mel (96, 64): a file, (waveform, sample rate), or a log-mel already.

    Raises:
        AudioError: if it cannot be read or holds no sound.
        CounterError: if an array is not (96, 64).
    """
    if sound is None:
        return None
    if isinstance(sound, (str, Path)):
        sound = read_audio(sound)
    if isinstance(sound, tuple):
        return log_mel(*sound)
    if sound.shape != (96, 64) or not np.isfinite(sound).all():
        raise CounterError("a log-mel has the shape (96, 64) and finite values")
    return sound.astype(np.float32)


class CrowdCounter:
    """Counts people with one network on one runtime.

    Args:
        network: with its weights.
        model: the name to report.
        runtime: how stages and exits are run.
        exits: names to serve; default: the SL-ViT branches (``served_exits``) and the final exit.
        intervals: the checkpoint's calibration.

    Raises:
        CounterError: for an exit that the network does not have.
    """

    def __init__(
        self,
        network: MultiExitNetwork,
        model: str,
        *,
        runtime: Runtime | None = None,
        exits: Sequence[str] | None = None,
        intervals: Intervals | None = None,
    ) -> None:
        if network.classifies:
            raise CounterError(f"{model} tells classes apart; it does not count")
        self.network = network
        self.model = model
        self.exits = served_exits(network) if exits is None else self._known(exits)
        self.intervals = intervals or Intervals()
        self.chain = (runtime or pick("auto")).ready(network)

    def _known(self, exits: Sequence[str]) -> list[str]:
        for name in exits:
            if name not in self.network.exit_names:
                raise CounterError(f"no exit {name!r} in {self.model} (it has {', '.join(self.network.exit_names)})")
        return [name for name in self.network.exit_names if name in exits]

    @property
    def size(self) -> tuple[int, int]:
        """The (width, height) at which a picture is looked at."""
        return self.network.config.scene

    def stream(
        self, image: Picture, audio: Sound | None = None, *, exits: Sequence[str] | None = None
    ) -> Iterator[ExitResult]:
        """Yield each exit's answer as soon as it is there; what the caller no longer asks for is not computed.

        Args:
            image: H×W×3 uint8 RGB, or a file.
            audio: a file, (waveform, sample rate), a log-mel (96, 64), or None: not heard.
            exits: names; default: all that this counter serves.

        A picture more than four times the native size is cut into tiles, which are added; the sound belongs
        to the whole scene and is then not used.

        Raises:
            CrowdExitError: for a picture or a sound that cannot be used.
        """
        begun = time.perf_counter()
        wanted = self.exits if exits is None else self._known(exits)
        picture = _checked(read_picture(image) if isinstance(image, (str, Path)) else image)
        heard = hear(audio)
        height, width = picture.shape[:2]
        boxes = tile_boxes(width, height, self.size)
        if len(boxes) == 1:
            for name, values, density, placements in self._pass([picture], [heard], wanted):
                map_ = None if density is None else _without_padding(density[0], placements[0])
                yield self._result(name, float(values[0]), map_, begun, heard is not None)
            return
        # Tiles answer together, a few at a time: exit by exit needs every tile at that exit.
        sums = dict.fromkeys(wanted, 0.0)
        maps: list[tuple[tuple[int, int, int, int], NDArray[np.float32]]] = []
        for start in range(0, len(boxes), TILES_AT_ONCE):
            part = boxes[start : start + TILES_AT_ONCE]
            tiles = [picture[y : y + h, x : x + w] for x, y, w, h in part]
            for name, values, density, placements in self._pass(tiles, [None] * len(tiles), wanted):
                sums[name] += float(values.sum())
                if density is not None:
                    maps += [(box, _without_padding(d, p)) for box, d, p in zip(part, density, placements, strict=True)]
        for name in wanted:
            map_ = _assemble(maps, width, height) if name == FINAL and maps else None
            yield self._result(name, sums[name], map_, begun, False)

    def _pass(
        self,
        pictures: Sequence[NDArray[np.uint8]],
        sounds: Sequence[NDArray[np.float32] | None],
        exits: Sequence[str],
    ) -> Iterator[tuple[str, NDArray[np.float32], NDArray[np.float32] | None, list[Placement]]]:
        """Run a batch of pictures: (exit, counts (B,), density (B, h, w) or None, placements)."""
        config = self.network.config
        seen = [views(picture, config.size, config.view) for picture in pictures]
        laid = [view for of_one in seen for view in of_one]
        heard = [sound for sound, of_one in zip(sounds, seen, strict=True) for _ in of_one]
        starts = np.cumsum([0, *(len(of_one) for of_one in seen[:-1])])
        placements = [placement for _, placement in laid]
        for name, answer in self.chain.stream(batch_of(laid, heard, config.size), exits):
            density = None if answer.density is None else answer.density[:, 0].numpy()
            counts = np.add.reduceat(answer.value.numpy(), starts)
            yield name, counts, density, placements

    def _result(
        self, name: str, count: float, density: NDArray[np.float32] | None, begun: float, heard: bool
    ) -> ExitResult:
        if not math.isfinite(count):
            raise CounterError(f"{self.model}: the exit {name} did not give a number")
        # A regressor may undershoot zero; a crowd does not.
        count = max(0.0, count)
        interval = self.intervals.around(name, count, heard=heard)
        return ExitResult(name, count, interval, 1000 * (time.perf_counter() - begun), density)

    def count(
        self,
        image: Picture,
        audio: Sound | None = None,
        *,
        exit: str = "auto",
        deadline_ms: float | None = None,
    ) -> CountResult:
        """Count with every exit up to ``exit``, and choose one.

        Args:
            exit: the last exit to run and the one to choose; ``auto`` is the last that this counter serves.
            deadline_ms: choose the latest answer that is there by then; when not even the first exit's is,
                that one is waited for. Checked between stages.

        Raises:
            CrowdExitError: as :meth:`stream`; for a deadline that is not positive.
        """
        if deadline_ms is not None and not deadline_ms > 0:
            raise CounterError(f"a deadline of {deadline_ms:g} ms cannot be kept")
        last = self.exits[-1] if exit == "auto" else self._known([exit])[0]
        until = self.network.stage_of(last)
        wanted = [name for name in self.exits if self.network.stage_of(name) <= until and name != FINAL]
        wanted = [name for name in wanted if name != last] + [last]
        results: list[ExitResult] = []
        for result in self.stream(image, audio, exits=wanted):
            if deadline_ms is not None and results and result.latency_ms > deadline_ms:
                break
            results.append(result)
            if deadline_ms is not None and result.latency_ms >= deadline_ms:
                break
        chosen = next((r for r in results if r.exit == last), results[-1])
        return CountResult(self.model, chosen, tuple(results))

    def count_batch(
        self,
        pictures: Sequence[NDArray[np.uint8]],
        sounds: Sequence[NDArray[np.float32] | None],
        *,
        exits: Sequence[str] | None = None,
    ) -> dict[str, NDArray[np.float32]]:
        """Counts (B,) by exit for pictures of ordinary size, H×W×3 uint8, and log-mels (96, 64) or None."""
        wanted = self.exits if exits is None else self._known(exits)
        return {name: np.maximum(values, 0) for name, values, _, _ in self._pass(pictures, sounds, wanted)}


def served_exits(network: MultiExitNetwork) -> list[str]:
    """The exits to run unless told otherwise: one a place, the one named like the place, and the final."""
    plain = [name for name in network.exit_names if name in network.places or name == FINAL]
    return plain if len(plain) > 1 else network.exit_names


def load(name: str | Path, *, runtime: str = "auto", exits: Sequence[str] | None = None) -> CrowdCounter:
    """A counter with a shipped model's or a checkpoint's weights.

    Args:
        name: of a shipped model, or the path of a checkpoint.
        runtime: ``auto``, or a name of :func:`crowdexit.inference.runtime.names`.
        exits: names to serve; default: one a place, and the final exit.

    Raises:
        CrowdExitError: if there is no such model, checkpoint, runtime or exit.
    """
    keep_freed_memory()
    picked = pick(runtime)
    network, spec = zoo.load(name)
    return CrowdCounter(
        network, spec.model, runtime=picked, exits=exits, intervals=Intervals.from_dict(spec.meta.get("intervals"))
    )


def batch_of(
    laid: Sequence[tuple[NDArray[np.uint8], Placement]],
    sounds: Sequence[NDArray[np.float32] | None],
    size: tuple[int, int],
) -> Features:
    """Pictures on their canvases and their log-mels as the network's input."""
    image = torch.from_numpy(np.stack([normalise(canvas) for canvas, _ in laid]))
    inside = torch.from_numpy(np.stack([placement.inside(size) for _, placement in laid]))[:, None]
    silence = np.zeros((96, 64), np.float32)
    mels = torch.from_numpy(np.stack([silence if s is None else s for s in sounds]))[:, None]
    heard = torch.tensor([s is not None for s in sounds])
    return inputs(image, mels, heard, inside)


def _checked(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise PictureError("a picture is an array H×W×3 of bytes")
    if min(picture.shape[:2]) < MIN_SIDE:
        raise PictureError(f"{picture.shape[1]}×{picture.shape[0]} is too small to count in ({MIN_SIDE} at least)")
    return picture


def _without_padding(density: NDArray[np.float32], placement: Placement) -> NDArray[np.float32]:
    """The cells of a canvas' density map that the picture covers; no mass lies outside them."""
    (x, y), (w, h) = placement.offset, placement.size
    return density[y // STRIDE : -(-(y + h) // STRIDE), x // STRIDE : -(-(x + w) // STRIDE)]


def _assemble(
    maps: Sequence[tuple[tuple[int, int, int, int], NDArray[np.float32]]], width: int, height: int
) -> NDArray[np.float32]:
    """One density map for a tiled picture, at most 2048 cells a side, each tile's mass kept."""
    scale = min(1 / STRIDE, 2048 / max(width, height))
    out = np.zeros((math.ceil(height * scale), math.ceil(width * scale)), np.float32)
    for (x, y, w, h), density in maps:
        x0, y0, x1, y1 = (round(v * scale) for v in (x, y, x + w, y + h))
        x1, y1 = max(x1, x0 + 1), max(y1, y0 + 1)
        laid = cv2.resize(density, (x1 - x0, y1 - y0), interpolation=cv2.INTER_LINEAR)
        mass = float(laid.sum())
        target = out[y0:y1, x0:x1]
        if mass > 0:
            target += (laid * (float(density.sum()) / mass))[: target.shape[0], : target.shape[1]]
    return out
