"""`deltaw data mine` on a tiny encoder: the file that it writes, what it says, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import assert_refused
from tests.conftest import write_rows
from tests.serving.encoder_models import write_bert

ROWS = [{"question": f"What is {n}?", "answer": f"It is {n}, of course."} for n in range(20)]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bert(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture
def mine(call, bert, tmp_path):
    """Mine rows, and what was written."""

    def run(rows, *flags, status=0):
        file = write_rows(tmp_path / "d.jsonl", rows)
        ended = call("data", "mine", file, "--model", bert, "--precision", "fp32", *flags, status=status)
        written = tmp_path / "d.mined.jsonl"
        lines = written.read_text(encoding="utf-8").splitlines() if written.exists() else []
        return ended, [json.loads(line) for line in lines]

    return run


def test_each_row_gets_its_negatives_from_the_other_rows(mine):
    ended, written = mine(ROWS, "--negatives", 3, "--relative-margin", 0, "--fewer", "keep")
    assert [row["anchor"] for row in written] == [row["question"] for row in ROWS], "no row is lost"
    assert [row["positive"] for row in written] == [row["answer"] for row in ROWS]
    answers = {row["answer"] for row in ROWS}
    for row in written:
        negatives = [text for name, text in row.items() if name.startswith("negative_")]
        assert len(set(negatives)) == len(negatives) <= 3 and set(negatives) <= answers - {row["positive"]}
    said = " ".join(ended.out.split())
    assert "20 rows, 20 different queries, 20 passages" in said and "d.mined.jsonl" in said
    assert all(len(line) <= 80 or "/" in line for line in ended.out.splitlines())
    first = next(row for row in written if "negative_1" in row)
    for name, text in (("query", first["anchor"]), ("positive", first["positive"]), ("negative", first["negative_1"])):
        assert any(line.startswith(name) and f'"{text}"' in line for line in ended.out.splitlines())


def test_negatives_come_from_the_corpus_and_rows_with_fewer_are_told(mine, tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("One passage.\nAnother passage.\n" + ROWS[0]["answer"] + "\n")
    flags = ("--corpus", corpus, "--negatives", 3, "--relative-margin", 100)
    ended, written = mine(ROWS, *flags, "--json")
    told = json.loads(ended.out)
    assert (told["rows"], told["complete"], told["bare"], told["written"]) == (20, 0, 20, 20)
    assert told["passages"] == 3 and told["too_close"] == 59, "the first row's own passage is one of the three"
    assert "20 rows with fewer, 20 of them with none: written with what there is" in " ".join(ended.err.split())
    assert all(set(row) == {"anchor", "positive"} for row in written)
    ended, written = mine(ROWS, *flags[:2], "--negatives", 3, "--relative-margin", 0, "--max-score", 1, "--force")
    assert {text for row in written for name, text in row.items() if name[:3] == "neg"} <= set(
        corpus.read_text().splitlines()
    )


def test_only_complete_rows_are_written_if_asked(mine, tmp_path):
    corpus = write_rows(tmp_path / "c.jsonl", [{"text": text} for text in ("One.", "Two.", ROWS[3]["answer"])])
    wide = ("--corpus", corpus, "--negatives", 3, "--absolute-margin", 0, "--relative-margin", 0, "--fewer", "drop")
    ended, written = mine(ROWS, *wide, "--json")
    told = json.loads(ended.out)
    assert len(written) == told["written"] == told["complete"] < told["rows"] == 20 and written
    assert ROWS[3]["question"] not in [row["anchor"] for row in written], "its own passage is no negative"
    assert "not written" in ended.err


def test_rows_that_cannot_be_used_are_named_and_counted(mine):
    rows = [*ROWS, {"question": "Empty?", "answer": ""}]
    ended, written = mine(rows, status=2)
    assert_refused(ended, "'answer' is empty", "row 21", "data.bad_rows: skip")
    assert written == []
    for flag in ("--bad-rows", "--data.bad_rows"):
        ended, written = mine(rows, flag, "skip", "--force", "--json")
        assert json.loads(ended.out)["bad_rows"] == {"an empty text": 1} and len(written) == 20
        assert "1 row skipped: an empty text" in ended.err


def test_what_cannot_be_is_refused_before_a_model_is_read(call, mine, tmp_path):
    (tmp_path / "d.mined.jsonl").write_text("{}\n")
    ended, written = mine(ROWS, status=2)
    assert_refused(ended, "the output exists", "--force")
    assert written == [{}]
    none = tmp_path / "none"
    file = write_rows(tmp_path / "e.jsonl", ROWS)
    refused = {
        "fewer --negatives": ("--to-rank", 3),
        "no column 'quest'": ("--query-column", "quest"),
        "there is no file": ("--corpus", none / "x.jsonl"),
        "one of the files that are read": ("--output", file, "--force"),
    }
    for said, flags in refused.items():
        assert_refused(call("data", "mine", file, "--model", none, *flags), said)
    assert_refused(call("data", "mine", tmp_path / "none.jsonl", "--model", none), "there is no file")
    assert len(file.read_text().splitlines()) == 20


def test_a_killed_write_leaves_no_file(mine, monkeypatch):
    from deltaw.serving import mining

    def broken(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(mining.MinedRow, "as_dict", broken)
    ended, written = mine(ROWS, status=None)
    assert ended.status != 0 and written == []
