"""Losses of the task ``preference``, its reference model, and complete runs."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.nn.functional import logsigmoid

from deltaw.data.example import Example, RowGroup
from deltaw.runs.fit import fit
from deltaw.runtime.packed import packed_rows
from deltaw.tasks.preference.losses import PreferenceLoss
from deltaw.tasks.preference.settings import PreferenceSettings
from deltaw.tasks.preference.task import PreferenceTask
from deltaw.training.batchers import CausalMicroBatcher
from deltaw.training.causal_objective import CausalObjective
from deltaw.training.losses import log1mexp
from deltaw.training.session import Session
from tests.byte_models import byte_tokenizer, tiny_llama
from tests.conftest import COLORS, refusal, write_rows
from tests.training.runs import assert_same_run, load_eval_rows, losses, metrics, open_on_cpu, slow_except, stopped_run
from tests.training.test_losses import METHODS, adapted, assert_gradients, gradients, log_prob, pairs

BETA = 0.3
LOSSES = {"dpo": {}, "dpo smoothed": {"label_smoothing": 0.2}, "ipo": {}, "orpo": {}, "simpo": {"gamma": 0.7}}
LOSSES["simpo smoothed"] = {"gamma": 0.7, "label_smoothing": 0.1}


def make_loss(name):
    return PreferenceLoss(PreferenceSettings(loss=name.split()[0], beta=BETA, **LOSSES[name]))


def make_sums(count=7, seed=0):
    """Return summed log-probabilities, label counts and reference sums of pairs, in fp64."""
    random = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, 12, (count, 2), generator=random).double()
    sums = -counts * (0.05 + 3 * torch.rand(count, 2, generator=random, dtype=torch.float64))
    return sums, counts, sums + torch.randn(count, 2, generator=random, dtype=torch.float64)


def reference_losses(name, sums, counts, references):
    """Evaluate the definitions of the losses, one pair at a time."""
    kind = name.split()[0]
    options = LOSSES[name]
    smooth = options.get("label_smoothing", 0.0)
    losses = []
    for (sc, sr), (nc, nr), (rc, rr) in zip(sums, counts, references, strict=True):
        if kind == "ipo":
            losses.append((((sc - rc) / nc - (sr - rr) / nr) - 1 / (2 * BETA)) ** 2)
            continue
        if kind == "orpo":
            odds = [torch.exp(x) / (1 - torch.exp(x)) for x in (sc / nc, sr / nr)]
            losses.append(-sc / nc - BETA * torch.log(torch.sigmoid(torch.log(odds[0] / odds[1]))))
            continue
        logits = BETA * ((sc - rc) - (sr - rr))
        if kind == "simpo":
            logits = BETA * (sc / nc - sr / nr) - options["gamma"]
        losses.append(-(1 - smooth) * logsigmoid(logits) - smooth * logsigmoid(-logits))
    return torch.stack(losses)


@pytest.mark.parametrize("name", ["orpo", "simpo", "simpo smoothed"])
def test_reference_free_losses_match_trl(name):
    pytest.importorskip("trl", reason="TRL is not installed")
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    sums, counts, _ = make_sums()
    sums = sums.float()
    counts = counts.float()
    options = LOSSES[name]
    trainer_options = {"beta": BETA, "alpha": 0.0, "loss_type": "simpo", "accelerator": SimpleNamespace(device="cpu")}
    trainer_options |= {"simpo_gamma": options.get("gamma"), "label_smoothing": options.get("label_smoothing", 0.0)}
    trainer = SimpleNamespace(**trainer_options)
    ours_sums = sums.clone().requires_grad_()
    expected = sums.clone().requires_grad_()
    ours = make_loss(name).pair_losses(ours_sums, counts)
    means = expected / counts
    if name == "orpo":
        ratio, chosen, rejected, *_ = ORPOTrainer.odds_ratio_loss(trainer, means[:, 0], means[:, 1])
        theirs = -means[:, 0] - ratio  # in TRL, the first term is a mean over the tokens of a batch
    else:
        theirs, chosen, rejected = CPOTrainer.cpo_loss(trainer, means[:, 0], means[:, 1])
    torch.testing.assert_close(ours.losses, theirs)
    torch.testing.assert_close(ours.rewards, torch.stack([chosen, rejected], 1))
    gradient = torch.autograd.grad(ours.losses.sum(), ours_sums)
    reference = torch.autograd.grad(theirs.sum(), expected)
    torch.testing.assert_close(gradient, reference)


def with_references(model, groups):
    """Return the pairs with reference sums near those of the model."""
    random = np.random.default_rng(1)
    with torch.no_grad():
        rows = [replace(r, reference=float(log_prob(model, r)) + random.normal()) for g in groups for r in g.rows]
    return [RowGroup(pair) for pair in zip(rows[::2], rows[1::2], strict=True)]


def trl_step(kind, model, rows, folder, **options):
    """Return a TRL trainer, a batch of all rows, and its loss and gradients.

    ``options`` are the trainer's arguments and optionally a ``reference`` model.
    """
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    model_options = {"ref_model": copy.deepcopy(options.pop("reference"))} if "reference" in options else {}
    options |= {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none"}
    options |= {"output_dir": str(folder), "per_device_train_batch_size": len(rows), "disable_dropout": False}
    args = getattr(trl, f"{kind}Config")(**options)
    model_options |= {"train_dataset": Dataset.from_list(rows), "processing_class": byte_tokenizer()}
    trainer = getattr(trl, f"{kind}Trainer")(model=model, args=args, **model_options)
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(model, batch)
    return trainer, batch, float(loss.detach()), gradients(model, loss)


def perturbed_copy(base, share=0.02):
    """Return a copy of a model with perturbed weights."""
    policy = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(share * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return policy


def trl_rows(batch, prefix=""):
    """Convert rows of a TRL batch to examples."""
    rows = []
    keys = [prefix + key for key in ("input_ids", "completion_mask", "attention_mask")]
    for ids, mask, attended in zip(*(batch[key] for key in keys), strict=True):
        tokens = ids[attended.bool()].numpy().astype(np.int32)
        is_label = mask[attended.bool()].bool().numpy()
        desired = bool(batch["label"][len(rows)]) if "label" in batch else None
        rows.append(Example(len(rows), tokens, is_label, int((~is_label).sum()), None, desired=desired))
    return rows


@pytest.mark.parametrize("name", ["dpo", "ipo"])
def test_loss_and_gradients_match_trl_trainer(name, tmp_path):
    base = tiny_llama(initializer_range=0.3)
    policy = perturbed_copy(base)
    texts = [{"prompt": f"paint {c} ", "chosen": c[0] * (2 + n), "rejected": c[1:]} for n, c in enumerate(COLORS)]
    kind = "sigmoid" if name == "dpo" else "ipo"
    _, batch, theirs, expected = trl_step("DPO", policy, texts, tmp_path, reference=base, beta=BETA, loss_type=kind)
    rows = trl_rows(batch)
    groups = [RowGroup(pair) for pair in zip(rows[: len(texts)], rows[len(texts) :], strict=True)]
    task = PreferenceTask(byte_tokenizer(), settings=make_loss(name).settings)
    batcher = CausalMicroBatcher(300, True, False, "cpu")
    groups = task.add_reference_log_probs(base, groups, batcher)
    objective = task.objective(policy)
    with packed_rows(policy):
        ours = sum(objective(batch) for batch in batcher.batches(groups)) / objective.units(groups)
        actual = gradients(policy, ours)
    assert float(ours.detach()) == pytest.approx(theirs, rel=1e-4)
    assert_gradients(actual, expected, 1e-4, floor=0)


def test_log1mexp_is_accurate_and_has_finite_gradients():
    x = torch.tensor([-1e-9, -1e-3, -0.6931, -0.6932, -5.0, -40.0, 0.0], requires_grad=True)
    values = log1mexp(x)
    values.sum().backward()
    exact = [math.log(-math.expm1(v)) for v in x[1:6].tolist()]
    assert values[1:6].tolist() == pytest.approx(exact, rel=1e-5)
    assert torch.isfinite(values).all() and torch.isfinite(x.grad).all()


@pytest.mark.each_value
@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("layout", ["shared", "apart", "padded"])
def test_gradients_match_separate_float64_forward_passes(name, method, layout):
    model = adapted("llama", METHODS[method]())
    exact = copy.deepcopy(model).double()
    groups = with_references(exact, pairs())
    sums = torch.stack([torch.stack([log_prob(exact, row) for row in pair.rows]) for pair in groups])
    counts = torch.tensor([[row.label_count for row in pair.rows] for pair in groups]).double()
    references = torch.tensor([[row.reference for row in pair.rows] for pair in groups]).double()
    by_definition = reference_losses(name, sums, counts, references).sum()
    expected = gradients(exact, by_definition)
    objective = CausalObjective(model, make_loss(name))
    batcher = CausalMicroBatcher(70, layout == "shared", layout == "padded", "cpu")
    assert len(batcher.shapes(groups)) > 1 and objective.units(groups) == len(groups)
    with contextlib.nullcontext() if layout == "padded" else packed_rows(model):
        loss = sum(objective(batch) for batch in batcher.batches(groups))
        actual = gradients(model, loss)
    assert float(loss.detach()) == pytest.approx(float(by_definition.detach()), rel=1e-5)
    assert_gradients(actual, expected, 5e-5)
    means = objective.accumulator.means()
    assert means["margin"] == pytest.approx(means["chosen_reward"] - means["rejected_reward"])


def test_settings_unsupported_by_loss_or_task_are_rejected(settings, tmp_path):
    for task, preference, message in [
        ("preference", {"loss": "ipo", "label_smoothing": 0.1}, "no label smoothing"),
        ("preference", {"loss": "kto", "label_smoothing": 0.1}, "no label smoothing"),
        ("preference", {"loss": "dpo", "desirable_weight": 2.0}, "weighs all answers alike"),
        ("preference", {"gamma": 1.0}, "no margin"),
        ("causal-lm", {"loss": "ipo"}, "does not apply to the task 'causal-lm'"),
        ("preference", {"beta": 0}, r"preference\.beta"),
    ]:
        error = refusal(fit, settings(tmp_path / "a", task=task, preference=preference), match=message)
        assert task == "causal-lm" or "preference." in str(error)
    assert not (tmp_path / "a").exists()


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory):
    """Ten prompts. The first letter is the chosen completion, the next two are the rejected one."""
    rows = [{"prompt": f"paint it {c}", "chosen": c[0], "rejected": c[1:3]} for c in COLORS]
    return write_rows(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", rows)


@pytest.fixture(scope="module")
def make_config(settings, pairs_file):
    return functools.partial(settings, task="preference", data={"train": str(pairs_file), "eval": 3})


@pytest.fixture(scope="module")
def trained_run(make_config, tmp_path_factory):
    """Return a cached function that trains a run with a loss and returns its result."""
    folder = tmp_path_factory.mktemp("preferred")
    train = {"epochs": 8, "eval_every": 2}
    return functools.cache(lambda loss: fit(make_config(folder / loss, preference={"loss": loss}, train=train)))


@pytest.mark.parametrize("loss", slow_except("dpo", names=("dpo", "ipo", "orpo", "simpo")))
def test_run_increases_margin_of_eval_pairs(trained_run, loss):
    result = trained_run(loss)
    evals = [line["eval"] for line in metrics(result.output, "eval")]
    steps = metrics(result.output, "learning_rate")
    assert evals[-1]["margin"] > evals[0]["margin"] + 0.05 and evals[-1]["loss"] < evals[0]["loss"]
    accuracy = result.evaluation.metrics["accuracy"]
    low, high = result.evaluation.interval
    assert result.evaluation.main == "accuracy" and low <= accuracy <= high and accuracy > 0.6
    assert {"loss", "accuracy", "margin", "chosen_reward", "rejected_reward"} <= steps[0].keys()
    assert steps[-1]["margin"] > steps[0]["margin"] and steps[0]["label_tokens"] == steps[0]["rows"]
    if loss == "dpo":  # at step 0 the policy equals the reference
        assert steps[0]["loss"] == pytest.approx(math.log(2), rel=1e-5)
        assert steps[0]["margin"] == pytest.approx(0, abs=1e-5)


def test_reference_model_is_base_model(trained_run, model_folder):
    result = trained_run("dpo")
    run = open_on_cpu(result.output)
    assert isinstance(run.task, PreferenceTask) and run.task.generates_text
    eval_rows = load_eval_rows(run)
    exact = open_on_cpu(model_folder).model
    batcher = CausalMicroBatcher(10_000, False, False, "cpu")
    with run.base():
        referenced = run.task.add_reference_log_probs(run.model, eval_rows, batcher)
    with torch.no_grad():
        base = [[float(log_prob(exact, row)) for row in pair.rows] for pair in eval_rows]
        adapted_sums = [[float(log_prob(run.model, row)) for row in pair.rows] for pair in eval_rows]
    references = [[row.reference for row in pair.rows] for pair in referenced]
    assert np.array(references) == pytest.approx(np.array(base), rel=1e-5)
    margins = 0.1 * ((np.array(adapted_sums) - base) @ [1, -1])
    score = run.score(eval_rows).evaluation.metrics
    assert score["margin"] == pytest.approx(margins.mean(), rel=1e-4)
    assert score["margin"] == pytest.approx(result.evaluation.metrics["margin"], rel=1e-4)
    with run.base():
        at_base = run.score(eval_rows).evaluation.metrics
    assert at_base["accuracy"] == 0.5 and at_base["margin"] == 0 and abs(margins.mean()) > 0.05


def test_run_is_independent_of_prefix_sharing_microbatches_and_resuming(make_config, tmp_path):
    train = {"max_steps": 4, "checkpoint_every": 2, "eval_every": 3}
    for name, changes in [("one", {}), ("small", {"tokens_per_pass": 80}), ("apart", {"share_prefixes": False})]:
        fit(make_config(tmp_path / name, train={**train, **changes}))
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), rel=1e-4), name
    shared, separate = (metrics(tmp_path / name)[0]["computed_tokens"] for name in ("one", "apart"))
    assert shared < 0.6 * separate
    run = stopped_run(make_config(tmp_path / "run", train=train), 3)
    assert fit(make_config(run, train=train)).resumed_from_step >= 2
    assert_same_run(run, tmp_path / "one")
    refusal(fit, {"preference": {"beta": 0.7}}, resume=run, match="preference")


def test_early_stopping_works_and_unsupported_options_are_rejected(make_config, tmp_path):
    answers = {"train": {"eval_answers": 2}}
    active = {"lora": {"active": "completion"}}
    for message, changes in {"generated answers": answers, "pairs": active}.items():
        refusal(fit, make_config(tmp_path / "a", **changes), match=message)
    early = {"early_stopping": 2, "eval_every": 1, "saved_adapter": "best", "epochs": 10, "learning_rate": 0.3}
    result = fit(make_config(tmp_path / "b", train=early))
    assert result.best["metric"] == "loss" and result.stopped_early and result.outcome.steps < 30


@pytest.mark.slow
@pytest.mark.parametrize("method", ["prompt", "full", "bias"])
def test_other_methods_learn_preferences(make_config, tmp_path, method):
    step_losses = losses(fit(make_config(tmp_path / method, method=method, train={"epochs": 30})).output)
    assert np.mean(step_losses[-3:]) < np.mean(step_losses[:3])


def test_general_answers_limit_divergence_of_preference_training(make_config, tmp_path, monkeypatch):
    rows = [row for pair in pairs(3) for row in pair.rows]
    answers = [replace(row, row=number) for number, row in enumerate(rows, start=1)]
    monkeypatch.setattr(Session, "general_answers", lambda self, prompts: answers)
    final = []
    for weight in (1e-6, 50.0):
        train = {"epochs": 3, "keep_general": weight, "drift": False}
        run = fit(make_config(tmp_path / f"{weight}", train=train)).output
        final.append(np.mean([line["general_loss"] for line in metrics(run, "learning_rate")][-3:]))
    assert 0 < final[1] < 0.8 * final[0]
