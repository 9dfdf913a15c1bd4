"""Findings of the doctor on described machines and on this machine."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path

import pytest

from deltaw.errors import UserError
from deltaw.kernels.arithmetic import Arithmetic
from deltaw.machine.choices import Choice
from deltaw.machine.kernel_choice import KernelChoice
from deltaw.machine.product_rates import GENERIC, ProductRates
from deltaw.reports.diagnosis import VARIABLES, Diagnosis, Disk, Gpu, Kernels, ModelSizes, folder_bytes, gather
from deltaw.reports.doctor import DoctorFinding, Examination, diagnose
from deltaw.reports.installed_packages import Package
from tests.reports.consoles import render_text

ROOT = Path(__file__).parents[2]
RATES = {"fp32": {"avx2:dot": 200.0, "torch": 150.0}, "bf16": {"avx2:wide": 190.0, "torch": 60.0}}
RATES |= {"int8": {"avx2:dot": 400.0, "torch": 30.0}}
MACHINE = {"processor": "A processor", "machine_processors": 8, "processors": 8, "cores": 4, "free_memory": 12 * 10**9}
IDLE = {"quota": None, "load": 0.5, "swap": (0, 0), "openmp": ["libgomp.so.1"], "nvidia_driver": False, "mps": False}
HEALTHY = Diagnosis(
    **(MACHINE | IDLE | {"notes": [], "gpus": [], "environment": {}}),
    governor=("powersave", "intel_pstate"),
    threads=Choice(4, "physical cores"),
    variants=[Kernels("avx512", ("avx512f",), True), Kernels("avx2", (), True), Kernels("generic", (), True)],
    kernels=KernelChoice(Arithmetic("avx2", "dot", "wide", "dot"), GENERIC, 4, RATES),
    measured=ProductRates(RATES, disturbed=False),
    memory_limit=Choice(16 * 10**9, "physical memory"),
    disks=[Disk("runs", Path("runs"), 10**12, True), Disk("cache", Path("/c"), 10**12, True, 10**9)],
    packages=[Package("torch", "<3,>=2.6", "2.7"), Package("optuna", ">=4", None, "tune")],
    optional={"optuna": None, "peft": "0.18"},
    versions={"python": "3.12", "system": "Linux", "torch": "2.7", "cuda": "none"},
)


def diagnose_with(**changes: object) -> list[DoctorFinding]:
    return diagnose(dataclasses.replace(HEALTHY, **changes))


def test_healthy_machine_has_no_warnings() -> None:
    assert Examination(HEALTHY, diagnose(HEALTHY)).status in ("ok", "note")
    text = " ".join(finding.message for finding in diagnose(HEALTHY))
    assert "190 GFLOP/s (wide); the math library reaches 60" in text
    assert "optuna is not installed" in text and "peft 0.18" in text


def rates(**changes: dict[str, float]) -> KernelChoice:
    return dataclasses.replace(HEALTHY.kernels, rates={**RATES, **changes})


def disk(purpose: str, writable: bool = True, free: int = 10**12) -> list[Disk]:
    return [Disk(purpose, Path("/d"), free, writable)]


AVX2 = Kernels("avx2", (), True)
NOT_BUILT = Kernels("avx2", (), False)
OTHER_SOURCES = Kernels("amx", (), True, "other sources")
TORCH = Package("torch", "<3,>=2.6", "2.7")
OPTUNA = Package("optuna", ">=4", "3", "tune")
WITHOUT_KERNELS = KernelChoice(Arithmetic(), GENERIC, 4, {s: {"torch": RATES[s]["torch"]} for s in RATES})
THROTTLED = ProductRates({**RATES, "bf16": {"avx2:wide": 80.0, "torch": 50.0}}, disturbed=False)
CASES = {
    "few threads": ({"threads": Choice(1, "OMP_NUM_THREADS")}, "warning", "on 1 of 4 cores", "unset OMP"),
    "many threads": ({"threads": Choice(32, "OMP_NUM_THREADS")}, "warning", "more threads", "set it to 4"),
    "a quota": ({"quota": 2.0, "threads": Choice(2, "quota")}, "note", "2 of 8 processors", None),
    "a small quota": ({"quota": 0.5, "threads": Choice(1, "quota")}, "warning", "0.5 of 8", "throttled"),
    "affinity": ({"processors": 4, "load": 0.1}, "note", "4 of 8 processors", "taskset"),
    "two OpenMP": ({"openmp": ["libgomp.so.1", "libiomp5.so"]}, "warning", "libiomp5.so", "pip"),
    "a busy machine": ({"load": 30.0}, "warning", "load 30.0 on", "stop other programs"),
    "a low frequency": ({"governor": ("powersave", "acpi-cpufreq")}, "warning", "powersave", "governor"),
    "no kernels": ({"kernels": WITHOUT_KERNELS, "variants": [NOT_BUILT]}, "warning", "no compiled", "compiler"),
    "better kernels not built": ({"variants": [Kernels("amx", (), False), AVX2]}, "note", "amx, were not", "compiler"),
    "other sources": (
        {"variants": [OTHER_SOURCES, AVX2]},
        "warning",
        "amx cannot be used: other sources",
        "install deltaw",
    ),
    "one thread": ({"notes": ["compiled kernels run on one thread"]}, "warning", "one thread", "OpenMP"),
    "slow bf16": ({"kernels": rates(bf16={"avx2:wide": 100.0, "torch": 60.0})}, "note", "emulated", "fp32"),
    "slow int8": ({"kernels": rates(int8={"avx2:dot": 90.0})}, "note", "int8 products reach 45%", "memory"),
    "held back": ({"measured": THROTTLED}, "warning", "bf16 products are at 42% of the rate", "thermal throttling"),
    "disturbed": ({"measured": ProductRates(RATES, disturbed=True)}, "note", "disturbed", "idle"),
    "little memory": ({"free_memory": 10**8}, "warning", "0.1 GB free of 16.0 GB", "end other programs"),
    "swap": ({"swap": (10**9, 2 * 10**9)}, "warning", "1.0 GB are swapped out", "deltaw plan"),
    "a large model": ({"model": ModelSizes("big", 70 * 10**9, GENERIC)}, "warning", "big (70,000 million)", "int8"),
    "a read-only cache": ({"disks": disk("cache", False)}, "warning", "cannot be written to /d", "DELTAW_CACHE"),
    "a read-only output": ({"disks": disk("runs", False)}, "problem", "cannot be written to /d", "output"),
    "a full disk": ({"disks": disk("runs", free=1000)}, "problem", "0.0 GB", "disk is full"),
    "a low disk": ({"disks": disk("runs", free=10**9)}, "note", "1.0 GB free", "checkpoints"),
    "an old torch": ({"packages": [Package("torch", "<3,>=2.6", "2.1")]}, "problem", "torch 2.1 does not fit", "pip"),
    "a missing package": ({"packages": [Package("gguf", ">=0.17", None)]}, "problem", "gguf", "pip install"),
    "an old extra": ({"packages": [TORCH, OPTUNA]}, "warning", "optuna 3", "pip install"),
    "not installed": ({"packages": []}, "note", "not installed", "checkout"),
    "a driver without a GPU": ({"nvidia_driver": True}, "warning", "a build without CUDA", "CUDA build"),
    "an old GPU": ({"gpus": [Gpu("T4", 16 * 10**9, 10**9, (7, 5))]}, "note", "no native bf16", None),
    "a variable": ({"environment": {"DELTAW_CACHE": "/c"}}, "note", "DELTAW_CACHE is set", None),
    "a misspelled variable": ({"environment": {"DELTAW_KERNEL": "x"}}, "warning", "DELTAW_KERNEL", "KERNELS?"),
}


@pytest.mark.parametrize("case", CASES)
def test_problem_is_reported_with_hint(case: str) -> None:
    changes, severity, message, hint = CASES[case]
    new = [f for f in diagnose_with(**changes) if f not in diagnose(HEALTHY) and f.severity != "ok"]
    (finding,) = [f for f in new if message in f.message]
    assert finding.severity == severity
    assert hint is None or hint in (finding.hint or "")
    assert Examination(HEALTHY, new).status == severity


def test_gpu_without_triton_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    for spec, expected in ((None, 1), (object(), 0)):
        monkeypatch.setattr("deltaw.reports.doctor.importlib.util.find_spec", lambda name, spec=spec: spec)
        found = diagnose_with(gpus=[Gpu("A100", 80 * 10**9, 10**9, (8, 0))])
        assert sum("triton is not installed" in finding.message for finding in found) == expected


def test_unused_and_disabled_kernels_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    found = diagnose_with(variants=[Kernels("avx512", (), True), NOT_BUILT])
    (finding,) = [f for f in found if "not built" in f.message]
    assert finding.severity == "ok" and finding.message.endswith("avx2")
    monkeypatch.setenv("DELTAW_NATIVE", "0")
    (finding,) = [f for f in diagnose_with(kernels=WITHOUT_KERNELS, measured=None) if f.topic == "kernels"]
    assert "DELTAW_NATIVE=0" in finding.message and finding.severity == "warning"


def test_all_environment_variables_are_listed() -> None:
    sources = [*(ROOT / "src").rglob("*.py"), ROOT / "setup.py"]
    variables = {name for file in sources for name in re.findall(r"\bDELTAW_[A-Z_]+\b", file.read_text("utf-8"))}
    assert variables == set(VARIABLES)


def test_gather_uses_configured_rates_without_measuring(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "gguf").mkdir(parents=True)
    (tmp_path / "cache" / "gguf" / "model").write_bytes(os.urandom(50_000))
    diagnosis = gather(output=str(tmp_path / "no" / "runs"), measure=lambda *_: pytest.fail("rates were measured"))
    runs, cache = diagnosis.disks[:2]
    assert runs.writable and runs.free_bytes > 0 and not runs.path.exists()
    assert cache.path == tmp_path / "cache" and cache.held_bytes == diagnosis.cache_bytes["gguf"] == 50_000
    assert diagnosis.cores >= 1 and diagnosis.threads.value == 1 and diagnosis.processor
    assert 0 < diagnosis.free_memory <= diagnosis.memory_limit.value
    assert diagnosis.measured is None and diagnosis.kernels.rate("fp32") > 0
    assert {p.name for p in diagnosis.packages} >= {"torch", "transformers"} or not diagnosis.packages


def test_gather_measures_missing_rates(tmp_path, monkeypatch, model_folder) -> None:
    monkeypatch.delenv("DELTAW_MEASURED")
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path))
    diagnosis = gather(str(model_folder))
    assert diagnosis.model is not None and diagnosis.model.sizes.hidden == 32
    embedding = 259 * 32
    assert embedding < diagnosis.model.parameters < 3 * embedding + 20_000
    assert diagnosis.measured is not None
    assert diagnosis.measured.rates.keys() == diagnosis.kernels.rates.keys() == {"fp32", "bf16", "int8"}
    assert all(rate > 0 for rates_by_kernel in diagnosis.measured.rates.values() for rate in rates_by_kernel.values())


def test_missing_model_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model"):
        gather(str(tmp_path / "none" / "at" / "all"))


def test_sparse_files_count_allocated_bytes(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(10**9)
    (tmp_path / "dense").write_bytes(os.urandom(9000))
    assert 9000 <= folder_bytes(tmp_path) < 10**6


def test_report_fits_80_columns_and_json_is_plain() -> None:
    for severity, changes in (("problem", {"packages": []}), ("ok", {})):
        diagnosis = dataclasses.replace(HEALTHY, **changes)
        finding = DoctorFinding(severity, "disk", "long words " * 20, "do this")
        examination = Examination(diagnosis, [*diagnose(diagnosis), finding])
        text = render_text(examination.render())
        assert max(map(len, text.splitlines())) <= 80
        assert all(expected in text for expected in ("* 190", "avx2:wide", "do this"))
        assert ("not possible" in text) == (severity == "problem")
        assert json.loads(json.dumps(examination.as_dict(), allow_nan=False))["kernels"]["rates"] == RATES
