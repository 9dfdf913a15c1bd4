"""Plans: memory of the process in addition to its tensors, and conversion to JSON."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from deltaw.memory.plan import KINDS, FittingPlan, Footprint, OtherBytes, Plan, resident_parts

MB = 10**6


def footprint(**parts: int) -> Footprint:
    sizes = {kind: parts.get(kind, 0) for kind in KINDS}
    return Footprint(sum(sizes.values()), sizes, "backward", "layers.0")


def resident_bytes(tensors: Footprint, *, process: int = 300 * MB, kernels: int = 0) -> dict[str, int]:
    return resident_parts(tensors, process, OtherBytes(kernels=kernels))[0]


def test_process_includes_tensors_and_kernels() -> None:
    tensors = footprint(weights=100 * MB, workspace=20 * MB)
    parts = resident_bytes(tensors)
    assert parts["tensors"] == tensors.peak_bytes and parts["process"] == 300 * MB
    assert sum(parts.values()) > tensors.peak_bytes + 300 * MB and all(size >= 0 for size in parts.values())
    assert resident_bytes(tensors, kernels=7 * MB)["kernels"] == parts["kernels"] + 7 * MB


PEAKS = [("reading", "reading", 900 * MB, 900 * MB), ("loading", "mapped", 500 * MB, 900 * MB)]
PEAKS += [("saving", "saving", 500 * MB, 910 * MB)]


@pytest.mark.parametrize(("phase", "argument", "size", "expected"), PEAKS)
def test_largest_phase_is_peak_and_equals_sum_of_parts(phase, argument, size, expected) -> None:
    tensors = footprint(weights=100 * MB, trained=10 * MB, activations=50 * MB)
    parts, phases = resident_parts(tensors, 300 * MB, OtherBytes(**{argument: size}))
    assert max(phases, key=lambda name: phases[name]) == phase and sum(parts.values()) == phases[phase] == expected
    assert parts[phase] == expected - phases["training"]
    smaller, phases = resident_parts(tensors, 300 * MB, OtherBytes(**{argument: 40 * MB}))
    assert sum(smaller.values()) == phases["training"] == max(phases.values()) and smaller[phase] == 0


def test_mapped_file_counts_for_process_but_not_for_tensors() -> None:
    parts, _ = resident_parts(footprint(weights=MB), 0, OtherBytes(features=5 * MB))
    assert parts["tensors"] == MB and parts["features"] == 5 * MB


def test_allocator_overhead_depends_only_on_temporary_tensors() -> None:
    assert resident_bytes(footprint(weights=MB, trained=MB, optimizer=MB, gradients=MB))["allocator"] == 0
    small, large = (resident_bytes(footprint(weights=MB, activations=size))["allocator"] for size in (10 * MB, 20 * MB))
    assert 0 < small < 5 * MB and large == pytest.approx(2 * small)


def test_plan_and_fitting_plan_convert_to_json() -> None:
    tensors = footprint(weights=100 * MB, trained=10 * MB, activations=50 * MB)
    memory = {"peak_bytes": tensors.peak_bytes, "parts": tensors.parts, "resident": resident_bytes(tensors)}
    common = {"total_parameters": 50 * MB, "trained_parameters": 2 * MB, "precision": "bf16", **memory}
    peak = {"phase": tensors.phase, "peak_resident_bytes": sum(memory["resident"].values())}
    plan = Plan(method="lora", **common, **peak, module=tensors.module, tokens=1024, rows=16, operations=10**12)
    assert Plan.from_fields(json.loads(json.dumps(plan.to_fields()))) == plan
    record = json.loads(json.dumps(plan.as_dict()))
    assert record == {**record, **common, **peak, "tokens_per_pass": 1024}

    record = json.loads(json.dumps(FittingPlan("lora", 8, 512, True, "bf16", plan, 0.25).as_dict()))
    expected = {"rank": 8, "tokens_per_pass": 512, "checkpointing": True, "estimated_seconds_per_step": 0.25}
    assert record == {**record, **expected, "peak_resident_bytes": plan.peak_resident_bytes}


def test_retained_memory_of_allocator_counts_for_process() -> None:
    tensors = footprint(weights=100 * MB, activations=20 * MB)
    more = resident_bytes(replace(tensors, retained_bytes=7 * MB))["allocator"]
    assert more == resident_bytes(tensors)["allocator"] + 7 * MB


def test_rollouts_are_a_phase_in_addition_to_persistent_tensors() -> None:
    tensors = footprint(weights=100 * MB, trained=10 * MB, activations=50 * MB)
    _, phases = resident_parts(tensors, 300 * MB, OtherBytes(rollouts=100 * MB))
    assert 510 * MB < phases["rollouts"] < 520 * MB
