"""Each method on an encoder with a new head: the head is trained beside every method, and nothing unsaid."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from deltaw.data.example import LabeledExample
from deltaw.data.images import LabelMicroBatcher
from deltaw.methods.base import Method
from deltaw.methods.files import method_of_folder
from deltaw.runtime.packed import padded_rows
from deltaw.training.seen import as_seen
from deltaw.training.tasks.labels import LabelObjective
from tests.methods.rows import classifier
from tests.methods.test_trained_exactly import METHODS, changed, check_moved, run, values_of

HEADS = {"bert": ["classifier"], "distilbert": ["pre_classifier", "classifier"], "llama": ["score"]}


def objective(model: PreTrainedModel) -> LabelObjective:
    return LabelObjective(model, "sequence-classification")


def rows() -> list[LabeledExample]:
    rng = np.random.default_rng(0)
    return [LabeledExample(n + 1, rng.integers(3, 60, size=5 + n).astype(np.int32), n % 3) for n in range(6)]


def logits(model: PreTrainedModel, method: Method | None) -> torch.Tensor:
    """Of one row at a time, so that no padding is in it."""
    examples = [row if method is None else as_seen(row, method) for row in rows()]
    with torch.no_grad():
        ids = [torch.from_numpy(row.tokens).long()[None] for row in examples]
        return torch.cat([model(input_ids=i).logits for i in ids])


@pytest.mark.each_value
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", HEADS)
def test_the_head_is_trained_with_every_method_and_comes_back_from_disk(family: str, name: str, tmp_path: Path) -> None:
    base, heads = classifier(family), HEADS[family]
    model, before, method = copy.deepcopy(base), values_of(base), METHODS[name]()
    with padded_rows(model):
        start = run(model, method, objective, LabelMicroBatcher(1024, "cpu"), rows(), extra_modules=heads)
    check_moved(model, method, start)
    moved = changed(model, before)
    of_heads = {n for n in before if n.startswith(tuple(f"{head}." for head in heads))}
    assert of_heads <= moved
    if name in ("lora", "head", "prompt"):
        assert moved == of_heads
    assert moved <= {n.removesuffix(".values") for n in start}

    method.save(model, tmp_path, base_model="tiny")
    loaded = copy.deepcopy(base)
    again = method_of_folder(tmp_path, None)
    again.load(loaded, tmp_path)
    expected = logits(model, method)
    assert (expected - logits(base, None)).norm() > 1e-2 * expected.norm()
    torch.testing.assert_close(logits(loaded, again), expected, rtol=1e-6, atol=1e-6)
    assert again.keeps_base(loaded)
    with again.without(loaded):
        assert torch.equal(logits(loaded, None), logits(base, None))
