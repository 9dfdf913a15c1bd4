"""Settings from files, dictionaries and flags, and hints for invalid values."""

from __future__ import annotations

import pytest
import yaml

from deltaw.errors import UserError
from deltaw.settings.config import RunConfig, parse_yaml, settings
from deltaw.settings.model_parts import parse_parts

MINIMAL = {"model": "m", "data": "rows.jsonl"}


def refusal(source, flags=None):
    with pytest.raises(UserError) as error:
        RunConfig.read(source, flags)
    return error.value


def test_yaml_numbers_are_parsed():
    numbers = {"1e-4": 1e-4, "-1E+3": -1000.0, ".5e1": 5.0, "2.0e-4": 2e-4, "12": 12, "null": None}
    texts = {"1e": "1e", "a1e4": "a1e4", "1e-4x": "1e-4x", "[q_proj, 1e2]": ["q_proj", 100.0]}
    for text, value in (numbers | texts).items():
        assert parse_yaml(text) == value and type(parse_yaml(text)) is type(value), text
    with pytest.raises(yaml.YAMLError):  # invalid date
        parse_yaml("2024-13-45")


def test_file_name_is_accepted_as_data_section():
    config = RunConfig.read(MINIMAL, {"data": {"eval": 3}})
    assert config.data.train == "rows.jsonl" and config.data.eval == 3


def test_flags_override_file_settings_by_key(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: m\ndata: {train: d, eval: 5}\nlora: {rank: 2, alpha: 1e1}\ntrain: {epochs: 3}\n")
    config = RunConfig.read(file, {"lora": {"rank": 8}, "train": {"seed": 4}, "model": "other"})
    assert (config.model, config.data.eval, config.lora.rank, config.lora.alpha) == ("other", 5, 8, 10.0)
    assert (config.train.epochs, config.train.seed) == (3, 4)


def test_empty_section_uses_defaults_and_lora_accepts_peft_names(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: m\ndata: d\nlora:\n  # rank: 8\ntrain:\n")
    assert RunConfig.read(file) == RunConfig.read({"model": "m", "data": "d"})
    config = RunConfig.read({**MINIMAL, "lora": {"r": 4, "lora_alpha": 8, "use_rslora": True}})
    assert (config.lora.rank, config.lora.alpha, config.lora.rslora) == (4, 8, True)


def test_all_errors_are_reported_with_location_and_hints(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("modl: m\ndata: d\ntrain: {epochs: 0, learning_rat: 1, tokens_per_pass: none}\n")
    error = refusal(file)
    assert error.location == str(file)
    faults = ("'model' is missing", "unknown key 'modl'", "'train.epochs' cannot be 0")
    hints = ("'modl': did you mean 'model'", "'train.learning_rat': did you mean 'train.learning_rate'")
    hints += ("'train.epochs' should be greater than 0", "should be an integer or be 'auto'")
    assert [fault for fault in faults if fault not in error.message] == []
    assert [hint for hint in hints if hint not in (error.hint or "")] == []


def test_error_location_mentions_flags(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: m\ndata: d\n")
    assert refusal(file, {"train": {"epochs": 0}}).location == f"{file} and the flags"
    assert refusal(file, {"lora": {"rank": 0}}).location == f"{file} and the flags: lora.rank"
    assert refusal(None, {"train": {"epochs": 1}}).location == "the flags"


def test_unusable_numbers_are_rejected():
    inf = float("inf")
    bad = {"learning_rate": [inf, float("nan"), 1e30], "betas": [[0.9], [1, 0.9]], "epochs": [inf], "warmup": [inf]}
    bad |= {"weight_decay": [-1], "max_grad_norm": [0], "tokens_per_pass": [0], "seed": [2**64]}
    for key, value in ((key, value) for key, values in bad.items() for value in values):
        assert f"'train.{key}'" in refusal({**MINIMAL, "train": {key: value}}).message


def test_constructor_rejects_values_as_read_does():
    values = {**MINIMAL, "lorra": 3, "train": {"batch_size": 0}}
    with pytest.raises(UserError) as constructed:
        RunConfig(**values)
    with pytest.raises(UserError) as read:
        RunConfig.read(values)
    assert str(constructed.value) == str(read.value)
    assert "unknown key 'lorra'" in constructed.value.message
    assert "'train.batch_size' should be at least 1" in (constructed.value.hint or "")


# Settings whose value follows from the job.
NO_ADVICE = {"model", "task", "method", "input.modules", "prompt.text", "train.keep_general"}


def test_settings_say_when_to_change_them():
    listed = {setting.key: setting.when for setting in settings()}
    assert {key for key, when in listed.items() if not when} == NO_ADVICE
    assert all(when[0].isupper() and when.endswith(".") for when in listed.values() if when)


def test_every_setting_has_a_description_and_its_default():
    described = list(settings())
    assert all(setting.description for setting in described)
    assert [s.key for s in described if s.default is ...] == ["model", "data.train"]
    plain = RunConfig.read(MINIMAL).model_dump()
    for setting in (s for s in described if s.default is not ...):
        section, _, leaf = setting.key.rpartition(".")
        assert (plain[section] if section else plain)[leaf] == setting.default, setting.key


def test_parts_of_a_model_are_stored_as_one_reference(tmp_path):
    data = {"data": "rows.jsonl"}
    expected = {
        "parts:pypi:a==1/x + ./v": {"language": "pypi:a==1/x", "vision": "./v"},
        "parts:a/b@c + v": {"vision": " v ", "language": "a/b@c", "connector": "linear"},
        "parts:a + b + mlp": {"language": "a", "vision": "b", "connector": "mlp"},
        "parts:c + d": "parts: c  +  d",
    }
    for reference, value in expected.items():
        config = RunConfig.read({"model": value, **data})
        assert config.model == reference
        assert RunConfig.read(config.model_dump(mode="json")).model == reference
        assert parse_parts(reference).reference == reference
    file = tmp_path / "train.yaml"
    file.write_text("model: {language: a, vision: b}\ndata: rows.jsonl\n")
    assert RunConfig.read(file, {"model": "c"}).model == "c"
    assert parse_parts("owner/name + x") is None


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"language": "a", "visoin": "b"}, "unknown key 'model.visoin'"),
        ({"language": "a"}, "needs a language model and a vision encoder"),
        ({"language": "a", "vision": 3}, "needs a language model and a vision encoder"),
        ({"language": "a", "vision": ""}, "does not name a language model and a vision encoder"),
        ({"language": "a", "vision": "parts:b + c"}, "does not name a language model and a vision encoder"),
        ({"language": "a", "vision": "b", "connector": "gelu"}, "unknown connector 'gelu'"),
        ("parts:a", "does not name a language model and a vision encoder"),
        ("parts:a + b + c + mlp", "does not name a language model and a vision encoder"),
    ],
)
def test_invalid_parts_are_rejected(value, message):
    assert message in refusal({"model": value, "data": "rows.jsonl"}).message
