"""Kernel launches per transformer block and optimizer step, counted on a simulated CUDA device.

    python benchmarks/launches.py

A step is forward, backward and optimizer of LoRA with rank 16 on all linear layers of a Llama with bf16 weights. The
counts do not measure speed: the device (``tests/fake_cuda``, which needs a C++ compiler and torch's CPU build) runs no
kernels. Launches per block are computed from models with one and three blocks. Triton kernels of liger-kernel are
counted but not run. Sides are skipped if their packages are not installed.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.fake_cuda import device

device.install()

import torch  # noqa: E402

from deltaw.kernels import gpu_attention  # noqa: E402
from tests.fake_cuda.launches import ATTENTION, ATTENTION_BACKWARD, Launches, counted_launches, per_block  # noqa: E402
from tests.fake_cuda.llama_steps import STEPS, llama, tokens, train_llama  # noqa: E402

HEADER = "| side | launches per block | launches per step outside of blocks | synchronizations per step |"


def main() -> None:
    gpu_attention.DEVICES = ()
    sides: dict[str, Callable[[int, Launches], Any]] = {
        "deltaw": lambda blocks, launches: train_llama(blocks, launches)[0],
        "deltaw, the model's own blocks": lambda blocks, launches: train_llama(blocks, launches, fused=False)[0],
        "PEFT": peft_steps,
    }
    if all(importlib.util.find_spec(name) for name in ("liger_kernel", "triton")):
        sides["PEFT with Liger kernels"] = liger_steps
    print(f"{HEADER}\n| --- | ---: | ---: | ---: |")
    for name, steps in sides.items():
        with counted_launches() as launches:
            counts = per_block(lambda blocks, steps=steps: steps(blocks, launches))
        print(f"| {name} | {counts['block']:.0f} | {counts['step']:.0f} | {counts['synchronizations']} |", flush=True)


def peft_steps(blocks: int, launches: Launches, prepare: Callable[[Any], None] = lambda model: None) -> list[Any]:
    """Train a PEFT model with fused AdamW and gradient clipping, and read the loss and the norm of each step."""
    from peft import LoraConfig, get_peft_model

    model = llama(blocks)
    prepare(model)
    settings = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, settings).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
    ids = tokens().to("cuda")
    counts = []
    with counted_sdpa(launches):
        for _ in range(STEPS):
            before = launches.read()
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            torch.stack([loss.detach(), norm]).tolist()
            after = launches.read()
            counts.append((after[0] - before[0], after[1] - before[1]))
    return counts


def counted_sdpa(launches: Launches) -> Any:
    """Context in which torch's attention counts as a fused kernel."""

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(query, key, value)
            return launches.counting(torch.zeros_like, ATTENTION)(query)

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> Any:
            zeros = launches.counting(lambda: [torch.zeros_like(t) for t in ctx.saved_tensors], ATTENTION_BACKWARD)
            return tuple(zeros())

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return Attention.apply(query, key, value)

    return patch.object(torch.nn.functional, "scaled_dot_product_attention", attend)


def liger_steps(blocks: int, launches: Launches) -> list[Any]:
    """Count PEFT with Liger's kernels, which compute nothing here. The result of the model is undefined."""
    import triton
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    def launch(self: Any, *args: Any, grid: Any, **kwargs: Any) -> None:
        launches.corrections += 1

    with patch.object(triton.runtime.jit.JITFunction, "run", launch):
        return peft_steps(blocks, launches, lambda model: apply_liger_kernel_to_llama(model=model))


if __name__ == "__main__":
    main()
