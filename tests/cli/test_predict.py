"""`deltaw predict` for each task: scores equal those of `deltaw eval`, and every row gives a record."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import signal
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from transformers import BertForSequenceClassification, ViTConfig, ViTForImageClassification

from deltaw.runs.fit import fit
from deltaw.serving import predicting
from deltaw.serving.prediction_file import PredictionFile
from tests.byte_models import saved
from tests.cli.conftest import assert_refused, start
from tests.conftest import laid_over, write_rows
from tests.serving.encoder_models import bert_config, train_classifier, train_embedder, write_bert

CLASSES = ("cat", "dog", "bird")


def train(model: Path, output: Path, task: str, rows, **more) -> Path:
    """A run of a few steps."""
    file = rows if isinstance(rows, Path) else write_rows(output.parent / f"{output.name}.jsonl", rows)
    settings = {
        "model": str(model),
        "task": task,
        "data": {"train": str(file)},
        "lora": {"rank": 2, "alpha": 4},
        "train": {"learning_rate": 1e-2, "batch_size": 4, "max_steps": 2, "drift": False},
    }
    fixed = {"precision": "fp32", "device": "cpu", "threads": 1, "output": str(output)}
    return Path(fit(laid_over(settings | fixed, more)).output)


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
    """Predict rows or a file, and return the records of the output."""

    def run(model, rows, *flags, suffix=".jsonl", status=0):
        file = rows if isinstance(rows, Path) else write_rows(tmp_path / "rows.jsonl", rows)
        output = tmp_path / f"predictions{suffix}"
        ended = call("predict", model, file, "--output", output, *flags, status=status)
        return ended if status else read(output)

    return run


def read(path: Path) -> list[dict]:
    """The records of a file."""
    if path.suffix == ".parquet":
        return pyarrow.parquet.read_table(path).to_pylist()
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file)) if path.suffix == ".csv" else [json.loads(line) for line in file]


def evaluated(call, run, file) -> dict:
    """The metrics of `deltaw eval`."""
    return json.loads(call("eval", run, "--data", file, "--json", "--no-drift", status=0).out)["eval"]


def labeled(count: int) -> list[dict]:
    return [{"text": f"{CLASSES[n % 3]} {'x' * (n * 7 % 23)} {n}", "label": CLASSES[n * n % 3]} for n in range(count)]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_accuracy_of_predicted_classes_is_that_of_eval(call, predict, classifier, tmp_path, suffix):
    rows = labeled(60)
    found = predict(classifier, rows, suffix=suffix)
    assert [row["text"] for row in found] == [row["text"] for row in rows]
    assert [int(row["row"]) for row in found] == [*range(1, 61)]
    right = np.mean([row["prediction"] == row["label"] for row in found])
    metrics = evaluated(call, classifier, tmp_path / "rows.jsonl")
    assert right == metrics["accuracy"]
    for row in found:
        by_class = row["probabilities"] if suffix == ".jsonl" else {c: float(row[f"p_{c}"]) for c in CLASSES}
        assert max(by_class, key=by_class.__getitem__) == row["prediction"]
        assert sum(by_class.values()) == pytest.approx(1, abs=1e-6)
        assert not row["error"]


def test_rows_without_labels_of_any_class_give_the_same_predictions(predict, classifier):
    rows = labeled(12)
    with_labels = predict(classifier, rows)
    bare = predict(classifier, [{"text": row["text"], "label": "never seen"} for row in rows], "--force")
    none = predict(classifier, [{"text": row["text"]} for row in rows], "--force")
    assert [r["probabilities"] for r in with_labels] == [r["probabilities"] for r in bare]
    assert [r["probabilities"] for r in with_labels] == [r["probabilities"] for r in none]


def test_each_unusable_row_gives_a_record_with_an_error_in_its_place(call, predict, classifier, tmp_path):
    file = tmp_path / "in.jsonl"
    lines = ['{"text": "cat"}', "not json", '{"text": " "}', '{"other": 1}', json.dumps({"text": "x" * 100})]
    file.write_text("\n".join([*lines, '{"text": "dog"}', "[1]"]) + "\n")
    found = predict(classifier, file)
    assert [row["row"] for row in found] == [1, 2, 3, 4, 5, 6, 7]
    assert [row["prediction"] is None for row in found] == [False, True, True, True, True, False, True]
    said = [row["error"] for row in found]
    assert said[0] is said[5] is None
    for error, words in zip([*said[1:5], said[6]], ["JSON", "empty", "text", "64 tokens", "object"], strict=True):
        assert words in error
    ended = call("predict", classifier, file, status=0)
    assert [json.loads(line) for line in ended.out.splitlines()] == found, "the same on standard output"
    assert "7 rows, 5 of them without a prediction" in ended.unwrapped


def test_a_file_without_one_usable_row_is_refused_and_leaves_nothing(predict, classifier, tmp_path):
    assert_refused(predict(classifier, [{"text": ""}, {"text": " "}], status=2), "no row can be used", "empty")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    assert_refused(predict(classifier, [{"n": 1}], status=2), "column")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_leading_unusable_rows_do_not_decide_the_columns(predict, classifier, monkeypatch):
    monkeypatch.setattr(predicting, "CHUNK_ROWS", 2)
    found = predict(classifier, [{"text": ""}] * 3 + [{"text": "cat"}], suffix=".csv")
    assert len(found) == 4 and found[0]["error"] and found[3]["prediction"] in CLASSES


def test_records_with_errors_are_written_before_the_first_prediction(predict, classifier, monkeypatch):
    monkeypatch.setattr(predicting, "CHUNK_ROWS", 2)
    real, sizes = PredictionFile.write, []

    def write(self, lines):
        sizes.append(lines.count(b"\n"))
        real(self, lines)

    monkeypatch.setattr(PredictionFile, "write", write)
    assert_refused(predict(classifier, [{"text": ""}] * 5, status=2), "no row can be used")
    assert sizes == [2, 2, 1]


def test_a_missing_file_is_reported_before_the_model_is_loaded(predict, classifier, monkeypatch, tmp_path):
    def load(*args, **options):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("deltaw.training.origin.open_run", load)
    assert_refused(predict(classifier, tmp_path / "rwos.jsonl", status=2), "rwos.jsonl")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_values_without_a_form_in_the_output_are_replaced(predict, classifier, tmp_path, suffix):
    file = tmp_path / "in.jsonl"
    rows = ('{"text": "cat", "odd": "\\ud800", "number": NaN}', '{"text": "dog", "odd": "\\\\ud800", "number": 1.5}')
    file.write_text("\n".join(rows))
    first, second = predict(classifier, file, suffix=suffix)
    assert first["odd"] == {".jsonl": "\ud800"}.get(suffix, "\ufffd") and second["odd"] == "\\ud800"
    assert not first["number"] and float(second["number"]) == 1.5


def test_columns_of_the_rows_are_kept_beside_predictions_of_the_same_name(predict, classifier):
    (found,) = predict(classifier, [{"text": "cat", "prediction": "mine", "row": 9, "error": "e"}], suffix=".parquet")
    assert (found["prediction"], found["row"], found["error"]) == ("mine", 9, "e")
    assert found["predicted_prediction"] in CLASSES and found["predicted_row"] == 1
    assert found["predicted_error"] is None


def test_texts_of_another_column_are_predicted_and_missing_ones_refused(predict, classifier):
    (named,) = predict(classifier, [{"comment_text": "cat"}], "--data.columns", "{text: comment_text}")
    (plain,) = predict(classifier, [{"text": "cat"}], "--force")
    assert named["probabilities"] == plain["probabilities"]
    flags = ("--force", "--data.columns")
    assert_refused(predict(classifier, [{"text": "cat"}], *flags, "{text: nope}", status=2), "no column 'nope'")
    assert_refused(predict(classifier, [{"text": "cat"}], *flags, "text", status=2), "--data.columns")


def test_long_rows_are_truncated_on_request(predict, classifier):
    found = predict(classifier, [{"text": "x" * 100}], "--data.long_rows", "cut", "--data.max_length", 20)
    assert found[0]["prediction"] in CLASSES and found[0]["error"] is None


def test_an_output_is_not_overwritten_unless_forced(call, predict, classifier, tmp_path):
    predict(classifier, labeled(3))
    before = (tmp_path / "predictions.jsonl").read_bytes()
    assert_refused(predict(classifier, labeled(2), status=2), "exists", "--force")
    assert (tmp_path / "predictions.jsonl").read_bytes() == before
    assert len(predict(classifier, labeled(2), "--force")) == 2
    assert_refused(predict(classifier, labeled(2), suffix=".txt", status=2), ".txt", ".parquet")
    same = call("predict", classifier, tmp_path / "rows.jsonl", "-o", tmp_path / "rows.jsonl", "--force", status=2)
    assert_refused(same, "the input file")
    assert_refused(call("predict", classifier, tmp_path / "rows.jsonl", "--json", status=2), "--output")
    beneath = call("predict", classifier, tmp_path / "rows.jsonl", "-o", tmp_path / "rows.jsonl" / "o.csv", status=2)
    assert_refused(beneath, "cannot write 'o.csv'")
    assert_refused(predict(classifier, labeled(2), "--temperature", 1, suffix=".csv", status=2), "writes no text")


def test_rows_limits_how_many_are_predicted_and_json_counts_them(call, classifier, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [*labeled(5), {"text": ""}, *labeled(5)])
    ended = call("predict", classifier, file, "-o", tmp_path / "o.csv", "--rows", 7, "--json", status=0)
    told = json.loads(ended.out)
    assert (told["rows"], told["predicted"], told["errors"]) == (7, 6, {"an empty text": 1})
    assert told["task"] == "sequence-classification" and len(read(tmp_path / "o.csv")) == 7


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".parquet", ".jsonl.gz"])
def test_any_file_that_training_reads_is_predicted(predict, classifier, tmp_path, suffix):
    import gzip

    rows, file = labeled(7), tmp_path / f"in{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    elif suffix == ".json":
        file.write_text(json.dumps(rows))
    elif suffix == ".jsonl.gz":
        file.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    else:
        with file.open("w", newline="") as to:
            writer = csv.DictWriter(to, ["text", "label"], delimiter="\t" if suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    expected = [row["probabilities"] for row in predict(classifier, rows)]
    assert [row["probabilities"] for row in predict(classifier, file, "--force")] == expected


def test_rows_of_a_folder_name_their_files(predict, classifier, tmp_path):
    (tmp_path / "d").mkdir()
    write_rows(tmp_path / "d" / "b.jsonl", labeled(2))
    write_rows(tmp_path / "d" / "a.jsonl", labeled(1))
    found = predict(classifier, tmp_path / "d")
    assert [(Path(row["file"]).name, row["row"]) for row in found] == [("a.jsonl", 1), ("b.jsonl", 1), ("b.jsonl", 2)]


def test_predicted_numbers_have_the_error_of_eval(call, predict, bert, folder, tmp_path):
    rows = [{"text": "x" * (n % 17), "label": n % 17 / 4, "extra": n} for n in range(1, 33)]
    run = train(bert, folder / "regression", "regression", [r for r in rows if r["text"]])
    rows = [row for row in rows if row["text"]]
    found = predict(run, rows)
    error = np.mean([(row["prediction"] - row["label"]) ** 2 for row in found])
    assert error == pytest.approx(evaluated(call, run, tmp_path / "rows.jsonl")["mse"], rel=1e-5)


def test_scores_of_a_reward_model_rank_pairs_as_eval_does(call, predict, bert, folder, tmp_path):
    rows = [{"prompt": f"q{n}", "chosen": "y" * (n % 7 + 1), "rejected": "z" * (n % 5 + 1)} for n in range(20)]
    run = train(bert, folder / "rewards", "sequence-classification", rows)
    found = predict(run, rows)
    right = np.mean([row["score_chosen"] > row["score_rejected"] for row in found])
    assert right == evaluated(call, run, tmp_path / "rows.jsonl")["accuracy"]
    single = predict(run, [{"prompt": r["prompt"], "completion": r["chosen"]} for r in rows], "--force")
    assert [r["score"] for r in single] == pytest.approx([r["score_chosen"] for r in found], abs=1e-4)
    without = predict(
        run, [{"prompt": "q"}, {"prompt": "q", "response": ""}, {"prompt": "q", "answer": "y"}], "--force"
    )
    assert ["answer" in (row["error"] or "") for row in without] == [True, True, False]


def test_scores_of_passages_and_their_ranking_are_those_of_eval(call, predict, folder, tmp_path):
    torch.manual_seed(1)
    config = bert_config(num_labels=1, initializer_range=0.4)
    model = saved(BertForSequenceClassification(config).eval(), folder / "scorer")
    rows = [{"query": f"q{n}", "passage": f"p{n * 7 % 5}", "label": n % 2} for n in range(24)]
    run = train(model, folder / "reranker", "reranking", rows)
    found = predict(run, rows)
    right = np.mean([(row["score"] > 0.5) == (row["label"] > 0.5) for row in found])
    assert right == evaluated(call, run, tmp_path / "rows.jsonl")["accuracy"]
    texts = [row["passage"] for row in rows[:5]]
    (listed,) = predict(run, [{"query": "q0", "passages": texts}], "--force")
    assert len(listed["score"]) == 5
    assert listed["ranking"] == sorted(range(5), key=lambda place: -listed["score"][place])
    alone = predict(run, [{"query": "q0", "passage": text} for text in texts], "--force")
    assert [row["score"] for row in alone] == pytest.approx(listed["score"], abs=1e-5)


def test_embeddings_retrieve_as_eval_does(call, predict, bert, folder, tmp_path):
    run = train_embedder(bert, folder / "embedder")
    rows = [{"anchor": f"question {n}", "positive": f"answer {'y' * (n % 5)} {n}"} for n in range(20)]
    found = predict(run, rows, suffix=".parquet")
    queries, passages = (np.array([row[f"{side}_embedding"] for row in found]) for side in ("query", "passage"))
    assert np.linalg.norm(queries, axis=1) == pytest.approx(np.ones(20), abs=1e-5)
    best = np.mean((queries @ passages.T).argmax(1) == np.arange(20))
    assert best == evaluated(call, run, tmp_path / "rows.jsonl")["recall@1"]
    alone = predict(run, [{"text": row["positive"]} for row in rows])
    assert np.array([row["embedding"] for row in alone]) == pytest.approx(passages, abs=1e-5)


def test_completions_match_the_answers_as_eval_counts_them(call, predict, finished_run, rows_file, tmp_path):
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    found = predict(finished_run, rows)
    exact = np.mean([row["completion"] == row["predicted_completion"] for row in found])
    assert exact == evaluated(call, finished_run, rows_file)["exact_match"]
    asked = predict(finished_run, [{"prompt": row["prompt"]} for row in rows], "--force")
    assert [row["completion"] for row in asked] == [row["predicted_completion"] for row in found]
    assert {row["finish"] for row in asked} <= {"stop", "length"}
    chats = [{"messages": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    assert [r["completion"] for r in predict(finished_run, chats, "--force")] == [r["completion"] for r in asked]
    said = json.loads(call("generate", finished_run, rows[0]["prompt"], "--json", status=0).out)["completions"][0]
    assert said["completion"] == asked[0]["completion"]


def test_sampled_completions_are_the_same_after_another_start(predict, finished_run, monkeypatch):
    rows, flags = [{"prompt": "paint it"}] * 6, ("--temperature", 1, "--max-new-tokens", 8, "--seed", 3)
    together = [row["completion"] for row in predict(finished_run, rows, *flags)]
    monkeypatch.setattr(predicting, "COMPLETION_ROWS", 2)
    assert [row["completion"] for row in predict(finished_run, rows, *flags, "--force")] == together
    assert len(set(together)) > 1


def test_prompts_that_are_empty_or_too_long_have_an_error(predict, finished_run):
    rows = [{"prompt": "paint it red"}, {"prompt": ""}, {"prompt": "x" * 500}, {"completion": "r"}]
    said = [row["error"] for row in predict(finished_run, rows)]
    assert said[0] is None and "empty" in said[1] and "tokens" in said[2] and "no prompt" in said[3]


def test_accuracy_of_predicted_image_classes_is_that_of_eval(call, predict, folder, tmp_path):
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    vit = ViTConfig(image_size=8, patch_size=4, num_channels=1, initializer_range=0.2, num_labels=3, **shape)
    ViTForImageClassification(vit).eval().save_pretrained(folder / "vit")
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 255, (24, 8, 8)).astype(np.uint8)
    for number, image in enumerate(pixels):
        into = folder / "images" / CLASSES[number % 3]
        into.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(into / f"{number}.png")
    run = train(folder / "vit", folder / "image-run", "image-classification", folder / "images")
    found = predict(run, folder / "images")
    assert len(found) == 24
    right = np.mean([Path(row["image"]).parent.name == row["prediction"] for row in found])
    assert right == evaluated(call, run, folder / "images")["accuracy"]


# Resuming


@pytest.fixture
def killed(call, classifier, tmp_path, monkeypatch):
    """Predict rows with a process that is killed in the midst of them, then again to the end."""
    monkeypatch.setattr(predicting, "CHUNK_ROWS", 8)
    file = write_rows(tmp_path / "rows.jsonl", [*labeled(50), {"text": ""}, *labeled(49)])

    def run(output: Path, *flags):
        real, done = predicting.Predictor._predict, []

        def dying(self, *args):
            done.append(args)
            if len(done) == 6:
                raise KeyboardInterrupt
            return real(self, *args)

        with monkeypatch.context() as patched:
            patched.setattr(predicting.Predictor, "_predict", dying)
            call("predict", classifier, file, "-o", output, *flags, status=130)
        with output.with_name(output.name + ".partial").open("ab") as partial:
            partial.write(b"half a rec")  # written after the journal was
        return file

    return run


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_resumed_file_is_equal_to_one_written_at_once(call, killed, classifier, tmp_path, suffix):
    output, whole = tmp_path / f"out{suffix}", tmp_path / f"whole{suffix}"
    file = killed(output)
    assert not output.exists()
    ended = call("predict", classifier, file, "-o", output, status=0)
    assert "resuming after 40 of 100 rows" in ended.unwrapped
    assert "100 rows, 1 of them" in ended.unwrapped, "errors before and after are counted"
    call("predict", classifier, file, "-o", whole, status=0)
    assert output.read_bytes() == whole.read_bytes() and len(read(output)) == 100
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["rows.jsonl", output.name, whole.name])


def test_a_file_that_is_complete_but_not_renamed_is_finished(call, classifier, tmp_path, monkeypatch):
    file = write_rows(tmp_path / "rows.jsonl", labeled(3))
    with monkeypatch.context() as patched:
        patched.setattr(PredictionFile, "finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        call("predict", classifier, file, "-o", tmp_path / "o.csv", status=130)
    monkeypatch.setattr(predicting.Predictor, "_predict", None)
    call("predict", classifier, file, "-o", tmp_path / "o.csv", status=0)
    assert len(read(tmp_path / "o.csv")) == 3


def test_other_rows_or_settings_do_not_resume_a_file(call, killed, classifier, tmp_path):
    output = tmp_path / "out.jsonl"
    file = killed(output)
    before = (tmp_path / "out.jsonl.partial").read_bytes()
    again = ("predict", classifier, file, "-o", output)
    assert_refused(call(*again, "--data.max_length", 30, status=2), "the settings changed", "--force")
    with file.open("a") as to:
        to.write('{"text": "one more"}\n')
    assert_refused(call(*again, status=2), "the file changed", "--force")
    assert (tmp_path / "out.jsonl.partial").read_bytes() == before
    call(*again, "--force", status=0)
    assert len(read(output)) == 101


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals of another kind")
def test_a_process_that_is_killed_goes_on_to_the_same_bytes(call, classifier, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", labeled(12_000))
    output, partial = tmp_path / "out.csv", tmp_path / "out.csv.partial.json"
    with start("predict", classifier, file, "-o", output) as process:
        process.until(lambda: partial.exists())
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    assert partial.exists() and not output.exists()
    assert "resuming after" in call("predict", classifier, file, "-o", output, status=0).err
    call("predict", classifier, file, "-o", tmp_path / "whole.csv", status=0)
    assert output.read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_two_processes_do_not_write_one_file(call, classifier, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", labeled(3))
    with contextlib.closing(PredictionFile(tmp_path / "o.csv", {}, force=False)):
        assert_refused(call("predict", classifier, file, "-o", tmp_path / "o.csv", status=2), "another process")
    call("predict", classifier, file, "-o", tmp_path / "o.csv", status=0)
