"""The sides of ``step.py``, each run in its own process.

``run`` starts one process and returns its results. ``run_in_turns`` starts several that alternate. ``main`` runs in the
child process.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from machine import kernels_text
from step_models import MODELS, config_of, linear_shapes, prepare_model

RANK = 16
ALPHA = 32
# Rows per product of the head in the floor.
HEAD_ROWS = 256
STEPS_PER_TURN = 4


def run(job: dict[str, Any], environment: dict[str, str], script: str = __file__) -> dict[str, Any]:
    """Run a side in a new process with additional environment variables and return its results."""
    process = subprocess.run(
        [sys.executable, os.path.abspath(script), json.dumps(job)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment, "OMP_NUM_THREADS": str(job["threads"])},
    )
    lines = [line for line in process.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        sys.exit(f"{job}\n{process.stderr[-3000:]}")
    return json.loads(lines[-1].removeprefix("RESULT "))


def run_in_turns(
    jobs: dict[str, dict[str, Any]], environments: dict[str, dict[str, str]], script: str = __file__
) -> dict[str, list[dict[str, Any]]]:
    """Run sides that alternate every ``STEPS_PER_TURN`` steps, so that other load on the host slows all of them
    equally.

    Returns:
        By side, its results as returned by ``run``, once for each turn except the first, with the speed of the turn.
    """
    sides: dict[str, subprocess.Popen[str]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    results: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryFile("w+") as errors:

        def fail(name: str) -> NoReturn:
            sides[name].wait()
            errors.seek(0)
            sys.exit(f"{jobs[name]}\n{errors.read()[-3000:]}")

        def read_message(name: str, kind: str) -> str:
            """Return the next message of this kind from a side."""
            for line in sides[name].stdout or ():
                if line.startswith(kind + " "):
                    return line.removeprefix(kind + " ")
            fail(name)

        def start_turn(name: str) -> None:
            stdin = sides[name].stdin
            assert stdin is not None
            try:
                stdin.write("\n")
                stdin.flush()
            except BrokenPipeError:  # the process has exited
                fail(name)

        try:
            for name, job in jobs.items():
                sides[name] = subprocess.Popen(
                    [sys.executable, os.path.abspath(script), json.dumps({**job, "in_turns": True})],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                    env={**os.environ, **environments[name], "OMP_NUM_THREADS": str(job["threads"])},
                )
                read_message(name, "TURN")
                print(f"{name} is loaded", flush=True)
            for _ in range(min(job["steps"] for job in jobs.values()) // STEPS_PER_TURN - 1):
                for name in jobs:
                    start_turn(name)
                    seconds[name].append(float(read_message(name, "TURN")))
            for name, durations in seconds.items():
                start_turn(name)
                result = json.loads(read_message(name, "RESULT"))
                tokens = tokens_of_step(jobs[name]).numel()
                results[name] = [{**result, "tokens_per_second": tokens / duration} for duration in durations]
        finally:
            for side in sides.values():
                side.kill()
                side.wait()
    return results


class Turns:
    """Pauses a side after each turn and reports the time per step.

    The first step of a turn is not counted, because the other sides have replaced the contents of the caches.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        self.waits = bool(job.get("in_turns"))
        self.seconds: list[float] = []
        self.start = time.perf_counter()

    def step_done(self) -> None:
        if not self.waits:
            return
        self.seconds.append(time.perf_counter() - self.start)
        if len(self.seconds) == STEPS_PER_TURN:
            print(f"TURN {statistics.median(self.seconds[1:])}", flush=True)
            sys.stdin.readline()
            self.seconds = []
        self.start = time.perf_counter()


def main() -> None:
    import torch

    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    result = {"floor": floor_side, "deltaw": deltaw_side, "peft": peft_side}[job["side"]](job)
    print("RESULT " + json.dumps(result), flush=True)


def shape_of_step(job: dict[str, Any]) -> tuple[int, int]:
    """Return the rows of a step and the tokens of a row."""
    size = MODELS[job["model"]]
    return job.get("rows") or size.rows, job.get("length") or size.length


def tokens_of_step(job: dict[str, Any]) -> Any:
    """Return the tokens of a step: text for pretrained weights, random tokens for random weights."""
    import argparse

    import torch
    from transformers import AutoTokenizer

    shape = shape_of_step(job)
    if MODELS[job["model"]].kind is None:
        text = Path(argparse.__file__).read_text(encoding="utf-8")
        tokenizer = AutoTokenizer.from_pretrained(prepare_model(job["model"], Path())[1])
        return torch.tensor(tokenizer(text)["input_ids"][: math.prod(shape)]).view(shape)
    vocabulary = config_of(job["model"]).vocab_size
    return torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(0))


def deltaw_side(job: dict[str, Any]) -> dict[str, Any]:
    from deltaw.hub.loading import load
    from deltaw.runtime.nf4 import quantize_nf4
    from deltaw.runtime.quantized_weights import quantize_int8

    tokens = tokens_of_step(job)
    loaded = load(job["reference"], precision=job["precision"], device="cpu", log=lambda line: None)
    model = loaded.model
    precision = loaded.choices["precision"]
    if precision.value == "int8":
        quantize_int8(model.base_model, lambda: model(tokens[:1]))
    if precision.value == "nf4":
        quantize_nf4(model.base_model)
    arithmetic = f"{precision.value} ({precision.why}), {kernels_text()}"
    offered = () if loaded.kernels is None else loaded.kernels.approximations
    return {"how": arithmetic, **train_deltaw(model, job, tokens, offered)}


def train_deltaw(model: Any, job: dict[str, Any], tokens: Any, candidates: tuple[str, ...] = ()) -> dict[str, Any]:
    """Train a loaded model with deltaw, using the approximations that are verified on the same tokens."""
    import numpy as np

    from deltaw.data.example import Example
    from deltaw.lora import LoRAConfig, adapter_parameters, attach
    from deltaw.machine.memory import retain_freed_memory
    from deltaw.runtime.packed import packed_rows
    from deltaw.runtime.weights_in_huge_pages import move_to_huge_pages
    from deltaw.training.approximations import Approximations, GradientCheck, applicable
    from deltaw.training.batchers import BatcherOptions, choose_causal_batcher
    from deltaw.training.causal_objective import CausalObjective
    from deltaw.training.loop import train
    from deltaw.training.preparation import checkpoint_blocks

    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    resident = loaded_bytes(model)
    labels = np.ones(tokens.shape[1], bool)
    examples = [Example(n, row.numpy().astype(np.int32), labels, 0, None) for n, row in enumerate(tokens)]
    batcher, _ = choose_causal_batcher(model, examples, BatcherOptions("cpu", share=False))
    attach(model, LoRAConfig(rank=RANK, alpha=ALPHA), seed=0)
    if job.get("checkpointing"):
        checkpoint_blocks(model)
    retain_freed_memory()  # like the command line
    move_to_huge_pages(model)  # like a run
    objective = CausalObjective(model)
    seconds = []
    turns = Turns(job)
    parameters = dict(adapter_parameters(model))
    with packed_rows(model):
        check = GradientCheck(model, objective, batcher, parameters, examples[:1])
        usable = applicable(model, objective, candidates)
        allowed = check.choose(usable) if usable else None
    approximations = Approximations(allowed.names if allowed else ())
    with approximations.on(), packed_rows(model):
        outcome = train(
            objective,
            list(parameters.values()),
            examples,
            batcher,
            learning_rate=1e-4,
            total_steps=job["steps"],
            batch_size=len(examples),
            on_step=lambda step: (seconds.append(step.seconds), turns.step_done()),
        )
    memory = {**memory_above(resident), "weight_bytes": weights}
    verified = "" if allowed is None else f"; approximate: {allowed.measured}; not: {dict(allowed.refused)}"
    metrics = {"loss": outcome.loss, "approximate": f"{', '.join(approximations.names) or 'nothing'}{verified}"}
    return {**speeds(seconds, tokens.numel()), **memory, **metrics}


def peft_side(job: dict[str, Any]) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    tokens = tokens_of_step(job)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[job["precision"]]
    model = AutoModelForCausalLM.from_pretrained(job["folder"], dtype=dtype)
    return train_peft(model, job, tokens)


def train_peft(model: Any, job: dict[str, Any], tokens: Any) -> dict[str, Any]:
    """Train a loaded model with PEFT."""
    import torch
    from peft import LoraConfig, get_peft_model

    resident = loaded_bytes(model)
    torch.manual_seed(0)
    settings = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, settings, autocast_adapter_dtype=not job.get("bf16_factors"))
    if job.get("checkpointing"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    forward = torch.compile(model) if job.get("compiled") else model
    seconds = []
    losses = []
    turns = Turns(job)
    for _ in range(job["steps"]):
        start = time.perf_counter()
        loss = forward(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
        turns.step_done()
    mean_loss = statistics.fmean(losses)
    return {**speeds(seconds, tokens.numel()), **memory_above(resident), "loss": mean_loss}


def floor_side(job: dict[str, Any]) -> dict[str, Any]:
    """Time only the model's matrix products, forward and backward, and count the other operations at the same rate."""
    import torch

    config = config_of(job["model"])
    row_count, length = shape_of_step(job)
    rows = row_count * length
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[job["precision"]]

    def median_of(product: Callable[[], object], times: int) -> float:
        product()
        durations = []
        for _ in range(times):
            start = time.perf_counter()
            product()
            durations.append(time.perf_counter() - start)
        return statistics.median(durations)

    def time_products(rows: int, inputs: int, outputs: int, times: int) -> float:
        x = torch.randn(rows, inputs, dtype=dtype)
        grad = torch.randn(rows, outputs, dtype=dtype)
        weight = torch.randn(outputs, inputs, dtype=dtype)
        return median_of(lambda: x @ weight.t(), times) + median_of(lambda: grad @ weight, times)

    seconds = operations = 0.0
    shapes = linear_shapes(config)
    for (inputs, outputs), count in shapes.items():
        seconds += count * time_products(rows, inputs, outputs, 2 * job["steps"])
        operations += count * 4 * rows * inputs * outputs
    head_rows = min(rows, HEAD_ROWS)
    seconds += (
        rows / head_rows * time_products(head_rows, config.hidden_size, config.vocab_size, max(2, job["steps"] // 2))
    )
    operations += 4 * rows * config.hidden_size * config.vocab_size
    rate = operations / seconds
    query_size = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    pairs = rows * (length + 1) / 2
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    attention = 2 * 2 * pairs * query_size * types.count("full_attention") * 3.5
    update = 6 * rows * RANK * sum(c * (i + o) for (i, o), c in shapes.items())
    total = seconds + (attention + update) / rate
    return {
        "tokens_per_second": rows / total,
        "rate": rate,
        "operations_per_token": (operations + attention + update) / rows,
    }


def speeds(seconds: list[float], tokens: int) -> dict[str, Any]:
    """Return the time of the first step and tokens per second at the median of the other steps."""
    timed = seconds[1:] or seconds
    return {"tokens_per_second": tokens / statistics.median(timed), "first_step": seconds[0], "seconds": seconds}


def memory_above(resident: int) -> dict[str, Any]:
    from deltaw.machine.memory import peak_resident_bytes

    peak = peak_resident_bytes()
    return {"peak_bytes": peak, "above_bytes": peak - resident}


def loaded_bytes(model: Any) -> int:
    """Return the resident memory after reading all weights, including mapped ones, and reset the peak."""
    from deltaw.machine.memory import release_free_memory, resident_bytes

    for parameter in model.parameters():
        parameter.detach().flatten()[::512].clone()
    release_free_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        print("the peak could not be reset: it includes loading", file=sys.stderr)
    return resident_bytes()


if __name__ == "__main__":
    main()
