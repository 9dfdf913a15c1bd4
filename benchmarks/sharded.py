"""What each of several processes holds of a base model that FSDP2 divides: its peak of main memory.

    python benchmarks/sharded.py [--precision fp32] [--width 768] [--blocks 16] [--processes 1 2 4]

Trains a few steps of a random Llama with ``train.sharding: base``, two rows a process and step. Of the
process that takes most, it tells how far its memory rose above what process 0 held before the model was
loaded. Expected is what it rose by in one process, less the blocks, with base / P and one block, and with the
vector in which gradients are added up. The planned peak stands beside the measured one.
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
    given = parser.parse_args()
    if given.worker:
        work(given.worker)
        return
    print("\n".join(machine_lines(1)))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        stored = "fp32" if given.precision == "fp32" else "bf16"
        blocks, largest, rest = made(folder, given.width, given.blocks, stored)
        if given.precision == "int8":
            blocks, largest = blocks / 2, largest / 2
        print(f"{given.precision}: blocks {blocks:.0f} MB, one {largest:.1f} MB, the rest {rest:.1f} MB")
        whole = 0.0
        for processes in given.processes:
            told = started(folder, given.precision, processes)
            peak, start = max(one["peak"] for one in told), told[0]["start"]
            rise, planned, vector = peak - start, told[0]["planned"], told[0]["trained"] * 4 / 1e6
            line = f"{processes} processes: {rise:.0f} MB above {start:.0f}"
            if processes == 1:
                whole = rise
            elif whole and given.precision != "int8":  # one process maps the bf16 files as it rounds
                expected = whole - blocks + blocks / processes + largest + vector
                line += f", expected {expected:.0f} (ratio {rise / expected:.2f})"
            print(f"{line}; peak {peak:.0f} MB, planned {planned:.0f} ({planned / peak:.3f})", flush=True)


def made(folder: Path, width: int, blocks: int, stored: str) -> tuple[float, float, float]:
    """Write a random model and rows; MB of all blocks, of one, and of the rest."""
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
    model = LlamaForCausalLM(config).to(torch.float32 if stored == "fp32" else torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = ({"prompt": f"say {n}", "completion": "word " * 5} for n in range(10, 34))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def megabytes(module: torch.nn.Module) -> float:
        return sum(p.numel() * p.element_size() for p in module.parameters()) / 1e6

    listed = model.model.layers
    return megabytes(listed), megabytes(listed[0]), megabytes(model) - megabytes(listed)


def started(folder: Path, precision: str, processes: int) -> list[dict[str, float]]:
    """Train in so many processes; what :func:`work` told of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
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
    running = [
        subprocess.Popen(
            [sys.executable, __file__, "--worker", json.dumps(settings)],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    told = [process.communicate(timeout=600)[0] for process in running]
    if any(process.returncode for process in running):
        sys.exit("\n".join(told))
    return [json.loads(text.splitlines()[-1]) for text in told]


def work(settings: str) -> None:
    """As one process: train, and tell its memory just before the model was loaded, its peak since then, the
    plan's peak (of process 0), all in MB, and how many parameters were trained."""
    from deltaw.cli import main as command
    from deltaw.memory.plan import Plan
    from deltaw.runs import fit, follower
    from deltaw.training import process  #  noqa: F401

    path = Path(json.loads(settings)["output"]).parent / f"run-{os.environ['RANK']}.json"
    path.write_text(settings)
    told: dict[str, float] = {}
    load, plan = fit.load_for, fit.plan_run

    def load_for(*args: object, **kwargs: object) -> object:
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        told["start"] = status("VmRSS")
        return load(*args, **kwargs)

    def plan_run(*args: object, **kwargs: object) -> Plan:
        made = plan(*args, **kwargs)
        told.update(planned=made.peak_resident_bytes / 1e6, trained=made.trained_parameters)
        return made

    fit.load_for = follower.load_for = load_for
    fit.plan_run = plan_run
    try:
        command(["train", str(path), "--fresh"])
    except SystemExit as ended:
        if ended.code:
            raise
    print(json.dumps({**told, "peak": status("VmHWM")}))


def status(name: str) -> float:
    """A line of the process's own account of its memory, in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024 / 1e6
    raise LookupError(name)


if __name__ == "__main__":
    main()
