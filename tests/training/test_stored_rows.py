"""A run with rows on disk is bit-identical to a run with rows in memory."""

from __future__ import annotations

import numpy as np
import pytest

from deltaw.data import row_cache
from deltaw.data.example import lengths_of
from deltaw.data.row_store import DiskRows, MemoryRows, digest_of_rows
from deltaw.experiments.trial import split_validation
from deltaw.runs.fit import fit
from deltaw.settings.config import RunConfig
from deltaw.training import batchers
from deltaw.training.session import read_data
from tests.conftest import deep_merge
from tests.training.runs import outcome

KINDS = {
    "prompt": {"method": "prompt"},
    "features": {"lora": {"layers": [1]}, "train": {"keep_features": True}},
    "head": {"method": "head", "train": {"keep_features": True}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_on_disk_train_identically(settings, tmp_path, kind, monkeypatch):
    changes = deep_merge({"train": {"epochs": 2}}, KINDS[kind])
    in_memory = fit(settings(tmp_path / "small", **changes))
    monkeypatch.setattr(row_cache, "SPILL_BYTES", 0)
    monkeypatch.setattr(batchers, "MAX_BUFFERED_ROWS", 10**9)
    on_disk = fit(settings(tmp_path / "large", **changes))
    assert in_memory.evaluation.metrics == on_disk.evaluation.metrics
    ((lines, weights), (other_lines, other_weights)) = (outcome(run.output) for run in (in_memory, on_disk))
    assert weights == other_weights
    untimed = [[{k: v for k, v in line.items() if "second" not in k} for line in r] for r in (lines, other_lines)]
    assert untimed[0] == untimed[1]


def test_evaluation_in_parts_returns_same_metrics(settings, tmp_path, monkeypatch):
    changes = {"data": {"eval": 5}, "train": {"max_steps": 1}}
    full = fit(settings(tmp_path / "whole", **changes)).evaluation
    monkeypatch.setattr(batchers, "MAX_BUFFERED_ROWS", 2)
    monkeypatch.setattr("deltaw.tasks.language.task.MAX_BUFFERED_ROWS", 2)
    parts = fit(settings(tmp_path / "parts", **changes)).evaluation
    assert len(parts.per_row) == 5
    np.testing.assert_array_equal(parts.per_row, full.per_row)
    assert parts.metrics == pytest.approx(full.metrics, rel=1e-5)


def test_row_statistics_construct_no_examples(settings, tmp_path, monkeypatch):
    """Lengths, epoch order, the key of a plan, and validation rows are available without constructing examples."""
    monkeypatch.setattr(row_cache, "SPILL_BYTES", 0)
    config = RunConfig.read(settings(tmp_path / "run"))
    _, data = read_data(config)
    assert isinstance(data.train.store, DiskRows)
    monkeypatch.setattr(DiskRows, "example", None)
    assert len(lengths_of(data.all_rows)) == len(data.all_rows) == 10
    training, validation = split_validation(data.train, 0)
    assert len(training) + len(validation) == len(data.train)
    on_disk = digest_of_rows(data.all_rows)
    monkeypatch.undo()
    _, data = read_data(config)
    assert isinstance(data.train.store, MemoryRows) and digest_of_rows(data.all_rows) == on_disk
