"""A task in a separate file is registered once, and supports settings, checks, plans, runs, resuming and comparison.

Two tasks: pairs of answers, and rollouts with a settings section.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from safetensors.torch import load_file

import deltaw
from deltaw.cli import main
from deltaw.errors import UserError
from deltaw.experiments.compare import compare
from deltaw.inference.open_run import open_run
from deltaw.runs.checks import check_data_and_run
from deltaw.runs.data_checks import check_data, preview_rows
from deltaw.runs.folder import Run
from deltaw.settings import task_registry
from deltaw.settings.config import RunConfig
from deltaw.settings.schema import run_schema
from deltaw.training.callbacks import Callback, LineCallback
from deltaw.training.session import read_data
from tests.conftest import deep_merge, write_rows
from tests.experiments.conftest import use_local_worker
from tests.training.runs import ADAPTER, RecordingCallback
from tests.training.toy_rollouts import ENTRY as LETTERS
from tests.training.toy_task import ENTRY, PreferenceTask

BUILT_IN = (
    "causal-lm",
    "preference",
    "rl",
    "distill",
    "sequence-classification",
    "regression",
    "image-classification",
    "embedding",
    "reranking",
)


@pytest.fixture
def toy():
    task_registry.register(ENTRY)
    yield ENTRY
    task_registry.unregister(ENTRY.name)


@pytest.fixture
def run_settings(settings, tmp_path):
    """Settings in which completions in capitals are preferred."""
    words = ("red", "blue", "green", "black", "white", "pink", "gray", "teal")
    rows = [{"prompt": f"say {w}: ", "chosen": w.upper(), "rejected": w.title()} for w in words]
    bad = [{"prompt": "say it: ", "chosen": "it", "rejected": "it"}, {"prompt": "say it: ", "chosen": "it"}]
    file = write_rows(tmp_path / "pairs.jsonl", [*rows, rows[0], *bad])
    data = {"train": str(file), "eval": 2, "bad_rows": "skip"}
    train = {"epochs": 8, "batch_size": 3, "checkpoint_every": 5}
    defaults = {"task": "toy-preference", "data": data, "train": train}
    return lambda **changes: settings(tmp_path / "run", **deep_merge(defaults, changes))


@pytest.mark.parametrize("method", ["lora", "prompt", pytest.param("head", marks=pytest.mark.slow)])
def test_registered_task_trains_saves_and_can_be_opened(toy, run_settings, method):
    log_lines = []
    assert task_registry.names() == (*BUILT_IN, "toy-preference")
    result = deltaw.fit(run_settings(method=method), callback=LineCallback(log_lines.append))
    assert result.plan is not None and 0 < result.plan.trained_parameters < result.plan.total_parameters
    assert result.outcome.rows == 8 * 6
    first, *_, last = [step["loss"] for step in steps_of(result.output)]
    assert last < first
    assert any("packing" in line and "shared prefixes" in line for line in log_lines)
    assert result.evaluation.main == "preferred"

    opened = open_run(str(result.output), precision="fp32", device="cpu", log=lambda line: None)
    assert isinstance(opened.task, PreferenceTask)
    assert RunConfig.read(result.output / "run.yaml").task == "toy-preference"
    opened.require_generation()  # the task generates text


def test_unusable_rows_are_skipped_and_reported(toy, run_settings):
    config = RunConfig.read(run_settings())
    _, data = read_data(config)
    assert (len(data.train), len(data.held_out), data.report.duplicates) == (6, 2, 1)
    assert data.report.bad_rows == {"nothing to prefer": 1, "'rejected' is missing": 1}
    check = check_data(config)
    counts = {finding.name: finding.count for finding in check.findings}
    assert check.usable and check.form == "toy pairs" and counts == {"bad_rows": 1, "duplicates": 1}
    (row,) = preview_rows(config, 2, 1)
    texts = ["".join(piece.text for piece in example.spans) for example in row.examples]
    assert texts == ["say blue: BLUE", "say blue: Blue"]
    long = RunConfig.read(run_settings(), {"data": {"max_length": 12}})
    with pytest.raises(UserError, match="longer than 12 tokens"):
        read_data(long)
    (finding,) = (f for f in check_data(long).findings if f.name == "long_rows")
    assert finding.level == "error" and finding.count > 0


def test_interrupted_run_is_resumed(toy, run_settings):
    class Stop(Callback):
        steps = 0

        def on_step(self, step):
            self.steps += 1

        def should_stop(self):
            return self.steps >= 5

    assert deltaw.fit(run_settings(), callback=Stop()).interrupted
    result = deltaw.fit(run_settings())
    assert result.resumed_from_step == 5 and not result.interrupted and result.outcome.rows == 8 * 6


@pytest.mark.slow
def test_methods_can_be_compared_and_runs_evaluated(toy, run_settings, tmp_path, monkeypatch, capsys):
    use_local_worker(monkeypatch)
    config = RunConfig.read(run_settings(train={"epochs": 1}))
    comparison = compare(config, ["lora", "last"], folder=tmp_path / "out", seeds=1)
    assert {result.method for result in comparison.results} == {"lora", "last"} and comparison.metric == "preferred"
    run = deltaw.fit(config).output
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["eval", str(run), "--data", str(config.data.train), "--json"])
    assert "preferred" in json.loads(capsys.readouterr().out)["eval"]


def test_unregistered_task_is_rejected(run_settings):
    for _ in range(2):
        with pytest.raises(UserError, match="'task' cannot be 'toy-preference'"):
            RunConfig.read(run_settings())
        task_registry.register(ENTRY)
        assert RunConfig.read(run_settings()).task == "toy-preference"
        task_registry.unregister(ENTRY.name)
    with pytest.raises(UserError, match="unknown task 'causal'"):
        task_registry.entry_of("causal")
    with pytest.raises(ValueError, match="already"):
        task_registry.register(task_registry.entry_of("regression"))


@pytest.fixture
def letters():
    task_registry.register(LETTERS)
    yield LETTERS
    task_registry.unregister(LETTERS.name)


@pytest.fixture
def letter_settings(settings, tmp_path):
    """Settings of a run that is rewarded for letters."""
    rows = write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"say {n}"} for n in range(8)])
    train = {"max_steps": 4, "learning_rate": 0.05, "checkpoint_every": 1}
    defaults = {"task": "toy-letters", "data": {"train": str(rows), "eval": 2}, "train": train}
    return lambda output="run", **changes: settings(tmp_path / output, **deep_merge(defaults, changes))


def test_section_of_registered_task_is_validated(letters, letter_settings):
    config = RunConfig.read(letter_settings(letters={"letters": "xyz"}), {"letters": {"group": 6}})
    assert (config.section, config.letters.letters, config.letters.group) == (config.letters, "xyz", 6)
    for section, message in (
        ({"group": 1}, "at least 2"),
        ({"leters": "a"}, "leters"),
        ({"updates": 5}, "more updates than rows"),
    ):
        with pytest.raises(UserError, match=message):
            RunConfig.read(letter_settings(letters=section))
    with pytest.raises(UserError, match="section 'letters' does not apply"):
        RunConfig.read(letter_settings(task="causal-lm", letters={"group": 6}))
    with pytest.raises(UserError, match="does not support sharding"):
        RunConfig.read(letter_settings(train={"sharding": "base"}))
    blank = RunConfig.read(letter_settings(letters={"letters": " "}))
    assert "all letters are blank" in check_data_and_run(blank, folder=False).findings[0].text
    assert set(run_schema()["properties"]["letters"]["properties"]) == set(LETTERS.settings.model_fields)


def test_rollouts_of_registered_task_are_planned_and_raise_reward(letters, letter_settings):
    config = letter_settings(letters={"group": 16}, train={"max_steps": 16})
    plan = deltaw.plan(config)
    longer = deltaw.plan(deep_merge(config, {"letters": {"max_new_tokens": 100}}))
    assert longer.peak_bytes > plan.peak_bytes and plan.trained_parameters == longer.trained_parameters
    result = deltaw.fit(config)
    rewards = [step["reward"] for step in steps_of(result.output)]
    assert len(rewards) == 16 and np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.15
    assert result.evaluation.main == "reward" and len(result.evaluation.per_row) == 2
    assert Run(result.output).progress == "reward"


def test_rollouts_are_resumed_bit_identically(letters, letter_settings):
    whole = deltaw.fit(letter_settings("whole", letters={"updates": 2}))
    config = letter_settings("part", letters={"updates": 2})
    deltaw.fit(config, callback=RecordingCallback(stop_after=3))
    resumed = deltaw.fit(resume=config["output"])
    assert resumed.resumed_from_step == 3
    expected = load_file(whole.output / ADAPTER)
    tensors = load_file(resumed.output / ADAPTER)
    assert all((tensors[name] == expected[name]).all() for name in expected)
    rewards, resumed_rewards = ([s.get("reward") for s in steps_of(r.output)] for r in (whole, resumed))
    assert rewards[:3] == resumed_rewards[:3] and rewards[0] == rewards[1]


def test_commands_support_section_of_registered_task(letters, letter_settings, tmp_path, capsys, monkeypatch):
    for command in ("train", "init"):  # its flags follow from the tasks that are registered on import
        monkeypatch.delitem(sys.modules, f"deltaw.cli.{command}", raising=False)
    config = letter_settings()
    (tmp_path / "train.json").write_text(json.dumps(config))

    def output_of(*arguments):
        with pytest.raises(SystemExit) as result:
            main([*map(str, arguments)])
        assert result.value.code == 0
        return capsys.readouterr().out

    output_of("train", tmp_path / "train.json", "--letters.letters", "xyz", "--train.max_steps", 2)
    assert RunConfig.read(tmp_path / "run" / "run.yaml").letters.letters == "xyz"
    scores = json.loads(output_of("eval", tmp_path / "run", "--data", config["data"]["train"], "--json"))
    assert 0 <= scores["eval"]["reward"] <= 1
    flags = ["--data", config["data"]["train"], "--model", config["model"], "--task", "toy-letters", "--yes"]
    assert "8 rows of prompts" in output_of("init", tmp_path / "new.yaml", *flags)
    assert "toy-letters (write some letters)" in (tmp_path / "new.yaml").read_text()
    assert RunConfig.read(tmp_path / "new.yaml").task == "toy-letters"


def steps_of(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "loss" in line]
