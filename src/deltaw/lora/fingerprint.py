"""The fingerprint of a base model's weights, by which an adapter, a run or a stored answer knows other ones.

It covers every value of every parameter and of every buffer that is saved with the model. How the model is
divided into files does not matter, nor the type that it is loaded in: a fingerprint is a list of digests, of
the values rounded to bf16, and of the values themselves if these differ. For a model that was loaded in bf16
only the first is known, so two fingerprints agree if one begins the other (:func:`same_base`).

Values are read from memory unless they were noted on the parameter (:func:`note_values`), by the code that
loaded the model from files or that replaced the weight by a quantized one.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from deltaw.lora.stored import block_weight, library_of_tensor, stored_form

# What a fingerprint begins with: changed whenever fingerprints are made in another way.
FORMAT = "weights-1:"
FINGERPRINT_KEY = "deltaw.base_fingerprint"
"""In an adapter's metadata."""
# Numbers that are hashed at a time: few enough to stay in a processor's cache.
AT_ONCE = 1 << 17
# Numbers that are taken from a tensor at a time, where that copies them.
COPIED_AT_ONCE = 1 << 22
# Fewer numbers than this are hashed sooner than threads are started.
WORTH_THREADS = 1 << 20
MOST_THREADS = 8
_NOTED = "of_base"

T = TypeVar("T")
R = TypeVar("R")


class OtherBaseModelWarning(UserWarning):
    """An adapter is loaded onto another base model than it was trained on."""


class Values(NamedTuple):
    """What the fingerprint takes of a tensor.

    Attributes:
        shape: of the tensor.
        digests: SHA-256 of its values in bf16, in fp32 and in fp64, up to the type that it has. One that says
            nothing new repeats the one before, so that a bf16 tensor can stand beside its copy in fp32.
    """

    shape: tuple[int, ...]
    digests: tuple[str, ...]


def levels_of(dtype: torch.dtype) -> int:
    """The number of digests of a tensor of this type."""
    return {torch.float64: 3, torch.float32: 2, torch.float16: 2}.get(dtype, 1)


def values_of(shape: Sequence[int], pieces: Iterable[Tensor]) -> Values:
    """The values of a tensor that comes in pieces, on the CPU and in order; pieces of any size."""
    hashes = [hashlib.sha256() for _ in range(3)]
    updates = [one.update for one in hashes]
    says_more = [True, False, False]  # than the digest before
    levels = 1
    for piece in pieces:
        flat = piece.detach().reshape(-1)
        levels = levels_of(flat.dtype)
        for start in range(0, flat.numel(), AT_ONCE):
            _add(updates, says_more, flat[start : start + AT_ONCE])
    digests: list[str] = []
    for level in range(levels):
        digests.append(hashes[level].hexdigest() if says_more[level] else digests[-1])
    return Values(tuple(shape), tuple(digests))


def _add(updates: Sequence[Callable[[memoryview], object]], says_more: list[bool], flat: Tensor) -> None:
    """Hash numbers in each type up to their own, and note which of them says more than the one before."""
    in_bf16, in_fp32, in_fp64 = updates
    if levels_of(flat.dtype) == 1:
        in_bf16(flat.view(torch.uint8).numpy().data)
        return
    # NumPy, since torch would start threads of its own in each thread that calls it.
    numbers = flat.numpy()
    single = numbers.astype(np.float32, copy=False)
    bits = single.view(np.uint32)
    in_bf16(_rounded(bits).data)
    in_fp32(bits.data)
    says_more[1] = says_more[1] or bool((bits & np.uint32(0xFFFF)).any())
    if flat.dtype == torch.float64:
        in_fp64(numbers.data)
        says_more[2] = says_more[2] or not np.array_equal(single, numbers, equal_nan=True)


def _rounded(bits: np.ndarray) -> np.ndarray:
    """The bits of fp32 numbers, uint32 (n), rounded to bf16 as torch does it: to nearest, ties to even."""
    result = bits >> np.uint32(16)
    result &= np.uint32(1)
    result += np.uint32(0x7FFF)
    result += bits
    result >>= np.uint32(16)
    return result.astype(np.uint16)


def base_fingerprint(model: nn.Module, replaced: Iterable[Tensor] = ()) -> str | None:
    """The fingerprint of a base model; None if its weights are not at hand, as in a dry run, or if another
    library has quantized them.

    ``replaced`` are parameters whose values the adapter has itself, such as a new classifier's, which are
    random each time: only their names and shapes count. A weight that is stored as int8 or in blocks counts
    with the values that it stands for.

    It takes milliseconds if the values were noted. Otherwise all are read, at 2 to 4 GB/s on two processors.
    """
    without_value = {id(parameter) for parameter in replaced}
    blocks = {id(m.get_parameter("weight")): m for m in model.modules() if block_weight(m) is not None}
    found: dict[str, Values] = {}
    unread: dict[str, Tensor] = {}
    in_blocks: dict[str, nn.Module] = {}
    for name, tensor in saved_tensors(model):
        noted = noted_values(tensor)
        if id(tensor) in without_value:
            found[name] = Values(tuple(tensor.shape) if noted is None else noted.shape, ())
        elif noted is not None:
            found[name] = noted
        elif not has_values(tensor) or library_of_tensor(tensor) is not None:
            return None
        elif id(tensor) in blocks:
            in_blocks[name] = blocks[id(tensor)]
        elif tensor.dtype in (torch.int8, torch.uint8):
            return None  # quantized by somebody who did not note what it was
        else:
            unread[name] = tensor
    read = in_threads(values_in_memory, unread.values(), sum(tensor.numel() for tensor in unread.values()))
    found |= zip(unread, read, strict=True)
    return fingerprint_of(found | {name: values_of_blocks(layer) for name, layer in in_blocks.items()})


def fingerprint_of(tensors: Mapping[str, Values]) -> str | None:
    """The fingerprint of tensors by their names in the model; None if no values are known."""
    most = max((len(values.digests) for values in tensors.values()), default=0)
    levels = []
    for level in range(most):
        whole = hashlib.sha256()
        for name, values in sorted(tensors.items()):
            of_level = values.digests[min(level, len(values.digests) - 1)] if values.digests else ""
            whole.update(f"{name}:{tuple(values.shape)}:{of_level};".encode())
        levels.append(whole.hexdigest()[:32])
    return FORMAT + ".".join(levels) if levels else None


def same_base(first: str | None, second: str | None) -> bool | None:
    """Whether two fingerprints are of the same weights, which may be rounded to bf16 in one of them; None if
    one is missing."""
    if first is None or second is None:
        return None
    levels = [name.removeprefix(FORMAT).split(".") for name in (first, second)]
    return all(one == other for one, other in zip(*levels, strict=False))


def warn_of_base(what: str, metadata: Mapping[str, str], own: str | None, folder: object, named: object) -> None:
    """Warn if an adapter was trained on another base model than the one at hand.

    Args:
        what: begins the message, as "the adapter". metadata: of its file, in ``folder``.
        own: the fingerprint of the model at hand. named: what the adapter calls its base model.
    """
    if same_base(metadata.get(FINGERPRINT_KEY), own) is False:
        trained_on = f" ({named})" if named else ""
        said = f"{what} was trained on another base model{trained_on}: {folder}"
        warnings.warn(said, OtherBaseModelWarning, stacklevel=3)


def saved_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a fingerprint covers: every parameter once, and every floating-point buffer that is saved with the
    model, except those that belong to the stored form of a weight."""
    yield from model.named_parameters()
    saved = model.state_dict(keep_vars=True)
    for path, module in model.named_modules():
        for key, buffer in module.named_buffers(recurse=False) if stored_form(module) is None else ():
            name = f"{path}.{key}".lstrip(".")
            if name in saved and buffer.is_floating_point():
                yield name, buffer


def values_in_memory(tensor: Tensor) -> Values:
    """The values of a tensor as it is now, on any device."""
    return values_of(tensor.shape, _pieces(tensor.detach()))


def values_of_blocks(layer: nn.Module) -> Values:
    """The values that a layer's weight in blocks stands for."""
    stored = block_weight(layer)
    assert stored is not None
    rows = max(1, COPIED_AT_ONCE // stored.columns)
    pieces = (stored.dequantized(torch.bfloat16, s, s + rows) for s in range(0, stored.shape[0], rows))
    return values_of(stored.shape, (piece.cpu() for piece in pieces))


def in_threads(function: Callable[[T], R], items: Iterable[T], numbers: int) -> list[R]:
    """``function`` of each item, in their order; in several threads where the ``numbers`` of all of them are
    worth it. Hashing lets other threads run."""
    if numbers < WORTH_THREADS:
        return [function(item) for item in items]
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(min(usable, MOST_THREADS), thread_name_prefix="fingerprint") as pool:
        return list(pool.map(function, items))


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor's values in order, on the CPU; copied a piece at a time where they lie otherwise."""
    if not tensor.dim():
        yield tensor.cpu().reshape(1)
        return
    if tensor.is_contiguous():
        tensor = tensor.view(-1)
    rows = max(1, COPIED_AT_ONCE // max(1, tensor[:1].numel()))
    for start in range(0, len(tensor), rows):
        yield tensor[start : start + rows].cpu().contiguous()


@torch.no_grad()
def note_base(quantized: Tensor, weight: Tensor) -> None:
    """Note on a ``quantized`` parameter the values of the ``weight`` that it stands for."""
    if (noted := noted_values(weight)) is not None:
        note_values(quantized, noted)
    elif has_values(weight):
        note_values(quantized, values_in_memory(weight))


def note_values(tensor: Tensor, values: Values) -> None:
    """Note on a tensor what its values are, or what they stand for."""
    vars(tensor)[_NOTED] = values


def noted_values(tensor: Tensor) -> Values | None:
    """What was noted on a tensor."""
    return getattr(tensor, _NOTED, None)


def has_values(tensor: Tensor) -> bool:
    """False on the meta device and under torch's FakeTensorMode, where tensors have shapes alone."""
    return not (tensor.is_meta or type(tensor).__name__ == "FakeTensor")
