"""ΔW of a parameter that a module's own code uses: fused experts, the projections of nn.MultiheadAttention.

There is no layer whose forward could be replaced. So while the module runs, its attribute is W + ΔW in place
of W:

    weight (out, in):                  W + scaling · (A·B)ᵀ          A (in, r), B (r, out)
    weight (experts, out, in):         for each expert alike         A (experts, in, r), B (experts, r, out)
    weight (experts, in, out):         W + scaling · A·B for each expert

W + ΔW is one product added to W (``addmm``), so that ΔW alone is never kept; it stays until the backward if
the module's own code keeps its weight for that. Its gradient is what the module's code gives for a trained
weight, and A and B take theirs from it. There is no adapter dropout: an input of the update is not known
here.

It knows one parameter and the module that runs; nothing of names, files or selection.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deltaw.kernels.torch_private import own_parameters, remove_forward_hooks
from deltaw.lora.layers import LoRALayer
from deltaw.lora.math_dora import without_autocast

ATTENTION_KEYS = ("lora_in_proj_weight", "lora_out_proj_weight")
"""What the updates of an ``nn.MultiheadAttention`` are called as its children."""


class LoRAParameter(LoRALayer):
    """The update of one parameter, with its factors.

    It is no layer in the forward: :meth:`watch` has a module compute with W + ΔW, :meth:`unwatch` ends that.

    Args:
        holder: the module that has the parameter.
        attribute: the parameter's name there; it has two dimensions, or three with the experts first.
        rank, alpha, rslora, init, generator: as for :class:`~deltaw.lora.layers.LoRALinear`.
        is_in_out: whether a parameter of three dimensions is (experts, in, out) and not (experts, out, in).

    Raises:
        UserError: rank or init cannot be used.
    """

    is_layer = False

    attribute: str
    is_in_out: bool
    _holder: nn.Module
    _runner: nn.Module | None
    _hooks: tuple[int, ...]

    def __init__(
        self,
        holder: nn.Module,
        attribute: str,
        rank: int,
        alpha: float = 1.0,
        *,
        rslora: bool = False,
        init: str | None = "uniform",
        generator: torch.Generator | None = None,
        is_in_out: bool = False,
    ) -> None:
        super().__init__()
        # Not as a child: the parameter stays where it is.
        vars(self).update(_holder=holder, attribute=attribute, _runner=None, _hooks=())
        shape = self.weight.shape
        experts = shape[0] if len(shape) == 3 else None
        vars(self).update(experts=experts, is_in_out=is_in_out and experts is not None)
        n_in, n_out = (shape[-2], shape[-1]) if self.is_in_out else (shape[-1], shape[-2])
        stack = tuple(shape[:-2])
        self._begin(((*stack, n_in, rank), (*stack, rank, n_out)), rank, alpha, 0.0, rslora, init, generator)

    @property
    def holder(self) -> nn.Module:
        """The module that ``weight`` is a parameter of."""
        return self._holder

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """W: the frozen parameter itself."""
        parameter = own_parameters(self._holder)[self.attribute]
        assert parameter is not None
        return parameter

    def effective_weight(self) -> Tensor:
        """W + ΔW in the type of W, with a graph to A and B."""
        weight = self.weight
        dtype = weight.dtype
        # Autocast would round W and the product apart, and the module's own product casts the sum anyway.
        with without_autocast(weight.device.type):
            factor_A, factor_B = self.lora_A.to(dtype), self.lora_B.to(dtype)
            if self.is_in_out:
                left, right = factor_A, factor_B
            else:
                left, right = factor_B.transpose(-1, -2), factor_A.transpose(-1, -2)
            add = torch.baddbmm if weight.dim() == 3 else torch.addmm
            return add(weight, left, right, alpha=self.scaling)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """ΔW in the layout of the parameter, in fp32 (fp64 for an fp64 parameter)."""
        if self.is_in_out:
            return (self.lora_A @ self.lora_B).mul_(self.scaling)
        return (self.lora_B.transpose(-1, -2) @ self.lora_A.transpose(-1, -2)).mul_(self.scaling)

    def watch(self, runner: nn.Module) -> None:
        """From now on ``runner``, whose forward reads the parameter, computes with W + ΔW."""
        before = runner.register_forward_pre_hook(self._before)
        after = runner.register_forward_hook(self._after, always_call=True)
        vars(self).update(_runner=runner, _hooks=(before.id, after.id))

    def unwatch(self) -> None:
        """Leave the module as it was."""
        if self._runner is not None:
            # By number, since the handles of a copied model would still point to the first one's hooks.
            remove_forward_hooks(self._runner, self._hooks)
        vars(self._holder).pop(self.attribute, None)
        vars(self).update(_runner=None, _hooks=())

    def _before(self, module: nn.Module, inputs: Any) -> None:
        # An instance's own attribute is found before a parameter of that name, which stays registered.
        if self.adapting:
            vars(self._holder)[self.attribute] = self.effective_weight()
        else:
            vars(self._holder).pop(self.attribute, None)

    def _after(self, module: nn.Module, inputs: Any, output: Any) -> None:
        vars(self._holder).pop(self.attribute, None)

    def extra_repr(self) -> str:
        """The parameter's name and shape, rank and alpha."""
        shape = tuple(self.weight.shape)
        return f"{self.attribute}: {shape}, rank={self.rank}, alpha={self.alpha:g}"


def parameter_refusal(holder: nn.Module, attribute: str) -> str | None:
    """Why a parameter cannot be adapted, or None where it can be."""
    parameter = own_parameters(holder).get(attribute)
    if parameter is None:
        return "it is not there"
    if parameter.dim() not in (2, 3):
        return f"it has {parameter.dim()} dimensions, not two or three"
    if not parameter.is_floating_point():
        return f"it is {str(parameter.dtype).removeprefix('torch.')}, not floating-point"
    if isinstance(holder, nn.Embedding) and holder.max_norm is not None:
        return "an embedding with max_norm rewrites its weight while it is read"
    if type(holder).forward is nn.Module.forward:
        return f"a {type(holder).__name__} has no forward of its own that would compute with it"
    return None


def attention_refusal(attention: nn.MultiheadAttention) -> str | None:
    """Why an attention module cannot be adapted, or None where it can be."""
    if type(attention).forward is not nn.MultiheadAttention.forward:
        return f"{type(attention).__name__} has a forward of its own"
    if attention.in_proj_weight is None:
        return "its query, key and value have different sizes, so that it has no in_proj_weight"
    return None


def adapt_attention(
    attention: nn.MultiheadAttention,
    rank: int,
    alpha: float,
    *,
    rslora: bool,
    init: str | None,
    generator: torch.Generator | None,
) -> tuple[LoRAParameter, LoRAParameter]:
    """The updates of ``in_proj_weight`` (3·dim, dim), and of ``out_proj``'s weight (dim, dim)."""
    out = LoRAParameter(attention.out_proj, "weight", rank, alpha, rslora=rslora, init=init, generator=generator)
    into = LoRAParameter(attention, "in_proj_weight", rank, alpha, rslora=rslora, init=init, generator=generator)
    if init is not None:
        # PEFT draws the output projection's factors a second time; so one seed gives the same ones.
        out = LoRAParameter(attention.out_proj, "weight", rank, alpha, rslora=rslora, init=init, generator=generator)
    return into, out
