"""Images and sounds as the batch that a network takes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from crowdexit.data.views import Placement, normalised, views
from crowdexit.models.network import Config
from crowdexit.models.stages import Features, inputs


def batch_of(
    laid: Sequence[tuple[NDArray[np.uint8], Placement]],
    log_mels: Sequence[NDArray[np.float32] | None],
) -> Features:
    """Images on canvases of one size and their log-mels as the network's input."""
    height, width = laid[0][0].shape[:2]
    image = torch.from_numpy(normalised([canvas for canvas, _ in laid]))
    valid_mask = torch.from_numpy(np.stack([placement.valid_mask((width, height)) for _, placement in laid]))[:, None]
    silence = np.zeros((96, 64), np.float32)
    mels = torch.from_numpy(np.stack([silence if s is None else s for s in log_mels]))[:, None]
    has_audio = torch.tensor([s is not None for s in log_mels])
    return inputs(image, mels, has_audio, valid_mask)


def make_batch(image: NDArray[np.uint8], audio: NDArray[np.float32] | None, config: Config) -> Features:
    """All that a network sees of an image H×W×3, in one view or several, each with the log-mel (96, 64) or None."""
    laid = views(image, config.size, config.view)
    return batch_of(laid, [audio] * len(laid))
