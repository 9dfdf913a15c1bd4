"""Generation: batches match single prompts, stop tokens apply, and the model's state is restored."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from transformers import AttentionInterface, GenerationConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from deltaw.decoding.generation import generate
from deltaw.errors import UserError
from deltaw.hub.terminators import terminators
from tests.byte_models import tiny_gpt2, tiny_llama


def random_prompts(count: int = 7, max_length: int = 40, seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(3, 259, size=generator.integers(1, max_length)) for _ in range(count)]


@torch.no_grad()
def without_cache(model: PreTrainedModel, prompt: np.ndarray, steps: int, stop_ids: Sequence[int] = ()) -> list[int]:
    """Decode greedily without a KV cache: each step processes the entire sequence."""
    generated: list[int] = []
    while len(generated) < steps:
        ids = torch.tensor([[*prompt, *generated]])
        generated.append(int(model(ids).logits[0, -1].argmax()))
        if generated[-1] in stop_ids:
            return generated[:-1]
    return generated


@pytest.mark.each_value
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("batch_tokens", [1, 200, 100_000])
def test_batched_generation_matches_single_prompts(make, batch_tokens: int, tokenizer) -> None:
    model = make(0)
    prompts = random_prompts()
    answers = generate(model, tokenizer, prompts, max_new_tokens=12, batch_tokens=batch_tokens)
    stop_ids = terminators(model, tokenizer)
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = without_cache(model, prompt, 12, stop_ids)
        assert answer.tokens.tolist() == expected
        assert answer.stopped == (len(expected) < 12)
        assert answer.text == tokenizer.decode(expected, skip_special_tokens=True)


def test_stop_token_stops_only_its_row(tokenizer) -> None:
    model = tiny_llama()
    prompts = random_prompts(5)
    unlimited = generate(model, tokenizer, prompts, max_new_tokens=10, stop_ids=[])
    assert all(len(answer.tokens) == 10 and not answer.stopped for answer in unlimited)
    stop_ids = [int(unlimited[0].tokens[4]), int(unlimited[1].tokens[7])]
    stopped = generate(model, tokenizer, prompts, max_new_tokens=10, stop_ids=stop_ids)
    for before, after in zip(unlimited, stopped, strict=True):
        expected = list(itertools.takewhile(lambda token: token not in stop_ids, before.tokens.tolist()))
        assert (after.tokens.tolist(), after.stopped) == (expected, len(expected) < 10)
    assert stopped[0].stopped


PADDED_PROMPTS = [
    # Padding is eos here. A real eos in a prompt must be attended to, with and without padding.
    (tiny_llama, ([0, 5, 0, 7, 0], [9, 0], [0, 0, 0, 11, 12, 13, 14]), [6, 6, 6]),
    # Generation stops at the last position of the model.
    (tiny_gpt2, ([5] * 125, [6] * 124, [7] * 3), [3, 4, 6]),
]


@pytest.mark.parametrize(("make", "prompts", "lengths"), PADDED_PROMPTS)
def test_prompts_with_padding_tokens_or_full_context_decode_correctly(make, prompts, lengths, tokenizer) -> None:
    model = make()
    prompts = [np.array(prompt) for prompt in prompts]
    answers = generate(model, tokenizer, prompts, max_new_tokens=6, stop_ids=[])
    expected = [without_cache(model, *arguments) for arguments in zip(prompts, lengths, strict=True)]
    assert [answer.tokens.tolist() for answer in answers] == expected


def test_terminators_combine_all_sources(tokenizer) -> None:
    model = tiny_llama(eos_token_id=7)
    model.generation_config.eos_token_id = [9, 11]
    # 0 is the tokenizer's eos and <|endoftext|>, and 2 is <|im_end|>.
    assert terminators(model, tokenizer) == [0, 2, 7, 9, 11]
    assert terminators(None, None) == []


def test_generation_config_of_model_is_ignored(tokenizer) -> None:
    model = tiny_llama()
    results = []
    sampling_options = {"do_sample": True, "temperature": 3.0, "repetition_penalty": 5.0, "no_repeat_ngram_size": 1}
    for config in (model.generation_config, GenerationConfig(**sampling_options, eos_token_id=0)):
        model.generation_config = config
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            answers = generate(model, tokenizer, random_prompts(3), max_new_tokens=10)
        results.append([answer.tokens.tolist() for answer in answers])
    assert results[0] == results[1] and model.generation_config.repetition_penalty == 5.0


def test_generation_restores_state_and_computes_only_last_logits(tokenizer) -> None:
    AttentionInterface.register("test_training_attention", sdpa_attention_forward)
    model = tiny_llama()
    implementations = set()
    lengths = set()
    model.train()
    model.model.layers[0].eval()
    model.set_attn_implementation("test_training_attention")
    model.model.register_forward_pre_hook(lambda module, _: implementations.add(module.config._attn_implementation))
    model.lm_head.register_forward_hook(lambda _, inputs, output: lengths.add(output.shape[1]))
    state = torch.random.get_rng_state()
    modes = [module.training for module in model.modules()]
    generate(model, tokenizer, random_prompts(3), max_new_tokens=3)
    assert (implementations, lengths) == ({"sdpa"}, {1})
    assert model.config._attn_implementation == "test_training_attention"
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(("prompt", "max_new_tokens"), [([], 5), ([5] * 128, 5), ([5], 0)])
def test_invalid_prompts_and_lengths_raise(prompt: list[int], max_new_tokens: int, tokenizer) -> None:
    with pytest.raises(UserError):
        generate(tiny_gpt2(), tokenizer, [np.array(prompt, dtype=int)], max_new_tokens=max_new_tokens)


def test_progress_counts_prompts(tokenizer) -> None:
    calls: list[tuple[int, int]] = []
    progress = {"batch_tokens": 60, "on_progress": lambda done, of: calls.append((done, of))}
    generate(tiny_llama(), tokenizer, random_prompts(5), max_new_tokens=2, **progress)
    assert len(calls) > 1 and calls[-1] == (5, 5)
    assert generate(tiny_llama(), tokenizer, []) == []
