"""Rows of an embedding that are never read, because their tokens do not occur.

Weights that are not converted are mapped from their file, and the system loads only touched pages. With a large
vocabulary this is often a small part.
"""

from __future__ import annotations

import mmap
import re
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

from deltaw.data.example import used_tokens
from deltaw.hub.folders import config_folder
from deltaw.lora.layers_quantized import BlockEmbedding
from deltaw.tensor_files import StoredTensor, read_header
from deltaw.training.evaluation.general import MAX_ANSWER_TOKENS
from deltaw.training.monitoring.generation import is_checked
from deltaw.training.planning.lasting_bytes import GENERAL_TOKENS, num_answers
from deltaw.training.session import Session

# Minimum number of bytes that Linux maps around a touched page of a cached file: 16 pages of 4 KiB.
MIN_REGION_BYTES = 64 * 1024
# Number of pages to touch in order to measure the mapped size, and their distance: twice the largest page.
NUM_TOUCHES = 8
TOUCH_DISTANCE = 4 << 20


def unread_bytes(session: Session, *, dtype: str, converted: int) -> int:
    """Return the bytes of the input embedding that are never read from disk.

    Args:
        session: Session on fake tensors.
        dtype: Data type of the loaded weights.
        converted: Bytes of files with weights of another type. They are read completely.

    Returns:
        0 if the embedding is read completely: it is trained, tied to another layer, or not mapped.
    """
    embedding = session.model.get_input_embeddings()
    if not isinstance(embedding, nn.Embedding) or embedding.weight.requires_grad or converted:
        return 0
    if isinstance(embedding, BlockEmbedding):
        return 0  # it is read, not mapped
    weight = embedding.weight
    named = session.model.named_parameters(remove_duplicate=False)
    folder = config_folder(session.config.model, dtype, session.config.trust_remote_code)
    if sum(parameter is weight for _, parameter in named) != 1 or not any(folder.glob("*.safetensors")):
        return 0
    tokens = used_tokens(session.data.all_rows).astype(np.int64)
    tokens = tokens[tokens < len(weight)]  # without image tokens
    if not len(tokens):
        return 0
    row_bytes = weight.shape[1] * weight.element_size()
    region = _region(folder, weight)
    first = tokens * row_bytes // region
    last = ((tokens + 1) * row_bytes - 1) // region
    touched = len(np.unique(np.concatenate([first, last]))) * max(region, row_bytes)
    if is_checked(session) or (session.task.generates_text and session.config.train.drift is not False):
        touched += GENERAL_TOKENS * max(region, row_bytes)
    # Generated answers and completions may contain any token.
    touched += num_answers(session) * MAX_ANSWER_TOKENS * max(region, row_bytes)
    limits = session.generation_limits
    touched += session.total_steps * limits.num_concurrent * limits.max_length * max(region, row_bytes)
    return max(0, weight.numel() * weight.element_size() - touched)


def _region(folder: Path, weight: torch.Tensor) -> int:
    """Return the bytes that are mapped with a page of the file that contains a weight of this shape."""
    for path in sorted(folder.glob("*.safetensors")):
        for stored in read_header(path).values():
            if stored.shape == tuple(weight.shape) and stored.is_float:
                return mapped_page_bytes(stored)
    return MIN_REGION_BYTES


def mapped_page_bytes(stored: StoredTensor) -> int:
    """Return the average number of bytes that the system maps for one touched page of a stored tensor.

    A system with page cache folios of several sizes maps an entire folio, up to 2 MiB. Their size depends on the file
    system and on previous reads, so it is measured on a few pages.
    """
    start = stored.start
    end = stored.start + stored.bytes
    touches = min(NUM_TOUCHES, (end - start) // TOUCH_DISTANCE)
    if sys.platform != "linux" or not touches:
        return MIN_REGION_BYTES
    access = mmap.PROT_READ | mmap.PROT_WRITE
    with stored.file.open("rb") as file, mmap.mmap(file.fileno(), end, flags=mmap.MAP_PRIVATE, prot=access) as mapped:
        view = torch.frombuffer(mapped, dtype=torch.uint8)
        address = view.data_ptr()
        del view
        for offset in np.linspace(start, end - 1, touches + 2, dtype=np.int64)[1:-1]:
            mapped[int(offset)]
        return max(MIN_REGION_BYTES, _resident_at(address) // touches)


def _resident_at(address: int) -> int:
    """Return the resident bytes of the mapping at an address, or 0 if the system does not report it."""
    try:
        maps = Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    match = re.search(rf"(?m)^{address:x}-[0-9a-f]+ (?:.*\n)(?:[A-Z].*\n)*?Rss:\s+(\d+) kB", maps)
    return 1024 * int(match[1]) if match else 0
