"""One whole run: from settings to a folder with an adapter.

:func:`fit` shows the order of a run; other modules do the work. Nothing is printed: a
:class:`deltaw.training.callbacks.Callback` is told.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

from deltaw.errors import UserError
from deltaw.hub.folders import config_folder, resolve
from deltaw.hub.loading import LoadedModel, check_architecture, load
from deltaw.hub.packages import is_package_reference
from deltaw.hub.sentence_layout import layout_files
from deltaw.kernels import loader
from deltaw.lora.attachment import count_parameters
from deltaw.machine.choices import Choice, choose_device, choose_precision
from deltaw.machine.memory import memory_limit_bytes, peak_resident_bytes, release_free_memory
from deltaw.memory.plan import Plan
from deltaw.methods.base import CLASSES_KEY, Method
from deltaw.runs.checkpoints import listed
from deltaw.runs.checks import check_rows, check_settings
from deltaw.runs.folder import FOLDER, Run, RunFolder, check_output
from deltaw.runs.record import Result, RunRecord, Start, begin, clear_end, settings_to_resume
from deltaw.runs.resuming import (
    assemble_alike,
    choices_of,
    compute_as,
    require_same_model,
    require_same_rows,
    rows_facts,
    send_settings,
)
from deltaw.runs.summary import write_card
from deltaw.runs.tracking import Tracking
from deltaw.runtime.generation import Sampler, Writer
from deltaw.settings import RunConfig
from deltaw.training.callbacks import Callback, RunStart, Say, silent
from deltaw.training.drift import Drift, DriftMeter
from deltaw.training.evaluation.base import Evaluation
from deltaw.training.evaluation.general import NoGeneralAnswers
from deltaw.training.guarantee import UntrainedParameterError
from deltaw.training.monitoring.best import now
from deltaw.training.monitoring.distilled import compare_with_prompt
from deltaw.training.monitoring.generation import GenerationCheck
from deltaw.training.monitoring.monitor import Monitor
from deltaw.training.monitoring.neighbors import neighbor_drift
from deltaw.training.monitoring.rates import choose_rate
from deltaw.training.origin import InferenceSession
from deltaw.training.parallel.joining import as_parallel, divided, refuse_alone, threads_of
from deltaw.training.parallel.reducer import ALONE, Reducer
from deltaw.training.planning.budget import memory_budget, no_plan_to_keep, within_memory
from deltaw.training.planning.plan_run import plan_run
from deltaw.training.preparation import save_calibration
from deltaw.training.process import guest
from deltaw.training.prompting import prompting_of, write_prompting
from deltaw.training.session import APPROXIMATE, Session, read_data
from deltaw.training.small_data import small_data_lines
from deltaw.training.state import NotFinite, Outcome, Step, TrainState
from deltaw.training.tasks.base import RunData, Task
from deltaw.working import Detail, working


@dataclass(frozen=True)
class Decoding:
    """Makes what writes the texts of a model and its adapter, greedily or drawn."""

    writer: Callable[[InferenceSession], Writer]
    sampler: Callable[[InferenceSession], Sampler]


def fit(
    config: RunConfig | Mapping | str | os.PathLike[str] | None = None,
    *,
    callback: Callback | None = None,
    resume: str | os.PathLike[str] | None = None,
    fresh: bool = False,
    processes: Reducer = ALONE,
    decoding: Decoding | None = None,
) -> Result:
    """Train as ``config`` says and write the run's folder, all but its page, which :func:`deltaw.reports.run.fit`
    adds: arguments, result and errors are described there.

    Args:
        processes: that train together; this is process 0, and the others :func:`deltaw.runs.follower.follow`.
        decoding: makes what writes texts; None for transformers, which draws none.
    """
    if resume is not None:
        if fresh or not (config is None or isinstance(config, Mapping)) or "output" in (config or {}):
            hint = "pass only single settings to change: no settings file, no 'output', no fresh"
            raise UserError("a resumed run keeps its own settings and folder", where=str(resume), hint=hint)
        config = {**(config or {}), "output": os.fspath(resume)}
        config = settings_to_resume(Path(os.path.expanduser(resume)), config)
    config = RunConfig.read(config)
    output = Path(os.path.expanduser(config.output))
    if processes is ALONE:
        refuse_alone()
    with guest(), Tracking(config, callback or Callback()) as told:
        check_settings(config)
        check_output(output, goes_on=not fresh and (resume is not None or Run(output).training is not None))
        start = begin(output, config, asked=resume is not None, fresh=fresh, say=told.on_line)
        try:
            return _fit(start, output, told, processes, decoding)
        finally:
            if start.lock is not None:
                start.lock.release()


class Clock:
    """Where a run's time goes: seconds by part. What a part holds of another one counts once, as the inner one."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._seconds: dict[str, float] = {}

    def add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """While open, time is that part's."""
        begun, known = time.monotonic(), sum(self._seconds.values())
        try:
            yield
        finally:
            self.add(name, time.monotonic() - begun - (sum(self._seconds.values()) - known))

    def parts(self) -> dict[str, float]:
        """Seconds by part up to now; ``other`` is the rest."""
        rest = time.monotonic() - self._began - sum(self._seconds.values())
        return {name: round(seconds, 3) for name, seconds in {**self._seconds, "other": max(rest, 0.0)}.items()}


def _fit(start: Start, output: Path, callback: Callback, processes: Reducer, decoding: Decoding | None) -> Result:
    began, clock = now(), Clock()
    start.config = as_parallel(start.config, processes, callback.on_line)
    with clock.part("loading"):
        task, data, rows = _read(start, silent if start.done else callback.on_line)
    if start.run is not None and start.done:
        send_settings(None, processes)
        return Result.of_finished(start.run)
    with clock.part("planning"):
        config, plan = planned(start.config, task, data, callback, processes=processes)
    with clock.part("loading"):
        loaded, session = _assembled(start, config, task, data, callback, processes, decoding)
    device = str(loaded.choices["device"].value)
    folder = RunFolder(output, lock=start.lock, lines_kept=start.lines_kept if start.goes_on else None)
    if folder.moved is not None:
        callback.on_line(f"{output} held an earlier run, which is now in {folder.moved}")
    choices, say = choices_of(session, loaded.choices), callback.on_line
    record = RunRecord(start, session, folder, rows=rows, choices=choices, say=say)
    monitor = Monitor(session, folder.path, callback, folder.write_metrics, began=began)
    record.add("monitor", monitor, durable=monitor.checkpointed)
    record.extras["approximations"] = session.approximations
    trained = sum(p.numel() for _, p in session.method.parameters(session.model))
    total, drift, quality = count_parameters(session.model).total, None, {}

    def write_settings() -> None:
        chosen = {key: (c.value, c.why) for key, c in {**loaded.choices, **session.chosen}.items()}
        folder.write_settings(start.as_written(config), {**chosen, **start.as_begun()})

    try:
        with clear_end(output, where=record.where, last=record.checkpoints.settled):
            write_settings()
            if task.tokenizer is not None:
                folder.write_tokenizer(task.tokenizer)
            folder.write_skipped(data.skipped)
            session.feed.keep_in(folder.path)
            with clock.part("rate search"):
                searched = choose_rate(session, folder.path, callback)
            record.chose(choices_of(session, loaded.choices))
            record.describe(plan, of_run := loaded.choices | session.chosen, memory_limit_bytes().value)
            callback.on_start(RunStart(folder.path, config, of_run, total, trained, session.total_steps))
            with clock.part("drift"):
                meter, check = DriftMeter(session), GenerationCheck(session)
            outcome = _train(_Watching(session, folder, record, monitor, callback, searched, clock))
            evaluation = Evaluation() if outcome.interrupted else monitor.evaluation
            _compare_with_base(session, folder, outcome, evaluation, callback)
            write_settings()  # with what was chosen on the way
            with clock.part("drift"):
                if not outcome.interrupted:
                    drift, quality = _drift(meter, folder, outcome.steps, callback), check.measure()
            processes.dismiss()
            write_card(folder.path, session, outcome, evaluation, trained, drift, quality)
            record.done(outcome)
            monitor.done(outcome, goes_on=record.checkpoints.enabled)
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
        writes_text=task.writes_text,
        drift=drift,
        generation=quality,
        arithmetic=_arithmetic(session) if device == "cpu" else {},
        approximations=session.approximations.as_dict(),
        best=monitor.best.as_dict(),
        stopped_early=monitor.stopped,
        resumed_from_step=start.step,
        checkpoints=listed(output / FOLDER),
        seconds_by_part=clock.parts(),
    )
    return record.came_to(result)


def _read(start: Start, say: Say) -> tuple[Task, RunData, dict[str, object]]:
    """The run's rows, and what identifies them; a run in the folder must have had the same."""
    task, data = read_data(start.config, say, check=False)
    check_rows(start.config, task, data)
    rows = rows_facts(data.train, data.held_out)
    if start.rows is not None:
        require_same_rows(start.rows, rows, start.asked, Path(start.asked.output), done=start.done)
    if not start.done:
        task.check(data, call=True)
    return task, data, rows


def _assembled(
    start: Start,
    config: RunConfig,
    task: Task,
    data: RunData,
    callback: Callback,
    processes: Reducer,
    decoding: Decoding | None,
) -> tuple[LoadedModel, Session]:
    """The run's model, loaded, and its session; what the run began with must be what is there."""
    for line in [] if start.found else small_data_lines(len(data.train), len(data.held_out), config.train):
        callback.on_line(line)
    send_settings(config, processes)
    loaded = load_for(config, task, data, callback.on_line, callback.on_choice, processes=processes)
    begun = None if start.found is None else compute_as(start.found.values["training"].get("arithmetic"))
    writes = None if decoding is None else functools.partial(_writer, decoding, loaded, config, task)
    samples = sampler_of(decoding, loaded, config, task)
    with working("preparing the training"):
        session = assemble_alike(config, task, data, loaded, processes, begun, writes=writes, samples=samples)
        lines = session.lines()
    for line in [*map(Detail, session.said), *lines]:
        callback.on_line(line)
    session.said += lines
    if start.found is not None:
        require_same_model(start.found.values["model"], session, Path(config.output))
    start.check_length(session.total_steps)
    return loaded, session


def _writer(decoding: Decoding, loaded: LoadedModel, config: RunConfig, task: Task, method: Method | None) -> Writer:
    return decoding.writer(InferenceSession(loaded, config, method, task))


def sampler_of(
    decoding: Decoding | None, loaded: LoadedModel, config: RunConfig, task: Task
) -> Callable[[Method], Sampler] | None:
    """What makes the sampler of a model with a method's adapter."""
    if decoding is None:
        return None
    return lambda method: decoding.sampler(InferenceSession(loaded, config, method, task))


def planned(
    config: RunConfig, task: Task, data: RunData, callback: Callback, *, processes: Reducer = ALONE
) -> tuple[RunConfig, Plan | None]:
    """The run's plan; None where the model cannot be run on fake tensors. With it the settings, which
    ``memory`` may have changed. It is that of each of ``processes``, which share their machine's memory.

    Raises:
        UserError: the memory that the machine gives does not suffice, and ``force`` is not set; or ``memory``
            is set where it cannot be kept.
    """
    device = choose_device(config.device).value
    budget = memory_budget(config.memory, device)
    if device != "cpu":
        return config, None
    limit = memory_limit_bytes().value // processes.local_size
    try:
        plan = plan_run(config, task, data, processes=processes.size)
        if budget is not None:
            blocks = count_blocks(config, task, callback.on_line)
            config, plan = within_memory(config, task, data, plan, budget, blocks, processes.size)
            checkpointed = config.train.checkpointing
            if checkpointed:
                shown = f"all {blocks}" if checkpointed is True else f"{checkpointed} of {blocks}"
                callback.on_line(f"memory {config.memory}: activation checkpointing in {shown} blocks")
    except UserError:
        raise
    except Exception as error:  # whatever a foreign model raises on fake tensors, it may well train
        brief = f"{type(error).__name__}: {str(error)[:100]}"
        if budget is not None:
            raise no_plan_to_keep(brief) from error
        callback.on_line(f"no memory plan: the dry run on fake tensors failed ({brief})")
        return config, None
    callback.on_plan(plan, limit)
    if plan.peak_resident_bytes > limit and not config.force:
        what = f"the run needs {plan.peak_resident_bytes:,} bytes of memory, and the machine gives {limit:,}"
        ways = "lower train.tokens_per_pass, set train.checkpointing, or train anyway with --force true"
        raise UserError(what, where="the plan", hint=f"see what fits with 'deltaw plan --budget', {ways}")
    return config, plan


def count_blocks(config: RunConfig, task: Task, say: Say) -> int:
    """How many blocks the run's model has, by its configuration."""
    dtype = choose_precision("cpu", config.precision).value
    folder = config_folder(config.model, dtype, config.trust_remote_code, say=say)
    text = check_architecture(folder, task.name, config.trust_remote_code).get_text_config()
    return int(getattr(text, "num_hidden_layers", 1))


def load_for(
    config: RunConfig,
    task: Task,
    data: RunData,
    say: Say = silent,
    choose: Callable[[str, Choice], None] | None = None,
    *,
    processes: Reducer = ALONE,
) -> LoadedModel:
    """The model of a run, with a head for the data's classes, which starts at random by the run's seed."""
    torch.manual_seed(config.train.seed)
    loaded = load(
        config.model,
        precision=config.precision,
        device=config.device,
        threads=threads_of(config, processes),
        task=config.task,
        num_labels=task.outputs(data),
        trust_remote_code=config.trust_remote_code,
        say=say,
        weights=divided(config, processes),
    )
    for name, choice in loaded.choices.items():
        if choose is None:
            say(Detail(f"{name}: {choice}"))
        else:
            choose(name, choice)
    if loaded.kernels is not None and (faster := loaded.kernels.faster_precision(config.precision)) is not None:
        say(faster)
    return loaded


class _Watching(Callback):
    """What a run does with what its training reports: writes it down, evaluates, keeps checkpoints, and tells the
    caller's callback, on a clock. Without ``go_on`` the training ends before its first step."""

    def __init__(
        self,
        session: Session,
        folder: RunFolder,
        record: RunRecord,
        monitor: Monitor,
        callback: Callback,
        go_on: bool,
        clock: Clock,
    ) -> None:
        self.session, self.folder, self.record, self.monitor = session, folder, record, monitor
        self.callback, self._go_on, self.clock = callback, go_on, clock

    def on_begin(self, state: TrainState) -> None:
        self.record.begin(state)
        self.monitor.begin(state)
        self.callback.on_begin(state)

    def on_step(self, step: Step) -> None:
        self.clock.add("training", step.seconds)
        self.folder.write_metrics(step.as_dict())
        self.callback.on_step(step)
        with self.clock.part("evaluating"):
            found = self.monitor.on_step(step)
        self._after(step.step, found)

    def on_skip(self, found: NotFinite) -> None:
        self.folder.write_metrics(found.as_dict())
        self.callback.on_skip(found)
        self.callback.on_line(f"step {found.step}: skipped, its loss or gradient is not finite")
        with self.clock.part("evaluating"):
            evaluation = self.monitor.on_skip(found.step)
        self._after(found.step, evaluation)

    def on_approximations(self, line: str, step: int) -> None:
        """From this step on something is no longer approximate."""
        approximations = self.session.approximations
        self.session.chosen[APPROXIMATE] = approximations.choice({"": line})
        self.folder.write_metrics({"step": step, "approximations": approximations.as_dict()})
        self.callback.on_line(f"not approximate from step {step} on: {line}")

    def should_stop(self) -> bool:
        return not self._go_on or self.callback.should_stop()

    def ended(self) -> bool:
        return self.monitor.ended() or self.callback.ended()

    def diagnose(self, found: NotFinite) -> Sequence[str]:
        return [*self.record.diagnose(found), *self.callback.diagnose(found)]

    def _after(self, step: int, decided: Evaluation | None) -> None:
        checkpoints = self.record.checkpoints
        checkpoints.step_done(best=decided is not None and checkpoints.evaluated(step, decided))


def _train(watching: _Watching) -> Outcome:
    """The training and its evaluations; the adapter is saved however the training ends, unless it was not
    trained."""
    session, folder, monitor, callback = watching.session, watching.folder, watching.monitor, watching.callback
    record, checkpoints, clock = watching.record, watching.record.checkpoints, watching.clock
    release_free_memory()
    session.approximations.on_change = watching.on_approximations
    record.restore()
    with clock.part("evaluating"):
        monitor.before()
    release_free_memory()  # of what was evaluated: the steps' tensors seldom fit its holes
    with session.running():
        try:
            skips = session.config.train.not_finite == "skip"
            outcome = session.train(watching, saved=record.saved, skip_not_finite=skips)
        except BaseException as error:
            callback.on_end(None)
            _keep_adapter(session, folder.path, error, callback)
            raise
        callback.on_end(outcome)
        with working("saving"):
            checkpoints.write()
            save_adapter(session, folder.path)
        with clock.part("evaluating"):
            if not outcome.interrupted:
                checkpoints.evaluated(outcome.steps, monitor.finish(outcome.steps))
            monitor.put_best(outcome.steps, lambda to: save_adapter(session, to), evaluate=not outcome.interrupted)
        checkpoints.close()
    return outcome


def _keep_adapter(session: Session, folder: Path, error: BaseException, callback: Callback) -> None:
    """After an error, save what was trained before it, where that is sound: not what is said to be trained
    and is not, nor what an interruption at once may have left half changed."""
    if isinstance(error, UntrainedParameterError | KeyboardInterrupt):
        return
    try:
        save_adapter(session, folder)
    except (UserError, OSError, SafetensorError) as another:
        callback.on_line(f"the adapter could not be saved: {another}")
        return
    if isinstance(error, UserError):
        callback.on_line(f"the adapter as it was before that step is in {folder}")


def _drift(meter: DriftMeter, folder: RunFolder, step: int, callback: Callback) -> Drift | None:
    """How far general answers moved, written down; said why not where a language model gives none."""
    try:
        drift = meter.measure()
    except NoGeneralAnswers as reason:
        callback.on_line(f"drift: not measured ({reason})")
        return None
    if drift is not None:
        folder.write_metrics({"step": step, "general": [asdict(answer) for answer in meter.side_by_side()]})
        folder.write_metrics({"step": step, "drift": drift.as_dict()})
    return drift


def _compare_with_base(
    session: Session, folder: RunFolder, outcome: Outcome, trained: Evaluation, callback: Callback
) -> None:
    """What a prompt that was trained into the adapter saves, and what became of general sentences' neighbors, written
    down and said."""
    if outcome.interrupted:
        return
    for name, found in (("distilled", compare_with_prompt(session, trained)), ("drift", neighbor_drift(session))):
        if found is not None:
            folder.write_metrics({"step": outcome.steps, name: found.as_dict()})
            callback.on_line(str(found))


def save_adapter(session: Session, folder: Path) -> None:
    """Write what was trained, with the names of a classifier's classes in the weights file's metadata, and how its
    rows are prompted. Programs that read more than the adapter cannot find a base model inside a package by its
    reference, and get its path."""
    classes = session.data.classes
    metadata = {} if classes is None else {CLASSES_KEY: json.dumps(list(classes))}
    folder.mkdir(parents=True, exist_ok=True)
    session.task.write_beside(session.model, folder)
    base = session.config.model
    if layout_files(folder) and is_package_reference(base):
        base = str(resolve(base).path)
    session.method.save(session.model, folder, base_model=base, metadata=metadata)
    write_prompting(folder, prompting_of(session.task, session.data, session.config.data))
    save_calibration(folder, session.identity, session.roundings)


def _arithmetic(session: Session) -> dict[str, str]:
    with session.approximations.on():
        return loader.arithmetic().as_dict()
