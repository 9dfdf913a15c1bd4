"""Divergences from a teacher: against their definitions in float64, against TRL's own code, and in chunks."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from deltaw.data.lessons import Lesson
from deltaw.data.packing import batches
from deltaw.lora.adapt import attach
from deltaw.lora.config import LoRAConfig
from deltaw.runtime.packed import packed_rows
from deltaw.task_settings import DistillSettings
from deltaw.training.distillation.loss import DistillObjective, divergence, with_rest
from deltaw.training.distillation.teachers import Teacher
from deltaw.training.tasks.causal_batcher import CausalMicroBatcher
from deltaw.training.tasks.causal_objective import CausalObjective
from tests.tiny_models import VOCABULARY, causal_model

BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)


def by_definition(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """β KL(t ‖ m) + (1−β) KL(s ‖ m) of probabilities, with KL(t ‖ s) and KL(s ‖ t) at the ends."""
    s, t = student.softmax(-1), teacher.softmax(-1)
    if beta == 0:
        return (t * (t / s).log()).sum(-1)
    if beta == 1:
        return (s * (s / t).log()).sum(-1)
    m = beta * t + (1 - beta) * s
    return beta * (t * (t / m).log()).sum(-1) + (1 - beta) * (s * (s / m).log()).sum(-1)


def two(dtype: torch.dtype, count: int = 7, classes: int = 23) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    student, teacher = (3 * torch.randn(count, classes, generator=generator, dtype=torch.float64) for _ in range(2))
    return student.to(dtype).requires_grad_(), teacher.to(dtype)


@pytest.mark.parametrize("beta", BETAS)
def test_divergence_and_gradient_are_those_of_the_definition(beta):
    student, teacher = two(torch.float64)
    ours = divergence(student.log_softmax(-1), teacher.log_softmax(-1), beta)
    theirs = by_definition(student, teacher, beta)
    assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-14) and ours.detach().min() > 0.01
    gradients = [torch.autograd.grad(values.sum(), student)[0] for values in (ours, theirs)]
    assert torch.allclose(*gradients, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("beta", BETAS)
def test_loss_and_gradient_are_those_of_trl(beta):
    trl = pytest.importorskip("trl.experimental.gkd.gkd_trainer", reason="TRL is not installed").GKDTrainer
    student, teacher = two(torch.float32)
    labels = torch.tensor([[1, -100, 2, 3, -100, 4, 5]])
    kept = labels[0] != -100
    how = {"beta": beta, "temperature": 1.7}
    theirs = trl.generalized_jsd_loss(student[None], teacher[None], labels, **how)
    logprobs = [(logits[kept] / 1.7).log_softmax(-1) for logits in (student, teacher)]
    ours = divergence(*logprobs, beta).sum() / kept.sum()
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(value, student)[0] for value in (ours, theirs)]
    assert torch.allclose(*gradients, rtol=1e-5, atol=1e-6)


def test_settings_name_the_ends_as_trl_does():
    named = {name: DistillSettings(divergence=name).mixed for name in ("forward", "reverse", "jsd")}
    assert named == {"forward": 0.0, "reverse": 1.0, "jsd": 0.5}
    assert DistillSettings(divergence="jsd", beta=0.1).mixed == 0.1


def test_tokens_that_are_not_kept_are_one_more_token():
    student, teacher = two(torch.float64)
    tokens = teacher.topk(5, -1).indices
    kept = [with_rest(logits.log_softmax(-1).gather(-1, tokens)) for logits in (student, teacher)]
    for logprobs, logits in zip(kept, (student, teacher), strict=True):
        rest = 1 - logits.softmax(-1).gather(-1, tokens).sum(-1)
        assert torch.allclose(logprobs.exp().sum(-1), torch.ones(7, dtype=torch.float64))
        assert torch.allclose(logprobs[:, -1].exp(), rest)
    # Merging tokens never makes distributions easier to tell apart.
    whole = divergence(student.log_softmax(-1), teacher.log_softmax(-1), 0.5)
    part = divergence(*kept, 0.5)
    assert (part < whole).all() and (part > 0).all()


# A student and its teachers on rows, the prompts of which differ.


def lessons(*lengths: tuple[int, int, int], seed: int = 5) -> list[Lesson]:
    """Rows with so many tokens of the student's prompt, of the teacher's, and of the completion."""
    draw = np.random.default_rng(seed)
    shared = draw.integers(3, VOCABULARY, 6).astype(np.int32)  # what the teacher's prompts begin with
    rows = []
    for number, (own, taught, answer) in enumerate(lengths, start=1):
        prompt, more, completion = (draw.integers(3, VOCABULARY, n).astype(np.int32) for n in (own, taught, answer))
        tokens = np.concatenate([prompt, completion])
        teacher_prompt = np.concatenate([shared, more, prompt])
        rows.append(Lesson(number, tokens, np.arange(len(tokens)) >= own, own, "x", teacher_prompt=teacher_prompt))
    return rows


ROWS = lessons((4, 3, 5), (6, 2, 1), (3, 4, 7), (5, 1, 3))
PACKED = CausalMicroBatcher(64, share=True, padded=False, device="cpu")


def student_of(settings: DistillSettings, *families: str, weights: tuple[float, ...] = ()) -> DistillObjective:
    """A Llama with a LoRA adapter, in float64, whose teachers are other models."""
    model = causal_model("llama").double().requires_grad_(False)
    attach(model, LoRAConfig(rank=2, target_modules="all-linear"), seed=0)
    with torch.no_grad():
        for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    objective = DistillObjective(model, settings)
    made = []
    for seed, (family, weight) in enumerate(zip(families, weights or (1.0,) * len(families), strict=True), start=1):
        other = causal_model(family, seed=seed).double().requires_grad_(False)
        made.append(Teacher(CausalObjective(other), PACKED, weight, lambda other=other: packed_rows(other)))
    objective.teachers = made
    return objective


def gradients_of(objective: DistillObjective, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [p for p in objective.model.parameters() if p.requires_grad]))


def alone(objective: DistillObjective, rows: list[Lesson]) -> Tensor:
    """The loss by transformers' own forward, row by row, all logits at once."""
    total, settings = torch.zeros((), dtype=torch.float64), objective.settings
    whole = sum(teacher.weight for teacher in objective.teachers)
    for row in rows:
        count = row.label_count
        ids = torch.from_numpy(row.tokens).long()[None]
        taught = torch.from_numpy(row.as_taught().tokens).long()[None]
        own = objective.model(ids).logits[0, -count - 1 : -1] / settings.temperature
        mixed = sum(
            teacher.weight
            / whole
            * (teacher.objective.model(taught).logits[0, -count - 1 : -1] / settings.temperature).softmax(-1)
            for teacher in objective.teachers
        )
        total = total + by_definition(own, mixed.log(), settings.mixed).sum()
    return total


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_packed_rows_in_chunks_give_what_each_row_gives_alone(kind):
    settings = DistillSettings(divergence=kind, temperature=1.3, chunk=3)
    objective = student_of(settings, "llama", "qwen3", weights=(1.0, 3.0))
    expected = alone(objective, ROWS)
    with packed_rows(objective.model):
        found = [objective(batch) for batch in PACKED.batches(ROWS)]
        each = torch.cat([objective.divergences(batch) for batch in PACKED.batches(ROWS)])
    loss = torch.stack(found).sum()
    assert torch.allclose(loss, expected, rtol=1e-6)
    assert torch.allclose(each.sum(), expected, rtol=1e-6) and len(each) == sum(row.label_count for row in ROWS)
    for ours, theirs in zip(gradients_of(objective, loss), gradients_of(objective, expected), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-7)  # transformers' norms are in fp32
    assert objective.units(ROWS) == 16


def test_logits_of_all_tokens_are_never_there_at_once(monkeypatch):
    objective = student_of(DistillSettings(chunk=3), "llama")
    seen: list[int] = []
    plain = objective._logits
    monkeypatch.setattr(objective, "_logits", lambda rows: seen.append(len(rows)) or plain(rows))
    with packed_rows(objective.model):
        for batch in PACKED.batches(ROWS):
            objective(batch).backward()
    assert max(seen) == 3 and 16 <= sum(seen) <= 24  # the last chunk of a microbatch is filled up


def test_kept_tokens_of_the_teacher_give_what_it_gives_itself():
    """All tokens kept: the full divergence; a few kept, stored or asked for now: one and the same."""
    full = student_of(DistillSettings(divergence="jsd", beta=0.3), "llama")
    every = student_of(DistillSettings(divergence="jsd", beta=0.3, top_k=VOCABULARY), "llama")
    few = student_of(DistillSettings(divergence="jsd", beta=0.3, top_k=4), "llama")
    tokens, values = few.likeliest(ROWS[:2])
    assert tokens.shape == values.shape == (6, 4)
    stored, start = list(ROWS), 0
    for place, row in enumerate(ROWS[:2]):
        part = slice(start, start := start + row.label_count)
        stored[place] = replace(row, taught=(tokens[part].numpy(), values[part].numpy()))

    def loss(objective: DistillObjective, rows: list[Lesson]) -> float:
        with packed_rows(objective.model):
            return float(sum(objective(batch) for batch in PACKED.batches(rows)).detach())

    assert math.isclose(loss(full, ROWS), loss(every, ROWS), rel_tol=1e-12)
    assert math.isclose(loss(few, ROWS), loss(few, stored), rel_tol=1e-12)
    assert 0 < loss(few, ROWS) < loss(full, ROWS)
    asked: list[int] = []
    teacher = few.teachers[0]
    few.teachers = [replace(teacher, running=lambda: asked.append(1) or teacher.running())]
    rows = [row for row in stored if row.taught is not None]
    loss(few, rows)
    assert not asked  # what is kept is not computed again
    loss(few, ROWS[:2])
    assert asked


def test_a_vocabulary_that_is_padded_differently_is_cut_to_what_both_have():
    objective = student_of(DistillSettings(), "llama")
    model = objective.teachers[0].objective.model
    before = alone(objective, ROWS)
    model.resize_token_embeddings(VOCABULARY + 6, mean_resizing=False)
    objective.teachers = [replace(objective.teachers[0], objective=CausalObjective(model))]
    assert objective.width == VOCABULARY
    with packed_rows(objective.model):
        after = sum(objective(batch) for batch in PACKED.batches(ROWS))
    assert torch.allclose(after, before, rtol=1e-6)


def test_without_teachers_it_is_a_cross_entropy():
    objective = student_of(DistillSettings())
    with packed_rows(objective.model):
        batch = next(batches(ROWS, 64))
        assert torch.equal(objective(batch), CausalObjective(objective.model)(batch))
