"""Tiny encoders, embedders and classifiers on disk, with trained adapters."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import BertConfig, BertModel

from deltaw.runs.fit import fit
from tests.byte_models import save_model
from tests.conftest import deep_merge, write_rows

TEXTS = ["a", "some longer text", "x" * 40, "snow ☃"]


def bert_config(**changes: object) -> BertConfig:
    shape = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 64}
    shape |= {"num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.2}
    return BertConfig(**{**shape, **changes})


def write_bert(folder: Path, **changes: object) -> Path:
    torch.manual_seed(0)
    return save_model(BertModel(bert_config(**changes)).eval(), folder)


def train_classifier(model: Path, output: Path, classes: tuple[str, ...], **overrides: object) -> Path:
    """Train for a few steps on generated rows."""
    rows = [{"text": f"{name} number {n}", "label": name} for n in range(4) for name in classes]
    settings = {"model": str(model), "task": "sequence-classification"}
    settings |= {"data": {"train": str(write_rows(output.parent / f"{output.name}.jsonl", rows))}}
    settings |= {"lora": {"rank": 2, "alpha": 4}}
    settings |= {"train": {"learning_rate": 1e-2, "batch_size": 4, "max_steps": 2, "drift": False}}
    fixed = {"precision": "fp32", "device": "cpu", "threads": 1, "output": str(output)}
    return Path(fit(deep_merge(settings | fixed, overrides)).output)


def train_embedder(model: Path, output: Path, **overrides: object) -> Path:
    """Train for a few steps on generated pairs, with a large change of the vectors."""
    rows = [{"anchor": f"question {n} {'x' * (n % 7)}", "positive": f"answer {'y' * (n % 5)} {n}"} for n in range(20)]
    settings = {"model": str(model), "task": "embedding"}
    settings |= {"data": {"train": str(write_rows(output.parent / f"{output.name}.jsonl", rows)), "eval": 0.3}}
    settings |= {"lora": {"rank": 2, "alpha": 4}}
    settings |= {"train": {"learning_rate": 3e-2, "batch_size": 5, "epochs": 3, "drift": False}}
    fixed = {"precision": "fp32", "device": "cpu", "threads": 1, "output": str(output)}
    return Path(fit(deep_merge(settings | fixed, overrides)).output)
