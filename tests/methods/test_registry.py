"""Methods register in one place: settings, flags, plans, searches and saved adapters follow."""

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
from deltaw.errors import UserError
from deltaw.experiments.compare import check_methods
from deltaw.experiments.folder import settings_of
from deltaw.experiments.tune import Range, Values, default_space
from deltaw.methods import registry
from deltaw.methods.registry import MethodEntry
from deltaw.settings import RunConfig
from deltaw.settings import settings as all_settings
from deltaw.training.origin import open_run, score_run
from deltaw.training.planning.asked import chosen_methods
from tests.methods.toy_method import ENTRY, Norms

ADAPTER = "adapter_model.safetensors"
BUILT_IN = ("lora", "head", "input", "prompt", "bias", "random", "last", "full")


@pytest.fixture
def toy() -> Iterator[MethodEntry]:
    """The toy method, for one test."""
    registry.register(ENTRY)
    yield ENTRY
    registry.unregister(ENTRY.name)


def test_a_method_in_a_file_of_its_own_trains_saves_and_is_opened_again(toy, settings, tmp_path):
    made = settings(tmp_path / "run", method="norms", norms={"above": 1}, train={"epochs": 3})
    before = AutoModelForCausalLM.from_pretrained(made["model"], dtype=torch.float32).state_dict()
    result = deltaw.fit(made)
    trained = {f"model.layers.1.{name}.weight" for name in ("input_layernorm", "post_attention_layernorm")}
    saved = load_file(result.output / ADAPTER)
    assert saved.keys() == trained
    assert not any(torch.equal(tensor, before[name]) for name, tensor in saved.items())
    assert result.plan is not None and result.trained_parameters == sum(t.numel() for t in saved.values())

    opened = open_run(str(result.output), precision="fp32", device="cpu", say=lambda line: None)
    assert isinstance(opened.method, Norms)
    after = opened.model.state_dict()
    assert {name for name in after if not torch.equal(after[name], before[name])} == trained
    rows = opened.task.read(opened.config.data, seed=opened.config.train.seed).held_out
    again = score_run(opened, rows).evaluation.metrics
    assert again["loss"] == pytest.approx(result.evaluation.metrics["loss"], rel=1e-5)
    assert RunConfig.read(result.output / "run.yaml").norms == ENTRY.settings(above=1)


def test_plans_flags_searches_and_comparisons_know_it(toy, settings, tmp_path):
    config = RunConfig.read(settings(tmp_path / "run", method="norms"), {"norms": {"above": 1}})
    plan = deltaw.plan(config)
    assert plan.method == "norms" and 0 < plan.trained_parameters < plan.total_parameters / 10
    assert chosen_methods("all", "lora") == [*BUILT_IN, "norms"]
    space = {"train.learning_rate": Range(2e-4, 2e-2, log=True), "norms.above": Values((0, 1))}
    assert default_space(config, 2e-3) == space
    keys = [setting.key for setting in all_settings()]
    assert keys.index("last.blocks") < keys.index("norms.above") < keys.index("train.learning_rate")
    assert "norms" in registry.compared_names() and check_methods(["norms"]) == ["norms"]
    flat = settings_of(config)
    assert flat["norms.above"] == 1 and not any(key.startswith("lora.") for key in flat)
    command = settings_flags(click.command()(lambda **given: None))
    flag = next(option for option in command.params if "--norms.above" in option.opts)
    assert flag.record({"norms.above": "INTEGER"}, every=True) == (
        "--norms.above INTEGER",
        "the lowest block whose norms are trained  [default: 0]",
    )


def test_its_mistakes_are_explained_like_those_of_any_method(toy, settings, tmp_path):
    for section, says in (
        ({"above": -1}, r"norms\.above is -1"),
        ({"abov": 1}, r"did you mean 'norms\.above'"),
        (3, "a section of keys and values"),
    ):
        with pytest.raises(UserError, match=says):
            RunConfig.read(settings(tmp_path, method="norms", norms=section))


def test_a_method_that_is_not_registered_any_more_is_refused(settings, tmp_path):
    for _ in range(2):  # what was undone can be done again
        registry.register(ENTRY)
        read = RunConfig.read(settings(tmp_path / "run", method="norms", train={"max_steps": 2}))
        registry.unregister(ENTRY.name)
        with pytest.raises(UserError, match="'method' cannot be 'norms'"):
            RunConfig.read(settings(tmp_path, method="norms"))
        with pytest.raises(UserError, match="unknown key 'norms'"):
            RunConfig.read(settings(tmp_path, norms={"above": 1}))
        with pytest.raises(UserError, match="there is no method 'norms'"):
            deltaw.fit(read)
    assert registry.names() == BUILT_IN


@pytest.mark.parametrize("name", ["lora", "train", "data", "model_dump", "two words", "class"])
def test_a_name_that_is_taken_is_refused_and_changes_nothing(name):
    keys = [setting.key for setting in all_settings()]
    with pytest.raises(ValueError, match=f"'{name}'"):
        registry.register(MethodEntry(name, Norms))
    assert registry.names() == BUILT_IN and [setting.key for setting in all_settings()] == keys


@pytest.mark.parametrize("entry", registry.entries(), ids=lambda entry: entry.name)
def test_built_in_methods_carry_the_name_that_they_are_registered_by(entry):
    made = entry.load().from_run(None, train=None, tokenizer=None)
    assert made.name == entry.name and made.usual_rate > 0


def test_settings_are_read_without_the_code_of_any_method(tmp_path: Path):
    """What a method trains is imported when the method is chosen."""
    code = (
        "import sys; import deltaw.settings; "
        "loaded = [m for m in sys.modules if m.startswith('deltaw.methods.')]; "
        "sys.exit(str(loaded) if set(loaded) - {'deltaw.methods.settings', 'deltaw.methods.registry'} else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
