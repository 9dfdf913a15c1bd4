"""What a caller sees of a run, and how it stops one; without a callback a run is silent."""

from __future__ import annotations

import subprocess
import sys

import pytest

import deltaw
from deltaw.errors import UserError
from deltaw.training.callbacks import Callback, Lines
from tests.training.runs import metrics


class Noted(Callback):
    """Every call, in order."""

    def __init__(self, stop_after=None):
        self.calls, self.steps, self.lines, self.evaluations = [], [], [], []
        self._stop_after = stop_after

    def _note(self, name):
        if self.calls[-1:] != [name]:
            self.calls.append(name)

    def on_line(self, line):
        self._note("line")
        self.lines.append(line)

    def on_plan(self, plan, limit_bytes):
        self._note("plan")
        assert 0 < plan.peak_resident_bytes < limit_bytes

    def on_begin(self, state):
        self._note("begin")
        assert state.step == 0 and state.total_steps == 6

    def on_step(self, step):
        self._note("step")
        self.steps.append(step.step)

    def on_evaluation(self, step, evaluation):
        self._note("evaluation")
        self.evaluations.append((step, evaluation.metrics["loss"]))

    def should_stop(self):
        return self._stop_after is not None and len(self.steps) >= self._stop_after

    def on_end(self, outcome):
        self._note("end")
        self.outcome = outcome


def test_everything_is_told_in_order(settings, tmp_path):
    noted = Noted()
    train = {"epochs": 2, "eval_every": 4}
    result = deltaw.fit(settings(tmp_path / "run", train=train), callback=noted)
    first = [name for name in noted.calls if name not in ("line", "plan")]
    assert first == ["begin", "step", "evaluation", "step", "end", "evaluation"]
    assert noted.calls.index("plan") < noted.calls.index("begin")
    assert noted.steps == [1, 2, 3, 4, 5, 6] and noted.outcome is result.outcome
    assert [step for step, _ in noted.evaluations] == [4, 6]
    assert noted.evaluations[-1][1] == result.evaluation.metrics["loss"]
    assert [(t["step"], t["eval"]["loss"]) for t in metrics(result.output, "eval")] == noted.evaluations
    assert (result.output / "README.md").is_file()


def test_the_end_is_told_also_where_a_training_fails(settings, tmp_path):
    noted = Noted()
    broken = settings(tmp_path / "run", lora={"alpha": 1e20}, train={"epochs": 2})
    with pytest.raises(UserError, match="diverged"):
        deltaw.fit(broken, callback=noted)
    assert noted.calls[-2:] == ["end", "line"] and noted.outcome is None


def test_a_run_from_python_prints_nothing(settings, tmp_path, capfd):
    deltaw.fit(settings(tmp_path / "run"))
    deltaw.plan(settings(tmp_path / "run"))
    assert capfd.readouterr() == ("", "")
    said = []
    deltaw.fit(settings(tmp_path / "other"), callback=Lines(said.append))
    assert said and capfd.readouterr() == ("", "")


def test_training_and_experiments_import_nothing_that_draws():
    script = (
        "import sys, deltaw.training.fit, deltaw.training.planning.budget, deltaw.experiments.compare, "
        "deltaw.experiments.tune, deltaw.experiments.worker; "
        "tops = {n.partition('.')[0] for n in sys.modules}; "
        "print(*({'rich', 'click'} & tops), *(n for n in sys.modules if n.startswith('deltaw.reports')))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
