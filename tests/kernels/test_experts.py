"""Tests of products grouped by expert against autograd in float64."""

from __future__ import annotations

import math

import pytest
import torch

from deltaw.kernels import experts as kernel
from deltaw.kernels.experts import ExpertActivation, ExpertProducts

FORMS = {
    "silu": ExpertActivation(),
    "gelu": ExpertActivation("gelu"),
    "inner layer": ExpertActivation("relu", gated=False),
    "clipped": ExpertActivation("silu", interleaved=True, limit=1.5, slope=1.702, offset=1.0),
}


def sample(form, tokens, by_column=True, bias=False, rank=0, *, experts=5, chosen=2, width=12, inner=8):
    """Return x, experts, router weights, and both products, in fp64."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def products(inputs, outputs):
        shape = (outputs, inputs) if by_column else (inputs, outputs)
        factors = (random(experts, inputs, rank), random(experts, rank, outputs)) if rank else (None, None)
        biases = random(experts, outputs) if bias else None
        return ExpertProducts(random(experts, *shape), by_column, biases, *factors, 0.5)

    index = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :chosen]
    weights = torch.rand(tokens, chosen, generator=generator, dtype=torch.float64)
    both = products(width, inner * (1 + form.gated)), products(inner, width)
    return random(tokens, width), index, weights, *both


def converted(value, dtype):
    if isinstance(value, ExpertProducts):
        return ExpertProducts._make(converted(t, dtype) for t in value)
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def gradients(arguments, form, grad):
    """Return the output and the gradients of x, the router weights and the factors from autograd."""
    x, index, weights, *both = arguments
    leaves = [x, weights, *(t for p in both for t in (p.lora_A, p.lora_B) if t is not None)]
    for leaf in leaves:
        leaf.requires_grad_()
    y = kernel.run_experts_reference(x, index, weights, *both, form)
    computed = torch.autograd.grad(y, leaves, grad)
    for leaf in leaves:
        leaf.requires_grad_(False)
    return [y.detach(), *computed]


def closed_form(arguments, form, grad, dtype):
    """Return the same from the operators in ``dtype``. Factors stay in fp32."""
    x, index, weights, *both = (converted(argument, dtype) for argument in arguments)
    if dtype == torch.bfloat16:
        both = [p._replace(**{n: converted(getattr(p, n), torch.float32) for n in ("lora_A", "lora_B")}) for p in both]
    y, *saved = kernel.run_experts(x, index, weights, *both, form)
    grads = kernel.run_experts_backward(grad.to(dtype), x, index, weights, tuple(saved), *both, form)
    return [y, *(g for g in grads if g.numel())]


def assert_close(actual, expected, tolerance):
    assert len(actual) == len(expected)
    for left, right in zip(actual, expected, strict=True):
        assert left.shape == right.shape
        assert float((left.double() - right).norm()) <= tolerance * float(right.norm())


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize(("by_column", "bias"), [(True, False), (False, True)])
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 4e-2)]
)
def test_results_equal_autograd(form, by_column, bias, rank, dtype, tolerance):
    arguments = sample(form, 37, by_column, bias, rank)
    if dtype == torch.bfloat16:  # compare with the rounded weights, without the jump of the gradient at the limit
        form = form._replace(limit=math.inf)
        arguments = [converted(converted(argument, dtype), torch.float64) for argument in arguments]
    grad = torch.randn(37, 12, dtype=torch.float64)
    assert_close(closed_form(arguments, form, grad, dtype), gradients(arguments, form, grad), tolerance)


@pytest.mark.parametrize("tokens", [1, 2, 700])
def test_one_expert_for_all_tokens_and_experts_without_tokens(tokens, monkeypatch):
    monkeypatch.setattr(kernel, "MAX_ROWS", 64)
    form = FORMS["silu"]
    arguments = list(sample(form, tokens, rank=2))
    arguments[1] = torch.tensor([[1, 4]]).expand(tokens, 2)
    grad = torch.randn(tokens, 12, dtype=torch.float64)
    expected = gradients(arguments, form, grad)
    assert_close(closed_form(arguments, form, grad, torch.float32), expected, 1e-5)
    assert not expected[3][[0, 2, 3]].any()


def test_unneeded_gradients_are_empty():
    x, index, weights, *both = sample(FORMS["silu"], 9)
    _, *saved = kernel.run_experts(x, index, weights, *both, FORMS["silu"])
    grads = kernel.run_experts_backward(x, x, index, weights, tuple(saved), *both, FORMS["silu"], need_x=False)
    assert [g.numel() for g in grads] == [0, 18, 0, 0, 0, 0]


def test_wrong_shapes_are_rejected():
    x, index, weights, first, second = sample(FORMS["silu"], 9)
    with pytest.raises(ValueError, match="do not match"):
        kernel.run_experts(x, index, weights, second, first, FORMS["silu"])
    with pytest.raises(ValueError, match="router weights"):
        kernel.run_experts(x, index, weights[:3], first, second, FORMS["silu"])
