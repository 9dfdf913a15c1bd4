"""A search for settings: it goes on where it was, survives trials that fail, and says what it found."""

from __future__ import annotations

import io
import sys

import pytest
from rich.console import Console

from deltaw.errors import UserError
from deltaw.experiments.jobs import WorkerEnded
from deltaw.experiments.tune import TrialResult, Tuning, lessons, tune
from deltaw.reports.comparison import tuning_table
from deltaw.settings import RunConfig

SEARCH = ["train.learning_rate=1e-4..1e-1:log", "lora.rank=[2,4]"]


@pytest.fixture
def search(here, study_settings, tmp_path):
    def run(trials, search=SEARCH, **changes):
        out = io.StringIO()
        here.asked = []
        config = RunConfig.read(study_settings(tmp_path / "run", **changes))
        how = {"folder": tmp_path / "out", "search": search, "say": Console(file=out, width=200).print}
        tuning = tune(config, trials=trials, **how)
        return tuning, out.getvalue(), [what for what in here.asked if what.startswith("trial")]

    return run


def test_a_search_goes_on_to_the_number_that_is_asked(search, tmp_path):
    first, said, asked = search(2)
    assert len(asked) == 2 and said.count("trial ") == 2
    # The usual rate of a model 32 wide, 2e-4 on one 4,096 wide.
    usual = pytest.approx(2e-4 * (4096 / 32) ** 0.78, rel=0.01)
    assert first.trials[0].values == {"train.learning_rate": usual, "lora.rank": 4} and first.first == 0
    second, said, asked = search(3)
    assert len(asked) == 1 and "2 of 3 trials were made before" in said
    assert [t.loss for t in second.trials[:2]] == [t.loss for t in first.trials]
    assert second.first == 0 and second.steps == 6 and second.validation_rows == 2
    done = [trial.loss for trial in second.trials if trial.end == "done"]
    assert second.ranked[0].loss == min(done)
    best = RunConfig.read(tmp_path / "out" / "best.yaml")
    assert best.train.learning_rate == second.ranked[0].values["train.learning_rate"]
    assert best.lora.rank == second.ranked[0].values["lora.rank"]
    assert best.output == str(tmp_path / "run")
    assert search(3)[2] == []


def test_other_settings_are_another_search(search, untrained):
    search(1)
    tuning, said, asked = search(1, train={"epochs": 1})
    assert len(asked) == 1 and "train.epochs was 2.0, is 1.0" in said
    assert tuning.steps == 3
    assert search(1)[2] == []


def test_a_trial_that_fails_does_not_end_the_search(search, untrained, meddling):
    def fail(do, config):
        if do == "trial" and len(untrained.asked) == 2:
            untrained.asked.append("trial lost")
            raise WorkerEnded("its process was ended by SIGKILL")

    with meddling(fail):
        tuning, *_ = search(3)
    assert [trial.end for trial in tuning.trials] == ["done", "failed", "done"]
    assert "Failed: its process was ended by SIGKILL" in lessons(tuning)


def test_settings_that_never_work_end_the_search(search, tmp_path):
    with pytest.raises(UserError, match="blocks"):
        search(20, ["train.learning_rate=1e-4..1e-3"], method="last", last={"blocks": 3})
    assert not (tmp_path / "out").exists()


def test_an_interrupted_trial_does_not_count(search, untrained, meddling):
    def interrupt(do, config):
        if do == "trial" and len(untrained.asked) == 2:
            raise KeyboardInterrupt

    with meddling(interrupt), pytest.raises(KeyboardInterrupt):
        search(3)
    tuning, said, asked = search(3)
    assert "1 of 3 trials were made before" in said and len(asked) == 2 and len(tuning.trials) == 3


def test_a_hopeless_trial_is_ended_early(search, here, monkeypatch):
    def told(self, do, on_report=None, **request):
        if do == "usual":
            return {"usual_rate": 2e-4}
        here.asked.append("trial")
        number = len(here.asked)
        facts = {"training_rows": 20, "validation_rows": 2, "steps": 6}
        for evaluation in (1, 2, 3):
            if not on_report({"evaluation": evaluation, "loss": float(number)}):
                return {**facts, "stopped": True}
        return {**facts, "loss": float(number)}

    monkeypatch.setattr(here, "ask", told)
    tuning, *_ = search(8)
    assert [trial.end for trial in tuning.trials] == ["done"] * 5 + ["ended early"] * 3


def test_without_optuna_the_hint_is_said(search, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r'pip install "deltaw\[tune\]"'):
        search(1)


def test_a_storage_that_is_no_database_is_refused(here, study_settings, tmp_path):
    file = tmp_path / "trials.db"
    file.write_text("no database at all, but long enough to be taken for a header" * 9)
    config = RunConfig.read(study_settings(tmp_path / "run"))
    with pytest.raises(UserError, match="--storage"):
        tune(config, trials=1, folder=tmp_path / "out", search=SEARCH, storage=file)
    assert not (tmp_path / "out").exists()


def test_what_was_learned_is_said():
    trials = [TrialResult(n, {"lora.rank": r}, loss, "done") for n, (r, loss) in enumerate([(8, 2.0), (16, 1.5)])]
    trials += [TrialResult(2, {"lora.rank": 16}, 1.505, "done"), TrialResult(3, {"lora.rank": 4}, None, "diverged")]
    tuning = Tuning("out", "lora", {"lora.rank": "[4, 8, 16]"}, trials, 0, {"lora.rank": 0.75}, {"lora.rank": "high"})
    text = "\n".join(lessons(tuning))
    for said in (
        "Trial 1 is best: loss 1.5000 with lora.rank 16.",
        "gave 2.0000: the best has 25.0% less",
        "1 of the other 2 finished trials come within 1% of it",
        "lora.rank 75%",
        "high end of what was searched ([4, 8, 16])",
        "1 diverged",
    ):
        assert said in text
    out = io.StringIO()
    Console(file=out, width=80).print(tuning_table(tuning))
    assert "0 (as it was)" in out.getvalue()
