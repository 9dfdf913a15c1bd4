"""The worker process of an experiment: it makes trainings on request, one line of JSON at a time.

It reads requests from standard input and writes answers to standard output. All other output goes to
standard error. The process ends when its input ends, so no training outlives the experiment.
"""

from __future__ import annotations

import json
import math
import os
import queue
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TextIO

import torch

from deltaw import tasks
from deltaw.config import RunConfig
from deltaw.data.settings import DataSettings
from deltaw.errors import UserError
from deltaw.experiments.budget import budget_of
from deltaw.experiments.final import final_run, scores
from deltaw.experiments.trial import Stopped, Trial
from deltaw.host import measurements
from deltaw.host.choices import choose_device, choose_precision
from deltaw.host.memory import keep_freed_memory
from deltaw.hub.folders import config_folder
from deltaw.hub.loading import check_architecture
from deltaw.hub.skeleton import skeleton
from deltaw.kernels.torch_private import LACKS
from deltaw.memory.simulation import fake_tensors
from deltaw.methods.choose import choose_method
from deltaw.methods.files import classes_of
from deltaw.training.callbacks import Say
from deltaw.training.fit import load_for
from deltaw.training.session import read_data, usual_rate_of
from deltaw.training.tasks.base import RunData, Task

Message = Mapping[str, object]


class Worker:
    """Answers requests. Between them it keeps the current trial and its rows.

    Args:
        report: called with intermediate results; returns whether to continue.
    """

    def __init__(self, report: Callable[[Message], bool], say: Say) -> None:
        self._report = report
        self._say = say
        self._trial: Trial | None = None
        self._known: tuple[tuple[DataSettings, str, str, int], tuple[Task, RunData]] | None = None

    def answer(self, request: Message) -> Message:
        """Answer the request that ``request["do"]`` names."""
        does: dict[str, Callable[[Message], Message]] = {
            "usual": self.usual,
            "open": self.open,
            "rate": self.rate,
            "trial": self.trial,
            "base": self.base,
            "run": self.run,
        }
        return does[str(request["do"])](request)

    def usual(self, request: Message) -> Message:
        """The method's usual learning rate, without loading weights."""
        config = _config(request)
        dtype = choose_precision(choose_device(config.device).value, config.precision).value
        folder = config_folder(config.model, dtype, config.trust_remote_code)
        architecture = check_architecture(folder, config.task, config.trust_remote_code)
        return {"usual_rate": usual_rate_of(choose_method(config, None), architecture)}

    def open(self, request: Message) -> Message:
        """Load the model and the rows for trainings at several learning rates."""
        trial = self._open_store(_config(request))
        session = trial.session
        return {"usual_rate": usual_rate_of(session.method, session.model.config), **_rows_of(trial)}

    def rate(self, request: Message) -> Message:
        """Train the open trial, or a new one where settings are given, at one learning rate, for a share of
        the budget at most."""
        if "config" in request:
            self._open_store(_config(request))
        if self._trial is None:
            raise RuntimeError("'rate' was requested before 'open'")
        trial, rate, share = self._trial, float(str(request["rate"])), float(str(request["share"]))
        budget = budget_of(trial.config.train, len(trial.training)).times(share)
        try:
            curve = trial.until_flat(rate, budget)
        except UserError as error:
            self._say(f"learning rate {rate:g}: {error.what}")
            return {"loss": None}
        return {"loss": curve.best_loss, "steps": curve.outcome.steps}

    def trial(self, request: Message) -> Message:
        """Train with new settings and evaluate on the way; the parent may end the trial early."""
        trial = self._open_store(_config(request))
        steps = trial.steps(float(str(request["share"])))
        every = trial.config.train.eval_every or math.ceil(steps / int(str(request["evaluations"])))

        def on_evaluation(number: int, loss: float) -> bool:
            return self._report({"evaluation": number, "loss": loss})

        rate = trial.session.learning_rate
        facts = {**_rows_of(trial), "learning_rate": rate, "steps": steps}
        try:
            loss = trial.loss(rate, steps, every=every, on_evaluation=on_evaluation)
        except Stopped:
            return {**facts, "stopped": True}
        finally:
            self._close()
        return {**facts, "loss": loss if math.isfinite(loss) else None}

    def base(self, request: Message) -> Message:
        """Evaluate the untrained model on the held-out rows."""
        self._close()
        config = _config(request)
        task, data = read_data(config, self._say)
        loaded = load_for(config, task, data, self._say)
        batcher, _ = task.batcher(
            loaded.model,
            data.held_out,
            device=str(loaded.choices["device"].value),
            tokens_per_pass=config.train.tokens_per_pass,
            share=config.train.share_prefixes,
            method_shares=True,
            virtual_tokens=0,
        )
        held_out = task.referenced(loaded.model, data.held_out, batcher)
        with task.running(loaded.model, batcher):
            objective = task.objective(loaded.model)
            evaluation = task.evaluate(objective, held_out, batcher, data.classes)
        return scores(task, data.held_out, evaluation)

    def run(self, request: Message) -> Message:
        """Make one final training, with a folder of its own."""
        self._close()
        config = _config(request)
        found = final_run(config, self._say, plan=bool(request.get("plan", True)))
        return {**found, "total_parameters": _total_parameters(config, Path(str(found["output"])))}

    def _open_store(self, config: RunConfig) -> Trial:
        self._close()
        key = (config.data, config.task, config.model, config.data_seed)
        known = self._known[1] if self._known is not None and self._known[0] == key else None
        self._trial = Trial(config, self._say, known)
        self._known = (key, (self._trial.task, self._trial.data))
        return self._trial

    def _close(self) -> None:
        if self._trial is not None:
            self._trial.close()
            self._trial = None


def _config(request: Message) -> RunConfig:
    settings = request["config"]
    if not isinstance(settings, Mapping):
        raise RuntimeError("a request's config is not a mapping")
    return RunConfig.read(settings)


def _rows_of(trial: Trial) -> dict[str, object]:
    return {"training_rows": len(trial.training), "validation_rows": len(trial.validation)}


def _total_parameters(config: RunConfig, output: Path) -> int:
    """Parameters of the model with the run's head, counted from its configuration."""
    classes = classes_of(output)
    outputs = len(classes) if classes is not None else tasks.entry_of(config.task).outputs
    device = choose_device(config.device).value
    with fake_tensors() if LACKS is None else torch.device("meta"):
        model = skeleton(
            config.model,
            dtype=choose_precision(device, config.precision).value,
            task=config.task,
            num_labels=outputs,
            trust_remote_code=config.trust_remote_code,
        )
        return sum(parameter.numel() for parameter in model.parameters())


def _lines_of_input(into: queue.SimpleQueue[str]) -> None:
    """Put each line of standard input into the queue; at the end of input, exit the process at once."""
    # Not through sys.stdin, whose lock would be held while the interpreter shuts down.
    rest = b""
    while part := os.read(0, 65536):
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            into.put(line.decode())
    os._exit(0)


def main() -> None:
    """Answer requests until the input ends."""
    keep_freed_memory()
    answers: TextIO = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    requests: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_lines_of_input, args=(requests,), daemon=True).start()

    def send(kind: str, content: object) -> None:
        # With what was measured, so that the next worker chooses the same arithmetic.
        answers.write(json.dumps({kind: content, "measured": measurements.used()}, allow_nan=False) + "\n")

    def report(content: Message) -> bool:
        send("report", content)
        return bool(json.loads(requests.get()))

    worker = Worker(report, say)
    while True:
        request = json.loads(requests.get())
        try:
            send("done", worker.answer(request))
        except UserError as error:
            say(f"error: {error}")
            send("error", {"what": error.what, "where": error.where, "hint": error.hint})


if __name__ == "__main__":
    main()
