"""Detect that other programs need the cores, and then stop the OpenMP threads from spinning.

GNU's OpenMP library, which torch is linked with on Linux, lets a thread without work spin for milliseconds before it
sleeps. This is fast on a quiet machine. Beside other programs the spinning thread takes the core from the one it waits
for, and a training loses more than half of its share. The library spins almost not at all while more of its threads
exist than the process has CPUs (``GOMP_SPINCOUNT`` in its manual). So while the machine is busy, idle threads are added
to it. They run nothing, and no result depends on them.

A watching thread measures how long this process's threads were ready to run without a core (``/proc/self/schedstat``).
On systems without this file or library nothing is started.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

# Seconds between two measurements.
INTERVAL = 0.25
# The machine is busy if the threads together waited for a core for this share of the time.
BUSY_SHARE = 0.1
# It is quiet again after this number of intervals below ``QUIET_SHARE`` in a row.
QUIET_SHARE = 0.03
QUIET_INTERVALS = 12
_NANOSECOND = 1e-9
_TASKS = Path("/proc/self/task")


@dataclass(frozen=True)
class Load:
    """Effect of other programs on this process.

    Attributes:
        busy_seconds: Time for which the machine was busy.
        waited_seconds: Time for which threads waited for a core meanwhile, summed over the threads.
    """

    busy_seconds: float = 0.0
    waited_seconds: float = 0.0

    def __sub__(self, earlier: Load) -> Load:
        return Load(self.busy_seconds - earlier.busy_seconds, self.waited_seconds - earlier.waited_seconds)


def waited_seconds() -> float | None:
    """Return how long the existing threads of this process have waited for a core, summed over the threads.

    None if the system does not measure it.
    """
    total = 0
    try:
        for task in os.listdir(_TASKS):
            try:
                fields = (_TASKS / task / "schedstat").read_text(encoding="ascii").split()
            except (FileNotFoundError, ProcessLookupError):
                if not (_TASKS / task).exists():
                    continue  # the thread has ended
                return None
            total += int(fields[1])
    except (OSError, ValueError, IndexError):
        return None
    return total * _NANOSECOND


class BusyWatch:
    """Watches the load and limits the spinning. One per process.

    Attributes:
        is_busy: True while other programs take time from this process.
        load: Their effect since the start of the process.
    """

    def __init__(self, parallel: int, function: int) -> None:
        """Store the addresses of ``GOMP_parallel`` and of a function without side effects."""
        self.is_busy = False
        self.load = Load()
        self._run_parallel = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)(
            parallel
        )
        self._function = function
        self._quiet = threading.Event()

    def start(self) -> None:
        """Start watching, if the system measures waiting times."""
        if waited_seconds() is not None:
            threading.Thread(target=self._watch, name="deltaw busy watch", daemon=True).start()

    def _watch(self) -> None:
        last_time = time.monotonic()
        last_waited = waited_seconds() or 0.0
        quiet_intervals = 0
        while True:
            time.sleep(INTERVAL)
            now = time.monotonic()
            waited = waited_seconds() or 0.0
            seconds = now - last_time
            waited_now = max(0.0, waited - last_waited)  # negative if a thread has ended
            last_time = now
            last_waited = waited
            share = waited_now / seconds
            if not self.is_busy and share > BUSY_SHARE:
                self._begin()
                quiet_intervals = 0
            if not self.is_busy:
                continue
            self.load = Load(self.load.busy_seconds + seconds, self.load.waited_seconds + waited_now)
            quiet_intervals = quiet_intervals + 1 if share < QUIET_SHARE else 0
            if quiet_intervals >= QUIET_INTERVALS:
                self.is_busy = False
                self._quiet.set()

    def _begin(self) -> None:
        self.is_busy = True
        self._quiet = threading.Event()
        threading.Thread(
            target=self._hold_threads, args=(self._quiet,), name="deltaw idle threads", daemon=True
        ).start()

    def _hold_threads(self, quiet: threading.Event) -> None:
        """Keep more OpenMP threads than CPUs until ``quiet``. They end with this thread."""
        self._run_parallel(self._function, None, len(os.sched_getaffinity(0)) + 1, 0)
        quiet.wait()


class _WatchedProcess:
    """The watch of this process, and the process that started it. A forked child has no threads and starts its own."""

    watch: BusyWatch | None = None
    pid = 0


def watch_load(parallel: int, function: int) -> None:
    """Start the watch of this process, once."""
    if _WatchedProcess.pid == os.getpid():
        return
    _WatchedProcess.pid = os.getpid()
    _WatchedProcess.watch = BusyWatch(parallel, function)
    _WatchedProcess.watch.start()


def current_watch() -> BusyWatch | None:
    """Return the watch of this process, or None if nothing is watched."""
    return _WatchedProcess.watch if _WatchedProcess.pid == os.getpid() else None


def load_so_far() -> Load:
    """Return the effect of other programs since the start of this process."""
    watch = current_watch()
    return Load() if watch is None else watch.load
