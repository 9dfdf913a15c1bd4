"""Adapters on disk: what PEFT reads of ours, what we read of PEFT's, and what is refused."""

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
from tests.lora.models import FAMILIES, every_kind_and_pefts, inputs, logits, peft_factors, perturb, tiny, with_peft


def _trained(family: str, seed: int = 0, **settings: object) -> nn.Module:
    model = tiny(family)
    attach(model, LoRAConfig(**{"rank": 4, "alpha": 8.0, **settings}), seed=seed)
    return perturb(model)


def _differs_from_base(output: torch.Tensor, family: str) -> None:
    """A file that loses everything must not pass for one that was read."""
    plain = logits(tiny(family), family)
    assert (output - plain).norm() > 1e-3 * plain.norm()


def _in_peft(family: str, folder: Path) -> nn.Module:
    """PEFT's own loading, in which no warning may come."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        # Said of every model with a tied embedding, whatever the file holds.
        warnings.filterwarnings("ignore", message=".*ensure_weight_tying")
        return PeftModel.from_pretrained(tiny(family), str(folder)).eval()


_PATTERNS = {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6}, "alpha_pattern": {"v_proj": 3.5}}
_SETTINGS = {
    "rslora and patterns": ("llama", {"rslora": True, **_PATTERNS}),
    "layers": ("llama", {"layers": "1-", "target_modules": "attention"}),
    "excluded": ("qwen3", {"exclude_modules": ["mlp"]}),
    "Conv1D": ("gpt2", {}),
    "all biases": ("gpt2", {"bias": "all", "target_modules": ["c_attn"]}),
    "adapted biases": ("gpt2", {"bias": "lora_only", "target_modules": ["c_attn", "wpe"]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "scaled embedding": ("gemma3", {"target_modules": ["embed_tokens", "q_proj"]}),
    "whole modules": ("llama", {"train_modules": ["lm_head", "model.norm"]}),
    "pissa": ("llama", {"init": "pissa"}),
    "olora": ("llama", {"init": "olora"}),
    "olora Conv1D": ("gpt2", {"init": "olora", "rslora": True, "rank_pattern": {"c_fc": 2}}),
    "eva": ("llama", {"init": "eva"}),
    "pissa rslora": ("llama", {"init": "pissa", "rslora": True, "rank_pattern": {"q_proj": 2}}),
    "dora": ("llama", {"dora": True}),
    "dora pissa": ("gpt2", {"dora": True, "init": "pissa"}),
    "dora olora": ("vit", {"dora": True, "init": "olora", "target_modules": ["q_proj", "fc1"]}),
    "dora embedding": ("gemma3", {"dora": True, "target_modules": ["embed_tokens", "q_proj"]}),
    "classifier": ("bert", {"target_modules": ["query", "dense"], "train_modules": ["classifier"]}),
    "classifier left": ("bert", {"target_modules": ["value", "dense"]}),
    "albert": ("albert", {"target_modules": ["query", "ffn"]}),
    "t5": ("t5", {"target_modules": "mlp"}),
    "vit": ("vit", {"target_modules": "attention", "train_modules": ["classifier"]}),
}


@pytest.mark.parametrize(("family", "settings"), _SETTINGS.values(), ids=_SETTINGS.keys())
def test_peft_loads_what_is_saved_and_so_do_we(family, settings, tmp_path):
    model = _trained(family, **settings)
    expected = logits(model, family)
    _differs_from_base(expected, family)
    save_adapter(model, tmp_path)
    torch.testing.assert_close(logits(_in_peft(family, tmp_path), family), expected, atol=1e-5, rtol=1e-4)
    again = tiny(family)
    summary = load_adapter(again, tmp_path)
    torch.testing.assert_close(logits(again, family), expected, atol=1e-5, rtol=1e-4)
    assert summary.trained == 0 == count_parameters(again).trained
    detach(again)
    assert torch.equal(logits(again, family), logits(tiny(family), family))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.filterwarnings("ignore")  # of PEFT, about fan_in_fan_out and groups
def test_every_kind_of_layer_goes_both_ways(dora, tmp_path):
    ours, _, ids = every_kind_and_pefts(dora=dora)
    detach(base := copy.deepcopy(ours))
    assert (ours(ids) - base(ids)).norm() > 1e-2 * base(ids).norm()
    save_adapter(ours, tmp_path / "ours")
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "ours"))
    torch.testing.assert_close(theirs(ids), ours(ids), atol=1e-5, rtol=1e-5)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    load_adapter(base, tmp_path / "theirs")
    torch.testing.assert_close(base(ids), ours(ids), atol=1e-6, rtol=1e-6)


def test_the_settings_file_is_pefts_own(tmp_path):
    model = tiny("llama")
    theirs = with_peft(model, r=4, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM")
    theirs.save_pretrained(str(tmp_path / "theirs"))
    attach(model, LoRAConfig(rank=4, alpha=8, target_modules=["q_proj"]))
    save_adapter(model, tmp_path / "ours")
    read = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs")]
    assert read[0] == {**read[1], "peft_version": read[0]["peft_version"]}
    assert set(read[0]) == set(DEFAULTS)
    tensors = [safetensors.torch.load_file(tmp_path / w / "adapter_model.safetensors") for w in ("ours", "theirs")]
    ours, theirs = ({k: (t.shape, t.dtype) for k, t in of.items()} for of in tensors)
    assert ours == theirs


def test_a_file_names_exactly_the_adapted_modules_and_is_read_without_a_model(tmp_path):
    model = _trained("llama", target_modules="attention", layers=[0], exclude_modules=["k_proj"], rslora=True)
    save_adapter(model, tmp_path, base_model="some/base")
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["target_modules"] == [f"0.self_attn.{x}_proj" for x in "oqv"]
    assert settings["base_model_name_or_path"] == "some/base" and settings["task_type"] == "CAUSAL_LM"
    assert len(peft_factors(_in_peft("llama", tmp_path))) == 3
    config, tensors, metadata = read_adapter(tmp_path)
    assert (config.rank, config.alpha, config.rslora) == (4, 8.0, True)
    assert tensors[f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight"].shape == (4, 32)
    told = {"format": "pt", "base_model_name_or_path": "some/base", "task_type": "CAUSAL_LM"}
    assert told.items() <= metadata.items() and metadata["deltaw.base_fingerprint"]
    save_adapter(model, tmp_path, task_type=None)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["auto_mapping"]["base_model_class"] == "LlamaForCausalLM"


def test_target_entries_tell_modules_apart():
    assert target_entries(["a.x", "b.x", "b.y"], ["a.x", "b.x"]) == ["x"]
    assert target_entries(["a.x", "b.x", "b.y"], ["b.x"]) == ["b.x"]
    assert target_entries(["x", "b.x"], ["x"]) == "x"
    assert target_entries(["a.x", "c.a.x", "b"], ["a.x", "b"]) == r"a\.x|b"


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_that_changed_weights_is_saved_as_a_plain_adapter_of_twice_the_rank(init, tmp_path):
    model = _trained("llama", init=init, target_modules=["q_proj"], alpha=6.0)
    save_adapter(model, tmp_path)
    adapter = read_adapter(tmp_path)
    assert (adapter.config.rank, adapter.config.alpha, adapter.config.init) == (8, 12.0, "uniform")
    merge(model, keep_original=False)
    with pytest.raises(UserError, match=init):
        save_adapter(model, tmp_path)


def test_an_adapter_of_a_merged_model_can_still_be_saved(tmp_path):
    model = _trained("llama")
    expected = logits(model, "llama")
    merge(model)
    save_adapter(model, tmp_path)
    load_adapter(again := tiny("llama"), tmp_path)
    assert torch.equal(logits(again, "llama"), expected)


def test_a_bf16_model_keeps_its_adapter_in_fp32_through_a_file(tmp_path):
    model, again = (tiny("llama").to(torch.bfloat16) for _ in range(2))
    attach(model, LoRAConfig(rank=4))
    save_adapter(perturb(model), tmp_path)
    load_adapter(again, tmp_path)
    pairs = zip(adapter_parameters(model), adapter_parameters(again), strict=True)
    assert all(torch.equal(a, b) and b.dtype == torch.float32 for (_, a), (_, b) in pairs)


@pytest.fixture
def saved(tmp_path) -> Path:
    """A folder with a good adapter, to be spoiled."""
    save_adapter(_trained("llama"), tmp_path / "adapter")
    return tmp_path / "adapter"


def _rewrite(folder: Path, **settings: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def _refused(folder: Path, family: str = "llama") -> str:
    model = tiny(family)
    before = {n: (id(m), m.training) for n, m in model.named_modules()}
    with pytest.raises(UserError) as caught:
        load_adapter(model, folder)
    assert before == {n: (id(m), m.training) for n, m in model.named_modules()}
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny(family).parameters(), strict=True))
    return str(caught.value)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
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
    ],
)
def test_settings_that_change_the_mathematics_are_refused_by_name(settings, named, saved):
    _rewrite(saved, **settings)
    assert named in _refused(saved)


def test_settings_without_effect_are_passed_over(saved):
    _rewrite(saved, of_tomorrow=None, of_yesterday=False, more=[], loftq_config={"loftq_bits": 4}, revision="main")
    load_adapter(tiny("llama"), saved)


_UP, _LAYER = "model.layers.1.mlp.up_proj", "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({f"{_LAYER}.lora_A.weight": torch.zeros(4, 31)}, "(4, 31)"),
        ({f"{_LAYER}.lora_A.weight": None}, "missing"),
        ({f"{_UP}.lora_A.weight": None, f"{_UP}.lora_B.weight": None}, _UP),
        ({"model.layers.9.self_attn.q_proj.lora_A.weight": torch.zeros(4, 32)}, "layers.9"),
        ({f"{_LAYER}.lora_magnitude_vector": torch.zeros(32)}, "lora_magnitude_vector"),
        ({"model.norm.weight": torch.zeros(32)}, "model.norm.weight"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(change, said, saved):
    path = saved / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path) | {PREFIX + name: tensor for name, tensor in change.items()}
    safetensors.torch.save_file({k: t for k, t in tensors.items() if t is not None}, path, {"format": "pt"})
    message = _refused(saved)
    assert said in message and next(iter(change)).partition(".lora")[0] in message


def test_missing_and_broken_files_and_adapters_of_other_models_are_refused(saved, tmp_path):
    assert "no adapter folder" in _refused(tmp_path / "nowhere")
    assert "adapter_config.json" in _refused(tmp_path)
    assert "base model" in _refused(saved, "gpt2")
    weights = saved / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"\xff" * 100, whole[:4]):
        weights.write_bytes(broken)
        assert "cut off or damaged" in _refused(saved)
    weights.unlink()
    assert "no adapter_model.safetensors" in _refused(saved)
    (saved / "adapter_model.bin").write_bytes(b"")
    assert "pickle" in _refused(saved)
    for text in ("{", "[]", "\udcff"):
        (saved / "adapter_config.json").write_text(text, errors="surrogateescape")
        assert "adapter_config.json" in _refused(saved)


def test_a_model_without_an_adapter_cannot_be_saved_and_one_with_one_not_loaded_onto(saved, tmp_path):
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
def test_an_adapter_can_be_trained_further_after_loading(family, tmp_path):
    model, again = _trained(family, target_modules="attention"), tiny(family)
    save_adapter(model, tmp_path)
    assert load_adapter(again, tmp_path, trainable=True).trained == count_parameters(model).trained
    again(**inputs(family)).logits.pow(2).mean().backward()
    assert all(p.grad is not None for _, p in adapter_parameters(again))
