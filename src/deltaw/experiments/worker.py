"""Worker process of an experiment: runs trainings on request.

It reads JSON requests from standard input and writes answers to standard output, one per line. All other output is
redirected to standard error. The process exits at the end of its input, so no training outlives the experiment.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO, cast

import torch

from deltaw.errors import UserError
from deltaw.experiments.entry import Message
from deltaw.experiments.final_run import final_run, scores
from deltaw.experiments.folder import budget_from_settings
from deltaw.experiments.trial import TaskData, TrainingStopped, Trial
from deltaw.hub.folders import config_folder
from deltaw.hub.loading import check_architecture
from deltaw.hub.skeletons import skeleton
from deltaw.kernels.torch_private import MISSING_NAME
from deltaw.machine import product_rates
from deltaw.machine.choices import choose_device, choose_precision
from deltaw.machine.memory import retain_freed_memory
from deltaw.memory.simulation import fake_tensors
from deltaw.methods.files import choose_method, read_classes, read_num_outputs
from deltaw.progress import LogFunction, ignore_line
from deltaw.runs.load_model import load_model
from deltaw.settings import task_registry
from deltaw.settings.config import RunConfig
from deltaw.settings.data import DataSettings
from deltaw.training.batchers import BatcherOptions
from deltaw.training.planning.plan_run import plan_run, with_time
from deltaw.training.session import default_rate_of, rate_factors, read_data
from deltaw.worker_process import read_input


class TrialWorker:
    """Answers requests. The current trial and its rows are cached between requests.

    Args:
        report: Receives intermediate results. Returns True to continue.
    """

    def __init__(self, report: Callable[[Message], bool], log: LogFunction) -> None:
        self._report = report
        self._log = log
        self._trial: Trial | None = None
        self._cached_data: tuple[tuple[DataSettings, str, str, int], TaskData] | None = None

    def answer(self, request: Message) -> Message:
        """Answer the request named by ``request["do"]``."""
        handlers = {"usual": self.usual, "rate": self.rate, "trial": self.trial, "base": self.base, "run": self.run}
        return handlers[str(request["do"])](request)

    def usual(self, request: Message) -> Message:
        """Return the method's default learning rate and the predicted time of a training, without loading weights."""
        config = _config(request)
        dtype = choose_precision(choose_device(config.device).value, config.precision).value
        folder = config_folder(config.model, dtype, config.trust_remote_code)
        architecture = check_architecture(folder, config.task, config.trust_remote_code)
        method = choose_method(config, None)
        seconds = None
        factors = [task_registry.entry_of(config.task).load().rate_factor(config.section)]
        with contextlib.suppress(UserError):  # the first training reports the error
            task, data = read_data(config, ignore_line)
            factors = rate_factors(config, task, method, len(data.train))
            seconds = with_time(plan_run(config, task, data), config, task, data).seconds
        return {"usual_rate": default_rate_of(method, architecture, *factors).value, "seconds": seconds}

    def rate(self, request: Message) -> Message:
        """Train with one learning rate for a share of the budget. The model is cached for further rates of the same
        settings.
        """
        config = _config(request)
        trial = self._trial
        if trial is None or trial.config != config.with_train(keep_features=True):
            trial = self._open_trial(config)
        rate = float(str(request["rate"]))
        share = float(str(request["share"]))
        budget = budget_from_settings(trial.config.train, len(trial.training)).times(share)
        try:
            curve = trial.until_flat(rate, budget)
        except UserError as error:
            self._log(f"learning rate {rate:g}: {error.message}")
            return {"loss": None}
        return {"loss": curve.best_loss, "steps": curve.outcome.steps}

    def trial(self, request: Message) -> Message:
        """Train with new settings and report intermediate evaluations. The parent process may stop the trial."""
        trial = self._open_trial(_config(request))
        steps = trial.steps(float(str(request["share"])))
        rate = trial.session.learning_rate
        every = trial.config.train.eval_every or math.ceil(steps / int(str(request["evaluations"])))

        def on_evaluation(number: int, loss: float) -> bool:
            return self._report({"evaluation": number, "loss": loss})

        rows = {"training_rows": len(trial.training), "validation_rows": len(trial.validation)}
        summary = {**rows, "learning_rate": rate, "steps": steps}
        try:
            loss = trial.loss(rate, steps, every=every, callback=on_evaluation)
        except TrainingStopped:
            return {**summary, "stopped": True}
        finally:
            self._close()
        return {**summary, "loss": loss if math.isfinite(loss) else None}

    def base(self, request: Message) -> Message:
        """Evaluate the untrained model on the held-out rows."""
        self._close()
        config = _config(request)
        task, data = read_data(config, self._log)
        if task.needs_session:
            # Rollouts need a session. A model with newly initialized factors equals the base model.
            trial = Trial(config.model_copy(update={"method": "lora"}), self._log, (task, data), once=True)
            try:
                with trial.session.running():
                    evaluation = trial.session.evaluate()
            finally:
                trial.close()
            return scores(task, data.held_out, evaluation)
        loaded = load_model(config, task, data, self._log)
        device = str(loaded.choices["device"].value)
        train = config.train
        options = BatcherOptions(device, train.tokens_per_pass, train.share_prefixes)
        batcher, _ = task.batcher(loaded.model, data.held_out, options)
        held_out = task.add_reference_log_probs(loaded.model, data.held_out, batcher)
        objective = task.objective(loaded.model)
        with task.model_context(loaded.model, batcher):
            evaluation = task.evaluate(objective, held_out, batcher, data.classes)
        return scores(task, data.held_out, evaluation)

    def run(self, request: Message) -> Message:
        """Run a final training in a separate folder."""
        self._close()
        config = _config(request)
        result = final_run(config, self._log, plan=bool(request.get("plan", True)))
        folder = Path(str(result["output"]))
        classes = read_classes(folder)
        labels = len(classes) if classes is not None else read_num_outputs(folder)
        dtype = choose_precision(choose_device(config.device).value, config.precision).value
        named: Any = {"task": config.task, "num_labels": labels, "trust_remote_code": config.trust_remote_code}
        # Count the model's parameters with the run's head, without loading weights.
        with fake_tensors() if MISSING_NAME is None else torch.device("meta"):
            parameters = skeleton(config.model, dtype=dtype, **named).parameters()
            return {**result, "total_parameters": sum(parameter.numel() for parameter in parameters)}

    def _open_trial(self, config: RunConfig) -> Trial:
        self._close()
        key = (config.data, config.task, config.model, config.data_seed)
        cached = self._cached_data[1] if self._cached_data is not None and self._cached_data[0] == key else None
        self._trial = Trial(config, self._log, cached)
        self._cached_data = key, (self._trial.task, self._trial.data)
        return self._trial

    def _close(self) -> None:
        if self._trial is not None:
            self._trial.close()
            self._trial = None


def _config(request: Message) -> RunConfig:
    return RunConfig.read(cast("Mapping[str, object]", request["config"]))


def main() -> None:
    """Answer requests until the input ends."""
    retain_freed_memory()
    answers: TextIO = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)

    def log(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    requests: queue.SimpleQueue[str] = queue.SimpleQueue()
    partial_line = b""

    def receive(chunk: bytes) -> None:
        nonlocal partial_line
        *lines, partial_line = (partial_line + chunk).split(b"\n")
        for line in lines:
            requests.put(line.decode())

    read_input(receive)

    def send(kind: str, content: object) -> None:
        # Include the measured rates, so that the next worker chooses the same arithmetic.
        answers.write(json.dumps({kind: content, "measured": product_rates.used_rates()}, allow_nan=False) + "\n")

    def report(content: Message) -> bool:
        send("report", content)
        return bool(json.loads(requests.get()))

    worker = TrialWorker(report, log)
    while True:
        request = json.loads(requests.get())
        try:
            send("done", worker.answer(request))
        except UserError as error:
            log(f"error: {error}")
            send("error", {"message": error.message, "location": error.location, "hint": error.hint})
