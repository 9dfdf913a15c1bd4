"""Choice of the attention implementation by contexts that are nested or overlap in threads."""

from __future__ import annotations

import contextlib

from deltaw.runtime.attention_choice import use_attention
from deltaw.runtime.packed import ATTENTION, packed_rows
from tests.byte_models import tiny_llama


def test_overlapping_contexts_restore_the_original_at_the_last_exit() -> None:
    model = tiny_llama()
    stacks = [contextlib.ExitStack() for _ in range(3)]
    for stack in stacks:
        stack.enter_context(packed_rows(model, fused=False))
    for index in (0, 2):  # threads exit in any order
        stacks[index].close()
        assert model.config._attn_implementation == ATTENTION
    stacks[1].close()
    assert model.config._attn_implementation == "sdpa"


def test_nested_contexts_restore_the_implementation_of_the_outer_one() -> None:
    model = tiny_llama()
    with packed_rows(model, fused=False):
        with use_attention(model, "eager"):
            with packed_rows(model, fused=False):
                assert model.config._attn_implementation == ATTENTION
            assert model.config._attn_implementation == "eager"
        assert model.config._attn_implementation == ATTENTION
    assert model.config._attn_implementation == "sdpa"
