"""Prepares Speech Commands (Warden, 2018) for classification: ``crowdexit prepare speech-commands``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray

from crowdexit.data.spectrogram import SPEECH_RATE, Spectrogram, beginning
from crowdexit.data.store import SPLITS
from crowdexit.errors import CrowdExitError

from .common import Destination, Size, Skipped, Strict, by_hash, check_size, plain, read_lines, run, shown
from .labelled import Labelled, prepare_classes, read_recording
from .registry import DataSet

WORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
CLASSES = (*WORDS, "unknown", "silence")
UNKNOWN, SILENCE = CLASSES.index("unknown"), CLASSES.index("silence")
LISTS = {"val": "validation_list.txt", "test": "testing_list.txt"}
NOISE = "_background_noise_"
# Which stretch of each noise file a split takes its silence from, as shares of its length.
STRETCHES = {"train": (0.0, 0.8), "val": (0.8, 0.9), "test": (0.9, 1.0)}
VOLUMES = (1.0, 0.5, 0.25, 0.125)  # of the silence, in turns
_NOISE_SECONDS = 600  # of a noise file that are used; the longest that is published has 95


@dataclass(frozen=True)
class Second(Labelled):
    """``path`` is below SRC. Of noise, ``start`` is where in it the second begins, in samples."""

    path: str
    start: int = 0
    volume: float = 1.0


DATA_SET = DataSet("Speech Commands, spoken words (Warden, 2018)", task="classification", has_audio=True)
app = typer.Typer(add_completion=False)


@app.command()
def main(
    src: Annotated[Path, typer.Argument(metavar="SRC", help="Folder of yes/, no/, …, the two lists and the noise.")],
    dst: Destination,
    size: Size = 224,
    strict: Strict = False,
) -> None:
    """Prepare Speech Commands: one HDF5 file of spectrograms and labels, the usual twelve classes.

    The splits are the official lists'. `unknown` are recordings of the other words, `silence` seconds of the
    background noise; in each split they are as many as the ten words have on average there. Which recordings
    these are is fixed by the hashes of their names; each split has its own stretch of every noise file. The
    images are those of crowdexit.data.spectrogram.stft_image. An interrupted run resumes.

    Example: crowdexit prepare speech-commands speech_commands_v0.02 data/speech-commands.h5
    """
    if not src.is_dir():
        raise CrowdExitError(f"{src}: no such folder")
    skipped: Skipped = []
    notes: list[str] = []
    seconds = find_spoken(src, skipped, notes, strict=strict)
    wanted = {split: share_of(seconds, split) for split in SPLITS}
    noise = lru_cache(maxsize=1)(lambda path: read_noise(src / path))  # the seconds come file by file
    seconds += find_silence(src, wanted, noise, skipped)

    spectrogram = Spectrogram("stft", size)

    def make(second: Second) -> NDArray[np.uint8]:
        if second.label == SILENCE:
            samples = noise(second.path)[second.start : second.start + SPEECH_RATE] * second.volume
            return spectrogram.of(samples, SPEECH_RATE)
        return spectrogram.of(*read_recording(src / second.path))

    prepare_classes(
        dst,
        CLASSES,
        "Speech Commands (Warden, 2018), twelve classes",
        seconds,
        make,
        settings=f"speech_commands {src.resolve()} {size} {seconds}",
        what="recordings",
        spectrogram=spectrogram,
        notes=lambda _: notes,
        skipped=skipped,
        strict=strict,
    )


def find_spoken(src: Path, skipped: Skipped, notes: list[str], *, strict: bool) -> list[Second]:
    """The recordings of the ten words and those drawn from the others, each with its split.

    Args:
        src: the folder.
        skipped: gets the recordings that both lists name.
        notes: gets a line for each list that names files which are not there.
        strict: whether these are an error.

    Raises:
        CrowdExitError: if one of the words or lists is missing, or there is no other word.
    """
    found: dict[str, list[str]] = {}
    try:
        for folder in sorted(src.iterdir()):
            if folder.is_dir() and not folder.name.startswith(("_", ".")):
                files = sorted(
                    path.name
                    for path in folder.iterdir()
                    if path.suffix.lower() == ".wav" and not path.name.startswith(".")
                )
                if files:
                    found[folder.name] = [f"{folder.name}/{name}" for name in files]
        for word in WORDS:
            if word not in found:
                there = "holds no .wav file" if (src / word).is_dir() else "is missing"
                raise CrowdExitError(f"{src}: the folder of the word {word!r} {there}")
    except OSError as error:
        raise CrowdExitError(f"{error.filename}: cannot be read ({error.strerror})") from error
    if len(found) == len(WORDS):
        raise CrowdExitError(f"{src}: holds no other words than the ten, so there is nothing for 'unknown'")
    splits = read_lists(src, {id for ids in found.values() for id in ids}, skipped, notes, strict=strict)

    spoken: list[Second] = []
    others: list[Second] = []
    for word, ids in found.items():
        mine, label = (spoken, WORDS.index(word)) if word in WORDS else (others, UNKNOWN)
        mine += [Second(id, splits[id], label, id) for id in ids if id in splits]
    unknown: list[Second] = []
    for split in SPLITS:
        drawn = set(by_hash(other.id for other in others if other.split == split)[: share_of(spoken, split)])
        unknown += [other for other in others if other.id in drawn]
    return spoken + unknown


def share_of(seconds: Sequence[Second], split: str) -> int:
    """How many recordings the ten words have in a split on average; at least one, if there are any."""
    total = sum(second.split == split and second.label < len(WORDS) for second in seconds)
    return max(round(total / len(WORDS)), min(total, 1))


def read_lists(src: Path, ids: set[str], skipped: Skipped, notes: list[str], *, strict: bool) -> dict[str, str]:
    """The split of each recording, ``WORD/FILE.wav``: what neither list names is to train on.

    Args:
        src: the folder.
        ids: the recordings that are there. What is in the lists is only compared with them.
        skipped: gets the recordings that both lists name, which get no split.
        notes: gets a line for each list that names what is not there.
        strict: whether that is an error.

    Raises:
        CrowdExitError: if a list is missing, or by ``strict``.
    """
    named: dict[str, set[str]] = {}
    any_case = {id.lower(): id for id in ids}
    for split, name in LISTS.items():
        path = src / name
        try:
            if not path.is_file():
                raise CrowdExitError(f"{src}: holds no {name}, which lists the {split} split")
            check_size(path.stat().st_size, "list")
            lines = read_lines(path, errors="surrogateescape")
        except OSError as error:
            raise CrowdExitError(f"{path}: cannot be read ({error.strerror})") from error
        # A list may write an ending in other letters than the file.
        listed = {line if line in ids else any_case.get(line.lower(), line) for line in map(str.strip, lines) if line}
        missing = sorted(listed - ids)
        if missing and strict:
            raise CrowdExitError(f"{shown(missing[0])}: listed in {name}, but missing")
        if missing:
            notes.append(f"{len(missing)} recordings listed in {name} are missing ({shown(missing[0])} first)")
        named[split] = listed & ids
    both = named["val"] & named["test"]
    skipped += [(shown(id), "both lists name it") for id in sorted(both)]
    held = {id: split for split, mine in named.items() for id in mine}
    return {id: held.get(id, "train") for id in ids - both}


def find_silence(
    src: Path, wanted: Mapping[str, int], noise: Callable[[str], NDArray[np.float64]], skipped: Skipped
) -> list[Second]:
    """Seconds of the background noise, so many as ``wanted`` for each split, evenly spread over its stretches.

    Args:
        src: the folder.
        wanted: how many, by split.
        noise: reads a noise file, by its path below SRC: (samples,).
        skipped: gets the noise files that cannot be read.

    Raises:
        CrowdExitError: if there is no noise, or too little for as many different seconds.
    """
    try:
        paths = sorted(path for path in (src / NOISE).glob("[!.]*") if path.suffix.lower() == ".wav")
    except OSError as error:
        raise CrowdExitError(f"{error.filename}: cannot be read ({error.strerror})") from error
    lengths: dict[str, int] = {}
    for path in paths:
        name = f"{NOISE}/{path.name}"
        try:
            if not plain(name):
                raise CrowdExitError("its name is not plain text")
            lengths[name] = len(noise(name))
        except CrowdExitError as error:
            skipped.append((shown(name), str(error)))
    if not lengths:
        raise CrowdExitError(f"{src}: no usable .wav file in {NOISE}, so there is nothing for 'silence'")
    seconds: list[Second] = []
    for split, number in wanted.items():
        first, last = STRETCHES[split]
        # From each file's first to its last place where a second of it begins and ends within the stretch.
        places = {
            name: range(int(first * length), int(last * length) - SPEECH_RATE + 1) for name, length in lengths.items()
        }
        total = sum(map(len, places.values()))
        if total < number:
            raise CrowdExitError(f"{src}: the noise in {NOISE} is too short for {number} seconds of {split}")
        chosen = [(2 * n + 1) * total // (2 * number) for n in range(number)]
        passed = turn = 0
        for name, there in places.items():
            while turn < number and chosen[turn] < passed + len(there):
                start, volume = there[chosen[turn] - passed], VOLUMES[turn % len(VOLUMES)]
                seconds.append(Second(f"{name}@{start}x{volume:g}", split, SILENCE, name, start, volume))
                turn += 1
            passed += len(there)
    return seconds


def read_noise(path: Path) -> NDArray[np.float64]:
    """A file of background noise in mono at 16 kHz, (samples,); of a very long one the first ten minutes.

    Raises:
        CrowdExitError: if it cannot be read, or is no usable sound.
    """
    waveform, rate = read_recording(path)
    return beginning(waveform, rate, SPEECH_RATE, _NOISE_SECONDS)


if __name__ == "__main__":
    sys.exit(run(app))
