"""Tests of decoding steps against the reference implementation, and of their independence from batch and threads."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from types import SimpleNamespace as Config

import pytest
import torch
from torch import Tensor

from deltaw.kernels import decode, decode_reference
from deltaw.kernels.decode import Decoder, PackedAdapter, Pages, reference_step
from deltaw.kernels.decode_reference import DecoderBlock, DecoderLinear
from deltaw.kernels.quantize import quantize_rows
from deltaw.kernels.rows import HalfNorms, Norm
from tests.kernels.conftest import compiled_only, relative_error, same_bits

VARIANTS = "all"

I32 = torch.int32
KINDS = ("fp32", "bf16", "int8")
# Relative error of the logits. fp32 sums differ only in their order. A value halfway between two steps of a rounded
# type may round either way, an error of one step in that row's input.
TOLERANCE = {"fp32": 2e-5, "bf16": 1.5e-2, "int8": 2.5e-2}

# Default configuration of a random decoder: arguments of DecoderBlock, then the other settings.
BLOCK_OPTIONS = {"heads": 4, "key_heads": 2, "head_size": 12, "split": "apart", "gated": True, "parallel": False}
BLOCK_OPTIONS |= {"activation": "silu", "window": None, "softcap": None, "rotary_dims": 12}
OTHER_OPTIONS = {"kind": "fp32", "hidden": 48, "inner": 80, "vocabulary": 101, "blocks": 2, "joint_gate": False}
OTHER_OPTIONS |= {"bias": False}
OTHER_OPTIONS |= {"centered": False, "offset": 0.0, "places": ("before",), "head_norms": False, "columns": False}
OTHER_OPTIONS |= {"cache": torch.float32, "logits": (None, 1.0)}
BF16 = torch.bfloat16
PLAIN = {"gated": False, "centered": True, "bias": True}
CONFIGS = {
    "llama": {},
    "odd sizes": {"hidden": 50, "heads": 3, "key_heads": 3, "head_size": 10, "inner": 37, "rotary_dims": 6},
    "gemma": {
        "places": ("before", "after"), "offset": 1.0, "softcap": 5.0, "window": 9, "activation": "gelu_tanh",
        "head_norms": True, "logits": (4.0, 0.7),
    },
    "gpt2": {**PLAIN, "split": "stacked", "rotary_dims": 0, "activation": "gelu_tanh"},
    "neox": {**PLAIN, "split": "grouped", "parallel": True, "activation": "gelu"},
    "phi": {"split": "stacked", "joint_gate": True, "inner": 70},
    "post": {**PLAIN, "places": ("post",), "activation": "relu"},
    "many queries": {"heads": 20, "key_heads": 1, "head_size": 8, "rotary_dims": 8, "hidden": 64},
    "wide heads": {"heads": 2, "key_heads": 1, "head_size": 80, "rotary_dims": 32, "hidden": 130, "cache": BF16},
    "odd heads": {"heads": 3, "key_heads": 1, "head_size": 9, "rotary_dims": 4, "cache": BF16, "window": 7},
    "smooth": {"columns": True, "bias": True, "cache": BF16, "window": 40},
}  # fmt: skip


def linear(outputs: int, inputs: int, form: Config, bias: bool | None = None) -> DecoderLinear:
    weight = torch.randn(outputs, inputs) / math.sqrt(inputs)
    bias_values = torch.randn(outputs) * 0.1 if (form.bias if bias is None else bias) else None
    if form.kind != "int8":
        return DecoderLinear(weight.to(torch.float32 if form.kind == "fp32" else BF16), bias_values)
    columns = torch.rand(inputs) + 0.5 if form.columns else None
    rounded, scale = quantize_rows(weight if columns is None else weight / columns)
    return DecoderLinear(rounded, bias_values, scale, columns)


def norm(size: int, form: Config) -> Norm:
    weight = torch.rand(size) + 0.5 - form.offset
    bias = torch.randn(size) * 0.1 if form.centered else None
    return Norm(weight, bias, 1e-5, form.offset, form.centered)


def block(form: Config) -> DecoderBlock:
    query_size = form.heads * form.head_size
    key_size = form.key_heads * form.head_size
    is_separate = form.split == "apart"
    first, second = (HalfNorms(**{position: norm(form.hidden, form) for position in form.places}) for _ in range(2))
    return DecoderBlock(
        query=linear(query_size if is_separate else query_size + 2 * key_size, form.hidden, form),
        key=linear(key_size, form.hidden, form) if is_separate else None,
        value=linear(key_size, form.hidden, form) if is_separate else None,
        output=linear(form.hidden, query_size, form),
        gate=linear(form.inner * (2 if form.joint_gate else 1), form.hidden, form),
        up=linear(form.inner, form.hidden, form) if form.gated and not form.joint_gate else None,
        down=linear(form.hidden, form.inner, form),
        first=first,
        second=second,
        query_norm=norm(form.head_size, form) if form.head_norms else None,
        key_norm=norm(form.head_size, form) if form.head_norms else None,
        scaling=form.head_size**-0.5,
        **{name: getattr(form, name) for name in BLOCK_OPTIONS},
    )


def decoder(**changes: object) -> Decoder:
    form = Config(**{**BLOCK_OPTIONS, **OTHER_OPTIONS, **changes})
    torch.manual_seed(0)
    angles = torch.arange(1200.0)[:, None] * torch.logspace(0, -3, max(1, form.rotary_dims // 2))
    tables = [(angles.cos(), angles.sin())] if form.rotary_dims else []
    blocks = [block(form) for _ in range(form.blocks)]
    head = linear(form.vocabulary, form.hidden, form, bias=False)
    options = {"cache_dtype": form.cache, "logits_softcap": form.logits[0], "logits_scale": form.logits[1]}
    return Decoder(blocks, norm(form.hidden, form), head, tables, **options)


def adapter(decoder: Decoder, seed: int, rank: int = 0) -> PackedAdapter:
    """Return a random adapter of about half of the layers, with ranks from 1 to 20 if ``rank`` is 0."""
    generator = torch.Generator().manual_seed(seed)
    layers = [(n, name) for n, b in enumerate(decoder.blocks) for name, _ in b.layers()] + [(-1, decode_reference.HEAD)]
    factors = {}
    for block_index, name in layers:
        if rank == 0 and torch.rand((), generator=generator) < 0.4:
            continue
        layer = decoder._layer(block_index, name)
        r = rank or int(torch.randint(1, 21, (), generator=generator))
        A = torch.randn(layer.inputs, r, generator=generator) / math.sqrt(layer.inputs)
        factors[block_index, name] = A, torch.randn(r, layer.outputs, generator=generator) / math.sqrt(r), 0.5
    return decoder.pack_adapter(factors)


def adapters_of(decoder: Decoder, *ranks: int) -> list[PackedAdapter]:
    return [adapter(decoder, seed, rank) for seed, rank in enumerate(ranks or (0, 0, 0))]


@dataclass
class Rows:
    """Rows of a step: tokens of each sequence from a given position."""

    hidden: Tensor
    positions: Tensor
    sequence: Tensor
    adapter: Tensor

    @classmethod
    def of(cls, hidden: int, *chunks: tuple[int, int, int, int], seed: int = 0) -> Rows:
        """Chunks are (sequence, first position, tokens, adapter)."""
        rows = [(first + n, sequence, adapter) for sequence, first, count, adapter in chunks for n in range(count)]
        x = torch.randn(len(rows), hidden, generator=torch.Generator().manual_seed(seed))
        return cls(x, *torch.tensor(rows, dtype=I32).t().contiguous())

    def subset(self, rows: slice) -> Rows:
        return Rows(self.hidden[rows], self.positions[rows], self.sequence[rows], self.adapter[rows])

    def step(self, decoder: Decoder, pages: Pages, table: Tensor, adapters=(), selected=None) -> tuple[Tensor, Tensor]:
        return decoder.step(pages, self.hidden, self.positions, self.sequence, table, self.adapter, adapters, selected)

    def reference(self, decoder: Decoder, pages: Pages, table: Tensor, adapters=()) -> tuple[Tensor, Tensor]:
        x = self.hidden.double()
        selected = torch.arange(len(self.hidden), dtype=I32)
        return reference_step(decoder, pages, x, self.positions, self.sequence, table, self.adapter, adapters, selected)


def table_of(sequences: int, pages: int) -> Tensor:
    """Return a page table with the pages of each sequence in random order."""
    order = torch.randperm(sequences * pages, generator=torch.Generator().manual_seed(0))
    return order.to(I32).view(sequences, pages)


def new_pages(decoder: Decoder, count: int) -> Pages:
    """Return pages filled with NaN, so that reading unwritten memory is detected."""
    pages = decoder.new_pages(count)
    pages.data.fill_(float("nan"))
    return pages


def assert_rows_are_independent(decoder: Decoder, rows: Rows, table: Tensor, adapters: list[PackedAdapter]) -> None:
    """Assert that each row has bit-identical outputs in a batch and in a step of its own row."""
    batch_pages = new_pages(decoder, table.numel())
    single_pages = new_pages(decoder, table.numel())
    batch_outputs = rows.step(decoder, batch_pages, table, adapters)
    for m in range(len(rows.hidden)):
        single_outputs = rows.subset(slice(m, m + 1)).step(decoder, single_pages, table, adapters)
        assert same_bits([outputs[0] for outputs in single_outputs], [outputs[m] for outputs in batch_outputs]), m
    assert batch_outputs[1][:37].std() > 0.01


@pytest.fixture
def no_reference(monkeypatch):
    """Make a fallback to the reference implementation an error. The tests call it directly."""
    monkeypatch.setattr(decode, "reference_step", None)


@pytest.mark.each_pair
@compiled_only
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_step_matches_reference(name, kind, no_reference):
    model = decoder(**CONFIGS[name], kind=kind)
    adapters = adapters_of(model)
    table = table_of(3, 4)
    pages = [new_pages(model, 12) for _ in range(2)]
    tolerance = TOLERANCE[kind] * (100 if model.cache_dtype == BF16 and kind == "fp32" else 1)
    for seed, chunks in enumerate(
        (((0, 0, 45, 0), (2, 0, 33, -1), (1, 0, 7, 2)), ((1, 7, 1, 2), (0, 45, 1, 0), (2, 33, 2, 1))), 1
    ):
        rows = Rows.of(model.final_norm.weight.numel(), *chunks, seed=seed)
        exact = rows.reference(model, pages[1], table, adapters)
        for actual, expected in zip(rows.step(model, pages[0], table, adapters), exact, strict=True):
            assert relative_error(actual, expected) < tolerance


@compiled_only
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "odd sizes", "phi", "many queries"])
def test_row_is_bit_identical_in_any_batch(name, kind, no_reference):
    model = decoder(**CONFIGS[name], kind=kind, blocks=1)
    rows = Rows.of(model.head.inputs, (0, 0, 37, 0), (1, 0, 3, 1), (2, 0, 40, -1), (3, 0, 12, 2), (4, 0, 5, 3))
    assert_rows_are_independent(model, rows, table_of(5, 4), adapters_of(model, 4, 16, 9, 64))


@compiled_only
def test_long_context_is_bit_identical_for_any_thread_count(no_reference):
    model = decoder(blocks=1, heads=2, key_heads=1, vocabulary=33)
    table = table_of(1, 34)
    prompt = Rows.of(48, (0, 0, 1050, -1))
    pages = new_pages(model, 34)
    logits = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        logits.append(prompt.step(model, pages, table)[1])
        assert torch.equal(logits[-1][-1], prompt.subset(slice(1049, 1050)).step(model, pages, table)[1][0])
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])
    assert relative_error(logits[0], prompt.reference(model, new_pages(model, 34), table)[1]) < 2e-5


def test_sequences_share_pages_of_a_prefix(kernels):
    model = decoder()
    pages = new_pages(model, 6)
    table = torch.tensor([[4, 1], [4, 2], [3, 5]], dtype=I32)
    full = Rows.of(48, (2, 0, 38, -1))
    prefix = full.subset(slice(0, 32))
    suffix = full.subset(slice(32, 38))
    replace(prefix, sequence=torch.zeros_like(prefix.sequence)).step(model, pages, table)
    expected = full.step(model, pages, table)[1][32:]
    for sequence in (0, 1):
        shared = replace(suffix, sequence=torch.full_like(suffix.sequence, sequence)).step(model, pages, table)[1]
        torch.testing.assert_close(shared, expected, rtol=1e-5, atol=1e-5)
    pages.copy(1, 0)
    table[2] = torch.tensor([4, 0])
    copied, original = (Rows.of(48, (sequence, 38, 1, -1)).step(model, pages, table)[1] for sequence in (2, 0))
    assert torch.equal(copied, original)


def test_step_returns_only_selected_rows(kernels):
    model = decoder()
    table = table_of(2, 2)
    pages = new_pages(model, 4)
    adapters = adapters_of(model, 4)
    rows = Rows.of(48, (0, 0, 20, 0), (1, 0, 9, -1))
    selected = torch.tensor([28, 3], dtype=I32)
    all_outputs = rows.step(model, pages, table, adapters)
    for actual, full in zip(rows.step(model, pages, table, adapters, selected), all_outputs, strict=True):
        torch.testing.assert_close(actual, full[selected.long()])
    none_selected = rows.step(model, pages, table, adapters, selected[:0])
    assert [tuple(empty.shape) for empty in none_selected] == [(0, 48), (0, 101)]


INVALID_INDICES = [("positions", 64), ("positions", -1), ("sequence", 2), ("adapter", 1), ("adapter", -2), ("page", 4)]
INVALID_INDICES += [("selected", 6)]


@pytest.mark.parametrize(("changed", "value"), INVALID_INDICES)
def test_out_of_range_index_raises(kernels, changed, value):
    model = decoder()
    pages = new_pages(model, 4)
    rows = Rows.of(48, (0, 0, 3, 0), (1, 0, 3, -1))
    adapters = adapters_of(model, 0)
    table = table_of(2, 2)
    selected = torch.tensor([5], dtype=I32)
    rows.step(model, pages, table, adapters, selected)
    {"page": table[1, :1], "selected": selected, **vars(rows)}[changed][-1] = value
    with pytest.raises(IndexError):
        rows.step(model, pages, table, adapters, selected)


def test_mismatched_parts_raise():
    model = decoder()
    factors = (torch.ones(48, 2), torch.ones(2, 48), 1.0)
    for layer, message in (((2, "query"), "no layer"), ((0, "key"), "B of key")):
        with pytest.raises(ValueError, match=message):
            model.pack_adapter({layer: factors})
    with pytest.raises(ValueError, match="scales"):
        DecoderLinear(torch.ones(4, 4, dtype=torch.int8))
    with pytest.raises(ValueError, match="down"):
        replace(model.blocks[0], down=DecoderLinear(torch.ones(40, 80)))
    with pytest.raises(TypeError, match="int32"):
        Rows.of(48, (0, 0, 3, 0)).step(model, new_pages(model, 2), table_of(2, 1).long())
