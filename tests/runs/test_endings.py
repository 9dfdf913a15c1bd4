"""Runs that cannot go on: each ends with what happened and what to do, and leaves a state to go on from."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltaw.errors import UserError
from deltaw.runs import checkpoints
from deltaw.runs.checkpoints import listed
from deltaw.runs.fit import fit
from deltaw.runs.folder import Run, RunFolder
from deltaw.training.callbacks import Calling
from deltaw.training.loop import MOST_IN_ROW
from tests.training.runs import TRAIN, Told, adapter, assert_same_run, metrics

SKIP = {**TRAIN, "not_finite": "skip", "eval_every": None}


def raising(after, error):
    """Ends the training with an error once so many steps are done."""

    def on_step(step):
        if step.step == after:
            raise error

    return Calling(on_step=on_step)


NO_MEMORY = (
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
    "allocate 4000000000000 bytes. Error code 12 (Cannot allocate memory)"
)


def test_errors_of_the_machine_say_what_to_do_and_the_run_goes_on(settings, tmp_path, whole):
    made = settings(tmp_path / "run", train=TRAIN)
    for error, what in (
        (RuntimeError(NO_MEMORY), "out of memory"),
        (MemoryError("dw_block found no memory to work in"), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS)), "read-only"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/run/metrics.jsonl"), "the disk is full"),
    ):
        with pytest.raises(UserError, match=what) as ended:
            fit(made, callback=raising(5, error))
        assert "resumes from step-000004" in ended.value.hint and Run(tmp_path / "run").state == "failed"
    assert fit(made).resumed_from_step == 4
    assert_same_run(tmp_path / "run", whole)


PARTS = {
    "the tensors": (checkpoints, "write_tensors"),
    "flushing": (checkpoints.Draft, "publish"),
    "a line of the metrics": (RunFolder, "write_metrics"),
}


@pytest.mark.parametrize("part", PARTS)
def test_a_disk_that_fills_up(settings, tmp_path, whole, monkeypatch, part):
    """Whatever is being written: the checkpoint before stays, and the run goes on once there is room."""
    run, calls = tmp_path / "run", []
    real, most = getattr(*PARTS[part]), 5 if part == "a line of the metrics" else 2

    def filling(*arguments, **named):
        calls.append(part)
        if len(calls) > most:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments, **named)

    def half_written():
        return list((run / "checkpoints").glob(f"{checkpoints.PARTIAL}*"))

    with monkeypatch.context() as patch:
        patch.setattr(*PARTS[part], filling)
        with pytest.raises(UserError, match=r"No space left|disk is full") as ended:
            fit(settings(run, train=TRAIN))
        assert "step-000004" in str(ended.value) and re.search("make room|free some space", ended.value.hint)
    assert listed(run / "checkpoints")[-1].name == "step-000004"
    # There the unpublished one stays hidden, and is cleared by the next run.
    assert part == "flushing" or not half_written()
    assert fit(settings(run, train=TRAIN)).resumed_from_step == 4
    assert_same_run(run, whole)
    assert not half_written()


class Breaking(Told):
    """Makes a weight infinite after a step, as a broken memory would, and repairs it later."""

    def __init__(self, after, until=None):
        super().__init__()
        self.after, self.until = after, until

    def on_line(self, line):
        super().on_line(line)
        if line.startswith(f"step {self.until}: skipped"):
            self.broken.data.copy_(self.kept)

    def on_begin(self, state):
        self.broken = next(p for n, p in zip(state.names, state.trained, strict=True) if n.endswith("lora_A"))

    def on_step(self, step):
        super().on_step(step)
        if step.step == self.after:
            self.kept = self.broken.data.clone()
            self.broken.data[0, 0] = torch.inf


def all_finite(tensors):
    return all(tensor.isfinite().all() for tensor in tensors.values())


@pytest.fixture(scope="module")
def broken_model(model_folder, tmp_path_factory):
    """A model whose second block gives infinite numbers."""
    folder = shutil.copytree(model_folder, tmp_path_factory.mktemp("broken") / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"].fill_(1e38)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def test_the_diagnosis_names_the_first_module_and_saves_the_rows(settings, tmp_path, broken_model):
    run = tmp_path / "run"
    with pytest.raises(UserError, match="diverged") as ended:
        fit(settings(run, model=broken_model, train=TRAIN))
    # Its output is the first that is beyond the largest number; those of its parts came before.
    assert "first not finite: the output of 'model.layers.1.mlp.down_proj'" in ended.value.what
    assert (ended.value.where or "").startswith("step 1 of")
    facts = json.loads((run / "failed_step-000001.json").read_text())
    assert facts["step"] == 1 and len(facts["rows"]) == 3 and str(facts["rows"][0]) in ended.value.what
    tensors = load_file(run / "failed_step-000001.safetensors")
    assert {"0/tokens", "1/tokens", "2/tokens", "0/is_label"} <= tensors.keys()
    assert Run(run).state == "diverged"
    factors = adapter(run)
    assert all_finite(factors) and not any(t.any() for name, t in factors.items() if "lora_B" in name)


def test_steps_that_are_skipped_change_nothing_and_are_counted(settings, tmp_path):
    told = Breaking(4, until=6)
    result = fit(settings(tmp_path / "run", train=SKIP), callback=told)
    assert told.steps == [1, 2, 3, 4, 7, 8, 9, 10, 11, 12]
    assert result.outcome.skipped == result.as_dict()["skipped_steps"] == 2
    assert result.outcome.steps == 12 and result.outcome.loss == result.outcome.loss
    assert [line["step"] for line in metrics(tmp_path / "run", "skipped")] == [5, 6]
    assert all_finite(adapter(tmp_path / "run"))


def test_a_run_that_skips_only_ends(settings, tmp_path, broken_model):
    # In the first steps too, which check what is trained.
    with pytest.raises(UserError, match="steps in a row"):
        fit(settings(tmp_path / "broken", model=broken_model, train=SKIP))
    told = Breaking(1)
    with pytest.raises(UserError, match=f"after {MOST_IN_ROW - 1} steps in a row") as ended:
        fit(settings(tmp_path / "run", train={**SKIP, "epochs": 8}), callback=told)
    assert ended.value.where == f"step {1 + MOST_IN_ROW} of 24"
    assert sum("skipped" in line for line in told.lines) == MOST_IN_ROW - 1


def test_a_run_that_diverged_goes_on_when_told_to_skip_and_is_moved_for_other_settings(settings, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(UserError, match=r"weights were not finite before the step: '.*lora_A'") as ended:
        fit(settings(run, train=TRAIN), callback=Breaking(4))
    assert "diverged" in ended.value.what and ended.value.where == "step 5 of 12"
    # The checkpoint before the failed step holds the broken weight; the one before it does not.
    shutil.rmtree(run / "checkpoints" / "step-000004")
    skipping = fit(settings(shutil.copytree(run, tmp_path / "copy"), train=SKIP))
    assert skipping.resumed_from_step == 2 and skipping.outcome.skipped == 0
    other = fit(settings(run, train={**TRAIN, "learning_rate": 1e-3}))
    assert other.resumed_from_step is None and (tmp_path / "run.1" / "failed_step-000005.json").is_file()
