"""Tests of linear recurrences and short convolutions over prefix trees."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st

from deltaw.kernels import loader, recurrence
from deltaw.kernels.chunks import chunks_of
from deltaw.kernels.continued import ContinuedRows
from deltaw.kernels.layout import Layout
from deltaw.kernels.recurrence import packed_recurrence, recurrence_reference
from deltaw.kernels.short_convolution import convolution_reference, packed_convolution, predecessors
from deltaw.memory.scratch import arena_bytes
from tests.kernels.conftest import compiled_only, examples, relative_error


@st.composite
def trees(draw):
    count = draw(st.integers(1, 7))
    lengths = [draw(st.sampled_from([0, 1, 2, 7, 16, 17, 40, 70])) for _ in range(count)]
    lengths[0] += 1
    parents = [draw(st.integers(-1, i - 1)) for i in range(count)]
    return Layout.of_lengths(lengths, parents)


def random_inputs(layout, *, delta, key_heads=2, heads=4, d=5, d_v=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(layout.length, *shape, generator=generator, dtype=torch.float64).to(dtype)

    def uniform(*shape):
        return torch.rand(layout.length, *shape, generator=generator, dtype=torch.float64).to(dtype)

    rate = uniform(heads) if delta else None
    return [normal(key_heads, d), normal(key_heads, d), normal(heads, d_v), -uniform(heads), rate]


def gradients(function, inputs, layout, **options):
    """Return the output and the gradients of the inputs."""
    leaves = [None if t is None else t.clone().requires_grad_() for t in inputs]
    out = function(*leaves, layout, **options)
    slopes = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, [t for t in leaves if t is not None], slopes)]


@examples(trees(), st.booleans(), st.booleans(), st.sampled_from(recurrence.CHUNK_SIZES), count=60)
def test_chunks_equal_the_recurrence_token_by_token(layout, delta, unit_vectors, size):
    inputs = random_inputs(layout, delta=delta)
    options = {"scaling": 0.4, "unit_vectors": unit_vectors or delta}
    expected = gradients(recurrence_reference, inputs, layout, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recurrence, "CHUNK_SIZES", (size,))
        computed = gradients(packed_recurrence, inputs, layout, **options)
    for actual, reference in zip(computed, expected, strict=True):
        torch.testing.assert_close(actual, reference, rtol=1e-9, atol=1e-9)


@compiled_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(2, 2), (2, 4), (1, 12)], ids=["own keys", "shared keys", "one key head"])
@pytest.mark.parametrize("delta", [True, False], ids=["delta", "scan"])
def test_compiled_kernels_equal_the_reference_in_fp64(delta, heads, dtype, arithmetic):
    layout = Layout.of_lengths([70, 0, 64, 1, 130, 5], [-1, 0, 1, 1, -1, 4])
    sizes = {"key_heads": heads[0], "heads": heads[1], "d": 64, "d_v": 32}
    inputs = random_inputs(layout, delta=delta, dtype=dtype, **sizes)
    inputs[1] = inputs[1] * 0.2
    options = {"scaling": 0.3, "unit_vectors": delta}
    assert recurrence.is_compiled(*inputs[:3])
    computed = gradients(packed_recurrence, inputs, layout, **options)
    wide = [None if t is None else t.double() for t in inputs]
    expected = gradients(recurrence_reference, wide, layout, **options)
    # Each result is rounded once to its type. The gradients of decays and rates are sums of rounded products.
    tolerance = 3e-6 if dtype == torch.float32 else 2e-2
    for actual, reference in zip(computed, expected, strict=True):
        assert relative_error(actual.double(), reference) < tolerance


@compiled_only
def test_compiled_kernels_do_not_depend_on_the_number_of_threads(arithmetic):
    layout = Layout.of_lengths([70, 20, 30], [-1, 0, 0])
    inputs = random_inputs(layout, delta=True, key_heads=2, heads=6, d=32, d_v=64, dtype=torch.float32)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(gradients(packed_recurrence, inputs, layout, unit_vectors=True))
    for other in results[1:]:
        for actual, expected in zip(other, results[0], strict=True):
            assert relative_error(actual, expected) < 1e-6


@compiled_only
@pytest.mark.parametrize(
    ("lengths", "parents"),
    [([700, 200, 300], [-1, 0, 0]), ([70, *[1] * 90, 65, 3], [-1, *[0] * 90, 7, 91])],
    ids=["long rows", "many branches"],
)
def test_planned_scratch_memory_equals_the_arenas(lengths, parents, arithmetic):
    torch.set_num_threads(1)
    layout = Layout.of_lengths(lengths, parents)
    inputs = random_inputs(layout, delta=True, key_heads=1, heads=6, d=64, d_v=64, dtype=torch.float32)
    operators = torch.ops.deltaw
    arguments = (*inputs, layout.segments(), 1.0, True)
    for operator, args in ((operators.recurrence, arguments), (operators.recurrence_backward, (inputs[2], *arguments))):
        loader.release_scratch()  # of this thread
        others = loader.kernels().dw_scratch_bytes(0)
        operator(*args)  # the first call cuts the arena into chunks
        loader.kernels().dw_scratch_bytes(1)
        operator(*args)
        measured = loader.kernels().dw_scratch_bytes(1) - others
        planned = arena_bytes(operator.default, args)
        assert planned <= measured <= 1.02 * planned + 2**12


@compiled_only
def test_scratch_memory_is_independent_of_the_number_of_branches():
    torch.set_num_threads(1)
    planned = []
    for branches in (2, 200):
        layout = Layout.of_lengths([64] + [1] * branches, [-1] + [0] * branches)
        inputs = random_inputs(layout, delta=True, key_heads=2, heads=2, d=64, d_v=64, dtype=torch.float32)
        arguments = (inputs[2], *inputs, layout.segments(), 1.0, True)
        planned.append(arena_bytes(torch.ops.deltaw.recurrence_backward.default, arguments))
    assert planned[0] == planned[1]


@pytest.mark.parametrize("decay", [-1e5, float("-inf")])
@pytest.mark.parametrize("delta", [True, False], ids=["delta", "scan"])
def test_weak_decays_after_a_strong_decay_are_exact(delta, decay, kernels):
    layout = Layout.of_lengths([100, 90], [-1, 0])
    inputs = random_inputs(layout, delta=delta, key_heads=2, heads=2, d=32, d_v=32, dtype=torch.float32)
    inputs[3] = inputs[3] * 0.01
    strong = torch.tensor([30, 31, 70, 99, 100, 130])
    inputs[3][strong] = decay
    options = {"scaling": 0.3, "unit_vectors": True}
    expected = gradients(recurrence_reference, [t if t is None else t.double() for t in inputs], layout, **options)
    computed = gradients(packed_recurrence, inputs, layout, **options)
    for actual, reference in zip(computed, expected, strict=True):
        assert relative_error(actual, reference) < 3e-6
    assert not computed[4][strong].any()


@pytest.mark.parametrize("tensor", range(5))
def test_nan_does_not_reach_other_rows(tensor, kernels):
    layout = Layout.of_lengths([30, 40, 50])
    inputs = random_inputs(layout, delta=True, key_heads=2, heads=2, d=32, d_v=32, dtype=torch.float32)
    expected = gradients(packed_recurrence, inputs, layout)
    inputs[tensor][:30] = float("nan")
    for actual, reference in zip(gradients(packed_recurrence, inputs, layout), expected, strict=True):
        assert torch.equal(actual[30:], reference[30:])


def test_empty_rows_have_empty_outputs_and_gradients(kernels):
    layout = Layout.of_lengths([0, 0], [-1, 0])
    inputs = random_inputs(layout, delta=True, key_heads=2, heads=2, d=32, d_v=32, dtype=torch.float32)
    out, *grads = gradients(packed_recurrence, inputs, layout)
    assert out.shape == inputs[2].shape == recurrence_reference(*inputs, layout).shape
    assert [grad.shape for grad in grads] == [t.shape for t in inputs]


@pytest.mark.parametrize("delta", [True, False])
def test_closed_form_equals_numeric_gradients(delta):
    layout = Layout.of_lengths([5, 2, 3], [-1, 0, 0])
    inputs = [t.requires_grad_() for t in random_inputs(layout, delta=delta) if t is not None]

    def outputs(*tensors):
        rate = tensors[4] if delta else None
        return packed_recurrence(*tensors[:4], rate, layout, scaling=0.7, unit_vectors=delta)

    assert torch.autograd.gradcheck(outputs, inputs)


def test_heads_are_independent_of_their_group(monkeypatch):
    layout = Layout.of_lengths([20, 9, 9], [-1, 0, 0])
    inputs = random_inputs(layout, delta=True, key_heads=4, heads=8)
    whole = gradients(packed_recurrence, inputs, layout)
    monkeypatch.setattr(recurrence, "ELEMENTS_PER_GROUP", 1)
    for actual, expected in zip(gradients(packed_recurrence, inputs, layout), whole, strict=True):
        torch.testing.assert_close(actual, expected)


def test_sums_of_16_bit_inputs_are_in_fp32():
    layout = Layout.of_lengths([150])
    inputs = random_inputs(layout, delta=True, dtype=torch.bfloat16)
    inputs[3] = inputs[3] * 0.01  # slow decay, so that errors would accumulate
    exact = recurrence_reference(*(t.double() for t in inputs), layout, unit_vectors=True)
    computed = packed_recurrence(*inputs, layout, unit_vectors=True)
    assert computed.dtype == torch.bfloat16
    error = float((computed.double() - exact).norm() / exact.norm())
    assert error < 2.0**-8


def test_rows_that_share_a_prefix_equal_separate_rows():
    layout = Layout.of_lengths([37, 5, 21], [-1, 0, 0])
    inputs = random_inputs(layout, delta=True)
    packed = packed_recurrence(*inputs, layout)
    first = torch.arange(42)
    second = torch.cat([torch.arange(37), torch.arange(42, 63)])
    for tokens in (first, second):
        row = packed_recurrence(*(t[tokens] for t in inputs), Layout.of_lengths([len(tokens)]))
        torch.testing.assert_close(packed[tokens], row)


def test_a_chunk_starts_after_the_last_chunk_of_its_parent():
    layout = Layout.of_lengths([20, 0, 3], [-1, 0, 1])
    chunks = chunks_of(layout, 16)
    assert [(level.start, level.stop) for level in chunks.levels] == [(0, 1), (1, 2), (2, 3)]
    assert chunks.positions[2, :3].tolist() == [20, 21, 22]
    assert chunks.is_token.sum().item() == 23


@pytest.mark.parametrize("change", ["length", "heads", "rate"])
def test_shapes_that_do_not_fit_are_rejected(change):
    layout = Layout.of_lengths([4])
    inputs = random_inputs(layout, delta=True)
    if change == "length":
        layout = Layout.of_lengths([5])
    elif change == "heads":
        inputs[0] = inputs[1] = torch.zeros(4, 3, 5, dtype=torch.float64)
    else:
        inputs[4] = inputs[4][:, :1]
    with pytest.raises(ValueError, match=r"tokens|share|shape"):
        packed_recurrence(*inputs, layout)


@pytest.mark.parametrize(
    "change", [{"x": (4,)}, {"x": (5, 6)}, {"weight": (5, 3)}, {"weight": (6, 0)}, {"bias": (3,)}, {"bias": (6, 1)}]
)
def test_convolution_rejects_shapes_that_do_not_fit(change):
    shapes = {"x": (4, 6), "weight": (6, 3), "bias": (6,), **change}
    with pytest.raises(ValueError, match=r"tokens|channels|bias"):
        packed_convolution(*(torch.zeros(shape) for shape in shapes.values()), Layout.of_lengths([4]))


@examples(trees(), st.booleans(), st.sampled_from([1, 3, 4]), count=40)
def test_convolution_equals_its_reference(layout, silu, width):
    generator = torch.Generator().manual_seed(0)
    shapes = (layout.length, 6), (6, width), (6,)
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    expected = gradients(convolution_reference, inputs, layout, silu=silu)
    for actual, reference in zip(gradients(packed_convolution, inputs, layout, silu=silu), expected, strict=True):
        torch.testing.assert_close(actual, reference)


def test_convolution_equals_torch_row_by_row():
    layout = Layout.of_lengths([9, 2, 4], [-1, 0, 0])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(layout.length, 6, generator=generator)
    weight = torch.randn(6, 4, generator=generator)
    bias = torch.randn(6, generator=generator)
    packed = packed_convolution(x, weight, bias, layout)
    for tokens in (torch.arange(11), torch.cat([torch.arange(9), torch.arange(11, 15)])):
        padded = torch.nn.functional.pad(x[tokens].T[None], (3, 0))
        row = torch.nn.functional.conv1d(padded, weight[:, None], bias, groups=6)[0].T
        torch.testing.assert_close(packed[tokens], row)


def test_predecessors_cross_short_and_empty_segments():
    layout = Layout.of_lengths([3, 0, 1, 2], [-1, 0, 1, 2])
    assert predecessors(layout, 4)[:, 4].tolist() == [4, 3, 2, 1]
    assert predecessors(layout, 4)[:, 0].tolist() == [0, 6, 6, 6]


def split_rows(tensor, lengths, starts, stops):
    """Return the tokens from ``starts`` to ``stops`` of each sequence of a packed row."""
    rows = tensor.split(lengths)
    return torch.cat([row[start:stop] for row, start, stop in zip(rows, starts, stops, strict=True)])


@examples(st.lists(st.integers(3, 90), min_size=1, max_size=4), st.booleans(), st.booleans(), st.randoms(), count=40)
def test_continued_rows_equal_whole_sequences(lengths, delta, wide, random):
    layout = Layout.of_lengths(lengths)
    sizes = {"d": 32, "d_v": 64} if wide else {}
    inputs = random_inputs(layout, delta=delta, dtype=torch.float32, **sizes)
    generator = torch.Generator().manual_seed(2)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((layout.length, 20), (20, 4), (20,)))
    options = {"scaling": 0.3, "unit_vectors": True}
    expected = packed_recurrence(*inputs, layout, **options), packed_convolution(x, weight, bias, layout, silu=True)
    slots = random.sample(range(6), len(lengths))
    states = torch.zeros(6, 3000 + 4 * 32 * 64)
    others = [slot for slot in range(6) if slot not in slots]
    states[others] = 7.0
    starts = [0] * len(lengths)
    parts = []
    while any(start < length for start, length in zip(starts, lengths, strict=True)):
        stops = [min(n, start + random.choice([1, 1, 2, 17, 64])) for start, n in zip(starts, lengths, strict=True)]
        active = [n for n, (start, stop) in enumerate(zip(starts, stops, strict=True)) if stop > start]
        rows = ContinuedRows([stops[n] - starts[n] for n in active], [slots[n] for n in active], states)
        now = [None if t is None else split_rows(t, lengths, starts, stops) for t in inputs]
        y = rows.recurrence(*now, **options)
        z = rows.convolution(split_rows(x, lengths, starts, stops), weight, bias, silu=True)
        assert rows.state_size <= states.shape[1] and rows.state_size % 16 == 0
        parts.append((y, z, starts, stops))
        starts = stops
    for index, reference in enumerate(expected):
        for *computed, low, high in parts:
            torch.testing.assert_close(computed[index], split_rows(reference, lengths, low, high), rtol=2e-5, atol=2e-5)
    assert bool((states[others] == 7.0).all())
