"""Gives a prepared set without audio a simulated ambience, marked so: ``crowdexit prepare ambience``.

The acoustic model stands in ``crowdexit.data.ambience``, the measuring in ``data_prep.ambience_report``.
"""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray

from crowdexit.data.ambience import MODEL_VERSION, SAMPLE_RATE, VoiceBank, simulate
from crowdexit.data.log_mel import log_mel
from crowdexit.data.store import Store, StoredSample
from crowdexit.data.voices import read_voices
from crowdexit.errors import CrowdExitError
from crowdexit.utils import command

from .ambience_report import measure, plot
from .common import CORES, Jobs, Strict, Task, prepare, run
from .registry import DataSet

DATA_SET = DataSet("Simulated audio for a prepared set of images", task="counting", has_audio=True)
app = typer.Typer(add_completion=False)


@app.command()
def main(
    src: Annotated[Path, typer.Argument(metavar="SRC.h5", help="A prepared file.")],
    dst: Annotated[
        Path | None,
        typer.Argument(
            metavar="DST.h5",
            help="The file to write; without it SRC is only measured or drawn.",
            callback=command.output_file,
        ),
    ] = None,
    voices: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of voice recordings (WAV), for DST.")
    ] = None,
    voices_origin: Annotated[
        str | None, typer.Option(help="Origin of the voices, stored in the file [default: DIR's name].")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the simulation.")] = 0,
    takes: Annotated[int, typer.Option(min=0, help="Further seconds for each training image.")] = 8,
    measured: Annotated[
        bool, typer.Option("--measure", help="Print how much of the count's variance the audio explains.")
    ] = False,
    plotted: Annotated[
        Path | None,
        typer.Option(
            "--plot", metavar="OUT.png", help="Plot some of the audio, and measure.", callback=command.output_file
        ),
    ] = None,
    strict: Strict = False,
    jobs: Jobs = CORES,
) -> None:
    """Add a simulated second of audio to every image that has none.

    Recorded audio is kept. Simulated audio depends only on seed and id, not on the order or the number of
    processes. Training images get further takes: other seconds of the same crowd. An interrupted
    run resumes.

    Example: crowdexit prepare ambience data/shanghaitech.h5 data/ambience.h5 --voices recordings --measure
    """
    if dst is None and not (measured or plotted):
        raise CrowdExitError("nothing to do: name DST.h5, --measure or --plot")
    if dst is not None:
        if voices is None:
            raise CrowdExitError("--voices is missing: a folder of voice recordings is needed to write DST.h5")
        add_ambience(src, dst, voices, voices_origin, seed=seed, takes=takes, strict=strict, jobs=jobs)
    if measured or plotted:
        results = measure(dst or src)
        print(*results, sep="\n")
        if plotted:
            plot(dst or src, plotted, results)


def add_ambience(
    src: Path,
    dst: Path,
    voices: Path,
    voices_origin: str | None = None,
    *,
    seed: int = 0,
    takes: int = 8,
    strict: bool = False,
    jobs: int = CORES,
) -> None:
    """Copy a prepared file and give every sample without audio a simulated one; print the summary.

    Raises:
        CrowdExitError: if a file or the voices cannot be used, or ``src`` and ``dst`` are the same.
    """
    if src.resolve() == dst.resolve():
        raise CrowdExitError(f"{dst}: SRC and DST are the same file")
    banks = read_voices(voices)  # also so that a wrong folder fails here, once, and not for every sample
    origin = voices_origin or voices.resolve().name
    with Store(src) as store:
        tasks = [Task(id, split) for split in store.splits() for id in store.ids(split)]
        make = partial(make_sample, store=store, voices=voices, voices_origin=origin, seed=seed, takes=takes)
        stamp = src.stat()
        settings = (
            f"ambience {MODEL_VERSION} {src.resolve()} {stamp.st_size} {stamp.st_mtime_ns} "
            f"{voices.resolve()} {[len(bank) for bank in banks.values()]} {origin} {seed} {takes}"
        )
        prepare(dst, tasks, make, settings=settings, strict=strict, jobs=jobs).print()
    with Store(dst) as made:
        sources = Counter(made.info(split, id).audio_source for split in made.splits() for id in made.ids(split))
    print("  sound:", ", ".join(f"{number} {source}" for source, number in sorted(sources.items())))


def make_sample(task: Task, *, store: Store, voices: Path, voices_origin: str, seed: int, takes: int) -> StoredSample:
    """Read a sample and, if it has no audio, simulate it: take 0, and for a training image takes 1, 2, …

    Raises:
        CrowdExitError: if the sample is damaged, or its count out of the model's range.
    """
    sample = store.read(task.split, task.id, with_takes=True)
    if sample.audio_source != "none":
        return sample
    bank = read_voices(voices)[task.split]

    def simulate_take(take: int) -> NDArray[np.float32]:
        return log_mel(simulate(sample.count, bank, generator(seed, task.id, take)), SAMPLE_RATE)

    further = [simulate_take(take) for take in range(1, takes + 1)] if task.split == "train" else []
    return replace(
        sample,
        log_mel=simulate_take(0),
        takes=np.stack(further).astype(np.float16) if further else None,
        audio_source="simulated",
        origin={**sample.origin, **marks(bank, voices_origin, seed)},
    )


def marks(bank: VoiceBank, voices_origin: str, seed: int) -> Mapping[str, str]:
    """What is kept with every simulated audio."""
    return {
        "sound": "simulated, not recorded with the image",
        "ambience_model": MODEL_VERSION,
        "ambience_seed": str(seed),
        "ambience_voices": f"{voices_origin} ({len(bank)} recordings)",
    }


def generator(seed: int, id: str, take: int) -> np.random.Generator:
    """The generator of one second: the same for a seed, id and take, in any order and any process."""
    key = hashlib.sha256(f"{seed}\n{id}\n{take}".encode()).digest()
    return np.random.default_rng(int.from_bytes(key, "little"))


if __name__ == "__main__":
    sys.exit(run(app))
