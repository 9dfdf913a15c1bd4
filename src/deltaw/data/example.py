"""A row of a data set as the model sees it, its tokens and which of them are labels; and groups of rows.

Knows no tokenizer, no file and no batch.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np


@dataclass(frozen=True, eq=False)
class Example:
    """The tokens of one row with its loss mask.

    Attributes:
        row: number of the row in its file, from 1 (in a JSON Lines file, the number of its line).
        tokens: int32 (length,).
        is_label: bool (length,); True where this token is predicted in the loss. Never True at position 0,
            which nothing precedes.
        prompt_length: tokens before the last completion; ``tokens[:prompt_length]`` is what a model is
            given to generate it. 0 for plain text.
        answer: text of the last completion without end marks; None for plain text.
        active_from: the first token that an activated adapter acts on, the row's length where it acts on
            none; None for adapters that act on all.
        reference: the log-probability of its labels together under a reference model, in nats; None where no
            loss needs it.
        desired: whether an answer that comes alone is one to be written; None where no loss needs it.
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
    def shareable(self) -> int:
        """Tokens at its beginning that are the same whatever follows, so that rows can share them: not those
        on which an activated adapter acts, since another row may have them before its own does."""
        return len(self.tokens) if self.active_from is None else self.active_from

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def label_count(self) -> int:
        """How many tokens are labels."""
        return int(self.is_label.sum())

    def shortened(self, length: int) -> Example:
        """The first ``length`` tokens of this row."""
        return replace(
            self,
            tokens=self.tokens[:length],
            is_label=self.is_label[:length],
            prompt_length=min(self.prompt_length, length),
        )

    def after(self, added: int, tokens: np.ndarray) -> Example:
        """This row as ``tokens``, the first ``added`` of which were put before it and are no labels.

        The labels stay the same ones: the row's first token is not predicted, though something precedes it
        now.
        """
        return replace(
            self,
            tokens=tokens,
            is_label=np.concatenate([np.zeros(added, bool), self.is_label]),
            prompt_length=self.prompt_length + added if self.prompt_length else 0,
        )

    def without_first(self, removed: int) -> Example:
        """What :meth:`after` was made of, ``removed`` being what it added; no adapter acts on it."""
        return replace(
            self,
            tokens=self.tokens[removed:],
            is_label=self.is_label[removed:],
            prompt_length=self.prompt_length - removed,
            active_from=None,
        )


@dataclass(frozen=True, eq=False)
class RowGroup:
    """Rows that one loss sees together, such as a chosen and a rejected answer to one prompt.

    To the data a group is one row: an epoch shuffles groups, and a group is never cut into two microbatches.

    Attributes:
        rows: in an order that the loss knows.
    """

    rows: tuple[Example, ...]

    @property
    def row(self) -> int:
        """The number of its first row in the file."""
        return self.rows[0].row

    def __len__(self) -> int:
        """Tokens of all its rows."""
        return sum(len(row) for row in self.rows)

    @property
    def label_count(self) -> int:
        """How many tokens of all its rows are labels."""
        return sum(row.label_count for row in self.rows)


Item: TypeAlias = Example | RowGroup


def rows_of(item: Item) -> tuple[Example, ...]:
    """The rows of a group, or the row itself."""
    return item.rows if isinstance(item, RowGroup) else (item,)


@dataclass(frozen=True, eq=False)
class LabeledExample:
    """The tokens of one row, special tokens included, and its label.

    Attributes:
        row: number of the row in its file, from 1.
        tokens: int32 (length,).
        label: index of the class, or the number of a regression.
        segments: int8 (length,), which of the two texts each token belongs to; None for one text, or if the
            tokenizer does not say.
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
        """Equal for rows with the same tokens and segments."""
        digest = hashlib.blake2b(self.tokens.tobytes(), digest_size=16)
        if self.segments is not None:
            digest.update(self.segments.tobytes())
        return digest.digest()
