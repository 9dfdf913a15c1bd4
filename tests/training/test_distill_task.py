"""Complete runs of the task distill: learning, files in the run's folder, and bit-identical resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import deltaw
from deltaw.errors import UserError
from deltaw.memory.plan import Plan
from deltaw.settings.config import RunConfig
from deltaw.tasks.distill.feed import ANSWERS, FOLDER, TOP_TOKENS
from deltaw.tasks.distill.loss import DistillObjective
from deltaw.tasks.distill.settings import DistillSettings
from deltaw.tasks.distill.teachers import first_difference
from deltaw.training.planning.plan_run import plan
from tests.conftest import deep_merge, refusal, write_rows
from tests.training.parallel_runs import distance, needs_gloo, train_all
from tests.training.runs import (
    ADAPTER,
    RecordingCallback,
    load_eval_rows,
    losses,
    metrics,
    open_on_cpu,
    slow_except,
    stopped_run,
)

PROMPT = "Answer as a poet would, in rhymes"


@pytest.fixture
def distill_run(tmp_path, long_context_folder):
    """Return a factory of settings of a run that trains a prompt into the adapter."""
    rows = ({"prompt": f"say {n}", "completion": f"it is {n * n}"} for n in range(12))
    rows = write_rows(tmp_path / "rows.jsonl", rows)

    def make(output: str, **changes: object) -> dict:
        train = {"max_steps": 4, "batch_size": 3, "learning_rate": 0.01, "checkpoint_every": 1, "drift": False}
        defaults = {"model": str(long_context_folder), "task": "distill", "data": {"train": str(rows), "eval": 3}}
        defaults |= {"distill": {"prompt": PROMPT, "max_new_tokens": 6}, "train": train, "precision": "fp32"}
        defaults["output"] = str(tmp_path / output)
        return deep_merge(defaults, changes)

    return make


def test_run_distills_prompt_and_reports_saved_tokens(distill_run):
    output = RecordingCallback()
    result = deltaw.fit(distill_run("run", train={"max_steps": 25}), callback=output)
    steps = losses(result.output)
    assert np.mean(steps[-3:]) < 0.8 * steps[0]
    assert result.evaluation.main == "exact_match" and result.evaluation.metrics["loss"] < 0.9 * steps[0]
    (line,) = metrics(result.output, "distilled")
    report = line["distilled"]
    assert report["prompt_tokens_saved"] == 1 + len("system\n") + len(PROMPT) + 1 + len("\n")
    assert report["rows"] == 3 and report["student"]["value"] == result.evaluation.metrics["exact_match"]
    assert {*report} >= {"base_with_prompt", "base"}
    assert "a request saves 43 prompt tokens; exact_match on 3 held-out rows: base with prompt" in output


def test_divergence_from_identical_teacher_is_zero(distill_run, tmp_path, long_context_folder):
    """The teacher is the base model without a prompt, so the divergence is zero before the adapter changes."""
    base = {"prompt": None, "teachers": [{"model": str(long_context_folder)}]}
    result = deltaw.fit(distill_run("run", distill=base, train={"max_steps": 1, "learning_rate": 1e-9}))
    (first,) = metrics(result.output, "learning_rate")
    assert abs(first["loss"]) < 1e-6 and first["gradient_norm"] < 1e-4


@pytest.mark.slow
def test_student_learns_from_teacher_with_adapter(distill_run, tmp_path, long_context_folder):
    config = {"task": "causal-lm", "distill": {"prompt": None, "max_new_tokens": 128}, "train": {"max_steps": 30}}
    teacher = deltaw.fit(distill_run("teacher", **config)).output
    distill = {"prompt": None, "teachers": [{"adapter": str(teacher)}], "divergence": "jsd"}
    result = deltaw.fit(distill_run("run", distill=distill, train={"max_steps": 40}))
    steps = losses(result.output)
    assert np.mean(steps[-3:]) < 0.5 * steps[0]


SOURCES = {
    "own": {"on_policy": 0.5},
    "teacher's": {"answers": "teacher"},
    "likeliest": {"answers": "teacher", "top_k": 5, "on_policy": 0.3},
}


@pytest.mark.parametrize("source", slow_except("likeliest", names=SOURCES))
def test_resumed_run_is_bit_identical(distill_run, source):
    uninterrupted = deltaw.fit(distill_run("whole", distill=SOURCES[source]))
    resumed = deltaw.fit(resume=stopped_run(distill_run("part", distill=SOURCES[source]), 2))
    ours = losses(uninterrupted.output)
    theirs = losses(resumed.output)
    assert ours == theirs and len(ours) == 4
    assert (uninterrupted.output / ADAPTER).read_bytes() == (resumed.output / ADAPTER).read_bytes()


@needs_gloo
@pytest.mark.slow
@pytest.mark.parametrize("source", ["own", "likeliest"])
def test_two_processes_match_one(distill_run, source):
    # Adam scales even a gradient of pure rounding error to a full step, so the learning rate is low.
    one, two = (distill_run(name, distill=SOURCES[source], train={"learning_rate": 1e-3}) for name in ("one", "two"))
    deltaw.fit(one)
    train_all(two)
    ours, theirs = (losses(Path(settings["output"])) for settings in (two, one))
    assert len(theirs) == 4 and ours == pytest.approx(theirs, rel=1e-5)
    difference, norm = distance(Path(two["output"]), Path(one["output"]))
    assert norm > 0 and difference <= 1e-5 * norm


@pytest.mark.slow
def test_teacher_outputs_are_stored_once_and_reused(distill_run, monkeypatch):
    settings = distill_run("run", distill=SOURCES["likeliest"])
    stopped = deltaw.fit(settings, callback=RecordingCallback(stop_after=1)).output / FOLDER
    answers = json.loads((stopped / ANSWERS).read_text())["answers"]
    top_tokens = np.load(stopped / TOP_TOKENS, allow_pickle=False)
    assert len(answers) == 12 and top_tokens.shape[1] == 5  # answers to all rows, tokens of only the training rows
    assert top_tokens.shape[0] == sum(len(tokens) for _, tokens, _ in answers[:9])
    assert (np.diff(top_tokens["logprob"], axis=1) <= 0).all() and (top_tokens["logprob"] < 0).all()
    monkeypatch.setattr("deltaw.tasks.distill.teachers.Teacher.generate", lambda *args: pytest.fail("generated again"))
    monkeypatch.setattr(DistillObjective, "top_tokens", _limit_rows(DistillObjective.top_tokens, 3))
    assert not deltaw.fit(resume=settings["output"]).interrupted


def _limit_rows(original, max_rows):
    """Return ``original`` with a check that at most ``max_rows`` rows, those of one step, are requested."""

    def likeliest(self, rows):
        assert len(rows) <= max_rows
        return original(self, rows)

    return likeliest


@pytest.mark.slow
def test_student_generates_the_on_policy_share(distill_run):
    result = deltaw.fit(distill_run("half", distill={"on_policy": 0.5}, train={"max_steps": 12}))
    shares = [line["student_tokens"] for line in metrics(result.output, "learning_rate")]
    assert 0.2 < np.mean(shares) < 0.8 and len(set(shares)) > 2
    result = deltaw.fit(distill_run("all", distill={"on_policy": 1.0}))
    lines = metrics(result.output, "learning_rate")
    assert all(line["student_tokens"] == 1 and line["label_tokens"] <= 3 * 6 for line in lines)


def test_teacher_answers_rows_without_completions(distill_run, tmp_path):
    path = write_rows(tmp_path / "asked.jsonl", [{"prompt": f"say {n}"} for n in range(8)])
    result = deltaw.fit(distill_run("run", data={"train": str(path), "eval": 2}))
    assert result.evaluation.metrics["loss"] > 0 and len(result.evaluation.per_row) == 2
    assert len(json.loads((result.output / FOLDER / ANSWERS).read_text())["answers"]) == 8
    (line,) = metrics(result.output, "distilled")
    assert line["distilled"]["base_with_prompt"]["value"] == 1  # the teacher generated the answers


def test_virtual_tokens_count_as_student_prompt_tokens_only(distill_run):
    short = {"max_steps": 2}
    result = deltaw.fit(distill_run("run", method="prompt", prompt={"length": 3}, distill=SOURCES["own"], train=short))
    (line,) = metrics(result.output, "distilled")
    assert line["distilled"]["prompt_tokens_saved"] == 43 - 3


def test_base_teacher_requires_an_unmodified_base_model(distill_run, long_context_folder):
    refusal(deltaw.fit, distill_run("run", method="full"), match="modifies the base model")
    other = {"teachers": [{"model": str(long_context_folder)}]}
    result = deltaw.fit(distill_run("other", method="full", distill=other, train={"max_steps": 10}))
    steps = losses(result.output)
    assert np.mean(steps[-3:]) < 0.9 * steps[0]


def test_finished_run_is_evaluated_without_teachers(distill_run, tmp_path):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(PROMPT)
    result = deltaw.fit(distill_run("run", distill={"prompt": str(prompt)}))
    prompt.unlink()
    run = open_on_cpu(result.output)
    score = run.score(load_eval_rows(run)).metrics
    assert score["exact_match"] == result.evaluation.metrics["exact_match"]
    assert score["cross_entropy"] == pytest.approx(result.evaluation.metrics["cross_entropy"], rel=1e-5)


@pytest.mark.planned
def test_plan_includes_teacher_and_its_longer_rows(distill_run, long_context_folder):
    def planned(**distill: object) -> Plan:
        return plan(distill_run("run", distill=distill, train={"batch_size": 1}))

    weights = sum(file.stat().st_size for file in long_context_folder.glob("*.safetensors"))
    short = planned(prompt="brief")
    long = planned(prompt="at length " * 20)
    assert long.operations > 2 * short.operations and long.peak_bytes > short.peak_bytes
    other = planned(prompt="brief", teachers=[{"model": str(long_context_folder)}])
    assert other.peak_bytes > short.peak_bytes + 0.9 * weights


def test_teacher_with_different_tokenizer_is_rejected(distill_run, tmp_path, long_context_folder):
    other = shutil.copytree(long_context_folder, tmp_path / "other")
    file = other / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = (next(token for token, number in vocabulary.items() if number == n) for n in (40, 41))
    vocabulary[first] = 41
    vocabulary[second] = 40
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match=f"token 40 is '{second}', the student's is '{first}'"):
        deltaw.fit(distill_run("run", distill={"teachers": [{"model": str(other)}]}))
    assert first_difference({"a": 0, "b": 1}, {"a": 0}) == (1, "b", None)
    assert first_difference({"a": 0}, {"a": 0}) is None


@pytest.mark.parametrize(
    ("distill", "message"),
    [
        ({}, "the teacher would be identical"),
        ({"teachers": [{"weight": 2}]}, "the teacher would be identical"),
        ({"prompt": "p", "beta": 0.2}, "has no beta"),
        ({"prompt": "p", "divergence": "jsd", "beta": 1.0}, "less than 1"),
        ({"prompt": "p", "on_policy": 1.5}, "at most 1"),
    ],
)
def test_invalid_settings_are_rejected(distill, message):
    refusal(RunConfig.read, {"model": "m", "data": "d.jsonl", "task": "distill", "distill": distill}, match=message)


def test_distill_section_requires_its_task_and_existing_prompt_file(tmp_path):
    refusal(RunConfig.read, {"model": "m", "data": "d.jsonl", "distill": {"prompt": "p"}}, match="section 'distill'")
    path = tmp_path / "prompts.txt"
    path.write_text("Be brief.\n")
    assert DistillSettings(prompt=str(path)).prompt_text == "Be brief."
    assert DistillSettings(prompt="Be brief.").prompt_text == "Be brief."
    with pytest.raises(UserError, match="cannot be read") as error:
        DistillSettings(prompt=str(tmp_path / "prompt.txt")).prompt_text  # noqa: B018
    assert "prompts.txt" in str(error.value.hint)
