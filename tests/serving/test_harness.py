"""Tasks of lm-evaluation-harness: deltaw's log-probabilities and texts are those of the harness's own backend."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import yaml

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'deltaw[evaluate]'")

import datasets
from lm_eval.api.instance import Instance
from lm_eval.models.api_models import JsonChatStr
from lm_eval.models.huggingface import HFLM

from deltaw.serving import harness
from deltaw.serving.harness import FILE, SessionLM, evaluate_tasks
from deltaw.training.origin import open_run
from deltaw.training.tasks.causal_objective import CausalObjective
from tests.cli.conftest import assert_refused, call, start  # noqa: F401
from tests.conftest import COLORS, write_rows

STOPS = {"until": ["\n", "e"], "max_gen_toks": 12, "do_sample": False}
PAIRS = [
    ("paint it ", "red"),
    ("paint it ", "blue"),
    ("paint it ", "b"),  # one token, whose context is another's beginning
    ("paint it", " b"),  # a space at the seam
    ("", "green"),
    ("a context of more tokens than the model has positions " * 4, "white"),
    ("paint it ", "red and then blue" * 3),
]


@pytest.fixture(autouse=True)
def _own_data_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, one, number, ("task", number, 1)) for number, one in enumerate(arguments)]


def sides(model: Path, adapter: Path | None = None) -> tuple[SessionLM, HFLM]:
    """deltaw's model class and the harness's backend, both in fp32."""
    opened = open_run(str(adapter or model), model=str(model) if adapter else None, precision="fp32", say=print)
    peft = None if adapter is None else str(adapter)
    return SessionLM(opened, print), HFLM(str(model), dtype="float32", batch_size=3, device="cpu", peft=peft)


@pytest.fixture(params=["model_folder", "gpt2_folder"])
def folder(request: pytest.FixtureRequest) -> Path:
    """A model with rotary, and one with learned positions."""
    return request.getfixturevalue(request.param)


def test_log_likelihoods_are_those_of_the_hf_backend(folder: Path) -> None:
    ours, theirs = sides(folder)
    found = ours.loglikelihood(requests("loglikelihood", PAIRS))
    expected = theirs.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    assert [one[0] for one in found] == pytest.approx([one[0] for one in expected], abs=1e-3)
    assert [one[1] for one in found] == [one[1] for one in expected]


def test_an_adapter_is_scored_as_peft_has_it(model_folder: Path, finished_run: Path) -> None:
    pytest.importorskip("peft")
    ours, theirs = sides(model_folder, finished_run)
    answers = [(f"paint it {color}", color[0]) for color in COLORS]
    found = ours.loglikelihood(requests("loglikelihood", answers))
    expected = theirs.loglikelihood(requests("loglikelihood", answers), disable_tqdm=True)
    assert [one[0] for one in found] == pytest.approx([one[0] for one in expected], abs=1e-3)
    with ours.session.base():
        base = SessionLM(ours.session, print).loglikelihood(requests("loglikelihood", answers))
    assert max(abs(one[0] - two[0]) for one, two in zip(found, base, strict=True)) > 0.05


def test_a_shared_context_is_computed_once(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    outputs = CausalObjective.label_outputs
    monkeypatch.setattr(CausalObjective, "label_outputs", lambda self, b: (seen.append(b), outputs(self, b))[1])
    ours, _ = sides(model_folder)
    ours.loglikelihood(requests("loglikelihood", [("a long question of many tokens: ", c) for c in COLORS]))
    assert sum(batch.row_tokens for batch in seen) > 300 > 80 > sum(batch.tokens for batch in seen)


def test_perplexities_of_texts_longer_than_the_model_are_those_of_the_hf_backend(folder: Path) -> None:
    texts = [("one text that is short",), ("a text of several windows " * 20,), ("x" * 127,), ("x" * 129,)]
    ours, theirs = sides(folder)
    found = ours.loglikelihood_rolling(requests("loglikelihood_rolling", texts))
    expected = theirs.loglikelihood_rolling(requests("loglikelihood_rolling", texts), disable_tqdm=True)
    assert found == pytest.approx(expected, rel=1e-5)


def test_texts_are_those_of_the_hf_backend(folder: Path) -> None:
    prefix = "several prompts begin with the very same words. "
    asked = [(prefix + f"paint it {color}: ", dict(STOPS)) for color in COLORS]
    asked += [("x" * 300, dict(STOPS)), ("no stop", {"max_gen_toks": 5})]
    ours, theirs = sides(folder)
    found = ours.generate_until(requests("generate_until", asked))
    assert found == theirs.generate_until(requests("generate_until", asked), disable_tqdm=True)
    assert len(set(found)) > 3
    ours.close()


def test_texts_are_drawn_where_a_task_samples(model_folder: Path) -> None:
    ours, _ = sides(model_folder)
    how = {"max_gen_toks": 20, "do_sample": True, "temperature": 5.0, "top_p": 0.9}
    drawn = ours.generate_until(requests("generate_until", [("paint it", how)] * 4))
    assert len(set(drawn)) == 4
    again = ours.generate_until(requests("generate_until", [("paint it", how)] * 4))
    assert drawn == again
    ours.close()


@pytest.mark.slow  # a server of its own process
def test_the_harness_scores_a_served_model_over_http(model_folder: Path) -> None:
    reason = "lm-eval's models over HTTP need tenacity: it is in the extra 'dev'"
    pytest.importorskip("tenacity", reason=reason)
    pytest.importorskip("fastapi", reason="the server needs FastAPI: it is in the extra 'dev'")
    from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

    ours, _ = sides(model_folder)
    pairs = [pair for pair in PAIRS if len(pair[0]) < 100]
    asked = [(f"paint it {color}: ", dict(STOPS)) for color in COLORS]
    with start("serve", model_folder, "--port", "0", "--name", "tiny", "--precision", "fp32") as server:
        url = server.until(lambda: re.match(r"serving tiny at (http://127\.0\.0\.1:\d+)\n", server.said()[0]), 120)[1]
        how = {"model": "tiny", "tokenizer": str(model_folder), "tokenizer_backend": "huggingface"}
        served = LocalCompletionsAPI(base_url=f"{url}/v1/completions", max_length=128, **how)
        found = served.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
        texts = served.generate_until(requests("generate_until", asked), disable_tqdm=True)
        chat = LocalChatCompletion(base_url=f"{url}/v1/chat/completions", model="tiny")
        turns = JsonChatStr(json.dumps([{"role": "user", "content": "paint it red"}]))
        answer = chat.generate_until(requests("generate_until", [(turns, {"max_gen_toks": 12})]), disable_tqdm=True)
    expected = ours.loglikelihood(requests("loglikelihood", pairs))
    assert [one[0] for one in found] == pytest.approx([one[0] for one in expected], abs=1e-3)
    assert [one[1] for one in found] == [one[1] for one in expected]
    assert texts == ours.generate_until(requests("generate_until", asked))
    prompt = ours.apply_chat_template([{"role": "user", "content": "paint it red"}])
    assert answer == ours.generate_until(requests("generate_until", [(prompt, {"max_gen_toks": 12})]))
    ours.close()


def write_task(folder: Path, name: str, **changes: object) -> None:
    """A task file: is it painted in the right color?"""
    rows = write_rows(folder / "colors.jsonl", ({"color": c, "right": c[0]} for c in COLORS))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "paint it {{color}}\n",
        "doc_to_choice": ["r", "b", "g", "w", "p", "t", "c"],
        "doc_to_target": "{{['r', 'b', 'g', 'w', 'p', 't', 'c'].index(right)}}",
        "metric_list": [{"metric": "acc"}],
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({**task, **changes}), encoding="utf-8")


def test_eval_prints_and_keeps_the_scores_of_base_and_adapter(call, finished_run, tmp_path) -> None:  # noqa: F811
    write_task(tmp_path, "colors")
    written = {"output_type": "generate_until", "doc_to_choice": None, "generation_kwargs": STOPS}
    written |= {"doc_to_target": "{{right}}", "metric_list": [{"metric": "exact_match"}]}
    write_task(tmp_path, "written", **written, num_fewshot=0)
    arguments = ["eval", finished_run, "--tasks", "colors,written", "--include-path", tmp_path, "--precision", "fp32"]
    ended = call(*arguments, "--base", "--limit", 8, "--fewshot", 1, status=0)
    assert max(map(len, ended.out.splitlines())) <= 80
    assert "colors" in ended.out and "±" in ended.out and "exact_match" in ended.out
    kept = json.loads((finished_run / FILE).read_text())
    (finished_run / FILE).unlink()
    told = json.loads(call(*arguments, "--base", "--limit", 8, "--fewshot", 1, "--json", status=0).out)
    (finished_run / FILE).unlink()
    assert kept["tasks"] == told["tasks"] and told["tasks"].keys() == {"base", "adapter"}
    base, adapter = (told["tasks"][model][0] for model in ("base", "adapter"))
    assert base["task"] == adapter["task"] == "colors" and adapter["rows"] == 8
    assert (adapter["fewshot"], told["tasks"]["adapter"][1]["fewshot"]) == (1, 0)  # a task that says none gets none
    assert 0 <= adapter["value"] <= 1 and base["stderr"] > 0


def test_prompts_are_rendered_by_the_chat_template_if_asked(model_folder, tmp_path, monkeypatch) -> None:
    write_task(tmp_path, "colors", num_fewshot=1)
    seen = []
    scored = SessionLM._loglikelihood_tokens
    spy = lambda self, rows, **how: (seen.extend(rows), scored(self, rows, **how))[1]  # noqa: E731
    monkeypatch.setattr(SessionLM, "_loglikelihood_tokens", spy)
    opened = open_run(str(model_folder), precision="fp32", say=print)
    evaluate_tasks(opened, ["colors"], folder=tmp_path, chat=True, limit=2, say=print)
    context = seen[0][0][0]
    assert context.count("<|im_start|>user") == 2 and context.endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"doc_to_text": "{{''.__class__.__mro__[1].__subclasses__()}}"}, ["harness fails", "SecurityError"]),
        ({"dataset_kwargs": {"data_files": {"test": "missing.jsonl"}}}, ["harness fails", "missing.jsonl"]),
        ({"include": "../other.yaml"}, ["outside of the folder", "--trust-remote-code"]),
    ],
)
def test_a_task_file_that_reaches_out_is_refused(call, model_folder, tmp_path, changes, words) -> None:  # noqa: F811
    folder = tmp_path / "tasks"
    folder.mkdir()
    write_task(folder, "colors", **changes)
    ended = call("eval", model_folder, "--tasks", "colors", "--include-path", folder)
    assert_refused(ended, *words)


def test_a_task_file_that_names_code_needs_a_word(call, model_folder, tmp_path) -> None:  # noqa: F811
    write_task(tmp_path, "colors")
    with (tmp_path / "colors.yaml").open("a") as file:
        file.write("process_docs: !function own.docs\n")
    (tmp_path / "own.py").write_text("def docs(rows):\n    return rows.select(range(3))\n")
    arguments = ["eval", model_folder, "--tasks", "colors", "--include-path", tmp_path]
    assert_refused(call(*arguments), "the task runs code", "--trust-remote-code")
    told = json.loads(call(*arguments, "--trust-remote-code", "--json", status=0).out)
    assert told["tasks"]["model"][0]["rows"] == 3


def test_what_does_not_go_together_is_refused(call, model_folder, rows_file, tmp_path, monkeypatch) -> None:  # noqa: F811
    write_task(tmp_path, "colors")
    arguments = ["eval", model_folder, "--tasks", "colours", "--include-path", tmp_path]
    monkeypatch.setattr(harness, "TaskManager", _without_defaults(harness.TaskManager))
    assert_refused(call(*arguments), "no task 'colours'", "did you mean colors?")
    assert_refused(call(*arguments, "--data", rows_file), "tasks have their own rows", "leave out --data")
    assert_refused(call("eval", model_folder, "--tasks", ","), "there is no task")
    assert_refused(call("eval", model_folder, "--limit", 3), "--limit", "give --tasks too")
    assert_refused(call("eval", model_folder, "--tasks", "a", "--include-path", tmp_path / "none"), "no such folder")
    (tmp_path / "broken.yaml").write_text("a: [")
    assert_refused(call(*arguments), "not YAML", "broken.yaml")


def _without_defaults(manager):
    """The harness's own thousands of task files take seconds to list."""
    return lambda include_path, include_defaults: manager(include_path=include_path, include_defaults=False)


@pytest.mark.slow
@pytest.mark.network
def test_scores_of_a_real_model_are_those_of_the_hf_backend(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("DELTAW_CACHE", str(Path.home() / ".cache" / "deltaw"))
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import harness as benchmark

    benchmark.write_tasks(tmp_path, 200)
    benchmark.write_model(tmp_path)
    ours, theirs = benchmark.ours(tmp_path, "fp32"), benchmark.theirs(tmp_path, "float32", 8)
    for task in benchmark.TASKS:
        found, expected = ours(task), theirs(task)
        assert found == pytest.approx({name: expected[name] for name in found}, rel=2e-4), task
        if task != "plots":  # shares of rows
            assert found == {name: expected[name] for name in found}
    for name in ("harness", "machine"):
        sys.modules.pop(name, None)
