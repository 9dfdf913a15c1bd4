"""Settings: their names, their limits, and what is said where they cannot be used."""

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


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rank", 0),
        ("rank", 2.5),
        ("rank", True),
        ("alpha", -1.0),
        ("alpha", float("nan")),
        ("alpha", "32"),
        ("dropout", 1.0),
        ("dropout", -0.1),
        ("init", "kaiming"),
        ("bias", "some"),
        ("rslora", "yes"),
        ("dora", "yes"),
        ("target_modules", []),
        ("target_modules", ["q_proj", ""]),
        ("target_modules", "("),
        ("exclude_modules", 3),
        ("layers", "7-3"),
        ("layers", "a"),
        ("layers", [-1]),
        ("rank_pattern", {"q_proj": 0}),
        ("alpha_pattern", {"(": 1.0}),
        ("train_modules", [1]),
    ],
)
def test_a_value_that_cannot_be_used_is_refused_by_its_key(key, value):
    with pytest.raises(UserError) as caught:
        LoRAConfig(**{key: value})
    assert key in str(caught.value)


def test_orthogonal_needs_an_even_rank():
    with pytest.raises(UserError, match="even"):
        LoRAConfig(rank=3, init="orthogonal")


def test_pefts_names_are_accepted():
    config = LoRAConfig.from_dict(
        {
            "r": 4,
            "lora_alpha": 8,
            "lora_dropout": 0.1,
            "init_lora_weights": True,
            "use_rslora": True,
            "use_dora": False,
            "layers_to_transform": 3,
            "modules_to_save": ["lm_head"],
            "exclude_modules": None,
        }
    )
    expected = LoRAConfig(rank=4, alpha=8.0, dropout=0.1, rslora=True, layers=[3], train_modules=["lm_head"])
    assert config == expected


def test_an_unknown_key_names_the_nearest():
    with pytest.raises(UserError, match="lora_alpha"):
        LoRAConfig.from_dict({"lora_alhpa": 3})


def test_a_setting_under_both_names_is_refused():
    with pytest.raises(UserError, match="twice"):
        LoRAConfig.from_dict({"r": 3, "rank": 3})


def test_every_setting_is_described():
    assert all(f.metadata["description"] for f in fields(LoRAConfig))


def test_it_serves_as_a_field_of_a_pydantic_model():
    class Run(pydantic.BaseModel):
        lora: LoRAConfig = LoRAConfig()

    assert Run(lora={"rank": 4, "layers": "2-"}).lora.layers == "2-"
    with pytest.raises(pydantic.ValidationError):
        Run(lora={"rnk": 4})


def test_layers_are_read():
    assert parse_layers("0-3, 8,16-") == [(0, 3), (8, 8), (16, None)]
    assert parse_layers([1, 2]) == [(1, 1), (2, 2)]


def test_scaling():
    assert scaling(16, 32.0) == 2.0 and scaling(16, 32.0, rslora=True) == 8.0


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"lora_bias": True, "dora": True}, "lora_bias"),
        ({"lora_bias": True, "init": "gaussian"}, "lora_bias"),
        ({"target_parameters": ["w"], "dropout": 0.1}, "dropout"),
        ({"target_parameters": ["w"], "dora": True}, "dora"),
        ({"target_parameters": ["w"], "lora_bias": True}, "lora_bias"),
        ({"target_modules": []}, "target_modules"),
        ({"trainable_token_indices": [3, 3]}, "trainable_token_indices"),
        ({"trainable_token_indices": [-1]}, "trainable_token_indices"),
        ({"trainable_token_indices": {"embed": ["a"]}}, "trainable_token_indices"),
        ({"trainable_token_indices": [True]}, "trainable_token_indices"),
    ],
)
def test_settings_of_parts_that_cannot_be(settings, where):
    with pytest.raises(UserError) as caught:
        LoRAConfig(**settings)
    assert caught.value.where == where


def test_no_modules_are_needed_where_parts_are_named():
    config = LoRAConfig(target_modules=[], target_parameters="experts.down_proj", trainable_token_indices={5})
    assert config.target_parameters == ["experts.down_proj"] and config.trainable_token_indices == [5]
    assert LoRAConfig.from_dict({"trainable_token_indices": {"wte": [1]}, "lora_bias": True}).lora_bias


def test_every_public_name_is_what_it_says_once_all_modules_are_loaded():
    for path in Path(deltaw.lora.__file__).parent.glob("*.py"):
        importlib.import_module(f"deltaw.lora.{path.stem}")
    assert not any(isinstance(getattr(deltaw.lora, name), types.ModuleType) for name in deltaw.lora.__all__)
