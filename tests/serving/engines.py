"""Engines over tiny models, and what transformers itself would write."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from deltaw.serving.adapters import Adapters, FixedAdapters
from deltaw.serving.batch import Batch, BatchLimits
from deltaw.serving.decodable import Decodable, decodable
from deltaw.serving.engine import Engine
from tests.byte_models import byte_tokenizer, tiny_llama

# Engines that are closed after the test.
MADE: list[Engine] = []


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@functools.cache
def llama() -> tuple[PreTrainedModel, Decodable]:
    model = tiny_llama().requires_grad_(False)
    return model, decodable(model)


def engine(pages: int = 64, **changes: object) -> Engine:
    """An engine over the tiny Llama; token 0 ends its texts."""
    return over(llama()[1], pages, terminators=(0,), **changes)


def engine_of(model: PreTrainedModel, pages: int = 64, **changes: object) -> Engine:
    return over(decodable(model), pages, **changes)


def over(
    made: Decodable,
    pages: int,
    *,
    limits: BatchLimits | None = None,
    adapters: Adapters | None = None,
    **changes: object,
) -> Engine:
    adapters = adapters or FixedAdapters()
    work = Batch(made, pages, adapters, limits or BatchLimits())
    MADE.append(Engine(work, tokenizer(), adapters=adapters, **changes))  # type: ignore[arg-type]
    return MADE[-1]


def prompts(count: int, longest: int = 40, vocabulary: int = 259, seed: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.integers(3, min(vocabulary, 90), int(random.integers(1, longest + 1))) for _ in range(count)]


def greedy(model: PreTrainedModel, prompt: np.ndarray, count: int, ends: tuple[int, ...] = ()) -> list[int]:
    """What transformers writes, without a terminator."""
    ids = torch.from_numpy(np.asarray(prompt, np.int64))[None]
    how = {"max_new_tokens": count, "do_sample": False, "eos_token_id": list(ends) or None, "pad_token_id": 0}
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **how)
    return before(out[0, len(prompt) :].tolist(), ends)


def before(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """The tokens before the first terminator."""
    return list(itertools.takewhile(lambda token: token not in ends, tokens))


SMALL_STEPS = BatchLimits(running=4, prompt_rows=6, alone_rows=9, least_rows=2)
