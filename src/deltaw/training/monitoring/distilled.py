"""What a prompt is worth that was trained into an adapter: the tokens that a request saves, and at which score.

Knows a session and its rows; shows nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deltaw.data.example import Example
from deltaw.training.distillation.feed import LessonFeed
from deltaw.training.evaluation.base import Evaluation
from deltaw.training.session import Session
from deltaw.training.tasks.causal import evaluate_causal
from deltaw.working import working


@dataclass(frozen=True)
class PromptComparison:
    """The base model with and without the prompt, and the student without it.

    Attributes:
        saved: prompt tokens of a request, in the mean. rows: that were evaluated.
        scores: by who answered, in order; empty where nothing was held out.
    """

    saved: float
    rows: int
    scores: Mapping[str, Evaluation]

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        scores = {who: found.score() for who, found in self.scores.items()}
        return {"prompt_tokens_saved": self.saved, "rows": self.rows, **scores}

    def __str__(self) -> str:
        text = f"a request saves {self.saved:,.0f} prompt tokens"
        if not self.scores:
            return text
        main = next(iter(self.scores.values())).main
        each = (f"{who.replace('_', ' ')} {_shown(found)}" for who, found in self.scores.items())
        return f"{text}; {main} on {self.rows:,} held-out rows: {', '.join(each)}"


def compare_with_prompt(session: Session, student: Evaluation) -> PromptComparison | None:
    """The comparison of a run that trained a prompt into its adapter; None for another run.

    Args:
        student: the evaluation of the adapter that the run keeps, on the first set of held-out rows.
    """
    feed, method, model = session.feed, session.method, session.model
    if not isinstance(feed, LessonFeed) or not feed.settings.prompt:
        return None
    known = session.data.held_out or session.data.train
    saved = float(np.mean([len(row.teacher_prompt) - row.prompt_length for row in known]))
    if not session.data.held_out or not student.metrics or not method.keeps_base(model):
        return PromptComparison(saved, 0, {})
    virtual = method.virtual_tokens
    with session.running(), method.evaluating(model), method.without(model), working("comparing with the prompt"):
        rows = [row for row in feed.with_answers(session.data.held_out) if row.label_count]
        prompted: Sequence[Example] = [row.as_taught() for row in rows]
        plain: Sequence[Example] = [row.without_first(virtual) for row in rows]
        scores = {
            "base_with_prompt": evaluate_causal(feed.objective, prompted, feed.batcher),
            "base": evaluate_causal(feed.objective, plain, feed.batcher),
        }
    return PromptComparison(saved, len(rows), {**scores, "student": student})


def _shown(found: Evaluation) -> str:
    value = found.metrics[found.main]
    if found.interval is None:
        return f"{value:.3f}"
    low, high = found.interval
    return f"{value:.3f} ({low:.3f} to {high:.3f})"
