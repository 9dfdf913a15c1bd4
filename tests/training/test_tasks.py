"""Tasks register in one place: settings, flags, plans and runs follow."""

from __future__ import annotations

import json

import pytest

import deltaw
from deltaw import tasks
from deltaw.errors import UserError
from deltaw.settings import RunConfig
from deltaw.training.callbacks import Lines
from deltaw.training.origin import open_run
from tests.conftest import write_rows
from tests.training.toy_task import ENTRY, PreferenceTask

BUILT_IN = ("causal-lm", "preference", "sequence-classification", "regression", "image-classification")


@pytest.fixture
def toy():
    tasks.register(ENTRY)
    yield ENTRY
    tasks.unregister(ENTRY.name)


@pytest.fixture
def run_settings(settings, tmp_path):
    """Answers in capitals are preferred."""
    words = ("red", "blue", "green", "black", "white", "pink", "gray", "teal")
    rows = [{"prompt": f"say {w}: ", "chosen": w.upper(), "rejected": w.title()} for w in words]
    file = write_rows(tmp_path / "pairs.jsonl", rows)
    train = {"epochs": 8, "batch_size": 3}
    return lambda **changes: settings(
        tmp_path / "run", task="toy-preference", data={"train": str(file), "eval": 2}, train=train, **changes
    )


@pytest.mark.parametrize("method", ["lora", "prompt", "head"])
def test_a_task_in_a_file_of_its_own_trains_saves_and_is_opened_again(toy, run_settings, method):
    said = []
    result = deltaw.fit(run_settings(method=method), callback=Lines(said.append))
    assert result.plan is not None and result.outcome.rows == 8 * 6
    steps = [json.loads(line) for line in (result.output / "metrics.jsonl").read_text().splitlines()]
    losses = [step["loss"] for step in steps if "loss" in step]
    assert losses[-1] < losses[0]
    assert any("packing" in line and "shared prefixes" in line for line in said)
    assert result.evaluation.main == "preferred"

    opened = open_run(str(result.output), precision="fp32", device="cpu", say=lambda line: None)
    assert isinstance(opened.task, PreferenceTask)
    assert RunConfig.read(result.output / "run.yaml").task == "toy-preference"
    opened.require_generation()  # it writes text, as any language model does


def test_its_plan_is_made_and_the_settings_know_its_name(toy, run_settings):
    assert tasks.names() == (*BUILT_IN, "toy-preference")
    plan = deltaw.plan(run_settings())
    assert 0 < plan.trained_parameters < plan.total_parameters


def test_a_task_that_is_not_registered_is_refused(run_settings):
    for _ in range(2):
        with pytest.raises(UserError, match="'task' cannot be 'toy-preference'"):
            RunConfig.read(run_settings())
        tasks.register(ENTRY)
        assert RunConfig.read(run_settings()).task == "toy-preference"
        tasks.unregister(ENTRY.name)
    with pytest.raises(UserError, match="no task 'causal'"):
        tasks.entry_of("causal")
    with pytest.raises(ValueError, match="already"):
        tasks.register(tasks.entry_of("regression"))


def test_the_registry_needs_neither_torch_nor_transformers():
    import subprocess
    import sys

    script = (
        "import importlib.util, sys; spec = importlib.util.find_spec('deltaw'); "
        "sys.modules['deltaw'] = importlib.util.module_from_spec(spec); "  # its names are not imported
        "import deltaw.tasks; print(*({'torch', 'transformers', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "" and "causal-lm" in tasks.names()
