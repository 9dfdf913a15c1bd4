"""Texts of many adapters in one batch are each adapter's own, and none takes another's keys and values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from deltaw.errors import UserError
from deltaw.lora import LoRAConfig, adapter_parameters, attach, detach
from deltaw.serving.adapters import ActiveAdapter, AdapterFacts, FixedAdapters
from deltaw.serving.bank import Packer, packed_from_model
from deltaw.serving.decodable import Decodable, decodable
from deltaw.serving.request import Request
from tests.byte_models import tiny_gpt2, tiny_llama
from tests.serving.engines import SMALL_STEPS, greedy, over, prompts

RANKS = {"small": 2, "wide": 7, "larger": 16}
TARGETS = {"small": "all-linear", "wide": ["q_proj", "down_proj"], "larger": "all-linear"}


def adapted(model: PreTrainedModel, made: Decodable, name: str) -> ActiveAdapter:
    """An adapter that is put on the model, packed; it stays on."""
    rank, targets = RANKS[name], TARGETS[name]
    if type(model).__name__.startswith("GPT2") and name == "wide":
        targets = ["c_attn", "c_fc"]
    attach(model, LoRAConfig(rank=rank, alpha=2 * rank, target_modules=targets), seed=rank)
    generator = torch.Generator().manual_seed(rank)
    for _, factor in adapter_parameters(model):
        factor.data.normal_(0, 0.2, generator=generator)
    packed = packed_from_model(model, Packer(model, made))
    assert packed is not None and not isinstance(packed, str)
    return ActiveAdapter(rank, AdapterFacts(), packed)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_a_mixed_batch_gives_each_adapters_own_texts(make: type) -> None:
    model = make().requires_grad_(False)
    made = decodable(model)
    asked = prompts(5, seed=2)
    expected = {None: [greedy(model, p, 10) for p in asked]}
    adapters = {}
    for name in RANKS:
        adapters[name] = adapted(model, made, name)
        expected[name] = [greedy(model, p, 10) for p in asked]
        detach(model)
    assert len({str(texts) for texts in expected.values()}) == 4, "every adapter writes something else"
    engine = over(made, 64, limits=SMALL_STEPS, adapters=FixedAdapters(adapters))
    assert engine.adapters() == tuple(RANKS)
    order = [(name, n) for n in range(len(asked)) for name in expected]
    for _ in range(2):  # the second time prompts are taken over
        texts = engine.write_all([Request(asked[n], name, max_new_tokens=10) for name, n in order])
        assert [t.tokens.tolist() for t in texts] == [expected[name][n] for name, n in order]
    assert engine.load.reused > 0


def test_an_adapter_that_cannot_be_loaded_fails_its_own_requests_alone() -> None:
    class Failing(FixedAdapters):
        def facts(self, name: str) -> AdapterFacts:
            return AdapterFacts()

        def acquire(self, name: str) -> ActiveAdapter:
            raise UserError("its files are gone", where=name)

    model = tiny_llama().requires_grad_(False)
    engine = over(decodable(model), 16, adapters=Failing())
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
    engine = over(decodable(tiny_llama().requires_grad_(False)), 16, adapters=adapters)
    waits = engine.submit(Request(np.arange(3, 9), "slow", max_new_tokens=4))
    passes = engine.submit(Request(np.arange(3, 9), max_new_tokens=4))
    assert passes.result().finish == "length" and not waits.done
    adapters.ready = True
    assert waits.result().finish == "length"
    engine.close()
