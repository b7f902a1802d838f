"""The documentation points at what is there."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

from crowdexit.cli.main import app

ROOT = Path(__file__).parents[1]
LISTED = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
PAGES = [ROOT / name for name in LISTED.splitlines()] or sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
LINK = re.compile(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]+))?\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for name, anchor in LINK.findall(page.read_text()):
        target = page.parent / name if name else page
        assert target.exists(), f"{page.name} links to {name}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{page.name} links to {name}#{anchor}"


def test_recipes_in_the_documentation_exist():
    recipes = {path.stem for path in (ROOT / "crowdexit" / "training" / "recipes").glob("*.yaml")}
    for page in PAGES:
        for name in re.findall(r"crowdexit train ([a-z][\w-]+)(?=\s|`)", page.read_text()):
            assert name in recipes or name.endswith("-"), f"{page.name}: no recipe {name}"


def test_version():
    result = CliRunner().invoke(app, ["--version"])
    assert result.output == f"crowdexit {version('crowdexit')}\n"
    assert result.exit_code == 0


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "H×W×3 uint8 RGB" in (tmp_path / "api" / "index.html").read_text("utf-8")
