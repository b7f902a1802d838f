"""Make the sample clip and images from a video and its annotated heads: ``python -m data_prep.clip``.

The heads are a table ``frame,x,y``: frames counted from the start of the excerpt, pixels from the upper left corner.
The audio is simulated from the annotated counts, and the clip says so.
"""

from __future__ import annotations

import csv
import math
import sys
import wave
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import av
import numpy as np
import typer
from numpy.typing import NDArray
from PIL import Image

from crowdexit.data.ambience import LENGTH, SAMPLE_RATE, VoiceBank, simulate
from crowdexit.data.voices import read_voices
from crowdexit.errors import CrowdExitError
from crowdexit.utils import command
from crowdexit.utils.files import write_problem

from .ambience import generator, marks
from .common import JPEG_QUALITY, run

CONSTANT_RATE_FACTOR = "23"  # of H.264: smaller is better and larger
VOICES = "test"  # the split of the recordings: nothing is trained or chosen on the samples

Heads = dict[int, list[tuple[float, float]]]

Video = Annotated[Path, typer.Argument(metavar="VIDEO", help="The video to cut from.")]
Table = Annotated[Path, typer.Argument(metavar="HEADS.csv", help="The heads: frame,x,y.")]
Voices = Annotated[Path, typer.Option(metavar="DIR", help="Folder of voice recordings (WAV).")]
Start = Annotated[int, typer.Option(min=0, help="Frame of the video that is frame 0 of the table.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the simulation.")]

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.command()
def excerpt(
    video: Video,
    heads: Table,
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT.mp4", help="The clip; the counts are written next to it as .csv.", callback=command.output_file
        ),
    ],
    voices: Voices,
    voices_origin: Annotated[
        str | None, typer.Option(help="Origin of the voices, stored in the clip [default: DIR's name].")
    ] = None,
    start: Start = 0,
    frames: Annotated[int, typer.Option(min=1, max=600, help="Length of the clip in frames.")] = 100,
    every: Annotated[int, typer.Option(min=1, help="Frames from one annotated frame to the next, from 0 on.")] = 5,
    seed: Seed = 0,
) -> None:
    """Cut an annotated excerpt from a video and add simulated audio.

    An annotated frame without a row has no heads. The frame rate is the video's own.

    Example: python -m data_prep.clip excerpt vtest.avi heads.csv clip.mp4 --voices recordings --start 690
    """
    _check_suffix(out, ".mp4")
    images, rate = read_video(video, start, frames)
    counts = {frame: len(points) for frame, points in read_heads(heads, images[0], range(0, frames, every)).items()}
    bank = read_voices(voices)[VOICES]
    seconds = [int(second * rate) for second in range(math.ceil(frames / rate))]
    audio = simulate_track([counts[frame // every * every] for frame in seconds], bank, seed)
    source = f"frames {start} to {start + frames - 1} of {video.name}, encoded again"
    audio_note = marks(bank, voices_origin or voices.resolve().name, seed)
    comment = "; ".join([source, *(f"{key}: {text}" for key, text in audio_note.items())])
    with _whole(out) as part:
        write_clip(part, images, audio[: round(frames / rate * SAMPLE_RATE)], rate=rate, comment=comment)
    with _whole(out.with_suffix(".csv")) as part:
        rows = [(frame, f"{float(frame / rate):.3f}", count) for frame, count in counts.items()]
        _write_csv(part, ["frame", "time_s", "count"], rows)
    most, least = max(counts.values()), min(counts.values())
    print(f"{out.name}: {frames} frames, {len(counts)} of them annotated, {least} to {most} heads, simulated audio")


@app.command()
def still(
    video: Video,
    heads: Table,
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT.jpg",
            help="The image; OUT.csv and OUT-simulated.wav are written next to it.",
            callback=command.output_file,
        ),
    ],
    voices: Voices,
    start: Start = 0,
    frame: Annotated[int, typer.Option(min=0, help="The frame, by the table's numbers.")] = 0,
    seed: Seed = 0,
) -> None:
    """Extract one annotated frame from a video, with its heads and a simulated second of audio.

    Example: python -m data_prep.clip still vtest.avi heads.csv street.jpg --voices recordings --start 690 --frame 25
    """
    _check_suffix(out, ".jpg")
    [image], _ = read_video(video, start + frame, 1)
    points = read_heads(heads, image).get(frame)
    if not points:
        raise CrowdExitError(f"{heads}: no heads in frame {frame}")
    audio = simulate(len(points), read_voices(voices)[VOICES], generator(seed, "still", 0))
    with _whole(out) as part:
        comment = f"frame {start + frame} of {video.name}"
        image.to_image().save(part, "JPEG", quality=JPEG_QUALITY, comment=comment)
    with _whole(out.with_suffix(".csv")) as part:
        _write_csv(part, ["x", "y"], points)
    with _whole(out.with_name(f"{out.stem}-simulated.wav")) as part, wave.open(str(part), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(np.round(audio * 32_767).astype("<i2").tobytes())
    print(f"{out.name}: {image.width}×{image.height}, {len(points)} heads, a second of simulated audio")


@app.command()
def collage(
    video: Video,
    heads: Table,
    out: Annotated[Path, typer.Argument(metavar="OUT.jpg", help="The image.", callback=command.output_file)],
    start: Start = 0,
    side: Annotated[int, typer.Option(min=8, max=128, help="Width and height of the crop, in pixels.")] = 24,
    seed: Annotated[int, typer.Option(min=0, help="Another seed, another order.")] = 0,
) -> None:
    """Fill an image of the video's size with squares around annotated heads: a dense crowd of a known count.

    All heads are used once in random order, then again in another order, until the image is full.

    Example: python -m data_prep.clip collage vtest.avi heads.csv crowd.jpg --start 690
    """
    _check_suffix(out, ".jpg")
    first = read_video(video, start, 1)[0][0]
    points = [(frame, *point) for frame, inside in sorted(read_heads(heads, first).items()) for point in inside]
    if not points:
        raise CrowdExitError(f"{heads}: no heads")
    if side > min(first.width, first.height):
        raise CrowdExitError(f"--side {side}: larger than the {first.width}×{first.height} video")
    frames = [image.to_ndarray(format="rgb24") for image in read_video(video, start, points[-1][0] + 1)[0]]
    crowd = fill(frames, points, side, np.random.default_rng(seed))
    with _whole(out) as part:
        number = (first.height // side) * (first.width // side)
        comment = f"{number} squares around heads in {video.name}, from frame {start} on"
        Image.fromarray(crowd).save(part, "JPEG", quality=JPEG_QUALITY, comment=comment)
    print(
        f"{out.name}: {crowd.shape[1]}×{crowd.shape[0]}, {number} heads, each cut out {number / len(points):.1f} times"
    )


def fill(
    frames: Sequence[NDArray[np.uint8]],
    points: Sequence[tuple[int, float, float]],
    side: int,
    rng: np.random.Generator,
) -> NDArray[np.uint8]:
    """Fill an image with squares around heads, row by row.

    Args:
        frames: (height, width, 3) each.
        points: frame, x and y of each head.
        side: of the squares; near the border they are moved into the frame.

    Returns:
        As high and wide as a frame, less what is left over beside whole squares.
    """
    height, width = frames[0].shape[:2]
    rows, columns = height // side, width // side
    rounds = -(-rows * columns // len(points))
    order = np.concatenate([rng.permutation(len(points)) for _ in range(rounds)])[: rows * columns]
    crowd = np.zeros((rows * side, columns * side, 3), np.uint8)
    for number, chosen in enumerate(order):
        frame, x, y = points[chosen]
        left = int(np.clip(round(x - side / 2), 0, width - side))
        top = int(np.clip(round(y - side / 2), 0, height - side))
        row, column = divmod(number, columns)
        crowd[row * side : (row + 1) * side, column * side : (column + 1) * side] = frames[frame][
            top : top + side, left : left + side
        ]
    return crowd


def read_video(path: Path, start: int, frames: int) -> tuple[list[Any], Fraction]:
    """Decode frames of a video.

    Returns:
        ``frames`` of :class:`av.VideoFrame` in YUV 4:2:0, from frame ``start`` on, and the frames per second.

    Raises:
        CrowdExitError: if it cannot be read, is too short, or has odd sides, pixels that are not square or no rate.
    """
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise CrowdExitError(f"{path}: has no video stream")
            stream = container.streams.video[0]
            rate, aspect = stream.average_rate, stream.sample_aspect_ratio
            images = [
                image.reformat(format="yuv420p") for image in islice(container.decode(stream), start, start + frames)
            ]
    except (OSError, ValueError) as error:  # PyAV's errors are one or the other
        raise CrowdExitError(f"{path}: cannot be read as a video ({error})") from error
    if len(images) < frames:
        raise CrowdExitError(f"{path}: ends before frame {start + frames - 1}")
    if not rate:
        raise CrowdExitError(f"{path}: has no frame rate")
    if aspect not in (None, 0, 1):
        raise CrowdExitError(f"{path}: its pixels are not square ({aspect})")
    if images[0].width % 2 or images[0].height % 2:
        raise CrowdExitError(f"{path}: {images[0].width}×{images[0].height}; both sides must be even")
    return images, rate


def read_heads(path: Path, image: Any, annotated: Sequence[int] | None = None) -> Heads:
    """Read a table of heads by frame.

    Args:
        image: one of the frames, which has the size in which the heads must lie.
        annotated: the frames that may have heads, all of which are in the result; default: those in the table.

    Raises:
        CrowdExitError: if it is not such a table, or a head lies outside the image or in a frame that is not annotated.
    """
    heads: Heads = {frame: [] for frame in annotated or ()}
    try:
        with path.open(newline="") as file:
            for number, row in enumerate(csv.DictReader(file), 2):
                where = f"{path}: line {number}"
                try:
                    frame, x, y = int(row["frame"]), float(row["x"]), float(row["y"])
                except (KeyError, TypeError, ValueError):
                    raise CrowdExitError(f"{where}: not frame,x,y") from None
                if not (0 <= x < image.width and 0 <= y < image.height):
                    raise CrowdExitError(f"{where}: outside the {image.width}×{image.height} image")
                if frame < 0 or (annotated is not None and frame not in annotated):
                    raise CrowdExitError(f"{where}: frame {frame} is not one of those annotated")
                heads.setdefault(frame, []).append((x, y))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CrowdExitError(f"{path}: cannot be read ({error})") from error
    return heads


def simulate_track(counts: list[int], bank: VoiceBank, seed: int) -> NDArray[np.float32]:
    """Simulate sound for one count a second: (len(counts) · 16000,) float32 at 16 kHz.

    Simulated seconds that overlap by half and fade into each other at constant power.
    """
    fade = np.sin(np.pi * (np.arange(LENGTH) + 0.5) / LENGTH)  # its square and its neighbours' add up to one
    half = LENGTH // 2
    audio = np.zeros(len(counts) * LENGTH + LENGTH)
    for i in range(2 * len(counts) + 1):
        # This second is loudest at i / 2 seconds.
        second = simulate(counts[min(i // 2, len(counts) - 1)], bank, generator(seed, "clip", i))
        audio[i * half : i * half + LENGTH] += fade * second
    return np.clip(audio[half:-half], -1, 1).astype(np.float32)


def write_clip(path: Path, images: list[Any], waveform: NDArray[np.float32], *, rate: Fraction, comment: str) -> None:
    """Write H.264 (square pixels) and AAC (mono, 16 kHz) into an MP4 file, with a comment in its metadata."""
    with av.open(str(path), "w") as container:
        container.metadata["comment"] = comment
        video = container.add_stream("libx264", rate=rate, options={"crf": CONSTANT_RATE_FACTOR, "preset": "slow"})
        video.width, video.height, video.pix_fmt = images[0].width, images[0].height, "yuv420p"
        video.codec_context.sample_aspect_ratio = Fraction(1)
        audio = container.add_stream("aac", rate=SAMPLE_RATE, layout="mono")
        for number, image in enumerate(images):
            image.pts, image.time_base = number, 1 / rate
            image.pict_type = 0  # the encoder chooses the type, not the source
            container.mux(video.encode(image))
        container.mux(video.encode())
        block = av.AudioFrame.from_ndarray(waveform[None], format="fltp", layout="mono")
        block.sample_rate, block.pts, block.time_base = SAMPLE_RATE, 0, Fraction(1, SAMPLE_RATE)
        container.mux(audio.encode(block))
        container.mux(audio.encode())


def _check_suffix(out: Path, suffix: str) -> None:
    if out.suffix.lower() != suffix:
        raise CrowdExitError(f"{out}: the name must end in {suffix}")


def _write_csv(path: Path, header: list[str], rows: Iterable[Sequence[object]]) -> None:
    with path.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(header)
        table.writerows(rows)


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """Give a path to write to, which takes the place of ``out`` at the end and is removed on an error.

    Raises:
        CrowdExitError: if it cannot be written.
    """
    part = out.with_name(f"{out.stem}.part{out.suffix}")
    try:
        yield part
        part.replace(out)
    except (OSError, ValueError) as error:
        problem = write_problem(out, error) if isinstance(error, OSError) else f"{out}: cannot be written ({error})"
        raise CrowdExitError(problem) from error
    finally:
        with suppress(OSError):
            part.unlink()


if __name__ == "__main__":
    sys.exit(run(app))
