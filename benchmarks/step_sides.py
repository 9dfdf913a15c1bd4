"""The sides of ``step.py``, each run in a process of its own.

``run`` starts one and gives its results, ``run_in_turns`` several that take turns of some steps;
``main`` is what the process does.
"""

from __future__ import annotations

import json
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
from step_models import MODELS, config_of, linear_shapes, made

RANK, ALPHA = 16, 32
# Labels that the head takes at a time in the floor.
HEAD_ROWS = 256
STEPS_OF_A_TURN = 4


def run(job: dict[str, Any], environment: dict[str, str], script: str = __file__) -> dict[str, Any]:
    """The results of a side in a new process, whose environment has these variables too."""
    done = subprocess.run(
        [sys.executable, os.path.abspath(script), json.dumps(job)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment, "OMP_NUM_THREADS": str(job["threads"])},
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        sys.exit(f"{job}\n{done.stderr[-3000:]}")
    return json.loads(lines[-1].removeprefix("RESULT "))


def run_in_turns(
    jobs: dict[str, dict[str, Any]], environments: dict[str, dict[str, str]], script: str = __file__
) -> dict[str, list[dict[str, Any]]]:
    """The results of sides that take turns of some steps, so that a host's other guests slow all alike.

    Returns:
        For each side its results as ``run`` gives them, once for each turn but the first, with its speed.
    """
    sides: dict[str, subprocess.Popen[str]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryFile("w+") as errors:

        def ended(name: str) -> NoReturn:
            sides[name].wait()
            errors.seek(0)
            sys.exit(f"{jobs[name]}\n{errors.read()[-3000:]}")

        def told(name: str, kind: str) -> str:
            """What a side says next, of this kind."""
            for line in sides[name].stdout or ():
                if line.startswith(kind + " "):
                    return line.removeprefix(kind + " ")
            ended(name)

        def next_turn(name: str) -> None:
            to = sides[name].stdin
            assert to is not None
            try:
                to.write("\n")
                to.flush()
            except BrokenPipeError:  # it is no more
                ended(name)

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
                told(name, "TURN")
                print(f"{name} is there", flush=True)
            for _ in range(min(job["steps"] for job in jobs.values()) // STEPS_OF_A_TURN - 1):
                for name in jobs:
                    next_turn(name)
                    seconds[name].append(float(told(name, "TURN")))
            for name, each in seconds.items():
                next_turn(name)
                result = json.loads(told(name, "RESULT"))
                tokens = tokens_of_step(jobs[name]).numel()
                found[name] = [{**result, "tokens_per_second": tokens / one} for one in each]
        finally:
            for side in sides.values():
                side.kill()
                side.wait()
    return found


class Turns:
    """One side's own part of it: after a turn's steps it says how long one took, and waits. A turn's first
    step finds the caches full of what the others left there, and does not count."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.waits = bool(job.get("in_turns"))
        self.seconds: list[float] = []
        self.begun = time.perf_counter()

    def step_done(self) -> None:
        if not self.waits:
            return
        self.seconds.append(time.perf_counter() - self.begun)
        if len(self.seconds) == STEPS_OF_A_TURN:
            print(f"TURN {statistics.median(self.seconds[1:])}", flush=True)
            sys.stdin.readline()
            self.seconds = []
        self.begun = time.perf_counter()


def main() -> None:
    import torch

    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    result = {"floor": floor_side, "deltaw": deltaw_side, "peft": peft_side}[job["side"]](job)
    print("RESULT " + json.dumps(result), flush=True)


def tokens_of_step(job: dict[str, Any]) -> Any:
    """Text (a module of Python's library) for weights that were trained, random tokens for random ones."""
    import argparse

    import torch
    from transformers import AutoTokenizer

    size = MODELS[job["model"]]
    if size.kind is None:
        text = Path(argparse.__file__).read_text(encoding="utf-8")
        tokenizer = AutoTokenizer.from_pretrained(made(job["model"], Path())[1])
        tokens = torch.tensor(tokenizer(text)["input_ids"][: size.rows * size.length])
        return tokens.view(size.rows, size.length)
    vocabulary = config_of(job["model"]).vocab_size
    return torch.randint(0, vocabulary, (size.rows, size.length), generator=torch.Generator().manual_seed(0))


def deltaw_side(job: dict[str, Any]) -> dict[str, Any]:
    from deltaw.hub.loading import load
    from deltaw.runtime.quantized_weights import quantize_int8, quantize_nf4

    tokens = tokens_of_step(job)
    loaded = load(job["reference"], precision=job["precision"], device="cpu", say=lambda line: None)
    model, precision = loaded.model, loaded.choices["precision"]
    if precision.value == "int8":
        quantize_int8(model.base_model, lambda: model(tokens[:1]))
    if precision.value == "nf4":
        quantize_nf4(model.base_model)
    how = f"{precision.value} ({precision.why}), {kernels_text()}"
    offered = () if loaded.kernels is None else loaded.kernels.approximations
    return {"how": how, **trained(model, job, tokens, offered)}


def trained(model: Any, job: dict[str, Any], tokens: Any, offered: tuple[str, ...] = ()) -> dict[str, Any]:
    """deltaw's steps on a loaded model, with those approximations that are verified on the same tokens."""
    import numpy as np

    from deltaw.data.example import Example
    from deltaw.lora import LoRAConfig, adapter_parameters, attach
    from deltaw.machine.memory import keep_freed_memory
    from deltaw.runtime.packed import packed_rows
    from deltaw.runtime.quantized_weights import use_large_pages
    from deltaw.training.approximations import Approximations, GradientCheck, applicable
    from deltaw.training.loop import train
    from deltaw.training.preparation import checkpoint_blocks
    from deltaw.training.tasks.causal_batcher import choose_causal_batcher
    from deltaw.training.tasks.causal_objective import CausalObjective

    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    resident = loaded_bytes(model)
    labels = np.ones(tokens.shape[1], bool)
    examples = [Example(n, row.numpy().astype(np.int32), labels, 0, None) for n, row in enumerate(tokens)]
    batcher, _ = choose_causal_batcher(model, examples, device="cpu", share=False)
    attach(model, LoRAConfig(rank=RANK, alpha=ALPHA), seed=0)
    if job.get("checkpointing"):
        checkpoint_blocks(model)
    keep_freed_memory()  # as the command line does
    use_large_pages(model)  # as a run does
    objective, seconds, turns = CausalObjective(model), [], Turns(job)
    named = dict(adapter_parameters(model))
    with packed_rows(model):
        check = GradientCheck(model, objective, batcher, named, examples[:1])
        used = applicable(model, objective, offered)
        chosen = check.choose(used) if used else None
    approximations = Approximations(chosen.names if chosen else ())
    with approximations.on(), packed_rows(model):
        outcome = train(
            objective,
            list(named.values()),
            examples,
            batcher,
            learning_rate=1e-4,
            total_steps=job["steps"],
            batch_size=len(examples),
            on_step=lambda step: (seconds.append(step.seconds), turns.step_done()),
        )
    memory = {**memory_above(resident), "weight_bytes": weights}
    verified = "" if chosen is None else f"; approximate: {chosen.measured}; not: {dict(chosen.refused)}"
    found = {"loss": outcome.loss, "approximate": f"{', '.join(approximations.names) or 'nothing'}{verified}"}
    return {**speeds(seconds, tokens.numel()), **memory, **found}


def peft_side(job: dict[str, Any]) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    tokens = tokens_of_step(job)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[job["precision"]]
    model = AutoModelForCausalLM.from_pretrained(job["folder"], dtype=dtype)
    return peft_trained(model, job, tokens)


def peft_trained(model: Any, job: dict[str, Any], tokens: Any) -> dict[str, Any]:
    """PEFT's steps on a loaded model."""
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
    seconds, losses, turns = [], [], Turns(job)
    for _ in range(job["steps"]):
        begun = time.perf_counter()
        loss = forward(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - begun)
        losses.append(loss.item())
        turns.step_done()
    loss_of_all = statistics.fmean(losses)
    return {**speeds(seconds, tokens.numel()), **memory_above(resident), "loss": loss_of_all}


def floor_side(job: dict[str, Any]) -> dict[str, Any]:
    """Time the model's matrix products alone, forward and backward; count the rest at their rate."""
    import torch

    config, size = config_of(job["model"]), MODELS[job["model"]]
    rows = size.rows * size.length
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[job["precision"]]

    def median_of(product: Callable[[], object], times: int) -> float:
        product()
        found = []
        for _ in range(times):
            begun = time.perf_counter()
            product()
            found.append(time.perf_counter() - begun)
        return statistics.median(found)

    def both_ways(rows: int, inputs: int, outputs: int, times: int) -> float:
        x, grad = torch.randn(rows, inputs, dtype=dtype), torch.randn(rows, outputs, dtype=dtype)
        weight = torch.randn(outputs, inputs, dtype=dtype)
        return median_of(lambda: x @ weight.t(), times) + median_of(lambda: grad @ weight, times)

    seconds = operations = 0.0
    shapes = linear_shapes(config)
    for (inputs, outputs), count in shapes.items():
        seconds += count * both_ways(rows, inputs, outputs, 2 * job["steps"])
        operations += count * 4 * rows * inputs * outputs
    part = min(rows, HEAD_ROWS)
    seconds += rows / part * both_ways(part, config.hidden_size, config.vocab_size, max(2, job["steps"] // 2))
    operations += 4 * rows * config.hidden_size * config.vocab_size
    rate = operations / seconds
    wide = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    pairs = size.rows * size.length * (size.length + 1) / 2
    attention = 2 * 2 * pairs * wide * config.num_hidden_layers * 3.5
    update = 6 * rows * RANK * sum(c * (i + o) for (i, o), c in shapes.items())
    total = seconds + (attention + update) / rate
    return {
        "tokens_per_second": rows / total,
        "rate": rate,
        "operations_per_token": (operations + attention + update) / rows,
    }


def speeds(seconds: list[float], tokens: int) -> dict[str, Any]:
    """The time of the first step, and tokens per second at the median of the others."""
    rest = seconds[1:] or seconds
    return {"tokens_per_second": tokens / statistics.median(rest), "first_step": seconds[0], "seconds": seconds}


def memory_above(resident: int) -> dict[str, Any]:
    from deltaw.machine.memory import peak_resident_bytes

    peak = peak_resident_bytes()
    return {"peak_bytes": peak, "above_bytes": peak - resident}


def loaded_bytes(model: Any) -> int:
    """Resident memory with all weights read, mapped ones included; resets the peak."""
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
