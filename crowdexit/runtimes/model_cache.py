"""The user's cache of converted models and of the fastest runtime.

It is optional: missing or damaged entries are made again, and a read-only cache is not written.
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
from crowdexit.runtimes.subgraphs import Subgraph, partition, takes_any_size
from crowdexit.utils.files import atomic_write
from crowdexit.utils.machine import cache_folder
from crowdexit.utils.paths import PACKAGE

MOST_NETWORKS = 8
MOST_CHOICES = 100
_CHOICES = "runtimes.json"
_LIBRARIES = ("crowdexit", "torch", "openvino", "onnx", "onnxscript", "onnxruntime")
# Sources that define a network's graph and its conversion.
_SOURCES = ("models/**/*.py", "runtimes/*.py")
M = TypeVar("M")


def installed_version(package: str) -> str | None:
    """The version of a package, None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def gpu_name() -> str:
    """The GPU's name; empty without one."""
    with suppress(RuntimeError):  # a GPU that cannot be queried
        return torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return ""


def fingerprint(network: MultiExitNetwork, *more: object) -> str:
    """A hash of a network, its weights, the code of its graph, library versions and further values.

    It includes the kind and options of exits, as two exits with equal modules and weights may differ only in these.
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
    """A hash of the sources that determine cached models, as they change in a checkout."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(path for pattern in _SOURCES for path in package.glob(pattern)):
        digest.update(repr((str(path.relative_to(package)), path.read_bytes())).encode())
    return digest.hexdigest()


class ModelCache(Generic[M]):
    """The converted subgraphs of one network for one runtime.

    The digests of its files are stored with each model, as a damaged one may be readable and count wrongly.

    Args:
        suffix: of a model's file.
        read, write: a model from and to its file; other files that ``write`` creates are cached with it.
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
        """A cached model, or None."""
        if self._folder is None:
            return None
        stem = _stem(subgraph, shapes)
        with suppress(Exception):  # missing, or any error a library raises for a damaged file
            digests = json.loads((self._folder / f"{stem}.json").read_text("utf-8"))
            if all(_digest(self._folder / name) == digest for name, digest in digests.items()):
                model = self._read(self._folder / f"{stem}{self._suffix}")
                with suppress(OSError):  # a read-only cache is useful too
                    os.utime(self._folder)
                return model
        return None

    def keep(self, subgraph: str, shapes: Shapes, model: M) -> None:
        """Cache a model and evict the least recently used networks."""
        if self._folder is None:
            return
        stem = _stem(subgraph, shapes)
        with suppress(Exception):  # a full disk, or any error a library raises for it
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


def cached_subgraphs(
    network: MultiExitNetwork,
    models: ModelCache[M],
    source: Callable[[], MultiExitNetwork],
    convert: Callable[[Subgraph, Shapes | None], M],
) -> tuple[dict[str, Signature], Callable[[str, Shapes], M]]:
    """The signatures of a network's subgraphs, and a function that returns a subgraph's model for some input shapes.

    Only what is not cached is traced and converted.

    Args:
        source: the network to convert, if it comes to that.
        convert: a subgraph to a model; for those that take any image size without shapes.
    """

    @cache
    def subgraphs() -> dict[str, Subgraph]:
        return partition(source())

    def model(subgraph: str, shapes: Shapes) -> M:
        of = () if takes_any_size(network) else shapes
        return models.model(subgraph, of, lambda: convert(subgraphs()[subgraph], of or None))

    return models.signatures(lambda: {name: subgraph.signature for name, subgraph in subgraphs().items()}), model


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
    """Saved choices by key; empty if the file is missing or damaged."""
    folder = cache_folder()
    if folder is None:
        return {}
    with suppress(OSError, ValueError, RecursionError):
        data = json.loads((folder / _CHOICES).read_text("utf-8"))
        if isinstance(data, dict):
            return {str(key): str(name) for key, name in data.items()}
    return {}


def save_choice(key: str, name: str) -> None:
    """Save a choice; only the latest ones are kept."""
    _write_choices({**choices(), key: name})


def forget_choice(key: str) -> None:
    """Delete a saved choice."""
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
