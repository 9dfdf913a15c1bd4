"""Invocation sequences of activated adapters, and their positions in rows.

The sequence is the text that starts an assistant message in the chat template. Without a template, it is the common
suffix of all prompts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from deltaw.data.example import Example
from deltaw.data.packing import common_prefix
from deltaw.data.rendering import FAULTS, render_with_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Maximum length of a derived sequence in tokens.
MAX_INVOCATION_TOKENS = 16
# Questions with different endings, so that their common suffix does not contain text of a question.
_QUESTIONS = ("Why?", "Name a color", "7 + 5 =", "Thank you.")


def opening_of_answer(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that start an assistant message in the chat template. Empty if the template adds no tokens."""
    token_lists, text = [], ""
    try:
        for question in _QUESTIONS:
            message = [{"role": "user", "content": question}]
            with_opening, without_opening = (
                render_with_tokenizer(tokenizer, message, generation=generation) for generation in (True, False)
            )
            if not with_opening.startswith(without_opening) or with_opening == without_opening:
                return []
            text = with_opening[len(without_opening) :]
            token_lists.append(np.asarray(tokenizer(with_opening, add_special_tokens=False)["input_ids"], np.int32))
    except FAULTS:
        return []  # the error is reported when rows are rendered
    return _common_ending(token_lists, len(tokenizer(text, add_special_tokens=False)["input_ids"]))


def ending_of_prompts(rows: Iterable[Example]) -> list[int]:
    """Return the common token suffix of all prompts, which is empty if a row has no prompt."""
    return _common_ending((row.tokens[: row.prompt_length] for row in rows), MAX_INVOCATION_TOKENS)


def _common_ending(sequences: Iterable[np.ndarray], max_tokens: int) -> list[int]:
    """Return the longest common suffix of token sequences, limited to ``max_tokens``."""
    ending: np.ndarray | None = None
    for tokens in sequences:
        ending = tokens[::-1][:max_tokens] if ending is None else ending[: common_prefix(ending, tokens[::-1])]
        if not len(ending):
            break
    return [] if ending is None else ending[::-1].tolist()


def with_activation(row: Example, invocation: Sequence[int]) -> Example:
    """Set the position from which an adapter with this invocation sequence is active.

    It is the last occurrence of the sequence before the last completion, as in generation, so that a completion that
    quotes the sequence has no effect. Without an occurrence the adapter is inactive.
    """
    first_label = int(np.flatnonzero(row.is_label)[0]) if row.is_label.any() else len(row.tokens)
    start = last_occurrence(row.tokens[: row.prompt_length or first_label], invocation)
    return replace(row, active_from=len(row.tokens) if start is None else start)


def last_occurrence(tokens: np.ndarray, invocation: Sequence[int]) -> int | None:
    """Return the start of the last occurrence of the sequence in (length,) tokens, or None."""
    if len(tokens) < len(invocation):
        return None
    windows = np.lib.stride_tricks.sliding_window_view(tokens, len(invocation))
    starts = np.flatnonzero((windows == np.asarray(invocation)).all(1))
    return int(starts[-1]) if len(starts) else None


def acts_before_labels(row: Example) -> bool:
    """Return True if an activated adapter is active before the first label, so that all labels are trained."""
    labels = np.flatnonzero(row.is_label)
    return row.active_from is None or len(labels) == 0 or int(labels[0]) > row.active_from
