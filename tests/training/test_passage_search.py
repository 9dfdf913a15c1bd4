"""Retrieval evaluation searches all passages of the evaluated file, including those of training rows."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from deltaw.tasks.embedding import task as embedding
from deltaw.tasks.embedding.objective import text_key
from deltaw.tasks.embedding.task import evaluate_embeddings, searched_passages
from deltaw.training.monitoring.best import evaluated_rows
from tests.conftest import THREADS, write_rows
from tests.serving.encoder_models import write_bert
from tests.training.runs import build_session

WORDS = ("snow", "bread", "river", "engine", "violin", "planet", "garden", "number", "stone", "cloud")


def rows_of(count: int, seed: int = 0) -> list[dict]:
    random = np.random.default_rng(seed)
    texts = [" ".join(random.choice(WORDS, 4)) + f" {n}" for n in range(2 * count)]
    return [{"anchor": a, "positive": b} for a, b in zip(texts[::2], texts[1::2], strict=True)]


def run_settings(folder, rows: list[dict], **data) -> dict:
    """Return settings of a run into ``folder / "run"``. The first call writes the tiny encoder."""
    model = folder / "bert" if (folder / "bert").is_dir() else write_bert(folder / "bert")
    train = {"learning_rate": 5e-3, "batch_size": 8, "epochs": 1, "drift": False}
    data = {"train": str(write_rows(folder / "rows.jsonl", rows)), "eval": 0.2, **data}
    defaults = {"task": "embedding", "precision": "fp32", "device": "cpu", "threads": THREADS, "lora": {"rank": 4}}
    return {**defaults, "model": str(model), "data": data, "train": train, "output": str(folder / "run")}


@pytest.fixture
def make_settings(tmp_path):
    return functools.partial(run_settings, tmp_path)


def evaluate(session, rows=None, max_passages=None):
    with session.running():
        rows = session.data.held_out if rows is None else rows
        return evaluate_embeddings(session.objective, rows, session.batcher, max_passages)


def vectors_of(session, rows) -> dict[bytes, torch.Tensor]:
    """Return the normalized vector of each distinct text, computed without batching."""
    texts = {text_key(text): text for row in rows for text in row.rows}
    vectors = {}
    for key, text in texts.items():
        (hidden,) = session.model(input_ids=torch.from_numpy(text.tokens).long()[None]).last_hidden_state
        vectors[key] = torch.nn.functional.normalize(hidden.mean(0), dim=0).detach()
    return vectors


def ranks_by_hand(session, rows, file) -> list[int]:
    """Return the rank of the first correct passage for each query in the passages of ``file``.

    The text of the query itself is excluded unless it is a correct passage.
    """
    vectors = vectors_of(session, file)
    passages = {text_key(text) for row in file for text in row.rows[1:]}
    ranks = []
    for query in dict.fromkeys(text_key(row.rows[0]) for row in rows):
        correct = {text_key(row.rows[1]) for row in file if text_key(row.rows[0]) == query}
        scores = {key: float(vectors[query] @ vectors[key]) for key in passages if key != query or key in correct}
        ordered = sorted(scores, key=lambda key: -scores[key])
        ranks.append(1 + next(rank for rank, key in enumerate(ordered) if key in correct))
    return ranks


@pytest.mark.parametrize("groups", [3, 4096])
def test_queries_are_ranked_among_all_passages_of_file(make_settings, monkeypatch, groups):
    monkeypatch.setattr(embedding, "_GROUPS_AT_ONCE", groups)
    session = build_session(make_settings(rows_of(60)))
    eval_rows = list(session.data.held_out)
    train = list(session.data.train)
    evaluation = evaluate(session)
    ranks = np.array(ranks_by_hand(session, eval_rows, [*eval_rows, *train]))
    assert evaluation.metrics["passages_searched"] == 60 and "passages_in_file" not in evaluation.metrics
    assert evaluation.metrics["recall@1"] == pytest.approx((ranks == 1).mean())
    assert evaluation.metrics["mrr@10"] == pytest.approx(np.where(ranks <= 10, 1 / ranks, 0).mean())
    ranks_of_eval_rows = np.array(ranks_by_hand(session, eval_rows, eval_rows))
    assert (ranks > ranks_of_eval_rows).any(), "passages of training rows must affect the ranks in this test"


def test_every_correct_passage_in_file_counts(make_settings):
    rows = rows_of(30)
    for n in range(10):
        rows.append({"anchor": rows[n]["anchor"], "positive": f"{rows[n]['anchor']} again"})
    session = build_session(make_settings([row | {"part": n % 7} for n, row in enumerate(rows)], group="part"))
    file = session.data.held_out[0].file_rows
    query_groups = {row.group for row in session.data.held_out}
    assert any(row.group in query_groups for row in session.data.train), "a training row must contain a correct passage"
    ranks = ranks_by_hand(session, session.data.held_out, file)
    assert evaluate(session).metrics["mrr@10"] == pytest.approx(np.mean([1 / r if r <= 10 else 0 for r in ranks]))


def test_equal_passages_are_deduplicated(make_settings):
    rows = rows_of(40)
    for row in rows[10:]:
        row["positive"] = rows[0]["positive"]
    assert evaluate(build_session(make_settings(rows))).metrics["passages_searched"] == 10


def test_passage_equal_to_query_is_not_ranked(make_settings):
    rows = rows_of(40)
    for n in range(40):  # each query is the passage of another row, and would rank first with cosine 1
        rows.append({"anchor": f"other {n}", "positive": rows[n]["anchor"]})
    session = build_session(make_settings(rows))
    file = list(session.data.held_out[0].file_rows)
    ranks = np.array(ranks_by_hand(session, session.data.held_out, file))
    assert evaluate(session).metrics["mrr@10"] == pytest.approx(np.where(ranks <= 10, 1 / ranks, 0).mean())


def test_limited_search_contains_correct_passages_and_reports_size(make_settings):
    session = build_session(make_settings(rows_of(60)))
    limited = evaluate(session, max_passages=20)
    full = evaluate(session)
    assert (limited.metrics["passages_searched"], limited.metrics["passages_in_file"]) == (20, 60)
    assert limited.metrics["mrr@10"] >= full.metrics["mrr@10"]
    first, second = (list(searched_passages(session.data.held_out, 20)) for _ in range(2))
    assert first == second, "each evaluation uses the same sample"


def test_row_subset_is_evaluated_against_entire_file(make_settings):
    session = build_session(make_settings(rows_of(60)))
    assert evaluate(session, session.data.held_out[:3]).metrics["passages_searched"] == 60


def test_evaluation_file_is_searched_without_training_file(make_settings, tmp_path):
    other_file = write_rows(tmp_path / "other.jsonl", rows_of(7, seed=3))
    session = build_session(make_settings(rows_of(60), eval=str(other_file)))
    assert evaluate(session).metrics["passages_searched"] == 7


def test_scored_pairs_and_classes_embed_no_extra_passages(make_settings):
    for extra in ({"score": 0.5}, {}):
        rows = [row | extra for row in rows_of(30)]
        if not extra:
            rows = [{"text": row["anchor"], "label": str(n % 3)} for n, row in enumerate(rows)]
        session = build_session(make_settings(rows))
        assert len(evaluated_rows(session)) == 1


def test_evaluation_cost_includes_passages_of_file(make_settings):
    session = build_session(make_settings(rows_of(60)))
    assert sum(map(len, evaluated_rows(session))) == 12 + 24  # two passages cost as much as a row
