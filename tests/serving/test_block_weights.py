"""The decoder over weights in blocks, of every format: its logits and texts are those of the weights that the
blocks stand for, with adapters beside each other too, and the blocks stay blocks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from deltaw.kernels import loader
from deltaw.kernels.block_linear import FORMATS, BlockWeight
from deltaw.lora.layers_quantized import BlockEmbedding, BlockLinear
from deltaw.runtime.quantized_weights import quantize_nf4
from deltaw.serving.decodable import decodable, tolerance
from tests.byte_models import tiny_llama
from tests.kernels.test_decode_blocks import drawn
from tests.runtime.families import VOCABULARY, model_of
from tests.serving.adapter_folders import write_lora
from tests.serving.mixed_rows import Rows, bank_over, drawn_prompts, last_logits, packed_of, written
from tests.serving.test_mixed_adapters import carrying, families, off

WIDE = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": VOCABULARY}
ROWS, STEPS = 12, 4


def in_blocks(name: str) -> tuple[nn.Module, nn.Module]:
    """A Llama in bf16 whose matrices are blocks of a format, and the one in fp32 of their numbers."""
    plain = tiny_llama(**WIDE).to(torch.bfloat16).requires_grad_(False)
    kept = copy.deepcopy(plain)
    for number, (place, module) in enumerate(list(kept.named_modules())):
        if not isinstance(module, nn.Linear | nn.Embedding):
            continue
        stored = drawn(name, *module.weight.shape, seed=number)
        kind = BlockLinear if isinstance(module, nn.Linear) else BlockEmbedding
        kept.set_submodule(place, kind.of(module, stored))
        plain.get_submodule(place).weight.data.copy_(stored.dequantized(torch.bfloat16))
    return kept, plain.float()


@pytest.fixture(scope="module", params=families("NF4 Q4_K", " ".join(sorted({*FORMATS} - {"NF4", "Q4_K"}))))
def served(request, tmp_path_factory):
    """A model in blocks with its decoder, the model of the blocks' numbers, and two adapters, packed too."""
    kept, plain = in_blocks(request.param)
    made, root = decodable(kept), tmp_path_factory.mktemp("adapters")
    folders = [write_lora(plain, root / str(n), seed=n, rank=4 + 5 * n, size=0.05) for n in range(2)]
    return kept, plain, made, packed_of(bank_over(kept, made, *folders)), folders


def test_logits_in_a_mixed_batch_are_those_of_the_numbers(served):
    kept, plain, made, packed, folders = served
    which = [n % 3 - 1 for n in range(ROWS)]
    mixed, texts = written(Rows(made, packed, which), drawn_prompts(ROWS, VOCABULARY), STEPS)
    carriers = [plain, *(carrying(plain, folder) for folder in folders)]
    exact = [[last_logits(carrier, text, STEPS + 1) for text in texts] for carrier in carriers]
    for adapter in (-1, 0, 1):
        rows = [number for number, of in enumerate(which) if of == adapter]
        ours = torch.cat([mixed[:, number] for number in rows])
        distances = [off(ours, torch.cat([found[number] for number in rows])) for found in exact]
        own = distances.pop(adapter + 1)
        assert own < tolerance(kept) and 2 * own < min(distances)


def test_any_number_of_threads_and_rows_gives_the_same_bits(served):
    if loader.library() is None:
        pytest.skip("torch's products depend on how many rows there are")
    _, _, made, packed, _ = served
    prompts, before, found = drawn_prompts(3, VOCABULARY), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(written(Rows(made, packed, [-1, 0, 1]), prompts, STEPS)[0])
            alone = written(Rows(made, packed, [1]), prompts[2:], STEPS)[0]
            assert torch.equal(alone[:, 0], found[-1][:, 2])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_nothing_is_dequantized_for_a_decoder(served):
    kept, made = served[0], served[2]
    layers = [layer for block in made.decoder.blocks for _, layer in block.layers()] + [made.decoder.head]
    addresses = {p.data_ptr() for p in kept.parameters()}
    for layer in layers:
        assert isinstance(layer.weight, BlockWeight) and layer.weight.data.data_ptr() in addresses
    assert isinstance(made.entry.weight, BlockWeight) and made.entry.known == VOCABULARY


@pytest.mark.parametrize("family", families("Phi3 GPTNeoX", "Gemma3 Qwen3"))
def test_families_in_nf4_are_decoded_too(family):
    model = model_of(family, torch.bfloat16, intermediate_size=128)
    assert not quantize_nf4(model.base_model).kept
    made = decodable(model)
    plain = model_of(family, torch.bfloat16, intermediate_size=128)
    for name, module in model.named_modules():
        if isinstance(module, BlockLinear):
            plain.get_submodule(name).weight.data.copy_(module.plain_weight())
    assert isinstance(made.decoder.blocks[0].query.weight, BlockWeight)
    prompts = drawn_prompts(3, VOCABULARY)
    logits = Rows(made, [], [-1] * 3).step(prompts)
    if loader.library() is not None:
        assert torch.equal(Rows(decodable(plain), [], [-1] * 3).step(prompts), logits)
    plain.float()
    for row, prompt in zip(logits, prompts, strict=True):
        assert off(row, last_logits(plain, prompt)[0]) < tolerance(model)
