"""Attention over prefix trees against its reference implementation, and the layout against its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from deltaw.kernels import attention
from deltaw.kernels.attention import packed_attention, packed_attention_reference
from deltaw.kernels.layout import LARGEST_ATOM, Layout
from tests.kernels.conftest import close, compiled_only, examples, off, same_bits


@st.composite
def trees(draw):
    count = draw(st.integers(1, 9))
    lengths = [draw(st.sampled_from([1, 2, 3, 7, 20, LARGEST_ATOM + 3])) for _ in range(count)]
    parents = [draw(st.integers(-1, i - 1)) for i in range(count)]
    return Layout.of_lengths(lengths, parents)


def random_inputs(layout, heads=4, key_heads=2, size=8, dtype=torch.float64, value_size=None):
    generator = torch.Generator().manual_seed(0)
    shapes = [(heads, size), (key_heads, size), (key_heads, value_size or size)]
    return [torch.randn(h, layout.length, d, generator=generator, dtype=torch.float64).to(dtype) for h, d in shapes]


def gradients(function, inputs, layout, **how):
    """What a function gives, and the slopes of its inputs."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out = function(*leaves, layout, **how)
    slope = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).bfloat16()  # exact in all types
    return [out.detach(), *torch.autograd.grad(out, leaves, slope.to(out))]


def assert_as_the_reference(function, inputs, layout, tolerance=1e-9, **how):
    own = {key: value for key, value in how.items() if key != "compiled"}
    expected = gradients(packed_attention_reference, inputs, layout, **own)
    for one, other in zip(gradients(function, inputs, layout, **how), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@examples(trees(), st.sampled_from([None, 1, 5, 40]), count=40)
def test_tiles_cover_each_visible_pair_exactly_once(layout, window):
    covered = np.zeros((layout.length, layout.length), dtype=int)
    tiles = layout.tiles(window)
    gather, at = tiles.gather.numpy(), 0
    filling = np.zeros(len(gather), bool)
    filling[tiles.filling.numpy()] = True
    assert (gather[tiles.slots.numpy()] == np.arange(layout.length)).all()
    for batch in tiles.batches:
        seen = np.ones((batch.count, batch.queries, batch.keys.shape[1]), bool)
        seen[:, :, seen.shape[2] - batch.hidden.shape[-1] :] = ~batch.hidden.numpy()
        places = gather[at : at + batch.count * batch.queries].reshape(batch.count, -1)
        seen[filling[at : at + places.size].reshape(places.shape)] = False
        at += places.size
        for n in range(batch.count):
            rows, columns = np.nonzero(seen[n])
            np.add.at(covered, (places[n][rows], batch.keys[n].numpy()[columns]), 1)
    assert (covered == layout.visible(window)).all()


@examples(trees(), st.sampled_from([None, 4]), st.sampled_from([None, 2.0]), st.sampled_from([1, 2, 4]))
def test_forward_and_backward_equal_the_plain_reference(layout, window, softcap, key_heads):
    inputs = random_inputs(layout, key_heads=key_heads)
    assert_as_the_reference(packed_attention, inputs, layout, scaling=0.3, window=window, softcap=softcap)


@pytest.mark.parametrize("kept", [0.0, 1e9])
def test_backward_is_the_same_with_weights_kept_or_computed_again(kept, monkeypatch):
    monkeypatch.setattr(attention, "KEPT_WEIGHTS", kept)
    layout = Layout.of_lengths([20, 7, 30, 5], [-1, 0, 0, 1])
    assert_as_the_reference(packed_attention, random_inputs(layout), layout, scaling=0.3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lower_precision_stays_near_float64(dtype):
    layout = Layout.of_lengths([30, 140, 3], [-1, 0, 0])
    inputs = random_inputs(layout, size=16)
    low = packed_attention(*(t.to(dtype) for t in inputs), layout, scaling=0.25)
    assert low.dtype == dtype
    tolerance = {torch.float32: 1e-5}.get(dtype, 3e-2)
    exact = packed_attention_reference(*inputs, layout, scaling=0.25)
    torch.testing.assert_close(low.double(), exact, rtol=tolerance, atol=tolerance)


@compiled_only
@examples(
    trees(),
    st.sampled_from([None, 1, 5, 40]),
    st.sampled_from([None, 20.0]),
    st.sampled_from([(4, 2, 8), (9, 3, 20), (3, 3, 48), (5, 1, 6)]),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_the_compiled_kernel_equals_the_plain_reference_in_float64(layout, window, softcap, sizes, dtype):
    inputs, how = random_inputs(layout, *sizes, dtype), {"scaling": 0.3, "window": window, "softcap": softcap}
    out, *slopes = gradients(packed_attention, inputs, layout, **how)
    expected, *exact = gradients(packed_attention_reference, [t.double() for t in inputs], layout, **how)
    close(out, expected, dtype)
    for ours, theirs in zip(slopes, exact, strict=True):
        if theirs.norm() > 1e-6:  # of one key alone the weights have no slope
            assert off(ours, theirs) < (2e-5 if dtype == torch.float32 else 2e-2)


@compiled_only
def test_the_compiled_kernel_is_the_same_to_the_bit_each_time(threads):
    layout = Layout.of_lengths([90, 40, 33, 200], [-1, 0, 0, -1])
    inputs = random_inputs(layout, size=16, dtype=torch.bfloat16)
    assert same_bits(*(gradients(packed_attention, inputs, layout, scaling=0.25) for _ in range(2)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 6])
def test_queries_at_some_places_give_what_all_give_there(dtype, window):
    layout = Layout.of_lengths([40, 9, 1, 30, 12], [-1, 0, 0, 1, -1])
    query, key, value = (t.transpose(0, 1) for t in random_inputs(layout, dtype=dtype))
    picked = torch.tensor([0, 3, 39, 40, 49, 50, 51, 79, 91])  # some segments ask nothing, some once
    how = {"scaling": 0.3, "window": window}
    exact = [t.double() for t in (query, key, value)]
    out, kept = attention.attend(*exact, layout, **how)
    asked = query[picked], key, value
    ours, ours_kept = attention.attend(*asked, layout, picked=picked, **how)
    close(ours, out[picked], dtype)
    grad = torch.randn(ours.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    spread = torch.zeros_like(out).index_copy(0, picked, grad)
    of_query, *expected = attention.attend_backward(spread, *exact, out, kept, layout, **how)
    found = attention.attend_backward(grad.to(dtype), *asked, ours, ours_kept, layout, picked=picked, **how)
    for one, other in zip(found, (of_query[picked], *expected), strict=True):
        close(one, other, dtype)


def test_positions_continue_from_the_parent():
    layout = Layout.of_lengths([3, 2, 1, 2], [-1, 0, 1, -1])
    assert layout.positions().tolist() == [0, 1, 2, 3, 4, 5, 0, 1]
