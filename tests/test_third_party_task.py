"""A task in a separate file is registered once, and supports settings, checks, plans, runs, resuming and comparison."""

from __future__ import annotations

import json

import pytest

import deltaw
from deltaw import tasks
from deltaw.cli import main
from deltaw.errors import UserError
from deltaw.experiments.compare import compare
from deltaw.settings import RunConfig
from deltaw.training.callbacks import Callback, LineCallback
from deltaw.training.data_view import check_data, preview_rows
from deltaw.training.open_run import open_run
from deltaw.training.session import read_data
from tests.conftest import deep_merge, write_rows
from tests.experiments.conftest import use_local_worker
from tests.training.toy_task import ENTRY, PreferenceTask

BUILT_IN = (
    "causal-lm",
    "preference",
    "rl",
    "distill",
    "sequence-classification",
    "regression",
    "image-classification",
    "embedding",
    "reranking",
)


@pytest.fixture
def toy():
    tasks.register(ENTRY)
    yield ENTRY
    tasks.unregister(ENTRY.name)


@pytest.fixture
def run_settings(settings, tmp_path):
    """Settings in which completions in capitals are preferred."""
    words = ("red", "blue", "green", "black", "white", "pink", "gray", "teal")
    rows = [{"prompt": f"say {w}: ", "chosen": w.upper(), "rejected": w.title()} for w in words]
    bad = [{"prompt": "say it: ", "chosen": "it", "rejected": "it"}, {"prompt": "say it: ", "chosen": "it"}]
    file = write_rows(tmp_path / "pairs.jsonl", [*rows, rows[0], *bad])
    data = {"train": str(file), "eval": 2, "bad_rows": "skip"}
    train = {"epochs": 8, "batch_size": 3, "checkpoint_every": 5}
    defaults = {"task": "toy-preference", "data": data, "train": train}
    return lambda **changes: settings(tmp_path / "run", **deep_merge(defaults, changes))


@pytest.mark.parametrize("method", ["lora", "prompt", pytest.param("head", marks=pytest.mark.slow)])
def test_registered_task_trains_saves_and_can_be_opened(toy, run_settings, method):
    log_lines = []
    assert tasks.names() == (*BUILT_IN, "toy-preference")
    result = deltaw.fit(run_settings(method=method), callback=LineCallback(log_lines.append))
    assert result.plan is not None and 0 < result.plan.trained_parameters < result.plan.total_parameters
    assert result.outcome.rows == 8 * 6
    steps = [json.loads(line) for line in (result.output / "metrics.jsonl").read_text().splitlines()]
    first, *_, last = [step["loss"] for step in steps if "loss" in step]
    assert last < first
    assert any("packing" in line and "shared prefixes" in line for line in log_lines)
    assert result.evaluation.main == "preferred"

    opened = open_run(str(result.output), precision="fp32", device="cpu", log=lambda line: None)
    assert isinstance(opened.task, PreferenceTask)
    assert RunConfig.read(result.output / "run.yaml").task == "toy-preference"
    opened.require_generation()  # the task generates text


def test_unusable_rows_are_skipped_and_reported(toy, run_settings):
    config = RunConfig.read(run_settings())
    _, data = read_data(config)
    assert (len(data.train), len(data.held_out), data.report.duplicates) == (6, 2, 1)
    assert data.report.bad_rows == {"nothing to prefer": 1, "'rejected' is missing": 1}
    check = check_data(config)
    counts = {finding.name: finding.count for finding in check.findings}
    assert check.usable and check.form == "toy pairs" and counts == {"bad_rows": 1, "duplicates": 1}
    (row,) = preview_rows(config, 2, 1)
    texts = ["".join(piece.text for piece in example.spans) for example in row.examples]
    assert texts == ["say blue: BLUE", "say blue: Blue"]
    long = RunConfig.read(run_settings(), {"data": {"max_length": 12}})
    with pytest.raises(UserError, match="longer than 12 tokens"):
        read_data(long)
    (finding,) = (f for f in check_data(long).findings if f.name == "long_rows")
    assert finding.level == "error" and finding.count > 0


def test_interrupted_run_is_resumed(toy, run_settings):
    class Stop(Callback):
        steps = 0

        def on_step(self, step):
            self.steps += 1

        def should_stop(self):
            return self.steps >= 5

    assert deltaw.fit(run_settings(), callback=Stop()).interrupted
    result = deltaw.fit(run_settings())
    assert result.resumed_from_step == 5 and not result.interrupted and result.outcome.rows == 8 * 6


@pytest.mark.slow
def test_methods_can_be_compared_and_runs_evaluated(toy, run_settings, tmp_path, monkeypatch, capsys):
    use_local_worker(monkeypatch)
    config = RunConfig.read(run_settings(train={"epochs": 1}))
    comparison = compare(config, ["lora", "last"], folder=tmp_path / "out", seeds=1)
    assert {result.method for result in comparison.results} == {"lora", "last"} and comparison.metric == "preferred"
    run = deltaw.fit(config).output
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["eval", str(run), "--data", str(config.data.train), "--json"])
    assert "preferred" in json.loads(capsys.readouterr().out)["eval"]


def test_unregistered_task_is_rejected(run_settings):
    for _ in range(2):
        with pytest.raises(UserError, match="'task' cannot be 'toy-preference'"):
            RunConfig.read(run_settings())
        tasks.register(ENTRY)
        assert RunConfig.read(run_settings()).task == "toy-preference"
        tasks.unregister(ENTRY.name)
    with pytest.raises(UserError, match="unknown task 'causal'"):
        tasks.entry_of("causal")
    with pytest.raises(ValueError, match="already"):
        tasks.register(tasks.entry_of("regression"))
