"""What a run's evaluations and its end will take, estimated from the speed of its steps.

Estimates are cautious, and give way to what is measured: a run with a time budget keeps so much time back.
"""

from __future__ import annotations

from deltaw.training.evaluation.general import ANSWER_TOKENS, NoGeneralAnswers, check_size
from deltaw.training.evaluation.general_prompts import MEASURED
from deltaw.training.monitoring.time_budget import Ending
from deltaw.training.session import Session
from deltaw.training.state import Step

# A token that is only evaluated, of one that is trained on: a forward without a backward.
FORWARD = 0.5
# A token that is written, of one that is trained on: the weights are read again for each.
WRITTEN = 4.0
# Tokens of a general prompt with its template.
PROMPT_TOKENS = 60
# Writing files: seconds, and bytes per second.
SAVING_SECONDS, SAVING_RATE = 1.0, 50e6


class Costs:
    """Estimates of seconds for a session's evaluations and its end.

    Args:
        answers: that each evaluation writes (``train.eval_answers``).

    Attributes:
        samples: seconds that the answers to the sample prompts took.
    """

    def __init__(self, session: Session, answers: int) -> None:
        self.samples = 0.0
        self._tokens, self._seconds = 0, 0.0
        rows = [row for held_out in session.data.sets.values() for row in held_out]
        longest = max((len(row) - getattr(row, "prompt_length", 0) for row in rows), default=0)
        self._evaluation = FORWARD * sum(len(row) for row in rows) + WRITTEN * answers * longest
        self._drift = _drift_tokens(session)
        trained = sum(p.numel() * p.element_size() for _, p in session.method.parameters(session.model))
        self._saving = SAVING_SECONDS + trained / SAVING_RATE
        self._keeps_best = session.config.train.adapter == "best"

    def see(self, step: Step) -> None:
        """Take note of the speed of a step."""
        self._tokens += step.computed_tokens
        self._seconds += step.seconds

    def tell(self, ending: Ending) -> None:
        """Estimate what was not measured yet."""
        a_token = self._seconds / max(1, self._tokens)
        if not ending.measured:
            ending.evaluation = self._evaluation * a_token + self.samples
        ending.after = self._drift * a_token + self._saving
        if self._keeps_best:  # it is put back, saved and evaluated again
            ending.after += ending.evaluation + 2 * self._saving


def _drift_tokens(session: Session) -> float:
    """What measuring drift takes, in tokens that are trained on: two models' forwards over general answers,
    which the base model may have to write first."""
    if session.config.train.drift is False or not session.task.writes_text:
        return 0.0
    try:
        if session.config.train.drift == "auto":
            check_size(session.model)
    except NoGeneralAnswers:
        return 0.0
    read = len(MEASURED) * (PROMPT_TOKENS + ANSWER_TOKENS)
    return 2 * FORWARD * read + WRITTEN * len(MEASURED) * ANSWER_TOKENS
