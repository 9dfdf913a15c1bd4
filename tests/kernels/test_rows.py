"""Tests of norms, activations, rotary positions and cross-entropy against float64 references."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st

from deltaw.kernels import rows
from tests.kernels.conftest import assert_close, compiled_only, examples
from tests.kernels.test_linear import DTYPES, numbers

pytestmark = compiled_only
shapes = st.tuples(st.integers(1, 40), st.integers(1, 100))


@examples(shapes, st.sampled_from(DTYPES), st.booleans(), st.sampled_from([0.0, 1.0]))
def test_norm_and_gradient_match_reference(shape, dtype, centered, offset):
    size = shape[1]
    x, grad, added = (numbers(*shape, seed=seed).to(dtype) for seed in range(3))
    weight = numbers(size).to(dtype)
    bias = numbers(size, seed=3).to(dtype) if centered else None
    options = {"offset": offset, "eps": 1e-2, "centered": centered}
    y, stats = rows.norm(x, weight, bias, **options)
    leaf = x.double().requires_grad_()
    exact, _ = rows.norm_reference(leaf, weight.double(), None if bias is None else bias.double(), **options)
    assert_close(y, exact.detach(), dtype)
    exact.backward(grad.double())
    dx = rows.norm_backward(grad, x, weight, stats, offset=offset, centered=centered, addend=added)
    assert_close(dx, leaf.grad + added.double(), dtype)


@examples(shapes, st.sampled_from(DTYPES), st.sampled_from(rows.ACTIVATIONS), st.booleans())
def test_activation_and_gradient_match_reference(shape, dtype, kind, gated):
    gate, up, grad = (3 * numbers(*shape, seed=s) for s in range(3))
    gate = gate.to(dtype)
    up = up.to(dtype) if gated else None
    grad = grad.to(dtype)
    leaves = [t.double().requires_grad_() for t in (gate, up) if t is not None]
    exact = rows.activation_reference(leaves[0], leaves[1] if gated else None, kind)
    assert_close(rows.activation(gate, up, kind), exact.detach(), dtype)
    exact.backward(grad.double())
    *slopes, y = rows.activation_backward(grad, gate, up, kind)
    assert_close(y, exact.detach(), dtype)
    for actual, leaf in zip(slopes[: len(leaves)], leaves, strict=True):
        assert_close(actual, leaf.grad, dtype)
    assert gated or slopes[1].numel() == 0


def gelu_tanh_argument(x):
    return 2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)


# f(x)/x in a numerically stable form, and the argument of its exponential.
SHARES = {"silu": (torch.sigmoid, lambda x: x)}
SHARES |= {"gelu_tanh": (lambda x: torch.sigmoid(gelu_tanh_argument(x)), gelu_tanh_argument)}
SHARES |= {"gelu": (lambda x: torch.special.erfc(-x / 2**0.5) / 2, lambda x: x**2 / 2)}


@pytest.mark.parametrize("kind", SHARES)
def test_activations_are_accurate_for_large_inputs(kind):
    share, argument = SHARES[kind]
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([1e-20, 30.0, 80.0])])[None]
    wide = x.double().requires_grad_()
    f = wide * share(wide)
    f.sum().backward()
    with torch.no_grad():
        # In the tail only the exponential is left. Its relative error is the rounding error times its argument.
        s = share(wide)
        exponential_error = 4 + argument(wide).abs()
        share_error = torch.where(wide < 0, exponential_error, 4)
        digits = 2 * torch.finfo(torch.float32).eps
        tiny = 1e-30  # smaller values may be subnormal
        value_error = digits * share_error * f.abs() + tiny
        slope_error = digits * (share_error * s + exponential_error * (wide.grad - s).abs()) + tiny
        d_gate, _, y = rows.activation_backward(torch.ones_like(x), x, None, kind)
        for actual in (y, rows.activation(x, None, kind)):
            assert ((actual - f).abs() <= value_error).all()
        assert ((d_gate - wide.grad).abs() <= slope_error).all()


def test_activations_approach_their_limits():
    x = torch.tensor([[-1e4, -200.0, -90.0, 90.0, 200.0, 1e4]])
    for kind in SHARES:
        torch.testing.assert_close(rows.activation(x, None, kind), x.clamp_min(0), rtol=1e-6, atol=1e-30)
    assert rows.activation(torch.tensor([[float("nan")]]), None, "silu").isnan().all()


@examples(
    st.integers(1, 20), st.integers(1, 4), st.integers(1, 20), st.integers(0, 5), st.sampled_from(DTYPES), count=15
)
def test_rotation_and_its_transpose_match_reference(count, heads, half, rest, dtype):
    x = numbers(count, heads, 2 * half + rest).to(dtype)
    cosine = numbers(count, 2 * half).float()
    sine = numbers(count, 2 * half, seed=1).float()
    leaf = x.double().requires_grad_()
    exact = rows.rotate_reference(leaf, cosine.double(), sine.double())
    assert_close(rows.rotate(x, cosine, sine), exact.detach(), dtype)
    grad = numbers(*x.shape, seed=2).to(dtype)
    exact.backward(grad.double())
    assert_close(rows.rotate(grad, cosine, sine, backward=True), leaf.grad, dtype)


@examples(st.integers(1, 12), st.integers(2, 90), st.sampled_from(DTYPES), st.sampled_from([(1.0, 0.0), (0.5, 3.0)]))
def test_cross_entropy_and_gradient_match_reference(count, classes, dtype, change):
    scale, softcap = change
    logits = (4 * numbers(count, classes)).to(dtype)
    targets = torch.arange(count) % classes
    weights = torch.rand(count, generator=torch.Generator().manual_seed(0))
    leaf = logits.double().requires_grad_()
    z = leaf * scale if softcap == 0 else softcap * torch.tanh(leaf * scale / softcap)
    exact = torch.nn.functional.cross_entropy(z, targets, reduction="none")
    (exact * weights.double()).sum().backward()
    result = logits.clone()
    losses = rows.cross_entropy_(result, targets, weights, scale=scale, softcap=softcap, grad=False)
    # log Σ exp is rounded as a number of at least 1, but the loss of a nearly certain target is much smaller.
    assert_close(losses + 1, exact.detach() + 1, torch.bfloat16 if softcap else torch.float32)
    assert torch.equal(result, logits)
    rows.cross_entropy_(result, targets, weights, scale=scale, softcap=softcap, grad=True)
    assert_close(result, leaf.grad, dtype if dtype == torch.bfloat16 else torch.bfloat16)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_values_propagate(bad):
    x = torch.ones(2, 32)
    targets = torch.zeros(2, dtype=torch.long)
    x[1, 5] = bad
    assert not rows.norm(x, None, None, offset=0.0, eps=1e-6, centered=False)[0][1].isfinite().all()
    losses = rows.cross_entropy_(x.clone(), targets, torch.ones(2), scale=1.0, softcap=0.0, grad=False)
    assert losses[0].isfinite() and not losses[1].isfinite()
