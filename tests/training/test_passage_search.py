"""Retrieval evaluation of embeddings searches all passages of the file that the held-out rows come from."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from deltaw.training.embedding.objective import key_of_text
from deltaw.training.monitoring.best import evaluated_parts
from deltaw.training.tasks import embedding
from deltaw.training.tasks.embedding import evaluate_embeddings, searched_passages
from tests.conftest import THREADS, write_rows
from tests.serving.encoder_models import write_bert
from tests.training.runs import session_of

WORDS = ("snow", "bread", "river", "engine", "violin", "planet", "garden", "number", "stone", "cloud")


def rows_of(count: int, seed: int = 0) -> list[dict]:
    draw = np.random.default_rng(seed)
    texts = [" ".join(draw.choice(WORDS, 4)) + f" {n}" for n in range(2 * count)]
    return [{"anchor": a, "positive": b} for a, b in zip(texts[::2], texts[1::2], strict=True)]


def run_settings(folder, rows: list[dict], **data) -> dict:
    """Settings of a run into ``folder / "run"``; the tiny encoder is written on the first use."""
    model = folder / "bert" if (folder / "bert").is_dir() else write_bert(folder / "bert")
    train = {"learning_rate": 5e-3, "batch_size": 8, "epochs": 1, "drift": False}
    return {
        "model": str(model),
        "task": "embedding",
        "precision": "fp32",
        "device": "cpu",
        "threads": THREADS,
        "data": {"train": str(write_rows(folder / "rows.jsonl", rows)), "eval": 0.2, **data},
        "lora": {"rank": 4, "alpha": 8},
        "train": train,
        "output": str(folder / "run"),
    }


@pytest.fixture
def made(tmp_path):
    return functools.partial(run_settings, tmp_path)


def evaluate(session, rows=None, most=None):
    with session.running():
        rows = session.data.held_out if rows is None else rows
        return evaluate_embeddings(session.objective, rows, session.batcher, most)


def vectors_of(session, rows) -> dict[bytes, torch.Tensor]:
    """Vectors of length 1 by text, each text alone in the model."""
    texts = {key_of_text(text): text for row in rows for text in row.rows}
    found = {}
    for key, text in texts.items():
        (hidden,) = session.model(input_ids=torch.from_numpy(text.tokens).long()[None]).last_hidden_state
        found[key] = torch.nn.functional.normalize(hidden.mean(0), dim=0).detach()
    return found


def ranks_by_hand(session, rows, file) -> list[int]:
    """For each row, the rank of the first right passage among all passages of the file but the query's own text."""
    vectors = vectors_of(session, file)
    passages = {key_of_text(text) for row in file for text in row.rows[1:]}
    found = []
    for query in dict.fromkeys(key_of_text(row.rows[0]) for row in rows):
        right = {key_of_text(row.rows[1]) for row in file if key_of_text(row.rows[0]) == query}
        scores = {key: float(vectors[query] @ vectors[key]) for key in passages if key != query or key in right}
        ordered = sorted(scores, key=lambda key: -scores[key])
        found.append(1 + next(rank for rank, key in enumerate(ordered) if key in right))
    return found


@pytest.mark.parametrize("groups", [1, 3, 4096])
def test_held_out_queries_are_ranked_among_all_passages_of_the_file(made, monkeypatch, groups):
    monkeypatch.setattr(embedding, "_GROUPS_AT_ONCE", groups)
    session = session_of(made(rows_of(60)))
    held_out, train = list(session.data.held_out), list(session.data.train)
    found = evaluate(session)
    ranks = np.array(ranks_by_hand(session, held_out, [*held_out, *train]))
    assert found.metrics["passages_searched"] == 60 and "passages_in_file" not in found.metrics
    assert found.metrics["recall@1"] == pytest.approx((ranks == 1).mean())
    assert found.metrics["mrr@10"] == pytest.approx(np.where(ranks <= 10, 1 / ranks, 0).mean())
    alone = np.array(ranks_by_hand(session, held_out, held_out))
    assert (ranks > alone).any(), "the passages of the training rows must matter in this test"


def test_every_right_passage_of_a_query_in_the_file_counts(made):
    rows = rows_of(30)
    for n in range(10):
        rows.append({"anchor": rows[n]["anchor"], "positive": f"{rows[n]['anchor']} again"})
    session = session_of(made([row | {"part": n % 7} for n, row in enumerate(rows)], group="part"))
    file = session.data.held_out[0].file_rows
    asked = {row.group for row in session.data.held_out}
    assert any(row.group in asked for row in session.data.train), "a right passage must be among the training rows"
    ranks = ranks_by_hand(session, session.data.held_out, file)
    assert evaluate(session).metrics["mrr@10"] == pytest.approx(np.mean([1 / r if r <= 10 else 0 for r in ranks]))


def test_equal_passages_are_one(made):
    rows = rows_of(40)
    for row in rows[10:]:
        row["positive"] = rows[0]["positive"]
    assert evaluate(session_of(made(rows))).metrics["passages_searched"] == 10


def test_a_passage_with_the_text_of_the_query_is_not_ranked(made):
    rows = rows_of(40)
    for n in range(40):  # each query is the passage of another row, and would rank first with cosine 1
        rows.append({"anchor": f"other {n}", "positive": rows[n]["anchor"]})
    session = session_of(made(rows))
    file = list(session.data.held_out[0].file_rows)
    ranks = np.array(ranks_by_hand(session, session.data.held_out, file))
    assert evaluate(session).metrics["mrr@10"] == pytest.approx(np.where(ranks <= 10, 1 / ranks, 0).mean())


def test_a_limited_search_has_the_right_passages_and_reports_its_size(made):
    session = session_of(made(rows_of(60)))
    found, whole = evaluate(session, most=20), evaluate(session)
    assert (found.metrics["passages_searched"], found.metrics["passages_in_file"]) == (20, 60)
    assert found.metrics["mrr@10"] >= whole.metrics["mrr@10"]
    assert list(searched_passages(session.data.held_out, 20)) == list(searched_passages(session.data.held_out, 20)), (
        "the sample is the same in each evaluation"
    )


def test_some_rows_of_a_file_are_evaluated_against_the_whole_file(made):
    session = session_of(made(rows_of(60)))
    assert evaluate(session, session.data.held_out[:3]).metrics["passages_searched"] == 60


def test_an_evaluation_file_is_its_own_corpus(made, tmp_path):
    other = write_rows(tmp_path / "other.jsonl", rows_of(7, seed=3))
    session = session_of(made(rows_of(60), eval=str(other)))
    assert evaluate(session).metrics["passages_searched"] == 7


def test_scored_pairs_and_classes_embed_nothing_else(made):
    for extra in ({"score": 0.5}, {}):
        rows = [row | extra for row in rows_of(30)]
        if not extra:
            rows = [{"text": row["anchor"], "label": str(n % 3)} for n, row in enumerate(rows)]
        session = session_of(made(rows))
        assert len(evaluated_parts(session)) == 1


def test_costs_count_the_passages_of_the_file(made):
    session = session_of(made(rows_of(60)))
    assert sum(map(len, evaluated_parts(session))) == 12 + 24  # two passages are as much work as a row
