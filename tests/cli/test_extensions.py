"""Commands that come by entry point."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``crowdexit`` where the packages of a folder are installed, too."""
    path = os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "crowdexit", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb"},
    )


def install(folder: Path, package: str, commands: dict[str, str]) -> None:
    about = folder / f"{package}-0.1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.1.0\n")
    lines = [f"{name} = {value}" for name, value in commands.items()]
    (about / "entry_points.txt").write_text("\n".join(["[crowdexit.commands]", *lines]))


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A folder with the entry points of this checkout, whatever is installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    install(tmp_path, "crowdexit", project["entry-points"]["crowdexit.commands"])
    return tmp_path


def test_the_commands_of_a_checkout(checkout):
    shown = run(checkout, "--help").stdout
    assert {"count", "app", "prepare"} <= {line.strip("│ ").split(" ")[0] for line in shown.splitlines()}
    assert "--port" in run(checkout, "app", "--help").stdout
    assert "ShanghaiTech A and B" in run(checkout, "prepare", "--help").stdout
    refused = run(checkout, "prepare", "cifra", "a", "b")
    assert (refused.returncode, refused.stderr) == (2, "error: No such command 'cifra'. Did you mean 'cifar'?\n")


def test_another_package_adds_a_command(tmp_path):
    (tmp_path / "greeting.py").write_text(
        "import typer\napp = typer.Typer()\n"
        "@app.command()\ndef greet(name: str) -> None:\n    'Greet somebody.'\n    print(f'Hello {name}')\n"
    )
    install(tmp_path, "greeting", {"greet": "greeting:app"})
    assert "Greet somebody." in run(tmp_path, "--help").stdout
    assert run(tmp_path, "greet", "Ann").stdout == "Hello Ann\n"


def test_what_a_command_needs_and_is_not_installed_is_named(tmp_path):
    (tmp_path / "greeting.py").write_text("import nothing_of_that_name\n")
    install(tmp_path, "greeting", {"greet": "greeting:app"})
    assert "No module named 'nothing_of_that_name'" in run(tmp_path, "greet").stderr
    assert run(tmp_path, "--version").returncode == 0
