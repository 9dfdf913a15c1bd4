"""A plan's numbers: the process beside its tensors, and what goes into JSON."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from deltaw.memory.plan import KINDS, Fitting, Footprint, Plan, resident_parts

MB = 10**6


def footprint(**parts: int) -> Footprint:
    sizes = {kind: parts.get(kind, 0) for kind in KINDS}
    return Footprint(sum(sizes.values()), sizes, "backward", "layers.0")


def resident(of: Footprint, *, process: int = 300 * MB, kernels: int = 0) -> dict[str, int]:
    return resident_parts(of, process_bytes=process, kernel_bytes=kernels)[0]


def test_the_process_holds_all_tensors_kernels_and_more() -> None:
    of = footprint(weights=100 * MB, workspace=20 * MB)
    parts = resident(of)
    assert parts["tensors"] == of.peak_bytes and parts["process"] == 300 * MB
    assert sum(parts.values()) > of.peak_bytes + 300 * MB
    assert all(size >= 0 for size in parts.values())
    assert resident(of, kernels=7 * MB)["kernels"] == parts["kernels"] + 7 * MB


@pytest.mark.parametrize(
    ("phase", "asked", "size", "expected"),
    [
        ("reading", "reading_bytes", 900 * MB, 900 * MB),
        ("loading", "mapped_bytes", 500 * MB, 900 * MB),
        ("saving", "saving_bytes", 500 * MB, 910 * MB),
    ],
)
def test_the_largest_phase_is_the_peak_and_the_parts_add_up_to_it(phase, asked, size, expected) -> None:
    of = footprint(weights=100 * MB, trained=10 * MB, activations=50 * MB)
    parts, phases = resident_parts(of, process_bytes=300 * MB, **{asked: size})
    assert max(phases, key=lambda name: phases[name]) == phase
    assert sum(parts.values()) == phases[phase] == expected
    assert parts[phase] == expected - phases["training"]
    smaller, phases = resident_parts(of, process_bytes=300 * MB, **{asked: 40 * MB})
    assert sum(smaller.values()) == phases["training"] == max(phases.values()) and smaller[phase] == 0


def test_a_mapped_file_counts_for_the_process_and_not_for_its_tensors() -> None:
    parts, _ = resident_parts(footprint(weights=MB), process_bytes=0, feature_bytes=5 * MB)
    assert parts["tensors"] == MB and parts["features"] == 5 * MB


def test_an_allocator_holds_of_what_comes_and_goes_not_of_what_stays() -> None:
    assert resident(footprint(weights=MB, trained=MB, optimizer=MB, gradients=MB))["allocator"] == 0
    less, more = (resident(footprint(weights=MB, activations=size))["allocator"] for size in (10 * MB, 20 * MB))
    assert 0 < less < 5 * MB and more == pytest.approx(2 * less)


def test_a_plan_and_what_fits_go_into_json() -> None:
    of = footprint(weights=100 * MB, trained=10 * MB, activations=50 * MB)
    memory = {"peak_bytes": of.peak_bytes, "parts": of.parts, "resident": resident(of)}
    same = {"total_parameters": 50 * MB, "trained_parameters": 2 * MB, "precision": "bf16", **memory}
    peak = {"phase": of.phase, "peak_resident_bytes": sum(memory["resident"].values())}
    plan = Plan(method="lora", **same, **peak, module=of.module, tokens=1024, rows=16, operations=10**12)
    assert Plan.from_kept(json.loads(json.dumps(plan.kept()))) == plan
    told = json.loads(json.dumps(plan.as_dict()))
    assert told == {**told, **same, **peak, "tokens_per_pass": 1024}

    told = json.loads(json.dumps(Fitting("lora", 8, 512, True, "bf16", plan, 0.25).as_dict()))
    expected = {"rank": 8, "tokens_per_pass": 512, "checkpointing": True, "estimated_seconds_per_step": 0.25}
    assert told == {**told, **expected, "peak_resident_bytes": plan.peak_resident_bytes}


def test_freed_memory_that_the_allocator_keeps_is_part_of_the_process() -> None:
    of = footprint(weights=100 * MB, activations=20 * MB)
    assert resident(replace(of, held_bytes=7 * MB))["allocator"] == resident(of)["allocator"] + 7 * MB


def test_generated_text_is_a_phase_beside_the_tensors_that_stay() -> None:
    of = footprint(weights=100 * MB, trained=10 * MB, activations=50 * MB)
    _, phases = resident_parts(of, process_bytes=300 * MB, rollout_bytes=100 * MB)
    assert 510 * MB < phases["rollouts"] < 520 * MB
