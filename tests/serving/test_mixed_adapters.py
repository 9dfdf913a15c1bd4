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
from deltaw.serving.bank import AdapterBank, Packer, packed_from_model
from deltaw.serving.decodable import decodable, tolerance
from tests.runtime.families import VOCABULARY, model_of
from tests.serving.adapter_folders import write_lora
from tests.serving.mixed_rows import Rows, drawn_prompts, written

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
    """A model with its decoder, a bank of adapters with all in use, and where they were saved."""
    model = model_of(request.param)
    made = decodable(model)
    bank = AdapterBank(model, None, Packer(model, made), budget_bytes=1 << 30)
    root = tmp_path_factory.mktemp("adapters")
    folders = []
    for seed in range(ADAPTERS):
        folders.append(write_lora(model, root / str(seed), seed=seed, **drawn_settings(seed)))
        bank.add(str(seed), folders[-1])
    return model, made, bank, folders


def test_mixed_rows_equal_rows_alone_and_the_models_own(served):
    model, made, bank, folders = served
    packed = [bank.acquire(name).packed for name in bank.names()]
    which = np.random.default_rng(0).integers(-1, ADAPTERS, ROWS)
    prompts = drawn_prompts(ROWS, VOCABULARY)
    mixed, texts = written(Rows(made, packed, which), prompts, STEPS)
    for number in range(0, ROWS, 5):
        own = [] if which[number] < 0 else [packed[which[number]]]
        alone, text = written(Rows(made, own, [len(own) - 1]), prompts[number : number + 1], STEPS)
        assert off(alone[:, 0], mixed[:, number]) < TOLERANCE
        # The compiled step sums each row by itself; torch's products depend on how many rows there are.
        assert loader.library() is None or torch.equal(alone[:, 0], mixed[:, number])
        assert np.array_equal(text[0], texts[number])
    base = None
    for adapter in sorted({int(w) for w in which}):
        carrier = model if adapter < 0 else copy.deepcopy(model)
        if adapter >= 0:
            load_adapter(carrier, folders[adapter])
        for number in np.flatnonzero(which == adapter)[:2]:
            with torch.no_grad():
                own = carrier(input_ids=torch.as_tensor(texts[number])[None]).logits[0, -STEPS - 1 :]
            assert off(mixed[:, number], own) < TOLERANCE
            base = own if adapter < 0 else base
    assert base is not None, "some row had no adapter"
    prompt = drawn_prompts(1, VOCABULARY)[0]
    logits = Rows(made, packed, range(-1, ADAPTERS)).step([prompt] * (ADAPTERS + 1))
    distances = [off(logits[n], logits[0]) for n in range(1, ADAPTERS + 1)]
    assert min(distances) > 100 * TOLERANCE, "each adapter changes what is written"


def packer_on(carrier, model, made) -> Packer:
    """Packs for the decoder of ``model`` what is on a copy of it."""
    names = {id(module): name for name, module in model.named_modules()}
    blocks = tuple(carrier.get_submodule(names[id(block)]) for block in made.blocks)
    return Packer(carrier, dataclasses.replace(made, blocks=blocks))


def test_an_adapter_that_is_on_the_model_packs_the_same_or_says_why_not(served, tmp_path):
    model, made, bank, folders = served
    carrier = copy.deepcopy(model)
    load_adapter(carrier, folders[0])
    live = packed_from_model(carrier, packer_on(carrier, model, made))
    prompt = drawn_prompts(1, VOCABULARY)
    (own,) = Rows(made, [live], [0]).step(prompt)
    (of_bank,) = Rows(made, [bank.acquire("0").packed], [0]).step(prompt)
    assert torch.equal(own, of_bank)
    assert packed_from_model(model, Packer(model, made)) is None
    write_lora(model, tmp_path, target_modules="attention", train_modules=["lm_head"])
    carrier = copy.deepcopy(model)
    load_adapter(carrier, tmp_path)
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
    bank = AdapterBank(model, None, Packer(model, made), budget_bytes=1 << 30)
    bank.add("x", folder)
    carrier = copy.deepcopy(model)
    load_adapter(carrier, folder)
    prompts = drawn_prompts(6, VOCABULARY)
    which = [0, -1, 0, 0, -1, 0]
    logits = Rows(made, [bank.acquire("x").packed], which).step(prompts)
    exact = [carrier, model]
    if precision == "bf16":  # the model's own sums in bf16 are as far from those of fp32 as ours
        exact = [copy.deepcopy(m).float() for m in exact]
    for number, prompt in enumerate(prompts):
        with torch.no_grad():
            own, base = (m(input_ids=torch.as_tensor(prompt)[None]).logits[0, -1] for m in exact)
        expected, other = (base, own) if which[number] < 0 else (own, base)
        assert off(logits[number], expected) < tolerance(model) < off(logits[number], other)


def test_logits_equal_pefts_with_the_head_adapted_too(tmp_path):
    model = model_of("Llama")
    made = decodable(model)
    config = peft.LoraConfig(
        r=6, lora_alpha=9, target_modules=["q_proj", "v_proj", "down_proj", "lm_head"], task_type="CAUSAL_LM",
        rank_pattern={"v_proj": 11}, alpha_pattern={"lm_head": 3}, init_lora_weights=False,
    )  # fmt: skip
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    theirs.save_pretrained(tmp_path)
    bank = AdapterBank(model, None, Packer(model, made), budget_bytes=1 << 30)
    bank.add("theirs", tmp_path)
    prompt = drawn_prompts(1, VOCABULARY)
    (logits,) = Rows(made, [bank.acquire("theirs").packed], [0]).step(prompt)
    with torch.no_grad():
        own = theirs(input_ids=torch.as_tensor(prompt[0])[None]).logits[0, -1]
        base = model(input_ids=torch.as_tensor(prompt[0])[None]).logits[0, -1]
    assert off(logits, own) < TOLERANCE < off(base, own)
