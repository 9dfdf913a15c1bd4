"""Options and result of the evaluation of a loaded model."""

from __future__ import annotations

from dataclasses import dataclass, field

from deltaw.training.evaluation.answers import EvaluatedAnswer
from deltaw.training.evaluation.base import Evaluation


@dataclass(frozen=True)
class ScoreOptions:
    """Options of an evaluation of a loaded model.

    Attributes:
        num_answers: Number of examples, from the first, for which the model generates an answer. Tasks that reward
            completions return all of them if it is not 0.
        max_new_tokens: Maximum number of tokens of an answer, or None for the limit of training.
        samples: Number of sampled completions per prompt, in addition to the greedy one.
        temperature: Sampling temperature, or None for the temperature of training.
        threshold: Minimum weighted reward of a passing completion. None for the highest reward of functions with values
            up to 1.
    """

    num_answers: int = 0
    max_new_tokens: int | None = None
    samples: int = 0
    temperature: float | None = None
    threshold: float | None = None


@dataclass(frozen=True)
class EvaluationScore:
    """Evaluation of a model, its answers to some of the examples, and a warning if they contradict the scores."""

    evaluation: Evaluation
    answers: list[EvaluatedAnswer] = field(default_factory=list)
    warning: str | None = None

    @property
    def metrics(self) -> dict[str, float]:
        return self.evaluation.metrics
