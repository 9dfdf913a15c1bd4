"""Weights that a run never reads: rows of an embedding whose tokens do not occur in the data.

Weights of the type that they are stored in are mapped from their file, and the system brings in what is
touched. Of a large vocabulary that is often little. Knows a session and its rows; not how much a run needs.
"""

from __future__ import annotations

import numpy as np
from torch import nn

from deltaw.data.sequences import used_tokens
from deltaw.hub.folders import config_folder
from deltaw.lora.layers_blocks import BlockEmbedding
from deltaw.training.session import Session

# What Linux maps around a touched page of a file that it holds in memory: 16 pages of 4 KiB.
REGION = 64 * 1024
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
    first, last = tokens * row_bytes // REGION, ((tokens + 1) * row_bytes - 1) // REGION
    touched = len(np.unique(np.concatenate([first, last]))) * max(REGION, row_bytes)
    if not session.task.has_labels and session.config.train.drift is not False:
        touched += GENERAL_TOKENS * max(REGION, row_bytes)
    return max(0, weight.numel() * weight.element_size() - touched)
