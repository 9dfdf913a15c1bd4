"""Queue of jobs: order, stop, resume, and processes that survive the server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest

from deltaw.child_process import run_command
from deltaw.errors import UserError
from deltaw.runs.folder import Run, process_identity
from deltaw.studio import jobs
from deltaw.studio.jobs import JobQueue, StudioJob
from deltaw.studio.workspace import Workspace
from tests.byte_models import save_model, tiny_llama

STARTED = 120.0  # seconds


def wait_for(condition: Callable[[], object], queue: JobQueue | None = None) -> None:
    deadline = time.monotonic() + STARTED
    while not condition():
        assert time.monotonic() < deadline, queue and [job.log for job in queue.jobs()]
        time.sleep(0.05)
        if queue is not None:
            queue.poll()


@pytest.fixture
def workspace(tmp_path: Path) -> Iterator[Workspace]:
    result = Workspace(tmp_path)
    yield result
    for job in JobQueue(result).jobs():
        jobs.interrupt(job.process or {}, kill=True)


@pytest.fixture
def code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs are Python code in place of commands."""
    monkeypatch.setattr(jobs, "child_command", partial(jobs.workspace_command, "import sys; exec(sys.argv[1])"))


SLEEP = "import time; time.sleep(300)"


def add(queue: JobQueue, code: str) -> StudioJob:
    return queue.add("eval", [code], title="Score")


@pytest.mark.usefixtures("code")
def test_jobs_run_in_order_and_first_moves_a_job_to_the_front(workspace: Workspace) -> None:
    queue = JobQueue(workspace)
    one, two, three = (add(queue, f"import json, time; print(json.dumps({{'time': time.time()}})); {n}") for n in "123")
    queue.first(three.identity)
    assert [job.identity for job in queue.jobs()] == [three.identity, one.identity, two.identity]
    queue.poll()
    assert queue.busy() is queue.job(three.identity)
    queue.poll()
    assert [job.state for job in (one, two)] == ["queued", "queued"]
    wait_for(lambda: all(job.state == "done" for job in (one, two, three)), queue)
    assert three.result["time"] < one.result["time"] < two.result["time"]


@pytest.mark.usefixtures("code")
def test_restarted_queue_finds_the_running_process(workspace: Workspace) -> None:
    queue = JobQueue(workspace)
    job = add(queue, "open('started', 'w').close(); " + SLEEP)
    waiting = add(queue, "print('{}')")
    queue.poll()
    queue.close()
    wait_for((job.folder / "started").exists)  # before, the process ignores interrupts if pytest does
    process = psutil.Process(job.process["id"])
    assert os.getsid(process.pid) != os.getsid(0)  # it survives the end of the terminal
    again = JobQueue(workspace)
    again.poll()
    assert again.busy().process == job.process
    assert again.job(waiting.identity).state == "queued"
    again.stop(job.identity)
    wait_for(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE)
    wait_for(lambda: again.job(waiting.identity).state == "done", again)
    assert again.job(job.identity).state == "stopped"


@pytest.mark.usefixtures("code")
def test_process_of_a_server_killed_while_it_started_a_job_is_found(workspace: Workspace) -> None:
    queue = JobQueue(workspace)
    job = add(queue, SLEEP)
    queue.poll()
    values = json.loads((job.folder / "job.json").read_text())
    (job.folder / "job.json").write_text(json.dumps({**values, "process": None}))
    again = JobQueue(workspace)
    again.poll()
    assert again.busy().process == job.process


@pytest.mark.usefixtures("code")
def test_reused_process_id_is_not_signaled(workspace: Workspace) -> None:
    queue = JobQueue(workspace)
    job = add(queue, SLEEP)
    queue.poll()
    original = job.process
    with subprocess.Popen([sys.executable, "-c", SLEEP]) as other:
        identity = {**process_identity(other.pid), "begun": original["begun"] - 100.0}
        job.process = identity
        job.save()
        again = JobQueue(workspace)
        again.stop(job.identity)
        again.stop(job.identity, at_once=True)
        again.stop(job.identity, at_once=True)
        again.poll()
        assert again.job(job.identity).state == "stopped"
        time.sleep(0.3)
        assert other.poll() is None
        other.kill()
    jobs.interrupt(original, kill=True)


@pytest.mark.usefixtures("code")
@pytest.mark.parametrize("is_recorded", [True, False])
def test_other_process_in_the_folder_of_a_job_is_not_signaled(workspace: Workspace, is_recorded: bool) -> None:
    job = add(JobQueue(workspace), SLEEP)
    with subprocess.Popen(
        [sys.executable, "-c", "print(flush=True); " + SLEEP], cwd=job.folder, stdout=subprocess.PIPE
    ) as other:
        other.stdout.readline()
        job.state = "running"
        job.process = process_identity(other.pid) if is_recorded else None
        job.save()
        queue = JobQueue(workspace)
        queue.poll()
        queue.stop(job.identity)
        queue.stop(job.identity, at_once=True)
        queue.stop(job.identity, at_once=True)
        time.sleep(0.3)
        assert other.poll() is None
        assert is_recorded or queue.job(job.identity).state == "failed"
        other.kill()


@pytest.mark.usefixtures("code")
def test_damaged_jobs_are_skipped_with_a_note_and_others_run(workspace: Workspace, capsys) -> None:
    queue = JobQueue(workspace)
    damages = [{"state": "weird"}, {"created": "x"}, {"order": "x"}, {"arguments": [5]}, {"process": [1]}, {"run": 5}]
    for values in (*damages, {"arguments": ["a\0b"], "order": 0}, {"state": "running", "process": {"id": -1}}):
        file = add(queue, "print('{}')").folder / "job.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    file = add(queue, "print('{}')").folder / "job.json"
    file.write_text("[" * 100_000)
    last = add(queue, "print('{}')").identity
    again = JobQueue(workspace)
    assert capsys.readouterr().err.count("note: skipped ") == len(damages) + 1
    assert len(again.jobs()) == 3
    wait_for(lambda: again.job(last).state == "done", again)
    assert sorted(job.state for job in again.jobs()) == ["done", "failed", "failed"]
    assert any("the command is invalid" in job.log for job in again.jobs())


@pytest.mark.usefixtures("code")
def test_second_stop_needs_at_once_and_third_kills(workspace: Workspace) -> None:
    stubborn = (
        "import signal, sys, time; signal.signal(signal.SIGINT, lambda *_: print('got', file=sys.stderr)); "
        "print('ready', file=sys.stderr); time.sleep(1); [time.sleep(1) for _ in range(300)]"
    )
    queue = JobQueue(workspace)
    job = add(queue, stubborn)
    queue.poll()
    wait_for(lambda: "ready" in job.log)
    queue.stop(job.identity)
    wait_for(lambda: job.log.count("got") == 1)
    queue.stop(job.identity)  # from another tab
    assert job.stops == 1
    queue.stop(job.identity, at_once=True)
    wait_for(lambda: job.log.count("got") == 2)
    queue.stop(job.identity, at_once=True)
    wait_for(lambda: job.state == "stopped", queue)


@pytest.mark.usefixtures("code")
def test_queued_job_is_stopped_resumed_and_removed(workspace: Workspace) -> None:
    queue = JobQueue(workspace)
    job = add(queue, "print('{}')")
    queue.stop(job.identity)
    queue.poll()
    assert job.state == "stopped"
    queue.resume(job.identity)
    queue.resume(job.identity)
    wait_for(lambda: job.state == "done", queue)
    queue.remove(job.identity)
    assert not job.folder.exists()
    with pytest.raises(UserError, match="does not exist"):
        queue.job(job.identity)


def test_two_studios_of_one_folder_are_refused_and_a_stale_lock_is_not(workspace: Workspace) -> None:
    (workspace.state / "lock").touch()  # of a server that was killed
    one = JobQueue(workspace)
    two = JobQueue(workspace)
    one.start()
    with pytest.raises(UserError, match="another studio uses this folder"):
        two.start()
    one.close()
    two.start()
    two.close()


@pytest.mark.usefixtures("code")
def test_full_disk_delays_the_next_job(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = JobQueue(workspace)
    job = add(queue, "print('{}')")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(jobs, "write_text", fail)
        queue.poll()
        assert job.state == "queued"
        assert "No space left" in queue.problem.message
    wait_for(lambda: job.state == "done", queue)
    assert queue.problem is None


def test_failing_command_shows_message_and_hint(workspace: Workspace) -> None:
    queue = JobQueue(workspace)
    job = queue.add("train", ["train", "--json"], title="Train", settings={"model": "missing", "rank": 3})
    wait_for(lambda: job.state == "failed", queue)
    error = jobs.read_error(job.log)
    assert error is not None and error.message.startswith("'data' is missing; unknown key 'rank'") and error.hint


def test_modules_of_the_current_folder_are_not_imported(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    (workspace.folder / "yaml.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(workspace.folder)
    monkeypatch.syspath_prepend("")
    monkeypatch.syspath_prepend(str(workspace.folder))
    command, environment = jobs.child_command(workspace, ["schema"])
    finished = run_command(command, environment=environment)
    assert finished.status == 0 and json.loads(finished.output)["properties"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tiny_llama(), tmp_path_factory.mktemp("model"))


def train(queue: JobQueue, workspace: Workspace, model: Path, steps: int) -> StudioJob:
    rows = workspace.folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{n} + 1", "completion": f"{n + 1}"}) + "\n" for n in range(20)))
    output = workspace.folder / "runs" / "first"
    settings = {
        "model": str(model),
        "output": str(output),
        "device": "cpu",
        "data": {"train": str(rows), "max_length": 64},
        "train": {"max_steps": steps, "batch_size": 2, "warmup": 0, "drift": False, "samples": 0},
    }
    return queue.add("train", ["train", "--json"], title="first", run=output, settings=settings)


@pytest.mark.slow
def test_training_is_stopped_killed_and_resumed(workspace: Workspace, model: Path) -> None:
    queue = JobQueue(workspace)
    job = train(queue, workspace, model, 100_000)
    folder = workspace.folder / "runs" / "first"
    wait_for(lambda: Run(folder).steps > 5, queue)
    queue.stop(job.identity)
    wait_for(lambda: job.state == "stopped", queue)
    assert Run(folder).state == "interrupted"
    steps = Run(folder).steps
    queue.resume(job.identity)
    wait_for(lambda: Run(folder).state == "running" and Run(folder).steps > steps, queue)
    assert f"resumes from step {steps} of 100000" in job.log
    os.kill(job.process["id"], signal.SIGKILL)
    wait_for(lambda: job.state == "failed", queue)
    assert Run(folder).state == "killed"
    queue.resume(job.identity)
    wait_for(lambda: Run(folder).state == "running", queue)
    assert "resumes from step" in job.log


def test_processes_of_the_studio_are_restricted_to_its_folder(workspace: Workspace) -> None:
    code = (
        "from deltaw.untrusted_paths import AllowedFolders as A; a = A.of_process(); print(*a.folders, a.allow_hidden)"
    )
    command, environment = jobs.workspace_command(code, workspace)
    assert run_command(command, environment=environment).output.strip() == f"{workspace.folder} False"
    assert jobs.child_command(workspace, ["train"])[1] == environment
    private = workspace.folder.parent / "private.jsonl"
    private.write_text('{"text": "secret"}\n')
    queue = JobQueue(workspace)
    job = queue.add("predict", ["data", "check", str(private)], title="Check")
    wait_for(lambda: not job.is_active, queue)
    assert "outside of the folders" in job.log
