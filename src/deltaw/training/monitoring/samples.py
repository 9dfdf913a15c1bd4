"""Answers to held-out prompts by the base model and the adapter (``train.samples``)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from deltaw.data.example import Example
from deltaw.decoding.generation import GeneratedCompletion, TextGenerator
from deltaw.machine.choices import Choice
from deltaw.progress import track_progress
from deltaw.training.callbacks import Callback, Sample
from deltaw.training.evaluation.answers import EvaluatedAnswer, answers, exact_match_warning
from deltaw.training.evaluation.base import Evaluation
from deltaw.training.evaluation.general import NoGeneralAnswers, check_size
from deltaw.training.monitoring.generation import choose_rows
from deltaw.training.monitoring.probe import Probe, ProbeResult
from deltaw.training.session import Session

# Bounds of the maximum length of a sample answer. It is shorter if the expected answers are short.
MAX_SAMPLE_TOKENS = 48
MIN_SAMPLE_TOKENS = 16
# Maximum length for a model that is trained with rewards.
MAX_REWARD_SAMPLE_TOKENS = 256
# Number of samples of a language model.
SAMPLES = 8
# Random stream that selects the rows.
_SAMPLE_STREAM = 12


class SampleProbe(Probe):
    """Answers held-out prompts with the base model and with the adapter during training (``train.samples``).

    Args:
        session: Session of the run. No samples are generated if its model generates no text.
        callback: Receives the samples.
    """

    def __init__(self, session: Session, callback: Callback) -> None:
        self._session = session
        self._callback = callback
        self._base_samples: list[Sample] | None = None
        count = _sample_count(session)
        is_enabled = session.task.tokenizer is not None and session.task.generates_text and count > 0
        rows = session.data.held_out
        self._rows = choose_rows(rows, count, (session.config.train.seed, _SAMPLE_STREAM)) if is_enabled else []
        max_answer_length = max((len(row) - row.prompt_length for row in self._rows), default=0)
        self._max_new_tokens = min(MAX_SAMPLE_TOKENS, max(MIN_SAMPLE_TOKENS, 2 * max_answer_length))
        if max_new_tokens := session.generation_limits.max_new_tokens:
            self._max_new_tokens = min(MAX_REWARD_SAMPLE_TOKENS, max_new_tokens)

    def evaluate(self, step: int) -> Iterator[ProbeResult]:
        """Answer the prompts. The answers before the first step are generated once per run."""
        if not self._rows or (step == 0 and self._base_samples is not None):
            return
        is_base = step == 0 and self._session.start is None
        samples = self.of_base() if is_base else self.of_adapter()
        yield ProbeResult({"samples": [sample.as_dict() for sample in samples]})
        self._callback.on_samples(step, samples)
        if step == 0:
            self._base_samples = samples
            if pictures := self.pictures():
                yield ProbeResult({"pictures": pictures})

    def verify(self, evaluation: Evaluation) -> Iterator[ProbeResult]:
        """Report if generated answers contradict the exact match of the first set of held-out rows."""
        session = self._session
        if not self._rows or not isinstance(session.task.tokenizer, PreTrainedTokenizerBase):
            return
        rows = next(iter(session.data.sets.values()))

        with track_progress("verifying answers"):
            warning = exact_match_warning(rows, evaluation, session.task.tokenizer, _writer(session))
        if warning is not None:
            session.notes.append(warning)
            yield ProbeResult(line=warning)

    def state(self) -> dict[str, Any]:
        samples = self._base_samples
        return {"samples": None if samples is None else [sample.as_dict() for sample in samples]}

    def restore(self, state: Mapping[str, Any]) -> None:
        if state["samples"] is not None:
            self._base_samples = [Sample(**sample) for sample in state["samples"]]

    def of_base(self) -> list[Sample]:
        """Return the base model's answers.

        If the method does not preserve the base model, call it before the first step.
        """
        method = self._session.method
        model = self._session.model
        if not method.can_restore_base(model):
            return self.of_adapter()
        with method.base_model_active(model):
            return self._written([row.without_prefix(method.virtual_tokens) for row in self._rows], of_base=True)

    def of_adapter(self) -> list[Sample]:
        """Return the answers of the current model."""
        return self._written(self._rows)

    def pictures(self) -> dict[str, list[str]]:
        """Return thumbnails of the images in the prompts, by row number."""
        images = self._session.task.images
        pictures = {} if images is None else {str(row.row): images.thumbnails(row.tokens) for row in self._rows}
        return {row: urls for row, urls in pictures.items() if urls}

    def _written(self, rows: Sequence[Example], of_base: bool = False) -> list[Sample]:
        with track_progress("answering sample prompts"):
            answers = generate_answers(self._session, rows, max_new_tokens=self._max_new_tokens, of_base=of_base)
        return [Sample(a.row, a.question, a.expected or None, a.output) for a in answers]


def generate_answers(
    session: Session, rows: Sequence[Example], *, max_new_tokens: int | None, of_base: bool = False
) -> list[EvaluatedAnswer]:
    """Return the model's greedy answers to rendered rows. See :meth:`Session.complete`."""
    tokenizer = session.task.tokenizer
    if not rows or not isinstance(tokenizer, PreTrainedTokenizerBase):
        return []
    writer = _writer(session, of_base=of_base)
    return answers(session.model, tokenizer, rows, max_new_tokens=max_new_tokens, writer=writer)


def _writer(session: Session, *, of_base: bool = False) -> TextGenerator:
    def complete(prompts: Sequence[np.ndarray], count: int, *_: object) -> list[GeneratedCompletion]:
        return session.complete(prompts, count, of_base=of_base)

    return complete


def _sample_count(session: Session) -> int:
    """Return the number of samples."""
    setting = session.config.train.samples
    if setting != "auto":
        return int(setting)
    chosen = Choice(SAMPLES, "a language model")
    try:
        if not session.task.generates_text:
            raise NoGeneralAnswers(f"a model for {session.task.name} generates no text")
        check_size(session.model)
    except NoGeneralAnswers as reason:
        chosen = Choice(0, str(reason))
    session.chosen["train.samples"] = chosen
    return chosen.value
