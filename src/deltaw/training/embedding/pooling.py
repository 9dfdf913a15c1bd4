"""One vector a text from its tokens' vectors, and what a model's folder or the settings say of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deltaw.data.images import LabelBatch
from deltaw.data.packing import Batch
from deltaw.errors import UserError
from deltaw.hub.sentence_layout import Pooling, SentenceLayout, pooling_named, read_layout
from deltaw.runtime.packed import first_position, one_row, without_cache
from deltaw.training.microbatches import entered


def pooled(hidden: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """One vector a row.

    Args:
        hidden: (rows, length, width), of rows padded at their end. mask: (rows, length), 1 for real tokens.

    Returns:
        (rows, width).
    """
    if pooling == "first":
        return hidden[:, 0]
    if pooling == "last":
        return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]
    weights = mask if pooling == "mean" else mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)
    real = weights[..., None].to(hidden.dtype)
    # Zeros times what padding left there would be NaN where that is not finite.
    return (hidden.masked_fill(real == 0, 0) * real).sum(1) / real.sum(1)


def reader_of(model: PreTrainedModel) -> PreTrainedModel:
    """What reads texts: the model itself, or its encoder."""
    found: Any = model.get_encoder() if getattr(model.config, "is_encoder_decoder", False) else model
    return found  # type: ignore[no-any-return]


def vectors_of(model: PreTrainedModel, batch: LabelBatch | Batch, pooling: Pooling) -> tuple[list[Any], Tensor]:
    """The rows of a microbatch, and a vector for each: (rows, width), fp32 (fp64 of an fp64 model).

    Of packed rows, a token that several share counts for each of them.
    """
    core = reader_of(model)
    with entered(batch) as run:
        inputs = dict(run.inputs)
        if (positions := inputs.get("position_ids")) is not None and (first := first_position(core)):
            inputs["position_ids"] = positions + first
        hidden = core(**inputs, **without_cache(core)).last_hidden_state
    hidden = hidden if hidden.dtype == torch.float64 else hidden.float()
    if isinstance(batch, LabelBatch):
        return list(batch.examples), pooled(hidden, batch.inputs["attention_mask"], pooling)
    members, flat = batch.members, hidden.flatten(0, 1)
    rows: list[Any] = [member.example for member in members]
    if pooling in ("first", "last"):
        place = 0 if pooling == "first" else -1
        places = torch.tensor([int(member.places[place]) for member in members], device=flat.device)
        return rows, flat.index_select(0, places)
    places = torch.cat([torch.from_numpy(member.places) for member in members]).to(flat.device)
    counts = torch.tensor([len(member.places) for member in members])
    of_row = torch.arange(len(members)).repeat_interleave(counts).to(flat.device)
    weights = torch.ones(len(places))
    if pooling == "weighted":
        weights = torch.cat([torch.arange(1.0, count + 1) for count in counts.tolist()])
    weights = weights.to(flat)
    sums = flat.new_zeros(len(members), flat.shape[1])
    sums = sums.index_add(0, of_row, flat.index_select(0, places) * weights[:, None])
    return rows, sums / flat.new_zeros(len(members)).index_add(0, of_row, weights)[:, None]


def layout_of(
    model: PreTrainedModel,
    folder: Path,
    *,
    pooling: str = "auto",
    normalize: bool | str = "auto",
    query_prompt: str | None = None,
    passage_prompt: str | None = None,
    decoder: Pooling | None = None,
) -> tuple[SentenceLayout, str]:
    """How a model embeds a text, and why it pools so: as asked, as its folder says, or else by the mean of an encoder's
    tokens. A decoder's tokens see only those before them, so that a mean is not made for it.

    Args:
        decoder: the pooling of a decoder of which nobody says how it embeds; None: it is refused.

    Raises:
        UserError: the folder says something that is not possible here, there is no such pooling, or nobody says how a
            decoder embeds.
    """
    found = read_layout(folder)
    way, why = (None if found is None else found.pooling), "as the model's folder says"
    if pooling != "auto":
        way, why = pooling_named(pooling), "as asked"
    if way is None and sees_both_ways(model):
        way, why = "mean", "an encoder"
    if way is None and decoder is not None:
        way, why = decoder, "a decoder"
    if way is None:
        what = f"{type(model).__name__} is a decoder, and nothing says how it embeds a text"
        hint = "take an encoder, or ask for pooling 'last' or 'mean' if the model was trained for it"
        raise UserError(what, where=str(folder), hint=hint)
    known = found or SentenceLayout(None, True)
    scaled = known.normalize if normalize == "auto" else bool(normalize)
    query = known.query_prompt if query_prompt is None else query_prompt
    passage = known.passage_prompt if passage_prompt is None else passage_prompt
    return SentenceLayout(way, scaled, query, passage, known.max_length), why


def sees_both_ways(model: PreTrainedModel) -> bool:
    """Whether a token's vector depends on tokens behind it, tried on two rows that differ in the last one."""
    core = reader_of(model)
    ids = torch.arange(5, 13, device=model.device)[None] % core.config.get_text_config().vocab_size
    other = ids.clone()
    other[0, -1] = ids[0, 0]
    with torch.no_grad():
        first, second = (core(**one_row(core, row)).last_hidden_state[0, 0].float() for row in (ids, other))
    return bool((first - second).norm() > 1e-6 * first.norm())
