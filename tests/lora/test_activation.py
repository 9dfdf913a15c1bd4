"""Activated LoRA: logits and generated text match PEFT for adapters of either library."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import PeftModel
from torch import nn

from deltaw.errors import UserError
from deltaw.kernels.layout import Layout
from deltaw.lora import LoRAConfig, attach, detach, disabled, load_adapter, merge, save_adapter
from deltaw.lora.adapted import find_invocation_starts
from deltaw.runtime.packed import packed_rows
from tests.lora.models import perturb
from tests.tiny_models import causal_model

INVOCATION = [5, 7, 9]
FAMILIES = ("llama", "gpt2", "qwen3")
GENERATION_OPTIONS = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture
def ids() -> torch.Tensor:
    """Rows that contain the invocation sequence twice, once at the end, and not at all."""
    rows = torch.randint(10, 97, (3, 17), generator=torch.Generator().manual_seed(1))
    rows[0, 4:7] = rows[0, 10:13] = rows[1, 14:17] = torch.tensor(INVOCATION)
    return rows


def activated(family: str, **overrides: object) -> nn.Module:
    model = causal_model(family)
    settings = {"rank": 4, "alpha": 8, "active": "completion", "invocation_tokens": INVOCATION}
    attach(model, LoRAConfig(**{**settings, **overrides}), seed=0)
    return perturb(model, 0.2)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_adapter_matches_peft_in_both_directions(family, ids, tmp_path):
    ours = activated(family)
    reloaded = causal_model(family)
    save_adapter(ours, tmp_path / "ours")
    settings = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert settings["alora_invocation_tokens"] == INVOCATION and settings["task_type"] == "CAUSAL_LM"
    theirs = PeftModel.from_pretrained(causal_model(family), tmp_path / "ours").eval()
    theirs.save_pretrained(tmp_path / "theirs")
    load_adapter(reloaded, tmp_path / "theirs")
    with torch.no_grad():
        for model in (ours, reloaded):
            torch.testing.assert_close(model(input_ids=ids).logits, theirs(input_ids=ids).logits)
    mask = torch.ones_like(ids)
    generated = ours.generate(ids, attention_mask=mask, **GENERATION_OPTIONS)
    assert torch.equal(generated, theirs.generate(input_ids=ids, attention_mask=mask, **GENERATION_OPTIONS))
    assert torch.equal(generated, ours.generate(ids, attention_mask=mask, use_cache=False, **GENERATION_OPTIONS))
    base = causal_model(family).generate(ids, attention_mask=mask, **GENERATION_OPTIONS)
    assert torch.equal(generated[2], base[2]) and not torch.equal(generated[:2], base[:2])


@pytest.mark.parametrize("family", FAMILIES)
def test_adapter_is_active_only_after_last_invocation(family, ids):
    model = activated(family)
    base = causal_model(family)
    with torch.no_grad():
        ours = model(input_ids=ids).logits
        plain = base(input_ids=ids).logits
        assert torch.equal(ours[0, :10], plain[0, :10]) and torch.equal(ours[2], plain[2])
        assert not torch.isclose(ours[0, 10:], plain[0, 10:]).all(-1).any()
        with disabled(model):
            assert torch.equal(model(input_ids=ids).logits, plain)
        copied = copy.deepcopy(model)(input_ids=ids).logits
    assert torch.equal(copied, ours)
    detach(model)
    assert not model.base_model._forward_pre_hooks and not model.base_model._forward_hooks
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, plain)


def test_state_cache_preserves_active_rows(ids):
    for family in ("bloom", "mamba"):
        targets = ["in_proj"] if family == "mamba" else "all-linear"
        model = activated(family, target_modules=targets)
        mask = torch.ones_like(ids)
        generated = model.generate(ids, attention_mask=mask, **GENERATION_OPTIONS)
        assert torch.equal(generated, model.generate(ids, attention_mask=mask, use_cache=False, **GENERATION_OPTIONS))


def test_incremental_forward_matches_single_forward(ids):
    model = activated("llama")
    with torch.no_grad():
        first = model(input_ids=ids[:, :14], use_cache=True)
        rest = model(input_ids=ids[:, 14:], past_key_values=first.past_key_values)
        full = model(input_ids=ids)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), full.logits)


def test_dropout_applies_only_at_active_positions(ids):
    model = activated("llama", dropout=0.5).train()
    with torch.no_grad():
        first = model(input_ids=ids).logits
        second = model(input_ids=ids).logits
    assert torch.equal(first[0, :10], second[0, :10]) and not torch.equal(first[0, 10:], second[0, 10:])


def test_merge_and_calls_without_token_ids_raise():
    model = activated("llama")
    with pytest.raises(UserError, match="activated: it acts only from"):
        merge(model)
    with pytest.raises(UserError, match="needs the token ids"):
        model(inputs_embeds=torch.zeros(1, 3, 32))
    with torch.no_grad(), disabled(model):
        model(inputs_embeds=torch.zeros(1, 3, 32))


def test_packed_rows_require_active_mask(ids):
    model = activated("llama")
    layout = Layout.of_lengths([17, 17])
    row = {"input_ids": ids[:2].reshape(1, -1), "position_ids": torch.from_numpy(layout.positions())[None]}
    inputs = {**row, "packed_layout": layout, "use_cache": False}
    active = torch.arange(17) >= torch.tensor([[10], [14]])
    with torch.no_grad():
        separate = model(input_ids=ids[:2]).logits
        with packed_rows(model):
            with pytest.raises(UserError, match="rows are packed"):
                model(**inputs)
            packed = model(**inputs, adapter_active=active.reshape(1, -1)).logits
    torch.testing.assert_close(packed.view_as(separate), separate, rtol=1e-4, atol=1e-4)


_REJECTED_SETTINGS = [
    ({"dora": True}, "completion and dora"),
    ({"lora_bias": True}, "completion and lora_bias"),
    ({"bias": "all"}, "completion and bias 'all'"),
    ({"init": "pissa"}, "completion and init 'pissa'"),
    ({"target_parameters": ["experts.up"]}, "completion and target_parameters"),
    ({"trainable_token_indices": [3]}, "completion and trainable_token_indices"),
    ({"train_modules": ["lm_head"]}, "completion and train_modules"),
    ({"target_modules": ["lm_head"]}, "linear layers of blocks"),
    ({"target_modules": ["embed_tokens"]}, "linear layers of blocks"),
]


@pytest.mark.parametrize(("changes", "message"), _REJECTED_SETTINGS)
def test_settings_that_change_the_prompt_are_rejected(changes, message):
    with pytest.raises(UserError, match=message):
        activated("llama", **changes)


def test_settings_are_validated_and_accept_peft_names():
    config = LoRAConfig.from_dict({"r": 4, "alora_invocation_tokens": [3, 4]})
    assert (config.active, config.invocation_tokens) == ("completion", [3, 4])
    with pytest.raises(UserError, match="only for an activated adapter"):
        LoRAConfig(invocation_tokens=[3])
    for invalid in ([], "", [-1], [1.5], 7):
        with pytest.raises(UserError, match="invocation_tokens cannot be"):
            LoRAConfig(active="completion", invocation_tokens=invalid)
    with pytest.raises(UserError, match="as token ids"):
        attach(causal_model("llama"), LoRAConfig(active="completion"))


def test_last_invocation_is_located_in_every_row():
    ids = torch.tensor([[1, 2, 1, 2, 3], [2, 1, 1, 1, 2], [3, 3, 3, 3, 1]])
    assert find_invocation_starts(ids, [1, 2]).tolist() == [2, 3, 5]
    assert find_invocation_starts(ids[:, :1], [1, 2]).tolist() == [1, 1, 1]
