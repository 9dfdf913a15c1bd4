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
from deltaw.runtime.generation import generate, stream
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
    generate(model, tokenizer, some_prompts(2), max_new_tokens=3, temperature=1.0)
    list(stream(model, tokenizer, some_prompts(1)[0], max_new_tokens=3, temperature=1.0))
    assert set(seen) == {"sdpa"}
    assert model.config._attn_implementation == "test_training_attention"
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)


def test_drawing_depends_on_the_seed_alone(tokenizer) -> None:
    model = tiny_llama(initializer_range=0.1)
    prompts = some_prompts(3)

    def drawn(seed: int) -> list[list[int]]:
        answers = generate(model, tokenizer, prompts, max_new_tokens=8, temperature=1.0, seed=seed)
        return [answer.tokens.tolist() for answer in answers]

    first = drawn(1)
    torch.rand(5)
    assert drawn(1) == first
    assert drawn(2) != first


def test_top_k_of_one_is_greedy_and_prefill_computes_logits_of_the_last_position_only(tokenizer) -> None:
    model, prompts = tiny_llama(), some_prompts(3)
    one = generate(model, tokenizer, prompts, max_new_tokens=6, temperature=2.0, top_k=1)
    lengths: list[int] = []
    model.lm_head.register_forward_hook(lambda _, inputs, output: lengths.append(output.shape[1]))
    greedy = generate(model, tokenizer, prompts, max_new_tokens=6)
    assert [a.tokens.tolist() for a in one] == [a.tokens.tolist() for a in greedy]
    assert set(lengths) == {1}


def test_answers_end_where_the_positions_do(tokenizer) -> None:
    model = tiny_gpt2()
    prompts = [np.full(125, 5), np.full(120, 6), np.full(3, 7)]
    answers = generate(model, tokenizer, prompts, max_new_tokens=10, stop_ids=[])
    assert [len(answer.tokens) for answer in answers] == [3, 8, 10]
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.tokens.tolist() == without_cache(model, prompt, len(answer.tokens), [])


WRONG = ({"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1})


@pytest.mark.parametrize(
    ("prompt", "settings"),
    [(np.array([], dtype=int), {}), (np.full(128, 5), {}), *((np.array([5]), wrong) for wrong in WRONG)],
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


def test_streamed_pieces_are_the_generated_text(tokenizer) -> None:
    model = tiny_llama()
    for prompt in some_prompts(2):
        pieces = list(stream(model, tokenizer, prompt, max_new_tokens=30))
        assert "".join(pieces) == generate(model, tokenizer, [prompt], max_new_tokens=30)[0].text
        assert all(pieces)


def test_streamed_characters_of_several_tokens_come_whole(tokenizer) -> None:
    """A model that repeats its prompt's text: each next token is looked up in a table."""
    text = "naïve 日本語 🙂🙃 end" * 3
    tokens = tokenizer(text)["input_ids"]
    model = tiny_llama()
    script = iter([*tokens, 0])

    def scripted(_: object, inputs: object, output: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(output, -1e4)
        forced[..., next(script)] = 1e4
        return forced

    model.lm_head.register_forward_hook(scripted)
    pieces = list(stream(model, tokenizer, np.array([5, 6]), max_new_tokens=120))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert "日" in pieces and "🙂" in pieces


def test_closing_the_stream_stops_the_model(tokenizer) -> None:
    model = tiny_llama()
    steps: list[int] = []
    model.lm_head.register_forward_hook(lambda *_: steps.append(1))
    pieces = stream(model, tokenizer, np.array([40, 41, 42]), max_new_tokens=100, stop_ids=[])
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    done = len(steps)
    assert done < 100
    assert model.generation_config.eos_token_id == 0


def test_error_while_streaming_reaches_the_reader(tokenizer) -> None:
    model = tiny_llama()

    def fail(*_: object) -> None:
        raise ArithmeticError("broken")

    model.lm_head.register_forward_hook(fail)
    with pytest.raises(ArithmeticError, match="broken"):
        list(stream(model, tokenizer, np.array([40])))
