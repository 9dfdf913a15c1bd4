"""Comparison of accelerated calls with the model's original code, on rows of the script's first batch."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Rows of a batch are compared up to this number of tokens, at least one row.
MAX_TOKENS = 512
MAX_ROWS = 4
# Maximum relative differences of outputs, of all gradients and of the gradient of one parameter that are attributed to
# rounding, by type.
TOLERANCES = {
    torch.float64: (1e-9, 1e-8, 1e-8),
    torch.float32: (1e-4, 1e-3, 1e-3),
    torch.bfloat16: (4e-2, 2.5e-1, 7.5e-1),
}
# Differences up to this multiple of those of other rounding are attributed to rounding.
ROUNDING_MARGIN = 2.0
# A gradient smaller than this share of all gradients is not compared separately.
SMALL_SHARE = 1e-2


class AccelerationWarning(UserWarning):
    """A part is not accelerated, because its result differs from that of the original code."""


@dataclass(frozen=True)
class Differences:
    """Relative differences of outputs, and of gradients if the call has any.

    Attributes:
        outputs: Difference of the outputs.
        gradients: Difference of all gradients together.
        parameter: Largest difference of the gradient of one parameter.
    """

    outputs: float
    gradients: float = 0.0
    parameter: float = 0.0

    def exceed(self, dtype: torch.dtype, rounding: Differences | None = None) -> bool:
        """True if rounding in this type does not explain them.

        Args:
            dtype: Type of the products.
            rounding: Differences from :func:`rounding_differences`, which replace the usual limits if they are larger.
        """
        limits: Sequence[float] = TOLERANCES.get(dtype, TOLERANCES[torch.bfloat16])
        if rounding is not None:
            measured = rounding.outputs, rounding.gradients, rounding.parameter
            limits = [max(limit, ROUNDING_MARGIN * m) for limit, m in zip(limits, measured, strict=True)]
        values = self.outputs, self.gradients, self.parameter
        return not all(value <= limit for value, limit in zip(values, limits, strict=True))

    def __str__(self) -> str:
        text = f"outputs differ by {self.outputs:.1e}"
        if self.parameter:
            text += f", gradients by {self.gradients:.1e}, those of one parameter by up to {self.parameter:.1e}"
        return text


def sample_of(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return a few short rows of a call's arguments: the tensors with the shape of ``input_ids``, cut by rows."""
    tokens: Tensor = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    lengths = torch.full((len(tokens),), tokens.shape[1]) if mask is None else mask.sum(-1)
    order = lengths.argsort(stable=True).tolist()
    chosen = [order[0]]
    total = int(lengths[order[0]])
    for row in order[1:MAX_ROWS]:
        total += int(lengths[row])
        if total > MAX_TOKENS:
            break
        chosen.append(row)
    rows = torch.tensor(sorted(chosen))

    def select(value: Any) -> Any:
        is_row_tensor = isinstance(value, Tensor) and value.shape[:1] == tokens.shape[:1] and value.dim() == 2
        return value.index_select(0, rows) if is_row_tensor else value

    return {name: select(value) for name, value in inputs.items()}


def measure(
    original: Callable[[], Tensor], accelerated: Callable[[], Tensor], parameters: Sequence[nn.Parameter]
) -> Differences:
    """Compare two computations of the same outputs.

    Args:
        original: Runs the model's original code. Values that the caller does not use are zero.
        accelerated: Computes the same.
        parameters: Trained parameters. Empty to compare only outputs.
    """
    expected, expected_gradients = _with_gradients(original, parameters)
    computed, gradients = _with_gradients(accelerated, parameters)
    sizes = [float(g.float().norm()) for g in expected_gradients]
    total_size = max(math.hypot(*sizes), 1e-30)
    differences = [float((a.float() - b.float()).norm()) for a, b in zip(gradients, expected_gradients, strict=True)]
    total = math.hypot(*differences) / total_size
    shares = [d / max(size, SMALL_SHARE * total_size) for d, size in zip(differences, sizes, strict=True)]
    worst = float(torch.tensor([0.0, *shares]).max())  # NaN if one is NaN
    difference = float((computed.float() - expected.float()).norm()) / max(float(expected.float().norm()), 1e-30)
    return Differences(difference, total, worst)


def rounding_differences(
    model: nn.Module, run: Callable[[], Tensor], parameters: Sequence[nn.Parameter]
) -> Differences:
    """Return how much a computation in bfloat16 changes if the output of each module is rounded randomly.

    Args:
        model: Model that ``run`` calls.
        run: Runs the model's original code.
        parameters: Trained parameters. Empty to compare only outputs.
    """
    generator = torch.Generator().manual_seed(0)

    def perturb(module: nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or output.dtype != torch.bfloat16:
            return output
        noise = torch.rand(output.shape, generator=generator).sub_(0.5).mul_(torch.finfo(output.dtype).eps)
        return (output.float() * (1.0 + noise)).to(output.dtype)

    def run_perturbed() -> Tensor:
        hooks = [module.register_forward_hook(perturb) for module in model.modules()]
        try:
            return run()
        finally:
            for hook in hooks:
                hook.remove()

    return measure(run, run_perturbed, parameters)


def _with_gradients(run: Callable[[], Tensor], parameters: Sequence[nn.Parameter]) -> tuple[Tensor, list[Tensor]]:
    with torch.set_grad_enabled(bool(parameters)):
        output = run()
    if not parameters or not output.requires_grad:
        return output.detach(), [torch.zeros_like(p) for p in parameters]
    slopes = torch.linspace(0.5, 1.5, output.numel(), dtype=torch.float32).view(output.shape).to(output.dtype)
    found = torch.autograd.grad(output, parameters, slopes, allow_unused=True)
    zeros = (torch.zeros_like(p) for p in parameters)
    return output.detach(), [z if g is None else g for g, z in zip(found, zeros, strict=True)]


@contextlib.contextmanager
def without_randomness(model: nn.Module) -> Iterator[None]:
    """Context in which a model is in evaluation mode, and after which random numbers continue as before."""
    training = [module for module in model.modules() if module.training]
    with torch.random.fork_rng(devices=[]):
        model.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True


def warn_different(part: str, differences: Differences) -> None:
    """Warn that a part is not accelerated."""
    message = f"deltaw.accelerate: {part} is not used, because {differences} from the model's original code"
    warnings.warn(message, AccelerationWarning, stacklevel=4)


@contextlib.contextmanager
def nonzero_factors(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Context in which trained factors that are zero have random values, so that the other factor has a gradient.

    Changes of ``data`` are not seen by graphs that the script has created before.
    """
    zeros = [p for p in parameters if p.dim() > 1 and not bool(p.detach().any())]
    generator = torch.Generator().manual_seed(0)
    for parameter in zeros:
        parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    try:
        yield
    finally:
        for parameter in zeros:
            parameter.data.zero_()
