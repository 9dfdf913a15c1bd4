"""FlexAttention over prefix trees: its uncompiled form against the reference, its block masks against the
definition, and who takes over where it does not serve."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from deltaw.kernels import attention as flex
from deltaw.kernels.attention import packed_attention, packed_attention_reference
from deltaw.kernels.layout import Layout
from tests.kernels.conftest import examples, off
from tests.kernels.test_attention import assert_as_the_reference, gradients, random_inputs, trees

VARIANTS = "none"

flex_module = pytest.importorskip("torch.nn.attention.flex_attention", reason="no FlexAttention in this torch")
HOW = {"scaling": 0.3}
cuda_only = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device was found")
# A prompt with two answers, one of which goes on twice; rows of their own; out of depth-first order; empty.
TREES = {
    "one row": ([37], [-1]),
    "rows apart": ([20, 7, 40], [-1, -1, -1]),
    "a shared prompt": ([60, 9, 1, 30, 12], [-1, 0, 0, 1, -1]),
    "out of order": ([12, 8, 10, 9, 11], [-1, -1, 0, 1, 0]),
    "longer than a block": ([150, 33, 1, 90], [-1, 0, 0, 2]),
    "with an empty segment": ([30, 0, 14], [-1, 0, 1]),
}


@pytest.fixture(autouse=True)
def _derivative_on_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The uncompiled form has a derivative on a processor, which torch offers for compiled ones alone."""
    monkeypatch.setattr(flex_module, "_validate_device", lambda *tensors: None, raising=False)
    monkeypatch.setattr(flex, "_TRIALS", {})


@pytest.mark.each_value
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("window", [None, 11])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_uncompiled_form_equals_the_reference_in_float64(tree, window, softcap):
    layout = Layout.of_lengths(*TREES[tree])
    # Heads that share keys; and some that share none, with values of another size.
    sizes = {"heads": 3, "key_heads": 3, "value_size": 6} if tree == "a shared prompt" else {}
    how = {**HOW, "window": window, "softcap": softcap, "compiled": False}
    assert_as_the_reference(flex.tree_attention, random_inputs(layout, **sizes), layout, 1e-10, **how)


@examples(trees(), st.sampled_from([None, 1, 5, 40]), st.sampled_from([16, 128]), st.sampled_from([37, 1024]), count=40)
def test_counted_pairs_are_those_that_are_visible(layout, window, block, at_once):
    count = -(-layout.length // block)
    visible = np.zeros((count * block, count * block), np.int64)
    visible[: layout.length, : layout.length] = layout.visible(window)
    expected = visible.reshape(count, block, count, block).sum((1, 3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex, "COUNTED_AT_ONCE", at_once)
        assert (flex.visible_pairs(layout, window, block) == expected).all()


@examples(trees(), count=40)
def test_ranks_decide_who_sees_whom(layout):
    rank, end = flex.ranks(layout)
    assert sorted(rank) == list(range(layout.length))
    seen = (rank[None, :] <= rank[:, None]) & (rank[:, None] < end[None, :])
    assert (seen == layout.visible()).all()


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("window", [None, 11])
def test_block_masks_hold_the_blocks_that_torch_itself_would_find(tree, window):
    layout = Layout.of_lengths(*TREES[tree])
    ours = flex.tree_mask(layout, window)
    assert flex.tree_mask(layout, window) is ours  # made once for all layers
    theirs = flex_module.create_block_mask(
        ours.mask_mod, None, None, layout.length, layout.length, device="cpu", BLOCK_SIZE=flex.BLOCK
    )
    assert ours.shape == theirs.shape
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


def case(tree):
    """A layout, and inputs in fp32."""
    layout = Layout.of_lengths(*TREES[tree])
    return layout, random_inputs(layout, size=16, dtype=torch.float32)


@pytest.fixture
def on_this_device(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The processor stands for a device of FlexAttention's, whose uncompiled form stands for the compiled
    one; the list is told of each call."""
    calls: list[str] = []
    function = flex_module.flex_attention

    def watched(*args, **kwargs):
        calls.append("flex")
        return function(*args, **kwargs)

    monkeypatch.setattr(flex, "DEVICES", ("cpu",))
    monkeypatch.setattr(flex, "TRIED", flex.TRIED[:1])
    monkeypatch.setattr(flex, "_compiled", lambda: watched)
    return calls


def test_a_device_of_its_own_is_served_by_it_once_a_trial_agreed(on_this_device):
    layout, inputs = case("a shared prompt")
    tried = len(flex.TRIED)
    for calls in (tried + 1, tried + 2):  # the trial, and a call each time
        assert_as_the_reference(packed_attention, inputs, layout, 1e-4, **HOW)
        assert len(on_this_device) == calls
    assert flex.notes() == []


@pytest.mark.parametrize("fault", ["no such heads", "another result", "not for this length", "ImportError"])
def test_tiles_take_over_where_it_fails_differs_or_is_missing(fault, on_this_device, monkeypatch):
    layout, inputs = case("a shared prompt")
    works = flex._compiled()

    def broken(query, key, value, **others):
        if fault == "no such heads":
            raise NotImplementedError("no such heads\nand more")
        if fault == "another result":
            return query * 1.0 + 0.0 * (key.sum() + value.sum())
        if query.shape[2] == layout.length:  # which is not that of a trial
            raise torch._dynamo.exc.TorchDynamoException("not for this length")
        return works(query, key, value, **others)

    def compiled():
        if fault == "ImportError":
            raise ImportError("torch has no FlexAttention")
        return broken

    monkeypatch.setattr(flex, "_compiled", compiled)
    assert_as_the_reference(packed_attention, inputs, layout, 1e-4, **HOW)
    (note,) = flex.notes()
    assert "tiles" in note and "\n" not in note and fault in note
    assert not flex.serves(*inputs, packed_attention_reference)


def test_a_dry_run_compiles_nothing(on_this_device):
    from torch._subclasses.fake_tensor import FakeTensorMode

    layout, inputs = case("rows apart")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        inputs = [mode.from_tensor(t) for t in inputs]
        assert packed_attention(*inputs, layout, **HOW).shape == inputs[0].shape
    assert on_this_device == [] and flex._TRIALS == {}


def test_the_processor_itself_is_not_served():
    _, inputs = case("rows apart")
    assert not flex.serves(*inputs, packed_attention_reference)
    with pytest.raises(ValueError, match="tokens"):
        packed_attention(*inputs, Layout.of_lengths([9, 5]), **HOW)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for a processor with a C++ compiler")
@pytest.mark.parametrize("window", [None, 70])
def test_the_compiled_form_follows_the_block_masks(window):
    """On a processor, forward alone: unlike the uncompiled form it skips the blocks that are not listed.

    Torch's own template for processors (2.13) fails to compile for some soft caps, and for lengths that it is
    not told, so there are no caps here, and each length is compiled by itself.
    """
    for tree in ("longer than a block", "out of order"):
        torch._dynamo.reset()
        layout, inputs = case(tree)
        how = {**HOW, "window": window}
        with torch.no_grad():
            ours = flex.tree_attention(*inputs, layout, **how)
            expected = packed_attention_reference(*inputs, layout, **how)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@cuda_only
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window, softcap", [(None, None), (40, None), (None, 20.0)])
def test_the_compiled_form_on_a_gpu_equals_the_reference(tree, dtype, window, softcap):
    layout = Layout.of_lengths(*TREES[tree])
    exact = random_inputs(layout, heads=8, key_heads=2, size=64)
    how = {"scaling": 0.125, "window": window, "softcap": softcap}
    expected = gradients(packed_attention_reference, exact, layout, **how)
    layout.device = torch.device("cuda")
    ours = gradients(packed_attention, [t.to("cuda", dtype) for t in exact], layout, **how)
    assert flex.notes() == [], "FlexAttention did not serve this device"
    for one, other in zip(ours, expected, strict=True):
        assert off(one.cpu(), other) < flex.TOLERANCE[dtype]
