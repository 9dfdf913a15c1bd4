"""The settings: one definition, read from a file, a dictionary or flags; wrong values give a hint."""

from __future__ import annotations

import pytest
import yaml

from deltaw.errors import UserError
from deltaw.settings import RunConfig, parse_yaml, settings

LEAST = {"model": "m", "data": "rows.jsonl"}


def refusal(given, flags=None):
    with pytest.raises(UserError) as refused:
        RunConfig.read(given, flags)
    return refused.value


def test_numbers_are_read_as_people_write_them():
    numbers = {"1e-4": 1e-4, "-1E+3": -1000.0, ".5e1": 5.0, "2.0e-4": 2e-4, "12": 12, "null": None}
    texts = {"1e": "1e", "a1e4": "a1e4", "1e-4x": "1e-4x", "[q_proj, 1e2]": ["q_proj", 100.0]}
    for text, value in (numbers | texts).items():
        assert parse_yaml(text) == value and type(parse_yaml(text)) is type(value), text
    with pytest.raises(yaml.YAMLError):  # it looks like a date, and is none
        parse_yaml("2024-13-45")


def test_a_files_name_alone_stands_for_the_training_data():
    config = RunConfig.read(LEAST, {"data": {"eval": 3}})
    assert config.data.train == "rows.jsonl" and config.data.eval == 3


def test_flags_are_laid_over_the_file_key_by_key(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: m\ndata: {train: d, eval: 5}\nlora: {rank: 2, alpha: 1e1}\ntrain: {epochs: 3}\n")
    config = RunConfig.read(file, {"lora": {"rank": 8}, "train": {"seed": 4}, "model": "other"})
    assert (config.model, config.data.eval, config.lora.rank, config.lora.alpha) == ("other", 5, 8, 10.0)
    assert (config.train.epochs, config.train.seed) == (3, 4)


def test_a_section_that_is_empty_stands_for_its_defaults_and_lora_takes_pefts_names(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: m\ndata: d\nlora:\n  # rank: 8\ntrain:\n")
    assert RunConfig.read(file) == RunConfig.read({"model": "m", "data": "d"})
    config = RunConfig.read({**LEAST, "lora": {"r": 4, "lora_alpha": 8, "use_rslora": True}})
    assert (config.lora.rank, config.lora.alpha, config.lora.rslora) == (4, 8, True)


def test_every_fault_is_named_at_once_with_its_place_and_its_hint(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("modl: m\ndata: d\ntrain: {epochs: 0, learning_rat: 1, tokens_per_pass: none}\n")
    refused = refusal(file)
    assert refused.where == str(file)
    faults = ("'model' is not given", "unknown key 'modl'", "'train.epochs' cannot be 0")
    hints = ("'modl': did you mean 'model'", "'train.learning_rat': did you mean 'train.learning_rate'")
    hints += ("'train.epochs' should be greater than 0", "should be a valid integer or be 'auto'")
    assert [fault for fault in faults if fault not in refused.what] == []
    assert [hint for hint in hints if hint not in (refused.hint or "")] == []


def test_the_place_says_whether_flags_were_given_too(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: m\ndata: d\n")
    assert refusal(file, {"train": {"epochs": 0}}).where == f"{file} and the flags"
    assert refusal(file, {"lora": {"rank": 0}}).where == f"{file} and the flags: lora.rank"
    assert refusal(None, {"train": {"epochs": 1}}).where == "the flags"


def test_numbers_that_no_training_can_use_are_refused():
    inf = float("inf")
    bad = {"learning_rate": [inf, float("nan"), 1e30], "betas": [[0.9], [1, 0.9]], "epochs": [inf], "warmup": [inf]}
    bad |= {"weight_decay": [-1], "max_grad_norm": [0], "tokens_per_pass": [0], "seed": [2**64]}
    for key, value in ((key, value) for key, values in bad.items() for value in values):
        assert f"'train.{key}'" in refusal({**LEAST, "train": {key: value}}).what


def test_every_setting_is_described_and_its_default_is_one():
    described = list(settings())
    assert all(setting.description for setting in described)
    assert [s.key for s in described if s.default is ...] == ["model", "data.train"]
    plain = RunConfig.read(LEAST).model_dump()
    for setting in (s for s in described if s.default is not ...):
        section, _, leaf = setting.key.rpartition(".")
        assert (plain[section] if section else plain)[leaf] == setting.default, setting.key
