"""The commands with a tiny model: output streams and files."""

from __future__ import annotations

import json
import re

import yaml

from deltaw.cli.options import nested_settings
from deltaw.settings.config import settings as all_settings
from tests.cli.conftest import tree


def test_train_eval_generate_chat_and_inspect_work_in_sequence(call, flags, tmp_path, rows_file):
    run = tmp_path / "run"
    result = call("train", *flags(run, train__epochs=2))
    assert result.status == 0 and result.err == ""
    assert "training loss" in result.out and f"deltaw chat {run}" in result.out

    result = call("eval", run, "--with-base", "--answers", 1, status=0)
    assert "perplexity" in result.out and "exact match" in result.out and "paint it" in result.out
    assert len(re.findall("[✓✗]", result.out)) == 2  # one answer of each model

    result = call("generate", run, "--with-base", "--max-new-tokens", 2, stdin="paint it red\n\npaint it blue\n")
    assert result.status == 0 and result.out.count("base:") == result.out.count("adapter:") == 2
    assert result.err == "" and "adapted" in call("generate", run, "-v", "-p", "paint it red").err

    messages = f"hello\n{'x' * 300}\n/new\nhello again\n\nnever read\n"  # a message that is too long is removed
    result = call("chat", run, "--max-new-tokens", 3, stdin=messages)
    assert result.status == 0 and result.out.count("adapter: ") in (2, 3)
    assert "128 positions" in result.err and "Traceback" not in result.err

    result = call("inspect", run)
    assert result.status == 0 and "q_proj" in result.out and "rank" in result.out


def test_json_output_is_single_object(call, flags, finished_run, tmp_path, rows_file):
    trained = call("train", *flags(tmp_path / "run"), "--json")
    output = json.loads(trained.out)
    assert output["output"] == str(tmp_path / "run") and output["rows"] == 9
    keys = "tokens steps seconds rows_per_second tokens_per_second train_loss peak_memory_bytes planned_memory_bytes"
    assert output.keys() >= set(keys.split())
    assert output["eval"].keys() == {"loss", "perplexity", "exact_match"}
    low, high = output["score"]["interval"]
    assert output["score"]["metric"] == "exact_match" and low <= output["score"]["value"] <= high
    assert "rows: 10 read" in trained.err

    output = json.loads(call("eval", finished_run, "--data", rows_file, "--limit", 3, "--with-base", "--json").out)
    assert output["rows"] == 3
    assert output["eval"].keys() == output["base"].keys() == {"loss", "perplexity", "exact_match"}
    assert output["eval"]["loss"] < output["base"]["loss"]

    output = json.loads(call("generate", finished_run, "-p", "a [b] :cat:", "--with-base", "--json").out)
    (completion,) = output["completions"]
    assert completion.keys() == {"prompt", "completion", "finish", "base", "base_finish"}
    assert completion["prompt"] == "a [b] :cat:"

    assert json.loads(call("inspect", finished_run, "--json").out)
    assert json.loads(call("inspect", finished_run, finished_run, "--json").out)["same_base"] is True
    assert "cosine" in call("inspect", finished_run, finished_run).out


def test_flags_override_settings_file(call, flags, settings, tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump(settings(tmp_path / "run", train={"epochs": 1, "learning_rate": 1e-3})))
    flags_list = ["--train.epochs", "2", "--lora.target_modules", "[q_proj, v_proj]", "--data.eval", "null"]
    assert call("train", file, *flags_list, "--train.learning_rate", "2e-3").status == 0
    stored = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())
    assert stored["train"].items() >= {"epochs": 2, "learning_rate": 2e-3, "batch_size": 3}.items()
    assert stored["lora"]["rank"] == 4 and stored["lora"]["target_modules"] == ["q_proj", "v_proj"]
    assert stored["data"]["eval"] is None


def test_fresh_moves_earlier_run_and_reproduces_it(call, settings, tmp_path, flags):
    run = tmp_path / "run"
    assert call("train", *flags(run)).status == 0
    before = tree(run)
    result = call("train", run / "run.yaml", "--fresh")
    assert result.status == 0 and f"moved to {tmp_path / 'run.1'}" in " ".join(result.out.split())
    assert tree(tmp_path / "run.1") == before
    for name in ("adapter_model.safetensors", "adapter_config.json", "run.yaml", "tokenizer.json"):
        assert (run / name).read_bytes() == before[name], name


def test_unusual_names_are_accepted_and_printed_unchanged(call, flags, rows_file, tmp_path, monkeypatch):
    odd_file = tmp_path / "a[bold]:cat:.jsonl"
    odd_file.write_bytes(rows_file.read_bytes())
    monkeypatch.chdir(tmp_path)
    for output in ("[red]run", "1e5"):
        result = call("train", *flags(output, data=odd_file))
        assert result.status == 0 and (tmp_path / output / "run.yaml").exists()
        assert f"rows: 10 read from {odd_file}" in result.out.replace("\n ", "") and f"adapter: {output}" in result.out
    for text in ("2024", "no", "null"):
        assert nested_settings({"setting_output": text}) == {"output": text}


def test_help_all_lists_every_setting(call):
    result = call("train", "--help-all", status=0)
    for setting in all_settings():
        assert f"--{setting.key}" in result.out
        assert setting.description
    for verb in ("eval", "generate", "chat", "inspect"):
        assert verb in call("--help").out
        assert call(verb, "--help").status == 0
    assert re.search(r"\d+\.\d+", call("--version").out)
