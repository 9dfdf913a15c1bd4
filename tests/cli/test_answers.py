"""Answers of a run: incomplete chat templates, verified exact match, whole answers, rows of the training."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tokenizers.normalizers import Lowercase

from deltaw.data.example import Example
from deltaw.decoding.generation import GeneratedCompletion
from deltaw.reports.comparison import answer_list
from deltaw.runs import trained_rows
from deltaw.runs.fit import fit
from deltaw.runs.trained_rows import count_trained_rows, write_trained_rows
from deltaw.studio.live import scores
from deltaw.training.evaluation.answers import EvaluatedAnswer, exact_match_warning
from deltaw.training.evaluation.base import Evaluation
from deltaw.training.session import Session
from tests.byte_models import byte_tokenizer
from tests.conftest import COLORS, write_rows
from tests.data.conftest import CHATML
from tests.serving.encoder_models import write_bert
from tests.training.runs import RecordingCallback, metrics

MEMORIZE = {"epochs": 12, "batch_size": 8, "learning_rate": 3e-2, "schedule": "constant", "samples": 1}


@pytest.fixture
def memorize(settings, tmp_path):
    """Return a function that trains four rows until each answer is exact, evaluates on them, and returns the result."""
    rows = [{"prompt": f"paint it {c}", "completion": c[0]} for c in COLORS[:4]]
    file = str(write_rows(tmp_path / "rows.jsonl", rows))

    def run(callback=None, **data):
        data = {"train": file, "eval": file, **data}
        return fit(settings(tmp_path / "run", data=data, train=MEMORIZE), callback=callback)

    return run


def test_run_with_template_without_generation_prompt_answers_as_it_scores(memorize, call, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text(CHATML.partition("{% if add_generation_prompt")[0])
    callback = RecordingCallback()
    result = memorize(callback, chat_template=str(template))
    assert result.evaluation.metrics["exact_match"] == 1.0
    assert sum("ignores add_generation_prompt" in line for line in callback.lines) == 1
    assert not any("not confirmed" in line for line in callback.lines)
    flags = ("--data", tmp_path / "rows.jsonl", "--answers", 4, "--json", "--no-drift")
    answers = json.loads(call("eval", result.output, *flags, status=0).out)["answers"]
    assert [row["answers"]["adapter"]["text"] for row in answers] == [row["expected"] for row in answers]


def test_run_and_eval_report_answers_that_contradict_exact_match(memorize, call, tmp_path, monkeypatch):
    wrong = [GeneratedCompletion(np.array([9]), "assistant\nr", True)] * 8
    monkeypatch.setattr(Session, "complete", lambda self, prompts, *_, **__: wrong[: len(prompts)])
    callback = RecordingCallback()
    result = memorize(callback)
    (line,) = [line for line in callback.lines if "not confirmed" in line]
    assert "4 of 4" in line and '"assistant r" instead of "r"' in line
    command = ("eval", result.output, "--data", tmp_path / "rows.jsonl", "--no-drift")
    assert "not confirmed" not in call(*command, status=0).out
    generator = "deltaw.decoding.opening.SessionGenerator.__call__"
    monkeypatch.setattr(generator, lambda self, prompts, *_: wrong[: len(prompts)])
    assert "adapter: exact match is not confirmed: 4 of 4" in " ".join(call(*command, status=0).out.split())


@pytest.mark.parametrize(
    "label, answer, output, confirmed",
    [
        ("yes", "yes", "yes ", True),
        ("yes", "yes", "no", False),
        ("user: yes", "yes", "user: yes", False),
        ("<think>a</think>yes", "yes", "<think>a</think>yes", True),
        ("ye", "yes", "yes", True),  # a truncated row
        ('{"name": "f"}', "", '{"name": "f"}', True),  # a tool call
    ],
)
def test_exact_match_is_confirmed_by_the_generated_text(label, answer, output, confirmed):
    tokenizer = byte_tokenizer()
    tokens = np.array(tokenizer("q" + label, add_special_tokens=False)["input_ids"], np.int32)
    row = Example(1, tokens, np.arange(len(tokens)) > 0, 1, answer)
    evaluation = Evaluation.of_rows({"exact_match": 1.0}, "exact_match", np.ones(1))
    completion = GeneratedCompletion(tokens[1:], output, True)
    warning = exact_match_warning([row], evaluation, tokenizer, lambda *_: [completion])
    assert (warning is None) is confirmed


def test_whole_answers_are_printed_with_first_difference(call, finished_run, tmp_path):
    expected = "The delivery costs 19 euros for every address in the country."
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "paint it red", "completion": expected}])
    command = ("eval", finished_run, "--data", rows, "--no-drift", "--answers", 1)
    result = call(*command, "--with-base", status=0)
    assert "".join(expected.split()) in "".join(result.out.split())
    assert result.out.count("differs from character") == 2
    (row,) = json.loads(call(*command, "--json", status=0).out)["answers"]
    assert (row["row"], row["question"], row["expected"]) == (1, "paint it red", expected)
    answer = row["answers"]["adapter"]
    assert answer["correct"] is False and not expected.startswith(answer["text"][: answer["first_difference"] + 1])


def test_first_difference_of_answers():
    answer = EvaluatedAnswer(1, "costs?", "It costs 19 euros.", " It costs 27 euros.")
    assert answer.first_difference == 9
    assert EvaluatedAnswer(1, "q", "yes", "yes\n").first_difference is None
    assert EvaluatedAnswer(1, "q", "", "text").first_difference is None
    (cell,) = [cell for cell in answer_list([{"m": answer}]).columns[1].cells if getattr(cell, "spans", None)]
    assert [cell.plain[span.start : span.end] for span in cell.spans if span.style == "red"] == ["27 euros."]


def test_eval_reports_rows_that_were_trained_on_by_content(call, finished_run, rows_file, tmp_path):
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    other = [{"id": 7, **row} for row in rows[:3]] + [{"prompt": "paint it new", "completion": "n"}]
    file = write_rows(tmp_path / "other name.jsonl", reversed(other))
    command = ("eval", finished_run, "--no-drift", "--data", file)
    result = call(*command, "--json", status=0)
    count = json.loads(result.out)["trained_rows"]
    assert count in (2, 3), "one row may be held out"
    assert f"{count} of 4 rows are also training rows of the run" in result.unwrapped
    assert scores(json.loads(result.out))["trained_rows"] == count
    file.write_text(json.dumps({"prompt": "paint it red", "completion": "another"}))
    result = call(*command, "--json", status=0)
    assert json.loads(result.out)["trained_rows"] == 0 and "training row" not in result.unwrapped


def test_digests_of_trained_rows_are_bounded_and_contain_no_text(tmp_path, monkeypatch):
    monkeypatch.setattr(trained_rows, "MAX_ROWS", 10)
    rows = [Example(n, np.arange(n, n + 5, dtype=np.int32), np.ones(5, bool), 1, "secret") for n in range(40)]
    assert count_trained_rows(tmp_path, rows) == 0
    write_trained_rows(tmp_path, rows[:30])
    assert (tmp_path / trained_rows.FILE).stat().st_size == 80
    assert count_trained_rows(tmp_path, rows) == 10 and count_trained_rows(tmp_path, rows[30:]) == 0


@pytest.mark.parametrize("task", ["sequence-classification", "embedding"])
def test_predictions_of_a_run_show_texts_as_written(tmp_path, task):
    texts = [f"The Neighbour's  dog, no. {n}: it's {'loud' if n % 2 else 'nice'}!" for n in range(12)]
    if task == "embedding":
        rows = [{"anchor": text, "positive": f"Dogs of {text}"} for text in texts]
    else:
        rows = [{"text": text, "label": "ab"[n % 2]} for n, text in enumerate(texts)]
    file = str(write_rows(tmp_path / "rows.jsonl", rows))
    train = {"max_steps": 1, "batch_size": 4, "drift": False}
    model = write_bert(tmp_path / "bert")
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = Lowercase()
    tokenizer.save_pretrained(model)
    settings = {"model": str(model), "task": task, "data": {"train": file, "eval": 4}}
    result = fit(settings | {"train": train, "precision": "fp32", "threads": 1, "output": str(tmp_path / "run")})
    (line,) = metrics(result.output, "predictions")
    examples = line["predictions"][""]["examples"]
    written = {text for row in rows for text in row.values()}
    assert len(examples) == 4 and {example["text"] for example in examples} <= written
    if task == "embedding":
        assert {example["predicted"] for example in examples} <= written
