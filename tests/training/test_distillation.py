"""Divergences from a teacher compared with float64 definitions and with TRL's code, and computed in chunks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deltaw.tasks.distill.loss import divergence
from deltaw.tasks.distill.settings import DistillSettings
from deltaw.training.losses import with_remainder

BETAS = (0.0, 0.1, 0.5, 1.0)


def reference_divergence(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Return β KL(t ‖ m) + (1−β) KL(s ‖ m), or KL(t ‖ s) for β = 0 and KL(s ‖ t) for β = 1."""
    s = student.softmax(-1)
    t = teacher.softmax(-1)
    if beta == 0:
        return (t * (t / s).log()).sum(-1)
    if beta == 1:
        return (s * (s / t).log()).sum(-1)
    m = beta * t + (1 - beta) * s
    return beta * (t * (t / m).log()).sum(-1) + (1 - beta) * (s * (s / m).log()).sum(-1)


def random_logits(dtype: torch.dtype, count: int = 7, classes: int = 23) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    student, teacher = (3 * torch.randn(count, classes, generator=generator, dtype=torch.float64) for _ in range(2))
    return student.to(dtype).requires_grad_(), teacher.to(dtype)


@pytest.mark.parametrize("beta", BETAS)
def test_divergence_and_gradient_match_definition(beta):
    student, teacher = random_logits(torch.float64)
    ours = divergence(student.log_softmax(-1), teacher.log_softmax(-1), beta)
    theirs = reference_divergence(student, teacher, beta)
    assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-14) and ours.detach().min() > 0.01
    gradients = [torch.autograd.grad(values.sum(), student)[0] for values in (ours, theirs)]
    assert torch.allclose(*gradients, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("beta", BETAS)
def test_loss_and_gradient_match_trl(beta):
    trl = pytest.importorskip("trl.experimental.gkd.gkd_trainer", reason="TRL is not installed").GKDTrainer
    student, teacher = random_logits(torch.float32)
    labels = torch.tensor([[1, -100, 2, 3, -100, 4, 5]])
    is_label = labels[0] != -100
    options = {"beta": beta, "temperature": 1.7}
    theirs = trl.generalized_jsd_loss(student[None], teacher[None], labels, **options)
    logprobs = [(logits[is_label] / 1.7).log_softmax(-1) for logits in (student, teacher)]
    ours = divergence(*logprobs, beta).sum() / is_label.sum()
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(value, student)[0] for value in (ours, theirs)]
    assert torch.allclose(*gradients, rtol=1e-5, atol=1e-6)


def test_divergence_names_match_trl_betas():
    named = {name: DistillSettings(divergence=name).mixture_weight for name in ("forward", "reverse", "jsd")}
    assert named == {"forward": 0.0, "reverse": 1.0, "jsd": 0.5}
    assert DistillSettings(divergence="jsd", beta=0.1).mixture_weight == 0.1


def test_remaining_tokens_are_merged_into_one():
    student, teacher = random_logits(torch.float64)
    tokens = teacher.topk(5, -1).indices
    reduced = [with_remainder(logits.log_softmax(-1).gather(-1, tokens)) for logits in (student, teacher)]
    for logprobs, logits in zip(reduced, (student, teacher), strict=True):
        remainder = 1 - logits.softmax(-1).gather(-1, tokens).sum(-1)
        assert torch.allclose(logprobs.exp().sum(-1), torch.ones(7, dtype=torch.float64))
        assert torch.allclose(logprobs[:, -1].exp(), remainder)
    # Merging tokens can only reduce a divergence.
    full = divergence(student.log_softmax(-1), teacher.log_softmax(-1), 0.5)
    partial = divergence(*reduced, 0.5)
    assert (partial < full).all() and (partial > 0).all()
