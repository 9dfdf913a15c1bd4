"""Adapters of text views are exchanged with PEFT on the complete vision-language models."""

from __future__ import annotations

import copy
import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from deltaw.hub.mrope import image_grids
from deltaw.hub.vision import VisionLanguageModel, text_view
from deltaw.lora import LoRAConfig, attach, load_adapter, read_adapter, save_adapter
from deltaw.lora.complete_names import complete_names, set_complete_names
from deltaw.lora.files import read_factors
from deltaw.lora.starting import attach_from, concatenate, save_new_directions
from deltaw.runtime.image_tokens import image_embeddings
from tests.conftest import refusal
from tests.lora.models import perturb
from tests.vision_models import FAMILIES, IMAGE_TOKEN, prompt, token_kinds, vision_model

_FAMILIES = ("llava", "llava_next", "llava_onevision", "smolvlm", "idefics3", "internvl", "mistral3", "qwen2_vl")


def _view(family: str, **settings: object) -> VisionLanguageModel:
    """Create a view with a trained adapter, if settings are given."""
    parts = text_view(vision_model(family))
    if settings:
        attach(parts.view, LoRAConfig(**{"rank": 4, "alpha": 8.0, **settings}), seed=0)
        perturb(parts.view)
    return parts


@torch.no_grad()
def _view_logits(family: str, parts: VisionLanguageModel) -> Tensor:
    """Return the logits of the view for a prompt with an image."""
    tokens = prompt(family)
    inputs = FAMILIES[family].inputs()
    grids = image_grids(parts.model.config, inputs)
    with image_embeddings(parts.view, torch.cat(parts.features(inputs)), grids) as first_id:
        is_image = tokens == IMAGE_TOKEN
        ids = tokens.masked_scatter(is_image, torch.arange(first_id, first_id + int(is_image.sum())))
        return parts.view(input_ids=ids[None]).logits[0]


@torch.no_grad()
def _complete_logits(family: str, model: nn.Module) -> Tensor:
    tokens = prompt(family)[None]
    return model(input_ids=tokens, **token_kinds(model, tokens), **FAMILIES[family].inputs()).logits[0]


def _load_in_peft(family: str, folder: Path) -> PeftModel:
    """Load the adapter on the complete model with PEFT, and fail on any warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=".*ensure_weight_tying")
        return PeftModel.from_pretrained(vision_model(family), str(folder)).eval()


def _wrapped(model: nn.Module) -> list[str]:
    """Return the names of the modules that PEFT has wrapped."""
    names = (name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    return [name.removeprefix("base_model.model.") for name in names]


def _check_close(actual: Tensor, expected: Tensor, family: str) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    plain = _complete_logits(family, vision_model(family))
    assert (expected - plain).norm() > 1e-3 * plain.norm()


_ROUND_TRIPS = [(family, {"target_modules": "all-linear"}) for family in _FAMILIES] + [
    ("llava", {"target_modules": ["q_proj", "v_proj"], "dora": True}),
    ("smolvlm", {"rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"model\.layers\.1\..*": 3}}),
    ("llava", {"layers": "1", "rank_pattern": {"model.layers.1.self_attn.k_proj": 2}}),
    ("llava_onevision", {"target_modules": ["q_proj", "lm_head"], "train_modules": ["model.norm"]}),
    ("llava", {"target_modules": ["q_proj"], "train_modules": ["lm_head", "embed_tokens"]}),
    ("llava", {"target_modules": ["embed_tokens", "lm_head"]}),
    ("llava", {"target_modules": ["q_proj"], "trainable_token_indices": {"model.embed_tokens": [7, 9]}}),
    ("llava", {"target_modules": "model.layers.0.self_attn.q_proj", "init": "pissa"}),
    ("llava_onevision", {"target_modules": ["q_proj"], "bias": "lora_only"}),
]


@pytest.mark.parametrize(("family", "settings"), _ROUND_TRIPS)
def test_saved_adapter_loads_on_complete_model_in_peft(family, settings, tmp_path):
    parts = _view(family, **settings)
    expected = _view_logits(family, parts)
    save_adapter(parts.view, tmp_path, base_model="base")
    theirs = _load_in_peft(family, tmp_path)
    mapping = complete_names(parts.view)
    adapted = [layer.name for layer in vars(parts.view)["_deltaw_attachment"].layers]
    assert set(_wrapped(theirs)) >= {mapping.to_complete(name) for name in adapted}
    assert all(mapping.from_complete(name) is not None for name in _wrapped(theirs))
    _check_close(_complete_logits(family, theirs), expected, family)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    reloaded = _view(family)
    load_adapter(reloaded.view, tmp_path)
    _check_close(_view_logits(family, reloaded), expected, family)
    save_adapter(reloaded.view, tmp_path / "again", base_model="base")
    again = (tmp_path / "again" / "adapter_config.json").read_text()
    assert again == (tmp_path / "adapter_config.json").read_text()


_PEFT = {
    "expression": {"target_modules": r".*(language|text)_model.*\.(q_proj|v_proj|down_proj)"},
    "dora": {"target_modules": r".*language_model.*\.(q_proj|up_proj)", "use_dora": True},
    "rslora": {
        "target_modules": r".*language_model.*\.(q_proj|up_proj)",
        "use_rslora": True,
        "rank_pattern": {"q_proj": 2},
    },
    "layers": {"target_modules": ["gate_proj", "o_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "pattern": {"target_modules": ["gate_proj"], "rank_pattern": {r"language_model\.layers\.1\.mlp\.gate_proj": 2}},
    "modules": {"target_modules": r"model\.(language|text)_model.*gate_proj", "modules_to_save": ["lm_head"]},
    "tokens": {"target_modules": ["gate_proj"], "trainable_token_indices": {"embed_tokens": [7, 9]}},
}


_PEFT_CASES = [(family, name) for name in ("expression", "modules") for family in _FAMILIES]
_PEFT_CASES += [("llava", name) for name in _PEFT if name not in ("expression", "modules")]


@pytest.mark.parametrize(("family", "name"), _PEFT_CASES)
def test_adapter_trained_by_peft_on_complete_model_loads_on_view(family, name, tmp_path):
    settings = _PEFT[name]
    theirs = get_peft_model(vision_model(family), LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **settings))
    perturb(theirs).eval().save_pretrained(tmp_path)
    expected = _complete_logits(family, theirs)
    parts = _view(family)
    load_adapter(parts.view, tmp_path)
    _check_close(_view_logits(family, parts), expected, family)
    factors_on = text_view(vision_model(family)).view
    if name in ("expression", "rslora", "layers", "pattern"):
        layers = {name for name, _ in vars(parts.view)["_deltaw_attachment"].adapted()}
        assert read_factors(factors_on, tmp_path).layers.keys() == layers


@pytest.mark.parametrize(
    "targets", ["all-linear", ["q_proj"], r".*(language_model.*q_proj|multi_modal_projector.linear_\d)"]
)
def test_adapter_of_tower_or_connector_is_rejected_by_name(targets, tmp_path):
    theirs = get_peft_model(vision_model("llava"), LoraConfig(r=2, target_modules=targets))
    theirs.save_pretrained(tmp_path)
    view = _view("llava").view
    before = copy.deepcopy(view.state_dict())
    for load in (load_adapter, read_factors):
        error = refusal(load, view, tmp_path)
        assert error.message.startswith("the adapter changes modules outside of the language model: 'model.")
        assert all("language_model" not in name for name in error.message.split("'")[1::2])
        assert "deltaw merge" in error.hint and "lora.vision_tower" in error.hint
    assert all(torch.equal(value, before[name]) for name, value in view.state_dict().items())
    assert view.state_dict().keys() == before.keys()


def test_adapter_of_language_model_alone_is_not_confused_with_complete_model(tmp_path):
    text = copy.deepcopy(_view("llava").view)
    vars(text).pop("_deltaw_complete_names")
    attach(text, LoRAConfig(rank=2, target_modules=["q_proj"]))
    save_adapter(text, tmp_path)
    assert refusal(load_adapter, _view("llava").view, tmp_path).message.startswith(
        "the adapter changes modules outside"
    )


def test_new_adapter_starts_from_stored_one(tmp_path):
    parts = _view("llava", target_modules=["q_proj"], rank_pattern={"model.layers.1.self_attn.q_proj": 4})
    expected = _view_logits("llava", parts)
    save_adapter(parts.view, tmp_path)
    started = _view("llava")
    stored = read_adapter(tmp_path, lazy=True)
    _, ranks = attach_from(started.view, stored, stored.config, str(tmp_path), seed=0)
    assert ranks == {f"model.layers.{i}.self_attn.q_proj": 4 for i in range(2)}
    _check_close(_view_logits("llava", started), expected, "llava")


def test_new_adapter_is_stacked_on_stored_ones(tmp_path):
    parts = _view("llava", target_modules=["q_proj"])
    expected = _view_logits("llava", parts)
    save_adapter(parts.view, tmp_path / "stored")
    files = [read_adapter(tmp_path / "stored", lazy=True)] * 2
    combined = concatenate(files, [0.25, 0.75], 2.0, "start_from")
    stacked = _view("llava")
    config = replace(combined.config, rank=10, alpha=20.0)
    attach_from(stacked.view, combined, config, "start_from", seed=0)
    _check_close(_view_logits("llava", stacked), expected, "llava")
    perturb(stacked.view)
    save_new_directions(stacked.view, tmp_path / "new", 8, base_model="base")
    assert {
        len(module.lora_A["default"].weight)
        for module in _load_in_peft("llava", tmp_path / "new").modules()
        if isinstance(module, BaseTunerLayer)
    } == {2}


def test_trained_connector_has_its_name_in_complete_model(tmp_path):
    parts = _view("llava")
    features = torch.cat(parts.features(FAMILIES["llava"].inputs()))
    connector = copy.deepcopy(parts.model.model.multi_modal_projector)
    with image_embeddings(parts.view, features):
        parts.view.get_input_embeddings().add_module("multi_modal_projector", connector)
        name = "model.embed_tokens.multi_modal_projector"
        mapping = complete_names(parts.view).with_module(name, "model.multi_modal_projector")
        set_complete_names(parts.view, mapping)
        attach(parts.view, LoRAConfig(rank=2, target_modules=["q_proj"], train_modules=["multi_modal_projector"]))
        perturb(parts.view)
        save_adapter(parts.view, tmp_path)
        trained = parts.view.get_submodule(name).state_dict()
    theirs = _load_in_peft("llava", tmp_path).base_model.model.model.multi_modal_projector
    saved = theirs.modules_to_save["default"].state_dict()
    assert all(torch.equal(saved[key], value) for key, value in trained.items())
    assert not torch.equal(saved["linear_1.weight"], theirs.original_module.linear_1.weight)


def test_settings_may_name_modules_of_complete_model():
    view = _view("llava", target_modules=r"model\.language_model\.layers\.1\..*q_proj", rank=2).view
    assert [layer.name for layer in vars(view)["_deltaw_attachment"].layers] == ["model.layers.1.self_attn.q_proj"]
    view = _view("llava", exclude_modules=["language_model.layers.0"], target_modules="attention").view
    assert {layer.name.split(".")[2] for layer in vars(view)["_deltaw_attachment"].layers} == {"1"}
    error = refusal(_view, "llava", target_modules=["vision_tower.q_proj"])
    assert "vision_tower.q_proj" in error.message
