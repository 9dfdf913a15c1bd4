"""The task `preference` over single answers: KTO against TRL's trainer, and whole runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deltaw.data.example import RowGroup
from deltaw.errors import UserError
from deltaw.runs.fit import fit
from deltaw.runtime.packed import packed_rows
from deltaw.task_settings import PreferenceSettings
from deltaw.training.losses import RowLogProbs, UnpairedLoss
from deltaw.training.origin import score_run
from deltaw.training.tasks.causal import PreferenceTask, UnpairedMicroBatcher
from tests.byte_models import byte_tokenizer, tiny_llama
from tests.conftest import COLORS, write_rows
from tests.training.loops import example
from tests.training.runs import assert_same_run, held_out_rows, losses, metrics, opened, stopped_run
from tests.training.test_losses import assert_gradients, gradients, log_prob
from tests.training.test_preference import moved, trl_rows, trl_step

WEIGHTED = PreferenceSettings(loss="kto", beta=0.3, desirable_weight=1.5, undesirable_weight=0.7)


@pytest.mark.parametrize("share", [0.02, -0.02], ids=["near", "other side"])
def test_loss_and_gradients_of_a_model_are_those_of_trls_trainer(share, tmp_path):
    base = tiny_llama(initializer_range=0.3)
    policy = moved(base, share)
    texts = [{"prompt": f"paint {c} ", "completion": c[: 2 + n % 3], "label": n % 3 != 0} for n, c in enumerate(COLORS)]
    given = {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.7, "train_sampling_strategy": "sequential"}
    trainer, batch, theirs, expected = trl_step("KTO", policy, texts, tmp_path, reference=base, **given)
    pairs = zip(trl_rows(batch), trl_rows(batch, "KL_"), strict=True)
    task = PreferenceTask(byte_tokenizer(), settings=WEIGHTED)
    batcher = UnpairedMicroBatcher(60, True, False, "cpu")
    answers = task.referenced(base, [RowGroup(pair) for pair in pairs], batcher)
    objective = task.objective(policy)
    assert len(batcher.shapes(answers)) > 1
    with packed_rows(policy):
        objective.begin(answers, batcher)
        ours = sum(objective(part) for part in batcher.batches(answers)) / objective.units(answers)
        found = gradients(policy, ours)
    (divergence,) = trainer._metrics["eval"]["kl"]  # the model is in eval mode
    assert float(objective.unpaired.divergence) == pytest.approx(divergence, rel=1e-4)
    assert float(ours.detach()) == pytest.approx(theirs, rel=1e-4)
    assert_gradients(found, expected, 1e-4, floor=0)


def test_the_divergence_is_no_less_than_zero_and_has_no_gradient():
    values = torch.tensor([-1.0, -2.0], requires_grad=True)
    rows = tuple(example(0, range(3), 2, reference=r, desired=d) for r, d in ((-1.5, True), (-1.0, False)))
    logs = RowLogProbs(values, torch.tensor([0, 1]), torch.tensor([0, 1]), rows)
    loss = UnpairedLoss(WEIGHTED)
    loss.estimate(torch.tensor([-2.0, 2.0]))
    assert float(loss.divergence) == 0
    assert loss.distance(logs).tolist() == [-0.5, 2] and not loss.distance(logs).requires_grad
    loss.estimate(torch.tensor([0.6, 2.0]))
    assert float(loss.divergence) == pytest.approx(0.3)
    found = loss.of_rows(logs)
    exact = [1.5 * (1 - 1 / (1 + np.exp(-0.3 * 0.2))), 0.7 * (1 - 1 / (1 + np.exp(-0.3 * 1.3)))]
    assert found.losses.tolist() == pytest.approx(exact)
    assert found.accuracies.tolist() == [1, 1] and found.rewards.tolist() == pytest.approx([0.15, -0.3])


@pytest.fixture(scope="module")
def answers_file(tmp_path_factory):
    """Ten questions, each with an answer; one of three letters is undesired."""
    answers = ((c, answer, good) for c in COLORS for answer, good in ((c[0], True), (c[1:3], False)))
    rows = ({"prompt": f"paint it {c}", "completion": answer, "label": good} for c, answer, good in answers)
    return write_rows(tmp_path_factory.mktemp("answers") / "answers.jsonl", rows)


@pytest.fixture(scope="module")
def judging(settings, answers_file):
    def make(output, **changes):
        given = {"preference": {"loss": "kto"}, "data": {"train": str(answers_file), "eval": 6}}
        return settings(output, task="preference", **given, **changes)

    return make


@pytest.fixture(scope="module")
def judged(judging, tmp_path_factory):
    return fit(judging(tmp_path_factory.mktemp("judged") / "run", train={"epochs": 12, "eval_every": 20}))


def test_a_run_shifts_the_rewards_of_answers_that_it_did_not_see(judged):
    evals = [line["eval"] for line in metrics(judged.output, "eval")]
    assert evals[-1]["margin"] > evals[0]["margin"] + 0.05 and evals[-1]["loss"] < evals[0]["loss"]
    found, (low, high) = judged.evaluation.metrics, judged.evaluation.interval
    assert low <= found["accuracy"] <= high and found["accuracy"] > 0.6 and found["kl"] >= 0
    steps = metrics(judged.output, "learning_rate")
    assert steps[0]["loss"] == pytest.approx(0.5, rel=1e-5)  # the adapter begins as the base model
    assert {"accuracy", "kl"} <= steps[0].keys() and steps[0]["label_tokens"] == steps[0]["rows"]


def test_the_reference_is_the_base_model_and_an_evaluation_counts_all_rows(judged, model_folder):
    run, exact = opened(judged.output), opened(model_folder).model
    held_out = held_out_rows(run)
    with torch.no_grad():
        ratios = [[float(log_prob(run.model, r) - log_prob(exact, r)) for r in group.rows] for group in held_out]
    ratios = np.array(ratios)
    divergence = max(0.0, ratios[:, 1].mean())
    signs = np.array([1 if group.rows[0].desired else -1 for group in held_out])
    expected = 1 - 1 / (1 + np.exp(-0.1 * signs * (ratios[:, 0] - divergence)))
    score = score_run(run, held_out).evaluation.metrics
    assert score["loss"] == pytest.approx(expected.mean(), rel=1e-4)
    assert score["kl"] == pytest.approx(divergence, rel=1e-3, abs=1e-5)
    assert score["loss"] == pytest.approx(judged.evaluation.metrics["loss"], rel=1e-4)
    with run.base():
        at_base = score_run(run, held_out).evaluation.metrics
    assert at_base["accuracy"] == 0.5 and at_base["loss"] == 0.5 and abs(score["loss"] - 0.5) > 1e-3


def test_microbatches_change_no_run_and_a_stopped_run_goes_on_equal_to_the_bit(judging, tmp_path):
    given = {"train": {"epochs": 1, "checkpoint_every": 2}}
    fit(judging(tmp_path / "whole", **given))
    small = fit(judging(tmp_path / "small", train={**given["train"], "tokens_per_pass": 80})).output
    assert losses(small) == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
    stopped_run(judging(tmp_path / "run", **given), 3)
    assert fit(judging(tmp_path / "run", **given)).resumed_from_step >= 2
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_virtual_tokens_come_before_both_rows(judging, tmp_path):
    found = losses(fit(judging(tmp_path / "run", method="prompt", train={"epochs": 4})).output)
    assert np.mean(found[-3:]) < np.mean(found[:3])


def test_rows_lacking_a_reference_are_refused():
    logs = RowLogProbs(torch.zeros(1), torch.tensor([0]), torch.tensor([0]), (example(1, range(3), 2, desired=True),))
    with pytest.raises(UserError, match="reference model"):
        UnpairedLoss(WEIGHTED).of_rows(logs)
