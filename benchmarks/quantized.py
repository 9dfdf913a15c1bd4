"""Training over a base model with 4-bit weights: speed, memory and loss, and a step over 3 billion quantized weights.

    python benchmarks/quantized.py [--repeats 2] [--sides deltaw-gguf bitsandbytes-fp32]

SmolLM2-135M-Instruct, 2 rows of 512 tokens, LoRA rank 16 on all linear layers, as in ``step.py``. The base model is the
blocks of its GGUF file, NF4, or the dequantized weights of the file in bf16. PEFT runs over bitsandbytes' NF4 with
double quantization, computing in bf16 or fp32. ``3b`` has the sizes of Llama-3.2-3B with random blocks (Q4_K, the
embedding Q6_K) and trains on 1 row of 512 tokens with activation checkpointing.

Every side runs in its own process, and the sides alternate. Peaks are resident memory, measured after the weights are
loaded.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from machine import print_machine
from step_models import config_of, prepare_model
from step_sides import deltaw_side, run, tokens_of_step, train_deltaw, train_peft

SIDES: dict[str, dict[str, Any]] = {
    **{f"deltaw-{p}": {"side": "deltaw", "precision": p} for p in ("gguf", "nf4", "bf16")},
    **{f"bitsandbytes-{p}": {"side": "bitsandbytes", "precision": p} for p in ("bf16", "fp32")},
    "3b": {"side": "3b", "model": "llama-3.2-3b", "checkpointing": True},
}
STEPS_3B = 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2, help="rounds over all sides")
    parser.add_argument("--steps", type=int, default=5, help="steps of each side; the first is timed separately")
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES), metavar="SIDE")
    parser.add_argument("--threads", type=int, default=0, help="0: chosen by deltaw")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()

    from deltaw.machine.choices import choose_threads

    threads = args.threads or choose_threads().value
    reference, folder = prepare_model("smollm2", Path(tempfile.gettempdir()))
    results: dict[str, list[dict[str, Any]]] = {}
    for round_index in range(args.repeats):
        for name in args.sides:
            if name == "3b" and round_index:
                continue  # only its memory is of interest
            job = {
                "model": "smollm2",
                "reference": reference,
                "folder": folder,
                "threads": threads,
                "steps": STEPS_3B if name == "3b" else args.steps,
                **SIDES[name],
            }
            results.setdefault(name, []).append(run(job, {}, __file__))
            print(
                f"round {round_index + 1}: {name:18} {results[name][-1]['tokens_per_second']:8.1f} tokens/s", flush=True
            )
    print(*table(results), sep="\n")
    print_machine(threads)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


def table(all_results: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Return the medians as a Markdown table."""
    lines = [
        "",
        "| | tokens/s | weights | peak resident | above the weights | mean loss |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, results in all_results.items():

        def median(key: str, runs: list[dict[str, Any]] = results) -> float:
            return statistics.median(result[key] for result in runs)

        weights = f"{median('weight_bytes') / 1e6:,.1f} MB" if "weight_bytes" in results[0] else ""
        peak, above = (median(key) / 1e6 for key in ("peak_bytes", "above_bytes"))
        lines.append(
            f"| {name} | {median('tokens_per_second'):.1f} | {weights} | {peak:,.0f} MB | {above:,.0f} MB "
            f"| {median('loss'):.4f} |"
        )
    return lines


def bitsandbytes_side(job: dict[str, Any]) -> dict[str, Any]:
    """Train with PEFT over bitsandbytes' NF4 with double quantization."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[job["precision"]]
    quantized = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    model = AutoModelForCausalLM.from_pretrained(
        job["folder"], dtype=dtype, quantization_config=quantized, device_map="cpu"
    )
    return train_peft(model, job, tokens_of_step(job))


def random_blocks_side(job: dict[str, Any]) -> dict[str, Any]:
    """Train with deltaw over random blocks in the sizes of a large model."""
    import torch
    from torch import nn

    from deltaw.hub.empty_models import build_empty
    from deltaw.hub.gguf_blocks import GGUFBlockTensor
    from deltaw.hub.gguf_loading import insert_block_layers
    from deltaw.kernels.block_linear import FORMATS

    def blocks(entry: GGUFBlockTensor) -> torch.Tensor:
        block_format = FORMATS[entry.format]
        data = torch.randint(0, 256, (entry.rows, block_format.bytes_of_row(entry.columns)), dtype=torch.uint8)
        scales = torch.tensor([1e-4, 1e-4], dtype=torch.float16).view(torch.uint8)
        rows = data.view(-1, block_format.bytes)
        if entry.format == "Q6_K":
            rows[:, 208:210] = scales[:2]
        else:
            rows[:, :4] = scales
        return data

    torch.manual_seed(0)
    model, _ = build_empty(Path(), config_of(job["model"]), "causal-lm", "gguf", "sdpa", False)
    entries = [
        GGUFBlockTensor(
            f"{name}.weight", "Q6_K" if isinstance(module, nn.Embedding) else "Q4_K", *module.weight.shape, 1
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) or (isinstance(module, nn.Linear) and "lm_head" not in name)
    ]
    insert_block_layers(model, entries, blocks)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.fill_(1.0)
    model.requires_grad_(False).eval()
    return train_deltaw(model, job, tokens_of_step(job))


def side() -> None:
    """Run one side (in the child process)."""
    import torch

    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    sides = {"deltaw": deltaw_side, "bitsandbytes": bitsandbytes_side, "3b": random_blocks_side}
    print("RESULT " + json.dumps(sides[job["side"]](job)), flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):
        side()
    else:
        main()
