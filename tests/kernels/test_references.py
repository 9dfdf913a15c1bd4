"""The reference implementations against torch's own functions in float64; on every machine."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from deltaw.kernels import head_gradient as head
from deltaw.kernels import linear as products
from deltaw.kernels import quantize, rows
from tests.kernels.conftest import off
from tests.kernels.test_linear import adapted, inputs, numbers, slopes_of_classes

VARIANTS = "none"


def same(ours: list[torch.Tensor], exact: list[torch.Tensor]) -> None:
    torch.testing.assert_close(ours, [tensor.detach() for tensor in exact], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("centered", [True, False])
def test_a_norm(centered):
    x, weight, bias, grad = numbers(7, 12), numbers(12, seed=1), numbers(12, seed=2), numbers(7, 12, seed=3)
    leaf = x.clone().requires_grad_()
    of_weight = (leaf, (12,), weight + 1)
    exact = F.layer_norm(*of_weight, bias, 1e-3) if centered else F.rms_norm(*of_weight, 1e-3) + bias
    y, stats = rows.norm_reference(x, weight, bias, offset=1.0, eps=1e-3, centered=centered)
    exact.backward(grad)
    dx = rows.norm_backward_reference(grad, x, weight, stats, offset=1.0, centered=centered, added=x)
    same([y, dx], [exact, leaf.grad + x])


@pytest.mark.parametrize("kind", rows.ACTIVATIONS)
def test_an_activation(kind):
    gate, up, grad = (3 * numbers(5, 9, seed=s) for s in range(3))
    leaves = [t.clone().requires_grad_() for t in (gate, up)]
    own = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}
    exact = own[kind](leaves[0]) * leaves[1]
    exact.backward(grad)
    found = [rows.activation_reference(gate, up, kind), *rows.activation_backward_reference(grad, gate, up, kind)]
    same(found, [exact, leaves[0].grad, leaves[1].grad, exact])


def test_rotary_positions_turn_pairs_of_numbers():
    """Pairs (i, i + half) as complex numbers, multiplied by one of length 1; gradients by its conjugate."""
    angles = numbers(6, 4)
    x, grad = numbers(6, 2, 10), numbers(6, 2, 10, seed=1)
    cosine, sine = (t.repeat(1, 2) for t in (angles.cos(), angles.sin()))

    def turned(values: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        pairs = torch.complex(values[..., :4], values[..., 4:8]) * by[:, None]
        return torch.cat([pairs.real, pairs.imag, values[..., 8:]], -1)

    unit = torch.polar(torch.ones_like(angles), angles)
    found = [rows.rotate_reference(x, cosine, sine), rows.rotate_reference(grad, cosine, sine, backward=True)]
    same(found, [turned(x, unit), turned(grad, unit.conj())])


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_cross_entropy(softcap):
    logits, targets, weights = (4 * numbers(5, 11), torch.tensor([0, 10, 3, 3, 7]), torch.rand(5, dtype=torch.float64))
    leaf = logits.clone().requires_grad_()
    z = leaf * 0.5 if softcap == 0 else softcap * torch.tanh(leaf * 0.5 / softcap)
    exact = torch.logsumexp(z, -1) - z.gather(1, targets[:, None])[:, 0]
    (exact * weights).sum().backward()
    losses = rows.cross_entropy_reference_(logits, targets, weights, scale=0.5, softcap=softcap, grad=True)
    same([losses, logits], [exact, leaf.grad])


def test_a_product_with_its_update_and_its_gradients():
    t = inputs(6, 10, 8, 3, torch.float64)
    leaves = [t[name].double().requires_grad_() for name in ("x", "lora_A", "lora_B")]
    of = adapted({name: tensor.double() for name, tensor in t.items()})
    exact = F.linear(leaves[0], t["weight"] + 0.5 * (leaves[1] @ leaves[2]).t(), t["bias"])
    exact.backward(t["grad"])
    y, h = products.linear_reference(t["x"], of)
    dx, narrow = products.linear_backward_reference(t["grad"], of)
    factors = products.factors_backward_reference(t["x"], h, t["grad"], narrow, 0.5)
    same([y, dx, *factors], [exact, *(leaf.grad for leaf in leaves)])


def test_int8_products_are_near_the_exact_ones():
    x, weight = numbers(20, 64), numbers(30, 64, seed=1)
    int8, scale = quantize.quantized_rows(weight.float())
    assert int8.dtype == torch.int8 and (int8.double() * scale[:, None] - weight).abs().max() <= 0.51 * scale.max()
    y, _ = products.linear_reference(x, products.Product(int8, scale=scale.double()))
    assert off(y, x @ weight.t()) < 0.02
    grad, targets = slopes_of_classes(20, 30, 3.0, 1)
    found = head.class_gradient_reference(grad, targets, weight, quantize.scales_of_rows(weight).double())
    assert off(found, grad @ weight) < 0.02
