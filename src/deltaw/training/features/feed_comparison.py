"""Comparison of loss and gradients of two feeds on probe rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deltaw.data.example import lengths_of
from deltaw.training.feed import Feed

NUM_PROBE_ROWS = 3
# Number of gradient elements to compare at a time.
_CHUNK_SIZE = 1 << 20


def select_probe_rows(examples: Sequence[Any]) -> list[Any]:
    """Return the shortest row and the rows at the 25th and 50th percentile of length, without duplicates."""
    ordered = np.argsort(lengths_of(examples), kind="stable").tolist()
    return [examples[ordered[index]] for index in sorted({0, len(ordered) // 4, len(ordered) // 2})]


def loss_and_gradients(feed: Feed, rows: Sequence[Any], trained: Sequence[nn.Parameter]) -> list[Tensor | None]:
    """Return the summed loss and its gradient for each trained parameter, or None for a parameter without gradient."""
    total: list[Tensor | None] = [None] * (1 + len(trained))
    for batch in feed.batches(rows):
        loss = feed.objective(batch)
        parts = [loss.detach(), *torch.autograd.grad(loss, trained, allow_unused=True)]
        for index, part in enumerate(parts):
            if part is None:
                continue
            previous = total[index]
            total[index] = part if previous is None else previous + part
    return total


def compare_feeds(
    model: nn.Module,
    reference: Feed,
    cached: Feed,
    rows: Sequence[Any],
    *,
    loss_tolerance: float | None,
    gradient_tolerance: float | None = None,
) -> str | None:
    """Compare the loss and gradients of two feeds of a model.

    The cached feed runs twice: it first computes its features and then reads them.

    Args:
        reference: Feed without a cache.
        cached: Feed with a cache.
        rows: Rows to run.
        loss_tolerance: Maximum relative difference of the loss. If it is None, the feeds only have to run without an
            error.
        gradient_tolerance: Maximum relative difference of the gradients. By default that of the loss.

    Returns:
        A description of the difference, or None.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    expected = loss_and_gradients(reference, rows, trained)
    for _ in range(2):
        actual = loss_and_gradients(cached, rows, trained)
        if loss_tolerance is None:
            continue
        if not is_close(expected[:1], actual[:1], loss_tolerance):
            return "a different loss"
        if not is_close(expected[1:], actual[1:], gradient_tolerance or loss_tolerance):
            return "different gradients"
    return None


def short_error(error: Exception) -> str:
    """Return type and message of a third-party error, shortened for use in a sentence."""
    return f"{type(error).__name__}: {str(error)[:100]}"


def is_close(expected: Sequence[Tensor | None], actual: Sequence[Tensor | None], tolerance: float) -> bool:
    """Return True if the tensors together differ by at most ``tolerance``, relative to the norm of ``expected``."""
    if [tensor is None for tensor in expected] != [tensor is None for tensor in actual]:
        return False
    difference = 0.0
    norm = 0.0
    for expected_tensor, actual_tensor in zip(expected, actual, strict=True):
        if expected_tensor is None or actual_tensor is None:
            continue
        # Compare in chunks, because a gradient can be as large as the model's largest weight.
        expected_chunks = expected_tensor.flatten().split(_CHUNK_SIZE)
        actual_chunks = actual_tensor.flatten().split(_CHUNK_SIZE)
        for expected_chunk, actual_chunk in zip(expected_chunks, actual_chunks, strict=True):
            difference += float((expected_chunk.float() - actual_chunk.float()).square().sum())
            norm += float(expected_chunk.float().square().sum())
    return math.sqrt(difference) <= tolerance * math.sqrt(norm)


def tolerance_of(dtype: torch.dtype) -> float:
    """Return the relative error that rounding in ``dtype`` can cause."""
    return 1e-3 if dtype in (torch.float32, torch.float64) else 6e-2
