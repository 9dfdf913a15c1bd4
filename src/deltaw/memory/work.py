"""What a run computes: operators, floating-point operations, and the kernels that the CPU's libraries build.

A matrix library builds a kernel for every shape that it meets, and keeps it: that memory no tensor shows.
How large a kernel is, :mod:`deltaw.memory.work` measures. Knows operators alone; formulas of their
operations are torch's own.
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import flop_registry

from deltaw.cache import recall, remember
from deltaw.kernels.torch_private import FLASH_BACKWARD, GROUPED_PRODUCT, DispatchMode
from deltaw.machine.memory import resident_bytes, trim_memory
from deltaw.machine.processor import processor_flags, processor_name

# What torch's libraries hold beside tensors: measured on this machine, not written down.
#
# Two things. On its first use a library loads its own code and tables and starts its threads: :func:`warm_up`
# uses what a training uses once, on tensors of a few kilobytes, so that this memory is part of what the process
# is seen to hold. And a matrix library builds a kernel for each shape that it meets and keeps it: how large one
# is follows from the process's growth over a few shapes, once for each processor and version.
#
# Knows operators and the process; no models and no runs.


MADE_BY = ("torch", "deltaw.memory.work")
# Shapes that a kernel's size is the mean over, after one that is not counted.
_SHAPES = 6
# Lengths of rows up to this one count as short: attention's kernels for them are smaller.
SHORT = 64


def warm_up(dtype: torch.dtype) -> None:
    """Use once what a training step uses, with weights of this type."""
    rows, width, classes = 64, 256, 512
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        weight = torch.ones(width, width, dtype=dtype)
        factor = torch.ones(width, 8, requires_grad=True)
        hidden = torch.ones(rows, width).to(dtype)
        adapted = functional.linear(hidden, weight) + (hidden.float() @ factor @ factor.t()).to(dtype)
        heads = adapted.view(1, rows, 4, -1).transpose(1, 2)
        mixed = functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
        normal = functional.layer_norm(mixed.transpose(1, 2).reshape(rows, width), (width,))
        logits = functional.silu(normal) @ torch.ones(width, classes, dtype=dtype)
        target = torch.arange(rows) % classes
        functional.cross_entropy(logits.float(), target, reduction="sum").backward()
        optimizer = torch.optim.AdamW([factor], fused=True)
        torch.nn.utils.clip_grad_norm_([factor], 1.0)
        optimizer.step()
        # Larger than the least share of work that torch gives to a thread: all of them start.
        torch.ones(torch.get_num_threads() * 2**16).add_(1.0)


@functools.cache
def product_bytes(half: bool) -> int:
    """Bytes that the library keeps for the kernel of one matrix product, in bf16 or in fp32."""
    dtype = torch.bfloat16 if half else torch.float32
    weight = torch.ones(256, 384, dtype=dtype)
    inputs = [torch.ones(65 + 7 * number, 256, dtype=dtype) for number in range(_SHAPES + 1)]
    return _measured(f"product-{half}", [functools.partial(torch.mm, one, weight) for one in inputs])


@functools.cache
def attention_bytes(long: bool) -> int:
    """Bytes kept for the kernels of attention's backward in bf16, for one length of rows."""
    lengths = [(SHORT + 65 if long else SHORT - 33) + 3 * number for number in range(_SHAPES + 1)]

    def backward(row: Tensor) -> None:
        with torch.enable_grad():
            functional.scaled_dot_product_attention(row, row, row).sum().backward()

    made = [torch.ones(1, 1, n, 64, dtype=torch.bfloat16, requires_grad=True) for n in lengths]
    return _measured(f"attention-{long}", [functools.partial(backward, row) for row in made])


def _measured(name: str, uses: list[Callable[[], object]]) -> int:
    """The growth of the process by each of ``uses`` but the first; remembered for this kind of machine."""
    key = [name, processor_name(), sorted(processor_flags()), torch.get_num_threads()]
    known = recall("kernels", key, MADE_BY)
    if isinstance(known, dict) and isinstance(known.get("bytes"), int):
        return known["bytes"]
    first, *others = uses
    first()
    trim_memory()
    before = resident_bytes()
    for use in others:
        use()
    trim_memory()
    grown = max(0, resident_bytes() - before) // len(others)
    remember("kernels", key, {"bytes": grown}, MADE_BY)
    return grown


_aten = torch.ops.aten
_IN_PLACE = {_aten.addmm_: _aten.addmm, _aten.baddbmm_: _aten.baddbmm}
_PRODUCTS = {_aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm, _aten.linear, _aten.addmv, _aten.mv, *_IN_PLACE}
HALF = (torch.bfloat16, torch.float16)

# As many kernels stay in memory (oneDNN's default, unless its own variable says otherwise), and an eighth
# more: what the process cannot give back of those that were let go.
DEFAULT_CAPACITY, LEFT_BEHIND = 1024, 1.125


class Product(NamedTuple):
    """A matrix product: its precision, all its sizes, and whether it is many small ones at once."""

    half: bool
    sizes: frozenset[int]
    batched: bool = False


class Routed(NamedTuple):
    """A product of routed tokens: its precision, all tokens' rows, and the experts' weight (E, …)."""

    half: bool
    rows: int
    weight: tuple[int, ...]


class WorkCounter(DispatchMode):
    """While open, counts operators and their work.

    Attributes:
        operators: how many. operations: floating-point operations of products, convolutions, attention.
        products: the matrix products of different shapes.
        lengths: lengths of rows that an attention backward in half precision has met.
        routed: products of experts with the tokens that a router gives each: by precision and shapes, how
            many calls there were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators = 0
        self.operations = 0
        self.lengths: set[int] = set()
        self._seen: set[tuple[object, ...]] = set()
        self.products: list[Product] = []
        self.routed: Counter[Routed] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.operators += 1
        packet = func.overloadpacket
        formula = flop_registry.get(packet) or flop_registry.get(_IN_PLACE.get(packet))
        if formula is not None:
            self.operations += int(formula(*args, **kwargs, out_val=result))
        if packet is GROUPED_PRODUCT:
            rows, weight = args[0], args[1]
            self.routed[Routed(rows.dtype in HALF, rows.shape[0], tuple(weight.shape))] += 1
        elif packet in _PRODUCTS:
            self._note_product(packet, args)
        elif packet is FLASH_BACKWARD and args[1].dtype in HALF:
            self.lengths.add(args[1].shape[-2])
        return result

    def _note_product(self, packet: object, args: Any) -> None:
        tensors = [t for t in args if isinstance(t, torch.Tensor)]
        key = (packet, *((t.dtype, tuple(t.shape), t.stride()) for t in tensors))
        if key not in self._seen:
            self._seen.add(key)
            sizes = frozenset(size for t in tensors for size in t.shape)
            batched = packet in (_aten.bmm, _aten.baddbmm, _aten.baddbmm_)
            self.products.append(Product(tensors[-1].dtype in HALF, sizes, batched))


Varying: TypeAlias = Sequence[tuple[Collection[int], float]]


def kernel_bytes(
    work: WorkCounter, *, varying: Varying, lengths: int = 0, tiles: float = 1.0, repeats: float = 1.0
) -> int:
    """What the libraries keep over a run.

    Args:
        work: of some microbatches.
        varying: sizes that change between microbatches (numbers of tokens, of rows): those that were met in
            these, and how many different ones the whole run has. A product with one of the sizes comes
            again in as many shapes; the first that is met counts. Others come in no further shape.
        lengths: different lengths of rows in the run.
        tiles: shapes of attention's tiles in the run, for each in these microbatches: batched products come
            again in as many.
        repeats: microbatches of the run for each of these. A router gives each expert another number of
            tokens each time, so each call meets as many shapes as there are experts.
    """
    counts = {True: 0.0, False: 0.0}
    for product in work.products:
        met = (n / max(1, len(seen)) for seen, n in varying if not product.sizes.isdisjoint(seen))
        counts[product.half] += next(met, tiles if product.batched else 1.0)
    for routed, calls in work.routed.items():
        counts[routed.half] += _distinct(routed, calls * repeats)
    told = os.environ.get("ONEDNN_PRIMITIVE_CACHE_CAPACITY") or os.environ.get("DNNL_PRIMITIVE_CACHE_CAPACITY") or ""
    most = (int(told) if told.isdigit() else DEFAULT_CAPACITY) * LEFT_BEHIND
    products = sum(min(most, counts[half]) * product_bytes(half) for half in counts if counts[half])
    attention = attention_bytes(max(work.lengths) > SHORT) * lengths if work.lengths else 0
    return int(products + attention)


def _distinct(routed: Routed, calls: float) -> float:
    """Different numbers of rows that the experts of a routed product are expected to meet in so many calls.

    An expert gets from none to about twice its equal share of the tokens. Of ``spread`` values, n draws show
    spread·(1 − (1 − 1/spread)ⁿ) different ones.
    """
    experts = routed.weight[0]
    spread = max(1.0, 2 * routed.rows / experts)
    return float(spread * (1 - (1 - 1 / spread) ** (calls * experts)))
