"""Whether a model gives the same with an activated adapter if what precedes the answer runs apart.

Verified in fp32 on a small copy of the model (``small_copy``), forward and backward, with an adapter on all
linear layers that is not zero. So the answer is the same in a dry run, and does not hang on the precision of
the weights. The reference is the whole row with the adapter masked.

Knows models, layouts and adapters; not rows of data or stores.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deltaw.lora import LoRAConfig, adapter_parameters, attach
from deltaw.lora.adapted import PLACES
from deltaw.machine.choices import Choice
from deltaw.runtime.packed import TREE, backbone_of, packed_rows, sample_rows
from deltaw.runtime.partial import PartialLayout
from deltaw.runtime.recognition import TOLERANCE, asked_once

# Tokens at the end of a row that the adapter of the sample acts on.
ACTIVE = 3

_DIFFERENCES: dict[tuple[Any, ...], float] = {}


def can_run_apart(model: PreTrainedModel) -> Choice[bool]:
    """Whether tokens before the adapter's act can run first, their keys and values standing for them."""
    name = type(model).__name__
    try:
        found = asked_once(_DIFFERENCES, backbone_of(model), _apart_against_whole)
    except Exception as error:  # whatever a foreign model raises here, it can run whole rows
        return Choice(False, f"{name} cannot run prompts apart ({type(error).__name__}: {str(error)[:100]})")
    difference = f"relative difference {found:.1e}"
    if not found < TOLERANCE:
        return Choice(False, f"{name} gives something else if prompts run apart ({difference})")
    return Choice(True, f"{name} gives the same if prompts run apart ({difference})")


def _apart_against_whole(small: PreTrainedModel) -> float:
    """The larger one of the relative differences of outputs and of gradients."""
    attach(small, LoRAConfig(rank=4, alpha=8, activation="completion", invocation_tokens=[0]), seed=0)
    factors = [p for _, p in adapter_parameters(small)]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in factors:
            p.copy_(torch.randn(p.shape, generator=generator) * p.shape[0] ** -0.5)
    layout, inputs = sample_rows(small, TREE)
    active = torch.zeros(layout.length, dtype=torch.bool)
    for n, stop in enumerate(layout.stops.tolist()):
        active[stop - ACTIVE : stop] = n not in TREE
    slopes = torch.randn(int(active.sum()), small.config.get_text_config().hidden_size, generator=generator)
    with packed_rows(small, fused=False):
        whole = small(**{**inputs, PLACES: active[None]}).last_hidden_state[0][active]
        of_whole = torch.autograd.grad((whole * slopes).sum(), factors)
    keys: dict[int, tuple[Tensor, Tensor]] = {}
    with packed_rows(small):
        with torch.no_grad():
            _run(small, inputs, ~active, keys, acting=False)
        apart = _run(small, inputs, active, keys, acting=True)
        of_apart = torch.autograd.grad((apart * slopes).sum(), factors)
    differences = []
    for ours, theirs in (((apart,), (whole,)), (of_apart, of_whole)):
        flat, expected = (torch.cat([tensor.detach().flatten() for tensor in of]) for of in (ours, theirs))
        differences.append(float((flat - expected).norm() / expected.norm()))
    return max(differences)


def _run(
    small: PreTrainedModel, inputs: dict[str, Any], which: Tensor, keys: dict[int, tuple[Tensor, Tensor]], acting: bool
) -> Tensor:
    """(M, hidden) outputs of these tokens alone."""
    places = which.nonzero()[:, 0]
    layout = PartialLayout(inputs["packed_layout"], places, keys)
    part = {name: inputs[name][:, places] for name in ("input_ids", "position_ids")}
    told = {"packed_layout": layout, PLACES: acting, "use_cache": False}
    outputs: Tensor = small(**part, **told).last_hidden_state[0]
    return outputs
