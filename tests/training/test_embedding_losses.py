"""Losses of vectors against float64 closed forms, and against sentence-transformers where it is installed."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from deltaw.data.example import LabeledExample
from deltaw.data.retrieval import TextGroup
from deltaw.errors import UserError
from deltaw.task_settings import EmbeddingSettings
from deltaw.training.embedding.losses import loss_for, loss_of_step

WIDTH, ROWS = 8, 5


def group(number: int, texts: int, scores: tuple[float, ...] = (), label: int | None = None, same=None) -> TextGroup:
    """A row of texts that nothing else has; ``same`` names a text that stands in place of its passage."""
    tokens = [np.array([number, place]) for place in range(texts)]
    if same is not None:
        tokens[1] = np.array([same, 1])
    rows = tuple(LabeledExample(number, one.astype(np.int32), 0.0) for one in tokens)
    return TextGroup(rows, scores, bytes([number]), label)


def vectors(count: int) -> torch.Tensor:
    return torch.randn(count, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()


def settings(**given: object) -> EmbeddingSettings:
    return EmbeddingSettings.model_validate(given)


def of(rows, found, normalize=True, **given) -> torch.Tensor:
    return loss_of_step(found, rows, settings(**given), normalize=normalize)


def unit(found: torch.Tensor) -> np.ndarray:
    return torch.nn.functional.normalize(found.detach(), dim=1).numpy()


@pytest.mark.parametrize("negatives", [0, 2])
def test_infonce_is_the_cross_entropy_over_all_passages_of_the_step(negatives):
    rows = [group(number, 2 + negatives) for number in range(ROWS)]
    found = vectors(ROWS * (2 + negatives))
    split = unit(found).reshape(ROWS, 2 + negatives, WIDTH)
    scores = split[:, 0] @ split[:, 1:].reshape(-1, WIDTH).T / 0.05
    own = scores[np.arange(ROWS), np.arange(ROWS) * (1 + negatives)]
    expected = np.mean(np.log(np.exp(scores).sum(1)) - own)
    assert of(rows, found).item() == pytest.approx(expected, rel=1e-12)
    assert of(rows, found, temperature=0.5).item() != pytest.approx(expected, rel=1e-3)


def test_symmetric_infonce_also_finds_the_query_of_each_passage():
    rows, found = [group(number, 2) for number in range(ROWS)], vectors(2 * ROWS)
    split = unit(found).reshape(ROWS, 2, WIDTH)
    scores = split[:, 0] @ split[:, 1].T / 0.05
    own = np.diag(scores)
    both = [np.mean(np.log(np.exp(one).sum(1)) - own) for one in (scores, scores.T)]
    assert of(rows, found, symmetric=True).item() == pytest.approx(np.mean(both), rel=1e-12)


def test_a_passage_that_is_right_for_two_rows_is_no_negative_of_either():
    rows = [group(0, 2), group(1, 2, same=0), group(2, 2)]
    found = vectors(6)
    with torch.no_grad():
        found[3] = found[1]
    split = unit(found).reshape(3, 2, WIDTH)
    scores = split[:, 0] @ split[:, 1].T / 0.05
    scores[0, 1] = scores[1, 0] = -np.inf
    expected = np.mean(np.log(np.exp(scores).sum(1)) - np.diag(scores))
    assert of(rows, found).item() == pytest.approx(expected, rel=1e-12)


def test_a_query_is_no_negative_of_itself_where_it_is_another_rows_passage():
    rows = [group(0, 2), group(1, 2), group(2, 2)]
    query = rows[0].rows[0].tokens
    rows[1] = replace(rows[1], rows=(rows[1].rows[0], replace(rows[1].rows[1], tokens=query)))
    found = vectors(6)
    with torch.no_grad():
        found[3] = found[0]
    split = unit(found).reshape(3, 2, WIDTH)
    scores = split[:, 0] @ split[:, 1].T / 0.05
    scores[0, 1] = -np.inf
    expected = np.mean(np.log(np.exp(scores).sum(1)) - np.diag(scores))
    assert of(rows, found).item() == pytest.approx(expected, rel=1e-12)


def test_negatives_of_other_rows_above_a_margin_are_left_out_and_the_own_ones_are_not():
    rows, found = [group(number, 3) for number in range(3)], vectors(9)
    split = unit(found).reshape(3, 3, WIDTH)
    candidates = np.concatenate([split[:, 1], split[:, 2]])
    similar = split[:, 0] @ candidates.T
    others = np.tile(np.arange(3), 2)[None] != np.arange(3)[:, None]
    left_out = (similar > np.diag(similar[:, :3])[:, None] - 0.1) & others
    assert left_out.any()
    assert not left_out.all()
    scores = np.where(left_out, -np.inf, similar / 0.05)
    expected = np.mean(np.log(np.exp(scores).sum(1)) - np.diag(scores[:, :3]))
    assert of(rows, found, mask_above=-0.1).item() == pytest.approx(expected, rel=1e-12)


def test_cosent_counts_pairs_in_the_wrong_order_and_no_ties():
    given = [0.1, 0.9, 0.5, 0.5, 0.0]
    rows, found = [group(number, 2, (score,)) for number, score in enumerate(given)], vectors(2 * ROWS)
    split = unit(found).reshape(ROWS, 2, WIDTH)
    similar = (split[:, 0] * split[:, 1]).sum(1)
    terms = [
        math.exp((similar[i] - similar[j]) / 0.05) for i in range(ROWS) for j in range(ROWS) if given[i] < given[j]
    ]
    assert len(terms) == 9
    assert of(rows, found).item() == pytest.approx(math.log(1 + sum(terms)), rel=1e-12)


def test_supcon_takes_rows_of_the_same_class_as_right_and_a_class_of_one_row_adds_nothing():
    classes = [0, 1, 0, 2, 1]
    rows, found = [group(number, 1, label=label) for number, label in enumerate(classes)], vectors(ROWS)
    similar = unit(found) @ unit(found).T / 0.05
    np.fill_diagonal(similar, -np.inf)
    total = 0.0
    for i in range(ROWS):
        alike = [j for j in range(ROWS) if j != i and classes[i] == classes[j]]
        total -= sum(similar[i, j] - np.log(np.exp(similar[i]).sum()) for j in alike) / max(1, len(alike))
    loss = of(rows, found)
    assert loss.item() == pytest.approx(total / ROWS, rel=1e-12)
    loss.backward()
    assert found.grad.isfinite().all()


def test_the_teachers_margin_and_its_distribution_over_passages():
    rows, found = [group(number, 3, (1.5,)) for number in range(ROWS)], vectors(3 * ROWS)
    split = found.detach().numpy().reshape(ROWS, 3, WIDTH)
    margins = ((split[:, 0] * split[:, 1]) - (split[:, 0] * split[:, 2])).sum(1)
    assert of(rows, found, normalize=False).item() == pytest.approx(np.mean((margins - 1.5) ** 2), rel=1e-12)
    rows = [group(number, 3, (2.0, 0.5)) for number in range(ROWS)]
    assert of(rows, found, normalize=False, loss="margin-mse").item() == pytest.approx(np.mean((margins - 1.5) ** 2))
    student = np.einsum("rd,rpd->rp", split[:, 0], split[:, 1:])
    log_shares = student - np.log(np.exp(student).sum(1, keepdims=True))
    teacher = np.exp([2.0, 0.5]) / np.exp([2.0, 0.5]).sum()
    expected = np.mean((teacher * (np.log(teacher) - log_shares)).sum(1))
    assert of(rows, found, normalize=False).item() == pytest.approx(expected, rel=1e-6)


def test_matryoshka_adds_the_loss_of_the_first_dimensions_normalized_again():
    rows, found = [group(number, 2) for number in range(ROWS)], vectors(2 * ROWS)
    parts = sum(of(rows, found[:, :count]).item() for count in (8, 4))
    assert of(rows, found, dimensions=[8, 4]).item() == pytest.approx(parts, rel=1e-12)


@pytest.mark.parametrize("given", [{}, {"symmetric": True}, {"dimensions": [8, 2]}, {"mask_above": 0.0}])
def test_gradients_are_those_of_finite_differences(given):
    rows = [group(number, 3) for number in range(3)]
    found = vectors(9)
    assert torch.autograd.gradcheck(lambda one: of(rows, one, **given, temperature=0.5), (found,))


def test_the_loss_follows_from_what_the_rows_have_and_another_one_is_refused():
    kinds = {
        "infonce": group(0, 2),
        "cosent": group(0, 2, (0.5,)),
        "supcon": group(0, 1, label=3),
        "margin-mse": group(0, 3, (0.5,)),
        "kl": group(0, 3, (0.5, 0.1)),
    }
    assert {name: loss_for([row], settings()) for name, row in kinds.items()} == {name: name for name in kinds}
    assert loss_for([kinds["cosent"]], settings(loss="angle")) == "angle"
    with pytest.raises(UserError, match="does not fit rows with 1 passages and 1 scores"):
        loss_for([kinds["cosent"]], settings(loss="infonce"))
    with pytest.raises(UserError, match="no symmetric"):
        settings(loss="cosent", symmetric=True)


def theirs(name: str, found: torch.Tensor, columns: int, labels: torch.Tensor | None = None, **how: object):
    """A loss of sentence-transformers on the same vectors."""
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses", reason="not installed")
    split = found.view(-1, columns, found.shape[1])
    return getattr(losses, name)(None, **how).compute_loss_from_embeddings(list(split.unbind(1)), labels)


@pytest.mark.parametrize(
    ("name", "texts", "scores", "given"),
    [
        ("MultipleNegativesRankingLoss", 2, 0, {}),
        ("MultipleNegativesRankingLoss", 4, 0, {}),
        ("MultipleNegativesSymmetricRankingLoss", 2, 0, {"symmetric": True}),
        ("CoSENTLoss", 2, 1, {}),
        ("AnglELoss", 2, 1, {"loss": "angle"}),
        ("MarginMSELoss", 3, 1, {}),
        ("MarginMSELoss", 4, 3, {"loss": "margin-mse"}),
        ("DistillKLDivLoss", 4, 3, {}),
    ],
)
def test_losses_and_gradients_are_those_of_sentence_transformers(name, texts, scores, given):
    drawn = np.random.default_rng(0).normal(size=(ROWS, scores)).clip(-1, 1)
    rows = [group(number, texts, tuple(drawn[number].tolist())) for number in range(ROWS)]
    ours, other = (vectors(ROWS * texts).detach().float().requires_grad_() for _ in range(2))
    of(rows, ours, normalize=False, **given).backward()
    labels = torch.tensor(drawn, dtype=torch.float32)
    loss = theirs(name, other, texts, labels[:, 0] if scores == 1 else labels)
    loss.backward()
    assert of(rows, ours, normalize=False, **given).item() == pytest.approx(loss.item(), rel=1e-5)
    assert (ours.grad - other.grad).norm() <= 1e-5 * other.grad.norm()
