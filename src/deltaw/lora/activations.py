"""Initialization from data: A from the directions in which a layer's own inputs vary most.

EVA (arXiv 2410.07170): the columns of A are the top right-singular vectors of the inputs that the layer sees
on the user's first batches, about their mean, and B = 0. So W stays as it is, the model's outputs too, and
the saved file is a plain adapter's.

The vectors are found in one pass over the batches and in bounded memory: of every layer's inputs only the k =
2r + 8 strongest directions (r the largest rank) are kept, and each batch is merged into them (the sequential
Karhunen-Loève transform of Ross et al., IJCV 77, 2008, section 3). It costs 4·k·(in) bytes for each distinct
input, and for n tokens about 14·n·(in)·k operations, in addition to the 2·n·(in)·(out) of the layer's own
forward; layers with the same input (query, key and value) share the work.

It knows no data: whoever calls it runs the model. Padded tokens that go through the model count as any.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from deltaw.errors import UserError
from deltaw.kernels.torch_private import version_of
from deltaw.lora.attachment import adapted_layers, unwrapped
from deltaw.lora.initialize import init_refusal
from deltaw.lora.layers import LoRALayer
from deltaw.lora.math_dora import without_autocast

ROWS = 8192
"""Tokens that are merged at a time."""

POWERS = 2
"""Rounds of subspace iteration for each merge."""


@dataclass(frozen=True)
class ActivationInit:
    """What :func:`initialize_from_activations` did.

    Attributes:
        initialized: number of layers whose A was filled.
        tokens: the fewest and the most tokens that one of them saw.
        explained: mean share of the inputs' variance along the r directions of A.
        short: layers whose tokens (or inputs) do not span r directions; the other columns of A are of chance.
        unseen: layers that the batches never reached; they keep their uniform A.
    """

    initialized: int
    tokens: tuple[int, int]
    explained: float
    short: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()

    def __str__(self) -> str:
        fewest, most = self.tokens
        seen = f"{most:,}" if fewest == most else f"{fewest:,} to {most:,}"
        what = f"A of {self.initialized} layers is initialized from {seen} tokens of their inputs"
        lines = [f"{what}; its directions hold {self.explained:.0%} of the variance"]
        for names, said in ((self.short, "saw too few tokens for their rank"), (self.unseen, "were not run")):
            if names:
                lines.append(f"  {len(names)} layers {said}, such as {names[0]}")
        return "\n".join(lines)


def initialize_from_activations(model: nn.Module, run_batches: Callable[[], None], *, seed: int = 0) -> ActivationInit:
    """Fill A of every adapted layer from the inputs that it sees while ``run_batches`` runs.

    Args:
        model: has a fresh adapter on linear layers, as ``attach`` with ``init: eva`` leaves it.
        run_batches: runs forward passes of ``model``, a few hundred tokens for each unit of rank; it is
            called once, without gradients.
        seed: of the directions that the search begins with; the result hardly depends on it.

    Raises:
        UserError: a layer is an embedding or a convolution, or is trained already (B is not zero); its inputs
            are not finite; or no layer was run.
    """
    model = unwrapped(model)
    layers = [(name, layer) for name, layer in adapted_layers(model) if isinstance(layer, LoRALayer)]
    for name, layer in layers:
        if reason := init_refusal(layer, "eva"):
            raise UserError(f"'{name}': {reason}", where="init", hint="leave it out with exclude_modules")
        if not bool((layer.lora_B == 0).all()):
            hint = "call initialize_from_activations right after attach"
            raise UserError(f"'{name}' is trained already", where="init", hint=hint)
    width = 2 * max(layer.rank for _, layer in layers) + 8
    watch = _Watch(width, torch.Generator().manual_seed(seed))
    hooks = [layer.register_forward_pre_hook(watch.seen, with_kwargs=True) for _, layer in layers]
    try:
        with torch.no_grad():
            run_batches()
    finally:
        for hook in hooks:
            hook.remove()
    return _filled(layers, watch)


@torch.no_grad()
def _filled(layers: list[tuple[str, LoRALayer]], watch: _Watch) -> ActivationInit:
    """Copy what ``watch`` found into the layers."""
    seen = [(name, layer, watch.inputs[id(layer)]) for name, layer in layers if id(layer) in watch.inputs]
    if not seen:
        raise UserError("run_batches ran none of the adapted layers", hint="let it call the model that was given")
    explained: list[Tensor] = []
    for name, _, found in seen:
        if not torch.isfinite(found.total):
            hint = "check the data for values that are not finite, or load the model in bf16 or fp32"
            raise UserError(f"the inputs of '{name}' are not finite", where="init", hint=hint)
    for _, layer, found in seen:
        directions = found.directions[:, : layer.rank]
        layer.lora_A[:, : directions.shape[1]] = directions.to(layer.lora_A)
        explained.append(found.explained(layer.rank))
        layer.initialized()
    tokens = [found.tokens for _, _, found in seen]
    return ActivationInit(
        initialized=len(seen),
        tokens=(min(tokens), max(tokens)),
        explained=float(torch.stack([share.cpu() for share in explained]).mean()),
        short=tuple(n for n, layer, found in seen if layer.rank > min(found.tokens - 1, layer.lora_A.shape[0])),
        unseen=tuple(name for name, layer in layers if id(layer) not in watch.inputs),
    )


@dataclass
class _Inputs:
    """What is kept of the inputs of one layer, or of several that see the same.

    Attributes:
        directions: (in, k), orthonormal, the strongest first.
        strengths: (k), the singular values of the inputs about their mean.
        mean: (in).
        total: sum of squares of the inputs about their mean.
        tokens: how many there were.
    """

    directions: Tensor
    strengths: Tensor
    mean: Tensor
    total: Tensor
    tokens: int = 0

    @classmethod
    def nothing(cls, x: Tensor, width: int, generator: torch.Generator) -> _Inputs:
        """``width`` directions of chance for rows like ``x``, as none has been seen yet."""
        size = x.shape[-1]
        width = min(width, size)
        # Drawn on the CPU, so that one seed begins alike on any device.
        drawn = torch.randn(size, width, generator=generator).to(x.device)
        zeros = torch.zeros(size, device=x.device)
        return cls(torch.linalg.qr(drawn).Q, zeros[:width].clone(), zeros, zeros[0].clone())

    def merge(self, rows: Tensor) -> None:
        """Take ``rows`` (n, in), fp32, into account."""
        count = rows.shape[0]
        mean = rows.mean(0)
        before, now = self.tokens, self.tokens + count
        rows = rows - mean
        shift = (self.mean - mean) * (before * count / now) ** 0.5
        stacked = torch.cat([self.strengths[:, None] * self.directions.t(), rows, shift[None]])
        self.total = self.total + rows.square().sum() + shift.square().sum()
        self.mean = self.mean + (mean - self.mean) * (count / now)
        self.tokens = now
        if not torch.isfinite(self.total):
            return
        basis = self.directions
        for _ in range(POWERS + 1):
            # What is merged may span less than k directions: the old ones, faintly, keep the basis whole.
            drawn = stacked.t() @ (stacked @ basis)
            basis = torch.linalg.qr(drawn + basis * (1e-7 * drawn.norm())).Q
        _, self.strengths, turned = torch.linalg.svd(torch.linalg.qr(stacked @ basis, mode="r").R)
        self.directions = basis @ turned.t()

    def explained(self, rank: int) -> Tensor:
        """The share of the variance along the first ``rank`` directions."""
        return self.strengths[:rank].square().sum() / self.total.clamp(min=1e-30)


@dataclass
class _Watch:
    """Follows the inputs of adapted layers through forward passes.

    Attributes:
        width: how many directions are kept of each.
        inputs: by the layer's id; layers that see the same tensor share one.
        leads: the id of the layer whose inputs an ``_Inputs`` takes, by its own id.
    """

    width: int
    generator: torch.Generator
    inputs: dict[int, _Inputs] = field(default_factory=dict)
    leads: dict[int, int] = field(default_factory=dict)
    _last: tuple[Tensor, int, _Inputs] | None = None

    def seen(self, layer: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        """A forward pre-hook."""
        x = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(x, Tensor) or not x.numel():
            return
        version = -1 if x.is_inference() else version_of(x)
        found = self.inputs.get(id(layer))
        if self._last is not None and self._last[0] is x and self._last[1] == version:
            found = self.inputs.setdefault(id(layer), self._last[2])
            if found is self._last[2]:
                return
        if found is None:
            found = _Inputs.nothing(x, self.width, self.generator)
        elif self.leads[id(found)] != id(layer):
            # It saw what another layer sees, so far: from here on it goes its own way.
            found = replace(found)
        self.inputs[id(layer)] = found
        self.leads[id(found)] = id(layer)
        with without_autocast(x.device.type):
            for rows in x.detach().reshape(-1, x.shape[-1]).split(ROWS):
                found.merge(rows.float())
        self._last = (x, version, found)
