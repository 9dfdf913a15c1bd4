"""Engines over tiny models, and reference completions of transformers."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from deltaw.decoding.adapters import Adapters, FixedAdapters
from deltaw.decoding.batch import BatchLimits, RunningBatch
from deltaw.decoding.decodable import Decodable, build_decodable
from deltaw.decoding.engine import Engine
from tests.byte_models import byte_tokenizer, tiny_llama

# Engines that are closed after the test.
OPEN_ENGINES: list[Engine] = []


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@functools.cache
def llama() -> tuple[PreTrainedModel, Decodable]:
    model = tiny_llama().requires_grad_(False)
    return model, build_decodable(model)


def engine(pages: int = 64, **changes: object) -> Engine:
    """Return an engine over the tiny Llama with token 0 as the terminator."""
    return make_engine(llama()[1], pages, terminators=(0,), **changes)


def engine_of(model: PreTrainedModel, pages: int = 64, **changes: object) -> Engine:
    return make_engine(build_decodable(model), pages, **changes)


def make_engine(
    model: Decodable,
    pages: int,
    *,
    limits: BatchLimits | None = None,
    adapters: Adapters | None = None,
    **changes: object,
) -> Engine:
    adapters = adapters or FixedAdapters()
    work = RunningBatch(model, pages, adapters, limits or BatchLimits())
    OPEN_ENGINES.append(Engine(work, tokenizer(), adapters=adapters, **changes))  # type: ignore[arg-type]
    return OPEN_ENGINES[-1]


def prompts(count: int, max_length: int = 40, vocabulary: int = 259, seed: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.integers(3, min(vocabulary, 90), int(random.integers(1, max_length + 1))) for _ in range(count)]


def greedy(model: PreTrainedModel, prompt: np.ndarray, count: int, terminators: tuple[int, ...] = ()) -> list[int]:
    """Return transformers' greedy completion, without a terminator."""
    ids = torch.from_numpy(np.asarray(prompt, np.int64))[None]
    options = {"max_new_tokens": count, "do_sample": False, "eos_token_id": list(terminators) or None}
    options |= {"pad_token_id": 0}
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return truncate_at(out[0, len(prompt) :].tolist(), terminators)


def truncate_at(tokens: list[int], terminators: Sequence[int]) -> list[int]:
    """Return the tokens before the first terminator."""
    return list(itertools.takewhile(lambda token: token not in terminators, tokens))


SMALL_STEPS = BatchLimits(running=4, prompt_rows=6, prefill_rows=9, min_rows=2)
