"""Tests that rows with different adapters in one batch match separately computed rows."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import peft
import pytest
import torch

from deltaw.decoding.attached_adapter import Packer, pack_attached_adapter
from deltaw.decoding.decodable import build_decodable, tolerance
from deltaw.kernels import loader
from deltaw.lora import load_adapter
from deltaw.runtime.quantized_weights import quantize_int8
from tests.runtime.families import VOCABULARY, model_of
from tests.serving.adapter_folders import write_lora
from tests.serving.mixed_rows import Rows, decode_greedily, last_logits, make_bank, packed_adapters, random_prompts

ROWS = 24
ADAPTERS = 8
STEPS = 2
# Different summation order in fp32 over three blocks.
TOLERANCE = 1e-5


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return float((ours - reference).norm() / reference.norm())


def random_settings(seed: int) -> dict:
    """Return random rank, scaling and target modules of an adapter."""
    random = np.random.default_rng(seed)
    settings = {"rank": int(random.integers(4, 65)), "alpha": float(random.uniform(2, 16)), "size": 0.05}
    settings["rslora"] = bool(random.integers(2))
    if random.integers(2):
        settings["layers"] = ["0", "1-", "0-1"][random.integers(3)]
    settings["target_modules"] = ["all-linear", "attention", "mlp"][random.integers(3)]
    return settings


def family_params(quick: str, slow: str) -> list:
    return [*quick.split(), *(pytest.param(name, marks=pytest.mark.slow) for name in slow.split())]


@pytest.fixture(scope="module", params=family_params("Llama GPT2 Phi3", "Qwen3 Gemma GPTNeoX"))
def served(request, tmp_path_factory):
    """Model with its decoder, the packed adapters of a bank, and their folders."""
    model = model_of(request.param)
    root = tmp_path_factory.mktemp("adapters")
    decoder = build_decodable(model)
    folders = [write_lora(model, root / str(n), seed=n, **random_settings(n)) for n in range(ADAPTERS)]
    return model, decoder, packed_adapters(make_bank(model, decoder, *folders)), folders


def with_adapter(model, folder):
    """Return a copy of the model with an adapter."""
    carrier = copy.deepcopy(model)
    load_adapter(carrier, folder)
    return carrier


def test_mixed_rows_equal_single_rows_and_model(served):
    model, decoder, packed, folders = served
    adapter_indices = np.random.default_rng(0).integers(-1, ADAPTERS, ROWS)
    assert -1 in adapter_indices
    prompts = random_prompts(ROWS, VOCABULARY)
    mixed, texts = decode_greedily(Rows(decoder, packed, adapter_indices), prompts, STEPS)
    for number in range(0, ROWS, 5):
        row_adapters = [] if adapter_indices[number] < 0 else [packed[adapter_indices[number]]]
        rows = Rows(decoder, row_adapters, [len(row_adapters) - 1])
        single, text = decode_greedily(rows, prompts[number : number + 1], STEPS)
        assert relative_error(single[:, 0], mixed[:, number]) < TOLERANCE
        # The compiled kernel sums each row independently. torch's products depend on the number of rows.
        assert loader.library() is None or torch.equal(single[:, 0], mixed[:, number])
        assert np.array_equal(text[0], texts[number])
    for adapter in sorted({int(index) for index in adapter_indices}):
        carrier = model if adapter < 0 else with_adapter(model, folders[adapter])
        for number in np.flatnonzero(adapter_indices == adapter)[:2]:
            assert relative_error(mixed[:, number], last_logits(carrier, texts[number], STEPS + 1)) < TOLERANCE
    logits = Rows(decoder, packed, range(-1, ADAPTERS)).step(random_prompts(1, VOCABULARY) * (ADAPTERS + 1))
    assert min(relative_error(row, logits[0]) for row in logits[1:]) > 100 * TOLERANCE, "without effect"


def packer_for_copy(carrier, model, decoder) -> Packer:
    """Return a packer for the decoder of ``model`` that reads adapters from a copy of it."""
    names = {id(module): name for name, module in model.named_modules()}
    blocks = tuple(carrier.get_submodule(names[id(block)]) for block in decoder.blocks)
    return Packer(carrier, dataclasses.replace(decoder, blocks=blocks))


def test_attached_adapter_is_packed_or_reason_is_returned(served, tmp_path):
    model, decoder, packed, folders = served
    carrier = with_adapter(model, folders[0])
    attached_pack = pack_attached_adapter(carrier, packer_for_copy(carrier, model, decoder))
    prompts = random_prompts(1, VOCABULARY)
    packs = (attached_pack, packed[0])
    attached, from_bank = (Rows(decoder, [adapter], [0]).step(prompts) for adapter in packs)
    assert torch.equal(attached, from_bank)
    assert pack_attached_adapter(model, Packer(model, decoder)) is None
    carrier = with_adapter(model, write_lora(model, tmp_path, target_modules="attention", train_modules=["lm_head"]))
    reason = pack_attached_adapter(carrier, packer_for_copy(carrier, model, decoder))
    assert isinstance(reason, str) and "lm_head" in reason


@pytest.mark.each_value
@pytest.mark.parametrize("family", ["Llama", "GPT2"])
@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_adapters_match_model_in_other_precisions(family, precision, tmp_path):
    model = model_of(family, torch.bfloat16 if precision == "bf16" else torch.float32)
    folder = write_lora(model, tmp_path, rank=5, size=0.2)
    if precision == "int8":
        quantize_int8(model.base_model)
    decoder = build_decodable(model)
    adapter_indices = [0, -1, 0, 0, -1, 0]
    prompts = random_prompts(len(adapter_indices), VOCABULARY)
    logits = Rows(decoder, packed_adapters(make_bank(model, decoder, folder)), adapter_indices).step(prompts)
    exact = [with_adapter(model, folder), model]
    if precision == "bf16":  # both have similar rounding errors, so fp32 is the reference
        exact = [copy.deepcopy(m).float() for m in exact]
    for row_logits, prompt, adapter in zip(logits, prompts, adapter_indices, strict=True):
        adapted, base = (last_logits(m, prompt)[0] for m in exact)
        expected, other = (base, adapted) if adapter < 0 else (adapted, base)
        assert relative_error(row_logits, expected) < tolerance(model) < relative_error(row_logits, other)


def test_logits_with_adapted_head_match_peft(tmp_path):
    model = model_of("Llama")
    decoder = build_decodable(model)
    config = peft.LoraConfig(
        r=6, lora_alpha=9, target_modules=["q_proj", "v_proj", "down_proj", "lm_head"], task_type="CAUSAL_LM",
        rank_pattern={"v_proj": 11}, alpha_pattern={"lm_head": 3}, init_lora_weights=False,
    )  # fmt: skip
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    theirs.save_pretrained(tmp_path)
    prompt = random_prompts(1, VOCABULARY)
    (logits,) = Rows(decoder, packed_adapters(make_bank(model, decoder, tmp_path)), [0]).step(prompt)
    adapted, base = (last_logits(reference, prompt[0])[0] for reference in (theirs, model))
    assert relative_error(logits, adapted) < TOLERANCE < relative_error(base, adapted)
