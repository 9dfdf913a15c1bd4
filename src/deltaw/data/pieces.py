"""The tokens of a row as pieces of text, for a person to see what is trained on.

Each special token is a piece of its own. It knows tokens and a tokenizer; not how text is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens that are all labels, or all none.

    Attributes:
        text: as decoded; of a special token, its name.
        label: whether they are labels.
        special: whether it is one special token.
        tokens: how many.
    """

    text: str
    label: bool
    special: bool
    tokens: int


def pieces(
    tokens: np.ndarray | Sequence[int], is_label: np.ndarray | Sequence[bool], tokenizer: PreTrainedTokenizerBase
) -> list[Piece]:
    """The tokens as pieces, whose texts together are all of the text.

    Args:
        tokens: (length,). is_label: bool (length,).
    """
    ids = [int(token) for token in tokens]
    special = special_tokens(tokenizer)
    found: list[Piece] = []
    begin, done = 0, ""
    while begin < len(ids):
        label, is_special = bool(is_label[begin]), ids[begin] in special
        stop = begin + 1
        while stop < len(ids) and not is_special and ids[stop] not in special and bool(is_label[stop]) is label:
            stop += 1
        # Decoded together with all before it: on its own, a piece may lose the space that it begins with.
        whole = _decoded(ids[:stop], tokenizer)
        text = whole[len(done) :] if whole.startswith(done) else _decoded(ids[begin:stop], tokenizer)
        found.append(Piece(special.get(ids[begin], text) if is_special else text, label, is_special, stop - begin))
        begin, done = stop, whole
    return found


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """The tokenizer's special tokens and their names."""
    ids = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids |= set(tokenizer.all_special_ids)
    ordered = sorted(ids)
    return dict(zip(ordered, map(str, tokenizer.convert_ids_to_tokens(ordered)), strict=True))


def _decoded(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
