"""Tests of an engine with several adapters: each request matches its adapter's model, and slow loads block no other
request.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedModel

from deltaw.decoding.adapters import ActiveAdapter, AdapterInfo, FixedAdapters
from deltaw.decoding.attached_adapter import Packer
from deltaw.decoding.bank import AdapterBank
from deltaw.decoding.request import Request
from deltaw.errors import UserError
from deltaw.methods.base import Method
from deltaw.methods.files import method_from_folder
from tests.serving.adapter_folders import write_lora, write_soft_prompt
from tests.serving.engines import greedy, llama, make_engine, prompts, tokenizer, truncate_at

INVOCATION = [1, 40]
NEW = 10
SHORT = np.arange(3, 9)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """LoRA adapters, a soft prompt and an activated adapter."""
    model = llama()[0]
    root = tmp_path_factory.mktemp("adapters")
    activated = {"active": "completion", "invocation_tokens": INVOCATION}
    return {
        "narrow": write_lora(model, root / "narrow", rank=4, seed=1),
        "wide": write_lora(model, root / "wide", rank=33, rslora=True, target_modules="attention", seed=2),
        "soft": write_soft_prompt(model, root / "soft", length=5),
        "activated": write_lora(model, root / "activated", seed=3, **activated),
    }


def serve_adapters(budget: int = 1 << 30, **folders: Path):
    """Return a bank with these adapters and an engine that uses it."""
    model, decoder = llama()
    bank = AdapterBank(model, tokenizer(), Packer(model, decoder), budget_bytes=budget)
    for name, folder in folders.items():
        bank.add(name, folder)
    return bank, make_engine(decoder, 64, adapters=bank)


@functools.cache
def adapted_model(folder: Path) -> tuple[PreTrainedModel, Method]:
    """Return a copy of the model with an adapter."""
    model = copy.deepcopy(llama()[0])
    method = method_from_folder(folder, tokenizer())
    method.load(model, folder)
    return model, method


def reference_tokens(folder: Path | None, prompt: np.ndarray) -> list[int]:
    """Return transformers' greedy completion with this adapter."""
    if folder is None:
        return greedy(llama()[0], prompt, NEW)
    model, method = adapted_model(folder)
    return greedy(model, method.with_virtual_tokens(prompt), NEW)


def mixed_prompts(seed: int = 0) -> list[np.ndarray]:
    """Return prompts with shared prefixes, half of which contain the invocation sequence."""
    prefixed = [np.concatenate([np.arange(3, 60), p]) for p in prompts(4, 20, seed=seed)]
    return [np.concatenate([p, INVOCATION]) if n % 2 else p for n, p in enumerate(prefixed)]


def requests_for_all(names) -> list[Request]:
    return [Request(p, name, max_new_tokens=NEW, stop_ids=()) for p in mixed_prompts() for name in names]


def generate_one(engine, name: str, prompt: np.ndarray) -> tuple[list[int], list[int]]:
    """Return the tokens of a completion and the number of reused tokens per chunk."""
    chunks = list(engine.submit(Request(prompt, name, max_new_tokens=NEW, stop_ids=())))
    return [token for chunk in chunks for token in chunk.tokens], [chunk.reused for chunk in chunks]


def test_batched_adapters_match_separate_models(folders):
    _, engine = serve_adapters(**folders)
    requests = requests_for_all((None, *folders))
    texts = [text.tokens.tolist() for text in engine.generate_all(requests)]
    assert texts == [reference_tokens(folders.get(request.adapter), request.tokens) for request in requests]
    repeated = engine.generate_all(requests)  # with the prompts in the prefix cache
    assert [text.tokens.tolist() for text in repeated] == texts and engine.load.reused > 0
    base_texts, *adapted = (texts[number :: len(folders) + 1] for number in range(len(folders) + 1))
    assert base_texts not in adapted, "each adapter must change the output"


def test_evicted_adapters_are_reloaded_for_requests(folders):
    plain = {name: folders[name] for name in ("narrow", "wide")}
    budget = max(serve_adapters(x=folder)[0].status().bytes for folder in plain.values())
    bank, engine = serve_adapters(budget, **plain)
    requests = requests_for_all(plain)
    for request, text in zip(requests, engine.generate_all(requests), strict=True):
        assert text.tokens.tolist() == reference_tokens(plain[request.adapter], request.tokens)
    assert bank.status().dropped > 0


def test_swapped_adapter_does_not_reuse_cached_keys(folders, tmp_path):
    other = write_lora(llama()[0], tmp_path / "lora", seed=9)
    soft = write_soft_prompt(llama()[0], tmp_path / "soft", seed=1, length=5)
    bank, engine = serve_adapters(x=folders["narrow"])
    prompt = mixed_prompts()[0]
    for folder in (folders["narrow"], other, folders["narrow"], soft, folders["soft"]):
        bank.swap("x", folder)
        tokens, reused = generate_one(engine, "x", prompt)
        assert tokens == reference_tokens(folder, prompt)
        assert not any(reused), "the new version must not reuse cached keys"
    assert generate_one(engine, "x", prompt)[0] == reference_tokens(folders["soft"], prompt)


def test_activated_adapter_reuses_base_keys(folders):
    _, engine = serve_adapters(activated=folders["activated"])
    prompt = mixed_prompts()[1]
    engine.generate_all([Request(prompt, max_new_tokens=2, stop_ids=())])
    tokens, reused = generate_one(engine, "activated", prompt)
    assert reused[0] == len(prompt) - len(INVOCATION) and tokens == reference_tokens(folders["activated"], prompt)


def test_adapter_terminators_end_its_completions(tmp_path):
    folder = write_lora(llama()[0], tmp_path, seed=1, rank=4)
    prompt = mixed_prompts()[0]
    tokens = reference_tokens(folder, prompt)
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {tokens[3]}}}')
    (text,) = serve_adapters(tuned=folder)[1].generate_all([Request(prompt, "tuned", max_new_tokens=NEW)])
    assert text.terminator == tokens[3] and text.tokens.tolist() == truncate_at(tokens, tokens[3:4])


def test_removed_adapter_finishes_running_requests_and_rejects_new_ones(folders):
    bank, engine = serve_adapters(x=folders["narrow"])
    prompt = mixed_prompts()[0]
    generation = engine.submit(Request(prompt, "x", max_new_tokens=NEW, stop_ids=()))
    next(iter(generation))
    bank.remove("x")
    with pytest.raises(UserError, match="no adapter 'x'"):
        engine.submit(Request(prompt, "x"))
    assert generation.result().tokens.tolist() == reference_tokens(folders["narrow"], prompt)


class ControlledAdapters(FixedAdapters):
    """Adapter whose availability or failure is set by a test."""

    error: UserError | None = None
    ready = False

    def info(self, name: str) -> AdapterInfo:
        return AdapterInfo()

    def acquire(self, name: str) -> ActiveAdapter | None:  # type: ignore[override]
        if self.error:
            raise self.error
        return ActiveAdapter(1, AdapterInfo()) if self.ready else None


def test_failed_or_slow_adapter_load_affects_only_its_requests():
    adapters = ControlledAdapters()
    engine = make_engine(llama()[1], 16, adapters=adapters)
    delayed, immediate = (engine.submit(Request(SHORT, name, max_new_tokens=4)) for name in ("slow", None))
    assert immediate.result().tokens.tolist() == greedy(llama()[0], SHORT, 4) and not delayed.done
    adapters.ready = True
    assert delayed.result().finish == "length"
    adapters.error = UserError("its files are missing")
    failed, unaffected = (engine.submit(Request(SHORT, name, max_new_tokens=4)) for name in ("lost", None))
    with pytest.raises(UserError, match="files are missing"):
        failed.result()
    assert unaffected.result().tokens.tolist() == immediate.result().tokens.tolist()
