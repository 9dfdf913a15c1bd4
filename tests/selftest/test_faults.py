"""Faults that the self-test must find: a changed element, missing threads, and stale or missing kernels."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys

import pytest
import torch

from deltaw.kernels import loader, variants
from deltaw.selftest import kernel_checks, training_checks
from deltaw.selftest.kernel_call import Inputs, difference
from deltaw.selftest.kernel_checks import check_builds, check_results, check_threads, usable_variants
from deltaw.selftest.model_cases import model_cases
from deltaw.selftest.other_cases import other_cases
from deltaw.selftest.product_cases import product_cases
from tests.kernels.conftest import compiled_only

CASES = {case.name: case for case in (*product_cases(), *other_cases(), *model_cases())}


@pytest.mark.parametrize("name", CASES)
def test_a_changed_element_is_found_in_each_call(name):
    case = CASES[name]
    for dtype in case.types:
        results = [result.clone() for result in case.compute(Inputs(dtype, is_exact=False))]
        assert difference(results, results, dtype)[0] == 0
        largest = max(range(len(results)), key=lambda n: results[n].numel())
        changed = results[largest].reshape(-1)
        changed[-1] += 3 * changed.double().square().mean().sqrt().to(changed.dtype) + 1
        other = [*results[:largest], changed.view(results[largest].shape), *results[largest + 1 :]]
        ratio, place = difference(other, list(case.compute(Inputs(dtype, is_exact=False))), dtype)
        assert ratio > case.slack and f"element {changed.numel() - 1} of result {largest}" in place


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_differ(value):
    expected = torch.ones(3)
    ratio, place = difference([torch.tensor([1.0, value, 1.0])], [expected], torch.float32)
    assert ratio > 1e30 and "element 1" in place
    assert difference([torch.ones(2)], [expected], torch.float32)[0] == float("inf")


@compiled_only
def test_a_changed_result_of_a_kernel_fails_by_name(monkeypatch):
    product = next(product_cases())
    monkeypatch.setattr(kernel_checks, "product_cases", lambda: iter([product]))
    monkeypatch.setattr(kernel_checks, "other_cases", lambda: iter([]))
    monkeypatch.setattr(kernel_checks, "model_cases", lambda: iter([]))
    assert all(check.problem is None and "2 calls" in check.note for check in check_results(2))
    original = loader.kernels().dw_linear
    rows_by_columns = 3 * 40

    def changed(*arguments):
        status = original(*arguments)
        type_code, y = arguments[0], arguments[-2]
        if type_code == loader.dtype_code(torch.float32):
            (ctypes.c_float * rows_by_columns).from_address(y)[7] += 0.01
        return status

    monkeypatch.setattr(loader.kernels(), "dw_linear", changed)
    failed = [check for check in check_results(2) if check.problem is not None]
    assert failed and "product 3 × 64 × 40 (float32): element 7 of result 0" in failed[0].problem


@compiled_only
def test_missing_threads_fail():
    command = [
        sys.executable,
        "-c",
        "from deltaw.selftest.kernel_checks import check_threads\n"
        "for check in check_threads(2): print(check.name, '|', check.problem)",
    ]
    environment = {**os.environ, "OMP_THREAD_LIMIT": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "kernels run on 1 threads, but this machine has 2" in result.stdout
    result = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True
    )
    assert "runs use 1 threads (OMP_NUM_THREADS), not 2" in result.stdout


@compiled_only
def test_all_threads_run_at_once():
    before = torch.get_num_threads()
    problems = [check.problem for check in check_threads(2) if check.name != "threads of runs"]
    assert problems and not any(problems) and torch.get_num_threads() == before


@compiled_only
def test_changed_sources_are_stale(tmp_path, monkeypatch):
    if variants.source_digest() is None:
        pytest.skip("a wheel has no sources")
    assert [check.problem for check in check_builds()] == [None] * len(list(usable_variants()))
    sources = tmp_path / "csrc"
    shutil.copytree(variants.LIST.parent, sources)
    with (sources / "add.cpp").open("a") as file:
        file.write("// changed\n")
    monkeypatch.setattr(variants, "LIST", sources / "variants.txt")
    assert all("stale: built from sources" in check.problem for check in check_builds())


@compiled_only
def test_a_variant_from_other_sources_is_stale_without_sources(monkeypatch):
    if len(list(usable_variants())) < 2:
        pytest.skip("one variant was built")
    builds = iter([kernel_checks.Build("a", "c"), kernel_checks.Build("b", "c"), kernel_checks.Build("a", "c")])
    monkeypatch.setattr(kernel_checks, "build_of", lambda library: next(builds))
    monkeypatch.setattr(variants, "source_digest", lambda: None)
    first, second, *_ = check_builds()
    assert first.problem is None and second.problem == "stale: built from sources b, others from a"


def test_missing_and_damaged_kernels_fail(tmp_path, monkeypatch):
    monkeypatch.setattr(variants, "FOLDER", tmp_path)
    monkeypatch.setattr(loader._Process, "loaded", {})
    (check,) = check_builds()
    assert check.problem
    for variant in variants.allowed(kernel_checks.processor_flags()):
        (tmp_path / variant.file).write_bytes(b"not a library")
    assert all(check.problem for check in check_builds())


def test_wrong_losses_and_texts_fail(tmp_path, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    stored = training_checks.STORED_LOSSES
    lines = [
        f'{{"step": {n}, "loss": {stored[min(n, len(stored)) - 1]}}}\n' for n in range(1, training_checks.STEPS + 1)
    ]
    (run / "metrics.jsonl").write_text("".join(lines))
    assert training_checks._check_losses(run).problem is None
    lines[3] = f'{{"step": 4, "loss": {stored[3] * 1.01}}}\n'
    (run / "metrics.jsonl").write_text("".join(lines))
    assert "the loss of step 4 is" in training_checks._check_losses(run).problem
    (run / "metrics.jsonl").write_text("".join(lines[:-1]))
    assert f"instead of {training_checks.STEPS}" in training_checks._check_losses(run).problem
    output = '{"completions": [{"completion": " left"}]}'
    result = training_checks.CommandResult(0, output, "")
    monkeypatch.setattr(training_checks, "_deltaw", lambda arguments: result)
    assert "instead of ' left the harbor" in training_checks._check_text(run).problem
