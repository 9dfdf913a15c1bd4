"""The closed forms match their reference implementation and support autograd, ``torch.func`` and ``torch.compile``."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

from deltaw.lora import DoRALinear, LoRAEmbedding, LoRALinear
from deltaw.lora.math import Lookup, embedding, embedding_reference, linear, linear_reference
from deltaw.lora.math_dora import dora_linear, dora_linear_reference


def _operands(
    shape: tuple[int, ...], out: int, rank: int, dtype: torch.dtype, seed: int = 0, *, kind: str = "plain"
) -> dict[str, Tensor]:
    """Create the operands of a closed form, for a plain update or DoRA."""
    generator = torch.Generator().manual_seed(seed)
    factor = torch.float64 if dtype == torch.float64 else torch.float32
    sizes = {"x": shape, "weight": (out, shape[-1]), "bias": (out,), "lora_A": (shape[-1], rank), "lora_B": (rank, out)}
    sizes |= {"magnitude": (out,), "norm": (out,)} if kind == "dora" else {}
    operands = {k: torch.randn(s, generator=generator, dtype=torch.float64) for k, s in sizes.items()}
    operands = {k: t.to(dtype if k in ("x", "weight", "bias") else factor) for k, t in operands.items()}
    if kind == "dora":
        operands["norm"] = operands["norm"].abs() + 0.5
    return {k: t if k in ("weight", "norm") else t.requires_grad_() for k, t in operands.items()}


def _gradients(y: Tensor, operands: dict[str, Tensor]) -> list[Tensor]:
    seed = torch.Generator().manual_seed(1)
    grad_output = torch.randn(y.shape, generator=seed, dtype=torch.float64).to(y.dtype)
    inputs = [t for t in operands.values() if t.requires_grad]
    return list(torch.autograd.grad(y, inputs, grad_output))


CALLS = {"plain": linear, "dora": dora_linear}


def _reference(
    kind: str, operands: dict[str, Tensor], scaling: float, mask: Tensor | None, keep: float, in_out: bool
) -> Tensor:
    if kind == "dora":
        return dora_linear_reference(*operands.values(), scaling, mask, keep, in_out)
    return linear_reference(*operands.values(), scaling / keep, mask, in_out)


@pytest.mark.parametrize("kind", CALLS)
@settings(max_examples=40, deadline=None)
@given(
    leading=st.lists(st.integers(0, 4), max_size=3),
    n_in=st.integers(1, 9),
    n_out=st.integers(1, 9),
    rank=st.integers(1, 5),
    in_out=st.booleans(),
    dropout=st.sampled_from([0.0, 0.4]),
    seed=st.integers(0, 99),
)
def test_closed_form_matches_reference_for_any_shape(kind, leading, n_in, n_out, rank, in_out, dropout, seed):
    operands = _operands((*leading, n_in), n_out, rank, torch.float64, seed, kind=kind)
    if in_out:
        operands["weight"] = operands["weight"].t().contiguous()
    torch.manual_seed(seed)
    y = CALLS[kind](*operands.values(), 0.7, dropout, weight_is_in_out=in_out)
    torch.manual_seed(seed)
    mask = torch.empty_like(operands["x"], dtype=torch.bool).bernoulli_(1 - dropout) if dropout else None
    reference = _reference(kind, operands, 0.7, mask, 1 - dropout, in_out)
    assert y.shape == (*leading, n_out)
    torch.testing.assert_close(y, reference)
    for ours, theirs in zip(_gradients(y, operands), _gradients(reference, operands), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_closed_form_matches_reference_in_every_dtype(kind, dtype):
    operands = _operands((3, 5, 8), 6, 4, dtype, kind=kind)
    y = CALLS[kind](*operands.values(), 0.5)
    reference = _reference(kind, operands, 0.5, None, 1.0, False)
    half = {"atol": 0.15 if kind == "plain" else 0.25, "rtol": 0.05}
    tolerance = half if dtype in (torch.bfloat16, torch.float16) else {}
    torch.testing.assert_close(y, reference, **tolerance)
    for ours, theirs in zip(_gradients(y, operands), _gradients(reference, operands), strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, **tolerance)


@pytest.mark.each_pair
@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("in_out", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_closed_form_passes_gradcheck_and_gradgradcheck(kind, in_out, dropout):
    operands = _operands((2, 3), 3, 2, torch.float64, kind=kind)
    if in_out:
        operands["weight"] = operands["weight"].t().contiguous()
    trained = [name for name, t in operands.items() if t.requires_grad]

    def call(*tensors: Tensor) -> Tensor:
        torch.manual_seed(3)
        return CALLS[kind](*{**operands, **dict(zip(trained, tensors, strict=True))}.values(), 1.3, dropout, in_out)

    assert torch.autograd.gradcheck(call, tuple(operands[name] for name in trained))
    assert torch.autograd.gradgradcheck(call, tuple(operands[name] for name in trained))


def test_embedding_passes_gradcheck_and_gradgradcheck():
    torch.manual_seed(0)
    ids = torch.tensor([[1, 2, 3], [3, 3, 0]])
    weight, *factors = (torch.randn(*shape, dtype=torch.float64) for shape in ((4, 3), (4, 2), (2, 3)))
    factors = tuple(factor.requires_grad_() for factor in factors)

    def call(lora_A: Tensor, lora_B: Tensor) -> Tensor:
        return embedding(ids, weight, lora_A, lora_B, 0.7, Lookup(3.0))

    assert torch.autograd.gradcheck(call, factors)
    assert torch.autograd.gradgradcheck(call, factors)


@pytest.mark.parametrize("scale", [None, 2.5, torch.tensor(5.7)])
@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.parametrize("by_frequency", [False, True])
def test_embedding_matches_reference(scale, padding_idx, by_frequency):
    torch.manual_seed(0)
    ids = torch.tensor([[1, 2, 3], [3, 3, 0]])
    weight = torch.randn(6, 5)
    lora_A = torch.randn(6, 2, requires_grad=True)
    lora_B = torch.randn(2, 5, requires_grad=True)
    lookup = Lookup(scale, padding_idx, by_frequency)
    results = [call(ids, weight, lora_A, lora_B, 0.7, lookup) for call in (embedding, embedding_reference)]
    torch.testing.assert_close(*results)
    grads = [torch.autograd.grad(y.pow(2).sum(), (lora_A, lora_B)) for y in results]
    torch.testing.assert_close(*grads)


LAYERS = {"plain": LoRALinear, "dora": DoRALinear}
each_layer = pytest.mark.parametrize("kind", LAYERS)


def _layer(dtype: torch.dtype = torch.float32, kind: str = "plain", **options: float) -> LoRALinear:
    torch.manual_seed(0)
    layer = LAYERS[kind](8, 6, 3, alpha=6, bias=True, dtype=dtype, **options)
    nn.init.normal_(layer.lora_B)
    return layer


def _gradients_of(layer: LoRALinear) -> list[Tensor]:
    return [getattr(layer, name).grad.clone() for name in layer.trained]


def test_backward_saves_only_input_narrow_product_and_factors():
    layer = _layer()
    x = torch.randn(5, 7, 8, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    input_pointers = {t.data_ptr() for t in (x, layer.lora_A, layer.lora_B, layer.weight)}
    intermediates = [t for t in saved if t.data_ptr() not in input_pointers]
    assert [tuple(t.shape) for t in intermediates] == [(35, 3)]


def test_only_trainable_tensors_get_gradients():
    layer = _layer()
    x = torch.randn(4, 8)
    layer.lora_A.requires_grad_(False)
    layer(x).sum().backward()
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == {"lora_B"}
    layer.weight.requires_grad_(True)
    layer(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(6, 8))
    half = _layer(torch.bfloat16)
    half.bias.requires_grad_(True)
    half(torch.ones(4, 8, dtype=torch.bfloat16)).sum().backward()
    assert torch.equal(half.bias.grad, torch.full((6,), 4.0, dtype=torch.bfloat16))


def test_non_contiguous_input_and_gradient_match_reference():
    layer = _layer(torch.float64)
    x = torch.randn(8, 5, 3, dtype=torch.float64).permute(1, 2, 0).requires_grad_(True)
    y = layer(x)
    reference = linear_reference(x, layer.weight, layer.bias, layer.lora_A, layer.lora_B, layer.scaling)
    ours = torch.autograd.grad(y.transpose(0, 1).pow(2).sum(), x)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(reference.transpose(0, 1).pow(2).sum(), x)[0])


def test_in_place_change_of_output_is_allowed():
    layer = _layer()
    plain = _layer()
    x = torch.randn(2, 3, 8)
    torch.relu_(layer(x)).sum().backward()
    torch.relu(plain(x)).sum().backward()
    torch.testing.assert_close(layer.lora_A.grad, plain.lora_A.grad)


def test_dtype_mismatch_raises_as_in_nn_linear():
    with pytest.raises(RuntimeError, match="dtype"):
        _layer(torch.bfloat16)(torch.randn(4, 8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_sets_output_dtype(dtype):
    layer = _layer()
    x = torch.randn(4, 8, requires_grad=True)
    with torch.autocast("cpu", dtype):
        y = layer(x)
        reference = linear_reference(x, layer.weight, layer.bias, layer.lora_A, layer.lora_B, layer.scaling)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), reference.float(), atol=0.1, rtol=0.05)
    y.sum().backward()
    assert x.grad.dtype == layer.lora_A.grad.dtype == torch.float32


@each_layer
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_gradients_are_identical(kind, reentrant, dropout):
    layer = _layer(kind=kind, dropout=dropout)
    x = torch.randn(4, 8, requires_grad=True)
    grads = []
    for wrapped in (False, True):
        layer.zero_grad()
        torch.manual_seed(1)
        y = checkpoint(layer, x, use_reentrant=reentrant) if wrapped else layer(x)
        y.pow(2).sum().backward()
        grads.append(_gradients_of(layer))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_retained_graph_supports_second_backward():
    layer = _layer()
    y = layer(torch.randn(4, 8)).sum()
    y.backward(retain_graph=True)
    first = layer.lora_A.grad.clone()
    y.backward()
    torch.testing.assert_close(layer.lora_A.grad, 2 * first)


@each_layer
def test_torch_func_computes_per_example_gradients(kind):
    layer = _layer(kind=kind)
    factors = {name: getattr(layer, name).detach() for name in layer.trained}
    x = torch.randn(5, 8)

    def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        return functional_call(layer, parameters, (row,)).pow(2).sum()

    per_example = vmap(grad(loss), (None, 0))(factors, x)
    layer(x).pow(2).sum().backward()
    for name in layer.trained:
        torch.testing.assert_close(per_example[name].sum(0), getattr(layer, name).grad)


@pytest.mark.each_value
@each_layer
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_layer_compiles_without_graph_break(kind, dropout):
    layer = _layer(kind=kind, dropout=dropout)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 8)
    compiled(x).pow(2).sum().backward()
    ours = _gradients_of(layer)
    assert all(gradient.abs().sum() > 0 for gradient in ours)
    if dropout:
        return
    torch.testing.assert_close(compiled(x), layer(x))
    layer.zero_grad()
    layer(x).pow(2).sum().backward()
    torch.testing.assert_close(ours, _gradients_of(layer))


def test_compiled_embedding_matches_eager():
    torch.manual_seed(0)
    layer = LoRAEmbedding(9, 4, 2)
    nn.init.normal_(layer.lora_B)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    ids = torch.tensor([[1, 2], [8, 0]])
    torch.testing.assert_close(compiled(ids), layer(ids))
    compiled(ids).sum().backward()
    assert layer.lora_A.grad[8].abs().sum() > 0 and layer.lora_A.grad[5].abs().sum() == 0
