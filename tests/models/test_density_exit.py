"""Density branches: what surrounds a cell, and how far a branch looks."""

from __future__ import annotations

import pytest
import torch

from crowdexit.models import zoo
from crowdexit.models.exits import DensityBranch
from crowdexit.models.stages import Features


def of_map(visual: torch.Tensor) -> Features:
    batch, _, height, width = visual.shape
    return Features(visual, torch.zeros(batch, 1, 96, 64), torch.zeros(batch) > 0, torch.ones(batch, 1, height, width))


def test_context_starts_at_zero():
    torch.manual_seed(0)
    plain, wide = DensityBranch(5, (6, 4)), DensityBranch(5, (6, 4), context=(3, 4, 4))
    missing = wide.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert missing
    assert all(key.startswith("context.") for key in missing)
    features = of_map(torch.randn(2, 5, 8, 12))
    torch.testing.assert_close(wide(features).density, plain(features).density)


@pytest.mark.parametrize(("context", "reach"), [((), 4), ((3, 4), 10), ((3, 4, 4), 18)])
def test_how_far_a_cell_looks(context, reach):
    """In cells, farther with every layer of its context."""
    torch.manual_seed(0)
    branch = DensityBranch(2, (4, 4), context=context)
    if branch.context is not None:
        torch.nn.init.normal_(branch.context.out.weight)
    visual = torch.randn(1, 2, 4, 96, requires_grad=True)
    density = branch(of_map(visual)).density
    assert density.shape == (1, 1, 4, 96)
    density[0, 0, 1, 48].backward()
    seen = visual.grad.abs().sum((0, 1, 2)).nonzero().flatten()
    assert reach - 4 <= 48 - seen.min() <= reach + 4


def test_context_that_does_not_fit():
    with pytest.raises(ValueError, match="two convolutions at least"):
        DensityBranch(5, context=(8,))
    exit = zoo.ExitSpec("V1", "V1", "density", {"density_context": [4, 4]})
    with pytest.raises(zoo.ZooError, match="multiples of 32"):
        zoo.build(zoo.Spec("audiocsrnet", (exit,), {"view": "scale"}))
