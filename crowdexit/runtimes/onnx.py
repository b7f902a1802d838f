"""ONNX Runtime on the CPU, in float32."""

from __future__ import annotations

import io
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from crowdexit.models.network import MultiExitNetwork
from crowdexit.runtimes.base import ArrayReady, ReadyChain, Runtime, register_runtime
from crowdexit.runtimes.engines import OnnxEngine, Shapes, installed
from crowdexit.runtimes.model_cache import ModelCache, cached_subgraphs
from crowdexit.runtimes.subgraphs import Subgraph, chain_of


@register_runtime("onnx")
class Onnx(Runtime):
    """ONNX Runtime on the CPU; subgraphs are converted on first use and cached.

    Raises:
        RuntimeUnavailable: if ONNX Runtime or the ONNX exporter is not installed.
    """

    automatic = True

    def __init__(self, name: str = "onnx") -> None:
        for module in ("onnxruntime", "onnx", "onnxscript"):
            installed(module)
        self.name = name

    def ready(self, network: MultiExitNetwork) -> ReadyChain:
        network.cpu()
        models = ModelCache(network, self.name, ".onnx", Path.read_bytes, _write)
        signatures, model = cached_subgraphs(network, models, lambda: network, convert)
        return ArrayReady(network, self.name, chain_of(network, signatures, OnnxEngine(model)))


def _write(model: bytes, path: Path) -> None:
    path.write_bytes(model)


def convert(subgraph: Subgraph, shapes: Shapes | None = None) -> bytes:
    """Convert a subgraph to ONNX with dynamic batch, and dynamic map sizes if it takes any image size.

    Args:
        shapes: of its inputs, without the batch; default: at the network's own image size.
    """
    examples = subgraph.examples(shapes, batch=2)  # a batch of one would be taken for a constant
    batch, side = torch.export.Dim("batch"), torch.export.Dim.DYNAMIC
    inputs, outputs = subgraph.signature.names()
    with torch.no_grad(), warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        program: Any = torch.onnx.export(
            subgraph,
            examples,
            dynamo=True,
            dynamic_shapes=(tuple({0: batch} | dict.fromkeys(sides, side) for sides in subgraph.open_sides()),),
            input_names=inputs,
            output_names=outputs,
            verbose=False,
        )
    data: bytes = program.model_proto.SerializeToString()
    return data
