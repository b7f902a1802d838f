"""Makes a short video of known counts out of one annotated picture: ``python -m data_prep.clip``.

A window that wanders over a photograph gives a video whose true count is known in every frame. Its sound is
simulated, and the file says so.
"""

from __future__ import annotations

import csv
import sys
from fractions import Fraction
from pathlib import Path
from typing import Annotated

import av
import numpy as np
import typer
from numpy.typing import NDArray

from crowdexit.data.ambience import LENGTH, SAMPLE_RATE, VoiceBank, simulate
from crowdexit.data.store import Store, StoredSample, decode_image
from crowdexit.errors import CrowdExitError
from crowdexit.files import write_problem
from data_prep.ambience import generator, marks, read_voices
from data_prep.common import run

CONSTANT_RATE_FACTOR = "26"  # of H.264: smaller is better and larger

app = typer.Typer(add_completion=False)


@app.command()
def main(
    store: Annotated[Path, typer.Argument(metavar="STORE.h5", help="A prepared file.")],
    id: Annotated[str, typer.Argument(metavar="ID", help="The picture to wander over.")],
    out: Annotated[Path, typer.Argument(metavar="OUT.mp4", help="The clip; the counts go beside it as .csv.")],
    voices: Annotated[Path, typer.Option(metavar="DIR", help="Folder of voice recordings (WAV).")],
    voices_origin: Annotated[
        str | None, typer.Option(help="Where the voices come from, kept in the clip [default: DIR's name].")
    ] = None,
    size: Annotated[str, typer.Option(metavar="WxH", help="The window, in pixels; even numbers.")] = "640x360",
    seconds: Annotated[int, typer.Option(min=1, max=60, help="Length of the clip.")] = 10,
    fps: Annotated[int, typer.Option(min=1, max=60, help="Frames a second.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Another seed, another sound.")] = 0,
) -> None:
    """Make a clip with true counts: a window wanders over an annotated picture, with simulated sound.

    Example: python -m data_prep.clip data/shanghaitech.h5 B_IMG_100 clip.mp4 --voices recordings
    """
    width, height = parse_size(size)
    if out.suffix.lower() != ".mp4":
        raise CrowdExitError(f"{out}: the clip's name must end in .mp4")
    sample = find_sample(store, id)
    bank = read_voices(voices)[sample.split]
    corners = wander(sample, width, height, seconds * fps)
    counts = counts_inside(sample.points, corners, width, height)
    comment = "; ".join(f"{key}: {text}" for key, text in marks(bank, voices_origin or voices.name, seed).items())
    part = out.with_name(f"{out.stem}.part{out.suffix}")
    try:
        write_clip(
            part,
            crops(sample, corners, width, height),
            follow(counts[::fps], bank, id, seed),
            fps=fps,
            comment=f"moving window over {sample.origin.get('dataset', store.stem)} {id}; {comment}",
        )
        part.replace(out)
        with out.with_suffix(".csv").open("w", newline="") as file:
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(["frame", "time_s", "count"])
            rows.writerows([i, f"{i / fps:.3f}", count] for i, count in enumerate(counts))
    except (OSError, ValueError) as error:  # PyAV's errors are one or the other
        part.unlink(missing_ok=True)
        problem = write_problem(out, error) if isinstance(error, OSError) else f"{out}: cannot be written ({error})"
        raise CrowdExitError(problem) from error
    print(f"{out.name}: {len(counts)} frames of {size}, {min(counts)} to {max(counts)} heads, simulated sound")


def parse_size(size: str) -> tuple[int, int]:
    """``640x360`` as (640, 360).

    Raises:
        CrowdExitError: if it is not two even numbers of at least 32 (the video's colours come in 2×2 blocks).
    """
    width, times, height = size.lower().partition("x")
    if not (times and width.isdecimal() and height.isdecimal()):
        raise CrowdExitError(f"--size {size}: not of the form 640x360")
    if min(int(width), int(height)) < 32 or int(width) % 2 or int(height) % 2:
        raise CrowdExitError(f"--size {size}: both sides must be even and at least 32")
    return int(width), int(height)


def find_sample(path: Path, id: str) -> StoredSample:
    """The sample of this id, in whichever split.

    Raises:
        CrowdExitError: if it is not there.
    """
    with Store(path) as store:
        for split in store.splits():
            if (split, id) in store:
                return store.read(split, id)
    raise CrowdExitError(f"{path}: no picture {id!r}")


def wander(sample: StoredSample, width: int, height: int, frames: int) -> NDArray[np.int64]:
    """The window's upper left corner in each frame, (frames, 2), x y: once round the picture, and it closes.

    Raises:
        CrowdExitError: if the picture is smaller than the window.
    """
    room = np.array([sample.width - width, sample.height - height])
    if room.min() < 0:
        raise CrowdExitError(
            f"{sample.id}: {sample.width}×{sample.height} is smaller than the window of {width}×{height}"
        )
    turn = 2 * np.pi * np.arange(frames) / frames
    # Across and down out of step: the way is an ellipse, along which few and many heads take turns.
    way = 0.5 - 0.5 * np.cos(np.stack([turn, turn + 1.2], axis=1))
    return np.asarray(np.round(way * room).astype(np.int64))


def counts_inside(points: NDArray[np.float32], corners: NDArray[np.int64], width: int, height: int) -> list[int]:
    """How many of the heads, (N, 2), lie in the window at each of its places."""
    inside = (points >= corners[:, None]) & (points < corners[:, None] + np.array([width, height]))
    return [int(n) for n in inside.all(axis=2).sum(axis=1)]


def crops(sample: StoredSample, corners: NDArray[np.int64], width: int, height: int) -> list[NDArray[np.uint8]]:
    """What the window shows in each frame, (height, width, 3), RGB.

    Raises:
        CrowdExitError: if the image is damaged.
    """
    picture = decode_image(sample)
    return [np.ascontiguousarray(picture[y : y + height, x : x + width]) for x, y in corners]


def follow(counts: list[int], bank: VoiceBank, id: str, seed: int) -> NDArray[np.float32]:
    """Sound that follows the count: (len(counts) · 16000,) for one count a second.

    Simulated seconds that overlap by half and fade into each other at constant power.
    """
    fade = np.sin(np.pi * (np.arange(LENGTH) + 0.5) / LENGTH)  # its square and its neighbours' add up to one
    half = LENGTH // 2
    sound = np.zeros(len(counts) * LENGTH + LENGTH)
    for i in range(2 * len(counts) + 1):
        # This take is loudest at i / 2 seconds.
        take = simulate(counts[min(i // 2, len(counts) - 1)], bank, generator(seed, f"clip {id}", i))
        sound[i * half : i * half + LENGTH] += fade * take
    return np.clip(sound[half:-half], -1, 1).astype(np.float32)


def write_clip(
    path: Path, frames: list[NDArray[np.uint8]], sound: NDArray[np.float32], *, fps: int, comment: str
) -> None:
    """Write H.264 and AAC (mono, 16 kHz) into an MP4 file, with a comment in its metadata."""
    height, width = frames[0].shape[:2]
    with av.open(str(path), "w") as container:
        container.metadata["comment"] = comment
        video = container.add_stream("libx264", rate=fps, options={"crf": CONSTANT_RATE_FACTOR, "preset": "slow"})
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        audio = container.add_stream("aac", rate=SAMPLE_RATE, layout="mono")
        for picture in frames:
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode())
        block = av.AudioFrame.from_ndarray(sound[None], format="fltp", layout="mono")
        block.sample_rate, block.pts, block.time_base = SAMPLE_RATE, 0, Fraction(1, SAMPLE_RATE)
        container.mux(audio.encode(block))
        container.mux(audio.encode())


if __name__ == "__main__":
    sys.exit(run(app))
