"""Large frozen weights of a training in large pages of memory.

A product's right side is read in strips of a few columns, so a product with the transposed weight reads a
line of each row. Of a large weight each row is another page of 4 KiB, more of them than the processor
remembers the places of. Knows modules and memory; not what the weights are for.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deltaw.host.memory import free_memory_bytes
from deltaw.kernels import large_pages, loader
from deltaw.lora.fingerprint import has_values
from deltaw.runtime.int8_weights import file_mapped_at, give_back

AT_ONCE = 16 << 20  # bytes that are there twice while a weight moves
OF_FREE_MEMORY = 0.5  # weights that take more stay in their files, from where the system can drop them


@torch.no_grad()
def use_large_pages(model: nn.Module) -> int:
    """Move a model's large frozen weights out of their mapped files into large pages of memory.

    Values, parameters and who shares them stay; only where the numbers lie changes. Left out are weights
    that torch has allocated, and an input embedding that no other layer shares: of its file the system reads
    only the rows that occur. Comes once the weights have the values that a training starts from.

    Returns:
        bytes that were moved; 0 where the system has no large pages, without compiled kernels, and where
        memory is scarce.
    """
    if not large_pages.large_page_bytes() or loader.why_not():
        return 0
    weights = _large_weights(model)
    if sum(weight.nbytes for weight in weights) > OF_FREE_MEMORY * free_memory_bytes():
        return 0
    for weight in weights:
        _move(weight)
    return sum(weight.nbytes for weight in weights)


def _large_weights(model: nn.Module) -> list[Tensor]:
    """Each once, however many names it has."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    rows = getattr(embedding, "weight", None)
    if rows is not None and sum(tensor is rows for _, tensor in tensors) > 1:
        rows = None
    found = {id(tensor): tensor for _, tensor in tensors if tensor is not rows and _is_large(tensor)}
    return list(found.values())


def _is_large(tensor: Tensor) -> bool:
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    if not plain or not has_values(tensor) or tensor.device.type != "cpu" or tensor.requires_grad:
        return False
    if tensor.nbytes < large_pages.WORTH or tensor.dim() < 2 or not tensor.is_contiguous():
        return False
    return file_mapped_at(tensor.data_ptr()) is not None


def _move(weight: Tensor) -> None:
    before = weight.data
    moved = large_pages.large_empty(weight.numel(), weight.dtype).view(weight.shape)
    rows = max(1, AT_ONCE // (before.nbytes // len(before)))
    for row in range(0, len(before), rows):
        moved[row : row + rows] = before[row : row + rows]
        give_back(before[row : row + rows])
    give_back(before)  # with the pages that two pieces shared
    weight.data = moved
