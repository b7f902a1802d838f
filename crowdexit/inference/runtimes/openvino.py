"""OpenVINO on the CPU: float32, bfloat16, and int8 by post-training quantisation."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from crowdexit.errors import CrowdExitError
from crowdexit.inference.runtimes.arrays import Record, RuntimeUnavailable, stage_piece
from crowdexit.inference.runtimes.base import ArrayReady, ReadyChain, Runtime
from crowdexit.inference.runtimes.calibration import bundled
from crowdexit.inference.runtimes.engines import OpenVINOEngine, Shapes, installed, one_line, openvino_core
from crowdexit.inference.runtimes.kept import KeptModels
from crowdexit.inference.runtimes.pieces import Piece, chain_of, record_of, take_apart
from crowdexit.network import MultiExitNetwork
from crowdexit.stages import Features

log = logging.getLogger(__name__)

_CONVERTING = Lock()


class OpenVINO(Runtime):
    """OpenVINO on the CPU; pieces are converted when they are first run, and kept.

    ``openvino-int8`` is quantised on the pictures that come with the project.

    Raises:
        RuntimeUnavailable: if OpenVINO is not installed, or for int8 NNCF is not.
    """

    NAMES = ("openvino", "openvino-bf16", "openvino-int8")

    def __init__(self, name: str = "openvino") -> None:
        for module in ("openvino", "nncf") if name == "openvino-int8" else ("openvino",):
            installed(module)
        self.name = name

    def ready(self, network: MultiExitNetwork) -> ReadyChain:
        pieces = take_apart(network.cpu())
        if self.name == "openvino-int8":
            model = self._quantised(network, pieces)
        else:
            kept = _kept(network, "openvino")

            def model(piece: str, shapes: Shapes) -> Any:
                of = () if pieces[piece].any_size else shapes
                return kept.model(piece, of, lambda: convert(pieces[piece], of or None))

        engine = OpenVINOEngine(model, half=self.name != "openvino")
        return ArrayReady(network, self.name, chain_of(network, pieces, engine))

    def _quantised(self, network: MultiExitNetwork, pieces: dict[str, Piece]) -> Callable[[str, Shapes], Any]:
        """What gives a piece's quantised model. On the bundled pictures it is always the same, and kept."""
        kept = _kept(network, self.name)
        shapes_of = {name: tuple(port.shape for port in piece.ports.takes) for name, piece in pieces.items()}
        models: dict[str, Any] = {name: kept.get(name, shapes) for name, shapes in shapes_of.items()}
        if None in models.values():
            log.warning(
                "openvino-int8: quantised on the pictures that come with the project; "
                "`crowdexit export --precision int8 --calibrate DATA.h5` does it better"
            )
            try:
                models = quantise(pieces, network, bundled(network.config))
            except CrowdExitError:
                raise
            except Exception as error:  # whatever NNCF raises
                raise RuntimeUnavailable(f"{self.name}: NNCF cannot quantise it ({one_line(error)})") from None
            for name, made in models.items():
                kept.keep(name, shapes_of[name], made)
        return lambda piece, shapes: models[piece].clone()  # compiling fixes the shapes of the one it gets


def _kept(network: MultiExitNetwork, runtime: str) -> KeptModels[Any]:
    openvino = installed("openvino")

    def write(model: Any, path: Path) -> None:
        openvino.save_model(model, path, compress_to_fp16=False)

    return KeptModels(network, runtime, ".xml", openvino_core().read_model, write)


def multiplies_bf16() -> bool:
    """Whether OpenVINO computes in bfloat16 on this CPU."""
    return "BF16" in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@contextmanager
def _root_logger_kept() -> Iterator[None]:
    """OpenVINO's converter has the root logger tell errors only; where it fails, or two convert at once, for good."""
    root = logging.getLogger()
    with _CONVERTING:
        level, filters, handlers = root.level, [*root.filters], [*root.handlers]
        try:
            yield
        finally:
            root.setLevel(level)
            root.filters, root.handlers = filters, handlers


def convert(piece: Piece, shapes: Shapes | None = None) -> Any:
    """A piece as an ``openvino.Model``, its batch open, and the sides of its maps where it takes any image size.

    Its weights share the network's memory.

    Args:
        shapes: of what it takes, without the batch; default: at the network's own picture size.
    """
    openvino = installed("openvino")
    examples = piece.examples(shapes)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of shapes that become constants: all but the batch are
        traced = torch.jit.trace(piece, examples, check_trace=False)
        given = [
            openvino.PartialShape([-1 if d == 0 or d in sides else n for d, n in enumerate(example.shape)])
            for example, sides in zip(examples, piece.open_sides(), strict=True)
        ]
        with _root_logger_kept():
            model = openvino.convert_model(traced, example_input=examples, input=given)
    for names, sides in zip(piece.ports.names(), (model.inputs, model.outputs), strict=True):
        for name, side in zip(names, sides, strict=True):
            side.get_tensor().set_names({name})
    return model


def quantise(pieces: dict[str, Piece], network: MultiExitNetwork, calibration: Iterable[Features]) -> dict[str, Any]:
    """All pieces as ``openvino.Model``, the stages that see quantised to int8 by NNCF.

    The ear and the exits stay as they are: they are small, and an exit's layers decide the count.

    Args:
        calibration: batches on which the ranges of values are measured, each stage's behind the exact ones before it.
    """
    nncf = installed("nncf")
    nncf.set_log_level(logging.ERROR)
    states: list[Record] = [record_of(features) for features in calibration]
    models = {name: convert(piece) for name, piece in pieces.items()}
    exact = chain_of(network, pieces, OpenVINOEngine(lambda piece, shapes: models[piece].clone()))
    for index in range(len(network.stages)):
        name = stage_piece(index)
        ports = pieces[name].ports
        after = [exact.advance(index, state) for state in states]
        seen = nncf.Dataset([[state[port.name] for port in ports.takes] for state in states])
        sees = next((port for port in ports.gives if port.name == "visual"), None)
        if sees is not None:
            tokens = len(sees.shape) == 2
            options = {"model_type": nncf.ModelType.TRANSFORMER} if tokens else _for_maps(nncf)
            with redirect_stdout(io.StringIO()):  # its progress
                models[name] = nncf.quantize(
                    models[name], seen, subset_size=len(states), target_device=nncf.TargetDevice.CPU, **options
                )
        states = after
    return models


def _for_maps(nncf: Any) -> dict[str, Any]:
    """How NNCF treats a stage between maps: only its convolutions, and their biases corrected one after the other.

    The sound's γ and β in int8 moved a heard picture's count by up to a tenth; the quick correction by a hundredth.
    """
    others = nncf.IgnoredScope(types=["MatMul", "Multiply", "Add"], validate=False)
    return {"ignored_scope": others, "fast_bias_correction": False}
