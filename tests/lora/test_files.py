"""Adapter files: exchange with PEFT in both directions, and rejected files."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch
from peft import PeftModel
from torch import nn

from deltaw.errors import UserError
from deltaw.lora import (
    LoRAConfig,
    adapter_parameters,
    attach,
    count_parameters,
    detach,
    load_adapter,
    merge,
    read_adapter,
    save_adapter,
)
from deltaw.lora.peft_format import DEFAULTS, PREFIX, target_entries
from tests.lora.models import FAMILIES, all_kinds_and_peft, inputs, logits, peft_factors, perturb, tiny, with_peft


def _trained_model(family: str, seed: int = 0, **settings: object) -> nn.Module:
    model = tiny(family)
    attach(model, LoRAConfig(**{"rank": 4, "alpha": 8.0, **settings}), seed=seed)
    return perturb(model)


def _check_differs_from_base(output: torch.Tensor, family: str) -> None:
    """Check that the output differs from the base model's, so that an empty adapter fails."""
    plain = logits(tiny(family), family)
    assert (output - plain).norm() > 1e-3 * plain.norm()


def _load_in_peft(family: str, folder: Path) -> nn.Module:
    """Load the adapter with PEFT and fail on any warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        # PEFT warns for every model with a tied embedding.
        warnings.filterwarnings("ignore", message=".*ensure_weight_tying")
        return PeftModel.from_pretrained(tiny(family), str(folder)).eval()


_PATTERNS = {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6}, "alpha_pattern": {"v_proj": 3.5}}
_SETTINGS = {
    "rslora and patterns": ("llama", {"rslora": True, **_PATTERNS}),
    "all biases": ("gpt2", {"bias": "all", "target_modules": ["c_attn"]}),
    "adapted biases": ("gpt2", {"bias": "lora_only", "target_modules": ["c_attn", "wpe"]}),
    "scaled embedding": ("gemma3", {"target_modules": ["embed_tokens", "q_proj"]}),
    "whole modules": ("llama", {"train_modules": ["lm_head", "model.norm"]}),
    "olora Conv1D": ("gpt2", {"init": "olora", "rslora": True, "rank_pattern": {"c_fc": 2}}),
    "eva": ("llama", {"init": "eva"}),
    "pissa rslora": ("llama", {"init": "pissa", "rslora": True, "rank_pattern": {"q_proj": 2}}),
    "dora pissa": ("gpt2", {"dora": True, "init": "pissa"}),
    "dora olora": ("vit", {"dora": True, "init": "olora", "target_modules": ["q_proj", "fc1"]}),
    "dora embedding": ("gemma3", {"dora": True, "target_modules": ["embed_tokens", "q_proj"]}),
    "classifier": ("bert", {"target_modules": ["query", "dense"], "train_modules": ["classifier"]}),
    "vit": ("vit", {"target_modules": "attention", "train_modules": ["classifier"]}),
}


@pytest.mark.parametrize(("family", "settings"), _SETTINGS.values(), ids=_SETTINGS.keys())
def test_saved_adapter_loads_here_and_in_peft(family, settings, tmp_path):
    model = _trained_model(family, **settings)
    expected = logits(model, family)
    _check_differs_from_base(expected, family)
    save_adapter(model, tmp_path)
    torch.testing.assert_close(logits(_load_in_peft(family, tmp_path), family), expected, atol=1e-5, rtol=1e-4)
    reloaded = tiny(family)
    summary = load_adapter(reloaded, tmp_path)
    torch.testing.assert_close(logits(reloaded, family), expected, atol=1e-5, rtol=1e-4)
    assert summary.trained == 0 == count_parameters(reloaded).trained
    detach(reloaded)
    assert torch.equal(logits(reloaded, family), logits(tiny(family), family))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.filterwarnings("ignore")  # PEFT warns about fan_in_fan_out and groups
def test_all_layer_kinds_round_trip_through_peft(dora, tmp_path):
    ours, _, ids = all_kinds_and_peft(dora=dora)
    detach(base := copy.deepcopy(ours))
    assert (ours(ids) - base(ids)).norm() > 1e-2 * base(ids).norm()
    save_adapter(ours, tmp_path / "ours")
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "ours"))
    torch.testing.assert_close(theirs(ids), ours(ids), atol=1e-5, rtol=1e-5)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    load_adapter(base, tmp_path / "theirs")
    torch.testing.assert_close(base(ids), ours(ids), atol=1e-6, rtol=1e-6)


def test_adapter_config_matches_peft(tmp_path):
    model = tiny("llama")
    theirs = with_peft(model, r=4, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM")
    theirs.save_pretrained(str(tmp_path / "theirs"))
    attach(model, LoRAConfig(rank=4, alpha=8, target_modules=["q_proj"]))
    save_adapter(model, tmp_path / "ours")
    configs = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs")]
    assert configs[0] == {**configs[1], "peft_version": configs[0]["peft_version"]}
    assert set(configs[0]) == set(DEFAULTS)
    tensors = [safetensors.torch.load_file(tmp_path / w / "adapter_model.safetensors") for w in ("ours", "theirs")]
    ours, theirs = ({k: (t.shape, t.dtype) for k, t in of.items()} for of in tensors)
    assert ours == theirs


def test_file_lists_adapted_modules_and_is_readable_without_model(tmp_path):
    model = _trained_model("llama", target_modules="attention", layers=[0], exclude_modules=["k_proj"], rslora=True)
    save_adapter(model, tmp_path, base_model="some/base")
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["target_modules"] == [f"0.self_attn.{x}_proj" for x in "oqv"]
    assert settings["base_model_name_or_path"] == "some/base" and settings["task_type"] == "CAUSAL_LM"
    assert len(peft_factors(_load_in_peft("llama", tmp_path))) == 3
    config, tensors, metadata = read_adapter(tmp_path)
    assert (config.rank, config.alpha, config.rslora) == (4, 8.0, True)
    assert tensors[f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight"].shape == (4, 32)
    expected_metadata = {"format": "pt", "base_model_name_or_path": "some/base", "task_type": "CAUSAL_LM"}
    assert expected_metadata.items() <= metadata.items() and metadata["deltaw.base_fingerprint"]
    save_adapter(model, tmp_path, task_type=None)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["auto_mapping"]["base_model_class"] == "LlamaForCausalLM"


def test_target_entries_distinguish_modules():
    assert target_entries(["a.x", "b.x", "b.y"], ["a.x", "b.x"]) == ["x"]
    assert target_entries(["a.x", "b.x", "b.y"], ["b.x"]) == ["b.x"]
    assert target_entries(["x", "b.x"], ["x"]) == "x"
    assert target_entries(["a.x", "c.a.x", "b"], ["a.x", "b"]) == r"a\.x|b"


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_weight_changing_init_is_saved_with_twice_the_rank(init, tmp_path):
    model = _trained_model("llama", init=init, target_modules=["q_proj"], alpha=6.0)
    save_adapter(model, tmp_path)
    adapter = read_adapter(tmp_path)
    assert (adapter.config.rank, adapter.config.alpha, adapter.config.init) == (8, 12.0, "uniform")
    merge(model, keep_original=False)
    with pytest.raises(UserError, match=init):
        save_adapter(model, tmp_path)


def test_adapter_of_merged_model_can_be_saved(tmp_path):
    model = _trained_model("llama")
    expected = logits(model, "llama")
    merge(model)
    save_adapter(model, tmp_path)
    load_adapter(reloaded := tiny("llama"), tmp_path)
    assert torch.equal(logits(reloaded, "llama"), expected)


def test_adapter_of_bf16_model_is_saved_and_loaded_in_fp32(tmp_path):
    model, reloaded = (tiny("llama").to(torch.bfloat16) for _ in range(2))
    attach(model, LoRAConfig(rank=4))
    save_adapter(perturb(model), tmp_path)
    load_adapter(reloaded, tmp_path)
    pairs = zip(adapter_parameters(model), adapter_parameters(reloaded), strict=True)
    assert all(torch.equal(a, b) and b.dtype == torch.float32 for (_, a), (_, b) in pairs)


@pytest.fixture
def saved(tmp_path) -> Path:
    """Return a folder with a valid adapter, for tests that damage it."""
    save_adapter(_trained_model("llama"), tmp_path / "adapter")
    return tmp_path / "adapter"


def _rewrite(folder: Path, **settings: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def _load_error(folder: Path, family: str = "llama") -> str:
    model = tiny(family)
    before = {n: (id(m), m.training) for n, m in model.named_modules()}
    with pytest.raises(UserError) as raised:
        load_adapter(model, folder)
    assert before == {n: (id(m), m.training) for n, m in model.named_modules()}
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny(family).parameters(), strict=True))
    return str(raised.value)


_UNSUPPORTED_SETTINGS = [
    ({"peft_type": "IA3"}, "IA3"),
    ({"use_dora": True}, "lora_magnitude_vector' is missing"),
    ({"lora_bias": True}, "lora_B.bias' is missing"),
    ({"alora_invocation_tokens": ["a"]}, "invocation_tokens cannot be"),
    ({"alora_invocation_tokens": [1], "use_dora": True}, "dora"),
    ({"trainable_token_indices": [1]}, "trainable_tokens_delta' is missing"),
    ({"trainable_token_indices": [97]}, "token 97"),
    ({"target_parameters": ["input_layernorm.weight"]}, "1 dimensions"),
    ({"target_parameters": ["x"], "lora_dropout": 0.1}, "target_parameters"),
    ({"ensure_weight_tying": True}, "ensure_weight_tying"),
    ({"layer_replication": [[0, 1]]}, "layer_replication"),
    ({"megatron_config": {"a": 1}}, "megatron_config"),
    ({"use_qalora": True}, "use_qalora"),
    ({"of_tomorrow": 3}, "of_tomorrow"),
    ({"init_lora_weights": "corda"}, "corda"),
    ({"init_lora_weights": "olora", "fan_in_fan_out": True}, "olora"),
    ({"r": 0}, "rank"),
    ({"r": 5}, "(5, 32)"),
]


@pytest.mark.parametrize(("settings", "message"), _UNSUPPORTED_SETTINGS)
def test_unsupported_settings_are_rejected_by_name(settings, message, saved):
    _rewrite(saved, **settings)
    assert message in _load_error(saved)


def test_settings_without_effect_are_ignored(saved):
    _rewrite(saved, of_tomorrow=None, of_yesterday=False, more=[], loftq_config={"loftq_bits": 4}, revision="main")
    load_adapter(tiny("llama"), saved)


_UP = "model.layers.1.mlp.up_proj"
_LAYER = "model.layers.0.self_attn.q_proj"


_MISMATCHED_TENSORS = [
    ({f"{_LAYER}.lora_A.weight": torch.zeros(4, 31)}, "(4, 31)"),
    ({f"{_LAYER}.lora_A.weight": None}, "missing"),
    ({f"{_UP}.lora_A.weight": None, f"{_UP}.lora_B.weight": None}, _UP),
    ({"model.layers.9.self_attn.q_proj.lora_A.weight": torch.zeros(4, 32)}, "layers.9"),
    ({f"{_LAYER}.lora_magnitude_vector": torch.zeros(32)}, "lora_magnitude_vector"),
    ({"model.norm.weight": torch.zeros(32)}, "model.norm.weight"),
]


@pytest.mark.parametrize(("change", "message"), _MISMATCHED_TENSORS)
def test_error_names_mismatched_tensor(change, message, saved):
    path = saved / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path) | {PREFIX + name: tensor for name, tensor in change.items()}
    safetensors.torch.save_file({k: t for k, t in tensors.items() if t is not None}, path, {"format": "pt"})
    error = _load_error(saved)
    assert message in error and next(iter(change)).partition(".lora")[0] in error


def test_missing_damaged_and_foreign_adapters_are_rejected(saved, tmp_path):
    assert "no adapter folder" in _load_error(tmp_path / "nowhere")
    assert "adapter_config.json" in _load_error(tmp_path)
    assert "base model" in _load_error(saved, "gpt2")
    weights = saved / "adapter_model.safetensors"
    content = weights.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"\xff" * 100, content[:4]):
        weights.write_bytes(damaged)
        assert "cut off or damaged" in _load_error(saved)
    weights.unlink()
    assert "no adapter_model.safetensors" in _load_error(saved)
    (saved / "adapter_model.bin").write_bytes(b"")
    assert "pickle" in _load_error(saved)
    for text in ("{", "[]", "\udcff"):
        (saved / "adapter_config.json").write_text(text, errors="surrogateescape")
        assert "adapter_config.json" in _load_error(saved)


def test_saving_without_adapter_and_loading_twice_raise(saved, tmp_path):
    model = tiny("llama")
    with pytest.raises(UserError, match="no adapter"):
        save_adapter(model, tmp_path)
    load_adapter(model, saved)
    with pytest.raises(UserError, match="already"):
        load_adapter(model, saved)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError):
        save_adapter(model, tmp_path / "file")


@pytest.mark.parametrize("family", FAMILIES)
def test_loaded_adapter_can_be_trained(family, tmp_path):
    model = _trained_model(family, target_modules="attention")
    reloaded = tiny(family)
    save_adapter(model, tmp_path)
    assert load_adapter(reloaded, tmp_path, trainable=True).trained == count_parameters(model).trained
    reloaded(**inputs(family)).logits.pow(2).mean().backward()
    assert all(p.grad is not None for _, p in adapter_parameters(reloaded))
