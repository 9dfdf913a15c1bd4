"""Fingerprint of a base model's weights, which identifies the base model of an adapter, a run or a stored result.

It covers all values of all parameters and of the buffers that are saved with the model. It does not depend on the
division into files or on the dtype that the model is loaded in: a fingerprint is a list of digests, of the values
rounded to bf16, and of the values in fp32 and fp64 if all tensors have that precision. A model loaded in bf16 yields
only the first digest, even if it keeps some tensors in fp32, so two fingerprints match if one is a prefix of the other
(:func:`same_base`).

Values are read from memory unless a digest was recorded on the parameter (:func:`record_digest`), by code that loads
the model from files or replaces a weight by a quantized one.
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

from deltaw.lora.complete_names import complete_names
from deltaw.lora.stored import block_weight, stored_form, tensor_quantization_library
from deltaw.tensor_files import has_values

# Prefix of a fingerprint. Change it whenever the algorithm changes.
FORMAT = "weights-1:"
FINGERPRINT_KEY = "deltaw.base_fingerprint"
"""Key in an adapter's metadata."""
# Number of values hashed at a time, small enough for a CPU cache.
HASH_CHUNK = 1 << 17
# Number of values copied from a tensor at a time.
COPY_CHUNK = 1 << 22
# Minimum number of values for which starting threads is worthwhile.
MIN_THREADED = 1 << 20
MAX_THREADS = 8
_DIGEST_ATTRIBUTE = "of_base"

T = TypeVar("T")
R = TypeVar("R")


class OtherBaseModelWarning(UserWarning):
    """An adapter is loaded onto a different base model than it was trained on."""


class TensorDigest(NamedTuple):
    """Digests of a tensor.

    Attributes:
        shape: Shape of the tensor.
        digests: SHA-256 of the values in bf16, in fp32 and in fp64, up to the dtype of the tensor. If the values at a
            precision equal those at the lower one, the digest is repeated, so that a bf16 tensor matches its fp32 copy.
    """

    shape: tuple[int, ...]
    digests: tuple[str, ...]


def num_digests(dtype: torch.dtype) -> int:
    """Return the number of digests of a tensor with this dtype."""
    return {torch.float64: 3, torch.float32: 2, torch.float16: 2}.get(dtype, 1)


def digest_pieces(shape: Sequence[int], pieces: Iterable[Tensor]) -> TensorDigest:
    """Return the digest of a tensor given as consecutive pieces of any size on the CPU."""
    hashes = [hashlib.sha256() for _ in range(3)]
    updates = [digest.update for digest in hashes]
    differs = [True, False, False]  # if the values differ from those at the lower precision
    levels = 1
    for piece in pieces:
        flat = piece.detach().reshape(-1)
        levels = num_digests(flat.dtype)
        for start in range(0, flat.numel(), HASH_CHUNK):
            _hash_numbers(updates, differs, flat[start : start + HASH_CHUNK])
    digests: list[str] = []
    for level in range(levels):
        digests.append(hashes[level].hexdigest() if differs[level] else digests[-1])
    return TensorDigest(tuple(shape), tuple(digests))


def _hash_numbers(updates: Sequence[Callable[[memoryview], object]], differs: list[bool], flat: Tensor) -> None:
    """Hash values at each precision up to their own, and update ``differs``."""
    in_bf16, in_fp32, in_fp64 = updates
    if num_digests(flat.dtype) == 1:
        in_bf16(flat.view(torch.uint8).numpy().data)
        return
    # NumPy, because torch would start additional threads in each calling thread.
    numbers = flat.numpy()
    single = numbers.astype(np.float32, copy=False)
    bits = single.view(np.uint32)
    in_bf16(_round_to_bf16(bits).data)
    in_fp32(bits.data)
    differs[1] = differs[1] or bool((bits & np.uint32(0xFFFF)).any())
    if flat.dtype == torch.float64:
        in_fp64(numbers.data)
        differs[2] = differs[2] or not np.array_equal(single, numbers, equal_nan=True)


def _round_to_bf16(bits: np.ndarray) -> np.ndarray:
    """Round the bits of fp32 numbers, uint32 (n), to bf16 as torch does: to nearest, ties to even."""
    result = bits >> np.uint32(16)
    result &= np.uint32(1)
    result += np.uint32(0x7FFF)
    result += bits
    result >>= np.uint32(16)
    return result.astype(np.uint16)


def base_fingerprint(model: nn.Module, replaced: Iterable[Tensor] = ()) -> str | None:
    """Return the fingerprint of a base model.

    Takes milliseconds if digests were recorded. Otherwise all values are read, at 2 to 4 GB/s on two processors.

    Args:
        model: Model, possibly quantized: int8 and block weights count with the values that they represent.
        replaced: Parameters that the adapter stores itself, such as those of a new classifier, which are initialized
            randomly. Only their names and shapes count.

    Returns:
        The fingerprint, or None if the weights are not available, as in a dry run or after quantization by another
        library.
    """
    replaced_ids = {id(parameter) for parameter in replaced}
    blocks = {id(m.get_parameter("weight")): m for m in model.modules() if block_weight(m) is not None}
    digests: dict[str, TensorDigest] = {}
    unread: dict[str, Tensor] = {}
    in_blocks: dict[str, nn.Module] = {}
    for name, tensor in saved_tensors(model):
        recorded = recorded_digest(tensor)
        if id(tensor) in replaced_ids:
            digests[name] = TensorDigest(tuple(tensor.shape) if recorded is None else recorded.shape, ())
        elif recorded is not None:
            digests[name] = recorded
        elif not has_values(tensor) or tensor_quantization_library(tensor) is not None:
            return None
        elif id(tensor) in blocks:
            in_blocks[name] = blocks[id(tensor)]
        elif tensor.dtype in (torch.int8, torch.uint8):
            return None  # quantized by code that did not record the digest
        else:
            unread[name] = tensor
    read = map_in_threads(digest_tensor, unread.values(), sum(tensor.numel() for tensor in unread.values()))
    digests |= zip(unread, read, strict=True)
    return combine_digests(digests | {name: digest_blocks(layer) for name, layer in in_blocks.items()})


def combine_digests(tensors: Mapping[str, TensorDigest]) -> str | None:
    """Return the fingerprint of tensors by their names in the model, or None if no digests are known."""
    num_levels = min((len(values.digests) for values in tensors.values() if values.digests), default=0)
    levels = []
    for level in range(num_levels):
        combined = hashlib.sha256()
        for name, values in sorted(tensors.items()):
            digest = values.digests[level] if values.digests else ""
            combined.update(f"{name}:{tuple(values.shape)}:{digest};".encode())
        levels.append(combined.hexdigest()[:32])
    return FORMAT + ".".join(levels) if levels else None


def same_base(first: str | None, second: str | None) -> bool | None:
    """True if two fingerprints match, even if one is of weights rounded to bf16. None if one is missing."""
    if first is None or second is None:
        return None
    levels = [name.removeprefix(FORMAT).split(".") for name in (first, second)]
    return all(a == b for a, b in zip(*levels, strict=False))


def warn_other_base(subject: str, metadata: Mapping[str, str], loaded: str | None, path: object, base: object) -> None:
    """Warn if an adapter was trained on a different base model than the loaded one.

    Args:
        subject: Subject of the message, for example "the adapter".
        metadata: Metadata of the adapter's file.
        loaded: Fingerprint of the loaded model.
        path: Folder of the adapter.
        base: Name of the base model according to the adapter.
    """
    if same_base(metadata.get(FINGERPRINT_KEY), loaded) is False:
        trained_on = f" ({base})" if base else ""
        message = f"{subject} was trained on another base model{trained_on}: {path}"
        warnings.warn(message, OtherBaseModelWarning, stacklevel=3)


def saved_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors covered by a fingerprint with their names.

    These are all parameters, each once, and all floating-point buffers saved with the model, except those that are part
    of a quantized weight. Of a text view, these are the tensors of the language model.
    """
    mapping = complete_names(model)
    for name, parameter in model.named_parameters():
        if mapping is None or mapping.is_language(name):
            yield name, parameter
    saved = model.state_dict(keep_vars=True)
    for path, module in model.named_modules():
        for key, buffer in module.named_buffers(recurse=False) if stored_form(module) is None else ():
            name = f"{path}.{key}".lstrip(".")
            if name in saved and buffer.is_floating_point() and (mapping is None or mapping.is_language(name)):
                yield name, buffer


def digest_tensor(tensor: Tensor) -> TensorDigest:
    """Return the digest of a tensor's current values, on any device."""
    return digest_pieces(tensor.shape, _pieces(tensor.detach()))


def digest_blocks(layer: nn.Module) -> TensorDigest:
    """Return the digest of the values that a layer's block weight represents."""
    stored = block_weight(layer)
    assert stored is not None
    rows = max(1, COPY_CHUNK // stored.columns)
    pieces = (stored.dequantized(torch.bfloat16, s, s + rows) for s in range(0, stored.shape[0], rows))
    return digest_pieces(stored.shape, (piece.cpu() for piece in pieces))


def map_in_threads(function: Callable[[T], R], items: Iterable[T], num_values: int) -> list[R]:
    """Apply ``function`` to each item, in order, in several threads if the total number of values is large.

    Hashing releases the GIL.
    """
    if num_values < MIN_THREADED:
        return [function(item) for item in items]
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(min(usable, MAX_THREADS), thread_name_prefix="fingerprint") as pool:
        return list(pool.map(function, items))


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Yield a tensor's values in order on the CPU, copied in pieces if necessary."""
    if not tensor.dim():
        yield tensor.cpu().reshape(1)
        return
    if tensor.is_contiguous():
        tensor = tensor.view(-1)
    rows = max(1, COPY_CHUNK // max(1, tensor[:1].numel()))
    for start in range(0, len(tensor), rows):
        yield tensor[start : start + rows].cpu().contiguous()


@torch.no_grad()
def record_base_digest(quantized: Tensor, weight: Tensor) -> None:
    """Record the digest of the base ``weight`` on the ``quantized`` parameter that replaces it."""
    if (recorded := recorded_digest(weight)) is not None:
        record_digest(quantized, recorded)
    elif has_values(weight):
        record_digest(quantized, digest_tensor(weight))


def record_digest(tensor: Tensor, values: TensorDigest) -> None:
    """Record the digest of a tensor's values, or of the values that it represents."""
    vars(tensor)[_DIGEST_ATTRIBUTE] = values


def recorded_digest(tensor: Tensor) -> TensorDigest | None:
    """Return the recorded digest of a tensor, or None."""
    return getattr(tensor, _DIGEST_ATTRIBUTE, None)
