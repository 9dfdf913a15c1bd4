"""Reward runs with several processes, and runs killed during a rollout or a reward call."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
import yaml

import deltaw
from tests.cli.conftest import start
from tests.training.parallel_runs import distance, needs_gloo, train_all
from tests.training.runs import ADAPTER, metrics

LETTERS = """
import time
from pathlib import Path
def letters(completions, **columns):
    time.sleep(0.05)
    return [sum(c in "aeiou" for c in text) / max(1, len(text)) for text in completions]
"""


@pytest.fixture
def make_settings(tmp_path, model_folder):
    """Return a factory of settings for a run that is rewarded for vowels."""
    (tmp_path / "own.py").write_text(LETTERS)
    rows = "".join(f'{{"prompt": "say {n}"}}\n' for n in range(9))
    (tmp_path / "prompts.jsonl").write_text(rows)

    def make(output: str, **train: object) -> dict:
        data = {"train": str(tmp_path / "prompts.jsonl"), "eval": 2}
        config = {"model": str(model_folder), "task": "rl", "data": data, "output": str(tmp_path / output)}
        reward = {"functions": [f"{tmp_path / 'own.py'}:letters"], "group": 4, "max_new_tokens": 8}
        train = {"max_steps": 4, "batch_size": 3, "learning_rate": 0.02, "checkpoint_every": 1, **train}
        return config | {"reward": reward, "train": train, "precision": "fp32"}

    return make


@needs_gloo
@pytest.mark.slow
def test_two_processes_match_one(make_settings):
    single, parallel = (make_settings(name, max_steps=3, drift=False) for name in ("one", "two"))
    deltaw.fit(single)
    train_all(parallel)
    ours, theirs = (metrics(Path(config["output"]), "loss") for config in (parallel, single))
    assert len(ours) == 3 and any(line["groups_with_advantage"] for line in theirs)
    for a, b in zip(ours, theirs, strict=True):
        for key in ("reward", "length", "groups_with_advantage", "label_tokens", "rows"):
            assert a[key] == b[key], key
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-5)
    difference, norm = distance(Path(parallel["output"]), Path(single["output"]))
    assert norm > 0 and difference <= 1e-5 * norm


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_run_killed_at_twelve_moments_matches_uninterrupted_run(make_settings, tmp_path):
    uninterrupted = deltaw.fit(make_settings("whole", max_steps=60))
    config = make_settings("killed", max_steps=60)
    (tmp_path / "killed.yaml").write_text(yaml.safe_dump(config))
    moments = random.Random(7)
    metrics = tmp_path / "killed" / "metrics.jsonl"

    def lines() -> int:
        return metrics.read_text().count("\n") if metrics.exists() else 0

    for _ in range(12):
        with start("train", tmp_path / "killed.yaml") as process:
            num_lines = lines()
            process.wait_for(lambda num_lines=num_lines: lines() > num_lines + 1)
            # The kill hits the next step during sampling, during the reward call, or later.
            time.sleep(moments.uniform(0.0, 0.3))
            process.send_signal(signal.SIGKILL)
            process.communicate(timeout=60)
            assert process.returncode == -signal.SIGKILL
    resumed = deltaw.fit(resume=config["output"])
    assert (uninterrupted.output / ADAPTER).read_bytes() == (resumed.output / ADAPTER).read_bytes()
