"""Test if a model computes the same with an activated adapter when the tokens before it run separately.

The test runs forward and backward in fp32 on a small copy of the model, with a nonzero adapter on all linear layers.
The reference is a complete row with a masked adapter. The result is the same in a dry run, and does not depend on the
precision of the weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deltaw.lora import LoRAConfig, adapter_parameters, attach
from deltaw.lora.adapted import ACTIVE_KEYWORD
from deltaw.machine.choices import Choice
from deltaw.runtime.packed import PREFIX_TREE, backbone_of, packed_rows, sample_rows
from deltaw.runtime.partial import PartialLayout
from deltaw.runtime.recognition import TOLERANCE, measure_once

# Number of tokens at the end of a sample row on which the adapter is active.
ACTIVE_TOKENS = 3

_DIFFERENCES: dict[tuple[Any, ...], float] = {}


def can_run_separately(model: PreTrainedModel) -> Choice[bool]:
    """Return True with the reason if tokens before an activated adapter can run first and be replaced by their keys and
    values.
    """
    name = type(model).__name__
    try:
        error_norm = measure_once(_DIFFERENCES, backbone_of(model), _separate_run_error)
    except Exception as error:  # any error of a third-party model means that it needs complete rows
        return Choice(False, f"{name} cannot run prompts separately ({type(error).__name__}: {str(error)[:100]})")
    difference = f"relative difference {error_norm:.1e}"
    if not error_norm < TOLERANCE:
        return Choice(False, f"{name} has different outputs if prompts run separately ({difference})")
    return Choice(True, f"{name} has the same outputs if prompts run separately ({difference})")


def _separate_run_error(small: PreTrainedModel) -> float:
    """Return the maximum relative difference of outputs and gradients."""
    attach(small, LoRAConfig(rank=4, alpha=8, active="completion", invocation_tokens=[0]), seed=0)
    factors = [p for _, p in adapter_parameters(small)]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in factors:
            p.copy_(torch.randn(p.shape, generator=generator) * p.shape[0] ** -0.5)
    layout, inputs = sample_rows(small, PREFIX_TREE)
    active = torch.zeros(layout.length, dtype=torch.bool)
    for n, stop in enumerate(layout.stops.tolist()):
        active[stop - ACTIVE_TOKENS : stop] = n not in PREFIX_TREE
    slopes = torch.randn(int(active.sum()), small.config.get_text_config().hidden_size, generator=generator)
    with packed_rows(small, fused=False):
        expected_outputs = small(**{**inputs, ACTIVE_KEYWORD: active[None]}).last_hidden_state[0][active]
        expected_grads = torch.autograd.grad((expected_outputs * slopes).sum(), factors)
    keys: dict[int, tuple[Tensor, Tensor]] = {}
    with packed_rows(small):
        with torch.no_grad():
            _run(small, inputs, ~active, keys, acting=False)
        outputs = _run(small, inputs, active, keys, acting=True)
        grads = torch.autograd.grad((outputs * slopes).sum(), factors)
    differences = []
    for computed, references in (((outputs,), (expected_outputs,)), (grads, expected_grads)):
        flat, expected = (torch.cat([tensor.detach().flatten() for tensor in t]) for t in (computed, references))
        differences.append(float((flat - expected).norm() / expected.norm()))
    return max(differences)


def _run(
    small: PreTrainedModel, inputs: dict[str, Any], mask: Tensor, keys: dict[int, tuple[Tensor, Tensor]], acting: bool
) -> Tensor:
    """Return the outputs (M, hidden) of the selected tokens."""
    indices = mask.nonzero()[:, 0]
    layout = PartialLayout(inputs["packed_layout"], indices, keys)
    part = {name: inputs[name][:, indices] for name in ("input_ids", "position_ids")}
    options = {"packed_layout": layout, ACTIVE_KEYWORD: acting, "use_cache": False}
    outputs: Tensor = small(**part, **options).last_hidden_state[0]
    return outputs
