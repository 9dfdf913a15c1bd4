"""Token ids that end a text: end of document and end of turn.

Chat models end a turn with a special token (``<|im_end|>``, ``<|eot_id|>``) that often differs from the tokenizer's
``eos``. Generation must stop at any of them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

# End-of-turn and end-of-document tokens of published chat models.
_END_TOKENS = (
    *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<turn|>", "<|end|>", "<|return|>"),
    *("<|endoftext|>", "<|end_of_text|>", "<|END_OF_TURN_TOKEN|>"),
)


def terminators(model: nn.Module | None, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """Return the token ids that end a text, in ascending order.

    They consist of the ``eos`` tokens of the generation configuration and the tokenizer, and the known end tokens in
    the tokenizer's added vocabulary. Either argument can be None.
    """
    token_ids: set[int] = set()
    for config in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        token_ids |= _ids(getattr(config, "eos_token_id", None))
    if tokenizer is not None:
        # Only added tokens count: a regular vocabulary entry is not a terminator.
        token_ids |= {*_ids(tokenizer.eos_token_id), *turn_ends(tokenizer)}
    return sorted(token_ids)


def turn_ends(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of known end-of-turn and end-of-document tokens in the tokenizer's added vocabulary."""
    added = tokenizer.get_added_vocab()
    return sorted(added[end] for end in _END_TOKENS if end in added)


def terminators_in(folder: Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the terminators of a model that is not loaded, based on the files in its folder."""
    token_ids = set(terminators(None, tokenizer))
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            token_ids |= _ids(json.loads((folder / name).read_text(encoding="utf-8")).get("eos_token_id"))
    return sorted(token_ids)


def _ids(declared: int | list[int] | None) -> set[int]:
    return set() if declared is None else {declared} if isinstance(declared, int) else set(declared)
