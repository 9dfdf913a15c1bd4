"""Tests that the decoder generates the same as transformers if it runs the model's code, also with states of recurrent
layers.
"""

from __future__ import annotations

import copy
import dataclasses
import functools

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from deltaw.decoding.adapters import ActiveAdapter, AdapterInfo, FixedAdapters
from deltaw.decoding.batch import BatchLimits
from deltaw.decoding.decodable import Decodable, build_decodable
from deltaw.decoding.model_decoder import ModelDecoder
from deltaw.decoding.request import Constraint, Request, Sampling
from deltaw.lora import load_adapter
from deltaw.runtime.quantized_weights import quantize_int8
from deltaw.runtime.recurrent_layers import state_size
from tests.runtime.recurrent_families import DELTA, FAMILIES, MAMBA, SIZES, recurrent_model
from tests.serving.adapter_folders import write_lora
from tests.serving.engines import SMALL_STEPS, make_engine, prompts
from tests.serving.mixed_rows import make_bank, packed_adapters

VOCABULARY = 259
TOKENS = 64
# Rounding of fp32 logits, in standard deviations.
TOLERANCE = 1e-4
QUICK = ["lfm2", "qwen3_5_text", "granitemoehybrid", "falcon_h1", "olmo_hybrid"]
# Head sizes that the compiled kernels support.
WIDE = {
    "qwen3_5_text": DELTA | {"linear_key_head_dim": 32, "linear_value_head_dim": 64},
    "falcon_h1": MAMBA | {"mamba_d_head": 32, "mamba_n_heads": 3, "mamba_d_state": 32, "mamba_n_groups": 1},
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_local_experts": 4}
OTHERS = ["olmo2", "qwen3_moe", "granitemoe", "ernie4_5", "apertus"]


@functools.cache
def decodable(family: str, wide: bool = False) -> tuple[nn.Module, Decodable]:
    changes = WIDE[family] if wide else {}
    if family in FAMILIES:
        model = recurrent_model(family, vocab_size=VOCABULARY, **changes)
    else:
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **SIZES | EXPERTS | {"vocab_size": VOCABULARY})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    # Different answers to different prompts.
    model.get_output_embeddings().weight.data.normal_(0, 1.0)
    return model, build_decodable(model)


def assert_greedy(model: nn.Module, prompt: np.ndarray, tokens: np.ndarray) -> None:
    """Check that the model's code assigns the highest logit to each token of a completion, up to rounding."""
    text = torch.from_numpy(np.concatenate([prompt, tokens]))
    with torch.no_grad():
        logits = model(input_ids=text[None]).logits[0, len(prompt) - 1 : -1]
    chosen = logits.gather(1, text[len(prompt) :, None])[:, 0]
    assert float((logits.amax(1) - chosen).max()) < TOLERANCE * float(logits.std())


def complete(engine, texts: list[np.ndarray], count: int = TOKENS, **fields: object) -> list[list[int]]:
    results = engine.generate_all([Request(text, max_new_tokens=count, **fields) for text in texts])
    return [result.tokens.tolist() for result in results]


def assert_mixed_batch(model: nn.Module, built: Decodable, folder) -> None:
    """Check 20 completions of different prompts in one batch, with two adapters and without."""
    # The code of some families reads this weight without its layer.
    excluded = ["out_proj"] if model.config.model_type in ("falcon_h1", "nemotron_h") else None
    settings = {"exclude_modules": excluded}
    folders = [write_lora(model, folder / str(seed), seed=seed, rank=2 + seed, **settings) for seed in range(2)]
    packed = packed_adapters(make_bank(model, built, *folders))
    active = {str(n): ActiveAdapter(n + 1, AdapterInfo(), adapter) for n, adapter in enumerate(packed)}
    engine = make_engine(built, 200, adapters=FixedAdapters(active))
    texts = prompts(20, 100, seed=1)
    requests = [Request(text, (None, "0", "1")[number % 3], max_new_tokens=TOKENS) for number, text in enumerate(texts)]
    results = engine.generate_all(requests)
    adapted = [copy.deepcopy(model) for _ in folders]
    for carrier, path in zip(adapted, folders, strict=True):
        load_adapter(carrier, path)
    for number, (text, result) in enumerate(zip(texts, results, strict=True)):
        assert len(result.tokens) == TOKENS
        assert_greedy([model, *adapted][number % 3], text, result.tokens)
    assert len({token for result in results for token in result.tokens.tolist()}) > 30


@pytest.mark.parametrize(
    "family", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name not in QUICK)]
)
def test_batch_with_adapters_equals_transformers(family, tmp_path):
    model, built = decodable(family)
    assert isinstance(built.decoder, ModelDecoder)
    assert built.decoder.state_bytes == 4 * state_size(model)
    assert_mixed_batch(model, built, tmp_path)


@pytest.mark.parametrize("family", WIDE)
def test_compiled_states_equal_transformers(family, tmp_path):
    assert_mixed_batch(*decodable(family, wide=True), tmp_path)


@pytest.mark.parametrize("family", OTHERS)
def test_models_without_recognized_blocks_equal_transformers(family, tmp_path):
    model, built = decodable(family)
    assert built.decoder.state_bytes == 0
    assert_mixed_batch(model, built, tmp_path)


@pytest.mark.parametrize("family", ["lfm2", pytest.param("granitemoehybrid", marks=pytest.mark.slow)])
def test_preempted_sequences_continue_from_saved_states(family):
    _, built = decodable(family)
    texts = prompts(12, 100, seed=2)
    expected = complete(make_engine(built, 200), texts)
    limits = dataclasses.replace(SMALL_STEPS, saved_state_bytes=1 << 20)
    engine = make_engine(built, 12, limits=limits)
    assert complete(engine, texts) == expected
    assert engine.load.reused > 0
    without = make_engine(built, 12, limits=SMALL_STEPS)
    assert complete(without, texts) == expected
    assert without.load.reused == 0


def test_states_are_saved_where_prompts_end_and_branch():
    _, built = decodable("lfm2")
    engine = make_engine(built, 64, limits=BatchLimits(saved_state_bytes=1 << 20))
    random = np.random.default_rng(0)
    prompt = random.integers(3, 90, 100)

    def branch() -> np.ndarray:
        return np.concatenate([prompt[:70], random.integers(100, 200, 20)])

    def reused(text: np.ndarray, count: int = 4) -> int:
        handle = engine.submit(Request(text, max_new_tokens=count))
        chunks = list(handle)
        assert handle.result().tokens.tolist() == complete(make_engine(built, 64), [text], count)[0]
        return chunks[0].reused

    assert reused(prompt) == 0
    assert reused(prompt) == 96
    assert reused(branch()) == 0, "the state after the common prefix is saved by the second prompt that contains it"
    assert reused(branch()) == 64
    completion = complete(engine, [prompt], 70)[0]
    assert reused(np.concatenate([prompt, completion, [7]])) == 160
    assert reused(prompt[:97]) == 96


def test_several_completions_of_a_prompt_are_independent():
    _, built = decodable("qwen3_5_text")
    prompt = prompts(1, 60, seed=4)[0]
    sampling = [Sampling(temperature=1.0, seed=seed, logprobs=2) for seed in range(6)]
    requests = [Request(prompt, sampling=each, max_new_tokens=40) for each in sampling]
    limits = BatchLimits(running=3, saved_state_bytes=1 << 20)
    together = make_engine(built, 64, limits=limits).generate_all(requests)
    engine = make_engine(built, 64)
    num_equal = 0
    for request, result in zip(requests, together, strict=True):
        (alone,) = engine.generate_all([request])
        if np.array_equal(alone.tokens, result.tokens):
            num_equal += 1
            assert np.allclose([t.logprob for t in alone.logprobs], [t.logprob for t in result.logprobs], atol=1e-3)
    assert num_equal >= 5, "rounding changes few sampled tokens"
    assert len({tuple(result.tokens.tolist()) for result in together}) > 1


def test_prompt_logprobs_equal_the_model():
    model, built = decodable("granitemoehybrid")
    prompt = prompts(1, 90, seed=5)[0]
    request = Request(prompt, sampling=Sampling(logprobs=0), prompt_logprobs=True, max_new_tokens=1)
    limits = dataclasses.replace(SMALL_STEPS, saved_state_bytes=1 << 20)
    engine = make_engine(built, 64, limits=limits)
    with torch.no_grad():
        expected = model(input_ids=torch.from_numpy(prompt)[None]).logits[0].log_softmax(-1)
    for _ in range(2):  # the second request must not reuse tokens
        (result,) = engine.generate_all([request])
        computed = torch.tensor([token.logprob for token in result.logprobs[: len(prompt) - 1]])
        assert torch.allclose(computed, expected[torch.arange(len(prompt) - 1), prompt[1:]], atol=1e-4)


def test_constraint_holds():
    pytest.importorskip("llguidance", reason="constraints require llguidance")
    _, built = decodable("lfm2")
    engine = make_engine(built, 64)
    requests = [
        Request(text, constraint=Constraint("regex", "(ab|c){3}"), max_new_tokens=20) for text in prompts(3, 40)
    ]
    for result in engine.generate_all(requests):
        assert set(result.text.replace("ab", "c")) == {"c"} and result.finish == "stop"


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_other_precisions_are_verified(precision):
    model = recurrent_model("lfm2", torch.bfloat16 if precision == "bf16" else torch.float32)
    if precision == "int8":
        quantize_int8(model.base_model)
    assert isinstance(build_decodable(model).decoder, ModelDecoder)
