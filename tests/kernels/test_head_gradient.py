"""Tests of the loss and gradient of a language-model head against the float64 softmax over all classes."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from deltaw.kernels import head_gradient as heads
from deltaw.kernels import loader
from deltaw.kernels.quantize import row_scales
from deltaw.training import causal_objective
from deltaw.training.causal_objective import frozen_head_log_probs
from tests.kernels.conftest import assert_close, compiled_only, examples, same_bits
from tests.kernels.test_linear import numbers

VARIANTS = "all"


@pytest.fixture(autouse=True)
def with_summed_classes(arithmetic):
    """Enable summed classes, as in a run that verified the approximation."""
    with loader.temporary_arithmetic(arithmetic.with_approximations(["summed_classes"])):
        yield


@dataclass
class Head:
    """A head and hidden states in which neighboring rows are correlated, as in text."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    scale: float = 1.0
    softcap: float = 0.0

    @classmethod
    def of(cls, rows: int, classes: int, width: int, *, spread: float = 3.0, biased: bool = False, **change):
        hidden = numbers(rows, width)
        weight = numbers(classes, width, seed=1) * spread / width**0.5
        for row in range(1, rows):
            hidden[row] = 0.8 * hidden[row - 1] + 0.6 * hidden[row]
        bias = numbers(classes, seed=2).bfloat16() if biased else None
        return cls(hidden.bfloat16(), weight.bfloat16(), bias, torch.arange(rows) * 7 % classes, **change)

    def exact(self) -> tuple[Tensor, Tensor]:
        """Return the losses (M,) and ∂loss/∂hidden (M, d) in float64."""
        hidden = self.hidden.double().requires_grad_()
        z = self.scale * self.logits(hidden)
        if self.softcap:
            z = self.softcap * torch.tanh(z / self.softcap)
        losses = torch.nn.functional.cross_entropy(z, self.targets, reduction="none")
        (slopes,) = torch.autograd.grad(losses.sum(), hidden)
        return losses.detach(), slopes

    def logits(self, hidden: Tensor | None = None) -> Tensor:
        logits = (self.hidden.double() if hidden is None else hidden) @ self.weight.double().T
        return logits if self.bias is None else logits + self.bias.double()

    def losses_and_gradients(self, logits: Tensor, function=heads.head_gradient_) -> tuple[Tensor, Tensor]:
        """Return the losses and the complete hidden gradients computed by ``function``."""
        rows = len(self.hidden)
        dtype = logits.dtype
        slopes = torch.empty_like(self.hidden, dtype=dtype)
        unlikely = logits.new_empty(heads.num_groups(rows), logits.shape[1])
        shares = torch.empty(rows, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        bias = None if self.bias is None else self.bias.to(dtype)
        losses = function(
            logits, self.targets, self.hidden.to(dtype), self.weight.to(dtype), bias,
            scale=self.scale, softcap=self.softcap, slopes=slopes, shares=shares, unlikely=unlikely,
        )  # fmt: skip
        rest = (unlikely.double() @ self.weight.double()).repeat_interleave(heads.ROWS_PER_GROUP, 0)[:rows]
        return losses.double(), slopes.double() + shares.double()[:, None] * rest


def sums(rows: Tensor) -> Tensor:
    """Sum over the rows of each group."""
    return torch.stack([part.sum(0) for part in rows.split(heads.ROWS_PER_GROUP)])


CHANGES = st.sampled_from([{}, {"scale": 0.5, "biased": True}, {"softcap": 8.0}, {"scale": 2.0, "softcap": 15.0}])


@compiled_only
@examples(st.integers(1, 40), st.integers(1, 2500), st.integers(1, 50), CHANGES)
def test_head_gradient_matches_reference(rows, classes, pairs, change):
    head = Head.of(rows, classes, 2 * pairs, **change)
    logits = head.logits().bfloat16()
    losses, slopes = head.losses_and_gradients(logits.clone())
    expected, expected_slopes = head.losses_and_gradients(logits.double(), heads.head_gradient_reference_)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)
    # Both results are rounded, and a class at the threshold may be likely in one of them only.
    min_error = 2e-6 * rows**0.5 * head.weight.double().norm(dim=1).max()  # fp32 rounding error of p - 1 = 0
    assert (slopes - expected_slopes).norm() <= 0.012 * expected_slopes.norm() + min_error


@pytest.mark.parametrize("change", [{}, {"scale": 0.5, "biased": True}, {"softcap": 8.0}])
def test_reference_is_exact_if_all_classes_are_likely(change):
    head = Head.of(37, 60, 12, spread=0.5, **change)
    torch.testing.assert_close(head.losses_and_gradients(head.logits(), heads.head_gradient_reference_), head.exact())


@pytest.mark.each_value
@compiled_only
@pytest.mark.parametrize("change", [{}, {"biased": True}, {"softcap": 12.0}])
def test_head_gradient_is_close_and_its_group_sum_is_closer(change):
    """Results are bit-identical on one and two threads."""
    head = Head.of(100, 9000, 64, **change)
    results = []
    for count in (1, 2, 2):
        torch.set_num_threads(count)
        results.append(head.losses_and_gradients(head.logits().bfloat16()))
    assert same_bits(*results)
    losses, slopes = results[0]
    expected, exact = head.exact()
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)
    assert (slopes - exact).norm() < 0.03 * exact.norm()
    assert (sums(slopes) - sums(exact)).norm() < 0.006 * sums(exact).norm()


@compiled_only
def test_logit_errors_affect_only_unlikely_classes():
    head = Head.of(64, 20000, 128)
    expected, exact = head.exact()
    rough = (head.logits() + 0.15 * numbers(64, 20000, seed=5)).bfloat16()
    losses, slopes = head.losses_and_gradients(rough.clone())
    plain = torch.nn.functional.cross_entropy(rough.double(), head.targets, reduction="none")
    assert (losses - expected).norm() < 0.2 * (plain - expected).norm()
    p = rough.double().softmax(-1)
    p[torch.arange(64), head.targets] -= 1
    assert (slopes - exact).norm() < 0.5 * (p @ head.weight.double() - exact).norm()


@compiled_only
def test_rows_confident_in_wrong_and_in_target_class():
    head = Head.of(2, 9000, 64, spread=1.0)
    head.hidden[0] = head.weight[5].sign() * 3
    head.hidden[1] = head.weight[int(head.targets[1])].sign() * 30
    losses, slopes = head.losses_and_gradients(head.logits().bfloat16())
    expected, exact = head.exact()
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)
    assert_close(slopes[0], exact[0], torch.bfloat16)
    # If one probability is close to 1, fp32 has few significant digits for the others.
    assert (slopes[1] - exact[1]).norm() < 1e-5


@pytest.mark.each_pair
@compiled_only
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(("rows", "chunk_rows"), [(1, 192), (50, 16), (330, 20), (330, 100)])
def test_frozen_head_is_computed_in_chunks(rows, chunk_rows, int8, monkeypatch):
    monkeypatch.setattr(causal_objective, "FROZEN_CHUNK_ROWS", chunk_rows)
    monkeypatch.setitem(causal_objective.FROZEN_CHUNK_BYTES, "cpu", 0)
    calls = []
    original = causal_objective.head_gradient_

    def counted(logits, *args, **kwargs):
        calls.append(len(logits))
        return original(logits, *args, **kwargs)

    monkeypatch.setattr(causal_objective, "head_gradient_", counted)
    head = Head.of(rows, 8500, 64)
    hidden = head.hidden.requires_grad_()
    weights = torch.rand(rows) + 0.1
    options = {"scales": row_scales(head.weight) if int8 else None}
    values = frozen_head_log_probs(hidden, head.targets, head.weight, **options)
    (values * weights).sum().backward()
    expected, exact = head.exact()
    exact = -exact * weights.double()[:, None]
    assert sum(calls) == rows and max(calls) < chunk_rows + heads.ROWS_PER_GROUP
    torch.testing.assert_close(values.detach().double(), -expected, rtol=2e-3, atol=2e-3)
    assert (hidden.grad.double() - exact).norm() < 0.03 * exact.norm()
    with torch.no_grad():  # values are equal without a gradient
        assert torch.equal(frozen_head_log_probs(head.hidden, head.targets, head.weight, **options), values.detach())


@compiled_only
@pytest.mark.parametrize(("classes", "exact"), [(heads.MIN_CLASSES - 1, False), (heads.MIN_CLASSES, True)])
def test_small_heads_and_exact_runs_do_not_sum_classes(classes, exact, monkeypatch, arithmetic):
    monkeypatch.setattr(causal_objective, "head_gradient_", None)  # the function that sums classes
    head = Head.of(5, classes, 16)
    with loader.temporary_arithmetic(arithmetic.with_approximations(() if exact else ["summed_classes"])):
        frozen_head_log_probs(head.hidden.requires_grad_(), head.targets, head.weight).sum().backward()


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_fp32_hidden_states_are_multiplied_in_fp32(softcap, monkeypatch):
    monkeypatch.setattr(causal_objective, "WIDENED_ROWS", 1000)
    head = Head.of(50, 8500, 64, biased=True, softcap=softcap, scale=0.5)
    hidden = head.hidden.float().requires_grad_()
    values = frozen_head_log_probs(hidden, head.targets, head.weight, head.bias, 0.5, softcap)
    values.sum().backward()
    for actual, exact in zip((values, hidden.grad), head.exact(), strict=True):
        assert_close(actual, -exact, torch.float32)
