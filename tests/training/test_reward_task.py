"""Whole runs of the task reward: what they learn, report, and repeat to the bit when they are stopped."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.torch import load_file

import deltaw
from deltaw.errors import UserError
from deltaw.runs.checks import with_refusal
from deltaw.settings import RunConfig
from deltaw.training.data_view import check_data
from tests.conftest import write_rows
from tests.training.runs import ADAPTER, Told

LETTERS = """
def letters(completions, **columns):
    return [sum(c in "aeiou" for c in text) / max(1, len(text)) for text in completions]
def spread(completions, **columns):
    return [sum(map(ord, text)) % 11 / 10 for text in completions]
def early(completions, **columns):
    return [sum(c < "n" for c in text) / max(1, len(text)) for text in completions]
def broken(completions, **columns):
    return [1 / 0 for _ in completions]
"""
REWARD = {"group": 4, "max_new_tokens": 8, "loss": "grpo"}


@pytest.fixture
def reward_run(tmp_path, model_folder):
    """Settings of a run that is rewarded for vowels."""
    (tmp_path / "own.py").write_text(LETTERS)
    rows = write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"say {n}"} for n in range(8)])

    def make(
        output: str, *, name: str = "letters", steps: int = 4, reward: dict | None = None, **train: object
    ) -> dict:
        return {
            "model": str(model_folder),
            "task": "reward",
            "data": {"train": str(rows), "eval": 2},
            "reward": {"functions": [f"{tmp_path / 'own.py'}:{name}"], **REWARD, **(reward or {})},
            "train": {"max_steps": steps, "batch_size": 3, "learning_rate": 0.02, "checkpoint_every": 1, **train},
            "precision": "fp32",
            "output": str(tmp_path / output),
        }

    return make


def steps_of(folder) -> list[dict]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "loss" in line]


def test_a_run_learns_what_is_rewarded_and_reports_it(reward_run):
    result = deltaw.fit(reward_run("run", name="early", steps=16, reward={"group": 16}, learning_rate=0.05))
    steps = steps_of(result.output)
    rewards = [step["reward"] for step in steps]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.15
    first = steps[0]
    assert 0 <= first["teaching_groups"] <= 1 and 0 < first["length"] <= 8 and 0 <= first["cut_share"] <= 1
    assert first["mismatch"] < 1e-5  # fp32: of the engine's log-probabilities from the training's
    assert result.evaluation.main == "reward" and len(result.evaluation.per_row) == 2


def test_a_stopped_run_goes_on_to_the_bit_also_between_updates_on_one_rollout(reward_run):
    how = {"name": "spread", "reward": {"updates": 2, "loss": "gspo", "beta": 0.1, "redraw": 1}, "steps": 6}
    whole = deltaw.fit(reward_run("whole", **how))
    part = reward_run("part", **how)
    deltaw.fit(part, callback=Told(stop_after=3))
    again = deltaw.fit(resume=part["output"])
    one, other = (load_file(folder / ADAPTER) for folder in (whole.output, again.output))
    assert all((one[name] == other[name]).all() for name in one)
    # Every rollout changed the weights: what its second update learns from cannot be drawn again.
    assert all(step["gradient_norm"] > 0 for step in steps_of(whole.output))
    assert sorted(path.name for path in (again.output / "rollouts").iterdir()) == ["1.json", "2.json"]


def test_a_reward_that_fails_ends_the_run_with_its_name_and_row(reward_run):
    with pytest.raises(UserError, match="ZeroDivisionError") as refused:
        deltaw.fit(reward_run("run", name="broken"))
    assert "broken" in str(refused.value.where) and "row" in str(refused.value.where)


def test_reward_that_does_not_fit_the_rows_is_refused_before_a_model_is_loaded(reward_run, tmp_path, monkeypatch):
    monkeypatch.setattr("deltaw.runs.fit.load_for", lambda *given, **named: pytest.fail("a model is loaded"))
    monkeypatch.setattr("deltaw.runs.fit.planned", lambda *given, **named: pytest.fail("a plan is made"))
    with pytest.raises(UserError, match="ZeroDivisionError"):
        deltaw.fit(reward_run("run", name="broken"))
    exact = reward_run("run", reward={"functions": ["exact"]})
    for refuse in (deltaw.fit, deltaw.plan):
        with pytest.raises(UserError, match="needs 'answer', which no row has") as refused:
            refuse(exact)
        assert refused.value.hint == "the rows have: prompt"
    config = RunConfig.read(exact)
    first = with_refusal(check_data(config), config, folder=False).findings[0]
    assert first.level == "error" and "needs 'answer', which no row has" in first.text
    (tmp_path / "own.py").write_text(
        "class Few:\n  def reset(self, row): return None\n  def step(self, text): return 1\n"
    )
    with pytest.raises(UserError, match="the environment: it raised TypeError"):
        deltaw.fit(reward_run("run", reward={"functions": [], "environment": f"{tmp_path / 'own.py'}:Few"}))


def test_last_message_of_the_assistant_is_the_answer(reward_run, tmp_path):
    (tmp_path / "own.py").write_text(
        "def right(completions, answer):\n    return [float(a == 'red') for a in answer]\n"
    )
    turns = [{"role": "user", "content": "say"}, {"role": "assistant", "content": "red"}]
    rows = [{"messages": [{**turns[0], "content": f"say {n}"}, turns[1]]} for n in range(8)]
    config = reward_run("run", name="right", steps=1)
    config["data"]["train"] = str(write_rows(tmp_path / "turns.jsonl", rows))
    assert deltaw.fit(config).evaluation.metrics["reward"] == 1


def test_the_task_needs_a_reward_and_other_tasks_take_none():
    known = {"model": "m", "data": "d.jsonl"}
    with pytest.raises(UserError, match="needs a reward"):
        RunConfig.read({**known, "task": "reward"})
    rewarded = {**known, "task": "reward", "reward": {"functions": ["exact"]}}
    with pytest.raises(UserError, match="range test"):
        RunConfig.read({**rewarded, "train": {"learning_rate": "search"}})
    with pytest.raises(UserError, match="sharding leaves each process a part"):
        RunConfig.read({**rewarded, "train": {"sharding": "base"}})
    with pytest.raises(UserError, match="section 'reward'"):
        RunConfig.read({**known, "reward": {"functions": ["exact"]}})
