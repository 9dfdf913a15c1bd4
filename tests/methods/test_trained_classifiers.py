"""Every method on an encoder with a new head: the head is trained and no unreported parameter changes."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from deltaw.data.example import LabeledExample
from deltaw.methods.base import Method
from deltaw.methods.files import method_from_folder
from deltaw.runtime.padded import padded_rows
from deltaw.tasks.classification.objective import LabelObjective
from deltaw.training.batchers import LabelMicroBatcher
from deltaw.training.rendered_rows import render_example
from tests.methods.rows import classifier
from tests.methods.test_trained_exactly import METHODS, changed_names, check_moved, run, values_of

HEADS = {"bert": ["classifier"], "distilbert": ["pre_classifier", "classifier"], "llama": ["score"]}


def objective(model: PreTrainedModel) -> LabelObjective:
    return LabelObjective(model, "sequence-classification")


def rows() -> list[LabeledExample]:
    rng = np.random.default_rng(0)
    return [LabeledExample(n + 1, rng.integers(3, 60, size=5 + n).astype(np.int32), n % 3) for n in range(6)]


def logits(model: PreTrainedModel, method: Method | None) -> torch.Tensor:
    """Return the logits, computed row by row to avoid padding."""
    examples = [row if method is None else render_example(row, method) for row in rows()]
    with torch.no_grad():
        ids = [torch.from_numpy(row.tokens).long()[None] for row in examples]
        return torch.cat([model(input_ids=i).logits for i in ids])


@pytest.mark.each_value
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", HEADS)
def test_head_is_trained_with_every_method_and_restored_from_file(family: str, name: str, tmp_path: Path) -> None:
    base = classifier(family)
    heads = HEADS[family]
    model = copy.deepcopy(base)
    before = values_of(base)
    method = METHODS[name]()
    with padded_rows(model):
        start = run(model, method, objective, LabelMicroBatcher(1024), rows(), extra_modules=heads)
    check_moved(model, method, start)
    moved = changed_names(model, before)
    head_names = {n for n in before if n.startswith(tuple(f"{head}." for head in heads))}
    assert head_names <= moved
    if name in ("lora", "head", "prompt"):
        assert moved == head_names
    assert moved <= {n.removesuffix(".values") for n in start}

    method.save(model, tmp_path, base_model="tiny")
    loaded = copy.deepcopy(base)
    restored = method_from_folder(tmp_path, None)
    restored.load(loaded, tmp_path)
    expected = logits(model, method)
    assert (expected - logits(base, None)).norm() > 1e-2 * expected.norm()
    torch.testing.assert_close(logits(loaded, restored), expected, rtol=1e-6, atol=1e-6)
    assert restored.can_restore_base(loaded)
    with restored.base_model_active(loaded):
        assert torch.equal(logits(loaded, None), logits(base, None))
