"""The invocation sequence of an activated adapter: what it is, and where it stands in a row.

The sequence is what opens the assistant's turn in the chat template; without a template, what all prompts end
with. Knows tokenizers and examples; not adapters.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from deltaw.data.example import Example
from deltaw.data.packing import common_prefix
from deltaw.data.rendering import FAULTS, rendered_by

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokens that a derived sequence has at most. It is there to be found again, and the last occurrence counts.
LONGEST = 16
# Questions that end differently, so that nothing of theirs is taken for the opening of an answer.
_QUESTIONS = ("Why?", "Name a color", "7 + 5 =", "Thank you.")


def opening_of_answer(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens with which the chat template opens the assistant's turn; empty where there are none of
    their own."""
    wholes, text = [], ""
    try:
        for question in _QUESTIONS:
            message = [{"role": "user", "content": question}]
            asked, bare = (rendered_by(tokenizer, message, generation=generation) for generation in (True, False))
            if not asked.startswith(bare) or asked == bare:
                return []
            text = asked[len(bare) :]
            wholes.append(np.asarray(tokenizer(asked, add_special_tokens=False)["input_ids"], np.int32))
    except FAULTS:
        return []  # whoever renders rows with it says what is wrong
    return _common_ending(wholes, len(tokenizer(text, add_special_tokens=False)["input_ids"]))


def ending_of_prompts(rows: Iterable[Example]) -> list[int]:
    """The tokens that all prompts end with; empty where there are none, or rows without a prompt."""
    return _common_ending((row.tokens[: row.prompt_length] for row in rows), LONGEST)


def _common_ending(sequences: Iterable[np.ndarray], most: int) -> list[int]:
    """The longest common ending of token sequences, of at most so many tokens."""
    ending: np.ndarray | None = None
    for other in sequences:
        ending = other[::-1][:most] if ending is None else ending[: common_prefix(ending, other[::-1])]
        if not len(ending):
            break
    return [] if ending is None else ending[::-1].tolist()


def activated(row: Example, invocation: Sequence[int]) -> Example:
    """The row with the place where an adapter of this sequence begins to act.

    That is the last occurrence in what precedes the last completion, as when the model is to write it. So a
    completion that quotes the sequence changes nothing. Without an occurrence the adapter acts nowhere.
    """
    first_label = int(np.flatnonzero(row.is_label)[0]) if row.is_label.any() else len(row.tokens)
    start = last_occurrence(row.tokens[: row.prompt_length or first_label], invocation)
    return replace(row, active_from=len(row.tokens) if start is None else start)


def last_occurrence(tokens: np.ndarray, invocation: Sequence[int]) -> int | None:
    """Where the sequence last begins in tokens (length,); None where it does not occur."""
    if len(tokens) < len(invocation):
        return None
    windows = np.lib.stride_tricks.sliding_window_view(tokens, len(invocation))
    found = np.flatnonzero((windows == np.asarray(invocation)).all(1))
    return int(found[-1]) if len(found) else None


def learns(row: Example) -> bool:
    """Whether an activated adapter acts before each of the row's labels, so that all of them are learned."""
    labels = np.flatnonzero(row.is_label)
    return row.active_from is None or len(labels) == 0 or int(labels[0]) > row.active_from
