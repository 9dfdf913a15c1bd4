"""Labeled rows that cannot be used: an error at the first one, or skipped with the reason."""

from __future__ import annotations

import itertools

import pytest
from PIL import Image
from transformers import PreTrainedTokenizerBase

from deltaw.data.class_names import similar_text
from deltaw.data.row_reader import RunData
from deltaw.settings.data import DataSettings
from deltaw.tasks.classification.rows import LabelReader
from tests.data.chat_templates import tokenizer_of
from tests.data.conftest import refusal

TOKENIZER = tokenizer_of("base")
CLASSES = "sequence-classification"


def good_rows(count: int = 6) -> list[dict[str, object]]:
    return [{"text": f"film {n}", "label": "ab"[n % 2]} for n in range(count)]


def prepare_skipping(source: str, tokenizer: PreTrainedTokenizerBase | None = TOKENIZER, task=CLASSES) -> RunData:
    """Return the data without its bad row, which raises an error by default."""
    error = refusal(LabelReader(DataSettings(source), tokenizer, task).prepare)
    prepared = LabelReader(DataSettings(source, bad_rows="skip", eval=None), tokenizer, task).prepare()
    (line,) = prepared.skipped.lines()
    assert line["where"] == str(error.location).partition(" (line")[0]
    assert [line["reason"]] == list(prepared.report.bad_rows)
    return prepared


BAD: list[tuple[dict[str, object], str]] = [
    ({"text": 3, "label": "a"}, "a value of the wrong type"),
    ({"text": "x", "label": ["a"]}, "a label that is no class or number"),
    ({"text": "x", "label": None}, "an empty label"),
    ({"text": "", "label": "a"}, "an empty text"),
    ({"text": " \t\n\u3000", "label": "a"}, "an empty text"),
    ({"text": "\u200b\ufeff", "label": "b"}, "an empty text"),
]


@pytest.mark.parametrize(("row", "reason"), BAD)
def test_bad_row_raises_or_is_skipped(write, row, reason) -> None:
    path = write([*good_rows(), row])
    prepared = prepare_skipping(path)
    report = prepared.report
    assert [example.row for example in prepared.train] == [1, 2, 3, 4, 5, 6]
    assert (report.rows_read, report.rows_kept, report.bad_rows) == (7, 6, {reason: 1})
    (line,) = prepared.skipped.lines()
    assert (line["where"], line["row"]) == (f"{path}, row 7", row)


def test_missing_cells_and_broken_images_are_skipped(tmp_path, write) -> None:
    rows = "".join(f"film {n},{'ab'[n % 2]}\n" for n in range(6))
    prepared = prepare_skipping(write(f"text,label\n{rows}alone\nfilm 9,a\n", "d.csv"))
    assert [example.row for example in prepared.train] == [1, 2, 3, 4, 5, 6, 8]
    assert (prepared.report.rows_read, prepared.report.skipped) == (8, 1)
    write(b"no image", "images/a/9.png")
    for name, number in itertools.product("ab", range(3)):
        (tmp_path / "images" / name).mkdir(exist_ok=True)
        Image.new("L", (4, 4), number * 40 + ord(name)).save(tmp_path / "images" / name / f"{number}.png")
    prepared = prepare_skipping(str(tmp_path / "images"), None, "image-classification")
    assert len(prepared.train) == 6 and prepared.report.bad_rows == {"an image that cannot be read": 1}


def test_evaluation_file_is_counted_separately(write) -> None:
    train = write([*good_rows(), BAD[0][0]])
    eval_file = write([*good_rows(2), BAD[1][0], BAD[1][0]], "t.jsonl")
    settings = DataSettings(train, bad_rows="skip", eval=eval_file)
    prepared = LabelReader(settings, TOKENIZER, CLASSES).prepare()
    assert prepared.report.evaluation is not None
    assert (prepared.report.skipped, prepared.report.evaluation.skipped, len(prepared.skipped)) == (1, 2, 3)
    assert len(LabelReader(settings, TOKENIZER, CLASSES, classes=("a", "b")).file(eval_file)[0]) == 2


class AccentDroppingTokenizer:
    """A tokenizer that adds two special tokens and drops combining accents."""

    def num_special_tokens_to_add(self, pair: bool) -> int:
        return 2

    def __call__(self, texts: list[str], **options: object) -> dict[str, list[list[int]]]:
        return {"input_ids": [[1, *(ord(c) for c in text if c != "\N{COMBINING ACUTE ACCENT}"), 2] for text in texts]}


@pytest.mark.parametrize("task", [CLASSES, "regression"])
def test_text_with_only_special_tokens_is_skipped(write, task) -> None:
    rows = [{"text": f"film {n}", "label": n % 2} for n in range(4)]
    path = write([*rows, {"text": "\N{COMBINING ACUTE ACCENT}", "label": 1}])
    data = prepare_skipping(path, AccentDroppingTokenizer(), task)  # type: ignore[arg-type]
    assert data.report.bad_rows == {"an empty text": 1} and len(data.train) == 4


ALIKE = {
    "a missing letter": ({"account": 20, "acount": 1}, ["'acount' (1 row) is almost 'account' (20 rows)"]),
    "swapped letters": ({"billing": 20, "biling": 0, "blililng": 1, "bililng": 1}, ["'biling'", "'bililng'"]),
    "almost equal names": ({"spam": 20, "Spam ": 1}, []),
    "many rows": ({"cats": 20, "carts": 18}, []),
    "numbers": ({"level 1": 20, "level 2": 1}, []),
    "short names": ({"cat": 20, "car": 1}, []),
}


@pytest.mark.parametrize("name", ALIKE)
def test_rare_class_similar_to_a_frequent_one_is_reported(name) -> None:
    counts, expected = ALIKE[name]
    text, similar = similar_text(counts)
    assert len(similar) == len(expected) and all(part in text for part in expected), text
