"""A folder of voice recordings as the banks that the acoustic model draws from, one for each split."""

from __future__ import annotations

import hashlib
from fractions import Fraction
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.signal import resample_poly

from crowdexit.data.ambience import SAMPLE_RATE, VoiceBank
from crowdexit.data.log_mel import read_audio
from crowdexit.data.store import SPLITS
from crowdexit.errors import CrowdExitError

VOICES_UP_TO = {"train": 0.7, "val": 0.85}  # shares of the recordings, by the hash of their names


def find_voices(folder: Path) -> dict[str, list[Path]]:
    """The WAV files right in a folder, those of each split.

    The hashes of the names decide, so that held-out images are heard with held-out recordings and the
    division does not depend on how a folder is listed.

    Raises:
        CrowdExitError: if the folder is missing or has fewer than three WAV files.
    """
    if not folder.is_dir():
        raise CrowdExitError(f"{folder}: no such folder of voices")
    paths = sorted(
        (path for path in folder.iterdir() if path.suffix.lower() == ".wav"),
        key=lambda path: hashlib.sha256(path.name.encode()).digest(),
    )
    if len(paths) < len(SPLITS):
        raise CrowdExitError(f"{folder}: {len(paths)} WAV files; at least {len(SPLITS)} are needed, one for each split")
    train = min(round(VOICES_UP_TO["train"] * len(paths)), len(paths) - 2)
    val = min(max(round(VOICES_UP_TO["val"] * len(paths)), train + 1), len(paths) - 1)
    return {"train": paths[:train], "val": paths[train:val], "test": paths[val:]}


@cache
def read_voices(folder: Path) -> dict[str, VoiceBank]:
    """A bank of voices for each split, read once a process.

    Raises:
        CrowdExitError: if there are too few, one cannot be read, or all those of a split are silent.
    """
    banks = {}
    for split, paths in find_voices(folder).items():
        recordings = [_read_voice(path) for path in paths]
        try:
            banks[split] = VoiceBank.of(recordings)
        except CrowdExitError as error:
            raise CrowdExitError(f"{folder}: {error} (those for {split!r})") from error
    return banks


def _read_voice(path: Path) -> NDArray[np.float32]:
    waveform, rate = read_audio(path)
    ratio = Fraction(SAMPLE_RATE, rate).limit_denominator(1000)  # an odd rate would ask for a vast filter
    return np.asarray(resample_poly(waveform.mean(axis=0), ratio.numerator, ratio.denominator), np.float32)
