"""Text views of vision-language models compute the same as the complete models."""

from __future__ import annotations

import pytest
import torch
import transformers
from packaging.version import parse

from deltaw.hub.checkpoint import read_checkpoint
from deltaw.hub.parameter_names import match_names
from deltaw.hub.vision import VisionTower, is_vision_language, text_view
from deltaw.lora.complete_names import complete_names
from deltaw.runtime.image_tokens import verify_view
from tests.conftest import refusal
from tests.vision_models import FAMILIES, IMAGE_TOKEN, prompt, vision_model

# Families whose image tokens do not form one causal sequence with the text.
OTHER_ATTENTION = ("paligemma", "gemma3")
# Families with features of images in several blocks.
DEEPSTACK = ("qwen3_vl",)
# Families whose complete model, unlike the causal class of their language model, does not scale the logits.
OTHER_LOGITS = ("cohere2_vision",)
if parse(transformers.__version__) < parse("5.25"):
    OTHER_LOGITS += ("aya_vision",)
# Families with a connector that maps features one by one.
STORED_INPUTS = ("llava", "vipllava", "smolvlm", "idefics3", "internvl", "paligemma")
CAUSAL = [name for name in FAMILIES if name not in (*OTHER_ATTENTION, *DEEPSTACK, *OTHER_LOGITS)]


@pytest.mark.parametrize("family", CAUSAL)
def test_view_gives_logits_of_model(family):
    model = vision_model(family)
    inputs = FAMILIES[family].inputs()
    assert is_vision_language(model.config)
    parts = text_view(model)
    verify_view(parts, prompt(family), inputs, IMAGE_TOKEN)
    assert not is_vision_language(parts.view.config)
    shared = {id(p) for p in model.parameters()}
    assert all(id(p) in shared for p in parts.view.parameters())
    names = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in parts.view.named_parameters():
        assert names[complete_names(parts.view).to_complete(name)] is parameter


@pytest.mark.parametrize("family", OTHER_ATTENTION)
def test_bidirectional_images_are_rejected(family):
    error = refusal(text_view, vision_model(family))
    assert f"a {family} model is not supported: its image tokens attend" in error.message


@pytest.mark.parametrize("family", DEEPSTACK)
def test_features_in_several_blocks_are_rejected(family):
    error = refusal(text_view, vision_model(family))
    assert f"a {family} model is not supported: several of its blocks read features" in error.message


@pytest.mark.parametrize("family", FAMILIES)
def test_connectors_are_trained_on_stored_features_or_rejected(family):
    tower = VisionTower(vision_model(family))
    if family in STORED_INPUTS:
        rows = tower.connector_inputs(FAMILIES[family].inputs())
        mapped = tower.require_connector()(torch.cat(rows))
        torch.testing.assert_close(mapped, torch.cat(tower.features(FAMILIES[family].inputs())))
    else:
        error = refusal(tower.connector_inputs, FAMILIES[family].inputs())
        assert f"the connector of a {family} model cannot be trained" in error.message


@pytest.mark.parametrize("family", OTHER_LOGITS)
def test_other_outputs_are_rejected(family):
    parts = text_view(vision_model(family))
    error = refusal(verify_view, parts, prompt(family), FAMILIES[family].inputs(), IMAGE_TOKEN)
    assert f"a {family} model is not supported: its outputs differ by 93" in error.message


@pytest.mark.parametrize("family", ["llava", "llava_onevision", "smolvlm", "internvl", "mistral3", "qwen2_vl"])
def test_names_in_weight_files_match_parameters_of_view(family, tmp_path):
    model = vision_model(family)
    model.save_pretrained(tmp_path)
    view = text_view(model).view
    checkpoint = read_checkpoint(tmp_path)
    names = match_names(view, checkpoint.tensors)
    parameters = dict(view.named_parameters())
    assert names.stored.keys() == parameters.keys() and not names.converted
    for name, parameter in parameters.items():
        assert torch.equal(checkpoint.tensors[names.stored[name]].load(), parameter)
    assert len(names.unused) == len(checkpoint.tensors) - len(parameters)
