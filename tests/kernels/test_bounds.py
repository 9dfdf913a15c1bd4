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


def test_targets_of_another_type_or_number_are_refused():
    how = {"scale": 1.0, "softcap": 0.0, "grad": True}
    with pytest.raises(TypeError, match=r"targets are torch\.int32, not torch\.int64"):
        rows.cross_entropy_(ones(2, 8), torch.zeros(2, dtype=torch.int32), torch.ones(2), **how)
    with pytest.raises(ValueError, match=r"the targets is \(3,\), not \(2,\)"):
        rows.cross_entropy_(ones(2, 8), torch.zeros(3, dtype=torch.long), torch.ones(2), **how)
    with pytest.raises(ValueError, match=r"the weights is \(1,\), not \(2,\)"):
        rows.cross_entropy_(ones(2, 8), torch.zeros(2, dtype=torch.long), torch.ones(1), **how)


def test_a_class_gradient_refuses_targets_outside():
    grad, weight = torch.zeros(2, 40, dtype=torch.bfloat16), torch.randn(40, 16).bfloat16()
    scales = quantize.scales_of_rows(weight)
    with pytest.raises(IndexError, match=r"^target 40 is out of bounds for 40 classes$"):
        head.class_gradient_(grad, torch.tensor([1, 40]), weight, scales)
    with pytest.raises(ValueError, match="the weight's scales"):
        head.class_gradient_(grad, torch.tensor([1, 2]), weight, scales[:-1])


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


def test_attention_refuses_shapes_that_do_not_fit():
    layout = Layout.of_lengths([3, 2], [-1, 0])
    q, k, v = ones(5, 4, 8), ones(5, 2, 8), ones(5, 2, 8)
    for inputs, what in (
        ((q, k[:4], v), "4 keys, and the layout has 5 tokens"),
        ((q[:3], k, v), "the queries"),
        ((q, k, v[:4]), "the values"),
        ((q[..., :6], k, v), "the queries"),
        ((q[:, :3], k, v), "3 heads cannot share 2 key heads"),
    ):
        with pytest.raises(ValueError, match=what):
            attend(*inputs, layout, scaling=1.0)
    out, kept = attend(q, k, v, layout, scaling=1.0)
    with pytest.raises(ValueError, match="the gradient"):
        attend_backward(out[:4], q, k, v, out, kept, layout, scaling=1.0)


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


def test_norms_and_activations_refuse_shapes_that_do_not_fit():
    how = {"offset": 0.0, "centered": False}
    with pytest.raises(ValueError, match="the norm's weight"):
        rows.norm(ones(3, 8), ones(7), None, eps=1e-6, **how)
    _, stats = rows.norm(ones(3, 8), ones(8), None, eps=1e-6, **how)
    with pytest.raises(ValueError, match="the norm's statistics"):
        rows.norm_backward(ones(3, 8), ones(3, 8), ones(8), stats[:2], **how)
    with pytest.raises(ValueError, match="up is"):
        rows.activation(ones(3, 8), ones(3, 7), "silu")
    with pytest.raises(ValueError, match="the gradient"):
        rows.activation_backward(ones(2, 8), ones(3, 8), ones(3, 8), "silu")


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
