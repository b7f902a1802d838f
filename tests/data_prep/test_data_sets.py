"""The registry of data sets."""

from __future__ import annotations

import subprocess
import sys

import pytest
from typer.testing import CliRunner

import data_prep
from crowdexit.utils import command
from data_prep.command import app
from data_prep.registry import DataSet, command_of, data_sets

MINE = """
import typer
from data_prep.registry import DataSet

DATA_SET = DataSet("Mine, of the village", task="counting", has_heads=True, resumes=False)
app = typer.Typer()


@app.command()
def main(source: str) -> None:
    if source == "stopped":
        raise KeyboardInterrupt
    print(f"prepared {source}")
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A data set of one file."""
    (tmp_path / "my_set.py").write_text(MINE)
    monkeypatch.setattr(data_prep, "__path__", [*data_prep.__path__, str(tmp_path)])
    yield
    sys.modules.pop("data_prep.my_set", None)


def test_a_data_set_is_its_own_file(mine, capsys):
    assert data_sets()["my-set"] == DataSet("Mine, of the village", task="counting", has_heads=True, resumes=False)
    assert "Mine, of the village" in CliRunner().invoke(app, ["--help"]).output
    assert command.run(app, ["my-set", "here"]) == 0
    assert capsys.readouterr().out == "prepared here\n"
    assert command.run(app, ["my-set", "stopped"]) == 130
    assert capsys.readouterr().err == "interrupted; nothing was written\n"


def test_what_stands_in_the_source_is_what_is_imported():
    for name, data_set in data_sets().items():
        module = sys.modules[command_of(name).registered_commands[0].callback.__module__]
        assert data_set == module.DATA_SET
    assert {name for name, data_set in data_sets().items() if data_set.has_heads} == {"disco", "shanghaitech"}


def test_the_list_needs_none_of_them():
    program = (
        "import sys; from typer.testing import CliRunner; from data_prep.command import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "assert not {'torch', 'numpy', 'h5py', 'data_prep.disco'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_command_of_a_data_set(capsys):
    assert command.run(app, ["gtzan", "--help"]) == 0
    assert "Example: crowdexit prepare gtzan genres data/gtzan.h5" in capsys.readouterr().out
    assert command.run(app, ["gtzan", "nowhere", "set.h5"]) == 2
    assert capsys.readouterr().err.startswith("error: nowhere")
