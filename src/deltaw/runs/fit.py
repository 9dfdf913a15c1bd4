"""Run a training: from settings to a folder with an adapter.

:func:`fit` defines the order of the steps and other modules implement them. Nothing is printed: events go to a
:class:`deltaw.training.callbacks.Callback`, and to the default callbacks, which write the report.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from deltaw.data.row_reader import RunData
from deltaw.errors import UserError
from deltaw.hub.folders import resolve
from deltaw.hub.loading import LoadedModel, load
from deltaw.hub.packages import is_package_reference
from deltaw.hub.sentence_layout import layout_files
from deltaw.kernels import compiled, gpu_attention, loader
from deltaw.lora.attachment import count_parameters
from deltaw.machine.choices import UNTESTED_GPU, Choice, choose_device
from deltaw.machine.memory import memory_limit_bytes, peak_resident_bytes, release_free_memory
from deltaw.memory.plan import Plan, available_bytes
from deltaw.methods.base import CLASSES_KEY
from deltaw.methods.start import open_start, resolve_start
from deltaw.progress import Detail, LogFunction, ignore_line, track_progress
from deltaw.runs.checkpoints import list_checkpoints
from deltaw.runs.checks import check_rows, check_settings, check_start_folders
from deltaw.runs.folder import CHECKPOINT_FOLDER, Run, RunFolder, check_output
from deltaw.runs.record import Decision, Result, RunRecord, decide_and_lock, settings_to_resume, translate_errors
from deltaw.runs.resuming import (
    assemble_session,
    receive_settings,
    require_same_model,
    require_same_rows,
    require_same_start,
    row_digests,
    run_choices,
    send_settings,
    use_saved_arithmetic,
)
from deltaw.runs.summary import write_card
from deltaw.runs.tracking import tracked
from deltaw.runs.trained_rows import write_trained_rows
from deltaw.runtime.image_tokens import statistics_folded
from deltaw.runtime.sharded import sharded_blocks
from deltaw.settings import registry
from deltaw.settings.config import RunConfig
from deltaw.settings.registry import import_object
from deltaw.training.answers import Prompting, prompting_of, write_prompting
from deltaw.training.callbacks import Callback, Callbacks, RunStart
from deltaw.training.drift import Drift, DriftMeter
from deltaw.training.evaluation.base import Evaluation
from deltaw.training.evaluation.general import NoGeneralAnswers
from deltaw.training.loop import UntrainedParameterError
from deltaw.training.microbatches import SINGLE_PROCESS, Reducer
from deltaw.training.monitoring.best import now
from deltaw.training.monitoring.generation import GenerationCheck
from deltaw.training.monitoring.monitor import Monitor
from deltaw.training.monitoring.rates import choose_rate, follow_rate
from deltaw.training.optimizer import small_data_warnings
from deltaw.training.parallel.group import Group, LostProcess
from deltaw.training.parallel.joining import apply_parallelism, require_single_process, sharded_loader, threads_of
from deltaw.training.planning.budget import (
    PLANNED_DEVICES,
    count_blocks,
    fit_card,
    memory_budget,
    memory_limit_error,
    within_memory,
)
from deltaw.training.planning.plan_run import plan_run, with_time
from deltaw.training.preparation import save_calibration
from deltaw.training.process import preserved_process_state
from deltaw.training.session import APPROXIMATE, Session, compute_evaluation_share, read_data
from deltaw.training.state import NotFinite, NotFiniteError, Outcome, Step, TrainState
from deltaw.training.task import Task


def fit(
    config: RunConfig | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    *,
    callback: Callback | None = None,
    resume: str | os.PathLike[str] | None = None,
    fresh: bool = False,
    processes: Reducer = SINGLE_PROCESS,
) -> Result:
    """Train with the given settings and write the run's folder, including its report.

    An unfinished run in the same folder is resumed from its last checkpoint. A finished run is left unchanged, and its
    result is returned. Global state (threads, random number generators, signal handlers, garbage collector) is restored
    on return.

    Args:
        config: Settings, a dictionary of settings, or the path of a YAML file.
        callback: Receives all events of the run. Without a callback, the run is silent.
        resume: Folder of a run to continue with its stored settings, even if it is finished. ``config`` is then a
            dictionary of changed settings, or None.
        fresh: Start over. An existing run in the folder is moved.
        processes: Communication with the other processes of a distributed run. This is process 0.

    Raises:
        UserError: If an argument cannot be used; nothing is written in this case. Also if memory or disk space is
            insufficient, or if the training diverged; everything trained before is saved.
        UntrainedParameterError: If a parameter in the settings is not trained. No adapter is written.
    """
    user_callback = callback or Callback()
    defaults = [import_object(name)(user_callback) for name in registry.default_callbacks]
    try:
        return _fit_or_resume(config, Callbacks(user_callback, *defaults), resume, fresh, processes)
    finally:
        for default in defaults:
            default.close()


def _fit_or_resume(
    config: RunConfig | Mapping[str, Any] | str | os.PathLike[str] | None,
    callback: Callback,
    resume: str | os.PathLike[str] | None,
    fresh: bool,
    processes: Reducer,
) -> Result:
    if resume is not None:
        if fresh or not (config is None or isinstance(config, Mapping)) or "output" in (config or {}):
            hint = "pass only the settings to change: no settings file, no 'output', no fresh"
            raise UserError("a resumed run uses its stored settings and folder", location=str(resume), hint=hint)
        config = {**(config or {}), "output": os.fspath(resume)}
        config = settings_to_resume(Path(os.path.expanduser(resume)), config)
    config = resolve_start(RunConfig.read(config), callback.on_line)
    output = Path(os.path.expanduser(config.output))
    if processes is SINGLE_PROCESS:
        require_single_process()
    with preserved_process_state(), tracked(config, callback) as run_callback:
        check_settings(config)
        check_start_folders(config, output)
        check_output(output, is_resumed=not fresh and (resume is not None or Run(output).training is not None))
        start = decide_and_lock(output, config, resume=resume is not None, fresh=fresh, log=run_callback.on_line)
        try:
            return _fit(start, output, run_callback, processes)
        finally:
            if start.lock is not None:
                start.lock.release()


class PartTimer:
    """Measures the time of a run by part. Time in a nested part counts only for the inner part."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._seconds: dict[str, float] = {}

    def add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time in this context to a part."""
        start, nested_before = time.monotonic(), sum(self._seconds.values())
        try:
            yield
        finally:
            self.add(name, time.monotonic() - start - (sum(self._seconds.values()) - nested_before))

    def parts(self) -> dict[str, float]:
        """Return the seconds of each part so far. ``other`` is the remaining time."""
        other = time.monotonic() - self._began - sum(self._seconds.values())
        return {name: round(seconds, 3) for name, seconds in {**self._seconds, "other": max(other, 0.0)}.items()}


def _fit(start: Decision, output: Path, callback: Callback, processes: Reducer) -> Result:
    started_at, clock = now(), PartTimer()
    start.config = apply_parallelism(start.config, processes, callback.on_line)
    with clock.part("loading"):
        task, data, rows = _read(start, ignore_line if start.is_finished else callback.on_line)
    if start.run is not None and start.is_finished:
        send_settings(None, processes)
        return Result.of_finished(start.run)
    with clock.part("planning"):
        config, plan = plan_memory(start.config, task, data, callback, processes=processes, resumed=start.is_resumed)
    with clock.part("loading"):
        loaded, session = _assemble(start, config, task, data, callback, processes)
    device = str(loaded.choices["device"].value)
    folder = RunFolder(output, lock=start.lock, num_metrics_lines=start.num_metrics_lines if start.is_resumed else None)
    if folder.moved is not None:
        callback.on_line(f"{output} contained an earlier run, which was moved to {folder.moved}")
    choices, log = run_choices(session, loaded.choices), callback.on_line
    record = RunRecord(start, session, folder, rows=rows, choices=choices, log=log)
    monitor = Monitor(session, folder.path, callback, folder.write_metrics, start=started_at)
    record.add("monitor", monitor, durable=monitor.on_checkpoint)
    record.extras["approximations"] = session.approximations
    trained = sum(p.numel() for _, p in session.method.parameters(session.model))
    total, drift, quality = count_parameters(session.model).total, None, {}

    def write_settings() -> None:
        chosen = {key: (c.value, c.why) for key, c in {**loaded.choices, **session.chosen}.items()}
        folder.write_settings(start.settings_to_write(config), {**chosen, **start.initial_choices()})

    try:
        with translate_errors(output, location=record.position, last=record.checkpoints.wait_for_last):
            write_settings()
            if task.tokenizer is not None:
                folder.write_tokenizer(task.tokenizer)
            folder.write_skipped(data.skipped)
            write_trained_rows(folder.path, data.train)
            session.feed.set_run_folder(folder.path)
            with clock.part("rate search"):
                should_train = choose_rate(session, folder.path, callback)
            record.update_choices(run_choices(session, loaded.choices))
            record.describe(plan, chosen_for_run := loaded.choices | session.chosen, memory_limit_bytes().value)
            callback.on_start(RunStart(folder.path, config, chosen_for_run, total, trained, session.total_steps))
            with clock.part("drift"):
                meter, check = DriftMeter(session), GenerationCheck(session)
            outcome = _train(_RunCallback(session, folder, record, monitor, callback, should_train, clock))
            evaluation = Evaluation() if outcome.interrupted else monitor.evaluation
            _compare_base(session, folder, outcome, evaluation, callback)
            write_settings()  # includes settings that were chosen during the run
            with clock.part("drift"):
                if not outcome.interrupted:
                    drift, quality = _drift(meter, folder, outcome.steps, callback), check.measure()
            processes.dismiss()
            write_card(folder.path, session, outcome, evaluation, trained, drift, quality)
            record.done(outcome)
            monitor.close(outcome, can_resume=record.checkpoints.enabled)
    except BaseException as error:
        record.failed(error)
        raise
    finally:
        folder.close()
        session.close()
    result = Result(
        folder.path,
        outcome,
        evaluation,
        torch.cuda.max_memory_allocated() if device.startswith("cuda") else peak_resident_bytes(),
        plan=plan,
        trained_parameters=trained,
        method=config.method,
        task=config.task,
        generates_text=task.generates_text,
        drift=drift,
        generation=quality,
        arithmetic=_arithmetic(session) if device == "cpu" else {},
        approximations=session.approximations.as_dict(),
        best=monitor.best.as_dict(),
        stopped_early=monitor.stopped,
        rewards_differed=monitor.rewards_differed,
        resumed_from_step=start.step,
        checkpoints=list_checkpoints(output / CHECKPOINT_FOLDER),
        seconds_by_part=clock.parts(),
    )
    return record.record_result(result)


def _read(start: Decision, log: LogFunction) -> tuple[Task[Any], RunData, dict[str, object]]:
    """Read the rows and their digests, and check that they match those of the run in the folder."""
    task, data = read_data(start.config, log, check=False, prepare=not start.is_finished)
    check_rows(start.config, task, data)
    if start.checkpoint is not None:
        require_same_start(start.checkpoint.values, open_start(start.config), Path(start.requested.output))
    rows = row_digests(data.train, data.held_out)
    if start.rows is not None:
        require_same_rows(start.rows, rows, start.requested, Path(start.requested.output), done=start.is_finished)
    if not start.is_finished:
        task.check(data, call=True)
        if start.config.start_from is not None and not start.is_resumed:
            log("the optimizer state and the learning-rate schedule are new")
    return task, data, rows


def _assemble(
    start: Decision, config: RunConfig, task: Task[Any], data: RunData, callback: Callback, processes: Reducer
) -> tuple[LoadedModel, Session]:
    """Load the model and create the session, and check that the model matches that of the checkpoint."""
    for line in [] if start.checkpoint else small_data_warnings(len(data.train), len(data.held_out), config.train):
        callback.on_line(line)
    send_settings(config, processes)
    loaded = load_model(config, task, data, callback.on_line, callback.on_choice, processes=processes)
    arithmetic = None
    if start.checkpoint is not None:
        arithmetic = use_saved_arithmetic(start.checkpoint.values["training"].get("arithmetic"))
    with track_progress("preparing the training"):
        session = assemble_session(config, task, data, loaded, processes, arithmetic)
        lines = session.lines()
    for line in [*map(Detail, session.notes), *lines]:
        callback.on_line(line)
    session.notes += lines
    if start.checkpoint is not None:
        require_same_model(start.checkpoint.values["model"], session, Path(config.output))
    start.check_length(session.total_steps)
    return loaded, session


def plan_memory(
    config: RunConfig,
    task: Task[Any],
    data: RunData,
    callback: Callback,
    *,
    processes: Reducer = SINGLE_PROCESS,
    resumed: bool = False,
) -> tuple[RunConfig, Plan | None]:
    """Plan the memory and the time of a run and return its settings, which ``memory`` may have changed.

    The plan is None if the model cannot run on fake tensors. It is the plan of each of ``processes``, which share the
    memory of their machine.

    Raises:
        UserError: If the available memory is insufficient and ``force`` is not set, or if the ``memory`` limit cannot
            be met.
    """
    device = choose_device(config.device).value
    budget = memory_budget(config.memory, device)
    if not device.startswith(PLANNED_DEVICES):
        return config, None
    limit = memory_limit_bytes().value // processes.local_size
    try:
        plan = plan_run(config, task, data, processes=processes.size)
        if device != "cpu":
            sizes = [available_bytes(memory, device) for memory in (config.memory, None)]
            limit = min((size for size in sizes if size is not None), default=limit)
            if not config.force:
                config, plan = fit_card(config, task, data, plan, limit, callback.on_line, processes.size)
        elif budget is not None:
            blocks = count_blocks(config, task, callback.on_line)
            config, plan = within_memory(config, task, data, plan, budget, blocks, processes.size)
            if checkpointed := config.train.checkpointing:
                num_checkpointed = f"all {blocks}" if checkpointed is True else f"{checkpointed} of {blocks}"
                callback.on_line(f"memory {config.memory}: activation checkpointing in {num_checkpointed} blocks")
    except UserError:
        raise
    except Exception as error:  # a custom model may fail on fake tensors and still train
        brief = f"{type(error).__name__}: {str(error)[:100]}"
        if budget is not None:
            raise memory_limit_error(brief) from error
        callback.on_line(f"no memory plan: the dry run on fake tensors failed ({brief})")
        return config, None
    if processes.size == 1 and not resumed:  # the time of the remaining steps is not predicted
        plan = with_time(plan, config, task, data)
    callback.on_plan(plan, limit)
    if plan.required_bytes > limit and not config.force:
        message = f"the run needs {plan.required_bytes:,} bytes of memory, but only {limit:,} are available"
        alternatives = "lower train.tokens_per_pass, set train.checkpointing, or train anyway with --force true"
        raise UserError(message, location="the plan", hint=f"see 'deltaw plan --fit-memory', {alternatives}")
    return config, plan


def load_model(
    config: RunConfig,
    task: Task[Any],
    data: RunData,
    log: LogFunction = ignore_line,
    choose: Callable[[str, Choice[Any]], None] | None = None,
    *,
    processes: Reducer = SINGLE_PROCESS,
) -> LoadedModel:
    """Load the model of a run. A classification head is initialized with the run's seed."""
    torch.manual_seed(config.train.seed)
    loaded = load(
        config.model,
        precision=config.precision,
        device=config.device,
        threads=threads_of(config, processes),
        task=config.task,
        num_labels=task.num_outputs(data),
        trust_remote_code=config.trust_remote_code,
        log=log,
        weights=sharded_loader(config, processes),
    )
    choose = choose or (lambda name, choice: log(Detail(f"{name}: {choice}")))
    for name, choice in loaded.choices.items():
        choose(name, choice)
    if loaded.choices["device"].value != "cpu":
        log(UNTESTED_GPU)
    if loaded.kernels is not None and (faster := loaded.kernels.faster_precision(config.precision)) is not None:
        log(faster)
    return loaded


@dataclass(eq=False)
class _RunCallback(Callback):
    """Callback that records metrics, evaluates, writes checkpoints and forwards events to the user's callback.

    Attributes:
        should_train: If False, the training stops before its first step.
    """

    session: Session
    folder: RunFolder
    record: RunRecord
    monitor: Monitor
    callback: Callback
    should_train: bool
    clock: PartTimer

    def on_begin(self, state: TrainState) -> None:
        self.record.start(state)
        self.monitor.start(state)
        self.callback.on_begin(state)

    def on_step(self, step: Step) -> None:
        self.clock.add("training", step.seconds)
        self.folder.write_metrics(step.as_dict())
        self.callback.on_step(step)
        for line in [*gpu_attention.notes(), *compiled.notes()]:  # kernels are tried when a shape first occurs
            if line not in self.session.notes:
                self.session.notes.append(line)
                self.callback.on_line(line)
        with self.clock.part("evaluating"):
            evaluation = self.monitor.on_step(step)
        self._finish_step(step.step, evaluation)

    def on_skip(self, event: NotFinite) -> None:
        self.folder.write_metrics(event.as_dict())
        self.callback.on_skip(event)
        if event.repeated:
            self.callback.on_line(f"step {event.step}: overflow at loss scale {event.loss_scale:g}, repeated")
            return
        self.callback.on_line(f"step {event.step}: skipped, its loss or gradient is not finite")
        with self.clock.part("evaluating"):
            evaluation = self.monitor.on_skip(event.step)
        self._finish_step(event.step, evaluation)

    def on_approximations(self, line: str, step: int) -> None:
        """Record that an approximation was disabled from this step on."""
        approximations = self.session.approximations
        self.session.chosen[APPROXIMATE] = approximations.choice({"": line})
        self.folder.write_metrics({"step": step, "approximations": approximations.as_dict()})
        self.callback.on_line(f"approximation disabled from step {step}: {line}")

    def should_stop(self) -> bool:
        return not self.should_train or self.callback.should_stop()

    def should_finish(self) -> bool:
        return self.monitor.should_finish() or self.callback.should_finish()

    def diagnose(self, event: NotFinite) -> Sequence[str]:
        return [*self.record.diagnose(event), *self.callback.diagnose(event)]

    def _finish_step(self, step: int, evaluation: Evaluation | None) -> None:
        checkpoints = self.record.checkpoints
        checkpoints.step_done(best=evaluation is not None and checkpoints.evaluated(step, evaluation))


def _train(run: _RunCallback) -> Outcome:
    """Train and evaluate. The adapter is saved even if the training fails, unless its parameters are inconsistent."""
    session, folder, monitor, callback = run.session, run.folder, run.monitor, run.callback
    record, checkpoints, clock = run.record, run.record.checkpoints, run.clock
    release_free_memory()
    session.approximations.on_change = run.on_approximations
    record.restore()
    with clock.part("evaluating"):
        monitor.prepare()
    release_free_memory()  # memory of the evaluation is fragmented and rarely reusable for training steps
    with session.running():
        try:
            skips = session.config.train.not_finite == "skip"
            outcome = session.train(run, checkpoint=record.saved, skip_not_finite=skips)
        except BaseException as error:
            callback.on_end(None)
            _save_adapter_after_error(session, folder.path, error, callback)
            raise
        callback.on_end(outcome)
        with track_progress("saving"):
            checkpoints.write()
            save_adapter(session, folder.path)
        with clock.part("evaluating"):
            if not outcome.interrupted:
                checkpoints.evaluated(outcome.steps, monitor.finish(outcome.steps))
            monitor.save_best(outcome.steps, functools.partial(save_adapter, session), evaluate=not outcome.interrupted)
        checkpoints.close()
    return outcome


def _save_adapter_after_error(session: Session, folder: Path, error: BaseException, callback: Callback) -> None:
    """Save the parameters that were trained before an error, if they are consistent.

    They are not if a parameter turned out to be untrained, or if an interrupt may have occurred during an update.
    """
    if isinstance(error, UntrainedParameterError | KeyboardInterrupt):
        return
    try:
        save_adapter(session, folder)
    except (UserError, OSError, SafetensorError) as save_error:
        callback.on_line(f"the adapter could not be saved: {save_error}")
        return
    if isinstance(error, UserError):
        callback.on_line(f"the adapter from before that step is in {folder}")


def _drift(meter: DriftMeter, folder: RunFolder, step: int, callback: Callback) -> Drift | None:
    """Measure and record the drift. Logs the reason if a language model has no general answers."""
    try:
        drift = meter.measure()
    except NoGeneralAnswers as reason:
        callback.on_line(f"drift: not measured ({reason})")
        return None
    if drift is not None:
        folder.write_metrics({"step": step, "general": [asdict(answer) for answer in meter.compare_answers()]})
        folder.write_metrics({"step": step, "drift": drift.as_dict()})
    return drift


def _compare_base(session: Session, folder: RunFolder, outcome: Outcome, after: Evaluation, callback: Callback) -> None:
    """Record and log the measurements of the task after training, such as the comparison with a distilled prompt."""
    if outcome.interrupted:
        return
    for name, result in session.task.final_measurements(session, after):
        folder.write_metrics({"step": outcome.steps, name: result.as_dict()})
        callback.on_line(str(result))


def save_adapter(session: Session, folder: Path) -> None:
    """Save the adapter with the names of its classes and its prompting.

    Folders in the format of sentence-transformers get the path of a base model inside a package, because other programs
    cannot resolve its reference.
    """
    classes = session.data.classes
    metadata = {} if classes is None else {CLASSES_KEY: json.dumps(list(classes))}
    metadata |= session.task.adapter_metadata(session.model)
    folder.mkdir(parents=True, exist_ok=True)
    session.task.save_extra_files(session.model, folder)
    base = session.config.model
    if layout_files(folder) and is_package_reference(base):
        base = str(resolve(base).path)
    with statistics_folded(session.model), session.task.saved_form(session.model):
        session.method.save(session.model, folder, base_model=base, metadata=metadata)
    tokenizer, writes = session.task.tokenizer, session.task.generates_text
    prompting = prompting_of(tokenizer, session.data, session.config.data) if tokenizer and writes else Prompting()
    write_prompting(folder, prompting)
    save_calibration(folder, session.identity, session.roundings)


def _arithmetic(session: Session) -> dict[str, str]:
    with session.approximations.on():
        return loader.arithmetic().as_dict()


# Worker processes (rank 1 and higher) of a distributed run. They receive the settings from process 0 and compute their
# share of each step. Only process 0 writes files and output.


# Exit status of a worker of a failed run. Process 0 reports the error.
WORKER_FAILED = 2


def follow(group: Group) -> int:
    """Take part in the run of process 0 and return the exit status.

    Raises:
        UserError: If this process cannot take part, for example because the model is not on its machine.
    """
    try:
        with preserved_process_state(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # process 0 shows the same warnings
            return _follow(group)
    except LostProcess:
        return WORKER_FAILED
    except (NotFiniteError, UntrainedParameterError):
        # Process 0 raises the same error. If this process exited first, torchrun would kill process 0 while it saves.
        with contextlib.suppress(LostProcess):
            group.obey()
        return WORKER_FAILED
    except UserError as error:
        message = f"process {group.rank} of {group.size}: {error.message}"
        raise UserError(message, location=error.location, hint=error.hint) from error


def _follow(group: Group) -> int:
    if (received := receive_settings(group)) is None:
        return 0
    # Only process 0 adds the gradients of general answers.
    config = received.with_train(keep_general=0.0)
    task, data = read_data(config, check=False)
    loaded = load_model(config, task, data, processes=group)
    session = assemble_session(config, task, data, loaded, group, None)
    if (sharded := sharded_blocks(loaded.model)) is not None:
        group.gather = sharded.gather
    group.evaluate = lambda number: compute_evaluation_share(session, number)
    try:
        follow_rate(session, group)
        with session.running():
            session.train(skip_not_finite=config.train.not_finite == "skip")
            group.obey()
    finally:
        session.close()
    return 0
