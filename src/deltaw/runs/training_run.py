"""State of a run that is being trained, and the steps that :func:`deltaw.runs.fit.fit` calls in order."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from deltaw.data.row_reader import RunData
from deltaw.errors import UserError
from deltaw.hub.loading import LoadedModel
from deltaw.kernels import busy_machine, loader
from deltaw.lora.attachment import count_parameters
from deltaw.machine.choices import Choice
from deltaw.machine.memory import memory_limit_bytes, peak_resident_bytes, release_free_memory
from deltaw.memory.plan import Plan
from deltaw.methods.start import open_start
from deltaw.progress import Detail, ignore_line, track_progress
from deltaw.runs.checkpoints import list_checkpoints
from deltaw.runs.checks import check_rows
from deltaw.runs.decision import Decision
from deltaw.runs.folder import CHECKPOINT_FOLDER, RunFolder
from deltaw.runs.load_model import load_model
from deltaw.runs.memory_check import plan_memory
from deltaw.runs.part_timer import PartTimer
from deltaw.runs.process_agreement import assemble_session, send_settings
from deltaw.runs.record import RunRecord
from deltaw.runs.result import Result
from deltaw.runs.resuming import (
    require_same_model,
    require_same_rows,
    require_same_start,
    row_digests,
    run_choices,
    use_saved_arithmetic,
)
from deltaw.runs.run_callback import RunCallback
from deltaw.runs.save_adapter import save_adapter
from deltaw.runs.summary import write_card
from deltaw.runs.trained_rows import write_trained_rows
from deltaw.runs.translate_errors import translate_errors
from deltaw.training.callbacks import Callback, RunStart
from deltaw.training.evaluation.base import Evaluation
from deltaw.training.monitoring.best import now
from deltaw.training.monitoring.monitor import Monitor
from deltaw.training.monitoring.probe import Probe
from deltaw.training.monitoring.probes import run_probes
from deltaw.training.monitoring.rates import choose_rate
from deltaw.training.parallel.joining import apply_parallelism
from deltaw.training.reducer import Reducer
from deltaw.training.session import Session, read_data
from deltaw.training.small_data import small_data_warnings
from deltaw.training.state import Outcome
from deltaw.training.task import Task
from deltaw.training.trained_check import UntrainedParameterError


class TrainingRun:
    """A run from its settings to its result. Each step sets the attributes that later steps read.

    Args:
        start: Decision to start or to resume the run.
        callback: Receives the events of the run.
        processes: Communication with the other processes of a distributed run.

    Attributes:
        config: Settings to train with. Planning may enable activation checkpointing.
        clock: Time of the run by part.
        task: Training task.
        data: Rows of the run.
        row_digests: Digests of the rows.
        plan: Plan of memory and time, or None if the model cannot run on fake tensors.
        loaded: Base model with the choices of its loading.
        session: Model, method, rows and task, ready for training.
        folder: Folder of the run.
        record: State of the run in ``run.json`` and checkpoints.
        probes: Measurements of the base model and the trained model.
        monitor: Evaluations during the run.
        num_trained: Number of trained parameters.
        outcome: Totals of the training.
        evaluation: Evaluation after the training. Empty if the training was interrupted.
        probe_fields: Fields of the result that the probes measured, such as ``drift``.
    """

    task: Task[Any]
    data: RunData
    row_digests: dict[str, object]
    plan: Plan | None
    loaded: LoadedModel
    session: Session
    folder: RunFolder
    record: RunRecord
    probes: Sequence[Probe]
    monitor: Monitor
    num_trained: int
    outcome: Outcome

    def __init__(self, start: Decision, callback: Callback, processes: Reducer) -> None:
        self.start = start
        self.callback = callback
        self.processes = processes
        self.config = start.config
        self.output = Path(os.path.expanduser(start.requested.output))
        self.clock = PartTimer()
        self._load_before = busy_machine.load_so_far()
        self.evaluation = Evaluation()
        self.probe_fields: dict[str, Any] = {}
        self._started_at = now()
        self._should_train = True

    @property
    def is_finished(self) -> bool:
        """True if the run in the folder is finished, so that no training takes place."""
        return self.start.run is not None and self.start.is_finished

    @property
    def choices(self) -> dict[str, Choice[Any]]:
        """Automatic choices so far, by dotted key."""
        return {**self.loaded.choices, **self.session.chosen}

    def divide_processors(self) -> None:
        """Apply the number of processes to the settings."""
        self.config = apply_parallelism(self.config, self.processes, self.callback.on_line)
        self.start.config = self.config

    def read_rows(self) -> None:
        """Read the rows, and check that they match those of the run in the folder."""
        start = self.start
        log = ignore_line if start.is_finished else self.callback.on_line
        with self.clock.part("loading"):
            self.task, self.data = read_data(self.config, log, check=False, prepare=not start.is_finished)
            check_rows(self.config, self.task, self.data)
            if start.checkpoint is not None:
                require_same_start(start.checkpoint.values, open_start(self.config), self.output)
            self.row_digests = row_digests(self.data.train, self.data.held_out)
            if start.rows is not None:
                require_same_rows(start.rows, self.row_digests, start.requested, self.output, done=start.is_finished)
            if not start.is_finished:
                self.task.check(self.data, call=True)
                if self.config.start_from is not None and not start.is_resumed:
                    log("the optimizer state and the learning-rate schedule are new")

    def stored_result(self) -> Result:
        """Return the result of the finished run in the folder, and release the other processes."""
        assert self.start.run is not None
        send_settings(None, self.processes)
        return Result.of_finished(self.start.run)

    def plan_memory(self) -> None:
        """Plan the memory and the time, and reject a run that does not fit."""
        with self.clock.part("planning"):
            self.config, self.plan = plan_memory(
                self.config,
                self.task,
                self.data,
                self.callback,
                processes=self.processes,
                resumed=self.start.is_resumed,
            )

    def load_model(self) -> None:
        """Load the base model in all processes."""
        if not self.start.checkpoint:
            for line in small_data_warnings(len(self.data.train), len(self.data.held_out), self.config.train):
                self.callback.on_line(line)
        with self.clock.part("loading"):
            send_settings(self.config, self.processes)
            self.loaded = load_model(
                self.config,
                self.task,
                self.data,
                self.callback.on_line,
                self.callback.on_choice,
                processes=self.processes,
            )

    def assemble_session(self) -> None:
        """Prepare the model for training, and check that it matches that of the checkpoint."""
        checkpoint = self.start.checkpoint
        with self.clock.part("loading"):
            arithmetic = None
            if checkpoint is not None:
                arithmetic = use_saved_arithmetic(checkpoint.values["training"].get("arithmetic"))
            with track_progress("preparing the training"):
                self.session = assemble_session(
                    self.config, self.task, self.data, self.loaded, self.processes, arithmetic
                )
                lines = self.session.lines()
            for line in [*map(Detail, self.session.notes), *lines]:
                self.callback.on_line(line)
            self.session.notes += lines
            if checkpoint is not None:
                require_same_model(checkpoint.values["model"], self.session, self.output)
            self.start.check_length(self.session.total_steps)
        self.num_trained = sum(p.numel() for _, p in self.session.method.parameters(self.session.model))

    def open_folder(self) -> None:
        """Create the run's folder, its record and its monitor."""
        kept_lines = self.start.num_metrics_lines if self.start.is_resumed else None
        self.folder = RunFolder(self.output, lock=self.start.lock, num_metrics_lines=kept_lines)
        if self.folder.moved is not None:
            self.callback.on_line(f"{self.output} contained an earlier run, which was moved to {self.folder.moved}")
        self.record = RunRecord(
            self.start,
            self.session,
            self.folder,
            rows=self.row_digests,
            choices=run_choices(self.session, self.loaded.choices),
            log=self.callback.on_line,
        )
        self.probes = run_probes(self.session, self.callback)
        self.monitor = Monitor(
            self.session,
            self.folder.path,
            self.callback,
            self.folder.write_metrics,
            probes=self.probes,
            start=self._started_at,
        )
        self.record.add("monitor", self.monitor, durable=self.monitor.on_checkpoint)
        self.record.extras["approximations"] = self.session.approximations

    @contextlib.contextmanager
    def errors_recorded(self) -> Iterator[None]:
        """Context that records errors in ``run.json`` and closes the folder and the session."""
        try:
            with translate_errors(
                self.output, location=self.record.position, last=self.record.checkpoints.wait_for_last
            ):
                yield
        except BaseException as error:
            self.record.failed(error)
            raise
        finally:
            self.folder.close()
            self.session.close()

    def write_inputs(self) -> None:
        """Write settings, tokenizer, skipped rows and the digests of the trained rows to the folder."""
        self._write_settings()
        if self.task.tokenizer is not None:
            self.folder.write_tokenizer(self.task.tokenizer)
        self.folder.write_skipped(self.data.skipped)
        write_trained_rows(self.folder.path, self.data.train)
        self.session.feed.set_run_folder(self.folder.path)

    def _write_settings(self) -> None:
        chosen = {key: (choice.value, choice.why) for key, choice in self.choices.items()}
        settings = self.start.settings_to_write(self.config)
        self.folder.write_settings(settings, {**chosen, **self.start.initial_choices()})

    def choose_learning_rate(self) -> None:
        """Search the learning rate if the settings request it."""
        with self.clock.part("rate search"):
            self._should_train = choose_rate(self.session, self.folder.path, self.callback)

    def announce(self) -> None:
        """Record the description of the run, and pass it to the callback."""
        self.record.update_choices(run_choices(self.session, self.loaded.choices))
        choices = self.choices
        self.record.describe(self.plan, choices, memory_limit_bytes().value)
        num_parameters = count_parameters(self.session.model).total
        self.callback.on_start(
            RunStart(self.folder.path, self.config, choices, num_parameters, self.num_trained, self.session.total_steps)
        )

    def measure_base(self) -> None:
        """Measure the base model with all probes, which compare it with the trained model later."""
        with self.clock.part("measuring"):
            for probe in self.probes:
                probe.before()

    def train(self) -> None:
        """Train and evaluate. The adapter is saved even if the training fails, unless it is inconsistent."""
        session = self.session
        checkpoints = self.record.checkpoints
        callback = RunCallback(
            session=session,
            folder=self.folder,
            record=self.record,
            monitor=self.monitor,
            callback=self.callback,
            should_train=self._should_train,
            clock=self.clock,
        )
        release_free_memory()
        session.approximations.on_change = callback.on_approximations
        self.record.restore()
        with self.clock.part("evaluating"):
            self.monitor.prepare()
        release_free_memory()  # memory of the evaluation is fragmented and rarely reusable for training steps
        with session.running():
            try:
                skips = self.config.train.not_finite == "skip"
                outcome = session.train(callback, checkpoint=self.record.saved, skip_not_finite=skips)
            except BaseException as error:
                self.callback.on_end(None)
                self._save_adapter_after_error(error)
                raise
            self.callback.on_end(outcome)
            with track_progress("saving"):
                checkpoints.write()
                save_adapter(session, self.folder.path)
            with self.clock.part("evaluating"):
                if not outcome.interrupted:
                    checkpoints.evaluated(outcome.steps, self.monitor.finish(outcome.steps))
                save = functools.partial(save_adapter, session)
                self.monitor.save_best(outcome.steps, save, evaluate=not outcome.interrupted)
            checkpoints.close()
        self.outcome = outcome
        if not outcome.interrupted:
            self.evaluation = self.monitor.evaluation
        self._write_settings()  # includes settings that were chosen during the run

    def _save_adapter_after_error(self, error: BaseException) -> None:
        """Save the parameters that were trained before an error, if they are consistent.

        They are not if a parameter turned out to be untrained, or if an interrupt may have occurred during an update.
        """
        if isinstance(error, UntrainedParameterError | KeyboardInterrupt):
            return
        try:
            save_adapter(self.session, self.folder.path)
        except (UserError, OSError, SafetensorError) as save_error:
            self.callback.on_line(f"the adapter could not be saved: {save_error}")
            return
        if isinstance(error, UserError):
            self.callback.on_line(f"the adapter from before that step is in {self.folder.path}")

    def measure_adapter(self) -> None:
        """Measure the trained model with all probes, and record their results."""
        with self.clock.part("measuring"):
            for probe in () if self.outcome.interrupted else self.probes:
                for result in probe.after(self.evaluation):
                    result.record(self.outcome.steps, self.folder.write_metrics, self.callback.on_line)
                    self.probe_fields |= result.fields

    def finish(self) -> None:
        """Release the other processes, write the model card and record the end of the run."""
        self.processes.dismiss()
        write_card(self.folder.path, self.session, self.outcome, self.evaluation, self.num_trained, **self.probe_fields)
        self.record.done(self.outcome)
        self.monitor.close(self.outcome, can_resume=self.record.checkpoints.enabled)

    def result(self) -> Result:
        """Return and record the result of the run."""
        device = str(self.loaded.choices["device"].value)
        on_cuda = device.startswith("cuda")
        result = Result(
            output=self.folder.path,
            outcome=self.outcome,
            evaluation=self.evaluation,
            peak_memory_bytes=torch.cuda.max_memory_allocated() if on_cuda else peak_resident_bytes(),
            plan=self.plan,
            trained_parameters=self.num_trained,
            method=self.config.method,
            task=self.config.task,
            generates_text=self.task.generates_text,
            **self.probe_fields,
            arithmetic=self._arithmetic() if device == "cpu" else {},
            approximations=self.session.approximations.as_dict(),
            best=self.monitor.best.as_dict(),
            stopped_early=self.monitor.stopped,
            rewards_differed=self.monitor.rewards_differed,
            resumed_from_step=self.start.step,
            checkpoints=list_checkpoints(self.output / CHECKPOINT_FOLDER),
            seconds_by_part=self.clock.parts(),
            load=busy_machine.load_so_far() - self._load_before,
        )
        return self.record.record_result(result)

    def _arithmetic(self) -> dict[str, str]:
        with self.session.approximations.on():
            return loader.arithmetic().as_dict()
