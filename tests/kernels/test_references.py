"""Tests of the reference implementations against torch functions in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from deltaw.kernels import head_gradient as head
from deltaw.kernels import linear as products
from deltaw.kernels import quantize, rows
from tests.kernels.conftest import relative_error
from tests.kernels.test_linear import adapted, class_gradients, inputs, numbers

VARIANTS = "none"


def assert_equal(ours: list[torch.Tensor], exact: list[torch.Tensor]) -> None:
    torch.testing.assert_close(ours, [tensor.detach() for tensor in exact], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("centered", [True, False])
def test_norm_matches_torch(centered):
    x = numbers(7, 12)
    weight = numbers(12, seed=1)
    bias = numbers(12, seed=2)
    grad = numbers(7, 12, seed=3)
    leaf = x.clone().requires_grad_()
    norm_args = (leaf, (12,), weight + 1)
    exact = F.layer_norm(*norm_args, bias, 1e-3) if centered else F.rms_norm(*norm_args, 1e-3) + bias
    y, stats = rows.norm_reference(x, weight, bias, offset=1.0, eps=1e-3, centered=centered)
    exact.backward(grad)
    dx = rows.norm_backward_reference(grad, x, weight, stats, offset=1.0, centered=centered, addend=x)
    assert_equal([y, dx], [exact, leaf.grad + x])


@pytest.mark.parametrize("kind", rows.ACTIVATIONS)
def test_activation_matches_torch(kind):
    gate, up, grad = (3 * numbers(5, 9, seed=s) for s in range(3))
    leaves = [t.clone().requires_grad_() for t in (gate, up)]
    functions = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}
    exact = functions[kind](leaves[0]) * leaves[1]
    exact.backward(grad)
    actual = [rows.activation_reference(gate, up, kind), *rows.activation_backward_reference(grad, gate, up, kind)]
    assert_equal(actual, [exact, leaves[0].grad, leaves[1].grad, exact])


def test_rotation_matches_complex_multiplication():
    """Pairs (i, i + half) are complex numbers multiplied by a unit number, and gradients are multiplied by its
    conjugate.
    """
    angles = numbers(6, 4)
    x = numbers(6, 2, 10)
    grad = numbers(6, 2, 10, seed=1)
    cosine, sine = (t.repeat(1, 2) for t in (angles.cos(), angles.sin()))

    def rotated(values: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        pairs = torch.complex(values[..., :4], values[..., 4:8]) * factor[:, None]
        return torch.cat([pairs.real, pairs.imag, values[..., 8:]], -1)

    unit = torch.polar(torch.ones_like(angles), angles)
    actual = [rows.rotate_reference(x, cosine, sine), rows.rotate_reference(grad, cosine, sine, backward=True)]
    assert_equal(actual, [rotated(x, unit), rotated(grad, unit.conj())])


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_cross_entropy_matches_torch(softcap):
    logits = 4 * numbers(5, 11)
    targets = torch.tensor([0, 10, 3, 3, 7])
    weights = torch.rand(5, dtype=torch.float64)
    leaf = logits.clone().requires_grad_()
    z = leaf * 0.5 if softcap == 0 else softcap * torch.tanh(leaf * 0.5 / softcap)
    exact = torch.logsumexp(z, -1) - z.gather(1, targets[:, None])[:, 0]
    (exact * weights).sum().backward()
    losses = rows.cross_entropy_reference_(logits, targets, weights, scale=0.5, softcap=softcap, grad=True)
    assert_equal([losses, logits], [exact, leaf.grad])


def test_product_with_update_matches_torch():
    t = inputs(6, 10, 8, 3, torch.float64)
    leaves = [t[name].double().requires_grad_() for name in ("x", "lora_A", "lora_B")]
    product = adapted({name: tensor.double() for name, tensor in t.items()})
    exact = F.linear(leaves[0], t["weight"] + 0.5 * (leaves[1] @ leaves[2]).t(), t["bias"])
    exact.backward(t["grad"])
    y, h = products.linear_reference(t["x"], product)
    dx, grad_h = products.linear_backward_reference(t["grad"], product)
    factors = products.factors_backward_reference(t["x"], h, t["grad"], grad_h, 0.5)
    assert_equal([y, dx, *factors], [exact, *(leaf.grad for leaf in leaves)])


def test_int8_products_are_close_to_exact():
    x = numbers(20, 64)
    weight = numbers(30, 64, seed=1)
    int8, scale = quantize.quantize_rows(weight.float())
    assert int8.dtype == torch.int8 and (int8.double() * scale[:, None] - weight).abs().max() <= 0.51 * scale.max()
    y, _ = products.linear_reference(x, products.LinearProduct(int8, scale=scale.double()))
    assert relative_error(y, x @ weight.t()) < 0.02
    grad, targets = class_gradients(20, 30, 3.0, 1)
    actual = head.class_gradient_reference(grad, targets, weight, quantize.row_scales(weight).double())
    assert relative_error(actual, grad @ weight) < 0.02
