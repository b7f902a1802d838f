"""Speech Commands in the published layout, whole and broken, through the command to the prepared file."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from audio_files import break_some, error, everything, hiss, tone, write_wav

from crowdexit.data.classes import ClassStore
from crowdexit.data.log_mel import read_audio
from crowdexit.data.spectrogram import Spectrogram, stft_image
from crowdexit.data.store import SPLITS
from data_prep import common, labelled, speech_commands
from data_prep.speech_commands import CLASSES, NOISE, VOLUMES, WORDS

OTHERS = ("bed", "cat", "dog")
NOISES = {"rain.wav": 200_000, "running_tap.wav": 400_000}  # samples


def prepare(*arguments, size=32) -> int:
    return common.run(speech_commands.app, [*map(str, arguments), "--size", str(size)])


@pytest.fixture
def source(tmp_path):
    """Ten words and three others with six recordings each: four to train on, and one in either list."""
    source = tmp_path / "speech"
    lists = {"validation_list.txt": [], "testing_list.txt": []}
    for w, word in enumerate((*WORDS, *OTHERS)):
        for n in range(6):
            write_wav(source / word / f"{n}a_nohash_0.wav", hiss(100 * w + n, 2000))
        lists["validation_list.txt"].append(f"{word}/4a_nohash_0.wav\n")
        lists["testing_list.txt"].append(f"{word}/5a_nohash_0.wav\n")
    for name, lines in lists.items():
        (source / name).write_text("".join(lines))
    for name, length in NOISES.items():
        write_wav(source / NOISE / name, hiss(length, length))
    (source / NOISE / "README.md").write_text("where the noise comes from")
    (source / NOISE / "._rain.wav").write_bytes(b"of a Macintosh")
    (source / "yes" / "._0a_nohash_0.wav").write_bytes(b"of a Macintosh")
    (source / "LICENSE").write_text("of the set")
    return source


def test_whole_set(source, tmp_path, capsys):
    assert prepare(source, tmp_path / "set.h5") == 0
    assert capsys.readouterr().out.splitlines() == [
        "set.h5: 72 images of 32×32, 12 classes",
        "  train     48 images, 4 a class",
        "  val       12 images, 1 a class",
        "  test      12 images, 1 a class",
    ]
    assert ClassStore(tmp_path / "set.h5").classes == [*WORDS, "unknown", "silence"]
    found = everything(tmp_path / "set.h5")
    for id, (split, name, values) in found.items():
        folder, file = id.split("/")
        if folder == NOISE:
            assert name == "silence"
            continue
        assert name == (folder if folder in WORDS else "unknown")
        assert split == {"4": "val", "5": "test"}.get(file[0], "train")  # the lists', strictly
        assert values == stft_image(*read_audio(source / id), size=32).tobytes()


def test_unknown_and_silence_are_the_mean_of_the_words(source, tmp_path):
    for n in range(20):
        write_wav(source / "yes" / f"more{n}.wav", hiss(n, 2000))
    with (source / "testing_list.txt").open("a") as file:
        file.writelines(f"yes/more{n}.wav\n" for n in range(10))
    assert prepare(source, tmp_path / "set.h5") == 0
    counts = Counter((split, name) for split, name, _ in everything(tmp_path / "set.h5").values())
    for split, mean in (("train", 5), ("val", 1), ("test", 2)):
        for name in ("unknown", "silence"):
            assert counts[split, name] == mean == sum(counts[split, word] for word in WORDS) / 10
    assert counts["train", "yes"] == 14
    assert counts["test", "yes"] == 11


def test_the_same_in_every_run(source, tmp_path):
    for name in ("one.h5", "two.h5"):
        assert prepare(source, tmp_path / name) == 0
    assert everything(tmp_path / "one.h5") == everything(tmp_path / "two.h5")
    # The names decide what is drawn, and not where the set lies or in which order its lists are.
    path = source / "testing_list.txt"
    path.write_text("\r\n".join(reversed(path.read_text().split())) + "\r\n\r\n")
    source.rename(tmp_path / "elsewhere")
    assert prepare(tmp_path / "elsewhere", tmp_path / "three.h5") == 0
    assert everything(tmp_path / "one.h5") == everything(tmp_path / "three.h5")


def test_silence_of_two_splits_never_overlaps(source, tmp_path):
    """Many seconds of each split: at their places in the noise, and no sample of one in another split."""
    for word in WORDS:
        for n in range(6, 30):
            write_wav(source / word / f"{n}.wav", hiss(n, 200))
        for n, name in ((8, "validation_list.txt"), (8, "testing_list.txt")):
            with (source / name).open("a") as file:
                start = 6 if "val" in name else 14
                file.writelines(f"{word}/{k}.wav\n" for k in range(start, start + n))
    assert prepare(source, tmp_path / "set.h5") == 0
    has_audio = {name: {split: np.zeros(length, bool) for split in SPLITS} for name, length in NOISES.items()}
    counts, volumes = Counter(), Counter()
    for id, (split, name, values) in everything(tmp_path / "set.h5").items():
        if name != "silence":
            continue
        file, rest = id.removeprefix(f"{NOISE}/").split("@")
        start, volume = int(rest.split("x")[0]), float(rest.split("x")[1])
        samples = read_audio(source / NOISE / file)[0][0, start : start + 16_000].astype(float)
        assert len(samples) == 16_000
        assert values == stft_image(samples * volume, 16_000, size=32).tobytes()
        has_audio[file][split][start : start + 16_000] = True
        counts[split] += 1
        volumes[volume] += 1
    assert counts == {"train": 12, "val": 9, "test": 9}
    assert set(volumes) == set(VOLUMES)
    for file, by_split in has_audio.items():
        assert np.sum(list(by_split.values()), axis=0).max() == 1
        # Both files serve every split that has room in them; to train on more than the first.
        assert by_split["train"].mean() > 0.3, file
        assert by_split["val"].any()
        assert by_split["test"].any()


def test_noise_at_another_rate_and_in_stereo(source, tmp_path):
    for path in (source / NOISE).glob("*.wav"):
        path.unlink()
    seconds = 20
    audio = tone(1000, 44_100, seconds)
    write_wav(source / NOISE / "tone.wav", np.stack([audio, audio], 1), 44_100)
    assert prepare(source, tmp_path / "set.h5", size=129) == 0  # whole rows, none mixed with another
    starts = []
    for id, (_, name, values) in everything(tmp_path / "set.h5").items():
        if name == "silence":
            start, volume = id.split("@")[1].split("x")
            starts.append(int(start))
            failing = np.frombuffer(values, np.uint8).reshape(129, 129, 3)[..., 0].astype(float)
            assert failing.mean(axis=1).argmax() == 128 - 16
            assert failing.max() == pytest.approx(255 * (1 + 20 * np.log10(0.5 * float(volume)) / 120), abs=1)
    assert len(starts) == 6
    assert 16_000 * 18 <= max(starts) <= 16_000 * (seconds - 1)  # counted at 16 kHz


def test_long_and_short_recordings(source, tmp_path):
    write_wav(source / "yes" / "0a_nohash_0.wav", tone(seconds=2.5))
    write_wav(source / "yes" / "1a_nohash_0.wav", tone(seconds=0.3, rate=8000), 8000)
    assert prepare(source, tmp_path / "set.h5") == 0
    found = everything(tmp_path / "set.h5")
    for n in (0, 1):
        id = f"yes/{n}a_nohash_0.wav"
        assert found[id][2] == stft_image(*read_audio(source / id), size=32).tobytes()


def test_damaged_recordings_are_skipped_and_named(source, tmp_path, capsys):
    broken = break_some(source / "yes")
    assert prepare(source, tmp_path / "set.h5") == 0
    out = capsys.readouterr().out.splitlines()
    assert f"  {len(broken)} recordings skipped:" in out
    for id, reason in broken.items():
        assert any(line.startswith(f"    yes/{id}: ") and reason in line for line in out), (id, out)
    assert len(out) == 4 + 1 + len(broken)
    assert sum(id.startswith("yes/") for id in everything(tmp_path / "set.h5")) == 6


def test_damaged_noise_is_skipped_and_named(source, tmp_path, capsys):
    (source / NOISE / "rain.wav").write_bytes(b"")
    write_wav(source / NOISE / "nan.wav", np.full(200_000, np.nan), floats=True)
    assert prepare(source, tmp_path / "set.h5") == 0
    out = capsys.readouterr().out.splitlines()
    assert "  2 recordings skipped:" in out
    assert f"    {NOISE}/rain.wav: an empty file" in out
    assert any(line.startswith(f"    {NOISE}/nan.wav: ") and "not finite" in line for line in out)
    counts = Counter((split, name) for split, name, _ in everything(tmp_path / "set.h5").values())
    assert [counts[split, "silence"] for split in SPLITS] == [4, 1, 1]
    assert prepare(source, tmp_path / "other.h5", "--strict") == 2
    assert error(capsys).startswith(f"error: {NOISE}/nan.wav: ")


def test_lists_that_name_what_is_not_there(source, tmp_path, capsys):
    with (source / "validation_list.txt").open("ab") as file:
        file.write(b"yes/gone.wav\nnever/gone.wav\n../../secret.wav\n/etc/passwd\n\xff\xfe\x1b[2J\n")
    assert prepare(source, tmp_path / "set.h5") == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert out.splitlines()[4:] == ["  5 recordings listed in validation_list.txt are missing (../../secret.wav first)"]
    assert len(everything(tmp_path / "set.h5")) == 72
    assert prepare(source, tmp_path / "other.h5", "--strict") == 2
    assert error(capsys) == "error: ../../secret.wav: listed in validation_list.txt, but missing"
    assert not (tmp_path / "other.h5").exists()


def test_what_both_lists_name_is_in_no_split(source, tmp_path, capsys):
    with (source / "testing_list.txt").open("a") as file:
        file.write("yes/4a_nohash_0.wav\n")
    assert prepare(source, tmp_path / "set.h5") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "    yes/4a_nohash_0.wav: both lists name it"
    assert "yes/4a_nohash_0.wav" not in everything(tmp_path / "set.h5")


def remove(path):
    for file in sorted(path.rglob("*"), reverse=True):
        file.unlink()
    path.rmdir() if path.is_dir() else path.unlink()


SPOILED = {
    "a word missing": (lambda s: remove(s / "stop"), "the folder of the word 'stop' is missing"),
    "a word empty": (
        lambda s: [p.unlink() for p in (s / "stop").iterdir()],
        "the folder of the word 'stop' holds no .wav",
    ),
    "no other word": (lambda s: [remove(s / word) for word in OTHERS], "nothing for 'unknown'"),
    "no noise folder": (lambda s: remove(s / NOISE), f"no usable .wav file in {NOISE}, so there is nothing for"),
    "no noise": (lambda s: [p.unlink() for p in (s / NOISE).glob("*.wav")], f"no usable .wav file in {NOISE}"),
    "short noise": (
        lambda s: [write_wav(p, hiss(0, 100_000)) for p in (s / NOISE).glob("*.wav")],
        "is too short for 1 seconds of val",
    ),
    "a list missing": (lambda s: (s / "testing_list.txt").unlink(), "holds no testing_list.txt"),
    "a list is a folder": (
        lambda s: ((s / "testing_list.txt").unlink(), (s / "testing_list.txt").mkdir()),
        "holds no testing_list.txt",
    ),
    "a word damaged": (
        lambda s: [p.write_bytes(b"") for p in (s / "go").iterdir()],
        "class 'go' has no image to train on",
    ),
    "all in a list": (
        lambda s: (s / "testing_list.txt").write_text("".join(f"go/{n}a_nohash_0.wav\n" for n in (0, 1, 2, 3, 5))),
        "class 'go' has no image to train on",
    ),
}


@pytest.mark.parametrize("case", SPOILED)
def test_what_cannot_be_mended_is_one_line(source, tmp_path, capsys, case):
    spoil, reason = SPOILED[case]
    spoil(source)
    assert prepare(source, tmp_path / "set.h5") == 2
    assert reason in error(capsys)
    assert not list(tmp_path.glob("set.h5*"))


def test_a_list_of_absurd_length(source, tmp_path, capsys):
    with (source / "testing_list.txt").open("wb") as file:
        file.truncate(2**40)
    assert prepare(source, tmp_path / "set.h5") == 2
    assert "1,099,511,627,776 bytes are too much for a list" in error(capsys)


def test_interrupted_run_goes_on(source, tmp_path, monkeypatch, capsys):
    assert prepare(source, tmp_path / "whole.h5") == 0
    made = []

    def failing(*arguments):
        if len(made) == 67:  # among the silence
            raise KeyboardInterrupt
        made.append(1)
        return original(*arguments)

    original = Spectrogram.of
    with monkeypatch.context() as patch:
        patch.setattr(Spectrogram, "of", failing)
        patch.setattr(labelled, "BATCH", 4)
        assert prepare(source, tmp_path / "set.h5") == 130
    assert not (tmp_path / "set.h5").exists()
    capsys.readouterr()
    assert prepare(source, tmp_path / "set.h5") == 0
    assert "  64 recordings resumed from an interrupted run" in capsys.readouterr().out
    assert everything(tmp_path / "set.h5") == everything(tmp_path / "whole.h5")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["nowhere", "set.h5"], "no such folder"),
        (["empty", "set.h5"], "the folder of the word 'yes' is missing"),
        (["speech", "empty"], "a folder; name a file"),
        (["speech", "set.h5", "--what"], "--what"),
        (["speech"], "DST"),
    ],
)
def test_bad_input_is_one_line(source, tmp_path, monkeypatch, capsys, arguments, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert prepare(*arguments) == 2
    assert reason in error(capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "speech"]


def test_through_the_true_command(source, tmp_path):
    command = [sys.executable, "-m", "data_prep.speech_commands", source, tmp_path / "set.h5", "--size", "32"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"set.h5: 72 images of 32×32, {len(CLASSES)} classes")


def test_help_has_an_example(capsys):
    assert common.run(speech_commands.app, ["--help"]) == 0
    assert "Example: crowdexit prepare speech-commands" in capsys.readouterr().out
