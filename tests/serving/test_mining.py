"""Tests of mining negatives, compared with brute force and sentence-transformers."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from deltaw.errors import UserError
from deltaw.evaluation import mining
from deltaw.evaluation.mining import MiningSettings, mine, mining_output, write_mined
from deltaw.hub.sentence_layout import SentenceLayout
from deltaw.serving.encoders import read_embedder
from tests.byte_models import byte_tokenizer
from tests.serving.encoder_models import write_bert

LOAD_OPTIONS = {"precision": "fp32", "device": "cpu"}


class Angles:
    """Fake embedder: a text's vector has the angle in degrees that its first word names. Records the embedded texts."""

    width = 2
    layout = SentenceLayout("mean", True)

    def __init__(self):
        self.embedded_texts: list[str] = []

    def vectors(self, texts):
        self.embedded_texts += texts
        angles = torch.tensor([math.radians(float(text.split()[0])) for text in texts])
        return torch.stack([angles.cos(), angles.sin()], 1), 0


def mine_rows(pairs, passages, embedder=None, **settings):
    settings = {"negatives": 2, "relative_margin": None} | settings
    return mine(pairs, passages, embedder or Angles(), MiningSettings(**settings), lambda line: None)


def negatives(*arguments, **settings):
    """Return the texts of each row's negatives."""
    return [[text for text, _ in row.negatives] for row in mine_rows(*arguments, **settings).rows]


def test_negatives_are_nearest_passages_except_positives():
    passages = ["60 far", "10 near", "20 mid", "1 own", "5 nearest"]
    result = mine_rows([("0 query", "1 own")], passages, negatives=3)
    assert result.rows[0].as_dict() == {
        "anchor": "0 query",
        "positive": "1 own",
        "negative_1": "5 nearest",
        "negative_2": "10 near",
        "negative_3": "20 mid",
    }
    expected = [math.cos(math.radians(angle)) for angle in (5, 10, 20)]
    assert [score for _, score in result.rows[0].negatives] == pytest.approx(expected)
    assert result.rows[0].score == pytest.approx(math.cos(math.radians(1)))


def test_positives_of_equal_queries_are_never_negatives():
    pairs = [("0 Query", "1 one"), ("0  query", "2 two"), ("50 other", "40 elsewhere")]
    passages = ["2 TWO", "1  One", "0 query", "3 three", "3 Three ", "4 four"]
    # Both rows have the same query, so their passages are positives of each other. Texts equal except for case or
    # spaces are the same.
    assert negatives(pairs, passages) == [["3 three", "4 four"]] * 2 + [["4 four", "3 three"]]
    assert mine_rows(pairs, passages).passages == 5


def test_margins_exclude_possible_positives():
    """The positive at 60 degrees scores 0.5."""
    pairs = [("0 q", "60 own")]
    passages = [f"{angle} x" for angle in (30, 59, 61, 62, 70, 80)]
    assert negatives(pairs, passages) == [["30 x", "59 x"]]
    assert negatives(pairs, passages, absolute_margin=0) == [["61 x", "62 x"]]
    assert negatives(pairs, passages, relative_margin=0.05) == [["62 x", "70 x"]]  # below 0.475: 61.6 degrees
    assert negatives(pairs, passages, absolute_margin=0.2, relative_margin=0.05) == [["80 x"]]
    assert negatives(pairs, passages, max_score=0.52) == [["59 x", "61 x"]]
    result = mine_rows(pairs, passages, absolute_margin=0, max_score=0.48)
    assert (result.too_close, result.too_high) == (2, 1)
    # A relative margin also lowers the bound if the score is negative.
    assert negatives([("0 q", "120 own")], ["119 x", "121 x", "150 x"], relative_margin=0.05) == [["150 x"]]


def test_lowest_positive_score_bounds_negatives():
    pairs = [("0 q", "10 own"), ("0 q", "60 own")]
    for rows in (pairs, pairs[::-1]):
        assert negatives(rows, ["20 x", "65 x", "70 x"], relative_margin=0.05) == [["65 x", "70 x"]] * 2


def test_ranks_exclude_positives():
    pairs = [("0 q", "2 own")]
    passages = [f"{angle} x" for angle in range(3, 9)] + ["2 own"]
    assert negatives(pairs, passages, from_rank=3) == [["5 x", "6 x"]]
    assert negatives(pairs, passages, from_rank=2, to_rank=3) == [["4 x", "5 x"]]
    with pytest.raises(UserError, match="2 negatives cannot be found from rank 2 to 2"):
        MiningSettings(negatives=2, from_rank=2, to_rank=2)


def test_rows_with_too_few_negatives_are_counted():
    result = mine_rows([("0 q", "9 own"), ("50 q", "40 own")], ["9 own", "40 own"], negatives=1, max_score=0.76)
    assert [len(row.negatives) for row in result.rows] == [0, 1]  # cosines of 40 and of 41 degrees
    assert (result.num_without_negatives(), len(result.complete()), result.as_dict()["rows"]) == (1, 1, 2)
    assert mine_rows([("0 q", "9 own")], ["9 own"]).as_dict()["mean_scores"]["negative"] is None


def test_each_text_is_embedded_once_with_prompt():
    embedder = Angles()
    pairs = [("0 q", "5 own"), ("0 q", "5 own"), ("7 x", "5 own")]
    mine_rows(pairs, ["7 x", "5 own", "7 x"], embedder)
    assert sorted(embedder.embedded_texts) == ["0 q", "5 own", "7 x"]
    embedder = Angles()
    texts = negatives(pairs, ["7 x", "5 own"], embedder, query_prompt="90 ask: ", passage_prompt="3 say: ")
    expected = ["3 say: 5 own", "3 say: 7 x", "90 ask: 0 q", "90 ask: 7 x"]
    assert sorted(embedder.embedded_texts) == expected and texts == [["7 x"], ["7 x"], []]


def test_vectors_exceeding_memory_are_rejected(monkeypatch):
    monkeypatch.setattr(mining, "free_memory_bytes", lambda: 10)
    with pytest.raises(UserError, match="the vectors of 2 texts need"):
        mine_rows([("0 q", "9 own")], [])


@pytest.fixture(scope="module")
def sentences() -> list[tuple[str, str]]:
    """Pairs whose passage contains a word of the query. Some queries occur twice."""
    random = np.random.default_rng(0)
    words = ["river", "stone", "green", "cloud", "paper", "seven", "under", "light", "bread", "quiet"]

    def text(count, *prefix):
        return " ".join([*prefix, *random.choice(words, count)])

    queries = [text(3) for _ in range(30)]
    return [(query, text(3, query.split()[0])) for query in (*queries, *queries[:6])]


def test_negatives_match_sentence_transformers(tmp_path, sentences):
    """Scores differ only by rounding, so the selected texts are equal."""
    util = pytest.importorskip("sentence_transformers.util", reason="sentence-transformers is not installed")
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer

    folder = write_bert(tmp_path / "bert")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None  # otherwise texts are rendered as messages
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    pairs = list(dict.fromkeys(sentences))
    result = mine(
        pairs,
        [passage for _, passage in pairs],
        read_embedder(str(folder), log=lambda line: None, **LOAD_OPTIONS),
        MiningSettings(negatives=3, to_rank=90, relative_margin=1e-4),
        lambda line: None,
    )
    table = Dataset.from_dict({"anchor": [q for q, _ in pairs], "positive": [p for _, p in pairs]})
    model = SentenceTransformer(str(folder), device="cpu")
    options = {"num_negatives": 3, "range_max": 90, "relative_margin": 1e-4, "output_format": "n-tuple"}
    expected = util.mine_hard_negatives(table, model, verbose=False, **options)
    ours = {(row.anchor, row.positive): row.as_dict() for row in result.complete()}
    assert 10 < len(expected) == len(ours) and result.too_close > 10
    assert {(row["anchor"], row["positive"]): row for row in expected} == ours


def test_faiss_search_of_large_corpora_is_nearly_exact(monkeypatch):
    pytest.importorskip("faiss", reason="faiss is not installed")
    random = np.random.default_rng(0)
    passages = [f"{angle:.3f} x" for angle in random.uniform(0, 360, 3000)]
    pairs = [(f"{angle} q", f"{angle + 1} own") for angle in range(0, 360, 9)]
    exact = negatives(pairs, passages, negatives=5)
    monkeypatch.setattr(mining, "MAX_EXACT_PASSAGES", 1000)
    lines: list[str] = []
    result = mine(pairs, passages, Angles(), MiningSettings(5, relative_margin=None), lines.append)
    pairs = zip(result.rows, exact, strict=True)
    matches = [len({text for text, _ in row.negatives} & set(exact_texts)) for row, exact_texts in pairs]
    assert "approximate search by faiss" in lines[-1] and sum(matches) > 0.9 * 5 * len(pairs)


def test_exact_search_without_faiss_logs_a_hint(monkeypatch):
    monkeypatch.setattr(mining, "MAX_EXACT_PASSAGES", 3)
    monkeypatch.setattr(mining, "find_spec", lambda name: None)
    pairs = [("0 q", "1 own")]
    passages = [f"{angle} x" for angle in range(5, 15)]
    lines = []
    result = mine(pairs, passages, Angles(), MiningSettings(2, relative_margin=None), lines.append)
    assert [text for text, _ in result.rows[0].negatives] == ["5 x", "6 x"]
    assert "is slow" in lines[0] and "deltaw[search]" in lines[1]


def test_long_text_is_truncated_and_counted(bert):
    embedder = read_embedder(str(bert), log=lambda line: None, **LOAD_OPTIONS)
    assert embedder.limit == 64
    texts = ["x" * 200, "short", "x" * 64]
    vectors, num_truncated = embedder.vectors(texts)
    assert num_truncated == 1 and torch.allclose(vectors[0], vectors[2], atol=1e-6)
    with pytest.raises(UserError, match="no token"):
        embedder.vectors([""])


def test_adapter_of_other_task_is_rejected(runs):
    with pytest.raises(UserError, match="this adapter is for sequence-classification"):
        read_embedder(str(runs["mood"]), log=print, **LOAD_OPTIONS)


def test_output_is_next_to_input_and_never_overwrites_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d").mkdir()
    file = tmp_path / "d" / "rows.jsonl"
    file.touch()
    target = mining_output(str(file), None, None, force=False)
    assert target == tmp_path / "d" / "rows.mined.jsonl"
    assert str(mining_output("owner/rows:train", None, None, force=False)) == "rows_train.mined.jsonl"
    write_mined(mine_rows([("0 é", "9 own")], ["7 x"]).rows, target)
    assert json.loads(target.read_text(encoding="utf-8")) == {"anchor": "0 é", "positive": "9 own", "negative_1": "7 x"}
    with pytest.raises(UserError, match="the output exists"):
        mining_output(str(file), None, None, force=False)
    assert mining_output(str(file), target, None, force=True) == target
    for read, corpus in ((target, None), (file, target)):
        with pytest.raises(UserError, match="the output is an input file"):
            mining_output(str(read), target, None if corpus is None else str(corpus), force=True)
    assert sorted(entry.name for entry in target.parent.iterdir()) == ["rows.jsonl", "rows.mined.jsonl"]
