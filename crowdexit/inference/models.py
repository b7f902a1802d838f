"""Open a model by name or path: a checkpoint for any runtime, an exported folder with its own."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TypedDict

import torch

from crowdexit.calibration.familiarity import Familiarity
from crowdexit.calibration.intervals import Intervals
from crowdexit.calibration.temperatures import Temperatures
from crowdexit.export.manifest import is_export, read_manifest, write_manifest
from crowdexit.export.runner import Exported
from crowdexit.export.standalone import ExportError
from crowdexit.models import zoo
from crowdexit.models.folding import fold_norms
from crowdexit.models.network import MultiExitNetwork
from crowdexit.runtimes.base import ArrayReady, ReadyChain, Runtime
from crowdexit.runtimes.selection import select_runtime
from crowdexit.utils.files import write_problem


class _ExportedRuntime(Runtime):
    """The runtime of an exported network."""

    def __init__(self, exported: Exported) -> None:
        self.name = f"{exported.manifest.library}, {exported.manifest.precision}, exported"
        self._exported = exported

    def ready(self, network: MultiExitNetwork) -> ReadyChain:
        return _ExportedChain(network, self.name, self._exported)


class _ExportedChain(ArrayReady):
    def __init__(self, network: MultiExitNetwork, runtime: str, exported: Exported) -> None:
        super().__init__(network, runtime, exported.chain)
        self._manifest = exported.manifest

    def fingerprint(self) -> str:
        """A hash of the manifest, which includes those of all files."""
        return hashlib.blake2b(self._manifest.model_dump_json().encode(), digest_size=16).hexdigest()


def open_model(name: str | Path, runtime: str = "auto") -> tuple[MultiExitNetwork, zoo.Spec, Runtime]:
    """A network, its description, and its runtime.

    A checkpoint's batch normalisations are folded into its convolutions. The network of an exported folder has no
    weights; only its runtime can run it.

    Args:
        name: of a shipped model, or the path of a checkpoint or of an exported folder.
        runtime: ``auto``, or a name of :func:`crowdexit.runtimes.selection.names`; for checkpoints only.

    Raises:
        CrowdExitError: if there is no such model or runtime, or it is damaged.
    """
    if not _is_export(name):
        selected = select_runtime(runtime)
        network, spec = zoo.load(name)
        fold_norms(network)
        return network, spec, selected
    if runtime != "auto":
        raise ExportError(f"{name} runs on what it was exported for; --runtime {runtime} is for checkpoints")
    exported = Exported(name)
    manifest = exported.manifest
    try:
        exits = tuple(zoo.ExitSpec(**one) for one in manifest.network.exits)
    except TypeError:
        raise ExportError(f"{name}: the manifest's exits are damaged") from None
    meta = {key: getattr(manifest, key) for key in zoo.CALIBRATION}
    spec = zoo.Spec(manifest.network.model, exits, manifest.network.changes, meta)
    with torch.device("meta"):
        network = zoo.build(spec).eval()
    built = [(exit, network.stage_of(exit)) for exit in network.exit_names]
    for what, stored, own in (
        ("exits", list(manifest.exits.items()), built),
        ("classifies", manifest.classifies, network.classifies),
        *((key, getattr(manifest, key), getattr(network.config, key)) for key in ("size", "scene", "view", "step")),
    ):
        if stored != own:
            raise ExportError(f"{name}: the manifest describes another network than its models are ({what})")
    return network, spec, _ExportedRuntime(exported)


class Calibration(TypedDict):
    """The calibration of a checkpoint, as arguments of a counter."""

    intervals: Intervals
    familiarity: Familiarity | None


def calibration_of(spec: zoo.Spec) -> Calibration:
    """The calibration of a counting network.

    Raises:
        CrowdExitError: if it is damaged.
    """
    intervals = Intervals.from_dict(spec.meta.get("intervals"))
    return Calibration(intervals=intervals, familiarity=Familiarity.from_dict(spec.meta.get("familiarity")))


def keep_calibration(
    name: str | Path,
    *,
    intervals: Intervals | None = None,
    temperatures: Temperatures | None = None,
    familiarity: Familiarity | None = None,
) -> Path:
    """Replace the calibration of a checkpoint or an exported folder, atomically.

    Args:
        intervals, temperatures, familiarity: None keeps the existing one.

    Returns:
        The checkpoint or the folder.

    Raises:
        CrowdExitError: if there is no such model, or it cannot be written.
    """
    made = {"intervals": intervals, "temperatures": temperatures, "familiarity": familiarity}
    kept = {key: calibration.to_dict() for key, calibration in made.items() if calibration is not None}
    if not _is_export(name):
        path = zoo.checkpoint_path(name)
        zoo.annotate(path, **kept)
        return path
    folder = Path(name)
    try:
        write_manifest(folder, read_manifest(folder).model_copy(update=kept))
    except OSError as error:
        raise ExportError(write_problem(folder, error, kept="the existing manifest is unchanged")) from None
    return folder


def _is_export(name: str | Path) -> bool:
    """Whether it names an exported folder; names of shipped models take precedence."""
    return str(name) not in zoo.shipped() and is_export(name)
