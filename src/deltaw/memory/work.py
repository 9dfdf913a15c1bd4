"""Count the operators and floating-point operations of a run, and estimate the kernels that CPU libraries compile for
it.

A matrix library compiles and caches a kernel per shape. That memory belongs to no tensor, so its size per kernel is
measured on this machine. The formulas for floating-point operations are torch's.
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

from deltaw.cache.results import load_result, store_result
from deltaw.kernels.processor import processor_flags, processor_name
from deltaw.kernels.torch_private import FLASH_BACKWARD, GROUPED_PRODUCT, DispatchMode
from deltaw.machine.memory import resident_bytes, trim_memory

# torch's libraries use two kinds of memory in addition to tensors. At its first use, a library loads code and tables
# and starts threads: :func:`warm_up` triggers this, so that it is included in the measured size of the process. And a
# matrix library caches a kernel per shape: its size is the growth of the process over a few shapes, measured once per
# processor and version.


CACHE_DEPENDENCIES = ("torch", "deltaw.memory.work")
# Number of shapes over which a kernel's size is averaged, after one warm-up shape.
_NUM_SHAPES = 6
# Maximum length of a short row, for which attention's kernels are smaller.
SHORT_LENGTH = 64


def warm_up(dtype: torch.dtype) -> None:
    """Run every kind of operator of a training step once, with weights of this type."""
    rows = 64
    width = 256
    classes = 512
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        weight = torch.ones(width, width, dtype=dtype)
        factor = torch.ones(width, 8, requires_grad=True)
        hidden = torch.ones(rows, width).to(dtype)
        adapted = functional.linear(hidden, weight) + (hidden.float() @ factor @ factor.t()).to(dtype)
        heads = adapted.view(1, rows, 4, -1).transpose(1, 2)
        mixed = functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
        normal = functional.layer_norm(mixed.transpose(1, 2).reshape(rows, width), (width,))
        logits = functional.silu(normal) @ torch.ones(width, classes, dtype=dtype)
        functional.cross_entropy(logits.float(), torch.arange(rows) % classes, reduction="sum").backward()
        optimizer = torch.optim.AdamW([factor], fused=True)
        torch.nn.utils.clip_grad_norm_([factor], 1.0)
        optimizer.step()
        # Exceeds torch's minimum work per thread, so that all threads start.
        torch.ones(torch.get_num_threads() * 2**16).add_(1.0)


@functools.cache
def product_bytes(half: bool) -> int:
    """Return the bytes that the library caches for the kernel of one matrix product, in bf16 or fp32."""
    dtype = torch.bfloat16 if half else torch.float32
    weight = torch.ones(256, 384, dtype=dtype)
    inputs = [torch.ones(65 + 7 * number, 256, dtype=dtype) for number in range(_NUM_SHAPES + 1)]
    return _measured_growth(f"product-{half}", [functools.partial(torch.mm, x, weight) for x in inputs])


@functools.cache
def attention_bytes(long: bool) -> int:
    """Return the bytes that the library caches for the kernels of attention's backward in bf16, per row length."""
    lengths = [(SHORT_LENGTH + 65 if long else SHORT_LENGTH - 33) + 3 * number for number in range(_NUM_SHAPES + 1)]

    def backward(row: Tensor) -> None:
        with torch.enable_grad():
            functional.scaled_dot_product_attention(row, row, row).sum().backward()

    rows = [torch.ones(1, 1, n, 64, dtype=torch.bfloat16, requires_grad=True) for n in lengths]
    return _measured_growth(f"attention-{long}", [functools.partial(backward, row) for row in rows])


def _measured_growth(name: str, calls: list[Callable[[], object]]) -> int:
    """Return the mean growth of the process per call, without the first. Cached for each kind of machine."""
    key = [name, processor_name(), sorted(processor_flags()), torch.get_num_threads()]
    cached = load_result("kernels", key, CACHE_DEPENDENCIES)
    if isinstance(cached, dict) and isinstance(cached.get("bytes"), int):
        return cached["bytes"]
    first, *rest = calls
    first()
    trim_memory()
    initial_bytes = resident_bytes()
    for call in rest:
        call()
    trim_memory()
    growth = max(0, resident_bytes() - initial_bytes) // len(rest)
    store_result("kernels", key, {"bytes": growth}, CACHE_DEPENDENCIES)
    return growth


_aten = torch.ops.aten
_IN_PLACE = {_aten.addmm_: _aten.addmm, _aten.baddbmm_: _aten.baddbmm}
_PRODUCTS = {_aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm, _aten.linear, _aten.addmv, _aten.mv, *_IN_PLACE}
HALF_DTYPES = (torch.bfloat16, torch.float16)

# Number of kernels that oneDNN caches by default (configurable by environment variable), and the factor for memory of
# evicted kernels that the process cannot return.
DEFAULT_CAPACITY = 1024
EVICTION_OVERHEAD = 1.125


class ProductShape(NamedTuple):
    """Shape of a matrix product.

    Attributes:
        half: True for 16-bit types.
        sizes: Sizes of all dimensions.
        batched: True for a batched product of small matrices.
    """

    half: bool
    sizes: frozenset[int]
    batched: bool = False


class RoutedProduct(NamedTuple):
    """Shape of a product of routed tokens with experts.

    Attributes:
        half: True for 16-bit types.
        rows: Rows of all tokens.
        weight: Shape of the experts' weight, (E, …).
    """

    half: bool
    rows: int
    weight: tuple[int, ...]


class WorkCounter(DispatchMode):
    """Context manager that counts operators and their work.

    Attributes:
        operators: Number of operator calls.
        operations: Floating-point operations of products, convolutions and attention.
        products: Matrix products of distinct shapes.
        lengths: Row lengths of attention backward passes in 16-bit types.
        routed: Number of calls of each product with routed tokens.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators = self.operations = 0
        self.lengths: set[int] = set()
        self._seen_products: set[tuple[object, ...]] = set()
        self.products: list[ProductShape] = []
        self.routed: Counter[RoutedProduct] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.operators += 1
        packet = func.overloadpacket
        formula = flop_registry.get(packet) or flop_registry.get(_IN_PLACE.get(packet))
        if formula is not None:
            self.operations += int(formula(*args, **kwargs, out_val=result))
        if packet is GROUPED_PRODUCT:
            rows = args[0]
            weight = args[1]
            self.routed[RoutedProduct(rows.dtype in HALF_DTYPES, rows.shape[0], tuple(weight.shape))] += 1
        elif packet in _PRODUCTS:
            self._note_product(packet, args)
        elif packet is FLASH_BACKWARD and args[1].dtype in HALF_DTYPES:
            self.lengths.add(args[1].shape[-2])
        return result

    def _note_product(self, packet: object, args: Any) -> None:
        tensors = [t for t in args if isinstance(t, torch.Tensor)]
        key = (packet, *((t.dtype, tuple(t.shape), t.stride()) for t in tensors))
        if key not in self._seen_products:
            self._seen_products.add(key)
            sizes = frozenset(size for t in tensors for size in t.shape)
            batched = packet in (_aten.bmm, _aten.baddbmm, _aten.baddbmm_)
            self.products.append(ProductShape(tensors[-1].dtype in HALF_DTYPES, sizes, batched))


VaryingSizes: TypeAlias = Sequence[tuple[Collection[int], float]]


def kernel_bytes(
    work: WorkCounter, *, varying: VaryingSizes, lengths: int = 0, tiles: float = 1.0, repeats: float = 1.0
) -> int:
    """Estimate the bytes of the kernels that the libraries cache over a run.

    Args:
        work: Counted work of a sample of microbatches.
        varying: For each size that changes between microbatches (numbers of tokens or rows), its values in the sample
            and its number of distinct values in the entire run. A product that contains one of the values occurs in
            that number of shapes. The first match counts.
        lengths: Number of distinct row lengths in the run.
        tiles: Ratio of attention tile shapes in the run to those in the sample. Applies to batched products.
        repeats: Ratio of microbatches in the run to those in the sample. A router assigns a different number of tokens
            to each expert each time, so each call adds as many shapes as there are experts.
    """
    counts = {True: 0.0, False: 0.0}
    for product in work.products:
        ratios = (n / max(1, len(values)) for values, n in varying if not product.sizes.isdisjoint(values))
        counts[product.half] += next(ratios, tiles if product.batched else 1.0)
    for routed, calls in work.routed.items():
        counts[routed.half] += _expected_row_counts(routed, calls * repeats)
    limit = os.environ.get("ONEDNN_PRIMITIVE_CACHE_CAPACITY") or os.environ.get("DNNL_PRIMITIVE_CACHE_CAPACITY") or ""
    max_kernels = (int(limit) if limit.isdigit() else DEFAULT_CAPACITY) * EVICTION_OVERHEAD
    products = sum(min(max_kernels, counts[half]) * product_bytes(half) for half in counts if counts[half])
    attention = attention_bytes(max(work.lengths) > SHORT_LENGTH) * lengths if work.lengths else 0
    return int(products + attention)


def _expected_row_counts(routed: RoutedProduct, calls: float) -> float:
    """Return the expected number of distinct row counts that the experts of a routed product receive in ``calls``
    calls.

    An expert receives between 0 and about twice its equal share of the tokens. The expected number of distinct values
    among n draws from ``spread`` values is spread·(1 − (1 − 1/spread)ⁿ).
    """
    experts = routed.weight[0]
    spread = max(1.0, 2 * routed.rows / experts)
    return float(spread * (1 - (1 - 1 / spread) ** (calls * experts)))
