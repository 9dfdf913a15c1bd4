"""Tests of FlexAttention over prefix trees: uncompiled results, block masks and the fallback."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from deltaw.kernels import flex_attention, gpu_attention
from deltaw.kernels.attention import packed_attention, packed_reference
from deltaw.kernels.layout import Layout
from tests.kernels.conftest import examples, relative_error
from tests.kernels.test_attention import assert_matches_reference, gradients, random_inputs, trees

VARIANTS = "none"

flex_module = pytest.importorskip("torch.nn.attention.flex_attention", reason="no FlexAttention in this torch")
OPTIONS = {"scaling": 0.3}
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
    monkeypatch.setattr(flex, "_TRIALS", {})


@pytest.mark.each_value
@pytest.mark.parametrize("tree", list(TREES)[2:])
@pytest.mark.parametrize("window", [None, 11])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_uncompiled_attention_matches_float64_reference(tree, window, softcap):
    layout = Layout.of_lengths(*TREES[tree])
    # Grouped heads, and for one tree separate key heads with a different value size.
    sizes = {"heads": 3, "key_heads": 3, "value_size": 6} if tree == "a shared prompt" else {}
    options = {**OPTIONS, "window": window, "softcap": softcap, "compiled": False}
    assert_matches_reference(flex.tree_attention, random_inputs(layout, **sizes), layout, 1e-10, **options)


@examples(trees(), st.sampled_from([None, 1, 5, 40]), st.sampled_from([16, 128]), st.sampled_from([37, 1024]), count=40)
def test_pair_counts_match_visibility(layout, window, block, at_once):
    count = -(-layout.length // block)
    visible = np.zeros((count * block, count * block), np.int64)
    visible[: layout.length, : layout.length] = layout.visible(window)
    expected = visible.reshape(count, block, count, block).sum((1, 3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex, "QUERIES_PER_COUNT", at_once)
        assert (flex.visible_pairs(layout, window, block) == expected).all()


@examples(trees(), count=40)
def test_ranks_encode_visibility(layout):
    rank, end = flex.ranks(layout)
    assert sorted(rank) == list(range(layout.length))
    seen = (rank[None, :] <= rank[:, None]) & (rank[:, None] < end[None, :])
    assert (seen == layout.visible()).all()


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("window", [None, 11])
def test_block_masks_match_torch(tree, window):
    layout = Layout.of_lengths(*TREES[tree])
    actual = flex.tree_mask(layout, window)
    assert flex.tree_mask(layout, window) is actual  # cached for all layers
    options = {"device": "cpu", "BLOCK_SIZE": flex.BLOCK}
    expected = flex_module.create_block_mask(actual.mask_mod, None, None, layout.length, layout.length, **options)
    assert actual.shape == expected.shape
    assert torch.equal(actual.to_dense(), expected.to_dense())
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name


def case(tree):
    """Return a layout and inputs in fp32."""
    layout = Layout.of_lengths(*TREES[tree])
    return layout, random_inputs(layout, size=16, dtype=torch.float32)


@pytest.fixture
def flex_on_cpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Use uncompiled FlexAttention on the CPU in place of the compiled one, and return the list of recorded calls."""
    calls: list[str] = []
    original = flex_module.flex_attention

    def recorded(*args, **kwargs):
        calls.append("flex")
        return original(*args, **kwargs)

    monkeypatch.setattr(flex, "DEVICES", ("cpu",))
    monkeypatch.setattr(flex, "TRIAL_TREES", flex.TRIAL_TREES[:1])
    monkeypatch.setattr(flex, "_compiled", lambda: recorded)
    return calls


def test_supported_device_uses_flex_after_successful_trial(flex_on_cpu):
    layout, inputs = case("a shared prompt")
    tried = len(flex.TRIAL_TREES)
    for calls in (tried + 1, tried + 2):  # the trials, then one call per iteration
        assert_matches_reference(packed_attention, inputs, layout, 1e-4, **OPTIONS)
        assert len(flex_on_cpu) == calls
    assert flex.notes() == []


@pytest.mark.parametrize("fault", ["no such heads", "a different result", "not for this length", "ImportError"])
def test_tiles_replace_failing_differing_or_missing_flex(fault, flex_on_cpu, monkeypatch):
    layout, inputs = case("a shared prompt")
    original = flex._compiled()

    def broken(query, key, value, **options):
        if fault == "no such heads":
            raise NotImplementedError("no such heads\nand more")
        if fault == "a different result":
            return query * 1.0 + 0.0 * (key.sum() + value.sum())
        if query.shape[2] == layout.length:  # the trials have another length
            raise torch._dynamo.exc.TorchDynamoException("not for this length")
        return original(query, key, value, **options)

    def compiled():
        if fault == "ImportError":
            raise ImportError("torch has no FlexAttention")
        return broken

    monkeypatch.setattr(flex, "_compiled", compiled)
    assert_matches_reference(packed_attention, inputs, layout, 1e-4, **OPTIONS)
    (note,) = flex.notes()
    assert "tiles" in note and "\n" not in note and fault in note
    assert not flex.supports(*inputs, packed_reference)


def test_dry_run_does_not_compile(flex_on_cpu):
    from torch._subclasses.fake_tensor import FakeTensorMode

    layout, inputs = case("rows apart")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        inputs = [mode.from_tensor(t) for t in inputs]
        assert packed_attention(*inputs, layout, **OPTIONS).shape == inputs[0].shape
    assert flex_on_cpu == [] and flex._TRIALS == {}


def test_flex_does_not_support_cpu():
    _, inputs = case("rows apart")
    assert not flex.supports(*inputs, packed_reference)
    with pytest.raises(ValueError, match="tokens"):
        packed_attention(*inputs, Layout.of_lengths([9, 5]), **OPTIONS)


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
            actual = flex.tree_attention(*inputs, layout, **options)
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
    assert flex.notes() == [], "FlexAttention did not serve this device"
    for actual_tensor, expected_tensor in zip(actual, expected, strict=True):
        assert relative_error(actual_tensor.cpu(), expected_tensor) < flex.TOLERANCE[dtype]
