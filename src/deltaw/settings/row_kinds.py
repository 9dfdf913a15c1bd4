"""Columns that rows can have, used by ``deltaw init``, error messages and the table in ``docs/data.md``.

Only names are defined here. Readers validate the values.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

# Columns of paired preferences, and of unpaired preferences with a label (see deltaw.tasks.preference.rows).
PAIR_COLUMNS = ("chosen", "rejected")
JUDGED_COLUMNS = ("prompt", "completion", "label")
# Columns of rows for retrieval (see deltaw.tasks.embedding.rows).
QUERIES = ("anchor", "query", "question", "sentence1", "premise", "prompt", "instruction")
PASSAGES = (
    *("positive", "passage", "passages", "answer", "document", "documents", "sentence2", "hypothesis"),
    *("response", "completion", "output"),
)
NEGATIVES = ("negative", "negatives")
SCORES = ("score", "scores", "similarity_score", "label", "labels")
TEXTS = ("text", "sentence")
# Usual names of the columns of labeled rows (see deltaw.tasks.classification.rows).
LABELED_TEXTS = (*TEXTS, "review", "content", "document", "question", "comment", "tweet", "headline", "body")
TEXT_PAIRS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"))
LABELS = ("label", "labels", "target", "class", "category")
IMAGES = ("image", "img", "images", "picture", "photo")
IMAGE_NAME = re.compile("|".join(IMAGES), re.IGNORECASE)  # in the name of a column that may contain images
# Columns that may contain the answer to a prompt, in order of preference.
PROMPT_ANSWERS = ("completion", "answer", "ideal", "output", "label")
# Names of retrieval columns in ``data.columns``, if they differ from the first alternative of ``RowKind.inferred``.
_MAPPED = {"query": "anchor", "passage": "positive"}


@dataclass(frozen=True)
class RowKind:
    """A set of columns that the rows of a task can have.

    Attributes:
        name: Noun phrase for messages and the docs.
        required: Alternative names of each required column.
        optional: Names of other columns that a reader uses.
        inferred: Stricter version of ``required`` from which ``deltaw init`` infers the task. Empty if column names are
            not
            sufficient to infer it.
        unless: Column names that prevent the inference.
    """

    name: str
    required: tuple[tuple[str, ...], ...]
    optional: tuple[str, ...] = ()
    inferred: tuple[tuple[str, ...], ...] = ()
    unless: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of all columns."""
        return tuple(name for group in (*self.required, self.optional) for name in group)

    def missing(self, columns: Collection[str]) -> list[tuple[str, ...]]:
        """Return the alternative names of each required column that is missing from ``columns``."""
        return [names for names in self.required if not any(name in columns for name in names)]

    def fits(self, columns: Collection[str]) -> bool:
        """Return True if ``columns`` contain one name of each required column."""
        return not self.missing(columns)

    def infer(self, columns: Collection[str]) -> dict[str, str] | None:
        """Infer the task from column names, ignoring case.

        Returns:
            The mapping for ``data.columns`` (empty if no column must be renamed), or None if the names do not fit.
        """
        by_name = {column.strip().lower(): column for column in reversed(list(columns))}
        if not self.inferred or by_name.keys() & set(self.unless):
            return None
        mapped: dict[str, str] = {}
        for names in self.inferred:
            column = next((by_name[name] for name in names if name in by_name), None)
            if column is None:
                return None
            if column not in names:
                mapped[_MAPPED.get(names[0], names[0])] = column
        return mapped

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(names[0] for names in self.required)})"


def _format(name: str, columns: str, optional: str = "") -> RowKind:
    """Return the row kind of a format in :mod:`deltaw.data.formats` that has a prompt and an answer."""
    required = tuple((column,) for column in columns.split())
    return RowKind(name, required, tuple(optional.split()), required)


_PAIR = (("chosen",), ("rejected",))
_SCORED_PAIR = (("sentence1",), ("sentence2",), ("score",))
_SEARCH = ((*QUERIES, *TEXTS), PASSAGES)
_GRADED = (*SCORES, *NEGATIVES, "negative_1")
_QUERY_NAMES = ("anchor", "query", "question")
_PASSAGE_NAMES = ("positive", "passage", "passages", "document", "documents")
_ANSWERED = ("answer", "completion", "response", "output")
_RANKED = "queries with passages, and scores or negatives"

ANSWER_PAIRS = RowKind("pairs of answers", _PAIR, ("prompt", "system", "tools", "margin"), _PAIR)
SINGLE_ANSWERS = RowKind("single answers, preference.loss: kto", tuple((name,) for name in JUDGED_COLUMNS))
GRADED_PASSAGES = RowKind(_RANKED, (*_SEARCH, _GRADED), (), (_QUERY_NAMES[1:], _PASSAGE_NAMES[1:], SCORES), _ANSWERED)
PASSAGE_SEARCH = RowKind("queries with passages", _SEARCH, _GRADED, (_QUERY_NAMES, _PASSAGE_NAMES), _ANSWERED)
SCORED_PAIRS = RowKind("pairs of sentences with scores", _SCORED_PAIR, (), _SCORED_PAIR)
# Formats with a prompt and an answer, in the order of deltaw.data.formats.
PROMPTED_FORMATS = (
    _format("messages", "messages", "tools"),
    _format("sharegpt", "conversations", "system tools"),
    _format("prompt-completion", "prompt completion", "system tools"),
    _format("alpaca", "instruction output", "input system"),
    _format("evals", "input ideal"),
)
PLAIN_TEXT = RowKind("text", (("text",),))
FormName = Literal["auto", "messages", "prompt-completion", "text", "alpaca", "sharegpt", "evals"]
PROMPTS = RowKind("prompts", (("prompt",),), PROMPT_ANSWERS)
LABELED_ROWS = (
    RowKind("texts with labels", (LABELED_TEXTS, (*LABELS, "score")), ("text_pair",)),
    *(RowKind("pairs of texts with labels", ((a,), (b,), (*LABELS, "score"))) for a, b in TEXT_PAIRS),
)
TEXT_CLASSES = RowKind("texts with classes", (TEXTS, SCORES))
LABELED_IMAGES = RowKind("images with labels", (IMAGES, LABELS))
# In the order in which `deltaw init` tries them.
BUILT_IN_KINDS = (
    *(ANSWER_PAIRS, SINGLE_ANSWERS, GRADED_PASSAGES, PASSAGE_SEARCH, SCORED_PAIRS, *PROMPTED_FORMATS, PLAIN_TEXT),
    *(PROMPTS, *LABELED_ROWS, TEXT_CLASSES, LABELED_IMAGES),
)
