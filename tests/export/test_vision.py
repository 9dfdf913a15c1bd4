"""Merge and export of adapters of vision-language models, which are trained through their text views."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from deltaw.export import gguf_architectures
from deltaw.export.as_adapter import write_adapter
from deltaw.export.combine import Recipe
from deltaw.export.gguf_adapter import export_gguf_adapter
from deltaw.export.merge import merge_run
from deltaw.export.merge_plan import MergeOptions
from deltaw.export.portable import export_folder
from deltaw.export.verify import MergeVerifier, Verification
from deltaw.hub.vision import text_view
from deltaw.lora import LoRAConfig, attach, save_adapter
from deltaw.lora.attachment import adapted_layers
from deltaw.reports.inspect import inspect_adapter
from deltaw.settings.method_registry import entry_of
from tests.conftest import refusal
from tests.export.merge_cases import perturb_adapter, read_config, silence_transformers
from tests.vision_models import FAMILIES, prompt, save_vision_model, token_kinds, vision_model

_FAMILIES = ("llava", "llava_next", "llava_onevision", "smolvlm", "idefics3", "internvl", "mistral3", "qwen2_vl")


def _base(folder: Path, family: str = "llava") -> Path:
    silence_transformers()
    vision_model(family).save_pretrained(folder)
    return folder


def _load(folder: Path) -> PreTrainedModel:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@torch.no_grad()
def _logits(family: str, model: nn.Module) -> Tensor:
    tokens = prompt(family)[None]
    return model(input_ids=tokens, **token_kinds(model, tokens), **FAMILIES[family].inputs()).logits


def _adapter(base: Path, folder: Path, **settings: object) -> tuple[PreTrainedModel, Path]:
    """Save an adapter. Return the complete model, with the adapter on its language model."""
    parts = text_view(_load(base))
    attach(parts.view, LoRAConfig(**{"rank": 4, "alpha": 8, **settings}), seed=0)
    save_adapter(perturb_adapter(parts.view), folder, base_model=str(base))
    parts.model.set_output_embeddings(parts.view.get_output_embeddings())
    return parts.model, folder


def _check_merged(family: str, base: Path, adapted: nn.Module, out: Path, changed: str) -> None:
    expected = _logits(family, adapted)
    assert (expected - _logits(family, _load(base))).norm() > 1e-3 * expected.norm()
    torch.testing.assert_close(_logits(family, _load(out)), expected, rtol=1e-4, atol=1e-4)
    before, after = (load_file(folder / "model.safetensors") for folder in (base, out))
    assert before.keys() == after.keys()
    differing = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert differing and all(changed in name for name in differing)
    assert not any("vision" in name for name in differing)
    assert read_config(out)["architectures"] == read_config(base)["architectures"]


@pytest.mark.parametrize("family", _FAMILIES)
def test_merged_folder_is_complete_model(family: str, tmp_path: Path) -> None:
    base = _base(tmp_path / "base", family)
    adapted, adapter = _adapter(base, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    assert merge_run(adapter, tmp_path / "out").same_base is True
    _check_merged(family, base, adapted, tmp_path / "out", "_proj")


def test_adapters_are_merged_into_files_with_old_names(tmp_path: Path) -> None:
    base = _base(tmp_path / "base")
    adapted, adapter = _adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    tensors = load_file(base / "model.safetensors")
    save_file({_old_name(name): t for name, t in tensors.items()}, base / "model.safetensors", {"format": "pt"})
    assert merge_run(adapter, tmp_path / "out").same_base is True
    _check_merged("llava", base, adapted, tmp_path / "out", "q_proj")
    assert "language_model.model.layers.0.mlp.up_proj.weight" in load_file(tmp_path / "out" / "model.safetensors")


def _old_name(name: str) -> str:
    """Return the name of a tensor in files of LLaVA before transformers 4.52."""
    for new, old in (("model.language_model.", "language_model.model."), ("lm_head.", "language_model.lm_head.")):
        name = old + name.removeprefix(new) if name.startswith(new) else name
    return name.removeprefix("model.")


@pytest.mark.parametrize(
    "settings",
    [
        {"dora": True, "target_modules": ["v_proj"]},
        {"target_modules": ["lm_head", "q_proj"]},
        {"target_modules": ["q_proj"], "train_modules": ["model.norm", "lm_head"]},
        {"target_modules": ["q_proj"], "init": "pissa"},
    ],
)
def test_other_parts_of_adapters_are_merged(settings: dict[str, object], tmp_path: Path) -> None:
    base = _base(tmp_path / "base")
    adapted, adapter = _adapter(base, tmp_path / "adapter", **settings)
    assert merge_run(adapter, tmp_path / "out").same_base is True
    _check_merged("llava", base, adapted, tmp_path / "out", "")


@pytest.mark.parametrize("name", ["head", "bias", "random", "last", "full", "input"])
def test_methods_that_train_base_parameters_can_be_loaded_and_merged(name: str, tmp_path: Path) -> None:
    base = _base(tmp_path / "base", "llava_onevision")
    parts = text_view(_load(base))
    method = entry_of(name).load().from_run(None, train=None, tokenizer=None)
    if name == "last":
        method.blocks = 1
    method.prepare(parts.view, seed=0)
    with torch.no_grad():
        for _, parameter in method.parameters(parts.view):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    method.after_step(parts.view)
    method.save(parts.view, tmp_path / "adapter", base_model=str(base))
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(key.startswith(("model.language_model.", "lm_head.")) for key in stored)
    reloaded = text_view(_load(base))
    entry_of(name).load().from_run(None, train=None, tokenizer=None).load(reloaded.view, tmp_path / "adapter")
    assert merge_run(tmp_path / "adapter", tmp_path / "out").same_base is True
    view = text_view(_load(tmp_path / "out")).view
    with torch.no_grad():
        expected = parts.view(prompt("llava")[None] % 250).logits
        for model in (reloaded.view, view):
            torch.testing.assert_close(model(prompt("llava")[None] % 250).logits, expected, rtol=1e-4, atol=1e-4)
        plain = text_view(_load(base)).view(prompt("llava")[None] % 250).logits
    assert (expected - plain).norm() > 1e-3 * plain.norm()


def test_other_base_model_is_rejected(tmp_path: Path) -> None:
    base = _base(tmp_path / "base")
    adapter = _adapter(base, tmp_path / "adapter")[1]
    tensors = load_file(base / "model.safetensors")
    name = next(name for name in tensors if "language_model" in name and "up_proj" in name)
    tensors[name] += 1
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    assert "trained on other weights" in refusal(merge_run, adapter, tmp_path / "out").message


def test_adapter_of_peft_on_vision_tower_can_be_merged(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = _base(tmp_path / "base")
    theirs = peft.get_peft_model(_load(base), peft.LoraConfig(r=4, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    theirs.save_pretrained(tmp_path / "adapter")
    merge_run(tmp_path / "adapter", tmp_path / "out", MergeOptions(model=str(base)))
    torch.testing.assert_close(
        _logits("llava", _load(tmp_path / "out")), _logits("llava", theirs), rtol=1e-4, atol=1e-4
    )


def test_merged_folder_has_processor_and_is_verified(tmp_path: Path) -> None:
    silence_transformers()
    base = save_vision_model("llava", tmp_path / "base")
    adapter = _adapter(base, tmp_path / "adapter")[1]
    result = merge_run(adapter, tmp_path / "out", verify=MergeVerifier())
    assert isinstance(result.verification, Verification) and result.verification.passed
    assert result.verification.adapter.mean > 0.1
    picture = Image.new("RGB", (40, 30), "red")
    first, second = (
        AutoProcessor.from_pretrained(folder, backend="pil")(images=picture, text="see <image>", return_tensors="pt")
        for folder in (base, tmp_path / "out")
    )
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == (base / "chat_template.jinja").read_text()


def test_adapters_are_combined_into_an_adapter_of_the_complete_model(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = _base(tmp_path / "base")
    adapted, first = _adapter(base, tmp_path / "first", target_modules=["q_proj"])
    expected = _logits("llava", adapted)
    options = MergeOptions(additional_adapters=(first,), recipe=Recipe("linear", (0.25, 0.75)))
    write_adapter(first, tmp_path / "both", options, rank=None)
    theirs = peft.PeftModel.from_pretrained(_load(base), tmp_path / "both")
    torch.testing.assert_close(_logits("llava", theirs), expected, rtol=1e-4, atol=1e-4)
    assert json.loads((tmp_path / "both" / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    merge_run(first, tmp_path / "out", options)
    torch.testing.assert_close(_logits("llava", _load(tmp_path / "out")), expected, rtol=1e-4, atol=1e-4)


def test_gguf_adapter_has_names_of_language_model(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    base = _base(tmp_path / "base")
    adapted, adapter = _adapter(base, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    export_gguf_adapter(adapter, tmp_path / "adapter.gguf")
    reader = gguf.GGUFReader(tmp_path / "adapter.gguf")
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    names = [f"blk.{i}.{name}.weight.lora_{part}" for i in (0, 1) for name in ("attn_q", "ffn_down") for part in "ab"]
    assert sorted(tensors) == sorted(names)
    assert reader.get_field("general.architecture").contents() == "llama"
    layer = next(
        layer for name, layer in adapted_layers(adapted) if name.endswith("language_model.layers.1.mlp.down_proj")
    )
    assert torch.equal(tensors["blk.1.ffn_down.weight.lora_a"], layer.lora_A.t())
    assert torch.equal(tensors["blk.1.ffn_down.weight.lora_b"], layer.lora_B.t())


def test_unsupported_exports_are_rejected_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(gguf_architectures._FAMILIES, "lfm2")
    base = _base(tmp_path / "lfm2", "lfm2_vl")
    adapter = _adapter(base, tmp_path / "lfm2_adapter", target_modules=["q_proj"])[1]
    error = refusal(export_gguf_adapter, adapter, tmp_path / "adapter.gguf")
    assert error.message == "deltaw does not export 'lfm2' models to GGUF"
    adapter = _adapter(_base(tmp_path / "next", "llava_next"), tmp_path / "adapter")[1]
    assert "vision-language" in refusal(export_folder, adapter, tmp_path / "mlx", "mlx").message
    assert not (tmp_path / "adapter.gguf").exists() and not (tmp_path / "mlx").exists()


def test_portable_adapter_loads_on_complete_model_in_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = _base(tmp_path / "base")
    settings = {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {"q_proj": 2}, "rslora": True}
    adapted, adapter = _adapter(base, tmp_path / "adapter", **settings)
    export_folder(adapter, tmp_path / "out")
    theirs = peft.PeftModel.from_pretrained(_load(base), tmp_path / "out")
    torch.testing.assert_close(_logits("llava", theirs), _logits("llava", adapted), rtol=1e-4, atol=1e-4)
    assert not any("vision" in name for name, _ in theirs.named_parameters() if "lora" in name)


def test_adapter_can_be_inspected(tmp_path: Path) -> None:
    _, adapter = _adapter(_base(tmp_path / "base"), tmp_path / "adapter", target_modules=["q_proj"])
    report = inspect_adapter(adapter)
    names = [f"model.language_model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    assert [module.module for module in report.modules] == names
    assert report.norm > 0 and [kind.kind for kind in report.kinds()] == ["q_proj"]
