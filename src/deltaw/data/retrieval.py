"""Rows for retrieval: a query with passages and perhaps scores, or a text with its class.

Columns have the names that sentence-transformers gives them, or other usual ones (:data:`QUERIES`, :data:`PASSAGES`).
What a model sees of a row, a subclass says: each text alone, or the query with each passage. Knows no models.
"""

from __future__ import annotations

import abc
import functools
import hashlib
import math
import re
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from deltaw.data.check import Finding
from deltaw.data.classes import class_name
from deltaw.data.columns import NEGATIVES, PASSAGES, QUERIES, SCORES, TEXTS, named_columns, wrong_columns
from deltaw.data.example import LabeledExample, RowGroup
from deltaw.data.messages import WRONG_TYPE, empty_text, written_text
from deltaw.data.pieces import pieces
from deltaw.data.report import BadRowError, count_of
from deltaw.data.row_reader import RowReader, ShownExample
from deltaw.data.rows import Row, Rows
from deltaw.errors import UserError

_NUMBERED = re.compile(r"negative_\d+")


@dataclass(frozen=True)
class RowTexts:
    """A row's texts.

    Attributes:
        query: or, of a row with a class, its text.
        passages: the right one first, unless ``scores`` say how right each is.
        scores: one for each passage, or one for a positive and a negative: by how much the first is better; empty
            where the first passage is right and the others are not.
        name: of the row's class.
    """

    query: str
    passages: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    name: str | None = None


@dataclass(frozen=True, eq=False)
class TextGroup(RowGroup):
    """A row's texts as a model sees them.

    Attributes:
        rows: of an embedding model, the query and the passages; of a reranker, the query with each passage.
        scores: as in :class:`RowTexts`. group: equal for rows with the same query.
        label: the number of the row's class; None where it has none.
        file_rows: all usable rows of the row's file, trained on or held out; empty if unknown.
    """

    scores: tuple[float, ...] = ()
    group: bytes = b""
    label: int | None = None
    file_rows: Sequence[TextGroup] = field(default=(), repr=False)

    @property
    def label_count(self) -> int:
        """A row counts once."""
        return 1


@dataclass(frozen=True)
class Columns:
    """The columns of a file by what they hold; one that is not there is None."""

    query: str | None
    passage: str | None
    negatives: tuple[str, ...]
    score: str | None
    text: str | None

    @classmethod
    def of(cls, names: Sequence[str], where: str, task: str = "embedding", *, labeled: bool = True) -> Columns:
        """Return the columns of a file.

        Args:
            labeled: False if a text, a query or a passage alone is enough.

        Raises:
            UserError: there is neither a query with a passage, nor a text with its class.
        """

        def first(known: Sequence[str]) -> str | None:
            return next((name for name in known if name in names), None)

        numbered = sorted(filter(_NUMBERED.fullmatch, names), key=lambda name: int(name.rpartition("_")[2]))
        negatives = (*(name for name in NEGATIVES if name in names), *numbered)
        query, passage, score, text = first(QUERIES), first(PASSAGES), first(SCORES), first(TEXTS)
        if not labeled and (query or passage or text):
            return cls(query, passage, negatives, None, text if passage is query is None else None)
        if passage is not None and query is None:
            query, text = text, None
        if query is None or passage is None:
            query = passage = None
            if text is None or score is None:
                raise wrong_columns(task, names, where)
        return cls(query, passage, negatives if passage is not None else (), score, text if passage is None else None)

    @property
    def form(self) -> str:
        """What the rows are."""
        if self.passage is None:
            return "texts with classes"
        if self.score is not None:
            return "queries and passages with scores"
        return "queries with passages and negatives" if self.negatives else "queries with passages"


class RetrievalReader(RowReader[TextGroup], abc.ABC):
    """Reads files for retrieval.

    Args, beside those of every reader:
        score_range: the least and the most that a score may be.
        labeled: False to read rows for prediction, whose scores and classes are ignored.
    """

    noun = "a row of texts"
    form = "queries with passages"
    same = "with the same texts as an earlier one"
    torn = "whose texts have another score elsewhere"
    torn_hint = "if one score is right, correct the others"

    def __init__(
        self, *args: Any, score_range: tuple[float, float] = (-math.inf, math.inf), labeled: bool = True, **how: Any
    ) -> None:
        super().__init__(*args, **how)
        self.labeled = labeled
        self.score_range = score_range
        self._columns = Columns(None, None, (), None, None)
        self._names: dict[str, int] = {}
        self._file_rows: list[TextGroup] = []
        if self.tokenizer is None:
            raise UserError("the model has no tokenizer", where="model", hint="copy its tokenizer.json into its folder")

    @abc.abstractmethod
    def encode(self, rows: Sequence[RowTexts], limit: int | None) -> list[list[Encoded]]:
        """What the model sees of each row; texts are cut to ``limit`` tokens, special ones included."""

    @functools.cached_property
    def _empty(self) -> list[np.ndarray]:
        """Token ids of empty texts, with which a text is compared of which the tokenizer keeps nothing."""
        return [ids for ids, _ in self.encode([RowTexts("", ("",))], None)[0]]

    def used_columns(self) -> set[str | None]:
        columns = self._columns
        used = {columns.query, columns.passage, *columns.negatives, columns.score, columns.text}
        return {self.settings.columns.get(name, name) for name in used if name is not None}

    def usable(self, rows: Rows, chosen: Sequence[int]) -> Sequence[int]:
        """All that are chosen; what their columns hold is settled here."""
        self._file_rows, names = [], named_columns(rows.columns, self.settings.columns)
        self._columns = Columns.of(names, rows.name, self.columns_task, labeled=self.labeled)
        self.form = self._columns.form
        return chosen

    def examples(self, rows: Rows, indices: Sequence[int]) -> Iterator[TextGroup | None]:
        read = lambda index: self.row_texts(self.row(rows, index), rows.place(index))  # noqa: E731
        for found in self.encoded(rows, indices, read, lambda texts: self.encode(texts, None)):
            yield found and self._group(rows, *found)

    def row_texts(self, row: Row, where: str) -> RowTexts:
        """A row's texts and scores.

        Raises:
            BadRowError: it cannot be used.
        """
        columns = self._columns
        if not self.labeled:
            column = columns.query or columns.text
            given = [name for name in columns.negatives if row.get(name) not in (None, "")]
            texts = [_texts(row.get(name), name, where) for name in (columns.passage, *given) if name]
            return RowTexts(written_text(row.get(column), column, where) if column else "", sum(texts, ()))
        if columns.passage is None:
            assert columns.text is not None and columns.score is not None
            name = class_name(row.get(columns.score), columns.score, where)
            if name is None:
                raise BadRowError(
                    "the row has no class", reason="no class", where=where, hint="write one, or remove it"
                )
            return RowTexts(written_text(row.get(columns.text), columns.text, where), name=name)
        assert columns.query is not None
        query = written_text(row.get(columns.query), columns.query, where)
        passages = _texts(row.get(columns.passage), columns.passage, where)
        several = isinstance(row.get(columns.passage), list)
        for column in columns.negatives:
            value = row.get(column)
            if value in (None, "") and _NUMBERED.fullmatch(column):
                continue  # rows may have different numbers of them, which a table leaves empty
            found = _texts(value, column, where)
            for text in found:
                if text in (query, *passages):
                    what = f"'{column}' is the row's own {'query' if text == query else 'passage'}"
                    hint = "remove it, or the row: a text cannot be right and wrong"
                    raise BadRowError(what, reason="a text that is its own negative", where=where, hint=hint)
            passages += found
        if columns.score is None:
            if several:
                what = f"'{columns.passage}' is a list, and no column says which of its passages are right"
                hint = "add 'labels', a list of as many numbers"
                raise BadRowError(what, reason="passages without scores", where=where, hint=hint)
            return RowTexts(query, passages)
        return RowTexts(query, passages, self._scores(row.get(columns.score), len(passages), where))

    def _scores(self, value: object, passages: int, where: str) -> tuple[float, ...]:
        column, (low, high) = self._columns.score, self.score_range
        values = value if isinstance(value, list) else [value]
        found = []
        for one in values:
            number = _number(one)
            if not math.isfinite(number):
                what = f"'{column}' must be a number but is {str(one)[:40]!r}"
                raise BadRowError(what, reason="a score that is no number", where=where, hint="write a number")
            if not low <= number <= high and not (passages == 2 and len(values) == 1):
                what = f"'{column}' is {number:g}, and scores lie between {low:g} and {high:g}"
                hint = f"correct it, or say what they lie between: {self._range_setting}: [0, 5]"
                raise BadRowError(what, reason="a score outside of its range", where=where, hint=hint)
            found.append(number)
        if len(found) != passages and not (len(found) == 1 and passages == 2):
            what = f"the row has {passages} passages and {len(found)} scores"
            raise BadRowError(what, reason="scores that do not fit", where=where, hint="give each passage a score")
        return tuple(found)

    _range_setting = "embedding.score_range"

    def _group(self, rows: Rows, index: int, row_texts: RowTexts, encoded: list[Encoded]) -> TextGroup | None:
        """At most ``data.max_length`` tokens a text; None where the row is dropped, which is counted."""
        if any(np.array_equal(ids, empty) for ids, _ in encoded for empty in self._empty):
            self.skip(rows, index, empty_text("a text", rows.place(index)))
            return None
        lengths, limit = [len(ids) for ids, _ in encoded], self.settings.max_length
        if not self.is_kept(rows.place(index), lengths):
            return None
        if max(lengths) > limit:
            (encoded,) = self.encode([row_texts], limit)
        label = None if row_texts.name is None else self._names.setdefault(row_texts.name, len(self._names))
        number, scores = rows.number(index), row_texts.scores
        labels = scores if len(scores) == len(encoded) else (0.0,) * len(encoded)
        texts = tuple(
            LabeledExample(number, ids, one, segments) for (ids, segments), one in zip(encoded, labels, strict=True)
        )
        query = hashlib.blake2b(row_texts.query.encode(), digest_size=16).digest()
        group = TextGroup(texts, scores, query, label, self._file_rows)  # type: ignore[arg-type]
        self._file_rows.append(group)
        return group

    def key(self, item: TextGroup) -> bytes:
        return self.content(item) + repr((item.scores, item.label)).encode()

    def content(self, item: TextGroup) -> bytes:
        return b"".join(row.digest for row in item.rows)  # type: ignore[attr-defined]

    def groups(self, items: Sequence[TextGroup]) -> list[Hashable]:
        """Rows with the same query are all trained on, or all held out."""
        return [item.group for item in items]

    def show(self, row: Any, item: TextGroup) -> ShownExample:
        assert self.tokenizer is not None
        place = next(place for place, one in enumerate(item.rows) if one is row)
        if item.label is not None:
            label = list(self._names)[item.label]
        elif place == 0:
            label = "query"
        else:
            told = [f"{score:g}" for score in item.scores] or ["passage"]
            label = [*told, *["negative"] * len(item.rows)][place - 1]
        return ShownExample(len(row), 1, tuple(pieces(row.tokens, [False] * len(row), self.tokenizer)), label)

    def findings(self, items: Sequence[TextGroup], report: Any) -> list[Finding]:
        """Rows whose passage is that of another query: in one step, each is the other's negative."""
        passages = [item.rows[1].tokens.tobytes() for item in items if len(item.rows) > 1]
        again = len(passages) - len(set(passages))
        text = f"{count_of(again)} whose passage is that of an earlier one; in one step neither is the other's negative"
        return [Finding("shared_passages", "note", again, text, "nothing, if both are right")]


# Token ids int32 (length,), and which text each belongs to, int8 (length,); None for one text.
Encoded = tuple[np.ndarray, np.ndarray | None]


def _number(value: object) -> float:
    """A number, or the text of one as a table has it; NaN for all else."""
    try:
        return float(value) if isinstance(value, int | float | str) else math.nan
    except (ValueError, OverflowError):
        return math.nan


def _texts(value: object, column: str, where: str) -> tuple[str, ...]:
    """One text, or a list of them."""
    if not isinstance(value, list):
        return (written_text(value, column, where),)
    if not value:
        what = f"'{column}' is an empty list"
        raise BadRowError(what, reason=WRONG_TYPE, where=where, hint="write at least one text, or remove the row")
    return tuple(written_text(one, column, where) for one in value)
