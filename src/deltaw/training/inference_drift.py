"""Drift of a finished run, and its general answers beside the base model's.

What :meth:`deltaw.training.session.Session.drift` is to a run that trains, this is to one that is opened
again.
"""

from __future__ import annotations

from dataclasses import dataclass

from deltaw.data.example import Example
from deltaw.data.prepare import encode_prompt
from deltaw.runtime.generation import generate
from deltaw.training.evaluation.drift import Drift, measure_drift
from deltaw.training.evaluation.general import ANSWER_TOKENS, check_size, general_answers
from deltaw.training.evaluation.general_prompts import MEASURED
from deltaw.training.inference import InferenceSession


@dataclass(frozen=True)
class GeneralAnswer:
    """One general prompt, answered by the base model and by the fine-tuned one."""

    prompt: str
    base: str
    adapter: str


def drift_of(opened: InferenceSession) -> Drift | None:
    """How far general answers have moved from the base model's; None without an adapter, where the model
    writes no text, and where the run's ``train.drift`` is false.

    Raises:
        NoGeneralAnswers: the base model gives none that could be measured; the message says why.
    """
    if opened.method is None or opened.task.tokenizer is None or opened.task.has_labels:
        return None
    asked = "auto" if opened.config is None else opened.config.train.drift
    if asked is False:
        return None
    if asked == "auto":
        check_size(opened.model)
    answers = _base_answers(opened)
    batcher, _ = opened.task.batcher(
        opened.model,
        answers,
        device=str(opened.loaded.choices["device"].value),
        tokens_per_pass="auto",
        share="auto",
        method_shares=True,
        virtual_tokens=opened.method.virtual_tokens,
    )
    return measure_drift(
        opened.model,
        answers,
        batcher,
        base=opened.base,
        running=lambda: opened.task.running(opened.model, batcher),
        as_trained=opened.example,
    )


def answers_side_by_side(opened: InferenceSession, count: int) -> list[GeneralAnswer]:
    """Greedy answers of both models to ``count`` of the general prompts, taken evenly from all kinds.

    Raises:
        NoGeneralAnswers: as :func:`drift_of`.
    """
    answers = _base_answers(opened)
    chosen = answers[:: max(1, len(answers) // count)][:count]
    prompts = [MEASURED[answer.row - 1] for answer in chosen]
    written = generate(
        opened.model,
        opened.tokenizer,
        [opened.prompt(encode_prompt(p, opened.data or "auto", opened.tokenizer)) for p in prompts],
        max_new_tokens=ANSWER_TOKENS,
    )
    return [
        GeneralAnswer(prompt, base.answer or "", done.text)
        for prompt, base, done in zip(prompts, chosen, written, strict=True)
    ]


def _base_answers(opened: InferenceSession) -> list[Example]:
    with opened.base():
        return general_answers(
            opened.model,
            opened.tokenizer,
            MEASURED,
            opened.data or "auto",
            identity=opened.identity,
            reserved=0 if opened.method is None else opened.method.virtual_tokens,
        )
