"""The JSON schema of the settings: it is that of the code, takes what deltaw takes, and refuses slips."""

from __future__ import annotations

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
COLUMNS = {"from": "b.jsonl", "weight": 2, "columns": {"prompt": "q"}}
CLASSES = {"train": "d", "classes": [0, 1], "eval": None, "columns": {"prompt": "question"}}
PEFTS = {"r": 8, "lora_alpha": 16, "init_lora_weights": True, "modules_to_save": ["lm_head"]}
RATE = {"learning_rate": 1e-4, "betas": [0.9, 0.99], "checkpointing": 4}
TAKEN = {
    "data": ["rows.jsonl", ["a.jsonl", COLUMNS], {"train": ["a.jsonl", {"from": "b.jsonl", "form": "text"}]}, CLASSES],
    "lora": [None, PEFTS, {"layers": 3}, {"layers": "16-", "train_modules": "lm_head", "rank": None}],
    "train": [None, RATE, {"checkpointing": True, "max_grad_norm": None}],
    "memory": ["2GB"],
    "threads": [2],
    "random": [{"weights": 1000}],
    "prompt": [{"length": 5}],
    "method": ["random"],
}
SOURCES = [{"weight": 2}, {"from": "b", "weight": 0}, {"from": "b", "form": "novel"}, {"from": "b", "wieght": 2}]
OF_ROWS = [{"max_length": 1}, {"rows": 0}, {"form": "novel"}, {"classes": ["a"]}, {"columns": {"promt": "a"}}]
REFUSED = {
    "model": [None],
    "modl": ["m"],
    "data": [{"trian": "d"}, {}, [], *({"train": [s]} for s in SOURCES), *({"train": "d", **of} for of in OF_ROWS)],
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


def each(table: dict[str, list]) -> list[dict[str, object]]:
    """Settings in which one key has one of the table's values."""
    return [{**LEAST, key: value} for key, values in table.items() for value in values]


def test_what_deltaw_takes_fits(validator) -> None:
    for given in each(TAKEN):
        RunConfig.read(given)
        validator.validate(given)


def test_what_deltaw_refuses_does_not(validator) -> None:
    for given in each(REFUSED):
        with pytest.raises(UserError):
            pytest.fail(str(RunConfig.read(given)))
        assert not validator.is_valid(given), given


def test_pefts_names_are_there() -> None:
    assert PEFT_NAMES.keys() <= run_schema()["properties"]["lora"]["properties"].keys()


def test_values_of_a_setting_for_a_shell() -> None:
    assert values_of("precision") == ["auto", "bf16", "fp32", "int8", "gguf", "nf4"]
    assert values_of("lora.dora") == ["true", "false"]
    assert values_of("train.share_prefixes") == ["true", "false", "auto"]
    assert "pissa" in values_of("lora.init") and "messages" in values_of("data.form")
    assert "sequence-classification" in values_of("task")
    assert values_of("train.epochs") == values_of("no.such.key") == []
