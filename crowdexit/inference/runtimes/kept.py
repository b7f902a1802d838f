"""What takes long to make, kept in the user's cache: converted models, and which runtime was the fastest.

Nothing depends on it: what is missing or damaged is made anew, and where nothing can be written nothing is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Generic, TypeVar

from crowdexit.inference.runtimes.engines import Shapes
from crowdexit.network import MultiExitNetwork

MOST_NETWORKS = 8
MOST_CHOICES = 100
_LIBRARIES = ("crowdexit", "torch", "openvino", "nncf", "onnx", "onnxscript", "onnxruntime")
M = TypeVar("M")


def cache_folder() -> Path:
    """The user's cache of this project; perhaps not there yet."""
    asked = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (asked if asked.is_absolute() else Path.home() / ".cache") / "crowdexit"


def installed_version(package: str) -> str | None:
    """The version of a package, None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def fingerprint(network: MultiExitNetwork, *more: object) -> str:
    """A hash of a network, its weights, the libraries' versions and what else is given."""
    digest = hashlib.blake2b(digest_size=16)
    libraries = [installed_version(name) for name in _LIBRARIES]
    exits = [(name, type(network.exit_module(name)).__name__, network.stage_of(name)) for name in network.exit_names]
    digest.update(repr((libraries, type(network).__name__, network.config, exits, more)).encode())
    for name, tensor in network.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class KeptModels(Generic[M]):
    """The converted pieces of one network for one runtime.

    Args:
        suffix: of a model's file.
        read, write: a model from its file, and to it; whatever else ``write`` puts beside it is kept with it.
    """

    def __init__(
        self,
        network: MultiExitNetwork,
        runtime: str,
        suffix: str,
        read: Callable[[Path], M],
        write: Callable[[M, Path], None],
    ) -> None:
        self._folder = cache_folder() / "models" / fingerprint(network, runtime)
        self._suffix, self._read, self._write = suffix, read, write

    def get(self, piece: str, shapes: Shapes) -> M | None:
        """A kept model, or None."""
        path = self._path(piece, shapes)
        if not path.is_file():
            return None
        with suppress(Exception):  # whatever a library makes of a damaged file
            model = self._read(path)
            os.utime(self._folder)
            return model
        return None

    def keep(self, piece: str, shapes: Shapes, model: M) -> None:
        """Keep a model, and of all networks' those that were used last."""
        path = self._path(piece, shapes)
        part = self._folder / f"part-{os.getpid()}"
        with suppress(OSError):
            part.mkdir(parents=True, exist_ok=True)
            self._write(model, part / path.name)
            for made in sorted(part.iterdir(), key=lambda made: made.name == path.name):  # the model itself last
                made.replace(self._folder / made.name)
            part.rmdir()
            others = sorted(self._folder.parent.iterdir(), key=lambda folder: folder.stat().st_mtime)
            for old in others[:-MOST_NETWORKS]:
                shutil.rmtree(old, ignore_errors=True)

    def model(self, piece: str, shapes: Shapes, make: Callable[[], M]) -> M:
        """A kept model, or one that is made and kept."""
        kept = self.get(piece, shapes)
        if kept is not None:
            return kept
        made = make()
        self.keep(piece, shapes, made)
        return made

    def _path(self, piece: str, shapes: Shapes) -> Path:
        name = hashlib.blake2b(repr((piece, shapes)).encode(), digest_size=16).hexdigest()
        return self._folder / f"{name}{self._suffix}"


def choices() -> dict[str, str]:
    """What was chosen before, by its key; nothing where that file is not there or damaged."""
    with suppress(OSError, ValueError, RecursionError):
        data = json.loads((cache_folder() / "runtimes.json").read_text("utf-8"))
        if isinstance(data, dict):
            return {str(key): str(name) for key, name in data.items()}
    return {}


def keep_choice(key: str, name: str) -> None:
    """Keep a choice, and of all the last ones."""
    path = cache_folder() / "runtimes.json"
    known = {**choices(), key: name}
    part = path.with_name(f"part-{os.getpid()}-{path.name}")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(dict(list(known.items())[-MOST_CHOICES:])), "utf-8")
        part.replace(path)
