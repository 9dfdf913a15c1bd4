"""A range test before training changes only the learning rate, for every training method."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from deltaw.runs.fit import fit
from deltaw.training.callbacks import FunctionCallback
from deltaw.training.monitoring import rates
from deltaw.training.monitoring.rates import search_rate
from deltaw.training.optimizer import Schedule
from tests.training.runs import METHODS, RecordingCallback, adapter, build_session, metrics, slow_except

KINDS = {"lora": {"lora": {"dropout": 0.1}}, "dora": {"lora": {"dora": True}}}


@pytest.mark.each_value
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", slow_except("lora", "dora", "bias", names={**METHODS, **KINDS}))
def test_range_test_restores_model_and_random_state(settings, tmp_path, gpt2_folder, method, precision):
    changes = {**(METHODS | KINDS)[method], "precision": precision, "train": {"learning_rate": "search"}}
    changes |= {"model": str(gpt2_folder)} if method == "bias" else {}
    session = build_session(settings(tmp_path / "run", **changes))
    before = {name: tensor.clone() for name, tensor in session.model.state_dict().items()}
    random_state = torch.get_rng_state()
    with session.running():
        search = search_rate(session)
    assert search is not None and len(search.rates) >= 5
    assert search.rates == sorted(search.rates) and search.rates[0] == pytest.approx(search.usual / 30)
    assert torch.equal(torch.get_rng_state(), random_state)
    for name, tensor in session.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(parameter.grad is None for _, parameter in session.method.parameters(session.model))


def test_run_with_search_equals_run_with_selected_rate(settings, tmp_path):
    class RateCallback(RecordingCallback):
        def on_rate_search(self, search, folder):
            self.rate_search = (search, folder)

    callback = RateCallback()
    result = fit(settings(tmp_path / "search", train={"learning_rate": "search"}), callback=callback)
    search, folder = callback.rate_search
    stored = json.loads((result.output / "learning_rate.json").read_text())
    assert stored == search.as_dict() and folder == result.output
    assert f"learning_rate: search  # {search.chosen}: " in (result.output / "run.yaml").read_text()
    assert f"learning rate {search.chosen:g}: " in callback
    run_with_rate = fit(settings(tmp_path / "same", train={"learning_rate": search.chosen}))
    ours = adapter(result.output)
    theirs = adapter(run_with_rate.output)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [line["step"] for line in metrics(result.output, "loss")] == [1, 2, 3]


def test_diverging_loss_stops_range_test(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(rates, "HIGHEST_FACTOR", 1e6)
    monkeypatch.setattr(rates, "DIVERGENCE_FACTOR", 1.2)
    session = build_session(settings(tmp_path / "run", train={"learning_rate": "search"}))
    with session.running():
        # Without training, a tiny model's loss is near its maximum and could not diverge.
        session.train(schedule=Schedule("constant", 0.05, 30), total_steps=30)
        search = search_rate(session)
    assert search is not None and search.diverged and search.rates[-1] < search.usual * 1e6 / 2
    assert search.chosen < search.rates[-1]


def test_stopped_search_stops_run_without_training(settings, tmp_path):
    calls = itertools.count(1)
    callback = FunctionCallback(should_stop=lambda: next(calls) == 4)  # True only once, like a signal

    result = fit(settings(tmp_path / "run", train={"learning_rate": "search"}), callback=callback)
    assert result.interrupted and result.outcome.steps == 0
