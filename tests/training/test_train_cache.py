"""A feature cache gives the branches that the backbone gives, and never those of another."""

from __future__ import annotations

import json

import pytest
import torch
from test_train_vit import EXITS, SMALL
from tiny_runs import best, run, tiny

from crowdexit.data.dataset import EpochPlan
from crowdexit.errors import CrowdExitError
from crowdexit.models import zoo
from crowdexit.training.cache import MANIFEST

VIEWS = {"views": 2}


@pytest.fixture(scope="module")
def trained(store, tmp_path_factory):
    out = tmp_path_factory.mktemp("cached")
    run(tiny(store, "count", epochs=1, loss="balanced", **SMALL), out)
    return out / "model.safetensors"


def branches(store, start, out, **keys):
    keys = {"start": start, "exits": EXITS, "loss": "balanced", "local": 1.0, "epochs": 5, **SMALL, **keys}
    data = {**VIEWS, **keys.pop("data", {})}
    run(tiny(store, "branches", data=data, **keys), out)
    return {key: value for key, value in best(out).items() if key.startswith("branches.")}


def errors(out):
    """Of each branch, by validation."""
    return {name: table["error"] for name, table in zoo.read_spec(out / "model.safetensors").meta["validation"].items()}


@pytest.fixture(scope="module")
def passed(store, trained, tmp_path_factory):
    """The errors of branches with the backbone run for every sample."""
    out = tmp_path_factory.mktemp("passed")
    branches(store, trained, out)
    return errors(out)


@pytest.mark.parametrize("gigabytes", [1.0, 2e-5])
def test_the_same_branches_from_the_cache(store, trained, passed, tmp_path, gigabytes):
    cache = {"gigabytes": gigabytes}
    cached = branches(store, trained, tmp_path / "run", cache=cache)
    # What passes the backbone in other batches is rounded otherwise.
    assert errors(tmp_path / "run") == pytest.approx(passed, rel=1e-3)
    folder = tmp_path / "run" / "features"
    rows = json.loads((folder / MANIFEST).read_text())["rows"]
    size = sum(path.stat().st_size for path in folder.glob("*.npy"))
    if gigabytes == 1:
        assert rows == 20  # ten samples in two views
    else:
        assert 0 < rows < 20
        assert size <= gigabytes * 1e9 + 4096  # and the files' headers
    # A second run, of other branches at the same places, reads what the first has written.
    before = (folder / "visual-1.npy").read_bytes()
    again = branches(store, trained, tmp_path / "again", cache={"folder": folder, **cache}, exits=EXITS[1:])
    assert again.keys() < cached.keys()
    assert errors(tmp_path / "again") == pytest.approx({n: passed[n] for n in errors(tmp_path / "again")}, rel=1e-3)
    assert (folder / "visual-1.npy").read_bytes() == before


def test_what_is_cached_is_not_computed(store, trained, tmp_path, monkeypatch):
    cache = {"folder": tmp_path / "features"}
    branches(store, trained, tmp_path / "first", cache=cache)
    images = []
    from crowdexit.data.dataset import CrowdDataset

    read = CrowdDataset.__getitem__
    monkeypatch.setattr(CrowdDataset, "__getitem__", lambda self, key: images.append(self.split) or read(self, key))
    branches(store, trained, tmp_path / "second", cache=cache, epochs=3)
    assert images.count("train") == 1  # the example that tells the sizes
    assert images.count("val") == 3 * 5


def test_bfloat16_is_cached_exactly(store, trained, tmp_path):
    keys = {"precision": "bf16-mixed", "epochs": 4}
    branches(store, trained, tmp_path / "passed", **keys)
    branches(store, trained, tmp_path / "cached", cache={}, **keys)
    assert errors(tmp_path / "cached") == pytest.approx(errors(tmp_path / "passed"), rel=2e-2)
    types = json.loads((tmp_path / "cached" / "features" / MANIFEST).read_text())["types"]
    assert types["audio-1"] == "bfloat16"


def test_of_another_network_or_other_data(store, trained, tmp_path):
    folder = tmp_path / "features"
    cache = {"folder": folder}
    branches(store, trained, tmp_path / "first", cache=cache, epochs=1)
    other = tmp_path / "other.safetensors"
    network, spec = zoo.load(trained)
    with torch.no_grad():
        next(network.stages[1].parameters()).add_(1e-3)
    zoo.save(network, spec, other)
    for keys, words in (
        ({"start": other}, "another network"),
        ({"data": {"scale": [0.5, 1.0]}}, "other data"),
        ({"exits": EXITS[:2]}, "other places"),
        ({"data": {"views": 3}}, "another size"),
    ):
        keys = {"start": trained, **keys}
        with pytest.raises(CrowdExitError, match=f"features: a feature cache of {words}"):
            branches(store, keys.pop("start"), tmp_path / words, cache=cache, **keys)
        assert not (tmp_path / words / "model.safetensors").exists()
    (folder / "whole.npy").write_bytes(b"half")
    with pytest.raises(CrowdExitError, match="damaged"):
        branches(store, trained, tmp_path / "damaged", cache=cache)
    (folder / MANIFEST).write_text("{")
    with pytest.raises(CrowdExitError, match="damaged"):
        branches(store, trained, tmp_path / "damaged", cache=cache)


def test_no_room(store, trained, tmp_path, monkeypatch):
    with pytest.raises(CrowdExitError, match="more than the limit"):
        branches(store, trained, tmp_path / "a", cache={"gigabytes": 1e-9})
    import shutil

    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CrowdExitError, match="are free"):
        branches(store, trained, tmp_path / "b", cache={})
    (tmp_path / "file").touch()
    with pytest.raises(CrowdExitError, match="cannot create the feature cache"):
        branches(store, trained, tmp_path / "c", cache={"folder": tmp_path / "file" / "features"})


def test_a_recipe_says_which_views_come_again(store, trained):
    with pytest.raises(ValueError, match="needs the stage"):
        tiny(store, "branches", start=trained, cache={})


def test_views_come_in_turn():
    plan = EpochPlan(["A", "B", "C"], views=2)
    seen = []
    for epoch in range(2):
        plan.set_epoch(epoch)
        seen.append(sorted(plan.plan()))
    assert seen == [[(i, epoch) for i in range(3)] for epoch in range(2)]
    often = EpochPlan(["A", "B"], views=3, length=6).plan()
    assert sorted(often) == [(i, view) for i in range(2) for view in range(3)]
