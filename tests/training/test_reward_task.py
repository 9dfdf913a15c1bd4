"""Complete runs of the task ``rl``: learning, reporting, and bit-identical resuming."""

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
from tests.training.runs import ADAPTER, RecordingCallback

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
    """Return a factory of settings for a run that is rewarded for vowels."""
    (tmp_path / "own.py").write_text(LETTERS)
    rows = write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"say {n}"} for n in range(8)])

    def make(
        output: str, *, name: str = "letters", steps: int = 4, reward: dict | None = None, **train: object
    ) -> dict:
        return {
            "model": str(model_folder),
            "task": "rl",
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


def test_run_increases_reward_and_reports_metrics(reward_run):
    result = deltaw.fit(reward_run("run", name="early", steps=16, reward={"group": 16}, learning_rate=0.05))
    steps = steps_of(result.output)
    rewards = [step["reward"] for step in steps]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.15
    first = steps[0]
    assert 0 <= first["groups_with_advantage"] <= 1 and 0 < first["length"] <= 8 and 0 <= first["truncated_share"] <= 1
    assert first["mismatch"] < 1e-5  # in fp32, engine and training agree on log-probabilities
    assert result.evaluation.main == "reward" and len(result.evaluation.per_row) == 2


def test_run_resumed_between_updates_of_rollout_is_bit_identical(reward_run):
    options = {"name": "spread", "reward": {"updates": 2, "loss": "gspo", "beta": 0.1, "redraw": 1}, "steps": 6}
    uninterrupted = deltaw.fit(reward_run("whole", **options))
    config = reward_run("part", **options)
    deltaw.fit(config, callback=RecordingCallback(stop_after=3))
    resumed = deltaw.fit(resume=config["output"])
    expected, actual = (load_file(folder / ADAPTER) for folder in (uninterrupted.output, resumed.output))
    assert all((expected[name] == actual[name]).all() for name in expected)
    # Every rollout changed the weights, so the completions of its second update cannot be sampled again.
    assert all(step["gradient_norm"] > 0 for step in steps_of(uninterrupted.output))
    assert sorted(path.name for path in (resumed.output / "rollouts").iterdir()) == ["1.json", "2.json"]


def test_failing_reward_is_reported_with_name_and_row(reward_run):
    with pytest.raises(UserError, match="ZeroDivisionError") as error:
        deltaw.fit(reward_run("run", name="broken"))
    assert "broken" in str(error.value.location) and "row" in str(error.value.location)


def test_reward_unsuitable_for_rows_is_rejected_before_loading_model(reward_run, tmp_path, monkeypatch):
    monkeypatch.setattr("deltaw.runs.fit.load_model", lambda *args, **kwargs: pytest.fail("a model is loaded"))
    monkeypatch.setattr("deltaw.runs.fit.plan_memory", lambda *args, **kwargs: pytest.fail("a plan is made"))
    with pytest.raises(UserError, match="ZeroDivisionError"):
        deltaw.fit(reward_run("run", name="broken"))
    exact = reward_run("run", reward={"functions": ["exact"]})
    for refuse in (deltaw.fit, deltaw.plan):
        with pytest.raises(UserError, match="needs 'answer', which no row has") as error:
            refuse(exact)
        assert error.value.hint == "the rows have: prompt"
    config = RunConfig.read(exact)
    first = with_refusal(check_data(config), config, folder=False).findings[0]
    assert first.level == "error" and "needs 'answer', which no row has" in first.text
    (tmp_path / "own.py").write_text(
        "class Few:\n  def reset(self, row): return None\n  def step(self, text): return 1\n"
    )
    with pytest.raises(UserError, match="the environment: it raised TypeError"):
        deltaw.fit(reward_run("run", reward={"functions": [], "environment": f"{tmp_path / 'own.py'}:Few"}))


def test_last_assistant_message_is_reference_answer(reward_run, tmp_path):
    (tmp_path / "own.py").write_text(
        "def right(completions, answer):\n    return [float(a == 'red') for a in answer]\n"
    )
    turns = [{"role": "user", "content": "say"}, {"role": "assistant", "content": "red"}]
    rows = [{"messages": [{**turns[0], "content": f"say {n}"}, turns[1]]} for n in range(8)]
    config = reward_run("run", name="right", steps=1)
    config["data"]["train"] = str(write_rows(tmp_path / "turns.jsonl", rows))
    assert deltaw.fit(config).evaluation.metrics["reward"] == 1


def test_reward_is_required_by_rl_and_rejected_by_other_tasks():
    base = {"model": "m", "data": "d.jsonl"}
    with pytest.raises(UserError, match="needs a reward"):
        RunConfig.read({**base, "task": "rl"})
    rewarded = {**base, "task": "rl", "reward": {"functions": ["exact"]}}
    with pytest.raises(UserError, match="range test"):
        RunConfig.read({**rewarded, "train": {"learning_rate": "search"}})
    with pytest.raises(UserError, match="does not support sharding"):
        RunConfig.read({**rewarded, "train": {"sharding": "base"}})
    with pytest.raises(UserError, match="section 'reward'"):
        RunConfig.read({**base, "reward": {"functions": ["exact"]}})
