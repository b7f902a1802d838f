"""Runtimes by name, and the choice among them."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from math import inf
from typing import Any

import torch
from torch import Tensor

from crowdexit.models.network import MultiExitNetwork
from crowdexit.models.stages import ExitOutput, Features
from crowdexit.runtimes.arrays import RuntimeUnavailable
from crowdexit.runtimes.base import ReadyChain, Runtime, registered_runtimes
from crowdexit.runtimes.batch import make_batch
from crowdexit.runtimes.calibration import made_up_crowd, sample
from crowdexit.runtimes.eager import Eager
from crowdexit.runtimes.engines import one_line
from crowdexit.runtimes.model_cache import choices, fingerprint, forget_choice, gpu_name, installed_version, save_choice
from crowdexit.runtimes.openvino import multiplies_bf16
from crowdexit.runtimes.winograd import filtered_layers
from crowdexit.utils.machine import has_bfloat16, processor
from crowdexit.utils.modules import import_modules

log = logging.getLogger(__name__)

INT8 = "openvino-int8"
# Allowed relative difference of an exit's output from eager float32, and absolute of one head or class score.
TOLERANCE = 0.02
INT8_TOLERANCE = 0.03  # for int8, relative only, at every exit
PROBES, LONG_S = 5, 3.0  # runs to time, or seconds per candidate
PATIENCE_S = 60.0  # after which no further candidate is tried
_FAILURES = (RuntimeUnavailable, RuntimeError)  # the latter PyTorch's own, where it runs out of memory or cannot at all


def names() -> tuple[str, ...]:
    """All runtimes by name, ``auto`` first."""
    import_modules("crowdexit.runtimes")
    return ("auto", *registered_runtimes())


def automatic_names() -> tuple[str, ...]:
    """The runtimes that ``auto`` may choose."""
    return tuple(name for name in names()[1:] if registered_runtimes()[name].automatic)


def select_runtime(name: str) -> Runtime:
    """The runtime of that name; ``auto`` is :class:`Auto`.

    Raises:
        RuntimeUnavailable: for an unknown name, one that is not installed, or a GPU that is not there.
    """
    if name == "auto":
        return Auto()
    if name not in names():
        raise RuntimeUnavailable(f"no runtime {name!r} (there are {', '.join(names())})")
    make: Callable[[str], Runtime] = registered_runtimes()[name]
    return make(name)


class Auto(Runtime):
    """The fastest runtime that agrees with eager float32 on an image, measured once for a machine and a network.

    Candidates need no separate preparation: not torch.compile, which needs a C++ compiler and a minute; int8 if the
    network has activation ranges. The choice is logged once, as a warning, and saved in the user's cache. Without
    alternatives nothing is logged.

    If the chosen runtime fails, eager float32 takes over.
    """

    name = "auto"

    def ready(self, network: MultiExitNetwork) -> ReadyChain:
        key = _key(network)
        known = choices().get(key)
        if known in automatic_names():
            try:
                return _with_eager_fallback(select_runtime(known).ready(network), key)
            except Exception as error:
                log.warning("%s; selecting a runtime again", one_line(error))
        selected, chain, complete = _fastest(network)
        if complete:
            save_choice(key, selected)
        return _with_eager_fallback(chain, key)


def _with_eager_fallback(chain: ReadyChain, key: str) -> ReadyChain:
    return chain if chain.runtime == "eager" else FallbackChain(chain, key)


@dataclass(frozen=True)
class _State:
    """The state between two stages, and what is needed to recompute it.

    Attributes:
        chain: owner of the state. own: the state. stage: the last one run, initially −1.
        features: the batch before the first stage. rows: the indices of its remaining samples.
    """

    chain: ReadyChain
    own: Any
    stage: int
    features: Features
    rows: Tensor


class FallbackChain(ReadyChain):
    """The runtime chosen by ``auto`` until it fails; then eager float32, which recomputes running batches.

    Args:
        key: of the saved choice, which is deleted then.
    """

    def __init__(self, chain: ReadyChain, key: str) -> None:
        super().__init__(chain.network, chain.runtime)
        self._chain, self._key = chain, key

    def prepare(self, exits: Collection[str], size: tuple[int, int] | None = None) -> None:
        try:
            self._chain.prepare(exits, size)
        except _FAILURES as error:
            self._fall_back(self._chain, error)

    def begin(self, features: Features) -> _State:
        state = _State(self._chain, None, -1, features, torch.arange(len(features.visual)))
        try:
            return replace(state, own=state.chain.begin(features))
        except _FAILURES as error:
            return self._recompute(state, error)

    def advance(self, index: int, state: _State) -> _State:
        try:
            return replace(state, own=state.chain.advance(index, state.own), stage=index)
        except _FAILURES as error:
            return self._recompute(replace(state, stage=index), error)

    def run_exit(self, name: str, state: _State) -> ExitOutput:
        try:
            return state.chain.run_exit(name, state.own)
        except _FAILURES as error:
            again = self._recompute(state, error)
            return again.chain.run_exit(name, again.own)

    def select(self, state: _State, keep: Tensor) -> _State:
        state = replace(state, rows=state.rows[keep])
        try:
            return replace(state, own=state.chain.select(state.own, keep))
        except _FAILURES as error:
            return self._recompute(state, error)

    def visual_of(self, state: _State) -> tuple[Tensor, Tensor]:
        return state.chain.visual_of(state.own)

    def _fall_back(self, failed: ReadyChain, error: Exception) -> None:
        """Switch to eager float32, unless done already."""
        if failed is self._chain:
            log.warning("runtime auto: %s; falling back to eager", one_line(error))
            forget_choice(self._key)
            self._chain = Eager().ready(self.network)
            self.runtime = self._chain.runtime

    def _recompute(self, state: _State, error: Exception) -> _State:
        """Recompute the state of a failed chain with eager float32."""
        self._fall_back(state.chain, error)
        own = self._chain.begin(state.features.select(state.rows))
        for index in range(state.stage + 1):
            own = self._chain.advance(index, own)
        return replace(state, chain=self._chain, own=own)


def candidates(network: MultiExitNetwork) -> tuple[tuple[str, ...], ...]:
    """Candidates besides eager float32; of each row, fastest first, the first that agrees is used."""
    added = tuple(dict.fromkeys(registered_runtimes()[name].candidates(network) for name in names()[1:]))
    if torch.cuda.is_available():
        known = ("cuda-half",), ("cuda-bf16",), ("cuda",)  # the order of speed depends on the GPU
        return (*known, *filter(None, added))
    pytorch: tuple[str, ...] = ()
    if has_bfloat16():
        pytorch = ("eager-bf16",)
    elif torch.backends.nnpack.is_available() and filtered_layers(network):
        pytorch = ("winograd",)
    openvino: tuple[str, ...] = ()
    if installed_version("openvino"):
        try:
            openvino = ("openvino-bf16", "openvino") if multiplies_bf16() else ("openvino",)
        except Exception as error:  # installed, but unusable
            _leave_out("openvino", one_line(error))
    # Writing ONNX takes longest, and ONNX Runtime's float32 has never been as fast as 16 or 8 bits.
    others: tuple[str, ...] = (INT8,) if openvino and network.activation_ranges else ()
    if installed_version("onnxruntime") and "openvino-bf16" not in openvino:
        others += ("onnx",)
    return tuple(filter(None, (pytorch, openvino, others, *added)))


def _fastest(network: MultiExitNetwork) -> tuple[str, ReadyChain, bool]:
    """The name of the fastest runtime that agrees with eager float32, the network on it, and whether all were tried.

    Incomplete trials are not saved, as the machine may have been busy.
    """
    begun = time.perf_counter()
    agreeing, complete = {"eager": Eager().ready(network)}, True
    rows = candidates(network)
    if not rows:
        return "eager", agreeing["eager"], complete
    features = make_batch(*sample(), network.config)
    expected = _answers(agreeing["eager"], features)
    for row in rows:
        for name in row:
            if time.perf_counter() - begun > PATIENCE_S:
                _leave_out(name, "trying the others took too long")
                complete = False
                continue
            try:
                chain = select_runtime(name).ready(network)
                agrees = (
                    _int8_agrees(chain, agreeing["eager"], features)
                    if name == INT8
                    else _agree(_answers(chain, features), expected)
                )
            except Exception as error:  # any error: try the next
                _leave_out(name, one_line(error))
                continue
            if agrees:
                agreeing[name] = chain
                break
    least = _in_turn(network, agreeing, features)
    selected = min(least, key=least.__getitem__)
    timings = 1e3 * least[selected], 1e3 * least["eager"]
    log.warning("runtime auto: %s, %.0f ms an image here (eager %.0f ms)", selected, *timings)
    return selected, _in_place(selected, agreeing[selected], network), complete


def _leave_out(name: str, why: str) -> None:
    log.warning("runtime auto skips %s: %s", name, why)


def _answers(chain: ReadyChain, features: Features) -> dict[str, Tensor]:
    """Outputs of the final exit and some early ones; this compiles."""
    *early, final = chain.exit_names
    exits = [*early[:: max(1, len(early) // 3)][:3], final]
    return {name: answer.value for name, answer in chain.stream(features, exits)}


def _in_turn(network: MultiExitNetwork, chains: Mapping[str, ReadyChain], features: Features) -> dict[str, float]:
    """The minimum time of each candidate in seconds, always including eager.

    Other load only adds time, and runs alternate so that a change of machine speed does not favour one.
    """
    least, failed, end = dict.fromkeys(chains, inf), set[str](), time.perf_counter() + LONG_S * len(chains)
    for probe in range(PROBES):
        if probe and time.perf_counter() > end:
            break
        for name in [name for name in chains if name not in failed]:
            try:
                least[name] = min(least[name], _seconds(_in_place(name, chains[name], network), features))
            except Exception as error:
                if name == "eager":
                    raise
                _leave_out(name, one_line(error))
                failed.add(name)
    return {name: seconds for name, seconds in least.items() if name not in failed}


def _in_place(name: str, chain: ReadyChain, network: MultiExitNetwork) -> ReadyChain:
    """The chain; a runtime that runs the network itself moves its weights back first."""
    runtime = select_runtime(name)
    return runtime.ready(network) if runtime.runs_network else chain


def _seconds(chain: ReadyChain, features: Features) -> float:
    """Seconds for one image with the exits of :func:`_answers`."""
    begun = time.perf_counter()
    _answers(chain, features)
    return time.perf_counter() - begun


def _agree(answers: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return all(
        float((answers[name] - value).abs().max()) <= TOLERANCE * (float(value.abs().max()) + 1)
        for name, value in expected.items()
    )


def _int8_agrees(chain: ReadyChain, eager: ReadyChain, street: Features) -> bool:
    """Whether every exit agrees on both test images."""
    for features in (street, make_batch(made_up_crowd(), None, chain.network.config)):
        expected = dict(eager.stream(features))
        for name, answer in chain.stream(features):
            value = expected[name].value
            worst = float((answer.value - value).abs().max() / value.abs().max())
            if not worst <= INT8_TOLERANCE:
                log.warning("runtime auto skips %s: exit %s differs by %.1f %%", INT8, name, 100 * worst)
                return False
    return True


def _key(network: MultiExitNetwork) -> str:
    """A hash of everything that decides which runtime is fastest: machine, libraries, network and weights."""
    return fingerprint(network, *processor(), os.cpu_count(), torch.get_num_threads(), gpu_name())
