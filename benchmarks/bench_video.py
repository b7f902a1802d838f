"""How fast a video is counted, beside its two halves alone: ``python -m benchmarks.bench_video``.

A 1080p file is made (noise that moves, H.264 as cameras write it, with audio), then measured in turns: decoding it
alone, the network alone on batches that are ready, and ``crowdexit count``'s pipeline, which does both at once. The
pipeline can be no faster than the slower half; how near it comes is the figure to look at.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from fractions import Fraction
from itertools import islice
from pathlib import Path
from time import perf_counter

import av
import cv2
import numpy as np

from benchmarks.machine import describe, in_a_line, keep
from crowdexit.inference.counter import CrowdCounter, Prepared, load
from crowdexit.inference.preprocessing import load_log_mel
from crowdexit.jobs.options import BATCH, CountOptions
from crowdexit.jobs.pipeline import count_frames
from crowdexit.video.decode import FrameSampler, Span
from crowdexit.video.frames import read_frames

EVERY = Span(fps=1000.0)  # all frames that there are


def write_video(path: Path, frames: int, size: tuple[int, int], rate: int = 25) -> None:
    """A window moving over an image of noise of several sizes, with a sound of noise."""
    random = np.random.default_rng(0)
    width, height = size
    background = np.zeros((height + 2 * 200, width + 2 * 200, 3), np.float32)
    for cells in (8, 32, 128):
        noise = random.uniform(0, 85, (background.shape[0] // cells, background.shape[1] // cells, 3)).astype(
            np.float32
        )
        background += cv2.resize(noise, background.shape[1::-1], interpolation=cv2.INTER_CUBIC)
    ground = np.clip(background, 0, 255).astype(np.uint8)
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=rate, options={"preset": "fast", "crf": "23"})
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        video.codec_context.gop_size = 2 * rate
        audio = container.add_stream("aac", rate=48_000, layout="mono")
        for index in range(frames):
            x, y = (int(200 + 190 * f(index / 40)) for f in (np.sin, np.cos))
            shown = np.ascontiguousarray(ground[y : y + height, x : x + width])
            frame_out = av.VideoFrame.from_ndarray(shown, format="rgb24")
            frame_out.pts, frame_out.time_base = index, Fraction(1, rate)
            container.mux(video.encode(frame_out))
        waveform = random.normal(0, 0.1, (1, 48_000 * (frames // rate + 1))).astype(np.float32)
        block = av.AudioFrame.from_ndarray(waveform, format="fltp", layout="mono")
        block.sample_rate, block.pts = 48_000, 0
        container.mux(audio.encode(block))
        container.mux([*video.encode(), *audio.encode()])


def seconds_of(work: Callable[[], int]) -> float:
    """Seconds a frame of what returns how many frames it was."""
    begun = perf_counter()
    frames = work()
    return (perf_counter() - begun) / frames


def decoding(path: Path) -> int:
    """Decode every frame."""
    images = FrameSampler(path, EVERY)
    count = sum(1 for _ in images)
    images.close()
    return count


def model(counter: CrowdCounter, batch: Prepared, frames: int, exit: str) -> int:
    """Count the same batch again and again."""
    size = len(batch.scenes)
    for _ in range(-(-frames // size)):
        counter.answers(batch, exit=exit)
    return -(-frames // size) * size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="audiocsrnet-s")
    parser.add_argument("--exit", default="auto")
    parser.add_argument("--runtime", default="auto")
    parser.add_argument("--frames", type=int, default=100)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--size", default="1920x1080")
    parser.add_argument("--turns", type=int, default=3, help="the median of these is reported")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures here too")
    args = parser.parse_args()
    counter = load(args.model, runtime=args.runtime)
    width, height = map(int, args.size.split("x"))
    times: dict[str, list[float]] = {"decoding": [], "model": [], "pipeline": []}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        write_video(path, args.frames, (width, height))
        first = list(islice(read_frames(path, EVERY), args.batch))
        ready = counter.prepare(
            [(f.scaled(counter.size_for(*f.size) or f.size), load_log_mel(f.waveform)) for f in first]
        )
        options = CountOptions(exit=args.exit, batch=args.batch)
        parts: dict[str, Callable[[], int]] = {
            "decoding": lambda: decoding(path),
            "model": lambda: model(counter, ready, args.frames, args.exit),
            "pipeline": lambda: sum(1 for _ in count_frames(counter, read_frames(path, EVERY), "video", options)),
        }
        model(counter, ready, args.batch, args.exit)  # the first run is slower
        for _ in range(args.turns):
            for name, part in parts.items():
                times[name].append(seconds_of(part))
    median = {name: statistics.median(values) for name, values in times.items()}
    slower = max(median["decoding"], median["model"])
    figures = {
        "machine": describe(),
        "what": f"{args.model}, exit {args.exit}, {counter.chain.runtime}, batch {args.batch}",
        "video": f"{args.frames} frames of {args.size}, H.264",
        "fps": {name: 1 / value for name, value in median.items()},
        "share_of_slower": slower / median["pipeline"],
        "turns": {name: [1 / value for value in values] for name, values in times.items()},
    }
    print(f"{figures['what']}\n{figures['video']}\n{in_a_line(describe())}")
    for name, value in median.items():
        spread = ", ".join(f"{1 / turn:.1f}" for turn in times[name])
        print(f"{name:9} {1 / value:7.1f} frames a second   ({spread})")
    print(f"the pipeline is at {figures['share_of_slower']:.2f} of the slower half")
    keep(figures, args.json)


if __name__ == "__main__":
    main()
