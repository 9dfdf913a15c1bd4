"""Evaluation of a prompt that was distilled into an adapter: saved tokens and scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deltaw.data.example import Example
from deltaw.progress import track_progress
from deltaw.training.distillation.feed import DistillFeed
from deltaw.training.evaluation.base import Evaluation
from deltaw.training.session import Session
from deltaw.training.tasks.causal import evaluate_causal


@dataclass(frozen=True)
class PromptComparison:
    """Scores of the base model with and without the prompt, and of the student without it.

    Attributes:
        saved: Mean number of saved prompt tokens per request.
        rows: Number of evaluated rows.
        scores: Evaluation by model, in order. Empty if the run has no evaluation rows.
    """

    saved: float
    rows: int
    scores: Mapping[str, Evaluation]

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        scores = {model: evaluation.score() for model, evaluation in self.scores.items()}
        return {"prompt_tokens_saved": self.saved, "rows": self.rows, **scores}

    def __str__(self) -> str:
        text = f"a request saves {self.saved:,.0f} prompt tokens"
        if not self.scores:
            return text
        main = next(iter(self.scores.values())).main
        scores = [f"{model.replace('_', ' ')} {_format_score(score)}" for model, score in self.scores.items()]
        return f"{text}; {main} on {self.rows:,} held-out rows: {', '.join(scores)}"


def compare_with_prompt(session: Session, student: Evaluation) -> PromptComparison | None:
    """Compare the models after a run that distilled a prompt. Returns None for other runs.

    Args:
        session: Session of the run.
        student: Evaluation of the saved adapter on the first set of held-out rows.
    """
    feed, method, model = session.feed, session.method, session.model
    if not isinstance(feed, DistillFeed) or not feed.settings.prompt:
        return None
    measured_rows = session.data.held_out or session.data.train
    saved = float(np.mean([len(row.teacher_prompt) - row.prompt_length for row in measured_rows]))
    if not session.data.held_out or not student.metrics or not method.can_restore_base(model):
        return PromptComparison(saved, 0, {})
    num_virtual_tokens = method.virtual_tokens
    progress = track_progress("comparing with the prompt")
    with session.running(), method.evaluating(model), method.base_model_active(model), progress:
        rows = [row for row in feed.with_answers(session.data.held_out) if row.label_count]
        prompted: Sequence[Example] = [row.as_taught() for row in rows]
        plain: Sequence[Example] = [row.without_prefix(num_virtual_tokens) for row in rows]
        base_with_prompt = evaluate_causal(feed.objective, prompted, feed.batcher)
        base = evaluate_causal(feed.objective, plain, feed.batcher)
    scores = {"base_with_prompt": base_with_prompt, "base": base, "student": student}
    return PromptComparison(saved, len(rows), scores)


def _format_score(evaluation: Evaluation) -> str:
    value = evaluation.metrics[evaluation.main]
    if evaluation.interval is None:
        return f"{value:.3f}"
    low, high = evaluation.interval
    return f"{value:.3f} ({low:.3f} to {high:.3f})"
