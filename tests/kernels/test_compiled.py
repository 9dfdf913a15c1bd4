"""Compiled row functions: trials, fallbacks, and the generated kernels in Triton's interpreter."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from deltaw.kernels import compiled, rows


@pytest.fixture
def norm(monkeypatch):
    """A norm that would be compiled on the CPU."""
    monkeypatch.setattr(compiled, "DEVICES", ("cpu",))
    monkeypatch.setattr(compiled, "_REASONS", {})
    monkeypatch.setattr(compiled, "mark_dynamic", lambda tensor, dim: None)
    return compiled.CompiledFunction(rows.norm_reference)


def call(function, count=6, width=8):
    x = torch.randn(count, width, generator=torch.Generator().manual_seed(count))
    shared = {"weight": torch.ones(width), "bias": None, "offset": 0.0, "eps": 1e-5, "centered": False}
    return function(x=x, **shared)[0], rows.norm_reference(x, **shared)[0]


def test_function_is_compiled_once_for_all_lengths(norm, monkeypatch):
    calls = []

    def compile_function(function):
        calls.append(function.__name__)
        return lambda **arguments: function(**arguments)

    monkeypatch.setattr(compiled, "compile_function", compile_function)
    for count in (6, 100, 7):
        torch.testing.assert_close(*call(norm, count))
    assert calls == ["norm_reference"] and compiled.notes() == []
    call(norm, width=4)
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("compile_function", "reason"),
    [
        (lambda f: lambda **a: tuple(1.1 * t for t in f(**a)), "results differ"),
        (lambda f: lambda **a: 1 / 0, "ZeroDivisionError"),
        (lambda f: lambda **a: tuple(t * float("nan") for t in f(**a)), "results differ"),
    ],
    ids=["wrong", "error", "nan"],
)
def test_failed_trial_runs_torch_operators_and_is_reported(norm, monkeypatch, compile_function, reason):
    monkeypatch.setattr(compiled, "compile_function", compile_function)
    for _ in range(2):
        torch.testing.assert_close(*call(norm), rtol=0, atol=0)
    (note,) = compiled.notes()
    assert note.startswith("norm_reference is not compiled") and reason in note


def test_later_compile_error_runs_torch_operators(norm, monkeypatch):
    from torch._dynamo.exc import TorchDynamoException

    def compile_function(function):
        def run(**arguments):
            if len(arguments["x"]) > 50:
                raise TorchDynamoException("too long")
            return function(**arguments)

        return run

    monkeypatch.setattr(compiled, "compile_function", compile_function)
    monkeypatch.setattr(compiled, "TRIAL_ROWS", 50)
    torch.testing.assert_close(*call(norm, 60), rtol=0, atol=0)
    assert "too long" in compiled.notes()[0]


def test_trial_leaves_overwritten_arguments_unchanged(norm, monkeypatch):
    monkeypatch.setattr(compiled, "compile_function", lambda f: lambda **a: f(**a))
    logits = torch.randn(4, 9)
    targets = torch.tensor([1, 2, 3, 4])
    given = {"targets": targets, "weights": torch.ones(4), "scale": 1.0, "softcap": 0.0, "grad": True}
    expected = torch.softmax(logits, -1) - torch.nn.functional.one_hot(targets, 9)
    function = compiled.CompiledFunction(rows.cross_entropy_reference_)
    function(logits=logits, **given)
    torch.testing.assert_close(logits, expected)


@pytest.mark.slow
def test_generated_kernels_in_interpreter():
    pytest.importorskip("triton", reason="triton is not installed")
    command = [sys.executable, "-m", "tests.kernels.interpreted_rows"]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]
    output = json.loads(process.stdout.splitlines()[-1])
    assert output["notes"] == []
    for name, result in output["results"].items():
        assert result["difference"] < (1e-5 if "float32" in name else 1e-2), name
        assert result["kernels"] > 0, name  # the functions did not run as torch operators
