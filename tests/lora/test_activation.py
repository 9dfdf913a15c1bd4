"""Activated LoRA on a model: the same logits and texts as PEFT's, whichever of the two made the adapter."""

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
from deltaw.lora.adapted import invocation_starts
from deltaw.runtime.packed import packed_rows
from tests.lora.models import perturb
from tests.tiny_models import causal_model

INVOCATION = [5, 7, 9]
FAMILIES = ("llama", "gpt2", "qwen3")
WRITING = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture
def ids() -> torch.Tensor:
    """Rows with the sequence twice, once at the end, and not at all."""
    rows = torch.randint(10, 97, (3, 17), generator=torch.Generator().manual_seed(1))
    rows[0, 4:7] = rows[0, 10:13] = rows[1, 14:17] = torch.tensor(INVOCATION)
    return rows


def activated(family: str, **changes: object) -> nn.Module:
    model = causal_model(family)
    settings = {"rank": 4, "alpha": 8, "activation": "completion", "invocation_tokens": INVOCATION}
    attach(model, LoRAConfig(**{**settings, **changes}), seed=0)
    return perturb(model, 0.2)


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_gives_equal_logits_and_texts_from_a_saved_adapter_and_saves_it_for_us(family, ids, tmp_path):
    ours, again = activated(family), causal_model(family)
    save_adapter(ours, tmp_path / "ours")
    settings = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert settings["alora_invocation_tokens"] == INVOCATION and settings["task_type"] == "CAUSAL_LM"
    theirs = PeftModel.from_pretrained(causal_model(family), tmp_path / "ours").eval()
    theirs.save_pretrained(tmp_path / "theirs")
    load_adapter(again, tmp_path / "theirs")
    with torch.no_grad():
        for model in (ours, again):
            torch.testing.assert_close(model(input_ids=ids).logits, theirs(input_ids=ids).logits)
    mask = torch.ones_like(ids)
    written = ours.generate(ids, attention_mask=mask, **WRITING)
    assert torch.equal(written, theirs.generate(input_ids=ids, attention_mask=mask, **WRITING))
    assert torch.equal(written, ours.generate(ids, attention_mask=mask, use_cache=False, **WRITING))
    base = causal_model(family).generate(ids, attention_mask=mask, **WRITING)
    assert torch.equal(written[2], base[2]) and not torch.equal(written[:2], base[:2])


@pytest.mark.parametrize("family", FAMILIES)
def test_it_acts_from_the_last_occurrence_on_and_nowhere_else(family, ids):
    model, base = activated(family), causal_model(family)
    with torch.no_grad():
        ours, bare = model(input_ids=ids).logits, base(input_ids=ids).logits
        assert torch.equal(ours[0, :10], bare[0, :10]) and torch.equal(ours[2], bare[2])
        assert not torch.isclose(ours[0, 10:], bare[0, 10:]).all(-1).any()
        with disabled(model):
            assert torch.equal(model(input_ids=ids).logits, bare)
        again = copy.deepcopy(model)(input_ids=ids).logits
    assert torch.equal(again, ours)
    detach(model)
    assert not model.base_model._forward_pre_hooks and not model.base_model._forward_hooks
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, bare)


def test_a_cache_of_states_remembers_which_rows_are_invoked(ids):
    for family in ("bloom", "mamba"):
        targets = ["in_proj"] if family == "mamba" else "all-linear"
        model, mask = activated(family, target_modules=targets), torch.ones_like(ids)
        written = model.generate(ids, attention_mask=mask, **WRITING)
        assert torch.equal(written, model.generate(ids, attention_mask=mask, use_cache=False, **WRITING))


def test_a_model_called_piece_by_piece_gives_what_it_gives_at_once(ids):
    model = activated("llama")
    with torch.no_grad():
        first = model(input_ids=ids[:, :14], use_cache=True)
        rest = model(input_ids=ids[:, 14:], past_key_values=first.past_key_values)
        whole = model(input_ids=ids)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), whole.logits)


def test_dropout_is_drawn_where_the_adapter_acts_alone(ids):
    model = activated("llama", dropout=0.5).train()
    with torch.no_grad():
        one, other = model(input_ids=ids).logits, model(input_ids=ids).logits
    assert torch.equal(one[0, :10], other[0, :10]) and not torch.equal(one[0, 10:], other[0, 10:])


def test_merging_and_calls_without_token_ids_are_refused():
    model = activated("llama")
    with pytest.raises(UserError, match="activated, and acts only from"):
        merge(model)
    with pytest.raises(UserError, match="needs the token ids"):
        model(inputs_embeds=torch.zeros(1, 3, 32))
    with torch.no_grad(), disabled(model):
        model(inputs_embeds=torch.zeros(1, 3, 32))


def test_packed_rows_must_say_where_it_acts(ids):
    model, layout = activated("llama"), Layout.of_lengths([17, 17])
    row = {"input_ids": ids[:2].reshape(1, -1), "position_ids": torch.from_numpy(layout.positions())[None]}
    inputs = {**row, "packed_layout": layout, "use_cache": False}
    active = torch.arange(17) >= torch.tensor([[10], [14]])
    with torch.no_grad():
        apart = model(input_ids=ids[:2]).logits
        with packed_rows(model):
            with pytest.raises(UserError, match="several rows are packed"):
                model(**inputs)
            packed = model(**inputs, adapter_active=active.reshape(1, -1)).logits
    torch.testing.assert_close(packed.view_as(apart), apart, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dora": True}, "'completion' and dora"),
        ({"lora_bias": True}, "'completion' and lora_bias"),
        ({"bias": "all"}, "'completion' and bias 'all'"),
        ({"init": "pissa"}, "'completion' and init 'pissa'"),
        ({"target_parameters": ["experts.up"]}, "'completion' and target_parameters"),
        ({"trainable_token_indices": [3]}, "'completion' and trainable_token_indices"),
        ({"train_modules": ["lm_head"]}, "'completion' and train_modules"),
        ({"target_modules": ["lm_head"]}, "linear layers of blocks"),
        ({"target_modules": ["embed_tokens"]}, "linear layers of blocks"),
    ],
)
def test_what_changes_the_base_models_part_of_a_row_is_refused(changes, said):
    with pytest.raises(UserError, match=said):
        activated("llama", **changes)


def test_settings_are_checked_and_named_as_in_peft():
    config = LoRAConfig.from_dict({"r": 4, "alora_invocation_tokens": [3, 4]})
    assert (config.activation, config.invocation_tokens) == ("completion", [3, 4])
    with pytest.raises(UserError, match="not always active"):
        LoRAConfig(invocation_tokens=[3])
    for wrong in ([], "", [-1], [1.5], 7):
        with pytest.raises(UserError, match="invocation_tokens cannot be"):
            LoRAConfig(activation="completion", invocation_tokens=wrong)
    with pytest.raises(UserError, match="as token ids"):
        attach(causal_model("llama"), LoRAConfig(activation="completion"))


def test_the_last_occurrence_is_found_in_every_row():
    ids = torch.tensor([[1, 2, 1, 2, 3], [2, 1, 1, 1, 2], [3, 3, 3, 3, 1]])
    assert invocation_starts(ids, [1, 2]).tolist() == [2, 3, 5]
    assert invocation_starts(ids[:, :1], [1, 2]).tolist() == [1, 1, 1]
