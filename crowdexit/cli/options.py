"""Options that several commands share."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

DEFAULT_MODEL = "audiocsrnet-lite"
Model = Annotated[
    str, typer.Option("--model", help="A shipped model's name, or the path of a checkpoint or an export.")
]
RuntimeName = Annotated[
    str,
    typer.Option(
        "--runtime", help="auto, eager, compile, openvino, onnx, cuda; -bf16, -int8, -half (docs/runtimes.md)."
    ),
]
Ids = Annotated[str, typer.Option(help="Only samples whose id matches this shell pattern.")]
AudioFlag = Annotated[bool, typer.Option("--audio/--no-audio", help="Use audio where available.")]


class Format(StrEnum):
    table = "table"
    json = "json"
