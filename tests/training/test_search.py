"""The search over d and h: every candidate beside the others, and the best that costs no more than the CNN branch."""

from __future__ import annotations

import pytest
from tiny_runs import run, tiny
from typer.testing import CliRunner

from crowdexit.cli.main import app
from crowdexit.errors import CrowdExitError
from crowdexit.evaluation.grid import Candidate, Grid, as_markdown, read_grid
from crowdexit.models import zoo
from crowdexit.training.search import search_recipe

EXITS = [{"name": "V1", "place": "V1", "kind": "slvit"}]


@pytest.fixture(scope="module")
def branches(store, backbone, tmp_path_factory):
    out = tmp_path_factory.mktemp("branches")
    run(tiny(store, "branches", start=backbone, exits=EXITS, epochs=1), out)
    return out


def test_grid_is_trained_and_written(store, branches, tmp_path):
    arguments = ["search", str(branches), "--data", str(store), "--place", "AV2", "--dims", "2,4", "--heads", "1,3"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "grid")])
    assert result.exit_code == 0, result.output
    grid = read_grid(tmp_path / "grid")
    assert [(c.exit, c.dim, c.heads) for c in grid.candidates] == [
        ("cnn", None, None),
        *((f"d{d}-h{h}", d, h) for d in (2, 4) for h in (1, 3)),
    ]
    network, _ = zoo.load(tmp_path / "grid")
    assert network.exit_module("d4-h3").encoder.attention.heads == 3
    assert network.exit_module("d2-h1").dim == 2
    params = {c.exit: c.params for c in grid.candidates}
    assert params["d2-h1"] < params["d2-h3"] < params["d4-h3"]
    for name in ("grid.csv", "grid.md", "grid.png"):
        assert (tmp_path / "grid" / name).stat().st_size > 50
    assert "| d4-h3 | 4 | 3 |" in result.output


@pytest.mark.parametrize(("measure", "best"), [("accuracy", "d8-h2"), ("error", "d8-h1")])
def test_the_best_has_no_more_parameters_than_the_cnn_branch(measure, best):
    grid = Grid(
        measure,
        (
            Candidate("cnn", None, None, 100, 50),
            Candidate("d8-h1", 8, 1, 60, 40),
            Candidate("d8-h2", 8, 2, 100, 60),
            Candidate("d8-h4", 8, 4, 101, 70 if measure == "accuracy" else 10),
        ),
    )
    assert grid.best is not None
    assert grid.best.exit == best
    assert "0.000M (more than CNN)" in as_markdown(grid)


def test_nothing_fits():
    grid = Grid("error", (Candidate("cnn", None, None, 10, 1.0), Candidate("d8-h4", 8, 4, 11, 0.5)))
    assert grid.best is None
    assert "None has as few" in as_markdown(grid)


@pytest.mark.parametrize(("dims", "heads"), [([], [2]), ([0], [2]), ([8], [-1])])
def test_no_grid(store, branches, dims, heads):
    with pytest.raises(CrowdExitError, match="positive widths"):
        search_recipe(branches, store, "V1", dims, heads)


def test_a_run_that_has_no_branches(store, backbone):
    with pytest.raises(CrowdExitError, match="not trained classifier-wise"):
        search_recipe(backbone, store, "V1", [4], [2])
