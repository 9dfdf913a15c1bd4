"""Complete runs of the task ``rl``: learning, reporting, and bit-identical resuming."""

from __future__ import annotations

import numpy as np
import pytest

import deltaw
from deltaw.errors import UserError
from deltaw.reports.page.run_view import notices, score_warnings
from deltaw.runs.checks import check_data_and_run
from deltaw.runs.folder import read_run
from deltaw.settings.config import RunConfig
from tests.conftest import refusal, write_rows
from tests.training.runs import ADAPTER, RecordingCallback, metrics, stopped_run

LETTERS = """
def letters(completions, **columns):
    return [sum(c in "aeiou" for c in text) / max(1, len(text)) for text in completions]
def spread(completions, **columns):
    return [sum(map(ord, text)) % 11 / 10 for text in completions]
def early(completions, **columns):
    return [sum(c < "n" for c in text) / max(1, len(text)) for text in completions]
def broken(completions, **columns):
    return [1 / 0 for _ in completions]
def equal(completions, **columns):
    return [0.3 for _ in completions]
def absent(completions, **columns):
    return [None for _ in completions]
"""
REWARD = {"group": 4, "max_new_tokens": 8, "loss": "grpo"}


@pytest.fixture
def reward_run(tmp_path, model_folder):
    """Return a factory of settings for a run that is rewarded for vowels."""
    (tmp_path / "own.py").write_text(LETTERS)
    rows = write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"say {n}"} for n in range(8)])

    def make(output: str, *, name: str = "letters", steps: int = 4, reward: dict | None = None, **train) -> dict:
        config = {"model": str(model_folder), "task": "rl", "data": {"train": str(rows), "eval": 2}}
        train = {"batch_size": 3, "learning_rate": 0.02, "checkpoint_every": 1} | train | {"max_steps": steps}
        reward = {"functions": [f"{tmp_path / 'own.py'}:{name}"], **REWARD, **(reward or {})}
        return config | {"reward": reward, "train": train, "precision": "fp32", "output": str(tmp_path / output)}

    return make


def test_run_increases_reward_and_reports_metrics(reward_run):
    result = deltaw.fit(reward_run("run", name="early", steps=16, reward={"group": 16}, learning_rate=0.05))
    steps = metrics(result.output, "loss")
    rewards = [step["reward"] for step in steps]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.15
    first = steps[0]
    assert 0 <= first["groups_with_advantage"] <= 1 and 0 < first["length"] <= 8 and 0 <= first["truncated_share"] <= 1
    assert first["mismatch"] < 1e-5  # in fp32, engine and training agree on log-probabilities
    assert result.evaluation.main == "reward" and len(result.evaluation.per_row) == 2


def test_run_resumed_between_updates_of_rollout_is_bit_identical(reward_run):
    options = {"name": "spread", "reward": {"updates": 2, "loss": "gspo", "beta": 0.1, "redraw": 1}, "steps": 6}
    uninterrupted = deltaw.fit(reward_run("whole", **options))
    resumed = deltaw.fit(resume=stopped_run(reward_run("part", **options), 3))
    assert (uninterrupted.output / ADAPTER).read_bytes() == (resumed.output / ADAPTER).read_bytes()
    # Every rollout changed the weights, so the completions of its second update cannot be sampled again.
    assert all(step["gradient_norm"] > 0 for step in metrics(uninterrupted.output, "loss"))
    assert sorted(path.name for path in (resumed.output / "rollouts").iterdir()) == ["1.json", "2.json"]


@pytest.mark.parametrize(("name", "reward"), [("equal", {}), ("absent", {}), ("letters", {"mask_cut": True})])
def test_rewards_without_advantage_are_reported_early_and_at_end(reward_run, name, reward):
    """With ``mask_cut``, all completions reach the limit of tokens."""
    reward = {"max_new_tokens": 1, **reward} if reward else reward
    callback = RecordingCallback()
    result = deltaw.fit(reward_run("run", name=name, steps=6, reward=reward), callback=callback)
    early = next(line for line in callback.lines if "the rewards have trained nothing" in line)
    assert early.startswith("step 5: ")
    assert result.rewards_differed is False and result.as_dict()["rewards_differed"] is False
    run = read_run(result.output)
    assert run.result["rewards_differed"] is False
    assert "The rewards trained nothing" in next(score_warnings(run))
    assert any("The rewards trained nothing" in line for line in notices(run))


def test_steps_without_advantage_do_not_count_as_untrained_with_divergence(reward_run):
    """The gradient of the divergence is 0 as long as the model equals the reference model."""
    result = deltaw.fit(reward_run("run", name="equal", steps=3, reward={"beta": 0.1}))
    assert result.rewards_differed is False
    assert [step["gradient_norm"] for step in metrics(result.output, "loss")] == [0.0, 0.0, 0.0]


def test_short_run_without_advantage_is_reported_at_end(reward_run):
    callback = RecordingCallback()
    result = deltaw.fit(reward_run("run", name="equal", steps=2), callback=callback)
    assert "trained nothing" not in callback
    assert result.rewards_differed is False and "trained nothing" in next(score_warnings(read_run(result.output)))


def test_resumed_run_counts_advantages_of_all_steps(reward_run):
    resumed = deltaw.fit(resume=stopped_run(reward_run("part", name="equal", steps=6), 3))
    assert resumed.rewards_differed is False
    assert [line["step"] for line in metrics(resumed.output, "warning")] == [5]


def test_rewards_with_advantage_are_not_reported(reward_run):
    callback = RecordingCallback()
    result = deltaw.fit(reward_run("run", name="spread", steps=6), callback=callback)
    assert result.rewards_differed is True and "trained nothing" not in callback


def test_failing_reward_is_reported_with_name_and_row(reward_run):
    error = refusal(deltaw.fit, reward_run("run", name="broken"), match="ZeroDivisionError")
    assert "broken" in str(error.location) and "row" in str(error.location)


def test_reward_unsuitable_for_rows_is_rejected_before_loading_model(reward_run, tmp_path, monkeypatch):
    monkeypatch.setattr("deltaw.runs.load_model.load_model", lambda *args, **kwargs: pytest.fail("a model is loaded"))
    monkeypatch.setattr("deltaw.runs.memory_check.plan_memory", lambda *args, **kwargs: pytest.fail("a plan is made"))
    refusal(deltaw.fit, reward_run("run", name="broken"), match="ZeroDivisionError")
    exact = reward_run("run", reward={"functions": ["exact"]})
    for refuse in (deltaw.fit, deltaw.plan):
        error = refusal(refuse, exact, match="needs 'answer', which no row has")
        assert error.hint == "the rows have: prompt"
    config = RunConfig.read(exact)
    first = check_data_and_run(config, folder=False).findings[0]
    assert first.level == "error" and "needs 'answer', which no row has" in first.text
    code = "class Few:\n  def reset(self, row): return None\n  def step(self, text): return 1\n"
    (tmp_path / "own.py").write_text(code)
    with pytest.raises(UserError, match="the environment: it raised TypeError"):
        deltaw.fit(reward_run("run", reward={"functions": [], "environment": f"{tmp_path / 'own.py'}:Few"}))


def test_last_assistant_message_is_reference_answer(reward_run, tmp_path):
    code = "def right(completions, answer):\n    return [float(a == 'red') for a in answer]\n"
    (tmp_path / "own.py").write_text(code)
    turns = [{"role": "user", "content": "say"}, {"role": "assistant", "content": "red"}]
    rows = [{"messages": [{**turns[0], "content": f"say {n}"}, turns[1]]} for n in range(8)]
    config = reward_run("run", name="right", steps=1)
    config["data"]["train"] = str(write_rows(tmp_path / "turns.jsonl", rows))
    assert deltaw.fit(config).evaluation.metrics["reward"] == 1


def test_reward_is_required_by_rl_and_rejected_by_other_tasks():
    base = {"model": "m", "data": "d.jsonl"}
    rewarded = {"task": "rl", "reward": {"functions": ["exact"]}}
    for message, changes in {
        "needs a reward": {"task": "rl"},
        "range test": {**rewarded, "train": {"learning_rate": "search"}},
        "does not support sharding": {**rewarded, "train": {"sharding": "base"}},
        "section 'reward'": {"reward": {"functions": ["exact"]}},
    }.items():
        refusal(RunConfig.read, {**base, **changes}, match=message)
