"""Task ``preference`` with unpaired completions: KTO matches TRL's trainer, and complete runs learn."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from deltaw.cli import main
from deltaw.data.example import RowGroup
from deltaw.runs.data_checks import check_data
from deltaw.runs.fit import fit
from deltaw.runtime.packed import packed_rows
from deltaw.settings.config import RunConfig
from deltaw.tasks.preference.settings import PreferenceSettings
from deltaw.tasks.preference.task import PreferenceTask, UnpairedMicroBatcher
from deltaw.tasks.preference.unpaired_loss import UnpairedLoss
from deltaw.training.losses import RowLogProbs
from tests.byte_models import byte_tokenizer, tiny_llama
from tests.conftest import COLORS, refusal, write_rows
from tests.training.loops import example
from tests.training.runs import (
    RecordingCallback,
    assert_same_run,
    load_eval_rows,
    losses,
    metrics,
    open_on_cpu,
    stopped_run,
)
from tests.training.test_losses import assert_gradients, gradients, log_prob
from tests.training.test_preference import perturbed_copy, trl_rows, trl_step

WEIGHTED = PreferenceSettings(loss="kto", beta=0.3, desirable_weight=1.5, undesirable_weight=0.7)


@pytest.mark.parametrize("share", [0.02, -0.02], ids=["near", "other side"])
def test_loss_and_gradients_match_trl_trainer(share, tmp_path):
    base = tiny_llama(initializer_range=0.3)
    policy = perturbed_copy(base, share)
    texts = [{"prompt": f"paint {c} ", "completion": c[: 2 + n % 3], "label": n % 3 != 0} for n, c in enumerate(COLORS)]
    options = {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.7, "train_sampling_strategy": "sequential"}
    trainer, batch, theirs, expected = trl_step("KTO", policy, texts, tmp_path, reference=base, **options)
    pairs = zip(trl_rows(batch), trl_rows(batch, "KL_"), strict=True)
    task = PreferenceTask(byte_tokenizer(), settings=WEIGHTED)
    batcher = UnpairedMicroBatcher(60, True, False, "cpu")
    answers = task.add_reference_log_probs(base, [RowGroup(pair) for pair in pairs], batcher)
    objective = task.objective(policy)
    assert len(batcher.shapes(answers)) > 1
    with packed_rows(policy):
        objective.start_step(answers, batcher)
        ours = sum(objective(part) for part in batcher.batches(answers)) / objective.units(answers)
        actual = gradients(policy, ours)
    (divergence,) = trainer._metrics["eval"]["kl"]  # the model is in eval mode
    assert float(objective.unpaired.divergence) == pytest.approx(divergence, rel=1e-4)
    assert float(ours.detach()) == pytest.approx(theirs, rel=1e-4)
    assert_gradients(actual, expected, 1e-4, floor=0)


def test_divergence_is_clamped_to_zero_and_has_no_gradient():
    values = torch.tensor([-1.0, -2.0], requires_grad=True)
    rows = tuple(example(0, range(3), 2, reference=r, desired=d) for r, d in ((-1.5, True), (-1.0, False)))
    logs = RowLogProbs(values, torch.tensor([0, 1]), torch.tensor([0, 1]), rows)
    loss = UnpairedLoss(WEIGHTED)
    loss.estimate(torch.tensor([-2.0, 2.0]))
    assert float(loss.divergence) == 0
    assert loss.divergence_sums(logs).tolist() == [-0.5, 2] and not loss.divergence_sums(logs).requires_grad
    loss.estimate(torch.tensor([0.6, 2.0]))
    assert float(loss.divergence) == pytest.approx(0.3)
    results = loss.per_row_losses(logs)
    exact = [1.5 * (1 - 1 / (1 + np.exp(-0.3 * 0.2))), 0.7 * (1 - 1 / (1 + np.exp(-0.3 * 1.3)))]
    assert results.losses.tolist() == pytest.approx(exact)
    assert results.accuracies.tolist() == [1, 1] and results.rewards.tolist() == pytest.approx([0.15, -0.3])


@pytest.fixture(scope="module")
def answers_file(tmp_path_factory):
    """Ten prompts, each with a desired completion of one letter and an undesired one of two."""
    answers = ((c, answer, good) for c in COLORS for answer, good in ((c[0], True), (c[1:3], False)))
    rows = ({"prompt": f"paint it {c}", "completion": answer, "label": good} for c, answer, good in answers)
    return write_rows(tmp_path_factory.mktemp("answers") / "answers.jsonl", rows)


@pytest.fixture(scope="module")
def make_config(settings, answers_file):
    def make(output, **changes):
        config = {"preference": {"loss": "kto"}, "data": {"train": str(answers_file), "eval": 6}}
        return settings(output, task="preference", **config, **changes)

    return make


@pytest.fixture(scope="module")
def trained_run(make_config, tmp_path_factory):
    return fit(make_config(tmp_path_factory.mktemp("judged") / "run", train={"epochs": 8, "eval_every": 12}))


def test_run_increases_reward_margin_of_eval_rows(trained_run):
    evals = [line["eval"] for line in metrics(trained_run.output, "eval")]
    assert evals[-1]["margin"] > evals[0]["margin"] + 0.05 and evals[-1]["loss"] < evals[0]["loss"]
    eval_metrics = trained_run.evaluation.metrics
    low, high = trained_run.evaluation.interval
    assert low <= eval_metrics["accuracy"] <= high and eval_metrics["accuracy"] > 0.6 and eval_metrics["kl"] >= 0
    steps = metrics(trained_run.output, "learning_rate")
    assert steps[0]["loss"] == pytest.approx(0.5, rel=1e-5)  # the initial policy equals the reference
    assert {"accuracy", "kl"} <= steps[0].keys() and steps[0]["label_tokens"] == steps[0]["rows"]


def test_evaluation_uses_base_model_as_reference_and_all_rows(trained_run, model_folder):
    run = open_on_cpu(trained_run.output)
    exact = open_on_cpu(model_folder).model
    eval_rows = load_eval_rows(run)
    with torch.no_grad():
        ratios = [[float(log_prob(run.model, r) - log_prob(exact, r)) for r in group.rows] for group in eval_rows]
    ratios = np.array(ratios)
    divergence = max(0.0, ratios[:, 1].mean())
    signs = np.array([1 if group.rows[0].desired else -1 for group in eval_rows])
    expected = 1 - 1 / (1 + np.exp(-0.1 * signs * (ratios[:, 0] - divergence)))
    score = run.score(eval_rows).evaluation.metrics
    assert score["loss"] == pytest.approx(expected.mean(), rel=1e-4)
    assert score["kl"] == pytest.approx(divergence, rel=1e-3, abs=1e-5)
    assert score["loss"] == pytest.approx(trained_run.evaluation.metrics["loss"], rel=1e-4)
    with run.base():
        at_base = run.score(eval_rows).evaluation.metrics
    assert at_base["accuracy"] == 0.5 and at_base["loss"] == 0.5 and abs(score["loss"] - 0.5) > 1e-3


def test_run_is_independent_of_microbatches_and_resumes_bit_identical(make_config, tmp_path):
    changes = {"train": {"epochs": 1, "checkpoint_every": 2}}
    fit(make_config(tmp_path / "whole", **changes))
    small = fit(make_config(tmp_path / "small", train={**changes["train"], "tokens_per_pass": 80})).output
    assert losses(small) == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
    stopped_run(make_config(tmp_path / "run", **changes), 3)
    assert fit(make_config(tmp_path / "run", **changes)).resumed_from_step >= 2
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_rows_without_reference_are_rejected():
    logs = RowLogProbs(torch.zeros(1), torch.tensor([0]), torch.tensor([0]), (example(1, range(3), 2, desired=True),))
    refusal(UnpairedLoss(WEIGHTED).per_row_losses, logs, match="reference model")


@pytest.mark.parametrize("label", [True, False])
def test_single_kind_of_answers_is_reported_by_check_and_training(settings, tmp_path, label):
    rows = write_rows(
        tmp_path / "rows.jsonl", [{"prompt": f"paint {c}", "completion": c, "label": label} for c in COLORS]
    )
    config = RunConfig.read(settings(tmp_path / "run", task="kto", data={"train": str(rows)}, train={"max_steps": 1}))
    (finding,) = [finding for finding in check_data(config).findings if finding.name == "one_label"]
    callback = RecordingCallback()
    fit(config, callback=callback)
    assert finding.text in callback


@pytest.mark.parametrize("task", ["kto", "KTO", "preference"])
def test_data_check_knows_aliases_of_tasks(tmp_path, model_folder, capsys, task):
    rows = write_rows(
        tmp_path / "rows.jsonl", [{"prompt": f"paint {c}", "completion": c, "label": True} for c in COLORS]
    )
    with pytest.raises(SystemExit) as exit_info:
        main(["data", "check", str(rows), "--task", task, "--model", str(model_folder), "--json"])
    assert not exit_info.value.code
    assert "one_label" in [finding["name"] for finding in json.loads(capsys.readouterr().out)["findings"]]
