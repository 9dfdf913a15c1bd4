"""A model computed in fp32 whatever type its weights are stored in, a block at a time.

What a training in bf16 rounds, and what it approximates, is measured against this. A block's weights are
there in fp32 while the block runs: its forward keeps its input alone, and its backward runs it again. So this
takes the memory of one block, and not that of a model in fp32.

Weights that are quantized stay what they are; only numbers around them are wider. Knows models and their
blocks; not rows, losses or what is compared.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deltaw.kernels.torch_private import own_parameters
from deltaw.lora.stored import library_of_tensor
from deltaw.runtime.fused import FusedBlock
from deltaw.runtime.recognition import blocks_of, forward_replaced

HALF = (torch.bfloat16, torch.float16)
# How transformers calls what a block is given first.
_NAMES = ("hidden_states",)


@contextlib.contextmanager
def widened(model: nn.Module, *, apart: Iterable[nn.Module] = ()) -> Iterator[None]:
    """While open, the model computes in fp32, and gradients of its trained parameters come from that.

    Args:
        apart: modules that the caller multiplies with itself, such as a large output head; they stay as they
            are.
    """
    found = blocks_of(model)
    blocks = [] if found is None else list(found[1])
    inside = {id(module) for block in blocks for module in block.modules()} | {id(m) for m in apart}
    outside = [module for module in model.modules() if id(module) not in inside]
    with contextlib.ExitStack() as stack:
        for module in outside:
            if isinstance(module, nn.Embedding):  # its rows are the same numbers in fp32
                stack.enter_context(forward_replaced(module, _then_wide(module.forward)))
        stack.enter_context(_wide_parameters([m for m in outside if not isinstance(m, nn.Embedding)]))
        for block in blocks:
            stack.enter_context(forward_replaced(block, _wide_block(block)))
        yield


def _wide_block(block: nn.Module) -> Callable[..., Any]:
    own, modules = block.forward, list(block.modules())
    fused = own if isinstance(own, FusedBlock) else None

    def forward(*args: Any, **kwargs: Any) -> Any:
        named = dict(zip(_NAMES, args[:1], strict=False)) | kwargs
        hidden = _wide(named.pop(_NAMES[0]))
        picked = None if fused is None else fused.picked

        def run(hidden: Tensor) -> Any:
            with _wide_parameters(modules), _picking(fused, picked):
                return own(hidden, *_wide(args[1:]), **_wide(named))

        if not hidden.requires_grad and not any(p.requires_grad for p in block.parameters()):
            return run(hidden)
        # The kind of checkpointing that keeps nothing of a forward, with an input that a backward asks for.
        hidden = hidden if hidden.requires_grad else hidden.detach().requires_grad_()
        return checkpoint(run, hidden, use_reentrant=True, preserve_rng_state=False)

    return forward


@contextlib.contextmanager
def _picking(fused: FusedBlock | None, picked: Tensor | None) -> Iterator[None]:
    """While open, a fused block computes those of its outputs that it was told to, also when it runs again;
    afterwards it has let go of the weights in fp32."""
    if fused is None:
        yield
        return
    before, fused.picked = fused.picked, picked
    try:
        yield
    finally:
        fused.picked = before
        fused.forget()


@contextlib.contextmanager
def _wide_parameters(modules: Iterable[nn.Module]) -> Iterator[None]:
    """While open, parameters of 16 bits are fp32; the gradient of a trained one arrives at the original."""
    changed: list[tuple[dict[str, Any], str, Tensor]] = []
    made: dict[int, Tensor] = {}
    try:
        for module in modules:
            table: dict[str, Any] = own_parameters(module)
            for name, parameter in table.items():
                if parameter is None or parameter.dtype not in HALF or library_of_tensor(parameter):
                    continue
                changed.append((table, name, parameter))
                if id(parameter) not in made:
                    wide = parameter.float()
                    made[id(parameter)] = wide if parameter.requires_grad else nn.Parameter(wide, False)
                table[name] = made[id(parameter)]
        yield
    finally:
        for changed_table, name, parameter in changed:
            changed_table[name] = parameter


def _then_wide(own: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: _wide(own(*args, **kwargs))


def _wide(value: Any) -> Any:
    """Tensors of 16 bits in fp32, in tuples and dictionaries too."""
    if isinstance(value, Tensor):
        return value.float() if value.dtype in HALF else value
    if type(value) in (tuple, list):
        return type(value)(map(_wide, value))
    if type(value) is dict:
        return {key: _wide(inner) for key, inner in value.items()}
    return value
