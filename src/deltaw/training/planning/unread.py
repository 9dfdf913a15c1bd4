"""Weights that a run never reads: rows of an embedding whose tokens do not occur in the data.

Weights of the type that they are stored in are mapped from their file, and the system brings in what is
touched. Of a large vocabulary that is often little. Knows a session and its rows; not how much a run needs.
"""

from __future__ import annotations

import mmap
import re
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

from deltaw.data.sequences import used_tokens
from deltaw.hub.folders import config_folder
from deltaw.lora.layers_blocks import BlockEmbedding
from deltaw.tensor_files import StoredTensor, read_header
from deltaw.training.session import Session

# What Linux maps around a touched page of a file that it holds in memory, at least: 16 pages of 4 KiB.
REGION = 64 * 1024
# Pages that are touched to see what comes with them, and how far they lie apart: twice the largest page.
TOUCHED, APART = 8, 4 << 20
# Tokens of general prompts and their answers, which drift is measured on: an upper bound.
GENERAL_TOKENS = 2048


def unread_bytes(session: Session, *, dtype: str, converted: int) -> int:
    """Bytes of the input embedding that stay on the disk.

    Args:
        session: put together on fake tensors.
        dtype: what the weights are loaded as.
        converted: bytes of files whose weights have another type; these are read as a whole.

    Returns:
        0 where the embedding is read as a whole: it is trained, tied to another layer, or not mapped.
    """
    embedding = session.model.get_input_embeddings()
    if not isinstance(embedding, nn.Embedding) or embedding.weight.requires_grad or converted:
        return 0
    if isinstance(embedding, BlockEmbedding):
        return 0  # it is read, not mapped
    weight = embedding.weight
    names = session.model.named_parameters(remove_duplicate=False)
    folder = config_folder(session.config.model, dtype, session.config.trust_remote_code)
    if sum(parameter is weight for _, parameter in names) != 1 or not any(folder.glob("*.safetensors")):
        return 0
    tokens = used_tokens(session.data.every).astype(np.int64)
    if not len(tokens):
        return 0
    row_bytes = weight.shape[1] * weight.element_size()
    region = _region(folder, weight)
    first, last = tokens * row_bytes // region, ((tokens + 1) * row_bytes - 1) // region
    touched = len(np.unique(np.concatenate([first, last]))) * max(region, row_bytes)
    if not session.task.has_labels and session.config.train.drift is not False:
        touched += GENERAL_TOKENS * max(region, row_bytes)
    return max(0, weight.numel() * weight.element_size() - touched)


def _region(folder: Path, weight: torch.Tensor) -> int:
    """Bytes that come into memory with a page of the file that holds a weight like this one."""
    for path in sorted(folder.glob("*.safetensors")):
        for stored in read_header(path).values():
            if stored.shape == tuple(weight.shape) and stored.is_float:
                return mapped_around(stored)
    return REGION


def mapped_around(stored: StoredTensor) -> int:
    """Bytes that the system maps, on average, for one page of a stored tensor that is touched.

    A system that holds files in pages of several sizes maps all of the one that it finds, up to 2 MiB; which
    they are depends on the file system, and on how the file was read before. So a few pages are touched.
    """
    begin, end = stored.start, stored.start + stored.bytes
    touches = min(TOUCHED, (end - begin) // APART)
    if sys.platform != "linux" or not touches:
        return REGION
    with (
        stored.file.open("rb") as file,
        mmap.mmap(
            file.fileno(), end, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE
        ) as mapped,
    ):
        view = torch.frombuffer(mapped, dtype=torch.uint8)
        address = view.data_ptr()
        del view
        for place in np.linspace(begin, end - 1, touches + 2, dtype=np.int64)[1:-1]:
            mapped[int(place)]
        return max(REGION, _resident_at(address) // touches)


def _resident_at(address: int) -> int:
    """Bytes in memory of the mapping that begins at an address; 0 where the system does not tell."""
    try:
        maps = Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    found = re.search(rf"(?m)^{address:x}-[0-9a-f]+ (?:.*\n)(?:[A-Z].*\n)*?Rss:\s+(\d+) kB", maps)
    return 1024 * int(found[1]) if found else 0
