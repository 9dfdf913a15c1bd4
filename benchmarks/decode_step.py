"""Milliseconds of a decoding step for the sizes of SmolLM2-135M and Qwen2.5-0.5B, with random weights.

    python benchmarks/decode_step.py --rows 1 4 16 64 --context 256

Beside each time: its ratio to the time in which this machine reads the weights once (`of reads`), and to
the time of its multiplications at the rate of a large product of the same type (`of products`). The larger
of both is a floor. `mixed` is the ratio of a step whose rows belong to 16 adapters of ranks 4 … 64 on all
layers to one without adapters, steps of the two taking turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from deltaw.kernels import linear as products
from deltaw.kernels import loader, quantize
from deltaw.kernels.decode import Decoder, DecoderBlock, DecoderLinear, PackedAdapter
from deltaw.kernels.decode_reference import HEAD
from deltaw.kernels.rows import HalfNorms, Norm


@dataclass(frozen=True)
class Sizes:
    """A model's sizes."""

    name: str
    hidden: int
    inner: int
    blocks: int
    heads: int
    key_heads: int
    vocabulary: int
    head_size: int = 64
    bias: bool = False


MODELS = {
    "smollm2": Sizes("SmolLM2-135M", 576, 1536, 30, 9, 3, 49152),
    "qwen": Sizes("Qwen2.5-0.5B", 896, 4864, 24, 14, 2, 151936, bias=True),
}
BYTES = {"fp32": 4, "bf16": 2, "int8": 1}


def linear(outputs: int, inputs: int, kind: str, bias: bool = False) -> DecoderLinear:
    own = torch.randn(outputs) * 0.1 if bias else None
    if kind == "int8":
        weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
        return DecoderLinear(weight, own, torch.full((outputs,), inputs**-0.5 / 73))
    weight = torch.empty(outputs, inputs).normal_(0, inputs**-0.5)
    return DecoderLinear(weight if kind == "fp32" else weight.bfloat16(), own)


def decoder(of: Sizes, kind: str) -> Decoder:
    wide, narrow = of.heads * of.head_size, of.key_heads * of.head_size

    def norms() -> HalfNorms:
        return HalfNorms(Norm(torch.ones(of.hidden)))

    blocks = [
        DecoderBlock(
            *(of.heads, of.key_heads, of.head_size),
            query=linear(wide, of.hidden, kind, of.bias),
            key=linear(narrow, of.hidden, kind, of.bias),
            value=linear(narrow, of.hidden, kind, of.bias),
            output=linear(of.hidden, wide, kind),
            gate=linear(of.inner, of.hidden, kind),
            up=linear(of.inner, of.hidden, kind),
            down=linear(of.hidden, of.inner, kind),
            first=norms(),
            second=norms(),
            scaling=of.head_size**-0.5,
            turned=of.head_size,
        )
        for _ in range(of.blocks)
    ]
    angles = torch.arange(4096.0)[:, None] * torch.logspace(0, -4, of.head_size // 2)
    head = linear(of.vocabulary, of.hidden, kind)
    cache = torch.float32 if kind == "fp32" else torch.bfloat16
    return Decoder(blocks, Norm(torch.ones(of.hidden)), head, [(angles.cos(), angles.sin())], cache_dtype=cache)


def adapters_of(of: Decoder, count: int) -> list[PackedAdapter]:
    """Adapters of ranks 4 … 64 on all layers of the blocks."""
    found = []
    for number in range(count):
        rank = (4, 8, 16, 32, 64)[number % 5]
        factors = {
            (n, name): (torch.randn(layer.inputs, rank) * 0.01, torch.randn(rank, layer.outputs) * 0.01, 1.0)
            for n, block in enumerate(of.blocks)
            for name, layer in block.layers()
            if name != HEAD
        }
        found.append(of.pack_adapter(factors))
    return found


def stepping(of: Decoder, rows: int, context: int, adapters: list[PackedAdapter]) -> Callable[[], object]:
    """A step of so many sequences, each with a context of so many tokens."""
    each = context // of.page_tokens + 1
    pages = of.new_pages(rows * each)
    pages.data.normal_()
    table = torch.arange(rows * each, dtype=torch.int32).view(rows, each)
    hidden = torch.randn(rows, of.hidden)
    positions = torch.full((rows,), context, dtype=torch.int32)
    sequence = torch.arange(rows, dtype=torch.int32)
    adapter = sequence % len(adapters) if adapters else None
    return lambda: of.step(pages, hidden, positions, sequence, table, adapter, adapters)


def seconds(calls: list[Callable[[], object]], times: int) -> list[float]:
    """The median of each, taking turns."""
    found: list[list[float]] = [[] for _ in calls]
    for turn in range(times + 1):
        for call, own in zip(calls, found, strict=True):
            begun = time.perf_counter()
            call()
            if turn:
                own.append(time.perf_counter() - begun)
    return [statistics.median(own) for own in found]


def read_rate() -> float:
    """Bytes that torch sums up in a second, of a tensor that no cache holds; the best of some."""
    data = torch.ones(64 << 20)

    def best() -> float:
        begun = time.perf_counter()
        data.sum()
        return time.perf_counter() - begun

    return data.nbytes / min(best() for _ in range(8))


def product_rate(kind: str) -> float:
    """Operations a second of a large product of a type."""
    x, weight = torch.randn(1024, 1536), torch.randn(1536, 1536)
    scale: Tensor | None = None
    if kind == "int8":
        weight, scale = quantize.quantized_rows(weight)
    elif kind == "bf16":
        x, weight = x.bfloat16(), weight.bfloat16()
    (taken,) = seconds([lambda: products.linear(x, products.Product(weight, scale=scale))], 5)
    return 2 * len(x) * weight.numel() / taken


def weights_of(of: Decoder) -> int:
    return of.head.weight.numel() + sum(layer.weight.numel() for b in of.blocks for _, layer in b.layers())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--kinds", nargs="+", choices=list(BYTES), default=list(BYTES))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--times", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--mixed", type=int, default=16, help="adapters of the mixed batch; 0 leaves it out")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    reads = read_rate()
    print(f"kernels {loader.variant()}, {asked.threads} threads, reads {reads / 1e9:.1f} GB/s")
    print("| model | weights | rows | ms a step | tokens/s | of reads | of products | mixed |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name in asked.models:
        for kind in asked.kinds:
            of = decoder(MODELS[name], kind)
            rate, count = product_rate(kind), weights_of(of)
            adapters = adapters_of(of, asked.mixed)
            for rows in asked.rows:
                calls = [stepping(of, rows, asked.context, [])]
                if adapters and rows >= len(adapters):
                    calls.append(stepping(of, rows, asked.context, adapters))
                plain, *mixed = seconds(calls, asked.times)
                read, compute = count * BYTES[kind] / reads, 2 * rows * count / rate
                ratio = f"{mixed[0] / plain:.2f}" if mixed else ""
                print(
                    f"| {MODELS[name].name} | {kind} | {rows} | {1e3 * plain:.2f} | {rows / plain:.0f} "
                    f"| {plain / read:.2f} | {plain / compute:.2f} | {ratio} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
