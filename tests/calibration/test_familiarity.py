"""Which images are familiar, from the sums of their features; and that statistics survive a checkpoint."""

from __future__ import annotations

import numpy as np
import pytest

from crowdexit.calibration.familiarity import SHARE, Familiarity, FamiliarityError, describe, fit


def sums_of(features: np.ndarray) -> np.ndarray:
    """The sums of features (C, n), every cell of which is image."""
    return np.concatenate([features.sum(1), (features**2).sum(1), [features.shape[1]]])


def images(number: int, *, seed: int = 0, shift: float = 0.0) -> list[np.ndarray]:
    """Sums of images of three channels, each with a mean and a deviation of its own."""
    random = np.random.default_rng(seed)
    drawn = []
    for _ in range(number):
        mean, deviation = shift + random.normal(2, 0.5, (3, 1)), random.uniform(0.5, 1.5, (3, 1))
        drawn.append(sums_of(mean + deviation * random.normal(size=(3, 50))))
    return drawn


def test_describe():
    features = np.random.default_rng(0).normal(3, 2, (4, 60))
    assert describe(sums_of(features)) == pytest.approx(np.concatenate([features.mean(1), features.std(1)]))
    assert np.isfinite(describe(np.zeros(9))).all()


def test_how_many_are_familiar():
    """Of further images of the same kind about the share that is wanted; of others none."""
    made = fit(images(300))
    assert np.mean([made.is_familiar(of_one) for of_one in images(2000, seed=1)]) == pytest.approx(SHARE, abs=0.015)
    assert not any(made.is_familiar(of_one) for of_one in images(100, seed=2, shift=5.0))
    assert not made.is_familiar(np.full(7, np.nan))


def test_the_threshold_is_of_images_that_are_left_out():
    """As if the statistics had been made without each of them in turn."""
    drawn = images(60)
    left_out = [fit([*drawn[:i], *drawn[i + 1 :]]).score(drawn[i]) for i in range(60)]
    assert fit(drawn).threshold == pytest.approx(float(np.quantile(left_out, SHARE, method="higher")), rel=0.02)


def test_through_a_header():
    made = fit(images(40))
    again = Familiarity.from_dict(made.to_dict())
    assert again is not None
    one = images(1, seed=3)[0]
    assert again.score(one) == made.score(one)
    assert (again.threshold, again.samples) == (made.threshold, 40)
    assert Familiarity.from_dict(None) is None


@pytest.mark.parametrize(
    "change", [{"mean": "x"}, {"mean": "AAAA"}, {"precision": "AAAAAA=="}, {"threshold": "nan"}, {"samples": None}]
)
def test_damaged(change):
    with pytest.raises(FamiliarityError, match="statistics of its training images are damaged"):
        Familiarity.from_dict({**fit(images(40)).to_dict(), **change})


def test_no_statistics():
    with pytest.raises(
        FamiliarityError, match="11 images are too few for statistics of 6 numbers; at least 12 are needed"
    ):
        fit(images(11))
    with pytest.raises(FamiliarityError, match="the features are the same in all images"):
        fit(images(1) * 20)
    with pytest.raises(FamiliarityError, match="statistics of 6 numbers do not fit 8 features"):
        fit(images(40)).score(np.ones(9))
