"""Comparison of packed rows with shared prefixes with each row alone, run by the model's own code."""

from __future__ import annotations

import torch
from torch import nn

from deltaw.kernels.layout import Layout
from deltaw.lora import LoRAConfig, adapter_parameters, attach
from deltaw.runtime.packed import packed_rows

# A prefix with two continuations that branch within a chunk, a row of one token, and a longer row.
LENGTHS = (21, 3, 18, 1, 70)
PARENTS = (-1, 0, 0, -1, -1)


def attach_everywhere(model: nn.Module, excluded: list[str] | None = None) -> nn.Module:
    """Attach an adapter with nonzero factors to all linear layers."""
    config = LoRAConfig(rank=4, alpha=8, target_modules="all-linear", exclude_modules=excluded)
    attach(model, config, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in adapter_parameters(model):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def assert_equals_separate_rows(model: nn.Module, output: float = 1e-5, gradient: float = 5e-5) -> None:
    """Assert that outputs and gradients of a packed row equal those of its rows, relative to the largest value."""
    factors = [parameter for _, parameter in adapter_parameters(model)]
    layout = Layout.of_lengths(LENGTHS, PARENTS)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 120, (layout.length,), generator=generator)
    slopes = torch.randn(layout.length, model.config.hidden_size, generator=generator)
    backbone = model.base_model
    expected = torch.empty_like(slopes)
    total = torch.zeros(())
    for row, places, start in _rows_of(tokens):
        hidden = backbone(input_ids=row[None], use_cache=False).last_hidden_state[0, start:]
        expected[places] = hidden.detach()
        total = total + (hidden * slopes[places]).sum()
    options = {"allow_unused": True, "materialize_grads": True}
    expected_grads = torch.autograd.grad(total, factors, **options)
    positions = torch.from_numpy(layout.positions())[None]
    with packed_rows(model):
        arguments = {"position_ids": positions, "packed_layout": layout, "use_cache": False}
        hidden = backbone(input_ids=tokens[None], **arguments).last_hidden_state[0]
        grads = torch.autograd.grad((hidden * slopes).sum(), factors, **options)
    assert float((hidden.detach() - expected).abs().max() / expected.abs().max()) < output
    for actual, exact in zip(grads, expected_grads, strict=True):
        assert float((actual - exact).abs().max() / exact.abs().max().clamp_min(1e-20)) < gradient


def _rows_of(tokens: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor, int]]:
    """Return each row with the position of its own part: (tokens of the row, positions in the packed row)."""
    parts = torch.split(torch.arange(sum(LENGTHS)), LENGTHS)
    rows = []
    for part, parent in zip(parts, PARENTS, strict=True):
        places = part if parent < 0 else torch.cat([parts[parent], part])
        rows.append((tokens[places], part, len(places) - len(part)))
    return rows
