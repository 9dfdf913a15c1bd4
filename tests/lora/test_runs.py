"""Complete runs that train experts, parameters, tokens and biases: planned on fake tensors, then saved."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltaw import fit
from deltaw.lora import load_adapter
from tests.tiny_models import causal_model

_EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
# The trained tokens depend on the tokenizer, so the test fills in an empty list.
_RUNS = {"experts": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": _EXPERTS})}
_RUNS |= {"tokens of a tied head": ("gemma3", {"target_modules": ["q_proj"], "trainable_token_indices": []})}
_SLOW_RUNS = {"a fused block's weight": ("llama", {"target_modules": [], "target_parameters": ["up_proj.weight"]})}
_SLOW_RUNS |= {"bias on B": ("gpt2", {"lora_bias": True})}
_SLOW_RUNS |= {"tokens alone": ("llama", {"target_modules": [], "trainable_token_indices": []})}
_SLOW_RUNS |= {"bias on B alone": ("llama", {"target_modules": ["v_proj"], "lora_bias": True})}


_RUN_CASES = [*(pytest.param(*run, id=name) for name, run in _RUNS.items())]
_RUN_CASES += [*(pytest.param(*run, id=name, marks=pytest.mark.slow) for name, run in _SLOW_RUNS.items())]


@pytest.mark.each_value
@pytest.mark.parametrize(("family", "lora"), _RUN_CASES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.planned
def test_run_trains_and_saves_every_tensor(family, lora, precision, settings, model_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = causal_model(family)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    run = tmp_path / "run"
    ids = tokenizer("paint it red", add_special_tokens=False).input_ids
    if "trainable_token_indices" in lora:
        lora = {**lora, "trainable_token_indices": sorted(set(ids))}
    fit(settings(run, model=str(tmp_path / "model"), lora={"rank": 4, **lora}, precision=precision))
    tensors = safetensors.torch.load_file(run / "adapter_model.safetensors")
    assert all(tensor.any() for key, tensor in tensors.items() if "lora_B" in key)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    with torch.no_grad():
        plain = base(torch.tensor([ids])).logits
        load_adapter(base, run)
        assert (base(torch.tensor([ids])).logits - plain).norm() > 1e-3 * plain.norm()
