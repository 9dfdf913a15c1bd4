"""Drift of a run that trains: what is noted before the first step, and measured after the last.

Most methods keep the base model, and everything is measured at the end. Methods that train the base model's
own parameters keep no copy of them: of those the base model's answers are evaluated before training.
"""

from __future__ import annotations

from deltaw.training.evaluation.drift import BaseLosses, Drift, base_losses, measure_drift
from deltaw.training.evaluation.general import NoGeneralAnswers, check_size
from deltaw.training.evaluation.general_prompts import MEASURED
from deltaw.training.seen import as_seen
from deltaw.training.session import Session


class DriftMeter:
    """Measures how far a session's training moves general answers. Made before the first step.

    Args:
        session: ready to train. Nothing is measured where ``train.drift`` is false or the model writes no
            text.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        asked = session.config.train.drift
        self._wanted = asked is not False and session.task.tokenizer is not None
        self._wanted = self._wanted and not session.task.has_labels
        self._noted: BaseLosses | None = None
        self._reason: NoGeneralAnswers | None = None
        if not self._wanted:
            return
        try:
            if asked == "auto":
                check_size(session.model)
            if not session.method.keeps_base(session.model):
                answers = session.general_answers(MEASURED)
                with session.method.evaluating(session.model):
                    self._noted = base_losses(session.model, answers, session.batcher, session.running)
        except NoGeneralAnswers as reason:
            self._reason = reason

    def measure(self) -> Drift | None:
        """The drift of the trained model; None where it is not wanted. Call outside of ``session.running``.

        Raises:
            NoGeneralAnswers: the base model gives none that could be measured; the message says why.
        """
        if not self._wanted:
            return None
        if self._reason is not None:
            raise self._reason
        session, model = self._session, self._session.model
        noted = self._noted
        answers = session.general_answers(MEASURED) if noted is None else noted.answers
        with session.method.evaluating(model):
            return measure_drift(
                model,
                answers,
                session.batcher,
                base=noted or (lambda: session.method.without(model)),
                running=session.running,
                as_trained=lambda example: as_seen(example, session.method),
            )
