"""Fixtures for tests of whole runs: a tiny model in a folder, rows in a file, and a finished run.

No test uses the network or the user's cache, or measures the machine: what is chosen by measuring is the same
on every machine that has it. Tests of measuring ask for it themselves. Nothing is flushed to the disk, and runs of
one kind share a plan, unless a test is marked ``planned``: most of a tiny run's time would go there.
"""

from __future__ import annotations

import copy
import gc
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from deltaw.memory.plan import Plan
from deltaw.settings import RunConfig
from deltaw.training.planning.plan_run import plan_run
from deltaw.training.tasks.base import RunData, Task
from tests.byte_models import saved, tiny_gpt2, tiny_llama

# The same examples and random numbers in every run: what fails once fails again.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

Settings = Callable[..., dict]
# GFLOP/s by stored type and arithmetic: each variant's own arithmetic wins, and bf16 is no slower than fp32.
RATES = {
    "fp32": {"dot": 200.0, "torch": 100.0},
    "bf16": {"dot": 200.0, "tiles": 150.0, "wide": 120.0, "torch": 90.0},
    "int8": {"dot": 800.0, "tiles": 700.0, "torch": 50.0},
}
# Threads of runs in tests; `make test-variants` repeats all with two.
THREADS = int(os.environ.get("DELTAW_TEST_THREADS", "1"))
COLORS = ("red", "blue", "green", "black", "white", "pink", "gray", "teal", "cyan", "gold")


@pytest.hookimpl(tryfirst=True)  # before slow tests are deselected
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what the quick set leaves out of products of parameters."""
    for marker, together in (("each_value", 1), ("each_pair", 2)):
        products: dict[str, list[pytest.Function]] = {}
        for item in items:
            marked = isinstance(item, pytest.Function) and item.get_closest_marker(marker)
            if marked and not item.get_closest_marker("slow"):
                products.setdefault(item.nodeid.partition("[")[0], []).append(item)
        for members in products.values():
            for item in set(members) - set(covering(members, together)):
                item.add_marker(pytest.mark.slow)


def covering(members: Sequence[pytest.Function], together: int) -> list[pytest.Function]:
    """Few of a test's members that have all values of its parameters, or all pairs of them; chosen greedily."""
    has = {}
    for item in members:
        # Not its indices: since pytest 9 they count parameter sets, so that no two members have one in common.
        values = list(enumerate(item.callspec._idlist))
        has[item] = set(itertools.combinations(values, min(together, len(values))))
    missing, chosen = set().union(*has.values()), []
    while missing:
        best = max(members, key=lambda item: len(has[item] & missing))
        chosen.append(best)
        missing -= has[best]
    return chosen


_PLANS: dict[tuple[object, ...], Plan] = {}


def shared_plan(config: RunConfig, task: Task, data: RunData, *, processes: int = 1) -> Plan:
    """The plan of the first run with this model, task, method and precision."""
    key = (config.model, config.task, config.method, config.precision, processes)
    if config.memory is not None or key not in _PLANS:
        _PLANS[key] = plan_run(config, task, data, processes=processes)
    return _PLANS[key]


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Isolate tests from the user's cache, the network and the machine's rates, and use one thread; runs that
    several tests share are made like that too."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("DELTAW_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setenv("OMP_NUM_THREADS", str(THREADS))
        monkeypatch.setenv("DELTAW_MEASURED", json.dumps({"*": RATES}))
        monkeypatch.setattr("deltaw.runs.fit.plan_run", shared_plan)
        monkeypatch.setattr(os, "fsync", lambda handle: None)
        # A run collects garbage, and would walk through all the objects of torch and of pytest each time.
        gc.collect()
        gc.freeze()
        yield


@pytest.fixture(autouse=True)
def _own_plans(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("planned"):
        monkeypatch.setattr("deltaw.runs.fit.plan_run", plan_run)


@pytest.fixture(autouse=True)
def _own_random_numbers() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained Llama of two blocks with a byte-level tokenizer and a ChatML template."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    return saved(tiny_llama(initializer_range=0.3), folder)


@pytest.fixture(scope="session")
def roomy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with positions enough for general prompts in bytes."""
    folder = tmp_path_factory.mktemp("base") / "roomy"
    return saved(tiny_llama(initializer_range=0.3, max_position_embeddings=512), folder)


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2, whose layers have biases and another layout, and whose head is its embedding."""
    return saved(tiny_gpt2(), tmp_path_factory.mktemp("base") / "gpt2")


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten questions with a shared prefix, each with its answer."""
    path = tmp_path_factory.mktemp("rows") / "colors.jsonl"
    write_rows(path, ({"prompt": f"paint it {c}", "completion": c[0]} for c in COLORS))
    return path


def write_rows(path: Path, rows: Iterable[Mapping[str, object]]) -> Path:
    """Write rows as JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def laid_over(below: Mapping[str, object], above: Mapping[str, object]) -> dict:
    """``below``, with the sections and values of ``above`` merged into it."""
    merged = copy.deepcopy(dict(below))
    for key, value in above.items():
        known = merged.get(key)
        both = isinstance(value, Mapping) and isinstance(known, Mapping)
        merged[key] = laid_over(known, value) if both else value  # type: ignore[arg-type]
    return merged


@pytest.fixture(scope="session")
def settings(model_folder: Path, rows_file: Path) -> Settings:
    """Settings of a short run in fp32; arguments override them."""

    def make(output: Path, **changes: object) -> dict:
        plain = {
            "model": str(model_folder),
            "data": {"train": str(rows_file), "eval": 2},
            "lora": {"rank": 4, "alpha": 8},
            "train": {"learning_rate": 1e-2, "batch_size": 3, "epochs": 1},
            "precision": "fp32",
            "device": "cpu",
            "threads": THREADS,
            "output": str(output),
        }
        return laid_over(plain, changes)

    return make


@pytest.fixture(scope="session")
def finished_run(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run. Tests that change it copy it first."""
    from deltaw.runs.fit import fit

    return fit(settings(tmp_path_factory.mktemp("runs") / "done", train={"epochs": 4})).output
