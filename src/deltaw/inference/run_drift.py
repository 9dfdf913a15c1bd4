"""Drift of a finished run, and its answers to general prompts."""

from __future__ import annotations

import functools

from deltaw.data.example import Example
from deltaw.data.prompt_tokens import encode_prompt
from deltaw.decoding.generation import TextGenerator
from deltaw.inference.opened_run import OpenedRun
from deltaw.training.drift import BATCH_TOKENS, Drift, measure_drift
from deltaw.training.evaluation.general import MAX_ANSWER_TOKENS, GreedyDecoder, check_size, general_answers
from deltaw.training.evaluation.general_prompts import DRIFT_PROMPTS
from deltaw.training.monitoring.drift_probe import GeneralAnswer, drift_enabled, pair_answers, select_evenly


def measure_run_drift(opened: OpenedRun, writer: TextGenerator | None = None) -> Drift | None:
    """Return the drift of a finished run.

    Args:
        opened: Model of the run.
        writer: Generates the answers. The default is transformers.

    Returns:
        None if the model has no adapter or generates no text, or if ``train.drift`` is false.

    Raises:
        NoGeneralAnswers: if the base model generates no answer that can be measured.
    """
    setting = "auto" if opened.config is None else opened.config.train.drift
    if opened.method is None or not drift_enabled(setting, opened.task):
        return None
    if setting == "auto":
        check_size(opened.model)
    answers = _base_answers(opened, writer)
    batcher = opened.batcher(answers, opened.method.virtual_tokens)
    running = functools.partial(opened.task.model_context, opened.model, batcher)
    return measure_drift(opened.model, answers, batcher, base=opened.base, running=running, render=opened.example)


def compare_answers(opened: OpenedRun, count: int, writer: TextGenerator | None = None) -> list[GeneralAnswer]:
    """Return greedy answers of both models to ``count`` general prompts, evenly selected from all categories.

    Args:
        opened: Model of the run.
        count: Number of prompts.
        writer: Generates the answers. The default is transformers.

    Raises:
        NoGeneralAnswers: if the base model generates no usable answer.
    """
    selected = select_evenly(_base_answers(opened, writer), count)
    prompts = [DRIFT_PROMPTS[answer.row - 1] for answer in selected]
    encoded = [opened.prompt(encode_prompt(p, opened.data or "auto", opened.tokenizer)) for p in prompts]
    decoder = GreedyDecoder(opened.model, opened.tokenizer, None, writer, BATCH_TOKENS)
    return pair_answers(selected, decoder.complete(encoded, MAX_ANSWER_TOKENS))


def _base_answers(opened: OpenedRun, writer: TextGenerator | None) -> list[Example]:
    decoder = GreedyDecoder(opened.model, opened.tokenizer, opened.identity, writer)
    reserved = opened.virtual_tokens
    with opened.base():
        return general_answers(decoder, DRIFT_PROMPTS, opened.data or "auto", reserved=reserved)
