"""What the model itself writes to held-out prompts while it trains: scored at evaluations, or shown.

Decoding is greedy, draws no random numbers and leaves the model as it was found, so a training goes on as if
nothing had happened. Knows no folders and shows nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from deltaw.data.example import Example, RowGroup
from deltaw.training.evaluation.base import Evaluation
from deltaw.training.evaluation.causal import Answer, answers, exact_match
from deltaw.training.session import Session

# A sample's answer has at most so many tokens; where the rows' own answers are short, fewer.
SAMPLE_TOKENS = 48
FEWEST_TOKENS = 16
# Of the seed's random numbers, those that choose rows: for scores, and for samples.
_SCORED, _SHOWN = 11, 12
_BATCH_TOKENS = 1024
# The metric that answers give: the share that the model wrote exactly as the data says.
WRITTEN = "written_exact_match"


@dataclass(frozen=True)
class Sample:
    """One held-out prompt with its answer.

    Attributes:
        row: its number in the file. prompt: its last turn. expected: the answer that the data has.
        answer: what the model wrote.
    """

    row: int
    prompt: str
    expected: str
    answer: str

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def choose_rows(rows: Sequence[Any], count: int, *, seed: int, stream: int) -> list[Example]:
    """``count`` of the rows that have a prompt and an answer, drawn by the seed, in the order of the rows; of
    a pair the chosen answer."""
    alone = (row.rows[0] if isinstance(row, RowGroup) else row for row in rows)
    asked = [
        row for row in alone if isinstance(row, Example) and row.answer is not None and row.prompt_length
    ]
    if count >= len(asked):
        return asked
    places = np.random.default_rng([seed % 2**64, stream]).choice(len(asked), size=count, replace=False)
    return [asked[place] for place in sorted(places.tolist())]


class WrittenAnswers:
    """Scores what the model writes to some held-out rows (``train.eval_answers``).

    Args:
        session: whose model answers.
        sets: the sets of held-out rows by name.
    """

    def __init__(self, session: Session, sets: Mapping[str, Sequence[Any]]) -> None:
        train = session.config.train
        self._session = session
        self._rows = {
            name: choose_rows(rows, train.eval_answers, seed=train.seed, stream=_SCORED)
            for name, rows in sets.items()
            if train.eval_answers
        }

    @property
    def count(self) -> int:
        """Answers that one evaluation writes."""
        return sum(len(rows) for rows in self._rows.values())

    def scored(self, name: str, evaluation: Evaluation) -> Evaluation:
        """The evaluation of a set, with the share of answers that were written exactly."""
        rows = self._rows.get(name, [])
        if not rows:
            return evaluation
        share = exact_match(write(self._session, rows, max_new_tokens=None))
        return replace(evaluation, metrics={**evaluation.metrics, WRITTEN: share})


class Samples:
    """Answers to a few held-out prompts, of the base model and of the adapter as it trains
    (``train.samples``).

    Args:
        session: whose model answers; nothing where it writes no text.
        rows: held-out rows as the model sees them. count: how many of them.
    """

    def __init__(self, session: Session, rows: Sequence[Any], count: int) -> None:
        seed = session.config.train.seed
        self._session = session
        wanted = session.task.tokenizer is not None and session.task.writes_text and count > 0
        self._rows = choose_rows(rows, count, seed=seed, stream=_SHOWN) if wanted else []

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def max_new_tokens(self) -> int:
        """As many as the longest expected answer has twice over, within bounds."""
        longest = max((len(row) - row.prompt_length for row in self._rows), default=0)
        return min(SAMPLE_TOKENS, max(FEWEST_TOKENS, 2 * longest))

    def of_base(self) -> list[Sample]:
        """The base model's answers. Where the method keeps no base model, call it before the first step."""
        method, model = self._session.method, self._session.model
        kept = method.keeps_base(model)
        rows = [_without_virtual_tokens(row, method.virtual_tokens) for row in self._rows] if kept else None
        with method.without(model) if kept else contextlib.nullcontext():
            return self._written(rows or self._rows)

    def of_adapter(self) -> list[Sample]:
        """The model's answers as it is now."""
        return self._written(self._rows)

    def _written(self, rows: Sequence[Example]) -> list[Sample]:
        given = write(self._session, rows, max_new_tokens=self.max_new_tokens)
        return [Sample(a.row, a.question, a.expected, a.written) for a in given]


def write(session: Session, rows: Sequence[Example], *, max_new_tokens: int | None) -> list[Answer]:
    """The model's greedy answers to rows as it sees them; also within ``session.running()``.

    A microbatch of answers holds no more tokens than one of a training step, and keeps keys and values alone,
    so it takes less memory than a step.
    """
    tokenizer = session.task.tokenizer
    if not rows or not isinstance(tokenizer, PreTrainedTokenizerBase):
        return []
    with session.method.evaluating(session.model):
        return answers(
            session.model,
            tokenizer,
            rows,
            max_new_tokens=max_new_tokens,
            batch_tokens=getattr(session.batcher, "tokens_per_pass", _BATCH_TOKENS),
        )


def _without_virtual_tokens(row: Example, count: int) -> Example:
    return replace(
        row,
        tokens=row.tokens[count:],
        is_label=row.is_label[count:],
        prompt_length=row.prompt_length - count,
        active_from=None,
    )
