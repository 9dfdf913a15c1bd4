"""Text from a model: many prompts in batches.

The decoding is transformers' own ``generate``. What is added is what callers get wrong: prompts of unequal
length are padded on the left and masked by length, every terminator stops a text, settings that a model's
generation configuration brings along (a repetition penalty, a temperature) do not leak in, and the model is
left as it was found: its attention implementation, its training mode, torch's random state.

It does not know how prompts are rendered from conversations.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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
    StoppingCriteriaList,
)

from deltaw.errors import UserError
from deltaw.hub.loading import attention_of, ordinary_attention
from deltaw.hub.quiet import quiet
from deltaw.hub.terminators import terminators
from deltaw.kernels.linear import Product, linear
from deltaw.runtime.recognition import forward_replaced

# The text of a model's tokens is given out as it becomes certain. Decoding each token alone would break characters of
# several tokens and lose spaces, decoding everything each time would cost the square of the length. So a few tokens are
# decoded together.


# What a character decodes to that has begun and not ended, or is none.
UNFINISHED = "\ufffd"
_HELD = 16  # tokens that are decoded together, where all of them could be given out
_MOST_HELD = 64  # and where none could: bytes that are no text
# A character has at most four bytes. Tokenizers that decode a run of bytes as one write a mark for each byte
# of an unfinished character, others one for all of them.
_MOST_MARKS = 3


def text_of(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    """The tokens as text, special tokens left out."""
    return str(tokenizer.decode(tokens, skip_special_tokens=True))


class TextPieces:
    """Turns tokens into text, one at a time; the pieces together are the text of all the tokens.

    One exception: where a tokenizer falls back to bytes, and the model writes bytes that are no UTF-8 right
    after ones that are, the tokenizer takes characters back that have been given out. They stay, and the
    marks for them follow.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        # Tokens whose text is not all given out, and those before them that a tokenizer needs for context.
        self._held: list[int] = []
        self._given = ""  # the text of ``_held`` that has been given out

    def add(self, token: int) -> str:
        """The text that this token makes certain, perhaps none."""
        self._held.append(token)
        text = text_of(self._tokenizer, self._held)
        marks = len(text) - len(text.rstrip(UNFINISHED))
        certain = text[: len(text) - min(marks, _MOST_MARKS)]
        piece = ""
        if not marks or certain.startswith(self._given):
            piece, self._given = certain[_in_common(certain, self._given) :], certain
        if len(self._held) > _HELD:
            piece += self._let_go(text)
        return piece

    def end(self) -> str:
        """The rest of the text, where no more tokens come."""
        text = text_of(self._tokenizer, self._held)
        piece = text[_in_common(text, self._given) :]
        self._held, self._given = [], ""
        return piece

    def _let_go(self, text: str) -> str:
        """Go on with the last tokens alone, if they decode to the end of the text; what that gives out.

        Args:
            text: of all tokens that are held.
        """
        # Where it does not begin with what was given, the last character of a run of bytes has not ended.
        counts = (1, *range(8, 12)) if text.startswith(self._given) else ()
        waiting = len(text) - len(self._given)
        # A whole token may stand for itself. Marks may hide that a character began before the tail, so then
        # there must be more characters than marks; of four lengths one begins where a character does.
        for count in counts:
            tail = text_of(self._tokenizer, self._held[-count:])
            enough = UNFINISHED not in tail and tail if count == 1 else len(tail) > _MOST_MARKS
            if enough and text.endswith(tail) and waiting <= len(tail):
                self._held, self._given = self._held[-count:], tail[: len(tail) - waiting]
                return ""
        return self.end() if len(self._held) > _MOST_HELD else ""


def _in_common(one: str, other: str) -> int:
    """How many characters both begin with."""
    if one.startswith(other):
        return len(other)
    return next(n for n, (a, b) in enumerate(zip(one + "\0", other + "\1", strict=False)) if a != b)


@dataclass(frozen=True)
class Completion:
    """What a model wrote after one prompt.

    Attributes:
        tokens: the new token ids, without the terminator.
        text: the tokens as text, special tokens left out.
        stopped: a terminator ended it; False where the limit of new tokens did.
        terminator: the token that ended it; None where none did.
    """

    tokens: np.ndarray
    text: str
    stopped: bool
    terminator: int | None = None


# Told how many of how many are done.
Progress: TypeAlias = Callable[[int, int], None] | None
# Writes greedy texts of a model without :func:`generate`: of prompts of token ids, virtual ones among them, the most
# new tokens, the most tokens of a batch, and a progress; None where the model cannot be decoded so.
Writer: TypeAlias = Callable[[Sequence[np.ndarray], int, int, Progress], "list[Completion] | None"]


@dataclass(frozen=True)
class Drawing:
    """How completions are drawn.

    Attributes:
        max_new_tokens: the most tokens of each. temperature: 0 takes the likeliest token.
        top_p, top_k: as in :class:`deltaw.serving.request.Sampling`.
        seeds: one for each completion. logprobs: whether those of the tokens are wanted.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seeds: tuple[int, ...] = ()
    logprobs: bool = False


@dataclass(frozen=True)
class Drawn:
    """A completion that was drawn.

    Attributes:
        tokens: int64, without the terminator. text: special tokens left out.
        terminator: the token that ended it; None where the limit of new tokens did.
        logprobs: fp32, of the tokens, in nats, before temperature and what else narrows the choice; None where they
            were not asked for.
        prompt, written, reward: of a completion of several turns what the model was asked, as token ids, which of
            ``tokens`` it wrote itself, and the sum of what an environment gave; ``text`` is its last turn. None where
            the prompt was as given and the model wrote all.
    """

    tokens: np.ndarray
    text: str
    terminator: int | None
    logprobs: np.ndarray | None = None
    prompt: np.ndarray | None = None
    written: np.ndarray | None = None
    reward: float = 0.0

    @property
    def ended(self) -> bool:
        """Whether the model ended it."""
        return self.terminator is not None

    @property
    def length(self) -> int:
        """How many tokens the model wrote, the terminator left out."""
        return len(self.tokens) if self.written is None else int(self.written.sum())

    def as_list(self) -> list[Any]:
        """As JSON has it, without a bit lost."""
        arrays = (self.logprobs, self.prompt, self.written)
        known = [None if array is None else array.tolist() for array in arrays]
        return [self.tokens.tolist(), self.text, self.terminator, *known, self.reward]

    @classmethod
    def of_list(cls, values: Sequence[Any]) -> Drawn:
        """From :meth:`as_list`."""
        tokens, text, terminator, *arrays, reward = values
        kinds = zip(arrays, (np.float32, np.int32, bool), strict=True)
        logprobs, prompt, written = (None if array is None else np.array(array, kind) for array, kind in kinds)
        return cls(np.array(tokens, np.int64), text, terminator, logprobs, prompt, written, reward)


# Completions that a training's sampler writes at once, at most.
DRAWN_AT_ONCE = 64
# Draws completions of a model as it is at the call: of prompts of token ids, virtual ones among them.
Sampler: TypeAlias = Callable[[Sequence[np.ndarray], Drawing], "list[Drawn]"]


def seed_of(*numbers: int) -> int:
    """One number of several, which tells all of them apart."""
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
) -> list[Completion]:
    """Continue every prompt; the answers stand in the order of the prompts.

    Each token is the likeliest one. Prompts of like length share a batch, the longest first. In fp32 a prompt
    gets the same answer in a batch as alone.

    Args:
        prompts: token ids, each (length,).
        max_new_tokens: the most tokens to write; fewer where the model's positions end before.
        batch_tokens: the most tokens that a batch holds in the end, rows × (longest prompt + new tokens).
            It bounds the memory for keys and values; one prompt alone may exceed it.
        stop_ids: the tokens that end a text instead of the model's own (:func:`terminators`).
        on_progress: told (prompts done, prompts) after each batch.

    Raises:
        UserError: a prompt is empty or leaves no room for an answer, or ``max_new_tokens`` is below 1.
    """
    config = _config(model, tokenizer, stop_ids, max_new_tokens)
    answers: list[Completion | None] = [None] * len(prompts)
    done = 0
    with _as_found(model, config):
        for places, allowance in _batches(prompts, max_new_tokens, batch_tokens, position_limit(model)):
            config.max_new_tokens = allowance
            rows = [np.asarray(prompts[place], dtype=np.int64) for place in places]
            ids, mask = _padded(rows, config.pad_token_id, model.device)
            written = _decoder(model).generate(ids, attention_mask=mask, generation_config=config)
            for place, row in zip(places, written[:, ids.shape[1] :].cpu().numpy(), strict=True):
                answers[place] = _completion(row, tokenizer, config.eos_token_id)
            done += len(rows)
            if on_progress is not None:
                on_progress(done, len(prompts))
    return [answer for answer in answers if answer is not None]


def decode_by(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int,
    choose: Callable[[Tensor], Sequence[int | None]],
) -> None:
    """Continue prompts together, each token chosen by the caller.

    Args:
        prompts: token ids, each (length,); at least one token, and room for ``max_new_tokens`` behind it.
        choose: given logits (prompts, vocabulary), in fp32, the next token of each; None where its text has
            ended. Once all have ended, the decoding does.

    Raises:
        UserError: the model does not generate.
    """
    config = _config(model, tokenizer, (), max_new_tokens)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=model.device)

    def chosen(input_ids: Tensor, scores: Tensor) -> Tensor:
        forced = torch.full_like(scores, float("-inf"))
        for row, token in enumerate(choose(scores.float())):
            ended[row] = token is None
            forced[row, 0 if token is None else token] = 0.0
        return forced

    def stopped(input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        return ended

    with _as_found(model, config):
        ids, mask = _padded([np.asarray(p, np.int64) for p in prompts], config.pad_token_id, model.device)
        choosing, ending = LogitsProcessorList([chosen]), StoppingCriteriaList([stopped])  # type: ignore[list-item]
        how: dict[str, Any] = {"logits_processor": choosing, "stopping_criteria": ending}
        _decoder(model).generate(ids, attention_mask=mask, generation_config=config, **how)


def _config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int] | None, max_new_tokens: int
) -> GenerationConfig:
    """A generation configuration that holds these settings and nothing else."""
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}", where="max_new_tokens", hint="at least 1")
    ends = sorted(set(stop_ids)) if stop_ids is not None else terminators(model, tokenizer)
    pad = tokenizer.pad_token_id
    if pad is None:  # padding is masked by length, so any id does
        pad = ends[0] if ends else 0
    tokens = {"eos_token_id": ends or None, "pad_token_id": pad, "bos_token_id": tokenizer.bos_token_id}
    return GenerationConfig(do_sample=False, use_cache=True, max_new_tokens=max_new_tokens, **tokens)


@contextlib.contextmanager
def _as_found(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Ready the model for decoding within the block, and leave it as it was before."""
    training = [module for module in model.modules() if module.training]
    own_config = model.generation_config
    devices = [model.device] if model.device.type == "cuda" else []
    attention, random = attention_of(model, ordinary_attention(model)), torch.random.fork_rng(devices)
    with attention, quiet(), random, _own_head_product(model):
        model.eval()
        # transformers fills what a configuration leaves open from the model's own: an empty one brings none.
        model.generation_config = GenerationConfig(pad_token_id=config.pad_token_id)
        try:
            yield
        finally:
            model.generation_config = own_config
            for module in training:
                module.training = True


@contextlib.contextmanager
def _own_head_product(model: PreTrainedModel) -> Iterator[None]:
    """While open, a plain output head is multiplied by deltaw's own kernel.

    On some processors torch's product of a few bf16 rows with a large vocabulary takes scratch memory of some
    ten times the head's weight: 620 MB for 49,152 classes of 576, more than a step of training.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.weight.device.type != "cpu" or "forward" in vars(head):
        yield
        return

    def forward(hidden: Tensor) -> Tensor:
        logits, _ = linear(hidden.flatten(0, -2), Product(head.weight, bias=head.bias))
        return logits.unflatten(0, hidden.shape[:-1])

    with forward_replaced(head, forward):
        yield


def _decoder(model: PreTrainedModel) -> GenerationMixin:
    """The model by its other base class, which has ``generate``.

    Raises:
        UserError: the model does not generate.
    """
    if not isinstance(model, GenerationMixin):
        what = f"a {type(model).__name__} does not generate text"
        raise UserError(what, where="model", hint="give a causal language model")
    return model


def position_limit(model: PreTrainedModel) -> int | None:
    """How many positions the model has, where its configuration says so."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    limit = getattr(config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def _batches(
    prompts: Sequence[np.ndarray], max_new_tokens: int, batch_tokens: int, limit: int | None
) -> Iterator[tuple[list[int], int]]:
    """The places of prompts that are decoded together, and for how many steps; the longest first, so that a lack of
    memory shows at once."""
    lengths = [len(prompt) for prompt in prompts]
    allowances = []
    for place, length in enumerate(lengths):
        allowance = max_new_tokens if limit is None else min(max_new_tokens, limit - length)
        if length == 0:
            raise UserError("the prompt is empty", where=f"prompt {place + 1}", hint="give it a token at least")
        if allowance < 1:
            what = f"the prompt has {length} tokens, and the model {limit} positions"
            raise UserError(what, where=f"prompt {place + 1}", hint="shorten the prompt")
        allowances.append(allowance)
    open_batch: list[int] = []
    for place in sorted(range(len(prompts)), key=lambda place: -lengths[place]):
        if open_batch:
            first = open_batch[0]
            tokens = (len(open_batch) + 1) * (lengths[first] + allowances[first])
            # Rows near the end of the positions may write fewer tokens than others, as each does alone.
            if tokens > batch_tokens or allowances[place] != allowances[first]:
                yield open_batch, allowances[first]
                open_batch = []
        open_batch.append(place)
    if open_batch:
        yield open_batch, allowances[open_batch[0]]


def _padded(rows: Sequence[np.ndarray], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (rows, longest), padded on the left, and the mask of what is not padding."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), pad, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, longest - len(row) :] = torch.from_numpy(row)
        mask[number, longest - len(row) :] = 1
    return ids.to(device), mask.to(device)


def _completion(row: np.ndarray, tokenizer: PreTrainedTokenizerBase, ends: list[int] | None) -> Completion:
    """Cut a row at its first terminator; what follows there is padding."""
    at = np.flatnonzero(np.isin(row, ends)) if ends else np.empty(0, dtype=int)
    tokens = row[: at[0]] if at.size else row
    terminator = int(row[at[0]]) if at.size else None
    return Completion(tokens, text_of(tokenizer, tokens.tolist()), bool(at.size), terminator)
