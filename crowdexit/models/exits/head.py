"""What every early exit has in common: it reads tokens off the features and ends in the same MLP head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from crowdexit.models.stages import Exit, ExitOutput, Features


class MLPHead(nn.Sequential):
    """Three dense layers with ReLU and dropout between: n → 256 → 256 → outputs.

    Widths follow from the parameter tables of the SL-ViT paper (tables IV to VIII). The same head ends the
    branches of the multi-exit ViT paper ("three dense layers with two dropouts").

    Args:
        inputs: n, the length of the flattened features.
        outputs: number of classes, or 1 for a count.
        hidden: width of the two hidden layers.
        dropout: probability of the two dropouts.
    """

    def __init__(self, inputs: int, outputs: int, hidden: int = 256, dropout: float = 0.5) -> None:
        super().__init__(
            nn.Linear(inputs, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, outputs),
        )

    @torch.no_grad()
    def start_tied(self, positions: int) -> None:
        """Start the first layer as a mean over ``positions``: the same weights for each, divided by their number.

        The papers start it at random. From few images a head that starts blind to position learns far
        sooner that people count the same wherever they stand. The input is position-major: n = positions · d.
        """
        first = self[0]
        assert isinstance(first, nn.Linear)
        shared = nn.Linear(first.in_features // positions, first.out_features)
        first.weight.copy_((shared.weight / positions).repeat(1, positions))
        first.bias.copy_(shared.bias)


class Branch(Exit):
    """An early exit: tokens of the features, flattened into the MLP head.

    Attributes:
        head: ends the branch; its input is position-major.
        cells: N, the positions that the head sees. dim: d, the length of each.
        token_grid: (rows, columns) of the first of them over the image, or None where they stand for all of it.
        scale: the answer is the head's output times this; 100 keeps a count's weights near one.
        rectifies: whether a ReLU follows the ``input_conv``.
    """

    head: MLPHead
    cells: int
    dim: int
    scale: float = 1.0
    rectifies: bool = False

    @property
    def count_head(self) -> nn.Sequential | None:
        return self.head if self.cells == 1 or self.input_conv is not None else None

    @torch.no_grad()
    def start_at(self, count: float) -> None:
        last = self.head[-1]
        assert isinstance(last, nn.Linear)
        last.bias.fill_(count / self.scale)

    def start_tied(self) -> None:
        self.head.start_tied(self.cells)

    def input_map(self, features: Features) -> Tensor:
        """The map B×C×h×w that the ``input_conv`` reads."""
        return features.grid()

    def tokens(self, features: Features) -> Tensor:
        """What the head sees, B×N×d, in reading order."""
        raise NotImplementedError  # abstract

    def attention_map(self, features: Features) -> Tensor | None:
        """How much its attention goes to each patch, B×rows×columns, the sum of each sample one; None: it has none."""
        return None

    def answer(self, tokens: Tensor) -> ExitOutput:
        """The head's answer to B×N×d."""
        return ExitOutput(as_answer(run_head(self.head, tokens)) * self.scale)

    def forward(self, features: Features) -> ExitOutput:
        return self.answer(self.tokens(features))


def run_head(head: MLPHead, tokens: Tensor) -> Tensor:
    """The head's output for B×N×d in float32 whatever the features came in: bfloat16 knows few counts."""
    flat = tokens.flatten(1).to(next(head.parameters()).dtype)
    # Autocast knows no meta tensors; a query whether it does would break torch.compile's graph.
    with torch.autocast("cpu" if flat.is_meta else flat.device.type, enabled=False):
        scores: Tensor = head(flat)
    return scores


def as_answer(scores: Tensor) -> Tensor:
    """B×1 → B for a count; class scores B×K stay."""
    return scores.squeeze(1) if scores.shape[1] == 1 else scores
