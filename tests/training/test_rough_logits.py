"""Int8 logits with unrounded outlier columns, and the cases in which they replace the logits of a head."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor

from deltaw.kernels import loader
from deltaw.kernels.head_gradient import MIN_CLASSES
from deltaw.runtime.rough_head import MIN_OUTLIER_ROWS, OUTLIER_COLUMNS, RoughHead, RoughLogits
from deltaw.training import causal_objective
from deltaw.training.causal_objective import frozen_head_log_probs

compiled_only = pytest.mark.skipif(loader.library() is None, reason="needs compiled kernels")
ROWS = 160
WIDTH = 192
HEAD = MIN_CLASSES + 300


@pytest.fixture(autouse=True)
def approximate():
    """Enable the approximations, as in a run that verified them."""
    with loader.temporary_arithmetic(loader.arithmetic().with_approximations(["int8_logits", "summed_classes"])):
        yield


def rows_with_outliers(count: int, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    """Return bf16 rows (rows, WIDTH) with ``count`` columns scaled by 30, and a bf16 head (HEAD, WIDTH)."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, WIDTH, generator=generator)
    hidden[:, torch.randperm(WIDTH, generator=generator)[:count]] *= 30
    weight = torch.randn(HEAD, WIDTH, generator=generator) / WIDTH**0.5
    return hidden.bfloat16(), weight.bfloat16()


def rough(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> RoughLogits:
    return RoughLogits(hidden, weight, bias, RoughHead.of(weight))


def errors(hidden: Tensor, weight: Tensor) -> Tensor:
    """Return the error of the rough logits against float64.

    Large logits are excluded because their spacing in bf16 exceeds the error of int8 products.
    """
    exact = hidden.double() @ weight.double().T
    actual = rough(hidden, weight).of(slice(None)).double()
    return torch.where(exact.abs() < 4, actual - exact, 0.0)


def test_large_columns_are_not_rounded():
    hidden, weight = rows_with_outliers(OUTLIER_COLUMNS)
    with_outliers = errors(hidden, weight)
    without_outliers = torch.cat([errors(part, weight) for part in hidden.split(MIN_OUTLIER_ROWS - 1)])
    assert with_outliers.norm() < 0.15 * without_outliers.norm()


@pytest.mark.parametrize("count", [0, OUTLIER_COLUMNS, 3 * OUTLIER_COLUMNS])
def test_error_matches_estimated_variance(count):
    hidden, weight = rows_with_outliers(count)
    logits = rough(hidden, weight)
    error = errors(hidden, weight)  # rounding to bf16 adds less than 0.02
    estimated = logits.variance()
    measured = float(error[error != 0].square().mean())
    assert 0.5 * measured - 1e-4 < estimated < 2 * measured + 1e-4
    assert logits.accurate(1.0) == (count <= OUTLIER_COLUMNS)
    assert not logits.accurate(20.0)  # scaling the logits scales their error


def test_part_of_rows_equals_slice_of_full_result():
    hidden, weight = rows_with_outliers(3)
    bias = torch.randn(HEAD, generator=torch.Generator().manual_seed(1)).bfloat16()
    logits = rough(hidden, weight, bias)
    full = logits.of(slice(0, ROWS))
    assert torch.equal(full[40:90], logits.of(slice(40, 90)))
    without = rough(hidden, weight).of(slice(0, ROWS))
    expected = without.float() + bias.float()
    rounded = 2.0**-7 * float(without.abs().max())  # sums are rounded to bf16, without kernels after each part
    assert rounded < 0.3 and ((full.float() - expected).abs() <= rounded).all()


def test_nan_row_yields_nan_logits():
    hidden, weight = rows_with_outliers(1)
    hidden[3, 5] = float("nan")
    logits = rough(hidden, weight).of(slice(None))
    assert logits[3].isnan().all() and logits[:3].isfinite().all() and logits[4:].isfinite().all()


@compiled_only
def test_head_uses_rough_logits_if_accurate(monkeypatch):
    """With accurate rough logits, loss and gradient are close to the exact ones.

    If columns are too large, the exact logits of the head are computed and the result is bit-identical.
    """
    parts = []
    compute_part = RoughLogits.of
    monkeypatch.setattr(RoughLogits, "of", lambda self, part: parts.append(part) or compute_part(self, part))
    for count, uses_rough in ((OUTLIER_COLUMNS, True), (3 * OUTLIER_COLUMNS, False)):
        hidden, weight = rows_with_outliers(count)
        hidden = (hidden.float() / 3).bfloat16().requires_grad_()
        if not uses_rough:
            hidden = (hidden.detach() * 6).requires_grad_()
        targets = torch.arange(ROWS) * 31 % HEAD
        parts.clear()
        values = frozen_head_log_probs(hidden, targets, weight, rough=RoughHead.of(weight))
        values.sum().backward()
        assert bool(parts) == uses_rough
        exact_hidden = hidden.detach().clone().requires_grad_()
        expected = frozen_head_log_probs(exact_hidden, targets, weight)
        expected.sum().backward()
        if uses_rough:
            float64_hidden = hidden.detach().double().requires_grad_()
            exact = (float64_hidden @ weight.double().T).log_softmax(-1)[torch.arange(ROWS), targets]
            exact.sum().backward()
            torch.testing.assert_close(values.detach().double(), exact.detach(), rtol=2e-3, atol=0.01)
            assert (hidden.grad.double() - float64_hidden.grad).norm() < 0.03 * float64_hidden.grad.norm()
            assert not torch.equal(values, expected)
        else:
            assert torch.equal(values, expected) and torch.equal(hidden.grad, exact_hidden.grad)
        with torch.no_grad():
            without_grad = frozen_head_log_probs(hidden, targets, weight, rough=RoughHead.of(weight))
        assert torch.equal(without_grad, values.detach())


@compiled_only
def test_small_batches_of_bf16_head_are_not_rounded(monkeypatch):
    monkeypatch.setattr(causal_objective, "RoughLogits", mock.Mock(side_effect=AssertionError("few rows were rounded")))
    hidden, weight = rows_with_outliers(1, rows=MIN_OUTLIER_ROWS - 1)
    frozen_head_log_probs(hidden, torch.arange(len(hidden)), weight, rough=RoughHead.of(weight))


@pytest.mark.parametrize(("classes", "supported"), [(MIN_CLASSES + 4, True), (MIN_CLASSES + 1, False)])
def test_head_unsupported_by_int8_kernel_is_not_rounded(classes, supported):
    head = torch.nn.Linear(8, classes, bias=False, dtype=torch.bfloat16)
    assert causal_objective._may_round(head) == supported
