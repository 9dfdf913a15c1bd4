"""The loop alone: which rows a step sees, what it changes and what it leaves, and when it stops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.errors import UserError
from deltaw.runtime.packed import packed_rows
from deltaw.training.optimizer import count_steps
from deltaw.training.state import rows_of_step
from deltaw.training.tasks.causal_batcher import CausalMicroBatcher
from tests.training.loops import Training, examples, moved

FLAT = CausalMicroBatcher(tokens_per_pass=10_000, share=True, padded=False, device="cpu")


def training(batcher=FLAT, **changes):
    how = {"learning_rate": 1e-3, "total_steps": 4, "batch_size": 3, **changes}
    return Training("lora", "llama", rows=7, batcher=batcher, **how)


def factors(run):
    return {name: parameter.detach() for name, parameter in run.trained.items()}


@settings(max_examples=40)
@given(rows=st.integers(1, 60), batch=st.integers(1, 20), epochs=st.integers(1, 3), seed=st.integers(0, 9))
def test_every_epoch_sees_every_row_once_and_ends_with_the_rows_left(rows, batch, epochs, seed):
    numbered = examples(rows)
    per_epoch = math.ceil(rows / batch)
    assert count_steps(rows, batch, epochs, None) == epochs * per_epoch
    for epoch in range(epochs):
        steps = [rows_of_step(numbered, epoch * per_epoch + s, batch, seed) for s in range(per_epoch)]
        assert [len(s) for s in steps[:-1]] == [batch] * (per_epoch - 1)
        assert len(steps[-1]) == rows - batch * (per_epoch - 1)
        assert sorted(example.row for step in steps for example in step) == list(range(1, rows + 1))


def test_epochs_and_seeds_differ_in_their_order_and_steps_follow_from_epochs_unless_they_are_given():
    def order(step, seed):
        return [e.row for e in rows_of_step(examples(30), step, 30, seed)]

    assert order(0, 0) == order(0, 0) != order(1, 0) != order(0, 1) != order(0, 0)
    asked = ((10, 4, 1, None), (10, 4, 0.5, None), (10, 4, 0.01, None), (10, 4, 3, 5), (1, 16, 1, None))
    assert [count_steps(*one) for one in asked] == [3, 2, 1, 5, 1]


def test_a_step_counts_what_it_saw():
    run = training(total_steps=3).go()
    assert [step.rows for step in run.steps] == [3, 3, 1] and run.outcome.rows == 7 and run.steps[-1].epoch == 1
    assert run.outcome.tokens == sum(len(e.tokens) for e in run.rows)
    assert run.outcome.label_tokens == sum(e.label_count for e in run.rows)
    assert run.outcome.computed_tokens < run.outcome.tokens  # the stem of a step's rows is computed once
    mean = sum(s.loss * s.label_tokens for s in run.steps) / run.outcome.label_tokens
    assert run.outcome.loss == pytest.approx(mean)


def test_both_factors_move_and_the_frozen_weights_keep_every_bit():
    run = training(total_steps=3)
    with packed_rows(run.model):
        for batch in FLAT.batches(run.rows):
            run.objective(batch).backward()
    for name, parameter in run.trained.items():  # B begins as zero, so that A has no gradient yet
        assert bool(parameter.grad.any()) == name.endswith("lora_B"), name
        parameter.grad = None
    for name, weight in run.go().weights().items():
        assert torch.equal(weight, run.before[name]) == (name not in run.trained), name
    assert all(parameter.grad is None for name, parameter in run.model.named_parameters() if name not in run.trained)


def test_gradients_are_scaled_down_to_the_norm_that_is_allowed():
    free, held = (training(total_steps=1, max_grad_norm=norm).go() for norm in (None, 1e-12))
    assert free.steps[0].gradient_norm == held.steps[0].gradient_norm > 1e-3
    # AdamW is blind to the scale of a gradient until that comes near its epsilon of 1e-8.
    for name, factor in factors(held).items():
        moved = (factor - held.before[name]).norm()
        assert moved <= 1e-3 * (factors(free)[name] - free.before[name]).norm() + 1e-9


@pytest.mark.parametrize("late", [1, 4])  # after four steps only the device knows in time
def test_a_step_that_is_not_finite_is_refused_and_changes_nothing(late):
    run, kept = training(total_steps=6), {}

    def spoil(step):
        if step.step == late:
            kept.update({n: f.clone() for n, f in factors(run).items()})
            run.model.model.norm.weight.data.fill_(torch.inf)

    with pytest.raises(UserError, match="diverged") as refused:
        run.go(on_step=spoil)
    assert refused.value.where == f"step {late + 1} of 6" and "learning_rate" in (refused.value.hint or "")
    assert all(torch.equal(factor, kept[name]) for name, factor in factors(run).items())


def test_dropout_is_drawn_in_training_and_not_in_evaluation():
    drawn = Training()
    moved(drawn.model, 1.0)
    (batch,) = FLAT.batches(drawn.rows)
    with packed_rows(drawn.model), torch.no_grad():
        assert drawn.objective(batch) != drawn.objective(batch)
        with drawn.method.evaluating(drawn.model):
            assert drawn.objective(batch) == drawn.objective(batch)
        assert drawn.objective(batch) != drawn.objective(batch)
