"""A student is trained on the divergence from teachers that see other prompts."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from deltaw.lora.adapt import attach
from deltaw.lora.config import LoRAConfig
from deltaw.runtime.packed import packed_rows
from deltaw.tasks.distill.loss import DistillObjective
from deltaw.tasks.distill.rows import DistillExample
from deltaw.tasks.distill.settings import DistillSettings
from deltaw.tasks.distill.teachers import Teacher
from deltaw.training.batchers import CausalMicroBatcher
from deltaw.training.causal_objective import CausalObjective
from tests.tiny_models import VOCABULARY, causal_model
from tests.training.test_distillation import reference_divergence


def make_examples(*lengths: tuple[int, int, int], seed: int = 5) -> list[DistillExample]:
    """Return rows with lengths of the student's prompt, the teacher's additional prompt and the completion."""
    generator = np.random.default_rng(seed)
    shared = generator.integers(3, VOCABULARY, 6).astype(np.int32)  # common beginning of the teacher's prompts
    rows = []
    for number, (prompt_length, extra_length, completion_length) in enumerate(lengths, start=1):
        sizes = (prompt_length, extra_length, completion_length)
        prompt, extra, completion = (generator.integers(3, VOCABULARY, n).astype(np.int32) for n in sizes)
        tokens = np.concatenate([prompt, completion])
        teacher_prompt = np.concatenate([shared, extra, prompt])
        is_label = np.arange(len(tokens)) >= prompt_length
        rows.append(DistillExample(number, tokens, is_label, prompt_length, "x", teacher_prompt=teacher_prompt))
    return rows


ROWS = make_examples((4, 3, 5), (6, 2, 1), (3, 4, 7), (5, 1, 3))
PACKED = CausalMicroBatcher(64, share=True, padded=False, device="cpu")


def make_objective(settings: DistillSettings, *families: str, weights: tuple[float, ...] = ()) -> DistillObjective:
    """Return the objective of a float64 Llama with a LoRA adapter and other models as teachers."""
    model = causal_model("llama").double().requires_grad_(False)
    attach(model, LoRAConfig(rank=2, target_modules="all-linear"), seed=0)
    with torch.no_grad():
        for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    objective = DistillObjective(model, settings)
    teachers = []
    for seed, (family, weight) in enumerate(zip(families, weights or (1.0,) * len(families), strict=True), start=1):
        other = causal_model(family, seed=seed).double().requires_grad_(False)
        teachers.append(Teacher(CausalObjective(other), PACKED, weight, lambda other=other: packed_rows(other)))
    objective.teachers = teachers
    return objective


def gradients_of(objective: DistillObjective, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [p for p in objective.model.parameters() if p.requires_grad]))


def reference_loss(objective: DistillObjective, rows: list[DistillExample]) -> Tensor:
    """Return the reference loss: transformers' own forward row by row, with all logits at once."""
    total = torch.zeros((), dtype=torch.float64)
    settings = objective.settings
    total_weight = sum(teacher.weight for teacher in objective.teachers)
    for row in rows:
        count = row.label_count
        ids = torch.from_numpy(row.tokens).long()[None]
        teacher_ids = torch.from_numpy(row.as_taught().tokens).long()[None]
        student_logits = objective.model(ids).logits[0, -count - 1 : -1] / settings.temperature
        mixture = 0.0
        for teacher in objective.teachers:
            logits = teacher.objective.model(teacher_ids).logits[0, -count - 1 : -1]
            mixture = mixture + teacher.weight / total_weight * (logits / settings.temperature).softmax(-1)
        total = total + reference_divergence(student_logits, mixture.log(), settings.mixture_weight).sum()
    return total


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_chunked_packed_rows_match_single_rows(kind):
    settings = DistillSettings(divergence=kind, temperature=1.3, chunk=3)
    objective = make_objective(settings, "llama", "qwen3", weights=(1.0, 3.0))
    expected = reference_loss(objective, ROWS)
    with packed_rows(objective.model):
        losses = [objective(batch) for batch in PACKED.batches(ROWS)]
        divergences = torch.cat([objective.divergences(batch) for batch in PACKED.batches(ROWS)])
    loss = torch.stack(losses).sum()
    assert torch.allclose(loss, expected, rtol=1e-6) and torch.allclose(divergences.sum(), expected, rtol=1e-6)
    assert len(divergences) == sum(row.label_count for row in ROWS)
    for ours, theirs in zip(gradients_of(objective, loss), gradients_of(objective, expected), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-7)  # transformers computes norms in fp32
    assert objective.units(ROWS) == 16


def test_logits_are_computed_in_chunks(monkeypatch):
    objective = make_objective(DistillSettings(chunk=3), "llama")
    row_counts: list[int] = []
    original = objective._logits
    monkeypatch.setattr(objective, "_logits", lambda rows: row_counts.append(len(rows)) or original(rows))
    with packed_rows(objective.model):
        for batch in PACKED.batches(ROWS):
            objective(batch).backward()
    assert max(row_counts) == 3 and 16 <= sum(row_counts) <= 24  # the last chunk of a microbatch is padded


def test_stored_teacher_tokens_match_recomputed_tokens():
    """If all tokens are stored, the loss is the full divergence. Otherwise stored and recomputed tokens agree."""
    full = make_objective(DistillSettings(divergence="jsd", beta=0.3), "llama")
    all_tokens = make_objective(DistillSettings(divergence="jsd", beta=0.3, top_k=VOCABULARY), "llama")
    top_tokens_only = make_objective(DistillSettings(divergence="jsd", beta=0.3, top_k=4), "llama")
    tokens, values = top_tokens_only.top_tokens(ROWS[:2])
    assert tokens.shape == values.shape == (6, 4)
    stored = list(ROWS)
    start = 0
    for index, row in enumerate(ROWS[:2]):
        span = slice(start, start := start + row.label_count)
        stored[index] = replace(row, taught=(tokens[span].numpy(), values[span].numpy()))

    def loss(objective: DistillObjective, rows: list[DistillExample]) -> float:
        with packed_rows(objective.model):
            return float(sum(objective(batch) for batch in PACKED.batches(rows)).detach())

    assert math.isclose(loss(full, ROWS), loss(all_tokens, ROWS), rel_tol=1e-12)
    assert math.isclose(loss(top_tokens_only, ROWS), loss(top_tokens_only, stored), rel_tol=1e-12)
    assert 0 < loss(top_tokens_only, ROWS) < loss(full, ROWS)
    teacher_calls: list[int] = []
    teacher = top_tokens_only.teachers[0]
    counted = replace(teacher, model_context=lambda: teacher_calls.append(1) or teacher.model_context())
    top_tokens_only.teachers = [counted]
    rows = [row for row in stored if row.taught is not None]
    loss(top_tokens_only, rows)
    assert not teacher_calls  # stored tokens are not recomputed
    loss(top_tokens_only, ROWS[:2])
    assert teacher_calls


def test_padded_vocabulary_is_truncated_to_common_size():
    objective = make_objective(DistillSettings(), "llama")
    model = objective.teachers[0].objective.model
    before = reference_loss(objective, ROWS)
    model.resize_token_embeddings(VOCABULARY + 6, mean_resizing=False)
    objective.teachers = [replace(objective.teachers[0], objective=CausalObjective(model))]
    assert objective.width == VOCABULARY
    with packed_rows(objective.model):
        after = sum(objective(batch) for batch in PACKED.batches(ROWS))
    assert torch.allclose(after, before, rtol=1e-6)


def test_objective_without_teachers_is_cross_entropy():
    objective = make_objective(DistillSettings())
    with packed_rows(objective.model):
        batch = next(PACKED.batches(ROWS))
        assert torch.equal(objective(batch), CausalObjective(objective.model)(batch))
