"""Labeled rows that cannot be used: an error at the first, or skipped with their reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from deltaw.data import DataSettings
from deltaw.data.labels import LabelReader
from deltaw.errors import UserError
from tests.data.chat_templates import tokenizer_of

TOKENIZER = tokenizer_of("base")
CLASSES = "sequence-classification"


def written(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def good(count: int = 6) -> list[dict[str, object]]:
    return [{"text": f"film {n}", "label": "ab"[n % 2]} for n in range(count)]


BAD: list[tuple[dict[str, object], str]] = [
    ({"text": 3, "label": "a"}, "a value of the wrong type"),
    ({"text": "x", "label": ["a"]}, "a label that is no class or number"),
    ({"text": "x", "label": None}, "an empty label"),
    ({"text": "", "label": "a"}, "an empty text"),
]


@pytest.mark.parametrize(("row", "reason"), BAD)
def test_a_row_that_cannot_be_used_is_an_error_or_skipped(tmp_path: Path, row, reason) -> None:
    path = written(tmp_path / "d.jsonl", [*good(), row])
    with pytest.raises(UserError) as refused:
        LabelReader(DataSettings(path), TOKENIZER, CLASSES).prepared()
    assert str(refused.value.where) == f"{path}, row 7"
    prepared = LabelReader(DataSettings(path, bad_rows="skip", eval=None), TOKENIZER, CLASSES).prepared()
    report = prepared.report
    assert [example.row for example in prepared.train] == [1, 2, 3, 4, 5, 6]
    assert (report.rows_read, report.rows_kept, report.bad_rows) == (7, 6, {reason: 1})
    (line,) = prepared.skipped.lines()
    assert (line["where"], line["reason"], line["row"]) == (f"{path}, row 7", reason, row)


def test_rows_of_a_table_with_missing_cells_are_skipped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text("text,label\n" + "".join(f"film {n},{'ab'[n % 2]}\n" for n in range(6)) + "alone\nfilm 9,a\n")
    with pytest.raises(UserError, match="row 7 has 1 cells"):
        LabelReader(DataSettings(str(path)), TOKENIZER, CLASSES).prepared()
    prepared = LabelReader(DataSettings(str(path), bad_rows="skip", eval=None), TOKENIZER, CLASSES).prepared()
    assert [example.row for example in prepared.train] == [1, 2, 3, 4, 5, 6, 8]
    assert (prepared.report.rows_read, prepared.report.skipped) == (8, 1)


def test_broken_images_are_skipped(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(3):
            Image.new("L", (4, 4), number * 40 + ord(name)).save(tmp_path / "images" / name / f"{number}.png")
    (tmp_path / "images" / "a" / "9.png").write_bytes(b"no image")
    folder = str(tmp_path / "images")
    with pytest.raises(UserError, match="cannot be decoded"):
        LabelReader(DataSettings(folder), None, "image-classification").prepared()
    prepared = LabelReader(DataSettings(folder, bad_rows="skip", eval=None), None, "image-classification").prepared()
    assert len(prepared.train) == 6
    assert prepared.report.bad_rows == {"an image that cannot be read": 1}
    (line,) = prepared.skipped.lines()
    assert str(line["where"]).endswith("9.png")


def test_an_evaluation_file_is_counted_on_its_own(tmp_path: Path) -> None:
    train = written(tmp_path / "d.jsonl", [*good(), BAD[0][0]])
    apart = written(tmp_path / "t.jsonl", [*good(2), BAD[1][0], BAD[1][0]])
    settings = DataSettings(train, bad_rows="skip", eval=apart)
    prepared = LabelReader(settings, TOKENIZER, CLASSES).prepared()
    assert prepared.report.skipped == 1
    assert prepared.report.evaluation is not None and prepared.report.evaluation.skipped == 2
    assert len(prepared.skipped) == 3
    assert len(LabelReader(settings, TOKENIZER, CLASSES, classes=("a", "b")).file(apart)[0]) == 2
