"""Tests of adapters for other readers of PEFT's format and for mlx-lm: the same ΔW with a single rank and alpha."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from deltaw.errors import UserError
from deltaw.export.formats import export
from deltaw.export.portable import export_folder
from tests.export import models

MIXED = {"rank_pattern": {"up_proj": 2, "down_proj": 8}, "alpha_pattern": {"v_proj": 3.0}, "rslora": True}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_peft_applies_the_same_update(tmp_path: Path, family: str) -> None:
    peft = pytest.importorskip("peft", reason="compares with PEFT")
    settings = MIXED if family == "llama" else {"rank_pattern": {"c_attn": 2}}
    model, run = models.saved_run(tmp_path, family, **settings)
    result = export_folder(run, tmp_path / "portable")
    assert result.details["padded"] > 0 and result.details["folded"] > 0
    bare = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(bare, tmp_path / "portable").eval()
    ids = torch.tensor(models.random_prompts(models.VOCABULARY, 4))
    with torch.no_grad(), theirs.disable_adapter():
        base = bare(input_ids=ids).logits
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        actual = theirs(input_ids=ids).logits
    assert float((expected - base).abs().max()) > 0.1
    torch.testing.assert_close(expected, actual, rtol=1e-4, atol=1e-4)
    merged = theirs.merge_and_unload().state_dict()
    key = "model.layers.1.mlp.up_proj" if family == "llama" else "transformer.h.1.attn.c_attn"
    layer = model.get_submodule(key)
    delta = models.delta_weight(layer).t() if family == "gpt2" else models.delta_weight(layer)
    torch.testing.assert_close(merged[f"{key}.weight"], layer.weight + delta, rtol=1e-5, atol=1e-5)


def test_uniform_adapter_is_exported_bit_identical(tmp_path: Path) -> None:
    _, run = models.saved_run(tmp_path, "llama")
    result = export_folder(run, tmp_path / "out")
    assert (result.details["padded"], result.details["folded"]) == (0, 0)
    original, exported = (load_file(p / "adapter_model.safetensors") for p in (run, tmp_path / "out"))
    assert original.keys() == exported.keys() and all(torch.equal(original[key], exported[key]) for key in original)


def load_like_vllm(folder: Path, max_rank: int = 16) -> dict[str, dict[str, torch.Tensor]]:
    """Load factors as vLLM's loader does, with the checks that its documentation lists.

    It requires certain settings, rejects DoRA, modules trained in full and biases, limits the rank, and accepts A and B
    only of known modules, all with one rank.
    """
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["target_modules"] and config["r"] <= max_rank and isinstance(config["lora_alpha"], int)
    unsupported = ("modules_to_save", "use_dora", "lora_bias", "rank_pattern", "alpha_pattern", "use_rslora")
    assert config["bias"] == "none" and not any(config[name] for name in unsupported)
    supported_modules = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    factors: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        parts = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name)
        assert parts is not None and parts[1].rpartition(".")[2] in supported_modules
        assert tensor.shape[0 if parts[2] == "A" else 1] == config["r"]
        scale = config["lora_alpha"] / config["r"] if parts[2] == "B" else 1
        factors.setdefault(parts[1], {})[parts[2]] = tensor * scale
    return factors


def test_vllm_format_satisfies_loader_checks(tmp_path: Path) -> None:
    model, run = models.saved_run(tmp_path, "llama", **MIXED)
    export_folder(run, tmp_path / "out", "vllm")
    factors = load_like_vllm(tmp_path / "out")
    assert len(factors) == 14
    for name, pair in factors.items():
        expected = models.delta_weight(model.get_submodule(name))
        torch.testing.assert_close(pair["B"] @ pair["A"], expected, rtol=1e-5, atol=1e-6)


LAYERS = {"target_modules": ["q_proj", "lm_head"]}
EMBEDDING = {"target_modules": ["q_proj", "embed_tokens"]}
INVOKED = {"active": "completion", "invocation_tokens": [5]}


UNSUPPORTED_FEATURES = [
    ("gguf-adapter", "qwen2", {"dora": True}, "DoRA"),
    ("gguf-adapter", "qwen2", {"lora_bias": True}, "a bias on B"),
    ("gguf-adapter", "qwen2", {"train_modules": ["input_layernorm"]}, "trained in full"),
    ("gguf-adapter", "qwen2", {"trainable_token_indices": [5, 6]}, "rows of tokens"),
    ("gguf-adapter", "qwen2", EMBEDDING, "embedding 'model.embed_tokens'"),
    ("gguf-adapter", "qwen2", LAYERS, "tied"),
    ("peft", "llama", {"dora": True}, "DoRA"),
    ("vllm", "llama", EMBEDDING, "embed_tokens"),
    ("vllm", "llama", LAYERS, "lm_head"),
    ("vllm", "llama", INVOKED, "invocation"),
    ("mlx", "llama", INVOKED, "invocation"),
    ("mlx", "gpt2", {}, "'gpt2' models"),
]


@pytest.mark.parametrize(("format_name", "family", "settings", "message"), UNSUPPORTED_FEATURES)
def test_features_unsupported_by_a_reader_are_rejected(tmp_path, format_name, family, settings, message):
    _, run = models.saved_run(tmp_path, family, **settings)
    with pytest.raises(UserError, match=message):
        export(run, format_name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_peft_format_preserves_embeddings_and_invocation_tokens(tmp_path: Path) -> None:
    for name, settings in (("embedding", EMBEDDING), ("invoked", INVOKED)):
        export_folder(models.saved_run(tmp_path / name, "llama", **settings)[1], tmp_path / name / "out")
    names = load_file(tmp_path / "embedding" / "out" / "adapter_model.safetensors")
    assert "base_model.model.model.embed_tokens.lora_embedding_A" in names
    config = json.loads((tmp_path / "invoked" / "out" / "adapter_config.json").read_text())
    assert config["alora_invocation_tokens"] == [5]


def test_mlx_format_adapts_named_modules_of_last_layers(tmp_path: Path) -> None:
    """mlx-lm computes W·x + scale·(x·a)·b for the modules in ``keys``, in the last ``num_layers`` layers."""
    model, run = models.saved_run(tmp_path, "llama", **MIXED, layers="1-")
    export_folder(run, tmp_path / "out", "mlx")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    settings = config["lora_parameters"]
    assert (config["fine_tune_type"], config["num_layers"]) == ("lora", 1)
    assert (settings["rank"], settings["dropout"]) == (8, 0.0)
    assert {"self_attn.q_proj", "mlp.down_proj"} <= set(settings["keys"])
    tensors = load_file(tmp_path / "out" / "adapters.safetensors")
    assert len(tensors) == 14
    for key in settings["keys"]:
        name = f"model.layers.1.{key}"
        expected = models.delta_weight(model.get_submodule(name)).t()
        a = tensors[f"{name}.lora_a"]
        b = tensors[f"{name}.lora_b"]
        assert a.shape[1] == b.shape[0] == 8
        torch.testing.assert_close(settings["scale"] * a @ b, expected, rtol=1e-5, atol=1e-6)
