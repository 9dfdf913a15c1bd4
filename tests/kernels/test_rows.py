"""Norms, activations, rotary positions and cross-entropy against references in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st

from deltaw.kernels import rows
from tests.kernels.conftest import close, compiled_only, examples
from tests.kernels.test_linear import DTYPES, numbers

pytestmark = compiled_only
shapes = st.tuples(st.integers(1, 40), st.integers(1, 100))


@examples(shapes, st.sampled_from(DTYPES), st.booleans(), st.sampled_from([0.0, 1.0]))
def test_a_norm_and_its_gradient(shape, dtype, centered, offset):
    size = shape[1]
    x, grad, added = (numbers(*shape, seed=seed).to(dtype) for seed in range(3))
    weight, bias = numbers(size).to(dtype), numbers(size, seed=3).to(dtype) if centered else None
    how = {"offset": offset, "eps": 1e-2, "centered": centered}
    y, stats = rows.norm(x, weight, bias, **how)
    leaf = x.double().requires_grad_()
    exact, _ = rows.norm_reference(leaf, weight.double(), None if bias is None else bias.double(), **how)
    close(y, exact.detach(), dtype)
    exact.backward(grad.double())
    dx = rows.norm_backward(grad, x, weight, stats, offset=offset, centered=centered, added=added)
    close(dx, leaf.grad + added.double(), dtype)


@examples(shapes, st.sampled_from(DTYPES), st.sampled_from(rows.ACTIVATIONS), st.booleans())
def test_an_activation_and_its_gradient(shape, dtype, kind, gated):
    gate, up, grad = (3 * numbers(*shape, seed=s) for s in range(3))
    gate, up, grad = gate.to(dtype), up.to(dtype) if gated else None, grad.to(dtype)
    leaves = [t.double().requires_grad_() for t in (gate, up) if t is not None]
    exact = rows.activation_reference(leaves[0], leaves[1] if gated else None, kind)
    close(rows.activation(gate, up, kind), exact.detach(), dtype)
    exact.backward(grad.double())
    *slopes, y = rows.activation_backward(grad, gate, up, kind)
    close(y, exact.detach(), dtype)
    for found, leaf in zip(slopes[: len(leaves)], leaves, strict=True):
        close(found, leaf.grad, dtype)
    assert gated or slopes[1].numel() == 0


def gelu_tanh_argument(x):
    return 2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)


# f(x)/x in a form that loses no digits, and the argument of its exponential.
SHARES = {
    "silu": (torch.sigmoid, lambda x: x),
    "gelu_tanh": (lambda x: torch.sigmoid(gelu_tanh_argument(x)), gelu_tanh_argument),
    "gelu": (lambda x: torch.special.erfc(-x / 2**0.5) / 2, lambda x: x**2 / 2),
}


@pytest.mark.parametrize("kind", SHARES)
def test_an_activation_loses_no_digits_far_out(kind):
    share, argument = SHARES[kind]
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([1e-20, 30.0, 80.0])])[None]
    wide = x.double().requires_grad_()
    f = wide * share(wide)
    f.sum().backward()
    with torch.no_grad():
        # An argument's rounding counts as often as it is large, where what is left is its exponential.
        s, of_exponential = share(wide), 4 + argument(wide).abs()
        of_share = torch.where(wide < 0, of_exponential, 4)
        digits, tiny = 2 * torch.finfo(torch.float32).eps, 1e-30  # below which numbers lose digits
        of_value = digits * of_share * f.abs() + tiny
        of_slope = digits * (of_share * s + of_exponential * (wide.grad - s).abs()) + tiny
        d_gate, _, y = rows.activation_backward(torch.ones_like(x), x, None, kind)
        for found in (y, rows.activation(x, None, kind)):
            assert ((found - f).abs() <= of_value).all()
        assert ((d_gate - wide.grad).abs() <= of_slope).all()


def test_activations_far_out_are_what_they_tend_to():
    x = torch.tensor([[-1e4, -200.0, -90.0, 90.0, 200.0, 1e4]])
    for kind in SHARES:
        torch.testing.assert_close(rows.activation(x, None, kind), x.clamp_min(0), rtol=1e-6, atol=1e-30)
    assert rows.activation(torch.tensor([[float("nan")]]), None, "silu").isnan().all()


@examples(
    st.integers(1, 20), st.integers(1, 4), st.integers(1, 20), st.integers(0, 5), st.sampled_from(DTYPES), count=15
)
def test_rotary_positions_and_their_transpose(count, heads, half, rest, dtype):
    x = numbers(count, heads, 2 * half + rest).to(dtype)
    cosine, sine = numbers(count, 2 * half).float(), numbers(count, 2 * half, seed=1).float()
    leaf = x.double().requires_grad_()
    exact = rows.rotate_reference(leaf, cosine.double(), sine.double())
    close(rows.rotate(x, cosine, sine), exact.detach(), dtype)
    grad = numbers(*x.shape, seed=2).to(dtype)
    exact.backward(grad.double())
    close(rows.rotate(grad, cosine, sine, backward=True), leaf.grad, dtype)


@examples(st.integers(1, 12), st.integers(2, 90), st.sampled_from(DTYPES), st.sampled_from([(1.0, 0.0), (0.5, 3.0)]))
def test_cross_entropy_and_its_gradient(count, classes, dtype, change):
    scale, softcap = change
    logits = (4 * numbers(count, classes)).to(dtype)
    targets = torch.arange(count) % classes
    weights = torch.rand(count, generator=torch.Generator().manual_seed(0))
    leaf = logits.double().requires_grad_()
    z = leaf * scale if softcap == 0 else softcap * torch.tanh(leaf * scale / softcap)
    exact = torch.nn.functional.cross_entropy(z, targets, reduction="none")
    (exact * weights.double()).sum().backward()
    kept = logits.clone()
    losses = rows.cross_entropy_(kept, targets, weights, scale=scale, softcap=softcap, grad=False)
    # log Σ exp is rounded as a number of at least 1, of which a nearly certain answer leaves little.
    close(losses + 1, exact.detach() + 1, torch.bfloat16 if softcap else torch.float32)
    assert torch.equal(kept, logits)
    rows.cross_entropy_(kept, targets, weights, scale=scale, softcap=softcap, grad=True)
    close(kept, leaf.grad, dtype if dtype == torch.bfloat16 else torch.bfloat16)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_seen(bad):
    x, targets = torch.ones(2, 32), torch.zeros(2, dtype=torch.long)
    x[1, 5] = bad
    assert not rows.norm(x, None, None, offset=0.0, eps=1e-6, centered=False)[0][1].isfinite().all()
    losses = rows.cross_entropy_(x.clone(), targets, torch.ones(2), scale=1.0, softcap=0.0, grad=False)
    assert losses[0].isfinite() and not losses[1].isfinite()
