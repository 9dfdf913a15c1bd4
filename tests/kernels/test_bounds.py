"""What lies outside is refused before anything is written, the same with and without the extension."""

from __future__ import annotations

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
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = logits.clone()
    targets = torch.tensor([0, target, 39])
    with pytest.raises(IndexError, match=rf"^target {target} is out of bounds for 40 classes$"):
        rows.cross_entropy_(logits, targets, torch.ones(3), scale=1.0, softcap=0.0, grad=True)
    assert torch.equal(logits, before)


def cross_entropy(targets: torch.Tensor, weights: torch.Tensor) -> None:
    rows.cross_entropy_(ones(2, 8), targets, weights, scale=1.0, softcap=0.0, grad=True)


def class_gradient(targets: list[int], classes: int = 40) -> None:
    weight = torch.ones(40, 16, dtype=torch.bfloat16)
    grad = torch.zeros(2, 40, dtype=torch.bfloat16)
    head.class_gradient_(grad, torch.tensor(targets), weight, quantize.scales_of_rows(weight)[:classes])


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    attend(query, key, value, Layout.of_lengths([3, 2], [-1, 0]), scaling=1.0)


def attention_backward() -> None:
    inputs, layout = (ones(5, 4, 8), ones(5, 2, 8), ones(5, 2, 8)), Layout.of_lengths([3, 2], [-1, 0])
    out, kept = attend(*inputs, layout, scaling=1.0)
    attend_backward(out[:4], *inputs, out, kept, layout, scaling=1.0)


def norm(weight: torch.Tensor, stats: int = 3) -> None:
    of = rows.Norm(weight)
    of.backward(ones(3, 8), ones(3, 8), of(ones(3, 8))[1][:stats])


K, LONGS = ones(5, 2, 8), torch.zeros(2, dtype=torch.long)


@pytest.mark.parametrize(
    ("asked", "what"),
    [
        (lambda: cross_entropy(LONGS.int(), torch.ones(2)), r"targets are torch\.int32, not torch\.int64"),
        (lambda: cross_entropy(LONGS[[0, 0, 0]], torch.ones(2)), r"the targets is \(3,\), not \(2,\)"),
        (lambda: cross_entropy(LONGS, torch.ones(1)), r"the weights is \(1,\), not \(2,\)"),
        (lambda: class_gradient([1, 40]), "^target 40 is out of bounds for 40 classes$"),
        (lambda: class_gradient([1, 2], 39), "the weight's scales"),
        (lambda: attention(ones(5, 4, 8), K[:4], K), "4 keys, and the layout has 5 tokens"),
        (lambda: attention(ones(3, 4, 8), K, K), "the queries"),
        (lambda: attention(ones(5, 4, 8), K, K[:4]), "the values"),
        (lambda: attention(ones(5, 4, 6), K, K), "the queries"),
        (lambda: attention(ones(5, 3, 8), K, K), "3 heads cannot share 2 key heads"),
        (attention_backward, "the gradient"),
        (lambda: norm(ones(7)), "the norm's weight"),
        (lambda: norm(ones(8), 2), "the norm's statistics"),
        (lambda: rows.activation(ones(3, 8), ones(3, 7), "silu"), "up is"),
        (lambda: rows.activation_backward(ones(2, 8), ones(3, 8), ones(3, 8), "silu"), "the gradient"),
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
    ],
)
def test_segments_that_are_no_prefix_tree_are_refused(starts, stops, parents, what):
    with pytest.raises(ValueError, match=what):
        Layout(*(np.array(table, dtype=np.int64) for table in (starts, stops, parents)))


def test_tables_of_a_layout_are_lists_of_whole_numbers():
    with pytest.raises(ValueError, match="starts must be a list of whole numbers"):
        Layout(np.array([0.0]), np.array([3]), np.array([-1]))
    with pytest.raises(ValueError, match="parents must be a list of whole numbers"):
        Layout(np.array([0]), np.array([3]), np.array([[-1]]))


@pytest.mark.parametrize(
    ("picked", "error", "what"),
    [
        ([0, 5], IndexError, "picked place 5 is out of bounds for a row of 5 tokens"),
        ([-1, 2], IndexError, "picked place -1 is out of bounds"),
        ([2, 1], ValueError, "must ascend"),
        ([2, 2], ValueError, "must ascend"),
    ],
)
def test_picked_places_outside_or_out_of_order_are_refused(picked, error, what):
    layout = Layout.of_lengths([3, 2], [-1, 0])
    with pytest.raises(error, match=what):
        attend(ones(2, 4, 8), ones(5, 2, 8), ones(5, 2, 8), layout, scaling=1.0, picked=torch.tensor(picked))


@pytest.mark.parametrize(
    "shapes", [((4, 6), (3, 6)), ((4, 6), (4, 4)), ((3, 6), (3, 6)), ((4, 10), (4, 10)), ((4, 5), (4, 5))]
)
def test_rotary_tables_that_do_not_fit_are_refused(shapes):
    with pytest.raises(ValueError, match=r"cosines|sines|cannot be turned"):
        rows.rotate(ones(4, 2, 8), *(torch.ones(shape) for shape in shapes))


def product_of(given: dict[str, torch.Tensor]) -> None:
    of = {name: tensor for name, tensor in given.items() if name not in ("x", "added")}
    products.linear(given["x"], products.Product(**of), given["added"])


def linear_inputs() -> dict[str, torch.Tensor]:
    return {
        "x": ones(5, 8),
        "weight": ones(12, 8),
        "bias": ones(12),
        "lora_A": torch.ones(8, 2),
        "lora_B": torch.ones(2, 12),
        "added": ones(5, 12),
    }


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("x", (5, 12)),
        ("weight", (12, 12)),
        ("bias", (8,)),
        ("lora_A", (12, 2)),
        ("lora_B", (4, 12)),
        ("lora_B", (2, 8)),
        ("added", (4, 12)),
    ],
)
def test_a_product_refuses_shapes_that_do_not_fit(name, shape):
    given = linear_inputs()
    product_of(given)
    given[name] = given[name].new_ones(shape)
    with pytest.raises(ValueError, match="is \\("):
        product_of(given)


def test_an_int8_product_and_its_backward_refuse_scales_that_do_not_fit():
    x, (weight, scale) = ones(5, 8), quantize.quantized_rows(ones(12, 8))
    x_int8, x_scales = quantize.quantized(x, None)
    of, rounded = products.Product(weight, scale=scale), (None, x_int8, x_scales)
    for changed in ({"scale": scale[:8]}, {"smooth_scales": torch.ones(12)}, {"in_blocks": True}):
        with pytest.raises(ValueError, match="scales"):
            products.linear(x, of._replace(**changed), *rounded)
    for changed in ((None, x_int8[:4], x_scales), (None, x_int8, x_scales[:4])):
        with pytest.raises(ValueError, match="int8"):
            products.linear(x, of, *changed)
    with pytest.raises(ValueError, match="scales"):
        quantize.quantized(x, torch.ones(5))
    for changed in ({"scale": scale[:8]}, {"smooth_scales": torch.ones(12)}):
        with pytest.raises(ValueError, match="scales"):
            products.linear_backward(ones(5, 12), of._replace(**changed))
    with pytest.raises(ValueError, match="added"):
        products.linear_backward(ones(5, 12), of, ones(5, 12))
    with pytest.raises(ValueError, match="two factors"):
        products.linear_backward(ones(5, 12), products.Product(ones(12, 8), lora_B=torch.ones(2, 12)))


@pytest.mark.parametrize("token", [-1, 7, 2**40])
def test_token_ids_beyond_an_embedding_are_refused_with_and_without_virtual_tokens(token):
    """5 ids of the vocabulary and 2 virtual ones: the error is torch's own for an embedding of 7."""
    from deltaw.runtime import virtual_tokens

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(5, 4)

        def get_input_embeddings(self) -> nn.Module:
            return self.embedding

    model = Model()
    layer = virtual_tokens.attach(model, torch.zeros(2, 4))
    assert layer(torch.tensor([0, 4, 6])).shape == (3, 4)
    with pytest.raises(IndexError) as ours:
        layer(torch.tensor([0, token]))
    with pytest.raises(IndexError) as torchs:
        nn.Embedding(7, 4)(torch.tensor([0, token]))
    assert str(ours.value) == str(torchs.value)


@compiled_only
def test_the_library_itself_refuses_what_nobody_checked(monkeypatch):
    monkeypatch.undo()
    logits, targets = torch.zeros(1, 8), torch.tensor([8])
    with pytest.raises(IndexError, match="dw_cross_entropy was given an index out of bounds"):
        loader.kernels().dw_cross_entropy(
            0, 1, 8, logits.data_ptr(), targets.data_ptr(), torch.ones(1).data_ptr(), 1.0, 0.0, 1, None
        )
    assert not logits.any()
