"""A batch whose rows have different adapters, or none, gives each row what it gets alone."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import peft
import pytest
import torch

from deltaw.kernels import loader
from deltaw.lora import load_adapter
from deltaw.runtime.quantized_weights import quantize_int8
from deltaw.serving.bank import Packer, packed_from_model
from deltaw.serving.decodable import decodable, tolerance
from tests.runtime.families import VOCABULARY, model_of
from tests.serving.adapter_folders import write_lora
from tests.serving.mixed_rows import Rows, bank_over, drawn_prompts, last_logits, packed_of, written

ROWS, ADAPTERS, STEPS = 24, 8, 2
# Sums of fp32 numbers in another order, over three blocks.
TOLERANCE = 1e-5


def off(ours: torch.Tensor, own: torch.Tensor) -> float:
    return float((ours - own).norm() / own.norm())


def drawn_settings(seed: int) -> dict:
    """Another rank, scaling and choice of layers for each adapter."""
    draw = np.random.default_rng(seed)
    settings = {"rank": int(draw.integers(4, 65)), "alpha": float(draw.uniform(2, 16)), "size": 0.05}
    settings["rslora"] = bool(draw.integers(2))
    if draw.integers(2):
        settings["layers"] = ["0", "1-", "0-1"][draw.integers(3)]
    settings["target_modules"] = ["all-linear", "attention", "mlp"][draw.integers(3)]
    return settings


def families(quick: str, slow: str) -> list:
    return [*quick.split(), *(pytest.param(name, marks=pytest.mark.slow) for name in slow.split())]


@pytest.fixture(scope="module", params=families("Llama GPT2 Phi3", "Qwen3 Gemma GPTNeoX"))
def served(request, tmp_path_factory):
    """A model with its decoder, the packed adapters of a bank, and where they were saved."""
    model, root = model_of(request.param), tmp_path_factory.mktemp("adapters")
    made = decodable(model)
    folders = [write_lora(model, root / str(n), seed=n, **drawn_settings(n)) for n in range(ADAPTERS)]
    return model, made, packed_of(bank_over(model, made, *folders)), folders


def carrying(model, folder):
    """A copy of a model with an adapter on it."""
    carrier = copy.deepcopy(model)
    load_adapter(carrier, folder)
    return carrier


def test_mixed_rows_equal_rows_alone_and_the_models_own(served):
    model, made, packed, folders = served
    which = np.random.default_rng(0).integers(-1, ADAPTERS, ROWS)
    assert -1 in which
    prompts = drawn_prompts(ROWS, VOCABULARY)
    mixed, texts = written(Rows(made, packed, which), prompts, STEPS)
    for number in range(0, ROWS, 5):
        own = [] if which[number] < 0 else [packed[which[number]]]
        alone, text = written(Rows(made, own, [len(own) - 1]), prompts[number : number + 1], STEPS)
        assert off(alone[:, 0], mixed[:, number]) < TOLERANCE
        # The compiled step sums each row by itself; torch's products depend on how many rows there are.
        assert loader.library() is None or torch.equal(alone[:, 0], mixed[:, number])
        assert np.array_equal(text[0], texts[number])
    for adapter in sorted({int(w) for w in which}):
        carrier = model if adapter < 0 else carrying(model, folders[adapter])
        for number in np.flatnonzero(which == adapter)[:2]:
            assert off(mixed[:, number], last_logits(carrier, texts[number], STEPS + 1)) < TOLERANCE
    logits = Rows(made, packed, range(-1, ADAPTERS)).step(drawn_prompts(1, VOCABULARY) * (ADAPTERS + 1))
    assert min(off(row, logits[0]) for row in logits[1:]) > 100 * TOLERANCE, "each adapter changes what is written"


def packer_on(carrier, model, made) -> Packer:
    """Packs for the decoder of ``model`` what is on a copy of it."""
    names = {id(module): name for name, module in model.named_modules()}
    blocks = tuple(carrier.get_submodule(names[id(block)]) for block in made.blocks)
    return Packer(carrier, dataclasses.replace(made, blocks=blocks))


def test_an_adapter_that_is_on_the_model_packs_the_same_or_says_why_not(served, tmp_path):
    model, made, packed, folders = served
    carrier = carrying(model, folders[0])
    live = packed_from_model(carrier, packer_on(carrier, model, made))
    own, of_bank = (Rows(made, [one], [0]).step(drawn_prompts(1, VOCABULARY)) for one in (live, packed[0]))
    assert torch.equal(own, of_bank)
    assert packed_from_model(model, Packer(model, made)) is None
    carrier = carrying(model, write_lora(model, tmp_path, target_modules="attention", train_modules=["lm_head"]))
    reason = packed_from_model(carrier, packer_on(carrier, model, made))
    assert isinstance(reason, str) and "lm_head" in reason


@pytest.mark.each_value
@pytest.mark.parametrize("family", ["Llama", "GPT2"])
@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_weights_of_other_precisions_take_adapters_too(family, precision, tmp_path):
    model = model_of(family, torch.bfloat16 if precision == "bf16" else torch.float32)
    folder = write_lora(model, tmp_path, rank=5, size=0.2)
    if precision == "int8":
        quantize_int8(model.base_model)
    made = decodable(model)
    which = [0, -1, 0, 0, -1, 0]
    prompts = drawn_prompts(len(which), VOCABULARY)
    logits = Rows(made, packed_of(bank_over(model, made, folder)), which).step(prompts)
    exact = [carrying(model, folder), model]
    if precision == "bf16":  # the model's own sums in bf16 are as far from those of fp32 as ours
        exact = [copy.deepcopy(m).float() for m in exact]
    for ours, prompt, adapter in zip(logits, prompts, which, strict=True):
        own, base = (last_logits(m, prompt)[0] for m in exact)
        expected, other = (base, own) if adapter < 0 else (own, base)
        assert off(ours, expected) < tolerance(model) < off(ours, other)


def test_logits_equal_pefts_with_the_head_adapted_too(tmp_path):
    model = model_of("Llama")
    made = decodable(model)
    config = peft.LoraConfig(
        r=6, lora_alpha=9, target_modules=["q_proj", "v_proj", "down_proj", "lm_head"], task_type="CAUSAL_LM",
        rank_pattern={"v_proj": 11}, alpha_pattern={"lm_head": 3}, init_lora_weights=False,
    )  # fmt: skip
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    theirs.save_pretrained(tmp_path)
    prompt = drawn_prompts(1, VOCABULARY)
    (logits,) = Rows(made, packed_of(bank_over(model, made, tmp_path)), [0]).step(prompt)
    own, base = (last_logits(one, prompt[0])[0] for one in (theirs, model))
    assert off(logits, own) < TOLERANCE < off(base, own)
