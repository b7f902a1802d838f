"""The page: what it says at each moment, and that a real browser gets there."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import threading
import wave
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import cast

import audio_files as audio_files
import cv2
import gradio as gr
import numpy as np
import pytest
from branches import both_kinds
from PIL import Image

from app import answer
from app.answer import answers, problem, table
from app.page import SAMPLES, make_page, serve
from crowdexit.calibration.intervals import Intervals
from crowdexit.data.mel import AudioInput
from crowdexit.errors import CrowdExitError
from crowdexit.inference import counter as counting
from crowdexit.inference.counter import CrowdCounter
from crowdexit.models import zoo
from crowdexit.results import ExitResult
from crowdexit.runtimes.cancel import Cancelled, check

TINY = {"width": 0.0625, "audio_width": 0.0625, "size": [128, 64], "dim": 4, "heads": 2, "hidden": 8, "filters": 2}
EXITS = ["V1", "AV1", "AV2", "final"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    widths = {"V1": 0.3, "final": 0.1}
    spec = zoo.Spec("audiocsrnet-s", both_kinds(), TINY, {"intervals": Intervals(0.9, widths, widths, 30).to_dict()})
    zoo.save(zoo.build(spec), spec, path)
    return path


@pytest.fixture(scope="module")
def counter(checkpoint: Path) -> CrowdCounter:
    return counting.load(checkpoint, runtime="eager")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 255, (90, 120, 3), np.uint8))
    return path


def write_wav(path: Path, samples: int) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(np.random.default_rng(0).integers(-9000, 9000, samples, np.int16).tobytes())
    return path


def test_table_fills_exit_by_exit_and_the_image_comes_last(counter: CrowdCounter, image: Path) -> None:
    shown = list(answers(counter, image, None))
    assert [moment.table.count('class="done"') for moment in shown] == [0, 1, 2, 3, 4]
    assert all(re.findall(r'scope="row">(.*?)<', moment.table) == EXITS for moment in shown)
    assert [moment.image is not None for moment in shown] == [False] * 4 + [True]
    assert [moment.chart is not None for moment in shown] == [False] * 4 + [True]
    last = shown[-1]
    assert last.image is not None
    assert last.image.shape == (90, 120, 3)
    assert "the image alone" in last.headline


def test_warnings_of_the_reader_are_shown(counter: CrowdCounter, tmp_path: Path) -> None:
    pages = [Image.new("RGB", (120, 90), colour) for colour in ("grey", "white")]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    for moment in answers(counter, tmp_path / "a.tif", None):
        assert "2 pages in the file, only the first is counted" in moment.headline


@pytest.mark.parametrize("familiar", [True, False, None])
def test_page_warns_of_unfamiliar_images(
    counter: CrowdCounter, image: Path, monkeypatch: pytest.MonkeyPatch, familiar: bool | None
) -> None:
    monkeypatch.setattr(counter.predictor, "is_familiar", lambda sums: familiar)
    report = ["unlike those the network was trained on" in moment.headline for moment in answers(counter, image, None)]
    assert report == [False, *[familiar is False] * 4]


def test_the_first_answer_is_there_before_the_last_is_computed(counter: CrowdCounter, image: Path) -> None:
    moments = answers(counter, image, None)
    next(moments)
    assert "exit V1" in next(moments).headline
    moments.close()  # type: ignore[attr-defined]  # a visitor who leaves does no harm to the next one
    assert len(list(answers(counter, image, None))) == 5


def test_audio_is_used_unless_switched_off(
    counter: CrowdCounter, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_audio: list[bool] = []
    stream = counter.stream

    def listening(image: object, audio: object = None, **more: object) -> Iterator[ExitResult]:
        has_audio.append(cast(AudioInput, audio).log_mel is not None)
        return stream(image, audio, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(counter, "stream", listening)
    audio = write_wav(tmp_path / "sound.wav", 16_000)
    with_audio = list(answers(counter, image, audio))[-1]
    without = list(answers(counter, image, audio, use_audio=False))[-1]
    assert has_audio == [True, False]
    assert "image and audio" in with_audio.headline
    assert "switched off" in without.headline


def bad_text(folder: Path) -> tuple[Path, Path | None]:
    (folder / "a.jpg").write_text("not an image")
    return folder / "a.jpg", None


def bad_empty(folder: Path) -> tuple[Path, Path | None]:
    (folder / "a.jpg").touch()
    return folder / "a.jpg", None


def bad_truncated(folder: Path) -> tuple[Path, Path | None]:
    (folder / "a.jpg").write_bytes((SAMPLES / "street.jpg").read_bytes()[:20_000])
    return folder / "a.jpg", None


def bad_small(folder: Path) -> tuple[Path, Path | None]:
    cv2.imwrite(str(folder / "a.png"), np.zeros((10, 10, 3), np.uint8))
    return folder / "a.png", None


def bad_large(folder: Path) -> tuple[Path, Path | None]:
    cv2.imwrite(str(folder / "a.png"), np.zeros((13_000, 12_000), np.uint8))
    return folder / "a.png", None


def bad_silence(folder: Path) -> tuple[Path, Path | None]:
    return SAMPLES / "street.jpg", write_wav(folder / "a.wav", 0)


def bad_audio(folder: Path) -> tuple[Path, Path | None]:
    (folder / "a.wav").write_text("not a sound")
    return SAMPLES / "street.jpg", folder / "a.wav"


def bad_gone(folder: Path) -> tuple[Path, Path | None]:
    return folder / "deleted.jpg", None


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (bad_text, "image file: not an image"),
        (bad_empty, "image file: the file is empty"),
        (bad_truncated, "damaged or truncated"),
        (bad_small, "10×10 is too small"),
        (bad_large, "too large"),
        (bad_silence, "audio file: "),
        (bad_audio, "audio file: not a readable audio file"),
        (bad_gone, "no longer exists"),
    ],
)
def test_bad_input_is_one_line(
    counter: CrowdCounter, tmp_path: Path, make: Callable[[Path], tuple[Path, Path | None]], words: str
) -> None:
    image, audio = make(tmp_path)
    (shown,) = answers(counter, image, audio)
    assert words in shown.headline
    assert "ce-problem" in shown.headline
    assert "\n" not in shown.headline
    assert str(tmp_path) not in shown.headline
    assert (shown.table, shown.chart, shown.image) == ("", None, None)


def test_no_image_given(counter: CrowdCounter) -> None:
    (shown,) = answers(counter, None, None)
    assert "Choose an image" in shown.headline


def test_failure_while_counting_is_shown(counter: CrowdCounter, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> Iterator[ExitResult]:
        yield ExitResult("V1", 1.0, None, 1.0)
        raise CrowdExitError("it went wrong")

    monkeypatch.setattr(counter, "stream", failing)
    assert "it went wrong" in list(answers(counter, image, None))[-1].headline


def test_very_large_image_is_shown_small_without_audio(counter: CrowdCounter, tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "a.jpg"), np.full((300, 2000, 3), 90, np.uint8))
    last = list(answers(counter, tmp_path / "a.jpg", write_wav(tmp_path / "a.wav", 16_000)))[-1]
    assert last.image is not None
    assert last.image.shape == (240, answer.LONGEST_SIDE, 3)
    assert "audio was not used" in last.headline


def test_a_client_that_has_gone_stops_the_computing(counter: CrowdCounter, image: Path) -> None:
    """Closing what the framework iterates breaks off the exits that are still to come; the next request is served."""
    begun, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    class Slow:
        exits, size, model = counter.exits, counter.size, "slow"

        def stream(self, image: object, audio: object = None) -> Iterator[ExitResult]:
            yield ExitResult("V1", 1.0, None, 1.0)
            try:
                begun.set()
                assert go_on.wait(30)
                check()
                raise AssertionError("nobody wanted this any more")
            except Cancelled:
                ended.set()
                raise

    moments = answers(cast(CrowdCounter, Slow()), image, None)
    next(moments), next(moments)
    assert begun.wait(30)
    moments.close()
    go_on.set()
    assert ended.wait(30)
    assert len(list(answers(counter, image, None))) > 1


def test_audio_reader_warnings_are_shown(counter: CrowdCounter, image: Path, tmp_path: Path) -> None:
    audio = tmp_path / "a.wav"
    audio_files.write_wav(audio, audio_files.tone() * 32_768, floats=True)
    last = list(answers(counter, image, audio))[-1]
    assert "Warning: The audio file: samples reach" in last.headline
    assert str(tmp_path) not in last.headline


def test_words() -> None:
    def said(count: float) -> str:
        return answer.headline(ExitResult("final", count, None, 12.0), "").split("</p>")[0]

    assert "Nobody" in said(0.2)
    assert "About <b>1</b> person" in said(1.2)
    assert "About <b>1,235</b> people" in said(1234.6)
    assert "Likely" not in table([ExitResult("V1", 3.0, None, 1.0)], EXITS)
    assert "2 – 9" in table([ExitResult("V1", 3.0, (2.0, 9.0), 1.0)], EXITS)
    assert "12.3 s" in table([ExitResult("V1", 3.0, None, 12_345.0)], EXITS)


def test_messages_cannot_bring_markup() -> None:
    shown = problem("<script>${1 + 1} {{x}}").headline
    assert "<script>" not in shown
    assert "${" not in shown
    assert "{{" not in shown


def test_the_page_takes_no_account_of_anybody(counter: CrowdCounter) -> None:
    page = make_page(counter)
    assert page.analytics_enabled is False
    handlers = [fn for fn in page.fns.values() if fn.concurrency_id == "model"]
    assert len(handlers) == 2  # the button and the examples
    assert {fn.concurrency_limit for fn in handlers} == {1}
    assert not [b for b in page.blocks.values() if isinstance(b, gr.Dropdown)]  # one model: nothing to choose


def test_examples_outlive_the_deletion_of_old_files(counter: CrowdCounter) -> None:
    page = make_page(counter)
    load = next(fn.fn for fn in page.fns.values() if getattr(fn.fn, "__name__", "") == "load_example")
    assert load is not None
    loaded = load((0, [str(SAMPLES / "street.jpg"), str(SAMPLES / "street-simulated.wav")]))
    # The samples themselves, not copies in the folder that is swept.
    assert [Path(update["value"]["path"]).parent for update in loaded] == [SAMPLES, SAMPLES]


def test_several_shipped_models_can_be_chosen(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("audiocsrnet-lite", "audiocsrnet-m"):
        (tmp_path / name).mkdir()
        shutil.copy(checkpoint, tmp_path / name)
    monkeypatch.setattr(zoo, "checkpoints_folder", lambda: tmp_path)
    page = make_page("audiocsrnet-lite", runtime="eager")
    (chooser,) = (b for b in page.blocks.values() if isinstance(b, gr.Dropdown))
    assert {value for _, value in chooser.choices} == {"audiocsrnet-lite", "audiocsrnet-m"}
    assert chooser.value == "audiocsrnet-lite"
    handler = next(fn.fn for fn in page.fns.values() if fn.concurrency_id == "model")
    assert handler is not None
    file = {"path": str(SAMPLES / "street.jpg")}
    *_, last = handler(file, None, True, "audiocsrnet-m")
    assert "About" in last[0] or "Nobody" in last[0]
    *_, last = handler(file, None, True, "no-such-model")
    assert "Unknown model" in last[0]


def test_unusable_model_or_port_is_reported(counter: CrowdCounter, tmp_path: Path) -> None:
    with pytest.raises(CrowdExitError, match="neither a model's name"):
        make_page(tmp_path / "nothing")
    page = make_page(counter)
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(CrowdExitError, match="cannot serve"):
        serve(page, port=taken.getsockname()[1])
    with pytest.raises(CrowdExitError, match="not a port"):
        serve(page, port=99_999)
    with pytest.raises(CrowdExitError, match="cannot serve"):
        serve(page, "no.such.host.invalid", 7860)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_serving_does_not_go_through_a_proxy(counter: CrowdCounter, host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    try:
        port = free_port(host)
    except OSError:
        pytest.skip(f"{host} is not on this machine")
    page = make_page(counter)
    address = serve(page, host, port)
    page.close(verbose=False)
    assert f":{port}" in address
    assert "NO_PROXY" not in os.environ


def run_exit(port: int, method: str, path: str, body: object = None, **headers: str) -> tuple[int, str]:
    """Status and text of a request to a page on this machine."""
    connection = HTTPConnection("127.0.0.1", port, timeout=20)
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    connection.request(method, path, data, {"Content-Type": "application/json", **headers})
    response = connection.getresponse()
    return response.status, response.read().decode(errors="replace")


def upload(port: int, data: bytes) -> tuple[int, str]:
    head = b'--cut\r\nContent-Disposition: form-data; name="files"; filename="junk.jpg"\r\n\r\n'
    body = head + data + b"\r\n--cut--\r\n"
    return run_exit(port, "POST", "/gradio_api/upload", body, **{"Content-Type": "multipart/form-data; boundary=cut"})


def test_forged_requests_are_refused_in_one_line(
    counter: CrowdCounter, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    page = make_page(counter)
    number = next(number for number, fn in page.fns.items() if len(fn.inputs) == 3)
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"secret")
    link = Path(page.GRADIO_CACHE) / "link.png"
    link.symlink_to(secret)
    port = free_port()
    serve(page, port=port)
    file = {"path": str(secret), "meta": {"_type": "gradio.FileData"}}
    try:
        capfd.readouterr()
        for call, status in [
            ({"fn_index": 999, "data": []}, 400),
            ({"fn_index": "0", "data": []}, 400),
            ({"fn_index": [], "data": []}, 400),
            ({"fn_index": number, "data": []}, 400),
            ({"fn_index": number, "data": [1, None, True]}, 400),
            ({"fn_index": number, "data": [None, None, 1]}, 400),
            ({"fn_index": number, "data": [file, None, True]}, 403),
            ({"fn_index": number, "data": [{**file, "path": str(link)}, None, True]}, 403),
            ({"fn_index": number, "data": [{**file, "path": "x" * 5000}, None, True]}, 403),
            ({"fn_index": number, "data": [{**file, "path": "\0"}, None, True]}, 403),
            ([], 400),
            (b"[" * 10_000, 400),
        ]:
            made = {**call, "session_hash": "forged"} if isinstance(call, dict) else call
            assert run_exit(port, "POST", "/gradio_api/queue/join", made)[0] == status, call
        for method, path in [
            ("POST", "/gradio_api/run/predict"),
            ("POST", "/gradio_api/call/count"),
            ("POST", "/gradio_api/component_server"),
            ("DELETE", "/"),
        ]:
            assert run_exit(port, method, path, {"fn_index": number, "data": []})[0] == 404
        run_exit(port, "GET", "/gradio_api/queue/data?session_hash=unknown")
        assert run_exit(port, "GET", f"/gradio_api/file={secret}")[0] == 403
        assert run_exit(port, "POST", "/gradio_api/queue/join", b" " * (2**20 + 1))[0] == 413
        assert "Traceback" not in capfd.readouterr().err
        assert run_exit(port, "GET", "/")[0] == 200
    finally:
        page.close(verbose=False)


@pytest.mark.parametrize("listens_on", ["127.0.0.1", "0.0.0.0"])
def test_only_the_host_that_is_listened_on(counter: CrowdCounter, listens_on: str) -> None:
    page = make_page(counter)
    port = free_port()
    serve(page, listens_on, port, names=["Crowd.example"])
    statuses = {
        host: run_exit(port, "GET", "/", Host=host)[0]
        for host in ("127.0.0.1", f"localhost:{port}", "[::1]", "crowd.example:80", "evil.example", "", "192.0.2.7")
    }
    page.close(verbose=False)
    refused = {"evil.example", ""} if listens_on == "0.0.0.0" else {"evil.example", "", "192.0.2.7"}
    assert statuses == {host: 421 if host in refused else 200 for host in statuses}


def test_uploads_are_bounded_together(counter: CrowdCounter, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest files go for new ones, a file that is too large is refused before it is read."""
    monkeypatch.setattr("app.page.MAX_FILE_BYTES", 200_000)
    monkeypatch.setattr("app.page.MAX_UPLOADED_BYTES", 500_000)
    page = make_page(counter)
    port = free_port()
    serve(page, port=port)
    folder = Path(page.GRADIO_CACHE)
    paths = []
    for number in range(6):
        status, text = upload(port, bytes([number]) * 150_000)
        assert status == 200
        paths.append(Path(json.loads(text)[0]))
        os.utime(paths[-1], (number, number))
        assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 500_000
    assert paths[-1].is_file()
    assert not paths[0].exists()
    assert paths[0].is_relative_to(folder)
    assert upload(port, bytes(300_000))[0] == 413
    page.close(verbose=False)


def free_port(host: str = "127.0.0.1") -> int:
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        return int(probe.getsockname()[1])


CHROMIUM = shutil.which("chromium")
CHROMIUM_ARGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine (Debian: apt-get install chromium)")
def test_in_a_browser(checkpoint: Path, image: Path, tmp_path: Path) -> None:
    sync_api = pytest.importorskip("playwright.sync_api", reason="the Python package playwright is not installed")
    audio = write_wav(tmp_path / "sound.wav", 16_000)
    fake = tmp_path / "fake.jpg"
    fake.write_text("not an image")
    page = make_page(checkpoint, runtime="eager")
    address = serve(page, port=free_port())
    try:
        with sync_api.sync_playwright() as playwright:
            browser = playwright.chromium.launch_persistent_context(
                tmp_path / "profile", executable_path=CHROMIUM, args=CHROMIUM_ARGS
            )
            requests: list[str] = []
            browser.on("request", lambda request: requests.append(request.url))
            tab = browser.new_page()
            tab.set_default_timeout(30_000)
            tab.goto(address)
            tab.set_input_files("#image input[type=file]", image)
            tab.locator("#image img").wait_for()
            tab.set_input_files("#sound input[type=file]", audio)
            tab.locator("#sound [aria-label=Clear]").wait_for()
            tab.click("#count")
            tab.locator("#density img").wait_for()
            assert tab.locator("#exits tr.done").count() == len(EXITS)
            assert tab.locator("#exits tbody th").all_inner_texts() == EXITS
            assert "from image and audio" in tab.locator("#headline").inner_text()
            tab.locator("#chart img").wait_for()

            tab.set_viewport_size({"width": 360, "height": 740})  # a telephone: nothing sticks out
            assert tab.evaluate("document.documentElement.scrollWidth") <= 360

            tab.click("#image [aria-label='Remove Image']")
            tab.set_input_files("#image input[type=file]", fake)
            tab.locator("#image img").wait_for(state="attached")
            tab.click("#count")
            tab.locator(".ce-problem").wait_for()
            assert tab.locator(".ce-problem").inner_text() == "The image file: not an image"
            assert tab.locator("#density").count() == 0 or not tab.locator("#density").is_visible()
            browser.close()
        assert requests
        assert [url for url in requests if not url.startswith((address, "data:", "blob:"))] == []
    finally:
        page.close(verbose=False)
