"""Reads mutated files in a process of its own: ``python reading.py KIND FOLDER FIRST LAST``.

One line of JSON for each case, written before it is read and after: whoever started it sees which one ended it.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from crowdexit.data.audio import read_audio, read_middle_second
from crowdexit.data.image import read_image
from crowdexit.data.store import Store
from crowdexit.errors import CrowdExitError
from crowdexit.export.images import read_image as read_plain_image
from crowdexit.models import zoo
from crowdexit.video.frames import Span, read_frames

# What a damaged length or size is most often.
NUMBERS = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]


def mutated(data: bytes, others: list[bytes], rng: np.random.Generator) -> bytes:
    """A file's bytes, damaged in one to four ways."""
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        if not out:
            break
        kind, at = int(rng.integers(8)), int(rng.integers(len(out)))
        if rng.random() < 0.5:  # headers decide most
            at = min(at, int(rng.integers(1, 257)), len(out) - 1)
        length = int(rng.integers(1, 65))
        if kind == 0:
            out[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            out[at : at + length] = rng.bytes(len(out[at : at + length]))
        elif kind == 2:
            width = int(rng.choice([1, 2, 4, 8]))
            number = int(rng.choice(NUMBERS)) % (1 << (8 * width))
            out[at : at + width] = number.to_bytes(width, "big" if rng.random() < 0.5 else "little")
        elif kind == 3:
            del out[at:]
        elif kind == 4:
            del out[at : at + length]
        elif kind == 5:
            out[at:at] = out[at : at + length]
        elif kind == 6:
            out[at : at + length] = bytes(length)
        else:
            other = others[int(rng.integers(len(others)))]
            begin = int(rng.integers(max(1, len(other))))
            out[at : at + length] = other[begin : begin + length]
    return bytes(out)


def _image(path: Path) -> None:
    pixels = read_image(path).pixels
    assert pixels.ndim == 3
    assert pixels.dtype == np.uint8


def _plain_image(path: Path) -> None:
    pixels, _ = read_plain_image(path)
    assert pixels.ndim == 3
    assert pixels.dtype == np.uint8


def _audio(path: Path) -> None:
    samples, rate = read_audio(path, seconds=60, warn=lambda line: None)
    assert np.isfinite(samples).all()
    assert rate > 0
    read_middle_second(path, warn=lambda line: None)


def _video(path: Path) -> None:
    for frame in read_frames(path, Span(fps=4.0), warn=lambda line: None):
        assert frame.image.dtype == np.uint8
        _ = frame.warnings


def _store(path: Path) -> None:
    with Store(path) as store:
        for split in store.splits():
            store.counts(split)
            for id in store.ids(split):
                store.read(split, id, with_takes=True)


def _checkpoint(path: Path) -> None:
    zoo.load(path)


READERS: dict[str, Callable[[Path], None]] = {
    "image": _image,
    "plain-image": _plain_image,
    "audio": _audio,
    "video": _video,
    "store": _store,
    "checkpoint": _checkpoint,
}


def cases(kind: str, folder: Path, first: int, last: int) -> Iterator[tuple[int, Path]]:
    """The number of each case, and its file."""
    seeds = sorted(path for path in folder.iterdir() if path.is_file())
    contents = [path.read_bytes() for path in seeds]
    for number in range(first, last):
        rng = np.random.default_rng((sum(kind.encode()), number))
        chosen = int(rng.integers(len(seeds)))
        path = folder / "case" / f"{number}{seeds[chosen].suffix}"
        path.write_bytes(mutated(contents[chosen], contents, rng))
        yield number, path


def main() -> None:
    kind, folder, first, last = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    warnings.simplefilter("ignore")
    logging.disable()
    (folder / "case").mkdir(exist_ok=True)
    inside = str(folder.resolve())
    opened: list[str] = []
    names = {path.name for path in folder.iterdir()} | {"case"}

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[0], (str, bytes)) and os.fsdecode(args[0]).startswith(inside):
            opened.append(Path(os.fsdecode(args[0])).name)

    sys.addaudithook(watch)
    for number, path in cases(kind, folder, first, last):
        print(json.dumps({"case": number}), flush=True)
        opened.clear()
        begun, error = time.perf_counter(), None
        try:
            READERS[kind](path)
        except CrowdExitError as problem:
            error = str(problem)
        except BaseException as problem:
            print(json.dumps({"case": number, "escaped": f"{type(problem).__name__}: {problem}"}), flush=True)
            raise
        foreign = [name for name in opened if name != path.name and name in names]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        done = {
            "case": number,
            "error": error,
            "seconds": time.perf_counter() - begun,
            "peak": peak,
            "foreign": foreign,
        }
        print(json.dumps(done), flush=True)
        path.unlink()
        gc.collect()


if __name__ == "__main__":
    main()
