"""The files on the page "Write a task or a method" work as they are: they train, evaluate, predict and reopen."""

from __future__ import annotations

import importlib
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

import deltaw
from deltaw.cli import main
from deltaw.errors import UserError
from deltaw.inference.open_run import open_run
from deltaw.settings import method_registry, task_registry
from deltaw.settings.config import RunConfig, parse_yaml
from deltaw.settings.data import DataSettings
from tests.conftest import write_rows

PAGE = Path(__file__).parents[2] / "docs" / "development" / "task.md"
TEXT = PAGE.read_text(encoding="utf-8")
FILES = dict(re.findall(r"```python\n# (\w+)\.py\n(.*?)```", TEXT, re.DOTALL))
ADAPTER = "adapter_model.safetensors"
COLORS = ("red", "blue", "green", "black", "white", "pink", "gray", "teal")


@pytest.fixture
def plugins(tmp_path, monkeypatch):
    """Write the page's files, import them and register their entries, as an installed package would."""
    for name, code in FILES.items():
        (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    registered = []
    for registry, group in ((task_registry, "deltaw.tasks"), (method_registry, "deltaw.methods")):
        lines = re.search(rf'\[project\.entry-points\."{group}"\]\n(.*?)\n\n', TEXT, re.DOTALL)[1].splitlines()
        for name, module in (re.fullmatch(r'([\w-]+) = "(\w+):ENTRY"', line).groups() for line in lines):
            entry = importlib.import_module(module).ENTRY
            assert entry.name == name
            registry.register(entry)
            registered.append((registry, name))
    yield
    for registry, name in registered:
        registry.unregister(name)
    for name in FILES:
        del sys.modules[name]


@pytest.fixture
def rated(tmp_path, settings):
    """Return the settings of a run on rated answers."""
    rows = [{"prompt": f"say {c}", "answer": c.upper(), "stars": n % 5 + 1} for n, c in enumerate(COLORS)]
    rows.append({"prompt": "say it", "answer": "it"})
    file = write_rows(tmp_path / "rated.jsonl", rows)

    def make(**changes):
        train = {"epochs": 6, "batch_size": 3, "learning_rate": 2e-2}
        data = {"train": str(file), "eval": 2, "bad_rows": "skip"}
        return settings(tmp_path / "run", **{"data": data, "train": train, **changes})

    return make


def output_of(capsys, *arguments):
    capsys.readouterr()
    with pytest.raises(SystemExit) as result:
        main([*map(str, arguments)])
    assert result.value.code == 0
    return capsys.readouterr().out


def losses_of(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def test_smallest_task_trains_evaluates_and_predicts(plugins, rated, capsys, tmp_path):
    config = rated(task="rated")
    result = deltaw.fit(config)
    assert result.plan is not None and result.evaluation.main == "likely"
    assert losses_of(result.output)[-1] < losses_of(result.output)[0]
    data = config["data"]["train"]
    scores = json.loads(output_of(capsys, "eval", result.output, "--data", data, "--json"))["eval"]
    assert scores.keys() >= {"loss", "likely"}
    opened = open_run(str(result.output), precision="fp32", device="cpu", log=lambda line: None)
    rows = opened.task.read(opened.config.data, seed=opened.config.data_seed).held_out
    assert opened.score(rows).metrics["loss"] == pytest.approx(result.evaluation.metrics["loss"], rel=1e-5)
    output_of(capsys, "predict", result.output, data, "--output", tmp_path / "texts.jsonl", "--max-new-tokens", 3)
    records = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(records) == 9 and all(isinstance(record["completion"], str) for record in records)


def test_own_predictions_need_no_ratings(plugins, rated, capsys, tmp_path):
    config = rated(task="rated-scores")
    run = deltaw.fit(config).output
    rows = write_rows(tmp_path / "new.jsonl", [{"prompt": "say red", "answer": "RED"}, {"prompt": "say red"}])
    output_of(capsys, "predict", run, rows, "--output", tmp_path / "scores.jsonl")
    first, second = (json.loads(line) for line in (tmp_path / "scores.jsonl").read_text(encoding="utf-8").splitlines())
    assert first["log_prob"] < 0 and first["error"] is None
    assert second["log_prob"] is None and "'answer' is missing" in second["error"]


def test_task_without_inference_has_no_predictions(plugins, model_folder):
    entry = task_registry.entry_of("rated-scores")
    task_registry.unregister("rated-scores")
    task_registry.register(replace(entry, inference=None, auto_model="AutoModel"))
    opened = open_run(str(model_folder), precision="fp32", device="cpu", task="rated-scores", log=lambda line: None)
    with pytest.raises(UserError, match="the task rated-scores has no predictions") as error:
        opened.inference.reader(DataSettings(train="rows.jsonl"), ["prompt"], None)
    assert error.value.hint == "use deltaw eval"


def test_task_with_rewards_raises_its_reward(plugins, settings, capsys, tmp_path):
    rows = [{"prompt": f"say {n}", "wanted": "abcdefghijklm"} for n in range(8)]
    file = write_rows(tmp_path / "prompts.jsonl", rows)
    train = {"max_steps": 16, "learning_rate": 0.05, "batch_size": 3}
    config = settings(
        tmp_path / "run", task="letters", letters={"group": 16}, data={"train": str(file), "eval": 2}, train=train
    )
    result = deltaw.fit(config)
    lines = map(json.loads, (result.output / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    rewards = [line["reward"] for line in lines if "reward" in line and "loss" in line]
    assert len(rewards) == 16 and sum(rewards[-3:]) > sum(rewards[:3]) + 0.3
    assert result.evaluation.main == "reward"
    scores = json.loads(output_of(capsys, "eval", result.output, "--data", file, "--json"))
    assert 0 <= scores["eval"]["reward"] <= 1


def test_smallest_method_trains_saves_and_reopens(plugins, rated):
    result = deltaw.fit(rated(task="rated", method="norms", norms={"above": 1}))
    names = ("input_layernorm", "post_attention_layernorm")
    assert load_file(result.output / ADAPTER).keys() == {f"model.layers.1.{name}.weight" for name in names}
    opened = open_run(str(result.output), precision="fp32", device="cpu", log=lambda line: None)
    assert opened.method.name == "norms"
    with pytest.raises(UserError, match=r"norms.above is -1"):
        RunConfig.read(rated(method="norms", norms={"above": -1}))


def test_method_with_own_parameters_trains_saves_and_reopens(plugins, rated, capsys):
    config = rated(task="rated", method="gains", gains={"layers": ["q_proj", "down_proj"]})
    result = deltaw.fit(config)
    assert losses_of(result.output)[-1] < losses_of(result.output)[0]
    assert {name.rpartition("layers.")[2] for name in load_file(result.output / ADAPTER)} == {
        f"{layer}.{name}.gain" for layer in (0, 1) for name in ("self_attn.q_proj", "mlp.down_proj")
    }
    opened = open_run(str(result.output), precision="fp32", device="cpu", log=lambda line: None)
    assert opened.method.settings.layers == ("q_proj", "down_proj")  # the settings of the run, before load
    rows = opened.task.read(opened.config.data, seed=opened.config.data_seed).held_out
    assert opened.score(rows).metrics["loss"] == pytest.approx(result.evaluation.metrics["loss"], rel=1e-5)
    with opened.method.base_model_active(opened.model):
        assert opened.score(rows).metrics["loss"] != pytest.approx(result.evaluation.metrics["loss"], rel=1e-5)
    scores = json.loads(output_of(capsys, "eval", result.output, "--data", config["data"]["train"], "--json"))["eval"]
    assert scores.keys() >= {"loss", "likely"}


def test_settings_file_of_the_page_is_valid(plugins):
    config = RunConfig.read(parse_yaml(re.search(r"```yaml\n(.*?)```", TEXT, re.DOTALL)[1]))
    assert (config.task, config.method) == ("rated", "norms")
