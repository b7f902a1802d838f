"""Recordings in class folders and named by class, whole and broken, through the command to the prepared file."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from audio_files import break_some, error, everything, hiss, tone, write_encoded, write_wav

from crowdexit.data.classes import ClassStore
from crowdexit.data.log_mel import read_audio
from crowdexit.data.spectrogram import stft_image
from data_prep import common, labelled, sound_folders


def prepare(*arguments, size=32) -> int:
    return common.run(sound_folders.app, [*map(str, arguments), "--size", str(size)])


@pytest.fixture
def plain(tmp_path):
    """Class folders alone: two classes of ten recordings, each of another pitch, at several rates and lengths."""
    for label, name in enumerate(("high", "low")):
        for number in range(10):
            rate = (8000, 16_000, 44_100)[number % 3]
            audio = tone(3000 - 2500 * label + 40 * number, rate, 0.2 + 0.1 * number)
            write_wav(tmp_path / "set" / name / f"{number}.wav", audio, rate)
    return tmp_path / "set"


@pytest.fixture
def halves(tmp_path):
    """train and test folders: two classes of ten recordings to train on and two to test."""
    for name in ("high", "low"):
        for half, numbers in (("train", range(10)), ("test", range(2))):
            for number in numbers:
                write_wav(tmp_path / "halves" / half / name / f"{number}.wav", hiss(number, 4000))
    return tmp_path / "halves"


SPEAKERS = ("ann", "bob", "cy", "di")


@pytest.fixture
def named(tmp_path):
    """A flat folder of CLASS_SPEAKER_TAKE.wav: three classes, four speakers, five takes."""
    for name in range(3):
        for n, speaker in enumerate(SPEAKERS):
            for take in range(5):
                write_wav(
                    tmp_path / "named" / f"{name}_{speaker}_{take}.wav", hiss(100 * name + 10 * n + take, 1600), 8000
                )
    return tmp_path / "named"


def test_class_folders(plain, tmp_path, capsys):
    assert prepare(plain, tmp_path / "set.h5") == 0
    found = everything(tmp_path / "set.h5")
    assert len(found) == 20
    for id, (_, name, values) in found.items():
        assert id.startswith(f"{name}/")
        assert values == stft_image(*read_audio(plain / id), size=32).tobytes()
    assert Counter((split, name) for split, name, _ in found.values()) == {
        (split, name): number for split, number in (("train", 8), ("val", 1), ("test", 1)) for name in ("high", "low")
    }
    assert ClassStore(tmp_path / "set.h5").origin == "recordings of set"
    assert capsys.readouterr().out.splitlines() == [
        "set.h5: 20 images of 32×32, 2 classes",
        "  train     16 images, 8 a class",
        "  val        2 images, 1 a class",
        "  test       2 images, 1 a class",
    ]


def test_the_same_in_every_run(plain, tmp_path):
    for name in ("one.h5", "two.h5"):
        assert prepare(plain, tmp_path / name) == 0
    assert everything(tmp_path / "one.h5") == everything(tmp_path / "two.h5")
    plain.rename(tmp_path / "elsewhere")
    assert prepare(tmp_path / "elsewhere", tmp_path / "three.h5") == 0
    assert everything(tmp_path / "one.h5") == everything(tmp_path / "three.h5")


def test_train_and_test_folders(halves, tmp_path):
    assert prepare(halves, tmp_path / "set.h5", "--val", 0.2) == 0
    found = everything(tmp_path / "set.h5")
    for id, (split, name, _) in found.items():
        half, folder, _ = id.split("/")
        assert folder == name
        assert (split == "test") == (half == "test")
    assert Counter((split, name) for split, name, _ in found.values()) == {
        (split, name): number for split, number in (("train", 8), ("val", 2), ("test", 2)) for name in ("high", "low")
    }


def test_a_val_folder_is_taken_as_it_is(halves, tmp_path):
    write_wav(halves / "val" / "low" / "x.wav", hiss(9, 4000))
    assert prepare(halves, tmp_path / "set.h5") == 0
    found = everything(tmp_path / "set.h5")
    assert [id for id, (split, _, _) in found.items() if split == "val"] == ["val/low/x.wav"]
    assert sum(split == "train" for split, _, _ in found.values()) == 20


def test_classes_by_name(named, tmp_path):
    write_wav(named / "nothing.wav", hiss())
    write_wav(named / "_x.wav", hiss())
    write_wav(named / "more" / "0_ann_9.wav", hiss())
    assert prepare(named, tmp_path / "set.h5", "--label", "name") == 0
    found = everything(tmp_path / "set.h5")
    assert len(found) == 60
    assert all(id.split("_")[0] == name for id, (_, name, _) in found.items())
    assert Counter((split, name) for split, name, _ in found.values()) == {
        (split, str(name)): number for split, number in (("train", 16), ("val", 2), ("test", 2)) for name in range(3)
    }


def test_what_lies_elsewhere_is_counted(named, tmp_path, capsys):
    write_wav(named / "nothing.wav", hiss())
    write_wav(named / "more" / "0_ann_9.wav", hiss())
    (named / "notes.txt").write_text("left alone")
    (named / "._0_ann_0.wav").write_bytes(b"of a Macintosh")
    assert prepare(named, tmp_path / "set.h5", "--label", "name") == 0
    assert capsys.readouterr().out.splitlines()[4:] == ["  2 recordings outside the folder itself skipped"]


@pytest.mark.parametrize(
    ("group", "key"),
    [
        ("_([a-z]+)_", lambda id: id.split("_")[1]),  # its first group: the speaker
        ("_[0-9]", lambda id: id.split("_")[2][0]),  # all that matches: the take
        ("_(.+)", lambda id: id.split("_", 1)[1]),  # speaker and take
    ],
)
def test_a_group_is_never_in_two_splits(named, tmp_path, group, key):
    assert prepare(named, tmp_path / "set.h5", "--label", "name", "--group", group, "--val", 0.2) == 0
    found = everything(tmp_path / "set.h5")
    assert len(found) == 60
    splits = {}
    for id, (split, _, _) in found.items():
        assert splits.setdefault(key(id), split) == split
    held = Counter(splits.values())
    assert held["val"] == held["test"] == max(1, round(0.2 * len(splits)))
    # Here every group has each class once for each of its speakers or takes, so that classes stay even.
    assert len(set(Counter((split, name) for split, name, _ in found.values() if split == "val").values())) == 1


def test_a_group_reaches_over_class_folders(tmp_path):
    """Forty groups, some in one class and some in both: a tenth of all of them, whatever their classes."""
    for name, numbers in (("high", range(20)), ("low", range(10, 40))):
        for number in numbers:
            write_wav(tmp_path / "set" / name / f"{number}.wav", hiss(number, 1600))
    assert prepare(tmp_path / "set", tmp_path / "set.h5", "--group", ".+") == 0
    splits = {}
    for id, (split, _, _) in everything(tmp_path / "set.h5").items():
        assert splits.setdefault(id.split("/")[1], split) == split
    assert Counter(splits.values()) == {"train": 32, "val": 4, "test": 4}


def test_groups_and_folders_of_splits(halves, tmp_path, capsys):
    for path in (halves / "test").glob("*/*.wav"):
        path.rename(path.with_name(f"t{path.name}"))
    assert prepare(halves, tmp_path / "set.h5", "--group", "[t0-9]+", "--val", 0.3) == 0
    found = everything(tmp_path / "set.h5")
    for number in range(10):
        assert found[f"train/high/{number}.wav"][0] == found[f"train/low/{number}.wav"][0]
    assert Counter(split for split, _, _ in found.values()) == {"train": 14, "val": 6, "test": 4}
    capsys.readouterr()
    # The same text in both folders: then what is asked for cannot be had.
    assert prepare(halves, tmp_path / "other.h5", "--group", "[0-9]+") == 2
    assert error(capsys).endswith("which --group keeps in one split, is in train and test")
    assert not (tmp_path / "other.h5").exists()


def test_names_that_the_group_does_not_match(named, tmp_path, capsys):
    write_wav(named / "0_.wav", hiss())
    arguments = named, tmp_path / "set.h5", "--label", "name", "--group", "_([a-z]+)?_|_"
    assert prepare(*arguments) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-2:] == ["  1 recordings skipped:", "    0_.wav: --group matches nothing in its name"]
    assert len(everything(tmp_path / "set.h5")) == 60
    assert prepare(*arguments, "--strict") == 2
    assert error(capsys) == "error: 0_.wav: --group matches nothing in its name"


@pytest.mark.parametrize("suffix", [".flac", ".ogg"])
def test_other_formats(plain, tmp_path, suffix):
    write_encoded(plain / "low" / f"x{suffix}", tone(500, 16_000, 1.0))
    assert prepare(plain, tmp_path / "set.h5") == 0
    found = everything(tmp_path / "set.h5")
    assert len(found) == 21
    values = np.frombuffer(found[f"low/x{suffix}"][2], np.uint8).reshape(32, 32, 3).astype(int)
    wanted = stft_image(tone(500, 16_000, 1.0), 16_000, size=32).astype(int)
    np.testing.assert_allclose(values[:, 2:-2][wanted[:, 2:-2] > 170], wanted[:, 2:-2][wanted[:, 2:-2] > 170], atol=3)


def test_seconds(plain, tmp_path):
    assert prepare(plain, tmp_path / "set.h5", "--seconds", 0.5) == 0
    for id, (_, _, values) in everything(tmp_path / "set.h5").items():
        assert values == stft_image(*read_audio(plain / id), size=32, seconds=0.5).tobytes()


def test_damaged_recordings_are_skipped_and_named(plain, tmp_path, capsys):
    broken = break_some(plain / "high")
    write_wav(plain / "low" / os.fsdecode(b"caf\xe9.wav"), hiss())
    write_wav(plain / "low" / "a\x1b[2J.wav", hiss())
    write_wav(plain / "stray.wav", hiss())
    write_wav(plain / "low" / "odd.wav", tone(rate=44_101), 44_101)  # odd, but it can be used
    assert prepare(plain, tmp_path / "set.h5") == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    lines = out.splitlines()
    assert lines[0] == "set.h5: 21 images of 32×32, 2 classes"
    assert "  1 recordings outside the class folders skipped" in lines
    assert f"  {len(broken) + 2} recordings skipped:" in lines
    for id, reason in broken.items():
        assert any(line.startswith(f"    high/{id}: ") and reason in line for line in lines), (id, lines)
    assert sum("its name is not plain text" in line for line in lines) == 2
    assert str(tmp_path) not in out
    assert len(lines) == 4 + 2 + len(broken) + 2
    assert "low/odd.wav" in everything(tmp_path / "set.h5")


def test_strict_stops(plain, tmp_path, capsys):
    (plain / "low" / "3.wav").write_bytes(b"")
    assert prepare(plain, tmp_path / "set.h5", "--strict") == 2
    assert error(capsys) == "error: low/3.wav: an empty file"
    assert not (tmp_path / "set.h5").exists()


def test_a_class_of_nothing_but_damage(plain, tmp_path, capsys):
    for path in (plain / "low").iterdir():
        path.write_bytes(b"")
    assert prepare(plain, tmp_path / "set.h5") == 2
    assert error(capsys) == "error: class 'low' has no image to train on"
    assert not list(tmp_path.glob("set.h5*"))


def interrupt(monkeypatch, source, target):
    """A run that Ctrl-C ends after ten recordings, of which eight have been written."""
    made = []

    def make(path, *arguments):
        if len(made) == 10:
            raise KeyboardInterrupt
        made.append(path)
        return original(path, *arguments)

    original = sound_folders.read_recording
    with monkeypatch.context() as patch:
        patch.setattr(sound_folders, "read_recording", make)
        patch.setattr(labelled, "BATCH", 4)
        assert prepare(source, target) == 130
    assert not target.exists()
    return made


def test_interrupted_run_goes_on(plain, tmp_path, monkeypatch, capsys):
    assert prepare(plain, tmp_path / "whole.h5") == 0
    made = interrupt(monkeypatch, plain, tmp_path / "set.h5")
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted; the same command resumes it"
    for path in made[:8]:
        path.write_bytes(b"")  # which nobody reads again
    assert prepare(plain, tmp_path / "set.h5") == 0
    out = capsys.readouterr().out
    assert "  8 recordings resumed from an interrupted run" in out
    assert "skipped" not in out
    assert everything(tmp_path / "set.h5") == everything(tmp_path / "whole.h5")


@pytest.mark.parametrize("options", [["--seconds", 2], ["--val", 0.3], ["--group", "[0-9]"], []])
def test_what_cannot_be_gone_on_with_is_started_anew(plain, tmp_path, monkeypatch, capsys, options):
    interrupt(monkeypatch, plain, tmp_path / "set.h5")
    if not options:
        write_wav(plain / "bass" / "0.wav", tone(100))  # with which every label is another one
    assert prepare(plain, tmp_path / "set.h5", *options) == 0
    assert "resumed" not in capsys.readouterr().out
    assert prepare(plain, tmp_path / "whole.h5", *options) == 0
    assert everything(tmp_path / "set.h5") == everything(tmp_path / "whole.h5")


def test_killed_run_goes_on(plain, tmp_path, capsys):
    """SIGKILL, with no time to tidy up: a child kills itself while it reads its tenth recording."""
    script = (
        "import os, signal, sys\nfrom data_prep import common, labelled, sound_folders\n"
        "original, made = sound_folders.read_recording, []\n"
        "def make(*arguments):\n"
        "    made.append(1)\n"
        "    return original(*arguments) if len(made) < 10 else os.kill(os.getpid(), signal.SIGKILL)\n"
        "sound_folders.read_recording, labelled.BATCH = make, 4\n"
        "common.run(sound_folders.app, sys.argv[1:])\n"
    )
    target = tmp_path / "set.h5"
    killed = subprocess.run([sys.executable, "-c", script, plain, target, "--size", "32"], check=False)
    assert killed.returncode == -9
    assert not target.exists()
    assert prepare(plain, target) == 0
    assert "8 recordings resumed" in capsys.readouterr().out
    assert len(everything(target)) == 20


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["nowhere", "set.h5"], "no such folder"),
        (["text", "set.h5"], "no such folder"),
        (["empty", "set.h5"], "no two class folders of recordings"),
        (["one", "set.h5"], "no two class folders of recordings (train/CLASS/*.wav or CLASS/*.wav)"),
        (["half", "set.h5"], "the class folder low holds no recording"),
        (["set", "set.h5", "--label", "name"], "no recordings of two classes (CLASS_REST.wav)"),
        (["set", "set.h5", "--label", "colour"], "--label"),
        (["set", "set.h5", "--group", "("], "not a regular expression"),
        (["set", "set.h5", "--group", "x+"], "matches nothing in any name"),
        (["set", "set.h5", "--group", "wav"], "yields only 1 groups to train on; 3 are needed"),
        (["set", "set.h5", "--seconds", "0"], "--seconds"),
        (["set", "set.h5", "--seconds", "nan"], "--seconds"),
        (["set", "set.h5", "--val", "0.9"], "--val"),
        (["set", "set.h5", "--what"], "--what"),
        (["set", "empty"], "a folder; name a file"),
        (["set", "text/set.h5"], "is a file, not a folder"),
        (["set"], "DST"),
    ],
)
def test_bad_input_is_one_line(plain, tmp_path, monkeypatch, capsys, arguments, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("no folder")
    write_wav(tmp_path / "one" / "cat" / "a.wav", hiss())
    write_wav(tmp_path / "half" / "high" / "a.wav", hiss())
    write_wav(tmp_path / "half" / "mid" / "a.wav", hiss())
    (tmp_path / "half" / "low").mkdir()
    assert prepare(*arguments) == 2
    assert reason in error(capsys)
    assert not (tmp_path / "set.h5").exists()


def test_help_has_an_example(capsys):
    assert common.run(sound_folders.app, ["--help"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Example: crowdexit prepare sound-folders" in out
    assert "--group '_(.+)'" in out
