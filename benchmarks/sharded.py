"""Peak memory of each process that trains with a base model sharded by FSDP2.

    python benchmarks/sharded.py [--precision fp32] [--width 768] [--blocks 16] [--processes 1 2 4]

Trains some steps of a random Llama with ``train.sharding: base`` and two rows per process and step. Reports the growth
of the largest process's memory since before the model was loaded. The expected growth is that of a single process, with
the blocks replaced by blocks / P, one complete block, and the vector that accumulates gradients. The planned peak is
printed too.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from machine import machine_lines

STEPS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "int8"])
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        train_in_worker(args.worker)
        return
    print("\n".join(machine_lines(1)))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        dtype = "fp32" if args.precision == "fp32" else "bf16"
        blocks, largest, rest = write_model(folder, args.width, args.blocks, dtype)
        if args.precision == "int8":
            blocks /= 2
            largest /= 2
        print(f"{args.precision}: blocks {blocks:.0f} MB, one {largest:.1f} MB, other weights {rest:.1f} MB")
        single_process_growth = 0.0
        for processes in args.processes:
            measurements = run_processes(folder, args.precision, processes)
            peak = max(measurement["peak"] for measurement in measurements)
            start = measurements[0]["start"]
            growth = peak - start
            planned = measurements[0]["planned"]
            vector = measurements[0]["trained"] * 4 / 1e6
            text = f"{processes} processes: {growth:.0f} MB above {start:.0f}"
            if processes == 1:
                single_process_growth = growth
            elif single_process_growth and args.precision != "int8":  # one process maps bf16 files while quantizing
                expected = single_process_growth - blocks + blocks / processes + largest + vector
                text += f", expected {expected:.0f} (ratio {growth / expected:.2f})"
            print(f"{text}; peak {peak:.0f} MB, planned {planned:.0f} ({planned / peak:.3f})", flush=True)


def write_model(folder: Path, width: int, blocks: int, dtype: str) -> tuple[float, float, float]:
    """Write a random model and rows. Return the sizes of all blocks, of one block and of the other weights, in MB."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.byte_models import byte_tokenizer

    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 32 * 32,
        num_hidden_layers=blocks,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        head_dim=64,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).to(torch.float32 if dtype == "fp32" else torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = ({"prompt": f"say {n}", "completion": "word " * 5} for n in range(10, 34))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def megabytes(module: torch.nn.Module) -> float:
        return sum(p.numel() * p.element_size() for p in module.parameters()) / 1e6

    layers = model.model.layers
    return megabytes(layers), megabytes(layers[0]), megabytes(model) - megabytes(layers)


def run_processes(folder: Path, precision: str, processes: int) -> list[dict[str, float]]:
    """Train with this number of processes and return the measurements of each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {
        "model": str(folder),
        "output": str(folder / "run"),
        "precision": precision,
        "device": "cpu",
        "data": {"train": str(folder / "rows.jsonl"), "eval": None},
        "lora": {"rank": 4, "alpha": 8},
        "train": {
            "batch_size": 2 * processes,
            "max_steps": STEPS,
            "sharding": "base",
            "drift": False,
            "samples": 0,
            "keep_features": False,
            "checkpoint_minutes": None,
        },
    }
    shared = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, "--worker", json.dumps(settings)],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    outputs = [process.communicate(timeout=600)[0] for process in workers]
    if any(process.returncode for process in workers):
        sys.exit("\n".join(outputs))
    return [json.loads(text.splitlines()[-1]) for text in outputs]


def train_in_worker(settings: str) -> None:
    """Train in one process and print its measurements.

    These are the memory just before the model was loaded, the peak since then, the planned peak of process 0 (all in
    MB), and the number of trained parameters.
    """
    from deltaw.cli import main as command
    from deltaw.memory.plan import Plan
    from deltaw.runs import memory_check, training_run
    from deltaw.training import process  #  noqa: F401

    path = Path(json.loads(settings)["output"]).parent / f"run-{os.environ['RANK']}.json"
    path.write_text(settings)
    measurements: dict[str, float] = {}
    load = training_run.load_model
    plan = memory_check.plan_run

    def load_for(*args: object, **kwargs: object) -> object:
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak
        measurements["start"] = status("VmRSS")
        return load(*args, **kwargs)

    def plan_run(*args: object, **kwargs: object) -> Plan:
        memory_plan = plan(*args, **kwargs)
        measurements.update(planned=memory_plan.peak_resident_bytes / 1e6, trained=memory_plan.trained_parameters)
        return memory_plan

    training_run.load_model = load_for
    memory_check.plan_run = plan_run
    try:
        command(["train", str(path), "--fresh"])
    except SystemExit as exit:
        if exit.code:
            raise
    print(json.dumps({**measurements, "peak": status("VmHWM")}))


def status(name: str) -> float:
    """Return an entry of /proc/self/status in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024 / 1e6
    raise LookupError(name)


if __name__ == "__main__":
    main()
