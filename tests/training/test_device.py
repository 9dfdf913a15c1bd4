"""A step on a device: the host waits once, at the end, and what a step needs stays on the device.

The meta device stands for a device whose answers take long: torch refuses to read a number from it, to bring
a tensor back from it, and to find out how many elements of it are True. Whatever makes the host wait for a
CUDA device is thus an error here, on any machine. The last tests need a CUDA device.
"""

from __future__ import annotations

import importlib
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
from deltaw.training.evaluation.general import KeepGeneral
from deltaw.training.features import prefix_cache
from deltaw.training.features.prefix_cache import DeviceStore, on_device
from deltaw.training.features.store import MemoryStore, Shape, open_store
from deltaw.training.loop import train
from deltaw.training.tasks.causal_batcher import CausalMicroBatcher
from deltaw.training.tasks.causal_objective import CausalObjective
from tests.tiny_models import causal_model
from tests.training.loops import examples
from tests.training.test_activated import INVOCATION
from tests.training.test_activated import rows as activated_rows
from tests.training.toy_preference import Preference

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device was found")


def on_a_gpu(test):
    return pytest.mark.gpu(no_gpu(test))


def made_on(device, family="llama", **lora):
    """A tiny model with its trained parameters and its objective; on the meta device its tensors have no values."""
    model = causal_model(family).to("cpu" if device == "meta" else device)
    method = LoRA(LoRAConfig(rank=4, alpha=8, **lora))
    method.prepare(model, seed=0)
    with method.evaluating(model):
        objective = CausalObjective(model)
    model.to(device)
    return model, [p for _, p in method.parameters(model)], objective


def trained(model, parameters, objective, rows=None, *, tokens=40, share=True, **how):
    """Its outcome."""
    batcher = CausalMicroBatcher(tokens, share, False, model.device.type)
    with packed_rows(model):
        return train(objective, parameters, rows or examples(8), batcher, learning_rate=1e-3, **how)


@pytest.fixture
def unread(monkeypatch):
    """Training on the meta device: the list is told how many numbers are read at the end of each step."""
    optimizers = importlib.import_module("torch.optim.optimizer")
    known = optimizers._get_fused_kernels_supported_devices()
    monkeypatch.setattr(optimizers, "_get_fused_kernels_supported_devices", lambda: [*known, "meta"])
    asked: list[int] = []

    def read(*numbers):
        asked.append(len(numbers))
        return [1.0] * len(numbers)

    monkeypatch.setattr(loop, "_read", read)
    return asked


KINDS = {
    **{family: {"family": family} for family in ("llama", "qwen3", "gemma3", "gpt2")},
    "dora": {"dora": True},
    "dropout": {"dropout": 0.1},
    "bias": {"lora_bias": True},
    "activated": {"activation": "completion", "invocation_tokens": INVOCATION},
    "pairs": {},
    "general answers": {},
    "apart": {},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_packed_rows_waits_once(kind, unread):
    made = _, _, objective = made_on("meta", **KINDS[kind])
    rows, how = activated_rows() if kind == "activated" else examples(8), {"share": kind != "apart"}
    if kind == "pairs":
        objective.loss = Preference()
        rows = [RowGroup((rows[n], rows[n + 1])) for n in range(0, 8, 2)]
    elif kind == "general answers":  # they are read with the rest
        batcher = CausalMicroBatcher(40, True, False, "meta")
        how["add_gradients"] = KeepGeneral(objective, batcher, examples(3, seed=1), weight=0.5, seed=0)
    assert trained(*made, rows, total_steps=2, **how).steps == 2
    assert unread == [3, 3]


def test_places_of_queries_on_a_device_are_not_read():
    layout = Layout.of_lengths([5, 3], [-1, 0])
    layout.device = torch.device("meta")
    query, key = (torch.empty(n, 2, 4, device="meta") for n in (3, 8))
    picked = torch.empty(3, dtype=torch.int64, device="meta")
    out, kept = attend(query, key, key, layout, scaling=0.5, picked=picked)
    grads = attend_backward(out, query, key, key, None, kept, layout, scaling=0.5, picked=picked)
    assert out.shape == grads[0].shape == query.shape


def test_the_guard_sees_what_waits(unread):
    model, parameters, objective = made_on("meta")

    def reading(batch):
        loss = objective(batch)
        float(loss)
        return loss

    reading.units = objective.units
    with pytest.raises(RuntimeError, match="meta"):
        trained(model, parameters, reading, total_steps=1)


SHAPE = Shape.of(rows=3, units=6, width=2, dtype=torch.float32)


def filled(inner):
    store = DeviceStore(inner, torch.device("cpu"))
    values = torch.arange(12.0).view(6, 2)
    store.write(np.array([0, 1]), np.array([4, 0, 2]), values[[4, 0, 2]])
    return store, values


def test_vectors_are_read_where_they_are_used_and_kept_where_they_were(tmp_path, monkeypatch):
    inner = open_store("a", SHAPE, folder=tmp_path)
    store, values = filled(inner)
    assert store.done.tolist() == [True, True, False] and store.shape == SHAPE
    assert store.resident_bytes == inner.resident_bytes
    assert torch.equal(inner.read(np.array([2, 4])), values[[2, 4]])
    monkeypatch.setattr(type(inner), "read", None)  # the copy on the device must do without it
    assert torch.equal(store.read(np.array([2, 4, 2])), values[[2, 4, 2]])


def test_vectors_of_an_earlier_run_are_brought_over_once(monkeypatch):
    inner = MemoryStore(SHAPE)
    _, values = filled(inner)
    store, read = DeviceStore(inner, torch.device("cpu")), mock.Mock(wraps=inner.read)
    monkeypatch.setattr(inner, "read", read)
    for _ in range(2):
        assert torch.equal(store.read(np.array([4, 0, 4])), values[[4, 0, 4]])
    store.forget()
    assert not inner.done.any()
    assert torch.equal(store.read(np.array([0])), values[[0]])
    assert [call.args[0].tolist() for call in read.call_args_list] == [[0, 4], [0]]


def test_only_a_device_with_room_of_its_own_keeps_a_copy(monkeypatch):
    inner = MemoryStore(SHAPE)
    assert on_device(inner, torch.device("cpu")) is inner
    monkeypatch.setattr(prefix_cache, "DeviceStore", lambda store, device: "a copy")
    for free, expected in ((1000, "a copy"), (100, inner)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
        assert on_device(inner, torch.device("cuda")) is expected


@on_a_gpu
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_step_on_a_gpu_waits_once(family, monkeypatch):
    read = loop._read

    def allowed(*numbers):
        torch.cuda.set_sync_debug_mode("default")
        return read(*numbers)

    def watch(step):
        if step.step >= 3:  # the first steps are checked parameter by parameter, and compile
            torch.cuda.set_sync_debug_mode("error")

    monkeypatch.setattr(loop, "_read", allowed)
    try:
        trained(*made_on("cuda", family), total_steps=6, on_step=watch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_a_gpu
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_a_training_on_a_gpu_is_that_on_the_processor(family):
    steps = {"cpu": [], "cuda": []}
    for device, seen in steps.items():
        trained(*made_on(device, family), tokens=1000, total_steps=4, on_step=seen.append)
    # FlexAttention multiplies fp32 in TF32.
    assert [s.loss for s in steps["cuda"]] == pytest.approx([s.loss for s in steps["cpu"]], rel=2e-3)
