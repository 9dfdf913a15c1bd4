"""Runs that cannot go on: each ends with what happened and what to do, and leaves a state to go on from."""

from __future__ import annotations

import errno
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import deltaw
from deltaw.errors import UserError
from deltaw.training import checkpoints
from deltaw.training.callbacks import Callback
from deltaw.training.checkpoints import listed
from deltaw.training.loop import MOST_IN_ROW
from deltaw.training.run_folder import Run, RunFolder
from tests.training.test_checkpoints import ADAPTER, TRAIN, Told, assert_same_run, outcome_of

# So that it goes on as if nothing had been.
SETTINGS = {"train": TRAIN}


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    """A run that nothing stopped."""
    return deltaw.fit(settings(tmp_path_factory.mktemp("whole") / "run", **SETTINGS)).output


class Raising(Callback):
    """Ends the training with an error once so many steps are done."""

    def __init__(self, after, error):
        self.after, self.error, self.lines = after, error, []

    def on_line(self, line):
        self.lines.append(line)

    def on_step(self, step):
        if step.step == self.after:
            raise self.error


NO_MEMORY = (
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
    "allocate 4000000000000 bytes. Error code 12 (Cannot allocate memory)"
)


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (RuntimeError(NO_MEMORY), "out of memory"),
        (MemoryError("dw_block found no memory to work in"), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/run/metrics.jsonl"), "the disk is full"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS)), "read-only"),
    ],
    ids=["torch's memory", "the kernels' memory", "a GPU's memory", "full disk", "read-only"],
)
def test_errors_of_the_machine_say_what_to_do_and_the_run_goes_on(settings, tmp_path, whole, error, what):
    run = tmp_path / "run"
    with pytest.raises(UserError, match=what) as ended:
        deltaw.fit(settings(run, **SETTINGS), callback=Raising(5, error))
    assert "resumes from step-000004" in ended.value.hint
    assert Run(run).state == "failed"
    result = deltaw.fit(settings(run, **SETTINGS))
    assert result.resumed_from_step == 4
    assert_same_run(run, whole)


def test_other_errors_stay_what_they_are(settings, tmp_path):
    with pytest.raises(RuntimeError, match="a fault"):
        deltaw.fit(settings(tmp_path / "run", **SETTINGS), callback=Raising(3, RuntimeError("a fault")))
    assert deltaw.fit(settings(tmp_path / "run", **SETTINGS)).resumed_from_step == 2


@pytest.mark.parametrize("part", ["the tensors", "flushing", "a line of the metrics"])
def test_a_disk_that_fills_up(settings, tmp_path, whole, monkeypatch, part):
    """Whatever is being written: the checkpoint before stays, and the run goes on once there is room."""
    run, counted = tmp_path / "run", []

    def filling(real, fails):
        def write(*arguments, **named):
            counted.append(part)
            if fails(len(counted), *arguments):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*arguments, **named)

        return write

    with monkeypatch.context() as patch:
        if part == "the tensors":
            real = checkpoints.write_tensors
            patch.setattr(checkpoints, "write_tensors", filling(real, lambda n, *_: n > 2))
        elif part == "flushing":
            real = checkpoints.Draft.publish
            patch.setattr(checkpoints.Draft, "publish", filling(real, lambda n, *_: n > 2))
        else:
            real = RunFolder.write_metrics
            full = lambda n, folder, line: line["step"] > 5  # noqa: E731
            patch.setattr(RunFolder, "write_metrics", filling(real, full))
        with pytest.raises(UserError) as ended:
            deltaw.fit(settings(run, **SETTINGS))
        said = str(ended.value)
        assert "No space left" in said or "disk is full" in said
        assert "step-000004" in said and "room" in said
    assert listed(run / "checkpoints")[-1].name == "step-000004"
    if part != "flushing":  # there the unpublished one stays hidden, and is cleared by the next run
        assert not [p for p in (run / "checkpoints").iterdir() if p.name.startswith(checkpoints.PARTIAL)]
    result = deltaw.fit(settings(run, **SETTINGS))
    assert result.resumed_from_step == 4
    assert_same_run(run, whole)
    assert not [p for p in (run / "checkpoints").iterdir() if p.name.startswith(checkpoints.PARTIAL)]


class Breaking(Callback):
    """Makes a weight infinite after a step, as a broken memory would, and repairs it later."""

    def __init__(self, after, until=None):
        self.after, self.until, self.lines, self.steps = after, until, [], []

    def on_line(self, line):
        self.lines.append(line)
        if line.startswith(f"step {self.until}: skipped"):
            self.broken.data.copy_(self.kept)

    def on_begin(self, state):
        self.broken = next(p for n, p in zip(state.names, state.trained, strict=True) if n.endswith("lora_A"))

    def on_step(self, step):
        self.steps.append(step.step)
        if step.step == self.after:
            self.kept = self.broken.data.clone()
            self.broken.data[0, 0] = torch.inf


def broken_model(model_folder, folder):
    """A model whose second block gives infinite numbers for rows that contain a '7'."""
    shutil.copytree(model_folder, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(1e38)
    model.save_pretrained(folder)
    return str(folder)


def test_the_diagnosis_names_the_first_module_and_saves_the_rows(settings, tmp_path, model_folder):
    model = broken_model(model_folder, tmp_path / "broken")
    run, told = tmp_path / "run", Told()
    with pytest.raises(UserError, match="diverged") as ended:
        deltaw.fit(settings(run, model=model, **SETTINGS), callback=told)
    # Its output is the first that is beyond the largest number; those of its parts came before.
    assert "first not finite: the output of 'model.layers.1.mlp.down_proj'" in ended.value.what
    facts = json.loads((run / "failed_step-000001.json").read_text())
    assert facts["step"] == 1 and len(facts["rows"]) == 3 and str(facts["rows"][0]) in ended.value.what
    tensors = load_file(run / "failed_step-000001.safetensors")
    assert {"0/tokens", "1/tokens", "2/tokens", "0/is_label"} <= tensors.keys()
    assert Run(run).state == "diverged"


def test_a_weight_that_broke_before_the_step_is_named(settings, tmp_path):
    with pytest.raises(UserError, match=r"weights were not finite before the step: '.*lora_A'") as ended:
        deltaw.fit(settings(tmp_path / "run", **SETTINGS), callback=Breaking(4))
    assert ended.value.where == "step 5 of 12"


def test_steps_that_are_skipped_change_nothing_and_are_counted(settings, tmp_path):
    told = Breaking(4, until=6)
    changes = {"train": {**TRAIN, "not_finite": "skip", "eval_every": None}}
    result = deltaw.fit(settings(tmp_path / "run", **changes), callback=told)
    assert told.steps == [1, 2, 3, 4, 7, 8, 9, 10, 11, 12]
    assert result.outcome.skipped == 2 and result.as_dict()["skipped_steps"] == 2
    assert result.outcome.steps == 12 and result.outcome.loss == result.outcome.loss
    lines = outcome_of(tmp_path / "run")[1]
    assert [line["step"] for line in lines if "skipped" in line] == [5, 6]
    assert all(bool(t.isfinite().all()) for t in load_file(tmp_path / "run" / ADAPTER).values())


def test_a_run_that_skips_only_ends(settings, tmp_path):
    run, told = tmp_path / "run", Breaking(1)
    changes = {"train": {**TRAIN, "not_finite": "skip", "epochs": 8, "eval_every": None}}
    with pytest.raises(UserError, match=f"after {MOST_IN_ROW - 1} steps in a row") as ended:
        deltaw.fit(settings(run, **changes), callback=told)
    assert ended.value.where == f"step {1 + MOST_IN_ROW} of 24"
    assert sum("skipped" in line for line in told.lines) == MOST_IN_ROW - 1


def test_skipping_in_the_first_steps_keeps_the_check_of_trained_parameters(settings, tmp_path, model_folder):
    model = broken_model(model_folder, tmp_path / "broken")
    with pytest.raises(UserError, match="steps in a row"):
        deltaw.fit(settings(tmp_path / "run", model=model, train={**TRAIN, "not_finite": "skip", "eval_every": None}))


def test_a_run_that_diverged_goes_on_when_told_to_skip_and_is_moved_for_other_settings(settings, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(UserError, match="diverged"):
        deltaw.fit(settings(run, **SETTINGS), callback=Breaking(4))
    # The checkpoint before the failed step holds the broken weight; the one before it does not.
    shutil.rmtree(run / "checkpoints" / "step-000004")
    copy = shutil.copytree(run, tmp_path / "copy")
    skipping = deltaw.fit(settings(copy, train={**TRAIN, "not_finite": "skip", "eval_every": None}))
    assert skipping.resumed_from_step == 2 and skipping.outcome.skipped == 0
    other = deltaw.fit(settings(run, train={**TRAIN, "learning_rate": 1e-3}))
    assert other.resumed_from_step is None and (tmp_path / "run.1" / "failed_step-000005.json").is_file()
