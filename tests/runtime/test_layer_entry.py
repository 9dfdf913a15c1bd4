"""Detection of frozen lower layers, and forward passes that start above them."""

from __future__ import annotations

import copy

import pytest
import torch

from deltaw.lora import LoRAConfig, attach
from deltaw.runtime.layer_entry import BlockEntry, Level, frozen_digest, frozen_level
from tests.tiny_models import CAUSAL, PADDED, causal_model


def lowest_trained_level(model):
    return frozen_level(model, [p for p in model.parameters() if p.requires_grad])


def frozen_model(family="llama"):
    return causal_model(family).requires_grad_(False)


@pytest.mark.parametrize("family", [*CAUSAL, *PADDED])
def test_entering_at_lowest_trained_block_is_bit_identical(family):
    model = frozen_model(family)
    tokens = torch.arange(3, 15)[None] * torch.tensor([[1], [2]])

    def logits():
        with torch.no_grad():
            return model(tokens, use_cache=False).logits

    expected = logits()
    for index in (1, 2):
        entry = BlockEntry(model, index)
        hidden = entry.outputs(logits)
        assert hidden.shape == (2, 12, 32)
        with entry.enter(hidden):
            assert torch.equal(logits(), expected)
        with entry.enter(hidden * 1.5):
            assert not torch.equal(logits(), expected)
        with pytest.raises(ZeroDivisionError), entry.enter(hidden):
            raise ZeroDivisionError
        assert torch.equal(logits(), expected)
    assert not any("forward" in vars(m) or m._forward_hooks for m in model.modules())
    blocks = next(m for m in model.base_model.modules() if isinstance(m, torch.nn.ModuleList))
    for index, level in ((1, Level("block", 1, 2)), (0, None)):
        blocks[index].requires_grad_(True)
        assert lowest_trained_level(model) == level


def test_head_and_final_norm_are_separate_levels():
    model = frozen_model()
    assert frozen_level(model, []) is None
    assert frozen_level(model, [torch.nn.Parameter(torch.zeros(1))]) is None
    model.lm_head.requires_grad_(True)
    assert lowest_trained_level(model) == Level("head")
    model.model.norm.requires_grad_(True)
    assert lowest_trained_level(model) == Level("block", 2, 2)
    model.lm_head.weight = model.model.embed_tokens.weight
    model.lm_head.requires_grad_(True)
    assert lowest_trained_level(model) is None  # tied to the embeddings


def test_entry_above_trainable_parameters_raises():
    model = frozen_model()
    attach(model, LoRAConfig(rank=2, target_modules="all-linear"), seed=0)
    with pytest.raises(RuntimeError, match="depends on trainable parameters"):
        BlockEntry(model, 1).outputs(lambda: model(torch.arange(5)[None]))


def test_digest_depends_only_on_values_below_entry():
    model = frozen_model()
    level = Level("block", 1, 2)
    digest = frozen_digest(model, level)
    above = copy.deepcopy(model)
    below = copy.deepcopy(model)
    with torch.no_grad():
        above.model.layers[1].mlp.up_proj.weight[3, 7] += 1e-3
        below.model.layers[0].mlp.up_proj.weight[3, 7] += 1e-3
    assert frozen_digest(above, level) == digest != frozen_digest(below, level)
    assert frozen_digest(above, Level("head")) != frozen_digest(model, Level("head"))
