"""LoRA steps of a small Llama on the fake device, with rank 16 on all linear layers and bf16 weights."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from deltaw.data.example import Example
from deltaw.lora import LoRAConfig, adapter_parameters, attach
from deltaw.runtime.packed import packed_rows
from deltaw.training.batchers import BatcherOptions, choose_causal_batcher
from deltaw.training.causal_objective import CausalObjective
from deltaw.training.loop import train
from tests.fake_cuda.launches import Launches

ROWS = 2
LENGTH = 48
VOCABULARY = 128
# Training verifies in its first steps that parameters change. Later steps are counted.
STEPS = 4


def llama(blocks: int, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(dtype).to(device).eval().requires_grad_(False)


def tokens() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))


def train_llama(blocks: int, launches: Launches | None = None, *, fused: bool = True, **model) -> tuple[list, list]:
    """Train, and return the launches and synchronizations of each step, and the losses."""
    network = llama(blocks, **model)
    labels = np.ones(LENGTH, bool)
    rows = [Example(n, row.numpy().astype(np.int32), labels, 0, None) for n, row in enumerate(tokens())]
    batcher, _ = choose_causal_batcher(network, rows, BatcherOptions(network.device.type, share=False))
    attach(network, LoRAConfig(rank=16, alpha=32), seed=0)
    counts = [launches.read() if launches else (0, 0)]
    losses = []

    def on_step(step) -> None:
        losses.append(step.loss)
        counts.append(launches.read() if launches else (0, 0))

    with packed_rows(network, fused=fused):
        parameters = [parameter for _, parameter in adapter_parameters(network)]
        train(
            CausalObjective(network),
            parameters,
            rows,
            batcher,
            learning_rate=1e-3,
            total_steps=STEPS,
            batch_size=ROWS,
            on_step=on_step,
        )
    return [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(counts)], losses
