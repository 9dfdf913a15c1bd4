"""Planned and measured device memory of training runs on a simulated CUDA device.

The device of ``tests/fake_cuda`` computes on the CPU and allocates like torch's CUDA caching allocator, so the figures
describe its allocator and not a GPU. Each model is trained twice: with default settings, and on a card with ``--share``
of the memory that the first plan requires. The second run must use smaller microbatches or activation checkpointing,
and fails if it allocates more memory than the card has.

The models have random weights, 32,000 tokens and small blocks.

    python benchmarks/gpu_memory.py                   # nine models, about 20 minutes on 1 core
    python benchmarks/gpu_memory.py --only llama      # models whose name matches a regular expression
    python benchmarks/gpu_memory.py --json out.json --models DIR
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean

from machine import print_machine
from memory import create_model_in_process, error, settings_of
from memory_models import DECODERS, ENCODERS, SIZE

# Model and settings.
RUNS: list[tuple[str, dict]] = [
    ("llama", {"train.batch_size": 32}),
    ("qwen2", {"train.batch_size": 16}),
    ("qwen3", {"data": "sql", "train.batch_size": 4}),
    ("gemma2", {"train.batch_size": 16}),
    ("phi3", {"train.batch_size": 16}),
    ("gpt2", {"train.batch_size": 32}),
    ("smollm2", {"train.batch_size": 8}),
    ("bert", {"train.batch_size": 32}),
    ("mixtral", {"train.batch_size": 16}),
]
VOCABULARY = 32_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="run only models whose name matches this regular expression")
    parser.add_argument("--json", type=Path, default=None, help="write all results to this file")
    parser.add_argument("--models", type=Path, default=None, help="create the models in this folder and keep them")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps of each run")
    parser.add_argument("--share", type=float, default=0.9, help="share of the first plan that the second card has")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        job = json.load(sys.stdin)
        print(json.dumps(measure(**job) if "settings" in job else create_model(**job)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        print_machine()
        print("simulated allocator, not a GPU; MB")
        print("| model | card | microbatches | checkpointing | planned | measured | error | reserved |")
        print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
        rows: list[dict] = []
        for model, changes in RUNS:
            if not re.search(arguments.only, model):
                continue
            models = arguments.models or Path(scratch) / "models"
            is_published = model == "smollm2"
            tokenizer = create_model_in_process("smollm2" if is_published else "llama", models)
            reference = tokenizer if is_published else str(models / f"small-{model}")
            settings = settings_of(model, "lora", changes, reference, arguments.steps, Path(scratch) / "run")
            settings["data"]["eval"] = 4
            settings["train"]["samples"] = 0
            settings["device"] = "cuda"
            limit = None
            if not is_published and not Path(reference).exists():
                run_child({"model": model, "folder": reference, "tokenizer": tokenizer})
            for _ in range(2):
                measured = run_child({"settings": settings, "limit": limit})
                row = {"model": model, "settings": changes, "limit": limit, **measured}
                shutil.rmtree(settings["output"], ignore_errors=True)
                rows.append(row)
                print(format_row(row), flush=True)
                limit = int(arguments.share * row["required"])
                settings["memory"] = str(limit)
            if arguments.json is not None:
                arguments.json.write_text(json.dumps(rows, indent=1))
    errors = [error(row["planned"], row["measured"]) for row in rows]
    print(f"{len(errors)} runs, off by {fmean(map(abs, errors)):.1%} on average, {max(map(abs, errors)):.1%} at worst")


def format_row(row: dict) -> str:
    """Format a result as a row of a table."""
    card = "24 GiB" if row["limit"] is None else f"{row['limit'] / 1e6:.0f}"
    sizes = f"{row['planned'] / 1e6:.1f} | {row['measured'] / 1e6:.1f} | {error(row['planned'], row['measured']):+.1%}"
    choices = f"{row['tokens']:,} | {row['checkpointing']}"
    return f"| {row['model']} | {card} | {choices} | {sizes} | {row['reserved'] / 1e6:.0f} |"


def run_child(job: dict) -> dict:
    """Create a model or measure one run in a new process."""
    command = [sys.executable, __file__, "--child"]
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    result: dict = json.loads(done.stdout.splitlines()[-1])
    return result


def create_model(model: str, folder: str, tokenizer: str) -> dict:
    """Create a model with random weights (runs in the child process)."""
    import torch
    import transformers

    if model in ENCODERS:
        kind = f"{ENCODERS[model][0]}Model"
        settings = f"{ENCODERS[model][0]}Config"
        extra: dict = {**SIZE, "intermediate_size": 2048, "pad_token_id": 0, "max_position_embeddings": 514}
    else:
        kind, settings, _, _, extra = DECODERS[model]
        kind = f"{kind}Model" if kind.endswith("LMHead") else f"{kind}ForCausalLM"
        extra = {**extra, "bos_token_id": 1, "eos_token_id": 2}
    config = getattr(transformers, settings)(vocab_size=VOCABULARY, **extra)
    getattr(transformers, kind)(config).to(torch.bfloat16).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return {}


def measure(settings: dict, limit: int | None) -> dict:
    """Train with these settings on a device with ``limit`` bytes, or 24 GiB (runs in the child process)."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.fake_cuda.device import configure, disable_compiled_kernels, install

    install()
    import torch

    torch.cuda.init()
    if limit is not None:
        configure(total_memory=limit)
    from deltaw.runs.fit import fit
    from deltaw.settings.config import RunConfig

    disable_compiled_kernels()
    result = fit(RunConfig.read(settings))
    assert result.plan is not None
    written = re.search(r"checkpointing: (\S+)", (result.output / "run.yaml").read_text())
    return {
        "planned": result.plan.peak_resident_bytes,
        "required": result.plan.required_bytes,
        "measured": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
        "tokens": result.plan.tokens,
        "checkpointing": "" if written is None else written[1],
    }


if __name__ == "__main__":
    main()
