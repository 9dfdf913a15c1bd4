"""`deltaw data` shows rows as the model receives them and reports problems as text or JSON."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from deltaw.data import starter
from tests.byte_models import tiny_llama
from tests.cli.conftest import assert_refused
from tests.conftest import write_rows
from tests.data.chat_templates import tokenizer_of


def make_conversation(*texts):
    """Return a conversation that starts with a user message."""
    return {"messages": [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]}


ROWS = [
    make_conversation("Capital of Peru?", "<think>\nSouth.\n</think>\n\nLima.", "Chile?", "Santiago."),
    *(
        make_conversation("a"),
        make_conversation("Same?", "Yes."),
        make_conversation("Same?", "No."),
        make_conversation("Same?", "Yes."),
    ),
]
# Rows without problems.
CLEAN_ROWS = [{"prompt": f"What is {n}?", "completion": f"It is {n}."} for n in range(30)]


@pytest.fixture(scope="module")
def qwen_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny model with the chat template and tokens of Qwen 3."""
    return with_tokenizer(tokenizer_of("qwen3"), tmp_path_factory.mktemp("models") / "thinker")


def with_tokenizer(tokenizer, folder: Path) -> Path:
    """Save a tiny model with a tokenizer."""
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = write_rows(tmp_path / "d.jsonl", ROWS)
    path.write_text(path.read_text() + "not JSON\n")
    return path


@pytest.fixture
def check(call, qwen_model):
    """Return a function that runs ``deltaw data check``, asserts status and line lengths, and returns the output on one
    line.
    """

    def run(path, *flags, status=0):
        result = call("data", "check", path, "--model", qwen_model, *flags)
        assert (result.status, result.err) == (status, "")
        assert all(len(line) <= 80 or "/" in line for line in result.out.splitlines())  # paths are not wrapped
        return " ".join(result.out.split())

    return run


def test_show_marks_trained_tokens(call, qwen_model, file):
    result = call("data", "show", file, "--model", qwen_model, "--row", 1)
    assert (result.status, result.err) == (0, "")
    for text in (
        *("between « and »", "2 examples, since the template rewrites earlier turns"),
        "<|im_start|>assistant\n«<think>\nSouth.\n</think>\n\nLima.<|im_end|>»\n",
        "<|im_start|>assistant\nLima.<|im_end|>\n<|im_start|>user\nChile?<|im_end|>",
        "53 tokens, 18 of them labels (34%)",
    ):
        assert text in result.out


def test_show_prints_unusable_rows_with_reason(call, qwen_model, file):
    result = call("data", "show", file, "--model", qwen_model, "--limit", 2, status=0)
    assert f"{file}, row 1" in result.out and f"{file}, row 2" in result.out
    assert f"{file}, row 3" not in result.out
    assert "refused: no turn is from the assistant" in result.out
    skipped = call("data", "show", file, "--model", qwen_model, "--row", 2, "--data.bad_rows", "skip")
    assert "skipped: no turn is from the assistant" in skipped.out


def test_show_reports_effect_of_settings_on_row(call, qwen_model, file):
    def show_row(*flags):
        return call("data", "show", file, "--model", qwen_model, "--row", 3, "--data.max_length", 30, *flags).out

    assert "refused: longer than data.max_length (30 tokens)" in show_row()
    assert "truncated to 30 tokens: 5 lost, 5 of them labels" in show_row("--data.long_rows", "cut")
    assert "dropped: longer than data.max_length (30 tokens), 11 labels lost" in show_row("--data.long_rows", "drop")
    assert "divided into 2 examples of at most 30 tokens" in show_row("--data.long_rows", "split")
    assert "«Yes.<|endoftext|>" not in show_row() and "Same?\n«Yes." in show_row("--data.template", "plain")


def test_show_json_is_single_object(call, qwen_model, file):
    output = json.loads(call("data", "show", file, "--model", qwen_model, "--limit", 3, "--json").out)
    assert [row["row"] for row in output["rows"]] == [1, 2, 3]
    first, second = output["rows"][0]["examples"]
    trained = "".join(piece["text"] for piece in second["pieces"] if piece["label"])
    assert trained == "<think>\n\n</think>\n\nSantiago.<|im_end|>" and first["label_tokens"] == 18
    assert first["pieces"][0] == {"text": "<|im_start|>", "label": False, "special": True, "tokens": 1}
    assert output["rows"][1]["examples"] == [] and "no turn" in output["rows"][1]["notes"][0]


def test_show_infers_task_and_model_from_columns(call, qwen_model, file, monkeypatch):
    monkeypatch.setitem(starter._MODELS, "AutoModelForCausalLM", str(qwen_model))
    output = f"task causal-lm, tokenizer of {qwen_model}; change them with --task and --model"
    text = call("data", "show", file, status=0).out
    assert " ".join(text.split()).startswith(output) and "«" in text
    assert call("data", "check", file, status=2).out.startswith("task causal-lm")


def test_show_rejects_missing_rows_and_files(call, qwen_model, file, tmp_path):
    assert_refused(call("data", "show", file, "--model", qwen_model, "--row", 77), "the file has no row 77")
    broken = tmp_path / "broken.jsonl"
    good = '{"prompt": "a", "completion": "b"}\n'
    broken.write_text(f'{good}{{"prompt": \n{good}')
    result = call("data", "show", broken, "--model", qwen_model, "--row", 2, status=0)
    assert "broken.jsonl, line 2" in result.out and "refused: line 2 is not JSON" in result.out
    result = call("data", "show", broken, "--model", qwen_model, "--data.bad_rows", "skip", status=0)
    positions = [result.out.index(text) for text in ("row 1", "skipped: line 2", 'it reads: {"prompt":', "row 3")]
    assert positions == sorted(positions)
    assert_refused(call("data", "show", file.parent / "none.jsonl"), "there is no file", "did you mean")
    result = call("data", "check", file.parent / "none.jsonl", "--model", qwen_model)
    assert_refused(result, "none.jsonl")
    assert result.out == ""


def test_check_reports_problems_and_fails_if_training_would(check, file):
    out = check(file, status=2)
    for text in (
        "6 rows read as messages (chat template)",
        " is not JSON: ",
        "error: row 2 (line 2): no turn is from the assistant",
        "warning: 1 example with the same tokens and labels as an earlier one (dropped)",
        "warning: 1 prompt with different answers in different rows (3 examples)",
        "note: 1 row that became several examples",
        "examples end with <|im_end|> in 5 examples",
        "unusable: training would fail or learn nothing",
    ):
        assert text in out
    skipped_output = check(file, "--data.bad_rows", "skip")
    assert "warnings: the data can be trained on" in skipped_output and "they are skipped" in skipped_output


def test_check_json_is_single_object_despite_errors(call, qwen_model, file):
    result = call("data", "check", file, "--model", qwen_model, "--json")
    output = json.loads(result.out)
    assert result.status == 2 and "unusable" in result.err
    assert (output["verdict"], output["rows"], output["examples"], output["form"]) == ("unusable", 6, 5, "messages")
    findings = {finding["name"]: finding for finding in output["findings"]}
    assert findings["contradictions"]["count"] == 1
    assert findings["contradictions"]["rows"] == [f"{file}, row {n} (line {n})" for n in (3, 4, 5)]
    assert findings["duplicates"]["level"] == "warning"
    assert sum(b["examples"] for b in output["lengths"]["bins"]) == output["examples"]
    assert output["ends"] == {"<|im_end|>": 5}
    assert 0 < output["label_tokens"] < output["tokens"]


def test_missing_end_of_turn_labels_are_an_error(call, check, tmp_path):
    rows = write_rows(tmp_path / "d.jsonl", [{"prompt": f"{n}", "completion": "x"} for n in range(30)])
    template = tmp_path / "endless.jinja"
    template.write_text(
        "{% for m in messages %}<|im_start|>{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    # eos is appended because the template has no end-of-turn token of the tokenizer.
    assert "examples end with <|im_end|> in 30 examples" in check(rows, "--data.chat_template", template)
    tokenizer = tokenizer_of("generation")
    tokenizer.add_tokens(["<stop>"], special_tokens=True)
    tokenizer.chat_template = template.read_text().replace("</s>", "<stop>")
    result = call("data", "check", rows, "--model", with_tokenizer(tokenizer, tmp_path / "other"))
    assert result.status == 2 and "is ever trained, so the model will not learn to stop" in " ".join(result.out.split())


def test_overlap_with_each_evaluation_file_is_reported(check, tmp_path):
    eval_rows = [CLEAN_ROWS[4], {"prompt": "What is 5?", "completion": "Five."}]
    eval_rows += [{"prompt": "New?", "completion": "Yes."}]
    files = {"d": CLEAN_ROWS, "t": eval_rows, "u": CLEAN_ROWS[5:7]}
    train, first, second = (write_rows(tmp_path / f"{name}.jsonl", rows) for name, rows in files.items())
    out = check(train, "--data.eval", f"{{one: {first}, two: {second}, drawn: 0.1}}")
    assert f"1 example of {first} that are also training rows" in out
    assert f"1 example of {first} with the prompt of a training row" in out
    assert f"2 examples of {second} that are also" in out


ODD_TEXTS = {"1 row with an answer that has no letter or digit": ("Odd?", "...")}
ODD_TEXTS |= {"2 rows with an empty answer at the end": ("Even?", " "), "1 row with only white space": (" ", "")}
ODD_TEXTS |= {"1 row with �": ("Caf\ufffd?", "Yes."), "1 row with a special token in the text": ("<|im_end|>", "Yes.")}
ODD_TEXTS |= {"1 row with the text of an earlier one except for case": ("what is 7", "IT IS 7!")}


def test_unusual_text_is_reported_without_false_positives(check, tmp_path):
    path = write_rows(tmp_path / "d.jsonl", CLEAN_ROWS)
    clean_output = check(path)
    assert "fine: no problems found" in clean_output and "█" in clean_output
    odd_rows = [{"prompt": prompt, "completion": answer} for prompt, answer in ODD_TEXTS.values()]
    out = check(write_rows(path, [*CLEAN_ROWS, *odd_rows]))
    for number, text in enumerate(ODD_TEXTS, 31):
        assert text not in clean_output and text in out and f"{path}, row {number}" in out


def test_settings_are_read_from_file_or_run(call, qwen_model, file, tmp_path, finished_run):
    settings = tmp_path / "run.yaml"
    settings.write_text(yaml.safe_dump({"model": str(qwen_model), "data": {"train": str(file), "template": "plain"}}))
    assert "(plain template)" in call("data", "check", settings).out
    assert "(plain template)" in call("data", "check", file, "--settings", settings).out
    assert "paint it red" in call("data", "show", finished_run).out
    result = call("data", "show", settings, "--settings", settings)
    assert result.status == 2 and "so --settings is not allowed" in result.err


def test_check_and_show_support_labeled_rows(call, qwen_model, tmp_path):
    rows = [{"text": f"film {n}", "label": "good" if n % 3 else "bad"} for n in range(40)]
    rows += [{"text": "film 3", "label": "good"}, {"text": "rare film", "label": "odd"}, {"text": 3, "label": "good"}]
    rows += [{"text": "rarer film", "label": "odd"}, rows[0]]
    path = write_rows(tmp_path / "d.jsonl", rows)
    flags = ("--model", qwen_model, "--task", "sequence-classification")
    result = call("data", "check", path, *flags)
    assert result.status == 2
    for text in (
        "error: row 43 (line 43): ",
        "3 classes with row counts: bad 15, good 27, odd 2",
        "warning: classes with less than 10% of the rows of the largest: odd (2)",
        "warning: 2 rows with content that has another label elsewhere",
        "warning: 1 row with the same content and label as an earlier one (dropped)",
    ):
        assert text in " ".join(result.out.split())
    assert call("data", "check", path, *flags, "--data.bad_rows", "skip").status == 0
    output = json.loads(call("data", "check", path, *flags, "--json").out)
    assert output["class_counts"] == {"bad": 15, "good": 27, "odd": 2} and output["label_tokens"] is None
    show_result = call("data", "show", path, *flags, "--row", 2)
    assert "label 'good'" in show_result.out and "film 1" in show_result.out


REFUSALS = {
    "tracker": (["--track", "wandb"], "wandb"),
    "no held-out rows": (["--data.eval", "null", "--train.early_stopping", 2], "no rows are held out"),
    "target modules": (["--lora.target_modules", "[nothing]"], "matches no module"),
    "reward function": (["--task", "rl", "--reward.functions", "[{name: nonsense}]"], "no reward 'nonsense'"),
    "reward file": (["--task", "rl", "--reward.functions", "[{name: 'none.py:f'}]"], "no file none.py"),
    "memory": (["--memory", "much"], "much"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_check_and_plan_reject_same_input_as_train(call, model_folder, tmp_path, name):
    flags, message = REFUSALS[name]
    data = write_rows(tmp_path / "d.jsonl", [{"prompt": f"paint {n}", "completion": "red"} for n in range(12)])
    run = ["--model", model_folder, "--data.train", data, "--output", tmp_path / "run", "--precision", "fp32", *flags]
    for verb in (["train"], ["plan", "--methods", "lora"], ["data", "check"]):
        result = call(*verb, *run, status=2)
        assert message in " ".join((result.out + result.err).split()), (verb, result)
    assert not (tmp_path / "run").exists()


def test_model_without_head_weights_is_rejected_before_training(call, tmp_path, model_folder):
    folder = tmp_path / "headless"
    shutil.copytree(model_folder, folder)
    (weights,) = folder.glob("*.safetensors")
    tensors = load_file(weights)
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["LlamaModel"], "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: t for name, t in tensors.items() if "lm_head" not in name}, weights, metadata={"format": "pt"})
    data = write_rows(tmp_path / "d.jsonl", [{"prompt": f"paint {n}", "completion": "red"} for n in range(12)])
    run = ["--model", folder, "--data.train", data, "--output", tmp_path / "run", "--precision", "fp32"]
    for verb in (["train"], ["plan"], ["data", "check"]):
        result = call(*verb, *run, status=2)
        assert "lm_head.weight" in result.out + result.err


def test_check_without_settings_infers_columns(call, qwen_model, tmp_path):
    (tmp_path / "d.csv").write_text("frage;antwort\n" + "".join(f"was ist {n};nichts {n}\n" for n in range(30)))
    assert "30 rows read as prompt-completion" in call("data", "check", tmp_path / "d.csv", "--model", qwen_model).out
    rows = [{"prompt": f"q {n}", "completion": f"a {n}", "label": n % 2 == 0} for n in range(12)]
    kto_file = write_rows(tmp_path / "kto.jsonl", rows)
    assert call("data", "check", kto_file, "--model", qwen_model).status == 0


def test_misspelled_classes_and_empty_texts_are_reported(call, qwen_model, tmp_path):
    rows = [{"text": f"mail {n}", "label": ["account", "billing"][n % 2]} for n in range(20)]
    rows += [{"text": "odd", "label": "acount"}, {"text": " ", "label": "billing"}]
    path = write_rows(tmp_path / "d.jsonl", rows)
    out = " ".join(call("data", "check", path, "--model", qwen_model, status=2).out.split())
    assert "'acount' (1 row) is almost 'account' (10 rows)" in out
    assert "row 22 (line 22): 'text' is empty" in out


def test_check_describes_numbers_of_regression(call, qwen_model, tmp_path):
    rows = [{"text": f"row {n}", "label": [float(n), 2.0]} for n in range(20)] + [{"text": "far", "label": [1e6, 2.0]}]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    flags = ("--model", qwen_model, "--task", "regression")
    assert "of target 2: mean 2, standard deviation 0, from 2 to 2" in call("data", "check", file, *flags, status=2).out
    check = json.loads(call("data", "check", file, *flags, "--json", status=2).out)
    assert check["label_numbers"][0]["maximum"] == 1e6
    findings = {finding["name"]: finding["text"] for finding in check["findings"]}
    assert "target 2" in findings["constant_labels"] and "row 21: 1e+06" in findings["outliers"]
