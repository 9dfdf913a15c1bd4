"""A plan that was made before is found again, and only as long as nothing that it depends on has changed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from deltaw.cache import recall, remember
from deltaw.errors import UserError
from deltaw.kernels.arithmetic import APPROXIMATIONS
from deltaw.machine import product_rates as measurements
from deltaw.machine.product_rates import Measured
from deltaw.memory.plan import Plan
from deltaw.runtime import quantized_weights
from deltaw.settings import RunConfig
from deltaw.training.approximations import Chosen, GradientCheck
from deltaw.training.evaluation import general
from deltaw.training.monitoring.monitor import Samples
from deltaw.training.planning import plan_run as planning
from deltaw.training.planning.asked import refuse_memory
from deltaw.training.planning.budget import memory_budget, no_plan_to_keep
from deltaw.training.planning.remembered import Remembered, recalled
from deltaw.training.session import read_data
from deltaw.training.tasks import causal_objective
from tests.caches import other_text, other_version
from tests.conftest import laid_over, write_rows
from tests.kernels.conftest import compiled_only
from tests.training.runs import session_of


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def plan_of_some_run(settings, tmp_path_factory) -> Plan:
    config = RunConfig.read(settings(tmp_path_factory.mktemp("some") / "run"))
    return planning.plan_run(config, *read_data(config))


@pytest.fixture
def counted(plan_of_some_run, monkeypatch) -> mock.Mock:
    """In the place of dry runs."""
    made = mock.Mock(return_value=plan_of_some_run)
    monkeypatch.setattr(planning, "_planned", made)
    return made


@pytest.mark.parametrize("change", ["settings", "rows", "model", "variable", "source", "version"])
def test_any_change_of_what_a_plan_depends_on_makes_a_new_one(
    change, settings, rows_file, model_folder, tmp_path, own_cache, counted, plan_of_some_run, monkeypatch
):
    rows = shutil.copy(rows_file, tmp_path / "rows.jsonl")
    model = shutil.copytree(model_folder, tmp_path / "model")
    plain = settings(tmp_path / "run", data={"train": str(rows)}, model=str(model))
    for output in ("other", "run"):
        config = RunConfig.read({**plain, "output": str(tmp_path / output)})
        assert planning.plan_run(config, *read_data(config)) == plan_of_some_run
    assert counted.call_count == 1
    described = json.loads((model / "config.json").read_text()) | {"num_hidden_layers": 1}
    changes = {
        "settings": lambda: plain.update(laid_over(plain, {"train": {"batch_size": 4}})),
        "rows": lambda: write_rows(rows, ({"prompt": f"paint it {n}", "completion": "r"} for n in range(12))),
        "model": lambda: (model / "config.json").write_text(json.dumps(described)),
        "variable": lambda: monkeypatch.setenv("MKL_CBWR", "COMPATIBLE"),
        "source": lambda: other_text(monkeypatch, tmp_path / "source", "memory/plan.py"),
        "version": lambda: other_version(monkeypatch, "torch"),
    }
    changes[change]()
    config = RunConfig.read(plain)
    planning.plan_run(config, *read_data(config))
    assert counted.call_count == 2


def test_a_plan_is_not_taken_for_another_arithmetic(settings, tmp_path, own_cache, monkeypatch):
    """Neither where rates were measured anew, nor where the user forces another."""
    counted = mock.Mock(wraps=planning._planned)
    monkeypatch.setattr(planning, "_planned", counted)
    monkeypatch.delenv("DELTAW_MEASURED")
    monkeypatch.setattr(measurements, "_used", {})
    config = RunConfig.read(settings(tmp_path / "run"))
    task, data = read_data(config)
    rates: dict[str, dict[str, float]] = {}
    for of in measurements.candidates():
        rates.setdefault(of.stored, {})[of.name] = 50.0 if of.way == "torch" else 100.0
    monkeypatch.setattr(measurements, "measure", lambda *of: Measured(rates, disturbed=False))
    first = planning.plan_run(config, task, data)
    assert planning.plan_run(config, task, data) == first and counted.call_count == 1
    assert recalled(config, ["lora"]).plans == {"lora": first}
    for kind, key, _ in measurements.basis():
        slower = {stored: dict.fromkeys(of, 1.0) for stored, of in rates.items()}
        remember(kind, key, {"rates": slower, "disturbed": False})
    assert recalled(config, ["lora"]) is None
    planning.plan_run(config, task, data)
    assert counted.call_count == 2
    monkeypatch.setenv("DELTAW_KERNELS", "auto:torch")
    assert recalled(config, ["lora"]) is None


def test_a_method_that_does_not_fit_is_remembered_with_its_reason(settings, tmp_path, own_cache):
    config = RunConfig.read(settings(tmp_path / "run", lora={"target_modules": ["nosuch"]}))
    task, data = read_data(config)
    with pytest.raises(UserError, match="nosuch"):
        planning.plan_run(config, task, data)
    assert Remembered.of(config).refusal.what
    with pytest.raises(UserError, match="nosuch"):
        recalled(config, ["lora"])
    head = config.model_copy(update={"method": "head"})
    planning.plan_run(head, task, data)
    known = recalled(head, ["head", "lora"])
    assert list(known.plans) == ["head"] and any("nosuch" in line for line in known.lines)
    assert recalled(head, ["head", "bias"]) is None


def test_rows_of_a_hub_and_a_damaged_file_are_as_if_nothing_had_been_remembered(settings, tmp_path, own_cache):
    hub = RunConfig.read(settings(tmp_path / "run")).model_copy(update={"model": "owner/name"})
    assert Remembered.of(hub) is None and recalled(hub, ["lora"]) is None
    remember("kind", ["key"], {"n": 1})
    assert recall("kind", ["key"]) == {"n": 1} and recall("kind", ["other"]) is None
    (file,) = (own_cache / "remembered" / "kind").iterdir()
    file.write_text("{")
    assert recall("kind", ["key"]) is None


def test_a_remembered_plan_is_shown_without_torch(settings, tmp_path, own_cache):
    config = RunConfig.read(settings(tmp_path / "run"))
    task, data = read_data(config)
    made = planning.plan_run(config, task, data)
    (tmp_path / "run.json").write_text(json.dumps(settings(tmp_path / "run")))
    program = (
        "import sys; from deltaw.cli import main\n"
        "try: main(['plan', sys.argv[1], '--methods', 'lora', '--json', '--verbose'])\n"
        "finally: print('torch' in sys.modules, file=sys.stderr)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "run.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["lora"] == json.loads(json.dumps(made.as_dict()))
    assert done.stderr.splitlines()[-1] == "False" and "10 read from" in done.stderr


def test_a_limit_that_nobody_watches_is_refused_by_name():
    assert memory_budget("2GB", "cpu") == 2 * 10**9 and memory_budget(None, "cuda") is None
    for refuse, of in [(refuse_memory, "tune"), *((memory_budget, device) for device in ("cuda", "cuda:1", "mps"))]:
        with pytest.raises(UserError) as refused:
            refuse("2GB", of)
        assert refused.value.where == "memory"
    assert no_plan_to_keep("why").where == "memory"
    refuse_memory(None, "tune")


@compiled_only
def test_the_next_start_finds_calibration_comparison_and_answers_of_the_base(
    settings, tmp_path, own_cache, monkeypatch
):
    """And measures anew where rows or the start of the adapter are others."""
    rounded, written = mock.Mock(wraps=quantized_weights._best), mock.Mock(wraps=general.generate)
    monkeypatch.setattr(quantized_weights, "_best", rounded)
    monkeypatch.setattr(general, "generate", written)
    # The kernel does not take a vocabulary of this size, and nothing else could be approximate.
    monkeypatch.setattr(causal_objective, "_may_round", causal_objective._is_plain_bf16)
    compared = mock.Mock(side_effect=lambda check, offered: Chosen(tuple(offered), None))
    monkeypatch.setattr(GradientCheck, "choose", lambda check, offered: compared(check, offered))

    def start(**train: object) -> tuple[dict, list[str], list]:
        session = session_of(settings(tmp_path / "run", precision="int8", train=train), offered=APPROXIMATIONS)
        answers = Samples(session, session.data.held_out, 2).of_base()
        return session.model.state_dict(), session.said, answers

    def calls() -> tuple[int, ...]:
        return rounded.call_count, compared.call_count, written.call_count

    weights, said, answers = start()
    first = calls()
    assert all(first) and answers
    again = start(learning_rate=3e-3, max_steps=7)
    assert calls() == first
    assert again[1:] == (said, answers)
    assert weights.keys() == again[0].keys() and all(torch.equal(weights[name], again[0][name]) for name in weights)
    start(seed=5)  # other rows are held out, and the adapter begins elsewhere
    assert all(now > before for now, before in zip(calls(), first, strict=True))
