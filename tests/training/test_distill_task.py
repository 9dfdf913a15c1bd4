"""Whole runs of the task distill: what they learn, keep on disk, and repeat to the bit when they are stopped."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.torch import load_file

import deltaw
from deltaw.errors import UserError
from deltaw.settings import RunConfig
from tests.conftest import laid_over, write_rows
from tests.training.runs import ADAPTER, Told, metrics

PROMPT = "Answer as a poet would, in rhymes"


@pytest.fixture
def distill_run(tmp_path, roomy_folder):
    """Settings of a run that trains a prompt into the adapter."""
    rows = write_rows(
        tmp_path / "rows.jsonl", [{"prompt": f"say {n}", "completion": f"it is {n * n}"} for n in range(12)]
    )

    def make(output: str, **changes: object) -> dict:
        plain = {
            "model": str(roomy_folder),
            "task": "distill",
            "data": {"train": str(rows), "eval": 3},
            "distill": {"prompt": PROMPT, "max_new_tokens": 6},
            "train": {"max_steps": 4, "batch_size": 3, "learning_rate": 0.01, "checkpoint_every": 1, "drift": False},
            "precision": "fp32",
            "output": str(tmp_path / output),
        }
        return laid_over(plain, changes)

    return make


def test_the_student_comes_to_answer_as_the_prompted_base(distill_run):
    told = Told()
    result = deltaw.fit(distill_run("run", train={"max_steps": 40}), callback=told)
    steps = [line["loss"] for line in metrics(result.output, "learning_rate")]
    assert np.mean(steps[-3:]) < 0.6 * steps[0]
    (line,) = metrics(result.output, "distilled")
    found = line["distilled"]
    assert found["prompt_tokens_saved"] == len(f"<|im_start|>system\n{PROMPT}<|im_end|>\n") - 20 - 20 + 3 - 1
