"""Batched text generation with transformers' models.

Prompts of unequal length are padded on the left and masked by length. All terminators stop a text. Settings of the
model's generation configuration (repetition penalty, temperature) are not applied. The model is restored afterwards:
attention implementation, training mode and torch's random state.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StaticCache,
    StoppingCriteriaList,
)

from deltaw.decoding.device_sampling import DeviceSampler
from deltaw.decoding.request import Sampling
from deltaw.decoding.sampling import SamplingState
from deltaw.errors import UserError
from deltaw.hub.loading import default_attention, use_attention
from deltaw.hub.terminators import terminators
from deltaw.hub.transformers_private import quiet
from deltaw.kernels.layout import to_device
from deltaw.kernels.linear import LinearProduct, linear
from deltaw.runtime.block_roles import forward_replaced

# Incremental detokenization decodes a short suffix of tokens together. Decoding single tokens would break characters of
# several tokens and lose spaces, and decoding all tokens each time would take quadratic time.


# Incomplete or invalid characters decode to this one.
REPLACEMENT_CHARACTER = "\ufffd"
_MAX_BUFFERED = 16  # buffered tokens if all of their text can be emitted
_MAX_UNDECODABLE = 64  # buffered tokens if none of their text can be emitted, because the bytes are not text
# A character has at most four bytes. Some tokenizers emit one replacement character per byte of an incomplete
# character, and some a single one.
_MAX_MARKS = 3


def decode_text(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    """Decode tokens without special tokens."""
    return str(tokenizer.decode(tokens, skip_special_tokens=True))


class IncrementalDetokenizer:
    """Converts tokens to text one by one. The concatenated pieces equal the text of all tokens.

    Exception: if a tokenizer falls back to bytes and the model generates invalid UTF-8 right after valid
    bytes, the tokenizer would retract emitted characters. They remain, followed by replacement characters.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        # Tokens with text that is not emitted yet, and preceding tokens that the tokenizer needs as context.
        self._buffer: list[int] = []
        self._emitted = ""  # emitted text of ``_buffer``

    def add(self, token: int) -> str:
        """Return the text that becomes final with this token, possibly empty."""
        self._buffer.append(token)
        text = decode_text(self._tokenizer, self._buffer)
        marks = len(text) - len(text.rstrip(REPLACEMENT_CHARACTER))
        certain = text[: len(text) - min(marks, _MAX_MARKS)]
        piece = ""
        if not marks or certain.startswith(self._emitted):
            piece = certain[common_prefix_length(certain, self._emitted) :]
            self._emitted = certain
        if len(self._buffer) > _MAX_BUFFERED:
            piece += self._shrink_buffer(text)
        return piece

    def end(self) -> str:
        """Return the remaining text after the last token."""
        text = decode_text(self._tokenizer, self._buffer)
        emitted = self._emitted
        self._buffer = []
        self._emitted = ""
        return text[common_prefix_length(text, emitted) :]

    def _shrink_buffer(self, text: str) -> str:
        """Shrink the buffer to its last tokens if they decode to the end of the text. Return text emitted by this.

        Args:
            text: Text of all buffered tokens.
        """
        # If the text does not start with the emitted text, the last character is incomplete.
        num_pending = len(text) - len(self._emitted)
        # A single token can be a complete character. Otherwise replacement characters may hide a character that starts
        # before the tail, so the tail needs more characters than marks. One of four lengths starts at a character.
        for count in (1, *range(8, 12)) if text.startswith(self._emitted) else ():
            tail = decode_text(self._tokenizer, self._buffer[-count:])
            is_sufficient = REPLACEMENT_CHARACTER not in tail and tail if count == 1 else len(tail) > _MAX_MARKS
            if is_sufficient and text.endswith(tail) and num_pending <= len(tail):
                self._buffer = self._buffer[-count:]
                self._emitted = tail[: len(tail) - num_pending]
                return ""
        return self.end() if len(self._buffer) > _MAX_UNDECODABLE else ""


def common_prefix_length(left: str, right: str) -> int:
    """Return the length of the common prefix of two texts."""
    if left.startswith(right):
        return len(right)
    return next(n for n, (a, b) in enumerate(zip(left + "\0", right + "\1", strict=False)) if a != b)


@dataclass(frozen=True)
class GeneratedCompletion:
    """Completion of a prompt.

    Attributes:
        tokens: New token ids without the terminator.
        text: Text of the tokens without special tokens.
        stopped: True if a terminator stopped the completion, False if the token limit did.
        terminator: Token that stopped the completion, or None.
    """

    tokens: np.ndarray
    text: str
    stopped: bool
    terminator: int | None = None


# Receives the number of completed items and the total.
Progress: TypeAlias = Callable[[int, int], None] | None
# Greedy decoding without :func:`generate`. Receives prompts (token ids, including virtual tokens), the maximum number
# of new tokens, the maximum number of tokens per batch, and a progress callback. Returns None for unsupported models.
TextGenerator: TypeAlias = Callable[[Sequence[np.ndarray], int, int, Progress], "list[GeneratedCompletion] | None"]


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters of completions.

    Attributes:
        max_new_tokens: Maximum number of tokens per completion.
        temperature: Sampling temperature. 0 selects the most likely token.
        top_p: See :class:`deltaw.decoding.request.Sampling`.
        top_k: See :class:`deltaw.decoding.request.Sampling`.
        seeds: A seed per completion.
        logprobs: True to return log-probabilities of the tokens.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seeds: tuple[int, ...] = ()
    logprobs: bool = False


@dataclass(frozen=True)
class SampledCompletion:
    """A sampled completion.

    Attributes:
        tokens: int64 token ids without the terminator.
        text: Text without special tokens. With several turns, text of the last turn.
        terminator: Token that stopped the completion, or None if the token limit did.
        logprobs: fp32 log-probabilities of the tokens in nats, before temperature, top-p and top-k. None if not
            requested.
        prompt: Token ids of the prompt, if it differs from the given prompt.
        is_generated: bool (tokens,) False for tokens of the environment. None if all tokens are generated.
        reward: Sum of the environment's rewards.
    """

    tokens: np.ndarray
    text: str
    terminator: int | None
    logprobs: np.ndarray | None = None
    prompt: np.ndarray | None = None
    is_generated: np.ndarray | None = None
    reward: float = 0.0

    @property
    def ended(self) -> bool:
        """True if a terminator stopped the completion."""
        return self.terminator is not None

    @property
    def length(self) -> int:
        """Number of generated tokens without the terminator."""
        return len(self.tokens) if self.is_generated is None else int(self.is_generated.sum())

    def as_list(self) -> list[Any]:
        """Return lossless JSON values."""
        arrays = (self.logprobs, self.prompt, self.is_generated)
        optional_values = [None if array is None else array.tolist() for array in arrays]
        return [self.tokens.tolist(), self.text, self.terminator, *optional_values, self.reward]

    @classmethod
    def from_list(cls, values: Sequence[Any]) -> SampledCompletion:
        """Create a completion from :meth:`as_list`."""
        tokens, text, terminator, *arrays, reward = values
        typed = zip(arrays, (np.float32, np.int32, bool), strict=True)
        logprobs, prompt, is_generated = (None if array is None else np.array(array, kind) for array, kind in typed)
        return cls(np.array(tokens, np.int64), text, terminator, logprobs, prompt, is_generated, reward)


# Maximum number of completions that training samples concurrently.
MAX_CONCURRENT_SAMPLES = 64
# Samples completions from the current model. Prompts are token ids, including virtual tokens.
Sampler: TypeAlias = Callable[[Sequence[np.ndarray], SamplingParams], "list[SampledCompletion]"]


def derive_seed(*numbers: int) -> int:
    """Combine numbers into a seed."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[np.ndarray],
    *,
    max_new_tokens: int = 64,
    batch_tokens: int = 4096,
    stop_ids: Sequence[int] | None = None,
    on_progress: Progress = None,
) -> list[GeneratedCompletion]:
    """Generate greedy completions of prompts, in order.

    Prompts of similar length share a batch, longest first. In fp32, a completion does not depend on the batch.

    Args:
        prompts: Token ids, each (length,).
        max_new_tokens: Maximum number of new tokens, also limited by the model's positions.
        batch_tokens: Maximum number of tokens in a batch at the end: rows × (longest prompt + new tokens). It limits
            the memory for keys and values. A single prompt may exceed it.
        stop_ids: Tokens that end a text, instead of the model's terminators (:func:`terminators`).
        on_progress: Receives (completed prompts, prompts) after each batch.

    Raises:
        UserError: if a prompt is empty or too long, or ``max_new_tokens`` is below 1.
    """
    config = _config(model, tokenizer, stop_ids, max_new_tokens)
    answers: dict[int, GeneratedCompletion] = {}
    with _decoding_state(model, config):
        for indices, allowance in _batches(prompts, max_new_tokens, batch_tokens, position_limit(model)):
            config.max_new_tokens = allowance
            rows = [np.asarray(prompts[index], dtype=np.int64) for index in indices]
            if model.device.type == "cuda":
                tokens = _greedy_on_device(model, tokenizer, rows, config)
            else:
                ids, mask = _padded(rows, config.pad_token_id, model.device)
                sequences = _decoder(model).generate(ids, attention_mask=mask, generation_config=config)
                tokens = sequences[:, ids.shape[1] :].cpu().numpy()
            for index, row in zip(indices, tokens, strict=True):
                answers[index] = _completion(row, tokenizer, config.eos_token_id)
            if on_progress is not None:
                on_progress(len(answers), len(prompts))
    return [answers[index] for index in range(len(prompts))]


def decode_with_callback(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int,
    choose: Callable[[Tensor], Tensor | None],
) -> None:
    """Decode prompts together, with tokens chosen by the caller.

    Args:
        prompts: Token ids, each (length,), nonempty and with ``max_new_tokens`` positions available after it.
        choose: Receives fp32 logits (prompts, vocabulary), and returns the next tokens (prompts,), or None to stop.

    Raises:
        UserError: if the model cannot generate.
    """
    config = _config(model, tokenizer, (), max_new_tokens)
    stops = False

    def chosen(input_ids: Tensor, scores: Tensor) -> Tensor:
        nonlocal stops
        tokens = choose(scores.float())
        stops = tokens is None
        forced = torch.full_like(scores, float("-inf"))
        return forced.scatter_(1, input_ids[:, -1:] if tokens is None else tokens.to(scores.device)[:, None], 0.0)

    def stopped(input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        return torch.full(input_ids.shape[:1], stops, device=input_ids.device)

    with _decoding_state(model, config):
        ids, mask = _padded([np.asarray(p, np.int64) for p in prompts], config.pad_token_id, model.device)
        if (cache := _static_cache(model, ids.shape[1] + max_new_tokens)) is not None:
            _decode_on_device(model, ids, mask, cache, max_new_tokens, choose)
            return
        generate = partial(_decoder(model).generate, ids, attention_mask=mask, generation_config=config)
        generate(logits_processor=LogitsProcessorList([chosen]), stopping_criteria=StoppingCriteriaList([stopped]))


def _static_cache(model: PreTrainedModel, length: int) -> StaticCache | None:
    """Return a cache of fixed size on a GPU, or None on other devices and for models that transformers' loop needs."""
    prepares_inputs = type(_decoder(model)).prepare_inputs_for_generation
    standard = prepares_inputs is GenerationMixin.prepare_inputs_for_generation
    if model.device.type != "cuda" or not standard or "position_ids" not in _parameters(model):
        return None
    cache = StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=length)
    for layer in cache.layers:
        if hasattr(layer, "cumulative_length"):  # each layer would copy it from the host, with a synchronization
            layer.cumulative_length = torch.zeros((), dtype=torch.long, device=model.device)
    return None if any(cache.is_linear) else cache


def _parameters(model: PreTrainedModel) -> Container[str]:
    return inspect.signature(type(model).forward).parameters


@torch.no_grad()
def _decode_on_device(
    model: PreTrainedModel,
    ids: Tensor,
    mask: Tensor,
    cache: StaticCache,
    max_new_tokens: int,
    choose: Callable[[Tensor], Tensor | None],
) -> None:
    """Decode without synchronizing with the device. Transformers' loop synchronizes twice per token.

    Args:
        model: The model, in evaluation mode.
        ids: (rows, length) token ids, padded on the left.
        mask: (rows, length) attention mask.
        cache: Empty cache. Because of its fixed size, transformers does not read the mask on the host.
        max_new_tokens: Maximum number of new tokens.
        choose: See :func:`decode_with_callback`.
    """
    length = ids.shape[1]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    mask = nn.functional.pad(mask, (0, max_new_tokens), value=1)
    options = {"logits_to_keep": 1} if "logits_to_keep" in _parameters(model) else {}
    for step in range(max_new_tokens):
        inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": mask[:, : length + step]}
        logits = model(**inputs, past_key_values=cache, use_cache=True, **options).logits[:, -1].float()
        if (tokens := choose(logits)) is None:
            return
        ids = tokens[:, None]
        positions = positions[:, -1:] + 1


def _greedy_on_device(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[np.ndarray], config: GenerationConfig
) -> np.ndarray:
    """Return greedy tokens (rows, steps). Rows continue after a terminator until all of them have one."""
    blocks: list[np.ndarray] = []

    def receive(tokens: np.ndarray, _: np.ndarray) -> bool:
        blocks.append(tokens)
        return bool(np.isin(np.concatenate(blocks), config.eos_token_id or ()).any(0).all())

    states = [SamplingState(Sampling(), prompt, 0) for prompt in prompts]
    sampler = DeviceSampler(states, config.max_new_tokens, model.device, receive)
    decode_with_callback(model, tokenizer, prompts, config.max_new_tokens, sampler)
    return np.concatenate(blocks).T


def _config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int] | None, max_new_tokens: int
) -> GenerationConfig:
    """Return a generation configuration with only these settings."""
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}", location="max_new_tokens", hint="at least 1")
    stop_tokens = sorted(set(stop_ids)) if stop_ids is not None else terminators(model, tokenizer)
    pad = tokenizer.pad_token_id
    if pad is None:  # padding is masked by length, so any id is valid
        pad = stop_tokens[0] if stop_tokens else 0
    tokens = {"eos_token_id": stop_tokens or None, "pad_token_id": pad, "bos_token_id": tokenizer.bos_token_id}
    return GenerationConfig(do_sample=False, use_cache=True, max_new_tokens=max_new_tokens, **tokens)


@contextlib.contextmanager
def _decoding_state(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Context that prepares the model for decoding, and restores it on exit."""
    training = [module for module in model.modules() if module.training]
    original_config = model.generation_config
    devices = [model.device] if model.device.type == "cuda" else []
    attention = use_attention(model, default_attention(model))
    random = torch.random.fork_rng(devices)
    with attention, quiet(), random, _compiled_head(model):
        model.eval()
        # transformers fills missing values from the model's configuration, so use an empty one.
        model.generation_config = GenerationConfig(pad_token_id=config.pad_token_id)
        try:
            yield
        finally:
            model.generation_config = original_config
            for module in training:
                module.training = True


@contextlib.contextmanager
def _compiled_head(model: PreTrainedModel) -> Iterator[None]:
    """Context in which a linear output head uses deltaw's kernel.

    On some CPUs, torch's matmul of a small number of bf16 rows with a large vocabulary allocates about ten times the
    size of the head's weight: 620 MB for 49,152 classes of width 576, more than a training step.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.weight.device.type != "cpu" or "forward" in vars(head):
        yield
        return

    def forward(hidden: Tensor) -> Tensor:
        logits, _ = linear(hidden.flatten(0, -2), LinearProduct(head.weight, bias=head.bias))
        return logits.view(*hidden.shape[:-1], logits.shape[-1])

    with forward_replaced(head, forward):
        yield


def _decoder(model: PreTrainedModel) -> GenerationMixin:
    """Return the model as its base class that implements ``generate``.

    Raises:
        UserError: if the model cannot generate.
    """
    if not isinstance(model, GenerationMixin):
        message = f"a {type(model).__name__} does not generate text"
        raise UserError(message, location="model", hint="use a causal language model")
    return model


def position_limit(model: PreTrainedModel) -> int | None:
    """Return the model's number of positions, or None if the configuration does not specify it."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    limit = getattr(config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def _batches(
    prompts: Sequence[np.ndarray], max_new_tokens: int, batch_tokens: int, limit: int | None
) -> Iterator[tuple[list[int], int]]:
    """Yield the indices of prompts per batch and the number of new tokens.

    The longest are first, so memory errors occur early.
    """
    lengths = [len(prompt) for prompt in prompts]
    allowances = []
    for index, length in enumerate(lengths):
        allowance = max_new_tokens if limit is None else min(max_new_tokens, limit - length)
        if length == 0:
            raise UserError("the prompt is empty", location=f"prompt {index + 1}", hint="it needs at least one token")
        if allowance < 1:
            message = f"the prompt has {length} tokens, and the model {limit} positions"
            raise UserError(message, location=f"prompt {index + 1}", hint="shorten the prompt")
        allowances.append(allowance)
    open_batch: list[int] = []
    for index in sorted(range(len(prompts)), key=lambda index: -lengths[index]):
        if open_batch:
            first = open_batch[0]
            tokens = (len(open_batch) + 1) * (lengths[first] + allowances[first])
            # Rows near the position limit can generate fewer tokens.
            if tokens > batch_tokens or allowances[index] != allowances[first]:
                yield open_batch, allowances[first]
                open_batch = []
        open_batch.append(index)
    if open_batch:
        yield open_batch, allowances[open_batch[0]]


def _padded(rows: Sequence[np.ndarray], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids (rows, longest) padded on the left, and the attention mask."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), pad, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, longest - len(row) :] = torch.from_numpy(row)
        mask[index, longest - len(row) :] = 1
    return to_device(ids, device), to_device(mask, device)


def _completion(row: np.ndarray, tokenizer: PreTrainedTokenizerBase, stop_ids: list[int] | None) -> GeneratedCompletion:
    """Truncate a row at its first terminator. The remaining tokens are padding."""
    stop_positions = np.flatnonzero(np.isin(row, stop_ids)) if stop_ids else np.empty(0, dtype=int)
    tokens = row[: stop_positions[0]] if stop_positions.size else row
    terminator = int(row[stop_positions[0]]) if stop_positions.size else None
    return GeneratedCompletion(tokens, decode_text(tokenizer, tokens.tolist()), bool(stop_positions.size), terminator)
