"""Simulated ambience: the model's promises, and the command from a silent prepared file to a sounding one."""

from __future__ import annotations

import wave
from itertools import pairwise

import h5py
import numpy as np
import pytest

from crowdexit.data import ambience as model
from crowdexit.data.store import Store, StoredSample, open_for_writing, write_sample
from crowdexit.data.voices import find_voices
from crowdexit.errors import CrowdExitError
from data_prep import ambience, ambience_report, common


def voice(number: int, seconds: float = 0.3, rate: int = 8_000) -> np.ndarray:
    """A hum with overtones that swells and dies, in ±1: what speech is to this model."""
    time = np.arange(int(seconds * rate)) / rate
    pitch = 90 + 11 * number
    return np.sin(np.pi * time / seconds) * sum(np.sin(2 * np.pi * pitch * k * time) / k for k in range(1, 6)) / 3


@pytest.fixture(scope="module")
def bank():
    return model.VoiceBank.of([voice(n, rate=16_000).astype(np.float32) for n in range(12)])


@pytest.fixture(scope="module")
def voices(tmp_path_factory):
    folder = tmp_path_factory.mktemp("voices")
    for number in range(12):
        with wave.open(str(folder / f"{number}_speaker.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(8_000)
            file.writeframes((voice(number) * 20_000).astype("<i2").tobytes())
    return folder


@pytest.fixture
def without_audio(tmp_path):
    """A prepared file: 4 train and 12 val images without audio, and one of each split with recorded sound."""
    path = tmp_path / "silent.h5"
    counts = {"train": [0, 3, 80, 900], "val": [5 * 2**n for n in range(11)] + [33], "test": []}
    with open_for_writing(path) as file:
        for split, numbers in counts.items():
            for n, count in enumerate(numbers):
                write_sample(file, sample(f"{'AB'[n % 2]}_IMG_{n}", split, count))
            write_sample(file, sample("rec", split, 7, np.full((96, 64), 0.25, np.float32)))
    return path


def sample(id, split, count, log_mel=None) -> StoredSample:
    return StoredSample(
        id=id,
        split=split,
        image=np.arange(9, dtype=np.uint8),
        points=np.ones((2, 2), np.float32),
        width=8,
        height=8,
        count=count,
        log_mel=log_mel,
        audio_source="none" if log_mel is None else "recorded",
        origin={"dataset": "made up"},
    )


def run(*arguments, jobs=1) -> int:
    return common.run(ambience.app, [*map(str, arguments), "--jobs", str(jobs)])


def contents(path) -> dict[str, object]:
    """Every array and attribute of a prepared file's samples."""
    found: dict[str, object] = {}

    def add(name, item):
        found.update({f"{name}@{key}": value for key, value in item.attrs.items()})
        if isinstance(item, h5py.Dataset):
            found[name] = item[()].tobytes()

    with h5py.File(path) as file:
        file.visititems(add)
    return found


def level(audio) -> float:
    return float(10 * np.log10(np.mean(np.square(audio))))


@pytest.mark.parametrize("count", [0, 1, 2.4, 33, 3_138, 10_000])
def test_any_count_gives_a_second(bank, count):
    audio = model.simulate(count, bank, np.random.default_rng(1))
    assert (audio.shape, audio.dtype) == ((16_000,), np.float32)
    assert np.abs(audio).max() <= 1
    assert -80 < level(audio) < 0


def test_nobody_means_background_alone(bank):
    others = model.VoiceBank.of([np.ones(50, np.float32)])
    for seed in range(5):
        one, other = (model.simulate(0, b, np.random.default_rng(seed)) for b in (bank, others))
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("count", [-1, 10_001, float("nan")])
def test_counts_out_of_range(bank, count):
    with pytest.raises(CrowdExitError, match="0 to 10000"):
        model.simulate(count, bank, np.random.default_rng(0))


def test_louder_on_average_with_more_people_but_never_surely(bank):
    levels = {
        n: np.array([level(model.simulate(n, bank, ambience.generator(0, str(n), i))) for i in range(30)])
        for n in (0, 10, 100, 1_000)
    }
    means = [levels[n].mean() for n in sorted(levels)]
    assert all(more > fewer + 2 for fewer, more in pairwise(means))
    # Ten times the crowd, and yet now and then the quieter one.
    assert levels[100].max() > levels[1_000].min()
    assert levels[10].max() > levels[100].min()


def test_many_voices_fill_the_gaps(bank):
    def unevenness(count):
        recordings = [model.simulate(count, bank, ambience.generator(0, str(count), i)) for i in range(20)]
        return np.mean([np.std([level(piece) for piece in np.split(audio, 20)]) for audio in recordings])

    assert unevenness(15) > 1.5 * unevenness(2_000)


def test_silent_recordings():
    with pytest.raises(CrowdExitError, match="silent"):
        model.VoiceBank.of([np.zeros(100, np.float32), np.zeros(0, np.float32)])


def test_command(without_audio, voices, tmp_path, capsys):
    target = tmp_path / "new" / "loud.h5"
    assert run(without_audio, target, "--voices", voices, "--takes", 3, "--voices-origin", "hums") == 0
    assert "16 simulated" in capsys.readouterr().out
    before, after = Store(without_audio), Store(target)
    for split in ("train", "val", "test"):
        assert after.counts(split) == before.counts(split)
        recorded = after.read(split, "rec", with_takes=True)
        assert (recorded.audio_source, recorded.takes) == ("recorded", None)
        assert "sound" not in recorded.origin
        assert np.all(recorded.log_mel == 0.25)
    has_audio = after.read("train", "A_IMG_2", with_takes=True)
    assert has_audio.audio_source == "simulated"
    assert has_audio.log_mel.shape == (96, 64)
    assert (has_audio.takes.shape, has_audio.takes.dtype) == ((3, 96, 64), np.float16)
    seconds = [has_audio.log_mel, *has_audio.takes.astype(np.float32)]
    for i, one in enumerate(seconds):
        assert all(np.abs(one - other).mean() > 0.05 for other in seconds[:i])
    assert has_audio.origin == {
        "dataset": "made up",
        "sound": "simulated, not recorded with the image",
        "ambience_model": model.MODEL_VERSION,
        "ambience_seed": "0",
        "ambience_voices": "hums (8 recordings)",
    }
    assert after.read("val", "A_IMG_0", with_takes=True).takes is None
    assert list(target.parent.iterdir()) == [target]


def test_fixed_by_seed_and_id_whatever_the_processes(without_audio, voices, tmp_path):
    one, two, other = (tmp_path / f"{name}.h5" for name in ("one", "two", "other"))
    arguments = ["--voices", voices, "--takes", 2]
    assert run(without_audio, one, *arguments) == 0
    assert run(without_audio, two, *arguments, jobs=2) == 0
    assert run(without_audio, other, *arguments, "--seed", 1) == 0
    assert contents(one) == contents(two)
    name = "train/A_IMG_2/log_mel"
    assert contents(one)[name] != contents(other)[name]


def test_splits_have_their_own_voices(voices):
    found = find_voices(voices)
    assert {split: len(paths) for split, paths in found.items()} == {"train": 8, "val": 2, "test": 2}
    assert len({path for paths in found.values() for path in paths}) == 12


@pytest.mark.parametrize("number", [3, 4, 5])
def test_few_voices_leave_no_split_without(tmp_path, number):
    for n in range(number):
        (tmp_path / f"{n}.wav").touch()
    assert all(find_voices(tmp_path).values())


def test_bad_input_is_one_line_and_code_2(without_audio, voices, tmp_path, capsys):
    target, empty = tmp_path / "out.h5", tmp_path / "empty"
    empty.mkdir()
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for n in range(3):
        (damaged / f"{n}.wav").write_bytes(b"no sound at all")
    broken = tmp_path / "broken.h5"
    broken.write_bytes(b"no HDF5 at all")
    for arguments, reason in [
        ((without_audio, without_audio, "--voices", voices), "same file"),
        ((without_audio, target), "--voices"),
        ((without_audio, target, "--voices", tmp_path / "nowhere"), "no such folder of voices"),
        ((without_audio, target, "--voices", empty), "0 WAV files"),
        ((without_audio, target, "--voices", damaged), "not a readable audio file"),
        ((tmp_path / "none.h5", target, "--voices", voices), "no such prepared file"),
        ((broken, target, "--voices", voices), "not a readable HDF5 file"),
        ((without_audio,), "nothing to do"),
        ((without_audio, "--measure"), "1 images of 'train' have audio and heads"),  # the recorded one
        ((without_audio, target, "--voices", voices, "--takes", -1), "--takes"),
    ]:
        assert run(*arguments) == 2, reason
        error = capsys.readouterr().err.strip().splitlines()
        assert len(error) == 1
        assert reason in error[0]
    assert not target.exists()


def test_count_beyond_the_model_is_skipped_or_strict(without_audio, voices, tmp_path, capsys):
    source, target = tmp_path / "huge.h5", tmp_path / "out.h5"
    with Store(without_audio) as store, open_for_writing(source) as file:
        for split in store.splits():
            for id in store.ids(split):
                write_sample(file, store.read(split, id))
        write_sample(file, sample("huge", "train", 20_000))
    assert run(source, target, "--voices", voices, "--takes", 0) == 0
    assert "huge: a count of 20000 cannot be simulated" in capsys.readouterr().out
    assert "huge" not in Store(target).counts("train")
    assert run(source, target, "--voices", voices, "--takes", 0, "--strict") == 2


def test_measure_and_plot(voices, tmp_path, capsys):
    """On a set where the count spans far, sound explains some of it and not all."""
    source, target, image = (tmp_path / name for name in ("in.h5", "out.h5", "plot.png"))
    with open_for_writing(source) as file:
        for split, number in (("train", 60), ("val", 30)):
            for n in range(number):
                write_sample(file, sample(f"{'AB'[n % 2]}_{split}{n}", split, round(10 ** (0.5 + 3 * n / number))))
    assert run(source, target, "--voices", voices, "--takes", 2, "--measure", "--plot", image) == 0
    out = capsys.readouterr().out
    assert "all images" in out
    assert "part A" in out
    assert "15 held-out images, fitted on 90 seconds" in out
    assert image.read_bytes().startswith(b"\x89PNG")
    assert 0.2 < ambience_report.measure(target)[0].r2 < 0.95
    assert run(target, "--plot", tmp_path / "nowhere" / "plot.png") == 2
