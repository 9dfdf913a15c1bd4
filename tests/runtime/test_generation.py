"""Decoding: batches against single prompts, terminators, and the model left as it was."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from transformers import AttentionInterface, GenerationConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from deltaw.errors import UserError
from deltaw.hub.terminators import terminators
from deltaw.runtime.generation import generate
from tests.byte_models import tiny_gpt2, tiny_llama


def some_prompts(count: int = 7, longest: int = 40, seed: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.integers(3, 259, size=random.integers(1, longest)) for _ in range(count)]


@torch.no_grad()
def without_cache(model: PreTrainedModel, prompt: np.ndarray, steps: int, ends: Sequence[int] = ()) -> list[int]:
    """Greedy decoding the slow, obvious way: the whole text through the model at each step."""
    written: list[int] = []
    while len(written) < steps:
        ids = torch.tensor([[*prompt, *written]])
        written.append(int(model(ids).logits[0, -1].argmax()))
        if written[-1] in ends:
            return written[:-1]
    return written


@pytest.mark.each_value
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("batch_tokens", [1, 200, 100_000])
def test_batched_answers_equal_those_one_by_one(make, batch_tokens: int, tokenizer) -> None:
    model, prompts = make(0), some_prompts()
    answers = generate(model, tokenizer, prompts, max_new_tokens=12, batch_tokens=batch_tokens)
    ends = terminators(model, tokenizer)
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = without_cache(model, prompt, 12, ends)
        assert answer.tokens.tolist() == expected
        assert answer.stopped == (len(expected) < 12)
        assert answer.text == tokenizer.decode(expected, skip_special_tokens=True)


def test_any_terminator_ends_a_row_and_the_rest_goes_on(tokenizer) -> None:
    model, prompts = tiny_llama(), some_prompts(5)
    free = generate(model, tokenizer, prompts, max_new_tokens=10, stop_ids=[])
    assert all(len(answer.tokens) == 10 and not answer.stopped for answer in free)
    ends = [int(free[0].tokens[4]), int(free[1].tokens[7])]
    ended = generate(model, tokenizer, prompts, max_new_tokens=10, stop_ids=ends)
    for before, after in zip(free, ended, strict=True):
        expected = list(itertools.takewhile(lambda token: token not in ends, before.tokens.tolist()))
        assert (after.tokens.tolist(), after.stopped) == (expected, len(expected) < 10)
    assert ended[0].stopped


@pytest.mark.parametrize(
    ("make", "prompts", "lengths"),
    [
        # Padding is eos here; a real eos in a prompt must count, in a batch as alone.
        (tiny_llama, ([0, 5, 0, 7, 0], [9, 0], [0, 0, 0, 11, 12, 13, 14]), [6, 6, 6]),
        # Answers end where the positions do.
        (tiny_gpt2, ([5] * 125, [6] * 124, [7] * 3), [3, 4, 6]),
    ],
)
def test_prompts_with_padding_tokens_or_many_tokens_are_decoded_as_alone(make, prompts, lengths, tokenizer) -> None:
    model, prompts = make(), [np.array(prompt) for prompt in prompts]
    answers = generate(model, tokenizer, prompts, max_new_tokens=6, stop_ids=[])
    expected = [without_cache(model, *of) for of in zip(prompts, lengths, strict=True)]
    assert [answer.tokens.tolist() for answer in answers] == expected


def test_terminators_come_from_everywhere(tokenizer) -> None:
    model = tiny_llama(eos_token_id=7)
    model.generation_config.eos_token_id = [9, 11]
    # 0: the tokenizer's eos and <|endoftext|>; 2: <|im_end|>.
    assert terminators(model, tokenizer) == [0, 2, 7, 9, 11]
    assert terminators(None, None) == []


def test_settings_of_the_models_generation_config_do_not_leak_in(tokenizer) -> None:
    model, found = tiny_llama(), []
    leaking = {"do_sample": True, "temperature": 3.0, "repetition_penalty": 5.0, "no_repeat_ngram_size": 1}
    for config in (model.generation_config, GenerationConfig(**leaking, eos_token_id=0)):
        model.generation_config = config
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            answers = generate(model, tokenizer, some_prompts(3), max_new_tokens=10)
        found.append([answer.tokens.tolist() for answer in answers])
    assert found[0] == found[1] and model.generation_config.repetition_penalty == 5.0


def test_model_and_random_state_are_left_as_found_and_logits_are_of_the_last_position_only(tokenizer) -> None:
    AttentionInterface.register("test_training_attention", sdpa_attention_forward)
    model, seen, lengths = tiny_llama(), set(), set()
    model.train()
    model.model.layers[0].eval()
    model.set_attn_implementation("test_training_attention")
    model.model.register_forward_pre_hook(lambda module, _: seen.add(module.config._attn_implementation))
    model.lm_head.register_forward_hook(lambda _, inputs, output: lengths.add(output.shape[1]))
    state, modes = torch.random.get_rng_state(), [module.training for module in model.modules()]
    generate(model, tokenizer, some_prompts(3), max_new_tokens=3)
    assert (seen, lengths) == ({"sdpa"}, {1})
    assert model.config._attn_implementation == "test_training_attention"
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(("prompt", "new"), [([], 5), ([5] * 128, 5), ([5], 0)])
def test_what_cannot_be_decoded_is_refused(prompt: list[int], new: int, tokenizer) -> None:
    with pytest.raises(UserError):
        generate(tiny_gpt2(), tokenizer, [np.array(prompt, dtype=int)], max_new_tokens=new)


def test_progress_counts_prompts(tokenizer) -> None:
    told: list[tuple[int, int]] = []
    progress = {"batch_tokens": 60, "on_progress": lambda done, of: told.append((done, of))}
    generate(tiny_llama(), tokenizer, some_prompts(5), max_new_tokens=2, **progress)
    assert len(told) > 1 and told[-1] == (5, 5)
    assert generate(tiny_llama(), tokenizer, []) == []
