"""How the vectors of a row's tokens become one, and what a model's folder says of it.

Sentence-transformers writes the way into ``modules.json`` and the folder of its pooling module. Without them
an encoder's real tokens are averaged. A model whose tokens see only those before them, a decoder, is not made
for that and is refused unless a way is asked for.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deltaw.errors import UserError

Pooling = Literal["mean", "first", "last"]
_KEYS: dict[str, Pooling] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "first",
    "pooling_mode_lasttoken": "last",
}


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
    real = mask[..., None].to(hidden.dtype)
    # Zeros times what padding left there would be NaN where that is not finite.
    return hidden.masked_fill(real == 0, 0).sum(1) / real.sum(1)


def pooling_of(model: PreTrainedModel, folder: Path, asked: str = "auto") -> tuple[Pooling, str]:
    """The pooling of a model and why.

    Raises:
        UserError: the folder says something that is not possible here, or the model is a decoder and nobody
            asked for a way.
    """
    if asked != "auto":
        if asked not in get_args(Pooling):
            raise UserError(
                f"there is no pooling '{asked}'", hint=f"use one of {', '.join(get_args(Pooling))}"
            )
        return asked, "as asked"  # type: ignore[return-value]
    told = _of_folder(folder)
    if told is not None:
        return told, "as the model's folder says"
    if not sees_both_ways(model):
        raise UserError(
            f"{type(model).__name__} is a decoder: its tokens see only those before them, and nothing says "
            "how it embeds a text",
            where=str(folder),
            hint="take an encoder, or ask for pooling 'last' or 'mean' if the model was trained for it",
        )
    return "mean", "an encoder"


def sees_both_ways(model: PreTrainedModel) -> bool:
    """Whether a token's vector depends on tokens behind it, tried on two rows that differ in the last one."""
    core = model.get_encoder() if getattr(model.config, "is_encoder_decoder", False) else model
    ids = torch.arange(5, 13, device=model.device).repeat(2, 1) % core.config.get_text_config().vocab_size
    ids[1, -1] = ids[0, 0]
    with torch.no_grad():
        hidden = core(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state.float()
    change = (hidden[0, 0] - hidden[1, 0]).norm()
    return bool(change > 1e-6 * hidden[0, 0].norm())


def _of_folder(folder: Path) -> Pooling | None:
    modules = _json(folder / "modules.json")
    if modules is None:
        return None
    kinds = [(str(m.get("type", "")).rpartition(".")[2], str(m.get("path", ""))) for m in modules]
    others = [kind for kind, _ in kinds if kind not in ("Transformer", "Pooling", "Normalize")]
    if others:
        raise UserError(
            f"the model's vectors go through a layer '{others[0]}', which is not supported",
            where=str(folder / "modules.json"),
        )
    path = next((path for kind, path in kinds if kind == "Pooling"), None)
    if path is None:
        return None
    # The path comes from the folder's file, and must not lead out of it.
    place = (folder / path / "config.json").resolve()
    settings = _json(place) if place.is_relative_to(folder.resolve()) else None
    on = [key for key, value in (settings or {}).items() if key.startswith("pooling_mode_") and value is True]
    if len(on) != 1 or on[0] not in _KEYS:
        raise UserError(
            f"the model's pooling is not supported: {', '.join(on) or 'none is named'}", where=str(place)
        )
    return _KEYS[on[0]]


def _json(file: Path) -> Any:
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"this is not JSON: {error}", where=str(file)) from error
