"""Whole runs of the task distill: what they learn, keep on disk, and repeat to the bit when they are stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

import deltaw
from deltaw.errors import UserError
from deltaw.memory.plan import Plan
from deltaw.settings import RunConfig
from deltaw.task_settings import DistillSettings
from deltaw.training.distillation.feed import ANSWERS, FOLDER, LIKELIEST
from deltaw.training.distillation.loss import DistillObjective
from deltaw.training.distillation.teachers import first_difference
from deltaw.training.origin import score_run
from deltaw.training.planning.plan_run import plan
from tests.conftest import laid_over, write_rows
from tests.training.parallel_runs import distance, needs_gloo, train_all
from tests.training.runs import ADAPTER, Told, held_out_rows, metrics, opened

PROMPT = "Answer as a poet would, in rhymes"


@pytest.fixture
def distill_run(tmp_path, roomy_folder):
    """Settings of a run that trains a prompt into the adapter."""
    rows = write_rows(
        tmp_path / "rows.jsonl", [{"prompt": f"say {n}", "completion": f"it is {n * n}"} for n in range(12)]
    )

    def make(output: str, **changes: object) -> dict:
        plain = {
            "model": str(roomy_folder),
            "task": "distill",
            "data": {"train": str(rows), "eval": 3},
            "distill": {"prompt": PROMPT, "max_new_tokens": 6},
            "train": {"max_steps": 4, "batch_size": 3, "learning_rate": 0.01, "checkpoint_every": 1, "drift": False},
            "precision": "fp32",
            "output": str(tmp_path / output),
        }
        return laid_over(plain, changes)

    return make


def equal_adapters(one, other) -> bool:
    ours, theirs = (load_file(folder / ADAPTER) for folder in (one, other))
    return ours.keys() == theirs.keys() and all((ours[name] == theirs[name]).all() for name in ours)


def test_a_prompt_is_trained_into_the_adapter_and_the_run_says_what_it_saves(distill_run):
    told = Told()
    result = deltaw.fit(distill_run("run", train={"max_steps": 40}), callback=told)
    steps = [line["loss"] for line in metrics(result.output, "learning_rate")]
    assert np.mean(steps[-3:]) < 0.6 * steps[0]
    assert result.evaluation.main == "exact_match" and result.evaluation.metrics["loss"] < 0.8 * steps[0]
    (line,) = metrics(result.output, "distilled")
    found = line["distilled"]
    assert found["prompt_tokens_saved"] == 1 + len("system\n") + len(PROMPT) + 1 + len("\n")
    assert found["rows"] == 3 and found["student"]["value"] == result.evaluation.metrics["exact_match"]
    assert {*found} >= {"base_with_prompt", "base"}
    assert "a request saves 43 prompt tokens; exact_match on 3 held-out rows: base with prompt" in told


def test_the_divergence_is_zero_where_student_and_teacher_are_given_the_same(distill_run, tmp_path, roomy_folder):
    """The base as another teacher, without a prompt: nothing to learn, before the adapter has moved."""
    base = {"prompt": None, "teachers": [{"model": str(roomy_folder)}]}
    result = deltaw.fit(distill_run("run", distill=base, train={"max_steps": 1, "learning_rate": 1e-9}))
    (first,) = metrics(result.output, "learning_rate")
    assert abs(first["loss"]) < 1e-6 and first["gradient_norm"] < 1e-4


@pytest.mark.slow
def test_another_teacher_with_an_adapter_is_learned_from(distill_run, tmp_path, roomy_folder):
    taught = {"task": "causal-lm", "distill": {"prompt": None, "max_new_tokens": 128}, "train": {"max_steps": 30}}
    teacher = deltaw.fit(distill_run("teacher", **taught)).output
    named = {"prompt": None, "teachers": [{"adapter": str(teacher)}], "divergence": "jsd"}
    result = deltaw.fit(distill_run("run", distill=named, train={"max_steps": 40}))
    steps = [line["loss"] for line in metrics(result.output, "learning_rate")]
    assert np.mean(steps[-3:]) < 0.5 * steps[0]


WAYS = {
    "own": {"on_policy": 0.5},
    "teacher's": {"answers": "teacher"},
    "likeliest": {"answers": "teacher", "top_k": 5, "on_policy": 0.3},
}


@pytest.mark.parametrize(
    "way", ["likeliest", *(pytest.param(way, marks=pytest.mark.slow) for way in ("own", "teacher's"))]
)
def test_a_stopped_run_goes_on_to_the_bit(distill_run, way):
    whole = deltaw.fit(distill_run("whole", distill=WAYS[way]))
    part = distill_run("part", distill=WAYS[way])
    deltaw.fit(part, callback=Told(stop_after=2))
    again = deltaw.fit(resume=part["output"])
    assert equal_adapters(whole.output, again.output)
    losses = [[line["loss"] for line in metrics(run, "learning_rate")] for run in (whole.output, again.output)]
    assert losses[0] == losses[1] and len(losses[0]) == 4


@needs_gloo
@pytest.mark.slow
@pytest.mark.parametrize("way", ["own", "likeliest"])
def test_two_processes_learn_as_one(distill_run, way):
    # Adam turns a gradient that is nothing but rounding into a whole step, so steps are short.
    one, two = (distill_run(name, distill=WAYS[way], train={"learning_rate": 1e-3}) for name in ("one", "two"))
    deltaw.fit(one)
    train_all(two)
    losses = [[line["loss"] for line in metrics(Path(of["output"]), "learning_rate")] for of in (two, one)]
    assert len(losses[1]) == 4 and losses[0] == pytest.approx(losses[1], rel=1e-5)
    off, norm = distance(Path(two["output"]), Path(one["output"]))
    assert norm > 0 and off <= 1e-5 * norm


@pytest.mark.slow
def test_what_the_teacher_gave_is_written_once_and_found_again(distill_run, monkeypatch):
    settings = distill_run("run", distill=WAYS["likeliest"])
    stopped = deltaw.fit(settings, callback=Told(stop_after=1)).output / FOLDER
    answers = json.loads((stopped / ANSWERS).read_text())["answers"]
    kept = np.load(stopped / LIKELIEST, allow_pickle=False)
    assert len(answers) == 12 and kept.shape[1] == 5  # of all rows; of those to train on, its likeliest tokens
    assert kept.shape[0] == sum(len(tokens) for _, tokens, _ in answers[:9])
    assert (np.diff(kept["logprob"], axis=1) <= 0).all() and (kept["logprob"] < 0).all()
    monkeypatch.setattr(
        "deltaw.training.distillation.teachers.Teacher.write", lambda *given: pytest.fail("written again")
    )
    monkeypatch.setattr(DistillObjective, "likeliest", _only_few(DistillObjective.likeliest, 3))
    assert not deltaw.fit(resume=settings["output"]).interrupted


def _only_few(asked, most):
    """Fails where more rows are asked for than one step has."""

    def likeliest(self, rows):
        assert len(rows) <= most
        return asked(self, rows)

    return likeliest


@pytest.mark.slow
def test_the_student_writes_the_share_of_rows_that_is_asked_for(distill_run):
    result = deltaw.fit(distill_run("half", distill={"on_policy": 0.5}, train={"max_steps": 12}))
    shares = [line["own_tokens"] for line in metrics(result.output, "learning_rate")]
    assert 0.2 < np.mean(shares) < 0.8 and len(set(shares)) > 2
    result = deltaw.fit(distill_run("all", distill={"on_policy": 1.0}))
    lines = metrics(result.output, "learning_rate")
    assert all(line["own_tokens"] == 1 and line["label_tokens"] <= 3 * 6 for line in lines)


def test_rows_without_answers_are_answered_by_the_teacher(distill_run, tmp_path):
    rows = write_rows(tmp_path / "asked.jsonl", [{"prompt": f"say {n}"} for n in range(8)])
    result = deltaw.fit(distill_run("run", data={"train": str(rows), "eval": 2}))
    assert result.evaluation.metrics["loss"] > 0 and len(result.evaluation.per_row) == 2
    assert len(json.loads((result.output / FOLDER / ANSWERS).read_text())["answers"]) == 8
    (line,) = metrics(result.output, "distilled")
    assert line["distilled"]["base_with_prompt"]["value"] == 1  # they are its own answers


def test_virtual_tokens_are_the_students_alone_and_count_as_tokens_of_a_request(distill_run):
    short = {"max_steps": 2}
    result = deltaw.fit(distill_run("run", method="prompt", prompt={"length": 3}, distill=WAYS["own"], train=short))
    (line,) = metrics(result.output, "distilled")
    assert line["distilled"]["prompt_tokens_saved"] == 43 - 3
    plain = deltaw.fit(distill_run("plain", train=short))
    (other,) = metrics(plain.output, "distilled")
    for who in ("base", "base_with_prompt"):
        assert line["distilled"][who] == other["distilled"][who]


def test_a_method_that_keeps_no_base_model_has_no_base_as_teacher(distill_run, roomy_folder):
    with pytest.raises(UserError, match="changes the base model"):
        deltaw.fit(distill_run("run", method="full"))
    other = {"teachers": [{"model": str(roomy_folder)}]}
    result = deltaw.fit(distill_run("other", method="full", distill=other, train={"max_steps": 15}))
    steps = [line["loss"] for line in metrics(result.output, "learning_rate")]
    assert np.mean(steps[-3:]) < 0.9 * steps[0]


def test_a_finished_run_is_evaluated_without_its_teachers(distill_run, tmp_path):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(PROMPT)
    result = deltaw.fit(distill_run("run", distill={"prompt": str(prompt)}))
    prompt.unlink()
    run = opened(result.output)
    score = score_run(run, held_out_rows(run)).metrics
    assert score["exact_match"] == result.evaluation.metrics["exact_match"]
    assert score["cross_entropy"] == pytest.approx(result.evaluation.metrics["cross_entropy"], rel=1e-5)


@pytest.mark.planned
def test_the_plan_counts_the_teacher_and_its_longer_rows(distill_run, roomy_folder):
    def planned(**distill: object) -> Plan:
        return plan(distill_run("run", distill=distill, train={"batch_size": 1}))

    weights = sum(file.stat().st_size for file in roomy_folder.glob("*.safetensors"))
    short, long = planned(prompt="brief"), planned(prompt="at length " * 20)
    assert long.operations > 2 * short.operations and long.peak_bytes > short.peak_bytes
    other = planned(prompt="brief", teachers=[{"model": str(roomy_folder)}])
    assert other.peak_bytes > short.peak_bytes + 0.9 * weights


def test_a_teacher_with_another_tokenizer_is_refused_by_its_first_token(distill_run, tmp_path, roomy_folder):
    other = shutil.copytree(roomy_folder, tmp_path / "other")
    file = other / "tokenizer.json"
    told = json.loads(file.read_text())
    vocabulary = told["model"]["vocab"]
    one, another = (next(token for token, number in vocabulary.items() if number == n) for n in (40, 41))
    vocabulary[one], vocabulary[another] = 41, 40
    file.write_text(json.dumps(told))
    with pytest.raises(UserError, match=f"token 40 is '{another}', and the student's is '{one}'"):
        deltaw.fit(distill_run("run", distill={"teachers": [{"model": str(other)}]}))
    assert first_difference({"a": 0, "b": 1}, {"a": 0}) == (1, "b", None)
    assert first_difference({"a": 0}, {"a": 0}) is None


@pytest.mark.parametrize(
    ("distill", "what"),
    [
        ({}, "the teacher would be the base model"),
        ({"teachers": [{"weight": 2}]}, "the teacher would be the base model"),
        ({"prompt": "p", "beta": 0.2}, "has no beta"),
        ({"prompt": "p", "divergence": "jsd", "beta": 1.0}, "less than 1"),
        ({"prompt": "p", "on_policy": 1.5}, "less than or equal to 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(distill, what):
    with pytest.raises(UserError, match=what):
        RunConfig.read({"model": "m", "data": "d.jsonl", "task": "distill", "distill": distill})


def test_the_section_is_for_its_task_and_a_missing_file_is_no_text(tmp_path):
    with pytest.raises(UserError, match="section 'distill'"):
        RunConfig.read({"model": "m", "data": "d.jsonl", "distill": {"prompt": "p"}})
    near = tmp_path / "prompts.txt"
    near.write_text("Be brief.\n")
    assert DistillSettings(prompt=str(near)).prompt_text == "Be brief."
    assert DistillSettings(prompt="Be brief.").prompt_text == "Be brief."
    with pytest.raises(UserError, match="cannot be read") as refused:
        DistillSettings(prompt=str(tmp_path / "prompt.txt")).prompt_text  # noqa: B018
    assert "prompts.txt" in str(refused.value.hint)
