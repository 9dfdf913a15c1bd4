"""Columns of the rows of each task, used by ``deltaw init``, error messages and the table in ``docs/data.md``.

Only names are defined here. Readers validate the values.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from deltaw.errors import UserError

# Columns of paired preferences, and of unpaired preferences with a label (see deltaw.data.preferences).
PAIR_COLUMNS = ("chosen", "rejected")
JUDGED_COLUMNS = ("prompt", "completion", "label")
# Columns of rows for retrieval (see deltaw.data.retrieval).
QUERIES = ("anchor", "query", "question", "sentence1", "premise", "prompt", "instruction")
PASSAGES = (
    *("positive", "passage", "passages", "answer", "document", "documents", "sentence2", "hypothesis"),
    *("response", "completion", "output"),
)
NEGATIVES = ("negative", "negatives")
SCORES = ("score", "scores", "similarity_score", "label", "labels")
TEXTS = ("text", "sentence")
# Usual names of the columns of labeled rows (see deltaw.data.classes).
LABELED_TEXTS = (*TEXTS, "review", "content", "document", "question", "comment", "tweet", "headline", "body")
TEXT_PAIRS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"))
LABELS = ("label", "labels", "target", "class", "category")
IMAGES = ("image", "img", "images", "picture")
# Columns that may contain the answer to a prompt, in order of preference.
PROMPT_ANSWERS = ("completion", "answer", "ideal", "output", "label")
# Names of retrieval columns in ``data.columns``, if they differ from the first alternative of ``RowKind.inferred``.
_MAPPED = {"query": "anchor", "passage": "positive"}
_PROMPTED = ("rl", "distill")
_CLASSIFIERS = ("sequence-classification", "regression")


@dataclass(frozen=True)
class RowKind:
    """A set of columns that the rows of a task can have.

    Attributes:
        name: Noun phrase for messages and the docs.
        tasks: Tasks that accept these rows. ``deltaw init`` infers the first one.
        required: Alternative names of each required column.
        optional: Names of other columns that a reader uses.
        inferred: Stricter version of ``required`` from which ``deltaw init`` infers the task. Empty if column names are
            not
            sufficient to infer it.
        unless: Column names that prevent the inference.
    """

    name: str
    tasks: tuple[str, ...]
    required: tuple[tuple[str, ...], ...]
    optional: tuple[str, ...] = ()
    inferred: tuple[tuple[str, ...], ...] = ()
    unless: tuple[str, ...] = ()

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
    return RowKind(name, ("causal-lm", *_PROMPTED), required, tuple(optional.split()), required)


_PAIR, _SCORED_PAIR = (("chosen",), ("rejected",)), (("sentence1",), ("sentence2",), ("score",))
_SEARCH, _GRADED = ((*QUERIES, *TEXTS), PASSAGES), (*SCORES, *NEGATIVES, "negative_1")
_QUERY_NAMES = ("anchor", "query", "question")
_PASSAGE_NAMES = ("positive", "passage", "passages", "document", "documents")
_ANSWERED = ("answer", "completion", "response", "output")
_PREFERRED = ("preference", "sequence-classification")
_RANKED, _SCORED_NAME = ("reranking", "embedding"), "queries with passages, and scores or negatives"
# In the order in which `deltaw init` tries them.
ROW_KINDS = (
    RowKind("pairs of answers", _PREFERRED, _PAIR, ("prompt", "system", "tools", "margin"), _PAIR),
    RowKind("single answers, preference.loss: kto", ("preference",), tuple((name,) for name in JUDGED_COLUMNS)),
    RowKind(_SCORED_NAME, _RANKED, (*_SEARCH, _GRADED), (), (_QUERY_NAMES[1:], _PASSAGE_NAMES[1:], SCORES), _ANSWERED),
    RowKind("queries with passages", ("embedding",), _SEARCH, _GRADED, (_QUERY_NAMES, _PASSAGE_NAMES), _ANSWERED),
    RowKind("pairs of sentences with scores", ("embedding",), _SCORED_PAIR, (), _SCORED_PAIR),
    _format("messages", "messages", "tools"),
    _format("sharegpt", "conversations", "system tools"),
    _format("prompt-completion", "prompt completion", "system tools"),
    _format("alpaca", "instruction output", "input system"),
    _format("evals", "input ideal"),
    RowKind("text", ("causal-lm",), (("text",),)),
    RowKind("prompts", _PROMPTED, (("prompt",),), PROMPT_ANSWERS),
    RowKind("texts with labels", _CLASSIFIERS, (LABELED_TEXTS, (*LABELS, "score")), ("text_pair",)),
    *(RowKind("pairs of texts with labels", _CLASSIFIERS, ((a,), (b,), (*LABELS, "score"))) for a, b in TEXT_PAIRS),
    RowKind("texts with classes", ("embedding",), (TEXTS, SCORES)),
    RowKind("images with labels", ("image-classification",), (IMAGES, LABELS)),
)


def kinds_of(task: str) -> tuple[RowKind, ...]:
    """Return the kinds of rows that a task accepts; empty for a task of a plug-in."""
    return tuple(kind for kind in ROW_KINDS if task in kind.tasks)


def mapped_columns(columns: Collection[str], mapped: Mapping[str, str]) -> list[str]:
    """Return the columns of a file as named after ``data.columns`` is applied."""
    return [*mapped, *(column for column in columns if column not in mapped.values())]


def require_columns(task: str, columns: Collection[str], file: str, mapped: Mapping[str, str]) -> None:
    """Reject a file if its columns fit no row kind of the task.

    Raises:
        UserError: if the columns do not fit. The message lists the columns of the file and of the task.
    """
    kinds, available = kinds_of(task), mapped_columns(columns, mapped)
    if not kinds or any(kind.fits(available) for kind in kinds):
        return
    raise wrong_columns(task, columns, file)


def listed(names: Sequence[str]) -> str:
    """Return the first 20 names in quotes, for a message."""
    quoted_names = ", ".join(f"'{name}'" for name in names[:20])
    return quoted_names + (", …" if len(names) > 20 else "") if quoted_names else "none"


def all_column_names() -> list[str]:
    """Return the names of all columns that any task reads."""
    names = [name for kind in ROW_KINDS for group in (*kind.required, kind.optional) for name in group]
    return list(dict.fromkeys(names))


def _alternatives(names: Sequence[str]) -> str:
    return " or ".join(f"'{name}'" for name in names[:3])


def wrong_columns(task: str, columns: Collection[str], file: str) -> UserError:
    """Return the error for columns that fit no kind of rows of the task."""
    kinds = kinds_of(task)
    other_kinds = [kind for kind in ROW_KINDS if task not in kind.tasks and kind.infer(columns) is not None]
    missing = [absent[0] for kind in kinds if len(absent := kind.missing(columns)) == 1 < len(kind.required)]
    hint = ""
    if missing:
        hint = f"if one of them is {_alternatives(missing[0])}, set data.columns: {{{missing[0][0]}: NAME}}. "
    hint += f"For {other_kinds[0].name}, set task: {other_kinds[0].tasks[0]}. " if other_kinds else ""
    if task == "reranking" and other_kinds and other_kinds[0].tasks[0] == "embedding":
        hint += "Use deltaw data mine to find negatives. "
    hint += f"{task} accepts {'; '.join(map(str, kinds))}. Map other names with data.columns: "
    hint += f"{{{kinds[0].required[0][0]}: …}}" if kinds else "{…}"
    location = f"{file}, whose columns are {listed(list(columns))}"
    return UserError(f"the columns do not fit the task {task}", location=location, hint=hint)
