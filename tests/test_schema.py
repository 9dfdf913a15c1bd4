"""The JSON schema of the settings: it is that of the code, takes what deltaw takes, and refuses slips."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from deltaw.errors import UserError
from deltaw.lora.config import PEFT_NAMES
from deltaw.schema import run_schema, schema_text, values_of
from deltaw.settings import RunConfig, parse_yaml, settings

ROOT = Path(__file__).parent.parent
PUBLISHED = ROOT / "docs" / "run.schema.json"
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    schema = run_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_the_published_schema_is_the_codes() -> None:
    assert PUBLISHED.read_text(encoding="utf-8") == schema_text(), (
        "make it anew: deltaw schema --output docs/run.schema.json"
    )


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_fit_and_name_the_schema(validator, path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    validator.validate(parse_yaml(text))
    first = text.splitlines()[0]
    assert first.startswith("# yaml-language-server: $schema=")
    assert (path.parent / first.partition("$schema=")[2]).resolve() == PUBLISHED


def test_it_describes_every_setting_with_its_default() -> None:
    properties = run_schema()["properties"]
    for setting in settings():
        at = properties
        for part in setting.key.split("."):
            entry = at[part]
            kinds = [entry, *entry.get("anyOf", ())]
            at = next((kind["properties"] for kind in kinds if "properties" in kind), {})
        assert entry["description"] == setting.description, setting.key
        if isinstance(setting.default, str | int | float):
            assert entry["default"] == setting.default, setting.key


def test_settings_that_a_run_writes_down_fit(validator, finished_run: Path) -> None:
    validator.validate(yaml.safe_load((finished_run / "run.yaml").read_text(encoding="utf-8")))


LEAST = {"model": "m", "data": {"train": "d"}}
TAKEN = [
    {**LEAST, "data": "rows.jsonl"},
    {**LEAST, "data": ["a.jsonl", {"from": "b.jsonl", "weight": 2, "columns": {"prompt": "q"}}]},
    {**LEAST, "data": {"train": ["a.jsonl", {"from": "b.jsonl", "form": "text"}]}},
    {**LEAST, "train": None, "lora": None},
    {**LEAST, "lora": {"r": 8, "lora_alpha": 16, "init_lora_weights": True, "modules_to_save": ["lm_head"]}},
    {**LEAST, "lora": {"layers": 3}},
    {**LEAST, "lora": {"layers": "16-", "train_modules": "lm_head", "rank": None}},
    {**LEAST, "data": {"train": "d", "classes": [0, 1], "eval": None, "columns": {"prompt": "question"}}},
    {**LEAST, "train": {"learning_rate": 1e-4, "betas": [0.9, 0.99], "checkpointing": 4}},
    {**LEAST, "train": {"checkpointing": True, "max_grad_norm": None}, "threads": 2, "memory": "2GB"},
    {**LEAST, "method": "random", "random": {"weights": 1000}, "prompt": {"length": 5}},
]
REFUSED = [
    {"data": "rows.jsonl"},
    {**LEAST, "modl": "m"},
    {**LEAST, "data": {"trian": "d"}},
    {**LEAST, "data": {}},
    {**LEAST, "data": []},
    {**LEAST, "data": {"train": ["a", {"from": "b", "wieght": 2}]}},
    {**LEAST, "data": {"train": [{"weight": 2}]}},
    {**LEAST, "data": {"train": [{"from": "b", "weight": 0}]}},
    {**LEAST, "data": {"train": [{"from": "b", "form": "novel"}]}},
    {**LEAST, "lora": {"rnk": 4}},
    {**LEAST, "lora": {"rank": 0}},
    {**LEAST, "lora": {"rank": 2.5}},
    {**LEAST, "lora": {"alpha": 0}},
    {**LEAST, "lora": {"dropout": 1}},
    {**LEAST, "lora": {"init": "pisa"}},
    {**LEAST, "lora": {"layers": -1}},
    {**LEAST, "lora": 4},
    {**LEAST, "train": {"learning_rate": "fast"}},
    {**LEAST, "train": {"learning_rate": 0}},
    {**LEAST, "train": {"betas": [0.9]}},
    {**LEAST, "train": {"epochs": 0}},
    {**LEAST, "train": {"schedule": "cosin"}},
    {**LEAST, "train": {"seed": -1}},
    {**LEAST, "data": {"train": "d", "max_length": 1}},
    {**LEAST, "data": {"train": "d", "rows": 0}},
    {**LEAST, "data": {"train": "d", "form": "novel"}},
    {**LEAST, "data": {"train": "d", "classes": ["a"]}},
    {**LEAST, "data": {"train": "d", "columns": {"promt": "a"}}},
    {**LEAST, "method": "qlora"},
    {**LEAST, "task": "summarizing"},
    {**LEAST, "precision": "fp8"},
    {**LEAST, "prompt": {"length": 0}},
    {**LEAST, "random": {"weights": 0}},
    {**LEAST, "last": {"blocks": 0}},
    {**LEAST, "threads": 0},
]


@pytest.mark.parametrize("given", TAKEN, ids=json.dumps)
def test_what_deltaw_takes_fits(validator, given: dict) -> None:
    RunConfig.read(given)
    validator.validate(given)


@pytest.mark.parametrize("given", REFUSED, ids=json.dumps)
def test_what_deltaw_refuses_does_not(validator, given: dict) -> None:
    with pytest.raises(UserError):
        RunConfig.read(given)
    assert not validator.is_valid(given)


def test_pefts_names_are_there() -> None:
    assert PEFT_NAMES.keys() <= run_schema()["properties"]["lora"]["properties"].keys()


def test_values_of_a_setting_for_a_shell() -> None:
    assert values_of("precision") == ["auto", "bf16", "fp32", "int8", "gguf", "nf4"]
    assert values_of("lora.dora") == ["true", "false"]
    assert values_of("train.share_prefixes") == ["true", "false", "auto"]
    assert "pissa" in values_of("lora.init") and "messages" in values_of("data.form")
    assert "sequence-classification" in values_of("task")
    assert values_of("train.epochs") == values_of("no.such.key") == []
