"""A block in one call takes about the memory of its two halves, which a plan counts in its stead."""

from __future__ import annotations

import pytest
import torch

from deltaw.memory.measure import peak_tensor_bytes
from deltaw.runtime.packed import fused_blocks
from deltaw.runtime.quantized_weights import quantize_int8
from tests.kernels.conftest import compiled_only
from tests.runtime.families import adapted, model_of
from tests.runtime.test_fused import counted_calls, outputs_and_gradients

BLOCKS = 4


@compiled_only
@pytest.mark.each_value
@pytest.mark.parametrize("int8", [False, True], ids=["bf16", "int8"])
@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma3", "GPT2", "Phi3", "GPTNeoX"])
def test_one_call_takes_about_what_the_halves_take(family, int8, monkeypatch):
    sizes = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": BLOCKS}
    model = model_of(family, torch.bfloat16, **sizes)
    if int8:
        quantize_int8(model.base_model)
    adapted(model)
    assert fused_blocks(model).choice.value
    lengths = (391, 9, 130, 310)

    def peak() -> int:
        for parameter in model.parameters():
            parameter.grad = None
        return peak_tensor_bytes(lambda: outputs_and_gradients(model, True, lengths))

    # What measures memory is an observer, before which blocks run as two halves.
    halves = peak()
    monkeypatch.setattr("deltaw.runtime.fused.unwatched", lambda *args: True)
    with counted_calls(monkeypatch) as calls:
        whole = peak()
    assert calls.count("forward") == calls.count("backward") == BLOCKS
    assert whole == pytest.approx(halves, rel=0.06)
