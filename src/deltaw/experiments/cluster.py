"""Jobs on a cluster. Ray Tune schedules them and detects lost machines.

The experiment still decides about jobs, pruning and storage: it acts as a search algorithm and a scheduler of Ray Tune.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaw.errors import UserError
from deltaw.experiments.entry import Message
from deltaw.experiments.jobs import Job, JobResult, Jobs, WorkerExited, WorkerProcess
from deltaw.machine import product_rates

# Keys of a job's results for Ray Tune: an intermediate result, its answer, or an error. Values are JSON strings because
# Ray Tune flattens dictionaries.
REPORT = "report"
DONE = "answer"
ERROR = "refused"
EXITED = "process_ended"
_THREADS = "OMP_NUM_THREADS"
# Disable Ray's telemetry, logger files, SIGINT handler and change of working directory.
_OFF = ("USAGE_STATS_ENABLED", "AIR_NEW_OUTPUT", "CHDIR_TO_TRIAL_DIR", "ACCEL_ENV_VAR_OVERRIDE_ON_ZERO")
_QUIET = {f"RAY_{name}": "0" for name in _OFF}
_QUIET |= dict.fromkeys(("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "TUNE_DISABLE_SIGINT_HANDLER"), "1")


@dataclass(frozen=True)
class Cluster:
    """Cluster that runs jobs.

    Attributes:
        address: Running cluster that includes this machine (``auto`` or ``host:port``), or ``local`` to start one on
            this machine only.
        cpus: Cores per job, or None for all cores of the smallest machine.
    """

    address: str
    cpus: int | None = None


def check_cluster(cluster: Cluster) -> None:
    """Check the requirements of a cluster before anything is written.

    Raises:
        UserError: If Ray is not installed, or Ray's client is requested.
    """
    _tune()
    if "://" in cluster.address:
        message = "an experiment runs on a machine of the cluster, not through Ray's client"
        hint = "start the command on one of its machines, with --ray auto"
        raise UserError(message, location=f"--ray {cluster.address}", hint=hint)


def run_on_cluster(jobs: Jobs, cluster: Cluster, storage: Path, *, gpu: bool = True) -> None:
    """Run all jobs on the machines of a cluster, in parallel if possible.

    Args:
        storage: Folder shared by all machines, also used for Ray Tune's files.
        gpu: Reserve a GPU per job if the cluster has GPUs.

    Raises:
        UserError: If the cluster cannot be reached or is too small, or if the experiment stops with an error.
    """
    tune = _tune()
    with _connected(cluster) as (cpus, gpus, slots):
        search, scheduler = _ray_adapters(jobs)
        needs = {"cpu": float(cpus), "gpu": float(min(1, gpus)) if gpu else 0.0}
        # Threads of a job: its cores, or the setting of this process if a job uses an entire machine.
        threads = os.environ.get(_THREADS) if cluster.cpus is None else cluster.cpus
        environment = {"folder": os.getcwd(), "threads": threads, "measured": product_rates.child_environment()}
        trainable = tune.with_resources(tune.with_parameters(run_job, environment=environment), needs)
        options = tune.TuneConfig(num_samples=-1, search_alg=search, scheduler=scheduler, max_concurrent_trials=slots)
        run_config = tune.RunConfig(name="ray", storage_path=str(storage.resolve()), verbose=0, callbacks=[])
        tune.Tuner(trainable, tune_config=options, run_config=run_config).fit()
        if search.error is not None:
            raise search.error


def run_job(config: Mapping[str, Any], environment: Mapping[str, Any]) -> None:
    """Run a job in a worker process on a machine of the cluster, and report to Ray Tune."""
    tune = _tune()
    os.environ.pop(_THREADS, None)  # set by Ray
    os.environ.update(environment["measured"])
    if environment["threads"] is not None:
        os.environ[_THREADS] = str(environment["threads"])
    job = Job(**{**config["job"], "log": Path(config["job"]["log"])})

    def report(result: Message) -> bool:
        tune.report({REPORT: json.dumps(dict(result))})
        return True  # Ray Tune kills this process to stop the job

    try:
        os.chdir(environment["folder"])
        with WorkerProcess(job.log) as child:
            answer = child.ask(job.do, report, **job.request)
        measured = [json.loads(text) for text in product_rates.child_environment().values()]
        tune.report({DONE: json.dumps({"answer": answer, "measured": measured})})
    except UserError as error:
        tune.report({ERROR: json.dumps({"message": error.message, "location": error.location, "hint": error.hint})})
    except (WorkerExited, OSError) as error:
        tune.report({EXITED: json.dumps(str(error))})


def _ray_adapters(jobs: Jobs) -> tuple[Any, Any]:
    """Return the jobs as a search algorithm and a scheduler of Ray Tune."""
    from ray.tune.schedulers import FIFOScheduler
    from ray.tune.search import Searcher

    keys: dict[str, str] = {}

    class Search(Searcher):  # type: ignore[misc]
        """Suggests jobs. An error of the experiment is raised after the running jobs are done."""

        error: UserError | None = None

        def __init__(self) -> None:
            super().__init__(metric=None, mode=None)

        def set_search_properties(self, *args: object, **kwargs: object) -> bool:
            return True

        def suggest(self, trial_id: str) -> Any:
            job = None if self.error is not None else jobs.next()
            if job is None:  # running jobs may lead to new ones, unless the experiment is stopping
                return Searcher.FINISHED if self.error is not None or not keys else None
            keys[trial_id] = job.key
            return {"job": {**dataclasses.asdict(job), "log": str(job.log)}}

        def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
            try:
                jobs.complete(keys.pop(trial_id), _answer(result, error))
            except UserError as experiment_error:
                self.error = self.error or experiment_error

        def save(self, checkpoint_path: str) -> None:
            """Ray Tune's checkpoint is unused because the experiment stores its results."""

        def restore(self, checkpoint_path: str) -> None:
            """Ray Tune's checkpoint is unused because the experiment stores its results."""

        def __reduce__(self) -> Any:
            return type(None), ()  # Ray Tune pickles its settings, but the experiment cannot be pickled

    class Scheduler(FIFOScheduler):  # type: ignore[misc]
        """Stops jobs that the experiment does not continue."""

        def on_trial_result(self, tune_controller: Any, trial: Any, result: Any) -> str:
            if REPORT in result and not jobs.report(keys[trial.trial_id], json.loads(result[REPORT])):
                return str(FIFOScheduler.STOP)
            return str(FIFOScheduler.CONTINUE)

        def __reduce__(self) -> Any:
            return type(None), ()

    return Search(), Scheduler()


def _answer(result: Any, failed: bool) -> JobResult:
    """Return the answer or the error of a job from its last report."""
    result = {} if failed else result or {}
    if DONE in result:
        answer = json.loads(result[DONE])
        for measured in answer["measured"]:
            product_rates.import_rates(measured)
        return dict(answer["answer"])
    if ERROR in result:
        return UserError(**json.loads(result[ERROR]))
    if EXITED in result:
        return WorkerExited(json.loads(result[EXITED]))
    if REPORT in result:
        return {"stopped": True}
    return WorkerExited("its machine was lost, or Ray could not start it there")


@contextlib.contextmanager
def _connected(cluster: Cluster) -> Iterator[tuple[int, int, int]]:
    """Connect to the cluster, and yield the cores and GPUs of a job, and the number of parallel jobs."""
    previous = {name: os.environ[name] for name in _QUIET if name in os.environ}
    os.environ.update(_QUIET)
    import ray

    dashboard = False if cluster.address == "local" else None
    try:
        ray.init(address=cluster.address, include_dashboard=dashboard, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        message = f"cannot connect to a Ray cluster: {str(error).strip().splitlines()[0][:200]}"
        hint = "run 'ray start --head' here and 'ray start --address HOST:6379' elsewhere, or use --ray local"
        raise UserError(message, location=f"--ray {cluster.address}", hint=hint) from error
    try:
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cores = [int(machine.get("CPU", 0)) for machine in machines]
        cpus = cluster.cpus or min((count for count in cores if count), default=0)
        num_parallel = sum(count // cpus for count in cores) if cpus else 0
        if not num_parallel:
            message = f"no machine of the cluster has {cluster.cpus or 1} cores (they have {cores})"
            raise UserError(message, location="--ray-cpus", hint="request fewer cores per trial")
        gpus = [int(machine.get("GPU", 0)) for machine in machines]
        yield cpus, sum(gpus), min(num_parallel, sum(gpus)) if sum(gpus) else num_parallel
    finally:
        ray.shutdown()
        for name in _QUIET:
            del os.environ[name]
        os.environ.update(previous)


def _tune() -> Any:
    """Import Ray Tune.

    Raises:
        UserError: If it is not installed.
    """
    try:
        from ray import tune
    except ImportError as error:
        message = "trials on several machines need Ray Tune, which is not installed"
        raise UserError(message, location="--ray", hint='on every machine: pip install "deltaw[ray]"') from error
    return tune
