"""Approximate logits of a frozen head from int8 products. Logits of likely classes are recomputed accurately.

A head's inputs have a small number of outlier columns, which would dominate the scale of each row. The largest columns
are therefore excluded from rounding and added as a low-rank update, as in LLM.int8() (arXiv 2208.07339).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from deltaw.kernels import linear as products
from deltaw.kernels import quantize
from deltaw.tensor_files import has_values

# Number of columns that are not rounded. Doubling it halves the error and doubles the cost.
OUTLIER_COLUMNS = 8
# With fewer rows, gathering these columns of the weight takes longer than it saves.
MIN_OUTLIER_ROWS = 128
# Maximum number of weight rows sampled to estimate their norm.
MAX_SAMPLED_CLASSES = 1024
# Allowed relative error of the probability mass of classes without recomputed logits.
MAX_LOGIT_ERROR = 0.01


@dataclass(frozen=True)
class RoughHead:
    """Int8 scales and statistics of a head's weight W (classes, d).

    Attributes:
        scales: (classes,) fp32. Each row is divided by its scale before rounding.
        row_square: Mean of ‖row‖² over sampled classes.
        scale_square: Mean of scale² over sampled classes.
        min_rows: With fewer rows, outlier columns are rounded too, and a bf16 head is multiplied without rounding.
    """

    scales: Tensor
    row_square: float
    scale_square: float
    min_rows: int = MIN_OUTLIER_ROWS

    @classmethod
    def of(cls, weight: Tensor) -> RoughHead:
        """Compute the scales of a weight. A dry run does not read its values."""
        scales = quantize.row_scales(weight.detach())
        if not has_values(weight):
            return cls(scales, 0.0, 0.0)
        sample = weight.detach()[:: -(-len(weight) // MAX_SAMPLED_CLASSES)].float()
        return cls(scales, float(sample.square().sum(1).mean()), float(scales.square().mean()))


class RoughLogits:
    """Approximate logits of rows (M, d), computed in parts.

    Args:
        hidden: (M, d).
        weight: (classes, d) in bf16, rounded to int8 when it is read.
        bias: (classes,) or None.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: RoughHead) -> None:
        self.hidden = hidden
        self.weight = weight
        self.bias = bias
        self.head = head
        self.rounded: Tensor = hidden
        self.lora_A: Tensor | None = None
        self.lora_B: Tensor | None = None
        if len(hidden) < head.min_rows or hidden.shape[1] <= OUTLIER_COLUMNS:
            return
        outliers = hidden.abs().amax(0).topk(OUTLIER_COLUMNS).indices
        self.rounded = hidden.index_fill(1, outliers, 0)
        index = (outliers, torch.arange(OUTLIER_COLUMNS))
        ones = torch.ones(OUTLIER_COLUMNS)
        self.lora_A = torch.zeros(hidden.shape[1], OUTLIER_COLUMNS).index_put_(index, ones)
        # Selecting column by column is several times as fast as a single index_select.
        columns = [weight.index_select(1, outliers[n : n + 1])[:, 0] for n in range(OUTLIER_COLUMNS)]
        self.lora_B = torch.stack([column.float() for column in columns])

    def of(self, part: slice) -> Tensor:
        """Return the head's outputs (m, classes) for a part of the rows, before scaling and soft-capping."""
        int8, scales = quantize.quantize_activations(self.rounded[part], None)
        update = (self.bias, self.lora_A, self.lora_B)
        head = products.LinearProduct(self.weight, True, self.head.scales, None, *update)
        return products.linear(self.hidden[part], head, None, int8, scales)[0]

    def variance(self) -> float:
        """Estimate the mean squared error of the logits over all rows.

        Rounding to steps of s has a mean squared error of s²/12. A logit therefore has (s²·‖w‖² + ‖x‖²·t²)/12, with
        steps s of row x and t of class w.
        """
        lengths = torch.linalg.vector_norm(self.rounded, dim=1, dtype=torch.float32)
        steps = self.rounded.abs().amax(1).float() / 127
        of_inputs = float(steps.square().mean()) * self.head.row_square
        return (of_inputs + float(lengths.square().mean()) * self.head.scale_square) / 12

    def accurate(self, scale: float) -> bool:
        """True if the logits, times ``scale``, are accurate enough. Always True in a dry run.

        The mean of exp(e) for an error e with variance v is exp(v/2).
        """
        if not has_values(self.hidden):
            return True
        return math.expm1(scale * scale * self.variance() / 2) <= MAX_LOGIT_ERROR
