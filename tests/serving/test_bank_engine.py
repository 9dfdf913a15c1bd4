"""Requests with different adapters run together and write what each adapter writes on its own model; one whose
adapter is late or lost holds up nobody."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedModel

from deltaw.errors import UserError
from deltaw.methods.base import Method
from deltaw.methods.files import method_of_folder
from deltaw.serving.adapters import ActiveAdapter, AdapterFacts, FixedAdapters
from deltaw.serving.bank import AdapterBank, Packer
from deltaw.serving.request import Request
from tests.serving.adapter_folders import write_lora, write_soft_prompt
from tests.serving.engines import greedy, llama, over, prompts, tokenizer

INVOCATION = [1, 40]
NEW = 10


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Plain adapters, a soft prompt, and an activated adapter."""
    model, root = llama()[0], tmp_path_factory.mktemp("adapters")
    activated = {"activation": "completion", "invocation_tokens": INVOCATION}
    return {
        "narrow": write_lora(model, root / "narrow", rank=4, seed=1),
        "wide": write_lora(model, root / "wide", rank=33, rslora=True, target_modules="attention", seed=2),
        "soft": write_soft_prompt(model, root / "soft", length=5),
        "activated": write_lora(model, root / "activated", seed=3, **activated),
    }


def bank_over(folders: dict[str, Path], budget: int = 1 << 30) -> AdapterBank:
    model, made = llama()
    bank = AdapterBank(model, tokenizer(), Packer(model, made), budget_bytes=budget)
    for name, folder in folders.items():
        bank.add(name, folder)
    return bank


@functools.cache
def carrier(folder: Path) -> tuple[PreTrainedModel, Method]:
    """The model with an adapter on it."""
    model = copy.deepcopy(llama()[0])
    method = method_of_folder(folder, tokenizer())
    method.load(model, folder)
    return model, method


def alone(folder: Path | None, prompt: np.ndarray) -> list[int]:
    """What transformers writes with this adapter on a model of its own."""
    if folder is None:
        return greedy(llama()[0], prompt, NEW)
    model, method = carrier(folder)
    return greedy(model, method.with_virtual_tokens(prompt), NEW)


def asked(seed: int = 0) -> list[np.ndarray]:
    """Prompts of which half have the invocation sequence; many begin alike."""
    begin = np.arange(3, 60)
    drawn = [np.concatenate([begin, p]) for p in prompts(10, 20, seed=seed)]
    return [np.concatenate([p, INVOCATION]) if n % 2 else p for n, p in enumerate(drawn)]


def test_together_they_write_what_each_writes_alone(folders):
    bank = bank_over(folders)
    engine = over(llama()[1], 64, adapters=bank)
    requests = [Request(p, name, max_new_tokens=NEW, stop_ids=()) for p in asked()[:4] for name in (None, *folders)]
    texts = [text.tokens.tolist() for text in engine.write_all(requests)]
    for request, text in zip(requests, texts, strict=True):
        folder = None if request.adapter is None else folders[request.adapter]
        assert text == alone(folder, request.tokens), request.adapter
    again = engine.write_all(requests)  # prompts are taken over
    assert [text.tokens.tolist() for text in again] == texts and engine.load.reused > 0
    of_base = texts[:: len(folders) + 1]
    for number in range(len(folders)):
        assert texts[number + 1 :: len(folders) + 1] != of_base, "each adapter changes something"
    engine.close()


def test_adapters_that_leave_memory_come_back_for_their_requests(folders):
    plain = {name: folders[name] for name in ("narrow", "wide")}
    sizes = []
    for name in plain:
        bank = bank_over({name: plain[name]})
        sizes.append(bank.status().bytes)
    bank = bank_over(plain, budget=max(sizes))
    engine = over(llama()[1], 64, adapters=bank)
    requests = [Request(p, name, max_new_tokens=NEW, stop_ids=()) for p in asked()[:4] for name in plain]
    for request, text in zip(requests, engine.write_all(requests), strict=True):
        assert request.adapter is not None
        assert text.tokens.tolist() == alone(plain[request.adapter], request.tokens)
    assert bank.status().dropped > 0
    engine.close()


def test_a_swapped_adapter_never_meets_keys_of_the_one_before(folders, tmp_path):
    other = write_lora(llama()[0], tmp_path, seed=9)
    bank = bank_over({"x": folders["narrow"]})
    engine = over(llama()[1], 64, adapters=bank)
    prompt = asked()[0]
    for folder in (folders["narrow"], other, folders["narrow"], folders["soft"]):
        bank.swap("x", folder)
        pieces = list(engine.submit(Request(prompt, "x", max_new_tokens=NEW, stop_ids=())))
        written = [token for piece in pieces for token in piece.tokens]
        assert written == alone(folder, prompt)
        assert all(piece.reused == 0 for piece in pieces), "nothing is kept under the new version yet"
    (again,) = engine.write_all([Request(prompt, "x", max_new_tokens=NEW, stop_ids=())])
    assert again.tokens.tolist() == alone(folders["soft"], prompt)
    engine.close()


def test_an_activated_adapter_shares_the_bases_keys(folders):
    bank = bank_over({"activated": folders["activated"]})
    engine = over(llama()[1], 64, adapters=bank)
    prompt = asked()[1]
    engine.write_all([Request(prompt, max_new_tokens=2, stop_ids=())])
    pieces = list(engine.submit(Request(prompt, "activated", max_new_tokens=NEW, stop_ids=())))
    assert pieces[0].reused == len(prompt) - len(INVOCATION)
    written = [token for piece in pieces for token in piece.tokens]
    assert written == alone(folders["activated"], prompt)
    engine.close()


def test_an_adapter_ends_its_texts_with_its_own_terminators(folders, tmp_path):
    folder = write_lora(llama()[0], tmp_path, seed=1, rank=4)
    prompt = asked()[0]
    written = alone(folder, prompt)
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {written[3]}}}')
    bank = bank_over({"own": folder})
    engine = over(llama()[1], 64, adapters=bank)
    (text,) = engine.write_all([Request(prompt, "own", max_new_tokens=NEW)])
    assert text.terminator == written[3] and text.tokens.tolist() == written[: written.index(written[3])]
    engine.close()


def test_a_removed_adapter_is_refused_and_one_in_hand_is_written_to_its_end(folders):
    bank = bank_over({"x": folders["narrow"]})
    engine = over(llama()[1], 64, adapters=bank)
    prompt = asked()[0]
    writing = engine.submit(Request(prompt, "x", max_new_tokens=NEW, stop_ids=()))
    pieces = iter(writing)
    first = next(pieces)
    bank.remove("x")
    with pytest.raises(UserError, match="no adapter 'x'"):
        engine.submit(Request(prompt, "x"))
    written = [*first.tokens, *(token for piece in pieces for token in piece.tokens)]
    assert written == alone(folders["narrow"], prompt)
    engine.close()


def test_an_adapter_that_cannot_be_loaded_fails_its_own_requests_alone() -> None:
    class Failing(FixedAdapters):
        def facts(self, name: str) -> AdapterFacts:
            return AdapterFacts()

        def acquire(self, name: str) -> ActiveAdapter:
            raise UserError("its files are gone", where=name)

    model, made = llama()
    engine = over(made, 16, adapters=Failing())
    lost = engine.submit(Request(np.arange(3, 9), "lost", max_new_tokens=4))
    kept = engine.submit(Request(np.arange(3, 9), max_new_tokens=4))
    with pytest.raises(UserError, match="files are gone"):
        lost.result()
    assert kept.result().tokens.tolist() == greedy(model, np.arange(3, 9), 4)
    engine.close()


def test_requests_whose_adapter_is_being_loaded_let_others_pass() -> None:
    class Slow(FixedAdapters):
        ready = False

        def facts(self, name: str) -> AdapterFacts:
            return AdapterFacts()

        def acquire(self, name: str) -> ActiveAdapter | None:  # type: ignore[override]
            return ActiveAdapter(1, AdapterFacts()) if self.ready else None

    adapters = Slow()
    engine = over(llama()[1], 16, adapters=adapters)
    waits = engine.submit(Request(np.arange(3, 9), "slow", max_new_tokens=4))
    passes = engine.submit(Request(np.arange(3, 9), max_new_tokens=4))
    assert passes.result().finish == "length" and not waits.done
    adapters.ready = True
    assert waits.result().finish == "length"
    engine.close()
