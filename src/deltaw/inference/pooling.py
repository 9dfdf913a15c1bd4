"""Pooling of token vectors into text vectors, and the embedding layout from a model's folder or the settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from deltaw.data.packing import MicroBatch
from deltaw.errors import UserError
from deltaw.hub.sentence_layout import Pooling, SentenceLayout, parse_pooling, read_layout
from deltaw.kernels.layout import to_device
from deltaw.runtime.packed import one_row, without_cache
from deltaw.training.feed import enter_batch


def pool(hidden: Tensor, rows: Sequence[np.ndarray], pooling: Pooling) -> Tensor:
    """Return a vector (rows, width) per row.

    Args:
        hidden: (tokens, width) hidden states.
        rows: For each row, the (row length,) indices of its tokens. A token of a shared prefix counts for each row.
    """
    if pooling in ("first", "last"):
        ends = torch.tensor([int(indices[0 if pooling == "first" else -1]) for indices in rows])
        return hidden.index_select(0, to_device(ends, hidden.device))
    token_indices = to_device(torch.from_numpy(np.concatenate(rows)), hidden.device)
    counts = torch.tensor([len(indices) for indices in rows])
    row_indices = to_device(torch.arange(len(rows)).repeat_interleave(counts), hidden.device)
    weights = torch.ones(len(token_indices))
    if pooling == "weighted":
        weights = torch.cat([torch.arange(1.0, count + 1) for count in counts.tolist()])
    weights = to_device(weights, hidden.device).to(hidden.dtype)
    sums = hidden.new_zeros(len(rows), hidden.shape[1])
    sums = sums.index_add(0, row_indices, hidden.index_select(0, token_indices) * weights[:, None])
    return sums / hidden.new_zeros(len(rows)).index_add(0, row_indices, weights)[:, None]


def text_encoder(model: PreTrainedModel) -> PreTrainedModel:
    """Return the module that encodes texts: the model or its encoder."""
    encoder: PreTrainedModel = model.get_encoder() if getattr(model.config, "is_encoder_decoder", False) else model
    return encoder


def vectors_of(model: PreTrainedModel, batch: MicroBatch, pooling: Pooling) -> Tensor:
    """Return the vectors (rows, width) of a microbatch's rows in fp32 (fp64 for an fp64 model)."""
    core = text_encoder(model)
    with enter_batch(batch) as run:
        hidden = core(**run.inputs, **without_cache(core)).last_hidden_state.flatten(0, 1)
    hidden = hidden if hidden.dtype == torch.float64 else hidden.float()
    return pool(hidden, [member.indices for member in batch.members], pooling)


def choose_layout(
    model: PreTrainedModel,
    folder: Path,
    *,
    pooling: str = "auto",
    normalize: bool | str = "auto",
    query_prompt: str | None = None,
    passage_prompt: str | None = None,
    decoder: Pooling | None = None,
) -> tuple[SentenceLayout, str]:
    """Return the embedding layout of a model and the reason for its pooling.

    The pooling is the requested one, the one of the model's folder, or the mean for an encoder. The mean does not suit
    decoders by default, because their tokens attend only to preceding tokens.

    Args:
        decoder: Pooling of a decoder without a configured one. None raises an error instead.

    Raises:
        UserError: if the folder specifies an unsupported layout, the pooling does not exist, or a decoder has no
            configured pooling.
    """
    stored = read_layout(folder)
    chosen = None if stored is None else stored.pooling
    why = "from the model's folder"
    if pooling != "auto":
        chosen = parse_pooling(pooling)
        why = "as requested"
    if chosen is None and is_bidirectional(model):
        chosen = "mean"
        why = "an encoder"
    if chosen is None and decoder is not None:
        chosen = decoder
        why = "a decoder"
    if chosen is None:
        message = f"{type(model).__name__} is a decoder without a configured pooling"
        hint = "use an encoder, or set pooling 'last' or 'mean' if the model was trained with it"
        raise UserError(message, location=str(folder), hint=hint)
    layout = stored or SentenceLayout(None, True)
    normalized = layout.normalize if normalize == "auto" else bool(normalize)
    query = layout.query_prompt if query_prompt is None else query_prompt
    passage = layout.passage_prompt if passage_prompt is None else passage_prompt
    return SentenceLayout(chosen, normalized, query, passage, layout.max_length), why


def is_bidirectional(model: PreTrainedModel) -> bool:
    """True if a token's vector depends on later tokens. Tested with two rows that differ in the last token."""
    core = text_encoder(model)
    ids = torch.arange(5, 13, device=model.device)[None] % core.config.get_text_config().vocab_size
    other = ids.clone()
    other[0, -1] = ids[0, 0]
    with torch.no_grad():
        first, second = (core(**one_row(core, row)).last_hidden_state[0, 0].float() for row in (ids, other))
    return bool((first - second).norm() > 1e-6 * first.norm())
