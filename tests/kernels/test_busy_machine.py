"""Other programs that compute are noticed, and OpenMP threads then stop spinning without another effect."""

import json
import os
import subprocess
import sys
import textwrap
import time

import pytest

from deltaw.kernels import busy_machine
from deltaw.kernels.busy_machine import Load

pytestmark = pytest.mark.skipif(
    busy_machine.waited_seconds() is None, reason="this system does not measure how long threads wait for a CPU"
)
# Multiplies matrices until the machine is busy and until it is quiet again. `quiet` replaces the measurement then, so
# that the test does not depend on other programs.
PROGRAM = """
    import json, os, time, torch
    from deltaw.kernels import busy_machine, loader

    loader.kernels()
    watch = busy_machine.current_watch()
    deadline = time.monotonic() + 120
    x = torch.randn(400, 400, generator=torch.Generator().manual_seed(0))

    def multiply_until(is_busy):
        while watch.is_busy is not is_busy and time.monotonic() < deadline:
            product = x @ x
        time.sleep(0.5)  # the helper thread starts or ends
        product = x @ x
        return product, len(os.listdir("/proc/self/task"))

    x @ x
    threads = len(os.listdir("/proc/self/task"))
    print("ready", flush=True)
    busy, busy_threads = multiply_until(True)
    busy_machine.INTERVAL = 0.01
    constant = busy_machine.waited_seconds()
    busy_machine.waited_seconds = lambda: constant
    quiet, quiet_threads = multiply_until(False)
    load = busy_machine.load_so_far()
    print(json.dumps({"threads": [threads, busy_threads, quiet_threads], "equal": torch.equal(busy, quiet),
                      "load": [load.busy_seconds, load.waited_seconds]}))
"""


def test_a_busy_machine_is_noticed_and_threads_are_added_until_it_is_quiet():
    cpus = len(os.sched_getaffinity(0))
    program = [sys.executable, "-c", textwrap.dedent(PROGRAM)]
    loops = []
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * cpus)]
            output = json.loads(process.stdout.readline())
        finally:
            for loop in loops:
                loop.kill()
                loop.wait()
            process.kill()
    before, busy, quiet = output["threads"]
    assert busy == before + cpus + 1  # the helper and its team, of which the helper is one
    assert quiet == before
    assert output["equal"]
    busy_seconds, waited = output["load"]
    assert busy_seconds > 0
    assert waited > busy_machine.BUSY_SHARE * busy_machine.INTERVAL  # at least of the interval that was noticed


def test_waiting_time_grows_only_while_threads_wait(monkeypatch):
    watch = busy_machine.BusyWatch(0, 0)
    started = []
    monkeypatch.setattr(watch, "_hold_threads", lambda quiet: started.append(quiet))
    measured = iter([0.0, 0.0, 5.0, 5.1, *[5.1] * (busy_machine.QUIET_INTERVALS + 1)])

    def waited():
        try:
            return next(measured)
        except StopIteration:
            raise SystemExit from None

    monkeypatch.setattr(busy_machine, "waited_seconds", waited)
    times = iter(range(100))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(times)))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(SystemExit):
        watch._watch()
    assert len(started) == 1 and started[0].is_set()
    assert not watch.is_busy
    assert watch.load.busy_seconds == busy_machine.QUIET_INTERVALS + 2
    assert watch.load.waited_seconds == pytest.approx(5.1)
    assert watch.load - Load(1.0, 5.1) == Load(busy_machine.QUIET_INTERVALS + 1, pytest.approx(0.0))
