"""Tests of reading adapter folders for serving, and of rejecting unsupported ones before anything changes."""

from __future__ import annotations

import copy
import json
import pickle
import re

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from deltaw.decoding.adapters import FolderReader
from deltaw.errors import UserError
from deltaw.lora import OtherBaseModelWarning, load_adapter
from deltaw.methods.files import SavedConfig, write_trained_parameters
from deltaw.methods.prompt import PromptFile, SoftPrompt, write_prompt
from deltaw.methods.settings import PromptSettings
from deltaw.runtime.quantized_weights import quantize_int8
from tests.byte_models import byte_tokenizer, tiny_gpt2, tiny_llama
from tests.serving.adapter_folders import write_lora, write_soft_prompt


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def reader(model):
    return FolderReader(model, byte_tokenizer())


def assert_rejected(reader, folder, message) -> None:
    with pytest.raises(UserError, match=message):
        reader.read(folder)


def test_factors_match_adapted_layers(model, reader, tmp_path):
    pattern = {"rank_pattern": {"q_proj": 7}, "alpha_pattern": {"down_proj": 3.0}, "rslora": True}
    write_lora(model, tmp_path, layers="1", **pattern)
    parts = reader.read(tmp_path)
    adapted = copy.deepcopy(model)
    load_adapter(adapted, tmp_path)
    with pytest.raises(UserError, match="is attached to the base model"):
        FolderReader(adapted, None)
    assert len(parts.layers) == 7 and all(".layers.1." in name for name in parts.layers)
    for name, factors in parts.layers.items():
        layer = adapted.get_submodule(name)
        assert all(torch.equal(getattr(factors, n), getattr(layer, n)) for n in ("lora_A", "lora_B"))
        assert factors.scaling == layer.scaling
    assert {layer.lora_A.shape[1] for layer in parts.layers.values()} == {4, 7}
    gpt2 = tiny_gpt2()  # its layers store transposed weights
    write_lora(gpt2, tmp_path, target_modules=["c_attn"])
    factors = FolderReader(gpt2, None).read(tmp_path).layers["transformer.h.0.attn.c_attn"]
    assert factors.lora_A.shape == (32, 4) and factors.lora_B.shape == (4, 96)


def test_peft_adapter_is_read(model, reader, tmp_path):
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["v_proj", "up_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(copy.deepcopy(model), config).save_pretrained(tmp_path)
    parts = reader.read(tmp_path)
    assert {name.rpartition(".")[2] for name in parts.layers} == {"v_proj", "up_proj"}
    assert {factors.scaling for factors in parts.layers.values()} == {5 / 3}
    assert parts.info.invocation is None and parts.info.config is None


def test_soft_prompt_is_read_as_virtual_tokens(model, reader, tmp_path):
    parts = reader.read(write_soft_prompt(model, tmp_path, length=5))
    assert parts.prompt.shape == (5, 32) and not parts.layers and parts.info.virtual_tokens == 5


def test_template_terminators_and_invocation_are_read_from_folder(model, reader, tmp_path):
    write_lora(model, tmp_path, active="completion", invocation_tokens=[1, 100, 101])
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    info = reader.read(tmp_path).info
    assert info.invocation == (1, 100, 101) and {7, 9} <= set(info.terminators)
    messages = [{"role": "user", "content": "hm"}]
    assert info.tokenizer.apply_chat_template(messages, tokenize=False) == "<hm>"
    info = reader.read(write_lora(model, tmp_path / "bare")).info  # without these files, the base's apply
    assert set(info.terminators) == {0, 2}  # end of text and end of turn
    assert "im_start" in info.tokenizer.apply_chat_template(messages, tokenize=False)


ADAPTERS_BEYOND_LINEAR = [
    ({"dora": True}, "DoRA"),
    ({"lora_bias": True}, "lora_bias"),
    ({"train_modules": ["lm_head"]}, "lm_head"),
    ({"trainable_token_indices": [4, 5]}, "trainable_token_indices"),
    ({"target_modules": ["embed_tokens"]}, "embed_tokens"),
    ({"target_modules": ["q_proj"], "target_parameters": ["gate_proj.weight"]}, "gate_proj.weight"),
]


@pytest.mark.parametrize(("settings", "feature"), ADAPTERS_BEYOND_LINEAR)
def test_adapters_beyond_linear_factors_are_rejected(model, reader, tmp_path, settings, feature):
    assert_rejected(reader, write_lora(model, tmp_path, **settings), re.escape(feature))


@pytest.mark.parametrize("method", ["full", "last", "random", "bias", "head", "input"])
def test_methods_that_change_base_weights_are_rejected(reader, tmp_path, method):
    write_trained_parameters(tmp_path, SavedConfig(method, "tiny"), {"lm_head.weight": torch.zeros(259, 32)}, {})
    assert_rejected(reader, tmp_path, f"'{method}'.*changes weights(?s:.*)deltaw merge")


def test_other_base_is_rejected_by_fingerprint(model, tmp_path):
    swapped = copy.deepcopy(model)
    with torch.no_grad():
        swapped.model.layers[0].mlp.down_proj.weight[-1, -1] += 1e-3
    for other in (tiny_llama(seed=1), swapped):
        assert_rejected(FolderReader(other, None), write_lora(model, tmp_path), "another base model")


@pytest.mark.parametrize("trained_on", ["int8", "fp32"])
@pytest.mark.parametrize("served_on", ["int8", "fp32"])
def test_int8_base_is_distinguished_from_other_bases(tmp_path, trained_on, served_on):
    def base(precision: str, seed: int = 0):
        model = tiny_llama(seed)
        if precision == "int8":
            quantize_int8(model.base_model)
        return model

    write_lora(base(trained_on), tmp_path)
    assert FolderReader(base(served_on), None).read(tmp_path).layers
    assert_rejected(FolderReader(base(served_on, seed=1), None), tmp_path, "another base model")


def test_soft_prompt_for_other_base_is_rejected(model, reader, tmp_path):
    carrier = copy.deepcopy(model)
    method = SoftPrompt(PromptSettings(length=2))
    method.prepare(carrier, seed=0)
    method.save(carrier, tmp_path, base_model="tiny")
    assert reader.read(tmp_path).prompt is not None
    assert_rejected(FolderReader(tiny_llama(seed=1), None), tmp_path, "another base model")
    with pytest.warns(OtherBaseModelWarning):
        SoftPrompt().load(tiny_llama(seed=1), tmp_path)


def test_adapter_with_other_sizes_is_rejected(reader, tmp_path):
    other = tiny_llama(hidden_size=48)
    assert_rejected(reader, write_lora(other, tmp_path), r"does not fit.*\(4, 32\).*\(4, 48\)")
    assert_rejected(reader, write_soft_prompt(other, tmp_path), "48")


def test_unknown_modules_and_missing_or_extra_tensors_are_rejected(model, reader, tmp_path):
    write_lora(model, tmp_path, target_modules=["q_proj"])
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    for changed, message in (
        ({k: v for k, v in tensors.items() if k != key}, "missing"),
        ({**tensors, "base_model.model.model.norm.scale": torch.zeros(32)}, "matches no parameter"),
        ({k.replace("layers.0", "layers.7"): v for k, v in tensors.items()}, "matches no module"),
        ({**tensors, key: torch.full_like(tensors[key], float("nan"))}, "not finite"),
    ):
        save_file(changed, file)
        assert_rejected(reader, tmp_path, message)


def test_missing_damaged_and_pickled_files_are_rejected(model, reader, tmp_path):
    assert_rejected(reader, tmp_path / "nothing", "no adapter folder")
    assert_rejected(reader, tmp_path, "no adapter_config")
    write_lora(model, tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    pickled = tmp_path / "adapter_model.bin"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    assert_rejected(reader, tmp_path, "cut off or damaged")
    weights.unlink()
    pickled.write_bytes(pickle.dumps({}))
    assert_rejected(reader, tmp_path, "pickle")
    pickled.unlink()
    assert_rejected(reader, tmp_path, "no adapter_model")


def test_unknown_type_other_task_and_invalid_terminators_are_rejected(model, reader, tmp_path):
    write_lora(model, tmp_path)
    path = tmp_path / "adapter_config.json"
    settings = json.loads(path.read_text())
    for change, message in ({"peft_type": "IA3"}, "IA3"), ({"task_type": "SEQ_CLS"}, "sequence-classification"):
        path.write_text(json.dumps(settings | change))
        assert_rejected(reader, tmp_path, message)
    path.write_text(json.dumps(settings))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 100_000}))
    assert_rejected(reader, tmp_path, "100000")


def test_soft_prompt_with_trained_modules_is_rejected(reader, tmp_path):
    modules = {"lm_head.weight": torch.zeros(259, 32)}
    write_prompt(tmp_path, PromptFile(torch.zeros(2, 32), modules, extra_modules=["lm_head"]), {})
    assert_rejected(reader, tmp_path, "lm_head")


def test_reading_does_not_change_the_model(model, reader, tmp_path):
    before = {name: (id(module), type(module)) for name, module in model.named_modules()}
    bits = {name: p.clone() for name, p in model.named_parameters()}
    reader.read(write_lora(model, tmp_path))
    assert_rejected(reader, write_lora(model, tmp_path, dora=True), "DoRA")
    assert {name: (id(module), type(module)) for name, module in model.named_modules()} == before
    assert all(torch.equal(p, bits[name]) for name, p in model.named_parameters())
