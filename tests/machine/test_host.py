"""Device, precision, thread and memory choices on machines described by files."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest
import torch

from deltaw.errors import UserError
from deltaw.machine import choices, memory

GIB = 1 << 30


class FakeMachine:
    """Kernel files of a machine, written below a root folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def write(self, files: dict[str, object]) -> None:
        for path, text in files.items():
            (self.root / path).parent.mkdir(parents=True, exist_ok=True)
            (self.root / path).write_text(f"{text}\n")

    def cores(self, *groups: str) -> None:
        """Write one topology file per CPU. Hyperthreads of a core list each other."""
        path = "sys/devices/system/cpu/cpu{}/topology/core_cpus_list"
        self.write({path.format(number): siblings for number, siblings in enumerate(groups)})


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    machine = FakeMachine(tmp_path)
    machine.cores(*"01234567")
    machine.write({"proc/meminfo": f"MemTotal:       {16 * GIB // 1024} kB\nMemFree: 1 kB"})
    return machine


@pytest.mark.parametrize(
    ("fp32", "bf16", "expected"),
    [(300, 290, "bf16"), (300, 160, "fp32"), (150, 300, "bf16"), (100, 85, "bf16"), (100, 84, "fp32")],
)
def test_bf16_is_chosen_if_about_as_fast(fp32: float, bf16: float, expected: str) -> None:
    chosen = choices.choose_precision("cpu", rates={"fp32": fp32, "bf16": bf16, "int8": 900})
    assert chosen.value == expected
    assert str(fp32) in chosen.why and str(bf16) in chosen.why


@pytest.mark.parametrize(("precision", "slow"), [("bf16", True), ("int8", True), ("fp32", False)])
def test_requested_precision_is_used_and_warns_if_slow(precision: str, slow: bool):
    chosen = choices.choose_precision("cpu", precision, rates={"fp32": 300, "bf16": 160, "int8": 100})
    assert chosen.value == precision and ("slow" in chosen.why) == slow
    fast = {"fp32": 300.0, "bf16": 290.0, "int8": 900.0}
    assert choices.choose_precision("cpu", precision, rates=fast) == choices.Choice(precision, "as requested")


@pytest.mark.parametrize(
    ("device", "precision", "message"),
    [
        ("cuda", "gguf", "not available on the device cuda"),
        ("mps", "nf4", "not available on the device mps"),
        ("cpu", "fp16", "not for processors"),
        ("cpu", "bf61", "not a precision"),
    ],
)
def test_unsupported_precision_raises(device: str, precision: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        choices.choose_precision(device, precision)


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_cuda_uses_bf16_from_capability_8(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert choices.choose_precision("cuda:0").value == expected
    assert choices.dtype_of(choices.loading_precision("cuda:0", "nf4")) == choices.dtype_of(expected)
    assert choices.loading_precision("cuda:0", "fp32") == "fp32" and choices.loading_precision("cpu", "nf4") == "nf4"


@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_quantized_precision_on_cuda_needs_bitsandbytes(monkeypatch, precision):
    installed = {"bitsandbytes", "accelerate"}
    monkeypatch.setattr(choices.importlib.util, "find_spec", lambda name: name in installed or None)
    assert choices.choose_precision("cuda", precision).value == precision
    installed.clear()
    with pytest.raises(UserError, match="needs bitsandbytes, accelerate") as error:
        choices.choose_precision("cuda", precision)
    assert error.value.hint == 'pip install "deltaw[cuda]"'


def test_auto_device_uses_cuda_only_if_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choices.choose_device().value == "cpu"
    card = {"is_available": lambda: True, "get_device_name": lambda index: "a card", "device_count": lambda: 1}
    for name, function in card.items():
        monkeypatch.setattr(torch.cuda, name, function)
    assert choices.choose_device() == choices.Choice("cuda", "a card")
    assert choices.choose_device("cpu").value == "cpu"
    with pytest.raises(UserError, match="torch sees 1"):
        choices.choose_device("cuda:3")


@pytest.mark.parametrize("device", ["cuda", "mps", "gpu", "cuda:x", "cpu:", "cpu:00"])
def test_unavailable_device_raises(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError):
        choices.choose_device(device)


def test_threads_default_to_usable_physical_cores(fake: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choices.choose_threads(root=fake.root).value == 8
    fake.cores(*["0,4", "1,5", "2,6", "3,7"] * 2)
    assert choices.choose_threads(root=fake.root) == choices.Choice(4, "physical cores")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 4, 5}, raising=False)
    assert choices.choose_threads(root=fake.root).value == 2


GROUP = "proc/self/cgroup"
CGROUP = "sys/fs/cgroup"
SESSION = {GROUP: "0::/user.slice/session.scope", f"{CGROUP}/user.slice/session.scope/cpu.max": "max 100000"}
# A container's mount has its group at the root. The path of the host does not exist in it.
CONTAINER = {GROUP: "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n0::/"}
CGROUP_V1 = {**CONTAINER, f"{CGROUP}/cpu,cpuacct/cpu.cfs_period_us": 100000}


CPU_QUOTAS = [
    ({GROUP: "0::/", f"{CGROUP}/cpu.max": "250000 100000"}, 2),
    ({GROUP: "0::/", f"{CGROUP}/cpu.max": "50000 100000"}, 1),
    ({GROUP: "0::/", f"{CGROUP}/cpu.max": "max 100000"}, 8),
    ({**SESSION, f"{CGROUP}/user.slice/cpu.max": "300000 100000"}, 3),
    ({**CGROUP_V1, f"{CGROUP}/cpu,cpuacct/cpu.cfs_quota_us": 400000}, 4),
    ({**CGROUP_V1, f"{CGROUP}/cpu,cpuacct/cpu.cfs_quota_us": -1}, 8),
]


@pytest.mark.parametrize(("files", "threads"), CPU_QUOTAS)
def test_cpu_quota_of_any_group_limits_threads(fake: FakeMachine, files: dict[str, object], threads: int) -> None:
    fake.write(files)
    chosen = choices.choose_threads(root=fake.root)
    assert chosen.value == threads and ("quota" in chosen.why) == (threads < 8)


def test_requested_thread_count_is_used(fake: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [choices.choose_threads(value, root=fake.root).value for value in ("12", 2)] == [12, 2]
    for invalid in ("0", "many", "-1"):
        with pytest.raises(UserError):
            choices.choose_threads(invalid, root=fake.root)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert choices.choose_threads(root=fake.root) == choices.Choice(3, "OMP_NUM_THREADS")


MEMORY_LIMITS = [
    ({}, None),
    ({GROUP: "0::/a/b", f"{CGROUP}/a/b/memory.max": "max", f"{CGROUP}/a/memory.max": 3 * GIB}, 3 * GIB),
    ({GROUP: "0::/a/b", f"{CGROUP}/a/b/memory.max": "max", f"{CGROUP}/a/memory.high": 3 * GIB}, 3 * GIB),
    ({GROUP: "4:memory:/jobs/7", f"{CGROUP}/memory/jobs/7/memory.limit_in_bytes": 2 * GIB}, 2 * GIB),
    ({GROUP: "4:memory:/jobs/7", f"{CGROUP}/memory/jobs/7/memory.limit_in_bytes": 9223372036854771712}, None),
    (
        {GROUP: "0::/../../elsewhere", f"{CGROUP}/memory.max": GIB},
        GIB,
    ),  # outside the namespace: the limit of the mount applies
]


@pytest.mark.parametrize(("files", "limit"), MEMORY_LIMITS)
def test_memory_limit_is_physical_or_of_any_group(fake, files, limit):
    fake.write(files)
    expected = (16 * GIB, "physical memory") if limit is None else (limit, "control group limit")
    assert memory.memory_limit_bytes(fake.root) == choices.Choice(*expected)


def test_choices_on_current_machine_are_plausible() -> None:
    assert 1 <= choices.choose_threads().value <= (os.cpu_count() or 1) or "OMP_NUM_THREADS" in os.environ
    assert 0 < memory.memory_limit_bytes().value <= psutil.virtual_memory().total
    block = bytearray(64 << 20)
    block[::4096] = b"x" * len(block[::4096])
    assert memory.peak_resident_bytes() > len(block) and memory.resident_bytes() > 0
    # The kernel sums its per-CPU counters only occasionally, so allow a tolerance.
    assert memory.peak_resident_bytes() >= memory.resident_bytes() * 0.9
