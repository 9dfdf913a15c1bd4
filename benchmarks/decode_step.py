"""Milliseconds of a decoding step with random weights in the sizes of SmolLM2-135M and Qwen2.5-0.5B.

    python benchmarks/decode_step.py --rows 1 4 16 64 --context 256

Each time is also given relative to the time for reading the weights once (`of reads`), and relative to the time of its
products at the rate of a large product of the same type (`of products`). The larger of these two times is a lower
bound. `mixed` is the ratio of a step whose rows use 16 adapters of ranks 4 … 64 on all layers to a step without
adapters. Both alternate.
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
from deltaw.kernels.decode import Decoder, PackedAdapter
from deltaw.kernels.decode_reference import HEAD, DecoderBlock, DecoderLinear
from deltaw.kernels.rows import HalfNorms, Norm


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model."""

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
    bias_values = torch.randn(outputs) * 0.1 if bias else None
    if kind == "int8":
        weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
        return DecoderLinear(weight, bias_values, torch.full((outputs,), inputs**-0.5 / 73))
    weight = torch.empty(outputs, inputs).normal_(0, inputs**-0.5)
    return DecoderLinear(weight if kind == "fp32" else weight.bfloat16(), bias_values)


def decoder(sizes: Sizes, kind: str) -> Decoder:
    query_size = sizes.heads * sizes.head_size
    key_size = sizes.key_heads * sizes.head_size

    def norms() -> HalfNorms:
        return HalfNorms(Norm(torch.ones(sizes.hidden)))

    blocks = [
        DecoderBlock(
            *(sizes.heads, sizes.key_heads, sizes.head_size),
            query=linear(query_size, sizes.hidden, kind, sizes.bias),
            key=linear(key_size, sizes.hidden, kind, sizes.bias),
            value=linear(key_size, sizes.hidden, kind, sizes.bias),
            output=linear(sizes.hidden, query_size, kind),
            gate=linear(sizes.inner, sizes.hidden, kind),
            up=linear(sizes.inner, sizes.hidden, kind),
            down=linear(sizes.hidden, sizes.inner, kind),
            first=norms(),
            second=norms(),
            scaling=sizes.head_size**-0.5,
            rotary_dims=sizes.head_size,
        )
        for _ in range(sizes.blocks)
    ]
    angles = torch.arange(4096.0)[:, None] * torch.logspace(0, -4, sizes.head_size // 2)
    head = linear(sizes.vocabulary, sizes.hidden, kind)
    cache = torch.float32 if kind == "fp32" else torch.bfloat16
    return Decoder(blocks, Norm(torch.ones(sizes.hidden)), head, [(angles.cos(), angles.sin())], cache_dtype=cache)


def adapters_of(model: Decoder, count: int) -> list[PackedAdapter]:
    """Return random adapters of ranks 4 … 64 on all layers of the blocks."""
    adapters = []
    for index in range(count):
        rank = (4, 8, 16, 32, 64)[index % 5]
        factors = {
            (n, name): (torch.randn(layer.inputs, rank) * 0.01, torch.randn(rank, layer.outputs) * 0.01, 1.0)
            for n, block in enumerate(model.blocks)
            for name, layer in block.layers()
            if name != HEAD
        }
        adapters.append(model.pack_adapter(factors))
    return adapters


def step_function(model: Decoder, rows: int, context: int, adapters: list[PackedAdapter]) -> Callable[[], object]:
    """Return a function that runs a step of ``rows`` sequences, each with ``context`` tokens in the cache."""
    pages_per_row = context // model.page_tokens + 1
    pages = model.new_pages(rows * pages_per_row)
    pages.data.normal_()
    table = torch.arange(rows * pages_per_row, dtype=torch.int32).view(rows, pages_per_row)
    hidden = torch.randn(rows, model.hidden)
    positions = torch.full((rows,), context, dtype=torch.int32)
    sequence = torch.arange(rows, dtype=torch.int32)
    adapter = sequence % len(adapters) if adapters else None
    return lambda: model.step(pages, hidden, positions, sequence, table, adapter, adapters)


def seconds(calls: list[Callable[[], object]], times: int) -> list[float]:
    """Return the median seconds of each call. The calls alternate."""
    durations: list[list[float]] = [[] for _ in calls]
    for turn in range(times + 1):
        for call, call_durations in zip(calls, durations, strict=True):
            start = time.perf_counter()
            call()
            if turn:
                call_durations.append(time.perf_counter() - start)
    return [statistics.median(call_durations) for call_durations in durations]


def read_rate() -> float:
    """Return the bytes per second of summing a tensor larger than all caches, the best of several runs."""
    data = torch.ones(64 << 20)

    def time_sum() -> float:
        start = time.perf_counter()
        data.sum()
        return time.perf_counter() - start

    return data.nbytes / min(time_sum() for _ in range(8))


def product_rate(kind: str) -> float:
    """Return the operations per second of a large product of this type."""
    x = torch.randn(1024, 1536)
    weight = torch.randn(1536, 1536)
    scale: Tensor | None = None
    if kind == "int8":
        weight, scale = quantize.quantize_rows(weight)
    elif kind == "bf16":
        x = x.bfloat16()
        weight = weight.bfloat16()
    (elapsed,) = seconds([lambda: products.linear(x, products.LinearProduct(weight, scale=scale))], 5)
    return 2 * len(x) * weight.numel() / elapsed


def weights_of(model: Decoder) -> int:
    return model.head.weight.numel() + sum(layer.weight.numel() for b in model.blocks for _, layer in b.layers())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--kinds", nargs="+", choices=list(BYTES), default=list(BYTES))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--times", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--mixed", type=int, default=16, help="number of adapters in the mixed batch; 0 disables it")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    reads = read_rate()
    print(f"kernels {loader.variant()}, {args.threads} threads, reads {reads / 1e9:.1f} GB/s")
    print("| model | weights | rows | ms a step | tokens/s | of reads | of products | mixed |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name in args.models:
        for kind in args.kinds:
            model = decoder(MODELS[name], kind)
            rate = product_rate(kind)
            count = weights_of(model)
            adapters = adapters_of(model, args.mixed)
            for rows in args.rows:
                calls = [step_function(model, rows, args.context, [])]
                if adapters and rows >= len(adapters):
                    calls.append(step_function(model, rows, args.context, adapters))
                plain, *mixed = seconds(calls, args.times)
                read = count * BYTES[kind] / reads
                compute = 2 * rows * count / rate
                ratio = f"{mixed[0] / plain:.2f}" if mixed else ""
                print(
                    f"| {MODELS[name].name} | {kind} | {rows} | {1e3 * plain:.2f} | {rows / plain:.0f} "
                    f"| {plain / read:.2f} | {plain / compute:.2f} | {ratio} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
