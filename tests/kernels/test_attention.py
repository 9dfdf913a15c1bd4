"""Tests of attention over prefix trees and of the layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from deltaw.kernels import attention
from deltaw.kernels.attention import packed_attention, packed_reference
from deltaw.kernels.layout import MAX_ATOM_QUERIES, Layout
from tests.kernels.conftest import assert_close, compiled_only, examples, relative_error, same_bits


@st.composite
def trees(draw):
    count = draw(st.integers(1, 9))
    lengths = [draw(st.sampled_from([1, 2, 3, 7, 20, MAX_ATOM_QUERIES + 3])) for _ in range(count)]
    parents = [draw(st.integers(-1, i - 1)) for i in range(count)]
    return Layout.of_lengths(lengths, parents)


def random_inputs(layout, heads=4, key_heads=2, size=8, dtype=torch.float64, value_size=None):
    generator = torch.Generator().manual_seed(0)
    shapes = [(heads, size), (key_heads, size), (key_heads, value_size or size)]
    return [torch.randn(h, layout.length, d, generator=generator, dtype=torch.float64).to(dtype) for h, d in shapes]


def gradients(function, inputs, layout, **options):
    """Return the output and the gradients of the inputs."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out = function(*leaves, layout, **options)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).bfloat16()  # exact in all types
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out))]


def assert_matches_reference(function, inputs, layout, tolerance=1e-9, **kwargs):
    options = {key: value for key, value in kwargs.items() if key != "compiled"}
    expected = gradients(packed_reference, inputs, layout, **options)
    for actual, expected_tensor in zip(gradients(function, inputs, layout, **kwargs), expected, strict=True):
        torch.testing.assert_close(actual, expected_tensor, rtol=tolerance, atol=tolerance)


@examples(trees(), st.sampled_from([None, 1, 5, 40]), count=40)
def test_tiles_cover_each_visible_pair_exactly_once(layout, window):
    covered = np.zeros((layout.length, layout.length), dtype=int)
    tiles = layout.tiles(window)
    gather = tiles.gather.numpy()
    offset = 0
    filling = np.zeros(len(gather), bool)
    filling[tiles.filling.numpy()] = True
    assert (gather[tiles.slots.numpy()] == np.arange(layout.length)).all()
    for batch in tiles.batches:
        visible = np.ones((batch.count, batch.queries, batch.keys.shape[1]), bool)
        visible[:, :, visible.shape[2] - batch.hidden.shape[-1] :] = ~batch.hidden.numpy()
        positions = gather[offset : offset + batch.count * batch.queries].reshape(batch.count, -1)
        visible[filling[offset : offset + positions.size].reshape(positions.shape)] = False
        offset += positions.size
        for n in range(batch.count):
            rows, columns = np.nonzero(visible[n])
            np.add.at(covered, (positions[n][rows], batch.keys[n].numpy()[columns]), 1)
    assert (covered == layout.visible(window)).all()


@examples(trees(), st.sampled_from([None, 4]), st.sampled_from([None, 2.0]), st.sampled_from([1, 2, 4]))
def test_forward_and_backward_match_reference(layout, window, softcap, key_heads):
    inputs = random_inputs(layout, key_heads=key_heads)
    assert_matches_reference(packed_attention, inputs, layout, scaling=0.3, window=window, softcap=softcap)


@pytest.mark.parametrize("limit", [0.0, 1e9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sinks_match_reference(limit, dtype, monkeypatch):
    monkeypatch.setattr(attention, "MAX_SAVED_WEIGHTS", limit)
    layout = Layout.of_lengths([20, 7, 30, 5], [-1, 0, 0, 1])
    options = {"scaling": 0.3, "window": 9, "sinks": torch.tensor([-1.0, 0.0, 1.0, 4.0], dtype=dtype)}
    inputs = random_inputs(layout, dtype=dtype)
    assert_matches_reference(packed_attention, inputs, layout, 1e-9 if dtype == torch.float64 else 2e-5, **options)


@pytest.mark.parametrize("limit", [0.0, 1e9])
def test_backward_with_saved_or_recomputed_weights_matches_reference(limit, monkeypatch):
    monkeypatch.setattr(attention, "MAX_SAVED_WEIGHTS", limit)
    layout = Layout.of_lengths([20, 7, 30, 5], [-1, 0, 0, 1])
    assert_matches_reference(packed_attention, random_inputs(layout), layout, scaling=0.3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lower_precision_is_close_to_float64(dtype):
    layout = Layout.of_lengths([30, 140, 3], [-1, 0, 0])
    inputs = random_inputs(layout, size=16)
    low = packed_attention(*(t.to(dtype) for t in inputs), layout, scaling=0.25)
    assert low.dtype == dtype
    tolerance = {torch.float32: 1e-5}.get(dtype, 3e-2)
    exact = packed_reference(*inputs, layout, scaling=0.25)
    torch.testing.assert_close(low.double(), exact, rtol=tolerance, atol=tolerance)


@compiled_only
@examples(
    trees(),
    st.sampled_from([None, 1, 5, 40]),
    st.sampled_from([None, 20.0]),
    st.sampled_from([(4, 2, 8), (9, 3, 20), (3, 3, 48), (5, 1, 6)]),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_compiled_kernel_matches_float64_reference(layout, window, softcap, sizes, dtype):
    inputs = random_inputs(layout, *sizes, dtype)
    options = {"scaling": 0.3, "window": window, "softcap": softcap}
    out, *grads = gradients(packed_attention, inputs, layout, **options)
    expected, *exact = gradients(packed_reference, [t.double() for t in inputs], layout, **options)
    assert_close(out, expected, dtype)
    for actual, expected_grad in zip(grads, exact, strict=True):
        if expected_grad.norm() > 1e-6:  # with a single key, the weights have no gradient
            assert relative_error(actual, expected_grad) < (2e-5 if dtype == torch.float32 else 2e-2)


@compiled_only
def test_compiled_kernel_is_deterministic(threads):
    layout = Layout.of_lengths([90, 40, 33, 200], [-1, 0, 0, -1])
    inputs = random_inputs(layout, size=16, dtype=torch.bfloat16)
    assert same_bits(*(gradients(packed_attention, inputs, layout, scaling=0.25) for _ in range(2)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 6])
def test_selected_queries_match_full_attention(dtype, window):
    layout = Layout.of_lengths([40, 9, 1, 30, 12], [-1, 0, 0, 1, -1])
    query, key, value = (t.transpose(0, 1) for t in random_inputs(layout, dtype=dtype))
    selected = torch.tensor([0, 3, 39, 40, 49, 50, 51, 79, 91])  # some segments have no query, some only one
    options = {"scaling": 0.3, "window": window}
    exact = [t.double() for t in (query, key, value)]
    out, saved = attention.attend(*exact, layout, **options)
    inputs = query[selected], key, value
    selected_out, selected_saved = attention.attend(*inputs, layout, rows=selected, **options)
    assert_close(selected_out, out[selected], dtype)
    grad = torch.randn(selected_out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    full_grad = torch.zeros_like(out).index_copy(0, selected, grad)
    query_grad, *expected = attention.attend_backward(full_grad, *exact, out, saved, layout, **options)
    outputs = (selected_out, selected_saved)
    actual_grads = attention.attend_backward(grad.to(dtype), *inputs, *outputs, layout, rows=selected, **options)
    for actual, expected_grad in zip(actual_grads, (query_grad[selected], *expected), strict=True):
        assert_close(actual, expected_grad, dtype)


def test_positions_continue_from_the_parent():
    layout = Layout.of_lengths([3, 2, 1, 2], [-1, 0, 1, -1])
    assert layout.positions().tolist() == [0, 1, 2, 3, 4, 5, 0, 1]
