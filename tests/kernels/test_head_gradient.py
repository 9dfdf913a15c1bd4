"""A head's loss and gradient by likely classes, against the soft-max over all classes in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from deltaw.kernels import head_gradient as heads
from deltaw.kernels import loader
from deltaw.kernels.quantize import scales_of_rows
from deltaw.training.tasks import causal_objective
from deltaw.training.tasks.causal_objective import frozen_head_log_probs
from tests.kernels.conftest import close, compiled_only, examples, same_bits
from tests.kernels.test_linear import numbers

VARIANTS = "all"


@pytest.fixture(autouse=True)
def summing(computing):
    """As in a run that verified sums over classes."""
    with loader.computing(computing.approximating(["summed_classes"])):
        yield


@dataclass
class Head:
    """Rows that resemble their neighbors, as those of a text do, and a head."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    scale: float = 1.0
    softcap: float = 0.0

    @classmethod
    def of(cls, rows: int, classes: int, width: int, *, spread: float = 3.0, biased: bool = False, **change):
        hidden, weight = numbers(rows, width), numbers(classes, width, seed=1) * spread / width**0.5
        for row in range(1, rows):
            hidden[row] = 0.8 * hidden[row - 1] + 0.6 * hidden[row]
        bias = numbers(classes, seed=2).bfloat16() if biased else None
        return cls(hidden.bfloat16(), weight.bfloat16(), bias, torch.arange(rows) * 7 % classes, **change)

    def exact(self) -> tuple[Tensor, Tensor]:
        """Losses (M) and ∂loss/∂hidden (M, d) in float64."""
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

    def found(self, logits: Tensor, function=heads.head_gradient_) -> tuple[Tensor, Tensor]:
        """What ``function`` makes of these, put together."""
        rows, dtype = len(self.hidden), logits.dtype
        slopes = torch.empty_like(self.hidden, dtype=dtype)
        unlikely = logits.new_empty(heads.groups(rows), logits.shape[1])
        shares = torch.empty(rows, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        bias = None if self.bias is None else self.bias.to(dtype)
        losses = function(
            logits, self.targets, self.hidden.to(dtype), self.weight.to(dtype), bias,
            scale=self.scale, softcap=self.softcap, slopes=slopes, shares=shares, unlikely=unlikely,
        )  # fmt: skip
        rest = (unlikely.double() @ self.weight.double()).repeat_interleave(heads.TOGETHER, 0)[:rows]
        return losses.double(), slopes.double() + shares.double()[:, None] * rest


def sums(rows: Tensor) -> Tensor:
    """Over the rows that are together."""
    return torch.stack([part.sum(0) for part in rows.split(heads.TOGETHER)])


CHANGES = st.sampled_from([{}, {"scale": 0.5, "biased": True}, {"softcap": 8.0}, {"scale": 2.0, "softcap": 15.0}])


@compiled_only
@examples(st.integers(1, 40), st.integers(1, 2500), st.integers(1, 50), CHANGES)
def test_it_equals_its_reference(rows, classes, pairs, change):
    head = Head.of(rows, classes, 2 * pairs, **change)
    given_logits = head.logits().bfloat16()
    losses, slopes = head.found(given_logits.clone())
    expected, expected_slopes = head.found(given_logits.double(), heads.head_gradient_reference_)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)
    # Rounded twice, and a class at the very limit may be likely in one and not in the other.
    least = 2e-6 * rows**0.5 * head.weight.double().norm(dim=1).max()  # what fp32 leaves of p - 1 = 0
    assert (slopes - expected_slopes).norm() <= 0.012 * expected_slopes.norm() + least


@pytest.mark.parametrize("change", [{}, {"scale": 0.5, "biased": True}, {"softcap": 8.0}])
def test_where_all_classes_are_likely_the_reference_is_exact(change):
    head = Head.of(37, 60, 12, spread=0.5, **change)
    torch.testing.assert_close(head.found(head.logits(), heads.head_gradient_reference_), head.exact())


@pytest.mark.each_value
@compiled_only
@pytest.mark.parametrize("change", [{}, {"biased": True}, {"softcap": 12.0}])
def test_it_is_near_the_exact_gradient_and_its_sum_is_nearer(change):
    """With the same bits on one thread and on two."""
    head, found = Head.of(100, 9000, 64, **change), []
    for count in (1, 2, 2):
        torch.set_num_threads(count)
        found.append(head.found(head.logits().bfloat16()))
    assert same_bits(*found)
    (losses, slopes), (expected, exact) = found[0], head.exact()
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)
    assert (slopes - exact).norm() < 0.03 * exact.norm()
    assert (sums(slopes) - sums(exact)).norm() < 0.006 * sums(exact).norm()


@compiled_only
def test_wrong_logits_count_only_where_they_hardly_matter():
    head = Head.of(64, 20000, 128)
    expected, exact = head.exact()
    rough = (head.logits() + 0.15 * numbers(64, 20000, seed=5)).bfloat16()
    losses, slopes = head.found(rough.clone())
    plain = torch.nn.functional.cross_entropy(rough.double(), head.targets, reduction="none")
    assert (losses - expected).norm() < 0.2 * (plain - expected).norm()
    p = rough.double().softmax(-1)
    p[torch.arange(64), head.targets] -= 1
    assert (slopes - exact).norm() < 0.5 * (p @ head.weight.double() - exact).norm()


@compiled_only
def test_a_row_that_is_sure_of_another_class_and_one_that_is_sure_of_its_target():
    head = Head.of(2, 9000, 64, spread=1.0)
    head.hidden[0] = head.weight[5].sign() * 3
    head.hidden[1] = head.weight[int(head.targets[1])].sign() * 30
    losses, slopes = head.found(head.logits().bfloat16())
    expected, exact = head.exact()
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)
    close(slopes[0], exact[0], torch.bfloat16)
    # Beside a probability of nearly one fp32 keeps little of the others.
    assert (slopes[1] - exact[1]).norm() < 1e-5


@pytest.mark.each_pair
@compiled_only
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(("rows", "at_once"), [(1, 192), (50, 16), (330, 20), (330, 100)])
def test_a_models_head_takes_it_in_parts(rows, at_once, int8, monkeypatch):
    monkeypatch.setattr(causal_objective, "FROZEN_CHUNK_ROWS", at_once)
    monkeypatch.setattr(causal_objective, "FROZEN_CHUNK_BYTES", 0)
    calls, kept = [], causal_objective.head_gradient_

    def counted(logits, *rest, **parts):
        calls.append(len(logits))
        return kept(logits, *rest, **parts)

    monkeypatch.setattr(causal_objective, "head_gradient_", counted)
    head = Head.of(rows, 8500, 64)
    hidden, weights = head.hidden.requires_grad_(), torch.rand(rows) + 0.1
    how = {"scales": scales_of_rows(head.weight) if int8 else None}
    values = frozen_head_log_probs(hidden, head.targets, head.weight, **how)
    (values * weights).sum().backward()
    expected, exact = head.exact()
    exact = -exact * weights.double()[:, None]
    assert sum(calls) == rows and max(calls) < at_once + heads.TOGETHER
    torch.testing.assert_close(values.detach().double(), -expected, rtol=2e-3, atol=2e-3)
    assert (hidden.grad.double() - exact).norm() < 0.03 * exact.norm()
    with torch.no_grad():  # the same without a gradient
        assert torch.equal(frozen_head_log_probs(head.hidden, head.targets, head.weight, **how), values.detach())


@compiled_only
@pytest.mark.parametrize(("classes", "exact"), [(heads.CLASSES - 1, False), (heads.CLASSES, True)])
def test_few_classes_are_all_counted_and_so_are_all_in_exact_runs(classes, exact, monkeypatch, computing):
    monkeypatch.setattr(causal_objective, "head_gradient_", None)  # which splits the classes
    head = Head.of(5, classes, 16)
    with loader.computing(computing.approximating(() if exact else ["summed_classes"])):
        frozen_head_log_probs(head.hidden.requires_grad_(), head.targets, head.weight).sum().backward()


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_wider_hidden_vectors_are_multiplied_in_their_own_type(softcap, monkeypatch):
    monkeypatch.setattr(causal_objective, "WIDENED_ROWS", 1000)
    head = Head.of(50, 8500, 64, biased=True, softcap=softcap, scale=0.5)
    hidden = head.hidden.float().requires_grad_()
    values = frozen_head_log_probs(hidden, head.targets, head.weight, head.bias, 0.5, softcap)
    values.sum().backward()
    for found, exact in zip((values, hidden.grad), head.exact(), strict=True):
        close(found, -exact, torch.float32)
