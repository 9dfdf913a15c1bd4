"""`deltaw data`: what rows become and what is wrong with them, as a person and a program read it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from deltaw.reports.starter import MODELS
from tests.byte_models import tiny_llama
from tests.cli.conftest import assert_refused
from tests.conftest import write_rows
from tests.data.chat_templates import tokenizer_of


def talk(*texts):
    """A conversation of which the user begins."""
    return {"messages": [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]}


ROWS = [
    talk("Capital of Peru?", "<think>\nSouth.\n</think>\n\nLima.", "Chile?", "Santiago."),
    *(talk("a"), talk("Same?", "Yes."), talk("Same?", "No."), talk("Same?", "Yes.")),
]
# Sound rows.
NUMBERS = [{"prompt": f"What is {n}?", "completion": f"It is {n}."} for n in range(30)]


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with the template and the tokens of Qwen 3."""
    return with_tokenizer(tokenizer_of("qwen3"), tmp_path_factory.mktemp("models") / "thinker")


def with_tokenizer(tokenizer, folder: Path) -> Path:
    """A tiny model with a tokenizer."""
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = write_rows(tmp_path / "d.jsonl", ROWS)
    path.write_text(path.read_text() + "not JSON\n")
    return path


@pytest.fixture
def check(call, thinker):
    """Check rows for the tiny model, with this status; lines of at most 80 columns, here as one."""

    def run(path, *flags, status=0):
        ended = call("data", "check", path, "--model", thinker, *flags)
        assert (ended.status, ended.err) == (status, "")
        assert all(len(line) <= 80 or "/" in line for line in ended.out.splitlines())  # a path stays whole
        return " ".join(ended.out.split())

    return run


def test_a_row_is_shown_with_what_is_trained_on_between_marks(call, thinker, file):
    ended = call("data", "show", file, "--model", thinker, "--row", 1)
    assert (ended.status, ended.err) == (0, "")
    for said in (
        *("between « and »", "2 examples, since the template rewrites earlier turns"),
        "<|im_start|>assistant\n«<think>\nSouth.\n</think>\n\nLima.<|im_end|>»\n",
        "<|im_start|>assistant\nLima.<|im_end|>\n<|im_start|>user\nChile?<|im_end|>",
        "53 tokens, 18 of them labels (34%)",
    ):
        assert said in ended.out


def test_rows_are_shown_in_order_and_those_that_cannot_be_used_with_the_reason(call, thinker, file):
    ended = call("data", "show", file, "--model", thinker, "--rows", 2, status=0)
    assert f"{file}, row 1" in ended.out and f"{file}, row 2" in ended.out
    assert f"{file}, row 3" not in ended.out
    assert "refused: no turn is the assistant's" in ended.out
    skipped = call("data", "show", file, "--model", thinker, "--row", 2, "--data.bad_rows", "skip")
    assert "skipped: no turn is the assistant's" in skipped.out


def test_what_the_settings_do_to_a_row_is_said(call, thinker, file):
    def said(*flags):
        return call("data", "show", file, "--model", thinker, "--row", 3, "--data.max_length", 30, *flags).out

    assert "refused: longer than data.max_length (30 tokens)" in said()
    assert "truncated to 30 tokens: 5 lost, 5 of them labels" in said("--data.long_rows", "cut")
    assert "dropped: longer than data.max_length (30 tokens), 11 labels lost" in said("--data.long_rows", "drop")
    assert "divided into 2 examples of at most 30 tokens" in said("--data.long_rows", "split")
    assert "«Yes.<|endoftext|>" not in said() and "Same?\n«Yes." in said("--data.template", "plain")


def test_rows_as_json_are_one_object(call, thinker, file):
    told = json.loads(call("data", "show", file, "--model", thinker, "--rows", 3, "--json").out)
    assert [row["row"] for row in told["rows"]] == [1, 2, 3]
    first, second = told["rows"][0]["examples"]
    trained = "".join(piece["text"] for piece in second["pieces"] if piece["label"])
    assert trained == "<think>\n\n</think>\n\nSantiago.<|im_end|>" and first["label_tokens"] == 18
    assert first["pieces"][0] == {"text": "<|im_start|>", "label": False, "special": True, "tokens": 1}
    assert told["rows"][1]["examples"] == [] and "no turn" in told["rows"][1]["notes"][0]


def test_rows_alone_are_read_as_their_columns_say_by_the_usual_model(call, thinker, file, monkeypatch):
    monkeypatch.setitem(MODELS, "causal-lm", str(thinker))
    told = f"task causal-lm, tokens of {thinker}; --task and --model change it"
    shown = call("data", "show", file, status=0).out
    assert " ".join(shown.split()).startswith(told) and "«" in shown
    assert call("data", "check", file, status=2).out.startswith("task causal-lm")


def test_a_row_that_is_not_there_and_a_missing_file_are_refused(call, thinker, file, tmp_path):
    assert_refused(call("data", "show", file, "--model", thinker, "--row", 77), "there is no row 77")
    broken = tmp_path / "broken.jsonl"
    good = '{"prompt": "a", "completion": "b"}\n'
    broken.write_text(f'{good}{{"prompt": \n{good}')
    ended = call("data", "show", broken, "--model", thinker, "--row", 2, status=0)
    assert "broken.jsonl, line 2" in ended.out and "refused: line 2 is not JSON" in ended.out
    ended = call("data", "show", broken, "--model", thinker, "--data.bad_rows", "skip", status=0)
    places = [ended.out.index(text) for text in ("row 1", "skipped: line 2", 'it reads: {"prompt":', "row 3")]
    assert places == sorted(places)
    assert_refused(call("data", "show", file.parent / "none.jsonl"), "'model' is not given")
    ended = call("data", "check", file.parent / "none.jsonl", "--model", thinker)
    assert_refused(ended, "none.jsonl")
    assert ended.out == ""


def test_a_check_names_what_is_wrong_and_ends_with_status_2_if_training_would_fail(check, file):
    out = check(file, status=2)
    for said in (
        "6 rows read as messages (chat template)",
        " is not JSON: ",
        "error: row 2 (line 2): no turn is the assistant's",
        "warning: 1 example with the same tokens and labels as an earlier one (dropped)",
        "warning: 1 prompt with different answers in different rows (3 examples)",
        "note: 1 row of which several examples come",
        "trained to end with <|im_end|> in 5 examples",
        "unusable: training would fail or be pointless",
    ):
        assert said in out
    warned = check(file, "--data.bad_rows", "skip")
    assert "warnings: it can be trained on" in warned and "they are skipped" in warned


def test_a_check_as_json_is_one_object_whatever_it_finds(call, thinker, file):
    ended = call("data", "check", file, "--model", thinker, "--json")
    told = json.loads(ended.out)
    assert ended.status == 2 and "unusable" in ended.err
    assert (told["verdict"], told["rows"], told["examples"], told["form"]) == ("unusable", 6, 5, "messages")
    findings = {finding["name"]: finding for finding in told["findings"]}
    assert findings["contradictions"]["count"] == 1
    assert findings["contradictions"]["rows"] == [f"{file}, row {n} (line {n})" for n in (3, 4, 5)]
    assert findings["duplicates"]["level"] == "warning"
    assert sum(b["examples"] for b in told["lengths"]["bins"]) == told["examples"]
    assert told["ends"] == {"<|im_end|>": 5}
    assert 0 < told["label_tokens"] < told["tokens"]


def test_a_model_that_would_never_learn_to_stop_is_an_error(call, check, tmp_path):
    """Long rows are truncated, so that each of them loses the end of its turn."""
    rows = write_rows(tmp_path / "d.jsonl", [{"prompt": f"{n}", "completion": "x"} for n in range(30)])
    template = tmp_path / "endless.jinja"
    template.write_text(
        "{% for m in messages %}<|im_start|>{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    # Without an end of turn that the tokenizer knows, eos is appended.
    assert "trained to end with <|im_end|> in 30 examples" in check(rows, "--data.chat_template", template)
    tokenizer = tokenizer_of("generation")
    tokenizer.add_tokens(["<stop>"], special_tokens=True)
    tokenizer.chat_template = template.read_text().replace("</s>", "<stop>")
    ended = call("data", "check", rows, "--model", with_tokenizer(tokenizer, tmp_path / "other"))
    assert ended.status == 2 and "is ever trained: the model will not learn to stop" in " ".join(ended.out.split())


def test_overlap_with_every_evaluation_file_is_found(check, tmp_path):
    apart = [NUMBERS[4], {"prompt": "What is 5?", "completion": "Five."}, {"prompt": "New?", "completion": "Yes."}]
    kinds = {"d": NUMBERS, "t": apart, "u": NUMBERS[5:7]}
    train, one, two = (write_rows(tmp_path / f"{name}.jsonl", rows) for name, rows in kinds.items())
    out = check(train, "--data.eval", f"{{one: {one}, two: {two}, drawn: 0.1}}")
    assert f"1 example of {one} that are also training rows" in out
    assert f"1 example of {one} with the prompt of a training row" in out
    assert f"2 examples of {two} that are also" in out


ODD = {
    "1 row with an answer that has no letter or digit": ("Odd?", "..."),
    "2 rows with an empty answer at the end": ("Even?", " "),
    "1 row with only white space": (" ", ""),
    "1 row with �": ("Caf\ufffd?", "Yes."),
    "1 row with a special token written in the text": ("<|im_end|>", "Yes."),
    "1 row like an earlier one but for case": ("what is 7", "IT IS 7!"),
}


def test_odd_texts_are_found_and_nothing_wrong_is_said_too(check, tmp_path):
    path = write_rows(tmp_path / "d.jsonl", NUMBERS)
    sound = check(path)
    assert "fine: no problem was found" in sound and "█" in sound
    odd = [{"prompt": prompt, "completion": answer} for prompt, answer in ODD.values()]
    out = check(write_rows(path, [*NUMBERS, *odd]))
    for number, said in enumerate(ODD, 31):
        assert said not in sound and said in out and f"{path}, row {number}" in out


def test_settings_come_from_a_file_or_a_run(call, thinker, file, tmp_path, finished_run):
    settings = tmp_path / "run.yaml"
    settings.write_text(yaml.safe_dump({"model": str(thinker), "data": {"train": str(file), "template": "plain"}}))
    assert "(plain template)" in call("data", "check", settings).out
    assert "(plain template)" in call("data", "check", file, "--settings", settings).out
    assert "paint it red" in call("data", "show", finished_run).out
    ended = call("data", "show", settings, "--settings", settings)
    assert ended.status == 2 and "--settings names others" in ended.err


def test_labeled_rows_are_checked_and_shown(call, thinker, tmp_path):
    rows = [{"text": f"film {n}", "label": "good" if n % 3 else "bad"} for n in range(40)]
    rows += [{"text": "film 3", "label": "good"}, {"text": "rare film", "label": "odd"}, {"text": 3, "label": "good"}]
    rows += [{"text": "rarer film", "label": "odd"}, rows[0]]
    path = write_rows(tmp_path / "d.jsonl", rows)
    flags = ("--model", thinker, "--task", "sequence-classification")
    ended = call("data", "check", path, *flags)
    assert ended.status == 2
    for said in (
        "error: row 43 (line 43): ",
        "3 classes, rows of each: bad 15, good 27, odd 2",
        "warning: classes with less than 10% of the rows of the largest: odd (2)",
        "warning: 2 rows with content that has another label elsewhere",
        "warning: 1 row with the same content and label as an earlier one (dropped)",
    ):
        assert said in " ".join(ended.out.split())
    assert call("data", "check", path, *flags, "--data.bad_rows", "skip").status == 0
    told = json.loads(call("data", "check", path, *flags, "--json").out)
    assert told["class_counts"] == {"bad": 15, "good": 27, "odd": 2} and told["label_tokens"] is None
    shown = call("data", "show", path, *flags, "--row", 2)
    assert "label 'good'" in shown.out and "film 1" in shown.out


REFUSALS = {
    "tracker": (["--track", "wandb"], "wandb"),
    "no held-out rows": (["--data.eval", "null", "--train.early_stopping", 2], "no rows are held out"),
    "target modules": (["--lora.target_modules", "[nothing]"], "matches no module"),
    "reward function": (["--task", "reward", "--reward.functions", "[{name: nonsense}]"], "no reward 'nonsense'"),
    "reward file": (["--task", "reward", "--reward.functions", "[{name: 'none.py:f'}]"], "no file none.py"),
    "memory": (["--memory", "much"], "much"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_check_and_plan_refuse_what_train_refuses_before_it_loads_weights(call, model_folder, tmp_path, name):
    flags, said = REFUSALS[name]
    data = write_rows(tmp_path / "d.jsonl", [{"prompt": f"paint {n}", "completion": "red"} for n in range(12)])
    run = ["--model", model_folder, "--data.train", data, "--output", tmp_path / "run", "--precision", "fp32", *flags]
    for verb in (["train"], ["plan", "--methods", "lora"], ["data", "check"]):
        ended = call(*verb, *run, status=2)
        assert said in " ".join((ended.out + ended.err).split()), (verb, ended)
    assert not (tmp_path / "run").exists()


def test_check_and_plan_refuse_a_model_whose_files_lack_the_head(call, tmp_path, model_folder):
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
        ended = call(*verb, *run, status=2)
        assert "lm_head.weight" in ended.out + ended.err


def test_rows_alone_are_checked_with_the_columns_that_init_finds(call, thinker, tmp_path):
    (tmp_path / "d.csv").write_text("frage;antwort\n" + "".join(f"was ist {n};nichts {n}\n" for n in range(30)))
    assert "30 rows read as prompt-completion" in call("data", "check", tmp_path / "d.csv", "--model", thinker).out
    rows = [{"prompt": f"q {n}", "completion": f"a {n}", "label": n % 2 == 0} for n in range(12)]
    judged = write_rows(tmp_path / "kto.jsonl", rows)
    assert call("data", "check", judged, "--model", thinker).status == 0


def test_classes_that_may_be_typing_errors_and_empty_texts_are_named(call, thinker, tmp_path):
    rows = [{"text": f"mail {n}", "label": ["account", "billing"][n % 2]} for n in range(20)]
    rows += [{"text": "odd", "label": "acount"}, {"text": " ", "label": "billing"}]
    path = write_rows(tmp_path / "d.jsonl", rows)
    out = " ".join(call("data", "check", path, "--model", thinker, status=2).out.split())
    assert "'acount' (1 row) is almost 'account' (10 rows)" in out
    assert "row 22 (line 22): 'text' is empty" in out
