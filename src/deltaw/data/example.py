"""Tokenized examples with their labels, groups and sequences of them, and their tokens as spans of text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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

    segments: ClassVar[None] = None

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
        tokens = self.tokens[:length]
        is_label = self.is_label[:length]
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
        tokens = self.tokens[removed:]
        is_label = self.is_label[removed:]
        prompt_length = self.prompt_length - removed
        return replace(self, tokens=tokens, is_label=is_label, prompt_length=prompt_length, active_from=None)


@dataclass(frozen=True, eq=False)
class RowGroup:
    """Rows that enter the loss together, for example a chosen and a rejected answer to one prompt.

    A group counts as one row: an epoch shuffles groups, and microbatches do not divide them.

    Attributes:
        rows: :class:`Example` or :class:`LabeledExample`, in the order that the loss requires.
    """

    rows: tuple[Any, ...]

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


def rows_of(item: Any) -> tuple[Any, ...]:
    """Return the rows of a group, or the row itself."""
    return item.rows if isinstance(item, RowGroup) else (item,)


# Maximum number of characters of a text in a report.
MAX_TEXT_LENGTH = 1000


@dataclass(frozen=True, eq=False)
class LabeledExample:
    """Tokens of one row, including special tokens, and its label.

    Attributes:
        row: Row number in the file, from 1.
        tokens: (length,) int32 token ids.
        label: Class index, or the target of a regression, or a tuple of several targets.
        segments: (length,) int8, the index of the text that each token belongs to. None for single texts, or if the
            tokenizer does not return segments.
        text: Start of the text as written in the row, for reports. Empty if unknown.
    """

    row: int
    tokens: np.ndarray
    label: Any
    segments: np.ndarray | None = None
    text: str = field(default="", repr=False)

    active_from: ClassVar[None] = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def shareable_length(self) -> int:
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

    Each special token is a separate span, and so are the tokens of an image, whose ids are beyond the vocabulary.

    Args:
        tokens: (length,) token ids.
        is_label: (length,) bool.
    """
    ids = [int(token) for token in tokens]
    special = special_tokens(tokenizer)
    size = len(tokenizer)
    spans: list[TokenSpan] = []
    text_ids: list[int] = []
    start = 0
    previous = ""
    while start < len(ids):
        label = bool(is_label[start])
        is_special = ids[start] in special
        stop = start + 1
        if ids[start] >= size:
            while stop < len(ids) and ids[stop] == ids[stop - 1] + 1:
                stop += 1
            spans.append(TokenSpan(f"<image {stop - start} tokens>", False, True, stop - start))
            start = stop
            continue
        while stop < len(ids) and not is_special and ids[stop] < size and ids[stop] not in special:
            if bool(is_label[stop]) is not label:
                break
            stop += 1
        # Decode from the start of the row: a span that is decoded separately may lose its leading space.
        text_ids += ids[start:stop]
        decoded = _decoded(text_ids, tokenizer)
        text = decoded[len(previous) :] if decoded.startswith(previous) else _decoded(ids[start:stop], tokenizer)
        spans.append(TokenSpan(special.get(ids[start], text) if is_special else text, label, is_special, stop - start))
        start = stop
        previous = decoded
    return spans


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Return the tokenizer's special token ids with their names."""
    ids = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids |= set(tokenizer.all_special_ids)
    ordered = sorted(ids)
    return dict(zip(ordered, map(str, tokenizer.convert_ids_to_tokens(ordered)), strict=True))


def _decoded(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


class ConcatSequence(Sequence[Any]):
    """Concatenation of sequences without copying them."""

    def __init__(self, parts: Sequence[Sequence[Any]]) -> None:
        self._parts = list(parts)
        self._stops = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._stops[-1])

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        if isinstance(index, slice):
            return select_rows(self, np.arange(len(self))[index])
        position = range(len(self))[index]
        part = int(np.searchsorted(self._stops, position, side="right"))
        return self._parts[part][position - int(self._stops[part]) + len(self._parts[part])]

    def __iter__(self) -> Iterator[Any]:
        for part in self._parts:
            yield from part

    @property
    def lengths(self) -> np.ndarray:
        """Return (n,) row lengths."""
        return np.concatenate([lengths_of(part) for part in self._parts])

    def used_tokens(self) -> np.ndarray:
        """Return distinct token ids in ascending order: a superset of those in the rows."""
        return np.unique(np.concatenate([used_tokens(part) for part in self._parts]))

    def digest(self) -> bytes:
        """Return a hash of the rows' content."""
        digest = hashlib.blake2b(digest_size=16)
        for part in self._parts:
            digest.update(part.digest() if hasattr(part, "digest") else repr(len(part)).encode())
        return digest.digest()


class IndexedSequence(Sequence[Any]):
    """View of the rows of a sequence at given indices."""

    def __init__(self, rows: Sequence[Any], indices: np.ndarray) -> None:
        self._rows = rows
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        if isinstance(index, slice):
            return IndexedSequence(self._rows, self._indices[index])
        return self._rows[int(self._indices[index])]

    @property
    def lengths(self) -> np.ndarray:
        """Return (n,) row lengths."""
        return lengths_of(self._rows)[self._indices]


def concat_rows(*parts: Sequence[Any]) -> Sequence[Any]:
    """Concatenate row sequences: lists into a list, other sequences into a view."""
    if all(isinstance(part, list) for part in parts):
        return [row for part in parts for row in part]
    return ConcatSequence([part for part in parts if len(part)] or parts[:1])


def select_rows(rows: Sequence[Any], indices: np.ndarray) -> Sequence[Any]:
    """Return the rows at ``indices``: a list for a list, a view for other sequences."""
    if isinstance(rows, list):
        return [rows[index] for index in indices.tolist()]
    return rows.select(indices) if hasattr(rows, "select") else IndexedSequence(rows, indices)


def lengths_of(rows: Sequence[Any]) -> np.ndarray:
    """Return (n,) row lengths without loading stored rows."""
    lengths = getattr(rows, "lengths", None)
    return np.fromiter(map(len, rows), np.int64, len(rows)) if lengths is None else lengths


def used_tokens(rows: Sequence[Any]) -> np.ndarray:
    """Return the distinct tokens of rows and of the rows of groups, in ascending order."""
    if hasattr(rows, "used_tokens"):
        return rows.used_tokens()
    tokens = [row.tokens for group in rows for row in getattr(group, "rows", (group,)) if hasattr(row, "tokens")]
    return np.unique(np.concatenate(tokens)) if tokens else np.zeros(0, np.int32)
