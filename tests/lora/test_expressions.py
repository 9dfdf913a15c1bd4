"""Expressions over names: what they match, as `re` does, and that none of them holds a process up."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from deltaw.errors import UserError
from deltaw.lora import LoRAConfig, attach, expressions, load_adapter, read_adapter, save_adapter
from deltaw.lora.expressions import matches
from deltaw.lora.peft_updates import content_of
from tests.lora.models import tiny

NAMES = [
    "q_proj",
    "model.layers.0.self_attn.q_proj",
    "model.layers.10.self_attn.q_proj",
    "model.layers.0.mlp.up_proj",
    "model_layers.0.mlp",
    "vision.layers.0.self_attn.q_proj",
    "a-b.c",
]
# Each takes 2 to the power of a name's length.
ENDLESS = ["(([a-z_0-9]+)[.]?)+!", "(?:(?:[a-z_.0-9]+)+)+!", "(?=(.|.)*!)x|(?:(.|.)(.|.))+!"]


EXPRESSIONS = [
    "q_proj",
    r"model\.layers\.0\.self_attn\.q_proj|model.layers.0.mlp",
    "model.layers.0.mlp",
    "a-b.c|",
    r".*\.(q|up)_proj",
    r"^(model(?=\.).*\.(q_proj|k_proj))$",
    r"^(?!vision).*q_proj",
    r"(?:layers\.)?0\.mlp",
    r"(.)\w*\1",
    "[ab].*",
]


def test_expressions_mean_what_they_mean_in_python():
    full, ending = (matches("key", EXPRESSIONS, NAMES, endings=endings) for endings in (False, True))
    for expression, whole, ends in zip(EXPRESSIONS, full, ending, strict=True):
        assert whole == {name for name in NAMES if re.fullmatch(expression, name)}, expression
        assert ends == {name for name in NAMES if re.match(rf"(.*\.)?({expression})$", name)}, expression


@pytest.mark.parametrize("expression", ENDLESS)
def test_an_expression_that_never_ends_is_ended(expression, monkeypatch):
    monkeypatch.setattr(expressions, "SECONDS", 0.1)
    with pytest.raises(UserError, match=r"was ended after 0\.1 seconds") as caught:
        matches("target_modules", [expression], [f"{name}.weight" for name in NAMES])
    assert caught.value.where == "target_modules" and caught.value.hint


def test_compiling_is_limited_too(monkeypatch):
    monkeypatch.setattr(expressions, "SECONDS", 0.1)
    classes = "(?i)" + "[à-\U0010ffff]" * 2000
    for settings, said in (
        ({"target_modules": classes}, "was ended"),
        ({"exclude_modules": "(a)" + "b" * 199_999}, "an expression of 200,002 characters"),
        ({"rank_pattern": {f"layer_{number}": 2 for number in range(20_001)}}, "20,001 expressions"),
    ):
        with pytest.raises(UserError, match=said):
            LoRAConfig(**settings)


@pytest.mark.parametrize("expression", ["(", "a{1,99999999999}", "(?P<n>a" * 200])
def test_what_is_no_expression_is_refused(expression):
    for settings in ({"target_modules": expression}, {"alpha_pattern": {expression: 2.0}}):
        with pytest.raises(UserError, match="no regular expression"):
            LoRAConfig(**settings)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 takes a flag anywhere in an expression")
def test_a_flag_inside_a_key_is_refused_where_it_is_matched():
    with pytest.raises(UserError, match="no regular expression"):
        attach(tiny("llama"), LoRAConfig(rank_pattern={"(?i)Q_PROJ": 2}))


def _saved(folder: Path, **settings: object) -> Path:
    """An adapter whose file says these settings."""
    model = tiny("llama")
    attach(model, LoRAConfig(rank=2, target_modules=["q_proj"]))
    save_adapter(model, folder, base_model="tiny")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return folder


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
def test_an_adapter_with_an_endless_expression_is_refused(tmp_path, monkeypatch, key):
    monkeypatch.setattr(expressions, "SECONDS", 0.1)
    settings = {key: {ENDLESS[0]: 4} if key.endswith("pattern") else ENDLESS[0]}
    folder = _saved(tmp_path, **{"target_modules": "all-linear", **settings})
    with pytest.raises(UserError, match="was ended"):
        load_adapter(tiny("llama"), folder)
    if key == "alpha_pattern":  # which is read without a model too
        with pytest.raises(UserError, match="was ended"):
            content_of(read_adapter(folder))


def test_a_tensor_whose_name_is_very_long_is_refused(tmp_path):
    folder = _saved(tmp_path)
    name = "base_model.model." + "a." * 5000 + "lora_A.weight"
    safetensors.torch.save_file({name: torch.zeros(2, 2)}, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match="name has 10,030 characters"):
        read_adapter(folder)
