"""One side of `benchmarks/preferences.py`: train in this process and print a line of JSON."""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
from machine import kernels_text
from sft_side import trl_arguments

LEARNING_RATE = 1e-4
BETA = 0.1
RANK = 16
ALPHA = 32


def deltaw_side(job: dict) -> dict:
    import torch

    from deltaw.data.example import Example, RowGroup
    from deltaw.hub.loading import load
    from deltaw.lora import LoRAConfig, adapter_parameters, attach
    from deltaw.machine.memory import retain_freed_memory
    from deltaw.runtime.quantized_weights import quantize_int8
    from deltaw.tasks.preference.settings import PreferenceSettings
    from deltaw.tasks.preference.task import PreferenceTask
    from deltaw.training.batchers import BatcherOptions, choose_causal_batcher
    from deltaw.training.loop import train
    from deltaw.training.optimizer import count_steps

    loaded = load(job["model"], precision=job["precision"], device="cpu", log=lambda line: None)
    model = loaded.model
    precision = loaded.choices["precision"]
    pairs = [
        RowGroup(
            tuple(
                Example(number, np.array(row["tokens"], np.int32), np.array(row["is_label"]), 0, None) for row in pair
            )
        )
        for number, pair in enumerate(job["rows"], 1)
    ]
    if precision.value == "int8":
        tokens = torch.cat([torch.tensor(pair[0]["tokens"]) for pair in job["rows"][:40]])[None, :512]
        quantize_int8(model.base_model, lambda: model.base_model(input_ids=tokens))
    batcher, _ = choose_causal_batcher(model, pairs, BatcherOptions("cpu", share=job["share"]))
    retain_freed_memory()  # like the command line
    task = PreferenceTask(loaded.tokenizer, settings=PreferenceSettings(loss="dpo", beta=BETA))
    start = time.perf_counter()
    pairs = list(task.add_reference_log_probs(model, pairs, batcher))
    reference_seconds = time.perf_counter() - start
    attach(model, LoRAConfig(rank=RANK, alpha=ALPHA), seed=0)
    objective = task.objective(model)
    with task.model_context(model, batcher):
        outcome = train(
            objective,
            [p for _, p in adapter_parameters(model)],
            pairs,
            batcher,
            learning_rate=LEARNING_RATE,
            total_steps=count_steps(len(pairs), job["batch_size"], 1.0, None),
            batch_size=job["batch_size"],
            schedule="linear",
        )
    arithmetic = f"{precision.value} ({precision.why}), {kernels_text()}"
    return {"seconds": outcome.seconds, "first": reference_seconds, "loss": outcome.loss, "how": arithmetic}


def trl_side(job: dict) -> dict:
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    from deltaw.data.packing import epoch_order

    class GivenTokens(DPOTrainer):
        """Trainer for pairs that are already tokenized."""

        def _prepare_dataset(self, dataset, *args, **kwargs):  # type: ignore[no-untyped-def]
            return dataset

        def _precompute_ref_logps(self, *args, **kwargs):  # type: ignore[no-untyped-def]
            start = time.perf_counter()
            dataset = super()._precompute_ref_logps(*args, **kwargs)
            self.first = time.perf_counter() - start
            return dataset

    torch.set_num_threads(job["threads"])
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[job["precision"]]
    model = AutoModelForCausalLM.from_pretrained(job["folder"], dtype=dtype)
    torch.manual_seed(0)
    adapter = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    reference_model = None
    if job["reference"] == "model":
        reference_model = AutoModelForCausalLM.from_pretrained(job["folder"], dtype=dtype)
    if reference_model is not None or job.get("bf16_factors"):
        model = get_peft_model(model, adapter, autocast_adapter_dtype=not job.get("bf16_factors"))
        adapter = None
    order = epoch_order(len(job["rows"]), 0, seed=0)
    arguments = trl_arguments(job) | {"learning_rate": LEARNING_RATE, "train_sampling_strategy": "sequential"}
    settings = DPOConfig(beta=BETA, precompute_ref_log_probs=job["reference"] == "first", **arguments)
    trainer = GivenTokens(
        model=model,
        ref_model=reference_model,
        args=settings,
        train_dataset=Dataset.from_list([_columns(job["rows"][index]) for index in order]),
        processing_class=AutoTokenizer.from_pretrained(job["folder"]),
        peft_config=adapter,
    )
    result = trainer.train()
    reference_seconds = getattr(trainer, "first", 0.0)
    return {"seconds": result.metrics["train_runtime"], "first": reference_seconds, "loss": result.training_loss}


def _columns(pair: list[dict]) -> dict[str, list[int]]:
    """Return a pair in the format of TRL's collator."""
    chosen, rejected = pair
    prompt = chosen["is_label"].index(True)
    return {
        "prompt_ids": chosen["tokens"][:prompt],
        "chosen_ids": chosen["tokens"][prompt:],
        "rejected_ids": rejected["tokens"][prompt:],
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("job", type=Path)
    job = json.loads(arguments.parse_args().job.read_text())
    job["rows"] = json.loads(Path(job["rows"]).read_text())
    measured = {"deltaw": deltaw_side, "trl": trl_side}[job["side"]](job)

    from deltaw.machine.memory import peak_resident_bytes

    measured["steps"] = len(job["rows"]) / measured["seconds"]
    measured["whole"] = len(job["rows"]) / (measured["seconds"] + measured["first"])
    measured["peak_bytes"] = peak_resident_bytes()
    print("RESULT " + json.dumps(measured), flush=True)


if __name__ == "__main__":
    main()
