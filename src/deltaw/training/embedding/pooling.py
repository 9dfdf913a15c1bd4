"""Pooling of token vectors into text vectors, and the embedding layout from a model's folder or the settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deltaw.data.images import LabelBatch
from deltaw.data.packing import PackedBatch
from deltaw.errors import UserError
from deltaw.hub.sentence_layout import Pooling, SentenceLayout, parse_pooling, read_layout
from deltaw.runtime.packed import first_position, one_row, without_cache
from deltaw.training.microbatches import enter_batch


def pool(hidden: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """Return a vector per row.

    Args:
        hidden: (rows, length, width) hidden states, with padding at the end of rows.
        mask: (rows, length), 1 for tokens and 0 for padding.

    Returns:
        (rows, width).
    """
    if pooling == "first":
        return hidden[:, 0]
    if pooling == "last":
        return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]
    weights = mask if pooling == "mean" else mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)
    token_weights = weights[..., None].to(hidden.dtype)
    # Masking prevents NaN if hidden states of padding are not finite.
    return (hidden.masked_fill(token_weights == 0, 0) * token_weights).sum(1) / token_weights.sum(1)


def text_encoder(model: PreTrainedModel) -> PreTrainedModel:
    """Return the module that encodes texts: the model or its encoder."""
    encoder: Any = model.get_encoder() if getattr(model.config, "is_encoder_decoder", False) else model
    return encoder  # type: ignore[no-any-return]


def vectors_of(model: PreTrainedModel, batch: LabelBatch | PackedBatch, pooling: Pooling) -> tuple[list[Any], Tensor]:
    """Return the rows of a microbatch and their vectors (rows, width) in fp32 (fp64 for an fp64 model).

    In packed rows, a token of a shared prefix counts for each row that shares it.
    """
    core = text_encoder(model)
    with enter_batch(batch) as run:
        inputs = dict(run.inputs)
        if (positions := inputs.get("position_ids")) is not None and (first := first_position(core)):
            inputs["position_ids"] = positions + first
        hidden = core(**inputs, **without_cache(core)).last_hidden_state
    hidden = hidden if hidden.dtype == torch.float64 else hidden.float()
    if isinstance(batch, LabelBatch):
        return list(batch.examples), pool(hidden, batch.inputs["attention_mask"], pooling)
    members, flat = batch.members, hidden.flatten(0, 1)
    rows: list[Any] = [member.example for member in members]
    if pooling in ("first", "last"):
        token = 0 if pooling == "first" else -1
        token_indices = torch.tensor([int(member.indices[token]) for member in members], device=flat.device)
        return rows, flat.index_select(0, token_indices)
    token_indices = torch.cat([torch.from_numpy(member.indices) for member in members]).to(flat.device)
    counts = torch.tensor([len(member.indices) for member in members])
    row_indices = torch.arange(len(members)).repeat_interleave(counts).to(flat.device)
    weights = torch.ones(len(token_indices))
    if pooling == "weighted":
        weights = torch.cat([torch.arange(1.0, count + 1) for count in counts.tolist()])
    weights = weights.to(flat)
    sums = flat.new_zeros(len(members), flat.shape[1])
    sums = sums.index_add(0, row_indices, flat.index_select(0, token_indices) * weights[:, None])
    return rows, sums / flat.new_zeros(len(members)).index_add(0, row_indices, weights)[:, None]


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
    chosen, why = (None if stored is None else stored.pooling), "from the model's folder"
    if pooling != "auto":
        chosen, why = parse_pooling(pooling), "as requested"
    if chosen is None and is_bidirectional(model):
        chosen, why = "mean", "an encoder"
    if chosen is None and decoder is not None:
        chosen, why = decoder, "a decoder"
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
