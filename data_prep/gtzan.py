"""Prepares GTZAN (Tzanetakis and Cook, 2002) for classification: ``crowdexit prepare gtzan``."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray

from crowdexit.data.classes import ClassStore
from crowdexit.data.spectrogram import MUSIC_RATE, MUSIC_SECONDS, Spectrogram, beginning
from crowdexit.errors import CrowdExitError

from .common import Destination, Size, Skipped, Strict, divided, run, shown
from .labelled import Labelled, prepare_classes, read_recording
from .registry import DataSet

GENRES = ("blues", "classical", "country", "disco", "hiphop", "jazz", "metal", "pop", "reggae", "rock")
FOLDERS = ("", "genres", "genres_original", "Data/genres_original")  # in which the genres may lie
SUFFIXES = (".wav", ".au")
PIECES = 10  # of a clip of 30 s
HELD_OUT = 0.1  # share of each genre's clips for validation, and as many for test


@dataclass(frozen=True)
class Clip(Labelled):
    """``path`` is that of its file."""

    path: Path


DATA_SET = DataSet("GTZAN, music by genre (Tzanetakis and Cook, 2002)", task="classification", has_audio=True)
app = typer.Typer(add_completion=False)


@app.command()
def main(
    src: Annotated[Path, typer.Argument(metavar="SRC", help="Folder of the ten genres, or what holds genres/.")],
    dst: Destination,
    size: Size = 224,
    strict: Strict = False,
) -> None:
    """Prepare GTZAN: one HDF5 file of spectrograms, each of three seconds, and their genres.

    A clip (.wav or .au) gives ten pieces, or as many as it is long enough for. Of each genre's clips a tenth is
    `val` and a tenth `test`, by the hashes of their names; the pieces of a clip stay together. The set has no
    official split, and clips of one artist may be in two splits. The images are those of
    crowdexit.data.spectrogram.gtzan_image. An interrupted run resumes.

    Example: crowdexit prepare gtzan genres data/gtzan.h5
    """
    if not src.is_dir():
        raise CrowdExitError(f"{src}: no such folder")
    skipped: Skipped = []
    spectrogram = Spectrogram("gtzan", size, MUSIC_SECONDS)
    clips = find_clips(src, skipped)
    prepare_classes(
        dst,
        GENRES,
        "GTZAN (Tzanetakis and Cook, 2002)",
        clips,
        lambda clip: make(clip.path, spectrogram),
        settings=f"gtzan {src.resolve()} {size} {clips}",
        what="clips",
        spectrogram=spectrogram,
        notes=note_short,
        skipped=skipped,
        strict=strict,
    )


def find_clips(src: Path, skipped: Skipped) -> list[Clip]:
    """The clips of the ten genres, each with its split; a clip that is there in two formats is taken once.

    Raises:
        CrowdExitError: if a genre is missing or has no clip.
    """
    clips: list[Clip] = []
    try:
        root = next((src / name for name in FOLDERS if any((src / name / genre).is_dir() for genre in GENRES)), None)
        if root is None:
            raise CrowdExitError(f"{src}: holds no folder of a genre (genres/blues/blues.00000.wav)")
        for label, genre in enumerate(GENRES):
            if not (root / genre).is_dir():
                raise CrowdExitError(f"{root}: holds no folder of the genre {genre!r}")
            found: dict[str, Path] = {}
            for path in sorted((root / genre).iterdir(), reverse=True):  # .wav before .au
                if path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
                    if path.stem in found:
                        skipped.append((shown(f"{genre}/{path.name}"), f"{found[path.stem].name} is the same clip"))
                    else:
                        found[path.stem] = path
            if not found:
                raise CrowdExitError(f"{root}: the genre {genre!r} has no clip")
            splits = divided(found, HELD_OUT)
            clips += [Clip(f"{genre}/{name}", splits[name], label, found[name]) for name in sorted(found)]
    except OSError as error:
        raise CrowdExitError(f"{error.filename}: cannot be read ({error.strerror})") from error
    return clips


def make(path: Path, spectrogram: Spectrogram) -> NDArray[np.uint8]:
    """The spectrograms of a clip's pieces, (n, size, size, 3) uint8; n is at most ten.

    Raises:
        CrowdExitError: if it cannot be read, is no usable sound or too short for one piece.
    """
    waveform, rate = read_recording(path)
    # The whole clip is resampled, so that pieces have no borders of their own.
    samples = beginning(waveform, rate, MUSIC_RATE, PIECES * MUSIC_SECONDS)
    each = MUSIC_SECONDS * MUSIC_RATE
    pieces = [samples[n * each : (n + 1) * each] for n in range(min(PIECES, len(samples) // each))]
    if not pieces:
        raise CrowdExitError(f"shorter than a piece of {MUSIC_SECONDS} s")
    return np.stack([spectrogram.of(piece, MUSIC_RATE) for piece in pieces])


def note_short(store: ClassStore) -> list[str]:
    pieces = Counter(id.rsplit("/", 1)[0] for split in store.splits() for id in store.ids(split))
    short = sum(number < PIECES for number in pieces.values())
    return [f"{short} clips too short for ten pieces gave as many as they have"] if short else []


if __name__ == "__main__":
    sys.exit(run(app))
