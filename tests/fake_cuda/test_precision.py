"""Precisions of a GPU: fp16 with loss scaling below compute capability 8.0, no fp64, and weights of bitsandbytes."""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deltaw.decoding.request import Request
from deltaw.export.merge_plan import MergeOptions, prepare_merge
from deltaw.export.merged import assemble
from deltaw.hub.loading import load
from deltaw.inference.open_run import open_run
from deltaw.kernels import operators
from deltaw.machine.choices import UNTESTED_GPU
from deltaw.runs.fit import fit
from deltaw.runtime.nf4 import round_to_nf4
from deltaw.runtime.packed import packed_rows
from deltaw.serving.http.opening import OpenOptions, open_served
from deltaw.training.batchers import CausalMicroBatcher
from deltaw.training.drift import measure_drift
from tests.byte_models import save_model, tiny_llama
from tests.fake_cuda.device import configured
from tests.fake_cuda.test_training import TASKS, SynchronizationCounter, inputs, run_on  # noqa: F401
from tests.tiny_models import causal_model
from tests.training.loops import examples
from tests.training.runs import RecordingCallback, assert_same_run, losses, metrics, stopped_run


class Recorder(RecordingCallback, SynchronizationCounter):
    """Records lines and synchronizations."""

    def __init__(self, *args) -> None:
        RecordingCallback.__init__(self, *args)
        SynchronizationCounter.__init__(self)

    def on_step(self, step) -> None:
        RecordingCallback.on_step(self, step)
        SynchronizationCounter.on_step(self, step)


def test_gpu_without_bf16_trains_in_fp16_and_resumes(run_on, settings, inputs, tmp_path):  # noqa: F811
    with configured(capability=(7, 5)):
        recorder = Recorder()
        train = {"max_steps": 12}
        cpu = run_on("cpu", train=train)
        cuda = run_on("cuda", callback=recorder, precision="auto", train=train)
        repeated = metrics(cuda.output, "repeated")
        steps = metrics(cuda.output, "gradient_norm")
        # The gradients of this model overflow with the first scales.
        assert repeated and cuda.as_dict()["skipped_steps"] == 0 and len(steps) == 12
        assert [line["loss_scale"] for line in repeated] == [2.0**16 / 2**n for n in range(len(repeated))]
        assert "step 1: overflow at loss scale 65536, repeated" in recorder and steps[-1]["loss_scale"] < 2.0**16
        first = metrics(cpu.output, "gradient_norm")[0]
        assert float(repeated[0]["repeated"]["loss"]) == pytest.approx(first["loss"], rel=2e-2)
        assert steps[-1]["loss"] < 0.8 * first["loss"]
        assert recorder.per_step <= 2 and UNTESTED_GPU in recorder
        assert any(line.startswith("precision: fp16") for line in recorder.lines)
        train = {"epochs": 4, "checkpoint_every": 2, "checkpoint_minutes": None}
        config = {"device": "cuda", "precision": "fp16", "train": train}
        whole = fit(settings(tmp_path / "whole", **config)).output
        stopped = fit(settings(tmp_path / "stopped", **config), callback=RecordingCallback(stop_after=3))
        assert stopped.interrupted and metrics(stopped.output, "repeated")
        assert_same_run(whole, fit(resume=stopped.output).output)


class WithoutFp64(TorchDispatchMode):
    """Rejects fp64 tensors on the device, as mps does."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, output)):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64 and tensor.device.type == "cuda":
                raise TypeError(f"{func}: the device does not support fp64")
        return output


@pytest.mark.parametrize("task", TASKS)
def test_device_without_fp64_trains_and_evaluates(task, run_on, inputs, monkeypatch):  # noqa: F811
    monkeypatch.setattr(operators, "WITHOUT_FP64", ("cuda",))
    changes = copy.deepcopy(TASKS[task])
    if changes.get("model") == "bert":
        changes["model"] = inputs["bert"]
    if task == "rl":
        changes["reward"]["functions"] = [inputs["reward"]]
    with WithoutFp64():
        result = run_on("cuda", task, **changes)
    assert result.outcome.steps == 5 and result.evaluation.metrics


def test_drift_is_measured_without_fp64(monkeypatch):
    model = causal_model("llama")
    batcher = CausalMicroBatcher(40, True, False, "cpu")
    rows = examples(4)
    options = {"base": contextlib.nullcontext, "running": lambda: packed_rows(model)}
    expected = measure_drift(model, rows, batcher, **options)
    model.to("cuda")
    with pytest.raises(TypeError, match="fp64"), WithoutFp64():
        measure_drift(model, rows, CausalMicroBatcher(40, True, False, "cuda"), **options)
    monkeypatch.setattr(operators, "WITHOUT_FP64", ("cuda",))
    with WithoutFp64():
        drift = measure_drift(model, rows, CausalMicroBatcher(40, True, False, "cuda"), **options)
    assert drift.loss == pytest.approx(expected.loss, rel=1e-6)


@pytest.fixture(scope="module")
def bitsandbytes():
    """The library with its implementations in torch, because its kernels need a real device."""
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed: pip install 'deltaw[cuda]'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(torch, "compile", lambda function=None, **options: function or (lambda compiled: compiled))
        return importlib.import_module("bitsandbytes")


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory):
    """A Llama in bf16 with layers of whole NF4 blocks."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 4, "initializer_range": 0.1}
    return save_model(tiny_llama(**sizes).bfloat16(), tmp_path_factory.mktemp("wide") / "model")


@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_run_on_bitsandbytes_weights(precision, bitsandbytes, wide_folder, settings, tmp_path, monkeypatch):
    rounded = load(str(wide_folder), precision="bf16", device="cpu", threads=1).model
    if precision == "nf4":
        assert round_to_nf4(rounded.base_model) == 14
    train = {"epochs": 2, "drift": False, "checkpoint_every": 2, "checkpoint_minutes": None}
    expected = settings(tmp_path / "rounded", model=str(save_model(rounded, tmp_path / "model")), train=train)
    expected_losses = losses(fit({**expected, "precision": "bf16"}).output)

    config = {"model": str(wide_folder), "precision": precision, "device": "cuda", "train": train}
    recorder = Recorder()
    run = fit(settings(tmp_path / "run", **config), callback=recorder)
    assert losses(run.output) == pytest.approx(expected_losses, rel=3e-2)
    assert f"14 of 14 layers are in {precision}, with bitsandbytes" in recorder
    stopped = stopped_run(settings(tmp_path / "stopped", **config), after=3)
    assert_same_run(run.output, fit(resume=stopped).output)

    opened = open_run(str(run.output), device="cuda", log=str)
    assert {parameter.device.type for parameter in opened.model.parameters()} == {"cuda"}
    kind = bitsandbytes.nn.Linear4bit if precision == "nf4" else bitsandbytes.nn.Linear8bitLt
    layers = [module for module in opened.model.modules() if isinstance(module, kind)]
    assert len(layers) == 14 and opened.model.dtype == torch.bfloat16
    assert opened.model.lm_head.weight.dtype == opened.model.model.embed_tokens.weight.dtype == torch.bfloat16
    served = open_served(str(run.output), {}, OpenOptions(device="cuda"), log=str)
    with contextlib.closing(served.engine):  # transformers runs the run's model, which replaces the base model
        results = served.engine.generate_all([Request(np.arange(3, 9), n, max_new_tokens=4) for n in ("run", None)])
    assert all(len(result.tokens) == 4 for result in results)
    assert served.engine.scheduler._session.loaded.choices["precision"].value == precision
    with prepare_merge(run.output, MergeOptions(), str) as job:
        assert "unquantized weights" in " ".join(assemble(job).notes)
    with configured(capability=(7, 5)):
        assert open_run(str(run.output), device="cuda", log=str).model.dtype == torch.float16
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    lines: list[str] = []
    open_run(str(run.output), device="cuda", log=lines.append)
    assert any(line.startswith(f"precision bf16 instead of the run's {precision}: ") for line in lines)
