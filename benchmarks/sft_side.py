"""One side of `benchmarks/sft.py`: train on the prepared rows in this process and print a line of JSON.

Both sides use the same token ids and labels, the same order of rows in every optimizer step, and the same learning
rate, schedule, rank, alpha, target modules and initialization. The time is that of the training loop. The memory is the
peak of the process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from machine import kernels_text

LEARNING_RATE = 2e-4
RANK = 16
ALPHA = 32


def deltaw_side(job: dict) -> dict:
    import torch

    from deltaw.data.example import Example
    from deltaw.hub.loading import load
    from deltaw.lora import LoRAConfig, adapter_parameters, attach, save_adapter
    from deltaw.machine.memory import retain_freed_memory
    from deltaw.runtime.packed import packed_rows
    from deltaw.runtime.quantized_weights import quantize_int8
    from deltaw.training.batchers import BatcherOptions, choose_causal_batcher
    from deltaw.training.causal_objective import CausalObjective
    from deltaw.training.loop import train
    from deltaw.training.optimizer import count_steps

    loaded = load(job["model"], precision=job["precision"], device="cpu", log=lambda line: None)
    precision = loaded.choices["precision"]
    examples = [
        Example(row, np.array(r["input_ids"], np.int32), np.array(r["labels"]) != -100, 0, None)
        for row, r in enumerate(job["rows"], 1)
    ]
    if precision.value == "int8":
        tokens = torch.cat([torch.tensor(r["input_ids"]) for r in job["rows"][:40]])[None, :512]
        quantize_int8(loaded.model.base_model, lambda: loaded.model.base_model(input_ids=tokens))
    batcher, _ = choose_causal_batcher(loaded.model, examples, BatcherOptions("cpu", share=job["share"]))
    attach(loaded.model, LoRAConfig(rank=RANK, alpha=ALPHA), seed=0)
    steps = count_steps(len(examples), job["batch_size"], 1.0, None)
    retain_freed_memory()  # like the command line
    objective = CausalObjective(loaded.model)
    with packed_rows(loaded.model):
        outcome = train(
            objective,
            [p for _, p in adapter_parameters(loaded.model)],
            examples,
            batcher,
            learning_rate=LEARNING_RATE,
            total_steps=steps,
            batch_size=job["batch_size"],
            schedule="linear",
        )
    save_adapter(loaded.model, job["output"], base_model=job["model"])
    arithmetic = f"{precision.value} ({precision.why}), {kernels_text()}"
    return {"seconds": outcome.seconds, "loss": outcome.loss, "how": arithmetic}


def trl_arguments(job: dict) -> dict:
    """Return the training arguments of TRL that the benchmarks share."""
    return {
        "output_dir": job["output"],
        "per_device_train_batch_size": job["batch_size"],
        "num_train_epochs": 1,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "linear",
        "bf16": job["precision"] == "bf16",
        "gradient_checkpointing": job.get("checkpointing", False),
        "use_cpu": True,
        "seed": 0,
        "logging_strategy": "epoch",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "max_length": None,
        "dataloader_pin_memory": False,
    }


def trl_side(job: dict) -> dict:
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from deltaw.data.packing import epoch_order

    torch.set_num_threads(job["threads"])
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[job["precision"]]
    model = AutoModelForCausalLM.from_pretrained(job["folder"], dtype=dtype)
    torch.manual_seed(0)
    adapter = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, adapter, autocast_adapter_dtype=job["autocast_adapter_dtype"])
    settings = SFTConfig(**trl_arguments(job), train_sampling_strategy="sequential")
    trainer = SFTTrainer(
        model=model,
        args=settings,
        train_dataset=Dataset.from_list([job["rows"][i] for i in epoch_order(len(job["rows"]), 0, seed=0)]),
        processing_class=AutoTokenizer.from_pretrained(job["tokenizer"]),
    )
    result = trainer.train()
    model.save_pretrained(job["output"])
    return {"seconds": result.metrics["train_runtime"], "loss": result.training_loss}


def run_side(script: str, job: dict, work: Path, **variables: str) -> dict:
    """Run a side in a new process and return its results.

    Args:
        script: File of this folder that measures a job in a file and prints its results.
        variables: Additional environment variables.
    """
    (work / "job.json").write_text(json.dumps(job))
    environment = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(job["threads"])}
    process = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(script)), str(work / "job.json")],
        capture_output=True,
        text=True,
        env={**os.environ, **environment, **variables},
    )
    for line in process.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    raise SystemExit(f"{job['side']} failed:\n{process.stdout[-2000:]}\n{process.stderr[-4000:]}")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("job", type=Path)
    job = json.loads(arguments.parse_args().job.read_text())
    job["rows"] = json.loads(Path(job["rows"]).read_text())
    measured = {"deltaw": deltaw_side, "trl": trl_side}[job["side"]](job)

    from deltaw.machine.memory import peak_resident_bytes

    measured["rows_per_second"] = len(job["rows"]) / measured["seconds"]
    measured["peak_bytes"] = peak_resident_bytes()
    print("RESULT " + json.dumps(measured), flush=True)


if __name__ == "__main__":
    main()
