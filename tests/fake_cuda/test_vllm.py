"""Generation with vLLM, which a stub replaces: adapters, seeds, log-probabilities, and reasons to use transformers."""

from __future__ import annotations

import contextlib
import itertools
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from deltaw.decoding.generation import SamplingParams
from deltaw.decoding.model import AdaptedModel
from deltaw.decoding.opening import SessionSampler, open_engine
from deltaw.decoding.request import Constraint, Request, Sampling
from deltaw.errors import UserError
from deltaw.inference.open_run import open_run
from deltaw.lora import LoRAConfig
from deltaw.methods.base import Method
from deltaw.methods.lora import LoRA
from deltaw.methods.prompt import SoftPrompt
from deltaw.methods.settings import PromptSettings
from deltaw.serving.http.opening import OpenOptions, open_served
from tests.fake_cuda import vllm_stub

PROMPTS = [np.random.default_rng(2).integers(3, 259, count) for count in (5, 12, 30)]
PARAMS = SamplingParams(12, 1.0, seeds=(1, 2, 3), logprobs=True)


@pytest.fixture
def vllm(monkeypatch):
    for name, module in vllm_stub.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(vllm_stub.LLM, "instances", [])
    return vllm_stub


def open_session(reference: Path, precision: str = "bf16", **options):
    return open_run(str(reference), precision=precision, device="cuda", log=lambda _: None, **options)


def change(session: AdaptedModel, seed: int, scale: float = 0.1) -> None:
    """Change the adapter's parameters, as a training step does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in session.method.parameters(session.model):
            parameter += scale * torch.randn(parameter.shape, generator=generator).to(parameter.device)


def attached(
    base: Path,
    precision: str = "bf16",
    method: Method | None = None,
    scale: float = 0.1,
    sampler: str = "auto",
    **config,
) -> AdaptedModel:
    session = open_session(base, precision, sampler=sampler)
    session.method = method or LoRA(LoRAConfig(**{"rank": 4, "alpha": 8, "target_modules": "all-linear"} | config))
    session.method.prepare(session.model, seed=0)
    change(session, 1, scale)
    return session


def save(session: AdaptedModel, folder: Path, base: Path) -> Path:
    folder.mkdir()
    session.method.save(session.model, folder, base_model=str(base))
    return folder


def model_logprobs(session: AdaptedModel, prompt: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    ids = torch.tensor([[*prompt, *tokens]]).cuda()
    with torch.no_grad():
        values = session.model(ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    return values.gather(-1, ids[0, len(prompt) :, None])[:, 0].cpu().numpy()


def tokens_of(completions) -> list[list[int]]:
    return [completion.tokens.tolist() for completion in completions]


@contextlib.contextmanager
def paused_before_step(engine, number: int) -> Iterator[None]:
    """Let the engine wait before its step of this number until the block ends, however fast the engine is."""
    step = engine.step
    numbers = itertools.count(1)
    resumed = threading.Event()

    def step_or_wait():
        if next(numbers) >= number:
            assert resumed.wait(60)
        return step()

    engine.step = step_or_wait
    try:
        yield
    finally:
        resumed.set()
        engine.step = step


def test_rollouts_use_the_current_adapter_with_reproducible_seeds(vllm, base):
    session = attached(base, sampler="vllm")
    sampler = SessionSampler(session)
    first = sampler(PROMPTS, PARAMS)
    assert sampler.why.startswith("vLLM: log-probabilities equal")
    assert tokens_of(sampler(PROMPTS, PARAMS)) == tokens_of(first)
    other_seeds = SamplingParams(12, 1.0, seeds=(4, 5, 2**64 - 1), logprobs=True)
    assert tokens_of(sampler(PROMPTS, other_seeds)) != tokens_of(first)
    change(session, 2)
    second = sampler(PROMPTS, PARAMS)
    assert tokens_of(second) != tokens_of(first)
    for prompt, completion in zip(PROMPTS, second, strict=True):
        expected = model_logprobs(session, prompt, completion.tokens)
        assert np.abs(completion.logprobs - expected).mean() < 0.1
    assert len(vllm.LLM.instances) == 1 and len(vllm.LLM.instances[0].llm_engine.list_loras()) == 1


def test_patterns_of_rank_and_alpha_are_applied(vllm, base):
    session = attached(base, rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 40}, rslora=True, sampler="vllm")
    sampler = SessionSampler(session)
    sampler(PROMPTS, PARAMS)
    assert sampler.why.startswith("vLLM:")


def test_engine_serves_the_adapter_and_the_base_model_with_all_request_parameters(vllm, base, tmp_path):
    session = open_session(save(attached(base), tmp_path / "adapter", base))
    with contextlib.closing(open_engine(session, log=pytest.fail)) as engine:
        adapted, plain = (Request(PROMPTS[0], name, max_new_tokens=20) for name in (engine.session_adapter, None))
        results = engine.generate_all([adapted, plain])
        assert results[0].tokens.tolist() != results[1].tokens.tolist()
        stop = results[1].text[4:6]
        sampling = Sampling(logprobs=3, logit_bias={7: 100.0})
        requests = [Request(PROMPTS[0], stop=(stop,), max_new_tokens=20), Request(PROMPTS[0], None, sampling)]
        requests.append(Request(PROMPTS[0], stop_ids=(int(results[1].tokens[3]),)))
        stopped, biased, terminated = engine.generate_all(requests)
        assert stopped.text == results[1].text.split(stop)[0] and stopped.finish == "stop"
        assert all(len(token.top) == 3 and token.top[0][1] >= token.top[1][1] for token in biased.logprobs)
        assert terminated.terminator == results[1].tokens[3] and len(terminated.tokens) < 4
        chunks = list(engine.submit(plain))
        assert len(chunks) >= 20 and "".join(chunk.text for chunk in chunks) == results[1].text
        with paused_before_step(vllm.LLM.instances[0].llm_engine, 2):
            handle = engine.submit(Request(PROMPTS[0], max_new_tokens=90))
            next(iter(handle))
            handle.cancel()
        assert handle.result().finish == "cancelled" and len(handle.result().tokens) < 90
        for request in (
            Request(PROMPTS[0], None, Sampling(3.0)),
            Request(PROMPTS[0], constraint=Constraint("regex", "a")),
        ):
            with pytest.raises(UserError, match="vLLM"):
                engine.generate_all([request])
        assert not vllm.LLM.instances[0].llm_engine.requests


def test_server_batches_several_adapters(vllm, base, tmp_path):
    folders = {}
    for number in (1, 2):
        session = attached(base)
        change(session, number)
        folders[f"adapter-{number}"] = save(session, tmp_path / str(number), base)
    lines: list[str] = []
    served = open_served(str(base), folders, OpenOptions(device="cuda", precision="bf16"), log=lines.append)
    with contextlib.closing(served.engine):
        names = (None, *folders)
        together = served.engine.generate_all([Request(PROMPTS[1], name, max_new_tokens=12) for name in names])
        texts = [result.tokens.tolist() for result in together]
        assert texts[0] != texts[1] != texts[2] != texts[0]
        for name, text in zip(names, texts, strict=True):
            alone = served.engine.generate_all([Request(PROMPTS[1], name, max_new_tokens=12)])
            assert alone[0].tokens.tolist() == text
        assert served.adapters() == tuple(folders) and any("vLLM" in line for line in lines)
        stub = vllm.LLM.instances[0].llm_engine
        assert stub.max_concurrent == 3
        count = len(stub.prefixes)
        served.engine.generate_all([Request(PROMPTS[1], max_new_tokens=4)])
        assert len(stub.prefixes) == count
        served.engine.generate_all([Request(PROMPTS[1], max_new_tokens=4, owner=2)])
        assert len(stub.prefixes) == count + 4


def fallback_reason(session: AdaptedModel) -> str:
    lines: list[str] = []
    with contextlib.closing(open_engine(session, log=lines.append)) as engine:
        result = engine.generate_all([Request(PROMPTS[0], engine.session_adapter, max_new_tokens=3)])
    assert len(result[0].tokens) == 3 and len(lines) == 1
    return lines[0]


UNSUPPORTED = {
    "DoRA": lambda base: attached(base, dora=True),
    "modules trained in full": lambda base: attached(base, train_modules=["norm"]),
    "bf16 or fp16": lambda base: attached(base, "fp32"),
    "embeddings and heads": lambda base: attached(base, target_modules=["lm_head", "q_proj"]),
    "method lora": lambda base: attached(base, method=SoftPrompt(PromptSettings(length=3))),
    "only CPUs": lambda base: open_session(base, sampler="transformers"),
}


@pytest.mark.parametrize("reason", UNSUPPORTED)
def test_unsupported_adapters_use_transformers_with_a_message(reason, vllm, base):
    message = fallback_reason(UNSUPPORTED[reason](base))
    assert message.startswith("transformers decodes: ") and reason in message
    assert not vllm.LLM.instances


def test_wrong_log_probabilities_disable_vllm(vllm, base, monkeypatch):
    monkeypatch.setattr(
        vllm_stub.LLMEngine, "add_lora", lambda self, request: self._adapted.update({request.lora_int_id: self._base})
    )
    session = attached(base)
    assert "log-probabilities differ from the model's by" in fallback_reason(session)


# Standard deviation of the parameters' values. The effect of the first is below the tolerance of log-probabilities.
@pytest.mark.parametrize("scale, ignored", [(0.003, ""), (0.003, ".lora_B"), (0.1, "mlp")])
def test_ignored_part_of_a_weak_adapter_is_an_error(scale, ignored, vllm, base, monkeypatch):
    def add_lora(self, request, original=vllm_stub.LLMEngine.add_lora):
        file = Path(request.lora_path) / "adapter_model.safetensors"
        tensors = {k: t * (not ignored or ignored not in k) for k, t in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})
        return original(self, request)

    monkeypatch.setattr(vllm_stub.LLMEngine, "add_lora", add_lora)
    session = attached(base, scale=scale, sampler="vllm")
    sampler = SessionSampler(session)
    if not ignored:
        sampler(PROMPTS, PARAMS)
        assert sampler.why.startswith("vLLM:")
        return
    with pytest.raises(UserError, match="vLLM does not generate"):
        sampler(PROMPTS, PARAMS)


def test_rollouts_use_vllm_only_on_request(vllm, base):
    sampler = SessionSampler(attached(base, sampler="auto"))
    sampler(PROMPTS, PARAMS)
    assert not sampler.why.startswith("vLLM") and not vllm.LLM.instances


def test_missing_vllm_is_reported(base):
    assert "vllm" not in sys.modules
    assert fallback_reason(open_session(base)) == "transformers decodes: vLLM is not installed (pip install vllm)"
    with pytest.raises(UserError, match="vLLM does not generate: vLLM is not installed"):
        open_engine(open_session(base, sampler="vllm"), log=pytest.fail)
