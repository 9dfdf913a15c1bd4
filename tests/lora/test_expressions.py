"""Regular expressions over module names match as in ``re``, and their time is limited."""

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
from deltaw.lora.peft_updates import read_content
from tests.lora.models import tiny

NAMES = ["q_proj", "model.layers.0.self_attn.q_proj", "model.layers.10.self_attn.q_proj", "model.layers.0.mlp.up_proj"]
NAMES += ["model_layers.0.mlp", "vision.layers.0.self_attn.q_proj", "a-b.c"]
# Matching time of each is exponential in the length of a name.
EXPONENTIAL = ["(([a-z_0-9]+)[.]?)+!", "(?:(?:[a-z_.0-9]+)+)+!", "(?=(.|.)*!)x|(?:(.|.)(.|.))+!"]


EXPRESSIONS = ["q_proj", r"model\.layers\.0\.self_attn\.q_proj|model.layers.0.mlp", "model.layers.0.mlp", "a-b.c|"]
EXPRESSIONS += [r".*\.(q|up)_proj", r"^(model(?=\.).*\.(q_proj|k_proj))$", r"^(?!vision).*q_proj"]
EXPRESSIONS += [r"(?:layers\.)?0\.mlp", r"(.)\w*\1", "[ab].*"]


def test_expressions_match_as_in_python():
    full_matches, suffix_matches = (matches("key", EXPRESSIONS, NAMES, endings=endings) for endings in (False, True))
    for expression, full, suffix in zip(EXPRESSIONS, full_matches, suffix_matches, strict=True):
        assert full == {name for name in NAMES if re.fullmatch(expression, name)}, expression
        assert suffix == {name for name in NAMES if re.match(rf"(.*\.)?({expression})$", name)}, expression


@pytest.mark.parametrize("expression", EXPONENTIAL)
def test_expression_with_exponential_time_is_stopped(expression, monkeypatch):
    monkeypatch.setattr(expressions, "SECONDS", 0.1)
    with pytest.raises(UserError, match=r"was stopped after 0\.1 seconds") as raised:
        matches("target_modules", [expression], [f"{name}.weight" for name in NAMES])
    assert raised.value.location == "target_modules" and raised.value.hint


def test_compile_time_and_sizes_are_limited(monkeypatch):
    monkeypatch.setattr(expressions, "SECONDS", 0.1)
    classes = "(?i)" + "[à-\U0010ffff]" * 2000
    for settings, message in (
        ({"target_modules": classes}, "was stopped"),
        ({"exclude_modules": "(a)" + "b" * 199_999}, "an expression of 200,002 characters"),
        ({"rank_pattern": {f"layer_{number}": 2 for number in range(20_001)}}, "20,001 expressions"),
    ):
        with pytest.raises(UserError, match=message):
            LoRAConfig(**settings)


@pytest.mark.parametrize("expression", ["(", "a{1,99999999999}", "(?P<n>a" * 200])
def test_invalid_expression_raises(expression):
    for settings in ({"target_modules": expression}, {"alpha_pattern": {expression: 2.0}}):
        with pytest.raises(UserError, match="not a regular expression"):
            LoRAConfig(**settings)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 takes a flag anywhere in an expression")
def test_flag_inside_pattern_key_raises_on_attach():
    with pytest.raises(UserError, match="not a regular expression"):
        attach(tiny("llama"), LoRAConfig(rank_pattern={"(?i)Q_PROJ": 2}))


def _save_adapter(folder: Path, **settings: object) -> Path:
    """Save an adapter and override these settings in its file."""
    model = tiny("llama")
    attach(model, LoRAConfig(rank=2, target_modules=["q_proj"]))
    save_adapter(model, folder, base_model="tiny")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return folder


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
def test_adapter_with_exponential_expression_is_rejected(tmp_path, monkeypatch, key):
    monkeypatch.setattr(expressions, "SECONDS", 0.1)
    settings = {key: {EXPONENTIAL[0]: 4} if key.endswith("pattern") else EXPONENTIAL[0]}
    folder = _save_adapter(tmp_path, **{"target_modules": "all-linear", **settings})
    with pytest.raises(UserError, match="was stopped"):
        load_adapter(tiny("llama"), folder)
    if key == "alpha_pattern":  # also read without a model
        with pytest.raises(UserError, match="was stopped"):
            read_content(read_adapter(folder))


def test_very_long_tensor_name_is_rejected(tmp_path):
    folder = _save_adapter(tmp_path)
    name = "base_model.model." + "a." * 5000 + "lora_A.weight"
    safetensors.torch.save_file({name: torch.zeros(2, 2)}, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match="name has 10,030 characters"):
        read_adapter(folder)
