"""Tests of lm-evaluation-harness tasks: log-probabilities and completions match the harness's own backend."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'deltaw[evaluate]'")

import datasets
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from deltaw.evaluation import harness
from deltaw.evaluation.harness import FILE, SessionLM, evaluate_tasks
from deltaw.inference.open_run import open_run
from deltaw.training.causal_objective import CausalObjective
from tests.cli.conftest import assert_refused, call, start  # noqa: F401
from tests.conftest import COLORS, write_rows

STOPS = {"until": ["\n", "e"], "max_gen_toks": 12, "do_sample": False}
PAIRS = [
    ("paint it ", "red"),
    ("paint it ", "blue"),
    ("paint it ", "b"),  # one token that starts another answer
    ("paint it", " b"),  # a space at the boundary
    ("", "green"),
    ("a context of more tokens than the model has positions " * 4, "white"),
    ("paint it ", "red and then blue" * 3),
]


@pytest.fixture(autouse=True)
def _temporary_dataset_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, entry, number, ("task", number, 1)) for number, entry in enumerate(arguments)]


def load_both_backends(model: Path, adapter: Path | None = None) -> tuple[SessionLM, HFLM]:
    """Return deltaw's model class and the harness's backend, both in fp32."""
    opened = open_run(str(adapter or model), model=str(model) if adapter else None, precision="fp32", log=print)
    peft = None if adapter is None else str(adapter)
    return SessionLM(opened, print), HFLM(str(model), dtype="float32", batch_size=3, device="cpu", peft=peft)


@pytest.fixture(params=["model_folder", "gpt2_folder"])
def folder(request: pytest.FixtureRequest) -> Path:
    """Models with rotary and with learned positions."""
    return request.getfixturevalue(request.param)


def test_log_likelihoods_match_hf_backend(folder: Path) -> None:
    ours, theirs = load_both_backends(folder)
    actual = ours.loglikelihood(requests("loglikelihood", PAIRS))
    expected = theirs.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    assert [result[0] for result in actual] == pytest.approx([result[0] for result in expected], abs=1e-3)
    assert [result[1] for result in actual] == [result[1] for result in expected]


def test_adapter_scores_match_peft(model_folder: Path, finished_run: Path) -> None:
    pytest.importorskip("peft")
    ours, theirs = load_both_backends(model_folder, finished_run)
    answers = [(f"paint it {color}", color[0]) for color in COLORS]
    actual = ours.loglikelihood(requests("loglikelihood", answers))
    expected = theirs.loglikelihood(requests("loglikelihood", answers), disable_tqdm=True)
    assert [result[0] for result in actual] == pytest.approx([result[0] for result in expected], abs=1e-3)
    with ours.session.base():
        base = SessionLM(ours.session, print).loglikelihood(requests("loglikelihood", answers))
    assert max(abs(result[0] - base_result[0]) for result, base_result in zip(actual, base, strict=True)) > 0.05


def test_shared_context_is_computed_once(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = []
    outputs = CausalObjective.label_outputs
    monkeypatch.setattr(CausalObjective, "label_outputs", lambda self, b: (batches.append(b), outputs(self, b))[1])
    ours, _ = load_both_backends(model_folder)
    ours.loglikelihood(requests("loglikelihood", [("a long question of many tokens: ", c) for c in COLORS]))
    assert sum(batch.row_tokens for batch in batches) > 300 > 80 > sum(batch.tokens for batch in batches)


def test_rolling_log_likelihoods_match_hf_backend(folder: Path) -> None:
    texts = [("one text that is short",), ("a text of several windows " * 20,), ("x" * 127,), ("x" * 129,)]
    ours, theirs = load_both_backends(folder)
    actual = ours.loglikelihood_rolling(requests("loglikelihood_rolling", texts))
    expected = theirs.loglikelihood_rolling(requests("loglikelihood_rolling", texts), disable_tqdm=True)
    assert actual == pytest.approx(expected, rel=1e-5)


def test_completions_match_hf_backend(folder: Path) -> None:
    prefix = "several prompts begin with the very same words. "
    cases = [(prefix + f"paint it {color}: ", dict(STOPS)) for color in COLORS]
    cases += [("x" * 300, dict(STOPS)), ("no stop", {"max_gen_toks": 5})]
    ours, theirs = load_both_backends(folder)
    completions = ours.generate_until(requests("generate_until", cases))
    assert completions == theirs.generate_until(requests("generate_until", cases), disable_tqdm=True)
    assert len(set(completions)) > 3
    ours.close()


def test_sampling_tasks_are_sampled_deterministically(model_folder: Path) -> None:
    ours, _ = load_both_backends(model_folder)
    sampling = {"max_gen_toks": 20, "do_sample": True, "temperature": 5.0, "top_p": 0.9}
    completions = ours.generate_until(requests("generate_until", [("paint it", sampling)] * 4))
    assert len(set(completions)) == 4
    repeated = ours.generate_until(requests("generate_until", [("paint it", sampling)] * 4))
    assert completions == repeated
    ours.close()


def write_task(folder: Path, name: str, **changes: object) -> None:
    """Write a task file that checks the color of an answer."""
    rows = write_rows(folder / "colors.jsonl", ({"color": c, "right": c[0]} for c in COLORS))
    task = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(rows)}}}
    task |= {"test_split": "test", "output_type": "multiple_choice", "doc_to_text": "paint it {{color}}\n"}
    task |= {"doc_to_choice": ["r", "b", "g", "w", "p", "t", "c"]}
    task |= {"doc_to_target": "{{['r', 'b', 'g', 'w', 'p', 't', 'c'].index(right)}}"}
    task |= {"metric_list": [{"metric": "acc"}]}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({**task, **changes}), encoding="utf-8")


def test_eval_prints_and_stores_scores_of_base_and_adapter(call, finished_run, tmp_path) -> None:  # noqa: F811
    write_task(tmp_path, "colors")
    changes = {"output_type": "generate_until", "doc_to_choice": None, "generation_kwargs": STOPS}
    changes |= {"doc_to_target": "{{right}}", "metric_list": [{"metric": "exact_match"}]}
    write_task(tmp_path, "written", **changes, num_fewshot=0)
    arguments = ["eval", finished_run, "--benchmarks", "colors,written", "--include-path", tmp_path, "--precision"]
    arguments += ["fp32"]
    result = call(*arguments, "--with-base", "--limit", 8, "--fewshot", 1, status=0)
    assert max(map(len, result.out.splitlines())) <= 80
    assert "colors" in result.out and "±" in result.out and "exact_match" in result.out
    stored = json.loads((finished_run / FILE).read_text())
    (finished_run / FILE).unlink()
    output = json.loads(call(*arguments, "--with-base", "--limit", 8, "--fewshot", 1, "--json", status=0).out)
    (finished_run / FILE).unlink()
    assert stored["tasks"] == output["tasks"] and output["tasks"].keys() == {"base", "adapter"}
    base, adapter = (output["tasks"][model][0] for model in ("base", "adapter"))
    assert base["task"] == adapter["task"] == "colors" and adapter["rows"] == 8
    assert (adapter["fewshot"], output["tasks"]["adapter"][1]["fewshot"]) == (
        1,
        0,
    )  # --fewshot does not override a task's num_fewshot of 0
    assert 0 <= adapter["value"] <= 1 and base["stderr"] > 0


def test_chat_option_renders_prompts_with_template(model_folder, tmp_path, monkeypatch) -> None:
    write_task(tmp_path, "colors", num_fewshot=1)
    scored_rows = []
    scored = SessionLM._loglikelihood_tokens
    spy = lambda self, rows, **options: (scored_rows.extend(rows), scored(self, rows, **options))[1]  # noqa: E731
    monkeypatch.setattr(SessionLM, "_loglikelihood_tokens", spy)
    opened = open_run(str(model_folder), precision="fp32", log=print)
    evaluate_tasks(opened, ["colors"], folder=tmp_path, chat=True, limit=2, log=print)
    context = scored_rows[0][0][0]
    assert context.count("<|im_start|>user") == 2 and context.endswith("<|im_start|>assistant\n")


TASK_FILES = [
    ({"doc_to_text": "{{''.__class__.__mro__[1].__subclasses__()}}"}, ["harness fails", "SecurityError"]),
    ({"dataset_kwargs": {"data_files": {"test": "missing.jsonl"}}}, ["harness fails", "missing.jsonl"]),
    ({"include": "../other.yaml"}, ["outside the folder", "--trust-remote-code"]),
]


@pytest.mark.parametrize(("changes", "words"), TASK_FILES)
def test_task_file_with_external_access_is_rejected(call, model_folder, tmp_path, changes, words) -> None:  # noqa: F811
    folder = tmp_path / "tasks"
    folder.mkdir()
    write_task(folder, "colors", **changes)
    result = call("eval", model_folder, "--benchmarks", "colors", "--include-path", folder)
    assert_refused(result, *words)


def test_task_file_with_code_requires_trust_option(call, model_folder, tmp_path) -> None:  # noqa: F811
    write_task(tmp_path, "colors")
    with (tmp_path / "colors.yaml").open("a") as file:
        file.write("process_docs: !function own.docs\n")
    (tmp_path / "own.py").write_text("def docs(rows):\n    return rows.select(range(3))\n")
    arguments = ["eval", model_folder, "--benchmarks", "colors", "--include-path", tmp_path]
    assert_refused(call(*arguments), "the task runs code", "--trust-remote-code")
    output = json.loads(call(*arguments, "--trust-remote-code", "--json", status=0).out)
    assert output["tasks"]["model"][0]["rows"] == 3


def test_invalid_option_combinations_are_rejected(call, model_folder, rows_file, tmp_path, monkeypatch) -> None:  # noqa: F811
    write_task(tmp_path, "colors")
    arguments = ["eval", model_folder, "--benchmarks", "colours", "--include-path", tmp_path]
    monkeypatch.setattr(harness, "TaskManager", _without_defaults(harness.TaskManager))
    assert_refused(call(*arguments), "no task 'colours'", "did you mean colors?")
    result = call(*arguments, "--data", rows_file)
    assert_refused(result, "benchmarks have their own rows", "--data", "remove it or --benchmarks")
    assert_refused(call("eval", model_folder, "--benchmarks", ","), "no task is given")
    assert_refused(call("eval", model_folder, "--fewshot", 3), "--fewshot", "add --benchmarks")
    result = call("eval", model_folder, "--benchmarks", "a", "--include-path", tmp_path / "none")
    assert_refused(result, "no such folder")
    (tmp_path / "broken.yaml").write_text("a: [")
    assert_refused(call(*arguments), "not YAML", "broken.yaml")


def _without_defaults(manager):
    """Skip the harness's own task files, which take seconds to list."""
    return lambda include_path, include_defaults: manager(include_path=include_path, include_defaults=False)
