"""Compress checkpoints and export them for other runtimes."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from crowdexit.cli.options import DEFAULT_MODEL
from crowdexit.utils import command

# Everything heavy is imported where it is used: `--help` and a mistyped option answer at once.

commands = typer.Typer()


class Library(StrEnum):
    openvino = "openvino"
    onnx = "onnx"


class Precision(StrEnum):
    fp32 = "fp32"
    bf16 = "bf16"
    int8 = "int8"


@commands.command(
    epilog="Example: `crowdexit compress runs/audiocsrnet-s-branches checkpoints/audiocsrnet-s/model.safetensors`"
)
def compress(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A trained run's folder or checkpoint.")],
    out: Annotated[Path, typer.Argument(help="The smaller checkpoint.", callback=command.output_file)],
    exits: Annotated[str | None, typer.Option(help="Early exits to keep, with commas between; default: all.")] = None,
) -> None:
    """Convert a checkpoint to float16 (half the size), optionally keeping only some exits."""
    from crowdexit.models import zoo

    network, spec = zoo.load(model)
    if exits is not None:
        network, spec = zoo.with_exits(network, spec, exits.split(","))
    zoo.save(network, spec, out, half=True)
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")


@commands.command(epilog="Example: `crowdexit export --precision int8 --calibrate crowd.h5 --out audiocsrnet-s-int8`")
def export(
    out: Annotated[Path, typer.Option(help="The folder to write.", callback=command.output_folder)],
    model: Annotated[
        str, typer.Option("--model", help="A shipped model's name, or a checkpoint's path.")
    ] = DEFAULT_MODEL,
    format: Annotated[Library, typer.Option(help="What is to run it.")] = Library.openvino,
    precision: Annotated[Precision, typer.Option(help="bf16 and int8: of OpenVINO alone.")] = Precision.fp32,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT; default: the model's own.")] = None,
    exits: Annotated[
        str | None, typer.Option(help="Early exits to export, comma-separated; final: none. Default: all.")
    ] = None,
    calibrate: Annotated[
        Path | None, typer.Option(help="A prepared HDF5 file to measure int8's ranges on; default: the model's own.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Of that file; default: train.")] = None,
) -> None:
    """Export every stage and exit as a model that runs without PyTorch, with a manifest."""
    from crowdexit.export.manifest import read_manifest
    from crowdexit.export.writer import export as run_export

    path = run_export(
        model,
        out,
        library=format.value,
        precision=precision.value,
        size=size,
        exits=None if exits is None else exits.split(","),
        calibrate=calibrate,
        split=split,
    )
    files = [file for file in path.rglob("*") if file.is_file()]
    print(f"{path}: {len(files)} files, {sum(file.stat().st_size for file in files) / 1e6:.1f} MB")
    manifest = read_manifest(path)
    if manifest.classifies or (manifest.intervals is not None and precision is Precision.fp32):
        return
    there = "its intervals are the checkpoint's"
    if manifest.intervals is None:
        there = f"it has no intervals at {size or 'its size'}"
    print(f"note: {there}; `crowdexit calibrate {path} --data …` measures its own", file=sys.stderr)
