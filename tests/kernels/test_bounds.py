"""Invalid inputs are rejected before anything is written, with and without the compiled kernels."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from torch import nn

from deltaw.kernels import head_gradient as head
from deltaw.kernels import linear as products
from deltaw.kernels import loader, quantize, rows
from deltaw.kernels.attention import attend, attend_backward
from deltaw.kernels.layout import Layout
from tests.kernels.conftest import compiled_only

VARIANTS = "none"

pytestmark = pytest.mark.usefixtures("kernels")


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target", [-1, 40, 2**40])
def test_out_of_range_target_raises(dtype, target):
    logits = torch.ones(3, 40, dtype=dtype)
    targets = torch.tensor([0, target, 39])
    with pytest.raises(IndexError, match=rf"^target {target} is out of bounds for 40 classes$"):
        rows.cross_entropy_(logits, targets, torch.ones(3), scale=1.0, softcap=0.0, grad=True)
    assert (logits == 1).all()


def cross_entropy(targets: torch.Tensor, weights: torch.Tensor) -> None:
    rows.cross_entropy_(ones(2, 8), targets, weights, scale=1.0, softcap=0.0, grad=True)


def class_gradient(targets: list[int], classes: int = 40) -> None:
    scales = quantize.row_scales(ones(40, 16))[:classes]
    head.class_gradient_(ones(2, 40), torch.tensor(targets), ones(40, 16), scales)


def head_gradient(target: int, groups: int) -> None:
    unlikely = ones(groups, 40)
    inputs = (ones(20, 40), INDICES[[0] * 20] + target, ones(20, 16), ones(40, 16), None)
    options = {"scale": 1.0, "softcap": 0.0, "slopes": ones(20, 16), "shares": torch.empty(20), "unlikely": unlikely}
    head.head_gradient_(*inputs, **options)


LAYOUT = Layout.of_lengths([3, 2], [-1, 0])


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, selected: list[int] | None = None) -> None:
    attend(query, key, value, LAYOUT, scaling=1.0, rows=selected and torch.tensor(selected))


def attention_backward() -> None:
    inputs = ones(5, 4, 8), ones(5, 2, 8), ones(5, 2, 8)
    out, saved = attend(*inputs, LAYOUT, scaling=1.0)
    attend_backward(out[:4], *inputs, out, saved, LAYOUT, scaling=1.0)


def norm(weight: torch.Tensor, stats: int = 3) -> None:
    layer = rows.Norm(weight)
    layer.backward(ones(3, 8), ones(3, 8), layer(ones(3, 8))[1][:stats])


INVALID_ROTARY_SHAPES = [((4, 6), (3, 6)), ((4, 6), (4, 4)), ((3, 6), (3, 6)), ((4, 10), (4, 10)), ((4, 5), (4, 5))]


def rotary(cosines: tuple[int, int], sines: tuple[int, int]) -> None:
    rows.rotate(ones(4, 2, 8), torch.ones(cosines), torch.ones(sines))


K = ones(5, 2, 8)
INDICES = torch.zeros(2, dtype=torch.long)


MISMATCHED_ARGUMENTS = [
    (lambda: cross_entropy(INDICES.int(), torch.ones(2)), r"targets are torch\.int32, not torch\.int64"),
    (lambda: cross_entropy(INDICES[[0, 0, 0]], torch.ones(2)), r"the targets is \(3,\), not \(2,\)"),
    (lambda: cross_entropy(INDICES, torch.ones(1)), r"the weights is \(1,\), not \(2,\)"),
    (lambda: class_gradient([1, 40]), "^target 40 is out of bounds for 40 classes$"),
    (lambda: class_gradient([1, 2], 39), "the weight's scales"),
    (lambda: head_gradient(40, head.num_groups(20)), "target 40"),
    (lambda: head_gradient(1, head.num_groups(20) - 1), "the sums of the unlikely classes"),
    (lambda: attention(ones(5, 4, 8), K[:4], K), "4 keys, but the layout has 5 tokens"),
    (lambda: attention(ones(3, 4, 8), K, K), "the queries"),
    (lambda: attention(ones(5, 4, 8), K, K[:4]), "the values"),
    (lambda: attention(ones(5, 4, 6), K, K), "the queries"),
    (lambda: attention(ones(5, 3, 8), K, K), "3 heads cannot share 2 key heads"),
    (lambda: attention(ones(2, 4, 8), K, K, [0, 5]), "selected position 5 is out of bounds for 5 tokens"),
    (lambda: attention(ones(2, 4, 8), K, K, [-1, 2]), "selected position -1 is out of bounds"),
    (lambda: attention(ones(2, 4, 8), K, K, [2, 1]), "must ascend"),
    (lambda: attention(ones(2, 4, 8), K, K, [2, 2]), "must ascend"),
    (attention_backward, "the gradient"),
    (lambda: norm(ones(7)), "the norm's weight"),
    (lambda: norm(ones(8), 2), "the norm's statistics"),
    (lambda: rows.activation(ones(3, 8), ones(3, 7), "silu"), "up is"),
    (lambda: rows.activation_backward(ones(2, 8), ones(3, 8), ones(3, 8), "silu"), "the gradient"),
    *(
        (functools.partial(rotary, *shapes), "cosines|sines|rotary dimensions must be even")
        for shapes in INVALID_ROTARY_SHAPES
    ),
]


@pytest.mark.parametrize(("call", "message"), MISMATCHED_ARGUMENTS)
def test_mismatched_arguments_raise(call, message):
    with pytest.raises((ValueError, TypeError, IndexError), match=message):
        call()


INVALID_PREFIX_TREES = [
    ([0, 3], [3, 5], [-1], "2 starts and 1 parents"),
    ([0, 3], [3], [-1, 0], "2 starts and 1 stops"),
    ([], [], [], "without gaps"),
    ([1, 3], [3, 5], [-1, 0], "without gaps"),
    ([0, 4], [3, 5], [-1, 0], "without gaps"),
    ([0, 2], [3, 5], [-1, 0], "without gaps"),
    ([0, 3], [3, 2], [-1, 0], "end before it starts"),
    ([0, 3], [3, 5], [1, -1], "must precede"),
    ([0, 3], [3, 5], [-1, 1], "must precede"),
    ([0, 3], [3, 5], [-1, -2], "-1 for none"),
    ([0.0], [3], [-1], "starts must be a one-dimensional integer array"),
    ([0], [3], [[-1]], "parents must be a one-dimensional integer array"),
]


@pytest.mark.parametrize(("starts", "stops", "parents", "message"), INVALID_PREFIX_TREES)
def test_invalid_prefix_tree_raises(starts, stops, parents, message):
    with pytest.raises(ValueError, match=message):
        Layout(*(np.array(table, dtype=None if table else np.int64) for table in (starts, stops, parents)))


SHAPES = {"x": (5, 8), "added": (5, 12), "weight": (12, 8), "bias": (12,), "lora_A": (8, 2), "lora_B": (2, 12)}
WRONG_SHAPES = [("x", 5, 12), ("weight", 12, 12), ("bias", 8), ("lora_A", 12, 2), ("lora_B", 4, 12), ("lora_B", 2, 8)]


def multiply(shapes: dict[str, tuple[int, ...]]) -> None:
    tensors = {name: ones(*shape).float() if "lora" in name else ones(*shape) for name, shape in shapes.items()}
    x = tensors.pop("x")
    added = tensors.pop("added")
    products.linear(x, products.LinearProduct(**tensors), added)


@pytest.mark.parametrize("bad_shape", [*WRONG_SHAPES, ("added", 4, 12)])
def test_product_with_mismatched_shapes_raises(bad_shape):
    multiply(SHAPES)
    with pytest.raises(ValueError, match="is \\("):
        multiply({**SHAPES, bad_shape[0]: bad_shape[1:]})


def test_int8_product_with_mismatched_scales_raises():
    x = ones(5, 8)
    grad = ones(5, 12)
    weight, scale = quantize.quantize_rows(ones(12, 8))
    x_int8, x_scales = quantize.quantize_activations(x, None)
    product = products.LinearProduct(weight, scale=scale)
    without_lora_a = products.LinearProduct(ones(12, 8), lora_B=torch.ones(2, 12))
    bad_shape = [{"scale": scale[:8]}, {"smooth_scales": torch.ones(12)}]
    forward = [(product._replace(**m), x_int8, x_scales, "scales") for m in (*bad_shape, {"in_blocks": True})]
    forward += [(product, x_int8[:4], x_scales, "int8"), (product, x_int8, x_scales[:4], "int8")]
    for modified, int8, scales, message in forward:
        with pytest.raises(ValueError, match=message):
            products.linear(x, modified, None, int8, scales)
    backward = [(product._replace(**modified), None, "scales") for modified in bad_shape]
    for modified, added, message in (*backward, (product, grad, "addend"), (without_lora_a, None, "given together")):
        with pytest.raises(ValueError, match=message):
            products.linear_backward(grad, modified, added)
    with pytest.raises(ValueError, match="scales"):
        quantize.quantize_activations(x, torch.ones(5))


@pytest.mark.parametrize("token", [-1, 7, 2**40])
def test_out_of_range_token_id_raises_with_and_without_virtual_tokens(token):
    """An embedding with 5 tokens and 2 virtual tokens raises the same error as a torch embedding with 7 tokens."""
    from deltaw.runtime import virtual_tokens

    model = nn.Module()
    messages = []
    model.embedding = nn.Embedding(5, 4)
    model.get_input_embeddings = lambda: model.embedding
    layer = virtual_tokens.attach(model, torch.zeros(2, 4))
    assert layer(torch.tensor([0, 4, 6])).shape == (3, 4)
    for embedding in (layer, nn.Embedding(7, 4)):
        with pytest.raises(IndexError) as error:
            embedding(torch.tensor([0, token]))
        messages.append(str(error.value))
    assert messages[0] == messages[1]


@compiled_only
def test_library_checks_indices_itself(monkeypatch):
    monkeypatch.undo()
    logits = torch.zeros(1, 8)
    targets = torch.tensor([8])
    with pytest.raises(IndexError, match="dw_cross_entropy received an index out of bounds"):
        pointers = [tensor.data_ptr() for tensor in (logits, targets, torch.ones(1))]
        loader.kernels().dw_cross_entropy(0, 1, 8, *pointers, 1.0, 0.0, 1, None)
    assert not logits.any()
