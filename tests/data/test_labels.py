"""Labeled texts: column detection, classes, rejected rows, and complete row accounting."""

from __future__ import annotations

import bz2

import pytest
from pydantic import TypeAdapter

from deltaw.settings.data import DataSettings
from deltaw.tasks.classification.rows import LabelReader, check_classes
from tests.data.conftest import accounted, refusal
from tests.data.label_models import WORDS, word_tokenizer

TOKENIZER = word_tokenizer()
CLASSIFY = "sequence-classification"


def rows_of(*labels, column="label"):
    return [{"text": f"{WORDS[i % 10]} {WORDS[i // 10]}", column: label} for i, label in enumerate(labels)]


def prepared(train, task=CLASSIFY, trained_classes=None, **settings):
    config = DataSettings(train=train, **{"eval": None, **settings})
    return LabelReader(config, TOKENIZER, task, classes=trained_classes).prepare()


def test_texts_have_special_tokens_and_classes_are_numbered(write):
    data = prepared(write(rows_of("rotten", "fresh", "fresh")))
    assert data.classes == ("fresh", "rotten") and [example.label for example in data.train] == [1, 0, 0]
    assert TOKENIZER.decode(data.train[1].tokens) == "[CLS] bad good [SEP]"
    assert data.report.class_counts == {"fresh": 2, "rotten": 1}
    assert "classes with fewer than 2 training rows: rotten" in data.report.lines()


def test_numeric_classes_are_sorted_by_value(write):
    assert prepared(write(rows_of(10, 2, 1, 2, 10))).classes == ("1", "2", "10")
    assert prepared(write(rows_of(1.0, 0.0, 1.0))).classes == ("0", "1")
    assert prepared(write(rows_of(True, False))).classes == ("false", "true")


def test_configured_classes_set_the_order_and_others_are_rejected_or_dropped(write):
    path = write(rows_of("fresh", "plot", "rotten", None, "fresh"))
    error = refusal(prepared, path, classes=["rotten", "fresh"])
    assert "'plot'" in error.message and "row 2" in str(error.location) and "'rotten', 'fresh'" in str(error.hint)
    data = prepared(path, classes=["rotten", "fresh"], other_classes="drop")
    assert [example.label for example in data.train] == [1, 0, 1] and data.report.other_classes == 2
    assert "2 rows dropped: their class is not in data.classes" in data.report.lines()
    # A misspelled class must not silently drop all its rows.
    error = refusal(prepared, path, classes=["frsh", "rotten"], other_classes="drop")
    assert "no row has the class 'frsh'" in error.message and "'fresh'" in str(error.hint)


def test_label_missing_from_training_is_rejected_with_its_row(write):
    path = write(rows_of("a", "c"), "test.jsonl")
    error = refusal(LabelReader(DataSettings(train="x"), TOKENIZER, CLASSIFY, classes=("a", "b")).file, path)
    assert "'c' was not seen in training" in error.message
    assert "row 2" in str(error.location) and "'a', 'b'" in str(error.hint)
    assert "not seen in training" in refusal(prepared, write(rows_of("a", "b", "a"), "train.jsonl"), eval=path).message


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (("a", None), {}, "the label is empty"),
        (("a", ""), {}, "the label is empty"),
        (("a", "a"), {}, "all rows have the class 'a'"),
        (("a", "a", "a"), {"trained_classes": ("a", "b")}, "the class 'a'"),
        (("a", ["b"]), {}, "is a list"),
        ((0.5, 1), {}, "is not a class"),
        (range(80), {}, "task: regression"),
        ((2.0, 2.0), {"task": "regression"}, "the number 2"),
        *(((1.0, x), {"task": "regression"}, "finite number") for x in ("much", None, float("nan"), True, "1e999")),
    ],
)
def test_invalid_labels_are_rejected(write, labels, options, message):
    error = refusal(prepared, write(rows_of(*labels)), **options)
    assert message in str(error) and (message != "finite number" or "row 2" in str(error.location))


def test_common_column_names_are_detected_and_ambiguous_ones_rejected(write):
    assert prepared(write(rows_of("a", "b", column="category"))).classes == ("a", "b")
    ambiguous = [{**row, "target": "x"} for row in rows_of("a", "b", column="category")]
    assert "several columns may be the label: 'target', 'category'" in refusal(prepared, write(ambiguous)).message
    assert prepared(write(ambiguous), columns={"label": "category"}).report.unused_columns == ("target",)
    error = refusal(prepared, write([{"words": "a", "label": 1}]))
    assert "no column for the text was found" in error.message and "'words', 'label'" in str(error.location)


def test_pairs_have_segments_and_the_longer_text_is_truncated(write):
    premises = (("good film", "no"), ("a " * 20, "yes"))
    rows = [{"premise": premise, "hypothesis": "bad plot", "label": label} for premise, label in premises]
    data = prepared(write(rows), max_length=8, long_rows="cut")
    assert data.report.form == "labeled pairs of texts"
    assert TOKENIZER.decode(data.train[0].tokens) == "[CLS] good film [SEP] bad plot [SEP]"
    assert data.train[0].segments.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert TOKENIZER.decode(data.train[1].tokens) == "[CLS] a a a [SEP] bad plot [SEP]"
    assert (data.report.cut, data.report.tokens_cut) == (1, 25 - 8)


def test_long_rows_are_rejected_truncated_or_dropped(write):
    path = write([*rows_of("a", "b", "a", "b"), {"text": "so " * 9, "label": "a"}])
    error = refusal(prepared, path, max_length=6)
    assert "row 5" in str(error.location) and "data.max_length: 11" in str(error.hint)
    cut = prepared(path, max_length=6, long_rows="cut")
    assert TOKENIZER.decode(cut.train[-1].tokens) == "[CLS] so so so so [SEP]"
    assert prepared(path, max_length=6, long_rows="drop").report.dropped_long == 1
    assert "special tokens" in refusal(prepared, path, max_length=2).message


def test_all_rows_are_counted_in_the_report(write):
    rows = [*rows_of("a", "b", "a", "b", "c", "a"), *rows_of("a", "b"), {"text": "so " * 9, "label": "a"}]
    options = {"other_classes": "drop", "max_length": 6, "long_rows": "drop", "eval": 2, "rows": 8}
    report = prepared(write(rows), classes=["a", "b"], **options).report
    assert report.rows_read == len(rows) == accounted(report)
    assert report.other_classes and report.dropped_long and report.duplicates and report.not_selected


def test_classes_are_validated_and_yaml_numbers_are_names(write):
    for classes in (["a"], [], ["a", "b", "a"]):
        assert refusal(DataSettings, train="x", classes=classes).location == "data.classes"
    settings = TypeAdapter(DataSettings).validate_python({"train": "x", "classes": [1, 0], "eval": 3})
    assert settings.classes == ["1", "0"] and settings.eval == 3.0
    rows = [{"text": "film", "label": label} for label in "aba"]  # rows with different labels are not duplicates
    assert prepared(write(rows)).report.duplicates == 1 and len(prepared(write(rows), duplicates="keep").train) == 3


def test_regression_targets_are_unchanged(write):
    data = prepared(write(rows_of("0.5", 3, -1e3)), "regression")
    assert data.classes is None and [e.label for e in data.train] == [0.5, 3.0, -1000.0]
    assert data.report.class_counts == {}


def test_compressed_table_uses_category_as_label(write):
    table = "category,text,movie_name\nfresh,a good film,x\nrotten,so bad,y\nplot,it is,z\n"
    path = write(bz2.compress(table.encode()), "reviews.csv.bz2")
    data = prepared(path, classes=["rotten", "fresh"], other_classes="drop", group="movie_name")
    assert [e.label for e in data.train] == [1, 0] and data.report.unused_columns == ()


def test_head_must_have_one_output_per_class():
    check_classes(2, ("a", "b"), "model")
    assert "3 outputs, but there are 2 classes" in refusal(check_classes, 3, ("a", "b"), "model").message
