"""A registered method appears in settings, flags, plans, searches and saved adapters."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import deltaw
from deltaw.cli.options import settings_flags
from deltaw.experiments.compare import check_methods
from deltaw.experiments.folder import result_settings
from deltaw.experiments.search_space import CategoricalValues, Range, default_space
from deltaw.inference.open_run import open_run
from deltaw.settings import method_registry
from deltaw.settings.config import RunConfig
from deltaw.settings.config import settings as all_settings
from deltaw.settings.method_registry import MethodEntry
from deltaw.training.planning.plan_arguments import parse_methods
from tests.conftest import refusal
from tests.methods.toy_method import ENTRY, Norms

ADAPTER = "adapter_model.safetensors"
BUILT_IN = ("lora", "head", "input", "prompt", "bias", "random", "last", "full")


@pytest.fixture
def toy() -> Iterator[MethodEntry]:
    """Register the toy method for one test."""
    method_registry.register(ENTRY)
    yield ENTRY
    method_registry.unregister(ENTRY.name)


def test_external_method_trains_saves_and_reopens(toy, settings, tmp_path):
    config = settings(tmp_path / "run", method="norms", norms={"above": 1}, train={"epochs": 2})
    before = AutoModelForCausalLM.from_pretrained(config["model"], dtype=torch.float32).state_dict()
    result = deltaw.fit(config)
    trained = {f"model.layers.1.{name}.weight" for name in ("input_layernorm", "post_attention_layernorm")}
    saved = load_file(result.output / ADAPTER)
    assert saved.keys() == trained and not any(torch.equal(tensor, before[name]) for name, tensor in saved.items())
    assert result.plan is not None and result.trained_parameters == sum(t.numel() for t in saved.values())

    opened = open_run(str(result.output), precision="fp32", device="cpu", log=lambda line: None)
    assert isinstance(opened.method, Norms)
    after = opened.model.state_dict()
    assert {name for name in after if not torch.equal(after[name], before[name])} == trained
    rows = opened.task.read(opened.config.data, seed=opened.config.train.seed).held_out
    metrics = opened.score(rows).evaluation.metrics
    assert metrics["loss"] == pytest.approx(result.evaluation.metrics["loss"], rel=1e-5)
    assert RunConfig.read(result.output / "run.yaml").norms == ENTRY.settings(above=1)


def test_external_method_appears_in_plans_flags_and_searches(toy, settings, tmp_path):
    config = RunConfig.read(settings(tmp_path / "run", method="norms"), {"norms": {"above": 1}})
    plan = deltaw.plan(config)
    assert plan.method == "norms" and 0 < plan.trained_parameters < plan.total_parameters / 10
    assert parse_methods("all", "lora") == [*BUILT_IN, "norms"]
    space = {"train.learning_rate": Range(2e-4, 2e-2, log=True), "norms.above": CategoricalValues((0, 1))}
    assert default_space(config, 2e-3) == space
    keys = [setting.key for setting in all_settings()]
    assert keys.index("last.blocks") < keys.index("norms.above") < keys.index("train.learning_rate")
    assert "norms" in method_registry.compared_names() and check_methods(["norms"]) == ["norms"]
    flat = result_settings(config)
    assert flat["norms.above"] == 1 and not any(key.startswith("lora.") for key in flat)
    command = settings_flags(click.command()(lambda **options: None))
    flag = next(option for option in command.params if "--norms.above" in option.opts)
    description = "the lowest block whose norms are trained  [default: 0]"
    assert flag.record({"norms.above": "INTEGER"}, show_all=True) == ("--norms.above INTEGER", description)


def test_invalid_settings_of_external_method_are_reported(toy, settings, tmp_path):
    for section, message in (
        ({"above": -1}, r"norms\.above is -1"),
        ({"abov": 1}, r"did you mean 'norms\.above'"),
        (3, "a section of keys and values"),
    ):
        refusal(RunConfig.read, settings(tmp_path, method="norms", norms=section), match=message)


def test_unregistered_method_is_rejected(settings, tmp_path):
    for _ in range(2):  # registering again after unregistering works
        method_registry.register(ENTRY)
        read = RunConfig.read(settings(tmp_path / "run", method="norms", train={"max_steps": 2}))
        method_registry.unregister(ENTRY.name)
        refusal(RunConfig.read, settings(tmp_path, method="norms"), match="'method' cannot be 'norms'")
        refusal(RunConfig.read, settings(tmp_path, norms={"above": 1}), match="unknown key 'norms'")
        refusal(deltaw.fit, read, match="unknown method 'norms'")
    assert method_registry.names() == BUILT_IN


@pytest.mark.parametrize("name", ["lora", "train", "data", "model_dump", "two words", "class"])
def test_registering_reserved_name_raises_without_changes(name):
    keys = [setting.key for setting in all_settings()]
    with pytest.raises(ValueError, match=f"'{name}'"):
        method_registry.register(MethodEntry(name, Norms))
    assert method_registry.names() == BUILT_IN and [setting.key for setting in all_settings()] == keys


@pytest.mark.parametrize("entry", method_registry.entries(), ids=lambda entry: entry.name)
def test_built_in_method_names_match_registry(entry):
    method = entry.load().from_run(None, train=None, tokenizer=None)
    assert method.name == entry.name and method.default_learning_rate > 0


def test_reading_settings_imports_no_method_code(tmp_path: Path):
    """The implementation of a method is imported only if the method is selected."""
    code = (
        "import sys; import deltaw.settings.config; "
        "loaded = [m for m in sys.modules if m.startswith('deltaw.methods.')]; "
        "sys.exit(str(loaded) if set(loaded) - {'deltaw.methods.settings', 'deltaw.settings.method_registry'} else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
