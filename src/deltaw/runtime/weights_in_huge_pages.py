"""Move large frozen weights into huge pages.

A matmul with a transposed weight reads strips across all rows. With 4 KiB pages, each row of a large weight is on a
different page, and the strips exceed the TLB.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deltaw.kernels import huge_pages, loader
from deltaw.lora.kinds import get_input_embedding
from deltaw.machine.memory import free_memory_bytes
from deltaw.runtime.quantized_weights import mapped_file, release_pages
from deltaw.tensor_files import has_values

# Bytes that exist twice while a weight is moved.
MOVE_CHUNK_BYTES = 16 << 20
# If the weights together exceed this share, all stay memory-mapped, so that the system can evict them.
MAX_FREE_MEMORY_SHARE = 0.5


@torch.no_grad()
def move_to_huge_pages(model: nn.Module) -> int:
    """Move a model's large frozen weights from memory-mapped files into huge pages.

    Values, parameters and weight sharing are preserved. Weights allocated by torch are not moved. An untied input
    embedding is not moved either: only the rows of tokens that occur are read from its file. Call this after the
    weights have their final values.

    Returns:
        Number of bytes moved. 0 if the system has no huge pages, the compiled kernels are unavailable, or memory is
        scarce.
    """
    if not huge_pages.huge_page_bytes() or loader.unavailable_reason():
        return 0
    weights = _large_weights(model)
    if sum(weight.nbytes for weight in weights) > MAX_FREE_MEMORY_SHARE * free_memory_bytes():
        return 0
    for weight in weights:
        _move(weight)
    return sum(weight.nbytes for weight in weights)


def _large_weights(model: nn.Module) -> list[Tensor]:
    """Return the large weights without duplicates."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    embedding = getattr(get_input_embedding(model), "weight", None)
    is_tied = sum(tensor is embedding for _, tensor in tensors) > 1
    skipped = None if is_tied else embedding
    return list({id(tensor): tensor for _, tensor in tensors if tensor is not skipped and _is_movable(tensor)}.values())


def _is_movable(tensor: Tensor) -> bool:
    """Return True for a large frozen matrix on the CPU that is mapped from a file."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
        return False
    if not has_values(tensor) or tensor.device.type != "cpu" or tensor.requires_grad:
        return False
    if tensor.nbytes < huge_pages.MIN_BYTES or tensor.dim() < 2 or not tensor.is_contiguous():
        return False
    return mapped_file(tensor.data_ptr()) is not None


def _move(weight: Tensor) -> None:
    original = weight.data
    target = huge_pages.empty_in_huge_pages(weight.numel(), weight.dtype).view(weight.shape)
    rows = max(1, MOVE_CHUNK_BYTES // (original.nbytes // len(original)))
    for start in range(0, len(original), rows):
        target[start : start + rows] = original[start : start + rows]
        release_pages(original[start : start + rows])
    release_pages(original)  # including pages at chunk boundaries
    weight.data = target
