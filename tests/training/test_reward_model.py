"""Reward models (``task: sequence-classification`` on preference pairs) match TRL and learn in complete runs."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel

from deltaw.data.example import LabeledExample
from deltaw.runs.fit import fit
from deltaw.runtime.padded import padded_rows
from deltaw.settings.data import DataSettings
from deltaw.tasks.classification.objective import LabelObjective
from deltaw.tasks.classification.rows import RewardPair, RewardReader
from deltaw.tasks.classification.task import evaluate_labels
from deltaw.training.batchers import LabelMicroBatcher
from tests.byte_models import byte_tokenizer
from tests.conftest import COLORS, refusal, write_rows
from tests.training.runs import load_eval_rows, metrics, open_on_cpu
from tests.training.test_label_objective import model_of
from tests.training.test_losses import assert_gradients, gradients
from tests.training.test_preference import trl_step

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def make_pairs():
    random = np.random.default_rng(0)
    pairs = []
    for number in range(6):
        texts = [random.integers(3, 97, length).astype(np.int32) for length in random.integers(3, 12, 2)]
        rows = tuple(LabeledExample(number + 1, tokens, 0.4 * number) for tokens in texts)
        pairs.append(RewardPair(rows, 0.4 * number))
    return pairs


def scores(model, pair):
    """Return the score of each row, computed without batching."""
    return [model(input_ids=torch.from_numpy(row.tokens.astype(np.int64))[None]).logits[0, 0] for row in pair.rows]


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("budget", [30, 1000])
def test_losses_gradients_and_scores_match_unbatched_rows(family, budget):
    model = model_of(family, outputs=1)
    exact = copy.deepcopy(model).double()
    groups = make_pairs()
    rewards = [scores(exact, pair) for pair in groups]
    margins = [better - worse - pair.margin for (better, worse), pair in zip(rewards, groups, strict=True)]
    loss_alone = -sum(margin.sigmoid().log() for margin in margins)
    rewards = np.array([[float(score.detach()) for score in pair] for pair in rewards])
    expected = gradients(exact, loss_alone)
    objective = LabelObjective(model, "sequence-classification")
    batcher = LabelMicroBatcher(budget, segments=True)
    shapes = batcher.shapes(groups)
    batches = list(batcher.batches(groups))
    assert shapes == [tuple(batch.inputs["input_ids"].shape) for batch in batches]
    assert all(batch.rows % 2 == 0 for batch in batches) and (len(batches) > 1) == (budget == 30)
    assert objective.units(groups) == len(groups) == sum(len(batch.sizes) for batch in batches)
    with padded_rows(model):
        loss = sum(objective(batch) for batch in batches)
        actual = gradients(model, loss)
        evaluation = evaluate_labels(objective, groups, batcher)
    assert float(loss.detach()) == pytest.approx(float(loss_alone.detach()), rel=1e-5)
    assert_gradients(actual, expected, 5e-5)
    assert evaluation.predictions == pytest.approx(rewards, rel=1e-4, abs=1e-5)
    accuracy = (rewards @ [1, -1] > 0).mean()
    assert evaluation.main == "accuracy" and evaluation.metrics["accuracy"] == pytest.approx(accuracy)
    assert evaluation.interval[0] <= accuracy <= evaluation.interval[1]
    assert objective.accumulator.means()["accuracy"] == pytest.approx(accuracy)


def test_loss_matches_trl_trainer(tmp_path):
    model = model_of("llama", outputs=1, pad=0)
    groups = make_pairs()
    ids = [[row.tokens.tolist() for row in pair.rows] for pair in groups]
    columns = [{"chosen_ids": c, "rejected_ids": r, "margin": p.margin} for (c, r), p in zip(ids, groups, strict=True)]
    end = "<|endoftext|>"
    _, _, theirs, expected = trl_step("Reward", model, columns, tmp_path, eos_token=end, pad_token=end)
    objective = LabelObjective(model, "sequence-classification")
    with padded_rows(model):
        batches = LabelMicroBatcher(40, segments=True).batches(groups)
        ours = sum(objective(batch) for batch in batches) / objective.units(groups)
        actual = gradients(model, ours)
    assert float(ours.detach()) == pytest.approx(theirs, rel=1e-4)
    assert_gradients(actual, expected, 1e-4, floor=1e-4)


def rows_with(**columns):
    return [{"prompt": f"paint it {c}", "chosen": c[0] * 3, "rejected": c[1:3] + "!", **columns} for c in COLORS]


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    """A tiny BERT and a tokenizer without a chat template that adds special tokens around each text."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=259, max_position_embeddings=128, **SHAPE)).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_run_learns_preference_and_can_be_opened(kind, settings, tmp_path, encoder_folder, model_folder):
    path = write_rows(tmp_path / "pairs.jsonl", rows_with(**({"margin": 0.5} if kind == "encoder" else {})))
    changes = {"model": str(encoder_folder)} if kind == "encoder" else {}
    changes |= {"task": "sequence-classification", "data": {"train": str(path), "eval": 3}}
    result = fit(settings(tmp_path / "run", **changes, train={"epochs": 6, "eval_every": 9}))
    evals = [line["eval"] for line in metrics(result.output, "eval")]
    assert evals[-1]["loss"] < evals[0]["loss"] and evals[-1]["accuracy"] == 1
    steps = metrics(result.output, "learning_rate")
    assert steps[-1]["margin"] > steps[0]["margin"] and steps[0]["label_tokens"] == steps[0]["rows"]
    adapter_config = json.loads((result.output / "adapter_config.json").read_text())
    assert adapter_config["task_type"] == "SEQ_CLS" and adapter_config["modules_to_save"]
    run = open_on_cpu(result.output)
    eval_pairs = load_eval_rows(run)
    score = run.score(eval_pairs).evaluation
    assert score.metrics == pytest.approx(result.evaluation.metrics, rel=1e-5)
    all_rows, report = run.task.read_file(str(path), run.config.data, run.classes)
    assert len(all_rows) == len(COLORS) and report.form == "preference pairs"
    if kind == "encoder":
        return
    # PEFT loads the adapter with its head.
    model = AutoModelForSequenceClassification.from_pretrained(model_folder, num_labels=1).eval()
    theirs = PeftModel.from_pretrained(model, str(result.output)).eval()
    with torch.no_grad():
        scores_of_peft = [list(map(float, scores(theirs, pair))) for pair in eval_pairs]
    assert np.array(scores_of_peft) == pytest.approx(score.predictions, rel=1e-4, abs=1e-5)


def test_encoder_texts_have_segments_and_margins_are_numbers(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    path = write_rows(tmp_path / "pairs.jsonl", rows_with(margin=0.5))
    prepared = RewardReader(DataSettings(train=str(path), eval=None), tokenizer).prepare()
    first, second = prepared.train[0].rows
    margin = prepared.train[0].margin
    assert margin == first.label == second.label == 0.5
    texts = [tokenizer.decode(first.tokens[first.segments == side]) for side in (0, 1)]
    assert texts == [f"paint it {COLORS[0]}", COLORS[0][0] * 3] and prepared.report.unused_columns == ()
    bad = write_rows(tmp_path / "bad.jsonl", [*rows_with(margin=0.5), *rows_with(margin="much")[:1]])
    refusal(RewardReader(DataSettings(train=str(bad)), tokenizer).file, str(bad), match="'margin' must be a number")
    prepared_rows, report = RewardReader(DataSettings(train=str(bad), bad_rows="skip"), tokenizer).file(str(bad))
    assert len(prepared_rows) == len(COLORS) and report.skipped == 1
