"""A tiny language model with a byte-level tokenizer, whose weights are the same on all machines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<|end|>"
# The model learns to continue the first words of this sentence.
SENTENCE = "Nine tall ships left the harbor at dawn, and by noon the fog had taken all of them."
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def tiny_model(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Return the model. NumPy draws the weights, because torch's random numbers differ between processors."""
    config = LlamaConfig(
        **SIZES,
        vocab_size=257,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=0,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    generator = np.random.default_rng(0)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.dim() == 2:
                values = generator.standard_normal(parameter.shape, np.float32)
                parameter.copy_(torch.from_numpy(values) * parameter.shape[1] ** -0.5)
    return model.to(dtype)


def write_tiny_model(folder: Path) -> None:
    """Write the model and its tokenizer to a new folder."""
    model = tiny_model()
    model.config.save_pretrained(folder)
    save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate((END, *alphabet))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END).save_pretrained(folder)


def write_rows(path: Path) -> None:
    """Write training rows: the sentence, which the model learns, and its parts from each word, which cost time."""
    words = SENTENCE.split()
    rows = [{"prompt": " ".join(words[:3]), "completion": " " + " ".join(words[3:])}]
    rows += [{"prompt": words[n], "completion": " " + " ".join(words[n + 1 :])} for n in range(1, len(words) - 1)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
