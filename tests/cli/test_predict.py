"""`deltaw predict` for each task: scores equal those of `deltaw eval`, and every row has a record."""

from __future__ import annotations

import contextlib
import csv
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from transformers import BertForSequenceClassification, ViTConfig, ViTForImageClassification

from deltaw.inference import predicting
from deltaw.inference.predicting import PredictionFile
from deltaw.runs.fit import fit
from tests.byte_models import save_model
from tests.cli.conftest import assert_refused
from tests.conftest import deep_merge, write_rows
from tests.serving.encoder_models import bert_config, train_classifier, train_embedder, write_bert

CLASSES = ("cat", "dog", "bird")


def train(model: Path, output: Path, task: str, rows, **overrides) -> Path:
    """Train a run of two steps."""
    file = rows if isinstance(rows, Path) else write_rows(output.parent / f"{output.name}.jsonl", rows)
    settings = {"model": str(model), "task": task, "data": {"train": str(file)}, "lora": {"rank": 2, "alpha": 4}}
    settings |= {"train": {"learning_rate": 1e-2, "batch_size": 4, "max_steps": 2, "drift": False}}
    run_settings = {"precision": "fp32", "device": "cpu", "threads": 1, "output": str(output)}
    return Path(fit(deep_merge(settings | run_settings, overrides)).output)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("predict")


@pytest.fixture(scope="module")
def bert(folder) -> Path:
    return write_bert(folder / "bert")


@pytest.fixture(scope="module")
def classifier(bert, folder) -> Path:
    return train_classifier(bert, folder / "classifier", CLASSES)


@pytest.fixture
def predict(call, tmp_path):
    """Return a function that predicts rows or a file and returns the output records."""

    def run(model, rows, *flags, suffix=".jsonl", status=0):
        file = rows if isinstance(rows, Path) else write_rows(tmp_path / "rows.jsonl", rows)
        output = tmp_path / f"predictions{suffix}"
        result = call("predict", model, file, "--output", output, *flags, status=status)
        return result if status else read(output)

    return run


def read(path: Path) -> list[dict]:
    """Return the records of an output file."""
    if path.suffix == ".parquet":
        return pyarrow.parquet.read_table(path).to_pylist()
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file)) if path.suffix == ".csv" else [json.loads(line) for line in file]


def eval_metrics(call, run, file) -> dict:
    """Return the metrics of `deltaw eval`."""
    return json.loads(call("eval", run, "--data", file, "--json", "--no-drift", status=0).out)["eval"]


def labeled_rows(count: int) -> list[dict]:
    return [{"text": f"{CLASSES[n % 3]} {'x' * (n * 7 % 23)} {n}", "label": CLASSES[n * n % 3]} for n in range(count)]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_class_accuracy_equals_eval(call, predict, classifier, tmp_path, suffix):
    rows = labeled_rows(60)
    predictions = predict(classifier, rows, suffix=suffix)
    assert [row["text"] for row in predictions] == [row["text"] for row in rows]
    assert [int(row["row"]) for row in predictions] == [*range(1, 61)]
    accuracy = np.mean([row["prediction"] == row["label"] for row in predictions])
    metrics = eval_metrics(call, classifier, tmp_path / "rows.jsonl")
    assert accuracy == metrics["accuracy"]
    for row in predictions:
        by_class = row["probabilities"] if suffix == ".jsonl" else {c: float(row[f"p_{c}"]) for c in CLASSES}
        assert max(by_class, key=by_class.__getitem__) == row["prediction"]
        assert sum(by_class.values()) == pytest.approx(1, abs=1e-6)
        assert not row["error"]


def test_predictions_do_not_depend_on_labels(predict, classifier):
    rows = labeled_rows(12)
    with_labels = predict(classifier, rows)
    unknown_labels = predict(classifier, [{"text": row["text"], "label": "never seen"} for row in rows], "--force")
    without_labels = predict(classifier, [{"text": row["text"]} for row in rows], "--force")
    assert [r["probabilities"] for r in with_labels] == [r["probabilities"] for r in unknown_labels]
    assert [r["probabilities"] for r in with_labels] == [r["probabilities"] for r in without_labels]


def test_unusable_rows_get_records_with_error(call, predict, classifier, tmp_path):
    file = tmp_path / "in.jsonl"
    lines = ['{"text": "cat"}', "not json", '{"text": " "}', '{"other": 1}', json.dumps({"text": "x" * 100})]
    file.write_text("\n".join([*lines, '{"text": "dog"}', "[1]"]) + "\n")
    predictions = predict(classifier, file)
    assert [row["row"] for row in predictions] == [1, 2, 3, 4, 5, 6, 7]
    assert [row["prediction"] is None for row in predictions] == [False, True, True, True, True, False, True]
    errors = [row["error"] for row in predictions]
    assert errors[0] is errors[5] is None
    for error, words in zip([*errors[1:5], errors[6]], ["JSON", "empty", "text", "64 tokens", "object"], strict=True):
        assert words in error
    result = call("predict", classifier, file, status=0)
    assert [json.loads(line) for line in result.out.splitlines()] == predictions, "the same on standard output"
    assert "7 rows, 5 of them without a prediction" in result.unwrapped


def test_file_without_usable_rows_is_rejected_without_output(predict, classifier, tmp_path):
    assert_refused(predict(classifier, [{"text": ""}, {"text": " "}], status=2), "no row can be used", "empty")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    assert_refused(predict(classifier, [{"n": 1}], status=2), "column")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_leading_unusable_rows_do_not_determine_columns(predict, classifier, monkeypatch):
    monkeypatch.setattr(predicting, "CHUNK_ROWS", 2)
    predictions = predict(classifier, [{"text": ""}] * 3 + [{"text": "cat"}], suffix=".csv")
    assert len(predictions) == 4 and predictions[0]["error"] and predictions[3]["prediction"] in CLASSES


def test_error_records_are_written_before_first_prediction(predict, classifier, monkeypatch):
    monkeypatch.setattr(predicting, "CHUNK_ROWS", 2)
    original = PredictionFile.write
    sizes = []

    def write(self, lines):
        sizes.append(lines.count(b"\n"))
        original(self, lines)

    monkeypatch.setattr(PredictionFile, "write", write)
    assert_refused(predict(classifier, [{"text": ""}] * 5, status=2), "no row can be used")
    assert sizes == [2, 2, 1]


def test_missing_file_is_reported_before_model_load(predict, classifier, monkeypatch, tmp_path):
    def load(*args, **options):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("deltaw.inference.open_run.open_run", load)
    assert_refused(predict(classifier, tmp_path / "rwos.jsonl", status=2), "rwos.jsonl")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_unrepresentable_values_are_replaced(predict, classifier, tmp_path, suffix):
    file = tmp_path / "in.jsonl"
    rows = ('{"text": "cat", "odd": "\\ud800", "number": NaN}', '{"text": "dog", "odd": "\\\\ud800", "number": 1.5}')
    file.write_text("\n".join(rows))
    first, second = predict(classifier, file, suffix=suffix)
    assert first["odd"] == {".jsonl": "\ud800"}.get(suffix, "\ufffd") and second["odd"] == "\\ud800"
    assert not first["number"] and float(second["number"]) == 1.5


def test_conflicting_column_names_get_prefix(predict, classifier):
    row = {"text": "cat", "prediction": "mine", "row": 9, "error": "e"}
    (predictions,) = predict(classifier, [row], suffix=".parquet")
    assert (predictions["prediction"], predictions["row"], predictions["error"]) == ("mine", 9, "e")
    assert predictions["predicted_prediction"] in CLASSES and predictions["predicted_row"] == 1
    assert predictions["predicted_error"] is None


def test_column_mapping_is_applied_and_missing_columns_rejected(predict, classifier):
    (from_column,) = predict(classifier, [{"comment_text": "cat"}], "--data.columns", "{text: comment_text}")
    (from_text,) = predict(classifier, [{"text": "cat"}], "--force")
    assert from_column["probabilities"] == from_text["probabilities"]
    flags = ("--force", "--data.columns")
    assert_refused(predict(classifier, [{"text": "cat"}], *flags, "{text: nope}", status=2), "no column 'nope'")
    assert_refused(predict(classifier, [{"text": "cat"}], *flags, "text", status=2), "--data.columns")


def test_long_rows_are_truncated_on_request(predict, classifier):
    predictions = predict(classifier, [{"text": "x" * 100}], "--data.long_rows", "cut", "--data.max_length", 20)
    assert predictions[0]["prediction"] in CLASSES and predictions[0]["error"] is None


def test_output_is_not_overwritten_without_force(call, predict, classifier, tmp_path):
    predict(classifier, labeled_rows(3))
    before = (tmp_path / "predictions.jsonl").read_bytes()
    assert_refused(predict(classifier, labeled_rows(2), status=2), "exists", "--force")
    assert (tmp_path / "predictions.jsonl").read_bytes() == before
    assert len(predict(classifier, labeled_rows(2), "--force")) == 2
    assert_refused(predict(classifier, labeled_rows(2), suffix=".txt", status=2), ".txt", ".parquet")
    same = call("predict", classifier, tmp_path / "rows.jsonl", "-o", tmp_path / "rows.jsonl", "--force", status=2)
    assert_refused(same, "the input file")
    assert_refused(call("predict", classifier, tmp_path / "rows.jsonl", "--json", status=2), "--output")
    below_file = call("predict", classifier, tmp_path / "rows.jsonl", "-o", tmp_path / "rows.jsonl" / "o.csv", status=2)
    assert_refused(below_file, "cannot write 'o.csv'")
    sampled = predict(classifier, labeled_rows(2), "--temperature", 1, suffix=".csv", status=2)
    assert_refused(sampled, "does not generate text")


def test_limit_restricts_rows_and_json_counts_them(call, classifier, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [*labeled_rows(5), {"text": ""}, *labeled_rows(5)])
    result = call("predict", classifier, file, "-o", tmp_path / "o.csv", "--limit", 7, "--json", status=0)
    output = json.loads(result.out)
    assert (output["rows"], output["predicted"], output["errors"]) == (7, 6, {"an empty text": 1})
    assert output["task"] == "sequence-classification" and len(read(tmp_path / "o.csv")) == 7


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".parquet", ".jsonl.gz"])
def test_all_training_file_formats_can_be_predicted(predict, classifier, tmp_path, suffix):
    import gzip

    rows = labeled_rows(7)
    file = tmp_path / f"in{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    elif suffix == ".json":
        file.write_text(json.dumps(rows))
    elif suffix == ".jsonl.gz":
        file.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    else:
        with file.open("w", newline="") as output_file:
            writer = csv.DictWriter(output_file, ["text", "label"], delimiter="\t" if suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    expected = [row["probabilities"] for row in predict(classifier, rows)]
    assert [row["probabilities"] for row in predict(classifier, file, "--force")] == expected


def test_folder_records_contain_file_names(predict, classifier, tmp_path):
    (tmp_path / "d").mkdir()
    write_rows(tmp_path / "d" / "b.jsonl", labeled_rows(2))
    write_rows(tmp_path / "d" / "a.jsonl", labeled_rows(1))
    predictions = predict(classifier, tmp_path / "d")
    assert [(Path(row["file"]).name, row["row"]) for row in predictions] == [
        ("a.jsonl", 1),
        ("b.jsonl", 1),
        ("b.jsonl", 2),
    ]


def test_regression_error_equals_eval(call, predict, bert, folder, tmp_path):
    rows = [{"text": "x" * (n % 17), "label": n % 17 / 4, "extra": n} for n in range(1, 33)]
    run = train(bert, folder / "regression", "regression", [r for r in rows if r["text"]])
    rows = [row for row in rows if row["text"]]
    predictions = predict(run, rows)
    error = np.mean([(row["prediction"] - row["label"]) ** 2 for row in predictions])
    assert error == pytest.approx(eval_metrics(call, run, tmp_path / "rows.jsonl")["mse"], rel=1e-5)


def test_reward_model_accuracy_equals_eval(call, predict, bert, folder, tmp_path):
    rows = [{"prompt": f"q{n}", "chosen": "y" * (n % 7 + 1), "rejected": "z" * (n % 5 + 1)} for n in range(20)]
    run = train(bert, folder / "rewards", "sequence-classification", rows)
    predictions = predict(run, rows)
    accuracy = np.mean([row["score_chosen"] > row["score_rejected"] for row in predictions])
    assert accuracy == eval_metrics(call, run, tmp_path / "rows.jsonl")["accuracy"]
    single = predict(run, [{"prompt": r["prompt"], "completion": r["chosen"]} for r in rows], "--force")
    assert [r["score"] for r in single] == pytest.approx([r["score_chosen"] for r in predictions], abs=1e-4)
    incomplete = [{"prompt": "q"}, {"prompt": "q", "response": ""}, {"prompt": "q", "answer": "y"}]
    without = predict(run, incomplete, "--force")
    assert ["answer" in (row["error"] or "") for row in without] == [True, True, False]


def test_reranking_scores_and_order_equal_eval(call, predict, folder, tmp_path):
    torch.manual_seed(1)
    config = bert_config(num_labels=1, initializer_range=0.4)
    model = save_model(BertForSequenceClassification(config).eval(), folder / "scorer")
    rows = [{"query": f"q{n}", "passage": f"p{n * 7 % 5}", "label": n % 2} for n in range(24)]
    run = train(model, folder / "reranker", "reranking", rows)
    predictions = predict(run, rows)
    accuracy = np.mean([(row["score"] > 0.5) == (row["label"] > 0.5) for row in predictions])
    assert accuracy == eval_metrics(call, run, tmp_path / "rows.jsonl")["accuracy"]
    texts = [row["passage"] for row in rows[:5]]
    (ranked,) = predict(run, [{"query": "q0", "passages": texts}], "--force")
    assert len(ranked["score"]) == 5
    assert ranked["ranking"] == sorted(range(5), key=lambda index: -ranked["score"][index])
    single = predict(run, [{"query": "q0", "passage": text} for text in texts], "--force")
    assert [row["score"] for row in single] == pytest.approx(ranked["score"], abs=1e-5)


def test_embedding_recall_equals_eval(call, predict, bert, folder, tmp_path):
    run = train_embedder(bert, folder / "embedder")
    rows = [{"anchor": f"question {n}", "positive": f"answer {'y' * (n % 5)} {n}"} for n in range(20)]
    predictions = predict(run, rows, suffix=".parquet")
    queries, passages = (np.array([row[f"{side}_embedding"] for row in predictions]) for side in ("query", "passage"))
    assert np.linalg.norm(queries, axis=1) == pytest.approx(np.ones(20), abs=1e-5)
    best = np.mean((queries @ passages.T).argmax(1) == np.arange(20))
    assert best == eval_metrics(call, run, tmp_path / "rows.jsonl")["recall@1"]
    single = predict(run, [{"text": row["positive"]} for row in rows])
    assert np.array([row["embedding"] for row in single]) == pytest.approx(passages, abs=1e-5)


def test_exact_match_of_completions_equals_eval(call, predict, finished_run, rows_file, tmp_path):
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    predictions = predict(finished_run, rows)
    exact = np.mean([row["completion"] == row["predicted_completion"] for row in predictions])
    assert exact == eval_metrics(call, finished_run, rows_file)["exact_match"]
    from_prompts = predict(finished_run, [{"prompt": row["prompt"]} for row in rows], "--force")
    assert [row["completion"] for row in from_prompts] == [row["predicted_completion"] for row in predictions]
    assert {row["finish"] for row in from_prompts} <= {"stop", "length"}
    chats = [{"messages": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    assert [r["completion"] for r in predict(finished_run, chats, "--force")] == [r["completion"] for r in from_prompts]
    generated = json.loads(call("generate", finished_run, rows[0]["prompt"], "--json", status=0).out)["completions"][0]
    assert generated["completion"] == from_prompts[0]["completion"]


def test_sampled_completions_do_not_depend_on_chunking(predict, finished_run, monkeypatch):
    rows = [{"prompt": "paint it"}] * 6
    flags = ("--temperature", 1, "--max-new-tokens", 8, "--seed", 3)
    completions = [row["completion"] for row in predict(finished_run, rows, *flags)]
    monkeypatch.setattr(predicting, "COMPLETION_ROWS", 2)
    assert [row["completion"] for row in predict(finished_run, rows, *flags, "--force")] == completions
    assert len(set(completions)) > 1


def test_empty_and_long_prompts_get_error(predict, finished_run):
    rows = [{"prompt": "paint it red"}, {"prompt": ""}, {"prompt": "x" * 500}, {"completion": "r"}]
    errors = [row["error"] for row in predict(finished_run, rows)]
    assert errors[0] is None and "empty" in errors[1] and "tokens" in errors[2] and "no prompt" in errors[3]


def test_image_accuracy_equals_eval(call, predict, folder, tmp_path):
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    vit = ViTConfig(image_size=8, patch_size=4, num_channels=1, initializer_range=0.2, num_labels=3, **shape)
    ViTForImageClassification(vit).eval().save_pretrained(folder / "vit")
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 255, (24, 8, 8)).astype(np.uint8)
    for number, image in enumerate(pixels):
        class_folder = folder / "images" / CLASSES[number % 3]
        class_folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(class_folder / f"{number}.png")
    run = train(folder / "vit", folder / "image-run", "image-classification", folder / "images")
    predictions = predict(run, folder / "images")
    assert len(predictions) == 24
    accuracy = np.mean([Path(row["image"]).parent.name == row["prediction"] for row in predictions])
    assert accuracy == eval_metrics(call, run, folder / "images")["accuracy"]


# Resuming


@pytest.fixture
def predict_killed(call, classifier, tmp_path, monkeypatch):
    """Return a function that predicts a file and interrupts the process before the end."""
    monkeypatch.setattr(predicting, "CHUNK_ROWS", 8)
    file = write_rows(tmp_path / "rows.jsonl", [*labeled_rows(50), {"text": ""}, *labeled_rows(49)])

    def run(output: Path, *flags):
        original = predicting.Predictor._predict
        calls = []

        def predict_then_interrupt(self, *args):
            calls.append(args)
            if len(calls) == 6:
                raise KeyboardInterrupt
            return original(self, *args)

        with monkeypatch.context() as patched:
            patched.setattr(predicting.Predictor, "_predict", predict_then_interrupt)
            call("predict", classifier, file, "-o", output, *flags, status=130)
        with output.with_name(output.name + ".partial").open("ab") as partial:
            partial.write(b"half a rec")  # after the last journal entry
        return file

    return run


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_resumed_file_equals_uninterrupted_file(call, predict_killed, classifier, tmp_path, suffix):
    output = tmp_path / f"out{suffix}"
    reference = tmp_path / f"whole{suffix}"
    file = predict_killed(output)
    assert not output.exists()
    result = call("predict", classifier, file, "-o", output, status=0)
    assert "resuming after 40 of 100 rows" in result.unwrapped
    assert "100 rows, 1 of them" in result.unwrapped, "errors before and after are counted"
    call("predict", classifier, file, "-o", reference, status=0)
    assert output.read_bytes() == reference.read_bytes() and len(read(output)) == 100
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["rows.jsonl", output.name, reference.name])


def test_complete_partial_file_is_renamed_on_resume(call, classifier, tmp_path, monkeypatch):
    file = write_rows(tmp_path / "rows.jsonl", labeled_rows(3))
    with monkeypatch.context() as patched:
        patched.setattr(PredictionFile, "finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        call("predict", classifier, file, "-o", tmp_path / "o.csv", status=130)
    monkeypatch.setattr(predicting.Predictor, "_predict", None)
    call("predict", classifier, file, "-o", tmp_path / "o.csv", status=0)
    assert len(read(tmp_path / "o.csv")) == 3


def test_changed_rows_or_settings_do_not_resume(call, predict_killed, classifier, tmp_path):
    output = tmp_path / "out.jsonl"
    file = predict_killed(output)
    before = (tmp_path / "out.jsonl.partial").read_bytes()
    command = ("predict", classifier, file, "-o", output)
    assert_refused(call(*command, "--data.max_length", 30, status=2), "the settings changed", "--force")
    with file.open("a") as output_file:
        output_file.write('{"text": "one more"}\n')
    assert_refused(call(*command, status=2), "the file changed", "--force")
    assert (tmp_path / "out.jsonl.partial").read_bytes() == before
    call(*command, "--force", status=0)
    assert len(read(output)) == 101


def test_concurrent_writer_is_rejected(call, classifier, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", labeled_rows(3))
    with contextlib.closing(PredictionFile(tmp_path / "o.csv", {}, force=False)):
        assert_refused(call("predict", classifier, file, "-o", tmp_path / "o.csv", status=2), "another process")
    call("predict", classifier, file, "-o", tmp_path / "o.csv", status=0)


def test_merged_classes_apply_to_every_command(call, predict, bert, tmp_path):
    spellings = ["Cat", "cat ", "Dog", "DOG"]
    rows = [{"text": f"{spellings[n % 4]} {n}", "label": spellings[n % 4]} for n in range(40)]
    classes = {"cat ": "Cat", "DOG": "Dog"}
    run = train(bert, tmp_path / "run", "sequence-classification", rows, data={"classes": classes})
    call("plan", run / "run.yaml", status=0)
    call("train", "--resume", run, "--train.max_steps", 3, status=0)
    file = write_rows(tmp_path / "eval.jsonl", [*rows, {"text": "Cat", "label": "CAT."}])
    result = call("eval", run, "--data", file, "--json", "--no-drift", status=0)
    assert "'CAT.' as 'Cat'" in result.unwrapped
    assert set(json.loads(result.out)["classes"]) == {"Cat", "Dog"}
    assert all(set(row["probabilities"]) == {"Cat", "Dog"} for row in predict(run, rows))


def test_missing_input_column_of_the_run_is_rejected_as_by_eval(call, predict, bert, tmp_path):
    rows = [{"body": row["text"], "class": row["label"]} for row in labeled_rows(12)]
    columns = {"text": "body", "label": "class"}
    run = train(bert, tmp_path / "mapped", "sequence-classification", rows, data={"columns": columns})
    other = [{"text": "cat", "label": "cat"}]
    assert_refused(predict(run, other, status=2), "no column 'body'", "data.columns.text")
    assert_refused(call("eval", run, "--data", tmp_path / "rows.jsonl", status=2), "no column 'body'")
    assert not (tmp_path / "predictions.jsonl").exists()
    (without_label,) = predict(run, [{"body": "cat"}])
    assert without_label["prediction"] in CLASSES
    flags = ("--force", "--data.columns", "{text: text}")
    assert predict(run, other, *flags)[0]["prediction"] in CLASSES


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_named_predictions_can_be_chained(call, predict, classifier, tmp_path, suffix):
    (once,) = predict(classifier, [{"text": "cat", "id": 7}], "--name", "topic", suffix=suffix)
    classes = ["topic_probabilities"] if suffix == ".jsonl" else [f"topic_p_{name}" for name in sorted(CLASSES)]
    assert list(once) == ["row", "text", "id", "topic", *classes, "topic_error"]
    assert once["topic"] in CLASSES
    first = tmp_path / f"predictions{suffix}"
    second = tmp_path / f"second{suffix}"
    call("predict", classifier, first, "--output", second, "--name", "mood", status=0)
    (twice,) = read(second)
    assert list(twice) == [*once, *(name.replace("topic", "mood") for name in list(once)[3:])]
    assert {name: twice[name] for name in once} == once and twice["mood"] == once["topic"]
    taken = call("predict", classifier, first, "--output", tmp_path / "third.jsonl", "--name", "topic", status=2)
    assert_refused(taken, "has a column 'topic'", "--name")
    assert not (tmp_path / "third.jsonl").exists()
    assert_refused(call("predict", classifier, first, "--name", " ", status=2), "name is empty")
