"""A run whose rows are on the disk is the run whose rows are in memory, to the bit."""

from __future__ import annotations

import numpy as np
import pytest

from deltaw.data import stored_rows
from deltaw.data.row_store import DiskRows, MemoryRows, digest_of_rows
from deltaw.data.sequences import lengths_of
from deltaw.experiments.worker import split_off
from deltaw.runs.fit import fit
from deltaw.settings import RunConfig
from deltaw.training.session import read_data
from deltaw.training.tasks import causal_batcher
from tests.conftest import laid_over
from tests.training.runs import outcome

KINDS = {
    "prompt": {"method": "prompt"},
    "features": {"lora": {"layers": [1]}, "train": {"keep_features": True}},
    "head": {"method": "head", "train": {"keep_features": True}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_on_the_disk_train_alike(settings, tmp_path, kind, monkeypatch):
    changes = laid_over({"train": {"epochs": 2}}, KINDS[kind])
    small = fit(settings(tmp_path / "small", **changes))
    monkeypatch.setattr(stored_rows, "SPILL_BYTES", 0)
    monkeypatch.setattr(causal_batcher, "ROWS_AT_ONCE", 10**9)
    large = fit(settings(tmp_path / "large", **changes))
    assert small.evaluation.metrics == large.evaluation.metrics
    ((lines, weights), (others, other_weights)) = (outcome(run.output) for run in (small, large))
    assert weights == other_weights
    untimed = [[{k: v for k, v in line.items() if "second" not in k} for line in of] for of in (lines, others)]
    assert untimed[0] == untimed[1]


def test_an_evaluation_in_parts_gives_the_same_metrics(settings, tmp_path, monkeypatch):
    told = {"data": {"eval": 5}, "train": {"max_steps": 1}}
    whole = fit(settings(tmp_path / "whole", **told)).evaluation
    monkeypatch.setattr(causal_batcher, "ROWS_AT_ONCE", 2)
    monkeypatch.setattr("deltaw.training.tasks.causal.ROWS_AT_ONCE", 2)
    parts = fit(settings(tmp_path / "parts", **told)).evaluation
    assert len(parts.per_row) == 5
    np.testing.assert_array_equal(parts.per_row, whole.per_row)
    assert parts.metrics == pytest.approx(whole.metrics, rel=1e-5)


def test_what_a_run_asks_of_all_rows_needs_no_row(settings, tmp_path, monkeypatch):
    """Lengths, the order of an epoch, a plan's key and validation rows come without an example made."""
    monkeypatch.setattr(stored_rows, "SPILL_BYTES", 0)
    config = RunConfig.read(settings(tmp_path / "run"))
    _, data = read_data(config)
    assert isinstance(data.train.store, DiskRows)
    monkeypatch.setattr(DiskRows, "example", None)
    assert len(lengths_of(data.every)) == len(data.every) == 10
    training, validation = split_off(data.train, 0)
    assert len(training) + len(validation) == len(data.train)
    on_disk = digest_of_rows(data.every)
    monkeypatch.undo()
    _, data = read_data(config)
    assert isinstance(data.train.store, MemoryRows)
    assert digest_of_rows(data.every) == on_disk
