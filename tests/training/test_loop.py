"""The training loop: row order, updates, frozen weights, and failures."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.runtime.packed import packed_rows
from deltaw.training.batchers import CausalMicroBatcher
from deltaw.training.optimizer import count_steps
from deltaw.training.state import rows_of_step
from tests.conftest import refusal
from tests.training.loops import Training, examples, randomize_lora_b

FLAT = CausalMicroBatcher(tokens_per_pass=10_000, share=True, padded=False, device="cpu")


def training(batcher=FLAT, **changes):
    options = {"learning_rate": 1e-3, "total_steps": 4, "batch_size": 3, **changes}
    return Training("lora", "llama", rows=7, batcher=batcher, **options)


def factors(run):
    return {name: parameter.detach() for name, parameter in run.trained.items()}


@settings(max_examples=40)
@given(rows=st.integers(1, 60), batch=st.integers(1, 20), epochs=st.integers(1, 3), seed=st.integers(0, 9))
def test_each_epoch_visits_every_row_once(rows, batch, epochs, seed):
    numbered = examples(rows)
    per_epoch = math.ceil(rows / batch)
    assert count_steps(rows, batch, epochs, None) == epochs * per_epoch
    for epoch in range(epochs):
        steps = [rows_of_step(numbered, epoch * per_epoch + s, batch, seed) for s in range(per_epoch)]
        assert [len(s) for s in steps[:-1]] == [batch] * (per_epoch - 1)
        assert len(steps[-1]) == rows - batch * (per_epoch - 1)
        assert sorted(example.row for step in steps for example in step) == list(range(1, rows + 1))


def test_row_order_depends_on_epoch_and_seed():
    def order(step, seed):
        return [e.row for e in rows_of_step(examples(30), step, 30, seed)]

    assert order(0, 0) == order(0, 0) != order(1, 0) != order(0, 1) != order(0, 0)
    cases = ((10, 4, 1, None), (10, 4, 0.5, None), (10, 4, 0.01, None), (10, 4, 3, 5), (1, 16, 1, None))
    assert [count_steps(*case) for case in cases] == [3, 2, 1, 5, 1]


def test_step_reports_count_rows_and_tokens():
    run = training(total_steps=3).run()
    assert [step.rows for step in run.steps] == [3, 3, 1] and run.outcome.rows == 7 and run.steps[-1].epoch == 1
    assert run.outcome.tokens == sum(len(e.tokens) for e in run.rows)
    assert run.outcome.label_tokens == sum(e.label_count for e in run.rows)
    assert run.outcome.computed_tokens < run.outcome.tokens  # the common prefix of a step's rows is computed once
    mean = sum(s.loss * s.label_tokens for s in run.steps) / run.outcome.label_tokens
    assert run.outcome.loss == pytest.approx(mean)


def test_lora_factors_change_and_frozen_weights_do_not():
    run = training(total_steps=3)
    with packed_rows(run.model):
        for batch in FLAT.batches(run.rows):
            run.objective(batch).backward()
    for name, parameter in run.trained.items():  # B is initialized to zero, so A has no gradient yet
        assert bool(parameter.grad.any()) == name.endswith("lora_B"), name
        parameter.grad = None
    for name, weight in run.run().weights().items():
        assert torch.equal(weight, run.initial_weights[name]) == (name not in run.trained), name
    assert all(parameter.grad is None for name, parameter in run.model.named_parameters() if name not in run.trained)


def test_gradients_are_clipped_to_max_norm():
    free, clipped = (training(total_steps=1, max_grad_norm=norm).run() for norm in (None, 1e-12))
    assert free.steps[0].gradient_norm == clipped.steps[0].gradient_norm > 1e-3
    # AdamW ignores a gradient's scale unless the gradient is near its epsilon of 1e-8.
    for name, factor in factors(clipped).items():
        distance = (factor - clipped.initial_weights[name]).norm()
        assert distance <= 1e-3 * (factors(free)[name] - free.initial_weights[name]).norm() + 1e-9


@pytest.mark.parametrize("last_step", [1, 4])  # after four steps, only the device detects it in time
def test_nonfinite_step_raises_without_update(last_step):
    run = training(total_steps=6)
    saved = {}

    def spoil(step):
        if step.step == last_step:
            saved.update({n: f.clone() for n, f in factors(run).items()})
            run.model.model.norm.weight.data.fill_(torch.inf)

    error = refusal(run.run, on_step=spoil, match="diverged")
    assert error.location == f"step {last_step + 1} of 6" and "learning_rate" in (error.hint or "")
    assert all(torch.equal(factor, saved[name]) for name, factor in factors(run).items())


def test_dropout_is_active_only_in_training():
    run = Training()
    randomize_lora_b(run.model, 1.0)
    (batch,) = FLAT.batches(run.rows)
    with packed_rows(run.model), torch.no_grad():
        assert run.objective(batch) != run.objective(batch)
        with run.method.evaluating(run.model):
            assert run.objective(batch) == run.objective(batch)
        assert run.objective(batch) != run.objective(batch)
