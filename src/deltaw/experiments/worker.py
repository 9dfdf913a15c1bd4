"""Worker process of an experiment: runs trainings on request.

It reads JSON requests from standard input and writes answers to standard output, one per line. All other output is
redirected to standard error. The process exits at the end of its input, so no training outlives the experiment.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import queue
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO, TypeAlias, cast

import numpy as np
import torch
from torch import nn

from deltaw.data.example import rows_of, select_rows
from deltaw.data.row_reader import RunData
from deltaw.errors import UserError
from deltaw.experiments.entry import Message
from deltaw.experiments.folder import Budget, budget_from_settings
from deltaw.experiments.until_flat import TrainingCurve, until_flat, validation_loss
from deltaw.hub.folders import config_folder
from deltaw.hub.loading import check_architecture, skeleton
from deltaw.kernels.torch_private import MISSING_NAME
from deltaw.machine import product_rates
from deltaw.machine.choices import choose_device, choose_precision
from deltaw.machine.memory import peak_resident_bytes, release_free_memory, retain_freed_memory
from deltaw.memory.plan import Plan
from deltaw.memory.simulation import fake_tensors
from deltaw.methods.files import choose_method, read_classes, read_num_outputs
from deltaw.progress import LogFunction, ignore_line
from deltaw.runs.fit import load_model, plan_memory, save_adapter
from deltaw.runs.folder import RunFolder, check_output
from deltaw.runs.summary import write_card
from deltaw.settings import task_registry
from deltaw.settings.config import RunConfig
from deltaw.settings.data import DataSettings
from deltaw.training.batchers import BatcherOptions
from deltaw.training.callbacks import LineCallback
from deltaw.training.evaluation.base import Evaluation, format_numbers
from deltaw.training.monitoring.generation import GenerationCheck
from deltaw.training.planning.plan_run import plan_run, with_time
from deltaw.training.process import preserved_process_state
from deltaw.training.session import Session, assemble, default_rate_of, rate_factors, read_data
from deltaw.training.state import Step
from deltaw.training.task import Task

# Detection of constant answers, and the score of the best constant answer.

# Predicted numbers are a constant answer if their range is below this share of the labels' standard deviation.
MAX_RELATIVE_SPREAD = 0.01
# Minimum share of rows with the most frequent answer for a constant baseline.
MIN_ANSWER_SHARE = 0.1


def single_answer(result: Evaluation, examples: Sequence[Any], decode: Callable[[np.ndarray], str] = str) -> str | None:
    """Return the model's answer if it is the same for all rows, although the expected answers differ. Otherwise None.

    A language model's answer is its most likely token at each label, truncated to the length of the shortest answer.

    Args:
        decode: Converts tokens to text.
    """
    if result.predictions is not None:
        truth = np.array([example.label for example in examples])
        if result.confusion is None:
            close = (np.ptp(result.predictions, 0) <= MAX_RELATIVE_SPREAD * np.std(truth, 0)).all()
            return format_numbers(result.predictions.mean(0), 4) if close and np.ptp(truth) > 0 else None
        chosen = result.predictions.argmax(1)
        is_constant = len(set(chosen.tolist())) == 1 < len(set(truth.tolist()))
        return str(result.classes[chosen[0]]) if is_constant else None
    if not result.predicted:
        return None
    shortest = min(len(predicted) for predicted, _ in result.predicted)
    columns = zip(*result.predicted, strict=True)
    actual, expected = ({answer[:shortest].tobytes() for answer in answers} for answers in columns)
    return decode(result.predicted[0][0]).strip() if len(actual) == 1 < len(expected) else None


def best_constant_answer(evaluation: Evaluation, examples: Sequence[Any]) -> tuple[str, np.ndarray] | None:
    """Return the best constant answer and its score per row, or None.

    It is the most frequent class or answer of these rows, or the mean of their numbers, so it uses the labels.
    """
    if evaluation.predictions is not None:
        truth = np.array([example.label for example in examples])
        if evaluation.confusion is None:
            return None if truth.ndim > 1 else (f"{truth.mean():.4g}", (truth - truth.mean()) ** 2)
        majority = int(np.bincount(truth).argmax())
        return str(evaluation.classes[majority]), (truth == majority).astype(np.float64)
    if not evaluation.predicted:
        return None
    texts = [example.answer for example in examples if getattr(example, "answer", None) is not None]
    answer, count = Counter(texts).most_common(1)[0]
    if len(texts) != len(evaluation.predicted) or count < MIN_ANSWER_SHARE * len(texts):
        return None
    return answer.strip(), np.array([float(text == answer) for text in texts])


# Trials are evaluated on validation rows that are split off the training rows. Learning rates and other settings are
# chosen by the validation loss. No choice depends on the held-out rows, which give the final score.


VALIDATION_SHARE = 0.1
VALIDATION_ROWS = 256
_SPLITTING = 4  # selects a separate random stream for the seed


# Receives the number of an evaluation and its loss. Returns True to continue the training.
OnEvaluation: TypeAlias = Callable[[int, float], bool]
TaskData: TypeAlias = tuple[Task, RunData]


class TrainingStopped(Exception):
    """Raised if a training was stopped early, by its caller or by a signal."""


class Trial:
    """Model and rows of a run, for repeated training from the same initialization.

    Args:
        config: Settings of the run.
        log: Receives messages for the user.
        known: Task and rows that have been read already.
        once: Train only once, without a copy of the initialization.

    Attributes:
        session: Training session.
        task: Task, which another trial on the same rows can reuse.
        data: Rows, which another trial can reuse.
        training: Training rows.
        validation: Validation rows.
        chosen: Automatic choices with reasons, by dotted key.

    Raises:
        UserError: As for a run, or if the rows do not suffice for a validation set.
    """

    def __init__(
        self, config: RunConfig, log: LogFunction = ignore_line, loaded: TaskData | None = None, *, once: bool = False
    ) -> None:
        # Store features of frozen layers, because rows are used repeatedly.
        self.config = config.with_train(keep_features=True)
        self._log, self._once = log, once
        self.task, self.data = loaded or read_data(self.config, log)
        self._needs_reload = False
        self._open()

    def _open(self) -> None:
        loaded = load_model(self.config, self.task, self.data, self._log)
        offered = () if loaded.kernels is None else loaded.kernels.approximations
        model, device = loaded.model, str(loaded.choices["device"].value)
        self.session: Session = assemble(
            self.config, self.task, self.data, model, device=device, new_modules=loaded.new_modules, candidates=offered
        )
        self.chosen = {**loaded.choices, **self.session.chosen}
        for line in [*self.session.notes, *self.session.lines()]:
            self._log(line)
        self.training, self.validation = split_validation(self.session.data.train, self.config.data_seed)
        self._start = [] if self._once else [p.detach().clone() for _, p in self._parameters()]

    def steps(self, share: float) -> int:
        """Return the number of steps of a share of the run."""
        return max(1, math.ceil(share * self.session.total_steps))

    def loss(self, rate: float, steps: int, *, every: int | None = None, callback: OnEvaluation | None = None) -> float:
        """Train from the initialization and return the validation loss, which is infinite if training diverges.

        Args:
            rate: Peak learning rate.
            steps: Number of optimizer steps.
            every: Interval of additional evaluations in steps.
            callback: Receives the number of an evaluation (from 1) and its loss. Returns True to continue.

        Raises:
            TrainingStopped: If ``callback`` returned False, or a signal arrived.
        """
        self._reset()
        with self.session.running():

            def on_step(step: Step) -> None:
                if every is None or callback is None or step.step % every or step.step == steps:
                    return
                if not callback(step.step // every, validation_loss(self.session, self.validation)):
                    raise TrainingStopped

            try:
                outcome = self.session.train(on_step=on_step, total_steps=steps, learning_rate=rate, rows=self.training)
                if outcome.interrupted:
                    raise TrainingStopped
                loss = validation_loss(self.session, self.validation)
            except UserError as error:
                self._log(f"learning rate {rate:g}: {error.message}")
                return math.inf
        self._needs_reload = False
        return loss

    def until_flat(self, rate: float, budget: Budget, **callbacks: Any) -> TrainingCurve:
        """Train from the initialization until the validation loss flattens or the budget ends.

        Args:
            callbacks: Callbacks of :func:`deltaw.experiments.until_flat.until_flat`.

        Raises:
            UserError: If training diverged.
            TrainingStopped: If a signal arrived.
        """
        self._reset()
        with self.session.running():
            curve = until_flat(self.session, self.training, self.validation, rate=rate, budget=budget, **callbacks)
        if curve.outcome.interrupted:
            raise TrainingStopped
        self._needs_reload = False
        return curve

    @torch.no_grad()
    def _reset(self) -> None:
        """Reset the trained parameters to the initialization. The model is loaded again after a training that did not
        finish.
        """
        if self._needs_reload:
            self.close()
            with torch.enable_grad():
                self._open()
        self._needs_reload = True
        if self._once:
            return
        for (_, parameter), start in zip(self._parameters(), self._start, strict=True):
            parameter.copy_(start)
            parameter.grad = None
        self.session.method.after_step(self.session.model)

    def _parameters(self) -> list[tuple[str, nn.Parameter]]:
        return list(self.session.method.parameters(self.session.model))

    def close(self) -> None:
        """Release the model and the stored features."""
        if hasattr(self, "session"):
            self.session.close()
            del self.session, self._start
            gc.collect()


def split_validation(rows: Sequence[Any], seed: int) -> tuple[Sequence[Any], Sequence[Any]]:
    """Split off a tenth of the rows, at most 256, as validation rows by the seed.

    Raises:
        UserError: If there are fewer than two rows.
    """
    if len(rows) < 2:
        hint = "use more rows, or set train.learning_rate to a number, so that nothing is tuned"
        raise UserError(f"{len(rows)} training row is too few for validation", location="data.train", hint=hint)
    count = min(VALIDATION_ROWS, max(1, round(VALIDATION_SHARE * len(rows))))
    is_validation = np.zeros(len(rows), bool)
    is_validation[np.random.default_rng([seed % 2**64, _SPLITTING]).permutation(len(rows))[:count]] = True
    return select_rows(rows, np.flatnonzero(~is_validation)), select_rows(rows, np.flatnonzero(is_validation))


# Final training of a method with a seed, scored on the held-out rows. It writes a run folder like ``deltaw train``, but
# does not train on the validation rows, and its length is automatic (:mod:`deltaw.experiments.until_flat`).


ADAPTER_FILES = "adapter_*"


@preserved_process_state()
def final_run(config: RunConfig, log: LogFunction, *, plan: bool) -> dict[str, object]:
    """Train until the validation loss flattens, write the run's folder, and score the held-out rows.

    Args:
        plan: Plan the memory first. Only needed for the first seed of a method.

    Returns:
        Values for the comparison, ready for JSON.

    Raises:
        UserError: If the input cannot be used, training diverged, or a signal stopped it.
    """
    check_output(Path(os.path.expanduser(config.output)))
    config = config.with_train(keep_features=True)
    task, data = read_data(config, log)
    memory_plan: Plan | None = None
    if plan:
        config, memory_plan = plan_memory(config, task, data, LineCallback(log))
    trial = Trial(config, log, (task, data), once=True)
    session = trial.session
    folder = RunFolder(Path(os.path.expanduser(config.output)))
    try:
        folder.write_settings(trial.config, {key: (c.value, c.why) for key, c in trial.chosen.items()})
        if task.tokenizer is not None:
            folder.write_tokenizer(task.tokenizer)
        check = GenerationCheck(session)
        release_free_memory()
        try:
            curve = trial.until_flat(
                session.learning_rate,
                budget_from_settings(trial.config.train, len(trial.training)),
                on_step=lambda step: folder.write_metrics(step.as_dict()),
                on_validation=lambda step, loss: folder.write_metrics({"step": step, "validation": {"loss": loss}}),
            )
        except TrainingStopped as error:
            raise UserError("the training was stopped by a signal", hint="start the comparison again") from error
        save_adapter(session, folder.path)
        generation = check.measure()
        with session.running():
            evaluation = session.evaluate()
        folder.write_metrics({"step": curve.best_step, "eval": evaluation.as_dict()})
        trained = sum(p.numel() for _, p in session.method.parameters(session.model))
        write_card(folder.path, session, curve.outcome, evaluation, trained, generation=generation)
    finally:
        folder.close()
        trial.close()
    outcome, on_gpu = curve.outcome, choose_device(config.device).value.startswith("cuda")
    return {
        "output": str(folder.path),
        **{name: getattr(outcome, name) for name in ("steps", "rows", "tokens", "seconds")},
        "best_step": curve.best_step,
        "flattened": curve.flattened,
        "generation": generation or None,
        "validation": [[step, loss] for step, loss in curve.points],
        "validation_loss": curve.best_loss,
        "training_rows": len(trial.training),
        "train_loss": outcome.loss,
        "trained_parameters": trained,
        "adapter_bytes": sum(file.stat().st_size for file in folder.path.glob(ADAPTER_FILES)),
        "planned_memory_bytes": None if memory_plan is None else memory_plan.peak_resident_bytes,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else peak_resident_bytes(),
        **scores(task, session.data.held_out, evaluation),
    }


def scores(task: Task, held_out: Sequence[Any], evaluation: Evaluation) -> dict[str, object]:
    """Return an evaluation of the held-out rows for JSON, with scores per row and constant answers."""
    per_row, tokenizer = evaluation.per_row, task.tokenizer
    rows = [row for item in held_out for row in rows_of(item)]

    def decode(tokens: np.ndarray) -> str:
        return "" if tokenizer is None else str(tokenizer.decode(tokens, skip_special_tokens=True))

    constant = best_constant_answer(evaluation, rows)
    return {
        "eval": evaluation.as_dict() or None,
        "score": evaluation.score(),
        "higher_is_better": evaluation.higher_is_better,
        "per_row": None if per_row is None else [float(value) for value in per_row],
        "single_answer": single_answer(evaluation, rows, decode),
        "constant": None if constant is None else {"answer": constant[0], "per_row": constant[1].tolist()},
    }


class TrialWorker:
    """Answers requests. The current trial and its rows are cached between requests.

    Args:
        report: Receives intermediate results. Returns True to continue.
    """

    def __init__(self, report: Callable[[Message], bool], log: LogFunction) -> None:
        self._report, self._log = report, log
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
        method, seconds = choose_method(config, None), None
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
        config, trial = _config(request), self._trial
        if trial is None or trial.config != config.with_train(keep_features=True):
            trial = self._open_trial(config)
        rate, share = float(str(request["rate"])), float(str(request["share"]))
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
        steps, rate = trial.steps(float(str(request["share"]))), trial.session.learning_rate
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
        device, train = str(loaded.choices["device"].value), config.train
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


def _read_requests(requests: queue.SimpleQueue[str]) -> None:
    """Put each line of standard input into the queue, and exit the process at the end of input."""
    # Read the file descriptor directly: the lock of sys.stdin would block the shutdown of the interpreter.
    partial_line = b""
    while chunk := os.read(0, 65536):
        *lines, partial_line = (partial_line + chunk).split(b"\n")
        for line in lines:
            requests.put(line.decode())
    os._exit(0)


def main() -> None:
    """Answer requests until the input ends."""
    retain_freed_memory()
    answers: TextIO = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)

    def log(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    requests: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read_requests, args=(requests,), daemon=True).start()

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


if __name__ == "__main__":
    main()
