"""A run that is killed at any moment goes on with the same command, equal to the bit.

A copy of a run's folder, made while the run goes on, is what a process leaves that is killed at that moment.
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import deltaw
from deltaw.errors import UserError
from deltaw.settings import RunConfig
from deltaw.training import checkpoints as files
from deltaw.training.callbacks import Callback
from deltaw.training.checkpoints import Checkpoints, listed, newest
from deltaw.training.evaluation.base import Evaluation
from deltaw.training.resuming import dumped, with_choices
from deltaw.training.run_folder import EARLIER, RUN, Run, RunLock
from deltaw.training.state import ArithmeticChangedWarning, SavedState
from tests.conftest import laid_over, write_rows
from tests.training.copies import copied

ADAPTER = "adapter_model.safetensors"
# Eight rows in steps of three: three steps an epoch.
TRAIN = {"epochs": 4, "checkpoint_every": 2, "eval_every": 6, "checkpoint_minutes": None}


class Snapshots(Callback):
    """Copies the run's folder at moments: after a step, or within the evaluation after one."""

    def __init__(self, run, into, steps=(), evaluations=()):
        self.run, self.into = Path(run), Path(into)
        self.steps, self.evaluations = set(steps), set(evaluations)
        self.taken, self.lines = {}, []

    def on_line(self, line):
        self.lines.append(line)

    def on_step(self, step):
        if step.step in self.steps:
            self._take(f"step {step.step}")

    def on_evaluation(self, step, evaluation):
        if step in self.evaluations:
            self._take(f"evaluation {step}")

    def _take(self, name):
        self.taken[name] = copied(self.run, self.into / name.replace(" ", "-"))


class Told(Callback):
    """Every line, and the steps that were trained."""

    def __init__(self):
        self.lines, self.steps = [], []

    def on_line(self, line):
        self.lines.append(line)

    def on_step(self, step):
        self.steps.append(step.step)

    def __contains__(self, text):
        return any(text in line for line in self.lines)


def outcome_of(folder):
    """What must be equal: the adapter to the byte, and every line of the metrics without its times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("seconds", None)
    return (folder / ADAPTER).read_bytes(), lines


def assert_same_run(folder, other):
    weights, lines = outcome_of(folder)
    expected, expected_lines = outcome_of(other)
    assert lines == expected_lines
    assert weights == expected


def stopped_run(settings, folder, after, **changes):
    """A run that was stopped by its caller after so many steps."""

    class Stop(Told):
        def should_stop(self):
            return len(self.steps) >= after

    result = deltaw.fit(settings(folder, **laid_over({"train": TRAIN}, changes)), callback=Stop())
    assert result.interrupted and result.outcome.steps == after
    return result


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    """A run that nothing stopped."""
    return deltaw.fit(settings(tmp_path_factory.mktemp("whole") / "run", train=TRAIN)).output


METHODS = {
    "lora": {"method": "lora", "lora": {"rank": 4, "alpha": 8, "dropout": 0.2}},
    "lora, upper block": {"method": "lora", "lora": {"layers": "1-", "rank": 4, "alpha": 8}},
    "prompt": {"method": "prompt", "prompt": {"length": 3}},
    "random": {"method": "random", "random": {"weights": 0.05}},
    "full": {"method": "full"},
    "head": {"method": "head"},
}


QUICK = {("lora", "bf16"), ("lora, upper block", "fp32"), ("full", "int8")}
EVERY = [
    pytest.param(m, p, marks=[] if (m, p) in QUICK else pytest.mark.slow)
    for m in METHODS
    for p in ("fp32", "bf16", "int8")
]


@pytest.mark.parametrize(("method", "precision"), EVERY)
def test_a_run_that_is_killed_goes_on_equal_to_the_bit(settings, tmp_path, monkeypatch, method, precision):
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache" / "packages"))
    # The two with frozen blocks below store features; the killed processes' stores go on too.
    changes = laid_over({"train": TRAIN, "precision": precision}, METHODS[method])
    run = tmp_path / "run"
    taken = Snapshots(run, tmp_path, steps=(1, 5), evaluations=(6, 12))
    whole = deltaw.fit(settings(run, **changes), callback=taken)
    assert whole.outcome.steps == 12 and whole.resumed_from_step is None
    stored = any("features computed once" in line for line in taken.lines)
    assert stored == (method in ("lora, upper block", "head"))
    for name, folder in taken.taken.items():
        told = Told()
        result = deltaw.fit(settings(folder, **changes), callback=told)
        number = int(name.split()[1])
        from_step = result.resumed_from_step
        # What was written last may not have been flushed; the one before was.
        assert (from_step or 0) in range(max(0, number - 5), number + 1), name
        assert told.steps == list(range((from_step or 0) + 1, 13)), name
        assert_same_run(folder, run)
        assert not list(tmp_path.glob("*.1"))


@pytest.mark.parametrize("method", ["lora, upper block", "head"])
def test_features_that_were_only_partly_stored_are_computed_as_they_were(settings, tmp_path, monkeypatch, method):
    """In the first epoch features come into being: a process that is killed there leaves some of them."""
    changes = laid_over({"train": {**TRAIN, "epochs": 3}, "precision": "bf16"}, METHODS[method])

    def cache(name):
        monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / name / "packages"))

    cache("a cache of its own")
    whole = deltaw.fit(settings(tmp_path / "whole", **changes)).output
    cache("another")
    killed = tmp_path / "killed"
    for at in (1, 3):  # before the first checkpoint, and between the first and the second
        taken = Snapshots(killed, tmp_path / str(at), steps=(at,))
        (tmp_path / str(at)).mkdir()
        with pytest.raises(RuntimeError, match="killed"):
            deltaw.fit(settings(killed, **changes), callback=Dying(taken, at))
        shutil.rmtree(killed)
        shutil.move(taken.taken[f"step {at}"], killed)
    result = deltaw.fit(settings(killed, **changes))
    assert result.resumed_from_step in (None, 2)
    assert_same_run(killed, whole)


class Dying(Callback):
    """Takes a copy, and ends with an error."""

    def __init__(self, taken, at):
        self.taken, self.at = taken, at

    def on_step(self, step):
        self.taken.on_step(step)
        if step.step == self.at:
            raise RuntimeError("killed")


def test_interrupted_runs_go_on_too(settings, tmp_path, whole):
    run = tmp_path / "run"
    stopped_run(settings, run, 3)
    assert Run(run).state == "interrupted"
    assert listed(run / "checkpoints")[-1].name == "step-000003"
    said = "The training was interrupted"
    assert said in (run / "README.md").read_text()
    result = deltaw.fit(settings(run, train=TRAIN))
    assert result.resumed_from_step == 3 and not result.interrupted
    assert_same_run(run, whole)
    assert said not in (run / "README.md").read_text()
    assert Run(run).state == "finished"
    answer = result.as_dict()
    assert answer["resumed_from_step"] == 3 and answer["steps"] == 12
    assert answer["checkpoints"] == [str(path) for path in listed(run / "checkpoints")]


def test_a_finished_run_is_moved_and_the_new_one_begins_with_its_first_step(settings, tmp_path):
    run = deltaw.fit(settings(tmp_path / "run", train=TRAIN)).output
    again = deltaw.fit(settings(run, train=TRAIN))
    assert again.resumed_from_step is None and (tmp_path / "run.1" / ADAPTER).is_file()
    assert_same_run(run, tmp_path / "run.1")


def test_a_finished_run_is_trained_further(settings, tmp_path):
    train = {**TRAIN, "epochs": 2, "schedule": "constant", "warmup": 0}
    longer = {**train, "epochs": 4}
    whole = deltaw.fit(settings(tmp_path / "whole", train=longer)).output
    run = deltaw.fit(settings(tmp_path / "run", train=train)).output
    told = Told()
    result = deltaw.fit({"train": {"epochs": 4}}, resume=run, callback=told)
    assert result.resumed_from_step == 6 and told.steps == [7, 8, 9, 10, 11, 12] and "12 steps now" in told
    # With a constant learning rate it is the run that had this length from the beginning.
    assert_same_run(run, whole)
    assert [line["step"] for line in outcome_of(run)[1] if "eval" in line] == [6, 12]
    assert RunConfig.read(run / "run.yaml").train.epochs == 4
    with pytest.raises(UserError, match="has done 12 steps") as refused:
        deltaw.fit(resume=run)
    assert "--train.epochs" in refused.value.hint


def test_a_decaying_schedule_goes_on_with_the_rates_of_the_new_length(settings, tmp_path):
    train = {**TRAIN, "epochs": 2, "schedule": "linear", "warmup": 0, "learning_rate": 0.01}
    run = deltaw.fit(settings(tmp_path / "run", train=train)).output
    deltaw.fit({"train": {"max_steps": 10}}, resume=run)
    rates = [line["learning_rate"] for line in outcome_of(run)[1] if "loss" in line]
    assert rates[:6] == pytest.approx([0.01 * (1 - n / 6) for n in range(6)])
    assert rates[6:] == pytest.approx([0.01 * (1 - n / 10) for n in range(6, 10)])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"train": {"batch_size": 4}}, "train.batch_size"),
        ({"train": {"seed": 1}}, "train.seed"),
        ({"train": {"schedule": "cosine"}}, "train.schedule"),
        ({"train": {"learning_rate": 0.5}}, "train.learning_rate"),
        ({"train": {"epochs": 5}}, "train.epochs"),
        ({"lora": {"rank": 2}}, "lora.rank"),
        ({"method": "head"}, "method"),
        ({"precision": "bf16"}, "precision"),
        ({"data": {"eval": 3}}, "data.eval"),
        ({"data": {"labels": "last"}}, "data.labels"),
    ],
)
def test_a_setting_that_would_make_it_another_run_is_refused_by_name(settings, tmp_path, changes, named):
    run = tmp_path / "run"
    stopped_run(settings, run, 3)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match=f"'{named}' is ") as refused:
        deltaw.fit(settings(run, **laid_over({"train": TRAIN}, changes)))
    assert "--fresh" in refused.value.hint and refused.value.where == str(run)
    assert before == {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    told = Told()
    fresh = deltaw.fit(settings(run, **laid_over({"train": TRAIN}, changes)), callback=told, fresh=True)
    assert fresh.resumed_from_step is None and (tmp_path / "run.1" / ADAPTER).is_file()


def test_settings_that_no_step_depends_on_may_change(settings, tmp_path, whole):
    run = tmp_path / "run"
    stopped_run(settings, run, 3)
    train = {**TRAIN, "checkpoint_every": 1, "keep_checkpoints": 5, "learning_rate": 1e-2}
    result = deltaw.fit(settings(run, train=train, force=True, prompt={"length": 7}))
    # The last five, and the best where it is none of these.
    assert result.resumed_from_step == 3 and len(result.checkpoints) in (5, 6)
    assert [path.name for path in result.checkpoints[-5:]] == [f"step-{n:06d}" for n in range(8, 13)]
    assert_same_run(run, whole)


def test_what_only_rounds_otherwise_is_allowed_and_said(settings, tmp_path):
    run, told = tmp_path / "run", Told()
    stopped_run(settings, run, 3)
    result = deltaw.fit(settings(run, train={**TRAIN, "tokens_per_pass": 40}), callback=told)
    assert result.resumed_from_step == 3 and "'train.tokens_per_pass' is 40" in told and "rounded" in told


def test_an_auto_that_is_given_as_it_was_chosen_is_no_change(settings, tmp_path):
    run = tmp_path / "run"
    first = stopped_run(settings, run, 3, train={"learning_rate": "auto"})
    rate = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["learning_rate"]
    assert rate > 0 and first.outcome.steps == 3
    chosen = newest(run / "checkpoints")[0].values["choices"]["train.learning_rate"]
    train = {**TRAIN, "learning_rate": chosen}
    assert deltaw.fit(settings(run, train=train)).resumed_from_step == 3


def test_choices_are_those_that_the_run_began_with(settings, tmp_path, monkeypatch):
    """What this machine would choose now does not matter to a run that goes on."""
    whole = deltaw.fit(settings(tmp_path / "whole", train=TRAIN, threads="auto")).output
    run = tmp_path / "run"
    stopped_run(settings, run, 3, threads="auto")
    monkeypatch.setattr("deltaw.training.tasks.causal_batcher.TOKENS_PER_PASS", {"cpu": 64})
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    result = deltaw.fit(settings(run, train=TRAIN, threads="auto"))
    assert result.resumed_from_step == 3
    assert_same_run(run, whole)
    text = (run / "run.yaml").read_text()
    assert "threads: auto  # 1: as the run began" in text and "tokens_per_pass: auto  # 1024: as the" in text


def test_a_checkpoint_does_not_choose_what_a_run_is_made_of(settings, tmp_path):
    config = RunConfig.read(settings(tmp_path / "run"))
    before = dumped(config)
    wanted = {"model": "/x", "trust_remote_code": True, "track": "wandb", "data.train": "/x", "output": "/x"}
    pinned, _ = with_choices(config, before, {**wanted, "data.chat_template": "/x", "threads": 2})
    assert pinned.model_copy(update={"threads": config.threads}) == config and pinned.threads == 2


def test_a_run_with_a_chat_template_of_its_own_goes_on(settings, tmp_path, model_folder):
    template = tmp_path / "own.jinja"
    template.write_text((model_folder / "chat_template.jinja").read_text())
    own = settings(tmp_path / "run", data={"chat_template": str(template)}, train={"max_steps": 1})
    run = deltaw.fit(own).output
    assert deltaw.fit({"train": {"max_steps": 2}}, resume=run).outcome.steps == 2


def test_products_are_computed_as_they_were(settings, tmp_path, monkeypatch):
    from deltaw.kernels import loader

    if loader.library() is None:
        pytest.skip("no compiled kernels here")
    whole = deltaw.fit(settings(tmp_path / "whole", train=TRAIN))
    run = tmp_path / "run"
    stopped_run(settings, run, 3)
    slow = {stored: {"dot": 1.0, "tiles": 1.0, "wide": 1.0, "torch": 100.0} for stored in ("fp32", "bf16", "int8")}
    monkeypatch.setenv("DELTAW_MEASURED", json.dumps({"*": slow}))
    with warnings.catch_warnings():
        warnings.simplefilter("error", ArithmeticChangedWarning)
        result = deltaw.fit(settings(run, train=TRAIN))
    assert result.arithmetic == whole.arithmetic and result.arithmetic["fp32"] != "torch"
    assert_same_run(run, whole.output)


def test_rows_that_changed_are_refused(settings, tmp_path):
    rows = [{"prompt": f"paint {n}", "completion": "ab"[n % 2]} for n in range(10)]
    data = {"train": str(write_rows(tmp_path / "rows.jsonl", rows))}
    run = tmp_path / "run"
    stopped_run(settings, run, 3, data=data)
    rows[4]["completion"] = "c"
    write_rows(tmp_path / "rows.jsonl", rows)
    changed = settings(run, train=TRAIN, data=data)
    with pytest.raises(UserError, match="have changed since") as refused:
        deltaw.fit(changed)
    assert "rows.jsonl" in refused.value.where
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(UserError, match=r"rows\.jsonl"):
        deltaw.fit(changed)
    rows[4]["completion"] = "a"
    write_rows(tmp_path / "rows.jsonl", rows)
    assert deltaw.fit(changed).resumed_from_step == 3


def test_the_same_rows_elsewhere_are_the_same_rows(settings, tmp_path, whole, rows_file):
    run = tmp_path / "run"
    stopped_run(settings, run, 3)
    elsewhere = shutil.copy(rows_file, tmp_path / "elsewhere.jsonl")
    assert deltaw.fit(settings(run, train=TRAIN, data={"train": str(elsewhere)})).resumed_from_step == 3
    assert_same_run(run, whole)


def test_another_model_under_the_same_name_is_refused(settings, tmp_path, model_folder):
    from transformers import AutoModelForCausalLM

    model = shutil.copytree(model_folder, tmp_path / "model")
    run = tmp_path / "run"
    stopped_run(settings, run, 3, model=str(model))
    for change in ("all but eight", "the last"):
        loaded = AutoModelForCausalLM.from_pretrained(model_folder)
        weight = loaded.model.layers[0].mlp.down_proj.weight.data.view(-1)
        if change == "the last":
            weight[-1] += 1e-3
        else:
            step = len(weight) // 8
            weight[[n for n in range(len(weight)) if n % step]] *= 1.5
        loaded.save_pretrained(model)
        with pytest.raises(UserError, match="weights are not those"):
            deltaw.fit(settings(run, train=TRAIN, model=str(model)))
    shutil.copytree(model_folder, model, dirs_exist_ok=True)
    assert deltaw.fit(settings(run, train=TRAIN, model=str(model))).resumed_from_step == 3


def test_a_run_of_an_earlier_version_goes_on_and_that_is_said(settings, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as earlier:
        earlier.setattr("deltaw.training.session.identity_of", lambda *of: "9c51f54953adfdd3-torch.float32")
        stopped_run(settings, run, 3)
    told = Told()
    assert deltaw.fit(settings(run, train=TRAIN), callback=told).resumed_from_step == 3
    assert "not verified: whether the model is as when the run began, with an earlier version" in told


def as_earlier_versions_wrote(run):
    """Two files in the place of run.json."""
    values = json.loads((run / RUN).read_text())
    (run / RUN).unlink()
    training, process = values.pop("training"), values["process"]
    status = {"version": 1, "state": values["state"], "total_steps": values["total_steps"], "process": process["id"]}
    summary, checkpoints = (run / name for name in EARLIER)
    checkpoints.write_text(json.dumps(status | training))
    values["state"] = "failed" if values["state"] == "diverged" else values["state"]
    summary.write_text(json.dumps(values))
    return values


def test_a_folder_of_an_earlier_version_is_read_and_resumed(settings, tmp_path, whole):
    run = tmp_path / "run"
    stopped_run(settings, run, 3)
    values = as_earlier_versions_wrote(run)
    earlier = Run(run)
    assert (earlier.state, earlier.steps, earlier.total_steps) == ("interrupted", 3, 12)
    assert earlier.result == values["result"] and earlier.started == values["started"] and earlier.chosen
    assert deltaw.fit(settings(run, train=TRAIN)).resumed_from_step == 3
    assert_same_run(run, whole)
    assert Run(run).started == values["started"] and not any((run / name).exists() for name in EARLIER)
    as_earlier_versions_wrote(run)
    assert Run(run).state == "finished"
    assert deltaw.fit({"train": {"epochs": 5}}, resume=run).resumed_from_step == 12


def test_damaged_checkpoints_are_passed_over_and_that_is_said(settings, tmp_path, whole):
    run = tmp_path / "run"
    stopped_run(settings, run, 5, train={"keep_checkpoints": 3})
    for count, path in enumerate(reversed(listed(run / "checkpoints")), start=1):
        target = path / files.TENSORS
        target.write_bytes(target.read_bytes()[:-8])
        copy, told = shutil.copytree(run, tmp_path / f"damaged {count}"), Told()
        result = deltaw.fit(settings(copy, train=TRAIN), callback=told)
        assert result.resumed_from_step == {1: 4, 2: 2, 3: None}[count]
        assert f"{path.name} is damaged and was skipped: state.safetensors has" in told
        if count < 3:
            assert_same_run(copy, whole)


class Fake:
    """As much of a training's state as checkpoints need."""

    step, total_steps = 4, 100

    def view(self):
        return SavedState({"step": self.step}, {"a": torch.ones(2)})


ABOUT = {"settings": {}, "choices": {}, "rows": {}, "model": None}


def test_the_last_checkpoints_and_the_best_are_kept(tmp_path):
    state = Fake()
    made = Checkpoints(tmp_path, every=2, minutes=None, keep=2, about=ABOUT)
    made.begin(state)
    losses = {3: 0.5, 6: 0.2, 9: 0.4}
    for state.step in range(1, 13):
        best = False
        if state.step in losses:
            scored = Evaluation({"loss": losses[state.step]}, main="loss", higher_is_better=False)
            best = made.evaluated(state.step, scored)
        made.step_done(best)
    made.close()
    assert [path.name for path in listed(tmp_path)] == ["step-000006", "step-000010", "step-000012"]
    assert newest(tmp_path)[0].values["best"] == {"rank": -0.2, "step": 6}


def test_checkpoints_by_time(tmp_path, settings, monkeypatch):
    import deltaw.training.checkpoints as module

    clock = [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    class Slow(Callback):
        def on_step(self, step):
            clock[0] += 25.0

    train = {**TRAIN, "checkpoint_every": None, "checkpoint_minutes": 1.0, "keep_checkpoints": 9, "eval_every": None}
    result = deltaw.fit(settings(tmp_path / "run", train=train), callback=Slow())
    assert [path.name for path in result.checkpoints] == [f"step-{n:06d}" for n in (3, 6, 9, 12)]


def test_without_checkpoints_none_are_written_and_the_run_begins_again(settings, tmp_path):
    none = {"checkpoint_every": None, "checkpoint_minutes": None}
    run = tmp_path / "run"
    first = stopped_run(settings, run, 3, train=none)
    assert not first.checkpoints
    again = deltaw.fit(settings(run, train={**TRAIN, **none}))
    assert again.resumed_from_step is None and (tmp_path / "run.1" / ADAPTER).is_file()
    with pytest.raises(UserError, match="no checkpoint to resume from"):
        deltaw.fit({"train": {"epochs": 9}}, resume=run)


def test_two_runs_into_one_folder(settings, tmp_path):
    run = tmp_path / "run"
    stopped_run(settings, run, 3)
    lock = RunLock(run)
    try:
        with pytest.raises(UserError, match="is training into this folder") as refused:
            deltaw.fit(settings(run, train=TRAIN))
        assert refused.value.where == str(run)
    finally:
        lock.release()
    assert deltaw.fit(settings(run, train=TRAIN)).resumed_from_step == 3


def test_a_second_run_while_one_goes_on_is_refused(settings, tmp_path):
    run, seen = tmp_path / "run", []

    class Second(Callback):
        def on_step(self, step):
            if step.step == 2:
                with pytest.raises(UserError, match=r"process \d+ is training into this folder"):
                    deltaw.fit(settings(run, train=TRAIN))
                seen.append(step.step)

    result = deltaw.fit(settings(run, train=TRAIN), callback=Second())
    assert seen == [2] and result.outcome.steps == 12


class Counter:
    """Counts over a run, as early stopping does."""

    def __init__(self):
        self.count = 0

    def state(self):
        return {"count": self.count}

    def restore(self, state):
        self.count = state["count"]


def test_what_others_keep_comes_back(tmp_path):
    settings = {"every": 2, "minutes": None, "keep": 1, "about": ABOUT}
    first, second = Counter(), Counter()
    first.count = 7
    made = Checkpoints(tmp_path, extras={"counter": first}, **settings)
    made.begin(Fake())
    made.write()
    made.close()
    Checkpoints(tmp_path, extras={"counter": second}, **settings).went_on_from(newest(tmp_path)[0])
    assert second.count == 7
