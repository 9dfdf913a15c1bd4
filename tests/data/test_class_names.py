"""Class names that are almost equal: reported with the setting that merges them, and merged by ``data.classes``."""

from __future__ import annotations

import pytest

from deltaw.data.class_names import almost_equal_names, match_classes, merged_classes, name_key
from deltaw.settings.config import RunConfig, parse_yaml
from deltaw.settings.data import DataSettings
from deltaw.tasks.classification.rows import LabelReader
from deltaw.tasks.embedding.rows import EmbeddingReader
from tests.data.chat_templates import tokenizer_of
from tests.data.conftest import refusal

TOKENIZER = tokenizer_of("base")
TASK = "sequence-classification"
SPELLINGS = ["Delivery", "delivery", " Delivery", "Delivery.", "DELI\u200bVERY", "Ｄelivery", "Billing", "billing  "]
MERGED = dict.fromkeys(SPELLINGS[1:6], "Delivery") | {"billing  ": "Billing"}


def spelled_rows(count: int = 24) -> list[dict[str, object]]:
    """Return rows in which the first spelling of each class is the most frequent."""
    labels = [*SPELLINGS, "Delivery", "Billing"]
    return [{"text": f"order {number}", "label": labels[number % len(labels)]} for number in range(count)]


@pytest.mark.parametrize("name", ["DELIVERY", " delivery\t", "Delivery!", "deli\u00advery", "delivery ..."])
def test_key_ignores_case_white_space_form_and_final_punctuation(name) -> None:
    assert name_key(name) == name_key("delivery")


@pytest.mark.parametrize(
    "names", [("C", "C#", "C++"), ("A+", "A-"), ("1", "2"), ("?", "!"), ("cafe", "café"), ("a b", "ab")]
)
def test_different_names_have_different_keys(names) -> None:
    assert almost_equal_names(dict.fromkeys(names, 1)) == []


def test_most_frequent_name_without_white_space_is_proposed() -> None:
    counts = {"spam": 2, "Spam ": 9, "ham": 5}
    assert almost_equal_names(counts) == [["Spam ", "spam"]]
    assert merged_classes(counts) == {"Spam ": "Spam", "spam": "Spam"}


def test_label_matches_only_a_single_class() -> None:
    assert match_classes({"SPAM", "spam", "eggs"}, ("Spam", "ham")) == {"SPAM": "Spam", "spam": "Spam"}
    assert match_classes({"SPAM"}, ("Spam", "spam")) == {}


def test_classes_are_reported_and_merged_by_the_proposed_setting(write) -> None:
    path = write(spelled_rows())
    data = LabelReader(DataSettings(path, eval=None), TOKENIZER, TASK).prepare()
    assert set(data.classes) == set(SPELLINGS)
    (line,) = [line for line in data.report.lines() if line.startswith("to merge them: ")]
    proposed = parse_yaml(line.removeprefix("to merge them: data.classes: "))
    assert proposed == MERGED
    merged = LabelReader(DataSettings(path, eval=None, classes=proposed), TOKENIZER, TASK).prepare()
    assert merged.classes == ("Billing", "Delivery") and sum(merged.report.class_counts.values()) == 24
    assert not [line for line in merged.report.lines() if "almost" in line]


@pytest.mark.parametrize("reader", ["classification", "embedding"])
def test_data_check_warns_until_classes_are_merged(write, reader) -> None:
    path = write(spelled_rows())

    def findings(classes=None):
        settings = DataSettings(path, classes=classes)
        built = (
            LabelReader(settings, TOKENIZER, TASK)
            if reader == "classification"
            else EmbeddingReader(settings, TOKENIZER)
        )
        found = {finding.name: finding for finding in built.check([]).findings}
        return found.get("almost_equal_classes")

    finding = findings()
    assert finding.level == "warning" and "'Delivery' (5 rows)" in finding.text
    assert parse_yaml(finding.hint.removeprefix("merge them: data.classes: ")) == MERGED
    assert findings(MERGED) is None


def test_labels_of_an_evaluation_file_count_as_the_trained_class(write) -> None:
    path = write([{"text": f"order {n}", "label": ("Delivery", "Billing")[n % 2]} for n in range(8)])
    evaluation = write([{"text": "a", "label": "DELIVERY "}, {"text": "b", "label": "bill"}], "eval.jsonl")
    settings = DataSettings(path, classes={"bill": "Billing"})
    reader = LabelReader(settings, TOKENIZER, TASK, classes=("Billing", "Delivery"))
    rows, report = reader.file(evaluation)
    assert [row.label for row in rows] == [1, 0] and report.matched_labels == {"DELIVERY ": "Delivery"}
    assert any("'DELIVERY ' as 'Delivery'" in line for line in report.lines())


def test_mapping_renames_labels_and_keeps_or_drops_others(write) -> None:
    path = write([{"text": f"film {n}", "label": n % 5 + 1} for n in range(20)])
    mapping = {"1": "bad", "2": "bad", "4": "good", "5": "good"}
    data = LabelReader(DataSettings(path, classes=mapping, eval=None), TOKENIZER, TASK).prepare()
    assert data.classes == ("3", "bad", "good")
    dropping = DataSettings(path, classes=mapping, other_classes="drop", eval=None)
    data = LabelReader(dropping, TOKENIZER, TASK).prepare()
    assert data.classes == ("bad", "good") and data.report.other_classes == 4
    one_class = DataSettings(path, classes=dict.fromkeys("12345", "all"), eval=None)
    assert "all rows have the class 'all'" in str(refusal(LabelReader(one_class, TOKENIZER, TASK).prepare))


def test_listed_classes_reject_a_spelling_with_the_mapping_as_hint(write) -> None:
    path = write(spelled_rows())
    settings = DataSettings(path, classes=["Delivery", "Billing"])
    assert "data.classes: {delivery: Delivery}" in str(refusal(LabelReader(settings, TOKENIZER, TASK).prepare).hint)


def test_mapping_is_read_from_yaml_and_flags(tmp_path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: m\noutput: o\ndata:\n  train: a.csv\n  classes: {1: bad, 'Good ': good}\n")
    config = RunConfig.read(file)
    assert config.data.classes == {"1": "bad", "Good ": "good"}
    assert RunConfig.read(config.model_dump(mode="json")).data.classes == config.data.classes
    error = refusal(RunConfig.read, {"model": "m", "output": "o", "data": {"train": "a.csv", "classes": {}}})
    assert "data.classes is empty" in str(error)
