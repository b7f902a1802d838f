"""The page: an image and a sound go in, the count at every exit fills in as the exits answer."""

from __future__ import annotations

import atexit
import os
import socket
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

import crowdexit
from crowdexit.errors import CrowdExitError
from crowdexit.inference import counter as counting
from crowdexit.inference.counter import CrowdCounter
from crowdexit.models import zoo

from . import guard
from .answer import WELCOME, Shown, answers, in_model_thread, problem

MAX_FILE_BYTES = 100 * 10**6
MAX_UPLOADED_BYTES = 10**9  # of all files together; the oldest go for new ones
CACHE_SECONDS = 3600  # of uploads and results
SAMPLES = Path(crowdexit.__file__).parent / "samples"
EXAMPLES: dict[str, list[str | None]] = {
    "Street, with simulated audio": ["street.jpg", "street-simulated.wav"],
    "Street, without audio": ["street.jpg", None],
}

_HEADING = """
<h1>CrowdExit</h1>
<p class="ce-note">Counts a crowd from an image and the audio of its location, in several steps:
early exits first, the whole network last.</p>
"""
_FOOT = (
    '<p class="ce-note">Everything is computed on the machine that serves this page. Files are deleted after an '
    "hour. The audio of the example is simulated, not recorded.</p>"
)
_CSS = """
.gradio-container { max-width: 1120px !important; margin: 0 auto !important; }
.ce-heading h1 { font-size: 1.7rem; font-weight: 700; margin: .4rem 0 .1rem; }
.gradio-container { --ce-quiet: color-mix(in srgb, var(--body-text-color) 68%, transparent); }
.ce-note { color: var(--ce-quiet); font-size: .9rem; line-height: 1.4; margin: .15rem 0; }
.ce-hint { color: var(--ce-quiet); font-size: 1.1rem; padding: .6rem 0; margin: 0; }
.ce-count { font-size: 2rem; line-height: 1.2; margin: .2rem 0 0; }
.ce-count b { font-weight: 750; }
.ce-problem { font-size: 1.1rem; margin: 0; padding: .7rem .9rem; border-left: 4px solid #d9480f; border-radius: 4px;
  background: color-mix(in srgb, #d9480f 12%, transparent); overflow-wrap: anywhere; }
.ce-warning { margin: .3rem 0; padding: .4rem .7rem; border-left: 4px solid #e8a200; border-radius: 4px;
  background: color-mix(in srgb, #e8a200 14%, transparent); overflow-wrap: anywhere; }
table.ce-exits { width: 100%; border: 0 !important; border-collapse: collapse; margin: 0 0 .4rem;
  font-variant-numeric: tabular-nums; }
table.ce-exits th, table.ce-exits td { padding: .45rem .6rem; text-align: right; border: 0 !important;
  border-bottom: 1px solid var(--border-color-primary) !important; }
table.ce-exits tr, table.ce-exits thead { border: 0 !important; }
#chart img { max-width: min(100%, 520px); }
table.ce-exits th:first-child { text-align: left; }
table.ce-exits thead th { font-weight: 500; color: var(--ce-quiet); font-size: .9rem; }
table.ce-exits tbody th { font-weight: 500; }
#sound [data-testid="upload-text"] { min-height: 0; padding: 2rem 0 .4rem; flex-direction: row; gap: .4rem;
  font-size: 1rem; }
#sound [data-testid="upload-icon"] { display: none; }
table.ce-exits tr.waiting { opacity: .45; }
table.ce-exits tbody tr:last-child.done > * { font-weight: 700; }
"""


def _theme() -> gr.themes.Base:
    """The system's own fonts: nothing is fetched, and there is nothing to wait for."""
    sans = [gr.themes.Font(name) for name in ("system-ui", "sans-serif")]
    mono = [gr.themes.Font(name) for name in ("ui-monospace", "monospace")]
    return gr.themes.Default(primary_hue="orange", neutral_hue="zinc", font=sans, font_mono=mono)


class _Models:
    """The models that the page offers, each loaded on first use."""

    def __init__(self, model: CrowdCounter | str | Path, runtime: str) -> None:
        if isinstance(model, CrowdCounter):
            first, load = model.model, {model.model: lambda: model}
        else:
            given, first = model, str(model)
            offered = [*zoo.shipped()] if first in zoo.names() else [first]
            load = {name: cache(lambda path=given if name == first else name: _warm(path, runtime)) for name in offered}
        self.first, self._load = first, load

    @property
    def names(self) -> list[str]:
        return list(self._load)

    def get(self, name: str | None) -> CrowdCounter:
        """Raises CrowdExitError for a name that is not offered, or as the counter's ``load``."""
        load = self._load.get(name or self.first)
        if load is None:
            raise CrowdExitError("Unknown model.")
        return in_model_thread(load)


def _warm(model: str | Path, runtime: str) -> CrowdCounter:
    """A counter whose first visitor's latencies are like everybody's."""
    counter = counting.load(model, runtime=runtime)
    counter.warm_up()
    return counter


def make_page(model: CrowdCounter | str | Path = "audiocsrnet-lite", *, runtime: str = "auto") -> gr.Blocks:
    """The page, not yet served.

    Args:
        model: a counter, a checkpoint's path, or the name of a shipped model: then all that are shipped can be
            chosen.
        runtime: for models that the page loads itself.

    Raises:
        CrowdExitError: if the model cannot be loaded.
    """
    models = _Models(model, runtime)
    models.get(None)

    def handler(
        image: dict[str, Any] | None, audio: dict[str, Any] | None, use_audio: bool, name: str | None = None
    ) -> Iterator[tuple[Any, ...]]:
        try:
            counter = models.get(name)
        except CrowdExitError as error:
            yield _updates(problem(str(error)))
            return
        for shown in answers(counter, _path(image), _path(audio), use_audio):
            yield _updates(shown)

    # A folder of its own for uploads and results: what is in there may be deleted, and goes with the process.
    uploads = Path(tempfile.mkdtemp(prefix="crowdexit-page-")).resolve()
    atexit.register(guard.delete, uploads)
    os.environ["GRADIO_TEMP_DIR"] = str(uploads)
    gr.set_static_paths([SAMPLES])  # served where they lie: copies would be deleted with the old uploads
    page: gr.Blocks
    with gr.Blocks(title="CrowdExit", analytics_enabled=False, delete_cache=(600, CACHE_SECONDS)) as page:
        gr.HTML(_HEADING, elem_classes="ce-heading")
        with gr.Row():
            with gr.Column(scale=4, min_width=300):
                image = gr.Image(
                    label="Picture",
                    type="filepath",
                    image_mode=None,
                    sources=["upload", "clipboard"],
                    height=260,
                    elem_id="picture",
                )
                audio = gr.Audio(
                    label="Audio of the location (optional)",
                    type="filepath",
                    sources=["upload", "microphone"],
                    editable=False,
                    buttons=[],
                    elem_id="sound",
                )
                use_audio = gr.Checkbox(True, label="Use the audio", container=False)
                inputs: list[Any] = [image, audio, use_audio]
                if len(models.names) > 1:
                    inputs.append(gr.Dropdown(models.names, value=models.first, label="Model"))
                button = gr.Button("Count", variant="primary", elem_id="count")
                examples = gr.Examples(
                    [[str(SAMPLES / file) if file else None for file in files] for files in EXAMPLES.values()],
                    [image, audio],
                    example_labels=list(EXAMPLES),
                    cache_examples=False,
                    api_visibility="private",
                )
            with gr.Column(scale=6, min_width=300):
                headline = gr.HTML(WELCOME, elem_id="headline")
                table = gr.HTML(visible=False, elem_id="exits")
                drawn = gr.Image(
                    label="Where the people are",
                    format="jpeg",
                    interactive=False,
                    visible=False,
                    buttons=["download", "fullscreen"],
                    elem_id="density",
                )
                chart = gr.Plot(show_label=False, format="png", visible=False, buttons=[], elem_id="chart")
        gr.HTML(_FOOT)
        # The files are handed over as they came (preprocess=False): our own readers check them, and say in one
        # line what is wrong; the framework's would only raise.
        event: dict[str, Any] = {
            "fn": handler,
            "inputs": inputs,
            "outputs": [headline, table, drawn, chart],
            "preprocess": False,
            "show_progress": "hidden",
            "scroll_to_output": True,  # on a telephone the answer is below the form
            "concurrency_limit": 1,
            "concurrency_id": "model",
            "api_visibility": "private",
        }
        button.click(**event)
        examples.load_input_event.then(**event)
    page.queue(max_size=32, api_open=False)
    return page


def _path(file: dict[str, Any] | None) -> str | None:
    """Where the framework put an upload; it accepts only files from its own upload folder."""
    return None if file is None else str(file["path"])


def _updates(shown: Shown) -> tuple[Any, ...]:
    """Values for headline, table, image and chart; what is empty is hidden."""
    return (
        shown.headline,
        gr.HTML(shown.table, visible=bool(shown.table)),
        gr.Image(shown.image, visible=shown.image is not None),
        gr.Plot(shown.chart, visible=shown.chart is not None),
    )


def serve(page: gr.Blocks, host: str = "127.0.0.1", port: int = 7860, names: Sequence[str] = ()) -> str:
    """Start serving the page in the background; ``page.close()`` ends it.

    Args:
        host: the address to listen on; requests to another host are refused (:class:`Guard`).
        names: further host names by which the page is reached, e.g. behind a proxy.

    Returns:
        The address for a browser on this machine.

    Raises:
        CrowdExitError: if the host or the port cannot be used.
    """
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            pass
    except OSError as error:
        raise CrowdExitError(f"cannot serve the page on {host}:{port} ({error.strerror or error})") from None
    except OverflowError:
        raise CrowdExitError(f"{port} is not a port (1 to 65535)") from None
    guarded = Middleware(
        guard.Guard,
        host=host,
        names=names,
        uploads=Path(page.GRADIO_CACHE),
        others=[SAMPLES],
        functions={number: [_kind(block) for block in fn.inputs] for number, fn in page.fns.items()},
        most_file=MAX_FILE_BYTES,
        most=MAX_UPLOADED_BYTES,
    )
    with _not_through_a_proxy():
        _, address, _ = page.launch(
            server_name=f"[{host}]" if ":" in host else host,  # IPv6 as in an address line
            server_port=port,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            inbrowser=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            enable_monitoring=False,
            run_history=False,
            footer_links=[],
            max_file_size=MAX_FILE_BYTES,
            app_kwargs={"middleware": [guarded]},
            theme=_theme(),
            css=_CSS,
        )
    return address


def _kind(component: object) -> guard.Value:
    """What the browser sends of a component."""
    if isinstance(component, gr.Checkbox):
        return guard.Value.SWITCH
    if isinstance(component, gr.Dropdown):
        return guard.Value.TEXT
    return guard.Value.NUMBER if isinstance(component, gr.Dataset) else guard.Value.FILE


@contextmanager
def _not_through_a_proxy() -> Iterator[None]:
    """The framework asks its own server whether it is up; where a proxy is set, it would ask that."""
    before = {name: os.environ.get(name) for name in ("NO_PROXY", "no_proxy")}
    os.environ.update(dict.fromkeys(before, "*"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def launch(
    model: CrowdCounter | str | Path = "audiocsrnet-lite",
    host: str = "127.0.0.1",
    port: int = 7860,
    runtime: str = "auto",
    names: Sequence[str] = (),
) -> None:
    """Serve the page until Ctrl-C (which is raised as KeyboardInterrupt, once the page is closed).

    Args:
        model: as for :func:`make_page`.
        host: the address to listen on; 0.0.0.0 lets other machines in.
        port: 1 to 65535.
        runtime: a runtime's name.
        names: further host names by which the page is reached.

    Raises:
        CrowdExitError: if the model cannot be loaded, or the host or port cannot be used.
    """
    page = make_page(model, runtime=runtime)
    address = serve(page, host, port, names)
    print(f"CrowdExit is at {address} (Ctrl-C ends it)", flush=True)
    try:
        threading.Event().wait()
    finally:
        page.close(verbose=False)
