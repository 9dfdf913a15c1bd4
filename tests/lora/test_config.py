"""LoRA settings: names, limits, and errors for invalid values."""

from __future__ import annotations

import importlib
import types
from dataclasses import fields
from pathlib import Path

import pydantic
import pytest

import deltaw.lora
from deltaw.errors import UserError
from deltaw.lora import LoRAConfig
from deltaw.lora.config import parse_layers, scaling

_INVALID = {"rank": [0, 2.5, True], "alpha": [-1.0, float("nan"), "32"], "dropout": [1.0, -0.1], "init": ["kaiming"]}
_INVALID |= {"bias": ["some"], "rslora": ["yes"], "dora": ["yes"], "target_modules": [[], ["q_proj", ""], "("]}
_INVALID |= {"exclude_modules": [3], "layers": ["7-3", "a", [-1]], "rank_pattern": [{"q_proj": 0}]}
_INVALID |= {"alpha_pattern": [{"(": 1.0}], "train_modules": [[1]]}
_INVALID |= {"trainable_token_indices": [[3, 3], [-1], {"embed": ["a"]}, [True]]}
_INVALID_COMBINATIONS = [
    ({"lora_bias": True, "dora": True}, "lora_bias"),
    ({"lora_bias": True, "init": "gaussian"}, "lora_bias"),
    ({"target_parameters": ["w"], "dropout": 0.1}, "dropout"),
    ({"target_parameters": ["w"], "dora": True}, "dora"),
    ({"target_parameters": ["w"], "lora_bias": True}, "lora_bias"),
    ({"rank": 3, "init": "orthogonal"}, "rank"),
]


@pytest.mark.parametrize(
    ("settings", "location"),
    [*_INVALID_COMBINATIONS, *(({key: value}, key) for key, values in _INVALID.items() for value in values)],
)
def test_invalid_settings_are_rejected_by_key(settings, location):
    with pytest.raises(UserError) as raised:
        LoRAConfig(**settings)
    assert raised.value.location.partition("[")[0] == location and location in str(raised.value)


def test_peft_names_are_accepted():
    kind = {"init_lora_weights": True, "use_rslora": True, "use_dora": False, "exclude_modules": None}
    peft = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "layers_to_transform": 3, "modules_to_save": ["lm_head"]}
    expected = LoRAConfig(rank=4, alpha=8.0, dropout=0.1, rslora=True, layers=[3], train_modules=["lm_head"])
    assert LoRAConfig.from_dict({**peft, **kind}) == expected
    assert LoRAConfig(**peft, **kind) == expected
    assert LoRAConfig(alora_invocation_tokens=[5]) == LoRAConfig(active="completion", invocation_tokens=[5])


@pytest.mark.parametrize("create", [LoRAConfig.from_dict, lambda values: LoRAConfig(**values)])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lora_alhpa": 3}, "lora_alpha"),
        ({"r": 3, "rank": 3}, "twice"),
        ({"task_type": "CAUSAL_LM"}, "the model determines the task"),
    ],
)
def test_unknown_and_duplicate_keys_are_rejected(create, values, message):
    with pytest.raises(UserError, match=message):
        create(values)


def test_every_setting_has_description():
    assert all(f.metadata["description"] for f in fields(LoRAConfig))


def test_config_works_as_pydantic_field():
    class Run(pydantic.BaseModel):
        lora: LoRAConfig = LoRAConfig()

    assert Run(lora={"rank": 4, "layers": "2-"}).lora.layers == "2-"
    with pytest.raises(pydantic.ValidationError):
        Run(lora={"rnk": 4})


def test_layers_are_parsed_and_scaling_is_computed():
    assert parse_layers("0-3, 8,16-") == [(0, 3), (8, 8), (16, None)]
    assert parse_layers([1, 2]) == [(1, 1), (2, 2)]
    assert (scaling(16, 32.0), scaling(16, 32.0, rslora=True)) == (2.0, 8.0)


def test_target_modules_may_be_empty_with_parameters_or_tokens():
    config = LoRAConfig(target_modules=[], target_parameters="experts.down_proj", trainable_token_indices={5})
    assert config.target_parameters == ["experts.down_proj"] and config.trainable_token_indices == [5]
    assert LoRAConfig.from_dict({"trainable_token_indices": {"wte": [1]}, "lora_bias": True}).lora_bias


def test_public_names_are_not_shadowed_by_modules():
    for path in Path(deltaw.lora.__file__).parent.glob("*.py"):
        importlib.import_module(f"deltaw.lora.{path.stem}")
    assert not any(isinstance(getattr(deltaw.lora, name), types.ModuleType) for name in deltaw.lora.__all__)
