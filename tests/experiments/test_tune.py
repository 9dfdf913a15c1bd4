"""Searches resume, survive failing trials and report findings."""

from __future__ import annotations

import io
import sys

import pytest
from rich.console import Console

from deltaw.errors import UserError
from deltaw.experiments.jobs import WorkerExited
from deltaw.experiments.tune import TrialResult, Tuning, tune, tuning_findings
from deltaw.reports.comparison import tuning_table
from deltaw.settings.config import RunConfig

SEARCH = ["train.learning_rate=1e-4..1e-1:log", "lora.rank=[2,4]"]


@pytest.fixture
def search(local_worker, study_settings, tmp_path):
    def run(trials, search=SEARCH, **changes):
        out = io.StringIO()
        local_worker.requests = []
        config = RunConfig.read(study_settings(tmp_path / "run", **changes))
        options = {"folder": tmp_path / "out", "search": search, "log": Console(file=out, width=200).print}
        tuning = tune(config, trials=trials, **options)
        return tuning, out.getvalue(), [request for request in local_worker.requests if request.startswith("trial")]

    return run


def test_search_resumes_up_to_number_of_trials(search, tmp_path):
    first, output, requests = search(2)
    assert len(requests) == 2 and output.count("trial ") == 2
    # Default rate for a hidden size of 32. It is 2e-4 for 4,096.
    usual = pytest.approx(2e-4 * (4096 / 32) ** 0.78, rel=0.01)
    assert first.trials[0].values == {"train.learning_rate": usual, "lora.rank": 4} and first.first == 0
    second, output, requests = search(3)
    assert len(requests) == 1 and "2 of 3 trials are already done" in output
    assert [t.loss for t in second.trials[:2]] == [t.loss for t in first.trials]
    assert second.first == 0 and second.steps == 6 and second.validation_rows == 2
    losses = [trial.loss for trial in second.trials if trial.end == "done"]
    assert second.ranked[0].loss == min(losses)
    best = RunConfig.read(tmp_path / "out" / "best.yaml")
    assert best.train.learning_rate == second.ranked[0].values["train.learning_rate"]
    assert best.lora.rank == second.ranked[0].values["lora.rank"]
    assert best.output == str(tmp_path / "run")
    assert search(3)[2] == []


def test_changed_settings_start_new_search(search, synthetic_worker):
    search(1)
    tuning, output, requests = search(1, train={"epochs": 1})
    assert len(requests) == 1 and "train.epochs was 2.0, is 1.0" in output
    assert tuning.steps == 3
    assert search(1)[2] == []


def test_failed_trial_does_not_stop_search(search, synthetic_worker, intercept_requests):
    def fail(kind, config):
        if kind == "trial" and len(synthetic_worker.requests) == 2:
            synthetic_worker.requests.append("trial lost")
            raise WorkerExited("its process was ended by SIGKILL")

    with intercept_requests(fail):
        tuning, *_ = search(3)
    assert [trial.end for trial in tuning.trials] == ["done", "failed", "done"]
    assert "Failed: its process was ended by SIGKILL" in tuning_findings(tuning)


def test_impossible_settings_stop_search(search, tmp_path):
    with pytest.raises(UserError, match="blocks"):
        search(20, ["train.learning_rate=1e-4..1e-3"], method="last", last={"blocks": 3})
    assert not (tmp_path / "out").exists()


def test_interrupted_trial_is_not_counted(search, synthetic_worker, intercept_requests):
    def interrupt(kind, config):
        if kind == "trial" and len(synthetic_worker.requests) == 2:
            raise KeyboardInterrupt

    with intercept_requests(interrupt), pytest.raises(KeyboardInterrupt):
        search(3)
    tuning, output, requests = search(3)
    assert "1 of 3 trials are already done" in output and len(requests) == 2 and len(tuning.trials) == 3


def test_poor_trial_is_pruned(search, local_worker, monkeypatch):
    def ask(self, kind, on_report=None, **request):
        if kind == "usual":
            return {"usual_rate": 2e-4}
        local_worker.requests.append("trial")
        number = len(local_worker.requests)
        counts = {"training_rows": 20, "validation_rows": 2, "steps": 6}
        for evaluation in (1, 2, 3):
            if not on_report({"evaluation": evaluation, "loss": float(number)}):
                return {**counts, "stopped": True}
        return {**counts, "loss": float(number)}

    monkeypatch.setattr(local_worker, "ask", ask)
    tuning, *_ = search(8)
    assert [trial.end for trial in tuning.trials] == ["done"] * 5 + ["ended early"] * 3


def test_missing_optuna_has_hint(search, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r'pip install "deltaw\[tune\]"'):
        search(1)


def test_invalid_storage_file_is_rejected(local_worker, study_settings, tmp_path):
    file = tmp_path / "trials.db"
    file.write_text("no database at all, but long enough to be taken for a header" * 9)
    config = RunConfig.read(study_settings(tmp_path / "run"))
    with pytest.raises(UserError, match="--storage"):
        tune(config, trials=1, folder=tmp_path / "out", search=SEARCH, storage=file)
    assert not (tmp_path / "out").exists()


def test_findings_of_tuning():
    trials = [TrialResult(n, {"lora.rank": r}, loss, "done") for n, (r, loss) in enumerate([(8, 2.0), (16, 1.5)])]
    trials += [TrialResult(2, {"lora.rank": 16}, 1.505, "done"), TrialResult(3, {"lora.rank": 4}, None, "diverged")]
    tuning = Tuning("out", "lora", {"lora.rank": "[4, 8, 16]"}, trials, 0, {"lora.rank": 0.75}, {"lora.rank": "high"})
    text = "\n".join(tuning_findings(tuning))
    for output in (
        "Trial 1 is best: loss 1.5000 with lora.rank 16.",
        "original settings: 2.0000. The best loss is 25.0% lower",
        "1 of the other 2 finished trials are within 1% of it",
        "lora.rank 75%",
        "high end of the search space ([4, 8, 16])",
        "1 diverged",
    ):
        assert output in text
    out = io.StringIO()
    Console(file=out, width=80).print(tuning_table(tuning))
    assert "0 (original)" in out.getvalue()
