"""Ctrl-C and SIGTERM while the program is still being imported."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

# Imports typer, which every command needs, so slowly that a signal comes in the middle.
SLOW = """
import sys, time
class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == "typer":
            print("importing", file=sys.stderr, flush=True)
            time.sleep(60)
sys.meta_path.insert(0, Slow())
"""


@pytest.mark.parametrize("program", ["crowdexit", "data_prep.shanghaitech", "app"])
@pytest.mark.parametrize(
    ("number", "line", "code"), [(signal.SIGINT, "interrupted", 130), (signal.SIGTERM, "terminated", 143)]
)
def test_signals_during_imports_end_in_one_line(program, number, line, code, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(SLOW)
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", program, "--help"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "importing\n"
        process.send_signal(number)
        out, err = process.communicate()
    assert (out, err, process.returncode) == ("", f"{line}\n", code)


def test_importing_as_a_library_leaves_signals_alone():
    code = (
        "import signal, data_prep, app, crowdexit;"
        "assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL;"
        "assert signal.getsignal(signal.SIGINT) == signal.default_int_handler"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_ctrl_c_is_a_keyboard_interrupt_once_a_command_runs():
    """Commands end what they have begun; only imports are cut off."""
    code = (
        "import os, signal, sys, typer\n"
        "from crowdexit.utils import command, signals\n"
        "signals.end_in_one_line()\n"
        "app = typer.Typer()\n"
        "@app.command()\n"
        "def main():\n"
        "    try: os.kill(os.getpid(), signal.SIGINT)\n"
        "    finally: print('tidied')\n"
        "sys.exit(command.run(app, []))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.stdout, ended.stderr, ended.returncode) == ("tidied\n", "interrupted\n", 130)
