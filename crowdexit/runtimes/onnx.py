"""ONNX Runtime on the CPU, in float32."""

from __future__ import annotations

import io
import warnings
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

import torch

from crowdexit.models.network import MultiExitNetwork
from crowdexit.runtimes.base import ArrayReady, ReadyChain, Runtime, register_runtime
from crowdexit.runtimes.engines import OnnxEngine, Shapes, installed
from crowdexit.runtimes.model_cache import ModelCache
from crowdexit.runtimes.pieces import Piece, chain_of, take_apart, takes_any_size


@register_runtime("onnx")
class Onnx(Runtime):
    """ONNX Runtime on the CPU; pieces are converted when they are first run, and kept.

    Raises:
        RuntimeUnavailable: if ONNX Runtime, or what writes ONNX, is not installed.
    """

    automatic = True

    def __init__(self, name: str = "onnx") -> None:
        for module in ("onnxruntime", "onnx", "onnxscript"):
            installed(module)
        self.name = name

    def ready(self, network: MultiExitNetwork) -> ReadyChain:
        network.cpu()
        models = ModelCache(network, self.name, ".onnx", Path.read_bytes, _write)

        @cache
        def pieces() -> dict[str, Piece]:  # only made where something is not kept yet
            return take_apart(network)

        def model(piece: str, shapes: Shapes) -> bytes:
            of = () if takes_any_size(network) else shapes
            return models.model(piece, of, lambda: convert(pieces()[piece], of or None))

        ports = models.ports(lambda: {name: piece.ports for name, piece in pieces().items()})
        return ArrayReady(network, self.name, chain_of(network, ports, OnnxEngine(model)))


def _write(model: bytes, path: Path) -> None:
    path.write_bytes(model)


def convert(piece: Piece, shapes: Shapes | None = None) -> bytes:
    """A piece as an ONNX file, its batch open, and the sides of its maps where it takes any image size.

    Args:
        shapes: of what it takes, without the batch; default: at the network's own image size.
    """
    examples = piece.examples(shapes, batch=2)  # a batch of one would be taken for a constant
    batch, side = torch.export.Dim("batch"), torch.export.Dim.DYNAMIC
    takes, gives = piece.ports.names()
    with torch.no_grad(), warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        program: Any = torch.onnx.export(
            piece,
            examples,
            dynamo=True,
            dynamic_shapes=(tuple({0: batch} | dict.fromkeys(sides, side) for sides in piece.open_sides()),),
            input_names=takes,
            output_names=gives,
            verbose=False,
        )
    data: bytes = program.model_proto.SerializeToString()
    return data
