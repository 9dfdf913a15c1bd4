"""Runs that fail report the cause and a hint, and leave a checkpoint to resume from."""

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
from deltaw.runs.checkpoints import list_checkpoints
from deltaw.runs.fit import fit
from deltaw.runs.folder import Run, RunFolder
from deltaw.training.callbacks import FunctionCallback
from deltaw.training.loop import MAX_SKIPPED_IN_ROW
from tests.conftest import refusal
from tests.training.runs import TRAIN, RecordingCallback, adapter, assert_same_run, metrics

SKIP = {**TRAIN, "not_finite": "skip", "eval_every": None}


def raise_after(after, error):
    """Return a callback that raises ``error`` after a step."""

    def on_step(step):
        if step.step == after:
            raise error

    return FunctionCallback(on_step=on_step)


NO_MEMORY = (
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
    "allocate 4000000000000 bytes. Error code 12 (Cannot allocate memory)"
)


def test_machine_errors_have_hint_and_allow_resume(settings, tmp_path, complete_run):
    config = settings(tmp_path / "run", train=TRAIN)
    for error, message in (
        (RuntimeError(NO_MEMORY), "out of memory"),
        (MemoryError("dw_block found no memory to work in"), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS)), "read-only"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/run/metrics.jsonl"), "the disk is full"),
    ):
        exc_info = refusal(fit, config, callback=raise_after(5, error), match=message)
        assert "resume from step-000004" in exc_info.hint and Run(tmp_path / "run").state == "failed"
    assert fit(config).resumed_from_step == 4
    assert_same_run(tmp_path / "run", complete_run)


PARTS = {
    "the tensors": (checkpoints, "write_tensors"),
    "flushing": (checkpoints.CheckpointWriter, "publish"),
    "a line of the metrics": (RunFolder, "write_metrics"),
}


@pytest.mark.parametrize("part", PARTS)
def test_full_disk_keeps_checkpoint_and_allows_resume(settings, tmp_path, complete_run, monkeypatch, part):
    """The earlier checkpoint is kept for every kind of write, and the run resumes after space is freed."""
    run = tmp_path / "run"
    calls = []
    original = getattr(*PARTS[part])
    max_calls = 5 if part == "a line of the metrics" else 2

    def fail_when_full(*arguments, **keywords):
        calls.append(part)
        if len(calls) > max_calls:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*arguments, **keywords)

    def partial_checkpoints():
        return list((run / "checkpoints").glob(f"{checkpoints.PARTIAL}*"))

    with monkeypatch.context() as patch:
        patch.setattr(*PARTS[part], fail_when_full)
        exc_info = refusal(fit, settings(run, train=TRAIN), match=r"No space left|disk is full")
        assert "step-000004" in str(exc_info) and re.search("make room|free some space", exc_info.hint)
    assert list_checkpoints(run / "checkpoints")[-1].name == "step-000004"
    # If publishing fails, the next run deletes the partial checkpoint.
    assert part == "flushing" or not partial_checkpoints()
    assert fit(settings(run, train=TRAIN)).resumed_from_step == 4
    assert_same_run(run, complete_run)
    assert not partial_checkpoints()


class WeightBreaker(RecordingCallback):
    """Sets a weight to infinity after a step, as faulty memory would, and repairs it later."""

    def __init__(self, after, until=None):
        super().__init__()
        self.after = after
        self.until = until

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


def are_all_finite(tensors):
    return all(tensor.isfinite().all() for tensor in tensors.values())


@pytest.fixture(scope="module")
def broken_model(model_folder, tmp_path_factory):
    """Return a model whose second block produces infinite values."""
    folder = shutil.copytree(model_folder, tmp_path_factory.mktemp("broken") / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"].fill_(1e38)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def test_divergence_names_first_module_and_saves_rows(settings, tmp_path, broken_model):
    run = tmp_path / "run"
    exc_info = refusal(fit, settings(run, model=broken_model, train=TRAIN), match="diverged")
    # The first module whose output overflows is reported. The outputs of its submodules are finite.
    assert "first not finite: the output of 'model.layers.1.mlp.down_proj'" in exc_info.message
    assert (exc_info.location or "").startswith("step 1 of")
    report = json.loads((run / "failed_step-000001.json").read_text())
    assert report["step"] == 1 and len(report["rows"]) == 3 and str(report["rows"][0]) in exc_info.message
    tensors = load_file(run / "failed_step-000001.safetensors")
    assert {"0/tokens", "1/tokens", "2/tokens", "0/is_label"} <= tensors.keys() and Run(run).state == "diverged"
    factors = adapter(run)
    assert are_all_finite(factors) and not any(t.any() for name, t in factors.items() if "lora_B" in name)


def test_skipped_steps_change_nothing_and_are_counted(settings, tmp_path):
    recorder = WeightBreaker(4, until=6)
    result = fit(settings(tmp_path / "run", train=SKIP), callback=recorder)
    assert recorder.steps == [1, 2, 3, 4, 7, 8, 9, 10, 11, 12]
    assert result.outcome.skipped == result.as_dict()["skipped_steps"] == 2
    assert result.outcome.steps == 12 and result.outcome.loss == result.outcome.loss
    assert [line["step"] for line in metrics(tmp_path / "run", "skipped")] == [5, 6]
    assert are_all_finite(adapter(tmp_path / "run"))


def test_run_stops_after_consecutive_skipped_steps(settings, tmp_path, broken_model):
    # Applies to the first steps too, which verify the trained parameters.
    refusal(fit, settings(tmp_path / "broken", model=broken_model, train=SKIP), match="steps in a row")
    recorder = WeightBreaker(1)
    with pytest.raises(UserError, match=f"after {MAX_SKIPPED_IN_ROW - 1} steps in a row") as exc_info:
        fit(settings(tmp_path / "run", train={**SKIP, "epochs": 8}), callback=recorder)
    assert exc_info.value.location == f"step {1 + MAX_SKIPPED_IN_ROW} of 24"
    assert sum("skipped" in line for line in recorder.lines) == MAX_SKIPPED_IN_ROW - 1


def test_diverged_run_resumes_with_skip_and_moves_for_other_settings(settings, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(UserError, match=r"weights were not finite before the step: '.*lora_A'") as exc_info:
        fit(settings(run, train=TRAIN), callback=WeightBreaker(4))
    assert "diverged" in exc_info.value.message and exc_info.value.location == "step 5 of 12"
    # The last checkpoint contains the broken weight, the one before does not.
    shutil.rmtree(run / "checkpoints" / "step-000004")
    skipped_result = fit(settings(shutil.copytree(run, tmp_path / "copy"), train=SKIP))
    assert skipped_result.resumed_from_step == 2 and skipped_result.outcome.skipped == 0
    other = fit(settings(run, train={**TRAIN, "learning_rate": 1e-3}))
    assert other.resumed_from_step is None and (tmp_path / "run.1" / "failed_step-000005.json").is_file()
