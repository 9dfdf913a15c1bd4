"""Generation on a device equals generation on the CPU, and seldom waits for the device."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch

from deltaw.decoding.generation import generate
from deltaw.decoding.opening import open_engine
from deltaw.decoding.request import Request, Sampling
from deltaw.errors import UserError
from deltaw.inference.open_run import open_run
from deltaw.lora import LoRAConfig
from deltaw.methods.lora import LoRA
from deltaw.serving.http.opening import OpenOptions, open_served
from tests.byte_models import byte_tokenizer, tiny_gpt2, tiny_llama
from tests.fake_cuda.device import recorded
from tests.tiny_models import causal_model

PROMPTS = [np.random.default_rng(0).integers(3, 259, count) for count in (9, 14, 20, 20, 3, 30)]
SAMPLING = [
    Sampling(seed=3, logprobs=0),
    Sampling(1.0, seed=1, logprobs=0),
    Sampling(0.7, top_k=5, seed=2, logprobs=0),
    Sampling(1.3, top_p=0.8, seed=2**64 - 1),
    Sampling(1.0, min_p=0.05, seed=5),
    Sampling(0.9, top_k=20, top_p=0.6, min_p=0.01, seed=6, logprobs=0),
]


def open_on(device: str, reference: Path):
    return open_run(str(reference), precision="fp32", device=device, log=lambda _: None)


@contextlib.contextmanager
def engine_on(device: str, base: Path):
    with contextlib.closing(open_engine(open_on(device, base), log=lambda _: None)) as engine:
        yield engine


MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2}
MODELS |= {name: lambda name=name: causal_model(name) for name in ("gemma3", "mistral", "phi3", "bloom")}


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_equal_those_of_transformers_loop(name):
    tokenizer = byte_tokenizer()
    results = []
    vocabulary = MODELS[name]().config.get_text_config().vocab_size
    prompts = [prompt % vocabulary for prompt in PROMPTS]
    for device in ("cpu", "cuda"):
        completions = generate(MODELS[name]().to(device), tokenizer, prompts, max_new_tokens=40)
        results.append([(c.tokens.tolist(), c.terminator) for c in completions])
    assert results[0] == results[1]


def test_rows_end_at_terminators_within_a_block():
    tokenizer = byte_tokenizer()
    model = tiny_llama().cuda()
    free = generate(model, tokenizer, PROMPTS, max_new_tokens=20, stop_ids=[])
    stops = [int(free[0].tokens[4]), int(free[1].tokens[18])]
    for before, after in zip(free, generate(model, tokenizer, PROMPTS, max_new_tokens=20, stop_ids=stops), strict=True):
        tokens = before.tokens.tolist()
        end = next((index for index, token in enumerate(tokens) if token in stops), None)
        assert after.tokens.tolist() == tokens[:end] and after.stopped == (end is not None)


def test_greedy_generation_waits_once_per_16_tokens():
    tokenizer = byte_tokenizer()
    model = tiny_llama().cuda()
    for count, expected in ((20, 3), (64, 5)):
        with recorded() as activity:
            generate(model, tokenizer, PROMPTS[:4], max_new_tokens=count, stop_ids=[])
        assert activity.synchronizations.total() <= expected


def test_sampled_tokens_and_log_probabilities_equal_those_of_the_cpu_engine(base):
    requests = [Request(p, sampling=s, max_new_tokens=40) for p, s in zip(PROMPTS, SAMPLING, strict=True)]
    with engine_on("cpu", base) as engine:
        expected = engine.generate_all(requests)
    with engine_on("cuda", base) as engine, recorded() as activity:
        results = engine.generate_all(requests)
    for left, right in zip(expected, results, strict=True):
        assert left.tokens.tolist() == right.tokens.tolist()
        assert (left.text, left.finish, left.terminator) == (right.text, right.finish, right.terminator)
        pairs = zip(left.logprobs, right.logprobs, strict=True)
        assert all(a.logprob == pytest.approx(b.logprob, abs=1e-4) for a, b in pairs)
    assert activity.synchronizations.total() <= 4


def test_streamed_tokens_wait_once_each_and_stop_strings_end_the_text(base):
    with engine_on("cuda", base) as engine:
        text = engine.generate_all([Request(PROMPTS[0], max_new_tokens=40)])[0].text
        with recorded() as activity:
            chunks = list(engine.submit(Request(PROMPTS[0], max_new_tokens=40)))
        assert "".join(chunk.text for chunk in chunks) == text and len(chunks) >= 40
        assert activity.synchronizations.total() <= 40 + 2
        stopped = engine.generate_all([Request(PROMPTS[0], stop=(text[3:5],), max_new_tokens=40)])[0]
        assert stopped.text == text.split(text[3:5])[0]


def test_penalties_are_applied_on_the_host(base):
    sampling = Sampling(0.8, presence_penalty=1.5, repetition_penalty=1.2, seed=4, logprobs=2)
    results = []
    for device in ("cpu", "cuda"):
        with engine_on(device, base) as engine:
            results.append(engine.generate_all([Request(p, sampling=sampling, max_new_tokens=12) for p in PROMPTS]))
    assert [r.tokens.tolist() for r in results[0]] == [r.tokens.tolist() for r in results[1]]


def test_logits_that_are_not_numbers_fail_the_request(base):
    session = open_on("cuda", base)
    session.model.lm_head.weight.data = session.model.lm_head.weight.data.clone().fill_(torch.nan)
    engine = open_engine(session, log=lambda _: None)
    with contextlib.closing(engine), pytest.raises(UserError, match="not numbers"):
        engine.generate_all([Request(PROMPTS[0], max_new_tokens=5)])


def test_server_without_vllm_serves_one_adapter_and_names_the_reason(base, tmp_path):
    session = open_on("cpu", base)
    method = LoRA(LoRAConfig(rank=2, alpha=40, target_modules="all-linear"))
    method.prepare(session.model, seed=0)
    with torch.no_grad():
        for _, parameter in method.parameters(session.model):
            parameter += 0.1
    method.save(session.model, tmp_path, base_model=str(base))
    lines: list[str] = []
    options = OpenOptions(device="cuda", precision="fp32")
    served = open_served(str(base), {"one": tmp_path}, options, log=lines.append)
    with contextlib.closing(served.engine):
        requests = [Request(PROMPTS[0], name, max_new_tokens=8) for name in ("one", None)]
        adapted, plain = served.engine.generate_all(requests)
    assert adapted.tokens.tolist() != plain.tokens.tolist()
    assert "transformers decodes: vLLM is not installed (pip install vllm)" in lines
    with pytest.raises(UserError, match=r"vLLM is not installed .*, and transformers serves one adapter, not 2"):
        open_served(str(base), {"one": tmp_path, "two": tmp_path}, options, log=lines.append)
