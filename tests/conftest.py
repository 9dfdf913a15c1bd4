"""Fixtures for tests of complete runs: a tiny model in a folder, rows in a file, and a finished run.

No test uses the network, the user's cache or measured rates of this machine. Choices based on measurements are
therefore equal on all machines with the same features. Tests of the measurements opt in explicitly. To save time, files
are not flushed to disk, and runs with equal settings share a plan unless a test is marked ``planned``.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from time import perf_counter

import pytest
import torch
from hypothesis import settings

from deltaw.data.row_reader import RunData
from deltaw.errors import UserError
from deltaw.memory.plan import Plan
from deltaw.settings.config import RunConfig
from deltaw.training.planning.plan_run import plan_run, with_time
from deltaw.training.planning.run_time import plan_with_cached_time
from deltaw.training.task import Task
from tests.byte_models import save_model, tiny_gpt2, tiny_llama

# Deterministic examples make failures reproducible.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

Settings = Callable[..., dict]
# GFLOP/s by stored type and arithmetic. The native arithmetic of each variant is the fastest, and bf16 is no slower
# than fp32.
RATES = {"fp32": {"dot": 200.0, "torch": 100.0}, "bf16": {"dot": 200.0, "tiles": 150.0, "wide": 120.0, "torch": 90.0}}
RATES |= {"int8": {"dot": 800.0, "tiles": 700.0, "torch": 50.0}}
# Threads of runs in tests. `make test-variants` repeats all tests with two.
THREADS = int(os.environ.get("DELTAW_TEST_THREADS", "1"))
COLORS = ("red", "blue", "green", "black", "white", "pink", "gray", "teal", "cyan", "gold")


@pytest.hookimpl(tryfirst=True)  # before slow tests are deselected
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark parameter combinations as slow that the quick set does not need."""
    for marker, together in (("each_value", 1), ("each_pair", 2)):
        products: dict[str, list[pytest.Function]] = {}
        for item in items:
            marked = isinstance(item, pytest.Function) and item.get_closest_marker(marker)
            if marked and not item.get_closest_marker("slow"):
                products.setdefault(item.nodeid.partition("[")[0], []).append(item)
        for members in products.values():
            for item in set(members) - set(select_covering(members, together)):
                item.add_marker(pytest.mark.slow)


def select_covering(members: Sequence[pytest.Function], together: int) -> list[pytest.Function]:
    """Greedily select members that together cover all values of the parameters, or all combinations of ``together``
    values.
    """
    covered_by = {}
    for item in members:
        # Since pytest 9, callspec.indices counts parameter sets and never repeats, so the ids are used.
        values = list(enumerate(item.callspec._idlist))
        covered_by[item] = set(itertools.combinations(values, min(together, len(values))))
    missing = set().union(*covered_by.values())
    selected = []
    while missing:
        best = max(members, key=lambda item: len(covered_by[item] & missing))
        selected.append(best)
        missing -= covered_by[best]
    return selected


_PLANS: dict[tuple[object, ...], Plan] = {}


def shared_plan(config: RunConfig, task: Task, data: RunData, *, processes: int = 1) -> Plan:
    """Return the plan of the first run with the same model configuration, task, method and precision."""
    file = Path(config.model, "config.json")
    model = file.read_text(encoding="utf-8") if file.is_file() else config.model
    key = (model, config.task, config.method, config.precision, config.device, processes)
    if config.memory is not None or key not in _PLANS:
        _PLANS[key] = plan_run(config, task, data, processes=processes)
    return _PLANS[key]


@pytest.fixture(scope="session", autouse=True)
def _isolated_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Isolate tests from the user's cache, the network and measured rates, and limit threads."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("DELTAW_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setenv("OMP_NUM_THREADS", str(THREADS))
        monkeypatch.setenv("DELTAW_MEASURED", json.dumps({"*": RATES}))
        monkeypatch.setattr("deltaw.runs.memory_check.plan_run", shared_plan)
        monkeypatch.setattr(os, "fsync", lambda handle: None)
        # The heap is always frozen, and counting frozen objects would be slow.
        monkeypatch.setattr("deltaw.training.loop.frozen_heap", contextlib.nullcontext)
        yield


class FullCollections:
    """Callback of the garbage collector that measures the longest full collection."""

    def __init__(self) -> None:
        self.longest = math.inf
        self._start = 0.0

    def __call__(self, phase: str, info: Mapping[str, int]) -> None:
        if phase == "start":
            self._start = perf_counter()
        elif info["generation"] == 2:
            self.longest = max(self.longest, perf_counter() - self._start)


@pytest.fixture(scope="session")
def full_collections() -> Iterator[FullCollections]:
    collections = FullCollections()
    gc.callbacks.append(collections)
    yield collections
    gc.callbacks.remove(collections)


@pytest.fixture(autouse=True)
def _frozen_heap(full_collections: FullCollections) -> None:
    """Exclude objects that exist before a test from garbage collections, if one took a hundredth of a second.

    A run collects garbage several times. Without this, the objects of torch, pytest and earlier tests would take more
    time than short runs: several hundred thousand objects, or a second per run, at the end of the tests.
    """
    if full_collections.longest > 0.01:
        gc.collect()
        gc.freeze()
        full_collections.longest = 0.0


@pytest.fixture(autouse=True)
def _fresh_plans(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("planned"):
        monkeypatch.setattr("deltaw.runs.memory_check.plan_run", plan_run)


# Functions that predict the time of a plan, by the modules that use them.
TIME_FUNCTIONS = {
    "deltaw.runs.memory_check.with_time": with_time,
    "deltaw.training.planning.plan_run.with_time": with_time,
    "deltaw.training.planning.budget.with_time": with_time,
    "deltaw.training.planning.plan_cache.plan_with_cached_time": plan_with_cached_time,
}


@pytest.fixture(autouse=True)
def _predicted_times(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Predict no time of runs, which would take a measurement per model, unless a test is marked ``timed``."""
    for name, function in TIME_FUNCTIONS.items():
        timed = request.node.get_closest_marker("timed") is not None
        monkeypatch.setattr(name, function if timed else lambda plan, *_: plan)


@pytest.fixture(autouse=True)
def _seeded_generator() -> None:
    # torch.manual_seed records a stack trace per accelerator, which takes a millisecond.
    torch.default_generator.manual_seed(0)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained Llama with two blocks, a byte-level tokenizer and a ChatML template."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    return save_model(tiny_llama(initializer_range=0.3), folder)


@pytest.fixture(scope="session")
def long_context_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with enough positions for general prompts in bytes."""
    folder = tmp_path_factory.mktemp("base") / "roomy"
    return save_model(tiny_llama(initializer_range=0.3, max_position_embeddings=512), folder)


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2 with biases, a transposed weight layout and tied embeddings."""
    return save_model(tiny_gpt2(), tmp_path_factory.mktemp("base") / "gpt2")


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten questions that share a prefix, with their answers."""
    path = tmp_path_factory.mktemp("rows") / "colors.jsonl"
    write_rows(path, ({"prompt": f"paint it {c}", "completion": c[0]} for c in COLORS))
    return path


def write_rows(path: Path, rows: Iterable[Mapping[str, object]]) -> Path:
    """Write rows as JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def refusal(work: Callable[..., object], *args: object, match: str | None = None, **kwargs: object) -> UserError:
    """Call ``work`` and return the UserError that it raises."""
    with pytest.raises(UserError, match=match) as error:
        work(*args, **kwargs)
    return error.value


def deep_merge(below: Mapping[str, object], above: Mapping[str, object]) -> dict:
    """Return ``below`` with the sections and values of ``above`` merged into it."""
    merged = copy.deepcopy(dict(below))
    for key, value in above.items():
        current = merged.get(key)
        are_sections = isinstance(value, Mapping) and isinstance(current, Mapping)
        merged[key] = deep_merge(current, value) if are_sections else value  # type: ignore[arg-type]
    return merged


@pytest.fixture(scope="session")
def settings(model_folder: Path, rows_file: Path) -> Settings:
    """Settings of a short fp32 run. Keyword arguments override them."""

    def make(output: Path, **changes: object) -> dict:
        defaults = {"model": str(model_folder), "data": {"train": str(rows_file), "eval": 2}, "precision": "fp32"}
        defaults |= {"lora": {"rank": 4, "alpha": 8}, "train": {"learning_rate": 1e-2, "batch_size": 3, "epochs": 1}}
        defaults |= {"device": "cpu", "threads": THREADS, "output": str(output)}
        return deep_merge(defaults, changes)

    return make


@pytest.fixture(scope="session")
def finished_run(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run. Tests that modify it copy it first."""
    from deltaw.runs.fit import fit

    return fit(settings(tmp_path_factory.mktemp("runs") / "done", train={"epochs": 4})).output
