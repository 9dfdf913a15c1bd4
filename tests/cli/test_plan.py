"""`deltaw plan` on the command line: tables, JSON, pictures, budgets and invalid arguments."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from unittest.mock import Mock

import pytest
import yaml
from transformers import ViTConfig, ViTModel

from deltaw.memory.plan import KINDS, PHASES
from deltaw.reports.tables import gigabytes
from deltaw.settings import method_registry
from tests.cli.conftest import assert_refused

METHOD_FLAGS = ("--prompt.length", 4, "--random.weights", 0.05, "--last.blocks", 1)


@pytest.fixture
def settings_file(settings, tmp_path):
    """Return a settings file in a temporary folder."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings(tmp_path / "run")))
    return path


def test_json_and_picture_contain_plan_of_every_method(call, settings_file, tmp_path):
    picture = tmp_path / "new" / "plans.svg"
    result = call("plan", settings_file, *METHOD_FLAGS, "--json", "--picture", picture, status=0)
    output = json.loads(result.out)
    assert set(output) == set(method_registry.names()) and next(iter(output)) == "lora"
    for plan in output.values():
        assert set(plan["parts"]) == set(KINDS) and sum(plan["parts"].values()) == plan["peak_bytes"]
        assert sum(plan["resident"].values()) == plan["peak_resident_bytes"] > plan["peak_bytes"]
        assert plan["trained_parameters"] > 0 and plan["phase"] in PHASES
    assert len({output[m]["total_parameters"] for m in output}) == 1
    assert output["full"]["trained_parameters"] == output["full"]["total_parameters"]
    assert output["full"]["parts"]["optimizer"] > output["lora"]["parts"]["optimizer"]
    assert "planned" not in result.out and "\nneeds " in f"\n{result.err}"
    assert f"chart: {picture}" in result.err
    texts = [text.text for text in ElementTree.parse(picture).iter("{http://www.w3.org/2000/svg}text")]
    assert {*output, *(gigabytes(plan["peak_resident_bytes"]) for plan in output.values())} < set(texts)
    assert [p.name for p in tmp_path.rglob("*.*")] == ["run.yaml", "plans.svg"]


def test_table_lists_requested_methods_and_own_method(call, settings_file):
    result = call("plan", settings_file, "--methods", "head, bias,lora")
    assert result.status == 0 and result.err == ""
    assert "method lora: " in result.out and "interpreter, libraries, rows" in result.out
    listed_methods = [line.split()[0] for line in result.out.splitlines() if "%" in line and "method" not in line]
    assert listed_methods == ["lora", "head", "bias"]
    assert "…" not in result.out
    assert max(map(len, (line.rstrip() for line in result.out.splitlines()))) <= 80 + len(str(settings_file))

    single_plan = call("plan", settings_file).out
    assert "\nneeds " in f"\n{single_plan}" and ": fits\n" in single_plan and "head" not in single_plan
    assert "--methods all" in single_plan
    assert "10 read from" not in single_plan and "rows: 10 read from" in call("plan", settings_file, "--verbose").out
    assert max(map(len, single_plan.splitlines())) <= 80 + len(str(settings_file))

    output = json.loads(call("plan", settings_file, "--methods", "head", "--lora.rank", 8, "--json").out)
    default_output = json.loads(call("plan", settings_file, "--methods", "head", "--json").out)
    assert list(output) == ["lora", "head"]
    assert output["lora"]["trained_parameters"] == 2 * default_output["lora"]["trained_parameters"]
    assert output["head"]["trained_parameters"] == default_output["head"]["trained_parameters"]


def test_incompatible_method_is_skipped_unless_it_is_the_runs(call, tmp_path):
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    ViTModel(ViTConfig(image_size=8, patch_size=4, num_channels=1, **size)).save_pretrained(tmp_path / "vit")
    rows = (",".join(map(str, [*range(n, n + 64), n % 2])) for n in range(12))
    (tmp_path / "pixels.csv").write_text("\n".join(rows) + "\n")
    images = ["--model", tmp_path / "vit", "--data", tmp_path / "pixels.csv", "--precision", "fp32"]
    images += ["--task", "image-classification"]
    result = call("plan", *images, "--method", "head", "--methods", "prompt,bias", "--json")
    assert result.status == 0 and list(json.loads(result.out)) == ["head", "bias"]
    assert "prompt: " in result.err
    result = call("plan", *images, "--method", "prompt", "--methods", "head", "--json")
    assert_refused(result, "tokens", "method")


@pytest.mark.parametrize("flags", [[], ["--fit-memory", "6GB"]])
def test_failure_on_fake_tensors_is_reported(call, settings_file, monkeypatch, flags):
    for module in ("plan_run", "budget"):
        failing_plan = Mock(side_effect=RuntimeError("a kernel without a shape"))
        monkeypatch.setattr(f"deltaw.training.planning.{module}.plan_run", failing_plan)
    # The seed is unique because plans of other tests are cached.
    result = call("plan", settings_file, "--methods", "head", "--train.seed", "77", "--json", *flags)
    assert_refused(result, "a kernel without a shape", "hint:")


def test_invalid_flags_are_rejected_before_reading_rows(call, settings_file, monkeypatch):
    monkeypatch.setattr("deltaw.training.session.task_of", lambda *_, **__: pytest.fail("rows were read"))
    for flag, value, words in (
        ("--methods", "lora,hed", ["'hed'", "did you mean 'head'"]),
        ("--fit-memory", "much", ["'much'", "6GB"]),
        ("--picture", "plans.png", ["plans.png", "hint: charts are SVG files"]),
    ):
        result = call("plan", settings_file, flag, value, "--json")
        assert_refused(result, flag, *words)
        assert result.out == ""


def test_unknown_target_module_is_rejected(call, settings_file):
    assert_refused(call("plan", settings_file, "--lora.target_modules", "[nosuch]", "--json"), "nosuch")


def test_budget_lists_fitting_settings_fastest_first(call, settings_file, tmp_path):
    flags = ["--methods", "lora,head", "--json"]
    result = call("plan", settings_file, *flags, "--fit-memory", "900GB", status=0)
    output = json.loads(result.out)
    assert output["budget_bytes"] == 900 * 10**9
    assert {s["method"] for s in output["settings"]} == {"lora", "head"}
    assert all(s["peak_resident_bytes"] <= output["budget_bytes"] for s in output["settings"])
    seconds = [s["estimated_seconds_per_step"] for s in output["settings"]]
    assert seconds == sorted(seconds)
    assert "tokens per pass" in result.err and "1.00 x" in result.err
    assert [p.name for p in tmp_path.iterdir()] == ["run.yaml"]


def test_error_for_small_budget_names_minimum(call, settings_file):
    result = call("plan", settings_file, "--method", "head", "--methods", "head", "--fit-memory", "1MB", "--json")
    assert_refused(result, "1,000,000 bytes", "the minimum is", "--fit-memory", "hint:")


@pytest.mark.timed
def test_time_is_printed_and_in_json(call, settings_file):
    first = call("plan", settings_file, "--train.seed", 5, status=0)
    assert "takes about " in first.out and "per step" in first.out
    flags = ["--train.seed", 5, "--methods", "lora", "--json"]
    output = json.loads(call("plan", settings_file, *flags, status=0).out)["lora"]
    assert output["seconds"] > 0 and output["seconds_per_step"] > 0
    assert sum(output["seconds_by_phase"].values()) == pytest.approx(output["seconds"])
    longer = json.loads(call("plan", settings_file, *flags, "--train.epochs", 40, status=0).out)["lora"]
    assert longer["seconds_by_phase"]["training"] > 20 * output["seconds_by_phase"]["training"]


@pytest.mark.timed
def test_time_budget_lists_rows_and_epochs_that_fit(call, settings_file):
    flags = ["--fit-time", "100 days", "--train.epochs", 2, "--json"]
    result = call("plan", settings_file, *flags, status=0)
    output = json.loads(result.out)
    assert output["budget_seconds"] == 100 * 86400
    assert [(s["epochs"], s["rows"], s["precision"]) for s in output["settings"]] == [(2, None, "fp32")]
    assert "data.rows" in result.err
    assert_refused(call("plan", settings_file, "--fit-time", "0.1s"), "--fit-time", "no settings fit", "hint:")
    assert_refused(call("plan", settings_file, "--fit-time", "soon"), "'soon'", "30min")


def test_output_folder_with_finished_run_is_accepted(call, finished_run):
    settings = ("--output", finished_run, "--lora.rank", 3, "--precision", "fp32")
    for _ in range(2):  # the second plan is cached
        assert "lora" in call("plan", finished_run / "run.yaml", *settings, status=0).out
