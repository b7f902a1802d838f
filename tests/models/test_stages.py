"""The record of features shows itself as a grid and as tokens, and compacts."""

from __future__ import annotations

import torch

from crowdexit.models.stages import Features, inputs


def record(visual: torch.Tensor, grid: tuple[int, int] | None = None) -> Features:
    n = visual.shape[0]
    has_audio = torch.arange(n) % 2 == 0
    return Features(visual, torch.randn(n, 1, 96, 64), has_audio, torch.rand(n, 1, 2, 3), torch.randn(n, 5), grid)


def test_inputs_without_audio():
    features = inputs(torch.zeros(2, 3, 16, 24))
    assert features.log_mel.shape == (2, 1, 96, 64)
    assert features.has_audio.tolist() == [False, False]
    assert features.valid_mask.shape == (2, 1, 2, 3)
    assert features.valid_mask.eq(1).all()


def test_inputs_with_audio_use_it_by_default():
    audio = torch.zeros(2, 1, 96, 64)
    assert inputs(torch.zeros(2, 3, 16, 24), audio).has_audio.tolist() == [True, True]
    report = torch.tensor([True, False])
    assert inputs(torch.zeros(2, 3, 16, 24), audio, report).has_audio.tolist() == [True, False]


def test_inputs_without_log_mel_never_have_audio():
    assert not inputs(torch.zeros(1, 3, 16, 24), has_audio=torch.tensor([True])).has_audio.any()


def test_map_as_tokens():
    visual = torch.randn(2, 4, 2, 3)
    features = record(visual)
    assert features.grid() is visual
    tokens = features.tokens()
    assert tokens.shape == (2, 7, 4)
    assert torch.equal(tokens[1, 1 + 1 * 3 + 2], visual[1, :, 1, 2])  # row-major
    torch.testing.assert_close(tokens[:, 0], visual.mean((2, 3)))


def test_tokens_as_map():
    tokens = torch.randn(2, 7, 4)
    features = record(tokens, (2, 3))
    assert features.tokens() is tokens
    grid = features.grid()
    assert grid.shape == (2, 4, 2, 3)
    assert torch.equal(grid[0, :, 1, 0], tokens[0, 1 + 3])


def test_select_takes_every_tensor_alike():
    features = record(torch.randn(3, 4, 2, 3))
    for keep in (torch.tensor([True, False, True]), torch.tensor([0, 2])):
        kept = features.select(keep)
        for name in ("visual", "log_mel", "has_audio", "valid_mask", "audio"):
            assert torch.equal(getattr(kept, name), getattr(features, name)[[0, 2]]), name


def test_select_keeps_what_is_not_there():
    features = record(torch.randn(2, 7, 4), (2, 3))
    kept = Features(features.visual, features.log_mel, features.has_audio, features.valid_mask, None, (2, 3)).select(
        torch.tensor([1])
    )
    assert kept.audio is None
    assert kept.token_grid == (2, 3)
