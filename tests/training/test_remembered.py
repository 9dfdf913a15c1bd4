"""A cached memory plan is reused until one of its dependencies changes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from deltaw.cache.results import load_result, store_result
from deltaw.kernels.arithmetic import APPROXIMATIONS
from deltaw.machine import product_rates as measurements
from deltaw.machine.product_rates import ProductRates
from deltaw.memory.plan import Plan
from deltaw.runtime import quantized_weights
from deltaw.settings.config import RunConfig
from deltaw.training import causal_objective
from deltaw.training.approximations import AllowedApproximations, GradientCheck
from deltaw.training.callbacks import Callback
from deltaw.training.evaluation import general
from deltaw.training.monitoring.samples import SampleProbe
from deltaw.training.planning import plan_run as planning
from deltaw.training.planning.budget import memory_budget, memory_limit_error
from deltaw.training.planning.plan_arguments import reject_memory_setting
from deltaw.training.planning.plan_cache import CachedPlan, load_cached_plans
from deltaw.training.planning.run_time import MicrobatchTime, StepRates, Workload, store_rates, timed_plan
from deltaw.training.session import read_data
from tests.caches import fake_version, modify_source
from tests.conftest import deep_merge, refusal, write_rows
from tests.kernels.conftest import compiled_only
from tests.training.runs import build_session


@pytest.fixture
def cache_folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def sample_plan(settings, tmp_path_factory) -> Plan:
    config = RunConfig.read(settings(tmp_path_factory.mktemp("some") / "run"))
    return planning.plan_run(config, *read_data(config))


@pytest.fixture
def dry_run(sample_plan, monkeypatch) -> mock.Mock:
    """Mock that replaces dry runs."""
    compute_plan = mock.Mock(return_value=sample_plan)
    monkeypatch.setattr(planning, "_compute_plan", compute_plan)
    return compute_plan


@pytest.mark.parametrize("change", ["settings", "rows", "model", "variable", "source", "version"])
def test_changed_dependency_invalidates_plan(
    change, settings, rows_file, model_folder, tmp_path, cache_folder, dry_run, sample_plan, monkeypatch
):
    rows = shutil.copy(rows_file, tmp_path / "rows.jsonl")
    model = shutil.copytree(model_folder, tmp_path / "model")
    base = settings(tmp_path / "run", data={"train": str(rows)}, model=str(model))
    for output in ("other", "run"):
        config = RunConfig.read({**base, "output": str(tmp_path / output)})
        assert planning.plan_run(config, *read_data(config)) == sample_plan
    assert dry_run.call_count == 1
    model_config = json.loads((model / "config.json").read_text()) | {"num_hidden_layers": 1}
    changes = {
        "settings": lambda: base.update(deep_merge(base, {"train": {"batch_size": 4}})),
        "rows": lambda: write_rows(rows, ({"prompt": f"paint it {n}", "completion": "r"} for n in range(12))),
        "model": lambda: (model / "config.json").write_text(json.dumps(model_config)),
        "variable": lambda: monkeypatch.setenv("MKL_CBWR", "COMPATIBLE"),
        "source": lambda: modify_source(monkeypatch, tmp_path / "source", "memory/plan.py"),
        "version": lambda: fake_version(monkeypatch, "torch"),
    }
    changes[change]()
    config = RunConfig.read(base)
    planning.plan_run(config, *read_data(config))
    assert dry_run.call_count == 2


def test_changed_arithmetic_invalidates_plan(settings, tmp_path, cache_folder, monkeypatch):
    """A plan is recomputed if rates were measured again or the user forces other kernels."""
    dry_run = mock.Mock(wraps=planning._compute_plan)
    monkeypatch.setattr(planning, "_compute_plan", dry_run)
    monkeypatch.delenv("DELTAW_MEASURED")
    monkeypatch.setattr(measurements, "_used", {})
    config = RunConfig.read(settings(tmp_path / "run"))
    task, data = read_data(config)
    rates: dict[str, dict[str, float]] = {}
    for candidate in measurements.candidates():
        rate = 50.0 if candidate.arithmetic_name == "torch" else 100.0
        rates.setdefault(candidate.weight_type, {})[candidate.name] = rate
    monkeypatch.setattr(measurements, "measure", lambda *args: ProductRates(rates, disturbed=False))
    first = planning.plan_run(config, task, data)
    assert planning.plan_run(config, task, data) == first and dry_run.call_count == 1
    assert load_cached_plans(config, ["lora"]).plans == {"lora": first}
    for kind, key, _ in measurements.provenance():
        slower = {stored: dict.fromkeys(values, 1.0) for stored, values in rates.items()}
        store_result(kind, key, {"rates": slower, "disturbed": False})
    assert load_cached_plans(config, ["lora"]) is None
    planning.plan_run(config, task, data)
    assert dry_run.call_count == 2
    monkeypatch.setenv("DELTAW_KERNELS", "auto:torch")
    assert load_cached_plans(config, ["lora"]) is None


def test_error_of_unsupported_method_is_cached(settings, tmp_path, cache_folder):
    config = RunConfig.read(settings(tmp_path / "run", lora={"target_modules": ["nosuch"]}))
    task, data = read_data(config)
    refusal(planning.plan_run, config, task, data, match="nosuch")
    assert CachedPlan.of(config).refusal.message
    refusal(load_cached_plans, config, ["lora"], match="nosuch")
    head = config.model_copy(update={"method": "head"})
    planning.plan_run(head, task, data)
    cached = load_cached_plans(head, ["head", "lora"])
    assert list(cached.plans) == ["head"] and any("nosuch" in line for line in cached.lines)
    assert load_cached_plans(head, ["head", "bias"]) is None


def test_hub_model_and_damaged_file_are_not_loaded_from_cache(settings, tmp_path, cache_folder):
    hub = RunConfig.read(settings(tmp_path / "run")).model_copy(update={"model": "owner/name"})
    assert CachedPlan.of(hub) is None and load_cached_plans(hub, ["lora"]) is None
    store_result("kind", ["key"], {"n": 1})
    assert load_result("kind", ["key"]) == {"n": 1} and load_result("kind", ["other"]) is None
    (file,) = (cache_folder / "remembered" / "kind").iterdir()
    file.write_text("{")
    assert load_result("kind", ["key"]) is None


def test_cached_plan_is_printed_without_importing_torch(settings, tmp_path, cache_folder):
    config = RunConfig.read(settings(tmp_path / "run"))
    task, data = read_data(config)
    plan = planning.plan_run(config, task, data)
    workload = Workload.from_dict(plan.workload)
    rates = StepRates((MicrobatchTime(1000, 10, 1.0, 0.4, 1.0, 0.1),))
    store_rates(workload, rates)
    plan = timed_plan(plan, workload, rates, config)
    (tmp_path / "run.json").write_text(json.dumps(settings(tmp_path / "run")))
    program = (
        "import sys; from deltaw.cli import main\n"
        "try: main(['plan', sys.argv[1], '--methods', 'lora', '--json', '--verbose'])\n"
        "finally: print('torch' in sys.modules, file=sys.stderr)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "run.json")]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(process.stdout)["lora"] == json.loads(json.dumps(plan.as_dict()))
    assert process.stderr.splitlines()[-1] == "False" and "10 read from" in process.stderr


def test_unsupported_memory_limit_raises():
    assert memory_budget("2GB", "cpu") == memory_budget("2GB", "cuda:1") == 2 * 10**9
    assert memory_budget(None, "mps") is None
    for refuse, target in [(reject_memory_setting, "tune"), (memory_budget, "mps")]:
        error = refusal(refuse, "2GB", target)
        assert error.location == "memory"
    assert memory_limit_error("why").location == "memory"
    reject_memory_setting(None, "tune")


@compiled_only
def test_second_start_reuses_calibration_comparison_and_base_answers(settings, tmp_path, cache_folder, monkeypatch):
    """They are computed again if the rows or the initial adapter differ."""
    rounded = mock.Mock(wraps=quantized_weights._choose_columns)
    stored = mock.Mock(wraps=general.store_result)
    monkeypatch.setattr(quantized_weights, "_choose_columns", rounded)
    monkeypatch.setattr(general, "store_result", stored)
    # The kernel does not support a vocabulary of this size, so no approximation would be considered.
    monkeypatch.setattr(causal_objective, "_may_round", causal_objective._is_plain_bf16)
    compared = mock.Mock(side_effect=lambda check, offered: AllowedApproximations(tuple(offered), None))
    monkeypatch.setattr(GradientCheck, "choose", lambda check, offered: compared(check, offered))

    def start(**train: object) -> tuple[dict, list[str], list]:
        config = settings(tmp_path / "run", precision="int8", train={"samples": 2, **train})
        session = build_session(config, candidates=APPROXIMATIONS)
        answers = SampleProbe(session, Callback()).of_base()
        return session.model.state_dict(), session.notes, answers

    def calls() -> tuple[int, ...]:
        return rounded.call_count, compared.call_count, stored.call_count

    weights, notes, answers = start()
    first = calls()
    assert all(first) and answers
    second = start(learning_rate=3e-3, max_steps=7)
    assert calls() == first and second[1:] == (notes, answers)
    assert weights.keys() == second[0].keys() and all(torch.equal(weights[name], second[0][name]) for name in weights)
    start(seed=5)  # different evaluation rows and a different initial adapter
    assert all(now > before for now, before in zip(calls(), first, strict=True))
