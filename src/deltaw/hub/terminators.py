"""Which token ids end a text: the end of the document, and the end of a turn of a conversation.

A chat model is trained to close its turn with a token of its own (``<|im_end|>``, ``<|eot_id|>``), which is
often not the tokenizer's ``eos``. A generation that watches only one of them does not stop.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

# The tokens with which published chat models end a turn or a document.
_ENDS = [
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<end_of_turn>",
    "<turn|>",
    "<|end|>",
    "<|return|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|END_OF_TURN_TOKEN|>",
]


def terminators(model: nn.Module | None, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """The token ids that end a text, ascending.

    They come from the model's generation configuration, the tokenizer's ``eos``, and those end-of-turn
    tokens that the tokenizer knows as one added token. Either argument may be None.
    """
    found: set[int] = set()
    for config in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        found |= _ids(getattr(config, "eos_token_id", None))
    if tokenizer is not None:
        # Only tokens that are matched whole in a text: an ordinary vocabulary entry is no terminator.
        found |= {*_ids(tokenizer.eos_token_id), *turn_ends(tokenizer)}
    return sorted(found)


def turn_ends(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of published end-of-turn and end-of-document tokens that the tokenizer knows as one added
    token."""
    added = tokenizer.get_added_vocab()
    return sorted(added[end] for end in _ENDS if end in added)


def terminators_in(folder: Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """As :func:`terminators`, for a model whose weights are not loaded, by the files in its folder."""
    found = set(terminators(None, tokenizer))
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            found |= _ids(json.loads((folder / name).read_text(encoding="utf-8")).get("eos_token_id"))
    return sorted(found)


def _ids(declared: int | list[int] | None) -> set[int]:
    return set() if declared is None else {declared} if isinstance(declared, int) else set(declared)
