"""The verbs at work on a tiny model: what they print where, and what they leave."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import yaml

from deltaw.cli.options import nested
from deltaw.settings import settings as all_settings
from tests.cli.conftest import tree


def in_a_fresh_interpreter(*arguments, stdin=""):
    command = [sys.executable, "-m", "deltaw", *map(str, arguments)]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_from_training_to_talk(call, flags, tmp_path, rows_file):
    run = tmp_path / "run"
    ended = call("train", *flags(run, train__epochs=2))
    assert ended.status == 0 and ended.err == ""
    assert "training loss" in ended.out and f"deltaw chat {run}" in ended.out

    ended = call("eval", run, "--base", "--answers", 1, status=0)
    assert "perplexity" in ended.out and "exact match" in ended.out and "paint it" in ended.out

    ended = call("generate", run, "--base", "--max-new-tokens", 2, stdin="paint it red\n\npaint it blue\n")
    assert ended.status == 0 and ended.out.count("base:") == ended.out.count("adapter:") == 2
    assert ended.err == "" and "adapted" in call("generate", run, "-v", "-p", "paint it red").err

    talk = f"hello\n{'x' * 300}\n/new\nhello again\n\nnever read\n"  # what is too long is taken back
    ended = call("chat", run, "--max-new-tokens", 3, stdin=talk)
    assert ended.status == 0 and ended.out.count("adapter: ") in (2, 3)
    assert "128 positions" in ended.err and "Traceback" not in ended.err

    ended = call("inspect", run)
    assert ended.status == 0 and "q_proj" in ended.out and "rank" in ended.out


def test_json_is_one_object_on_standard_output(call, flags, finished_run, tmp_path, rows_file):
    done = call("train", *flags(tmp_path / "run"), "--json")
    told = json.loads(done.out)
    assert told["output"] == str(tmp_path / "run") and told["rows"] == 9
    keys = "tokens steps seconds rows_per_second tokens_per_second train_loss peak_memory_bytes planned_memory_bytes"
    assert told.keys() >= set(keys.split())
    assert told["eval"].keys() == {"loss", "perplexity", "exact_match"}
    low, high = told["score"]["interval"]
    assert told["score"]["metric"] == "exact_match" and low <= told["score"]["value"] <= high
    assert "rows: 10 read" in done.err

    told = json.loads(call("eval", finished_run, "--data", rows_file, "--rows", 3, "--base", "--json").out)
    assert told["rows"] == 3
    assert told["eval"].keys() == told["base"].keys() == {"loss", "perplexity", "exact_match"}
    assert told["eval"]["loss"] < told["base"]["loss"]

    told = json.loads(call("generate", finished_run, "-p", "a [b] :cat:", "--base", "--json").out)
    (completion,) = told["completions"]
    assert completion.keys() == {"prompt", "completion", "finish", "base", "base_finish"}
    assert completion["prompt"] == "a [b] :cat:"

    assert json.loads(call("inspect", finished_run, "--json").out)
    assert json.loads(call("inspect", finished_run, finished_run, "--json").out)["same_base"] is True
    assert "cosine" in call("inspect", finished_run, finished_run).out


def test_flags_stand_above_the_file(call, flags, settings, tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump(settings(tmp_path / "run", train={"epochs": 1, "learning_rate": 1e-3})))
    given = ["--train.epochs", "2", "--lora.target_modules", "[q_proj, v_proj]", "--data.eval", "null"]
    assert call("train", file, *given, "--train.learning_rate", "2e-3").status == 0
    written = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())
    assert written["train"].items() >= {"epochs": 2, "learning_rate": 2e-3, "batch_size": 3}.items()
    assert written["lora"]["rank"] == 4 and written["lora"]["target_modules"] == ["q_proj", "v_proj"]
    assert written["data"]["eval"] is None


def test_a_runs_own_settings_train_it_again_and_the_earlier_run_is_kept(call, settings, tmp_path, flags):
    run = tmp_path / "run"
    assert call("train", *flags(run)).status == 0
    before = tree(run)
    ended = call("train", run / "run.yaml", "--fresh")
    assert ended.status == 0 and f"is now in {tmp_path / 'run.1'}" in " ".join(ended.out.split())
    assert tree(tmp_path / "run.1") == before
    for name in ("adapter_model.safetensors", "adapter_config.json", "run.yaml", "tokenizer.json"):
        assert (run / name).read_bytes() == before[name], name


def test_odd_names_are_taken_and_printed_as_they_are(call, flags, rows_file, tmp_path, monkeypatch):
    odd = tmp_path / "a[bold]:cat:.jsonl"
    odd.write_bytes(rows_file.read_bytes())
    monkeypatch.chdir(tmp_path)
    for output in ("[red]run", "1e5"):
        ended = call("train", *flags(output, data=odd))
        assert ended.status == 0 and (tmp_path / output / "run.yaml").exists()
        assert f"rows: 10 read from {odd}" in ended.out.replace("\n ", "") and f"adapter: {output}" in ended.out
    for text in ("2024", "no", "null"):
        assert nested({"setting_output": text}) == {"output": text}


def test_help_names_every_setting_with_its_default(call):
    ended = call("train", "--help-all", status=0)
    for setting in all_settings():
        assert f"--{setting.key}" in ended.out
        assert setting.description
    for verb in ("eval", "generate", "chat", "inspect"):
        assert verb in call("--help").out
        assert call(verb, "--help").status == 0
    assert re.search(r"\d+\.\d+", call("--version").out)


def test_a_process_of_its_own_prints_nothing_but_its_own_lines(flags, tmp_path):
    """Streams as a shell sees them: no advice, progress bars or warnings of the libraries below."""
    asked = flags(tmp_path / "run", train__checkpointing="true")
    out, err = in_a_fresh_interpreter("train", *asked, "--json")
    json.loads(out)
    lines = [line for line in err.splitlines() if not line.startswith("still ")]
    first = lines[: next(number for number, line in enumerate(lines) if line.startswith("step 1/2"))]
    header = ("rows:", "memory:", "precision: fp32", "steps:", "output:")  # a long path stands alone
    warnings = ("1 held-out row is few", "2 steps are few", "precision: int8 would take about", "compiled kernels")
    assert sum(line.startswith(header) for line in first) == 5, first
    assert all(line.startswith((*header, *warnings, "  ")) for line in first)
    known = (
        *(*header, *warnings, "step 1/2", "step 2/2", "training: 9 rows, 2 steps in ", "training loss", "held-out "),
        *("time: ", "drift: ", "adapter:", "report:", "next:", "  "),
    )
    assert [line for line in lines if not line.startswith(known)] == []
    assert [line for line in lines if len(line) > 80 and str(tmp_path) not in line] == []

    _, err = in_a_fresh_interpreter("train", "-v", *asked, "--fresh", "--json")
    told = " ".join(err.split())
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    for name in ("device: cpu", "threads: 1", "attention: sdpa", "kernels: ", "blocks: ", "14 adapted", "read as"):
        assert name in told and name not in " ".join(first)
    kept = [*record["notes"], *record["data"]["lines"]]
    kept += [f"{name}: {choice['value']} ({choice['why']})" for name, choice in record["chosen"].items()]
    assert [line for line in kept if " ".join(line.split()) not in told] == []
    written = (tmp_path / "run" / "run.yaml").read_text()
    assert all(f"# {record['chosen'][name]['value']}" in written for name in ("device", "precision", "threads"))
    assert "# kernels: " in written and "# attention: " in written


@pytest.mark.slow
def test_texts_from_a_process_of_its_own_come_without_warnings(finished_run):
    out, err = in_a_fresh_interpreter("generate", finished_run, "--max-new-tokens", "2", stdin="paint it red\n")
    assert err == "" and out
