"""A run that is killed at any moment goes on with the same command, equal to the bit."""

from __future__ import annotations

import itertools
import json
import shutil
import warnings
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import deltaw
from deltaw.errors import UserError
from deltaw.runs import checkpoints as files
from deltaw.runs.checkpoints import Checkpoints, listed, newest
from deltaw.runs.folder import Run
from deltaw.runs.resuming import dumped, with_choices
from deltaw.settings import RunConfig
from deltaw.training.callbacks import Calling
from deltaw.training.evaluation.base import Evaluation
from deltaw.training.state import ArithmeticChangedWarning, SavedState
from tests.cli.conftest import tree
from tests.conftest import laid_over
from tests.kernels.conftest import compiled_only
from tests.training.runs import ADAPTER, METHODS, TRAIN, Snapshots, Told, adapter, assert_same_run, metrics, stopped_run

KINDS = {name: METHODS[name] for name in ("prompt", "random", "full", "head")}
KINDS |= {"lora": {"lora": {"dropout": 0.2}}, "lora, upper block": {"lora": {"layers": "1-"}}}
QUICK = {("lora", "bf16"), ("lora, upper block", "fp32"), ("full", "int8")}
EVERY = [
    pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow)
    for case in itertools.product(KINDS, ("fp32", "bf16", "int8"))
]


@pytest.mark.parametrize(("method", "precision"), EVERY)
def test_a_run_that_is_killed_goes_on_equal_to_the_bit(settings, tmp_path, monkeypatch, method, precision):
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache" / "packages"))
    # The two with frozen blocks below store features; the killed processes' stores go on too.
    changes = laid_over({"train": TRAIN, "precision": precision}, KINDS[method])
    run = tmp_path / "run"
    moments = ["step 1", "step 5", "evaluation 6", "evaluation 12"]
    taken = Snapshots(run, tmp_path, moments if method == "lora" else moments[1::2])
    whole = deltaw.fit(settings(run, **changes), callback=taken)
    assert whole.outcome.steps == 12 and whole.resumed_from_step is None
    assert "lora" not in method or {tensor.dtype for tensor in adapter(run).values()} == {torch.float32}
    assert ("features computed once" in taken) == (method in ("lora, upper block", "head"))
    for name, folder in taken.taken.items():
        told = Told()
        result = deltaw.fit(settings(folder, **changes), callback=told)
        number = int(name.split()[1])
        from_step = result.resumed_from_step or 0
        # What was written last may not have been flushed; the one before was.
        assert from_step in range(max(0, number - 5), number + 1), name
        assert told.steps == list(range(from_step + 1, 13)), name
        assert_same_run(folder, run)
        assert not list(tmp_path.glob("*.1"))


@pytest.mark.parametrize("method", ["lora, upper block", pytest.param("head", marks=pytest.mark.slow)])
def test_features_that_were_only_partly_stored_are_computed_as_they_were(settings, tmp_path, monkeypatch, method):
    """In the first epoch features come into being: a process that is killed there leaves some of them."""
    changes = laid_over({"train": {**TRAIN, "epochs": 3}, "precision": "bf16"}, KINDS[method])
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "a cache of its own" / "packages"))
    whole = deltaw.fit(settings(tmp_path / "whole", **changes)).output
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "another" / "packages"))
    killed = tmp_path / "killed"
    for at in (1, 3):  # before the first checkpoint, and between the first and the second
        taken = Snapshots(killed, tmp_path, [f"step {at}"], dies_at=at)
        with pytest.raises(RuntimeError, match="killed"):
            deltaw.fit(settings(killed, **changes), callback=taken)
        shutil.rmtree(killed)
        shutil.move(taken.taken[f"step {at}"], killed)
    assert deltaw.fit(settings(killed, **changes)).resumed_from_step in (None, 2)
    assert_same_run(killed, whole)


def test_interrupted_runs_go_on_too_and_once_finished_are_kept(settings, tmp_path, stopped, whole):
    before, said = Run(stopped), "The training was interrupted"
    assert before.state == "interrupted" and listed(stopped / "checkpoints")[-1].name == "step-000003"
    assert said in (stopped / "README.md").read_text()
    result = deltaw.fit(settings(stopped, train=TRAIN))
    assert result.resumed_from_step == 3 and not result.interrupted
    assert_same_run(stopped, whole)
    after = Run(stopped)
    assert said not in (stopped / "README.md").read_text()
    assert after.state == "finished" and after.started == before.started
    answer = result.as_dict()
    assert answer["resumed_from_step"] == 3 and answer["steps"] == 12
    assert answer["checkpoints"] == [str(path) for path in listed(stopped / "checkpoints")]
    kept = tree(stopped)
    again = deltaw.fit(settings(stopped, train=TRAIN))
    assert again.earlier is not None and again.as_dict() == result.as_dict() and tree(stopped) == kept
    assert again.evaluation.as_dict() == result.evaluation.as_dict() and again.outcome == result.outcome
    fresh = deltaw.fit(settings(stopped, train=TRAIN), fresh=True)
    assert fresh.resumed_from_step is None and (tmp_path / "run.1" / ADAPTER).is_file()
    assert_same_run(stopped, whole)


def test_a_finished_run_is_trained_further(settings, tmp_path):
    train = {**TRAIN, "epochs": 2, "eval_every": 3, "schedule": "constant", "warmup": 0}
    whole = deltaw.fit(settings(tmp_path / "whole", train=train)).output
    run = deltaw.fit(settings(tmp_path / "run", train=train | {"epochs": 1})).output
    told = Told()
    result = deltaw.fit({"train": {"epochs": 2}}, resume=run, callback=told)
    assert result.resumed_from_step == 3 and told.steps == [4, 5, 6] and "6 steps now" in told
    # With a constant learning rate it is the run that had this length from the beginning.
    assert_same_run(run, whole)
    assert [line["step"] for line in metrics(run, "eval")] == [3, 6]
    assert RunConfig.read(run / "run.yaml").train.epochs == 2
    with pytest.raises(UserError, match="has done 6 steps") as refused:
        deltaw.fit(resume=run)
    assert "--train.epochs" in refused.value.hint


def test_a_decaying_schedule_goes_on_with_the_rates_of_the_new_length(settings, tmp_path):
    train = {**TRAIN, "epochs": 1, "schedule": "linear", "warmup": 0, "learning_rate": 0.01}
    run = deltaw.fit(settings(tmp_path / "run", train=train)).output
    deltaw.fit({"train": {"max_steps": 5}}, resume=run)
    rates = [line["learning_rate"] for line in metrics(run, "loss")]
    assert rates == pytest.approx([0.01 * (1 - n / (3 if n < 3 else 5)) for n in range(5)])


def test_settings_that_would_make_it_another_run_are_refused_by_name(settings, tmp_path, stopped):
    before = {p: p.read_bytes() for p in stopped.rglob("*") if p.is_file()}
    others = {"train.batch_size": 4, "train.seed": 1, "train.schedule": "cosine", "train.learning_rate": 0.5}
    others |= {"train.epochs": 5, "lora.rank": 2, "data.eval": 3, "data.labels": "last"}
    for name, value in {**others, "precision": "bf16", "method": "head"}.items():
        section, _, key = name.rpartition(".")
        other = settings(stopped, **laid_over({"train": TRAIN}, {section: {key: value}} if section else {key: value}))
        with pytest.raises(UserError, match=f"'{name}' is ") as refused:
            deltaw.fit(other)
        assert "--fresh" in refused.value.hint and refused.value.where == str(stopped)
    assert before == {p: p.read_bytes() for p in stopped.rglob("*") if p.is_file()}
    assert deltaw.fit(other, fresh=True).resumed_from_step is None and (tmp_path / "run.1" / ADAPTER).is_file()


def test_settings_that_no_step_depends_on_and_the_place_of_the_rows_may_change(
    settings, tmp_path, stopped, whole, rows_file
):
    train = {**TRAIN, "checkpoint_every": 1, "keep_checkpoints": 5, "learning_rate": 1e-2}
    data = {"train": str(shutil.copy(rows_file, tmp_path / "elsewhere.jsonl"))}
    result = deltaw.fit(settings(stopped, train=train, data=data, force=True, prompt={"length": 7}))
    # The last five, and the best where it is none of these.
    assert result.resumed_from_step == 3 and len(result.checkpoints) in (5, 6)
    assert [path.name for path in result.checkpoints[-5:]] == [f"step-{n:06d}" for n in range(8, 13)]
    assert_same_run(stopped, whole)


def test_what_only_rounds_otherwise_is_allowed_and_said(settings, stopped):
    told = Told()
    result = deltaw.fit(settings(stopped, train={**TRAIN, "tokens_per_pass": 40}), callback=told)
    assert result.resumed_from_step == 3 and "'train.tokens_per_pass' is 40" in told and "rounded" in told


def test_choices_are_those_that_the_run_began_with(settings, tmp_path, monkeypatch):
    """What this machine would choose now does not matter to a run that goes on; what it chose may be given."""
    changes = {"train": {**TRAIN, "learning_rate": "auto"}, "threads": "auto"}
    whole = deltaw.fit(settings(tmp_path / "whole", **changes)).output
    run = stopped_run(settings(tmp_path / "run", **changes), 3)
    given = shutil.copytree(run, tmp_path / "given")
    chosen = newest(run / "checkpoints")[0].values["choices"]["train.learning_rate"]
    assert chosen >= metrics(run)[-1]["learning_rate"] > 0
    monkeypatch.setattr("deltaw.training.tasks.causal_batcher.TOKENS_PER_PASS", {"cpu": 64})
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert deltaw.fit(settings(run, **changes)).resumed_from_step == 3
    assert_same_run(run, whole)
    text = (run / "run.yaml").read_text()
    assert "threads: auto  # 1: as the run began" in text and "tokens_per_pass: auto  # 1024: as the" in text
    assert deltaw.fit(settings(given, train={**TRAIN, "learning_rate": chosen})).resumed_from_step == 3


def test_a_checkpoint_does_not_choose_what_a_run_is_made_of(settings, tmp_path):
    config = RunConfig.read(settings(tmp_path / "run"))
    wanted = {"model": "/x", "trust_remote_code": True, "track": "wandb", "data.train": "/x", "output": "/x"}
    pinned, _ = with_choices(config, dumped(config), {**wanted, "data.chat_template": "/x", "threads": 2})
    assert pinned.model_copy(update={"threads": config.threads}) == config and pinned.threads == 2


@compiled_only
def test_products_are_computed_as_they_were(settings, stopped, whole, monkeypatch):
    slow = {stored: {"dot": 1.0, "tiles": 1.0, "wide": 1.0, "torch": 100.0} for stored in ("fp32", "bf16", "int8")}
    monkeypatch.setenv("DELTAW_MEASURED", json.dumps({"*": slow}))
    with warnings.catch_warnings():
        warnings.simplefilter("error", ArithmeticChangedWarning)
        result = deltaw.fit(settings(stopped, train=TRAIN))
    assert result.arithmetic == Run(whole).result["arithmetic"] and result.arithmetic["fp32"] != "torch"
    assert_same_run(stopped, whole)


def test_rows_that_changed_are_refused(settings, tmp_path, stopped, rows_file):
    file = tmp_path / "rows.jsonl"
    made, before = settings(stopped, train=TRAIN, data={"train": str(file)}), rows_file.read_text()
    file.write_text(before.replace('"completion": "w"', '"completion": "v"'))
    with pytest.raises(UserError, match="have changed, so the run") as refused:
        deltaw.fit(made)
    assert "rows.jsonl" in refused.value.where
    file.unlink()
    with pytest.raises(UserError, match=r"rows\.jsonl"):
        deltaw.fit(made)
    file.write_text(before)
    assert deltaw.fit(made).resumed_from_step == 3


def test_another_model_under_the_same_name_is_refused(settings, tmp_path, model_folder):
    model = shutil.copytree(model_folder, tmp_path / "model")
    made = settings(tmp_path / "run", train=TRAIN, model=str(model))
    stopped_run(made, 3)
    for last_alone in (False, True):
        weights = load_file(model_folder / "model.safetensors")
        weight = weights["model.layers.0.mlp.down_proj.weight"].view(-1)
        if last_alone:
            weight[-1] += 1e-3
        else:  # all but eight
            weight[torch.arange(len(weight)) % (len(weight) // 8) != 0] *= 1.5
        save_file(weights, model / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match="weights have changed"):
            deltaw.fit(made)
    shutil.copytree(model_folder, model, dirs_exist_ok=True)
    assert deltaw.fit(made).resumed_from_step == 3


def test_damaged_checkpoints_are_passed_over_and_that_is_said(settings, tmp_path, whole):
    run = stopped_run(settings(tmp_path / "run", train={**TRAIN, "keep_checkpoints": 3}), 5)
    for count, path in enumerate(reversed(listed(run / "checkpoints")), start=1):
        target = path / files.TENSORS
        target.write_bytes(target.read_bytes()[:-8])
        if count == 2:
            continue
        copy, told = shutil.copytree(run, tmp_path / f"damaged {count}"), Told()
        result = deltaw.fit(settings(copy, train=TRAIN), callback=told)
        assert result.resumed_from_step == {1: 4, 3: None}[count]
        assert f"{path.name} is damaged and was skipped: state.safetensors has" in told
        if count == 1:
            assert_same_run(copy, whole)


class Counter:
    """A training's state as far as checkpoints see it."""

    step, total_steps = 4, 100

    def view(self):
        return SavedState({"step": self.step}, {"a": torch.ones(2)})


def test_the_last_checkpoints_and_the_best_are_kept(tmp_path):
    state, losses = Counter(), {3: 0.5, 6: 0.2, 9: 0.4}
    about = {"settings": {}, "choices": {}, "rows": {}, "model": None}
    made = Checkpoints(tmp_path, every=2, minutes=None, keep=2, about=about)
    made.begin(state)
    for state.step in range(1, 13):
        scored = Evaluation({"loss": losses.get(state.step)}, main="loss", higher_is_better=False)
        made.step_done(state.step in losses and made.evaluated(state.step, scored))
    made.close()
    assert [path.name for path in listed(tmp_path)] == ["step-000006", "step-000010", "step-000012"]
    assert newest(tmp_path)[0].values["best"] == {"rank": -0.2, "step": 6}


def test_checkpoints_by_time(tmp_path, settings, monkeypatch):
    told = Told()  # each step takes 25 seconds
    monkeypatch.setattr(files, "time", SimpleNamespace(monotonic=lambda: 25.0 * len(told.steps)))
    train = {**TRAIN, "checkpoint_every": None, "checkpoint_minutes": 1.0, "keep_checkpoints": 9, "eval_every": None}
    result = deltaw.fit(settings(tmp_path / "run", train=train), callback=told)
    assert [path.name for path in result.checkpoints] == [f"step-{n:06d}" for n in (3, 6, 9, 12)]


def test_without_checkpoints_none_are_written_and_the_run_begins_again(settings, tmp_path):
    made = settings(tmp_path / "run", train={"checkpoint_every": None, "checkpoint_minutes": None})
    first = deltaw.fit(made, callback=Told(stop_after=1))
    assert first.interrupted and not first.checkpoints
    again = deltaw.fit(made)
    assert again.resumed_from_step is None and (tmp_path / "run.1" / ADAPTER).is_file()
    with pytest.raises(UserError, match="no checkpoint to resume from"):
        deltaw.fit({"train": {"epochs": 9}}, resume=tmp_path / "run")


def test_a_second_run_while_one_goes_on_is_refused(settings, tmp_path):
    run, seen = tmp_path / "run", []

    def second(step):
        if step.step == 2:
            with pytest.raises(UserError, match=r"process \d+ is training into this folder") as refused:
                deltaw.fit(settings(run))
            seen.append(refused.value.where)

    result = deltaw.fit(settings(run), callback=Calling(on_step=second))
    assert seen == [str(run)] and result.outcome.steps == 3
