"""Run a model in fp32, independent of the storage type of its weights, one block at a time.

This is the reference for the rounding errors of bf16 training and of approximations. A block's fp32 weights exist only
while the block runs. Its forward saves only its input, and its backward recomputes it, so the additional memory is that
of one block. Quantized weights are not changed, only the computations around them use fp32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deltaw.kernels.torch_modules import direct_parameters
from deltaw.lora.stored import tensor_quantization_library
from deltaw.runtime.block_roles import forward_replaced
from deltaw.runtime.fused import FusedBlock
from deltaw.runtime.recognition import blocks_of

HALF_TYPES = (torch.bfloat16, torch.float16)
# Name of a block's first argument in transformers.
_NAMES = ("hidden_states",)


@contextlib.contextmanager
def widened(model: nn.Module, *, excluded: Iterable[nn.Module] = ()) -> Iterator[None]:
    """Context in which the model computes in fp32, including the gradients of its trainable parameters.

    Args:
        excluded: Modules that are not converted, such as a large output head that the caller multiplies itself.
    """
    block_list = blocks_of(model)
    blocks = [] if block_list is None else list(block_list[1])
    inside = {id(module) for block in blocks for module in block.modules()} | {id(m) for m in excluded}
    outside = [module for module in model.modules() if id(module) not in inside]
    with contextlib.ExitStack() as stack:
        for module in outside:
            if isinstance(module, nn.Embedding):  # lookup is exact in 16 bits
                stack.enter_context(forward_replaced(module, _with_wide_output(module.forward)))
        stack.enter_context(_wide_parameters([m for m in outside if not isinstance(m, nn.Embedding)]))
        for block in blocks:
            stack.enter_context(forward_replaced(block, _wide_block(block)))
        yield


def _wide_block(block: nn.Module) -> Callable[..., Any]:
    original_forward = block.forward
    modules = list(block.modules())
    fused = original_forward if isinstance(original_forward, FusedBlock) else None

    def forward(*args: Any, **kwargs: Any) -> Any:
        arguments = dict(zip(_NAMES, args[:1], strict=False)) | kwargs
        hidden = _wide(arguments.pop(_NAMES[0]))
        output_indices = None if fused is None else fused.output_indices

        def run(hidden: Tensor) -> Any:
            fixed = _fixed_output_indices(fused, output_indices)
            with _wide_parameters(modules), _without_checkpointing(block), fixed:
                return original_forward(hidden, *_wide(args[1:]), **_wide(arguments))

        if not hidden.requires_grad and not any(p.requires_grad for p in block.parameters()):
            return run(hidden)
        # Reentrant checkpointing saves no tensors of the forward, but needs an input that requires a gradient.
        hidden = hidden if hidden.requires_grad else hidden.detach().requires_grad_()
        return checkpoint(run, hidden, use_reentrant=True, preserve_rng_state=False)

    return forward


@contextlib.contextmanager
def _without_checkpointing(block: nn.Module) -> Iterator[None]:
    """Context without activation checkpointing inside a block, which would recompute it after its fp32 weights end."""
    if not getattr(block, "gradient_checkpointing", False):
        yield
        return
    block.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        block.gradient_checkpointing = True  # type: ignore[assignment]


@contextlib.contextmanager
def _fixed_output_indices(fused: FusedBlock | None, output_indices: Tensor | None) -> Iterator[None]:
    """Context that sets the needed outputs of a fused block, also for recomputation, and releases its fp32 weights on
    exit.
    """
    if fused is None:
        yield
        return
    previous = fused.output_indices
    fused.output_indices = output_indices
    try:
        yield
    finally:
        fused.output_indices = previous
        fused.reset()


@contextlib.contextmanager
def _wide_parameters(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Context in which 16-bit parameters are fp32. Gradients flow to the original parameters."""
    changed: list[tuple[dict[str, Any], str, Tensor]] = []
    wide_by_id: dict[int, Tensor] = {}
    try:
        for module in modules:
            table: dict[str, Any] = direct_parameters(module)
            for name, parameter in table.items():
                if parameter is None or parameter.dtype not in HALF_TYPES or tensor_quantization_library(parameter):
                    continue
                changed.append((table, name, parameter))
                if id(parameter) not in wide_by_id:
                    wide = parameter.float()
                    wide_by_id[id(parameter)] = wide if parameter.requires_grad else nn.Parameter(wide, False)
                table[name] = wide_by_id[id(parameter)]
        yield
    finally:
        for changed_table, name, parameter in changed:
            changed_table[name] = parameter


def _with_wide_output(forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: _wide(forward(*args, **kwargs))


def _wide(value: Any) -> Any:
    """Convert 16-bit tensors to fp32, also in tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        return value.float() if value.dtype in HALF_TYPES else value
    if type(value) in (tuple, list):
        return type(value)(map(_wide, value))
    return {key: _wide(inner) for key, inner in value.items()} if type(value) is dict else value
