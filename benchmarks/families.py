"""Time of a LoRA step for other model families, compared with PEFT: a BERT classifier, GPT-2 and Gemma 2.

    python benchmarks/families.py [--repeats 5]

The models have random bf16 weights and small sizes of their families. LoRA has rank 16 on all linear layers. Both sides
run in this process on the same tokens and alternate after each step. Prints the median time of each side and the median
ratio of the paired steps.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
import transformers
from machine import print_machine
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from deltaw.data.packing import MicroBatch
from deltaw.kernels import loader
from deltaw.kernels.layout import Layout
from deltaw.lora import LoRAConfig, attach
from deltaw.machine.choices import choose_threads
from deltaw.runtime.packed import packed_rows
from deltaw.runtime.padded import padded_rows
from deltaw.training.causal_objective import CausalObjective

RANK = 16
ALPHA = 32
HEADS = {"num_attention_heads": 12, "hidden_size": 768, "intermediate_size": 2048}


def classifier() -> nn.Module:
    """Return a BERT classifier with MiniLM's sizes and a new head."""
    config = transformers.BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, num_labels=2
    )
    return transformers.BertForSequenceClassification(config)


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=6))


def gemma2() -> nn.Module:
    config = transformers.Gemma2Config(
        num_hidden_layers=6, num_key_value_heads=4, head_dim=64, vocab_size=49152, **HEADS
    )
    return transformers.Gemma2ForCausalLM(config)


# Function that creates the model, rows per step, tokens per row.
FAMILIES: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "encoder, 32 rows of 40": (classifier, 32, 40),
    "GPT-2, 2 rows of 512": (gpt2, 2, 512),
    "Gemma 2, 2 rows of 512": (gemma2, 2, 512),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(choose_threads().value)
    print(loader.unavailable_reason() or "compiled kernels")
    print_machine()
    for name, (make, rows, length) in FAMILIES.items():
        torch.manual_seed(0)
        model = make().to(torch.bfloat16).eval().requires_grad_(False)
        tokens = torch.randint(0, 5000, (rows, length))
        sides = [deltaw_step(copy.deepcopy(model), tokens), peft(copy.deepcopy(model), tokens)]
        for side in sides:
            side()
        pairs = [[timed(side) for side in sides] for _ in range(repeats)]
        our_time, peft_time = (statistics.median(p[i] for p in pairs) for i in (0, 1))
        ratio = statistics.median(p[1] / p[0] for p in pairs)
        print(
            f"{name:26} deltaw {our_time * 1e3:7.0f} ms, PEFT {peft_time * 1e3:7.0f} ms, {ratio:.2f} times", flush=True
        )


def timed(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def deltaw_step(model: nn.Module, tokens: Tensor) -> Callable[[], None]:
    attach(model, LoRAConfig(rank=RANK, alpha=ALPHA), seed=0)
    trained = [p for p in model.parameters() if p.requires_grad]
    if hasattr(model, "classifier"):
        labels = torch.zeros(len(tokens), dtype=torch.long)

        def classify() -> None:
            with padded_rows(model):
                backward_and_clear(model(input_ids=tokens, labels=labels).loss, trained)

        return classify
    objective = CausalObjective(model)
    layout = Layout.of_lengths([tokens.shape[1]] * len(tokens))
    indices = torch.arange(tokens.numel()).view(tokens.shape)
    inputs = {
        "input_ids": tokens.view(1, -1),
        "position_ids": torch.from_numpy(layout.positions())[None],
        "packed_layout": layout,
    }
    predictors = indices[:, :-1].flatten()
    targets = tokens[:, 1:].flatten()
    weights = torch.full((len(targets),), 1 / len(targets))
    count = tokens.numel()
    batch = MicroBatch(inputs, targets, (), count, predictors=predictors, weights=weights)

    def step() -> None:
        with packed_rows(model):
            backward_and_clear(objective(batch), trained)

    return step


def peft(model: nn.Module, tokens: Tensor) -> Callable[[], None]:
    layers = "all-linear"
    adapted = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=layers)).train()
    for module in adapted.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    trained = [p for p in adapted.parameters() if p.requires_grad]
    labels = torch.zeros(len(tokens), dtype=torch.long) if hasattr(model, "classifier") else tokens
    return lambda: backward_and_clear(adapted(input_ids=tokens, labels=labels).loss, trained)


def backward_and_clear(loss: Tensor, trained: list[nn.Parameter]) -> None:
    loss.backward()
    for parameter in trained:
        parameter.grad = None


if __name__ == "__main__":
    main()
