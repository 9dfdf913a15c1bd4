"""Tokens of a row as decoded spans of text, for displaying labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TokenSpan:
    """Consecutive tokens that are all labels, or all unlabeled.

    Attributes:
        text: Decoded text, or the name of a special token.
        label: True if the tokens are labels.
        special: True if the span is one special token.
        tokens: Number of tokens.
    """

    text: str
    label: bool
    special: bool
    tokens: int


def token_spans(
    tokens: np.ndarray | Sequence[int], is_label: np.ndarray | Sequence[bool], tokenizer: PreTrainedTokenizerBase
) -> list[TokenSpan]:
    """Divide tokens into spans. The concatenated span texts are the decoded text.

    Each special token is a separate span.

    Args:
        tokens: (length,) token ids.
        is_label: (length,) bool.
    """
    ids = [int(token) for token in tokens]
    special = special_tokens(tokenizer)
    spans: list[TokenSpan] = []
    start, previous = 0, ""
    while start < len(ids):
        label, is_special = bool(is_label[start]), ids[start] in special
        stop = start + 1
        while stop < len(ids) and not is_special and ids[stop] not in special and bool(is_label[stop]) is label:
            stop += 1
        # Decode from the start of the row: a span that is decoded separately may lose its leading space.
        decoded = _decoded(ids[:stop], tokenizer)
        text = decoded[len(previous) :] if decoded.startswith(previous) else _decoded(ids[start:stop], tokenizer)
        spans.append(TokenSpan(special.get(ids[start], text) if is_special else text, label, is_special, stop - start))
        start, previous = stop, decoded
    return spans


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Return the tokenizer's special token ids with their names."""
    ids = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids |= set(tokenizer.all_special_ids)
    ordered = sorted(ids)
    return dict(zip(ordered, map(str, tokenizer.convert_ids_to_tokens(ordered)), strict=True))


def _decoded(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
