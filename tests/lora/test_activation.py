"""Activated LoRA on a model: the same logits and texts as PEFT's, whichever of the two made the adapter."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from deltaw.errors import UserError
from deltaw.kernels.layout import Layout
from deltaw.lora import LoRAConfig, attach, detach, disabled, load_adapter, merge, save_adapter
from deltaw.lora.adapted import invocation_starts
from deltaw.runtime.packed import packed_rows
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
    return _filled(model)


def _filled(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_gives_equal_logits_and_texts_from_a_saved_adapter(family, ids, tmp_path):
    ours = activated(family)
    save_adapter(ours, tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["alora_invocation_tokens"] == INVOCATION and settings["task_type"] == "CAUSAL_LM"
    theirs = PeftModel.from_pretrained(causal_model(family), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)
    mask = torch.ones_like(ids)
    written = ours.generate(ids, attention_mask=mask, **WRITING)
    assert torch.equal(written, theirs.generate(input_ids=ids, attention_mask=mask, **WRITING))
    assert torch.equal(written, ours.generate(ids, attention_mask=mask, use_cache=False, **WRITING))
    base = causal_model(family).generate(ids, attention_mask=mask, **WRITING)
    assert torch.equal(written[2], base[2]) and not torch.equal(written[:2], base[:2])


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_of_peft_gives_equal_logits(family, ids, tmp_path):
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", alora_invocation_tokens=INVOCATION
    )
    theirs = _filled(get_peft_model(causal_model(family), config)).eval()
    theirs.save_pretrained(tmp_path)
    ours = causal_model(family)
    load_adapter(ours, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)


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


def test_merging_is_refused():
    with pytest.raises(UserError, match="activated, and acts only from"):
        merge(activated("llama"))


def test_without_token_ids_nobody_knows_where_it_acts():
    model = activated("llama")
    with pytest.raises(UserError, match="needs the token ids"):
        model(inputs_embeds=torch.zeros(1, 3, 32))
    with torch.no_grad(), disabled(model):
        model(inputs_embeds=torch.zeros(1, 3, 32))


def test_packed_rows_must_say_where_it_acts(ids):
    model, layout = activated("llama"), Layout.of_lengths([17, 17])
    inputs = {
        "input_ids": ids[:2].reshape(1, -1),
        "position_ids": torch.from_numpy(layout.positions())[None],
        "packed_layout": layout,
        "use_cache": False,
    }
    active = torch.arange(17) >= torch.tensor([[10], [14]])
    with torch.no_grad():
        apart = model(input_ids=ids[:2]).logits
        with packed_rows(model):
            with pytest.raises(UserError, match="several rows are packed"):
                model(**inputs)
            packed = model(**inputs, adapter_active=active.reshape(1, -1)).logits
    torch.testing.assert_close(packed.view_as(apart), apart, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"dora": True}, "dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "bias 'all'"),
        ({"init": "pissa"}, "init 'pissa'"),
        ({"target_parameters": ["experts.up"]}, "target_parameters"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"train_modules": ["lm_head"]}, "train_modules"),
    ],
)
def test_what_changes_the_base_models_part_of_a_row_is_refused(changes, what):
    with pytest.raises(UserError, match=f"'completion' and {what}"):
        LoRAConfig(activation="completion", invocation_tokens=INVOCATION, **changes)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_layers_outside_of_blocks_are_refused(target):
    with pytest.raises(UserError, match="linear layers of blocks"):
        activated("llama", target_modules=[target])


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
