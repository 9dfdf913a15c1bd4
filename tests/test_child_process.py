"""Commands in child processes: output, time limits, and the end of processes that they leave behind."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from deltaw import child_process, platforms
from deltaw.child_process import kill_process_tree, python_command, run_command, start_command, start_job

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
    result = run_command(python(code), stdin_bytes=b"abc", max_bytes=200)
    assert (result.status, result.output.strip(), result.messages.strip()[-3:]) == (3, "abc" * 10, "end")
    result = run_command(python(code), stdin_bytes=b"abc", max_bytes=5)
    assert (result.status, result.output, result.messages.strip()[-3:]) == (None, "abcab", "end")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_command_that_writes_too_much_is_killed(stream):
    code = f"import sys\nfor _ in range(200_000): sys.{stream}.write('x' * 10_000)"
    with start_job(python(code)) as job:
        result = job.finish(timeout=300, max_bytes=1 << 20)
        written = max(os.fstat(file.fileno()).st_size for file in (job.output, job.messages))
    assert result.status is None and len(result.output + result.messages) == 1 << 20
    assert written < 1_000_000_000, "it wrote 2 GB until it was done"


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


@pytest.mark.parametrize("include_current_folder", [False, True])
def test_python_command_searches_the_current_folder_only_if_this_process_does(
    include_current_folder, tmp_path, monkeypatch
):
    (tmp_path / "downloaded.py").write_text("print('imported')")
    monkeypatch.chdir(tmp_path)
    code = "import importlib.util; print(importlib.util.find_spec('downloaded') is not None, sys.argv[1])"
    command = python_command(code, ["a b"], include_current_folder=include_current_folder)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    assert run_command(python_command(code, ["a b"])).output.strip() == "False a b"
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    command = python_command(code, ["a b"], include_current_folder=include_current_folder)
    assert run_command(command, folder=tmp_path.parent).output.strip() == f"{include_current_folder} a b"


def test_python_command_has_the_search_path_of_this_process(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, "__editable__.finder.__path_hook__"])
    code = "import deltaw; print(repr(sys.path))"
    paths = [path if "__editable__" in path else str(Path(path).absolute()) for path in sys.path]
    assert run_command(python_command(code)).output.strip() == repr(paths)


BUSY_WORKER = """
from deltaw.worker_process import serve
def handler(request):
    while True: pass
serve(lambda: handler)
"""
IDLE_COMMAND = "import time; from deltaw.worker_process import read_input; read_input(); time.sleep(300)"
START_CHILDREN = {
    "worker": (
        "from deltaw.worker_process import PipeWorker; worker = PipeWorker(command); "
        "worker.request(b'', 60, max_bytes=0, count=0); process = worker._process"
    ),
    "command": (
        "import threading; from deltaw.child_process import start_job; context = start_job(command); "
        "job = context.__enter__(); process = job.process; "
        "threading.Thread(target=job.finish, args=[None], daemon=True).start()"
    ),
}


@pytest.mark.skipif(platforms.WINDOWS, reason="signals")
@pytest.mark.parametrize(
    ("kind", "code"), [("worker", BUSY_WORKER), ("command", IDLE_COMMAND)], ids=["worker", "command"]
)
def test_busy_child_exits_if_its_parent_is_killed(kind, code):
    program = (
        f"import os, time; command = {python_command(code)!r}; {START_CHILDREN[kind]}; time.sleep(2); "
        "print(process.pid, process.poll(), flush=True); os.kill(os.getpid(), 9)"
    )
    parent = start_command(python_command(program), stdout=subprocess.PIPE, text=True)
    pid, status = parent.communicate()[0].split()
    assert status == "None", "the child exited early"
    assert has_ended(int(pid))


ASK_EXPERIMENT_WORKER = (
    "from deltaw.experiments.jobs import WorkerProcess; WorkerProcess(Path('log')).ask('usual', config={})"
)
ASK_REWARD_WORKER = (
    'from deltaw.tasks.reward.rewards.worker import RewardWorker; settings = \'{"name": "rewards.py:score"}\'; '
    "worker = RewardWorker('deltaw.tasks.reward.rewards.rewarder', settings, 60.0); print(worker.request(None, 60.0))"
)


@pytest.mark.parametrize(
    ("code", "answer"),
    [(ASK_EXPERIMENT_WORKER, "'model' is missing"), (ASK_REWARD_WORKER, "'needs': []")],
    ids=["experiment", "reward"],
)
def test_worker_does_not_import_downloaded_modules(code, answer, tmp_path):
    for name in ("psutil", "torch", "yaml"):
        (tmp_path / f"{name}.py").write_text(f"open('imported {name}', 'w')")
    (tmp_path / "rewards.py").write_text("def score(completions): return [1.0 for _ in completions]")
    paths = [path for path in sys.path if path]
    program = f"import sys; sys.path[:] = {paths!r}; from pathlib import Path; {code}"
    result = run_command([sys.executable, "-c", program], folder=tmp_path)
    assert not [*tmp_path.glob("imported*")]
    assert answer in result.output + result.messages


def test_programs_start_with_python_command():
    for file in Path(child_process.__file__).parent.rglob("*.py"):
        text = file.read_text("utf-8")
        assert not re.search(r'sys\.executable, "-[cm]"', text), f"{file} may import from the current folder"
