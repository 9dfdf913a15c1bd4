"""Tests of the choice between torch's attention kernels on GPUs and tiles, with stand-ins on the CPU."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from deltaw.kernels import gpu_attention
from deltaw.kernels.attention import packed_attention, packed_reference
from deltaw.kernels.flex_attention import UnfusedError, attention_function, tree_mask
from deltaw.kernels.layout import Layout
from tests.kernels.conftest import relative_error
from tests.kernels.test_attention import gradients, random_inputs

VARIANTS = "none"

flex_module = pytest.importorskip("torch.nn.attention.flex_attention", reason="no FlexAttention in this torch")
varlen_module = pytest.importorskip("torch.nn.attention.varlen", reason="no variable-length attention in this torch")
TREE = ((150, 33, 1, 90), (-1, 0, 0, 2))
ROWS = ((70, 33, 0, 90), None)
SHORT = ((50, 20, 9), (-1, 0, 0))
ROOT = Path(__file__).parents[2]


class EagerFlex:
    """Stand-in for CompiledAttention that runs torch's operators and records its calls."""

    calls: ClassVar[list[tuple[int, bool, dict]]] = []
    faults: ClassVar[dict[int, Exception]] = {}  # by length
    compilations = 1

    def __init__(self, scaling, softcap, kernel_options):
        self.function = attention_function(scaling, softcap)
        self.kernel_options = kernel_options

    def __call__(self, query, key, value, layout, window):
        self.calls.append((layout.length, query.requires_grad, self.kernel_options))
        if layout.length in self.faults:
            raise self.faults[layout.length]
        return self.function(query, key, value, tree_mask(layout, window))


def eager_varlen(query, key, value, starts, same, longest, longest_key, *, scale, window_size, enable_gqa):
    """Stand-in for varlen_attn, one row at a time."""
    assert starts.dtype == torch.int32 and starts is same and longest == longest_key == int(starts.diff().max())
    assert enable_gqa == (query.shape[1] != key.shape[1]) and window_size[1] == 0
    rows = []
    for start, stop in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        layout = Layout.of_lengths([stop - start])
        inputs = (t[start:stop].transpose(0, 1) for t in (query, key, value))
        window = None if window_size[0] < 0 else window_size[0] + 1
        rows.append(packed_reference(*inputs, layout, scaling=scale, window=window).transpose(0, 1))
    return torch.cat(rows)


@pytest.fixture(autouse=True)
def varlen_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Install the stand-ins on the CPU, and return the lengths of calls of variable-length attention."""
    calls: list[int] = []

    def varlen(query, *args, **options):
        calls.append(len(query))
        return eager_varlen(query, *args, **options)

    monkeypatch.setattr(flex_module, "_validate_device", lambda *tensors: None, raising=False)
    monkeypatch.setattr(varlen_module, "varlen_attn", varlen)
    monkeypatch.setattr(gpu_attention, "CompiledAttention", EagerFlex)
    monkeypatch.setattr(gpu_attention, "DEVICES", ("cpu",))
    monkeypatch.setattr(gpu_attention, "_TRIALS", {})
    monkeypatch.setattr(gpu_attention, "_EXCESS", {})
    monkeypatch.setattr(EagerFlex, "calls", [])
    monkeypatch.setattr(EagerFlex, "faults", {})
    torch._dynamo.reset()  # torch limits the compilations of its uncompiled form too, over all tests of a process
    return calls


def attend(tree, dtype=torch.bfloat16, **options):
    """Compare attention of a layout with the fp64 reference, forward and backward."""
    layout = Layout.of_lengths(*tree)
    exact = random_inputs(layout, size=16)
    options = {"scaling": 0.25, **options}
    actual = gradients(packed_attention, [t.to(dtype) for t in exact], layout, **options)
    for result, expected in zip(actual, gradients(packed_reference, exact, layout, **options), strict=True):
        assert relative_error(result, expected) < gpu_attention.TOLERANCE[dtype]


@pytest.mark.parametrize("window", [None, 1, 20])
def test_separate_rows_use_variable_length_attention(window, varlen_calls):
    attend(ROWS, window=window)
    assert varlen_calls == [605, 193] and EagerFlex.calls == []
    attend(((40, 5), None), window=window)  # another length class, with its own trial
    assert varlen_calls == [605, 193, 90, 45] and gpu_attention.notes() == []


@pytest.mark.parametrize("tree, options", [(TREE, {}), (ROWS, {"softcap": 5.0}), (ROWS, {"dtype": torch.float32})])
def test_shared_prefixes_soft_caps_and_fp32_use_flex_attention(tree, options, varlen_calls):
    attend(tree, **options)
    length = sum(tree[0])
    assert [call[0] for call in EagerFlex.calls] == [605, length] and varlen_calls == []
    attend(tree, **options)
    assert [call[0] for call in EagerFlex.calls] == [605, length, length] and gpu_attention.notes() == []


@pytest.mark.parametrize("fault", ["an old GPU", "results differ"])
def test_failed_variable_length_attention_is_reported_and_flex_is_used(fault, monkeypatch):
    def broken(query, key, value, *args, **options):
        if fault == "an old GPU":
            raise RuntimeError("an old GPU\nand more")
        return query * float("nan") + key.sum() + value.sum()

    monkeypatch.setattr(varlen_module, "varlen_attn", broken)
    attend(ROWS)
    assert [call[0] for call in EagerFlex.calls] == [605, 193]
    (note,) = gpu_attention.notes()
    assert "FlexAttention also for rows without a shared prefix" in note and fault in note and "\n" not in note


@pytest.mark.parametrize("fault", [NotImplementedError("no such heads\nand more"), ImportError("no FlexAttention")])
def test_failure_of_one_length_class_does_not_affect_others(fault, monkeypatch):
    monkeypatch.setattr(EagerFlex, "faults", {90: fault})  # the trial of short rows
    attend(SHORT)
    (note,) = gpu_attention.notes()
    assert note.startswith("attention of 4/2 heads of size 16, fewer than 128 tokens: computed in tiles (")
    assert str(fault).splitlines()[0] in note and "\n" not in note and len(EagerFlex.calls) == 1
    EagerFlex.calls.clear()
    attend(TREE)
    attend(SHORT)
    assert [call[0] for call in EagerFlex.calls] == [605, 274] and gpu_attention.notes() == [note]


@pytest.mark.parametrize("fault", [UnfusedError("unfused"), torch._dynamo.exc.FailOnRecompileLimitHit("too many")])
def test_failure_after_the_trial_is_reported_and_runs_tiles(fault, monkeypatch):
    attend(TREE)
    monkeypatch.setattr(EagerFlex, "faults", {274: fault})
    attend(TREE)
    (note,) = gpu_attention.notes()
    assert "computed in tiles" in note and str(fault) in note


def test_other_errors_after_the_trial_are_raised(monkeypatch):
    attend(TREE)
    monkeypatch.setattr(EagerFlex, "faults", {274: torch.OutOfMemoryError("no memory")})
    with pytest.raises(torch.OutOfMemoryError):
        attend(TREE)


def test_short_trees_without_gradients_and_single_tokens_do_not_compile():
    with torch.no_grad():
        for tree in (SHORT, ((1,), None)):
            layout = Layout.of_lengths(*tree)
            packed_attention(*random_inputs(layout, dtype=torch.float32), layout, scaling=1.0)
    assert EagerFlex.calls == [] and gpu_attention._TRIALS == {}


@pytest.mark.parametrize("size, expected", [(16, [0, 1]), (256, [1, 2])])
def test_kernels_that_exceed_the_gpu_are_replaced_by_smaller_blocks(size, expected, monkeypatch):
    excess = iter(["a kernel needs 130 KB", None])
    monkeypatch.setattr(gpu_attention, "_excess_of_kernels", lambda modules, device: next(excess))
    layout = Layout.of_lengths(*TREE)
    inputs = [t.requires_grad_() for t in random_inputs(layout, size=size, dtype=torch.float32)]
    packed_attention(*inputs, layout, scaling=size**-0.5)
    options = [call[2] for call in EagerFlex.calls]
    assert options == [gpu_attention.BLOCK_OPTIONS[n] for n in (*expected, expected[-1])]
    (note,) = gpu_attention.notes()
    assert "smaller blocks in FlexAttention (a kernel needs 130 KB)" in note


def test_kernel_that_cannot_be_loaded_is_replaced_by_smaller_blocks(monkeypatch):
    faults = iter([RuntimeError("No valid configs.\nout of resource: shared memory, Required: 131072"), None, None])

    def call(self, query, key, value, layout, window, original=EagerFlex.__call__):
        if (fault := next(faults)) is not None:
            raise fault
        return original(self, query, key, value, layout, window)

    monkeypatch.setattr(EagerFlex, "__call__", call)
    attend(TREE)
    (note,) = gpu_attention.notes()
    assert "smaller blocks in FlexAttention (RuntimeError: out of resource" in note


def test_tiles_are_used_if_all_blocks_exceed_the_gpu(monkeypatch):
    monkeypatch.setattr(gpu_attention, "_excess_of_kernels", lambda modules, device: "too much stack")
    attend(TREE)
    assert len(EagerFlex.calls) == len(gpu_attention.BLOCK_OPTIONS)
    # A class that shares the compiled module has the same excess, although no module is loaded.
    monkeypatch.setattr(gpu_attention, "_excess_of_kernels", lambda modules, device: None)
    attend(SHORT)
    assert all("computed in tiles (too much stack)" in note for note in gpu_attention.notes())
    assert len(gpu_attention.notes()) == 2


@pytest.mark.parametrize("shared, spills, expected", [(99, 256, None), (100, 0, "100 KB of shared"), (0, 257, "1,028")])
def test_resources_of_compiled_kernels_are_compared_with_the_gpu(shared, spills, expected, monkeypatch):
    properties = SimpleNamespace(shared_memory_per_block_optin=99 * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    launchers = [SimpleNamespace(shared=0, n_spills=None), SimpleNamespace(shared=shared * 1024, n_spills=spills)]
    module = SimpleNamespace(kernel=SimpleNamespace(launchers=launchers), other=3)
    excess = gpu_attention._excess_of_kernels([module], torch.device("cuda", 0))
    assert excess is None if expected is None else expected in excess


def test_trial_inside_checkpointing_does_not_change_the_saved_tensors():
    layout = Layout.of_lengths(*TREE)
    leaves = [t.requires_grad_() for t in random_inputs(layout, size=16, dtype=torch.float32)]
    out = checkpoint(packed_attention, *leaves, layout, scaling=0.25, use_reentrant=False)
    expected = torch.autograd.grad(packed_reference(*leaves, layout, scaling=0.25).sum(), leaves)
    for actual, grad in zip(torch.autograd.grad(out.sum(), leaves), expected, strict=True):
        torch.testing.assert_close(actual, grad, rtol=1e-4, atol=1e-4)


def test_dry_run_does_not_compile():
    from torch._subclasses.fake_tensor import FakeTensorMode

    layout = Layout.of_lengths(*TREE)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        inputs = [mode.from_tensor(t) for t in random_inputs(layout, dtype=torch.float32)]
        assert packed_attention(*inputs, layout, scaling=1.0).shape == inputs[0].shape
    assert EagerFlex.calls == [] and gpu_attention._TRIALS == {}


def test_cpu_runs_tiles_and_checks_lengths(monkeypatch):
    monkeypatch.setattr(gpu_attention, "DEVICES", ("cuda",))
    layout = Layout.of_lengths(*TREE)
    inputs = random_inputs(layout, dtype=torch.float32)
    packed_attention(*inputs, layout, scaling=1.0)
    assert EagerFlex.calls == [] and gpu_attention._TRIALS == {}
    with pytest.raises(ValueError, match="tokens"):
        packed_attention(*inputs, Layout.of_lengths([9, 5]), scaling=1.0)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="compiling for a GPU requires triton")
@pytest.mark.skipif(shutil.which("c++") is None, reason="the fake device is compiled with a C++ compiler")
def test_kernels_compile_for_a_gpu_and_large_ones_are_rejected():
    """The blocks of a head size of 256 must be smaller than torch's defaults with 99 KB of shared memory."""
    table = [
        sys.executable,
        "-m",
        "tests.fake_cuda.compiled",
        "--child",
        "--lengths",
        "36",
        "127",
        "--capabilities",
        "89",
    ]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    run = subprocess.run(
        [*table, "--heads", "2/1/32", "2/1/256"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    rows = [line.split(" | ") for line in run.stdout.splitlines() if line.startswith("| sm_89")]
    assert [row[1:4] for row in rows] == [["2/1/32", "36, 127", "torch's"], ["2/1/256", "36, 127", "smaller backward"]]
    assert all(" KB, " in cell for row in rows for cell in row[4:])
