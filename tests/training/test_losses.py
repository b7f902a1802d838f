"""The Poisson loss: least at the truth, whatever crowds stand beside each other in a batch, and its gradients right."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from crowdexit.training.losses import poisson_count_loss, poisson_loss


def crowds(images: int, rate: torch.Tensor, size: tuple[int, int] = (8, 8)) -> torch.Tensor:
    """Heads in cells, drawn image by image at these mean rates."""
    return torch.poisson(rate.expand(images, 1, *size))


def test_gradients():
    torch.manual_seed(0)
    heads = crowds(2, torch.tensor(0.7), (9, 12)).double()
    density = torch.rand_like(heads).add(0.05).requires_grad_()
    # The weight of an image is no part of the loss: held, as it is without a gradient.
    weight = 1 / (1 + density.detach().sum((1, 2, 3)) / 30)

    def held(density):
        total = 0
        for side, share in ((1, 0.25), (2, 0.5), (4, 1.0), (8, 1.0), (99, 1.0)):
            for top in range(0, 9, side):
                for left in range(0, 12, side):
                    rate, number = (m[:, 0, top : top + side, left : left + side].sum((1, 2)) for m in (density, heads))
                    total = total + share * (rate - number * rate.log())
        return (total * weight).mean() / 30

    (wanted,) = torch.autograd.grad(held(density), density)
    (found,) = torch.autograd.grad(poisson_loss(density, heads), density)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6)


def test_least_at_the_truth():
    torch.manual_seed(0)
    heads = crowds(3, torch.tensor(2.0))
    exact = heads.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(poisson_loss(exact, heads), exact)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-6)


def test_no_bias_over_unlike_images():
    """Images alike to the network hold few heads or many; its one answer for them is the mean, cell by cell."""
    torch.manual_seed(0)
    rates = torch.tensor([0.0, 0.02, 0.1, 1.0, 5.0]).repeat(20)
    heads = torch.cat([crowds(1, rate) for rate in rates])
    raw = torch.zeros(1, 1, 8, 8, requires_grad=True)
    optimiser = torch.optim.Adam([raw], lr=0.3)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimiser, 0.98)
    for _ in range(250):
        optimiser.zero_grad()
        poisson_loss(F.softplus(raw).expand_as(heads), heads).backward()
        optimiser.step()
        schedule.step()
    density = F.softplus(raw).detach()
    counts = heads.sum((1, 2, 3))
    assert density.sum().item() == pytest.approx(counts.mean().item(), rel=2e-3)
    assert density.sum() > 2 * counts.median(), "where an absolute error would end"


def test_empty_and_padded_cells_are_finite():
    density = torch.zeros(2, 1, 4, 12, requires_grad=True)
    heads = torch.zeros(2, 1, 4, 12)
    heads[1, 0, 0, 0] = 3
    loss = poisson_loss(density, heads)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(density.grad).all()
    assert (density.grad[0] >= 0).all()
    assert density.grad[1, 0, 0, 0] < 0


def test_counts_without_a_map():
    heads = torch.tensor([0.0, 3.0, 200.0])
    count = torch.tensor([1.0, 4.0, 150.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(poisson_count_loss(count, heads), count)
    weight = 1 / (1 + count.detach() / 30)
    torch.testing.assert_close(gradient, (1 - heads / count.detach()) * weight / 3 / 30, rtol=1e-3, atol=1e-6)
    below = torch.tensor([-2.0, -0.5, -100.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(poisson_count_loss(below, heads), below)
    assert (gradient < 0).all(), "a negative count is drawn up"
