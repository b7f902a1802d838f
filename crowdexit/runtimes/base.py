"""The interface of runtimes."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crowdexit.calibration.familiarity import MAP_ROWS
from crowdexit.models.chain import iter_outputs
from crowdexit.models.network import MultiExitNetwork
from crowdexit.models.stages import ExitOutput, Features
from crowdexit.runtimes.arrays import ArrayChain, Record
from crowdexit.runtimes.subgraphs import record_of


class ReadyChain(ABC):
    """A network ready on one runtime: a chain (:class:`crowdexit.models.chain.Chain`) of :class:`Features`.

    The state between two stages is private to the runtime: only ``begin`` creates it, only ``select`` removes samples
    from it. Outputs are float32 on the CPU.

    Attributes:
        network: the original network. runtime: name of its runtime.
    """

    def __init__(self, network: MultiExitNetwork, runtime: str) -> None:
        self.network = network
        self.runtime = runtime
        self.exit_names = network.exit_names
        self.stage_of = network.stage_of

    def prepare(  # noqa: B027  (most runtimes have nothing to prepare)
        self, exits: Collection[str], size: tuple[int, int] | None = None
    ) -> None:
        """Prepare the stages up to some exits for an image size, rather than at the first such image.

        Args:
            size: (width, height) of its canvas; default: the network's own.

        Raises:
            RuntimeUnavailable: if this runtime cannot run it.
        """

    def fingerprint(self) -> str:
        """A hash of the weights, independent of the runtime."""
        weights = hashlib.blake2b(digest_size=16)
        for name, value in sorted(self.network.state_dict().items()):
            weights.update(name.encode() + bytes(value.detach().cpu().reshape(-1).view(torch.uint8).numpy()))
        return weights.hexdigest()

    @abstractmethod
    def begin(self, features: Features) -> Any:
        """The state of a batch before the first stage."""

    @abstractmethod
    def advance(self, index: int, state: Any) -> Any:
        """Run one stage and wait until it has finished."""

    @abstractmethod
    def run_exit(self, name: str, state: Any) -> ExitOutput:
        """Run one exit on the output of its stage."""

    @abstractmethod
    def select(self, state: Any, keep: Tensor) -> Any:
        """Select samples of a state: ``keep`` is a bool mask or indices over the batch."""

    @abstractmethod
    def visual_of(self, state: Any) -> tuple[Tensor, Tensor]:
        """The features after a stage, and the share of each cell that is image (``visual``, ``valid_mask``)."""

    def feature_sums(self, state: Any) -> NDArray[np.float64] | None:
        """Sums over the first stage's features, for familiarity (:mod:`crowdexit.calibration.familiarity`).

        For large maps only every fourth row is used, to save time.

        Returns:
            B×(2C + 1): for each channel the sum and the sum of squares over the cells that are image, and the number
            of these. None if the stage outputs no map on the 1/8 grid (but tokens).
        """
        visual, valid = self.visual_of(state)
        if visual.dim() != 4 or visual.shape[2:] != valid.shape[2:]:
            return None
        step = max(1, visual.shape[2] // MAP_ROWS)
        with torch.inference_mode():
            values = visual[:, :, ::step].float().flatten(2)  # B×C×n
            weights = valid[:, 0, ::step].float().flatten(1)[:, :, None]  # B×n×1
            sums = [values @ weights, values.square() @ weights, weights.sum(1, keepdim=True)]
            return np.asarray(torch.cat(sums, 1)[:, :, 0].cpu().numpy(), np.float64)

    def stream(self, features: Features, exits: Collection[str] | None = None) -> Iterator[tuple[str, ExitOutput]]:
        """Yield each wanted exit's output for a batch; see :func:`crowdexit.models.chain.iter_outputs`."""
        return iter_outputs(self, self.begin(features), exits)


class Runtime(ABC):
    """A way to run networks; :func:`register_runtime` makes it known by name.

    Attributes:
        name: its public name.
        automatic: whether ``auto`` may choose it, as it needs no separate preparation.
        runs_network: whether it runs the network itself and moves its weights.
    """

    name: str
    automatic: ClassVar[bool] = False
    runs_network: ClassVar[bool] = False

    @classmethod
    def candidates(cls, network: MultiExitNetwork) -> tuple[str, ...]:
        """Names that ``auto`` tries here, fastest first; the order of PyTorch, OpenVINO and ONNX Runtime is set
        in :func:`crowdexit.runtimes.selection.candidates`."""
        return ()

    @abstractmethod
    def ready(self, network: MultiExitNetwork) -> ReadyChain:
        """Prepare a network: convert or move its weights.

        Raises:
            RuntimeUnavailable: if this runtime cannot run it.
        """


_Runtime = TypeVar("_Runtime", bound=type[Runtime])
_RUNTIMES: dict[str, type[Runtime]] = {}


def register_runtime(*names: str) -> Callable[[_Runtime], _Runtime]:
    """Register a runtime class under names; it is created with the chosen one: ``Mine("mine-bf16")``."""

    def register(runtime: _Runtime) -> _Runtime:
        _RUNTIMES.update(dict.fromkeys(names, runtime))
        return runtime

    return register


def registered_runtimes() -> Mapping[str, type[Runtime]]:
    """All classes of runtimes by their names."""
    return _RUNTIMES


class ArrayReady(ReadyChain):
    """A chain of arrays with the tensor interface; both share memory."""

    def __init__(self, network: MultiExitNetwork, runtime: str, chain: ArrayChain) -> None:
        super().__init__(network, runtime)
        self._chain = chain

    def prepare(self, exits: Collection[str], size: tuple[int, int] | None = None) -> None:
        own = self.network.config.size
        width, height = own if size is None else size
        self._chain.prepare(exits, (width / own[0], height / own[1]))

    def begin(self, features: Features) -> Record:
        return record_of(features)

    def advance(self, index: int, state: Record) -> Record:
        return self._chain.advance(index, state)

    def run_exit(self, name: str, state: Record) -> ExitOutput:
        answer = self._chain.run_exit(name, state)
        density = None if answer.density is None else torch.from_numpy(answer.density)
        return ExitOutput(torch.from_numpy(answer.value), density)

    def select(self, state: Record, keep: Tensor) -> Record:
        return self._chain.select(state, keep.numpy())

    def visual_of(self, state: Record) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(state["visual"]), torch.from_numpy(state["valid_mask"])
