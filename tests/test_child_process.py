"""Commands in child processes: output, time limits, and the end of processes that they leave behind."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import psutil
import pytest

from deltaw import platforms
from deltaw.child_process import kill_process_tree, run_command, start_command, start_job

# Starts a process that sleeps, and prints its pid.
START_CHILD = (
    "import subprocess, sys; code = 'import time; time.sleep(300)'; "
    "child = subprocess.Popen([sys.executable, '-c', code]); print(child.pid, flush=True); "
)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def has_ended(pid: int) -> bool:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.01)
    return False


def test_result_has_status_start_of_output_and_end_of_messages():
    code = "import sys; print(sys.stdin.read() * 10); print('x' * 99 + 'end', file=sys.stderr); sys.exit(3)"
    result = run_command(python(code), stdin_bytes=b"abc", max_bytes=5)
    assert (result.status, result.output, result.messages.strip()[-3:]) == (3, "abcab", "end")


def test_time_limit_kills_descendants():
    result = run_command(python(START_CHILD + "child.wait()"), timeout=5)
    assert result.status is None
    assert has_ended(int(result.output))


@pytest.mark.skipif(platforms.WINDOWS, reason="sessions")
def test_processes_left_behind_are_killed():
    result = run_command(python(START_CHILD))
    assert result.status == 0
    assert has_ended(int(result.output))


def test_end_of_context_kills_the_command_and_ends_the_wait():
    with start_job(python("import time; time.sleep(300)")) as job:
        thread = threading.Thread(target=job.process.wait)
        thread.start()
    thread.join(30)
    assert not thread.is_alive() and job.process.returncode != 0


def test_pid_of_finished_process_is_not_killed(monkeypatch):
    process = start_command(python("raise SystemExit(4)"), stderr=subprocess.DEVNULL)
    process.wait()
    monkeypatch.setattr(psutil, "Process", lambda pid: pytest.fail("the pid may belong to another process"))
    assert kill_process_tree(process) == 4
