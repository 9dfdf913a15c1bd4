"""Runs of the task reward by several processes, and killed in the middle of a rollout or of a reward."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

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
def settings_of(tmp_path, model_folder):
    """Settings of a run that is rewarded for vowels, with the name of its folder."""
    (tmp_path / "own.py").write_text(LETTERS)
    rows = "".join(f'{{"prompt": "say {n}"}}\n' for n in range(9))
    (tmp_path / "prompts.jsonl").write_text(rows)

    def make(output: str, **train: object) -> dict:
        return {
            "model": str(model_folder),
            "task": "reward",
            "data": {"train": str(tmp_path / "prompts.jsonl"), "eval": 2},
            "reward": {"functions": [f"{tmp_path / 'own.py'}:letters"], "group": 4, "max_new_tokens": 8},
            "train": {"max_steps": 4, "batch_size": 3, "learning_rate": 0.02, "checkpoint_every": 1, **train},
            "precision": "fp32",
            "output": str(tmp_path / output),
        }

    return make


@needs_gloo
def test_two_processes_write_reward_and_learn_as_one(settings_of):
    one, two = settings_of("one"), settings_of("two")
    deltaw.fit(one)
    train_all(two)
    ours, theirs = ([line for line in metrics(Path(of["output"])) if "loss" in line] for of in (two, one))
    assert len(ours) == 4 and any(line["teaching_groups"] for line in theirs)
    for a, b in zip(ours, theirs, strict=True):
        for key in ("reward", "length", "teaching_groups", "label_tokens", "rows"):
            assert a[key] == b[key], key
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-5)
    off, norm = distance(Path(two["output"]), Path(one["output"]))
    assert norm > 0 and off <= 1e-5 * norm


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals of another kind")
def test_a_run_killed_at_twelve_moments_is_the_run_that_is_not(settings_of, tmp_path):
    whole = deltaw.fit(settings_of("whole", max_steps=60))
    made = settings_of("killed", max_steps=60)
    (tmp_path / "killed.yaml").write_text(yaml.safe_dump(made))
    moments, metrics = random.Random(7), tmp_path / "killed" / "metrics.jsonl"

    def lines() -> int:
        return metrics.read_text().count("\n") if metrics.exists() else 0

    for _ in range(12):
        with start("train", tmp_path / "killed.yaml") as process:
            seen = lines()
            process.until(lambda seen=seen: lines() > seen + 1)
            # Within the next step: while it writes, while it is rewarded, or later.
            time.sleep(moments.uniform(0.0, 0.3))
            process.send_signal(signal.SIGKILL)
            process.communicate(timeout=60)
            assert process.returncode == -signal.SIGKILL
    again = deltaw.fit(resume=made["output"])
    one, other = (load_file(folder / ADAPTER) for folder in (whole.output, again.output))
    assert all((one[name] == other[name]).all() for name in one)
