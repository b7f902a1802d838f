"""OpenVINO and ONNX Runtime: compile models once for every size, and run them."""

from __future__ import annotations

import os
import sys
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib import import_module
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crowdexit.errors import CrowdExitError
from crowdexit.runtimes.arrays import RuntimeUnavailable, is_exit
from crowdexit.runtimes.cancel import Cancelled, cancelled_by

# Compiled sizes are evicted least recently used first. A network has up to about ninety subgraphs (77 branches), and a
# process rarely more than one image size.
MOST_READY = 128
Shapes = tuple[tuple[int, ...], ...]
_MAKING_CORE = Lock()

# Both libraries send telemetry by default; it is switched off.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def installed(module: str) -> Any:
    """Import an optional package.

    Raises:
        RuntimeUnavailable: if it is missing or cannot be imported.
    """
    try:
        return import_module(module)
    except Exception as error:  # any error of missing or mismatched native libraries
        if isinstance(error, ModuleNotFoundError) and error.name == module:
            raise RuntimeUnavailable(f"{module} is not installed: pip install {module}") from None
        raise RuntimeUnavailable(f"{module} cannot be imported: {one_line(error)}") from None


def openvino_core() -> Any:
    """OpenVINO's ``Core``: one for the whole process, never released.

    Its CPU plugin installs an alternate signal stack in the thread that loads it, and frees that stack when any thread
    releases the plugin. Python handles signals on that stack, so the next Ctrl-C would crash the process.

    Raises:
        RuntimeUnavailable: if OpenVINO is missing or cannot be imported.
    """
    with _MAKING_CORE:
        return _core()


@cache
def _core() -> Any:
    return installed("openvino").Core()


def one_line(error: Exception) -> str:
    """The last line of an error, which names the cause, in at most 200 characters."""
    line = next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
    return line.strip()[:200]


def bears_half(subgraph: str, shapes: Shapes) -> bool:
    """Whether a subgraph with inputs of these shapes may compute in bfloat16.

    Exits on tokens may not: they cost little, and the final count of a transformer was 4 % off.
    """
    return not (is_exit(subgraph) and any(len(shape) == 2 for shape in shapes))


class Engine(ABC):
    """Runs subgraphs by name (:class:`crowdexit.runtimes.arrays.Engine`), from any thread.

    Args:
        model: returns a subgraph's model for inputs of these shapes (without the batch).
    """

    library: str

    def __init__(self, model: Callable[[str, Shapes], Any]) -> None:
        self._model = model
        self._ready_models: OrderedDict[tuple[str, Shapes], Any] = OrderedDict()  # most recently used last
        self._lock = Lock()

    def run(self, subgraph: str, arrays: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        """Run a subgraph; the outputs are new arrays.

        Raises:
            RuntimeUnavailable: if the library cannot compile the subgraph, or fails on it.
            Cancelled: if this thread's work was cancelled.
        """
        with self._lock:
            ready = self._made_ready(subgraph, tuple(array.shape[1:] for array in arrays))
            try:
                return self._run(ready, [np.ascontiguousarray(array) for array in arrays])
            except Cancelled:
                raise
            except Exception as error:
                raise self._failed(subgraph, "run", error) from None

    def prepare(self, subgraph: str, shapes: Sequence[tuple[int, ...]]) -> None:
        """Compile a subgraph for inputs of these shapes (without the batch) in advance.

        Raises:
            RuntimeUnavailable: if the library cannot.
        """
        with self._lock:
            self._made_ready(subgraph, tuple(shapes))

    def _made_ready(self, subgraph: str, shapes: Shapes) -> Any:
        key = (subgraph, shapes)
        if key not in self._ready_models:
            self._ready_models[key] = self._checked_ready(subgraph, shapes)
            if len(self._ready_models) > MOST_READY:
                self._ready_models.popitem(last=False)
        self._ready_models.move_to_end(key)
        return self._ready_models[key]

    def _checked_ready(self, subgraph: str, shapes: Shapes) -> Any:
        try:
            return self._ready(subgraph, self._model(subgraph, shapes), shapes)
        except CrowdExitError:
            raise
        except Exception as error:  # whatever the library or its compiler raises
            raise self._failed(subgraph, "compile", error) from None

    def _failed(self, subgraph: str, what: str, error: Exception) -> RuntimeUnavailable:
        return RuntimeUnavailable(f"{self.library} cannot {what} {subgraph}: {one_line(error)}")

    @abstractmethod
    def _ready(self, subgraph: str, model: Any, shapes: Shapes) -> Any: ...

    @abstractmethod
    def _run(self, ready: Any, arrays: list[NDArray[Any]]) -> list[NDArray[Any]]: ...


class OpenVINOEngine(Engine):
    """OpenVINO on the CPU; models are ``openvino.Model`` with a batch of any size.

    Args:
        half: whether subgraphs that tolerate it compute their unquantised layers in bfloat16, if the CPU does.
    """

    library = "OpenVINO"

    def __init__(self, model: Callable[[str, Shapes], Any], *, half: bool = False) -> None:
        super().__init__(model)
        self._core = openvino_core()
        self._half = half

    def _ready(self, subgraph: str, model: Any, shapes: Shapes) -> Any:
        # The batch stays dynamic: fixed sizes are hardly faster, and dropping samples makes many.
        model.reshape({index: [-1, *shape] for index, shape in enumerate(shapes)})
        precision = "bf16" if self._half and bears_half(subgraph, shapes) else "f32"
        options = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
        return self._core.compile_model(model, "CPU", options).create_infer_request()

    def _run(self, ready: Any, arrays: list[NDArray[Any]]) -> list[NDArray[Any]]:
        # Inputs are not copied; outputs are, as the next run overwrites them.
        with cancelled_by(ready.cancel):
            given = ready.infer(arrays, share_inputs=True, share_outputs=False)
        return [given[index] for index in range(len(ready.model_outputs))]


class OnnxEngine(Engine):
    """ONNX Runtime on the CPU; models are the bytes of an ONNX file with dynamic batch."""

    library = "ONNX Runtime"

    def __init__(self, model: Callable[[str, Shapes], bytes]) -> None:
        super().__init__(model)
        self._onnxruntime = installed("onnxruntime")

    def _ready(self, subgraph: str, model: bytes, shapes: Shapes) -> Any:
        options = self._onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors
        # Every subgraph has its own threads: those that have finished must not spin while the next run.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        return self._onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def _run(self, ready: Any, arrays: list[NDArray[Any]]) -> list[NDArray[Any]]:
        names = [port.name for port in ready.get_inputs()]
        options = self._onnxruntime.RunOptions()
        with cancelled_by(partial(setattr, options, "terminate", True)):
            given: list[NDArray[Any]] = ready.run(None, dict(zip(names, arrays, strict=True)), options)
        return given
