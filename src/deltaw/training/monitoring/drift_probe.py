"""Drift of a run in training.

Most methods preserve the base model, so drift is measured after training. If a method trains the base model's
parameters, the base model is evaluated before training.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from deltaw.data.example import Example
from deltaw.decoding.generation import GeneratedCompletion
from deltaw.training.drift import BaseLosses, Drift, base_losses, measure_drift
from deltaw.training.evaluation.base import Evaluation
from deltaw.training.evaluation.general import MAX_ANSWER_TOKENS, NUM_STORED_ANSWERS, NoGeneralAnswers, check_size
from deltaw.training.evaluation.general_prompts import DRIFT_PROMPTS
from deltaw.training.monitoring.probe import Probe, ProbeResult
from deltaw.training.rendered_rows import render_example
from deltaw.training.session import Session
from deltaw.training.task import Task


@dataclass(frozen=True)
class GeneralAnswer:
    """General prompt with the answers of the base model and the fine-tuned model."""

    prompt: str
    base: str
    adapter: str


def drift_enabled(setting: bool | str, task: Task[Any]) -> bool:
    """Return True if drift is measured with this value of ``train.drift``."""
    return setting is not False and task.tokenizer is not None and task.generates_text


def select_evenly(answers: Sequence[Example], count: int) -> Sequence[Example]:
    """Return ``count`` of the answers, from all categories of prompts."""
    indices = np.linspace(0, len(answers) - 1, min(count, len(answers)))
    return [answers[index] for index in indices.round().astype(int)]


def pair_answers(answers: Sequence[Example], completions: Sequence[GeneratedCompletion]) -> list[GeneralAnswer]:
    pairs = zip(answers, completions, strict=True)
    return [GeneralAnswer(DRIFT_PROMPTS[base.row - 1], base.answer or "", c.text) for base, c in pairs]


class DriftProbe(Probe):
    """Measures the drift caused by a session's training.

    Args:
        session: Session that is ready to train. Drift is not measured if ``train.drift`` is false or the model
            generates no text.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._enabled = drift_enabled(session.config.train.drift, session.task)
        self._stored_losses: BaseLosses | None = None
        self._answers: Sequence[Example] = ()
        self._reason: NoGeneralAnswers | None = None
        self._at_start: Drift | None = None

    def before(self) -> None:
        """Measure the base model if the method does not preserve it, and the adapter of ``start_from``."""
        if not self._enabled:
            return
        session = self._session
        try:
            if session.config.train.drift == "auto":
                check_size(session.model)
            if session.replaced_base:
                raise NoGeneralAnswers("the adapter of start_from has replaced weights of the base model")
            if not session.method.can_restore_base(session.model):
                answers = session.general_answers(DRIFT_PROMPTS)
                with session.method.evaluating(session.model):
                    self._stored_losses = base_losses(session.model, answers, session.batcher, session.running)
            if session.start is not None:  # the model of a resumed run has the values of its start here, too
                self._at_start = self.measure()
        except NoGeneralAnswers as reason:
            self._reason = reason

    def after(self, evaluation: Evaluation) -> Iterator[ProbeResult]:
        """Measure the drift, and compare general answers. Log the reason if a language model has none."""
        try:
            drift = self.measure()
        except NoGeneralAnswers as reason:
            yield ProbeResult(line=f"drift: not measured ({reason})")
            return
        if drift is not None:
            yield ProbeResult({"general": [asdict(answer) for answer in self.compare_answers()]})
            yield ProbeResult({"drift": drift.as_dict()}, fields={"drift": drift})

    def measure(self) -> Drift | None:
        """Return the drift of the trained model, or None if it is disabled. Call it outside of ``session.running``.

        Raises:
            NoGeneralAnswers: if the base model generates no answer that can be measured.
        """
        if not self._enabled:
            return None
        if self._reason is not None:
            raise self._reason
        session = self._session
        model = self._session.model
        stored_losses = self._stored_losses
        answers = session.general_answers(DRIFT_PROMPTS) if stored_losses is None else stored_losses.answers
        base = stored_losses or functools.partial(session.method.base_model_active, model)
        render = functools.partial(render_example, method=session.method)
        self._answers = answers
        with session.method.evaluating(model):
            drift = measure_drift(model, answers, session.batcher, base=base, running=session.running, render=render)
        return drift if self._at_start is None else replace(drift, start_loss=self._at_start.loss)

    def compare_answers(self, count: int = NUM_STORED_ANSWERS) -> list[GeneralAnswer]:
        """Return the answers of both models to some of the prompts after :meth:`measure`.

        Call it outside of ``session.running``.
        """
        session = self._session
        selected = select_evenly(self._answers, count)
        rendered = [render_example(answer, session.method) for answer in selected]
        prompts = [example.tokens[: example.prompt_length] for example in rendered]
        return pair_answers(selected, session.complete(prompts, MAX_ANSWER_TOKENS))
