"""Attention over prefix trees against its reference implementation, and the layout against its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.kernels import attention
from deltaw.kernels.attention import packed_attention, packed_attention_reference
from deltaw.kernels.layout import LARGEST_ATOM, Layout
from tests.kernels.conftest import close, compiled_only


@st.composite
def trees(draw):
    count = draw(st.integers(1, 9))
    lengths = [draw(st.sampled_from([1, 2, 3, 7, 20, LARGEST_ATOM + 3])) for _ in range(count)]
    parents = [draw(st.integers(-1, i - 1)) for i in range(count)]
    return Layout.of_lengths(lengths, parents)


def random_inputs(layout, heads=4, key_heads=2, size=8, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(heads, layout.length, size), (key_heads, layout.length, size), (key_heads, layout.length, size)]
    return [torch.randn(s, generator=generator, dtype=dtype, requires_grad=True) for s in shapes]


@settings(max_examples=40, deadline=None)
@given(trees(), st.sampled_from([None, 1, 5, 40]))
def test_tiles_cover_each_visible_pair_exactly_once(layout, window):
    covered = np.zeros((layout.length, layout.length), dtype=int)
    tiles = layout.tiles(window)
    gather, at = tiles.gather.numpy(), 0
    filling = np.zeros(len(gather), bool)
    filling[tiles.filling.numpy()] = True
    assert (gather[tiles.slots.numpy()] == np.arange(layout.length)).all()
    for batch in tiles.batches:
        seen = np.ones((batch.count, batch.queries, batch.keys.shape[1]), bool)
        width = batch.hidden.shape[-1]
        seen[:, :, seen.shape[2] - width :] = ~batch.hidden.numpy()
        places = gather[at : at + batch.count * batch.queries].reshape(batch.count, -1)
        seen[filling[at : at + places.size].reshape(places.shape)] = False
        at += places.size
        for n in range(batch.count):
            rows, columns = np.nonzero(seen[n])
            np.add.at(covered, (places[n][rows], batch.keys[n].numpy()[columns]), 1)
    assert (covered == layout.visible(window)).all()


@settings(max_examples=25, deadline=None)
@given(trees(), st.sampled_from([None, 4]), st.sampled_from([None, 2.0]), st.sampled_from([1, 2, 4]))
def test_forward_and_backward_equal_the_plain_reference(layout, window, softcap, key_heads):
    inputs = random_inputs(layout, key_heads=key_heads)
    again = [t.detach().clone().requires_grad_() for t in inputs]
    out = packed_attention(*inputs, layout, scaling=0.3, window=window, softcap=softcap)
    expected = packed_attention_reference(*again, layout, scaling=0.3, window=window, softcap=softcap)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(out)
    out.backward(weight)
    expected.backward(weight)
    for ours, theirs in zip(inputs, again, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kept", [0.0, 1e9])
def test_backward_is_the_same_with_weights_kept_or_computed_again(kept, monkeypatch):
    monkeypatch.setattr(attention, "KEPT_WEIGHTS", kept)
    layout = Layout.of_lengths([20, 7, 30, 5], [-1, 0, 0, 1])
    inputs = random_inputs(layout)
    again = [t.detach().clone().requires_grad_() for t in inputs]
    out = packed_attention(*inputs, layout, scaling=0.3)
    expected = packed_attention_reference(*again, layout, scaling=0.3)
    grads = torch.autograd.grad(out.square().sum(), inputs)
    for ours, theirs in zip(grads, torch.autograd.grad(expected.square().sum(), again), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_gradcheck():
    layout = Layout.of_lengths([2, 2, 1], [-1, 0, 0])
    inputs = random_inputs(layout, heads=2, key_heads=1, size=2)
    assert torch.autograd.gradcheck(
        lambda q, k, v: packed_attention(q, k, v, layout, scaling=0.7, window=2, softcap=3.0), inputs
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lower_precision_stays_near_float64(dtype):
    layout = Layout.of_lengths([30, 140, 3], [-1, 0, 0])
    inputs = random_inputs(layout, size=16)
    exact = packed_attention_reference(*inputs, layout, scaling=0.25)
    low = packed_attention(*[t.detach().to(dtype) for t in inputs], layout, scaling=0.25)
    assert low.dtype == dtype
    tolerance = {torch.float32: 1e-5}.get(dtype, 3e-2)
    torch.testing.assert_close(low.double(), exact, rtol=tolerance, atol=tolerance)


@compiled_only
@settings(max_examples=25, deadline=None)
@given(
    trees(),
    st.sampled_from([None, 1, 5, 40]),
    st.sampled_from([None, 20.0]),
    st.sampled_from([(4, 2, 8), (9, 3, 20), (3, 3, 48), (5, 1, 6)]),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_the_compiled_kernel_equals_the_plain_reference_in_float64(layout, window, softcap, sizes, dtype):
    heads, key_heads, size = sizes
    inputs = [t.detach().to(dtype) for t in random_inputs(layout, heads, key_heads, size)]
    exact = [t.double().requires_grad_() for t in inputs]
    leaves = [t.requires_grad_() for t in inputs]
    how = {"scaling": 0.3, "window": window, "softcap": softcap}
    out = packed_attention(*leaves, layout, **how)
    expected = packed_attention_reference(*exact, layout, **how)
    close(out.detach(), expected.detach(), dtype)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    out.backward(grad)
    expected.backward(grad.double())
    for ours, theirs in zip(leaves, exact, strict=True):
        if theirs.grad.norm() > 1e-6:  # of one key alone the weights have no slope
            error = (ours.grad.double() - theirs.grad).norm() / theirs.grad.norm()
            assert error < (2e-5 if dtype == torch.float32 else 2e-2)


@compiled_only
def test_the_compiled_kernel_is_the_same_to_the_bit_each_time(threads):
    layout = Layout.of_lengths([90, 40, 33, 200], [-1, 0, 0, -1])
    found = []
    for _ in range(2):
        inputs = [t.detach().bfloat16().requires_grad_() for t in random_inputs(layout, size=16)]
        packed_attention(*inputs, layout, scaling=0.25).sum().backward()
        found.append([t.grad for t in inputs])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 6])
def test_queries_at_some_places_give_what_all_give_there(dtype, window):
    layout = Layout.of_lengths([40, 9, 1, 30, 12], [-1, 0, 0, 1, -1])
    query, key, value = (t.detach().transpose(0, 1) for t in random_inputs(layout, dtype=dtype))
    picked = torch.tensor([0, 3, 39, 40, 49, 50, 51, 79, 91])  # some segments ask nothing, some once
    how = {"scaling": 0.3, "window": window}
    exact = [t.double() for t in (query, key, value)]
    out, kept = attention.attend(*exact, layout, **how)
    ours, ours_kept = attention.attend(query[picked], key, value, layout, picked=picked, **how)
    close(ours, out[picked], dtype)
    grad = torch.randn(ours.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    spread = torch.zeros_like(out).index_copy(0, picked, grad)
    expected = attention.attend_backward(spread, *exact, out, kept, layout, **how)
    found = attention.attend_backward(
        grad.to(dtype), query[picked], key, value, ours, ours_kept, layout, picked=picked, **how
    )
    close(found[0], expected[0][picked], dtype)
    close(found[1], expected[1], dtype)
    close(found[2], expected[2], dtype)


def test_positions_continue_from_the_parent():
    layout = Layout.of_lengths([3, 2, 1, 2], [-1, 0, 1, -1])
    assert layout.positions().tolist() == [0, 1, 2, 3, 4, 5, 0, 1]


def test_a_parent_after_its_child_is_refused():
    with pytest.raises(ValueError, match="before"):
        Layout.of_lengths([1, 1], [1, -1])
