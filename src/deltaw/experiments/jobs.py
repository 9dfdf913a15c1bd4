"""What an experiment lets worker processes do: one job after another here, or several at once on a Ray cluster.

An experiment knows what is to be done next and what an answer means (:class:`Jobs`); who does it, and where, is not
its concern. On each machine a job is done by a process of its own (:class:`Child`), whose other side is
:mod:`deltaw.experiments.worker`. Ray is imported where it is used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from deltaw.errors import UserError
from deltaw.machine import product_rates
from deltaw.machine.product_rates import for_children, learn

SECONDS_TO_END = 10.0


class WorkerEnded(Exception):
    """The worker process ended before it answered; the message says how."""


class Child:
    """A worker process (:mod:`deltaw.experiments.worker`), started by the first request.

    The worker ends when this process ends, for any reason. Ctrl-C reaches this process alone.

    Args:
        log: file to which the worker's output is appended.
    """

    def __init__(self, log: Path) -> None:
        self._log = log
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(
        self, do: str, on_report: Callable[[Mapping[str, object]], bool] | None = None, **request: object
    ) -> dict[str, object]:
        """Send a request and return the worker's answer.

        Args:
            do: name of the request; ``request`` holds its arguments.
            on_report: called with each intermediate report; returns whether the worker should continue.

        Raises:
            UserError: the worker refused the request.
            WorkerEnded: the worker process is gone; the next request starts another.
        """
        process = self._started()
        self._write({"do": do, **request})
        assert process.stdout is not None
        for line in process.stdout:
            message = json.loads(line)
            if "report" in message:
                self._write(on_report is None or on_report(message["report"]))
            elif "error" in message:
                raise UserError(**message["error"])
            else:
                learn(message.get("measured"))
                return dict(message["done"])
        raise WorkerEnded(self._ended(self.close()))

    def close(self) -> int | None:
        """End the process. Returns its exit status, or None if no process was running."""
        process, self._process = self._process, None
        if process is None:
            return None
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(OSError):  # the worker has exited with a request unread
            process.stdin.close()
        try:
            process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            process.kill()
        process.stdout.close()
        return process.wait()

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            with self._log.open("a", encoding="utf-8") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "deltaw.experiments.worker"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env={**os.environ, **for_children()},
                    text=True,
                    encoding="utf-8",
                    start_new_session=os.name == "posix",
                    creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
                )
        return self._process

    def _write(self, message: object) -> None:
        assert self._process is not None and self._process.stdin is not None
        with contextlib.suppress(OSError):  # its output ends too, and `ask` reports how it ended
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()

    def _ended(self, status: int | None) -> str:
        if status is not None and status < 0:
            name = signal.Signals(-status).name
            why = ": memory may have run out" if name == "SIGKILL" else ""
            return f"its process was ended by {name}{why} (see {self._log})"
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        last = f": {lines[-1][:200]}" if lines else ""
        return f"its process ended with status {status}{last} (see {self._log})"


# A job's answer, or why there is none.
Found: TypeAlias = Mapping[str, object] | UserError | WorkerEnded


@dataclass(frozen=True)
class Job:
    """One request to a worker.

    Attributes:
        key: tells it from the other jobs of its experiment. do, request: of :meth:`Child.ask`.
        log: file to which the output of a worker of its own is appended.
        alone: whether it needs such a worker even where jobs can share one.
    """

    key: str
    do: str
    log: Path
    request: Mapping[str, object] = field(default_factory=dict)
    alone: bool = False


class Jobs(Protocol):
    """What is to be done, and what becomes of it. Never called from two threads at once."""

    def next(self) -> Job | None:
        """The next job; None where there is none beside those that are under way."""
        ...

    def report(self, key: str, report: Mapping[str, object]) -> bool:
        """An intermediate result; whether the job is to go on."""
        ...

    def ended(self, key: str, found: Found) -> None:
        """A job's answer, or why there is none.

        Raises:
            UserError: the experiment is to end.
        """
        ...


def here(jobs: Jobs, worker: Child) -> None:
    """Do all jobs on this machine, one after another: by ``worker``, or by one of their own where they are alone.

    Raises:
        UserError: the experiment ends with it.
    """
    while (job := jobs.next()) is not None:
        key = job.key
        if job.alone:
            worker.close()
        with Child(job.log) if job.alone else contextlib.nullcontext(worker) as asked:
            try:
                found: Found = asked.ask(job.do, lambda report, key=key: jobs.report(key, report), **job.request)  # type: ignore[misc]
            except (UserError, WorkerEnded) as error:
                found = error
        jobs.ended(key, found)


# Jobs on a cluster: Ray Tune places them and notices lost machines. What is to be tried, what is pruned and what is
# stored stays with the experiment: its jobs are what Ray Tune calls a search, and its answers to reports a scheduler.

# What a job reports to Ray Tune, each as JSON, since Ray Tune takes dictionaries apart: an intermediate
# result, its answer, or why there is none.
REPORT, DONE, ERROR, ENDED = "report", "answer", "refused", "process_ended"
_THREADS = "OMP_NUM_THREADS"
# Ray's own behavior: no statistics sent home, no files of loggers, Ctrl-C as everywhere, no change of folder.
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


@dataclass(frozen=True)
class Cluster:
    """Where jobs are done.

    Attributes:
        address: of a running cluster that this machine belongs to (``auto``, or ``host:port``), or ``local``,
            which starts one of this machine alone.
        cpus: cores of a job; None: all of the machine with the fewest.
    """

    address: str
    cpus: int | None = None


def check_cluster(cluster: Cluster) -> None:
    """Refuse what cannot work, before anything is written.

    Raises:
        UserError: Ray is not installed, or its client is asked for.
    """
    _tune()
    if "://" in cluster.address:
        what = "an experiment runs on a machine of the cluster, not through Ray's client"
        hint = "start the command on one of its machines, with --ray auto"
        raise UserError(what, where=f"--ray {cluster.address}", hint=hint)


def elsewhere(jobs: Jobs, cluster: Cluster, storage: Path, *, gpu: bool = True) -> None:
    """Do all jobs on the machines of a cluster, as many at once as it has room for.

    Args:
        storage: a folder that all machines see; Ray Tune keeps its own files in it.
        gpu: whether a job takes a GPU, where the cluster has any.

    Raises:
        UserError: the cluster cannot be reached or has no room, or the experiment ends with it.
    """
    tune = _tune()
    with _connected(cluster) as (cpus, gpus, at_once):
        search, scheduler = _sides(jobs)
        needs = {"cpu": float(cpus), "gpu": float(min(1, gpus)) if gpu else 0.0}
        # Threads of a job: its cores, or what this process was told if a job has a machine for itself.
        threads = os.environ.get(_THREADS) if cluster.cpus is None else cluster.cpus
        told = {"folder": os.getcwd(), "threads": threads, "measured": product_rates.for_children()}
        does = tune.with_resources(tune.with_parameters(work, told=told), needs)
        how = tune.TuneConfig(num_samples=-1, search_alg=search, scheduler=scheduler, max_concurrent_trials=at_once)
        files = tune.RunConfig(name="ray", storage_path=str(storage.resolve()), verbose=0, callbacks=[])
        tune.Tuner(does, tune_config=how, run_config=files).fit()
        if search.error is not None:
            raise search.error


def work(config: Mapping[str, Any], told: Mapping[str, Any]) -> None:
    """On a machine of the cluster: let a worker of its own do one job, and report to Ray Tune."""
    tune = _tune()
    os.environ.pop(_THREADS, None)  # Ray's own choice
    os.environ.update(told["measured"])
    if told["threads"] is not None:
        os.environ[_THREADS] = str(told["threads"])
    job = Job(**{**config["job"], "log": Path(config["job"]["log"])})

    def report(found: Mapping[str, object]) -> bool:
        tune.report({REPORT: json.dumps(dict(found))})
        return True  # Ray Tune ends this process otherwise

    try:
        os.chdir(told["folder"])
        with Child(job.log) as child:
            answer = child.ask(job.do, report, **job.request)
        measured = [json.loads(text) for text in product_rates.for_children().values()]
        tune.report({DONE: json.dumps({"answer": answer, "measured": measured})})
    except UserError as error:
        tune.report({ERROR: json.dumps({"what": error.what, "where": error.where, "hint": error.hint})})
    except (WorkerEnded, OSError) as error:
        tune.report({ENDED: json.dumps(str(error))})


def _sides(jobs: Jobs) -> tuple[Any, Any]:
    """The jobs as Ray Tune sees them: what suggests configurations, and what stops them."""
    from ray.tune.schedulers import FIFOScheduler
    from ray.tune.search import Searcher

    keys: dict[str, str] = {}

    class Search(Searcher):  # type: ignore[misc]
        """Suggests the jobs; an error of the experiment waits until those under way are done."""

        error: UserError | None = None

        def __init__(self) -> None:
            super().__init__(metric=None, mode=None)

        def set_search_properties(self, *given: object, **named: object) -> bool:
            return True

        def suggest(self, trial_id: str) -> Any:
            job = None if self.error is not None else jobs.next()
            if job is None:  # a job that is under way may lead to others, unless the experiment is to end
                return Searcher.FINISHED if self.error is not None or not keys else None
            keys[trial_id] = job.key
            return {"job": {**dataclasses.asdict(job), "log": str(job.log)}}

        def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
            try:
                jobs.ended(keys.pop(trial_id), _answer(result, error))
            except UserError as found:
                self.error = self.error or found

        def save(self, checkpoint_path: str) -> None:
            """The experiment stores its own results."""

        def restore(self, checkpoint_path: str) -> None:
            """As it does not go on from Ray Tune's files."""

        def __reduce__(self) -> Any:
            return type(None), ()  # Ray Tune pickles its settings; the experiment cannot be, and need not be

    class Scheduler(FIFOScheduler):  # type: ignore[misc]
        """Ends the jobs that the experiment does not let go on."""

        def on_trial_result(self, tune_controller: Any, trial: Any, result: Any) -> str:
            if REPORT in result and not jobs.report(keys[trial.trial_id], json.loads(result[REPORT])):
                return str(FIFOScheduler.STOP)
            return str(FIFOScheduler.CONTINUE)

        def __reduce__(self) -> Any:
            return type(None), ()

    return Search(), Scheduler()


def _answer(result: Any, failed: bool) -> Found:
    """What the last thing that a job reported means."""
    result = {} if failed else result or {}
    if DONE in result:
        found = json.loads(result[DONE])
        for measured in found["measured"]:
            product_rates.learn(measured)
        return dict(found["answer"])
    if ERROR in result:
        return UserError(**json.loads(result[ERROR]))
    if ENDED in result:
        return WorkerEnded(json.loads(result[ENDED]))
    if REPORT in result:
        return {"stopped": True}
    return WorkerEnded("its machine was lost, or Ray could not start it there")


@contextlib.contextmanager
def _connected(cluster: Cluster) -> Iterator[tuple[int, int, int]]:
    """While open, this process belongs to the cluster: cores of a job, its GPUs, and how many fit at once."""
    before = {name: os.environ[name] for name in _QUIET if name in os.environ}
    os.environ.update(_QUIET)
    import ray

    dashboard = False if cluster.address == "local" else None
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        ray.init(address=cluster.address, include_dashboard=dashboard, **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        what = f"there is no Ray cluster: {str(error).strip().splitlines()[0][:200]}"
        hint = "run 'ray start --head' here and 'ray start --address HOST:6379' elsewhere, or use --ray local"
        raise UserError(what, where=f"--ray {cluster.address}", hint=hint) from error
    try:
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cores = [int(machine.get("CPU", 0)) for machine in machines]
        cpus = cluster.cpus or min((count for count in cores if count), default=0)
        at_once = sum(count // cpus for count in cores) if cpus else 0
        if not at_once:
            what = f"no machine of the cluster has {cluster.cpus or 1} cores (they have {cores})"
            raise UserError(what, where="--ray-cpus", hint="ask for fewer cores a trial")
        gpus = [int(machine.get("GPU", 0)) for machine in machines]
        yield cpus, sum(gpus), min(at_once, sum(gpus)) if sum(gpus) else at_once
    finally:
        ray.shutdown()
        for name in _QUIET:
            del os.environ[name]
        os.environ.update(before)


def _tune() -> Any:
    """Ray Tune.

    Raises:
        UserError: it is not installed.
    """
    try:
        from ray import tune
    except ImportError as error:
        what = "trials on several machines need Ray Tune, which is not installed"
        raise UserError(what, where="--ray", hint='on every machine: pip install "deltaw[ray]"') from error
    return tune
