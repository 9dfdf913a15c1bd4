"""Groups of labeled texts in packed rows have the losses and gradients of single rows."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForSequenceClassification

from deltaw.data.example import LabeledExample, RowGroup
from deltaw.runtime.packed import packed_rows
from deltaw.tasks.classification.objective import LabelObjective, uses_first_token
from deltaw.tasks.classification.task import LabelTask
from deltaw.tasks.reranking.task import RerankingTask
from deltaw.training.batchers import BatcherOptions, LabelMicroBatcher

COMMON = {"vocab_size": 99, "num_labels": 1, "initializer_range": 0.4}
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {**COMMON, "max_position_embeddings": 64}
PACKED = {
    "bert": lambda: transformers.BertConfig(**SHAPE),
    "roberta": lambda: transformers.RobertaConfig(pad_token_id=1, type_vocab_size=1, **SHAPE),
    "electra": lambda: transformers.ElectraConfig(embedding_size=16, **SHAPE),
    "distilbert": lambda: transformers.DistilBertConfig(dim=32, hidden_dim=48, n_layers=2, n_heads=4, **COMMON),
    "llama": lambda: transformers.LlamaConfig(num_key_value_heads=2, pad_token_id=0, **SHAPE),
    "gpt2": lambda: transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, pad_token_id=0, **COMMON),
}


def build_model(family: str) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(PACKED[family]()).eval()


def make_groups(*, segments: bool) -> list[RowGroup]:
    """Return groups of two to five rows with a common beginning and very different lengths."""
    random = np.random.default_rng(0)
    groups = []
    for number in range(7):
        start = random.integers(3, 99, random.integers(5, 9))
        rows = []
        for _ in range(int(random.integers(2, 6))):
            end = random.integers(3, 99, random.integers(1, 30))
            kinds = np.repeat([0, 1], [len(start), len(end)]).astype(np.int8) if segments else None
            rows.append(LabeledExample(number, np.concatenate([start, end]).astype(np.int32), 0.0, kinds))
        groups.append(RowGroup(tuple(rows)))  # type: ignore[arg-type]
    return groups


def build_batcher(model: transformers.PreTrainedModel, groups: list[RowGroup], budget: int = 100) -> LabelMicroBatcher:
    task = LabelTask("sequence-classification")
    return task.batcher(model, groups, BatcherOptions("cpu", tokens_per_pass=budget))[0]  # type: ignore[return-value]


@pytest.mark.each_value
@pytest.mark.parametrize("family", list(PACKED))
@pytest.mark.parametrize("budget", [60, 10_000])
def test_losses_and_gradients_match_single_rows(family, budget):
    model = build_model(family)
    groups = make_groups(segments=family in ("bert", "electra"))
    exact = copy.deepcopy(model).double()
    expected = 0.0
    for group in groups:
        scores = []
        for row in group.rows:
            inputs = {"input_ids": torch.from_numpy(row.tokens.astype(np.int64))[None]}
            if row.segments is not None:
                inputs["token_type_ids"] = torch.from_numpy(row.segments.astype(np.int64))[None]
            scores.append(exact(**inputs).logits[0, 0])
        expected = expected - torch.stack(scores).log_softmax(0)[0]
    expected.backward()
    batcher = build_batcher(model, groups, budget)
    assert not batcher.padded and batcher.independent == (family not in ("llama", "gpt2"))
    batches = list(batcher.batches(groups))
    assert batcher.shapes(groups) == [tuple(batch.inputs["input_ids"].shape) for batch in batches]
    assert (len(batches) > 1) == (budget == 60)
    total = sum(len(row) for group in groups for row in group.rows)
    assert sum(batch.row_tokens for batch in batches) == total
    computed = sum(batch.tokens for batch in batches)
    # A decoder computes each common prefix once.
    assert computed == total if batcher.independent else computed < 0.8 * total
    objective = LabelObjective(model, "sequence-classification")
    with packed_rows(model, independent=batcher.independent):
        loss = 0.0
        for batch in batches:
            parts = objective.predictions(batch)[:, 0].split(list(batch.sizes))
            loss = loss - sum(part.log_softmax(0)[0] for part in parts)
        loss.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    gradients = ([p.grad.double().flatten() for p in m.parameters() if p.grad is not None] for m in (model, exact))
    ours, theirs = map(torch.cat, gradients)
    assert ours.shape == theirs.shape and (ours - theirs).norm() <= 2e-5 * theirs.norm()


def test_rows_of_a_group_are_consecutive():
    model = build_model("llama")
    groups = make_groups(segments=False)
    order = [row for batch in build_batcher(model, groups).batches(groups) for row in batch.examples]
    positions = {id(row): number for number, row in enumerate(order)}
    for group in groups:
        first = positions[id(group.rows[0])]
        assert [positions[id(row)] for row in group.rows] == list(range(first, first + len(group.rows)))


def test_head_with_mean_pooling_uses_padded_rows():
    shape = {**SHAPE, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    config = transformers.ModernBertConfig(**shape, classifier_pooling="mean")
    model = AutoModelForSequenceClassification.from_config(config).eval()
    assert not uses_first_token(model)
    groups = make_groups(segments=False)
    assert build_batcher(model, groups).padded
    assert uses_first_token(build_model("bert")) and not uses_first_token(build_model("llama"))


def test_virtual_tokens_use_padded_rows():
    groups = make_groups(segments=False)
    task = RerankingTask("reranking")
    batcher, _ = task.batcher(build_model("bert"), groups, BatcherOptions("cpu", virtual_tokens=4))
    assert batcher.padded
