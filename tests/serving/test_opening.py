"""Tests that an engine over an opened run generates the same as transformers, with its decoder if possible."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from deltaw.data.prompt_tokens import encode_prompt
from deltaw.decoding.generation import GeneratedCompletion, SamplingParams, generate
from deltaw.decoding.opening import SESSION_ADAPTER, SessionGenerator, SessionSampler, open_engine, verified_generator
from deltaw.decoding.request import Constraint, Request, Sampling
from deltaw.errors import UserError
from deltaw.inference.open_run import open_run
from deltaw.inference.opened_run import OpenedRun
from deltaw.lora import LoRAConfig
from deltaw.methods.files import choose_method
from deltaw.methods.lora import LoRA
from deltaw.settings.config import RunConfig
from tests.byte_models import save_model
from tests.runtime.recurrent_families import recurrent_model
from tests.tiny_models import causal_model

# Methods that train the base's parameters share one code path, so most of them are slow tests. "bias" adds parameters.
METHODS = ["lora", "prompt", "bias", "full"]
METHODS += [pytest.param(name, marks=pytest.mark.slow) for name in ("head", "input", "random", "last")]
CHANGES = {"last": {"last": {"blocks": 1}}, "prompt": {"prompt": {"length": 4}}, "random": {"random": {"weights": 0.2}}}
INVOCATION = [13, 14, 15]
PROMPTS = [np.random.default_rng(5).integers(40, 99, count) for count in (2, 9, 16, 22, 29)]


def discard_log(line: str) -> None:
    """Discard a log line."""


def open_session(folder: Path) -> OpenedRun:
    return open_run(str(folder), precision="fp32", device="cpu", log=discard_log)


def make_run(model_folder: Path, folder: Path, method: LoRA | str) -> OpenedRun:
    """Save a run with parameters far from their initial values, and open it."""
    session = open_session(model_folder)
    if isinstance(method, str):
        raw = {"model": str(model_folder), "data": {"train": "none.jsonl"}, "method": method, "output": "x"}
        method = choose_method(RunConfig.model_validate(raw | CHANGES.get(method, {})), session.tokenizer)
    method.prepare(session.model, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in method.parameters(session.model):
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    method.after_step(session.model)
    folder.mkdir(parents=True)
    method.save(session.model, folder, base_model=str(model_folder))
    return open_session(folder)


def transformers_texts(session: OpenedRun, input_prompts: list[np.ndarray]) -> list[list[int]]:
    rendered = [session.prompt(prompt) for prompt in input_prompts]
    completions = generate(session.model, session.tokenizer, rendered, max_new_tokens=16)
    return [completion.tokens.tolist() for completion in completions]


def engine_texts(engine, input_prompts: list[np.ndarray], adapter: str | None = None) -> list[list[int]]:
    results = engine.generate_all([Request(p, adapter=adapter, max_new_tokens=16) for p in input_prompts])
    return [text.tokens.tolist() for text in results]


def assert_matches_transformers(session: OpenedRun, message: str | None = None) -> None:
    lines: list[str] = []
    expected = transformers_texts(session, PROMPTS)
    engine = open_engine(session, cache_bytes=1 << 22, log=lines.append)
    assert engine.session_adapter == (SESSION_ADAPTER if session.adapter and engine.has_base else None)
    cases = [(engine.session_adapter, p) for p in PROMPTS] + [(None, p) for p in PROMPTS]
    mixed = engine.generate_all([Request(p, adapter=name, max_new_tokens=16) for name, p in cases])
    outputs = [text.tokens.tolist() for text in mixed]
    assert outputs[: len(PROMPTS)] == expected
    if engine.has_base:
        with session.base():
            base_texts = transformers_texts(session, PROMPTS)
        assert outputs[len(PROMPTS) :] == base_texts and (base_texts != expected) == session.adapter
    assert bool(lines) == (message is not None) and (message is None or message in lines[0])
    engine.close()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_matches_transformers(method, model_folder, tmp_path):
    assert_matches_transformers(make_run(model_folder, tmp_path / "run", method))


def test_activated_adapter_applies_after_its_invocation(model_folder, tmp_path):
    config = LoRAConfig(rank=4, alpha=16, active="completion", invocation_tokens=INVOCATION)
    session = make_run(model_folder, tmp_path / "run", LoRA(config))
    invoked = [np.concatenate([p, INVOCATION, p[:2]]) for p in PROMPTS]
    engine = open_engine(session, cache_bytes=1 << 22, log=discard_log)
    outputs = engine_texts(engine, invoked, SESSION_ADAPTER)
    assert outputs == transformers_texts(session, invoked) and engine_texts(engine, invoked) != outputs
    assert engine_texts(engine, PROMPTS, SESSION_ADAPTER) == engine_texts(engine, PROMPTS), (
        "without the invocation, the output is the base model's"
    )

    prompt = np.concatenate([np.arange(40, 100), INVOCATION, [50]])
    engine.generate_all([Request(prompt, max_new_tokens=2)])
    for reused in (60, 63):  # first up to the invocation, then all tokens except the last
        assert next(iter(engine.submit(Request(prompt, adapter=SESSION_ADAPTER, max_new_tokens=2)))).reused == reused
    engine.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"dora": True}, "DoRA"), pytest.param({"train_modules": ["lm_head"]}, "lm_head", marks=pytest.mark.slow)],
)
def test_unsupported_adapters_are_decoded_by_transformers(changes, message, model_folder, tmp_path):
    session = make_run(model_folder, tmp_path / "run", LoRA(LoRAConfig(rank=4, alpha=16, **changes)))
    assert_matches_transformers(session, message)


@pytest.fixture(scope="module")
def bloom(tmp_path_factory) -> OpenedRun:
    model = causal_model("bloom")
    model.resize_token_embeddings(259)
    model.config.eos_token_id = model.generation_config.eos_token_id = 0
    return open_session(save_model(model, tmp_path_factory.mktemp("base") / "bloom"))


def test_unsupported_model_is_decoded_by_transformers(bloom):
    assert_matches_transformers(bloom, "its blocks are not recognized")


def test_transformers_engine_streams_stops_and_constrains(bloom):
    engine = open_engine(bloom, log=discard_log)
    prompt = encode_prompt("paint it", "auto", bloom.tokenizer)

    def make_request(count: int, **fields: object) -> Request:
        return Request(prompt, max_new_tokens=count, stop_ids=(), **fields)

    free = engine.submit(make_request(12, sampling=Sampling(logprobs=1)))
    chunks = list(free)
    full = free.result()
    assert len(chunks) >= 12 and "".join(p.text for p in chunks) == full.text
    assert [entry.token for entry in full.logprobs] == full.tokens.tolist()
    stop = full.text[3:5]
    stopped, short, late, empty = engine.generate_all(
        [make_request(12, stop=(stop,)), make_request(5), make_request(40, seconds=0.0), make_request(0)]
    )
    assert [text.finish for text in (stopped, short, late, empty)] == ["stop", "length", "timeout", "length"]
    assert stopped.text == full.text[: full.text.index(stop)] and short.tokens.tolist() == full.tokens[:5].tolist()
    with pytest.raises(UserError, match="prompt"):
        engine.submit(Request(prompt, prompt_logprobs=True))
    pytest.importorskip("llguidance", reason="constraints require llguidance")
    (constrained,) = engine.generate_all([Request(prompt, constraint=Constraint("regex", "(yes|no)"))])
    assert constrained.text in ("yes", "no")
    long = engine.submit(make_request(200))
    next(iter(long))
    long.cancel()
    assert long.result().finish == "cancelled"
    engine.close()


@pytest.fixture(scope="module")
def hybrid_folder(tmp_path_factory) -> Path:
    """Folder of a model with recurrent layers."""
    model = recurrent_model("lfm2", vocab_size=259)
    model.get_output_embeddings().weight.data.normal_(0, 1.0)
    model.config.eos_token_id = model.generation_config.eos_token_id = 0
    return save_model(model, tmp_path_factory.mktemp("base") / "lfm2")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_of_a_hybrid_model_matches_transformers(method, hybrid_folder, tmp_path):
    session = make_run(hybrid_folder, tmp_path / "run", method)
    assert_matches_transformers(session)
    assert "runs the model's own code" in open_engine(session, cache_bytes=1 << 22, log=discard_log).why


def test_activated_adapter_of_a_hybrid_model_applies_after_its_invocation(hybrid_folder, tmp_path):
    config = LoRAConfig(rank=4, alpha=16, active="completion", invocation_tokens=INVOCATION)
    session = make_run(hybrid_folder, tmp_path / "run", LoRA(config))
    prompt = np.concatenate([np.arange(40, 110), INVOCATION, [50]])
    engine = open_engine(session, cache_bytes=1 << 22, log=discard_log)
    base, adapted = (engine_texts(engine, [prompt], name) for name in (None, SESSION_ADAPTER))
    assert adapted == transformers_texts(session, [prompt]) != base
    chunk = next(iter(engine.submit(Request(prompt, adapter=SESSION_ADAPTER, max_new_tokens=2))))
    assert chunk.reused == 64
    engine.close()


def test_rollouts_of_a_hybrid_model_use_the_current_adapter(hybrid_folder, tmp_path):
    session = make_run(hybrid_folder, tmp_path / "run", "lora")
    sampler = SessionSampler(session)
    params = SamplingParams(16, logprobs=True)
    texts = []
    for _ in range(2):
        completions = sampler(PROMPTS, params)
        texts.append([completion.tokens.tolist() for completion in completions])
        assert texts[-1] == transformers_texts(session, PROMPTS)
        assert all(len(c.logprobs) == len(c.tokens) for c in completions)
        with torch.no_grad():
            for _, parameter in session.method.parameters(session.model):
                parameter += 0.3
    assert texts[0] != texts[1] and "transformers" not in sampler.why


@pytest.mark.parametrize("method", ["lora", "full", pytest.param("prompt", marks=pytest.mark.slow)])
def test_generator_follows_adapter_state_of_session(method, model_folder, tmp_path):
    session = make_run(model_folder, tmp_path / "run", method)
    generator = SessionGenerator(session, discard_log)

    def expected(inputs: list[np.ndarray]) -> list[tuple[object, ...]]:
        return fields(generate(session.model, session.tokenizer, inputs, max_new_tokens=8))

    def fields(completions: list[GeneratedCompletion]) -> list[tuple[object, ...]]:
        return [(each.text, each.tokens.tolist(), each.stopped, each.terminator) for each in completions]

    for _ in range(2):
        with session.base():
            bare = expected(PROMPTS)
            assert fields(generator(PROMPTS, 8, 4096, None)) == bare
            assert fields(verified_generator(session)(PROMPTS, 8, 64, None)) == bare
        inputs = [session.prompt(p) for p in PROMPTS]
        assert fields(generator(inputs, 8, 4096, None)) == expected(inputs) != bare
        verified = verified_generator(session)(inputs, 8, 64, None)
        assert (verified is None) if method == "full" else fields(verified) == expected(inputs)
