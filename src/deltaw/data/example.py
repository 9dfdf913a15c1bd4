"""Tokenized examples with their labels, and groups of them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np


@dataclass(frozen=True, eq=False)
class Example:
    """Tokens of one row with its loss mask.

    Attributes:
        row: Row number in the file, from 1 (line number in a JSON Lines file).
        tokens: (length,) int32 token ids.
        is_label: (length,) bool, True if the loss includes the prediction of this token. Always False at position 0,
            which has no preceding token.
        prompt_length: Number of tokens before the last completion. ``tokens[:prompt_length]`` is the prompt for
            generating it. 0 for plain text.
        answer: Text of the last completion without end marks, or None if the row is plain text.
        active_from: Index of the first token that an activated adapter changes, or the row length if it changes no
            token.
            None if the adapter changes all tokens.
        reference: Summed log-probability of the labels under a reference model, in nats. None if the loss does not use
            it.
        desired: For unpaired preference losses, True if the answer is desirable. None if the loss does not use it.
    """

    row: int
    tokens: np.ndarray
    is_label: np.ndarray
    prompt_length: int
    answer: str | None
    active_from: int | None = None
    reference: float | None = None
    desired: bool | None = None

    @property
    def shareable_length(self) -> int:
        """Return the number of leading tokens that do not depend on the tokens after them, so that rows can share them.

        Tokens that an activated adapter changes are not shareable, because another row may contain the same tokens
        before its activation.
        """
        return len(self.tokens) if self.active_from is None else self.active_from

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def label_count(self) -> int:
        """Return the number of labels."""
        return int(self.is_label.sum())

    def truncate(self, length: int) -> Example:
        """Return the example truncated to ``length`` tokens."""
        tokens, is_label = self.tokens[:length], self.is_label[:length]
        return replace(self, tokens=tokens, is_label=is_label, prompt_length=min(self.prompt_length, length))

    def with_prefix(self, added: int, tokens: np.ndarray) -> Example:
        """Return the example with ``added`` virtual tokens before it.

        The first token of the original example remains unlabeled.

        Args:
            added: Number of virtual tokens.
            tokens: All tokens, starting with the virtual ones.
        """
        is_label = np.concatenate([np.zeros(added, bool), self.is_label])
        prompt_length = self.prompt_length + added if self.prompt_length else 0
        return replace(self, tokens=tokens, is_label=is_label, prompt_length=prompt_length)

    def without_prefix(self, removed: int) -> Example:
        """Undo :meth:`with_prefix` and clear ``active_from``.

        Args:
            removed: Number of virtual tokens.
        """
        tokens, is_label, prompt_length = self.tokens[removed:], self.is_label[removed:], self.prompt_length - removed
        return replace(self, tokens=tokens, is_label=is_label, prompt_length=prompt_length, active_from=None)


@dataclass(frozen=True, eq=False)
class RowGroup:
    """Rows that enter the loss together, for example a chosen and a rejected answer to one prompt.

    A group counts as one row: an epoch shuffles groups, and microbatches do not divide them.

    Attributes:
        rows: Examples, in the order that the loss requires.
    """

    rows: tuple[Example, ...]

    @property
    def row(self) -> int:
        """Return the number of its first row in the file."""
        return self.rows[0].row

    def __len__(self) -> int:
        """Return the number of tokens of all rows."""
        return sum(len(row) for row in self.rows)

    @property
    def label_count(self) -> int:
        """Return the number of labels of all rows."""
        return sum(row.label_count for row in self.rows)


Item: TypeAlias = Example | RowGroup


def rows_of(item: Item) -> tuple[Example, ...]:
    """Return the rows of a group, or the row itself."""
    return item.rows if isinstance(item, RowGroup) else (item,)


@dataclass(frozen=True, eq=False)
class LabeledExample:
    """Tokens of one row, including special tokens, and its label.

    Attributes:
        row: Row number in the file, from 1.
        tokens: (length,) int32 token ids.
        label: Class index, or the target value of a regression.
        segments: (length,) int8, the index of the text that each token belongs to. None for single texts, or if the
            tokenizer does not return segments.
    """

    row: int
    tokens: np.ndarray
    label: int | float
    segments: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def label_count(self) -> int:
        return 1

    @property
    def digest(self) -> bytes:
        """Return a hash of the tokens and segments."""
        digest = hashlib.blake2b(self.tokens.tobytes(), digest_size=16)
        if self.segments is not None:
            digest.update(self.segments.tobytes())
        return digest.digest()
