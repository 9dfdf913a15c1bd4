"""What lies outside is refused before anything is written, the same with and without the extension."""

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
def test_a_target_outside_of_the_classes_is_refused(dtype, target):
    logits, targets = torch.ones(3, 40, dtype=dtype), torch.tensor([0, target, 39])
    with pytest.raises(IndexError, match=rf"^target {target} is out of bounds for 40 classes$"):
        rows.cross_entropy_(logits, targets, torch.ones(3), scale=1.0, softcap=0.0, grad=True)
    assert (logits == 1).all()


def cross_entropy(targets: torch.Tensor, weights: torch.Tensor) -> None:
    rows.cross_entropy_(ones(2, 8), targets, weights, scale=1.0, softcap=0.0, grad=True)


def class_gradient(targets: list[int], classes: int = 40) -> None:
    scales = quantize.scales_of_rows(ones(40, 16))[:classes]
    head.class_gradient_(ones(2, 40), torch.tensor(targets), ones(40, 16), scales)


def head_gradient(target: int, groups: int) -> None:
    unlikely, given = ones(groups, 40), (ones(20, 40), LONGS[[0] * 20] + target, ones(20, 16), ones(40, 16), None)
    how = {"scale": 1.0, "softcap": 0.0, "slopes": ones(20, 16), "shares": torch.empty(20), "unlikely": unlikely}
    head.head_gradient_(*given, **how)


LAYOUT = Layout.of_lengths([3, 2], [-1, 0])


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, picked: list[int] | None = None) -> None:
    attend(query, key, value, LAYOUT, scaling=1.0, picked=picked and torch.tensor(picked))


def attention_backward() -> None:
    inputs = ones(5, 4, 8), ones(5, 2, 8), ones(5, 2, 8)
    out, kept = attend(*inputs, LAYOUT, scaling=1.0)
    attend_backward(out[:4], *inputs, out, kept, LAYOUT, scaling=1.0)


def norm(weight: torch.Tensor, stats: int = 3) -> None:
    of = rows.Norm(weight)
    of.backward(ones(3, 8), ones(3, 8), of(ones(3, 8))[1][:stats])


TURNED = [((4, 6), (3, 6)), ((4, 6), (4, 4)), ((3, 6), (3, 6)), ((4, 10), (4, 10)), ((4, 5), (4, 5))]


def rotary(cosines: tuple[int, int], sines: tuple[int, int]) -> None:
    rows.rotate(ones(4, 2, 8), torch.ones(cosines), torch.ones(sines))


K, LONGS = ones(5, 2, 8), torch.zeros(2, dtype=torch.long)


@pytest.mark.parametrize(
    ("asked", "what"),
    [
        (lambda: cross_entropy(LONGS.int(), torch.ones(2)), r"targets are torch\.int32, not torch\.int64"),
        (lambda: cross_entropy(LONGS[[0, 0, 0]], torch.ones(2)), r"the targets is \(3,\), not \(2,\)"),
        (lambda: cross_entropy(LONGS, torch.ones(1)), r"the weights is \(1,\), not \(2,\)"),
        (lambda: class_gradient([1, 40]), "^target 40 is out of bounds for 40 classes$"),
        (lambda: class_gradient([1, 2], 39), "the weight's scales"),
        (lambda: head_gradient(40, head.groups(20)), "target 40"),
        (lambda: head_gradient(1, head.groups(20) - 1), "the sums of the unlikely classes"),
        (lambda: attention(ones(5, 4, 8), K[:4], K), "4 keys, and the layout has 5 tokens"),
        (lambda: attention(ones(3, 4, 8), K, K), "the queries"),
        (lambda: attention(ones(5, 4, 8), K, K[:4]), "the values"),
        (lambda: attention(ones(5, 4, 6), K, K), "the queries"),
        (lambda: attention(ones(5, 3, 8), K, K), "3 heads cannot share 2 key heads"),
        (lambda: attention(ones(2, 4, 8), K, K, [0, 5]), "picked place 5 is out of bounds for a row of 5 tokens"),
        (lambda: attention(ones(2, 4, 8), K, K, [-1, 2]), "picked place -1 is out of bounds"),
        (lambda: attention(ones(2, 4, 8), K, K, [2, 1]), "must ascend"),
        (lambda: attention(ones(2, 4, 8), K, K, [2, 2]), "must ascend"),
        (attention_backward, "the gradient"),
        (lambda: norm(ones(7)), "the norm's weight"),
        (lambda: norm(ones(8), 2), "the norm's statistics"),
        (lambda: rows.activation(ones(3, 8), ones(3, 7), "silu"), "up is"),
        (lambda: rows.activation_backward(ones(2, 8), ones(3, 8), ones(3, 8), "silu"), "the gradient"),
        *((functools.partial(rotary, *shapes), "cosines|sines|cannot be turned") for shapes in TURNED),
    ],
)
def test_what_does_not_fit_is_refused(asked, what):
    with pytest.raises((ValueError, TypeError, IndexError), match=what):
        asked()


@pytest.mark.parametrize(
    ("starts", "stops", "parents", "what"),
    [
        ([0, 3], [3, 5], [-1], "2 starts and 1 parents"),
        ([0, 3], [3], [-1, 0], "2 starts and 1 stops"),
        ([], [], [], "without gaps"),
        ([1, 3], [3, 5], [-1, 0], "without gaps"),
        ([0, 4], [3, 5], [-1, 0], "without gaps"),
        ([0, 2], [3, 5], [-1, 0], "without gaps"),
        ([0, 3], [3, 2], [-1, 0], "end before it starts"),
        ([0, 3], [3, 5], [1, -1], "must stand before"),
        ([0, 3], [3, 5], [-1, 1], "must stand before"),
        ([0, 3], [3, 5], [-1, -2], "-1 for none"),
        ([0.0], [3], [-1], "starts must be a list of whole numbers"),
        ([0], [3], [[-1]], "parents must be a list of whole numbers"),
    ],
)
def test_segments_that_are_no_prefix_tree_are_refused(starts, stops, parents, what):
    with pytest.raises(ValueError, match=what):
        Layout(*(np.array(table, dtype=None if table else np.int64) for table in (starts, stops, parents)))


SHAPES = {"x": (5, 8), "added": (5, 12), "weight": (12, 8), "bias": (12,), "lora_A": (8, 2), "lora_B": (2, 12)}
WRONG = [("x", 5, 12), ("weight", 12, 12), ("bias", 8), ("lora_A", 12, 2), ("lora_B", 4, 12), ("lora_B", 2, 8)]


def multiply(shapes: dict[str, tuple[int, ...]]) -> None:
    given = {name: ones(*shape).float() if "lora" in name else ones(*shape) for name, shape in shapes.items()}
    x, added = given.pop("x"), given.pop("added")
    products.linear(x, products.Product(**given), added)


@pytest.mark.parametrize("wrong", [*WRONG, ("added", 4, 12)])
def test_a_product_refuses_shapes_that_do_not_fit(wrong):
    multiply(SHAPES)
    with pytest.raises(ValueError, match="is \\("):
        multiply({**SHAPES, wrong[0]: wrong[1:]})


def test_an_int8_product_and_its_backward_refuse_scales_that_do_not_fit():
    x, grad, (weight, scale) = ones(5, 8), ones(5, 12), quantize.quantized_rows(ones(12, 8))
    x_int8, x_scales = quantize.quantized(x, None)
    of, one_factor = products.Product(weight, scale=scale), products.Product(ones(12, 8), lora_B=torch.ones(2, 12))
    wrong = [{"scale": scale[:8]}, {"smooth_scales": torch.ones(12)}]
    forward = [(of._replace(**changed), x_int8, x_scales, "scales") for changed in (*wrong, {"in_blocks": True})]
    forward += [(of, x_int8[:4], x_scales, "int8"), (of, x_int8, x_scales[:4], "int8")]
    for changed, int8, scales, what in forward:
        with pytest.raises(ValueError, match=what):
            products.linear(x, changed, None, int8, scales)
    backward = [(of._replace(**changed), None, "scales") for changed in wrong]
    for changed, added, what in (*backward, (of, grad, "added"), (one_factor, None, "two factors")):
        with pytest.raises(ValueError, match=what):
            products.linear_backward(grad, changed, added)
    with pytest.raises(ValueError, match="scales"):
        quantize.quantized(x, torch.ones(5))


@pytest.mark.parametrize("token", [-1, 7, 2**40])
def test_token_ids_beyond_an_embedding_are_refused_with_and_without_virtual_tokens(token):
    """5 ids of the vocabulary and 2 virtual ones: the error is torch's own for an embedding of 7."""
    from deltaw.runtime import virtual_tokens

    model, said = nn.Module(), []
    model.embedding = nn.Embedding(5, 4)
    model.get_input_embeddings = lambda: model.embedding
    layer = virtual_tokens.attach(model, torch.zeros(2, 4))
    assert layer(torch.tensor([0, 4, 6])).shape == (3, 4)
    for embedding in (layer, nn.Embedding(7, 4)):
        with pytest.raises(IndexError) as refused:
            embedding(torch.tensor([0, token]))
        said.append(str(refused.value))
    assert said[0] == said[1]


@compiled_only
def test_the_library_itself_refuses_what_nobody_checked(monkeypatch):
    monkeypatch.undo()
    logits, targets = torch.zeros(1, 8), torch.tensor([8])
    with pytest.raises(IndexError, match="dw_cross_entropy was given an index out of bounds"):
        loader.kernels().dw_cross_entropy(
            0, 1, 8, logits.data_ptr(), targets.data_ptr(), torch.ones(1).data_ptr(), 1.0, 0.0, 1, None
        )
    assert not logits.any()
