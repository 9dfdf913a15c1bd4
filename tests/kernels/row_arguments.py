"""Arguments of the compiled row functions, of the kinds that models use."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from deltaw.kernels import rows
from deltaw.kernels.compiled import CompiledFunction


def arguments(
    dtype: torch.dtype, device: str = "cpu", count: int = 5, width: int = 24
) -> Iterator[tuple[str, CompiledFunction, dict[str, Any]]]:
    """Yield a name, the function and its arguments for ``count`` rows."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    x = random(count, width)
    weight = random(width)
    bias = random(width)
    stats = random(count, 2, dtype=torch.float32)
    for name, centered, offset in (("rms norm", False, 0.0), ("gemma norm", False, 1.0), ("layer norm", True, 0.0)):
        shared = {"weight": weight, "offset": offset, "centered": centered}
        yield name, rows._compiled_norm, {"x": x, "bias": bias if centered else None, "eps": 1e-5, **shared}
        backward = {"grad": random(count, width), "x": x, "stats": stats, "addend": random(count, width), **shared}
        yield f"{name}, backward", rows._compiled_norm_backward, backward
    for kind in rows.ACTIVATIONS:
        for up in (random(count, width), None):
            forward = {"gate": x, "up": up, "kind": kind}
            yield f"{kind}, {up is None}", rows._compiled_activation, forward
            backward = {"grad": random(count, width), **forward}
            yield f"{kind}, {up is None}, backward", rows._compiled_activation_backward, backward
    tables = {name: random(count, 8, dtype=torch.float32) for name in ("cosine", "sine")}
    for backward in (False, True):
        yield f"rotate {backward}", rows._compiled_rotate, {"x": random(count, 2, 12), **tables, "backward": backward}
    targets = torch.randint(0, width, (count,), generator=generator).to(device)
    for softcap, grad in ((0.0, True), (5.0, True), (0.0, False)):
        given = {"targets": targets, "weights": random(count, dtype=torch.float32), "scale": 1.0, "softcap": softcap}
        name = f"cross-entropy {softcap} {grad}"
        yield name, rows._compiled_cross_entropy, {"logits": random(count, width), **given, "grad": grad}
