"""A decoding step against its reference implementation, and what must hold of any step: a row's outputs are
its own, whatever is computed beside it and by how many threads."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from types import SimpleNamespace as Form

import pytest
import torch
from torch import Tensor

from deltaw.kernels import decode, decode_reference
from deltaw.kernels.decode import Decoder, DecoderBlock, DecoderLinear, PackedAdapter, Pages, reference_step
from deltaw.kernels.quantize import quantized_rows
from deltaw.kernels.rows import HalfNorms, Norm
from tests.kernels.conftest import compiled_only, off, same_bits

VARIANTS = "all"

I32 = torch.int32
KINDS = ("fp32", "bf16", "int8")
# Of logits, relative to their size: fp32 sums differ in their order alone. A number that is about halfway
# between two steps of a rounded type falls to either side, which is an error of one step of that row's input.
TOLERANCE = {"fp32": 2e-5, "bf16": 1.5e-2, "int8": 2.5e-2}

# What a random decoder is like: what a block is told as it is, and the rest.
TOLD = {"heads": 4, "key_heads": 2, "head_size": 12, "split": "apart", "gated": True, "parallel": False}
TOLD |= {"activation": "silu", "window": None, "softcap": None, "turned": 12}
REST = {"kind": "fp32", "hidden": 48, "inner": 80, "vocabulary": 101, "blocks": 2, "joint_gate": False, "bias": False}
REST |= {"centered": False, "offset": 0.0, "places": ("before",), "head_norms": False, "columns": False}
REST |= {"cache": torch.float32, "logits": (None, 1.0)}
BF16 = torch.bfloat16
PLAIN = {"gated": False, "centered": True, "bias": True}
FORMS = {
    "llama": {},
    "odd sizes": {"hidden": 50, "heads": 3, "key_heads": 3, "head_size": 10, "inner": 37, "turned": 6},
    "gemma": {
        "places": ("before", "after"), "offset": 1.0, "softcap": 5.0, "window": 9, "activation": "gelu_tanh",
        "head_norms": True, "logits": (4.0, 0.7),
    },
    "gpt2": {**PLAIN, "split": "stacked", "turned": 0, "activation": "gelu_tanh"},
    "neox": {**PLAIN, "split": "grouped", "parallel": True, "activation": "gelu"},
    "phi": {"split": "stacked", "joint_gate": True, "inner": 70},
    "post": {**PLAIN, "places": ("post",), "activation": "relu"},
    "many queries": {"heads": 20, "key_heads": 1, "head_size": 8, "turned": 8, "hidden": 64},
    "wide heads": {"heads": 2, "key_heads": 1, "head_size": 80, "turned": 32, "hidden": 130, "cache": BF16},
    "odd heads": {"heads": 3, "key_heads": 1, "head_size": 9, "turned": 4, "cache": BF16, "window": 7},
    "smooth": {"columns": True, "bias": True, "cache": BF16, "window": 40},
}  # fmt: skip


def linear(outputs: int, inputs: int, form: Form, bias: bool | None = None) -> DecoderLinear:
    weight = torch.randn(outputs, inputs) / math.sqrt(inputs)
    own = torch.randn(outputs) * 0.1 if (form.bias if bias is None else bias) else None
    if form.kind != "int8":
        return DecoderLinear(weight.to(torch.float32 if form.kind == "fp32" else BF16), own)
    columns = torch.rand(inputs) + 0.5 if form.columns else None
    rounded, scale = quantized_rows(weight if columns is None else weight / columns)
    return DecoderLinear(rounded, own, scale, columns)


def norm(size: int, form: Form) -> Norm:
    weight, bias = torch.rand(size) + 0.5 - form.offset, torch.randn(size) * 0.1 if form.centered else None
    return Norm(weight, bias, 1e-5, form.offset, form.centered)


def block(form: Form) -> DecoderBlock:
    wide, narrow, apart = form.heads * form.head_size, form.key_heads * form.head_size, form.split == "apart"
    first, second = (HalfNorms(**{place: norm(form.hidden, form) for place in form.places}) for _ in range(2))
    return DecoderBlock(
        query=linear(wide if apart else wide + 2 * narrow, form.hidden, form),
        key=linear(narrow, form.hidden, form) if apart else None,
        value=linear(narrow, form.hidden, form) if apart else None,
        output=linear(form.hidden, wide, form),
        gate=linear(form.inner * (2 if form.joint_gate else 1), form.hidden, form),
        up=linear(form.inner, form.hidden, form) if form.gated and not form.joint_gate else None,
        down=linear(form.hidden, form.inner, form),
        first=first,
        second=second,
        query_norm=norm(form.head_size, form) if form.head_norms else None,
        key_norm=norm(form.head_size, form) if form.head_norms else None,
        scaling=form.head_size**-0.5,
        **{name: getattr(form, name) for name in TOLD},
    )


def decoder(**changes: object) -> Decoder:
    form = Form(**{**TOLD, **REST, **changes})
    torch.manual_seed(0)
    angles = torch.arange(1200.0)[:, None] * torch.logspace(0, -3, max(1, form.turned // 2))
    tables = [(angles.cos(), angles.sin())] if form.turned else []
    blocks, head = [block(form) for _ in range(form.blocks)], linear(form.vocabulary, form.hidden, form, bias=False)
    how = {"cache_dtype": form.cache, "logits_softcap": form.logits[0], "logits_scale": form.logits[1]}
    return Decoder(blocks, norm(form.hidden, form), head, tables, **how)


def adapter(of: Decoder, seed: int, rank: int = 0) -> PackedAdapter:
    """On about half of the layers, of rank 1 … 20."""
    make = torch.Generator().manual_seed(seed)
    places = [(n, name) for n, b in enumerate(of.blocks) for name, _ in b.layers()] + [(-1, decode_reference.HEAD)]
    factors = {}
    for number, name in places:
        if rank == 0 and torch.rand((), generator=make) < 0.4:
            continue
        layer = of._layer(number, name)
        r = rank or int(torch.randint(1, 21, (), generator=make))
        A = torch.randn(layer.inputs, r, generator=make) / math.sqrt(layer.inputs)
        factors[number, name] = A, torch.randn(r, layer.outputs, generator=make) / math.sqrt(r), 0.5
    return of.pack_adapter(factors)


def adapters_of(of: Decoder, *ranks: int) -> list[PackedAdapter]:
    return [adapter(of, seed, rank) for seed, rank in enumerate(ranks or (0, 0, 0))]


@dataclass
class Rows:
    """A step's rows: of each sequence, tokens from a position on."""

    hidden: Tensor
    positions: Tensor
    sequence: Tensor
    adapter: Tensor

    @classmethod
    def of(cls, hidden: int, *chunks: tuple[int, int, int, int], seed: int = 0) -> Rows:
        """Chunks are (sequence, first position, tokens, adapter)."""
        rows = [(first + n, sequence, own) for sequence, first, count, own in chunks for n in range(count)]
        x = torch.randn(len(rows), hidden, generator=torch.Generator().manual_seed(seed))
        return cls(x, *torch.tensor(rows, dtype=I32).t().contiguous())

    def some(self, rows: slice) -> Rows:
        return Rows(self.hidden[rows], self.positions[rows], self.sequence[rows], self.adapter[rows])

    def step(self, of: Decoder, pages: Pages, table: Tensor, adapters=(), wanted=None) -> tuple[Tensor, Tensor]:
        return of.step(pages, self.hidden, self.positions, self.sequence, table, self.adapter, adapters, wanted)

    def reference(self, of: Decoder, pages: Pages, table: Tensor, adapters=()) -> tuple[Tensor, Tensor]:
        x, wanted = self.hidden.double(), torch.arange(len(self.hidden), dtype=I32)
        return reference_step(of, pages, x, self.positions, self.sequence, table, self.adapter, adapters, wanted)


def table_of(sequences: int, pages: int) -> Tensor:
    """Pages of each sequence, in a random order."""
    order = torch.randperm(sequences * pages, generator=torch.Generator().manual_seed(0))
    return order.to(I32).view(sequences, pages)


def new_pages(of: Decoder, count: int) -> Pages:
    """Pages of NaN: what nobody wrote must not be read."""
    pages = of.new_pages(count)
    pages.data.fill_(float("nan"))
    return pages


def assert_alone_as_together(of: Decoder, rows: Rows, table: Tensor, adapters: list[PackedAdapter]) -> None:
    """Each row has the same bits alone and beside the others."""
    together, alone = new_pages(of, table.numel()), new_pages(of, table.numel())
    found = rows.step(of, together, table, adapters)
    for m in range(len(rows.hidden)):
        one = rows.some(slice(m, m + 1)).step(of, alone, table, adapters)
        assert same_bits([outputs[0] for outputs in one], [outputs[m] for outputs in found]), m
    assert found[1][:37].std() > 0.01


@pytest.fixture
def no_reference(monkeypatch):
    """Steps are the compiled kernels', or fail: the tests call the reference implementation by themselves."""
    monkeypatch.setattr(decode, "reference_step", None)


@pytest.mark.each_pair
@compiled_only
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FORMS)
def test_a_step_is_the_reference_implementations(name, kind, no_reference):
    of = decoder(**FORMS[name], kind=kind)
    adapters, table, pages = adapters_of(of), table_of(3, 4), [new_pages(of, 12) for _ in range(2)]
    tolerance = TOLERANCE[kind] * (100 if of.cache_dtype == BF16 and kind == "fp32" else 1)
    for seed, chunks in enumerate(
        (((0, 0, 45, 0), (2, 0, 33, -1), (1, 0, 7, 2)), ((1, 7, 1, 2), (0, 45, 1, 0), (2, 33, 2, 1))), 1
    ):
        rows = Rows.of(of.final_norm.weight.numel(), *chunks, seed=seed)
        exact = rows.reference(of, pages[1], table, adapters)
        for found, expected in zip(rows.step(of, pages[0], table, adapters), exact, strict=True):
            assert off(found, expected) < tolerance


@compiled_only
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "odd sizes", "phi", "many queries"])
def test_a_row_has_the_same_bits_alone_and_in_any_company(name, kind, no_reference):
    of = decoder(**FORMS[name], kind=kind, blocks=1)
    rows = Rows.of(of.head.inputs, (0, 0, 37, 0), (1, 0, 3, 1), (2, 0, 40, -1), (3, 0, 12, 2), (4, 0, 5, 3))
    assert_alone_as_together(of, rows, table_of(5, 4), adapters_of(of, 4, 16, 9, 64))


@compiled_only
def test_a_long_context_has_the_same_bits_for_any_number_of_threads(no_reference):
    of, table = decoder(blocks=1, heads=2, key_heads=1, vocabulary=33), table_of(1, 34)
    prompt, pages, found = Rows.of(48, (0, 0, 1050, -1)), new_pages(of, 34), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(prompt.step(of, pages, table)[1])
        assert torch.equal(found[-1][-1], prompt.some(slice(1049, 1050)).step(of, pages, table)[1][0])
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert off(found[0], prompt.reference(of, new_pages(of, 34), table)[1]) < 2e-5


def test_sequences_share_the_pages_of_a_prefix(kernels):
    of = decoder()
    pages, table = new_pages(of, 6), torch.tensor([[4, 1], [4, 2], [3, 5]], dtype=I32)
    whole = Rows.of(48, (2, 0, 38, -1))
    prefix, end = whole.some(slice(0, 32)), whole.some(slice(32, 38))
    replace(prefix, sequence=torch.zeros_like(prefix.sequence)).step(of, pages, table)
    expected = whole.step(of, pages, table)[1][32:]
    for sequence in (0, 1):
        shared = replace(end, sequence=torch.full_like(end.sequence, sequence)).step(of, pages, table)[1]
        torch.testing.assert_close(shared, expected, rtol=1e-5, atol=1e-5)
    pages.copy(1, 0)
    table[2] = torch.tensor([4, 0])
    again, first = (Rows.of(48, (sequence, 38, 1, -1)).step(of, pages, table)[1] for sequence in (2, 0))
    assert torch.equal(again, first)


def test_only_wanted_rows_come_back(kernels):
    of = decoder()
    table, pages, adapters = table_of(2, 2), new_pages(of, 4), adapters_of(of, 4)
    rows, wanted = Rows.of(48, (0, 0, 20, 0), (1, 0, 9, -1)), torch.tensor([28, 3], dtype=I32)
    everything = rows.step(of, pages, table, adapters)
    for found, whole in zip(rows.step(of, pages, table, adapters, wanted), everything, strict=True):
        torch.testing.assert_close(found, whole[wanted.long()])
    assert [tuple(none.shape) for none in rows.step(of, pages, table, adapters, wanted[:0])] == [(0, 48), (0, 101)]


@pytest.mark.parametrize(
    ("changed", "value"),
    [
        ("positions", 64),
        ("positions", -1),
        ("sequence", 2),
        ("adapter", 1),
        ("adapter", -2),
        ("page", 4),
        ("wanted", 6),
    ],
)
def test_what_lies_outside_is_refused(kernels, changed, value):
    of = decoder()
    pages, rows, adapters = new_pages(of, 4), Rows.of(48, (0, 0, 3, 0), (1, 0, 3, -1)), adapters_of(of, 0)
    table, wanted = table_of(2, 2), torch.tensor([5], dtype=I32)
    rows.step(of, pages, table, adapters, wanted)
    {"page": table[1, :1], "wanted": wanted, **vars(rows)}[changed][-1] = value
    with pytest.raises(IndexError):
        rows.step(of, pages, table, adapters, wanted)


def test_parts_that_do_not_fit_are_refused():
    of, factors = decoder(), (torch.ones(48, 2), torch.ones(2, 48), 1.0)
    for place, what in (((2, "query"), "no layer"), ((0, "key"), "B of key")):
        with pytest.raises(ValueError, match=what):
            of.pack_adapter({place: factors})
    with pytest.raises(ValueError, match="scales"):
        DecoderLinear(torch.ones(4, 4, dtype=torch.int8))
    with pytest.raises(ValueError, match="down"):
        replace(of.blocks[0], down=DecoderLinear(torch.ones(40, 80)))
    with pytest.raises(TypeError, match="int32"):
        Rows.of(48, (0, 0, 3, 0)).step(of, new_pages(of, 2), table_of(2, 1).long())
