"""Temperatures find the factor that scores were blown up by, and doubt is what its names say."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import softmax

from crowdexit.calibration.temperatures import TemperatureError, Temperatures, surprise, temperature


def drawn(number: int, classes: int = 5, seed: int = 0):
    """Scores that tell the true probabilities, and classes drawn by them."""
    random = np.random.default_rng(seed)
    scores = random.normal(0, 1.5, (number, classes))
    labels = np.array([random.choice(classes, p=row) for row in softmax(scores, 1)])
    return scores, labels


@pytest.mark.parametrize("factor", [0.3, 1.0, 4.0])
def test_the_factor_is_found(factor):
    scores, labels = drawn(6000)
    blown = (factor * scores).astype(np.float32)
    found = temperature(blown, labels)
    assert found == pytest.approx(factor, rel=0.06)
    best = surprise(blown, labels, found)
    assert all(best <= surprise(blown, labels, found * by) for by in (0.5, 0.97, 1.03, 2.0))
    assert best <= surprise(blown, labels)


def test_calibrated_confidence_is_how_often_it_is_right():
    scores, labels = drawn(8000)
    made = Temperatures({"x": temperature((3 * scores).astype(np.float32), labels)})
    uncertainties = made.uncertainties("x", (3 * scores).astype(np.float32), "confidence")
    right = scores.argmax(1) == labels
    for low in (0.1, 0.3, 0.5):
        some = (uncertainties >= low) & (uncertainties < low + 0.1)
        assert 1 - right[some].mean() == pytest.approx(uncertainties[some].mean(), abs=0.05)


def test_uncertainty():
    made = Temperatures({"cold": 0.5})
    scores = np.log(np.array([[0.7, 0.2, 0.1], [1 / 3, 1 / 3, 1 / 3], [1.0, 1e-30, 1e-30]])).astype(np.float32)
    assert made.uncertainties("x", scores, "confidence") == pytest.approx([0.3, 2 / 3, 0], abs=1e-6)
    entropy = -(0.7 * np.log(0.7) + 0.2 * np.log(0.2) + 0.1 * np.log(0.1)) / np.log(3)
    assert made.uncertainties("x", scores, "entropy") == pytest.approx([entropy, 1, 0], abs=1e-6)
    assert made.uncertainties("cold", scores, "confidence")[0] == pytest.approx(1 - 0.49 / (0.49 + 0.04 + 0.01))
    huge = np.array([[1e30, 0.0], [-1e30, 0.0]], np.float32)
    assert made.uncertainties("x", huge, "confidence").tolist() == [0, 0]


def test_scores_without_a_best_temperature():
    """All right, or all wrong: cold or hot, within what is allowed."""
    scores, labels = np.array([[5.0, 0.0], [0.0, 5.0]], np.float32), np.array([0, 1])
    assert 0.05 <= temperature(scores, labels) < 0.3
    assert temperature(scores, 1 - labels) == pytest.approx(20, rel=0.01)
    with pytest.raises(TemperatureError, match="not finite"):
        temperature(np.array([[np.nan, 1.0]], np.float32), np.array([0]))
    with pytest.raises(TemperatureError, match="no images"):
        temperature(np.zeros((0, 3), np.float32), np.zeros(0, np.int64))


def test_stored_in_the_header():
    made = Temperatures({"V1": 1.5, "final": 0.8}, 30)
    assert Temperatures.from_dict(made.to_dict()) == made
    assert Temperatures.from_dict(None) == Temperatures()
    for damaged in (3, {}, {"by_exit": {"a": 0}, "samples": 1}, {"by_exit": {"a": "x"}, "samples": 1}, {"by_exit": []}):
        with pytest.raises(TemperatureError, match="the checkpoint's temperatures are damaged"):
            Temperatures.from_dict(damaged)
