"""OpenVINO on the CPU: float32, bfloat16, and int8 with the ranges of a checkpoint."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from crowdexit.models.network import MultiExitNetwork
from crowdexit.runtimes.arrays import RuntimeUnavailable
from crowdexit.runtimes.base import ArrayReady, ReadyChain, Runtime, register_runtime
from crowdexit.runtimes.engines import OpenVINOEngine, Shapes, installed, openvino_core
from crowdexit.runtimes.int8 import quantised
from crowdexit.runtimes.model_cache import ModelCache, cached_subgraphs
from crowdexit.runtimes.subgraphs import Subgraph, chain_of

_CONVERTING = Lock()


@register_runtime("openvino", "openvino-bf16", "openvino-int8")
class OpenVINO(Runtime):
    """OpenVINO on the CPU; subgraphs are converted on first use and cached.

    ``openvino-int8`` needs a network's activation ranges (:mod:`crowdexit.runtimes.int8`).

    Raises:
        RuntimeUnavailable: if OpenVINO is not installed.
    """

    automatic = True

    def __init__(self, name: str = "openvino") -> None:
        installed("openvino")
        self.name = name

    def ready(self, network: MultiExitNetwork) -> ReadyChain:
        network.cpu()
        int8 = self.name == "openvino-int8"
        if int8 and not network.activation_ranges:
            raise RuntimeUnavailable(
                "openvino-int8: the checkpoint has no activation ranges; `crowdexit calibrate-int8` measures them"
            )
        models = _model_cache(network, "openvino" if self.name == "openvino-bf16" else self.name)

        def source() -> MultiExitNetwork:
            return quantised(network, network.activation_ranges) if int8 else network

        signatures, model = cached_subgraphs(network, models, source, convert)
        engine = OpenVINOEngine(model, half=self.name != "openvino")
        return ArrayReady(network, self.name, chain_of(network, signatures, engine))


def _model_cache(network: MultiExitNetwork, runtime: str) -> ModelCache[Any]:
    openvino = installed("openvino")

    def write(model: Any, path: Path) -> None:
        openvino.save_model(model, path, compress_to_fp16=False)

    return ModelCache(network, runtime, ".xml", openvino_core().read_model, write)


def multiplies_bf16() -> bool:
    """Whether OpenVINO computes in bfloat16 on this CPU."""
    return "BF16" in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@contextmanager
def _root_logger_restored() -> Iterator[None]:
    """Restore the root logger's level, which OpenVINO's converter changes and does not always reset."""
    root = logging.getLogger()
    with _CONVERTING:
        level, filters, handlers = root.level, [*root.filters], [*root.handlers]
        try:
            yield
        finally:
            root.setLevel(level)
            root.filters, root.handlers = filters, handlers


def convert(subgraph: Subgraph, shapes: Shapes | None = None) -> Any:
    """Convert a subgraph to an ``openvino.Model`` with dynamic batch, and dynamic map sizes if it takes any size.

    Its weights share the network's memory.

    Args:
        shapes: of its inputs, without the batch; default: at the network's own image size.
    """
    openvino = installed("openvino")
    examples = subgraph.examples(shapes)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of shapes that become constants: all but the batch are
        traced = torch.jit.trace(subgraph, examples, check_trace=False)
        given = [
            openvino.PartialShape([-1 if d == 0 or d in sides else n for d, n in enumerate(example.shape)])
            for example, sides in zip(examples, subgraph.open_sides(), strict=True)
        ]
        with _root_logger_restored():
            model = openvino.convert_model(traced, example_input=examples, input=given)
    for names, sides in zip(subgraph.signature.names(), (model.inputs, model.outputs), strict=True):
        for name, side in zip(names, sides, strict=True):
            side.get_tensor().set_names({name})
    return model
