"""What torch's libraries hold beside tensors: measured on this machine, not written down.

Two things. On its first use a library loads its own code and tables and starts its threads: :func:`warm_up`
uses what a training uses once, on tensors of a few kilobytes, so that this memory is part of what the process
is seen to hold. And a matrix library builds a kernel for each shape that it meets and keeps it: how large one
is follows from the process's growth over a few shapes, once for each processor and version.

Knows operators and the process; no models and no runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from deltaw.cache import recall, remember
from deltaw.host.memory import resident_bytes, trim_memory
from deltaw.host.processor import processor_flags, processor_name

MADE_BY = ("torch", "deltaw.memory.libraries")
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
