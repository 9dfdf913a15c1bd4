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
from tests.serving.engines import before, greedy, llama, over, prompts, tokenizer

INVOCATION = [1, 40]
NEW = 10
SHORT = np.arange(3, 9)


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


def serving(budget: int = 1 << 30, **folders: Path):
    """A bank of these adapters, and an engine that serves them."""
    model, made = llama()
    bank = AdapterBank(model, tokenizer(), Packer(model, made), budget_bytes=budget)
    for name, folder in folders.items():
        bank.add(name, folder)
    return bank, over(made, 64, adapters=bank)


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
    drawn = [np.concatenate([np.arange(3, 60), p]) for p in prompts(4, 20, seed=seed)]
    return [np.concatenate([p, INVOCATION]) if n % 2 else p for n, p in enumerate(drawn)]


def for_all(names) -> list[Request]:
    return [Request(p, name, max_new_tokens=NEW, stop_ids=()) for p in asked() for name in names]


def wrote(engine, name: str, prompt: np.ndarray) -> tuple[list[int], list[int]]:
    """The tokens of a text, and how many tokens each piece took over."""
    pieces = list(engine.submit(Request(prompt, name, max_new_tokens=NEW, stop_ids=())))
    return [token for piece in pieces for token in piece.tokens], [piece.reused for piece in pieces]


def test_together_they_write_what_each_writes_alone(folders):
    _, engine = serving(**folders)
    requests = for_all((None, *folders))
    texts = [text.tokens.tolist() for text in engine.write_all(requests)]
    assert texts == [alone(folders.get(request.adapter), request.tokens) for request in requests]
    again = engine.write_all(requests)  # prompts are taken over
    assert [text.tokens.tolist() for text in again] == texts and engine.load.reused > 0
    of_base, *adapted = (texts[number :: len(folders) + 1] for number in range(len(folders) + 1))
    assert of_base not in adapted, "each adapter changes something"


def test_adapters_that_leave_memory_come_back_for_their_requests(folders):
    plain = {name: folders[name] for name in ("narrow", "wide")}
    room = max(serving(x=folder)[0].status().bytes for folder in plain.values())
    bank, engine = serving(room, **plain)
    requests = for_all(plain)
    for request, text in zip(requests, engine.write_all(requests), strict=True):
        assert text.tokens.tolist() == alone(plain[request.adapter], request.tokens)
    assert bank.status().dropped > 0


def test_a_swapped_adapter_never_meets_keys_of_the_one_before(folders, tmp_path):
    other = write_lora(llama()[0], tmp_path / "lora", seed=9)
    soft = write_soft_prompt(llama()[0], tmp_path / "soft", seed=1, length=5)
    bank, engine = serving(x=folders["narrow"])
    prompt = asked()[0]
    for folder in (folders["narrow"], other, folders["narrow"], soft, folders["soft"]):
        bank.swap("x", folder)
        written, reused = wrote(engine, "x", prompt)
        assert written == alone(folder, prompt)
        assert not any(reused), "nothing is kept under the new version yet"
    assert wrote(engine, "x", prompt)[0] == alone(folders["soft"], prompt)


def test_an_activated_adapter_shares_the_bases_keys(folders):
    _, engine = serving(activated=folders["activated"])
    prompt = asked()[1]
    engine.write_all([Request(prompt, max_new_tokens=2, stop_ids=())])
    written, reused = wrote(engine, "activated", prompt)
    assert reused[0] == len(prompt) - len(INVOCATION) and written == alone(folders["activated"], prompt)


def test_an_adapter_ends_its_texts_with_its_own_terminators(tmp_path):
    folder = write_lora(llama()[0], tmp_path, seed=1, rank=4)
    prompt = asked()[0]
    written = alone(folder, prompt)
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {written[3]}}}')
    (text,) = serving(own=folder)[1].write_all([Request(prompt, "own", max_new_tokens=NEW)])
    assert text.terminator == written[3] and text.tokens.tolist() == before(written, written[3:4])


def test_a_removed_adapter_is_refused_and_one_in_hand_is_written_to_its_end(folders):
    bank, engine = serving(x=folders["narrow"])
    prompt = asked()[0]
    writing = engine.submit(Request(prompt, "x", max_new_tokens=NEW, stop_ids=()))
    next(iter(writing))
    bank.remove("x")
    with pytest.raises(UserError, match="no adapter 'x'"):
        engine.submit(Request(prompt, "x"))
    assert writing.result().tokens.tolist() == alone(folders["narrow"], prompt)


class Told(FixedAdapters):
    """An adapter that is there when a test says so, or fails."""

    error: UserError | None = None
    ready = False

    def facts(self, name: str) -> AdapterFacts:
        return AdapterFacts()

    def acquire(self, name: str) -> ActiveAdapter | None:  # type: ignore[override]
        if self.error:
            raise self.error
        return ActiveAdapter(1, AdapterFacts()) if self.ready else None


def test_an_adapter_that_cannot_be_loaded_fails_its_own_requests_alone_and_one_that_is_late_lets_others_pass():
    adapters = Told()
    engine = over(llama()[1], 16, adapters=adapters)
    waits, passes = (engine.submit(Request(SHORT, name, max_new_tokens=4)) for name in ("slow", None))
    assert passes.result().tokens.tolist() == greedy(llama()[0], SHORT, 4) and not waits.done
    adapters.ready = True
    assert waits.result().finish == "length"
    adapters.error = UserError("its files are gone")
    lost, kept = (engine.submit(Request(SHORT, name, max_new_tokens=4)) for name in ("lost", None))
    with pytest.raises(UserError, match="files are gone"):
        lost.result()
    assert kept.result().tokens.tolist() == passes.result().tokens.tolist()
