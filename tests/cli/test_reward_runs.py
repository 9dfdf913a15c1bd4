"""What is seen of a reward run: deltaw eval, steps, progress, plan."""

from __future__ import annotations

import itertools
import json
import re
import time
from contextlib import closing
from types import SimpleNamespace

import numpy as np
import pytest

import deltaw
from deltaw.data.prompts import Prompt
from deltaw.errors import UserError
from deltaw.hub.tokenizers import load_tokenizer
from deltaw.reports.page.write import comparison_page, run_page
from deltaw.reports.progress import LiveLine, closing_rows
from deltaw.reports.runs import as_values, result_rows
from deltaw.reports.watching import values_of
from deltaw.reports.wording import short
from deltaw.runs.folder import Run
from deltaw.runtime.generation import Drawing, Drawn
from deltaw.serving.rollouts import SessionSampler
from deltaw.settings import RunConfig
from deltaw.task_settings import RewardSettings
from deltaw.training.evaluation.base import mean_interval
from deltaw.training.monitoring.best import FORWARD, WRITTEN, Costs, Ending
from deltaw.training.planning.plan_run import plan
from deltaw.training.rollouts.scoring import Scorer, interval_of, pass_at
from deltaw.training.rollouts.turns import OneTurn
from deltaw.training.state import Step
from deltaw.training.tasks.reward import Asked, RewardTask
from tests.cli.conftest import assert_refused
from tests.conftest import write_rows

FUNCTIONS = """
def vowels(completions, **columns):
    return [sum(c in "aeiou" for c in text) / max(1, len(text)) for text in completions]
def short(prompt, completion):
    return float(len(completion) < 4) + int(prompt.split()[-1]) / 10
"""


def prompt(row: int, text: str = "say", answer: str | None = None) -> Prompt:
    tokens = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
    return Prompt(row, tokens, np.zeros(len(tokens), bool), len(tokens), answer, columns={"prompt": text})


def drawn(text: str, ended: bool = True) -> Drawn:
    return Drawn(np.frombuffer(text.encode(), np.uint8).astype(np.int64), text, 0 if ended else None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model_folder):
    """A finished run with two reward functions, each weighted, and its settings."""
    folder = tmp_path_factory.mktemp("rewarded")
    (folder / "own.py").write_text(FUNCTIONS)
    rows = write_rows(folder / "prompts.jsonl", [{"prompt": f"say {n}"} for n in range(10)])
    functions = [f"{folder / 'own.py'}:vowels", {"name": f"{folder / 'own.py'}:short", "weight": 0.5}]
    config = {
        "model": str(model_folder),
        "task": "reward",
        "data": {"train": str(rows), "eval": 4},
        "reward": {"functions": functions, "group": 4, "max_new_tokens": 8, "loss": "grpo", "beta": 0.01},
        "train": {"max_steps": 3, "batch_size": 3, "learning_rate": 0.02, "samples": 2, "drift": False},
        "precision": "fp32",
        "output": str(folder / "run"),
    }
    return deltaw.fit(config), config


@pytest.fixture
def evaluated(finished, call):
    """Evaluate the finished run with further flags; what ``--json`` prints."""

    def run(*flags: object) -> dict:
        return json.loads(call("eval", finished[0].output, "--no-drift", "--json", *flags, status=0).out)

    return run


# Scoring


def test_pass_at_k_is_the_share_of_all_choices_of_k_completions_with_one_that_passes():
    passed = np.random.default_rng(5).random((6, 5)) < 0.4
    for k in (1, 2, 5):
        chances = [np.mean([any(row[list(few)]) for few in itertools.combinations(range(5), k)]) for row in passed]
        assert pass_at(passed, k) == pytest.approx(chances)


def test_functions_of_one_name_are_told_apart_and_weights_apply(model_folder):
    pattern = {"name": "regex", "pattern": "a+"}
    functions = [pattern, {**pattern, "pattern": "a", "weight": -2.0}, {"name": "lower-case", "weight": 3.0}]
    settings = RewardSettings.model_validate({"functions": functions})
    with closing(Scorer(settings)) as scorer:
        prompts = [prompt(n) for n in range(3)]
        texts = [drawn("aa"), drawn("a"), drawn("B")]
        rewards = scorer(prompts, texts)
        named = scorer.named(rewards)
        assert scorer.highest == 4.0
        assert list(named) == ["reward", "reward regex 1", "reward regex 2", "reward lower-case"]
        assert named["reward"].tolist() == [4.0, 2.0, 0.0]
        best, *_, worst = scorer.extremes(prompts, texts, rewards)
    assert (best.text, best.reward, worst.text) == ("aa", 4.0, "B")
    assert best.parts == {"reward regex 1": 1.0, "reward regex 2": 0.0, "reward lower-case": 1.0}


@pytest.mark.parametrize(("weight", "pattern", "row"), [(1e308, "aa", 2), (-1e13, "aa", 2), (2e12, "a+", 1)])
def test_rewards_too_large_to_compute_with_are_named_with_function_and_row(weight, pattern, row):
    functions = ["lower-case", {"name": "regex", "pattern": pattern, "weight": weight}]
    scorer = Scorer(RewardSettings.model_validate({"functions": functions}))
    with closing(scorer), pytest.raises(UserError, match="weight × reward, is beyond") as refused:
        scorer([prompt(1), prompt(2)], [drawn("a"), drawn("aa")])
    assert refused.value.where == f"reward function regex, row {row}"


def test_a_mean_of_zeros_and_ones_has_the_interval_of_a_share():
    ones = np.ones(8)
    assert interval_of(ones) == mean_interval(ones, share=True) != mean_interval(ones)
    others = np.array([0.5, 1.0, 0.2])
    assert interval_of(others) == mean_interval(others)


def test_completions_are_scored_greedily_and_as_drawn(model_folder):
    settings = RewardSettings.model_validate({"functions": ["exact"], "max_new_tokens": 4, "top_k": 7})
    task = RewardTask(load_tokenizer(model_folder), print, settings)
    rows = [prompt(0, answer="yes"), prompt(1, answer="no")]
    asked: list[Drawing] = []

    def sampler(prompts, drawing):
        asked.append(drawing)
        if not drawing.seeds:
            return [drawn("yes"), drawn("maybe", ended=False)]
        return [drawn(text) for text in ("yes", "x", "x", "yes", "no", "x", "x", "x")]

    with closing(Scorer(settings)) as scorer:
        score = task.scored(rows, OneTurn(sampler), scorer, Asked(samples=4, temperature=0.7))
        lenient = task.scored(rows, OneTurn(sampler), scorer, Asked(threshold=0.0)).metrics
    greedy, several = asked[0], asked[1]
    assert greedy == Drawing(4) and (several.temperature, several.top_k) == (0.7, 7) and len(set(several.seeds)) == 8
    metrics = score.metrics
    assert metrics["reward"] == metrics["passed"] == 0.5
    assert (metrics["length"], metrics["cut_share"]) == (4.5, 0.5)  # with the end mark of "yes"
    assert metrics["sampled reward"] == metrics["pass@1"] == pytest.approx(3 / 8)
    assert metrics["pass@2"] == pytest.approx((1 - 1 / 6 + 1 - 3 / 6) / 2) and metrics["pass@4"] == 1.0
    low, high = score.evaluation.intervals["pass@4"]
    assert low < 0.5 and high == 1.0
    assert lenient["passed"] == 1.0 and "pass@1" not in lenient
    assert [(a.written, a.reward, a.exact) for a in score.answers] == [("yes", 1.0, True), ("maybe", 0.0, False)]


# deltaw eval


def test_eval_scores_a_run_as_the_run_did(finished, evaluated):
    result, _ = finished
    found = evaluated()
    assert found["eval"] == pytest.approx(result.evaluation.metrics)
    assert found["score"]["metric"] == "reward" and found["rows"] == 4
    assert {"reward vowels", "reward short", "passed", "length", "cut_share"} < set(found["eval"])
    assert found["eval"]["reward"] == pytest.approx(
        found["eval"]["reward vowels"] + 0.5 * found["eval"]["reward short"]
    )
    low, high = found["intervals"]["reward vowels"]
    assert low <= found["eval"]["reward vowels"] <= high


def test_eval_draws_for_pass_at_k_and_scores_the_base_beside(finished, evaluated):
    result, _ = finished
    found = evaluated("--samples", "3", "--temperature", "0.8", "--threshold", "0.2", "--base")
    again = evaluated("--samples", "3", "--temperature", "0.8", "--threshold", "0.2")
    assert found["eval"] == again["eval"]  # draws follow from fixed seeds
    assert found["eval"]["pass@1"] <= found["eval"]["pass@2"] <= found["eval"]["pass@3"]
    first = Run(result.output).base
    assert found["base"]["reward"] == pytest.approx(first["reward"])
    hotter = evaluated("--samples", "3", "--temperature", "9")["eval"]
    assert hotter["sampled reward"] != found["eval"]["sampled reward"]


def test_eval_shows_the_best_and_the_worst_completions(finished, call):
    result, _ = finished
    told = call("eval", result.output, "--no-drift", "--answers", 2, status=0).out
    assert "95 % interval" in told
    best, worst = (float(re.findall(r"\d\.\d\d", line)[0]) for line in told.splitlines() if "say " in line)
    mean = result.evaluation.metrics["reward"]
    assert best >= mean >= worst and best > worst


def test_flags_of_rewards_are_refused_for_other_tasks(model_folder, tmp_path, call):
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}])
    ended = call("eval", model_folder, "--data", rows, "--samples", 2, "--no-drift")
    assert_refused(ended, "scored for task: reward", "--samples")


def test_functions_of_a_folder_that_nobody_named_here_are_not_run(finished, evaluated, call, monkeypatch):
    result, _ = finished
    monkeypatch.setattr("deltaw.training.origin.was_named", lambda kind, value: kind != "reward")
    words = "reward.functions", "own.py", "--trust-remote-code"
    assert_refused(call("eval", result.output, "--no-drift"), *words)
    with pytest.raises(UserError, match=r"reward\.functions"):
        deltaw.fit({"train": {"max_steps": 4}}, resume=result.output)
    assert evaluated("--trust-remote-code")["score"]["metric"] == "reward"


# What a run tells


def test_steps_tell_rewards_with_errors_over_groups(finished):
    result, _ = finished
    metrics = Run(result.output).metrics
    for name in ("reward", "reward_error", "teaching_groups", "length", "cut_share", "clip_share", "kl", "mismatch"):
        assert len(metrics.column(name)[1]) == 3, name
    assert metrics.rewards() == ["reward vowels", "reward short"]
    total, vowels, brief = (metrics.column(name)[1] for name in ("reward", "reward vowels", "reward short"))
    assert total == pytest.approx(vowels + 0.5 * brief)
    assert metrics.column("reward_error vowels")[1].max() > 0
    assert metrics.column("kl")[1][-1] > metrics.column("kl")[1][0] == 0
    rewards = [one["reward"] for one in metrics.completions]
    assert metrics.completed == 3 and len(rewards) == 4 and rewards == sorted(rewards, reverse=True)
    assert rewards[0] >= total[-1] >= rewards[-1] and metrics.completions[0]["prompt"].startswith("say")


def test_without_a_base_no_divergence_is_told(finished, tmp_path):
    _, config = finished
    config = {**config, "output": str(tmp_path / "run"), "reward": {**config["reward"], "beta": 0.0}}
    run = Run(deltaw.fit({**config, "train": {**config["train"], "max_steps": 1}}).output)
    assert not len(run.metrics.column("kl")[1]) and len(run.metrics.column("clip_share")[1])


def test_prompts_without_answers_are_sampled_before_and_after(finished):
    result, _ = finished
    samples = Run(result.output).metrics.samples
    assert {sample.step for sample in samples} == {0, 3} and len(samples) == 4
    assert all(sample.expected is None and sample.prompt.startswith("say") for sample in samples)


def test_progress_and_lists_show_the_reward(finished):
    result, _ = finished
    run = Run(result.output)
    line = LiveLine(10, 2, 0.25, 0.5, metric="reward", length=12.4)
    assert "reward 0.2500  mean reward 0.5000  length 12" in line.words(200)
    ends = dict(closing_rows(result))
    assert "training reward" in ends and "training loss" not in ends
    assert "held-out reward" in ends
    assert run.score == ("reward", result.evaluation.metrics["reward"]) and not run.held_out_losses
    assert values_of("run", run)["reward"] == run.metrics.column("reward")[1][-1]
    assert as_values([run])[0]["score"]["metric"] == "reward"
    assert {"held-out reward", "training reward, mean of the last steps"} < {row[0] for row in result_rows([run]).rows}


def test_the_page_shows_rewards_completions_and_samples(finished, tmp_path):
    result, config = finished
    text = run_page(Run(result.output))
    for identity in ("reward", "functions", "length", "teaching-groups", "cut-share", "kl", "clip-share", "mismatch"):
        assert f'id="{identity}-figure"' in text, identity
    assert "95 % interval over groups" in text and "training reward" in text
    completions = Run(result.output).metrics.completions
    section = text[text.index('<h2 id="completions">') : text.index('<h2 id="next">')]
    assert section.count("<tr>") == 1 + len(completions) and short(completions[0]["reward"]) in section
    assert "expected</th>" not in text, "no prompt has an answer"

    other = {**config, "reward": {**config["reward"], "functions": ["lower-case"]}, "output": str(tmp_path / "run")}
    one = deltaw.fit({**other, "train": {**config["train"], "max_steps": 1}}).output
    assert 'id="functions-figure"' not in run_page(Run(one))
    assert "Training reward" in comparison_page([Run(one), Run(result.output)])


# The plan, and time


def test_the_time_of_a_step_is_that_of_its_rollout_too(finished, tmp_path, monkeypatch):
    _, config = finished
    drawn_in: list[float] = []
    own = SessionSampler.__call__

    def slow(self, prompts, drawing):
        begun = time.perf_counter()
        found = own(self, prompts, drawing)
        if drawing.seeds:
            time.sleep(0.3)
            drawn_in.append(time.perf_counter() - begun)
        return found

    monkeypatch.setattr(SessionSampler, "__call__", slow)
    run = Run(deltaw.fit({**config, "output": str(tmp_path / "run")}).output)
    seconds = run.metrics.column("seconds")[1]
    assert len(drawn_in) == 3 and all(seconds > drawn_in)


def test_an_evaluation_is_expected_to_take_what_its_completions_do(finished):
    _, config = finished
    rows = [prompt(n) for n in range(5)]
    read, data = RunConfig.read(config), SimpleNamespace(sets={"": rows}, every=rows)
    session = SimpleNamespace(
        data=data,
        task=SimpleNamespace(writes_text=True, checks_generation=False, evaluated_rows=lambda rows: [rows]),
        written=RewardTask.written(SimpleNamespace(settings=read.reward), data, 4),
        config=read,
        method=SimpleNamespace(parameters=lambda model: []),
        model=SimpleNamespace(config=None),
    )

    def estimated(trained: int) -> float:
        costs, ending = Costs(session, 0), Ending()
        costs.see(Step(1, 0.1, 0.0, 1e-3, 1.0, 12, trained, trained, 12, 2.0, metrics={"length": 8.0}))
        costs.tell(ending)
        return ending.evaluation

    a_token = 2.0 / (12 * 8)  # also of those that a step wrote and did not train on
    expected = (FORWARD * sum(map(len, rows)) + WRITTEN * len(rows) * 8) * a_token
    assert estimated(10) == estimated(12 * 8) == pytest.approx(expected)
    assert estimated(2 * 12 * 8) == pytest.approx(expected / 2)


def test_a_plan_holds_what_rollouts_take(finished, tmp_path):
    _, config = finished

    def planned(**reward: object):
        return plan(
            RunConfig.read({**config, "reward": {**config["reward"], **reward}, "output": str(tmp_path / "new")})
        )

    usual, long, many = planned(), planned(max_new_tokens=72), planned(group=8)
    few_pages, more_pages, more_rows = (
        # What the process of the tests holds differs from plan to plan.
        one.phases["rollouts"] - one.resident["process"]
        for one in (usual, long, many)
    )
    # Of each step three prompts of six tokens or so with four completions, which have no beginning in common.
    assert usual.tokens >= 3 * 4 * 8 and usual.rows == 12
    assert more_pages > few_pages > 0 and more_rows > few_pages
    others = {k: v for k, v in config.items() if k != "reward"}
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}] * 8)
    assert "rollouts" not in plan({**others, "task": "causal-lm", "data": {"train": str(rows)}}).phases
