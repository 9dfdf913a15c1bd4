"""Tests of adapters exported as GGUF files: their content, and rejected adapters."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from deltaw.errors import UserError
from deltaw.export.gguf_adapter import export_gguf_adapter, unify_alpha
from deltaw.export.gguf_architectures import find_architecture
from deltaw.export.gguf_hyperparameters import add_hyperparameters
from deltaw.export.gguf_tensors import adjacent_pairs
from deltaw.export.merge_plan import MergeOptions
from deltaw.export.portable import PlainUpdate
from deltaw.lora.fingerprint import FINGERPRINT_KEY, same_base
from tests.export import models

HEADS = {"attn_q": 4, "attn_k": 2}


def read_gguf(path: Path) -> tuple[dict[str, object], dict[str, np.ndarray]]:
    reader = GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    return fields, {tensor.name: np.array(tensor.data) for tensor in reader.tensors}


def test_scaled_factors_equal_delta_weight_of_each_layer(tmp_path: Path) -> None:
    """Rank, alpha and rsLoRA vary by module. The file has a single alpha, and rows of q and k are permuted."""
    settings = {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"v_proj": 3.0}, "rslora": True}
    model, run = models.saved_run(tmp_path, "llama", **settings)
    result = export_gguf_adapter(run, tmp_path / "a.gguf")
    fields, tensors = read_gguf(tmp_path / "a.gguf")
    names = ("general.type", "adapter.type", "general.architecture")
    assert [fields[name] for name in names] == ["adapter", "lora", "llama"]
    assert len(tensors) == 2 * result.details["tensors"] == 28
    modules = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
    for name, module in {**modules, "ffn_up": "mlp.up_proj"}.items():
        expected = models.delta_weight(model.get_submodule(f"model.layers.1.{module}"))
        heads = HEADS.get(name)
        expected = adjacent_pairs(expected, heads) if heads else expected
        factor_A, factor_B = (tensors[f"blk.1.{name}.weight.lora_{letter}"] for letter in "ab")
        actual = float(fields["adapter.lora.alpha"]) / factor_A.shape[0] * factor_B @ factor_A
        np.testing.assert_allclose(actual, expected.numpy(), rtol=1e-5, atol=1e-6)


def test_adjacent_pairs_interleave_halves_of_each_head() -> None:
    rows = torch.arange(8.0)[:, None]
    assert adjacent_pairs(rows, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_factors_with_common_scaling_are_bit_identical(tmp_path: Path) -> None:
    _, run = models.saved_run(tmp_path, "qwen3", rslora=True)
    assert export_gguf_adapter(run, tmp_path / "a.gguf").details["folded"] == 0
    _, tensors = read_gguf(tmp_path / "a.gguf")
    original = load_file(run / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    assert np.array_equal(tensors["blk.0.attn_q.weight.lora_b"], original[key].numpy())


def test_single_alpha_is_the_most_common_value() -> None:
    cases = ((4, 2.0), (8, 1.0), (2, 1.0))
    updates = [PlainUpdate("m", torch.zeros(rank, 3), torch.zeros(3, rank), scaling) for rank, scaling in cases]
    assert unify_alpha(updates) == (8.0, [1.0, 1.0, 0.25])


def test_file_contains_invocation_tokens_and_fingerprint(tmp_path: Path) -> None:
    _, run = models.saved_run(tmp_path, "qwen2", active="completion", invocation_tokens=[1, 7, 9])
    export_gguf_adapter(run, tmp_path / "a.gguf", kind="f16")
    fields, tensors = read_gguf(tmp_path / "a.gguf")
    assert fields[gguf.Keys.Adapter.ALORA_INVOCATION_TOKENS] == [1, 7, 9]
    with safe_open(run / "adapter_model.safetensors", framework="pt") as saved:
        assert same_base(str(fields[FINGERPRINT_KEY]), saved.metadata()[FINGERPRINT_KEY])
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(np.float16)}


def test_unsupported_bases_methods_and_nonfinite_values_are_rejected(tmp_path: Path) -> None:
    def assert_rejected(message: str, **options: object) -> None:
        with pytest.raises(UserError, match=message):
            export_gguf_adapter(run, tmp_path / "a.gguf", **options)
        assert not (tmp_path / "a.gguf").exists()

    _, run = models.saved_run(tmp_path, "llama")
    models.random_model("llama", models.VOCABULARY, seed=1).save_pretrained(tmp_path / "other")
    assert_rejected("other weights", options=MergeOptions(str(tmp_path / "other")))
    config = tmp_path / "base" / "config.json"
    weights = run / "adapter_model.safetensors"
    content = config.read_text()
    tensors = load_file(weights)
    config.write_text(json.dumps({**json.loads(content), "hidden_act": "relu"}))
    assert_rejected("activation 'relu'")
    config.write_text(content)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, weights, {"format": "pt"})
    assert_rejected("not finite")
    (run / "adapter_config.json").write_text(json.dumps({"method": "prompt"}))
    assert_rejected("method 'prompt'")


def test_split_weight_gets_an_update_of_each_part(tmp_path: Path) -> None:
    model, run = models.saved_run(tmp_path, "granite-hybrid")
    export_gguf_adapter(run, tmp_path / "a.gguf")
    fields, tensors = read_gguf(tmp_path / "a.gguf")
    scaling = float(fields["adapter.lora.alpha"]) / 4
    expected = models.delta_weight(model.get_submodule("model.layers.0.shared_mlp.input_linear"))
    for name, part in zip(("ffn_gate", "ffn_up"), expected.chunk(2), strict=True):
        factor_A, factor_B = (tensors[f"blk.0.{name}.weight.lora_{letter}"] for letter in "ab")
        np.testing.assert_allclose(scaling * factor_B @ factor_A, part.numpy(), rtol=1e-5, atol=1e-6)


def test_ignored_and_changed_weights_cannot_be_updated(tmp_path: Path) -> None:
    _, run = models.saved_run(tmp_path / "g", "gemma4-shared", target_modules=["per_layer_model_projection"])
    with pytest.raises(UserError, match=r"llama\.cpp ignores"):
        export_gguf_adapter(run, tmp_path / "a.gguf")
    _, run = models.saved_run(tmp_path / "l", "lfm2", target_modules=["conv.conv"], rank=64)
    with pytest.raises(UserError, match="convolution"):
        export_gguf_adapter(run, tmp_path / "a.gguf")


_LIMITED = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "truncate": False}


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gemma2", {"final_logit_softcapping": None}, "softcapping"),
        ("gemma4", {"num_kv_shared_layers": 2}, "share keys"),
        ("qwen3-moe", {"norm_topk_prob": False}, "norm_topk_prob"),
        ("qwen3-moe", {"mlp_only_layers": [0]}, "without experts"),
        ("qwen3.5", {"linear_value_head_dim": 32}, "different sizes"),
        ("qwen3.5", {"layer_types": ["full_attention", "linear_attention"] * 2}, "order of recurrent"),
        ("qwen3.5", {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 0]}}, "mrope_section"),
        ("granite-hybrid", {"time_step_limit": (0.0, 1.0)}, "time_step_limit"),
        ("falcon-h1", {"mamba_norm_before_gate": True}, "mamba_norm_before_gate"),
        ("falcon-h1", {"tie_word_embeddings": True}, "two multipliers"),
        ("exaone4", {"sliding_window": 8, "layer_types": ["sliding_attention"] * 2}, "sliding-window"),
        ("lfm2-moe", {"use_expert_bias": False}, "without a bias"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("llama", {"rope_parameters": {**_LIMITED, "rope_theta": 10000.0}}, "without truncation"),
        ("smollm3", {"rope_parameters": models.LLAMA3_ROPE}, "llama3"),
        ("lfm2-moe", {"routed_scaling_factor": 2.5}, "routed_scaling_factor"),
        ("lfm2", {"head_dim": 32}, "head_dim"),
        ("qwen2", {"head_dim": 32}, "head_dim"),
        ("phi3", {"head_dim": 32}, "head_dim"),
        ("gemma3", {"attn_logit_softcapping": 20.0}, "attn_logit_softcapping"),
        ("olmo3", {"layer_types": ["sliding_attention", "full_attention"] * 2}, "sliding-window"),
        ("granite", {"residual_multiplier": 0.0}, "residual_multiplier"),
        ("granite", {"attention_multiplier": 0.0}, "attention_multiplier"),
        ("granite-hybrid", {"layer_types": ["mamba"] * 3}, "has attention"),
        ("granite-hybrid", {"mamba_expand": 3, "mamba_d_head": 24}, "mamba_expand"),
        ("lfm2", {"layer_types": ["conv"] * 2}, "has attention"),
        ("lfm2", {"layer_types": ["full_attention"] * 2}, "has a convolution"),
        ("qwen3.5", {"layer_types": ["full_attention"] * 4}, "order of recurrent"),
    ],
)
def test_unsupported_settings_are_rejected(family: str, changes: dict[str, object], message: str) -> None:
    config = models.family_config(family, **changes)
    with pytest.raises(UserError, match=message):
        add_hyperparameters(gguf.GGUFWriter(None, "none"), find_architecture(config), config)


def test_unknown_model_family_is_named_in_error() -> None:
    with pytest.raises(UserError, match="'bloom' models"):
        find_architecture(AutoConfig.for_model("bloom"))
