"""Output of reward runs: `deltaw eval`, metrics, progress, report page and plan."""

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
from deltaw.data.prompts import TokenizedPrompt
from deltaw.decoding.generation import SampledCompletion, SamplingParams
from deltaw.decoding.opening import SessionSampler
from deltaw.errors import UserError
from deltaw.hub.tokenizers import load_tokenizer
from deltaw.inference.scores import ScoreOptions
from deltaw.reports.live_line import LiveLine
from deltaw.reports.live_table import progress_values
from deltaw.reports.page.write import comparison_page, run_page
from deltaw.reports.progress import summary_rows
from deltaw.reports.runs import result_rows, runs_as_dicts
from deltaw.reports.tables import short
from deltaw.runs.folder import Run
from deltaw.settings.config import RunConfig
from deltaw.tasks.reward.feed import SingleTurnSampler
from deltaw.tasks.reward.scoring import Scorer, interval_of, pass_at
from deltaw.tasks.reward.settings import RewardSettings
from deltaw.tasks.reward.task import RewardTask
from deltaw.training.evaluation.base import mean_interval
from deltaw.training.monitoring.best import EVALUATED_COST, GENERATED_COST, CostEstimates, OverheadSeconds
from deltaw.training.planning.plan_run import plan
from deltaw.training.state import Step
from tests.cli.conftest import assert_refused
from tests.conftest import write_rows

FUNCTIONS = """
def vowels(completions, **columns):
    return [sum(c in "aeiou" for c in text) / max(1, len(text)) for text in completions]
def short(prompt, completion):
    return float(len(completion) < 4) + int(prompt.split()[-1]) / 10
"""


def prompt(row: int, text: str = "say", answer: str | None = None) -> TokenizedPrompt:
    tokens = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
    return TokenizedPrompt(row, tokens, np.zeros(len(tokens), bool), len(tokens), answer, columns={"prompt": text})


def make_completion(text: str, is_complete: bool = True) -> SampledCompletion:
    return SampledCompletion(np.frombuffer(text.encode(), np.uint8).astype(np.int64), text, 0 if is_complete else None)


@pytest.fixture(scope="module")
def finished_run_and_config(tmp_path_factory, model_folder):
    """Return a finished run with two weighted reward functions, and its settings."""
    folder = tmp_path_factory.mktemp("rewarded")
    (folder / "own.py").write_text(FUNCTIONS)
    rows = write_rows(folder / "prompts.jsonl", [{"prompt": f"say {n}"} for n in range(10)])
    functions = [f"{folder / 'own.py'}:vowels", {"name": f"{folder / 'own.py'}:short", "weight": 0.5}]
    config = {"model": str(model_folder), "task": "rl", "data": {"train": str(rows), "eval": 4}}
    config |= {"reward": {"functions": functions, "group": 4, "max_new_tokens": 8, "loss": "grpo", "beta": 0.01}}
    config |= {"train": {"max_steps": 3, "batch_size": 3, "learning_rate": 0.02, "samples": 2, "drift": False}}
    config |= {"precision": "fp32", "output": str(folder / "run")}
    return deltaw.fit(config), config


@pytest.fixture
def evaluate_run(finished_run_and_config, call):
    """Return a function that evaluates the finished run and returns its JSON output."""

    def run(*flags: object) -> dict:
        return json.loads(call("eval", finished_run_and_config[0].output, "--no-drift", "--json", *flags, status=0).out)

    return run


# Scoring


def test_pass_at_k_equals_enumeration_of_subsets():
    passed = np.random.default_rng(5).random((6, 5)) < 0.4
    for k in (1, 2, 5):
        expected = [np.mean([any(row[list(s)]) for s in itertools.combinations(range(5), k)]) for row in passed]
        assert pass_at(passed, k) == pytest.approx(expected)


def test_functions_with_same_name_are_numbered_and_weighted(model_folder):
    pattern = {"name": "regex", "pattern": "a+"}
    functions = [pattern, {**pattern, "pattern": "a", "weight": -2.0}, {"name": "lower-case", "weight": 3.0}]
    settings = RewardSettings.model_validate({"functions": functions})
    with closing(Scorer(settings)) as scorer:
        prompts = [prompt(n) for n in range(3)]
        texts = [make_completion("aa"), make_completion("a"), make_completion("B")]
        rewards = scorer(prompts, texts)
        by_name = scorer.by_name(rewards)
        assert scorer.highest == 4.0
        assert list(by_name) == ["reward", "reward regex 1", "reward regex 2", "reward lower-case"]
        assert by_name["reward"].tolist() == [4.0, 2.0, 0.0]
        best, *_, worst = scorer.extremes(prompts, texts, rewards)
    assert (best.text, best.reward, worst.text) == ("aa", 4.0, "B")
    assert best.parts == {"reward regex 1": 1.0, "reward regex 2": 0.0, "reward lower-case": 1.0}


@pytest.mark.parametrize(("weight", "pattern", "row"), [(1e308, "aa", 2), (-1e13, "aa", 2), (2e12, "a+", 1)])
def test_reward_overflow_names_function_and_row(weight, pattern, row):
    functions = ["lower-case", {"name": "regex", "pattern": pattern, "weight": weight}]
    scorer = Scorer(RewardSettings.model_validate({"functions": functions}))
    with closing(scorer), pytest.raises(UserError, match=r"weight × reward\) exceeds") as exc_info:
        scorer([prompt(1), prompt(2)], [make_completion("a"), make_completion("aa")])
    assert exc_info.value.location == f"reward function regex, row {row}"


def test_binary_rewards_use_interval_of_share():
    ones = np.ones(8)
    assert interval_of(ones) == mean_interval(ones, share=True) != mean_interval(ones)
    values = np.array([0.5, 1.0, 0.2])
    assert interval_of(values) == mean_interval(values)


def test_greedy_and_sampled_completions_are_scored(model_folder):
    settings = RewardSettings.model_validate({"functions": ["exact"], "max_new_tokens": 4, "top_k": 7})
    task = RewardTask(load_tokenizer(model_folder), print, settings)
    rows = [prompt(0, answer="yes"), prompt(1, answer="no")]
    requests: list[SamplingParams] = []

    def sampler(prompts, params):
        requests.append(params)
        if not params.seeds:
            return [make_completion("yes"), make_completion("maybe", is_complete=False)]
        return [make_completion(text) for text in ("yes", "x", "x", "yes", "no", "x", "x", "x")]

    with closing(Scorer(settings)) as scorer:
        options = ScoreOptions(samples=4, temperature=0.7)
        score = task.score_completions(rows, SingleTurnSampler(sampler), scorer, options)
        lenient = task.score_completions(rows, SingleTurnSampler(sampler), scorer, ScoreOptions(threshold=0.0)).metrics
    greedy = requests[0]
    several = requests[1]
    assert greedy == SamplingParams(4) and (several.temperature, several.top_k) == (0.7, 7)
    assert len(set(several.seeds)) == 8
    metrics = score.metrics
    assert metrics["reward"] == metrics["passed"] == 0.5
    assert (metrics["length"], metrics["truncated_share"]) == (4.5, 0.5)  # includes the end token of "yes"
    assert metrics["sampled reward"] == metrics["pass@1"] == pytest.approx(3 / 8)
    assert metrics["pass@2"] == pytest.approx((1 - 1 / 6 + 1 - 3 / 6) / 2) and metrics["pass@4"] == 1.0
    low, high = score.evaluation.intervals["pass@4"]
    assert low < 0.5 and high == 1.0
    assert lenient["passed"] == 1.0 and "pass@1" not in lenient
    assert [(a.output, a.reward, a.exact) for a in score.answers] == [("yes", 1.0, True), ("maybe", 0.0, False)]


# deltaw eval


def test_eval_equals_evaluation_of_run(finished_run_and_config, evaluate_run):
    result, _ = finished_run_and_config
    output = evaluate_run()
    assert output["eval"] == pytest.approx(result.evaluation.metrics)
    assert output["score"]["metric"] == "reward" and output["rows"] == 4
    assert {"reward vowels", "reward short", "passed", "length", "truncated_share"} < set(output["eval"])
    vowels, brief = (output["eval"][f"reward {name}"] for name in ("vowels", "short"))
    assert output["eval"]["reward"] == pytest.approx(vowels + 0.5 * brief)
    low, high = output["intervals"]["reward vowels"]
    assert low <= output["eval"]["reward vowels"] <= high


def test_eval_samples_for_pass_at_k_and_scores_base(finished_run_and_config, evaluate_run):
    result, _ = finished_run_and_config
    output = evaluate_run("--samples", "3", "--temperature", "0.8", "--threshold", "0.2", "--with-base")
    repeated = evaluate_run("--samples", "3", "--temperature", "0.8", "--threshold", "0.2")
    assert output["eval"] == repeated["eval"]  # seeds are fixed
    assert output["eval"]["pass@1"] <= output["eval"]["pass@2"] <= output["eval"]["pass@3"]
    first = Run(result.output).base
    assert output["base"]["reward"] == pytest.approx(first["reward"])
    hotter = evaluate_run("--samples", "3", "--temperature", "9")["eval"]
    assert hotter["sampled reward"] != output["eval"]["sampled reward"]


def test_eval_shows_best_and_worst_completions(finished_run_and_config, call):
    result, _ = finished_run_and_config
    output = call("eval", result.output, "--no-drift", "--answers", 2, status=0).out
    assert "95 % interval" in output
    best, worst = map(float, re.findall(r"(?m)^\S* *adapter +(\d\.\d\d)", output))
    mean = result.evaluation.metrics["reward"]
    assert best >= mean >= worst and best > worst


def test_reward_flags_are_rejected_for_other_tasks(model_folder, tmp_path, call):
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}])
    result = call("eval", model_folder, "--data", rows, "--samples", 2, "--no-drift")
    assert_refused(result, "applies only to tasks that sample completions", "--samples")


def test_reward_code_of_untrusted_run_is_not_executed(finished_run_and_config, evaluate_run, call, monkeypatch):
    result, _ = finished_run_and_config
    monkeypatch.setattr("deltaw.methods.trust.was_referenced", lambda kind, value: kind != "reward")
    message = "reward.functions", "own.py", "--trust-remote-code"
    assert_refused(call("eval", result.output, "--no-drift"), *message)
    with pytest.raises(UserError, match=r"reward\.functions"):
        deltaw.fit({"train": {"max_steps": 4}}, resume=result.output)
    assert evaluate_run("--trust-remote-code")["score"]["metric"] == "reward"


# Metrics and reports


def test_steps_log_rewards_with_errors_over_groups(finished_run_and_config):
    result, _ = finished_run_and_config
    metrics = Run(result.output).metrics
    names = "reward reward_error groups_with_advantage length truncated_share clip_share kl mismatch"
    for name in names.split():
        assert len(metrics.column(name)[1]) == 3, name
    assert metrics.rewards() == ["reward vowels", "reward short"]
    total, vowels, brief = (metrics.column(name)[1] for name in ("reward", "reward vowels", "reward short"))
    assert total == pytest.approx(vowels + 0.5 * brief)
    assert metrics.column("reward_error vowels")[1].max() > 0
    assert metrics.column("kl")[1][-1] > metrics.column("kl")[1][0] == 0
    rewards = [completion["reward"] for completion in metrics.completions]
    assert metrics.completed == 3 and len(rewards) == 4 and rewards == sorted(rewards, reverse=True)
    assert rewards[0] >= total[-1] >= rewards[-1] and metrics.completions[0]["prompt"].startswith("say")


def test_prompts_without_answers_are_sampled_before_and_after_training(finished_run_and_config):
    result, _ = finished_run_and_config
    samples = Run(result.output).metrics.samples
    assert {sample.step for sample in samples} == {0, 3} and len(samples) == 4
    assert all(sample.expected is None and sample.prompt.startswith("say") for sample in samples)


def test_progress_and_run_list_show_reward(finished_run_and_config):
    result, _ = finished_run_and_config
    run = Run(result.output)
    line = LiveLine(10, 2, 0.25, 0.5, metric="reward", length=12.4)
    assert "reward 0.2500  mean reward 0.5000  length 12" in line.log_line(200)
    summary = dict(summary_rows(result))
    assert "training reward" in summary and "training loss" not in summary
    assert "held-out reward" in summary
    assert run.score == ("reward", result.evaluation.metrics["reward"]) and not run.held_out_losses
    assert progress_values("run", run)["reward"] == run.metrics.column("reward")[1][-1]
    assert runs_as_dicts([run])[0]["score"]["metric"] == "reward"
    assert {"held-out reward", "training reward, mean of the last steps"} < {row[0] for row in result_rows([run]).rows}


def test_page_shows_rewards_completions_and_samples(finished_run_and_config):
    result, _ = finished_run_and_config
    text = run_page(Run(result.output))
    figures = "reward functions length groups-with-advantage truncated-share kl clip-share mismatch"
    for identity in figures.split():
        assert f'id="{identity}-figure"' in text, identity
    assert "95 % interval over groups" in text and "training reward" in text
    completions = Run(result.output).metrics.completions
    section = text[text.index('<h2 id="completions">') : text.index('<h2 id="next">')]
    assert section.count("<tr>") == 1 + len(completions) and short(completions[0]["reward"]) in section
    assert "expected</th>" not in text, "no prompt has an answer"


def test_run_with_one_function_and_without_reference_model(finished_run_and_config, tmp_path):
    result, config = finished_run_and_config
    reward = {**config["reward"], "functions": ["lower-case"], "beta": 0.0}
    train = {**config["train"], "max_steps": 1}
    other_run = Run(deltaw.fit({**config, "reward": reward, "train": train, "output": str(tmp_path / "run")}).output)
    assert not len(other_run.metrics.column("kl")[1]) and len(other_run.metrics.column("clip_share")[1])
    assert 'id="functions-figure"' not in run_page(other_run)
    assert "Training reward" in comparison_page([other_run, Run(result.output)])


# The plan, and time


def test_step_time_includes_rollout(finished_run_and_config, tmp_path, monkeypatch):
    _, config = finished_run_and_config
    rollout_seconds: list[float] = []
    original_call = SessionSampler.__call__

    def call_slowly(self, prompts, params):
        started = time.perf_counter()
        output = original_call(self, prompts, params)
        if params.seeds:
            time.sleep(0.1)
            rollout_seconds.append(time.perf_counter() - started)
        return output

    monkeypatch.setattr(SessionSampler, "__call__", call_slowly)
    train = {**config["train"], "max_steps": 2}
    run = Run(deltaw.fit({**config, "train": train, "output": str(tmp_path / "run")}).output)
    seconds = run.metrics.column("seconds")[1]
    assert len(rollout_seconds) == 2 and all(seconds > rollout_seconds)


def test_evaluation_estimate_includes_generated_tokens(finished_run_and_config):
    _, config = finished_run_and_config
    rows = [prompt(n) for n in range(5)]
    run_config = RunConfig.read(config)
    data = SimpleNamespace(sets={"": rows}, all_rows=rows)
    session = SimpleNamespace(
        data=data,
        task=SimpleNamespace(generates_text=True, checks_generation=False, evaluated_rows=lambda rows: [rows]),
        generation_limits=RewardTask.generation_limits(SimpleNamespace(settings=run_config.reward), data, 4),
        config=run_config,
        method=SimpleNamespace(parameters=lambda model: []),
        model=SimpleNamespace(config=None),
    )

    def estimate_seconds(trained: int) -> float:
        costs = CostEstimates(session, 0)
        overhead = OverheadSeconds()
        costs.add_step(Step(1, 0.1, 0.0, 1e-3, 1.0, 12, trained, trained, 12, 2.0, metrics={"length": 8.0}))
        costs.update(overhead)
        return overhead.evaluation

    seconds_per_token = 2.0 / (12 * 8)  # counts generated tokens that were not trained on
    expected = (EVALUATED_COST * sum(map(len, rows)) + GENERATED_COST * len(rows) * 8) * seconds_per_token
    assert estimate_seconds(10) == estimate_seconds(12 * 8) == pytest.approx(expected)
    assert estimate_seconds(2 * 12 * 8) == pytest.approx(expected / 2)


def test_plan_includes_rollout_memory(finished_run_and_config, tmp_path):
    _, config = finished_run_and_config

    def plan_with(**reward: object):
        reward = {**config["reward"], **reward}
        return plan(RunConfig.read({**config, "reward": reward, "output": str(tmp_path / "new")}))

    default_plan = plan_with()
    long_plan = plan_with(max_new_tokens=72)
    large_group_plan = plan_with(group=8)
    default_bytes, long_bytes, large_group_bytes = (
        # The memory of the test process differs between plans.
        run_plan.phases["rollouts"] - run_plan.resident["process"]
        for run_plan in (default_plan, long_plan, large_group_plan)
    )
    # Each step has three prompts of about six tokens with four completions. They share no prefix.
    assert default_plan.tokens >= 3 * 4 * 8 and default_plan.rows == 12
    assert long_bytes > default_bytes > 0 and large_group_bytes > default_bytes
