"""Tests of decoding with block-quantized weights of every format, also with mixed adapters.

Logits and texts must match those of the dequantized weights, and the weights must remain in blocks.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from deltaw.decoding.decodable import build_decodable, tolerance
from deltaw.kernels import loader
from deltaw.kernels.block_linear import FORMATS, BlockWeight
from deltaw.lora.layers_quantized import BlockEmbedding, BlockLinear
from deltaw.runtime.nf4 import quantize_nf4
from tests.byte_models import tiny_llama
from tests.kernels.test_decode_blocks import scaled_random_blocks
from tests.runtime.families import VOCABULARY, model_of
from tests.serving.adapter_folders import write_lora
from tests.serving.mixed_rows import Rows, decode_greedily, last_logits, make_bank, packed_adapters, random_prompts
from tests.serving.test_mixed_adapters import family_params, relative_error, with_adapter

WIDE = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": VOCABULARY}
ROWS = 12
STEPS = 4


def quantize_to_blocks(name: str) -> tuple[nn.Module, nn.Module]:
    """Return a bf16 Llama whose matrices are blocks of a format, and an fp32 Llama with the dequantized values."""
    plain = tiny_llama(**WIDE).to(torch.bfloat16).requires_grad_(False)
    quantized = copy.deepcopy(plain)
    for number, (path, module) in enumerate(list(quantized.named_modules())):
        if not isinstance(module, nn.Linear | nn.Embedding):
            continue
        stored = scaled_random_blocks(name, *module.weight.shape, seed=number)
        kind = BlockLinear if isinstance(module, nn.Linear) else BlockEmbedding
        quantized.set_submodule(path, kind.of(module, stored))
        plain.get_submodule(path).weight.data.copy_(stored.dequantized(torch.bfloat16))
    return quantized, plain.float()


@pytest.fixture(scope="module", params=family_params("NF4 Q4_K", " ".join(sorted({*FORMATS} - {"NF4", "Q4_K"}))))
def served(request, tmp_path_factory):
    """Quantized model with its decoder, the dequantized model, and two adapters, as folders and packed."""
    quantized, plain = quantize_to_blocks(request.param)
    decoder = build_decodable(quantized)
    root = tmp_path_factory.mktemp("adapters")
    folders = [write_lora(plain, root / str(n), seed=n, rank=4 + 5 * n, size=0.05) for n in range(2)]
    return quantized, plain, decoder, packed_adapters(make_bank(quantized, decoder, *folders)), folders


def test_mixed_batch_logits_match_dequantized_weights(served):
    quantized, plain, decoder, packed, folders = served
    adapter_indices = [n % 3 - 1 for n in range(ROWS)]
    mixed, texts = decode_greedily(Rows(decoder, packed, adapter_indices), random_prompts(ROWS, VOCABULARY), STEPS)
    carriers = [plain, *(with_adapter(plain, folder) for folder in folders)]
    exact = [[last_logits(carrier, text, STEPS + 1) for text in texts] for carrier in carriers]
    for adapter in (-1, 0, 1):
        rows = [number for number, index in enumerate(adapter_indices) if index == adapter]
        ours = torch.cat([mixed[:, number] for number in rows])
        distances = [relative_error(ours, torch.cat([reference[number] for number in rows])) for reference in exact]
        matching = distances.pop(adapter + 1)
        assert matching < tolerance(quantized) and 2 * matching < min(distances)


def test_logits_are_bit_identical_for_any_threads_and_rows(served):
    if loader.library() is None:
        pytest.skip("torch's products depend on the number of rows")
    _, _, decoder, packed, _ = served
    prompts = random_prompts(3, VOCABULARY)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(decode_greedily(Rows(decoder, packed, [-1, 0, 1]), prompts, STEPS)[0])
            single = decode_greedily(Rows(decoder, packed, [1]), prompts[2:], STEPS)[0]
            assert torch.equal(single[:, 0], results[-1][:, 2])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_decoder_shares_block_weights_with_model(served):
    quantized = served[0]
    decoder = served[2]
    layers = [layer for block in decoder.decoder.blocks for _, layer in block.layers()] + [decoder.decoder.head]
    addresses = {p.data_ptr() for p in quantized.parameters()}
    for layer in layers:
        assert isinstance(layer.weight, BlockWeight) and layer.weight.data.data_ptr() in addresses
    assert isinstance(decoder.entry.weight, BlockWeight) and decoder.entry.num_tokens == VOCABULARY


@pytest.mark.parametrize("family", family_params("Phi3 GPTNeoX", "Gemma3 Qwen3"))
def test_nf4_families_match_dequantized_model(family):
    model = model_of(family, torch.bfloat16, intermediate_size=128)
    assert not quantize_nf4(model.base_model).unquantized
    decoder = build_decodable(model)
    plain = model_of(family, torch.bfloat16, intermediate_size=128)
    for name, module in model.named_modules():
        if isinstance(module, BlockLinear):
            plain.get_submodule(name).weight.data.copy_(module.plain_weight())
    assert isinstance(decoder.decoder.blocks[0].query.weight, BlockWeight)
    prompts = random_prompts(3, VOCABULARY)
    logits = Rows(decoder, [], [-1] * 3).step(prompts)
    if loader.library() is not None:
        assert torch.equal(Rows(build_decodable(plain), [], [-1] * 3).step(prompts), logits)
    plain.float()
    for row, prompt in zip(logits, prompts, strict=True):
        assert relative_error(row, last_logits(plain, prompt)[0]) < tolerance(model)
