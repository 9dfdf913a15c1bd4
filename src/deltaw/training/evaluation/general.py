"""Answers of the base model to general prompts, used to measure drift and to rehearse general behavior.

The base model generates the answers once by greedy decoding. They are cached on disk under a key of the model's
weights, its precision, the prompts and the number of tokens. Callers must pass a model that answers like the base
model.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltaw.cache.results import load_result, store_result
from deltaw.data.example import Example
from deltaw.data.packing import MicroBatch, epoch_order
from deltaw.data.prompt_tokens import encode_prompt
from deltaw.decoding.generation import GeneratedCompletion, Progress, TextGenerator, generate, position_limit
from deltaw.errors import UserError
from deltaw.hub.skeletons import has_values
from deltaw.kernels.layout import to_device
from deltaw.lora.fingerprint import base_fingerprint
from deltaw.lora.stored import count_logical_parameters
from deltaw.machine.choices import QUANTIZED
from deltaw.machine.kernel_choice import numerics_key
from deltaw.progress import track_progress
from deltaw.runtime.quantized_weights import Rounding
from deltaw.settings.data import DataSettings, TemplateName
from deltaw.training.batcher import Batcher
from deltaw.training.causal_objective import ROW_MULTIPLE, CausalObjective, chunked_sum
from deltaw.training.losses import detach_wide, kl_divergence, label_indices, with_remainder

# Maximum number of tokens of an answer. Longer answers add little information, because drift shows in the first words.
MAX_ANSWER_TOKENS = 40
# Number of general answers that a run stores for comparison with the base model's.
NUM_STORED_ANSWERS = 4
# Smaller models (tests, toys) have not learned general answers.
MIN_PARAMETERS = 16_000_000
# With fewer answers, drift is not meaningful.
MIN_ANSWERS = 8
# Tokens whose probabilities are compared with the base model's. All others count as one token.
TOP_TOKENS = 64
CACHE_DEPENDENCIES = (
    *("torch", "transformers", "tokenizers"),
    *("deltaw.kernels", "deltaw.lora", "deltaw.runtime", "deltaw.decoding"),
)


class NoGeneralAnswers(Exception):
    """The model cannot answer general prompts, so drift cannot be measured. The message contains the reason."""


def model_identity(model: PreTrainedModel, precision: str) -> str | None:
    """Return an identifier of a loaded model's weights and compute precision. Fake tensors have no identifier."""
    weights = base_fingerprint(model)
    return None if weights is None else f"{weights}-{precision if precision in QUANTIZED else model.dtype}"


def quantized_identity(identity: str | None, roundings: Sequence[Rounding]) -> str | None:
    """Return the identifier extended by the int8 calibration of the model's weights, if any."""
    if identity is None or not roundings:
        return identity
    calibration = json.dumps([rounding.as_json() for rounding in roundings])
    return f"{identity}-{hashlib.blake2b(calibration.encode(), digest_size=8).hexdigest()}"


def check_size(model: PreTrainedModel) -> None:
    """Reject a model that is too small to have learned general answers.

    Raises:
        NoGeneralAnswers: if the model has fewer parameters than ``MIN_PARAMETERS``.
    """
    count = count_logical_parameters(model)
    if count < MIN_PARAMETERS:
        raise NoGeneralAnswers(f"a model of {count:,} parameters has learned no general answers")


# Token ids of prompts, each (length,).
PromptTokens: TypeAlias = Sequence[np.ndarray]


@dataclass(frozen=True)
class GreedyDecoder:
    """Completes prompts greedily.

    Attributes:
        model: Model that completes the prompts.
        tokenizer: Tokenizer of the model.
        identity: Identifier of the base model (:func:`quantized_identity`) for the cache. None disables caching.
        writer: Generates the completions. By default, or if it returns None, transformers is used.
        batch_tokens: Limit of the memory for decoding, see :func:`deltaw.decoding.generation.generate`.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    identity: str | None = None
    writer: TextGenerator | None = None
    batch_tokens: int = 1024

    def complete(self, prompts: PromptTokens, count: int, on_progress: Progress = None) -> list[GeneratedCompletion]:
        """Return completions of up to ``count`` tokens."""
        tokens = self.batch_tokens
        completions = None if self.writer is None else self.writer(prompts, count, tokens, on_progress)
        if completions is not None:
            return completions
        model = self.model
        tokenizer = self.tokenizer
        return generate(model, tokenizer, prompts, max_new_tokens=count, batch_tokens=tokens, on_progress=on_progress)

    def cached(self, prompts: PromptTokens, count: int, on_progress: Progress = None) -> list[GeneratedCompletion]:
        """Return the result of :meth:`complete`, cached on disk. The model must compute as the base model."""
        digest = hashlib.sha256()
        for prompt in prompts:
            digest.update(len(prompt).to_bytes(4, "little") + prompt.astype("<i4").tobytes())
        key = [self.identity, count, digest.hexdigest(), numerics_key(self.model.device)]
        stored = None if self.identity is None else load_result("general", key, CACHE_DEPENDENCIES)
        if isinstance(stored, list) and len(stored) == len(prompts):
            with contextlib.suppress(TypeError, ValueError, OverflowError):  # invalid cache file
                return [GeneratedCompletion(np.array(ids, np.int32), str(s), t is not None, t) for ids, s, t in stored]
        completions = self.complete(prompts, count, on_progress)
        if self.identity is not None:
            values = [[c.tokens.tolist(), c.text, c.terminator] for c in completions]
            store_result("general", key, values, CACHE_DEPENDENCIES)
        return completions


def general_answers(
    base: GreedyDecoder, prompts: Sequence[str], data: DataSettings | TemplateName = "auto", *, reserved: int = 0
) -> list[Example]:
    """Return the base model's answers to general prompts as rows with the greedy tokens as labels.

    Args:
        data: Data settings of a run, or the name of a template, to render prompts with.
        reserved: Positions that a method prepends to each row.

    Returns:
        A row per answer. Its last label is the terminator if the model terminated the answer. ``row`` is the number of
        its prompt, from 1. PromptTokens without enough positions for an answer and empty answers are skipped.

    Raises:
        NoGeneralAnswers: if fewer than ``MIN_ANSWERS`` remain, or the chat template rejects the prompts.
    """
    limit = position_limit(base.model)
    try:
        rendered = [encode_prompt(prompt, data, base.tokenizer) for prompt in prompts]
    except UserError as error:
        raise NoGeneralAnswers(str(error.message)) from error
    max_length = math.inf if limit is None else limit - reserved - MAX_ANSWER_TOKENS
    fitting = {index: tokens for index, tokens in enumerate(rendered, start=1) if 0 < len(tokens) <= max_length}
    if len(fitting) < MIN_ANSWERS:
        raise NoGeneralAnswers(f"the model has {limit} positions, too few for general prompts")
    prompt_tokens = list(fitting.values())
    if has_values(base.model):
        with track_progress("generating the base model's general answers", len(prompt_tokens)) as advance:
            completions = base.cached(prompt_tokens, MAX_ANSWER_TOKENS, lambda count, _: advance(count))
        terminators = [[] if c.terminator is None else [c.terminator] for c in completions]
        answer_tokens = [[*c.tokens, *end] for c, end in zip(completions, terminators, strict=True)]
    else:  # fake tensors cannot be decoded, but answers of maximum length need the same memory
        answer_tokens = [[0] * MAX_ANSWER_TOKENS for _ in prompt_tokens]
    items = zip(fitting, prompt_tokens, answer_tokens, strict=True)
    answers = [_example(index, prompt, answer, base.tokenizer) for index, prompt, answer in items]
    if has_values(base.model):
        answers = [answer for answer in answers if (answer.answer or "").strip()]
    if len(answers) < MIN_ANSWERS:
        raise NoGeneralAnswers(f"the base model answers only {len(answers)} of {len(prompts)} prompts")
    return answers


def _example(index: int, prompt: np.ndarray, answer: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> Example:
    tokens = np.concatenate([prompt, np.asarray(answer, np.int32)]).astype(np.int32)
    is_label = np.arange(len(tokens)) >= len(prompt)
    return Example(index, tokens, is_label, len(prompt), str(tokenizer.decode(list(answer), skip_special_tokens=True)))


# Log-probabilities of the base model at the labels of an answer: its most likely tokens (labels, k), and their
# log-probabilities (labels, k).
TopLogProbs: TypeAlias = tuple[Tensor, Tensor]


@torch.no_grad()
def base_log_probs(objective: CausalObjective, batcher: Batcher, answers: Sequence[Example]) -> dict[int, TopLogProbs]:
    """Return the most likely tokens at the labels of each answer, by ``row``. The model must compute as the base model.

    The answers of a whole vocabulary would need hundreds of megabytes.
    """
    count = min(TOP_TOKENS, objective.model.config.get_text_config().vocab_size - 1)
    by_row = {}
    for batch in batcher.batches(answers):
        outputs = objective.label_outputs(batch)
        indices, members = label_indices(batch)
        for number, member in enumerate(batch.members):
            index = to_device(torch.from_numpy(indices[members == number]), outputs.device)
            top = objective.logits_of(outputs[index]).float().log_softmax(-1).topk(count)
            by_row[member.example.row] = (top.indices, top.values)
    return by_row


@dataclass(frozen=True)
class GeneralRehearsal:
    """Adds the gradients of weight · (mean divergence of general answers) to a step (``train.keep_general``).

    The divergence is KL(base model ‖ trained model) at the tokens of an answer, over the base model's most likely
    tokens and the remainder. Its gradient is zero until the answers drift, and grows with the drift. The cross-entropy
    of the same answers has a gradient at the base model, too, which competes with the gradient of the data. The
    prompts differ from the prompts that drift is measured on.

    Attributes:
        objective: Computes the logits.
        batcher: Cuts rows into microbatches.
        rows: General answers in the form that the model receives.
        base: Log-probabilities of the base model, by ``row`` (:func:`base_log_probs`).
        weight: Weight of their mean divergence, relative to weight 1 for the data's mean loss.
        seed: Seed of their order.
        per_step: Number of answers per step.
    """

    objective: CausalObjective
    batcher: Batcher
    rows: Sequence[Example]
    base: Mapping[int, TopLogProbs]
    weight: float
    seed: int
    per_step: int = 1

    def rows_of(self, step: int) -> list[Example]:
        """Return the answers of step ``step`` (from 0). Every answer is used once before any is repeated."""
        count = len(self.rows)
        positions = np.arange(step * self.per_step, (step + 1) * self.per_step)
        orders = {epoch: epoch_order(count, epoch, self.seed) for epoch in set((positions // count).tolist())}
        return [self.rows[orders[position // count][position % count]] for position in positions.tolist()]

    def __call__(self, step: int, loss_scale: float = 1.0) -> Tensor:
        """Add the gradients for a step, multiplied by ``loss_scale``.

        Returns:
            The unweighted mean divergence in nats per token, a scalar on the model's device. The device is not
            synchronized.
        """
        rows = self.rows_of(step)
        units = sum(row.label_count for row in rows)
        total = torch.zeros(())
        for batch in self.batcher.batches(rows):
            divergence = self._divergence(batch)
            (self.weight * divergence / (units / loss_scale)).backward()
            total = total + detach_wide(divergence)
        return total / units

    def _divergence(self, batch: MicroBatch) -> Tensor:
        """Return the summed divergence of a microbatch."""
        objective = self.objective
        outputs = objective.label_outputs(batch)
        index = to_device(torch.from_numpy(label_indices(batch)[0]), outputs.device)
        top = [self.base[member.example.row] for member in batch.members]
        tokens = torch.cat([token_ids for token_ids, _ in top])
        base = with_remainder(torch.cat([log_probs for _, log_probs in top]))

        def divergence(part: Tensor, rows: slice) -> Tensor:
            logits = objective.logits_of(part).float()
            log_probs = logits.gather(-1, tokens[rows]) - logits.logsumexp(-1, keepdim=True)
            return kl_divergence(base[rows], with_remainder(log_probs))

        parameters = list(objective.head.parameters()) if objective.chunked else []
        ones = torch.ones(len(index), device=outputs.device)
        # Several tensors of the size of the logits are in memory at the same time.
        chunk = max(ROW_MULTIPLE, objective.chunk // 4)
        return chunked_sum(outputs.index_select(0, index), ones, divergence, parameters, chunk=chunk)
