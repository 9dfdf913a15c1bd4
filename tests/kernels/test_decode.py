"""A decoding step against its reference implementation, and what must hold of any step: a row's outputs are
its own, whatever is computed beside it and by how many threads."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from deltaw.kernels import decode, decode_reference
from deltaw.kernels.decode import Decoder, DecoderBlock, DecoderLinear, PackedAdapter, Pages, reference_step
from deltaw.kernels.quantize import quantized_rows
from deltaw.kernels.rows import HalfNorms, Norm
from tests.kernels.conftest import compiled_only

VARIANTS = "all"

I32 = torch.int32
KINDS = ("fp32", "bf16", "int8")
# Of logits, relative to their size: fp32 sums differ in their order alone. A number that is about halfway
# between two steps of a rounded type falls to either side, which is an error of one step of that row's input.
TOLERANCE = {"fp32": 2e-5, "bf16": 1.5e-2, "int8": 2.5e-2}


@dataclass(frozen=True)
class Form:
    """What a random decoder is like."""

    kind: str = "fp32"
    hidden: int = 48
    heads: int = 4
    key_heads: int = 2
    head_size: int = 12
    inner: int = 80
    vocabulary: int = 101
    blocks: int = 2
    split: str = "apart"
    gated: bool = True
    joint_gate: bool = False
    parallel: bool = False
    activation: str = "silu"
    window: int | None = None
    softcap: float | None = None
    turned: int = 12
    centered: bool = False
    offset: float = 0.0
    places: tuple[str, ...] = ("before",)
    head_norms: bool = False
    bias: bool = False
    columns: bool = False
    cache: torch.dtype = torch.float32
    logits: tuple[float | None, float] = (None, 1.0)


FORMS = {
    "llama": Form(),
    "odd sizes": Form(hidden=50, heads=3, key_heads=3, head_size=10, inner=37, turned=6, vocabulary=67),
    "gemma": Form(
        places=("before", "after"), offset=1.0, softcap=5.0, window=9, activation="gelu_tanh",
        head_norms=True, logits=(4.0, 0.7),
    ),
    "gpt2": Form(split="stacked", gated=False, centered=True, bias=True, turned=0, activation="gelu_tanh"),
    "neox": Form(split="grouped", parallel=True, gated=False, centered=True, bias=True, activation="gelu"),
    "phi": Form(split="stacked", joint_gate=True, inner=70),
    "post": Form(places=("post",), centered=True, activation="relu", gated=False, bias=True),
    "many queries": Form(heads=20, key_heads=1, head_size=8, turned=8, hidden=64),
    "wide heads": Form(heads=2, key_heads=1, head_size=80, turned=32, hidden=130, cache=torch.bfloat16),
    "odd heads": Form(heads=3, key_heads=1, head_size=9, turned=4, cache=torch.bfloat16, window=7),
    "smooth": Form(columns=True, bias=True, cache=torch.bfloat16, window=40),
}  # fmt: skip


def linear(outputs: int, inputs: int, form: Form, bias: bool | None = None) -> DecoderLinear:
    weight = torch.randn(outputs, inputs) / math.sqrt(inputs)
    own = torch.randn(outputs) * 0.1 if (form.bias if bias is None else bias) else None
    if form.kind == "fp32":
        return DecoderLinear(weight, own)
    if form.kind == "bf16":
        return DecoderLinear(weight.bfloat16(), own)
    columns = torch.rand(inputs) + 0.5 if form.columns else None
    rounded, scale = quantized_rows(weight if columns is None else weight / columns)
    return DecoderLinear(rounded, own, scale, columns)


def norm(size: int, form: Form) -> Norm:
    weight, bias = torch.rand(size) + 0.5 - form.offset, torch.randn(size) * 0.1 if form.centered else None
    return Norm(weight, bias, 1e-5, form.offset, form.centered)


def norms(form: Form) -> HalfNorms:
    return HalfNorms(**{place: norm(form.hidden, form) for place in form.places})


def block(form: Form) -> DecoderBlock:
    wide, narrow = form.heads * form.head_size, form.key_heads * form.head_size
    apart = form.split == "apart"
    return DecoderBlock(
        form.heads,
        form.key_heads,
        form.head_size,
        query=linear(wide if apart else wide + 2 * narrow, form.hidden, form),
        key=linear(narrow, form.hidden, form) if apart else None,
        value=linear(narrow, form.hidden, form) if apart else None,
        output=linear(form.hidden, wide, form),
        gate=linear(form.inner * (2 if form.joint_gate else 1), form.hidden, form),
        up=linear(form.inner, form.hidden, form) if form.gated and not form.joint_gate else None,
        down=linear(form.hidden, form.inner, form),
        first=norms(form),
        second=norms(form),
        query_norm=norm(form.head_size, form) if form.head_norms else None,
        key_norm=norm(form.head_size, form) if form.head_norms else None,
        split=form.split,  # type: ignore[arg-type]
        gated=form.gated,
        parallel=form.parallel,
        activation=form.activation,
        scaling=form.head_size**-0.5,
        window=form.window,
        softcap=form.softcap,
        turned=form.turned,
    )


def decoder(form: Form, seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    angles = torch.arange(1200.0)[:, None] * torch.logspace(0, -3, max(1, form.turned // 2))
    tables = [(angles.cos(), angles.sin())] if form.turned else []
    softcap, scale = form.logits
    return Decoder(
        [block(form) for _ in range(form.blocks)],
        norm(form.hidden, form),
        linear(form.vocabulary, form.hidden, form, bias=False),
        tables,
        cache_dtype=form.cache,
        logits_softcap=softcap,
        logits_scale=scale,
    )


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


@dataclass
class Rows:
    """A step's rows: of each sequence, tokens from a position on."""

    hidden: Tensor
    positions: Tensor
    sequence: Tensor
    adapter: Tensor

    @classmethod
    def of(cls, hidden: int, chunks: list[tuple[int, int, int, int]], seed: int = 0) -> Rows:
        """Chunks are (sequence, first position, tokens, adapter)."""
        x = torch.randn(sum(n for _, _, n, _ in chunks), hidden, generator=torch.Generator().manual_seed(seed))
        positions = torch.cat([torch.arange(at, at + n, dtype=I32) for _, at, n, _ in chunks])
        sequence = torch.cat([torch.full((n,), s, dtype=I32) for s, _, n, _ in chunks])
        return cls(x, positions, sequence, torch.cat([torch.full((n,), a, dtype=I32) for _, _, n, a in chunks]))

    def some(self, rows: slice) -> Rows:
        return Rows(self.hidden[rows], self.positions[rows], self.sequence[rows], self.adapter[rows])

    def step(
        self, of: Decoder, pages: Pages, table: Tensor, adapters: Any = (), wanted: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        how = (pages, self.hidden, self.positions, self.sequence, table, self.adapter, adapters, wanted)
        return of.step(*how)

    def reference(
        self, of: Decoder, pages: Pages, table: Tensor, adapters: Any = (), dtype: torch.dtype = torch.float64
    ) -> tuple[Tensor, Tensor]:
        wanted = torch.arange(len(self.hidden), dtype=I32)
        x = self.hidden.to(dtype)
        return reference_step(of, pages, x, self.positions, self.sequence, table, self.adapter, adapters, wanted)


def table_of(sequences: int, pages: int, seed: int = 0) -> Tensor:
    """Pages of each sequence, in a random order."""
    order = torch.randperm(sequences * pages, generator=torch.Generator().manual_seed(seed))
    return order.to(I32).view(sequences, pages)


def new_pages(of: Decoder, count: int) -> Pages:
    """Pages of NaN: what nobody wrote must not be read."""
    pages = of.new_pages(count)
    pages.data.fill_(float("nan"))
    return pages


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.fixture
def no_reference(monkeypatch):
    """Steps are the compiled kernels', or fail: the tests call the reference implementation by themselves."""
    monkeypatch.setattr(decode, "reference_step", None)


@pytest.mark.each_pair
@compiled_only
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FORMS)
def test_a_step_is_the_reference_implementations(name, kind, no_reference):
    form = replace(FORMS[name], kind=kind)
    of = decoder(form)
    adapters = [adapter(of, seed) for seed in range(3)]
    table = table_of(3, 4)
    ours, theirs = new_pages(of, 12), new_pages(of, 12)
    prompts = Rows.of(form.hidden, [(0, 0, 45, 0), (2, 0, 33, -1), (1, 0, 7, 2)], seed=1)
    nexts = Rows.of(form.hidden, [(1, 7, 1, 2), (0, 45, 1, 0), (2, 33, 2, 1)], seed=2)
    for rows in (prompts, nexts):
        hidden, logits = rows.step(of, ours, table, adapters)
        hidden64, logits64 = rows.reference(of, theirs, table, adapters)
        loose = 10 if form.cache == torch.bfloat16 and kind == "fp32" else 1
        assert error(hidden, hidden64) < TOLERANCE[kind] * (100 if loose > 1 else 1)
        assert error(logits, logits64) < TOLERANCE[kind] * (100 if loose > 1 else 1)


@compiled_only
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "odd sizes", "phi", "many queries"])
def test_a_row_has_the_same_bits_alone_and_in_any_company(name, kind, no_reference):
    form = replace(FORMS[name], kind=kind, blocks=1)
    of = decoder(form)
    adapters = [adapter(of, seed, rank) for seed, rank in enumerate((4, 16, 9, 64))]
    table = table_of(5, 4)
    chunks = [(s, 0, n, a) for s, n, a in ((0, 37, 0), (1, 3, 1), (2, 40, -1), (3, 12, 2), (4, 5, 3))]
    together, alone = new_pages(of, 20), new_pages(of, 20)
    rows = Rows.of(form.hidden, chunks)
    hidden, logits = rows.step(of, together, table, adapters)
    for m in range(len(rows.hidden)):
        one = rows.some(slice(m, m + 1)).step(of, alone, table, adapters)
        assert torch.equal(one[0][0], hidden[m]) and torch.equal(one[1][0], logits[m]), m
    assert logits[:37].std() > 0.1


@compiled_only
def test_a_long_context_has_the_same_bits_for_any_number_of_threads(no_reference):
    form = Form(blocks=1, heads=2, key_heads=1, vocabulary=33)
    of, table = decoder(form), table_of(1, 34)
    pages = new_pages(of, 34)
    prompt = Rows.of(form.hidden, [(0, 0, 1050, -1)])
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            whole = prompt.step(of, pages, table)[1]
            last = prompt.some(slice(1049, 1050)).step(of, pages, table)[1]
            assert torch.equal(whole[-1], last[0])
            found.append(whole)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert error(found[0], prompt.reference(of, new_pages(of, 34), table)[1]) < 2e-5


def test_sequences_share_the_pages_of_a_prefix(kernels):
    form = Form(blocks=2)
    of = decoder(form)
    pages = new_pages(of, 6)
    table = torch.tensor([[4, 1], [4, 2], [3, 5]], dtype=I32)
    prefix = Rows.of(form.hidden, [(0, 0, 32, -1)], seed=1)
    prefix.step(of, pages, table)
    ends = [Rows.of(form.hidden, [(s, 32, 6, -1)], seed=7) for s in (0, 1)]
    shared = [rows.step(of, pages, table)[1] for rows in ends]
    own = Rows(
        torch.cat([prefix.hidden, ends[0].hidden]), torch.arange(38, dtype=I32),
        torch.full((38,), 2, dtype=I32), torch.full((38,), -1, dtype=I32),
    )  # fmt: skip
    whole = own.step(of, pages, table)[1][32:]
    torch.testing.assert_close(shared[0], whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(shared[1], whole, rtol=1e-5, atol=1e-5)
    pages.copy(1, 0)
    table[2] = torch.tensor([4, 0])
    again = Rows.of(form.hidden, [(2, 38, 1, -1)], seed=3).step(of, pages, table)[1]
    first = Rows.of(form.hidden, [(0, 38, 1, -1)], seed=3).step(of, pages, table)[1]
    assert torch.equal(again, first)


def test_only_wanted_rows_come_back(kernels):
    of = decoder(Form())
    table, pages = table_of(2, 2), new_pages(of, 4)
    adapters = [adapter(of, 0, 4)]
    rows = Rows.of(48, [(0, 0, 20, 0), (1, 0, 9, -1)])
    all_hidden, all_logits = rows.step(of, pages, table, adapters)
    wanted = torch.tensor([28, 3], dtype=I32)
    hidden, logits = rows.step(of, pages, table, adapters, wanted)
    torch.testing.assert_close(hidden, all_hidden[wanted.long()])
    torch.testing.assert_close(logits, all_logits[wanted.long()])
    none = rows.step(of, pages, table, adapters, wanted[:0])
    assert none[0].shape == (0, 48) and none[1].shape == (0, 101)


def test_an_adapter_changes_its_own_rows_alone(kernels):
    of = decoder(Form())
    table, pages = table_of(2, 1), new_pages(of, 2)
    adapters = [adapter(of, 0, 8)]
    base = Rows.of(48, [(0, 0, 5, -1), (1, 0, 5, -1)]).step(of, pages, table, adapters)[1]
    mixed = Rows.of(48, [(0, 0, 5, 0), (1, 0, 5, -1)]).step(of, pages, table, adapters)[1]
    assert error(mixed[:5], base[:5]) > 0.05
    torch.testing.assert_close(mixed[5:], base[5:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("changed", "value"),
    [("positions", 64), ("positions", -1), ("sequence", 2), ("adapter", 1), ("adapter", -2), ("page", 4)],
)
def test_what_lies_outside_is_refused(kernels, changed, value):
    of = decoder(Form())
    table, pages = table_of(2, 2), new_pages(of, 4)
    rows = Rows.of(48, [(0, 0, 3, 0), (1, 0, 3, -1)])
    adapters = [adapter(of, 0)]
    rows.step(of, pages, table, adapters)
    if changed == "page":
        table[1, 0] = value
    else:
        getattr(rows, changed)[-1] = value
    with pytest.raises(IndexError):
        rows.step(of, pages, table, adapters)
    if changed == "positions":
        with pytest.raises(IndexError):
            Rows.of(48, [(0, 0, 3, 0)]).step(of, pages, table, adapters, torch.tensor([3], dtype=I32))


def test_parts_that_do_not_fit_are_refused():
    of = decoder(Form())
    with pytest.raises(ValueError, match="no layer"):
        of.pack_adapter({(2, "query"): (torch.ones(48, 2), torch.ones(2, 48), 1.0)})
    with pytest.raises(ValueError, match="B of key"):
        of.pack_adapter({(0, "key"): (torch.ones(48, 2), torch.ones(2, 48), 1.0)})
    with pytest.raises(ValueError, match="scales"):
        DecoderLinear(torch.ones(4, 4, dtype=torch.int8))
    with pytest.raises(ValueError, match="down"):
        replace(of.blocks[0], down=linear(40, 80, Form()))
    with pytest.raises(TypeError, match="int32"):
        Rows.of(48, [(0, 0, 3, 0)]).step(of, new_pages(of, 2), table_of(2, 1).long())
