"""A range test before training leaves no trace but the rate, whichever method trains."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from deltaw.runs.fit import fit
from deltaw.training.callbacks import Calling
from deltaw.training.monitoring import rates
from deltaw.training.monitoring.rates import search_rate
from deltaw.training.optimizer import Schedule
from tests.training.runs import METHODS, Told, adapter, metrics, often, session_of

KINDS = {"lora": {"lora": {"dropout": 0.1}}, "dora": {"lora": {"dora": True}}}


@pytest.mark.each_value
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", often("lora", "dora", "prompt", "bias", "full", of={**METHODS, **KINDS}))
def test_every_tensor_of_the_model_and_the_random_numbers_are_as_before(
    settings, tmp_path, gpt2_folder, method, precision
):
    changes = {**(METHODS | KINDS)[method], "precision": precision, "train": {"learning_rate": "search"}}
    changes |= {"model": str(gpt2_folder)} if method == "bias" else {}
    session = session_of(settings(tmp_path / "run", **changes))
    before = {name: tensor.clone() for name, tensor in session.model.state_dict().items()}
    random = torch.get_rng_state()
    with session.running():
        found = search_rate(session)
    assert found is not None and len(found.rates) >= 5
    assert found.rates == sorted(found.rates) and found.rates[0] == pytest.approx(found.usual / 30)
    assert torch.equal(torch.get_rng_state(), random)
    for name, tensor in session.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(parameter.grad is None for _, parameter in session.method.parameters(session.model))


def test_a_run_that_searches_is_the_run_with_the_rate_that_it_found(settings, tmp_path):
    class Found(Told):
        def on_rate_search(self, search, folder):
            self.found = (search, folder)

    told = Found()
    result = fit(settings(tmp_path / "search", train={"learning_rate": "search", "epochs": 3}), callback=told)
    search, folder = told.found
    written = json.loads((result.output / "learning_rate.json").read_text())
    assert written == search.as_dict() and folder == result.output
    assert f"learning_rate: search  # {search.chosen}: " in (result.output / "run.yaml").read_text()
    assert f"learning rate {search.chosen:g}: " in told
    same = fit(settings(tmp_path / "same", train={"learning_rate": search.chosen, "epochs": 3}))
    ours, theirs = adapter(result.output), adapter(same.output)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [line["step"] for line in metrics(result.output, "loss")] == list(range(1, 10))


def test_a_loss_that_runs_away_ends_the_test(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(rates, "ABOVE", 1e6)
    monkeypatch.setattr(rates, "RUN_AWAY", 1.2)
    session = session_of(settings(tmp_path / "run", train={"learning_rate": "search"}))
    with session.running():
        # Before any training, a tiny model's loss is near its worst.
        session.train(schedule=Schedule("constant", 0.05, 30), total_steps=30)
        found = search_rate(session)
    assert found is not None and found.diverged and found.rates[-1] < found.usual * 1e6 / 2
    assert found.chosen < found.rates[-1]


def test_a_search_that_is_stopped_ends_the_run_with_nothing_trained(settings, tmp_path):
    asked = itertools.count(1)
    stops = Calling(should_stop=lambda: next(asked) == 4)  # once, as a signal comes once

    result = fit(settings(tmp_path / "run", train={"learning_rate": "search"}), callback=stops)
    assert result.interrupted and result.outcome.steps == 0
