"""Mean error and cost of exiting early at a bound of the uncertainty."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crowdexit.evaluation.cost import for_one_image, measure
from crowdexit.models import zoo


@dataclass(frozen=True)
class LeavingPoint:
    """The result of a bound.

    Attributes:
        bound: of the uncertainty; a sample exits at the first exit at or below it, at the latest at the last.
        error: mean over the samples (the share of wrong answers, or the absolute error of counts).
        cost: mean over the samples, in the unit of the costs.
        shares: of the samples that exit at each exit, by name.
    """

    bound: float
    error: float
    cost: float
    shares: Mapping[str, float]


def costs_on_the_way(spec: zoo.Spec, exits: Sequence[str]) -> dict[str, float]:
    """Multiply-adds of one view up to and including each exit, if all earlier ones run too."""
    network, features = for_one_image(spec)
    stages, own = measure(network, features)
    exits_cost, costs = 0, {}
    for name in exits:
        exits_cost += own[name]
        costs[name] = (sum(stages[: network.stage_of(name) + 1]) + exits_cost) / 2
    return costs


def leaving(
    uncertainties: Mapping[str, NDArray[np.float64]],
    errors: Mapping[str, NDArray[np.float64]],
    costs: Mapping[str, float],
    bounds: Sequence[float],
) -> list[LeavingPoint]:
    """For each bound the mean error and cost over samples that are known at every exit.

    Args:
        uncertainties, errors: of each sample (n,) by exit, in the order of the exits.
        costs: of a sample that exits at an exit, by name.
    """
    names = list(uncertainties)
    unsure, wrong = np.stack([uncertainties[name] for name in names]), np.stack([errors[name] for name in names])
    price = np.array([costs[name] for name in names])
    points = []
    for bound in bounds:
        sure = unsure <= bound
        sure[-1] = True
        left = sure.argmax(0)  # the first exit that is sure, of each sample
        error = wrong[left, np.arange(len(left))].mean()
        shares = np.bincount(left, minlength=len(names)) / len(left)
        points.append(
            LeavingPoint(bound, float(error), float(price[left].mean()), dict(zip(names, shares.tolist(), strict=True)))
        )
    return points
