"""Random token rows and tiny classifiers for tests of methods."""

from __future__ import annotations

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel

from deltaw.data.example import Example


def random_rows(count: int = 6) -> list[Example]:
    """Create rows of different lengths. Tokens from the fifth on are labels."""
    rng = np.random.default_rng(0)
    rows = []
    for row in range(count):
        tokens = rng.integers(3, 97, size=9 + row).astype(np.int32)
        is_label = np.zeros(len(tokens), bool)
        is_label[4:] = True
        rows.append(Example(row + 1, tokens, is_label, 4, "x"))
    return rows


def classifier(family: str, vocabulary: int = 60) -> PreTrainedModel:
    """Create a tiny classifier with three classes, without dropout."""
    torch.manual_seed(3)
    shape = {"vocab_size": vocabulary, "num_labels": 3, "pad_token_id": 1 if family == "roberta" else 0}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    if family == "distilbert":
        sizes = {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}
    config = transformers.AutoConfig.for_model(family, **shape, **sizes)
    return transformers.AutoModelForSequenceClassification.from_config(config).eval()
