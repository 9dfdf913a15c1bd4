"""Data-dependent initialization: A from the directions in which a layer's inputs vary most.

EVA (arXiv 2410.07170): the columns of A are the top right-singular vectors of the centered inputs that the layer
receives on the first batches, and B = 0. W and the model's outputs are unchanged, and the saved file is a plain
adapter.

The vectors are computed in one pass with bounded memory. For every layer's inputs, only the k = 2r + 8 strongest
directions (r is the largest rank) are stored, and each batch is merged into them (the sequential Karhunen-Loève
transform of Ross et al., IJCV 77, 2008, section 3). This costs 4·k·(in) bytes per distinct input, and about 14·n·(in)·k
operations for n tokens, in addition to the 2·n·(in)·(out) of the layer's forward. Layers with the same input (query,
key and value) share the work. The caller runs the model. Padding tokens count like other tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from deltaw.errors import UserError
from deltaw.kernels.torch_private import version_of
from deltaw.lora.attachment import adapted_layers, unwrap_model
from deltaw.lora.initialize import init_refusal
from deltaw.lora.layers import LoRALayer
from deltaw.lora.math_dora import without_autocast

CHUNK_ROWS = 8192
"""Number of tokens merged at a time."""

NUM_ITERATIONS = 2
"""Number of subspace iterations per merge."""


@dataclass(frozen=True)
class ActivationInit:
    """Result of :func:`initialize_from_activations`.

    Attributes:
        initialized: Number of layers with an initialized A.
        tokens: Minimum and maximum number of tokens that a layer received.
        explained: Mean share of the inputs' variance along the r directions of A.
        short: Layers with tokens (or inputs) that do not span r directions. Their remaining columns of A are random.
        unseen: Layers that were not run. Their A is unchanged.
    """

    initialized: int
    tokens: tuple[int, int]
    explained: float
    short: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()

    def __str__(self) -> str:
        min_tokens, max_tokens = self.tokens
        count = f"{max_tokens:,}" if min_tokens == max_tokens else f"{min_tokens:,} to {max_tokens:,}"
        text = f"A of {self.initialized} layers is initialized from {count} tokens of their inputs"
        lines = [f"{text}; its directions explain {self.explained:.0%} of the variance"]
        for names, problem in ((self.short, "received too few tokens for their rank"), (self.unseen, "were not run")):
            if names:
                lines.append(f"  {len(names)} layers {problem}, such as {names[0]}")
        return "\n".join(lines)


def initialize_from_activations(model: nn.Module, run_batches: Callable[[], None], *, seed: int = 0) -> ActivationInit:
    """Initialize A of every adapted layer from its inputs while ``run_batches`` runs.

    Args:
        model: Model with a new adapter on linear layers, attached with ``init: eva``.
        run_batches: Runs forward passes of ``model``, with some hundred tokens per unit of rank. Called once, without
            gradients.
        seed: Seed of the initial directions. It hardly affects the result.

    Raises:
        UserError: if a layer is an embedding or a convolution, or is trained already (B is not zero). Also if inputs of
            a layer are not finite, or no layer was run.
    """
    model = unwrap_model(model)
    layers = [(name, layer) for name, layer in adapted_layers(model) if isinstance(layer, LoRALayer)]
    for name, layer in layers:
        if reason := init_refusal(layer, "eva"):
            raise UserError(f"'{name}': {reason}", location="init", hint="exclude it with exclude_modules")
        if not bool((layer.lora_B == 0).all()):
            hint = "call initialize_from_activations right after attach"
            raise UserError(f"'{name}' is trained already", location="init", hint=hint)
    recorder = _ActivationRecorder(2 * max(layer.rank for _, layer in layers) + 8, torch.Generator().manual_seed(seed))
    hooks = [layer.register_forward_pre_hook(recorder.record, with_kwargs=True) for _, layer in layers]
    try:
        with torch.no_grad():
            run_batches()
    finally:
        for hook in hooks:
            hook.remove()
    return _fill_layers(layers, recorder)


@torch.no_grad()
def _fill_layers(layers: list[tuple[str, LoRALayer]], recorder: _ActivationRecorder) -> ActivationInit:
    """Copy the recorded directions into the layers."""
    recorded = [(name, layer, recorder.inputs[id(layer)]) for name, layer in layers if id(layer) in recorder.inputs]
    if not recorded:
        raise UserError("run_batches ran none of the adapted layers", hint="call the model passed to this function")
    for name, _, statistics in recorded:
        if not torch.isfinite(statistics.total):
            hint = "check the data for values that are not finite, or load the model in bf16 or fp32"
            raise UserError(f"the inputs of '{name}' are not finite", location="init", hint=hint)
    for _, layer, statistics in recorded:
        directions = statistics.directions[:, : layer.rank]
        layer.lora_A[:, : directions.shape[1]] = directions.to(layer.lora_A)
        layer.initialized()
    tokens = [statistics.tokens for _, _, statistics in recorded]
    return ActivationInit(
        initialized=len(recorded),
        tokens=(min(tokens), max(tokens)),
        explained=float(torch.stack([stats.explained(layer.rank).cpu() for _, layer, stats in recorded]).mean()),
        short=tuple(n for n, layer, stats in recorded if layer.rank > min(stats.tokens - 1, layer.lora_A.shape[0])),
        unseen=tuple(name for name, layer in layers if id(layer) not in recorder.inputs),
    )


@dataclass
class _ActivationStatistics:
    """Statistics of the inputs of one layer, or of several layers with the same inputs.

    Attributes:
        directions: (in, k) orthonormal vectors, strongest first.
        strengths: (k) singular values of the centered inputs.
        mean: (in) mean of the inputs.
        total: Sum of squares of the centered inputs.
        tokens: Number of tokens.
    """

    directions: Tensor
    strengths: Tensor
    mean: Tensor
    total: Tensor
    tokens: int = 0

    @classmethod
    def empty(cls, x: Tensor, width: int, generator: torch.Generator) -> _ActivationStatistics:
        """Return statistics without tokens for inputs like ``x``, with ``width`` random directions."""
        size = x.shape[-1]
        width = min(width, size)
        # Sampled on the CPU, so that a seed determines the same directions on any device.
        sample = torch.randn(size, width, generator=generator).to(x.device)
        zeros = torch.zeros(size, device=x.device)
        return cls(torch.linalg.qr(sample).Q, zeros[:width].clone(), zeros, zeros[0].clone())

    def merge(self, rows: Tensor) -> None:
        """Add ``rows`` (n, in) in fp32."""
        count = rows.shape[0]
        mean = rows.mean(0)
        old_count = self.tokens
        new_count = self.tokens + count
        rows = rows - mean
        shift = (self.mean - mean) * (old_count * count / new_count) ** 0.5
        stacked = torch.cat([self.strengths[:, None] * self.directions.t(), rows, shift[None]])
        self.total = self.total + rows.square().sum() + shift.square().sum()
        self.mean = self.mean + (mean - self.mean) * (count / new_count)
        self.tokens = new_count
        if not torch.isfinite(self.total):
            return
        basis = self.directions
        for _ in range(NUM_ITERATIONS + 1):
            # The merged rows may span fewer than k directions. A small share of the old basis keeps its rank at k.
            product = stacked.t() @ (stacked @ basis)
            basis = torch.linalg.qr(product + basis * (1e-7 * product.norm())).Q
        _, self.strengths, rotation = torch.linalg.svd(torch.linalg.qr(stacked @ basis, mode="r").R)
        self.directions = basis @ rotation.t()

    def explained(self, rank: int) -> Tensor:
        """Return the share of the variance along the first ``rank`` directions."""
        return self.strengths[:rank].square().sum() / self.total.clamp(min=1e-30)


@dataclass
class _ActivationRecorder:
    """Records the inputs of adapted layers in forward passes.

    Attributes:
        width: Number of directions per layer.
        generator: Generator of the initial directions.
        inputs: Statistics by id of the layer. Layers with the same input tensor share an entry.
        owner_ids: By id of the statistics, the id of the layer whose inputs are added to them.
    """

    width: int
    generator: torch.Generator
    inputs: dict[int, _ActivationStatistics] = field(default_factory=dict)
    owner_ids: dict[int, int] = field(default_factory=dict)
    _last_input: tuple[Tensor, int, _ActivationStatistics] | None = None

    def record(self, layer: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        """Record the input of a layer. Registered as a forward pre-hook."""
        x = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(x, Tensor) or not x.numel():
            return
        version = -1 if x.is_inference() else version_of(x)
        statistics = self.inputs.get(id(layer))
        if self._last_input is not None and self._last_input[0] is x and self._last_input[1] == version:
            statistics = self.inputs.setdefault(id(layer), self._last_input[2])
            if statistics is self._last_input[2]:
                return
        if statistics is None:
            statistics = _ActivationStatistics.empty(x, self.width, self.generator)
        elif self.owner_ids[id(statistics)] != id(layer):
            # The layer shared its inputs with another layer until now, so copy the statistics.
            statistics = replace(statistics)
        self.inputs[id(layer)] = statistics
        self.owner_ids[id(statistics)] = id(layer)
        with without_autocast(x.device.type):
            for rows in x.detach().reshape(-1, x.shape[-1]).split(CHUNK_ROWS):
                statistics.merge(rows.float())
        self._last_input = (x, version, statistics)
