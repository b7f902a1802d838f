"""Profiles: what they know of times, and that only a whole one of this very machine and network is read."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from branches import both_kinds
from networks import VIT
from tiny import TINY

from crowdexit.inference import profile as module
from crowdexit.inference.profile import FIRST, MAX_MEASUREMENTS, Profile, exit_step, profile_of, stage_step
from crowdexit.models import zoo


def made(path=None, key=None) -> Profile:
    profile = Profile(path, key)
    for ms in (10.0, 12.0, 11.0, 50.0):
        profile.note(FIRST, 1, ms)
        profile.note(stage_step(1), 1, 2 * ms, ms)
    profile.note(FIRST, 4, 32.0)
    profile.note(stage_step(1), 4, 96.0, 32.0)
    return profile


def test_quantiles_and_proportions():
    profile = made()
    assert [profile.ms(FIRST, quantile=q) for q in (0, 0.25, 0.5, 0.95, 1)] == [10, 10, 11, 50, 50]
    # Twice the first stage, however long that took.
    assert profile.ms(stage_step(1)) == pytest.approx(22)
    assert profile.ms(stage_step(1), first_ms=70.0) == pytest.approx(140)
    assert profile.ms(stage_step(1), quantile=1) == pytest.approx(22)
    assert profile.ms(exit_step("V1")) is None
    assert profile.ms(FIRST, min_samples=5) is None
    assert profile.total_ms([FIRST, stage_step(1)]) == pytest.approx(33)
    assert profile.total_ms([FIRST, exit_step("V1")]) is None


def test_other_numbers_of_rows():
    profile = made()
    assert profile.ms(FIRST, 4) == 32
    assert profile.ms(FIRST, 2) == pytest.approx(11 + (32 - 11) / 3)
    assert profile.ms(FIRST, 8) == pytest.approx(64)
    assert profile.ms(stage_step(1), 3, first_ms=1.0) == pytest.approx(2 + 2 / 3)
    assert profile.ms(stage_step(1), 8) == pytest.approx(3 * 64)


def test_the_old_is_forgotten():
    profile = Profile()
    for number in range(3 * MAX_MEASUREMENTS):
        profile.note(FIRST, 1, float(number))
    assert profile.ms(FIRST, quantile=0) == 2 * MAX_MEASUREMENTS


def test_saved_and_loaded(tmp_path):
    path = tmp_path / "a" / "p.json"
    made(path, {"runtime": "eager"}).write()
    assert [file.name for file in path.parent.iterdir()] == ["p.json"]
    again = Profile(path, {"runtime": "eager"})
    assert again.read()
    for step in (FIRST, stage_step(1)):
        for rows in (1, 2, 4, 9):
            assert again.ms(step, rows) == pytest.approx(made().ms(step, rows), rel=1e-4)
    assert again.knows([FIRST, stage_step(1)])
    assert not again.knows([FIRST, stage_step(2)])
    assert not Profile(path, {"runtime": "cuda"}).read()
    assert not Profile(tmp_path / "none.json").read()
    assert not Profile().read()
    Profile().write()
    (tmp_path / "file").write_text("")
    made(tmp_path / "file" / "p.json").write()  # cannot be: it is done without


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"\xff\xfe",
        lambda data: json.dumps(data).encode()[:-20],
        lambda data: json.dumps([data]).encode(),
        lambda data: json.dumps({**data, "format": 0}).encode(),
        lambda data: json.dumps({**data, "times": 3}).encode(),
        lambda data: json.dumps({**data, "times": {FIRST: {"one": [1.0]}}}).encode(),
        lambda data: json.dumps({**data, "times": {FIRST: {"0": [1.0]}}}).encode(),
        lambda data: json.dumps({**data, "times": {FIRST: {"-1": [1.0]}}}).encode(),
        lambda data: json.dumps({**data, "times": {FIRST: {"9" * 400: [1.0]}}}).encode(),
        lambda data: json.dumps({**data, "times": {FIRST: {"1": [10**400]}}}).encode(),
        lambda data: json.dumps({**data, "times": {FIRST: {"1": []}}}).encode(),
        lambda data: json.dumps({**data, "times": {FIRST: {"1": ["x"]}}}).encode(),
        lambda data: json.dumps({**data, "times": {FIRST: {"1": [-1.0]}}}).encode(),
        lambda data: json.dumps({**data, "times": {FIRST: {"1": [float("nan")]}}}).encode(),
    ],
)
def test_damaged_files(tmp_path, damage):
    path = tmp_path / "p.json"
    made(path).write()
    path.write_bytes(damage(json.loads(path.read_text())))
    profile = made(path)
    assert not profile.read()
    assert profile.ms(FIRST) == 11  # as it was


def test_profile_key(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def path_of(changes=(), exits=both_kinds(), runtime="eager", network=None):
        torch.manual_seed(len(changes))
        network = network or zoo.build(zoo.Spec("audiocsrnet-s", exits, {**TINY, **dict(changes)}))
        fresh = profile_of(network, runtime)
        fresh.note(FIRST, 1, 1.0)
        fresh.write()
        return len(list((tmp_path / "crowdexit" / "profiles").iterdir()))

    assert path_of() == path_of() == 1
    assert path_of(runtime="eager-bf16") == 2
    assert path_of({"size": [64, 64]}) == 3
    assert path_of({"dim": 8}) == 4
    assert path_of(exits=both_kinds()[:2]) == 5
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    assert path_of() == 6
    for number, view in enumerate(("fit", "tiles"), 7):
        assert path_of(network=zoo.build(zoo.Spec("transcrowd-gap-s", (), {**VIT, "view": view}))) == number
    versions = module.installed_version
    for number, library in enumerate(("openvino", "onnxruntime"), 9):
        monkeypatch.setattr(
            module, "installed_version", lambda name, new=library: "9" if name == new else versions(name)
        )
        assert path_of() == number


def test_the_profile_written_longest_ago_goes(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MOST_PROFILES", 3)
    for number in range(5):
        made(tmp_path / f"{number}.json").write()
        os.utime(tmp_path / f"{number}.json", (number, number))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2.json", "3.json", "4.json"]


def test_two_of_one_key_do_not_disturb_each_other(tmp_path, monkeypatch):
    """Each writes a file of its own beside the one that it is to become; what fails leaves none behind."""
    path, parts = tmp_path / "p.json", []
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda part, to: parts.append(part) or replace(part, to))
    made(path).write()
    made(path).write()
    assert len(set(parts)) == 2
    monkeypatch.setattr(Path, "replace", lambda part, to: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        made(path).write()
    assert list(tmp_path.iterdir()) == [path]
