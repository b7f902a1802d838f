"""Write a network's stages and exits as models that run without PyTorch."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from crowdexit.data.views import MEAN, STD
from crowdexit.errors import CrowdExitError
from crowdexit.export.bundle import write_program
from crowdexit.export.manifest import (
    FORMAT,
    FilePart,
    Library,
    Manifest,
    NetworkPart,
    PiecePart,
    Precision,
    write_manifest,
)
from crowdexit.export.standalone import ExportError
from crowdexit.models import zoo
from crowdexit.models.folding import fold_norms
from crowdexit.models.network import FINAL, MultiExitNetwork
from crowdexit.runtimes import onnx, openvino
from crowdexit.runtimes.calibration import of_file
from crowdexit.runtimes.engines import bears_half, installed, one_line
from crowdexit.runtimes.int8 import measure_ranges, quantised
from crowdexit.runtimes.subgraphs import Subgraph, partition
from crowdexit.utils.files import DiskFullError, disk_is_full, write_problem

_NEEDED = {"openvino": ("openvino",), "onnx": ("onnx", "onnxscript", "onnxruntime")}
_LIBRARIES = {"openvino": "OpenVINO", "onnx": "ONNX Runtime"}


def export(
    model: str | Path,
    out: Path,
    *,
    library: Library = "openvino",
    precision: Precision = "fp32",
    size: str | None = None,
    exits: Sequence[str] | None = None,
    calibrate: Path | None = None,
    split: str | None = None,
) -> Path:
    """Export a network; the folder appears whole.

    Args:
        model: name of a shipped model, or a checkpoint.
        out: the folder; must not be there yet.
        library: what is to run it.
        precision: ``bf16`` and ``int8`` are for OpenVINO alone. bf16 computes in bfloat16 where the CPU does; int8
            quantises the stages that see, and leaves the audio encoder in bf16. Exits on tokens always compute in
            float32.
        size: another image size, ``WIDTHxHEIGHT``.
        exits: names of early exits to take along; default: all. The final one always comes.
        calibrate: a prepared file with images to measure int8's ranges on; default: the checkpoint's own ranges.
        split: of that file; default: ``train``.

    Raises:
        CrowdExitError: for options that do not go together, a library that is not installed, or a folder that cannot
            be written.
    """
    if library == "onnx" and precision != "fp32":
        raise ExportError(f"ONNX is written in fp32; {precision} is for OpenVINO")
    if calibrate is not None and precision != "int8":
        raise ExportError(f"--calibrate {calibrate}: only int8 is calibrated")
    if split is not None and calibrate is None:
        raise ExportError(f"--split {split}: of which file? Name it with --calibrate")
    if out.exists():
        raise ExportError(f"{out}: already exists")
    for module in _NEEDED[library]:
        installed(module)
    network, spec = zoo.load(model)
    if exits is not None:
        network, spec = zoo.with_exits(network, spec, [name for name in exits if name != FINAL])
    if size is not None:
        network, spec = zoo.at_size(network, spec, zoo.parse_size(size, zoo.step_of(network)))
    fold_norms(network)
    part = out.with_name(f".{out.name}.part-{os.getpid()}")
    # A lower bound, from the weights alone: some subgraphs keep more bits than others.
    size_of = {"fp32": 4, "bf16": 2, "int8": 1}[precision]
    needed = size_of * sum(tensor.numel() for tensor in network.state_dict().values())
    try:
        if disk_is_full(out, needed=needed):
            raise DiskFullError(out, needed)
        run = _quantised(network, calibrate, split or "train") if precision == "int8" else network
        subgraphs = partition(run)
        part.mkdir(parents=True)
        parts = {
            name: _save(part, number, name, subgraph, library, precision)
            for number, (name, subgraph) in enumerate(subgraphs.items())
        }
        write_program(part, _LIBRARIES[library])
        write_manifest(part, _manifest(network, spec, library, precision, parts, part))
        part.rename(out)
    except CrowdExitError:
        raise
    except OSError as error:
        raise ExportError(write_problem(out, error, needed=needed, kept="nothing is written")) from None
    except Exception as error:  # whatever the libraries make of a network, an image or a full disk
        # They report a full disk as something else, and may have left there what they wrote.
        if disk_is_full(out, needed=max(2**16, needed - _bytes_in(part))):
            full = DiskFullError(out, needed)
            raise ExportError(write_problem(out, full, kept="nothing is written")) from None
        raise ExportError(f"{spec.model} cannot be exported: {one_line(error)}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return out


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*")) if folder.is_dir() else 0


def _quantised(network: MultiExitNetwork, calibrate: Path | None, split: str) -> MultiExitNetwork:
    ranges = network.activation_ranges
    if calibrate is not None:
        ranges = measure_ranges(network, [*of_file(calibrate, split, network)])
    if not ranges:
        raise ExportError("the checkpoint has no activation ranges for int8; name images for them with --calibrate")
    return quantised(network, ranges)


def _save(
    folder: Path, number: int, name: str, subgraph: Subgraph, library: Library, precision: Precision
) -> PiecePart:
    """Write the model of a subgraph."""
    # Whoever named an exit did not think of files.
    stem = name if re.fullmatch(r"[A-Za-z0-9._-]+", name) else f"{number}-{re.sub('[^A-Za-z0-9._-]', '_', name)}"
    if library == "onnx":
        files: tuple[str, ...] = (f"{stem}.onnx",)
        (folder / files[0]).write_bytes(onnx.convert(subgraph))
    else:
        files = (f"{stem}.xml", f"{stem}.bin")
        model = openvino.convert(subgraph)
        # What computes in bfloat16 loses nothing by weights in float16, which are half the size.
        half = precision != "fp32" and bears_half(name, tuple(spec.shape for spec in subgraph.signature.inputs))
        installed("openvino").save_model(model, folder / files[0], compress_to_fp16=half)
    return PiecePart(files=files, takes=subgraph.signature.inputs, gives=subgraph.signature.outputs)


def _manifest(
    network: MultiExitNetwork,
    spec: zoo.Spec,
    library: Library,
    precision: Precision,
    pieces: dict[str, PiecePart],
    folder: Path,
) -> Manifest:
    files = {}
    for name in (name for piece in pieces.values() for name in piece.files):
        contents = (folder / name).read_bytes()
        files[name] = FilePart(bytes=len(contents), sha256=hashlib.sha256(contents).hexdigest())
    config = network.config
    return Manifest(
        format=FORMAT,
        library=library,
        precision=precision,
        network=NetworkPart(model=spec.model, exits=tuple(vars(e) for e in spec.exits), changes=dict(spec.changes)),
        size=config.size,
        scene=config.scene,
        view=config.view,
        step=config.step,
        mean=_rounded(MEAN),
        std=_rounded(STD),
        classifies=network.classifies,
        exits={name: network.stage_of(name) for name in network.exit_names},
        audio_exits=tuple(filter(network.uses_audio, network.exit_names)),
        intervals=spec.meta.get("intervals"),
        temperatures=spec.meta.get("temperatures"),
        familiarity=spec.meta.get("familiarity"),
        pieces=pieces,
        files=files,
        made_with={name: version(name) for name in ("crowdexit", "torch", *_NEEDED[library])},
    )


def _rounded(values: NDArray[np.float32]) -> tuple[float, float, float]:
    red, green, blue = (round(float(value), 6) for value in values)
    return red, green, blue
