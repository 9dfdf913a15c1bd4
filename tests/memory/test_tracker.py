from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from deltaw.machine.memory import MAX_RETAINED_BYTES, trim_memory
from deltaw.memory.storage_tracker import MemoryTracker
from deltaw.memory.work import WorkCounter
from tests.peak_memory import peak_tensor_bytes, storage_bytes


def test_storage_counts_until_last_view_is_freed() -> None:
    with MemoryTracker() as tracker:
        values = torch.zeros(1000)
        assert tracker.footprint().steady_bytes == 4000
        view = values[3:].view(-1, 1)
        assert tracker.footprint().steady_bytes == 4000
        del values
        assert tracker.footprint().steady_bytes == 4000
        del view
        assert tracker.footprint().steady_bytes == 0 and tracker.footprint().peak_bytes == 4000


def test_existing_tensors_count_after_track() -> None:
    weight = torch.zeros(10, 10)
    with MemoryTracker() as tracker:
        tracker.track([weight, weight.t()], "weights")
        assert tracker.footprint().steady_bytes == 400
        tracker.track([weight], "trained")
    assert tracker.footprint().parts["weights"] == 0
    with pytest.raises(ValueError, match="not a kind"):
        tracker.track([weight], "wieghts")


def test_peak_is_attributed_to_phase_and_module() -> None:
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 5000))
    with MemoryTracker() as tracker:
        tracker.track_model(model)
        with torch.no_grad():
            model(torch.zeros(100, 10))
    footprint = tracker.footprint()
    assert (footprint.phase, footprint.module) == ("forward", "1")


def test_gradients_and_optimizer_state_are_distinguished() -> None:
    model = nn.Linear(200, 200, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    size = 200 * 200 * 4
    with MemoryTracker() as tracker:
        tracker.track_model(model)
        model(torch.zeros(1, 200)).sum().backward()
        optimizer.step()
    parts = tracker.footprint().parts
    assert parts["trained"] == parts["gradients"] == size and 2 * size <= parts["optimizer"] <= 2 * size + 64


def test_peak_counts_only_simultaneous_tensors() -> None:
    def run() -> None:
        first = torch.zeros(1000)
        del first
        torch.zeros(500), torch.zeros(700)

    before = torch.zeros(25)
    assert peak_tensor_bytes(run, alive=[before, before[1:]]) == 4800 + 100
    assert storage_bytes([before, before[1:]]) == 100


@pytest.mark.parametrize("with_counter", [False, True])
def test_gradient_accumulation_is_in_place_with_other_dispatch_modes(with_counter):
    """Autograd adds the second gradient in place, but not under another dispatch mode."""
    weight = torch.ones(1000, requires_grad=True)

    def run():
        ((weight * 2).sum() + (weight * 3).sum()).backward()

    with MemoryTracker() as tracker, WorkCounter() if with_counter else nullcontext():
        tracker.track([weight], "trained")
        run()
    weight.grad = None
    assert tracker.footprint().peak_bytes <= peak_tensor_bytes(run, alive=[weight]) + 100


@pytest.mark.parametrize(("small_first", "retained"), [(True, 20 << 20), (False, 0)])
def test_freed_small_blocks_remain_resident_before_large_block(small_first: bool, retained: int) -> None:
    with MemoryTracker() as tracker:
        if small_first:
            torch.zeros(20 << 20, dtype=torch.uint8)
        torch.zeros(64 << 20, dtype=torch.uint8)
        if not small_first:
            torch.zeros(20 << 20, dtype=torch.uint8)
    assert tracker.footprint().peak_bytes == 64 << 20 and tracker.footprint().retained_bytes == retained


@pytest.mark.parametrize("trimmed", [False, True])
def test_freed_blocks_are_retained_at_allocator_limit_until_trimmed(trimmed: bool) -> None:
    with MemoryTracker() as tracker:
        torch.zeros(MAX_RETAINED_BYTES // 2, dtype=torch.uint8)
        if trimmed:
            trim_memory()
        torch.zeros(MAX_RETAINED_BYTES, dtype=torch.uint8)
    assert tracker.footprint().retained_bytes == (0 if trimmed else MAX_RETAINED_BYTES // 2)
