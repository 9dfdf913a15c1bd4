"""Models with recurrent layers have PEFT's targets, loss and gradients on packed and padded rows."""

from __future__ import annotations

import contextlib

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch.nn import functional as F

from deltaw.errors import UserError
from deltaw.lora import LoRAConfig, LoRALayer, attach
from deltaw.runtime.packed import packed_rows
from deltaw.training.batchers import CausalMicroBatcher
from deltaw.training.causal_objective import CausalObjective
from tests.lora.models import copy_to_peft, factor_pairs, ours_as_peft, randomise, with_peft
from tests.runtime.recurrent_families import FAMILIES, recurrent_model
from tests.training.loops import example

ALL_LENGTHS = range(1, 201)
# One token, both sides of the sizes of convolutions and of chunks, and several chunks.
SAMPLE_LENGTHS = (1, 2, 3, 4, 5, 8, 15, 16, 17, 33, 63, 64, 65, 127, 130, 200)
TOLERANCE = 1e-5
# PEFT rejects the output projections of these two, because their CUDA kernels would ignore the adapter.
REJECTED = ("falcon_h1", "nemotron_h")
# Standard deviation of the matrices. Larger ones amplify rounding errors of transformers' gated delta rule.
STD = 0.07


def rows_of_lengths(lengths):
    """Return rows that branch from their predecessors at arbitrary tokens, some without a common prefix."""
    generator = torch.Generator().manual_seed(0)
    examples = []
    previous = torch.empty(0, dtype=torch.int64)
    for number, length in enumerate(lengths, 1):
        branch = 0 if number % 5 == 0 else int(torch.randint(0, length, (), generator=generator))
        own = torch.randint(3, 120, (length - len(previous[:branch]),), generator=generator)
        previous = torch.cat([previous[:branch], own])
        examples.append(example(number, previous.tolist(), max(1, length // 2)))
    return examples


def models(family):
    """Return deltaw's and PEFT's model with the same factors on their linear layers."""
    base = recurrent_model(family, std=STD)
    targets = "all-linear"
    if family == "qwen3_next":
        targets = r".*_attn\.\w*proj\w*"  # PEFT's "all-linear" adapts other modules, see below
    excluded = ["out_proj"] if family in REJECTED else None
    theirs = with_peft(base, r=4, lora_alpha=8, target_modules=targets, exclude_modules=excluded).eval()
    attach(base, LoRAConfig(rank=4, alpha=8, target_modules=targets, exclude_modules=excluded))
    randomise(base)
    copy_to_peft(base, theirs)
    return base, theirs


def train_row_by_row(model, examples):
    """Return the summed loss and add its gradients, each row in its own forward pass."""
    total = 0.0
    for row in examples:
        tokens = torch.from_numpy(row.tokens).long()
        labels = torch.from_numpy(row.is_label[1:])
        if labels.any():
            logits = model(input_ids=tokens[None], use_cache=False).logits[0, :-1]
            loss = F.cross_entropy(logits[labels], tokens[1:][labels], reduction="sum")
            loss.backward()
            total += loss.item()
    return total


def assert_equal_training(family, lengths, batcher):
    ours, theirs = models(family)
    examples = rows_of_lengths(lengths)
    expected = train_row_by_row(theirs, examples)
    objective = CausalObjective(ours)
    total = 0.0
    with contextlib.nullcontext() if batcher.padded else packed_rows(ours):
        for batch in batcher.batches(examples):
            loss = objective(batch)
            loss.backward()
            total += loss.item()
    assert total == pytest.approx(expected, rel=TOLERANCE)
    pairs = [(name, ours_as_peft(a.grad), b.grad) for name, a, b in factor_pairs(ours, theirs)]
    largest = max(float(expected.abs().max()) for _, _, expected in pairs)
    for name, actual, expected in pairs:
        difference = float((actual - expected).abs().max())
        assert difference <= TOLERANCE * largest, name
        assert difference <= 100 * TOLERANCE * float(expected.abs().max()), name


def adapted_modules(model, kind):
    return {
        name.removeprefix("base_model.model.") for name, module in model.named_modules() if isinstance(module, kind)
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_targets_equal_those_of_peft(family):
    base = recurrent_model(family)
    if family in REJECTED:
        with pytest.raises(ValueError, match="out_proj"):
            with_peft(base, target_modules="all-linear")
        with pytest.raises(UserError, match="out_proj"):
            attach(base, LoRAConfig(target_modules="all-linear"))
        return
    expected = adapted_modules(with_peft(base, target_modules="all-linear"), LoraLayer)
    attach(base, LoRAConfig(target_modules="all-linear"))
    if family == "qwen3_next":
        # PEFT replaces the names of the shared expert's projections by the parameters of the routed experts and the
        # router, as it does for files of older versions. deltaw's targets are linear modules.
        expected = {name for name in expected if not name.endswith(("mlp.experts", "base_layer", "mlp.gate"))}
        shared = {
            f"model.layers.{n}.mlp.shared_expert.{kind}_proj" for n in range(4) for kind in ("gate", "up", "down")
        }
        expected |= shared
    assert adapted_modules(base, LoRALayer) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_with_shared_prefixes_train_like_peft_row_by_row(family):
    assert_equal_training(family, SAMPLE_LENGTHS, CausalMicroBatcher(400, True, False))


@pytest.mark.parametrize("family", ["qwen3_5_text", "lfm2", "granitemoehybrid"])
def test_padded_rows_train_like_peft_row_by_row(family):
    assert_equal_training(family, SAMPLE_LENGTHS, CausalMicroBatcher(400, False, True))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_all_lengths_train_like_peft_row_by_row(family):
    assert_equal_training(family, ALL_LENGTHS, CausalMicroBatcher(3000, True, False))
