"""A block in one call needs about the memory of its two halves, which the plan counts instead."""

from __future__ import annotations

import pytest
import torch

from deltaw.runtime.packed import fused_blocks
from deltaw.runtime.quantized_weights import quantize_int8
from tests.kernels.conftest import compiled_only
from tests.peak_memory import peak_tensor_bytes
from tests.runtime.families import attach_adapter, model_of
from tests.runtime.test_fused import outputs_and_gradients, record_calls

BLOCKS = 4


@compiled_only
@pytest.mark.each_value
@pytest.mark.parametrize("int8", [False, True], ids=["bf16", "int8"])
@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma3", "GPT2", "Phi3", "GPTNeoX"])
def test_one_call_peak_is_close_to_that_of_halves(family, int8, monkeypatch):
    sizes = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": BLOCKS}
    model = model_of(family, torch.bfloat16, **sizes)
    if int8:
        quantize_int8(model.base_model)
    attach_adapter(model)
    assert fused_blocks(model).choice.value
    lengths = (391, 9, 130, 310)

    def peak() -> int:
        for parameter in model.parameters():
            parameter.grad = None
        return peak_tensor_bytes(lambda: outputs_and_gradients(model, True, lengths))

    # Measuring memory is an observer, and with an observer blocks run as two halves.
    halves = peak()
    monkeypatch.setattr("deltaw.runtime.fused.can_call_directly", lambda *args: True)
    with record_calls(monkeypatch) as calls:
        one_call = peak()
    assert calls.count("forward") == calls.count("backward") == BLOCKS and one_call == pytest.approx(halves, rel=0.06)
