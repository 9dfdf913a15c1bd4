"""`deltaw plan` from the command line: tables, one JSON object, pictures, budgets, refusals."""

from __future__ import annotations

import json
from unittest.mock import Mock

import pytest
import yaml
from PIL import Image
from transformers import ViTConfig, ViTModel

from deltaw.memory.plan import KINDS, PHASES
from deltaw.methods import registry
from tests.cli.conftest import assert_refused

SMALL = ("--prompt.length", 4, "--random.weights", 0.05, "--last.blocks", 1)


@pytest.fixture
def file(settings, tmp_path):
    """A file of settings; its folder is the test's own."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings(tmp_path / "run")))
    return path


def test_one_object_and_one_picture_hold_the_plan_of_every_method(call, file, tmp_path):
    picture = tmp_path / "new" / "plans.png"
    ended = call("plan", file, *SMALL, "--json", "--picture", picture, status=0)
    told = json.loads(ended.out)
    assert set(told) == set(registry.names()) and next(iter(told)) == "lora"
    for plan in told.values():
        assert set(plan["parts"]) == set(KINDS) and sum(plan["parts"].values()) == plan["peak_bytes"]
        assert sum(plan["resident"].values()) == plan["peak_resident_bytes"] > plan["peak_bytes"]
        assert plan["trained_parameters"] > 0 and plan["phase"] in PHASES
    assert len({told[m]["total_parameters"] for m in told}) == 1
    assert told["full"]["trained_parameters"] == told["full"]["total_parameters"]
    assert told["full"]["parts"]["optimizer"] > told["lora"]["parts"]["optimizer"]
    assert "planned" not in ended.out and "\nneeds " in f"\n{ended.err}"
    assert f"drawn to {picture}" in ended.err
    with Image.open(picture) as image:
        assert image.format == "PNG"
    assert [p.name for p in tmp_path.rglob("*.*")] == ["run.yaml", "plans.png"]


def test_the_table_names_the_methods_asked_for_beside_the_runs_own(call, file):
    ended = call("plan", file, "--methods", "head, bias,lora")
    assert ended.status == 0 and ended.err == ""
    assert "method lora: " in ended.out and "interpreter, libraries, rows" in ended.out
    named = [line.split()[0] for line in ended.out.splitlines() if "%" in line and "method" not in line]
    assert named == ["lora", "head", "bias"]
    assert "…" not in ended.out
    assert max(map(len, (line.rstrip() for line in ended.out.splitlines()))) <= 80 + len(str(file))

    alone = call("plan", file).out
    assert "\nneeds " in f"\n{alone}" and ": fits\n" in alone and "head" not in alone and "--methods all" in alone
    assert "10 read from" not in alone and "rows: 10 read from" in call("plan", file, "--verbose").out
    assert max(map(len, alone.splitlines())) <= 80 + len(str(file))

    told = json.loads(call("plan", file, "--methods", "head", "--lora.rank", 8, "--json").out)
    less = json.loads(call("plan", file, "--methods", "head", "--json").out)
    assert list(told) == ["lora", "head"]
    assert told["lora"]["trained_parameters"] == 2 * less["lora"]["trained_parameters"]
    assert told["head"]["trained_parameters"] == less["head"]["trained_parameters"]


def test_a_method_that_does_not_fit_is_named_and_left_out_unless_it_is_the_runs_own(call, tmp_path):
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    ViTModel(ViTConfig(image_size=8, patch_size=4, num_channels=1, **size)).save_pretrained(tmp_path / "vit")
    rows = (",".join(map(str, [*range(n, n + 64), n % 2])) for n in range(12))
    (tmp_path / "pixels.csv").write_text("\n".join(rows) + "\n")
    images = ["--model", tmp_path / "vit", "--data", tmp_path / "pixels.csv", "--precision", "fp32"]
    images += ["--task", "image-classification"]
    ended = call("plan", *images, "--method", "head", "--methods", "prompt,bias", "--json")
    assert ended.status == 0 and list(json.loads(ended.out)) == ["head", "bias"]
    assert "prompt: " in ended.err
    ended = call("plan", *images, "--method", "prompt", "--methods", "head", "--json")
    assert_refused(ended, "tokens", "method")


@pytest.mark.parametrize("flags", [[], ["--budget", "6GB"]])
def test_a_model_that_cannot_be_run_on_fake_tensors_is_told_of(call, file, monkeypatch, flags):
    for module in ("plan_run", "budget"):
        cannot = Mock(side_effect=RuntimeError("a kernel without a shape"))
        monkeypatch.setattr(f"deltaw.training.planning.{module}.plan_run", cannot)
    # A seed of its own: a plan that another test made would be remembered.
    ended = call("plan", file, "--methods", "head", "--train.seed", "77", "--json", *flags)
    assert_refused(ended, "a kernel without a shape", "hint:")


def test_what_cannot_be_used_is_refused_before_rows_are_read(call, file, monkeypatch):
    monkeypatch.setattr("deltaw.training.session.task_of", lambda *_, **__: pytest.fail("rows were read"))
    for flag, value, words in (
        ("--methods", "lora,hed", ["'hed'", "did you mean 'head'"]),
        ("--budget", "much", ["'much'", "6GB"]),
        ("--picture", "plans.xyz", ["plans.xyz", ".png"]),
    ):
        ended = call("plan", file, flag, value, "--json")
        assert_refused(ended, flag, *words)
        assert ended.out == ""


def test_a_target_that_the_model_does_not_have_is_refused(call, file):
    assert_refused(call("plan", file, "--lora.target_modules", "[nosuch]", "--json"), "nosuch")


def test_a_budget_gives_settings_within_it_the_fastest_first(call, file, tmp_path):
    flags = ["--methods", "lora,head", "--json"]
    ended = call("plan", file, *flags, "--budget", "900GB", status=0)
    told = json.loads(ended.out)
    assert told["budget_bytes"] == 900 * 10**9
    assert {s["method"] for s in told["settings"]} == {"lora", "head"}
    assert all(s["peak_resident_bytes"] <= told["budget_bytes"] for s in told["settings"])
    seconds = [s["estimated_seconds_per_step"] for s in told["settings"]]
    assert seconds == sorted(seconds)
    assert "tokens per pass" in ended.err and "1.00 x" in ended.err
    assert [p.name for p in tmp_path.iterdir()] == ["run.yaml"]


def test_a_budget_that_nothing_fits_says_what_the_least_would_take(call, file):
    ended = call("plan", file, "--method", "head", "--methods", "head", "--budget", "1MB", "--json")
    assert_refused(ended, "1,000,000 bytes", "the least needs", "--budget", "hint:")
