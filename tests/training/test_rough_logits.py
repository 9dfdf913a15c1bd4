"""Logits in int8 whose largest columns are not rounded, and where they take the place of a head's own."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor

from deltaw.kernels import loader
from deltaw.kernels.head_gradient import CLASSES
from deltaw.training.tasks import causal_objective
from deltaw.training.tasks.causal_objective import APART, ROWS_FOR_APART, RoughHead, RoughLogits, frozen_head_log_probs

compiled_only = pytest.mark.skipif(loader.library() is None, reason="heads are computed in parts by compiled kernels")
ROWS, WIDTH, HEAD = 160, 192, CLASSES + 300


@pytest.fixture(autouse=True)
def approximate():
    """As in a run that verified it."""
    with loader.computing(loader.arithmetic().approximating(["int8_logits", "summed_classes"])):
        yield


def rows_with_outliers(count: int, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    """Rows (rows, WIDTH) of which ``count`` columns are 30 times as large, and a head, in bf16."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, WIDTH, generator=generator)
    hidden[:, torch.randperm(WIDTH, generator=generator)[:count]] *= 30
    weight = torch.randn(HEAD, WIDTH, generator=generator) / WIDTH**0.5
    return hidden.bfloat16(), weight.bfloat16()


def rough(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> RoughLogits:
    return RoughLogits(hidden, weight, bias, RoughHead.of(weight))


def errors(hidden: Tensor, weight: Tensor) -> Tensor:
    """Of the rough logits, against float64. What bf16 itself rounds is taken out of their measure: large
    logits lie further apart in bf16 than int8 products err."""
    exact = hidden.double() @ weight.double().T
    found = rough(hidden, weight).of(slice(None)).double()
    return torch.where(exact.abs() < 4, found - exact, 0.0)


def test_large_columns_are_not_rounded():
    hidden, weight = rows_with_outliers(APART)
    apart = errors(hidden, weight)
    few = torch.cat([errors(part, weight) for part in hidden.split(ROWS_FOR_APART - 1)])
    assert apart.norm() < 0.15 * few.norm()


@pytest.mark.parametrize("count", [0, APART, 3 * APART])
def test_their_error_is_as_large_as_is_said(count):
    hidden, weight = rows_with_outliers(count)
    logits, error = rough(hidden, weight), errors(hidden, weight)  # where bf16's own rounding is less than 0.02
    said, found = logits.variance(), float(error[error != 0].square().mean())
    assert 0.5 * found - 1e-4 < said < 2 * found + 1e-4
    assert logits.accurate(1.0) == (count <= APART)
    assert not logits.accurate(20.0)  # a scale of the logits scales their error


def test_a_part_of_the_rows_is_as_in_the_whole():
    hidden, weight = rows_with_outliers(3)
    bias = torch.randn(HEAD, generator=torch.Generator().manual_seed(1)).bfloat16()
    logits = rough(hidden, weight, bias)
    whole = logits.of(slice(0, ROWS))
    assert torch.equal(whole[40:90], logits.of(slice(40, 90)))
    without = rough(hidden, weight).of(slice(0, ROWS))
    expected = without.float() + bias.float()
    rounded = 2.0**-7 * float(without.abs().max())  # sums to bf16, without kernels after each part
    assert rounded < 0.3 and ((whole.float() - expected).abs() <= rounded).all()


def test_no_number_stays_no_number():
    hidden, weight = rows_with_outliers(1)
    hidden[3, 5] = float("nan")
    logits = rough(hidden, weight).of(slice(None))
    assert logits[3].isnan().all() and logits[:3].isfinite().all() and logits[4:].isfinite().all()


@compiled_only
def test_a_head_takes_them_where_they_are_accurate(monkeypatch):
    """The loss and the gradient are the exact ones, about; where columns are too large the head's own logits
    are computed, to the bit."""
    made, own_of = [], RoughLogits.of
    monkeypatch.setattr(RoughLogits, "of", lambda self, part: made.append(part) or own_of(self, part))
    for count, taken in ((APART, True), (3 * APART, False)):
        hidden, weight = rows_with_outliers(count)
        hidden = (hidden.float() / 3).bfloat16().requires_grad_()
        if not taken:
            hidden = (hidden.detach() * 6).requires_grad_()
        targets = torch.arange(ROWS) * 31 % HEAD
        made.clear()
        values = frozen_head_log_probs(hidden, targets, weight, rough=RoughHead.of(weight))
        values.sum().backward()
        assert bool(made) == taken
        own = hidden.detach().clone().requires_grad_()
        expected = frozen_head_log_probs(own, targets, weight)
        expected.sum().backward()
        if taken:
            wide = hidden.detach().double().requires_grad_()
            exact = (wide @ weight.double().T).log_softmax(-1)[torch.arange(ROWS), targets]
            exact.sum().backward()
            torch.testing.assert_close(values.detach().double(), exact.detach(), rtol=2e-3, atol=0.01)
            assert (hidden.grad.double() - wide.grad).norm() < 0.03 * wide.grad.norm()
            assert not torch.equal(values, expected)
        else:
            assert torch.equal(values, expected)
            assert torch.equal(hidden.grad, own.grad)
        with torch.no_grad():
            again = frozen_head_log_probs(hidden, targets, weight, rough=RoughHead.of(weight))
        assert torch.equal(again, values.detach())


@compiled_only
def test_few_rows_of_a_bf16_head_are_not_rounded(monkeypatch):
    monkeypatch.setattr(causal_objective, "RoughLogits", mock.Mock(side_effect=AssertionError("few rows were rounded")))
    hidden, weight = rows_with_outliers(1, rows=causal_objective.ROWS_FOR_APART - 1)
    frozen_head_log_probs(hidden, torch.arange(len(hidden)), weight, rough=RoughHead.of(weight))


@pytest.mark.parametrize(("classes", "served"), [(CLASSES + 4, True), (CLASSES + 1, False)])
def test_a_head_that_the_int8_kernel_does_not_serve_is_not_rounded(classes, served):
    head = torch.nn.Linear(8, classes, bias=False, dtype=torch.bfloat16)
    assert causal_objective._may_round(head) == served
