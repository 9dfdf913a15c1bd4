"""Rows for retrieval: a query with passages and optional scores, or a text with its class.

Columns have the names of sentence-transformers, or other common ones (:data:`QUERIES`, :data:`PASSAGES`). Embedding
models encode each text separately, rerankers the query with each passage.
"""

from __future__ import annotations

import abc
import functools
import hashlib
import math
import re
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from deltaw.data.bad_rows import BadRowError
from deltaw.data.data_findings import DataFinding, class_findings
from deltaw.data.example import MAX_TEXT_LENGTH, LabeledExample, RowGroup, token_spans
from deltaw.data.messages import WRONG_TYPE, cell_text, empty_text
from deltaw.data.report import PreparationReport, count_of
from deltaw.data.row_reader import ExamplePreview, RowReader
from deltaw.data.rows import NumberedRows, Row
from deltaw.data.starter import TaskStarter
from deltaw.errors import UserError
from deltaw.progress import LogFunction, ignore_line
from deltaw.settings.columns import mapped_columns, wrong_columns
from deltaw.settings.data import DataSettings
from deltaw.settings.row_kinds import NEGATIVES, PASSAGES, QUERIES, SCORES, TEXTS
from deltaw.tasks.classification.rows import class_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NUMBERED = re.compile(r"negative_\d+")


@dataclass(frozen=True)
class RowTexts:
    """Texts of a row.

    Attributes:
        query: Query, or the text of a row with a class.
        passages: Passages. The first one is right unless ``scores`` are given.
        scores: One score per passage; or one score for a positive and a negative, the margin by which the first is
            better;
            or empty if only the first passage is right.
        name: Class of the row.
    """

    query: str
    passages: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    name: str | None = None


@dataclass(frozen=True, eq=False)
class TextGroup(RowGroup):
    """Encoded texts of a row.

    Attributes:
        rows: For embedding models, the query and the passages. For rerankers, the query with each passage.
        scores: See :class:`RowTexts`.
        group: Hash of the query.
        label: Class index of the row, or None.
        file_rows: All usable rows of the file, training and evaluation. Empty if unknown.
    """

    scores: tuple[float, ...] = ()
    group: bytes = b""
    label: int | None = None
    file_rows: Sequence[TextGroup] = field(default=(), repr=False)

    @property
    def label_count(self) -> int:
        """Return 1, the number of labels of a row."""
        return 1


@dataclass(frozen=True)
class Columns:
    """Columns of a file by role, or None if the file has no such column."""

    query: str | None
    passage: str | None
    negatives: tuple[str, ...]
    score: str | None
    text: str | None

    @classmethod
    def of(cls, names: Sequence[str], location: str, task: str = "embedding", *, labeled: bool = True) -> Columns:
        """Return the columns of a file.

        Args:
            labeled: False if a text, a query or a passage is sufficient.

        Raises:
            UserError: if the file has neither a query with a passage, nor a text with its class.
        """

        def first(common_names: Sequence[str]) -> str | None:
            return next((name for name in common_names if name in names), None)

        numbered = sorted(filter(_NUMBERED.fullmatch, names), key=lambda name: int(name.rpartition("_")[2]))
        negatives = (*(name for name in NEGATIVES if name in names), *numbered)
        query = first(QUERIES)
        passage = first(PASSAGES)
        score = first(SCORES)
        text = first(TEXTS)
        if not labeled and (query or passage or text):
            return cls(query, passage, negatives, None, text if passage is query is None else None)
        if passage is not None and query is None:
            query = text
            text = None
        if query is None or passage is None:
            query = passage = None
            if text is None or score is None:
                raise wrong_columns(task, names, location)
        return cls(query, passage, negatives if passage is not None else (), score, text if passage is None else None)

    @property
    def form(self) -> str:
        """Return a description of the rows."""
        if self.passage is None:
            return "texts with classes"
        if self.score is not None:
            return "queries and passages with scores"
        return "queries with passages and negatives" if self.negatives else "queries with passages"


class RetrievalReader(RowReader[TextGroup], abc.ABC):
    """Reads files for retrieval.

    Args:
        score_range: Minimum and maximum score.
        labeled: False to read rows for prediction and ignore scores and classes.
        prompts: Prefixes of queries and passages, for embedding models.
    """

    noun = "a row of texts"
    form = "queries with passages"
    duplicate_text = "with the same texts as an earlier one"
    contradiction_text = "whose texts have another score elsewhere"
    contradiction_hint = "if one score is right, correct the others"

    def __init__(
        self,
        settings: DataSettings,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        log: LogFunction = ignore_line,
        score_range: tuple[float, float] = (-math.inf, math.inf),
        labeled: bool = True,
        prompts: tuple[str, str] = ("", ""),
    ) -> None:
        super().__init__(settings, tokenizer, log=log)
        self.labeled = labeled
        self.score_range = score_range
        self._prompts = prompts
        self._columns = Columns(None, None, (), None, None)
        self._names: dict[str, int] = {}
        self._file_rows: list[TextGroup] = []

    @abc.abstractmethod
    def encode(self, rows: Sequence[RowTexts], limit: int | None) -> list[list[Encoded]]:
        """Tokenize the texts of each row, truncated to ``limit`` tokens including special tokens."""

    @functools.cached_property
    def _empty(self) -> list[np.ndarray]:
        """Return the token ids of empty texts, which identify texts without usable characters."""
        return [ids for ids, _ in self.encode([RowTexts("", ("",))], None)[0]]

    def used_columns(self) -> set[str | None]:
        columns = self._columns
        used = {columns.query, columns.passage, *columns.negatives, columns.score, columns.text}
        return {self.settings.columns.get(name, name) for name in used if name is not None}

    def select_usable(self, rows: NumberedRows, chosen: Sequence[int]) -> Sequence[int]:
        """Return all chosen rows, and determine the columns of the file."""
        self._file_rows, names = [], mapped_columns(rows.columns, self.settings.columns)
        self._columns = Columns.of(names, rows.name, self.columns_task, labeled=self.labeled)
        self.form = self._columns.form
        return chosen

    def examples(self, rows: NumberedRows, indices: Sequence[int]) -> Iterator[TextGroup | None]:
        if self.tokenizer is None:
            raise UserError("the model has no tokenizer", location="model", hint="copy tokenizer.json into its folder")
        read = functools.partial(self.read_row, rows)
        for row in self.encode_rows(rows, indices, read, lambda texts: self.encode(texts, None)):
            yield row and self._group(rows, *row)

    def read_row(self, rows: NumberedRows, index: int) -> RowTexts:
        return self.row_texts(self.row(rows, index), rows.row_location(index))

    def row_texts(self, row: Row, location: str) -> RowTexts:
        """Return the texts and scores of a row.

        Raises:
            BadRowError: if the row is unusable.
        """
        columns = self._columns
        if not self.labeled:
            column = columns.query or columns.text
            negatives = [name for name in columns.negatives if row.get(name) not in (None, "")]
            texts = [_texts(row.get(name), name, location) for name in (columns.passage, *negatives) if name]
            return RowTexts(cell_text(row.get(column), column, location) if column else "", sum(texts, ()))
        if columns.passage is None:
            assert columns.text is not None and columns.score is not None
            name = class_name(row.get(columns.score), columns.score, location)
            if name is None:
                raise BadRowError("the row has no class", reason="no class", location=location, hint="write its class")
            name = self.settings.class_of_label.get(name, name)
            return RowTexts(cell_text(row.get(columns.text), columns.text, location), name=name)
        assert columns.query is not None
        query = cell_text(row.get(columns.query), columns.query, location)
        passages = _texts(row.get(columns.passage), columns.passage, location)
        is_list = isinstance(row.get(columns.passage), list)
        for column in columns.negatives:
            value = row.get(column)
            if value in (None, "") and _NUMBERED.fullmatch(column):
                continue  # in a table, rows with fewer negatives have empty cells
            negative_texts = _texts(value, column, location)
            for text in negative_texts:
                if text in (query, *passages):
                    message = f"'{column}' is the row's own {'query' if text == query else 'passage'}"
                    hint = "remove it, or the row: a text cannot be right and wrong"
                    raise BadRowError(message, reason="a text that is its own negative", location=location, hint=hint)
            passages += negative_texts
        if columns.score is None:
            if is_list:
                message = f"'{columns.passage}' is a list, and no column has scores or labels of its passages"
                hint = "add 'labels', a list with one number per passage"
                raise BadRowError(message, reason="passages without scores", location=location, hint=hint)
            return RowTexts(query, passages)
        return RowTexts(query, passages, self._scores(row.get(columns.score), len(passages), location))

    def _scores(self, value: object, passages: int, location: str) -> tuple[float, ...]:
        column = self._columns.score
        low, high = self.score_range
        values = value if isinstance(value, list) else [value]
        scores = []
        for item in values:
            number = _number(item)
            if not math.isfinite(number):
                message = f"'{column}' must be a number but is {str(item)[:40]!r}"
                raise BadRowError(message, reason="a score that is no number", location=location, hint="write a number")
            if not low <= number <= high and not (passages == 2 and len(values) == 1):
                message = f"'{column}' is {number:g}, and scores must be between {low:g} and {high:g}"
                hint = f"correct it, or set the range: {self._range_setting}: [0, 5]"
                raise BadRowError(message, reason="a score outside of its range", location=location, hint=hint)
            scores.append(number)
        if len(scores) != passages and not (len(scores) == 1 and passages == 2):
            message = f"the row has {passages} passages and {len(scores)} scores"
            raise BadRowError(message, reason="scores that do not fit", location=location, hint="score each passage")
        return tuple(scores)

    _range_setting = "embedding.score_range"

    def _group(self, rows: NumberedRows, index: int, row_texts: RowTexts, encoded: list[Encoded]) -> TextGroup | None:
        """Build the group of a row with at most ``data.max_length`` tokens per text. Return None if the row is skipped
        or dropped (and counted).
        """
        if any(np.array_equal(ids, empty) for ids, _ in encoded for empty in self._empty):
            self.skip(rows, index, empty_text("a text", rows.row_location(index)))
            return None
        lengths = [len(ids) for ids, _ in encoded]
        limit = self.settings.max_length
        if not self.check_length(rows.row_location(index), lengths):
            return None
        if max(lengths) > limit:
            (encoded,) = self.encode([row_texts], limit)
        label = None if row_texts.name is None else self._names.setdefault(row_texts.name, len(self._names))
        number = rows.number(index)
        scores = row_texts.scores
        labels = scores if len(scores) == len(encoded) else (0.0,) * len(encoded)
        shown = (row_texts.query, *row_texts.passages)[-len(encoded) :]  # a reranker reads a query with each passage
        texts = tuple(
            LabeledExample(number, ids, value, segments, text[:MAX_TEXT_LENGTH])
            for (ids, segments), value, text in zip(encoded, labels, shown, strict=True)
        )
        query = hashlib.blake2b(row_texts.query.encode(), digest_size=16).digest()
        group = TextGroup(texts, scores, query, label, self._file_rows)
        self._file_rows.append(group)
        return group

    def key(self, item: TextGroup) -> bytes:
        return self.content(item) + repr((item.scores, item.label)).encode()

    def content(self, item: TextGroup) -> bytes:
        return b"".join(row.digest for row in item.rows)

    def groups(self, items: Sequence[TextGroup]) -> list[Hashable]:
        """Return the query of each row, so that rows with one query are on the same side of the split."""
        return [item.group for item in items]

    def show(self, row: Any, item: TextGroup) -> ExamplePreview:
        assert self.tokenizer is not None
        position = next(position for position, candidate in enumerate(item.rows) if candidate is row)
        if item.label is not None:
            label = list(self._names)[item.label]
        elif position == 0:
            label = "query"
        else:
            scores = [f"{score:g}" for score in item.scores] or ["passage"]
            label = [*scores, *["negative"] * len(item.rows)][position - 1]
        return ExamplePreview(len(row), 1, tuple(token_spans(row.tokens, [False] * len(row), self.tokenizer)), label)

    def add_counts(self, report: PreparationReport, items: Sequence[TextGroup]) -> PreparationReport:
        names = list(self._names)
        counts = Counter(names[item.label] for item in items if item.label is not None)
        return replace(report, class_counts={name: counts[name] for name in names})

    def findings(self, items: Sequence[TextGroup], report: PreparationReport) -> list[DataFinding]:
        """Report classes with similar names, and passages that rows share.

        In-batch negatives exclude passages that a row shares with another query.
        """
        passages = [item.rows[1].tokens.tobytes() for item in items if len(item.rows) > 1]
        num_repeated = len(passages) - len(set(passages))
        text = f"{count_of(num_repeated)} with an earlier row's passage; in one step neither is a negative of the other"
        shared = DataFinding("shared_passages", "note", num_repeated, text, "no action is needed if both are right")
        return [*class_findings(report.class_counts), shared]


Encoded = tuple[np.ndarray, np.ndarray | None]
"""(length,) int32 token ids, and (length,) int8 index of the text of each token (None if the row is a single text)."""


def _number(value: object) -> float:
    """Convert a number or its text to float. Return NaN for other values."""
    try:
        return float(value) if isinstance(value, int | float | str) else math.nan
    except (ValueError, OverflowError):
        return math.nan


def _texts(value: object, column: str, location: str) -> tuple[str, ...]:
    """Return the text or the list of texts in a cell."""
    if not isinstance(value, list):
        return (cell_text(value, column, location),)
    if not value:
        message = f"'{column}' is an empty list"
        raise BadRowError(message, reason=WRONG_TYPE, location=location, hint="write a text, or remove the row")
    return tuple(cell_text(text, column, location) for text in value)


class EmbeddingReader(RetrievalReader):
    """Reads files for an embedding model. Symmetric rows (scored pairs, texts with classes) get no prefix."""

    columns_task = "embedding"

    @property
    def predicts(self) -> tuple[str, ...]:  # type: ignore[override]
        has_both = self._columns.query is not None and self._columns.passage is not None
        return ("query_embedding", "passage_embedding") if has_both else ("embedding",)

    def encode(self, rows: Sequence[RowTexts], limit: int | None) -> list[list[Encoded]]:
        texts: list[str] = []
        for row in rows:
            both_ways = self._columns.text is not None or (len(row.passages) == 1 and row.scores)
            query, passage = ("", "") if both_ways else self._prompts
            texts += [*([query + row.query] if row.query else []), *(passage + text for text in row.passages)]
        assert self.tokenizer is not None
        cut: dict[str, Any] = {} if limit is None else {"truncation": True, "max_length": limit}
        ids = self.tokenizer(texts, return_attention_mask=False, verbose=False, **cut)["input_ids"]
        tokens = iter(ids)
        counts = (bool(row.query) + len(row.passages) for row in rows)
        return [[(np.asarray(next(tokens), np.int32), None) for _ in range(count)] for count in counts]


class EmbeddingStarter(TaskStarter):
    """Starter of tasks with rows for retrieval.

    Attributes:
        reader_class: Reader of the rows.
    """

    min_batch_size = 16  # the passages of a step's other rows are the negatives
    reader_class: ClassVar[type[RetrievalReader]] = EmbeddingReader

    def form(self, rows: NumberedRows, columns: Mapping[str, str]) -> str:
        return Columns.of(mapped_columns(rows.columns, columns), rows.name, self.entry.name).form

    def reader(
        self, rows: NumberedRows, settings: DataSettings, tokenizer: PreTrainedTokenizerBase | None
    ) -> RetrievalReader:
        return self.reader_class(settings, tokenizer)
