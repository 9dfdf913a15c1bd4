"""Search spaces: parsing, validation and application of values to settings."""

from __future__ import annotations

import pytest

from deltaw.errors import UserError
from deltaw.experiments.search_space import (
    CategoricalValues,
    Range,
    apply_values,
    check_space,
    current_values,
    default_space,
    parse_space,
)
from deltaw.settings.config import RunConfig


@pytest.fixture
def config(study_settings, tmp_path):
    return RunConfig.read(study_settings(tmp_path))


RANGES_AND_LISTS = [("train.learning_rate=1e-5..1e-2:log", Range(1e-5, 1e-2, log=True))]
RANGES_AND_LISTS += [("lora.rank=4..32", Range(4, 32, integers=True)), ("train.epochs=1..3", Range(1, 3))]
RANGES_AND_LISTS += [("lora.dropout=0..0.2", Range(0, 0.2)), ("lora.rank=[4, 8,16]", CategoricalValues((4, 8, 16)))]
RANGES_AND_LISTS += [("train.schedule=[linear, cosine]", CategoricalValues(("linear", "cosine")))]


@pytest.mark.parametrize(("text", "domain"), RANGES_AND_LISTS)
def test_ranges_and_lists_are_parsed(text, domain):
    assert parse_space([text]) == {text.partition("=")[0]: domain}


INVALID_SEARCH_SPACES = [("lora.rank", "has no value"), ("lora.rnk=[4]", "did you mean 'lora.rank'")]
INVALID_SEARCH_SPACES += [("lora.rank=4", "neither a range nor a list"), ("lora.rank=[4", "not a list")]
INVALID_SEARCH_SPACES += [("lora.rank=[4,4]", "duplicate"), ("lora.rank=8..4", "empty range")]
INVALID_SEARCH_SPACES += [("lora.rank=a..b", "neither"), ("train.learning_rate=0..1:log", "logarithm")]
INVALID_SEARCH_SPACES += [("data.max_length=[9]", "same rows"), ("train.seed=[1,2]", "same rows")]


@pytest.mark.parametrize(("text", "word"), INVALID_SEARCH_SPACES)
def test_invalid_search_space_is_rejected(text, word):
    with pytest.raises(UserError, match=word):
        parse_space([text])


def test_invalid_values_are_rejected_before_first_trial(config):
    for texts, message in (
        (["lora.rank=0..4"], r"lora\.rank"),
        (["train.schedule=[linear, cosin]"], r"train\.schedule"),
        (["lora.alpha=[4]", "lora.alpha/rank=[1]"], "cannot be searched together"),
    ):
        with pytest.raises(UserError, match=message):
            check_space(config, parse_space(texts))


def test_alpha_is_multiple_of_trial_rank(config):
    changed = apply_values(config, {"lora.alpha/rank": 2, "lora.rank": 16, "train.learning_rate": 0.5})
    assert (changed.lora.rank, changed.lora.alpha, changed.train.learning_rate) == (16, 32, 0.5)
    assert changed.model_copy(update={"lora": config.lora, "train": config.train}) == config


def test_default_space_of_every_method_is_valid(config):
    for method in ("lora", "head", "input", "prompt", "bias", "random", "last", "full"):
        method_config = config.model_copy(update={"method": method})
        space = default_space(method_config, 1e-3)
        check_space(method_config, space)
        assert space["train.learning_rate"] == Range(1e-4, 1e-2, log=True) and len(space) > 1


def test_current_settings_are_located_in_space(config):
    expected = {"train.learning_rate": 2e-4, "lora.rank": 4, "lora.alpha/rank": 2}
    assert current_values(config, default_space(config, 2e-4), 2e-4) == expected
    assert current_values(config, parse_space(["lora.rank=[8, 16]"]), 2e-4) is None


def test_edge_uses_scale_of_range():
    rates = Range(1e-5, 1e-1, log=True)
    assert [rates.edge(rate) for rate in (1.2e-5, 1e-3, 9e-2)] == ["low", "", "high"]
    assert [CategoricalValues((4, 8, 16)).edge(rank) for rank in (4, 8, 16)] == ["low", "", "high"]
    assert CategoricalValues(("linear", "cosine")).edge("linear") == "" and CategoricalValues((4,)).edge(4) == ""
