"""What the page shows for a request, free of the web framework: words, table, chart and image as the exits answer."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from crowdexit.data.image import decode_image
from crowdexit.data.mel import AudioInput, AudioStatus
from crowdexit.data.views import tile_boxes
from crowdexit.errors import CrowdExitError
from crowdexit.inference.counter import CrowdCounter
from crowdexit.inference.preprocessing import audio_input
from crowdexit.jobs.rows import UNFAMILIAR
from crowdexit.models.network import FINAL
from crowdexit.reports.draw import bars, overlay
from crowdexit.results import ExitResult
from crowdexit.runtimes.cancel import Cancelled, CancelToken
from crowdexit.utils.memory import return_freed_memory

if TYPE_CHECKING:
    from matplotlib.figure import Figure

T = TypeVar("T")

_STILL_THERE_S = 1.0  # how often the framework may find out that a client has gone

LARGE = 2**27  # bytes of an image's pixels from which on its memory is returned to the system
LONGEST_SIDE = 1600  # pixels of the image shown; more only makes the page slow
WELCOME = '<p class="ce-hint">Choose an image, or try one of the examples.</p>'
_EXPLANATION = (
    '<p class="ce-note">Each exit reports its count as soon as the network reaches it. Later exits are more accurate. '
    "Times count from the request to the answer.</p>"
)

# One thread for everything that a model computes: requests take turns, and no new pool of compute threads has to
# be set up for each of them.
_MODEL_THREAD = ThreadPoolExecutor(1, "model")


@dataclass(frozen=True)
class Shown:
    """What stands on the page at one moment.

    Attributes:
        headline: HTML, the count in words and the reader's warnings, or what is wrong.
        table: HTML, one row an exit; empty: no table.
        chart: count and latency for each exit, once all are there.
        image: H×W×3 uint8 RGB, the density over the image, once the final exit has answered.
    """

    headline: str
    table: str = ""
    chart: Figure | None = None
    image: NDArray[np.uint8] | None = None


def in_model_thread(work: Callable[[], T]) -> T:
    """Run something in the thread that belongs to the models, and wait for it."""
    return _MODEL_THREAD.submit(work).result()


def answers(
    counter: CrowdCounter, image_path: str | Path | None, audio_path: str | Path | None, use_audio: bool = True
) -> Iterator[Shown]:
    """What to show, moment by moment: at once, at each exit's answer, and at the end with chart and image.

    Args:
        image_path: the uploaded file; nothing is taken from its name.
        audio_path: the uploaded file, if any.
        use_audio: whether audio is used.

    Input that cannot be used gives one moment with the reason, and no exception. Where an answer takes long, the last
    moment is given again every second: that is when the framework closes this for a client that has gone, and closing
    it breaks off what is being computed.
    """
    if image_path is None:
        yield problem("Choose an image first.")
        return
    large = False
    try:
        fits = partial(tile_boxes, native=counter.size)
        decoded = decode_image(Path(image_path).read_bytes(), "The image file", fits)
        audio = _read_audio(audio_path, use_audio)
        pixels, warned = decoded.pixels, warning_lines((*decoded.warnings, *audio.warnings))
        tiled = len(tile_boxes(pixels.shape[1], pixels.shape[0], counter.size)) > 1
        large = pixels.nbytes > LARGE
        results: list[ExitResult] = []
        shown = Shown('<p class="ce-hint" role="status">Counting…</p>' + warned, table([], counter.exits))
        yield shown
        for result in _ahead(counter.stream(pixels, audio)):
            if result is None:
                yield shown
                continue
            results.append(result)
            if len(results) < len(counter.exits):
                shown = Shown(headline(result, "still counting") + warned, table(results, counter.exits))
                yield shown
        last = results[-1]
        drawn = None if last.density is None else overlay(_shrunk(pixels), last.density)
        yield Shown(
            headline(last, _senses(last.audio, tiled)) + warned, table(results, counter.exits), bars(results), drawn
        )
    except CrowdExitError as error:
        yield problem(str(error))
    except OSError:
        yield problem("The file no longer exists. Choose it again.")
    finally:
        if large:
            decoded = pixels = None  # type: ignore[assignment]
            return_freed_memory()


def problem(message: str) -> Shown:
    """One plain line that says what is wrong, and nothing else."""
    return Shown(f'<p class="ce-problem" role="alert">{_text(message)}</p>')


def warning_lines(warnings: Sequence[str]) -> str:
    """The reader's warnings about the image (HTML), a line each; empty without any."""
    return "".join(f'<p class="ce-warning" role="alert">Warning: {_text(line)}</p>' for line in warnings)


def headline(result: ExitResult, remark: str) -> str:
    """The count as a sentence (HTML), below it, small, how it came about, and whether it may be far off."""
    name = "final exit" if result.exit == FINAL else f"exit {result.exit}"
    unfamiliar = f'<p class="ce-warning" role="alert">{UNFAMILIAR}</p>' if result.familiar is False else ""
    interval = f"likely {result.interval[0]:,.0f} to {result.interval[1]:,.0f} · " if result.interval else ""
    return (
        f'<p class="ce-count" role="status">{_people(result.count)}</p>'
        f'<p class="ce-note">{interval}{_text(name)} after {_time(result.latency_ms)} · {_text(remark)}</p>'
        f"{unfamiliar}"
    )


def table(results: Sequence[ExitResult], exits: Sequence[str]) -> str:
    """A row for each exit (HTML), those that have not answered yet waiting."""
    by_name = {result.exit: result for result in results}
    intervals = any(result.interval for result in results)
    rows = []
    for name in exits:
        result = by_name.get(name)
        cells = [f'<th scope="row">{_text(name)}</th>', f"<td>{result.count:,.1f}</td>" if result else "<td>…</td>"]
        if intervals:
            span = result.interval if result else None
            cells.append(f"<td>{span[0]:,.0f} – {span[1]:,.0f}</td>" if span else "<td></td>")
        cells.append(f"<td>{_time(result.latency_ms)}</td>" if result else "<td>…</td>")
        rows.append(f'<tr class="{"done" if result else "waiting"}">{"".join(cells)}</tr>')
    head = ["Exit", "People", *(["Likely"] if intervals else []), "Time"]
    return (
        '<table class="ce-exits"><thead><tr>'
        + "".join(f'<th scope="col">{title}</th>' for title in head)
        + f"</tr></thead><tbody>{''.join(rows)}</tbody></table>{_EXPLANATION}"
    )


def _people(count: float) -> str:
    number = round(count)
    if number == 0:
        return "Nobody found"
    return f"About <b>{number:,}</b> {'person' if number == 1 else 'people'}"


def _time(milliseconds: float) -> str:
    return f"{milliseconds:,.0f} ms" if milliseconds < 9999.5 else f"{milliseconds / 1000:,.1f} s"


def _senses(audio: AudioStatus, tiled: bool) -> str:
    """How the image and the audio were used, in words."""
    if audio == "used":
        return "from image and audio"
    parts = "counted in parts, the image is very large" if tiled else "from the image alone"
    reasons: dict[AudioStatus, str] = {
        "switched off": ", the audio is switched off",
        "tiled": "; the audio was not used",
    }
    return parts + reasons.get(audio, "")


def _text(plain: str) -> str:
    """Plain text for the page's HTML; braces and dollars too, which the page's template language would read."""
    escaped = html.escape(plain)
    return escaped.replace("{", "&#123;").replace("}", "&#125;").replace("$", "&#36;").replace("`", "&#96;")


def _read_audio(audio_path: str | Path | None, use_audio: bool) -> AudioInput:
    if audio_path is None or not use_audio:
        return AudioInput(None, "none" if audio_path is None else "switched off")

    def named(line: str) -> str:
        # The reader names the file; its name here is one that the page gave it.
        return line.replace(str(audio_path), "The audio file")

    try:
        audio = audio_input(audio_path)
    except CrowdExitError as error:
        raise CrowdExitError(named(str(error))) from None
    return replace(audio, warnings=tuple(map(named, audio.warnings)))


def _shrunk(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    scale = LONGEST_SIDE / max(image.shape[:2])
    if scale >= 1:
        return image
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)


def _ahead(items: Iterator[T]) -> Iterator[T | None]:
    """The same items, computed ahead in the model thread; None after every second without one.

    Latencies run from the request to the answer: were the stream to wait while the page is drawn, the drawing
    would count into every later exit. Closing this breaks the computing off, between two layers.
    """
    queue: SimpleQueue[tuple[T] | None] = SimpleQueue()
    cancel_token = CancelToken()

    def work() -> None:
        try:
            with cancel_token.working():
                for item in items:
                    queue.put((item,))
                    if cancel_token.off:
                        return
        except Cancelled:
            pass  # nobody waits for it
        finally:
            queue.put(None)

    done = _MODEL_THREAD.submit(work)
    try:
        while True:
            try:
                entry = queue.get(timeout=_STILL_THERE_S)
            except Empty:
                yield None
                continue
            if entry is None:
                break
            yield entry[0]
        done.result()  # raises what the stream raised
    finally:
        cancel_token()
