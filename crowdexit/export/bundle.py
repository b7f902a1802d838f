"""The program that an exported folder brings along: this package's own modules, as far as counting needs them."""

from __future__ import annotations

import ast
import re
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

START = "crowdexit.export.count"
FOLDER = "standalone"
_IMPORT = re.compile(r"^from crowdexit\.(?:\w+\.)*(\w+) import ", re.MULTILINE)
_MAIN = '''"""Count the people in an image with the exported network in this folder: ``python count.py IMAGE``.

Needs NumPy, OpenCV and {library}, neither PyTorch nor CrowdExit.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # for python -I, which leaves it out

try:
    from standalone.count import main
except ModuleNotFoundError as missing:
    print(f"error: {{missing.name}} is not installed; this needs NumPy, OpenCV and {library}", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    sys.exit(main(HERE))
'''


def write_program(folder: Path, library: str) -> None:
    """Write ``count.py``, and the modules that it runs, into an exported folder.

    Args:
        folder: of the export.
        library: what runs its models, by its own name.

    Raises:
        OSError: if it cannot be written.
    """
    (folder / FOLDER).mkdir()
    about = f'"""What count.py runs, from CrowdExit {version("crowdexit")} (MIT licence)."""\n'
    (folder / FOLDER / "__init__.py").write_text(about, "utf-8")
    for name, source in sources().items():
        (folder / FOLDER / f"{name}.py").write_text(source, "utf-8")
    (folder / "count.py").write_text(_MAIN.format(library=library), "utf-8")


def sources() -> dict[str, str]:
    """The modules that counting needs, by their names in one flat package, importing one another from there."""
    found: dict[str, str] = {}
    todo, done = [START], set[str]()
    while todo:
        module = todo.pop()
        if module in done:
            continue
        done.add(module)
        source = _source_of(module)
        imported = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
        todo += [node.module for node in imported if (node.module or "").startswith("crowdexit") and node.module]
        name = module.rpartition(".")[2]
        if name in found:
            raise ValueError(f"two modules that counting needs are called {name}")
        found[name] = _IMPORT.sub(r"from .\1 import ", source)
    return found


def _source_of(module: str) -> str:
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(module)
    return Path(spec.origin).read_text("utf-8")
