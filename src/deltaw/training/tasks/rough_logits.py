"""Logits of a frozen head from int8 products, for where those that count are computed once more.

A head's inputs have a few columns with numbers far larger than all others, and one scale for each row would
have to span them. So the largest columns are taken out before a row is rounded, and come back as a low-rank
update that is not rounded, as in LLM.int8() (arXiv 2208.07339).

Knows tensors; not models, and not what the logits are for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from deltaw.kernels import linear as products
from deltaw.kernels import quantize
from deltaw.lora.fingerprint import has_values

# Columns that are not rounded. Twice as many halve the error, and cost as much again.
APART = 8
# With fewer rows, reading these columns of the weight takes longer than they are worth.
ROWS_FOR_APART = 128
# Rows of the weight, at most, that tell how long its rows are.
SAMPLED = 1024
# The error that rough logits may have: sums of probabilities of classes that are not computed once more are
# too large by this share, about.
LARGEST_ERROR = 0.01


@dataclass(frozen=True)
class RoughHead:
    """What a head's weight W (classes, d) takes to be multiplied in int8.

    Attributes:
        scales: (classes) fp32, what each row is divided by to be rounded.
        row_square, scale_square: means over the classes, or many of them, of ‖row‖² and of scale².
        least_rows: with fewer rows at once no column is left unrounded, and a bf16 head is multiplied as it
            is.
    """

    scales: Tensor
    row_square: float
    scale_square: float
    least_rows: int = ROWS_FOR_APART

    @classmethod
    def of(cls, weight: Tensor) -> RoughHead:
        """That of a weight; in a dry run its numbers are not read."""
        scales = quantize.scales_of_rows(weight.detach())
        if not has_values(weight):
            return cls(scales, 0.0, 0.0)
        some = weight.detach()[:: -(-len(weight) // SAMPLED)].float()
        return cls(scales, float(some.square().sum(1).mean()), float(scales.square().mean()))


class RoughLogits:
    """The logits of rows (M, d), to be asked for in parts.

    Args:
        hidden: (M, d). weight: (classes, d) in bf16, rounded to int8 as it is read. bias: (classes) or None.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: RoughHead) -> None:
        self.hidden, self.weight, self.bias, self.head = hidden, weight, bias, head
        self.rounded: Tensor = hidden
        self.lora_A: Tensor | None = None
        self.lora_B: Tensor | None = None
        if len(hidden) < head.least_rows or hidden.shape[1] <= APART:
            return
        apart = hidden.abs().amax(0).topk(APART).indices
        self.rounded = hidden.index_fill(1, apart, 0)
        self.lora_A = torch.zeros(hidden.shape[1], APART).index_put_(
            (apart, torch.arange(APART)), torch.ones(APART)
        )
        # Column by column, which is several times as fast as all at once.
        columns = [weight.index_select(1, apart[n : n + 1])[:, 0] for n in range(APART)]
        self.lora_B = torch.stack([column.float() for column in columns])

    def of(self, part: slice) -> Tensor:
        """Logits (m, classes) of some of the rows, without what a model makes of them afterwards."""
        int8, scales = quantize.quantized(self.rounded[part], None)
        logits, _ = products.linear(
            self.hidden[part],
            self.weight,
            scale=self.head.scales,
            bias=self.bias,
            lora_A=self.lora_A,
            lora_B=self.lora_B,
            x_int8=int8,
            x_scales=scales,
        )
        return logits

    def variance(self) -> float:
        """The mean square of the logits' error, about, over all rows.

        A number rounded to steps of s is off by s²/12 in the mean square; so a logit is off by
        (s²·‖w‖² + ‖x‖²·t²)/12, with the steps s of a row x and t of a class w.
        """
        lengths = torch.linalg.vector_norm(self.rounded, dim=1, dtype=torch.float32)
        steps = self.rounded.abs().amax(1).float() / 127
        of_inputs = float(steps.square().mean()) * self.head.row_square
        return (of_inputs + float(lengths.square().mean()) * self.head.scale_square) / 12

    def accurate(self, scale: float) -> bool:
        """Whether they may stand for the head's own, times ``scale``; in a dry run they may.

        The mean of exp(e) of an error e with the variance v is exp(v/2).
        """
        if not has_values(self.hidden):
            return True
        return math.expm1(scale * scale * self.variance() / 2) <= LARGEST_ERROR
