"""A reward model: `task: sequence-classification` on pairs of answers, against TRL and in whole runs."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel

from deltaw.data import DataSettings
from deltaw.data.example import LabeledExample
from deltaw.data.images import LabelMicroBatcher
from deltaw.data.reward_pairs import RewardPair, RewardReader
from deltaw.errors import UserError
from deltaw.runs.fit import fit
from deltaw.runtime.packed import padded_rows
from deltaw.training.origin import score_run
from deltaw.training.tasks.labels import LabelObjective, evaluate_labels
from tests.byte_models import byte_tokenizer
from tests.conftest import COLORS, write_rows
from tests.training.runs import held_out_rows, metrics, opened
from tests.training.test_label_objective import model_of
from tests.training.test_losses import assert_gradients, gradients
from tests.training.test_preference import trl_step

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def pairs_of():
    random = np.random.default_rng(0)
    found = []
    for number in range(6):
        texts = [random.integers(3, 97, length).astype(np.int32) for length in random.integers(3, 12, 2)]
        rows = tuple(LabeledExample(number + 1, tokens, 0.4 * number) for tokens in texts)
        found.append(RewardPair(rows, 0.4 * number))
    return found


def scores(model, pair):
    """Of each row alone."""
    return [model(input_ids=torch.from_numpy(row.tokens.astype(np.int64))[None]).logits[0, 0] for row in pair.rows]


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("budget", [30, 1000])
def test_losses_gradients_and_scores_are_those_of_rows_alone(family, budget):
    model = model_of(family, outputs=1)
    exact = copy.deepcopy(model).double()
    groups = pairs_of()
    rewards = [scores(exact, pair) for pair in groups]
    margins = [better - worse - pair.margin for (better, worse), pair in zip(rewards, groups, strict=True)]
    loss_alone = -sum(margin.sigmoid().log() for margin in margins)
    rewards = np.array([[float(score.detach()) for score in pair] for pair in rewards])
    expected = gradients(exact, loss_alone)
    objective = LabelObjective(model, "sequence-classification")
    batcher = LabelMicroBatcher(budget, "cpu")
    shapes = batcher.shapes(groups)
    batches = list(batcher.batches(groups))
    assert shapes == [tuple(batch.inputs["input_ids"].shape) for batch in batches]
    assert all(batch.rows % 2 == 0 for batch in batches) and (len(batches) > 1) == (budget == 30)
    assert objective.units(groups) == len(groups) == sum(batch.label_tokens for batch in batches)
    with padded_rows(model):
        loss = sum(objective(batch) for batch in batches)
        found = gradients(model, loss)
        evaluation = evaluate_labels(objective, groups, batcher)
    assert float(loss.detach()) == pytest.approx(float(loss_alone.detach()), rel=1e-5)
    assert_gradients(found, expected, 5e-5)
    assert evaluation.predictions == pytest.approx(rewards, rel=1e-4, abs=1e-5)
    right = (rewards @ [1, -1] > 0).mean()
    assert evaluation.main == "accuracy" and evaluation.metrics["accuracy"] == pytest.approx(right)
    assert evaluation.interval[0] <= right <= evaluation.interval[1]
    assert objective.watched.means()["accuracy"] == pytest.approx(right)


def test_the_loss_is_that_of_trls_trainer(tmp_path):
    model = model_of("llama", outputs=1, pad=0)
    groups = pairs_of()
    told = ((*(row.tokens.tolist() for row in pair.rows), pair.margin) for pair in groups)
    columns = [{"chosen_ids": chosen, "rejected_ids": rejected, "margin": margin} for chosen, rejected, margin in told]
    end = "<|endoftext|>"
    _, _, theirs, expected = trl_step("Reward", model, columns, tmp_path, eos_token=end, pad_token=end)
    objective = LabelObjective(model, "sequence-classification")
    with padded_rows(model):
        batches = LabelMicroBatcher(40, "cpu").batches(groups)
        ours = sum(objective(batch) for batch in batches) / objective.units(groups)
        found = gradients(model, ours)
    assert float(ours.detach()) == pytest.approx(theirs, rel=1e-4)
    assert_gradients(found, expected, 1e-4, floor=1e-4)


def rows_with(**more):
    return [{"prompt": f"paint it {c}", "chosen": c[0] * 3, "rejected": c[1:3] + "!", **more} for c in COLORS]


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    """A tiny BERT whose tokenizer has no chat template, and puts a token around each text."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=259, max_position_embeddings=128, **SHAPE)).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_a_run_learns_which_answer_is_better_and_is_read_again(kind, settings, tmp_path, encoder_folder, model_folder):
    path = write_rows(tmp_path / "pairs.jsonl", rows_with(**({"margin": 0.5} if kind == "encoder" else {})))
    changes = {"model": str(encoder_folder)} if kind == "encoder" else {}
    changes |= {"task": "sequence-classification", "data": {"train": str(path), "eval": 3}}
    result = fit(settings(tmp_path / "run", **changes, train={"epochs": 6, "eval_every": 9}))
    evals = [line["eval"] for line in metrics(result.output, "eval")]
    assert evals[-1]["loss"] < evals[0]["loss"] and evals[-1]["accuracy"] == 1
    steps = metrics(result.output, "learning_rate")
    assert steps[-1]["margin"] > steps[0]["margin"] and steps[0]["label_tokens"] == steps[0]["rows"]
    settings_of_adapter = json.loads((result.output / "adapter_config.json").read_text())
    assert settings_of_adapter["task_type"] == "SEQ_CLS" and settings_of_adapter["modules_to_save"]
    run = opened(result.output)
    held_out = held_out_rows(run)
    score = score_run(run, held_out).evaluation
    assert score.metrics == pytest.approx(result.evaluation.metrics, rel=1e-5)
    every, report = run.task.read_file(str(path), run.config.data, run.classes)
    assert len(every) == len(COLORS) and report.form == "preference pairs"
    if kind == "encoder":
        return
    # PEFT reads the adapter with its head.
    model = AutoModelForSequenceClassification.from_pretrained(model_folder, num_labels=1).eval()
    theirs = PeftModel.from_pretrained(model, str(result.output)).eval()
    with torch.no_grad():
        found = [list(map(float, scores(theirs, pair))) for pair in held_out]
    assert np.array(found) == pytest.approx(score.predictions, rel=1e-4, abs=1e-5)


def test_texts_of_an_encoder_are_told_apart_and_margins_are_numbers(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    path = write_rows(tmp_path / "pairs.jsonl", rows_with(margin=0.5))
    prepared = RewardReader(DataSettings(train=str(path), eval=None), tokenizer).prepared()
    (row, other), margin = prepared.train[0].rows, prepared.train[0].margin
    assert margin == row.label == other.label == 0.5
    texts = [tokenizer.decode(row.tokens[row.segments == side]) for side in (0, 1)]
    assert texts == [f"paint it {COLORS[0]}", COLORS[0][0] * 3]
    assert prepared.report.unused_columns == ()
    bad = write_rows(tmp_path / "bad.jsonl", [*rows_with(margin=0.5), *rows_with(margin="much")[:1]])
    with pytest.raises(UserError, match="'margin' must be a number"):
        RewardReader(DataSettings(train=str(bad)), tokenizer).file(str(bad))
    kept, report = RewardReader(DataSettings(train=str(bad), bad_rows="skip"), tokenizer).file(str(bad))
    assert len(kept) == len(COLORS) and report.skipped == 1
