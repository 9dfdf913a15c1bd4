"""The reference implementations against torch's own functions in float64; on every machine."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from deltaw.kernels import head_gradient as head
from deltaw.kernels import linear as products
from deltaw.kernels import quantize, rows
from tests.kernels.test_linear import numbers

VARIANTS = "none"


def same(ours: torch.Tensor, exact: torch.Tensor) -> None:
    torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("centered", [True, False])
def test_a_norm(centered):
    x, weight, bias, grad = numbers(7, 12), numbers(12, seed=1), numbers(12, seed=2), numbers(7, 12, seed=3)
    leaf = x.clone().requires_grad_()
    if centered:
        exact = F.layer_norm(leaf, (12,), weight + 1, bias, 1e-3)
    else:
        exact = F.rms_norm(leaf, (12,), weight + 1, 1e-3) + bias
    y, stats = rows.norm_reference(x, weight, bias, offset=1.0, eps=1e-3, centered=centered)
    same(y, exact.detach())
    exact.backward(grad)
    dx = rows.norm_backward_reference(grad, x, weight, stats, offset=1.0, centered=centered, added=x)
    same(dx, leaf.grad + x)


@pytest.mark.parametrize("kind", rows.ACTIVATIONS)
def test_an_activation(kind):
    gate, up, grad = (3 * numbers(5, 9, seed=s) for s in range(3))
    leaves = [t.clone().requires_grad_() for t in (gate, up)]
    own = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}
    exact = own[kind](leaves[0]) * leaves[1]
    same(rows.activation_reference(gate, up, kind), exact.detach())
    exact.backward(grad)
    d_gate, d_up, y = rows.activation_backward_reference(grad, gate, up, kind)
    for found, expected in ((d_gate, leaves[0].grad), (d_up, leaves[1].grad), (y, exact.detach())):
        same(found, expected)


def test_rotary_positions_turn_pairs_of_numbers():
    """Pairs (i, i + half) as complex numbers, multiplied by one of length 1; gradients by its conjugate."""
    angles = numbers(6, 4)
    x, grad = numbers(6, 2, 10), numbers(6, 2, 10, seed=1)
    cosine, sine = (t.repeat(1, 2) for t in (angles.cos(), angles.sin()))

    def turned(values: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        pairs = torch.complex(values[..., :4], values[..., 4:8]) * by[:, None]
        return torch.cat([pairs.real, pairs.imag, values[..., 8:]], -1)

    unit = torch.polar(torch.ones_like(angles), angles)
    same(rows.rotate_reference(x, cosine, sine), turned(x, unit))
    same(rows.rotate_reference(grad, cosine, sine, backward=True), turned(grad, unit.conj()))


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_cross_entropy(softcap):
    logits, targets, weights = (4 * numbers(5, 11), torch.tensor([0, 10, 3, 3, 7]), torch.rand(5, dtype=torch.float64))
    leaf = logits.clone().requires_grad_()
    z = leaf * 0.5 if softcap == 0 else softcap * torch.tanh(leaf * 0.5 / softcap)
    exact = torch.logsumexp(z, -1) - z.gather(1, targets[:, None])[:, 0]
    (exact * weights).sum().backward()
    ours = logits.clone()
    same(rows.cross_entropy_reference_(ours, targets, weights, scale=0.5, softcap=softcap, grad=True), exact.detach())
    same(ours, leaf.grad)


def test_a_product_with_its_update_and_its_gradients():
    x, weight, bias = numbers(6, 10), numbers(8, 10, seed=1), numbers(8, seed=2)
    lora_A, lora_B, grad = numbers(10, 3, seed=3), numbers(3, 8, seed=4), numbers(6, 8, seed=5)
    of = products.Product(weight, bias=bias, lora_A=lora_A, lora_B=lora_B, scaling=2.0)
    leaves = [t.clone().requires_grad_() for t in (x, lora_A, lora_B)]
    exact = F.linear(leaves[0], weight + 2.0 * (leaves[1] @ leaves[2]).t(), bias)
    y, h = products.linear_reference(x, of)
    same(y, exact.detach())
    exact.backward(grad)
    dx, narrow = products.linear_backward_reference(grad, of)
    same(dx, leaves[0].grad)
    of_A, of_B = products.factors_backward_reference(x, h, grad, narrow, 2.0)
    same(of_A, leaves[1].grad)
    same(of_B, leaves[2].grad)


def test_int8_products_are_near_the_exact_ones():
    x, weight = numbers(20, 64), numbers(30, 64, seed=1)
    int8, scale = quantize.quantized_rows(weight.float())
    assert int8.dtype == torch.int8 and (int8.double() * scale[:, None] - weight).abs().max() <= 0.51 * scale.max()
    y, _ = products.linear_reference(x, products.Product(int8, scale=scale.double()))
    exact = x @ weight.t()
    assert (y - exact).norm() < 0.02 * exact.norm()
    grad = torch.softmax(3 * numbers(20, 30, seed=2), -1)
    targets = torch.arange(20)
    grad[targets, targets] -= 1
    found = head.class_gradient_reference(grad, targets, weight, quantize.scales_of_rows(weight).double())
    assert (found - grad @ weight).norm() < 0.02 * (grad @ weight).norm()
