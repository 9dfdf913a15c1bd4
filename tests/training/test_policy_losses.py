"""Policy losses match their formulas, evaluated token by token in float64, and TRL."""

from __future__ import annotations

import math
from collections import defaultdict
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from deltaw.tasks.reward.feed import RewardFeed
from deltaw.tasks.reward.losses import PolicyLoss, Rollout, advantages
from deltaw.tasks.reward.scoring import Scorer
from deltaw.tasks.reward.settings import RewardSettings
from deltaw.training.batchers import MicroBatcher
from deltaw.training.losses import RowLogProbs
from deltaw.training.parallel.row_distribution import distribute_rows

LOSSES = ("grpo", "dr_grpo", "dapo", "cispo", "gspo", "rloo")
LENGTHS = (3, 7, 1, 5)
MAX_LENGTH = 9


def settings_of(loss: str, **options: object) -> RewardSettings:
    return RewardSettings.model_validate({"loss": loss, "max_new_tokens": MAX_LENGTH, "epsilon_high": 0.28, **options})


def make_rollouts(seed: int = 0, *, old: bool = True) -> tuple[torch.Tensor, list[Rollout]]:
    """Return log-probabilities (E,) as a leaf tensor, and rollouts.

    The old log-probabilities differ enough for clipping.
    """
    random = np.random.default_rng(seed)
    values = []
    rows = []
    for number, length in enumerate(LENGTHS):
        current = -random.gamma(1.0, 1.0, length)
        base = current + random.normal(0, 0.3, length)
        old_values = current + random.normal(0, 0.5, length)
        tokens = np.arange(length + 2, dtype=np.int32)
        is_label = np.arange(length + 2) >= 2
        log_probs = {"old_logprobs": old_values if old else None, "base_logprobs": base}
        rows.append(Rollout(number, tokens, is_label, 2, "", advantage=float(random.normal()), **log_probs))
        values.append(current)
    return torch.tensor(np.concatenate(values), requires_grad=True), rows


def row_log_probs(values: torch.Tensor, rows: list[Rollout]) -> RowLogProbs:
    owner = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor([row.label_count for row in rows]))
    return RowLogProbs(values, torch.arange(len(values)), owner, tuple(rows))


def mean_loss(loss: PolicyLoss, values: torch.Tensor, rows: list[Rollout]) -> torch.Tensor:
    """Normalize the loss like the training loop."""
    return loss(row_log_probs(values, rows)) / loss.units(rows)


def reference_loss(settings: RewardSettings, values: torch.Tensor, rows: list[Rollout]) -> torch.Tensor:
    """Evaluate the formulas in the docstring of ``deltaw.tasks.reward.losses``, one token at a time."""
    start = 0
    sums = []
    tokens = 0
    for row in rows:
        count = row.label_count
        current = values[start : start + count]
        old_values = torch.tensor(row.old_logprobs)
        start += count
        tokens += count
        log_ratios = current - old_values
        token_losses = []
        for index in range(count):
            log_ratio = log_ratios[index]
            if settings.loss == "gspo":
                log_ratio = log_ratios.mean()
            if settings.loss == "rloo":
                log_ratio = log_ratios.sum()
            ratio = log_ratio.exp()
            advantage = row.advantage
            if settings.loss == "cispo":
                token_losses.append(-min(float(ratio.detach()), settings.upper_epsilon) * advantage * current[index])
                continue
            bounded = ratio.clamp(1 - settings.epsilon, 1 + settings.upper_epsilon)
            loss = -torch.minimum(ratio * advantage, bounded * advantage)
            if settings.beta and settings.loss != "rloo":
                base_log_ratio = float(row.base_logprobs[index]) - current[index]
                loss = loss + settings.beta * (base_log_ratio.exp() - base_log_ratio - 1) * ratio
            token_losses.append(loss)
        sums.append(torch.stack(token_losses).sum())
    total = torch.stack(sums)
    if settings.loss in ("grpo", "gspo", "rloo"):
        return (total / torch.tensor([row.label_count for row in rows])).mean()
    return total.sum() / (len(rows) * MAX_LENGTH if settings.loss == "dr_grpo" else tokens)


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("loss", LOSSES)
def test_loss_and_gradient_match_formula(loss: str, beta: float):
    settings = settings_of(loss, beta=0.0 if loss == "cispo" else beta)
    values, rows = make_rollouts()
    ours = mean_loss(PolicyLoss(settings), values, rows)
    (gradient,) = torch.autograd.grad(ours, values)
    expected = reference_loss(settings, values, rows)
    (expected_gradient,) = torch.autograd.grad(expected, values)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-12)
    assert float(gradient.abs().max()) > 0


@pytest.mark.parametrize("loss", LOSSES)
def test_without_old_log_probs_gradient_matches_reinforce(loss: str):
    values, rows = make_rollouts(old=False)
    settings = settings_of(loss, epsilon_high=5.0)
    (gradient,) = torch.autograd.grad(PolicyLoss(settings)(row_log_probs(values, rows)), values)
    start = 0
    for row in rows:
        per_row = {"grpo": row.label_count, "gspo": row.label_count}.get(loss, 1)
        part = gradient[start : start + row.label_count]
        torch.testing.assert_close(part, torch.full_like(part, -row.advantage / per_row), rtol=1e-10, atol=1e-12)
        start += row.label_count


@pytest.mark.parametrize("loss", ["grpo", "dapo", "cispo", "gspo"])
def test_loss_is_independent_of_microbatches(loss: str):
    values, rows = make_rollouts()
    full = mean_loss(PolicyLoss(settings_of(loss)), values, rows)
    policy_loss = PolicyLoss(settings_of(loss))
    parts = []
    start = 0
    for row in rows:
        parts.append(policy_loss(row_log_probs(values[start : start + row.label_count], [row])))
        start += row.label_count
    torch.testing.assert_close(torch.stack(parts).sum() / policy_loss.units(rows), full)


def test_clip_share_and_engine_mismatch_are_recorded():
    values, rows = make_rollouts()
    rows[0] = Rollout(0, rows[0].tokens, rows[0].is_label, 2, "", advantage=1.0, old_logprobs=np.full(3, -50.0))
    logprobs = values[3:10].detach().numpy()
    options = {"old_logprobs": logprobs, "engine_logprobs": logprobs[:-1] - 0.01}  # without the end token
    rows[1] = Rollout(1, rows[1].tokens, rows[1].is_label, 2, "", advantage=1.0, **options)
    loss = PolicyLoss(settings_of("dapo"))
    loss(row_log_probs(values[:10], rows[:2]))
    metrics = loss.accumulator.means()
    assert metrics["clip_share"] == pytest.approx(0.3) and metrics["mismatch"] == pytest.approx(0.01, rel=1e-6)


def test_advantages_are_computed_per_group():
    rewards = np.array([[0.0, 1.0, 1.0, 0.0], [2.0, 2.0, 2.0, 2.0]])
    scaled = advantages(rewards, "grpo")
    np.testing.assert_allclose(scaled[0], np.array([-0.5, 0.5, 0.5, -0.5]) / (math.sqrt(1 / 3) + 1e-4))
    assert not scaled[1].any()
    np.testing.assert_allclose(advantages(rewards, "dr_grpo", scale=False)[0], [-0.5, 0.5, 0.5, -0.5])
    baselines = [rewards[0, [m for m in range(4) if m != n]].mean() for n in range(4)]
    np.testing.assert_allclose(advantages(rewards, "rloo")[0], rewards[0] - baselines)


def test_completions_without_advantage_do_not_count_as_work_of_a_process():
    batcher = MicroBatcher(10**6, share=False)
    arguments = {"seed": 0, "reference": nullcontext}
    feed = RewardFeed(SimpleNamespace(), batcher, None, settings_of("grpo"), **arguments)
    rows = [make_row(n, 20, float(n % 2)) for n in range(8)] + [make_row(8, 10, 0.0)]
    parts = distribute_rows(feed.cost_rows(rows), 2, share=False)
    assert [sum(rows[index].advantage for index in part) for part in parts] == [2, 2]
    assert sorted(index for part in parts for index in part) == list(range(9))
    with_divergence = RewardFeed(SimpleNamespace(), batcher, None, settings_of("grpo", beta=0.1), **arguments)
    assert with_divergence.cost_rows(rows) == rows


def test_equal_rewards_of_several_functions_have_equal_sums():
    functions = [{"name": "length", "weight": weight, "target": 9} for weight in (0.1, 0.7, -1.3)]
    scorer = Scorer(settings_of("grpo", functions=functions))
    for size in range(2, 18):
        totals = scorer.total(np.repeat([[0.1], [0.3], [0.9]], size, axis=1))
        assert np.ptp(totals) == 0 and totals[0] == pytest.approx(0.01 + 0.21 - 1.17)


def make_row(number: int, length: int, advantage: float) -> Rollout:
    tokens = np.full(length, number, np.int32)
    return Rollout(number, tokens, np.arange(length) > 0, 1, "", advantage=advantage)


@pytest.mark.parametrize("loss", LOSSES)
def test_equal_rewards_have_no_advantage_for_any_group_size(loss: str):
    for size in range(2, 18):
        for reward in (0.1, 0.3, 1 / 3, 0.7, 1.1, -2.3):
            rewards = np.full((3, size), reward)
            rewards[1, 0] += 1
            values = advantages(rewards, loss, loss != "dr_grpo")
            assert not values[[0, 2]].any() and values[1].all(), (size, reward)


@pytest.mark.parametrize("beta", [0.0, 0.05])
@pytest.mark.parametrize("loss", LOSSES)
def test_loss_and_gradient_match_trl(loss: str, beta: float):
    """In ``rloo`` the divergence is part of the reward, so TRL's loss does not contain it."""
    pytest.importorskip("trl.trainer.grpo_trainer", reason="TRL is not installed")
    from trl.trainer.grpo_trainer import GRPOTrainer
    from trl.trainer.rloo_trainer import RLOOTrainer

    trainer = RLOOTrainer if loss == "rloo" else GRPOTrainer
    settings = settings_of(loss, beta=beta, epsilon_high=0.28)
    values, rows = make_rollouts(1)
    ours = mean_loss(PolicyLoss(settings), values, rows)
    (gradient,) = torch.autograd.grad(ours, values)
    padded = torch.zeros(len(rows), max(LENGTHS), dtype=torch.float64)
    mask = torch.zeros_like(padded)
    old = torch.zeros_like(padded)
    base = torch.zeros_like(padded)
    start = 0
    for number, row in enumerate(rows):
        count = row.label_count
        padded[number, :count] = values.detach()[start : start + count]
        mask[number, :count] = 1
        old[number, :count] = torch.tensor(row.old_logprobs)
        base[number, :count] = torch.tensor(row.base_logprobs)
        start += count
    padded.requires_grad_()
    same = lambda x, **_: x  # noqa: E731
    accelerator = SimpleNamespace(num_processes=1, reduce=same, gather=same, gather_for_metrics=same)
    arguments = SimpleNamespace(use_bias_correction_kl=True, delta=None, steps_per_generation=1)
    options = {"aux_loss_enabled": False, "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None, "beta": beta}
    options |= {"importance_sampling_level": "sequence" if loss == "gspo" else "token", "args": arguments}
    options |= {"loss_type": {"gspo": "grpo"}.get(loss, loss), "accelerator": accelerator}
    options |= {"epsilon_low": settings.epsilon, "epsilon_high": settings.upper_epsilon, "use_vllm": False}
    options |= {"model": SimpleNamespace(training=True), "current_gradient_accumulation_steps": 1}
    options |= {"max_completion_length": MAX_LENGTH, "_entropy_bonus_enabled": False}
    log_probs = lambda *a, **k: (padded, torch.zeros_like(padded), None)  # noqa: E731
    fake = SimpleNamespace(**options, _get_per_token_logps_and_entropies=log_probs)
    fake._metrics = {"train": defaultdict(list)}
    ids = torch.zeros_like(mask, dtype=torch.int64)
    inputs = {"prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids, "completion_mask": mask}
    inputs["advantages"] = torch.tensor([row.advantage for row in rows], dtype=torch.float64)
    inputs |= {"old_per_token_logps": old, "old_logps": old.sum(1)}
    inputs |= {"ref_per_token_logps": base, "num_items_in_batch": mask.sum()}
    theirs = trainer._compute_loss(fake, None, inputs)
    (expected_gradient,) = torch.autograd.grad(theirs, padded)
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(gradient, expected_gradient[mask.bool()], rtol=1e-7, atol=1e-9)
