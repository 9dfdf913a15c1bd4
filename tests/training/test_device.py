"""Steps on a device: the host synchronizes once, at the end of a step.

Tests marked ``gpu`` need a CUDA device. ``make test-cuda`` runs them with the fake device of ``tests/fake_cuda``.
"""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch

from deltaw.data.example import RowGroup
from deltaw.kernels.attention import attend, attend_backward
from deltaw.kernels.layout import Layout
from deltaw.lora import LoRAConfig
from deltaw.methods.lora import LoRA
from deltaw.runtime.packed import packed_rows
from deltaw.training import loop
from deltaw.training.batchers import CausalMicroBatcher
from deltaw.training.causal_objective import CausalObjective
from deltaw.training.evaluation.general import GeneralRehearsal, base_log_probs
from deltaw.training.features import device_store
from deltaw.training.features.device_store import DeviceStore, with_device_copy
from deltaw.training.features.store import MemoryStore, Shape, open_store
from deltaw.training.loop import train
from tests.tiny_models import causal_model
from tests.training.loops import examples
from tests.training.test_activated import INVOCATION
from tests.training.test_activated import rows as activated_rows
from tests.training.toy_preference import Preference

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device was found")


def gpu_test(test):
    return pytest.mark.gpu(no_gpu(test))


def build_on(device, family="llama", **lora):
    """Return a tiny model, its trainable parameters and its objective."""
    model = causal_model(family).to(device)
    method = LoRA(LoRAConfig(rank=4, alpha=8, **lora))
    method.prepare(model, seed=0)
    with method.evaluating(model):
        objective = CausalObjective(model)
    return model, [p for _, p in method.parameters(model)], objective


def train_on(model, parameters, objective, rows=None, *, tokens=40, share=True, **options):
    """Train and return the outcome."""
    batcher = CausalMicroBatcher(tokens, share, False, model.device.type)
    with packed_rows(model):
        return train(objective, parameters, rows or examples(8), batcher, learning_rate=1e-3, **options)


KINDS = {**{family: {"family": family} for family in ("llama", "qwen3", "gemma3", "gpt2")}, "dora": {"dora": True}}
KINDS |= {"dropout": {"dropout": 0.1}, "bias": {"lora_bias": True}}
KINDS |= {"activated": {"active": "completion", "invocation_tokens": INVOCATION}, "pairs": {}, "general answers": {}}
KINDS |= {"apart": {}}


@gpu_test
@pytest.mark.parametrize("kind", KINDS)
def test_step_synchronizes_once(kind, monkeypatch):
    parts = _, _, objective = build_on("cuda", **KINDS[kind])
    rows = activated_rows() if kind == "activated" else examples(8)
    options = {"share": kind != "apart"}
    if kind == "pairs":
        objective.loss = Preference()
        rows = [RowGroup((rows[n], rows[n + 1])) for n in range(0, 8, 2)]
    elif kind == "general answers":  # their loss is read together with the others
        batcher = CausalMicroBatcher(40, True, False, "cuda")
        answers = examples(3, seed=1)
        base = base_log_probs(objective, batcher, answers)
        options["add_gradients"] = GeneralRehearsal(objective, batcher, answers, base, weight=0.5, seed=0)
    read = loop._read
    reads = []

    def allowed(*numbers):
        torch.cuda.set_sync_debug_mode("default")
        reads.append(len(numbers))
        return read(*numbers)

    def forbid_sync(step):
        if step.step >= 3:  # the first steps compile and check each parameter
            torch.cuda.set_sync_debug_mode("error")

    monkeypatch.setattr(loop, "_read", allowed)
    try:
        train_on(*parts, rows, total_steps=6, on_step=forbid_sync, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert reads[-3:] == [3, 3, 3]


@gpu_test
def test_forbidden_synchronization_raises():
    model, parameters, objective = build_on("cuda")

    class Synchronizing(CausalObjective):
        def __call__(self, batch):
            loss = super().__call__(batch)
            torch.cuda.set_sync_debug_mode("error")
            return float(loss.detach())

    objective.__class__ = Synchronizing
    try:
        with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
            train_on(model, parameters, objective, total_steps=1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu_test
def test_output_rows_on_device_are_not_read():
    layout = Layout.of_lengths([5, 3], [-1, 0])
    layout.device = torch.device("cuda")
    query, key = (torch.randn(n, 2, 4, device="cuda") for n in (3, 8))
    rows = torch.tensor([1, 4, 7], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, saved = attend(query, key, key, layout, scaling=0.5, rows=rows)
        grads = attend_backward(out, query, key, key, None, saved, layout, scaling=0.5, rows=rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert out.shape == grads[0].shape == query.shape


SHAPE = Shape.of(rows=3, units=6, width=2, dtype=torch.float32)


def filled_store(inner):
    store = DeviceStore(inner, torch.device("cpu"))
    values = torch.arange(12.0).view(6, 2)
    store.write(np.array([0, 1]), np.array([4, 0, 2]), values[[4, 0, 2]])
    return store, values


def test_device_store_reads_from_device_and_writes_through(tmp_path, monkeypatch):
    inner = open_store("a", SHAPE, folder=tmp_path)
    store, values = filled_store(inner)
    assert store.done.tolist() == [True, True, False] and store.shape == SHAPE
    assert store.resident_bytes == inner.resident_bytes and torch.equal(inner.read(np.array([2, 4])), values[[2, 4]])
    monkeypatch.setattr(type(inner), "read", None)  # reads must use the copy on the device
    assert torch.equal(store.read(np.array([2, 4, 2])), values[[2, 4, 2]])


def test_existing_vectors_are_copied_to_device_once(monkeypatch):
    inner = MemoryStore(SHAPE)
    _, values = filled_store(inner)
    store = DeviceStore(inner, torch.device("cpu"))
    read = mock.Mock(wraps=inner.read)
    monkeypatch.setattr(inner, "read", read)
    for _ in range(2):
        assert torch.equal(store.read(np.array([4, 0, 4])), values[[4, 0, 4]])
    store.clear()
    assert not inner.done.any() and torch.equal(store.read(np.array([0])), values[[0]])
    assert [call.args[0].tolist() for call in read.call_args_list] == [[0, 4], [0]]


def test_device_copy_requires_enough_memory(monkeypatch):
    inner = MemoryStore(SHAPE)
    assert with_device_copy(inner, torch.device("cpu")) is inner
    monkeypatch.setattr(device_store, "DeviceStore", lambda store, device: "a copy")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for free, expected in ((1000, "a copy"), (100, inner)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
        assert with_device_copy(inner, torch.device("cuda")) is expected


@gpu_test
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_gpu_losses_match_cpu(family):
    steps = {"cpu": [], "cuda": []}
    for device, reports in steps.items():
        train_on(*build_on(device, family), tokens=1000, total_steps=4, on_step=reports.append)
    # FlexAttention multiplies fp32 in TF32.
    assert [s.loss for s in steps["cuda"]] == pytest.approx([s.loss for s in steps["cpu"]], rel=2e-3)
