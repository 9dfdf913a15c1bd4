"""The worker process of an experiment: it makes trainings on request, one line of JSON at a time.

It reads requests from standard input and writes answers to standard output. All other output goes to
standard error. The process ends when its input ends, so no training outlives the experiment.
"""

from __future__ import annotations

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

from deltaw import tasks
from deltaw.data.example import rows_of
from deltaw.data.sequences import picked
from deltaw.data.settings import DataSettings
from deltaw.errors import UserError
from deltaw.experiments.folder import Budget, budget_of
from deltaw.experiments.until_flat import Curve, until_flat, validation_loss
from deltaw.hub.folders import config_folder
from deltaw.hub.loading import check_architecture, skeleton
from deltaw.kernels.torch_private import LACKS
from deltaw.machine import product_rates
from deltaw.machine.choices import choose_device, choose_precision
from deltaw.machine.memory import keep_freed_memory, peak_resident_bytes, release_free_memory
from deltaw.memory.plan import Plan
from deltaw.memory.simulation import fake_tensors
from deltaw.methods.base import Method
from deltaw.methods.files import choose_method, classes_of
from deltaw.runs.fit import load_for, planned, save_adapter
from deltaw.runs.folder import RunFolder, check_output
from deltaw.runs.summary import write_card
from deltaw.serving.opening import verified_writer
from deltaw.serving.rollouts import SessionSampler
from deltaw.settings import RunConfig
from deltaw.training.callbacks import Lines, Say, silent
from deltaw.training.evaluation.base import Evaluation
from deltaw.training.monitoring.generation import GenerationCheck
from deltaw.training.origin import InferenceSession
from deltaw.training.process import guest
from deltaw.training.session import Session, assemble, read_data, usual_rate_of
from deltaw.training.state import Step
from deltaw.training.tasks.base import RunData, Task
from deltaw.training.tasks.labels import LabelEvaluation

# Whether a model learned to tell rows apart: one answer to every row, and what such an answer would score.
#
# It knows evaluations and their rows, no models.


# Numbers that are predicted with less than this share of the labels' spread count as one answer.
SPREAD = 0.01
# The share of rows that must have the same answer for it to be something to compare with.
FREQUENT = 0.1


def one_answer(
    evaluation: Evaluation, examples: Sequence[Any], decode: Callable[[np.ndarray], str] = str
) -> str | None:
    """The answer that the model gives to every row; None where answers differ, or where all rows have the
    same answer anyway.

    A language model's answer is what is likeliest at each label. Answers of several lengths are compared as
    far as the shortest goes.

    Args:
        decode: text of tokens.
    """
    if isinstance(evaluation, LabelEvaluation):
        truth = np.array([example.label for example in examples])
        if evaluation.confusion is None:
            close = np.ptp(evaluation.predictions) <= SPREAD * np.std(truth)
            return f"{evaluation.predictions.mean():.4g}" if close and np.ptp(truth) > 0 else None
        chosen = evaluation.predictions.argmax(1)
        alike = len(set(chosen.tolist())) == 1 < len(set(truth.tolist()))
        return str(evaluation.classes[chosen[0]]) if alike else None
    if not evaluation.predicted:
        return None
    shortest = min(len(predicted) for predicted, _ in evaluation.predicted)
    sides = zip(*evaluation.predicted, strict=True)
    given, expected = ({answer[:shortest].tobytes() for answer in answers} for answers in sides)
    return decode(evaluation.predicted[0][0]).strip() if len(given) == 1 < len(expected) else None


def constant_scores(evaluation: Evaluation, examples: Sequence[Any]) -> tuple[str, np.ndarray] | None:
    """The best answer to give to every row, and what it scores row by row; None where there is none.

    It is the most frequent class or answer of these very rows, or the mean of their numbers, so it knows more
    than a model could.
    """
    if isinstance(evaluation, LabelEvaluation):
        truth = np.array([example.label for example in examples])
        if evaluation.confusion is None:
            return f"{truth.mean():.4g}", (truth - truth.mean()) ** 2
        most = int(np.bincount(truth).argmax())
        return str(evaluation.classes[most]), (truth == most).astype(np.float64)
    if not evaluation.predicted:
        return None
    texts = [example.answer for example in examples if getattr(example, "answer", None) is not None]
    answer, count = Counter(texts).most_common(1)[0]
    if len(texts) != len(evaluation.predicted) or count < FREQUENT * len(texts):
        return None
    return answer.strip(), np.array([float(text == answer) for text in texts])


# A trial: a training that can be repeated from the same initialization and is evaluated on validation rows.
#
# Learning rates and other settings are chosen by its validation loss. The validation rows are taken from the
# training rows. The run's held-out rows are not used, so the final score is on rows that no choice depended on.


VALIDATION_SHARE = 0.1
VALIDATION_ROWS = 256
_SPLITTING = 4  # selects a random stream of its own for the seed


# Told the number of an evaluation and its loss; whether the training is to continue.
OnEvaluation: TypeAlias = Callable[[int, float], bool]


class Stopped(Exception):
    """A training was stopped early, by its caller or by a signal."""


class Trial:
    """One run's model and rows, trained as often as needed.

    Args:
        config: the run's settings.
        say: told lines that a person may want to read.
        known: task and rows, if they have been read already.
        once: whether it is trained only once, so that no copy of the initialization is kept.

    Attributes:
        session: the training.
        task, data: what was read; another trial on the same rows can reuse them.
        training, validation: rows to train on, and rows to evaluate on.
        chosen: by dotted key, what was chosen without being told, and why.

    Raises:
        UserError: as for a run, or there are too few rows for a validation set.
    """

    def __init__(
        self, config: RunConfig, say: Say = silent, known: tuple[Task, RunData] | None = None, *, once: bool = False
    ) -> None:
        # Features of frozen layers are computed once for all repetitions.
        self.config = with_features(config)
        self._say, self._once = say, once
        self.task, self.data = known or read_data(self.config, say)
        self._spoilt = False
        self._open()

    def _open(self) -> None:
        loaded = load_for(self.config, self.task, self.data, self._say)
        offered = () if loaded.kernels is None else loaded.kernels.approximations
        device = str(loaded.choices["device"].value)
        how: dict[str, Any] = {"device": device, "new_modules": loaded.new_modules, "offered": offered}

        def of(method: Method | None) -> InferenceSession:
            return InferenceSession(loaded, self.config, method, self.task)

        how |= {
            "writes": lambda method: verified_writer(of(method)),
            "samples": lambda method: SessionSampler(of(method)),
        }
        self.session: Session = assemble(self.config, self.task, self.data, loaded.model, **how)
        self.chosen = {**loaded.choices, **self.session.chosen}
        for line in [*self.session.said, *self.session.lines()]:
            self._say(line)
        self.training, self.validation = split_off(self.session.data.train, self.config.data_seed)
        self._start = [] if self._once else [p.detach().clone() for _, p in self._parameters()]

    def steps(self, share: float) -> int:
        """Number of steps that make up a share of the run's."""
        return max(1, math.ceil(share * self.session.total_steps))

    def loss(
        self, rate: float, steps: int, *, every: int | None = None, on_evaluation: OnEvaluation | None = None
    ) -> float:
        """The validation loss after a training from the initialization; infinite if it diverges.

        Args:
            rate: peak learning rate.
            steps: number of optimizer steps.
            every: also evaluate after every so many steps, and call ``on_evaluation`` with the number of
                the evaluation (from 1) and its loss.
            on_evaluation: returns whether to continue.

        Raises:
            Stopped: ``on_evaluation`` returned false, or a signal arrived.
        """
        self._begin()
        with self.session.running():

            def on_step(step: Step) -> None:
                if every is None or on_evaluation is None or step.step % every or step.step == steps:
                    return
                if not on_evaluation(step.step // every, validation_loss(self.session, self.validation)):
                    raise Stopped

            try:
                outcome = self.session.train(on_step=on_step, total_steps=steps, learning_rate=rate, rows=self.training)
                if outcome.interrupted:
                    raise Stopped
                loss = validation_loss(self.session, self.validation)
            except UserError as error:
                self._say(f"learning rate {rate:g}: {error.what}")
                return math.inf
        self._spoilt = False
        return loss

    def until_flat(self, rate: float, budget: Budget, **told: Any) -> Curve:
        """Train from the initialization until the validation loss flattens or the budget ends.

        Args:
            told: of each step and validation loss; see :func:`deltaw.experiments.until_flat.until_flat`.

        Raises:
            UserError: training diverged.
            Stopped: a signal arrived.
        """
        self._begin()
        with self.session.running():
            curve = until_flat(self.session, self.training, self.validation, rate=rate, budget=budget, **told)
        if curve.outcome.interrupted:
            raise Stopped
        self._spoilt = False
        return curve

    @torch.no_grad()
    def _begin(self) -> None:
        """Reset the trained parameters to those before the first step; the loop seeds itself. After a training that
        did not end, everything is loaded again."""
        if self._spoilt:
            self.close()
            with torch.enable_grad():
                self._open()
        self._spoilt = True
        if self._once:
            return
        for (_, parameter), start in zip(self._parameters(), self._start, strict=True):
            parameter.copy_(start)
            parameter.grad = None
        self.session.method.after_step(self.session.model)

    def _parameters(self) -> list[tuple[str, nn.Parameter]]:
        return list(self.session.method.parameters(self.session.model))

    def close(self) -> None:
        """Release the model and the feature files."""
        if hasattr(self, "session"):
            self.session.close()
            del self.session, self._start
            gc.collect()


def with_features(config: RunConfig) -> RunConfig:
    """The settings with what frozen layers give kept, since every row is seen again."""
    return config.with_train(keep_features=True)


def split_off(rows: Sequence[Any], seed: int) -> tuple[Sequence[Any], Sequence[Any]]:
    """Rows to train on and validation rows: a tenth of the rows and at most 256, drawn by the seed.

    Raises:
        UserError: there are fewer than two rows.
    """
    if len(rows) < 2:
        hint = "give more rows, or fix train.learning_rate so that nothing is tuned"
        raise UserError(f"{len(rows)} training row leaves none to validate on", where="data.train", hint=hint)
    count = min(VALIDATION_ROWS, max(1, round(VALIDATION_SHARE * len(rows))))
    drawn = np.zeros(len(rows), bool)
    drawn[np.random.default_rng([seed % 2**64, _SPLITTING]).permutation(len(rows))[:count]] = True
    return picked(rows, np.flatnonzero(~drawn)), picked(rows, np.flatnonzero(drawn))


# One final training of a comparison: one method with one seed, scored on the held-out rows.
#
# It writes a run's folder as ``deltaw train`` does. What differs: the validation rows are not trained on, and
# the training ends by itself (:mod:`deltaw.experiments.until_flat`).


ADAPTER_FILES = "adapter_*"


@guest()
def final_run(config: RunConfig, say: Say, *, plan: bool) -> dict[str, object]:
    """Train until the validation loss flattens, write the run's folder, and score the held-out rows.

    Args:
        plan: whether to plan the memory first; other seeds of a method need what the first one needs.

    Returns:
        What a comparison stores of the training, ready for JSON.

    Raises:
        UserError: the input cannot be used, training diverged, or a signal stopped it.
    """
    check_output(Path(os.path.expanduser(config.output)))
    config = with_features(config)
    task, data = read_data(config, say)
    made: Plan | None = None
    if plan:
        config, made = planned(config, task, data, Lines(say))
    trial = Trial(config, say, (task, data), once=True)
    session = trial.session
    folder = RunFolder(Path(os.path.expanduser(config.output)))
    try:
        folder.write_settings(trial.config, {key: (c.value, c.why) for key, c in trial.chosen.items()})
        if task.tokenizer is not None:
            folder.write_tokenizer(task.tokenizer)
        check = GenerationCheck(session)
        curve = _trained(trial, folder)
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
        "steps": outcome.steps,
        "best_step": curve.best_step,
        "flattened": curve.flattened,
        "generation": generation or None,
        "validation": [[step, loss] for step, loss in curve.points],
        "validation_loss": curve.best_loss,
        "training_rows": len(trial.training),
        "rows": outcome.rows,
        "tokens": outcome.tokens,
        "seconds": outcome.seconds,
        "train_loss": outcome.loss,
        "trained_parameters": trained,
        "adapter_bytes": sum(file.stat().st_size for file in folder.path.glob(ADAPTER_FILES)),
        "planned_memory_bytes": None if made is None else made.peak_resident_bytes,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else peak_resident_bytes(),
        **scores(task, session.data.held_out, evaluation),
    }


def _trained(trial: Trial, folder: RunFolder) -> Curve:
    release_free_memory()
    try:
        return trial.until_flat(
            trial.session.learning_rate,
            budget_of(trial.config.train, len(trial.training)),
            on_step=lambda step: folder.write_metrics(step.as_dict()),
            on_validation=lambda step, loss: folder.write_metrics({"step": step, "validation": {"loss": loss}}),
        )
    except Stopped as error:
        raise UserError("the training was stopped by a signal", hint="start the comparison again") from error


def scores(task: Task, held_out: Sequence[Any], evaluation: Evaluation) -> dict[str, object]:
    """An evaluation of the held-out rows, ready for JSON: with what each row scores, the answer that every
    row was given, if there was only one, and what the best such answer would score."""
    per_row, tokenizer = evaluation.per_row, task.tokenizer
    rows = [row for item in held_out for row in rows_of(item)]

    def decode(tokens: np.ndarray) -> str:
        return "" if tokenizer is None else str(tokenizer.decode(tokens, skip_special_tokens=True))

    constant = constant_scores(evaluation, rows)
    return {
        "eval": evaluation.as_dict() or None,
        "score": evaluation.score(),
        "higher_is_better": evaluation.higher_is_better,
        "per_row": None if per_row is None else [float(value) for value in per_row],
        "one_answer": one_answer(evaluation, rows, decode),
        "constant": None if constant is None else {"answer": constant[0], "per_row": constant[1].tolist()},
    }


Message = Mapping[str, object]


class Worker:
    """Answers requests. Between them it keeps the current trial and its rows.

    Args:
        report: called with intermediate results; returns whether to continue.
    """

    def __init__(self, report: Callable[[Message], bool], say: Say) -> None:
        self._report, self._say = report, say
        self._trial: Trial | None = None
        self._known: tuple[tuple[DataSettings, str, str, int], tuple[Task, RunData]] | None = None

    def answer(self, request: Message) -> Message:
        """Answer the request that ``request["do"]`` names."""
        does = {"usual": self.usual, "rate": self.rate, "trial": self.trial, "base": self.base, "run": self.run}
        return does[str(request["do"])](request)

    def usual(self, request: Message) -> Message:
        """The method's usual learning rate, without loading weights."""
        config = _config(request)
        dtype = choose_precision(choose_device(config.device).value, config.precision).value
        folder = config_folder(config.model, dtype, config.trust_remote_code)
        architecture = check_architecture(folder, config.task, config.trust_remote_code)
        factor = tasks.entry_of(config.task).load().rate_factor(config.section)
        return {"usual_rate": usual_rate_of(choose_method(config, None), architecture, factor).value}

    def rate(self, request: Message) -> Message:
        """Train at one learning rate, for a share of the budget at most. The model stays loaded for further rates of
        the same settings."""
        config, trial = _config(request), self._trial
        if trial is None or trial.config != with_features(config):
            trial = self._open_store(config)
        rate, share = float(str(request["rate"])), float(str(request["share"]))
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
        rows = {"training_rows": len(trial.training), "validation_rows": len(trial.validation)}
        facts = {**rows, "learning_rate": rate, "steps": steps}
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
        if task.rolls_out:
            # What writes, rewards and teaches comes with a session. A model with new factors is the base model.
            trial = Trial(config.model_copy(update={"method": "lora"}), self._say, (task, data), once=True)
            try:
                with trial.session.running():
                    evaluation = trial.session.evaluate()
            finally:
                trial.close()
            return scores(task, data.held_out, evaluation)
        loaded = load_for(config, task, data, self._say)
        device, most = str(loaded.choices["device"].value), config.train.tokens_per_pass
        how: dict[str, Any] = {"share": config.train.share_prefixes, "method_shares": True, "virtual_tokens": 0}
        batcher, _ = task.batcher(loaded.model, data.held_out, device=device, tokens_per_pass=most, **how)
        held_out = task.referenced(loaded.model, data.held_out, batcher)
        objective = task.objective(loaded.model)
        with task.running(loaded.model, batcher):
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
        self._known = key, (self._trial.task, self._trial.data)
        return self._trial

    def _close(self) -> None:
        if self._trial is not None:
            self._trial.close()
            self._trial = None


def _config(request: Message) -> RunConfig:
    return RunConfig.read(cast("Mapping[str, object]", request["config"]))


def _total_parameters(config: RunConfig, output: Path) -> int:
    """Parameters of the model with the run's head, counted from its configuration."""
    classes = classes_of(output)
    outputs = len(classes) if classes is not None else tasks.entry_of(config.task).outputs
    dtype = choose_precision(choose_device(config.device).value, config.precision).value
    kind: dict[str, Any] = {"task": config.task, "num_labels": outputs, "trust_remote_code": config.trust_remote_code}
    with fake_tensors() if LACKS is None else torch.device("meta"):
        model = skeleton(config.model, dtype=dtype, **kind)
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
        answers.write(json.dumps({kind: content, "measured": product_rates.used()}, allow_nan=False) + "\n")

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
