"""The JSON schema of the settings matches the code, accepts valid settings and rejects mistakes."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest
import yaml

from deltaw.errors import UserError
from deltaw.lora.config import PEFT_NAMES
from deltaw.settings.config import RunConfig, parse_yaml, settings
from deltaw.settings.schema import allowed_values, run_schema, schema_text

ROOT = Path(__file__).parent.parent
PUBLISHED = ROOT / "docs" / "run.schema.json"
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    schema = run_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_published_schema_is_current() -> None:
    command = "deltaw schema --output docs/run.schema.json"
    assert PUBLISHED.read_text(encoding="utf-8") == schema_text(), f"regenerate it: {command}"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_validate_and_reference_the_schema(validator, path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    validator.validate(parse_yaml(text))
    first = text.splitlines()[0]
    assert first.startswith("# yaml-language-server: $schema=")
    assert (path.parent / first.partition("$schema=")[2]).resolve() == PUBLISHED


def test_schema_describes_every_setting_and_default() -> None:
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


def test_settings_stored_by_a_run_validate(validator, finished_run: Path) -> None:
    validator.validate(yaml.safe_load((finished_run / "run.yaml").read_text(encoding="utf-8")))


MINIMAL = {"model": "m", "data": {"train": "d"}}
COLUMNS = {"from": "b.jsonl", "weight": 2, "columns": {"prompt": "q"}}
CLASSES = {"train": "d", "classes": [0, 1], "eval": None, "columns": {"prompt": "question"}}
PEFT_SETTINGS = {"r": 8, "lora_alpha": 16, "init_lora_weights": True, "modules_to_save": ["lm_head"]}
TRAIN_SETTINGS = {"learning_rate": 1e-4, "betas": [0.9, 0.99], "checkpointing": 4}
VALID = {
    "data": ["rows.jsonl", ["a.jsonl", COLUMNS], {"train": ["a.jsonl", {"from": "b.jsonl", "form": "text"}]}, CLASSES],
    "lora": [None, PEFT_SETTINGS, {"layers": 3}, {"layers": "16-", "train_modules": "lm_head", "rank": None}],
    "train": [None, TRAIN_SETTINGS, {"checkpointing": True, "max_grad_norm": None}],
    "memory": ["2GB"],
    "threads": [2],
    "random": [{"weights": 1000}],
    "prompt": [{"length": 5}],
    "method": ["random"],
}
SOURCES = [{"weight": 2}, {"from": "b", "weight": 0}, {"from": "b", "form": "novel"}, {"from": "b", "wieght": 2}]
DATA_SETTINGS = [{"max_length": 1}, {"rows": 0}, {"form": "novel"}, {"classes": ["a"]}, {"columns": {"promt": "a"}}]
INVALID = {
    "model": [None],
    "modl": ["m"],
    "data": [
        {"trian": "d"},
        {},
        [],
        *({"train": [s]} for s in SOURCES),
        *({"train": "d", **of} for of in DATA_SETTINGS),
    ],
    "lora": [{"rnk": 4}, {"rank": 0}, {"rank": 2.5}, {"alpha": 0}, {"dropout": 1}, {"init": "pisa"}, {"layers": -1}, 4],
    "train": [{"learning_rate": 0}, {"betas": [0.9]}, {"epochs": "few"}, {"schedule": "cosin"}, {"seed": -1}],
    "method": ["qlora"],
    "task": ["summarizing"],
    "precision": ["fp8"],
    "prompt": [{"length": 0}],
    "random": [{"weights": 0}],
    "last": [{"blocks": 0}],
    "threads": [0],
}


def expand(table: dict[str, list]) -> list[dict[str, object]]:
    """Return settings in which one key has one of the table's values."""
    return [{**MINIMAL, key: value} for key, values in table.items() for value in values]


def test_valid_settings_match_the_schema(validator) -> None:
    for config in expand(VALID):
        RunConfig.read(config)
        validator.validate(config)


def test_invalid_settings_do_not_match_the_schema(validator) -> None:
    for config in expand(INVALID):
        with pytest.raises(UserError):
            pytest.fail(str(RunConfig.read(config)))
        assert not validator.is_valid(config), config


def test_peft_names_are_in_the_schema() -> None:
    assert PEFT_NAMES.keys() <= run_schema()["properties"]["lora"]["properties"].keys()


def test_allowed_values_of_settings() -> None:
    assert allowed_values("precision") == ["auto", "bf16", "fp16", "fp32", "int8", "gguf", "nf4"]
    assert allowed_values("lora.dora") == ["true", "false"]
    assert allowed_values("train.share_prefixes") == ["true", "false", "auto"]
    assert "pissa" in allowed_values("lora.init") and "messages" in allowed_values("data.form")
    assert "sequence-classification" in allowed_values("task")
    assert allowed_values("train.epochs") == allowed_values("no.such.key") == []
