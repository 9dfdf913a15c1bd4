"""Checks of training and decoding: a tiny model against stored values, and a run that is killed and resumed."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from deltaw.child_process import CommandResult, kill_process_tree, python_command, run_command, start_job
from deltaw.progress import LogFunction
from deltaw.selftest.check import Check
from deltaw.selftest.tiny_model import SENTENCE, write_rows, write_tiny_model

STEPS = 120
# Training losses of the first steps, in fp32. Kernels for AVX2 and AVX-512 and torch's operators agree to six digits.
STORED_LOSSES = (
    *(5.773877, 5.574894, 5.200116, 4.744122, 4.346694, 3.907489),
    *(3.718418, 3.337254, 2.949378, 2.987288, 2.908929, 2.131525),
)
# Relative difference that is allowed: rounding grows from step to step.
LOSS_TOLERANCE = 1e-3
CHECKPOINT_EVERY = 5
KILL_AFTER = 12  # steps
ATTEMPTS = 3
TIMEOUT = 120.0  # seconds of a command


def check_training(folder: Path, log: LogFunction) -> Iterator[Check]:
    """Train the tiny model, decode with it, and kill and resume the same run.

    Args:
        folder: Empty folder for model, rows and runs.
        log: Receives progress lines.
    """
    write_tiny_model(folder / "model")
    write_rows(folder / "rows.jsonl")
    log("training a tiny model")
    entire = folder / "entire"
    result = _deltaw(_training(folder, entire))
    if result.status != 0:
        yield Check("training", f"exit status {result.status}: {_last_line(result)}")
        return
    yield _check_losses(entire)
    log("decoding")
    yield _check_text(entire)
    log("killing and resuming the run")
    yield _check_resumed(folder, entire)


def _training(folder: Path, output: Path) -> list[str]:
    options: dict[str, Any] = {
        "model": folder / "model",
        "data.train": folder / "rows.jsonl",
        "data.eval": "null",
        "precision": "fp32",
        "device": "cpu",
        "lora.rank": 16,
        "lora.target_modules": "all-linear",
        "train.learning_rate": 0.01,
        "train.batch_size": 8,
        "train.max_steps": STEPS,
        "train.checkpoint_every": CHECKPOINT_EVERY,
        "train.drift": "false",
        "train.epochs": STEPS,
        "output": output,
    }
    return ["train", *(word for name, value in options.items() for word in (f"--{name}", str(value))), "--json"]


def _command(arguments: Sequence[str]) -> list[str]:
    return python_command("from deltaw.cli import main; main()", arguments)


def _deltaw(arguments: Sequence[str]) -> CommandResult:
    return run_command(_command(arguments), timeout=TIMEOUT)


def _last_line(result: CommandResult) -> str:
    return (result.messages.strip() or result.output.strip() or "no message").splitlines()[-1][:300]


def losses_of(run: Path) -> list[float]:
    """Return the losses of a run's steps so far."""
    with contextlib.suppress(OSError):
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        steps = [json.loads(line) for line in lines if line.endswith("}")]
        return [step["loss"] for step in steps if "loss" in step]
    return []


def _check_losses(run: Path) -> Check:
    losses = losses_of(run)
    if len(losses) != STEPS:
        return Check("training", f"{len(losses)} steps instead of {STEPS}")
    largest = 0.0
    for step, (loss, stored) in enumerate(zip(losses, STORED_LOSSES, strict=False), 1):
        error = abs(loss / stored - 1)
        if not error <= LOSS_TOLERANCE:
            return Check("training", f"the loss of step {step} is {loss:.6f} instead of {stored:.6f}")
        largest = max(largest, error)
    return Check("training", note=f"{len(STORED_LOSSES)} losses differ by up to {largest:.1e}")


def _check_text(run: Path) -> Check:
    words = SENTENCE.split(" ")
    prompt, expected = " ".join(words[:3]), " " + " ".join(words[3:])
    flags = ["-p", prompt, "--max-new-tokens", str(len(expected)), "--temperature", "0", "--precision", "fp32"]
    result = _deltaw(["generate", str(run), *flags, "--json"])
    if result.status != 0:
        return Check("decoding", f"exit status {result.status}: {_last_line(result)}")
    text = json.loads(result.output)["completions"][0]["completion"]
    if text != expected:
        return Check("decoding", f"the text is {text!r} instead of {expected!r}")
    return Check("decoding", note=repr(prompt + text))


def _check_resumed(folder: Path, entire: Path) -> Check:
    name = "kill and resume"
    for attempt in range(ATTEMPTS):
        run = folder / f"killed-{attempt}"
        killed_at = _killed_run(folder, run)
        if killed_at < STEPS:
            break
    else:
        return Check(name, f"the run finished before it could be killed, {ATTEMPTS} times")
    result = _deltaw(_training(folder, run))
    if result.status != 0:
        return Check(name, f"exit status {result.status}: {_last_line(result)}")
    resumed = json.loads(result.output)["resumed_from_step"]
    if not resumed:
        return Check(name, f"the run that was killed at step {killed_at} started from the beginning")
    file = "adapter_model.safetensors"
    if (run / file).read_bytes() != (entire / file).read_bytes() or losses_of(run) != losses_of(entire):
        return Check(name, f"resumed from step {resumed}, it differs from the uninterrupted run")
    return Check(name, note=f"killed at step {killed_at}, resumed from step {resumed}, equal to the bit")


def _killed_run(folder: Path, run: Path) -> int:
    """Start a run, kill it after some steps, and return the number of its steps."""
    with start_job(_command(_training(folder, run))) as job:
        deadline = time.monotonic() + TIMEOUT
        while job.process.poll() is None and time.monotonic() < deadline and len(losses_of(run)) < KILL_AFTER:
            time.sleep(0.002)
        kill_process_tree(job.process)
    return len(losses_of(run))
