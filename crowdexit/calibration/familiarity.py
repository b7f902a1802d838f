"""How unlike its training images an image is: the Mahalanobis distance of its early features to theirs.

An image is described by the mean and the standard deviation of every channel of the first stage's feature map, over the
cells that are image: 2C numbers. The score is their squared Mahalanobis distance to those of the training images (Lee
et al. 2018, arXiv 1807.03888). Above the threshold, which 2.5 % of the training images exceed when each is compared
with the others, an image is not familiar, and what the network counts there may be far off.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crowdexit.errors import CrowdExitError

SHARE = 0.975  # of the training images that are below the threshold
SHRINKAGE = 0.02  # of the covariance, towards its diagonal
MAP_ROWS = 24  # of a feature map that are summed
_LEAST = 1e-4  # of the mean variance: a feature that is hardly ever there varies by that


class FamiliarityError(CrowdExitError):
    """Statistics that cannot be made, or that a checkpoint describes wrongly."""


@dataclass(frozen=True)
class Familiarity:
    """Statistics of a network's training images.

    Attributes:
        mean: (2C,), of the images' descriptions.
        precision: (2C, 2C), the inverse of their covariance.
        threshold: the largest squared distance of a familiar image.
        samples: how many images they are of.
    """

    mean: NDArray[np.float32]
    precision: NDArray[np.float32]
    threshold: float
    samples: int

    def score(self, sums: NDArray[np.float64]) -> float:
        """The squared distance of an image from its sums (2C + 1,) (:func:`describe`).

        Raises:
            FamiliarityError: for another number of channels.
        """
        if len(sums) != len(self.mean) + 1:
            raise FamiliarityError(f"statistics of {len(self.mean)} numbers do not fit {len(sums) - 1} features")
        off = describe(sums) - self.mean
        return float(off @ self.precision @ off)

    def is_familiar(self, sums: NDArray[np.float64]) -> bool:
        """Whether an image is like the training images, from its sums (2C + 1,); one without numbers is not."""
        return self.score(sums) <= self.threshold

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for a checkpoint's header: arrays as the base64 of little-endian float32."""
        return {
            "mean": _encoded(self.mean),
            "precision": _encoded(self.precision),
            "threshold": self.threshold,
            "samples": self.samples,
        }

    @classmethod
    def from_dict(cls, data: Any) -> Familiarity | None:
        """Read what :meth:`to_dict` wrote; None is no statistics.

        Raises:
            FamiliarityError: for anything else.
        """
        if data is None:
            return None
        try:
            mean, precision = _decoded(data["mean"]), _decoded(data["precision"])
            threshold, samples = float(data["threshold"]), int(data["samples"])
            if not (math.isfinite(threshold) and np.isfinite(mean).all() and np.isfinite(precision).all()):
                raise ValueError
            return cls(mean, precision.reshape(len(mean), len(mean)), threshold, samples)
        except (KeyError, TypeError, ValueError):
            raise FamiliarityError("the checkpoint's statistics of its training images are damaged") from None


def sum_features(visual: NDArray[np.float32], valid_mask: NDArray[np.float32]) -> NDArray[np.float64] | None:
    """Sums over the cells that are image, of the features B×C×h×w after the first stage; of a large map of some rows.

    Args:
        valid_mask: B×1×h×w, how much of each cell is image.

    Returns:
        B×(2C + 1): of each channel the sum and the sum of squares, and the number of cells. None of tokens.
    """
    if visual.ndim != 4 or visual.shape[2:] != valid_mask.shape[2:]:
        return None
    step = max(1, visual.shape[2] // MAP_ROWS)
    values = visual[:, :, ::step].reshape(*visual.shape[:2], -1).astype(np.float32)
    weights = valid_mask[:, 0, ::step].reshape(len(visual), -1, 1).astype(np.float32)
    sums = [values @ weights, np.square(values) @ weights, weights.sum(1, keepdims=True)]
    return np.concatenate(sums, 1)[:, :, 0].astype(np.float64)


def describe(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean and standard deviation of every channel (2C,), from the sums of values, squares and weights (2C + 1,)."""
    values, squares = np.split(sums[:-1] / max(sums[-1], 1e-6), 2)
    return np.concatenate([values, np.sqrt(np.maximum(squares - values**2, 0))])


def fit(sums: Sequence[NDArray[np.float64]]) -> Familiarity:
    """Statistics from the sums (2C + 1,) of each training image.

    The covariance is shrunk a little towards its diagonal. The threshold is a quantile of the images' distances, each
    to the statistics of all the others: those to the statistics that they are part of are too small.

    Raises:
        FamiliarityError: for fewer than 4C images, or features that are the same in all images.
    """
    described = np.array([describe(of_one) for of_one in sums])
    samples, numbers = described.shape
    if samples < 2 * numbers:
        raise FamiliarityError(
            f"{samples} images are too few for statistics of {numbers} numbers; at least {2 * numbers} are needed"
        )
    mean = described.mean(0)
    covariance = np.cov(described.T)
    variances = np.diag(covariance)
    if not variances.mean() > 1e-12:
        raise FamiliarityError("the features are the same in all images")
    variances = np.maximum(variances, _LEAST * variances.mean())
    precision = np.linalg.inv((1 - SHRINKAGE) * covariance + SHRINKAGE * np.diag(variances))
    off = described - mean
    scores = np.einsum("ni,ij,nj->n", off, precision, off)
    # Without the image itself (Sherman & Morrison): the mean moves away from it, the covariance shrinks.
    away = samples / (samples - 1)
    kept = np.maximum(1 - away * scores / (samples - 1), 1e-3)
    left_out = away**2 * (samples - 2) / (samples - 1) * scores / kept
    threshold = float(np.quantile(left_out, SHARE, method="higher"))
    return Familiarity(mean.astype(np.float32), precision.astype(np.float32), threshold, samples)


def _encoded(values: NDArray[np.float32]) -> str:
    return base64.b64encode(values.astype("<f4").tobytes()).decode("ascii")


def _decoded(text: str) -> NDArray[np.float32]:
    return np.frombuffer(base64.b64decode(text, validate=True), "<f4").astype(np.float32)
