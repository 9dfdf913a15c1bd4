"""Gradients of a model. Each transformer block is one call of the kernels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from deltaw.data.example import Example
from deltaw.lora import LoRAConfig, adapter_parameters, attach
from deltaw.runtime.packed import packed_rows
from deltaw.selftest.kernel_call import Inputs, KernelCall
from deltaw.selftest.tiny_model import tiny_model
from deltaw.training.approximations import GradientCheck
from deltaw.training.batchers import BatcherOptions, choose_causal_batcher
from deltaw.training.causal_objective import CausalObjective


def model_cases() -> Iterator[KernelCall]:
    """Yield the calls."""
    yield KernelCall("gradients of a model", _gradients, is_exact=False, slack=8)


def _gradients(given: Inputs) -> Sequence[Tensor]:
    model = tiny_model(given.dtype)
    attach(model, LoRAConfig(rank=8, alpha=8.0, target_modules="all-linear"), seed=0)
    parameters = dict(adapter_parameters(model))
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.copy_(given.normal_fp32(*parameter.shape, std=0.1))
    lengths = (90, 33, 60)
    start = given.integers(257, 20).numpy()
    rows = []
    for number, length in enumerate(lengths):
        tokens = np.concatenate([start, given.integers(257, length).numpy()]).astype(np.int32)
        rows.append(Example(number, tokens, np.arange(len(tokens)) >= 20, 0, None))
    batcher, _ = choose_causal_batcher(model, rows, BatcherOptions("cpu", share=True))
    with packed_rows(model):
        check = GradientCheck(model, CausalObjective(model), batcher, parameters, rows)
        return [gradient for _, gradient in check.gradients(())]
