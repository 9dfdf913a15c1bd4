"""Decoding: batches against single prompts, terminators, and the model left as it was."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import AttentionInterface, GenerationConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from deltaw.errors import UserError
from deltaw.hub.terminators import terminators
from deltaw.runtime.generation import generate
from tests.byte_models import tiny_gpt2, tiny_llama

Maker = Callable[[int], PreTrainedModel]


def some_prompts(count: int = 7, longest: int = 40, seed: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.integers(3, 259, size=random.integers(1, longest)) for _ in range(count)]


def without_cache(model: PreTrainedModel, prompt: np.ndarray, steps: int, ends: list[int]) -> list[int]:
    """Greedy decoding the slow, obvious way: the whole text through the model at each step."""
    ids = torch.from_numpy(prompt)[None]
    written: list[int] = []
    for _ in range(steps):
        with torch.no_grad():
            token = int(model(ids).logits[0, -1].argmax())
        if token in ends:
            break
        written.append(token)
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    return written


@pytest.mark.each_value
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("batch_tokens", [1, 200, 100_000])
def test_batched_answers_equal_those_one_by_one(make: Maker, batch_tokens: int, tokenizer) -> None:
    model = make(0)
    prompts = some_prompts()
    answers = generate(model, tokenizer, prompts, max_new_tokens=12, batch_tokens=batch_tokens)
    ends = terminators(model, tokenizer)
    assert len(answers) == len(prompts)
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = without_cache(model, prompt, 12, ends)
        assert answer.tokens.tolist() == expected
        assert answer.stopped == (len(expected) < 12)
        assert answer.text == tokenizer.decode(expected, skip_special_tokens=True)


def test_any_terminator_ends_a_row_and_the_rest_goes_on(tokenizer) -> None:
    model = tiny_llama()
    prompts = some_prompts(5)
    free = generate(model, tokenizer, prompts, max_new_tokens=10, stop_ids=[])
    assert all(len(answer.tokens) == 10 and not answer.stopped for answer in free)
    ends = [int(free[0].tokens[4]), int(free[1].tokens[7])]
    ended = generate(model, tokenizer, prompts, max_new_tokens=10, stop_ids=ends)
    for before, after in zip(free, ended, strict=True):
        hits = np.flatnonzero(np.isin(before.tokens, ends))
        expected = before.tokens[: hits[0]] if hits.size else before.tokens
        assert after.tokens.tolist() == expected.tolist()
        assert after.stopped == bool(hits.size)
    assert ended[0].stopped


def test_prompt_that_ends_with_the_padding_token_is_not_masked(tokenizer) -> None:
    """Padding is eos here; a real eos in a prompt must count, in a batch as alone."""
    model = tiny_llama()
    prompts = [np.array([0, 5, 0, 7, 0]), np.array([9, 0]), np.array([0, 0, 0, 11, 12, 13, 14])]
    together = generate(model, tokenizer, prompts, max_new_tokens=6, stop_ids=[])
    for prompt, answer in zip(prompts, together, strict=True):
        assert answer.tokens.tolist() == without_cache(model, prompt, 6, [])


def test_terminators_come_from_everywhere(tokenizer) -> None:
    model = tiny_llama(eos_token_id=7)
    model.generation_config.eos_token_id = [9, 11]
    # 0: the tokenizer's eos and <|endoftext|>; 2: <|im_end|>.
    assert terminators(model, tokenizer) == [0, 2, 7, 9, 11]
    assert terminators(None, None) == []


def test_settings_of_the_models_generation_config_do_not_leak_in(tokenizer) -> None:
    model = tiny_llama()
    prompts = some_prompts(3)
    expected = [answer.tokens.tolist() for answer in generate(model, tokenizer, prompts, max_new_tokens=10)]
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=3.0, repetition_penalty=5.0, no_repeat_ngram_size=1, eos_token_id=0
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answers = generate(model, tokenizer, prompts, max_new_tokens=10)
    assert [answer.tokens.tolist() for answer in answers] == expected
    assert model.generation_config.repetition_penalty == 5.0


def test_model_and_random_state_are_left_as_found(tokenizer) -> None:
    AttentionInterface.register("test_training_attention", sdpa_attention_forward)
    model = tiny_llama()
    model.train()
    model.model.layers[0].eval()
    model.set_attn_implementation("test_training_attention")
    seen: list[str] = []
    model.model.register_forward_pre_hook(lambda module, _: seen.append(module.config._attn_implementation))
    state = torch.random.get_rng_state()
    modes = [module.training for module in model.modules()]
    generate(model, tokenizer, some_prompts(2), max_new_tokens=3)
    assert set(seen) == {"sdpa"}
    assert model.config._attn_implementation == "test_training_attention"
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)


def test_prefill_computes_logits_of_the_last_position_only(tokenizer) -> None:
    model, prompts = tiny_llama(), some_prompts(3)
    lengths: list[int] = []
    model.lm_head.register_forward_hook(lambda _, inputs, output: lengths.append(output.shape[1]))
    generate(model, tokenizer, prompts, max_new_tokens=6)
    assert set(lengths) == {1}


def test_answers_end_where_the_positions_do(tokenizer) -> None:
    model = tiny_gpt2()
    prompts = [np.full(125, 5), np.full(120, 6), np.full(3, 7)]
    answers = generate(model, tokenizer, prompts, max_new_tokens=10, stop_ids=[])
    assert [len(answer.tokens) for answer in answers] == [3, 8, 10]
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.tokens.tolist() == without_cache(model, prompt, len(answer.tokens), [])


@pytest.mark.parametrize(
    ("prompt", "settings"),
    [(np.array([], dtype=int), {}), (np.full(128, 5), {}), (np.array([5]), {"max_new_tokens": 0})],
)
def test_what_cannot_be_decoded_is_refused(prompt: np.ndarray, settings: dict[str, float], tokenizer) -> None:
    with pytest.raises(UserError):
        generate(tiny_gpt2(), tokenizer, [prompt], **settings)  # type: ignore[arg-type]


def test_progress_counts_prompts(tokenizer) -> None:
    told: list[tuple[int, int]] = []
    progress = {"batch_tokens": 60, "on_progress": lambda done, of: told.append((done, of))}
    generate(tiny_llama(), tokenizer, some_prompts(5), max_new_tokens=2, **progress)
    assert len(told) > 1
    assert told[-1] == (5, 5)
    assert generate(tiny_llama(), tokenizer, []) == []
