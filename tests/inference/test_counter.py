"""The counter: the same count whatever the door, the batch or the tiles; exits, deadlines, sounds, bad images."""

from __future__ import annotations

import io
import itertools
import struct
import time
import wave
import zlib
from copy import deepcopy

import numpy as np
import pytest
import torch
from branches import both_kinds
from networks import VIT
from PIL import Image
from tiny import TINY
from videos import tone

from crowdexit.calibration.intervals import Intervals
from crowdexit.data.image import ImageError, decode_pixels
from crowdexit.data.log_mel import log_mel
from crowdexit.data.mel import AudioError
from crowdexit.data.views import LEAST_SCALE, tile_boxes
from crowdexit.inference import collate, deadline, latency
from crowdexit.inference.anytime import DeadlineMissed
from crowdexit.inference.counter import CrowdCounter, default_exits, load
from crowdexit.inference.errors import CounterError
from crowdexit.inference.preprocessing import load_log_mel, prepared
from crowdexit.inference.profile import LAYING, PREPARING
from crowdexit.models import zoo
from crowdexit.runtimes.arrays import RuntimeUnavailable
from crowdexit.runtimes.eager import Eager


def noise(width: int, height: int, seed: int = 0) -> np.ndarray:
    """An image with rough and smooth parts, so that counts differ from place to place."""
    random = np.random.default_rng(seed)
    rough = random.integers(0, 255, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    return np.ascontiguousarray(rough.repeat(8, 0).repeat(8, 1)[:height, :width])


def encoded(image: np.ndarray, format: str = "PNG", **options) -> bytes:
    data = io.BytesIO()
    Image.fromarray(image).save(data, format, **options)
    return data.getvalue()


def test_count_and_stream_say_the_same(counter):
    image = noise(256, 128)
    streamed = list(counter.stream(image))
    result = counter.count(image)
    assert [r.exit for r in streamed] == [r.exit for r in result.exits] == ["V1", "AV1", "AV2", "final"]
    assert [r.count for r in streamed] == pytest.approx([r.count for r in result.exits], rel=1e-6)
    assert result.chosen is result.exits[-1]
    assert result.count == result.chosen.count > 0
    assert counter.count(noise(256, 128, seed=1)).count != pytest.approx(result.count, rel=1e-4)


@pytest.mark.parametrize("size", [(128, 64), (256, 128), (100, 100), (64, 200), (300, 40), (61, 33), (511, 255)])
def test_the_density_sums_to_the_count(counter, size):
    """Padding counts for nothing, and the map covers the image alone."""
    result = counter.count(noise(*size))
    density = result.exits[-1].density
    assert density is not None
    assert density.dtype == np.float32
    assert float(density.sum()) == pytest.approx(result.count, rel=1e-4)
    # As wide and high as the image is, up to a cell.
    assert abs(density.shape[1] / density.shape[0] - size[0] / size[1]) <= size[0] / size[1] * (2 / min(density.shape))
    assert all(r.density is None for r in result.exits[:-1])


def test_what_lies_in_the_padding_is_not_counted(counter):
    """A letterboxed image's count comes from the cells of the picture: half of them, about half the count."""
    whole, half = counter.count(noise(128, 64)), counter.count(noise(64, 64))
    assert half.exits[-1].density.shape == (8, 8)
    assert whole.exits[-1].density.shape == (8, 16)
    assert 0.3 < half.count / whole.count < 0.7


@pytest.mark.parametrize("size", [(1024, 256), (600, 300), (520, 900), (4000, 40)])
def test_tiled_image_counts_as_the_sum_of_its_tiles(counter, size):
    image = noise(*size)
    boxes = tile_boxes(*size, counter.size)
    assert len(boxes) > 1
    tiles = [counter.count(np.ascontiguousarray(image[y : y + h, x : x + w])).count for x, y, w, h in boxes]
    result = counter.count(image)
    assert result.count == pytest.approx(sum(tiles), rel=1e-4)
    density = result.exits[-1].density
    assert float(density.sum()) == pytest.approx(result.count, rel=1e-3)
    # Where a tile is, its mass is.
    scale = density.shape[1] / size[0]
    x, y, w, h = boxes[-1]
    mass = density[round(y * scale) : round((y + h) * scale), round(x * scale) : round((x + w) * scale)].sum()
    assert float(mass) == pytest.approx(tiles[-1], rel=0.1)
    assert [r.exit for r in result.exits] == ["V1", "AV1", "AV2", "final"]


def test_tiles_cover_the_image_once(counter):
    for width, height in [(128, 64), (512, 256), (513, 256), (999, 777), (33, 5000), (10_000, 32)]:
        boxes = tile_boxes(width, height, (128, 64))
        covered = np.zeros((height, width), np.uint8)
        for x, y, w, h in boxes:
            assert min(128 / w, 64 / h) >= LEAST_SCALE * 0.99
            covered[y : y + h, x : x + w] += 1
        assert (covered == 1).all()
    assert len(tile_boxes(512, 256, (128, 64))) == 1
    assert len(tile_boxes(513, 256, (128, 64))) == 2


@pytest.mark.parametrize("in_flight", [3, 1000])
def test_how_many_tiles_run_at_once_changes_no_count(counter, monkeypatch, in_flight):
    image = noise(1500, 600)
    all_at_once = counter.count(image)
    monkeypatch.setattr(collate, "PIXELS_PER_BATCH", 2 * 128 * 64)
    monkeypatch.setattr(collate, "PIXELS_IN_FLIGHT", in_flight * 128 * 64)
    few = counter.count(image)
    assert [r.exit for r in few.exits] == ["V1", "AV1", "AV2", "final"]
    assert [r.count for r in few.exits] == pytest.approx([r.count for r in all_at_once.exits], rel=1e-4, abs=1e-5)
    assert few.exits[-1].density == pytest.approx(all_at_once.exits[-1].density, rel=1e-3, abs=1e-6)


def watched(counter: CrowdCounter, **options) -> tuple[CrowdCounter, list[int]]:
    """A counter with a copy of another's network, and which of its stages ran."""
    network, ran = deepcopy(counter.network), []
    for index, stage in enumerate(network.stages):
        stage.register_forward_hook(lambda *_, index=index: ran.append(index))
    return CrowdCounter(network, "tiny", runtime=Eager(), **options), ran


def test_every_tile_comes_to_an_exit_before_any_goes_on(counter, monkeypatch):
    """A tiled image, too, has a first answer early."""
    monkeypatch.setattr(collate, "PIXELS_PER_BATCH", 2 * 128 * 64)
    tool, ran = watched(counter)
    assert next(tool.stream(noise(1500, 600))).exit == "V1"
    assert ran == [0] * 5  # nine tiles


def test_a_deadline_holds_for_tiles(counter, monkeypatch):
    """What is foreseen to be too late is refused before a stage is run; else the first exit answers, marked late."""
    image = noise(1100, 520)
    tiles = len(tile_boxes(1100, 520, (128, 64)))
    assert tiles > 3
    monkeypatch.setattr(collate, "PIXELS_IN_FLIGHT", 3 * 128 * 64)
    run: list[int] = []
    advance = type(counter.chain).advance

    def counted(self, index, state):
        run.append(index)
        return advance(self, index, state)

    _ = counter.profile
    rows = prepared(image, None, counter.network.config)[1]
    canvases = [(canvas.shape[1], canvas.shape[0]) for canvas, *_ in rows]
    predicted = counter.predictor.latency.predicted_s(canvases, "V1")
    assert 0 < predicted < counter.predictor.latency.predicted_s(canvases, "final")
    monkeypatch.setattr(type(counter.chain), "advance", counted)
    for late, seconds in (("fail", 11), ("wait", 101)):
        monkeypatch.setattr(counter.predictor.latency, "predicted_s", lambda *_, s=seconds: s)
        line = (
            rf"no exit can answer within 10000 ms: the image is cut into {tiles} tiles, for which the first, V1, takes"
        )
        with pytest.raises(DeadlineMissed, match=line):
            counter.count(image, deadline_ms=10_000, late=late)
    monkeypatch.setattr(counter.predictor.latency, "predicted_s", lambda *_: None)  # not known
    with pytest.raises(DeadlineMissed, match=r"no exit answered within 0\.001 ms; the image is cut into tiles"):
        counter.count(image, deadline_ms=0.001, late="fail")
    assert run == []
    monkeypatch.setattr(deadline, "MOST_LATE", 1e9)
    monkeypatch.setattr(counter.predictor.latency, "predicted_s", lambda rows, exit: 0.0 if exit == "V1" else 1.0)
    result = counter.count(image, deadline_ms=0.001)
    assert (result.chosen.exit, result.in_time) == ("V1", False)
    assert {*run} == {0}  # the stages behind the first exit are not run for an answer that is late anyhow
    assert result.count == pytest.approx(next(iter(counter.stream(image))).count, rel=1e-5)
    assert counter.count(image, deadline_ms=1e6).chosen.exit == "final"


def test_huge_images_are_refused_before_they_are_decoded(counter, tmp_path, monkeypatch):
    """What the profile foresees to come too late, by its decoding too, does not take that time first."""
    Image.fromarray(noise(1500, 1100)[..., 0]).save(tmp_path / "huge.png")
    _ = counter.profile
    monkeypatch.setattr(collate, "prepared", lambda *_: pytest.fail("decoded"))
    with pytest.raises(DeadlineMissed, match=r"no exit can answer within 0\.01 ms: the image is cut into \d+ tiles"):
        counter.count(tmp_path / "huge.png", deadline_ms=0.01)


def test_exif_orientation(counter, tmp_path):
    upright = noise(128, 64)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise for viewing
    lying = np.ascontiguousarray(np.rot90(upright))
    (tmp_path / "p.png").write_bytes(encoded(lying, exif=exif))
    assert counter.count(tmp_path / "p.png").count == pytest.approx(counter.count(upright).count, rel=1e-6)
    assert counter.count(lying).count != pytest.approx(counter.count(upright).count, rel=1e-3)


def test_kinds_of_images(counter, tmp_path):
    """Grey, palette, transparent and 16-bit files are what they show."""
    grey = noise(128, 64)[..., 0]
    expected = counter.count(np.repeat(grey[..., None], 3, 2)).count
    image = Image.fromarray(grey)
    sixteen = Image.fromarray(grey.astype(np.uint16) * 257)
    for number, form in enumerate([image, image.convert("P"), image.convert("RGBA"), image.convert("LA"), sixteen]):
        path = tmp_path / f"{number}.png"
        form.save(path)
        assert counter.count(path).count == pytest.approx(expected, rel=1e-5), form.mode
        assert counter.count(str(path)).count == counter.count(path).count


def test_exit_stops_the_network(counter):
    """What stands behind the asked exit is not computed."""
    tool, ran = watched(counter)
    for name, stages, answers in [
        ("V1", [0], ["V1"]),
        ("AV1", [0, 1], ["V1", "AV1"]),
        ("AV2", [0, 1, 2], ["V1", "AV1", "AV2"]),
        ("AV1-cnn", [0, 1], ["V1", "AV1", "AV1-cnn"]),
        ("final", [0, 1, 2, 3], ["V1", "AV1", "AV2", "final"]),
        ("auto", [0, 1, 2, 3], ["V1", "AV1", "AV2", "final"]),
    ]:
        ran.clear()
        result = tool.count(noise(128, 64), exit=name)
        assert ran == stages
        assert [r.exit for r in result.exits] == answers
        assert result.chosen.exit == answers[-1]
    ran.clear()
    list(itertools.islice(tool.stream(noise(128, 64)), 1))
    assert ran == [0]
    with pytest.raises(CounterError, match=r"no exit 'V2' in tiny \(it has V1,"):
        tool.count(noise(128, 64), exit="V2")
    with pytest.raises(CounterError, match="no exit"):
        list(tool.stream(noise(128, 64), exits=["V1", "other"]))


def test_up_to_an_exit_of_several_at_its_place(counter):
    """What comes after it there is not asked, and nothing comes out of its turn."""
    tool, _ = watched(counter, exits=counter.network.exit_names)
    for name, answers in [("V1", ["V1"]), ("V1-cnn", ["V1", "V1-cnn"]), ("AV1", ["V1", "V1-cnn", "AV1"])]:
        assert [r.exit for r in tool.count(noise(128, 64), exit=name).exits] == answers


def test_unreadable_image_does_not_delay_the_next(counter):
    tool, _ = watched(counter)

    def samples():
        yield noise(128, 64), None
        time.sleep(0.4)
        yield None
        yield noise(128, 64), None

    assert len(list(tool.count_many(samples()))) == 3
    assert tool.predictor.latency.times.ms(PREPARING, quantile=1) < 400


def test_latency_covers_the_whole_image(counter, monkeypatch, tmp_path):
    """Decoded, resized and laid out, in all the tiles that the scene has."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(collate, "PIXELS_PER_BATCH", 2 * 64 * 64)
    torch.manual_seed(0)
    network = zoo.build(zoo.Spec("transcrowd-gap-s", (), VIT))
    tool = CrowdCounter(network, "tiny", runtime=Eager())
    rows: list[int] = []
    monkeypatch.setattr(latency, "prepared", lambda *given: rows.append(len((made := prepared(*given))[1])) or made)
    decoded: list[tuple[int, ...]] = []
    monkeypatch.setattr(
        latency, "decode_pixels", lambda data: decoded.append((image := decode_pixels(data)).shape) or image
    )
    times = tool.profile
    assert set(rows) == {6}
    assert set(decoded) == {(2 * 128, 2 * 192, 3)}
    assert times.ms(PREPARING) > 0
    assert times.ms(LAYING, 2) > 0


def test_forms_of_audio(counter, tmp_path):
    """A file, samples and a log-mel are the same sound; none is another count than silence."""
    audio = tone(1.5, begin=0.4)
    path = tmp_path / "s.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes((audio * 32768).astype("<i2").tobytes())
    image = noise(128, 64)
    forms = [path, str(path), (audio, 16_000), (np.stack([audio, audio]), 16_000), log_mel(audio, 16_000)]
    counts = [counter.count(image, form).count for form in forms]
    assert counts == pytest.approx([counts[0]] * 5, rel=1e-4)
    unheard = counter.count(image)
    without_audio = counter.count(image, (0 * audio, 16_000))
    assert len({round(c, 4) for c in (counts[0], unheard.count, without_audio.count)}) == 3
    # V1 stands before the ear.
    assert unheard.exits[0].count == pytest.approx(without_audio.exits[0].count, rel=1e-6)


def test_audio_that_cannot_be_used(tmp_path):
    assert load_log_mel(None) is None
    for wrong in (np.zeros((64, 96), np.float32), np.full((96, 64), np.nan, np.float32)):
        with pytest.raises(AudioError, match=r"\(96, 64\)"):
            load_log_mel(wrong)
    with pytest.raises(AudioError, match="without samples"):
        load_log_mel((np.zeros(0, np.float32), 16_000))
    with pytest.raises(AudioError, match="no such"):
        load_log_mel(tmp_path / "none.wav")


@pytest.mark.parametrize(
    "image",
    [
        np.zeros(64, np.uint8),
        np.zeros((64, 64, 4), np.uint8),
        np.zeros((64, 64, 3), np.float32),
        np.zeros((31, 64, 3), np.uint8),
        np.zeros((0, 0, 3), np.uint8),
        [[[0, 0, 0]]],
    ],
)
def test_arrays_that_are_not_images(counter, image):
    with pytest.raises(ImageError):
        counter.count(image)


def header_only(width: int, height: int) -> bytes:
    """A PNG of a hundred bytes that claims a size."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


GOOD = encoded(noise(96, 64), "JPEG")


def test_images_in_the_forms_that_users_have(counter):
    """Pillow's of any mode and arrays in grey count as the same image in RGB."""
    rgb = noise(128, 64)
    grey = np.asarray(Image.fromarray(rgb).convert("L"))
    of_grey = counter.count(np.repeat(grey[..., None], 3, axis=2)).count
    assert of_grey > 0
    for image in (grey, grey[..., None], Image.fromarray(grey), Image.fromarray(grey.astype(np.uint16) * 257)):
        assert counter.count(image).count == pytest.approx(of_grey, rel=1e-6)
    of_rgb = counter.count(rgb).count
    for image in (Image.fromarray(rgb), Image.fromarray(rgb).convert("RGBA")):
        assert counter.count(image).count == pytest.approx(of_rgb, rel=1e-6)
    turned = Image.open(io.BytesIO(encoded(np.rot90(rgb), exif=Image.Exif()))).convert("RGB")
    turned.getexif()[274] = 6
    assert counter.count(turned).count == pytest.approx(of_rgb, rel=1e-6)
    whole = encoded(rgb, "JPEG")
    cut = Image.open(io.BytesIO(whole[: len(whole) // 2]))
    with pytest.raises(ImageError, match="damaged or truncated"):
        counter.count(cut)


def test_audio_in_the_order_of_scipy_and_gradio(counter):
    image = noise(128, 64)
    stereo = np.random.default_rng(0).normal(0, 0.1, (2, 16_000)).clip(-1, 1).astype(np.float32)
    expected = counter.count(image, (stereo, 16_000)).count
    assert counter.count(image, (16_000, stereo.T)).count == pytest.approx(expected, rel=1e-6)
    assert counter.count(image, (np.int64(16_000), stereo.T)).count == pytest.approx(expected, rel=1e-6)
    assert counter.count(image, (16_000, stereo[0])).count == counter.count(image, (stereo[0], 16_000)).count
    for pair in [(16_000, 16_000), (stereo, stereo), (stereo,), (stereo, 16_000, 2)]:
        with pytest.raises(AudioError, match=r"\(waveform, sample rate\) or \(sample rate, waveform\)"):
            counter.count(image, pair)


def test_names_too_long_for_the_system_are_no_files(counter, tmp_path):
    name = "x" * 300
    with pytest.raises(ImageError, match="no such file"):
        counter.count(tmp_path / name)
    with pytest.raises(AudioError, match="no such audio file"):
        counter.count(noise(64, 64), tmp_path / name)
    with pytest.raises(zoo.ZooError, match="neither a model's name"):
        load(tmp_path / name)


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (b"", "empty"),
        (b"these are words", "not an image"),
        (GOOD[: len(GOOD) // 2], "truncated"),
        (encoded(noise(96, 64))[:500], "truncated"),
        (encoded(noise(1, 1)), "too small"),
        (encoded(noise(31, 500)), "too small"),
        (header_only(100_000, 100_000), "too large"),
        (header_only(20_000, 8_000), "too large"),
        (header_only(2**31 - 1, 2**31 - 1), "too large"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\nshowpage\n", "not an image"),
    ],
    ids=["empty", "words", "half jpeg", "half png", "1x1", "31x500", "10 GP", "160 MP", "2^62", "postscript"],
)
def test_bad_images(counter, tmp_path, data, line):
    path = tmp_path / "p.jpg"
    path.write_bytes(data)
    began = time.process_time()
    with pytest.raises(ImageError, match=line) as caught:
        counter.count(path)
    assert time.process_time() - began < 2
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF"])
def test_damaged_images_raise_image_error(format):
    """Whatever a damaged file makes Pillow raise."""
    options = {"compression": "tiff_lzw"} if format == "TIFF" else {}
    good = encoded(noise(64, 48), format, **options)
    assert decode_pixels(good).shape == (48, 64, 3)
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        data = bytearray(good)
        for at in random.integers(
            0, len(data) if random.random() < 0.5 else min(200, len(data)), random.integers(1, 6)
        ):
            data[at] = random.integers(0, 256)
        if random.random() < 0.3:
            data = data[: random.integers(1, len(data))]
        try:
            assert decode_pixels(bytes(data)).ndim == 3
        except ImageError:
            refused += 1
    assert refused > 5


def test_served_exits():
    def network(*exits):
        return zoo.build(zoo.Spec("audiocsrnet-s", exits=exits, changes=TINY))

    both = both_kinds()
    assert default_exits(network(*both)) == ["V1", "AV1", "AV2", "final"]
    assert default_exits(network(*both[3:])) == ["V1-cnn", "AV1-cnn", "AV2-cnn", "final"]
    assert default_exits(network()) == ["final"]
    chosen = CrowdCounter(network(*both), "tiny", runtime=Eager(), exits=["AV2", "V1"])
    assert [r.exit for r in chosen.stream(noise(128, 64))] == ["V1", "AV2"]
    with pytest.raises(CounterError, match="no exit 'V7'"):
        CrowdCounter(network(), "tiny", runtime=Eager(), exits=["V7"])


def test_load(counter, tmp_path):
    """A checkpoint counts as the network that it was saved from, with its intervals."""
    spec = zoo.Spec(
        "audiocsrnet-s",
        exits=both_kinds(),
        changes=TINY,
        meta={"intervals": Intervals(0.8, {"final": 0.25}, {"final": 0.5}, 20).to_dict()},
    )
    zoo.save(counter.network, spec, tmp_path / "m" / "model.safetensors")
    again = load(tmp_path / "m", runtime="eager")
    image = noise(128, 64)
    result = again.count(image)
    assert result.model == "audiocsrnet-s"
    assert result.count == pytest.approx(counter.count(image).count, rel=1e-5)
    low, high = result.chosen.interval
    half = 0.25 * (result.count + 10)
    assert (low, high) == pytest.approx((max(0, result.count - half), result.count + half))
    has_audio = again.count(image, np.zeros((96, 64), np.float32)).chosen
    assert has_audio.interval[1] == pytest.approx(has_audio.count + 0.5 * (has_audio.count + 10))
    assert result.exits[0].interval is None
    row = result.to_dict("p.jpg")
    assert row["exits"][-1]["interval"] == [round(low, 2), round(high, 2)]
    for name, runtime, line in [
        (tmp_path / "none", "eager", "none"),
        (tmp_path / "m", "abacus", "no runtime 'abacus'"),
    ]:
        with pytest.raises((zoo.ZooError, RuntimeUnavailable), match=line):
            load(name, runtime=runtime)


def test_no_crowd_is_negative_and_no_count_is_nan():
    torch.manual_seed(0)
    network = zoo.build(zoo.Spec("audiocsrnet-s", exits=both_kinds()[:1], changes=TINY))
    head = [m for m in network.branches["V1"].modules() if isinstance(m, torch.nn.Linear)][-1]
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.constant_(head.bias, -3.0)
    tiny = CrowdCounter(network, "tiny", runtime=Eager(), intervals=Intervals(0.9, {"V1": 0.5}))
    first = next(tiny.stream(noise(128, 64)))
    assert (first.count, first.interval) == (0.0, (0.0, 5.0))
    assert [result.exits[0].count for result in tiny.count_many([(noise(128, 64), None)])] == [0]
    torch.nn.init.constant_(head.bias, float("nan"))
    with pytest.raises(CounterError, match="V1 did not return a number"):
        next(tiny.stream(noise(128, 64)))
