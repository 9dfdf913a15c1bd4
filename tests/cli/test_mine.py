"""`deltaw data mine` with a tiny encoder: output file, summary and invalid arguments."""

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
def mine_rows(call, bert, tmp_path):
    """Return a function that mines rows and returns the result and the output rows."""

    def run(rows, *flags, status=0):
        file = write_rows(tmp_path / "d.jsonl", rows)
        result = call("data", "mine", file, "--model", bert, "--precision", "fp32", *flags, status=status)
        output_file = tmp_path / "d.mined.jsonl"
        lines = output_file.read_text(encoding="utf-8").splitlines() if output_file.exists() else []
        return result, [json.loads(line) for line in lines]

    return run


def test_negatives_come_from_other_rows(mine_rows):
    result, mined_rows = mine_rows(ROWS, "--negatives", 3, "--relative-margin", 0, "--fewer", "keep")
    assert [row["anchor"] for row in mined_rows] == [row["question"] for row in ROWS], "no row is lost"
    assert [row["positive"] for row in mined_rows] == [row["answer"] for row in ROWS]
    answers = {row["answer"] for row in ROWS}
    for row in mined_rows:
        negatives = [text for name, text in row.items() if name.startswith("negative_")]
        assert len(set(negatives)) == len(negatives) <= 3 and set(negatives) <= answers - {row["positive"]}
    message = " ".join(result.out.split())
    assert "20 rows, 20 different queries, 20 passages" in message and "d.mined.jsonl" in message
    assert all(len(line) <= 80 or "/" in line for line in result.out.splitlines())
    first = next(row for row in mined_rows if "negative_1" in row)
    for name, text in (("query", first["anchor"]), ("positive", first["positive"]), ("negative", first["negative_1"])):
        assert any(line.startswith(name) and f'"{text}"' in line for line in result.out.splitlines())


def test_negatives_come_from_corpus_and_missing_ones_are_reported(mine_rows, tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("One passage.\nAnother passage.\n" + ROWS[0]["answer"] + "\n")
    flags = ("--corpus", corpus, "--negatives", 3, "--relative-margin", 100)
    result, mined_rows = mine_rows(ROWS, *flags, "--json")
    output = json.loads(result.out)
    assert (output["rows"], output["complete"], output["bare"], output["written"]) == (20, 0, 20, 20)
    assert output["passages"] == 3 and output["too_close"] == 59, "one passage is the positive of the first row"
    assert "20 rows with fewer, 20 of them with none: written with fewer negatives" in " ".join(result.err.split())
    assert all(set(row) == {"anchor", "positive"} for row in mined_rows)
    margins = ("--negatives", 3, "--relative-margin", 0, "--max-score", 1)
    result, mined_rows = mine_rows(ROWS, *flags[:2], *margins, "--force")
    mined = {text for row in mined_rows for name, text in row.items() if name[:3] == "neg"}
    assert mined <= set(corpus.read_text().splitlines())


def test_incomplete_rows_are_dropped_on_request(mine_rows, tmp_path):
    corpus = write_rows(tmp_path / "c.jsonl", [{"text": text} for text in ("One.", "Two.", ROWS[3]["answer"])])
    flags = ("--corpus", corpus, "--negatives", 3, "--absolute-margin", 0, "--relative-margin", 0, "--fewer", "drop")
    result, mined_rows = mine_rows(ROWS, *flags, "--json")
    output = json.loads(result.out)
    assert len(mined_rows) == output["written"] == output["complete"] < output["rows"] == 20 and mined_rows
    assert ROWS[3]["question"] not in [row["anchor"] for row in mined_rows], "the positive is not used as a negative"
    assert "not written" in result.err


def test_unusable_rows_are_reported_and_counted(mine_rows):
    rows = [*ROWS, {"question": "Empty?", "answer": ""}]
    result, mined_rows = mine_rows(rows, status=2)
    assert_refused(result, "'answer' is empty", "row 21", "data.bad_rows: skip")
    assert mined_rows == []
    for flag in ("--bad-rows", "--data.bad_rows"):
        result, mined_rows = mine_rows(rows, flag, "skip", "--force", "--json")
        assert json.loads(result.out)["bad_rows"] == {"an empty text": 1} and len(mined_rows) == 20
        assert "1 row skipped: an empty text" in result.err


def test_invalid_arguments_are_rejected_before_model_load(call, mine_rows, tmp_path):
    (tmp_path / "d.mined.jsonl").write_text("{}\n")
    result, mined_rows = mine_rows(ROWS, status=2)
    assert_refused(result, "the output exists", "--force")
    assert mined_rows == [{}]
    missing = tmp_path / "none"
    file = write_rows(tmp_path / "e.jsonl", ROWS)
    cases = {"fewer --negatives": ("--to-rank", 3), "no column 'quest'": ("--query-column", "quest")}
    cases |= {"there is no file": ("--corpus", missing / "x.jsonl")}
    cases |= {"the output is an input file": ("--output", file, "--force")}
    for message, flags in cases.items():
        assert_refused(call("data", "mine", file, "--model", missing, *flags), message)
    assert_refused(call("data", "mine", tmp_path / "none.jsonl", "--model", missing), "there is no file")
    assert len(file.read_text().splitlines()) == 20


def test_interrupted_write_leaves_no_file(mine_rows, monkeypatch):
    from deltaw.evaluation import mining

    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(mining.MinedRow, "as_dict", interrupt)
    result, mined_rows = mine_rows(ROWS, status=None)
    assert result.status != 0 and mined_rows == []
