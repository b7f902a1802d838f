"""The MLP head: its widths, and its start that is blind to position."""

from __future__ import annotations

import torch
from torch import nn

from crowdexit.models.exits.head import MLPHead, as_answer


def test_widths():
    head = MLPHead(40, 3)
    assert [(m.in_features, m.out_features) for m in head if isinstance(m, nn.Linear)] == [
        (40, 256),
        (256, 256),
        (256, 3),
    ]
    assert [m.p for m in head if isinstance(m, nn.Dropout)] == [0.5, 0.5]


def test_tied_start_is_blind_to_position():
    torch.manual_seed(0)
    x = torch.randn(3, 6, 4)
    moved = x[:, torch.randperm(6)]
    head = MLPHead(24, 1, hidden=16).eval()
    assert not torch.allclose(head(x.flatten(1)), head(moved.flatten(1)), atol=1e-4)
    head.start_tied(6)
    torch.testing.assert_close(head(x.flatten(1)), head(moved.flatten(1)), rtol=1e-5, atol=1e-6)
    # a fresh dense layer of four inputs lies within ±1/2; the mean of six positions within a sixth of it
    assert 0.2 / 6 < head[0].weight.abs().max() <= 0.5 / 6
    # a mean: more of the same changes nothing, another content does
    once = head(x[:, :1].repeat(1, 6, 1).flatten(1))
    shared = MLPHead(4, 1, hidden=16).eval()
    shared.load_state_dict({**head.state_dict(), "0.weight": head[0].weight[:, :4] * 6})
    torch.testing.assert_close(once, shared(x[:, 0]), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(once, head(x.flatten(1)), atol=1e-4)


def test_counts_lose_their_axis_and_scores_keep_it():
    assert as_answer(torch.zeros(2, 1)).shape == (2,)
    assert as_answer(torch.zeros(2, 10)).shape == (2, 10)
    assert as_answer(torch.zeros(1, 1)).shape == (1,)
