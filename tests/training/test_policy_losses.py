"""Losses of rewarded completions: against their formulas token by token in float64, and against TRL's own code."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from deltaw.task_settings import RewardSettings
from deltaw.training.losses import RowLogProbs
from deltaw.training.rollouts.losses import PolicyLoss, Rollout, advantages

LOSSES = ("grpo", "dr_grpo", "dapo", "cispo", "gspo", "rloo")
LENGTHS = (3, 7, 1, 5)
LONGEST = 9


def settings_of(loss: str, **more: object) -> RewardSettings:
    return RewardSettings.model_validate({"loss": loss, "max_new_tokens": LONGEST, "epsilon_high": 0.28, **more})


def given(seed: int = 0, *, old: bool = True) -> tuple[torch.Tensor, list[Rollout]]:
    """Log-probabilities (E,), a leaf, and completions whose old ones are so far off that clipping takes place."""
    random = np.random.default_rng(seed)
    values, rows = [], []
    for number, length in enumerate(LENGTHS):
        now = -random.gamma(1.0, 1.0, length)
        base, then = now + random.normal(0, 0.3, length), now + random.normal(0, 0.5, length)
        tokens, is_label = np.arange(length + 2, dtype=np.int32), np.arange(length + 2) >= 2
        known = {"old_logprobs": then if old else None, "base_logprobs": base}
        rows.append(Rollout(number, tokens, is_label, 2, "", advantage=float(random.normal()), **known))
        values.append(now)
    return torch.tensor(np.concatenate(values), requires_grad=True), rows


def of_rows(values: torch.Tensor, rows: list[Rollout]) -> RowLogProbs:
    owner = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor([row.label_count for row in rows]))
    return RowLogProbs(values, torch.arange(len(values)), owner, tuple(rows))


def mean(loss: PolicyLoss, values: torch.Tensor, rows: list[Rollout]) -> torch.Tensor:
    """As the loop divides it."""
    return loss(of_rows(values, rows)) / loss.units(rows)


def by_formula(settings: RewardSettings, values: torch.Tensor, rows: list[Rollout]) -> torch.Tensor:
    """The loss of the module's docstring, one token after another."""
    start, sums, tokens = 0, [], 0
    for row in rows:
        count = row.label_count
        now, then = values[start : start + count], torch.tensor(row.old_logprobs)
        start, tokens = start + count, tokens + count
        moved, each = now - then, []
        for place in range(count):
            log_ratio = moved[place]
            if settings.loss == "gspo":
                log_ratio = moved.mean()
            if settings.loss == "rloo":
                log_ratio = moved.sum()
            ratio, better = log_ratio.exp(), row.advantage
            if settings.loss == "cispo":
                each.append(-min(float(ratio.detach()), settings.high) * better * now[place])
                continue
            bounded = ratio.clamp(1 - settings.epsilon, 1 + settings.high)
            one = -torch.minimum(ratio * better, bounded * better)
            if settings.beta and settings.loss != "rloo":
                behind = float(row.base_logprobs[place]) - now[place]
                one = one + settings.beta * (behind.exp() - behind - 1) * ratio
            each.append(one)
        sums.append(torch.stack(each).sum())
    total = torch.stack(sums)
    if settings.loss in ("grpo", "gspo", "rloo"):
        return (total / torch.tensor([row.label_count for row in rows])).mean()
    return total.sum() / (len(rows) * LONGEST if settings.loss == "dr_grpo" else tokens)


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_and_its_gradient_are_those_of_its_formula(loss: str, beta: float):
    settings = settings_of(loss, beta=0.0 if loss == "cispo" else beta)
    values, rows = given()
    ours = mean(PolicyLoss(settings), values, rows)
    (gradient,) = torch.autograd.grad(ours, values)
    expected = by_formula(settings, values, rows)
    (wanted,) = torch.autograd.grad(expected, values)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-12)
    assert float(gradient.abs().max()) > 0


@pytest.mark.parametrize("loss", LOSSES)
def test_without_old_values_the_ratio_is_one_and_the_gradient_that_of_reinforce(loss: str):
    values, rows = given(old=False)
    settings = settings_of(loss, epsilon_high=5.0)
    (gradient,) = torch.autograd.grad(PolicyLoss(settings)(of_rows(values, rows)), values)
    start = 0
    for row in rows:
        per_row = {"grpo": row.label_count, "gspo": row.label_count}.get(loss, 1)
        part = gradient[start : start + row.label_count]
        torch.testing.assert_close(part, torch.full_like(part, -row.advantage / per_row), rtol=1e-10, atol=1e-12)
        start += row.label_count


@pytest.mark.parametrize("loss", ["grpo", "dapo", "cispo", "gspo"])
def test_a_microbatch_more_changes_nothing(loss: str):
    values, rows = given()
    whole = mean(PolicyLoss(settings_of(loss)), values, rows)
    cut, parts, start = PolicyLoss(settings_of(loss)), [], 0
    for row in rows:
        parts.append(cut(of_rows(values[start : start + row.label_count], [row])))
        start += row.label_count
    torch.testing.assert_close(torch.stack(parts).sum() / cut.units(rows), whole)


def test_what_was_clipped_and_how_far_the_engine_is_off_is_counted():
    values, rows = given()
    rows[0] = Rollout(0, rows[0].tokens, rows[0].is_label, 2, "", advantage=1.0, old_logprobs=np.full(3, -50.0))
    rows[1] = Rollout(
        1,
        rows[1].tokens,
        rows[1].is_label,
        2,
        "",
        advantage=1.0,
        old_logprobs=values[3:10].detach().numpy(),
        engine_logprobs=values[3:9].detach().numpy() - 0.01,  # none of the token that ends it
    )
    loss = PolicyLoss(settings_of("dapo"))
    loss(of_rows(values[:10], rows[:2]))
    found = loss.watched.means()
    assert found["clip_share"] == pytest.approx(0.3)
    assert found["mismatch"] == pytest.approx(0.01, rel=1e-6)


def test_advantages_are_of_groups():
    rewards = np.array([[0.0, 1.0, 1.0, 0.0], [2.0, 2.0, 2.0, 2.0]])
    scaled = advantages(rewards, "grpo")
    np.testing.assert_allclose(scaled[0], np.array([-0.5, 0.5, 0.5, -0.5]) / (math.sqrt(1 / 3) + 1e-4))
    assert not scaled[1].any()
    np.testing.assert_allclose(advantages(rewards, "dr_grpo", scale=False)[0], [-0.5, 0.5, 0.5, -0.5])
    others = [rewards[0, [m for m in range(4) if m != n]].mean() for n in range(4)]
    np.testing.assert_allclose(advantages(rewards, "rloo")[0], rewards[0] - others)


@pytest.mark.parametrize("beta", [0.0, 0.05])
@pytest.mark.parametrize("loss", LOSSES)
def test_loss_and_gradient_are_those_of_trl(loss: str, beta: float):
    """The divergence of ``rloo`` is in the reward, so that its trainer's loss has none."""
    pytest.importorskip("trl.trainer.grpo_trainer", reason="TRL is not installed")
    from trl.trainer.grpo_trainer import GRPOTrainer
    from trl.trainer.rloo_trainer import RLOOTrainer

    trainer = RLOOTrainer if loss == "rloo" else GRPOTrainer
    settings = settings_of(loss, beta=beta, epsilon_high=0.28)
    values, rows = given(1)
    ours = mean(PolicyLoss(settings), values, rows)
    (gradient,) = torch.autograd.grad(ours, values)
    padded = torch.zeros(len(rows), max(LENGTHS), dtype=torch.float64)
    mask, old, base = torch.zeros_like(padded), torch.zeros_like(padded), torch.zeros_like(padded)
    start = 0
    for number, row in enumerate(rows):
        count = row.label_count
        padded[number, :count] = values.detach()[start : start + count]
        mask[number, :count] = 1
        old[number, :count] = torch.tensor(row.old_logprobs)
        base[number, :count] = torch.tensor(row.base_logprobs)
        start += count
    padded.requires_grad_()
    accelerator = SimpleNamespace(
        num_processes=1, reduce=lambda x, **_: x, gather=lambda x: x, gather_for_metrics=lambda x: x
    )
    fake = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (padded, torch.zeros_like(padded), None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="sequence" if loss == "gspo" else "token",
        beta=beta,
        args=SimpleNamespace(use_bias_correction_kl=True, delta=None, steps_per_generation=1),
        loss_type={"gspo": "grpo"}.get(loss, loss),
        epsilon_low=settings.epsilon,
        epsilon_high=settings.high,
        use_vllm=False,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        max_completion_length=LONGEST,
        accelerator=accelerator,
        _entropy_bonus_enabled=False,
        _metrics={"train": __import__("collections").defaultdict(list)},
    )
    ids = torch.zeros_like(mask, dtype=torch.int64)
    inputs = {
        "prompt_ids": ids,
        "prompt_mask": ids,
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": torch.tensor([row.advantage for row in rows], dtype=torch.float64),
        "old_per_token_logps": old,
        "old_logps": old.sum(1),
        "ref_per_token_logps": base,
        "num_items_in_batch": mask.sum(),
    }
    theirs = trainer._compute_loss(fake, None, inputs)
    (wanted,) = torch.autograd.grad(theirs, padded)
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(gradient, wanted[mask.bool()], rtol=1e-7, atol=1e-9)
