"""A killed run resumes with the same command, bit-identically."""

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
from deltaw.runs import checkpoints as files
from deltaw.runs.checkpoints import Checkpoints, list_checkpoints, newest_checkpoint
from deltaw.runs.folder import Run
from deltaw.runs.resuming import apply_choices, dump_settings
from deltaw.settings.config import RunConfig
from deltaw.training.callbacks import FunctionCallback
from deltaw.training.evaluation.base import Evaluation
from deltaw.training.state import ArithmeticChangedWarning, SavedState
from tests.cli.conftest import tree
from tests.conftest import deep_merge, refusal
from tests.kernels.conftest import compiled_only
from tests.training.runs import (
    ADAPTER,
    METHODS,
    TRAIN,
    RecordingCallback,
    Snapshots,
    adapter,
    assert_same_run,
    metrics,
    slow_except,
    stopped_run,
)

KINDS = {name: METHODS[name] for name in ("prompt", "random", "full", "head")}
KINDS |= {"lora": {"lora": {"dropout": 0.2}}, "lora, upper block": {"lora": {"layers": "1-"}}}
FAST_CASES = {("lora", "bf16"), ("lora, upper block", "fp32"), ("full", "int8")}
METHOD_CASES = slow_except(*FAST_CASES, names=itertools.product(KINDS, ("fp32", "bf16", "int8")))


@pytest.mark.parametrize(("method", "precision"), METHOD_CASES)
def test_killed_run_resumes_bit_identically(settings, tmp_path, monkeypatch, method, precision):
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache" / "packages"))
    # Methods that freeze the lower blocks store features. A resumed run continues their store.
    changes = deep_merge({"train": TRAIN, "precision": precision}, KINDS[method])
    run = tmp_path / "run"
    moments = ["step 1", "step 5", "evaluation 12"]
    snapshots = Snapshots(run, tmp_path, moments if method == "lora" else moments[1:])
    result_of_run = deltaw.fit(settings(run, **changes), callback=snapshots)
    assert result_of_run.outcome.steps == 12 and result_of_run.resumed_from_step is None
    assert "lora" not in method or {tensor.dtype for tensor in adapter(run).values()} == {torch.float32}
    assert ("features computed once" in snapshots) == (method in ("lora, upper block", "head"))
    for name, folder in snapshots.copies.items():
        recorder = RecordingCallback()
        result = deltaw.fit(settings(folder, **changes), callback=recorder)
        number = int(name.split()[1])
        from_step = result.resumed_from_step or 0
        # The last checkpoint may not be flushed yet. The one before is.
        assert from_step in range(max(0, number - 5), number + 1), name
        assert recorder.steps == list(range(from_step + 1, 13)), name
        assert_same_run(folder, run)
        assert not list(tmp_path.glob("*.1"))


@pytest.mark.parametrize("method", ["lora, upper block", pytest.param("head", marks=pytest.mark.slow)])
def test_partially_stored_features_are_recomputed_equally(settings, tmp_path, monkeypatch, method):
    """Features are stored in the first epoch. A process killed during it leaves an incomplete store."""
    changes = deep_merge({"train": {**TRAIN, "epochs": 3}, "precision": "bf16"}, KINDS[method])
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "a cache of its own" / "packages"))
    complete_run = deltaw.fit(settings(tmp_path / "whole", **changes)).output
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "another" / "packages"))
    killed = tmp_path / "killed"
    for step in (1, 3):  # before the first checkpoint, and between the first and the second
        snapshots = Snapshots(killed, tmp_path, [f"step {step}"], fail_at=step)
        with pytest.raises(RuntimeError, match="killed"):
            deltaw.fit(settings(killed, **changes), callback=snapshots)
        shutil.rmtree(killed)
        shutil.move(snapshots.copies[f"step {step}"], killed)
    assert deltaw.fit(settings(killed, **changes)).resumed_from_step in (None, 2)
    assert_same_run(killed, complete_run)


def test_interrupted_run_resumes_and_finished_run_is_kept(settings, tmp_path, stopped_copy, complete_run):
    before = Run(stopped_copy)
    note = "The training was interrupted"
    assert before.state == "interrupted" and list_checkpoints(stopped_copy / "checkpoints")[-1].name == "step-000003"
    assert note in (stopped_copy / "README.md").read_text()
    result = deltaw.fit(settings(stopped_copy, train=TRAIN))
    assert result.resumed_from_step == 3 and not result.interrupted
    assert_same_run(stopped_copy, complete_run)
    after = Run(stopped_copy)
    assert note not in (stopped_copy / "README.md").read_text()
    assert after.state == "finished" and after.started == before.started
    values = result.as_dict()
    assert values["resumed_from_step"] == 3 and values["steps"] == 12
    assert values["checkpoints"] == [str(path) for path in list_checkpoints(stopped_copy / "checkpoints")]
    files_before = tree(stopped_copy)
    repeated = deltaw.fit(settings(stopped_copy, train=TRAIN))
    assert repeated.earlier is not None and repeated.as_dict() == result.as_dict()
    assert tree(stopped_copy) == files_before
    assert repeated.evaluation.as_dict() == result.evaluation.as_dict() and repeated.outcome == result.outcome
    fresh = deltaw.fit(settings(stopped_copy, train=TRAIN), fresh=True)
    assert fresh.resumed_from_step is None and (tmp_path / "run.1" / ADAPTER).is_file()
    assert_same_run(stopped_copy, complete_run)


def test_finished_run_can_be_extended(settings, tmp_path):
    train = {**TRAIN, "epochs": 2, "eval_every": 3, "schedule": "constant", "warmup": 0}
    complete_run = deltaw.fit(settings(tmp_path / "whole", train=train)).output
    run = deltaw.fit(settings(tmp_path / "run", train=train | {"epochs": 1})).output
    recorder = RecordingCallback()
    result = deltaw.fit({"train": {"epochs": 2}}, resume=run, callback=recorder)
    assert result.resumed_from_step == 3 and recorder.steps == [4, 5, 6] and "now has 6 steps" in recorder
    # With a constant learning rate, the result equals that of a run with the final length.
    assert_same_run(run, complete_run)
    assert [line["step"] for line in metrics(run, "eval")] == [3, 6]
    assert RunConfig.read(run / "run.yaml").train.epochs == 2
    exc_info = refusal(deltaw.fit, resume=run, match="has done 6 steps")
    assert "--train.epochs" in exc_info.hint


def test_extended_run_uses_schedule_of_new_length(settings, tmp_path):
    train = {**TRAIN, "epochs": 1, "schedule": "linear", "warmup": 0, "learning_rate": 0.01}
    run = deltaw.fit(settings(tmp_path / "run", train=train)).output
    deltaw.fit({"train": {"max_steps": 5}}, resume=run)
    rates = [line["learning_rate"] for line in metrics(run, "loss")]
    assert rates == pytest.approx([0.01 * (1 - n / (3 if n < 3 else 5)) for n in range(5)])


def test_incompatible_settings_are_rejected_by_name(settings, tmp_path, stopped_copy):
    before = {p: p.read_bytes() for p in stopped_copy.rglob("*") if p.is_file()}
    changed_settings = {"train.batch_size": 4, "train.seed": 1, "train.schedule": "cosine", "train.learning_rate": 0.5}
    changed_settings |= {"train.epochs": 5, "lora.rank": 2, "data.eval": 3, "data.labels": "last"}
    for name, value in {**changed_settings, "precision": "bf16", "method": "head"}.items():
        section, _, key = name.rpartition(".")
        change = {section: {key: value}} if section else {key: value}
        other = settings(stopped_copy, **deep_merge({"train": TRAIN}, change))
        exc_info = refusal(deltaw.fit, other, match=f"'{name}' is ")
        assert "--fresh" in exc_info.hint and exc_info.location == str(stopped_copy)
    assert before == {p: p.read_bytes() for p in stopped_copy.rglob("*") if p.is_file()}
    assert deltaw.fit(other, fresh=True).resumed_from_step is None and (tmp_path / "run.1" / ADAPTER).is_file()


def test_irrelevant_settings_and_data_path_may_change(settings, tmp_path, stopped_copy, complete_run, rows_file):
    train = {**TRAIN, "checkpoint_every": 1, "keep_checkpoints": 5, "learning_rate": 1e-2, "saved_adapter": "best"}
    data = {"train": str(shutil.copy(rows_file, tmp_path / "elsewhere.jsonl"))}
    result = deltaw.fit(settings(stopped_copy, train=train, data=data, force=True, prompt={"length": 7}))
    # The last five, and the best one if it is older.
    assert result.resumed_from_step == 3 and len(result.checkpoints) in (5, 6)
    assert [path.name for path in result.checkpoints[-5:]] == [f"step-{n:06d}" for n in range(8, 13)]
    assert_same_run(stopped_copy, complete_run)


def test_setting_that_changes_rounding_is_allowed_with_note(settings, stopped_copy):
    recorder = RecordingCallback()
    result = deltaw.fit(settings(stopped_copy, train={**TRAIN, "tokens_per_pass": 40}), callback=recorder)
    assert result.resumed_from_step == 3 and "'train.tokens_per_pass' is 40" in recorder and "rounded" in recorder


def test_resumed_run_keeps_automatic_choices(settings, tmp_path, monkeypatch):
    """Choices of the first start are kept even if this machine would now choose others."""
    changes = {"train": {**TRAIN, "learning_rate": "auto"}, "threads": "auto"}
    complete_run = deltaw.fit(settings(tmp_path / "whole", **changes)).output
    run = stopped_run(settings(tmp_path / "run", **changes), 3)
    copy_with_rate = shutil.copytree(run, tmp_path / "given")
    learning_rate = newest_checkpoint(run / "checkpoints")[0].values["choices"]["train.learning_rate"]
    assert learning_rate >= metrics(run)[-1]["learning_rate"] > 0
    monkeypatch.setattr("deltaw.training.batchers.TOKENS_PER_PASS", {"cpu": 64})
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert deltaw.fit(settings(run, **changes)).resumed_from_step == 3
    assert_same_run(run, complete_run)
    text = (run / "run.yaml").read_text()
    assert "threads: auto  # 1: as at the start of the run" in text and "tokens_per_pass: auto  # 1024: as at" in text
    assert deltaw.fit(settings(copy_with_rate, train={**TRAIN, "learning_rate": learning_rate})).resumed_from_step == 3


def test_checkpoint_cannot_replace_model_or_paths(settings, tmp_path):
    config = RunConfig.read(settings(tmp_path / "run"))
    stored = {"model": "/x", "trust_remote_code": True, "track": "wandb", "data.train": "/x", "output": "/x"}
    pinned, _ = apply_choices(config, dump_settings(config), {**stored, "data.chat_template": "/x", "threads": 2})
    assert pinned.model_copy(update={"threads": config.threads}) == config and pinned.threads == 2


@compiled_only
def test_resumed_run_keeps_arithmetic(settings, stopped_copy, complete_run, monkeypatch):
    slow = {stored: {"dot": 1.0, "tiles": 1.0, "wide": 1.0, "torch": 100.0} for stored in ("fp32", "bf16", "int8")}
    monkeypatch.setenv("DELTAW_MEASURED", json.dumps({"*": slow}))
    with warnings.catch_warnings():
        warnings.simplefilter("error", ArithmeticChangedWarning)
        result = deltaw.fit(settings(stopped_copy, train=TRAIN))
    assert result.arithmetic == Run(complete_run).result["arithmetic"] and result.arithmetic["fp32"] != "torch"
    assert_same_run(stopped_copy, complete_run)


def test_changed_rows_are_rejected(settings, tmp_path, stopped_copy, rows_file):
    file = tmp_path / "rows.jsonl"
    config = settings(stopped_copy, train=TRAIN, data={"train": str(file)})
    before = rows_file.read_text()
    file.write_text(before.replace('"completion": "w"', '"completion": "v"'))
    exc_info = refusal(deltaw.fit, config, match="have changed, so the run")
    assert "rows.jsonl" in exc_info.location
    file.unlink()
    refusal(deltaw.fit, config, match=r"rows\.jsonl")
    file.write_text(before)
    assert deltaw.fit(config).resumed_from_step == 3


def test_changed_weights_are_rejected(settings, tmp_path, model_folder):
    model = shutil.copytree(model_folder, tmp_path / "model")
    config = settings(tmp_path / "run", train=TRAIN, model=str(model))
    stopped_run(config, 3)
    for only_last in (False, True):
        weights = load_file(model_folder / "model.safetensors")
        weight = weights["model.layers.0.mlp.down_proj.weight"].view(-1)
        if only_last:
            weight[-1] += 1e-3
        else:  # all except eight values
            weight[torch.arange(len(weight)) % (len(weight) // 8) != 0] *= 1.5
        save_file(weights, model / "model.safetensors", {"format": "pt"})
        refusal(deltaw.fit, config, match="weights have changed")
    shutil.copytree(model_folder, model, dirs_exist_ok=True)
    assert deltaw.fit(config).resumed_from_step == 3


def test_damaged_checkpoints_are_skipped_with_note(settings, tmp_path, complete_run):
    run = stopped_run(settings(tmp_path / "run", train={**TRAIN, "keep_checkpoints": 3}), 5)
    for count, path in enumerate(reversed(list_checkpoints(run / "checkpoints")), start=1):
        target = path / files.TENSORS
        target.write_bytes(target.read_bytes()[:-8])
        if count == 2:
            continue
        copy = shutil.copytree(run, tmp_path / f"damaged {count}")
        recorder = RecordingCallback()
        result = deltaw.fit(settings(copy, train=TRAIN), callback=recorder)
        assert result.resumed_from_step == {1: 4, 3: None}[count]
        assert f"{path.name} is damaged and was skipped: state.safetensors has" in recorder
        if count == 1:
            assert_same_run(copy, complete_run)


class CounterState:
    """The part of a training state that checkpoints use."""

    step = 4
    total_steps = 100

    def view(self):
        return SavedState({"step": self.step}, {"a": torch.ones(2)})


def test_latest_and_best_checkpoints_are_retained(tmp_path):
    state = CounterState()
    losses = {3: 0.5, 6: 0.2, 9: 0.4}
    common_values = {"settings": {}, "choices": {}, "rows": {}, "model": None}
    config = Checkpoints(tmp_path, every=2, minutes=None, num_latest=2, common_values=common_values)
    config.start(state)
    for state.step in range(1, 13):
        scored = Evaluation({"loss": losses.get(state.step)}, main="loss", higher_is_better=False)
        config.step_done(state.step in losses and config.evaluated(state.step, scored))
    config.close()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000006", "step-000010", "step-000012"]
    assert newest_checkpoint(tmp_path)[0].values["best"] == {"rank": -0.2, "step": 6}


def test_checkpoints_are_written_by_time(tmp_path, settings, monkeypatch):
    recorder = RecordingCallback()  # each step takes 25 seconds
    monkeypatch.setattr(files, "time", SimpleNamespace(monotonic=lambda: 25.0 * len(recorder.steps)))
    train = {**TRAIN, "checkpoint_every": None, "checkpoint_minutes": 1.0, "keep_checkpoints": 9, "eval_every": None}
    result = deltaw.fit(settings(tmp_path / "run", train=train), callback=recorder)
    assert [path.name for path in result.checkpoints] == [f"step-{n:06d}" for n in (3, 6, 9, 12)]


def test_disabled_checkpoints_make_run_start_over(settings, tmp_path):
    config = settings(tmp_path / "run", train={"checkpoint_every": None, "checkpoint_minutes": None})
    first = deltaw.fit(config, callback=RecordingCallback(stop_after=1))
    assert first.interrupted and not first.checkpoints
    repeated = deltaw.fit(config)
    assert repeated.resumed_from_step is None and (tmp_path / "run.1" / ADAPTER).is_file()
    refusal(deltaw.fit, {"train": {"epochs": 9}}, resume=tmp_path / "run", match="no checkpoint to resume from")


def test_concurrent_run_in_same_folder_is_rejected(settings, tmp_path):
    run = tmp_path / "run"
    locations = []

    def start_second_run(step):
        if step.step == 2:
            exc_info = refusal(deltaw.fit, settings(run), match=r"process \d+ is training into this folder")
            locations.append(exc_info.location)

    result = deltaw.fit(settings(run), callback=FunctionCallback(on_step=start_second_run))
    assert locations == [str(run)] and result.outcome.steps == 3
