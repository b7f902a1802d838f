"""GTZAN in the published layout, whole and broken, through the command to the prepared file."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from audio_files import break_some, error, everything, hiss, tone, write_au, write_wav

from crowdexit.data.classes import ClassStore
from crowdexit.data.log_mel import read_audio
from crowdexit.data.spectrogram import gtzan_image
from data_prep import common, gtzan, labelled
from data_prep.gtzan import GENRES

PIECE = 66_150  # samples


def prepare(*arguments, size=32) -> int:
    return common.run(gtzan.app, [*map(str, arguments), "--size", str(size)])


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """Ten genres of three clips of three seconds."""
    folder = tmp_path_factory.mktemp("gtzan")
    for g, genre in enumerate(GENRES):
        for n in range(3):
            write_wav(folder / "genres" / genre / f"{genre}.{n:05d}.wav", hiss(10 * g + n, PIECE), 22_050)
    return folder


@pytest.fixture
def source(published, tmp_path):
    return shutil.copytree(published, tmp_path / "gtzan") / "genres"


def test_whole_set(source, tmp_path, capsys):
    assert prepare(source, tmp_path / "set.h5") == 0
    assert capsys.readouterr().out.splitlines() == [
        "set.h5: 30 images of 32×32, 10 classes",
        "  train     10 images, 1 a class",
        "  val       10 images, 1 a class",
        "  test      10 images, 1 a class",
        "  30 clips too short for ten pieces gave as many as they have",
    ]
    assert ClassStore(tmp_path / "set.h5").classes == list(GENRES)
    found = everything(tmp_path / "set.h5")
    for id, (_, name, values) in found.items():
        genre, clip, piece = id.split("/")
        assert (genre, clip.split(".")[0], piece) == (name, name, "0")
        assert values == gtzan_image(*read_audio(source / genre / f"{clip}.wav"), size=32).tobytes()


def test_ten_pieces_of_a_clip_stay_together(source, tmp_path, capsys):
    """30 s and a little more: ten pieces, each of another tone; nothing of what is left over."""
    steps = [tone(200 * (n + 1), 22_050, 3) for n in range(10)]
    write_wav(source / "jazz" / "jazz.00001.wav", np.concatenate([*steps, np.ones(9000)]), 22_050)
    assert prepare(source, tmp_path / "set.h5") == 0
    assert "  29 clips too short for ten pieces gave as many as they have" in capsys.readouterr().out.splitlines()
    found = {id: one for id, one in everything(tmp_path / "set.h5").items() if "jazz.00001" in id}
    assert list(found) == [f"jazz/jazz.00001/{n}" for n in range(10)]
    assert len({split for split, _, _ in found.values()}) == 1
    waveform = read_audio(source / "jazz" / "jazz.00001.wav")[0]
    for n, (_, _, values) in enumerate(found.values()):
        piece = waveform[:, n * PIECE : (n + 1) * PIECE]
        assert values == gtzan_image(piece, 22_050, size=32).tobytes()


@pytest.mark.parametrize(("samples", "pieces"), [(2 * PIECE - 1, 1), (2 * PIECE, 2), (3 * PIECE - 1, 2)])
def test_only_whole_pieces(source, tmp_path, samples, pieces):
    write_wav(source / "pop" / "pop.00000.wav", hiss(1, samples), 22_050)
    assert prepare(source, tmp_path / "set.h5") == 0
    ids = [id for id in everything(tmp_path / "set.h5") if "pop.00000" in id]
    assert ids == [f"pop/pop.00000/{n}" for n in range(pieces)]


def test_a_tenth_of_each_genre_fixed_by_the_names():
    for genre in GENRES:
        names = [f"{genre}.{n:05d}" for n in range(100)]
        splits = common.divided(names, gtzan.HELD_OUT)
        assert Counter(splits.values()) == {"train": 80, "val": 10, "test": 10}
        assert common.divided(reversed(names), gtzan.HELD_OUT) == splits
    assert sorted(name for name, split in splits.items() if split == "test")[:3] == [
        "rock.00009",
        "rock.00038",
        "rock.00039",
    ]


def test_au_files_and_folders_around(source, tmp_path):
    """As the set was first published: .au; other copies have it two folders down, with images beside it."""
    assert prepare(source, tmp_path / "one.h5") == 0
    for path in list(source.glob("*/*.wav")):
        write_au(path.with_suffix(".au"), read_audio(path)[0][0])
        path.unlink()
    outer = tmp_path / "copy" / "Data"
    outer.mkdir(parents=True)
    source.rename(outer / "genres_original")
    (outer / "images_original" / "blues").mkdir(parents=True)
    (outer / "features_3_sec.csv").write_text("filename")
    splits = {id: (split, name) for id, (split, name, _) in everything(tmp_path / "one.h5").items()}
    for src in (tmp_path / "copy", outer, outer / "genres_original"):
        assert prepare(src, tmp_path / "two.h5") == 0
        found = everything(tmp_path / "two.h5")
        assert {id: (split, name) for id, (split, name, _) in found.items()} == splits
    # The two scale 16 bits by 32,767 and 32,768, which is no shade of a difference but for rounding.
    for id, (_, _, values) in everything(tmp_path / "one.h5").items():
        a, b = (np.frombuffer(one, np.uint8).astype(int) for one in (values, found[id][2]))
        assert np.abs(a - b).max() <= 1


def test_a_clip_in_two_formats_is_taken_once(source, tmp_path, capsys):
    write_au(source / "rock" / "rock.00000.au", hiss(0, PIECE))
    assert prepare(source, tmp_path / "set.h5") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "    rock/rock.00000.au: rock.00000.wav is the same clip"
    assert len(everything(tmp_path / "set.h5")) == 30


def test_a_clip_of_another_rate(source, tmp_path):
    write_wav(source / "pop" / "pop.00000.wav", tone(1000, 44_100, 6), 44_100)
    assert prepare(source, tmp_path / "set.h5") == 0
    found = everything(tmp_path / "set.h5")
    for n in range(2):
        image = np.frombuffer(found[f"pop/pop.00000/{n}"][2], np.uint8).reshape(32, 32, 3)[..., 0]
        assert 32 - image.mean(axis=1).argmax() == pytest.approx(1000 / 11_025 * 32, abs=1)
        assert image[:, 2:-2].max() > image[:, 2:-2].mean() + 60


def test_damaged_clips_are_skipped_and_named(source, tmp_path, capsys):
    broken = break_some(source / "jazz")
    write_wav(source / "jazz" / "brief.wav", hiss(1, PIECE - 1), 22_050)
    (source / "jazz" / "._jazz.00000.wav").write_bytes(b"of a Macintosh")
    (source / "jazz" / "notes.txt").write_text("left alone")
    assert prepare(source, tmp_path / "set.h5") == 0
    out = capsys.readouterr().out.splitlines()
    assert f"  {len(broken) + 1} clips skipped:" in out
    for name, reason in {**broken, "brief.wav": "shorter than a piece of 3 s"}.items():
        id = name.removesuffix(".wav")
        assert any(line.startswith(f"    jazz/{id}: ") and reason in line for line in out), (id, out)
    assert sorted(id for id in everything(tmp_path / "set.h5") if id.startswith("jazz")) == [
        f"jazz/jazz.{n:05d}/0" for n in range(3)
    ]
    assert len(out) == 4 + 2 + len(broken) + 1


def test_a_damaged_clip_changes_no_split(source, tmp_path):
    assert prepare(source, tmp_path / "one.h5") == 0
    before = {id: split for id, (split, _, _) in everything(tmp_path / "one.h5").items()}
    held = next(id for id, split in before.items() if split == "val")
    (source / f"{held.removesuffix('/0')}.wav").write_bytes(b"")
    assert prepare(source, tmp_path / "two.h5") == 0
    del before[held]
    assert {id: split for id, (split, _, _) in everything(tmp_path / "two.h5").items()} == before


def test_strict_stops(source, tmp_path, capsys):
    (source / "jazz" / "jazz.00000.wav").write_bytes(b"")
    assert prepare(source, tmp_path / "set.h5", "--strict") == 2
    assert error(capsys) == "error: jazz/jazz.00000: an empty file"
    assert not (tmp_path / "set.h5").exists()


def test_interrupted_run_goes_on(source, tmp_path, monkeypatch, capsys):
    """A clip has all its pieces in the file or none, so that none is missing after going on."""
    for n in range(3):
        write_wav(source / "blues" / f"blues.{n:05d}.wav", hiss(n, 3 * PIECE), 22_050)
    assert prepare(source, tmp_path / "whole.h5") == 0
    made = []

    def make(path, audio):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(path)
        return original(path, audio)

    original = gtzan.make
    with monkeypatch.context() as patch:
        patch.setattr(gtzan, "make", make)
        patch.setattr(labelled, "BATCH", 4)  # reached with the second clip's last piece
        assert prepare(source, tmp_path / "set.h5") == 130
    for path in made[:2]:
        path.write_bytes(b"")  # which nobody reads again
    capsys.readouterr()
    assert prepare(source, tmp_path / "set.h5") == 0
    out = capsys.readouterr().out
    assert "  2 clips resumed from an interrupted run" in out
    assert "  30 clips too short" in out  # those of the first run are counted too
    assert "skipped" not in out
    assert everything(tmp_path / "set.h5") == everything(tmp_path / "whole.h5")


SPOILED = {
    "a genre missing": (lambda s: shutil.rmtree(s / "metal"), "holds no folder of the genre 'metal'"),
    "a genre empty": (lambda s: [p.unlink() for p in (s / "metal").iterdir()], "the genre 'metal' has no clip"),
    "a genre damaged": (
        lambda s: [p.write_bytes(b"") for p in (s / "metal").iterdir()],
        "class 'metal' has no image to train on",
    ),
    "no genre": (lambda s: [shutil.rmtree(s / genre) for genre in GENRES], "holds no folder of a genre"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_what_cannot_be_mended_is_one_line(source, tmp_path, capsys, case):
    spoil, reason = SPOILED[case]
    spoil(source)
    assert prepare(source, tmp_path / "set.h5") == 2
    assert reason in error(capsys)
    assert not list(tmp_path.glob("set.h5*"))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["nowhere", "set.h5"], "no such folder"),
        (["empty", "set.h5"], "holds no folder of a genre"),
        (["gtzan", "empty"], "a folder; name a file"),
        (["gtzan", "set.h5", "--what"], "--what"),
        (["gtzan"], "DST"),
    ],
)
def test_bad_input_is_one_line(source, tmp_path, monkeypatch, capsys, arguments, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert prepare(*arguments) == 2
    assert reason in error(capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "gtzan"]


def test_through_the_true_command(source, tmp_path):
    command = [sys.executable, "-m", "data_prep.gtzan", source.parent, tmp_path / "set.h5", "--size", "32"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("set.h5: 30 images of 32×32, 10 classes")


def test_help_has_an_example(capsys):
    assert common.run(gtzan.app, ["--help"]) == 0
    assert "Example: crowdexit prepare gtzan" in capsys.readouterr().out
