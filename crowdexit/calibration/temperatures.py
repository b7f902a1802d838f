"""Temperatures: class scores divided by one number an exit, so that its confidence is as often right as it says.

Guo et al. 2017. The number is the one that makes the true classes of held-out images most likely; it moves no
decision, only how sure it is said to be. The *uncertainty* of an exit on a sample is 1 − the largest
probability (``confidence``), or the entropy of the probabilities as a share of the largest there is (``entropy``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from crowdexit.errors import CrowdExitError

Measure = Literal["confidence", "entropy"]
_HOTTEST = 20.0  # and its inverse the coldest: where every held-out image is right, none would be cold enough


class TemperatureError(CrowdExitError):
    """Scores that no temperature can be fitted to, or temperatures that a checkpoint describes wrongly."""


@dataclass(frozen=True)
class Temperatures:
    """A classifier's calibration.

    Attributes:
        by_exit: an exit that is not there has the temperature one.
        samples: how many held-out images it was made of.
    """

    by_exit: Mapping[str, float] = field(default_factory=dict)
    samples: int = 0

    def uncertainties(self, exit: str, scores: NDArray[np.float32], measure: Measure) -> NDArray[np.float64]:
        """How unsure an exit is of each sample (n,), from zero to one, by its scores (n, K)."""
        logs = _log_softmax(scores.astype(np.float64) / self.by_exit.get(exit, 1.0))
        if measure == "confidence":
            out: NDArray[np.float64] = 1 - np.exp(logs.max(1))
            return out
        entropy: NDArray[np.float64] = -(np.exp(logs) * logs).sum(1) / math.log(logs.shape[1])
        return entropy

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for a checkpoint's header."""
        return {"by_exit": dict(self.by_exit), "samples": self.samples}

    @classmethod
    def from_dict(cls, data: Any) -> Temperatures:
        """Read what :meth:`to_dict` wrote; None is no calibration.

        Raises:
            TemperatureError: for anything else.
        """
        if data is None:
            return cls()
        try:
            by_exit = {str(name): float(value) for name, value in data["by_exit"].items()}
            if any(not 0 < value < math.inf for value in by_exit.values()):
                raise ValueError
            return cls(by_exit, int(data["samples"]))
        except (KeyError, TypeError, ValueError, AttributeError):
            raise TemperatureError("the checkpoint's temperatures are damaged") from None


def temperature(scores: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """The temperature of an exit, from its scores (n, K) of held-out images and their classes (n,).

    Raises:
        TemperatureError: if there are no images, or scores that are not finite.
    """
    from scipy.optimize import minimize_scalar  # a quarter of a second to import, and only fitting needs it

    if not len(labels):
        raise TemperatureError("no images to fit a temperature to")
    if not np.isfinite(scores).all():
        raise TemperatureError("scores that are not finite have no temperature")
    bound = math.log(_HOTTEST)
    # In the inverse temperature the likelihood has one peak, so in its logarithm, too.
    found = minimize_scalar(lambda x: surprise(scores, labels, math.exp(x)), bounds=(-bound, bound), method="bounded")
    return math.exp(float(found.x))


def surprise(scores: NDArray[np.float32], labels: NDArray[np.int64], temperature: float = 1.0) -> float:
    """The mean negative log-likelihood of the true classes (n,) under scores (n, K), in nats."""
    logs = _log_softmax(scores.astype(np.float64) / temperature)
    return float(-logs[np.arange(len(labels)), labels].mean())


def _log_softmax(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = scores - scores.max(1, keepdims=True)
    logs: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return logs
