"""Losses of vectors compared with float64 closed forms, and with sentence-transformers if it is installed."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from deltaw.data.example import LabeledExample
from deltaw.errors import UserError
from deltaw.tasks.embedding.losses import select_loss, step_loss
from deltaw.tasks.embedding.rows import TextGroup
from deltaw.tasks.embedding.settings import EmbeddingSettings
from tests.conftest import refusal

WIDTH = 8
ROWS = 5


def group(number: int, texts: int, scores: tuple[float, ...] = (), label=None, passage_of=None) -> TextGroup:
    """Return a row of unique texts. ``passage_of`` is the number of a row with the same passage."""
    tokens = [np.array([number, index]) for index in range(texts)]
    if passage_of is not None:
        tokens[1] = np.array([passage_of, 1])
    rows = tuple(LabeledExample(number, ids.astype(np.int32), 0.0) for ids in tokens)
    return TextGroup(rows, scores, bytes([number]), label)


def random_vectors(count: int) -> torch.Tensor:
    return torch.randn(count, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()


def settings(**options: object) -> EmbeddingSettings:
    return EmbeddingSettings.model_validate(options)


def compute_loss(rows, vectors, normalize=True, **options) -> torch.Tensor:
    return step_loss(vectors, rows, settings(**options), normalize=normalize)


def cross_entropy(scores: np.ndarray) -> float:
    """Return the mean cross-entropy of scores (n, m) whose targets are on the diagonal."""
    return np.mean(np.log(np.exp(scores).sum(1)) - np.diag(scores[:, : len(scores)]))


def normalized(vectors: torch.Tensor) -> np.ndarray:
    return torch.nn.functional.normalize(vectors.detach(), dim=1).numpy()


@pytest.mark.parametrize("negatives", [0, 2])
def test_infonce_is_cross_entropy_over_all_passages(negatives):
    rows = [group(number, 2 + negatives) for number in range(ROWS)]
    embeddings = random_vectors(ROWS * (2 + negatives))
    split = normalized(embeddings).reshape(ROWS, 2 + negatives, WIDTH)
    scores = split[:, 0] @ split[:, 1:].reshape(-1, WIDTH).T / 0.05
    positive_scores = scores[np.arange(ROWS), np.arange(ROWS) * (1 + negatives)]
    expected = np.mean(np.log(np.exp(scores).sum(1)) - positive_scores)
    assert compute_loss(rows, embeddings).item() == pytest.approx(expected, rel=1e-12)
    assert compute_loss(rows, embeddings, temperature=0.5).item() != pytest.approx(expected, rel=1e-3)


def test_symmetric_infonce_averages_both_directions():
    rows = [group(number, 2) for number in range(ROWS)]
    embeddings = random_vectors(2 * ROWS)
    split = normalized(embeddings).reshape(ROWS, 2, WIDTH)
    scores = split[:, 0] @ split[:, 1].T / 0.05
    expected = (cross_entropy(scores) + cross_entropy(scores.T)) / 2
    assert compute_loss(rows, embeddings, symmetric=True).item() == pytest.approx(expected, rel=1e-12)


def test_shared_passage_is_not_a_negative():
    rows = [group(0, 2), group(1, 2, passage_of=0), group(2, 2)]
    embeddings = random_vectors(6)
    with torch.no_grad():
        embeddings[3] = embeddings[1]
    split = normalized(embeddings).reshape(3, 2, WIDTH)
    scores = split[:, 0] @ split[:, 1].T / 0.05
    scores[0, 1] = scores[1, 0] = -np.inf
    assert compute_loss(rows, embeddings).item() == pytest.approx(cross_entropy(scores), rel=1e-12)


def test_query_equal_to_a_passage_is_not_its_negative():
    rows = [group(0, 2), group(1, 2), group(2, 2)]
    query = rows[0].rows[0].tokens
    rows[1] = replace(rows[1], rows=(rows[1].rows[0], replace(rows[1].rows[1], tokens=query)))
    embeddings = random_vectors(6)
    with torch.no_grad():
        embeddings[3] = embeddings[0]
    split = normalized(embeddings).reshape(3, 2, WIDTH)
    scores = split[:, 0] @ split[:, 1].T / 0.05
    scores[0, 1] = -np.inf
    assert compute_loss(rows, embeddings).item() == pytest.approx(cross_entropy(scores), rel=1e-12)


def test_mask_above_excludes_only_negatives_of_other_rows():
    rows = [group(number, 3) for number in range(3)]
    embeddings = random_vectors(9)
    split = normalized(embeddings).reshape(3, 3, WIDTH)
    candidates = np.concatenate([split[:, 1], split[:, 2]])
    similar = split[:, 0] @ candidates.T
    others = np.tile(np.arange(3), 2)[None] != np.arange(3)[:, None]
    masked = (similar > np.diag(similar[:, :3])[:, None] - 0.1) & others
    assert masked.any() and not masked.all()
    expected = cross_entropy(np.where(masked, -np.inf, similar / 0.05))
    assert compute_loss(rows, embeddings, mask_above=-0.1).item() == pytest.approx(expected, rel=1e-12)


def test_cosent_ignores_ties():
    labels = [0.1, 0.9, 0.5, 0.5, 0.0]
    rows = [group(number, 2, (score,)) for number, score in enumerate(labels)]
    embeddings = random_vectors(2 * ROWS)
    split = normalized(embeddings).reshape(ROWS, 2, WIDTH)
    similar = (split[:, 0] * split[:, 1]).sum(1)
    ordered = [(i, j) for i in range(ROWS) for j in range(ROWS) if labels[i] < labels[j]]
    terms = [math.exp((similar[i] - similar[j]) / 0.05) for i, j in ordered]
    assert len(terms) == 9
    assert compute_loss(rows, embeddings).item() == pytest.approx(math.log(1 + sum(terms)), rel=1e-12)


def test_supcon_ignores_classes_of_a_single_row():
    classes = [0, 1, 0, 2, 1]
    rows = [group(number, 1, label=label) for number, label in enumerate(classes)]
    embeddings = random_vectors(ROWS)
    similar = normalized(embeddings) @ normalized(embeddings).T / 0.05
    np.fill_diagonal(similar, -np.inf)
    total = 0.0
    for i in range(ROWS):
        alike = [j for j in range(ROWS) if j != i and classes[i] == classes[j]]
        total -= sum(similar[i, j] - np.log(np.exp(similar[i]).sum()) for j in alike) / max(1, len(alike))
    loss = compute_loss(rows, embeddings)
    assert loss.item() == pytest.approx(total / ROWS, rel=1e-12)
    loss.backward()
    assert embeddings.grad.isfinite().all()


def test_margin_mse_and_kl_match_closed_forms():
    rows = [group(number, 3, (1.5,)) for number in range(ROWS)]
    embeddings = random_vectors(3 * ROWS)
    split = embeddings.detach().numpy().reshape(ROWS, 3, WIDTH)
    margins = ((split[:, 0] * split[:, 1]) - (split[:, 0] * split[:, 2])).sum(1)
    expected = pytest.approx(np.mean((margins - 1.5) ** 2), rel=1e-12)
    assert compute_loss(rows, embeddings, normalize=False).item() == expected
    rows = [group(number, 3, (2.0, 0.5)) for number in range(ROWS)]
    assert compute_loss(rows, embeddings, normalize=False, loss="margin-mse").item() == expected
    student = np.einsum("rd,rpd->rp", split[:, 0], split[:, 1:])
    log_shares = student - np.log(np.exp(student).sum(1, keepdims=True))
    teacher = np.exp([2.0, 0.5]) / np.exp([2.0, 0.5]).sum()
    expected = np.mean((teacher * (np.log(teacher) - log_shares)).sum(1))
    assert compute_loss(rows, embeddings, normalize=False).item() == pytest.approx(expected, rel=1e-6)


def test_matryoshka_sums_losses_of_renormalized_prefixes():
    rows = [group(number, 2) for number in range(ROWS)]
    embeddings = random_vectors(2 * ROWS)
    parts = sum(compute_loss(rows, embeddings[:, :count]).item() for count in (8, 4))
    assert compute_loss(rows, embeddings, dimensions=[8, 4]).item() == pytest.approx(parts, rel=1e-12)


@pytest.mark.parametrize("options", [{}, {"symmetric": True}, {"dimensions": [8, 2]}, {"mask_above": 0.0}])
def test_gradients_match_finite_differences(options):
    rows = [group(number, 3) for number in range(3)]
    embeddings = random_vectors(9)
    assert torch.autograd.gradcheck(lambda x: compute_loss(rows, x, **options, temperature=0.5), (embeddings,))


def test_loss_is_selected_by_row_format():
    kinds = {"infonce": group(0, 2), "cosent": group(0, 2, (0.5,)), "supcon": group(0, 1, label=3)}
    kinds |= {"margin-mse": group(0, 3, (0.5,)), "kl": group(0, 3, (0.5, 0.1))}
    assert {name: select_loss([row], settings()) for name, row in kinds.items()} == {name: name for name in kinds}
    assert select_loss([kinds["cosent"]], settings(loss="angle")) == "angle"
    with pytest.raises(UserError, match="does not fit rows with 1 passages and 1 scores"):
        select_loss([kinds["cosent"]], settings(loss="infonce"))
    refusal(settings, loss="cosent", symmetric=True, match="no symmetric")


def peer_loss(name: str, embeddings: torch.Tensor, columns: int, labels: torch.Tensor | None = None, **options: object):
    """Return the loss of sentence-transformers for the same vectors."""
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses", reason="not installed")
    split = embeddings.view(-1, columns, embeddings.shape[1])
    return getattr(losses, name)(None, **options).compute_loss_from_embeddings(list(split.unbind(1)), labels)


PEERS = [("MultipleNegativesRankingLoss", 2, 0, {}), ("MultipleNegativesRankingLoss", 4, 0, {})]
PEERS += [("MultipleNegativesSymmetricRankingLoss", 2, 0, {"symmetric": True}), ("CoSENTLoss", 2, 1, {})]
PEERS += [("AnglELoss", 2, 1, {"loss": "angle"}), ("MarginMSELoss", 3, 1, {})]
PEERS += [("MarginMSELoss", 4, 3, {"loss": "margin-mse"}), ("DistillKLDivLoss", 4, 3, {})]


@pytest.mark.parametrize(("name", "texts", "scores", "options"), PEERS)
def test_losses_and_gradients_match_sentence_transformers(name, texts, scores, options):
    random_scores = np.random.default_rng(0).normal(size=(ROWS, scores)).clip(-1, 1)
    rows = [group(number, texts, tuple(random_scores[number].tolist())) for number in range(ROWS)]
    ours, other = (random_vectors(ROWS * texts).detach().float().requires_grad_() for _ in range(2))
    compute_loss(rows, ours, normalize=False, **options).backward()
    labels = torch.tensor(random_scores, dtype=torch.float32)
    loss = peer_loss(name, other, texts, labels[:, 0] if scores == 1 else labels)
    loss.backward()
    assert compute_loss(rows, ours, normalize=False, **options).item() == pytest.approx(loss.item(), rel=1e-5)
    assert (ours.grad - other.grad).norm() <= 1e-5 * other.grad.norm()
