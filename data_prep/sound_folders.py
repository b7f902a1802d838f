"""Prepares recordings in class folders for classification by spectrograms: ``crowdexit prepare sound-folders``."""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from crowdexit.data.spectrogram import Spectrogram
from crowdexit.data.store import SPLITS
from crowdexit.errors import CrowdExitError

from .class_folders import Folder, Place, Sample, Samples, find_samples, hidden
from .common import Destination, Size, Skipped, Strict, Val, divided, plain, run, shown
from .labelled import Labelled, prepare_classes, read_recording
from .registry import DataSet

SUFFIXES = (".wav", ".flac", ".ogg")


@dataclass(frozen=True)
class Recording(Labelled):
    """``place`` is where below the folder it is."""

    place: Place


DATA_SET = DataSet("Recordings in class folders", task="classification", has_audio=True)
app = typer.Typer(add_completion=False)


@app.command()
def main(
    src: Annotated[Path, typer.Argument(metavar="SRC", help="Folder of class folders, or with --label name of files.")],
    dst: Destination,
    size: Size = 224,
    seconds: Annotated[
        float, typer.Option(min=0.05, max=60, help="Of each recording's beginning; shorter ones end in silence.")
    ] = 1.0,
    label: Annotated[
        Literal["folder", "name"], typer.Option(help="The class is the folder's name, or a file's up to the first _.")
    ] = "folder",
    group: Annotated[
        str | None,
        typer.Option(metavar="REGEX", help="Files in whose names it matches the same text stay in one split."),
    ] = None,
    val: Val = 0.1,
    strict: Strict = False,
) -> None:
    """Prepare recordings (.wav, .flac, .ogg): one HDF5 file of their spectrograms as images, and labels.

    SRC holds train/CLASS and test/CLASS, optionally val/CLASS; or CLASS alone; or with --label name the files.
    Without val/, a share of the training recordings becomes `val`; of CLASS or files alone, another one as large
    becomes `test`. The hashes of the names decide, so that each class gets its share; with --group, those of the
    text that it matches in the file names (its first group, if it has one), so that nobody's voice is in two splits.
    The images are those of crowdexit.data.spectrogram.stft_image. An interrupted run resumes.

    Example: crowdexit prepare sound-folders recordings digits.h5 --label name --size 64 --group '_(.+)'
    """
    if not src.is_dir():
        raise CrowdExitError(f"{src}: no such folder")
    source = Folder(src)
    samples = find_named(source, src) if label == "name" else find_samples(source, src, SUFFIXES, "recording")
    skipped: Skipped = []
    spectrogram = Spectrogram("stft", size, seconds)
    recordings = split_up(samples, src, val, group, skipped)
    where = "the class folders" if label == "folder" else "the folder itself"
    prepare_classes(
        dst,
        samples.classes,
        f"recordings of {src.resolve().name}",
        recordings,
        lambda recording: spectrogram.of(*read_recording(src.joinpath(*recording.place))),
        settings=f"sound_folders {src.resolve()} {size} {seconds} {recordings}",
        what="recordings",
        spectrogram=spectrogram,
        notes=lambda _: [f"{samples.astray} recordings outside {where} skipped"] if samples.astray else [],
        skipped=skipped,
        strict=strict,
    )


def find_named(source: Folder, src: Path) -> Samples:
    """The recordings right in a folder, ``CLASS_REST.wav``; classes in alphabetical order.

    Raises:
        CrowdExitError: if there are fewer than two classes.
    """
    files = [place for place in source.files if not hidden(place) and place[-1].lower().endswith(SUFFIXES)]
    named = [place for place in files if len(place) == 1 and place[0].find("_") > 0]
    classes = sorted({name for (file,) in named if plain(name := file.split("_")[0])})
    if len(classes) < 2:
        raise CrowdExitError(f"{src}: holds no recordings of two classes (CLASS_REST{SUFFIXES[0]})")
    labels = {name: number for number, name in enumerate(classes)}
    found = [Sample(file, "", labels.get(file.split("_")[0], 0), (file,)) for (file,) in named]
    return Samples(classes, found, len(files) - len(named))


def split_up(samples: Samples, src: Path, val: float, group: str | None, skipped: Skipped) -> list[Recording]:
    """Give each recording its split; those whose names ``group`` does not match are added to ``skipped``.

    Raises:
        CrowdExitError: if ``group`` is no regular expression, matches nowhere, or cannot be kept to: there are too
            few groups, or SRC has one of them in two of its splits.
    """
    # By group, which reaches over classes; or recording by recording, so that each class has its share.
    keys = grouped(samples, src, group, skipped) if group is not None else {one.id: one.id for one in samples.found}
    found = [one for one in samples.found if one.id in keys]
    pools: dict[int, set[str]] = defaultdict(set)
    for one in found:
        if one.half in ("", "train"):
            pools[0 if group is not None else one.label].add(keys[one.id])
    splits: dict[str, str] = {}
    if "val" not in samples.halves:
        test = not samples.halves
        for pool in pools.values():
            splits |= divided(pool, val, test=test)
        needed = 3 if test else 2
        if group is not None and len(splits) < needed:
            raise CrowdExitError(f"{src}: --group yields only {len(splits)} groups to train on; {needed} are needed")

    def split(one: Sample) -> str:
        return one.half if one.half in ("val", "test") else splits.get(keys[one.id], "train")

    return [Recording(one.id, split(one), one.label, one.place) for one in found]


def grouped(samples: Samples, src: Path, group: str, skipped: Skipped) -> dict[str, str]:
    """What ``group`` matches in the file name, by the id of each recording where it matches anything.

    Raises:
        CrowdExitError: as :func:`split_up`.
    """
    try:
        pattern = re.compile(group)
    except re.error as error:
        raise CrowdExitError(f"--group {shown(group)}: not a regular expression ({error})") from error
    keys: dict[str, str] = {}
    halves: dict[str, str] = {}
    for one in samples.found:
        match = pattern.search(one.place[-1])
        key = match and match[min(1, pattern.groups)]
        if not key:  # also where it matches an empty text, or a first group that takes no part
            skipped.append((shown(one.id), "--group matches nothing in its name"))
            continue
        keys[one.id] = key
        if halves.setdefault(key, one.half) != one.half:
            both = " and ".join(split for split in SPLITS if split in (halves[key], one.half))
            raise CrowdExitError(f"{src}: {shown(key)!r}, which --group keeps in one split, is in {both}")
    if not keys:
        raise CrowdExitError(f"{src}: --group {shown(group)} matches nothing in any name")
    return keys


if __name__ == "__main__":
    sys.exit(run(app))
