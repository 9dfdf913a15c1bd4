"""What a search may change, and how values become settings."""

from __future__ import annotations

import pytest

from deltaw.errors import UserError
from deltaw.experiments.tune import Range, Values, applied, check_space, default_space, parse_space, present
from deltaw.settings import RunConfig


@pytest.fixture
def config(study_settings, tmp_path):
    return RunConfig.read(study_settings(tmp_path))


@pytest.mark.parametrize(
    ("text", "domain"),
    [
        ("train.learning_rate=1e-5..1e-2:log", Range(1e-5, 1e-2, log=True)),
        ("lora.rank=4..32", Range(4, 32, whole=True)),
        ("train.epochs=1..3", Range(1, 3)),
        ("lora.dropout=0..0.2", Range(0, 0.2)),
        ("lora.rank=[4, 8,16]", Values((4, 8, 16))),
        ("train.schedule=[linear, cosine]", Values(("linear", "cosine"))),
    ],
)
def test_ranges_and_lists_are_read(text, domain):
    assert parse_space([text]) == {text.partition("=")[0]: domain}


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("lora.rank", "names no setting"),
        ("lora.rnk=[4]", "did you mean 'lora.rank'"),
        ("lora.rank=4", "neither a range nor a list"),
        ("lora.rank=[4", "not a list"),
        ("lora.rank=[4,4]", "twice"),
        ("lora.rank=8..4", "empty range"),
        ("lora.rank=a..b", "neither"),
        ("train.learning_rate=0..1:log", "logarithm"),
        ("data.max_length=[9]", "same rows"),
        ("train.seed=[1,2]", "same rows"),
    ],
)
def test_what_cannot_be_searched_is_refused(text, word):
    with pytest.raises(UserError, match=word):
        parse_space([text])


def test_values_that_do_not_fit_are_refused_before_any_trial(config):
    for texts, said in (
        (["lora.rank=0..4"], r"lora\.rank"),
        (["train.schedule=[linear, cosin]"], r"train\.schedule"),
        (["lora.alpha=[4]", "lora.alpha/rank=[1]"], "exclude"),
    ):
        with pytest.raises(UserError, match=said):
            check_space(config, parse_space(texts))


def test_alpha_follows_the_rank_of_the_trial(config):
    made = applied(config, {"lora.alpha/rank": 2, "lora.rank": 16, "train.learning_rate": 0.5})
    assert (made.lora.rank, made.lora.alpha, made.train.learning_rate) == (16, 32, 0.5)
    assert made.model_copy(update={"lora": config.lora, "train": config.train}) == config


def test_every_method_has_a_space_whose_values_fit(config):
    for method in ("lora", "head", "input", "prompt", "bias", "random", "last", "full"):
        of_method = config.model_copy(update={"method": method})
        space = default_space(of_method, 1e-3)
        check_space(of_method, space)
        assert space["train.learning_rate"] == Range(1e-4, 1e-2, log=True) and len(space) > 1


def test_the_settings_as_they_are_are_found_in_the_space(config):
    found = {"train.learning_rate": 2e-4, "lora.rank": 4, "lora.alpha/rank": 2}
    assert present(config, default_space(config, 2e-4), 2e-4) == found
    assert present(config, parse_space(["lora.rank=[8, 16]"]), 2e-4) is None


def test_an_end_is_told_on_the_scale_of_the_range():
    rates = Range(1e-5, 1e-1, log=True)
    assert [rates.at_end(rate) for rate in (1.2e-5, 1e-3, 9e-2)] == ["low", "", "high"]
    assert [Values((4, 8, 16)).at_end(rank) for rank in (4, 8, 16)] == ["low", "", "high"]
    assert Values(("linear", "cosine")).at_end("linear") == "" and Values((4,)).at_end(4) == ""
