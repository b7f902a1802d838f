"""The wheel, installed without the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    pytest.importorskip("hatchling")
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (path,) = out.iterdir()
    return path


@pytest.fixture(scope="module")
def crowdexit(wheel, tmp_path_factory) -> Path:
    """The command where the wheel is installed, with the libraries of this environment but without the checkout."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, symlinks=True)
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True, env=outside())
    libraries = folder / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    # The path alone: the .pth files there, of which one names the checkout, are not read.
    (libraries / "libraries.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "bin" / "crowdexit"


def outside() -> dict[str, str]:
    """An environment that does not lead to the checkout."""
    return {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}


def run(crowdexit: Path, folder: Path, *arguments: str) -> str:
    """What the command prints in a folder, on an environment of its own."""
    environment = {
        **outside(),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "COLUMNS": "120",
        "NO_COLOR": "1",
        "TERM": "dumb",
    }
    done = subprocess.run(
        [crowdexit, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_one_top_level_package(wheel):
    with zipfile.ZipFile(wheel) as files:
        names = files.namelist()
    assert {name.split("/")[0] for name in names} == {"crowdexit", "crowdexit-0.1.0.dist-info"}
    assert "crowdexit/checkpoints/audiocsrnet-lite/model.safetensors" in names
    assert "crowdexit/samples/clip.mp4" in names


def test_it_is_the_installed_one(crowdexit, tmp_path):
    python = crowdexit.with_name("python")
    program = "import crowdexit, crowdexit.app, crowdexit.data_prep; print(crowdexit.__file__)"
    assert str(crowdexit.parents[1]) in run(python, tmp_path, "-c", program)
    with pytest.raises(AssertionError, match="No module named 'data_prep'"):
        run(python, tmp_path, "-c", "import data_prep")


def test_demo(crowdexit, tmp_path):
    assert "final" in run(crowdexit, tmp_path, "demo", "--runtime", "eager")
    assert sorted(path.suffix for path in (tmp_path / "demo-out").iterdir()) == [".csv", ".mp4"]


def test_the_page(crowdexit, tmp_path):
    assert "--port" in run(crowdexit, tmp_path, "app", "--help")
    run(crowdexit.with_name("python"), tmp_path, "-c", "import crowdexit.app.page")


def test_data_preparation(crowdexit, tmp_path, crowd_image):
    """By several processes, which find their module, too."""
    assert "shanghaitech" in run(crowdexit, tmp_path, "prepare", "--help")
    images, truths = tmp_path / "part_B" / "test_data" / "images", tmp_path / "part_B" / "test_data" / "ground-truth"
    images.mkdir(parents=True)
    truths.mkdir()
    for number in (1, 2):
        data, heads = crowd_image(heads=number)
        (images / f"IMG_{number}.jpg").write_bytes(data)
        cell = np.empty((1, 1), object)
        cell[0, 0] = {"location": heads, "number": len(heads)}
        savemat(truths / f"GT_IMG_{number}.mat", {"image_info": cell})
    made = run(crowdexit, tmp_path, "prepare", "shanghaitech", "part_B", "set.h5", "--jobs", "2")
    assert "set.h5: 2 images, 3 heads" in made
