"""Tests of FlexAttention over prefix trees: uncompiled results, block masks and compilations."""

from __future__ import annotations

import shutil
import warnings

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from deltaw.kernels import flex_attention, gpu_attention
from deltaw.kernels.attention import packed_attention, packed_reference
from deltaw.kernels.flex_attention import tree_mask
from deltaw.kernels.layout import Layout
from tests.kernels.conftest import examples, relative_error
from tests.kernels.test_attention import assert_matches_reference, gradients, random_inputs, trees

VARIANTS = "none"

flex_module = pytest.importorskip("torch.nn.attention.flex_attention", reason="no FlexAttention in this torch")
OPTIONS = {"scaling": 0.3}
SIZES = {"size": 16, "dtype": torch.float32}
cuda_only = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device was found")
# Trees: separate rows, a prompt with two completions of which one has two continuations, segments out of depth-first
# order, and an empty segment.
TREES = {"one row": ([37], [-1]), "rows apart": ([20, 7, 40], [-1, -1, -1])}
TREES |= {"a shared prompt": ([60, 9, 1, 30, 12], [-1, 0, 0, 1, -1])}
TREES |= {"out of order": ([12, 8, 10, 9, 11], [-1, -1, 0, 1, 0])}
TREES |= {"longer than a block": ([150, 33, 1, 90], [-1, 0, 0, 2]), "with an empty segment": ([30, 0, 14], [-1, 0, 1])}


@pytest.fixture(autouse=True)
def _cpu_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow gradients of uncompiled FlexAttention on a CPU, which torch supports only for compiled calls."""
    monkeypatch.setattr(flex_module, "_validate_device", lambda *tensors: None, raising=False)
    monkeypatch.setattr(gpu_attention, "_TRIALS", {})
    monkeypatch.setattr(gpu_attention, "_EXCESS", {})


def uncompiled(query, key, value, layout, scaling, window=None, softcap=None):
    return flex_attention.attention_function(scaling, softcap)(query, key, value, tree_mask(layout, window))


@pytest.mark.each_value
@pytest.mark.parametrize("tree", list(TREES)[2:])
@pytest.mark.parametrize("window", [None, 11])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_uncompiled_attention_matches_float64_reference(tree, window, softcap):
    layout = Layout.of_lengths(*TREES[tree])
    # Grouped heads, and for one tree separate key heads with a different value size.
    sizes = {"heads": 3, "key_heads": 3, "value_size": 6} if tree == "a shared prompt" else {}
    options = {**OPTIONS, "window": window, "softcap": softcap}
    assert_matches_reference(uncompiled, random_inputs(layout, **sizes), layout, 1e-10, **options)


@examples(trees(), st.sampled_from([None, 1, 5, 40]), st.sampled_from([16, 128]), st.sampled_from([37, 1024]), count=40)
def test_pair_counts_match_visibility(layout, window, block, at_once):
    count = -(-layout.length // block)
    visible = np.zeros((count * block, count * block), np.int64)
    visible[: layout.length, : layout.length] = layout.visible(window)
    expected = visible.reshape(count, block, count, block).sum((1, 3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex_attention, "QUERIES_PER_COUNT", at_once)
        assert (flex_attention.visible_pairs(layout, window, block) == expected).all()


@examples(trees(), count=40)
def test_ranks_encode_visibility(layout):
    rank, end = flex_attention.ranks(layout)
    assert sorted(rank) == list(range(layout.length))
    seen = (rank[None, :] <= rank[:, None]) & (rank[:, None] < end[None, :])
    assert (seen == layout.visible()).all()


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("window", [None, 11])
def test_block_masks_match_torch(tree, window):
    layout = Layout.of_lengths(*TREES[tree])
    actual = tree_mask(layout, window)
    assert tree_mask(layout, window) is actual  # cached for all layers
    options = {"device": "cpu", "BLOCK_SIZE": flex_attention.BLOCK}
    expected = flex_module.create_block_mask(actual.mask_mod, None, None, layout.length, layout.length, **options)
    assert actual.shape == expected.shape
    blocks = expected.to_dense().shape[-1]
    padding = torch.nn.functional.pad(expected.to_dense(), (0, 2 - blocks, 0, 2 - blocks)) if blocks < 2 else None
    assert torch.equal(actual.to_dense(), expected.to_dense() if padding is None else padding)
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(actual, name)[..., :blocks], getattr(expected, name)), name


def case(tree):
    """Return a layout and inputs in fp32."""
    layout = Layout.of_lengths(*TREES[tree])
    return layout, random_inputs(layout, **SIZES)


@pytest.fixture
def traced_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace FlexAttention with torch.compile on the CPU, and run the graph without generated code."""
    monkeypatch.setattr(gpu_attention, "DEVICES", ("cpu",))
    monkeypatch.setattr(flex_attention, "inductor_backend", lambda: lambda graph, inputs: graph)


def attend(length, window=None, trained=(True, True, True), **options):
    """Compare attention over a shared prefix with the reference, forward and backward."""
    layout = Layout.of_lengths([length // 2, length - length // 2], [-1, 0])
    options = {**OPTIONS, **options}
    inputs = [t.requires_grad_(needs) for t, needs in zip(random_inputs(layout, **SIZES), trained, strict=True)]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*unfused")
        out = packed_attention(*inputs, layout, **options, window=window)
    expected = packed_reference(*inputs, layout, **options, window=window)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    if any(trained):
        leaves = [t for t in inputs if t.requires_grad]
        grads = [torch.autograd.grad(result.square().sum(), leaves) for result in (out, expected)]
        for actual, expected_grad in zip(*grads, strict=True):
            torch.testing.assert_close(actual, expected_grad, rtol=1e-4, atol=1e-4)


def compilations():
    return [trial.attend.compilations for trial in gpu_attention._TRIALS.values()]


def test_main_kernel_is_forced_for_short_rows(traced_on_cpu, monkeypatch):
    graphs = []
    monkeypatch.setattr(flex_attention, "inductor_backend", lambda: lambda graph, inputs: graphs.append(graph) or graph)
    attend(36)
    calls = [node for graph in graphs for node in graph.graph.nodes if "flex_attention" in str(node.target)]
    options = [value for node in calls for value in node.args if isinstance(value, dict)]
    assert options and all(value["FORCE_USE_FLEX_ATTENTION"] for value in options)


@pytest.mark.slow
def test_lengths_windows_and_trained_inputs_do_not_recompile(traced_on_cpu):
    for length in (300, 128, 257):
        for window in (32, 48):
            for trained in ((True, True, True), (True, False, True), (False, True, False)):
                attend(length, window, trained)
    assert compilations() == [1] and gpu_attention.notes() == []
    attend(36, 32)  # a row shorter than a block
    attend(127, 48)
    attend(300, 32, (False, False, False))
    attend(300, softcap=5.0)
    attend(128, softcap=5.0)
    assert compilations() == [1, 1, 1, 1]


def test_recompilation_is_counted_and_the_limit_falls_back_to_tiles(traced_on_cpu):
    attend(300)
    try:
        torch.use_deterministic_algorithms(True)  # torch compiles again for another global state
        attend(300)
        (note,) = gpu_attention.notes()
        assert "recompiled 1 times" in note
        with torch._dynamo.config.patch(recompile_limit=1):
            torch.use_deterministic_algorithms(True, warn_only=True)
            attend(300)
    finally:
        torch.use_deterministic_algorithms(False)
    (note,) = gpu_attention.notes()
    assert "computed in tiles (FailOnRecompileLimitHit" in note
    attend(36)
    assert gpu_attention.notes() == [note] and len(gpu_attention._TRIALS) == 2, "short rows must not be affected"


def test_disabled_compilation_runs_tiles_instead_of_unfused_attention(traced_on_cpu):
    attend(36)
    with torch.compiler.set_stance("force_eager"):
        attend(36)
        attend(300)
    notes = gpu_attention.notes()
    assert len(notes) == 2
    assert all("computed in tiles (UnfusedError: torch.compile is disabled" in note for note in notes)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for a processor with a C++ compiler")
@pytest.mark.parametrize("window", [None, 70])
def test_compiled_attention_follows_block_masks(window):
    """Compiled attention skips the blocks that are not listed. Forward only, on a CPU.

    The CPU template of torch 2.13 fails to compile for some soft caps and for dynamic lengths. The test therefore uses
    no soft cap and compiles each length separately.
    """
    for tree in ("longer than a block", "out of order"):
        torch._dynamo.reset()
        layout, inputs = case(tree)
        options = {**OPTIONS, "window": window}
        with torch.no_grad():
            compiled = torch.compile(flex_attention.attention_function(OPTIONS["scaling"], None))
            actual = compiled(*inputs, tree_mask(layout, window))
            expected = packed_reference(*inputs, layout, **options)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@cuda_only
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window, softcap", [(None, None), (40, None), (None, 20.0)])
def test_compiled_attention_on_gpu_matches_reference(tree, dtype, window, softcap):
    layout = Layout.of_lengths(*TREES[tree])
    exact = random_inputs(layout, heads=8, key_heads=2, size=64)
    options = {"scaling": 0.125, "window": window, "softcap": softcap}
    expected = gradients(packed_reference, exact, layout, **options)
    layout.device = torch.device("cuda")
    actual = gradients(packed_attention, [t.to("cuda", dtype) for t in exact], layout, **options)
    assert gpu_attention.notes() == [], "torch's kernels did not serve this device"
    for actual_tensor, expected_tensor in zip(actual, expected, strict=True):
        assert relative_error(actual_tensor.cpu(), expected_tensor) < gpu_attention.TOLERANCE[dtype]
