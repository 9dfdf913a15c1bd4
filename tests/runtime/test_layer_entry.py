"""Where a model is frozen, and entering it there."""

from __future__ import annotations

import copy

import pytest
import torch

from deltaw.lora import LoRAConfig, attach
from deltaw.runtime.layer_entry import BlockEntry, Level, frozen_digest, lowest_trained
from tests.tiny_models import CAUSAL, PADDED, causal_model


def lowest(model):
    return lowest_trained(model, [p for p in model.parameters() if p.requires_grad])


def frozen(family="llama"):
    return causal_model(family).requires_grad_(False)


@pytest.mark.parametrize("family", [*CAUSAL, *PADDED])
def test_the_lowest_trained_block_is_found_and_entered_with_the_same_logits_to_the_bit(family):
    model, tokens = frozen(family), torch.arange(3, 15)[None] * torch.tensor([[1], [2]])

    def logits():
        with torch.no_grad():
            return model(tokens, use_cache=False).logits

    expected = logits()
    for index in (1, 2):
        entry = BlockEntry(model, index)
        hidden = entry.outputs(logits)
        assert hidden.shape == (2, 12, 32)
        with entry.entering(hidden):
            assert torch.equal(logits(), expected)
        with entry.entering(hidden * 1.5):
            assert not torch.equal(logits(), expected)
        with pytest.raises(ZeroDivisionError), entry.entering(hidden):
            raise ZeroDivisionError
        assert torch.equal(logits(), expected)
    assert not any("forward" in vars(m) or m._forward_hooks for m in model.modules())
    blocks = next(m for m in model.base_model.modules() if isinstance(m, torch.nn.ModuleList))
    for index, level in ((1, Level("block", 1, 2)), (0, None)):
        blocks[index].requires_grad_(True)
        assert lowest(model) == level


def test_a_head_and_what_follows_the_blocks_are_levels_of_their_own():
    model = frozen()
    assert lowest_trained(model, []) is None
    assert lowest_trained(model, [torch.nn.Parameter(torch.zeros(1))]) is None
    model.lm_head.requires_grad_(True)
    assert lowest(model) == Level("head")
    model.model.norm.requires_grad_(True)
    assert lowest(model) == Level("block", 2, 2)
    model.lm_head.weight = model.model.embed_tokens.weight
    model.lm_head.requires_grad_(True)
    assert lowest(model) is None  # tied to the embeddings


def test_a_layer_entry_point_above_something_trained_is_refused():
    model = frozen()
    attach(model, LoRAConfig(rank=2, target_modules="all-linear"), seed=0)
    with pytest.raises(RuntimeError, match="depends on what is trained"):
        BlockEntry(model, 1).outputs(lambda: model(torch.arange(5)[None]))


def test_the_digest_sees_one_changed_value_below_and_none_above():
    model = frozen()
    level = Level("block", 1, 2)
    known = frozen_digest(model, level)
    above, below = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        above.model.layers[1].mlp.up_proj.weight[3, 7] += 1e-3
        below.model.layers[0].mlp.up_proj.weight[3, 7] += 1e-3
    assert frozen_digest(above, level) == known != frozen_digest(below, level)
    assert frozen_digest(above, Level("head")) != frozen_digest(model, Level("head"))
