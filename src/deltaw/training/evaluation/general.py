"""The base model's own answers to general prompts: what drift is measured on and what is kept from changing.

The base model writes them once by greedy decoding. They are kept on disk under a name that depends on
everything that they follow from: the model's weights, its precision, the rendered prompts and the number of
tokens. It knows no method and no run; whoever calls makes sure that the model answers as the base model does.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltaw.cache import recall, remember
from deltaw.data.example import Example
from deltaw.data.packing import epoch_order
from deltaw.data.prepare import encode_prompt
from deltaw.data.settings import DataSettings
from deltaw.data.templates import TemplateName
from deltaw.errors import UserError
from deltaw.hub.loading import has_values
from deltaw.lora.fingerprint import base_fingerprint
from deltaw.lora.stored import count_numbers
from deltaw.machine.choices import QUANTIZED
from deltaw.machine.kernel_choice import computed_on
from deltaw.runtime.generation import Completion, Progress, Writer, generate, position_limit
from deltaw.runtime.quantized_weights import Rounding
from deltaw.training.losses import unrounded
from deltaw.training.microbatches import AnyBatcher, AnyObjective
from deltaw.working import working

# The most tokens of an answer. Longer answers cost time and say little more: a model that has drifted does so
# from the first words on.
ANSWER_TOKENS = 40
# General answers that a run keeps beside the base model's, to be read.
SHOWN = 4
# Below this a model has learned no general answers: test models and toys.
LEAST_PARAMETERS = 16_000_000
# Fewer answers than this say little.
LEAST_ANSWERS = 8
MADE_BY = ("torch", "transformers", "tokenizers", "deltaw.kernels", "deltaw.lora", "deltaw.runtime", "deltaw.serving")


class NoGeneralAnswers(Exception):
    """The model gives no answers that drift could be measured on; the message says why."""


def identity_of(model: PreTrainedModel, precision: str) -> str | None:
    """A name for a freshly loaded model's weights and the precision that they are to be run in; None on fake
    tensors."""
    weights = base_fingerprint(model)
    return None if weights is None else f"{weights}-{precision if precision in QUANTIZED else model.dtype}"


def as_rounded(identity: str | None, roundings: Sequence[Rounding]) -> str | None:
    """The name of a model as it computes: where its weights were calibrated to int8, with that calibration."""
    if identity is None or not roundings:
        return identity
    calibration = json.dumps([rounding.as_json() for rounding in roundings])
    return f"{identity}-{hashlib.blake2b(calibration.encode(), digest_size=8).hexdigest()}"


def check_size(model: PreTrainedModel) -> None:
    """Refuse a model that is too small to have learned general answers.

    Raises:
        NoGeneralAnswers: it has fewer parameters than ``LEAST_PARAMETERS``.
    """
    count = count_numbers(model)
    if count < LEAST_PARAMETERS:
        raise NoGeneralAnswers(f"a model of {count:,} parameters has learned no general answers")


def general_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    data: DataSettings | TemplateName = "auto",
    *,
    identity: str | None,
    batch_tokens: int = 1024,
    reserved: int = 0,
    writer: Writer | None = None,
) -> list[Example]:
    """What the model answers to general prompts: rows whose labels are its own greedy tokens.

    Args:
        model: answers as the base model does.
        data: how prompts are rendered: a run's data settings, or a template's name.
        identity: names the base model as it computes (:func:`as_rounded`); None keeps nothing on disk.
        batch_tokens: bounds the memory of decoding, as in :func:`deltaw.runtime.generation.generate`.
        reserved: positions that a method puts before each row.
        writer: writes the answers; None for transformers.

    Returns:
        a row for each answer, with the terminator as its last label where the model ended the answer itself;
        ``row`` is the number of its prompt, from 1. Prompts that leave no room for an answer, and empty
        answers, are skipped.

    Raises:
        NoGeneralAnswers: fewer than ``LEAST_ANSWERS`` are left, or the chat template takes no such prompt.
    """
    limit = position_limit(model)
    try:
        rendered = [encode_prompt(prompt, data, tokenizer) for prompt in prompts]
    except UserError as error:
        raise NoGeneralAnswers(str(error.what)) from error
    fitting = {
        number: tokens
        for number, tokens in enumerate(rendered, start=1)
        if len(tokens) and (limit is None or reserved + len(tokens) + ANSWER_TOKENS <= limit)
    }
    if len(fitting) < LEAST_ANSWERS:
        raise NoGeneralAnswers(f"the model has {limit} positions, too few for general prompts")
    asked = list(fitting.values())
    if has_values(model):
        with working("letting the base model answer general questions", len(asked)) as advance:
            how: dict[str, Any] = {"batch_tokens": batch_tokens, "on_progress": lambda done, _: advance(done)}
            done = base_answers(model, tokenizer, asked, ANSWER_TOKENS, identity=identity, writer=writer, **how)
        written = [[*one.tokens, *([] if one.terminator is None else [one.terminator])] for one in done]
    else:  # in a dry run on fake tensors nothing can be decoded: answers of full length take the same memory
        written = [[0] * ANSWER_TOKENS for _ in asked]
    answered = zip(fitting, asked, written, strict=True)
    answers = [_example(number, prompt, answer, tokenizer) for number, prompt, answer in answered]
    if has_values(model):
        answers = [answer for answer in answers if (answer.answer or "").strip()]
    if len(answers) < LEAST_ANSWERS:
        raise NoGeneralAnswers(f"the base model gives {len(answers)} answers to {len(prompts)} prompts")
    return answers


def base_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[np.ndarray],
    count: int,
    *,
    identity: str | None,
    batch_tokens: int,
    on_progress: Progress = None,
    writer: Writer | None = None,
) -> list[Completion]:
    """The base model's greedy answers, each of at most ``count`` tokens; remembered.

    Args:
        identity: names the base model as it computes; None remembers nothing.
        batch_tokens, on_progress: of :func:`generate`. writer: writes them; None for transformers.
    """
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(len(prompt).to_bytes(4, "little") + prompt.astype("<i4").tobytes())
    asked = [identity, count, digest.hexdigest(), computed_on(model.device)]
    kept = None if identity is None else recall("general", asked, MADE_BY)
    if isinstance(kept, list) and len(kept) == len(prompts):
        with contextlib.suppress(TypeError, ValueError, OverflowError):  # somebody else wrote the file
            return [Completion(np.array(ids, np.int32), str(text), end is not None, end) for ids, text, end in kept]
    done = None if writer is None else writer(prompts, count, batch_tokens, on_progress)
    if done is None:
        how: dict[str, Any] = {"batch_tokens": batch_tokens, "on_progress": on_progress}
        done = generate(model, tokenizer, prompts, max_new_tokens=count, **how)
    if identity is not None:
        remember("general", asked, [[one.tokens.tolist(), one.text, one.terminator] for one in done], MADE_BY)
    return done


def _example(number: int, prompt: np.ndarray, answer: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> Example:
    tokens = np.concatenate([prompt, np.asarray(answer, np.int32)]).astype(np.int32)
    is_label = np.arange(len(tokens)) >= len(prompt)
    text = str(tokenizer.decode(list(answer), skip_special_tokens=True))
    return Example(number, tokens, is_label, len(prompt), text)


@dataclass(frozen=True)
class KeepGeneral:
    """Adds the gradients of weight · (mean cross-entropy of general answers) to those of a step
    (``train.keep_general``).

    Self-distillation by rehearsal: the factors are pushed away from changes that general answers would pay for. The
    prompts are others than those that drift is measured on.

    Attributes:
        objective: the sum of a microbatch's losses. batcher: cuts rows into microbatches.
        rows: general answers, as the model is to see them.
        weight: what their mean loss is multiplied with; the data's mean loss has weight 1.
        seed: of their order. per_step: how many of them a step takes.
    """

    objective: AnyObjective
    batcher: AnyBatcher
    rows: Sequence[Example]
    weight: float
    seed: int
    per_step: int = 1

    def rows_of(self, step: int) -> list[Example]:
        """The answers of step ``step`` (from 0), a function of its number: each once before any twice."""
        count = len(self.rows)
        places = np.arange(step * self.per_step, (step + 1) * self.per_step)
        orders = {epoch: epoch_order(count, epoch, self.seed) for epoch in set((places // count).tolist())}
        return [self.rows[orders[place // count][place % count]] for place in places.tolist()]

    def __call__(self, step: int) -> Tensor:
        """Add the gradients for step ``step``; the mean loss of its answers in nats a token, unweighted: a
        scalar on the model's device, which is not waited for."""
        rows = self.rows_of(step)
        units = self.objective.units(rows)
        total = torch.zeros(())
        for batch in self.batcher.batches(rows):
            loss = self.objective(batch)
            (self.weight * loss / units).backward()
            total = total + unrounded(loss)
        return total / units
