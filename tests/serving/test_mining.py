"""Mining: which passages become negatives of which query, against brute force and sentence-transformers."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from deltaw.errors import UserError
from deltaw.hub.sentence_layout import SentenceLayout
from deltaw.serving import mining
from deltaw.serving.encoders import read_embedder
from deltaw.serving.mining import MiningSettings, mine, mined_file, write_mined
from tests.byte_models import byte_tokenizer
from tests.serving.encoder_models import write_bert

OPENED = {"precision": "fp32", "device": "cpu"}


class Angles:
    """Embeds a text as the angle that its first word names, in degrees; remembers what it was asked."""

    width, layout = 2, SentenceLayout("mean", True)

    def __init__(self):
        self.asked: list[str] = []

    def vectors(self, texts):
        self.asked += texts
        angles = torch.tensor([math.radians(float(text.split()[0])) for text in texts])
        return torch.stack([angles.cos(), angles.sin()], 1), 0


def mined(pairs, passages, embedder=None, **settings):
    settings = {"negatives": 2, "relative_margin": None} | settings
    return mine(pairs, passages, embedder or Angles(), MiningSettings(**settings), lambda line: None)


def negatives(*arguments, **settings):
    """The texts of each row's negatives."""
    return [[text for text, _ in row.negatives] for row in mined(*arguments, **settings).rows]


def test_negatives_are_the_nearest_passages_that_are_not_the_rows_own():
    passages = ["60 far", "10 near", "20 mid", "1 own", "5 nearest"]
    found = mined([("0 query", "1 own")], passages, negatives=3)
    assert found.rows[0].as_dict() == {
        "anchor": "0 query",
        "positive": "1 own",
        "negative_1": "5 nearest",
        "negative_2": "10 near",
        "negative_3": "20 mid",
    }
    expected = [math.cos(math.radians(angle)) for angle in (5, 10, 20)]
    assert [score for _, score in found.rows[0].negatives] == pytest.approx(expected)
    assert found.rows[0].score == pytest.approx(math.cos(math.radians(1)))


def test_no_passage_of_any_row_with_the_query_nor_an_equal_text_is_a_negative():
    pairs = [("0 Query", "1 one"), ("0  query", "2 two"), ("50 other", "40 elsewhere")]
    passages = ["2 TWO", "1  One", "0 query", "3 three", "3 Three ", "4 four"]
    # The second row's passage belongs to the first, too; the query itself and texts that differ in case do not count.
    assert negatives(pairs, passages) == [["3 three", "4 four"]] * 2 + [["4 four", "3 three"]]
    assert mined(pairs, passages).passages == 5


def test_margins_leave_out_what_may_be_another_answer():
    """The own passage at 60 degrees scores 0.5; others by cosine 0.5 and less."""
    pairs = [("0 q", "60 own")]
    passages = [f"{angle} x" for angle in (30, 59, 61, 62, 70, 80)]
    assert negatives(pairs, passages) == [["30 x", "59 x"]]
    assert negatives(pairs, passages, absolute_margin=0) == [["61 x", "62 x"]]
    assert negatives(pairs, passages, relative_margin=0.05) == [["62 x", "70 x"]]  # below 0.475: 61.6 degrees
    assert negatives(pairs, passages, absolute_margin=0.2, relative_margin=0.05) == [["80 x"]]
    assert negatives(pairs, passages, max_score=0.52) == [["59 x", "61 x"]]
    found = mined(pairs, passages, absolute_margin=0, max_score=0.48)
    assert (found.too_close, found.too_high) == (2, 1)
    # A margin is a share of a negative score, too: still farther from the query.
    assert negatives([("0 q", "120 own")], ["119 x", "121 x", "150 x"], relative_margin=0.05) == [["150 x"]]


def test_of_several_own_passages_the_lowest_bounds_the_negatives():
    pairs = [("0 q", "10 own"), ("0 q", "60 own")]
    for rows in (pairs, pairs[::-1]):
        assert negatives(rows, ["20 x", "65 x", "70 x"], relative_margin=0.05) == [["65 x", "70 x"]] * 2


def test_ranks_are_counted_without_the_rows_own_passages():
    pairs, passages = [("0 q", "2 own")], [f"{angle} x" for angle in range(3, 9)] + ["2 own"]
    assert negatives(pairs, passages, from_rank=3) == [["5 x", "6 x"]]
    assert negatives(pairs, passages, from_rank=2, to_rank=3) == [["4 x", "5 x"]]
    with pytest.raises(UserError, match="2 negatives cannot be found from rank 2 to 2"):
        MiningSettings(negatives=2, from_rank=2, to_rank=2)


def test_rows_with_fewer_are_counted_and_none_is_lost():
    found = mined([("0 q", "9 own"), ("50 q", "40 own")], ["9 own", "40 own"], negatives=1, max_score=0.76)
    assert [len(row.negatives) for row in found.rows] == [0, 1]  # cosines of 40 and of 41 degrees
    assert (found.bare(), len(found.complete()), found.as_dict()["rows"]) == (1, 1, 2)
    assert mined([("0 q", "9 own")], ["9 own"]).as_dict()["mean_scores"]["negative"] is None


def test_each_text_is_embedded_once_and_with_its_prompt():
    embedder = Angles()
    pairs = [("0 q", "5 own"), ("0 q", "5 own"), ("7 x", "5 own")]
    mined(pairs, ["7 x", "5 own", "7 x"], embedder)
    assert sorted(embedder.asked) == ["0 q", "5 own", "7 x"]
    embedder = Angles()
    found = negatives(pairs, ["7 x", "5 own"], embedder, query_prompt="90 ask: ", passage_prompt="3 say: ")
    asked = ["3 say: 5 own", "3 say: 7 x", "90 ask: 0 q", "90 ask: 7 x"]
    assert sorted(embedder.asked) == asked and found == [["7 x"], ["7 x"], []]


def test_vectors_that_do_not_fit_are_refused(monkeypatch):
    monkeypatch.setattr(mining, "free_memory_bytes", lambda: 10)
    with pytest.raises(UserError, match="the vectors of 2 texts need"):
        mined([("0 q", "9 own")], [])


@pytest.fixture(scope="module")
def sentences() -> list[tuple[str, str]]:
    """Pairs, some of one query, of which each passage has some of its query's words."""
    random = np.random.default_rng(0)
    words = ["river", "stone", "green", "cloud", "paper", "seven", "under", "light", "bread", "quiet"]

    def text(count, *more):
        return " ".join([*more, *random.choice(words, count)])

    queries = [text(3) for _ in range(30)]
    return [(query, text(3, query.split()[0])) for query in (*queries, *queries[:6])]


def test_negatives_are_those_of_sentence_transformers(tmp_path, sentences):
    """Its own scores differ by rounding alone, so that the texts are the same."""
    util = pytest.importorskip("sentence_transformers.util", reason="sentence-transformers is not installed")
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer

    folder = write_bert(tmp_path / "bert")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template, tokenizer.pad_token = None, tokenizer.eos_token  # it would render texts as messages
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    pairs = list(dict.fromkeys(sentences))
    found = mine(
        pairs,
        [passage for _, passage in pairs],
        read_embedder(str(folder), say=lambda line: None, **OPENED),
        MiningSettings(negatives=3, to_rank=90, relative_margin=1e-4),
        lambda line: None,
    )
    table = Dataset.from_dict({"anchor": [q for q, _ in pairs], "positive": [p for _, p in pairs]})
    model = SentenceTransformer(str(folder), device="cpu")
    how = {"num_negatives": 3, "range_max": 90, "relative_margin": 1e-4, "output_format": "n-tuple"}
    expected = util.mine_hard_negatives(table, model, verbose=False, **how)
    ours = {(row.anchor, row.positive): row.as_dict() for row in found.complete()}
    assert 10 < len(expected) == len(ours) and found.too_close > 10
    assert {(row["anchor"], row["positive"]): row for row in expected} == ours


def test_beyond_so_many_passages_faiss_finds_almost_the_same(monkeypatch):
    pytest.importorskip("faiss", reason="faiss is not installed")
    random = np.random.default_rng(0)
    passages = [f"{angle:.3f} x" for angle in random.uniform(0, 360, 3000)]
    pairs = [(f"{angle} q", f"{angle + 1} own") for angle in range(0, 360, 9)]
    exact = negatives(pairs, passages, negatives=5)
    monkeypatch.setattr(mining, "EXACT", 1000)
    said: list[str] = []
    found = mine(pairs, passages, Angles(), MiningSettings(5, relative_margin=None), said.append)
    same = [
        len({text for text, _ in row.negatives} & set(of_one)) for row, of_one in zip(found.rows, exact, strict=True)
    ]
    assert "approximate search by faiss" in said[-1] and sum(same) > 0.9 * 5 * len(pairs)


def test_without_faiss_all_are_compared_and_that_is_said(monkeypatch):
    monkeypatch.setattr(mining, "EXACT", 3)
    monkeypatch.setattr(mining, "find_spec", lambda name: None)
    pairs, passages, said = [("0 q", "1 own")], [f"{angle} x" for angle in range(5, 15)], []
    found = mine(pairs, passages, Angles(), MiningSettings(2, relative_margin=None), said.append)
    assert [text for text, _ in found.rows[0].negatives] == ["5 x", "6 x"]
    assert "takes long" in said[0] and "deltaw[search]" in said[1]


def test_a_long_text_is_truncated_and_counted(bert):
    embedder = read_embedder(str(bert), say=lambda line: None, **OPENED)
    assert embedder.limit == 64
    texts = ["x" * 200, "short", "x" * 64]
    vectors, cut = embedder.vectors(texts)
    assert cut == 1 and torch.allclose(vectors[0], vectors[2], atol=1e-6)
    with pytest.raises(UserError, match="no token"):
        embedder.vectors([""])


def test_an_adapter_for_another_task_gives_no_vectors(runs):
    with pytest.raises(UserError, match="this adapter is for sequence-classification"):
        read_embedder(str(runs["mood"]), say=print, **OPENED)


def test_the_output_stands_beside_the_file_and_replaces_nothing_by_accident(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d").mkdir()
    file = tmp_path / "d" / "rows.jsonl"
    file.touch()
    target = mined_file(str(file), None, None, force=False)
    assert target == tmp_path / "d" / "rows.mined.jsonl"
    assert str(mined_file("owner/rows:train", None, None, force=False)) == "rows_train.mined.jsonl"
    write_mined(mined([("0 é", "9 own")], ["7 x"]).rows, target)
    assert json.loads(target.read_text(encoding="utf-8")) == {"anchor": "0 é", "positive": "9 own", "negative_1": "7 x"}
    with pytest.raises(UserError, match="the output exists"):
        mined_file(str(file), None, None, force=False)
    assert mined_file(str(file), target, None, force=True) == target
    for read, corpus in ((target, None), (file, target)):
        with pytest.raises(UserError, match="one of the files that are read"):
            mined_file(str(read), target, None if corpus is None else str(corpus), force=True)
    assert sorted(entry.name for entry in target.parent.iterdir()) == ["rows.jsonl", "rows.mined.jsonl"]
