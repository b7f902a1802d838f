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
from dataclasses import asdict
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Generic, TypeVar

import torch

from crowdexit.errors import CrowdExitError
from crowdexit.models.network import MultiExitNetwork
from crowdexit.runtimes.arrays import Signature, TensorSpec
from crowdexit.runtimes.engines import Shapes
from crowdexit.utils.files import atomic_write
from crowdexit.utils.machine import cache_folder
from crowdexit.utils.paths import PACKAGE

MOST_NETWORKS = 8
MOST_CHOICES = 100
_CHOICES = "runtimes.json"
_LIBRARIES = ("crowdexit", "torch", "openvino", "onnx", "onnxscript", "onnxruntime")
# What a network's graph is made of, and what makes models of it.
_SOURCES = ("models/**/*.py", "runtimes/*.py")
M = TypeVar("M")


def installed_version(package: str) -> str | None:
    """The version of a package, None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def gpu_name() -> str:
    """The GPU's name; empty where there is none."""
    with suppress(RuntimeError):  # of one that is there and cannot even be asked for its name
        return torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return ""


def fingerprint(network: MultiExitNetwork, *more: object) -> str:
    """A hash of a network, its weights, the code that makes its graph, the libraries' versions and what else is given.

    Of an exit that is its kind and its options too: two of the same modules and weights may differ in nothing else.
    """
    digest = hashlib.blake2b(digest_size=16)
    libraries = [installed_version(name) for name in _LIBRARIES]
    exits = [
        (name, network.stage_of(name), network.exit_module(name).kind, network.branch_options.get(name))
        for name in network.exit_names
    ]
    identity = libraries, _code(PACKAGE), str(network), network.config, exits, network.activation_ranges, more
    digest.update(repr(identity).encode())
    for name, tensor in network.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@cache
def _code(package: Path) -> str:
    """A hash of the sources in the package's folder that decide what is kept: in a checkout they change."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(path for pattern in _SOURCES for path in package.glob(pattern)):
        digest.update(repr((str(path.relative_to(package)), path.read_bytes())).encode())
    return digest.hexdigest()


class ModelCache(Generic[M]):
    """The converted subgraphs of one network for one runtime.

    Beside each model lie the digests of its files: a damaged one may well be readable, and count wrongly.

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
        root = cache_folder()
        self._folder = None if root is None else root / "models" / fingerprint(network, runtime)
        self._suffix, self._read, self._write = suffix, read, write

    def get(self, subgraph: str, shapes: Shapes) -> M | None:
        """A kept model, or None."""
        if self._folder is None:
            return None
        stem = _stem(subgraph, shapes)
        with suppress(Exception):  # whatever is missing, or a library makes of a damaged file
            digests = json.loads((self._folder / f"{stem}.json").read_text("utf-8"))
            if all(_digest(self._folder / name) == digest for name, digest in digests.items()):
                model = self._read(self._folder / f"{stem}{self._suffix}")
                with suppress(OSError):  # a cache that can only be read is of use, too
                    os.utime(self._folder)
                return model
        return None

    def keep(self, subgraph: str, shapes: Shapes, model: M) -> None:
        """Keep a model, and of all networks' those that were used last."""
        if self._folder is None:
            return
        stem = _stem(subgraph, shapes)
        with suppress(Exception):  # a full disk, and whatever a library makes of it
            self._folder.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(prefix="part-", dir=self._folder, ignore_cleanup_errors=True) as part:
                self._write(model, Path(part) / f"{stem}{self._suffix}")
                made = sorted(Path(part).iterdir())
                digests = Path(part) / f"{stem}.json"
                digests.write_text(json.dumps({path.name: _digest(path) for path in made}), "utf-8")
                for path in (*made, digests):  # the digests last: without them there is no model
                    path.replace(self._folder / path.name)
            others = sorted(self._folder.parent.iterdir(), key=lambda folder: folder.stat().st_mtime)
            for old in others[:-MOST_NETWORKS]:
                shutil.rmtree(old, ignore_errors=True)

    def signatures(self, make: Callable[[], dict[str, Signature]]) -> dict[str, Signature]:
        """The cached signature of every subgraph, else made and cached: tracing takes as long as importing the network.

        Stored with a digest, as the models are.
        """
        path = None if self._folder is None else self._folder / "signatures.json"
        if path is not None:
            with suppress(Exception):  # missing, or damaged in any way
                digest, text = path.read_text("utf-8").split("\n", 1)
                if hashlib.blake2b(text.encode()).hexdigest() == digest:
                    return {subgraph: _signature_of(sides) for subgraph, sides in json.loads(text).items()}
        made = make()
        if path is not None:
            text = json.dumps({subgraph: asdict(signature) for subgraph, signature in made.items()})
            with suppress(OSError, CrowdExitError):
                path.parent.mkdir(parents=True, exist_ok=True)
                with atomic_write(path) as part:
                    part.write_text(f"{hashlib.blake2b(text.encode()).hexdigest()}\n{text}", "utf-8")
        return made

    def model(self, subgraph: str, shapes: Shapes, make: Callable[[], M]) -> M:
        """A cached model, else one that is made and cached."""
        cached = self.get(subgraph, shapes)
        if cached is not None:
            return cached
        made = make()
        self.keep(subgraph, shapes, made)
        return made


def _signature_of(sides: dict[str, list[dict[str, Any]]]) -> Signature:
    inputs, outputs = (
        tuple(TensorSpec(spec["name"], spec["dtype"], tuple(spec["shape"])) for spec in sides[side])
        for side in ("inputs", "outputs")
    )
    return Signature(inputs, outputs)


def _stem(subgraph: str, shapes: Shapes) -> str:
    """The name of a model's files without their suffixes."""
    return hashlib.blake2b(repr((subgraph, shapes)).encode(), digest_size=16).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def choices() -> dict[str, str]:
    """What was chosen before, by its key; nothing where that file is not there or damaged."""
    folder = cache_folder()
    if folder is None:
        return {}
    with suppress(OSError, ValueError, RecursionError):
        data = json.loads((folder / _CHOICES).read_text("utf-8"))
        if isinstance(data, dict):
            return {str(key): str(name) for key, name in data.items()}
    return {}


def save_choice(key: str, name: str) -> None:
    """Keep a choice, and of all the last ones."""
    _write_choices({**choices(), key: name})


def forget_choice(key: str) -> None:
    """Keep a choice no longer."""
    _write_choices({other: name for other, name in choices().items() if other != key})


def _write_choices(known: dict[str, str]) -> None:
    folder = cache_folder()
    if folder is None:
        return
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix="part-", dir=folder, ignore_cleanup_errors=True) as part:
            made = Path(part) / _CHOICES
            made.write_text(json.dumps(dict(list(known.items())[-MOST_CHOICES:])), "utf-8")
            made.replace(folder / _CHOICES)
