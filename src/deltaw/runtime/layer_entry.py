"""Entry points into a model above its frozen layers, to skip them with stored outputs.

A forward pass can stop at an entry point, which computes only the frozen part and returns its output. It can also start
at this point, which skips the frozen part and uses stored values. The form of a block's output is observed while the
model runs, so callers must compare results with and without an entry point before relying on it.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, NoReturn, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.generic import ModelOutput

from deltaw.runtime.block_roles import forward_replaced
from deltaw.runtime.recognition import blocks_of

# Bytes of a weight that are hashed at a time.
HASH_CHUNK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Level:
    """Level up to which a model is frozen.

    Args:
        kind: ``block``: the blocks below ``index`` of ``count``, and everything before them. ``head``: the entire
            backbone.
    """

    kind: Literal["block", "head"]
    index: int = 0
    count: int = 0

    def __str__(self) -> str:
        return "all but the output head" if self.kind == "head" else f"the lower {self.index} of {self.count} blocks"


class LayerEntry(Protocol):
    """A position in a model at which a forward pass can stop and start."""

    def outputs(self, run: Callable[[], object]) -> Tensor:
        """Return the output of the frozen part in ``run``, which runs the model and is stopped here.

        Raises:
            RuntimeError: if the model does not reach this position, or the output depends on trainable parameters.
        """

    def enter(self, hidden: Tensor) -> AbstractContextManager[None]:
        """Context in which the model's forward pass starts here with ``hidden``. :meth:`outputs` must have run before.

        The backward pass may run after the context is closed, with or without activation checkpointing.
        """


def frozen_level(model: PreTrainedModel, trained: Iterable[nn.Parameter]) -> Level | None:
    """Return the level up to which ``model`` is frozen if ``trained`` are trainable.

    A parameter with several positions counts at its lowest one.

    Returns:
        None if no block is frozen, or the model has no list of blocks.
    """
    ids = {id(p) for p in trained}
    backbone = model.base_model
    block_list = blocks_of(backbone)
    name, count = (block_list[0], len(block_list[1])) if block_list is not None else ("", 0)
    levels: dict[int, int] = {}
    is_past_blocks = False
    for full, parameter in backbone.named_parameters(remove_duplicate=False):
        if block_list is not None and full.startswith(f"{name}."):
            is_past_blocks = True
            level = int(full[len(name) + 1 :].partition(".")[0])
        else:
            # Modules are usually defined in the order of their use. A layer entry point raises if not.
            level = count if is_past_blocks else -1
        levels[id(parameter)] = min(level, levels.get(id(parameter), level))
    above = count + 1
    heights = {levels.get(id(p), above) for _, p in model.named_parameters(remove_duplicate=False) if id(p) in ids}
    if not heights or len(ids - {id(p) for p in model.parameters()}):
        return None
    lowest = min(heights)
    if lowest == above:
        return Level("head")
    return Level("block", lowest, count) if lowest > 0 else None


class BlockEntry:
    """Position between block ``index - 1`` and the next block or final layers.

    Values have the form of block outputs: (rows, tokens, d), with one row if rows are packed.
    """

    def __init__(self, model: PreTrainedModel, index: int) -> None:
        block_list = blocks_of(model.base_model)
        if block_list is None or not 0 < index <= len(block_list[1]):
            raise RuntimeError("the model has no such block")
        self._skipped = list(block_list[1])[:index]
        self._form: int | None = None  # length of the tuple that a block returns, if not a tensor

    def outputs(self, run: Callable[[], object]) -> Tensor:
        output = _run_until(self._skipped[-1], run)
        self._form = len(output) if isinstance(output, tuple) else None
        return _check_frozen(output[0] if isinstance(output, tuple) else output)

    @contextlib.contextmanager
    def enter(self, hidden: Tensor) -> Iterator[None]:
        # Replace the output of the last skipped block, not the input of the next one by a hook: a checkpointed block is
        # recomputed with its original arguments and without hooks.
        form = self._form
        output = hidden if form is None else (hidden, *[None] * (form - 1))

        def skip(*args: object, **kwargs: object) -> object:
            return output

        with contextlib.ExitStack() as stack:
            for block in self._skipped:
                stack.enter_context(forward_replaced(block, skip))
            yield


class BackboneEntry:
    """Position after a causal model's backbone. Values are (1, any number of outputs, d)."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._backbone = model.base_model

    def outputs(self, run: Callable[[], object]) -> Tensor:
        return _check_frozen(getattr(_run_until(self._backbone, run), "last_hidden_state", None))

    @contextlib.contextmanager
    def enter(self, hidden: Tensor) -> Iterator[None]:
        output = BaseModelOutput(last_hidden_state=hidden)
        with forward_replaced(self._backbone, lambda *args, **kwargs: output):
            yield


class HeadEntry:
    """Position before the first trainable module above the backbone.

    Values are the input of this module, (rows, d). On entry, the backbone returns unused zeros of one token per row, so
    the batch needs only one token per row.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        inside = {id(m) for m in model.base_model.modules()}
        self._backbone = model.base_model
        above = [module for module in model.modules() if id(module) not in inside]
        self._candidates = [m for m in above if any(p.requires_grad for p in m.parameters(recurse=False))]
        self._module: nn.Module | None = None
        self._answer: object = None  # backbone output for a row of zeros

    def outputs(self, run: Callable[[], object]) -> Tensor:
        def record_answer(module: nn.Module, args: object, output: object) -> None:
            self._answer = _zero_output(output, 1)

        def stop(module: nn.Module, args: tuple[object, ...]) -> NoReturn:
            self._module = module
            raise _StopForward(args[0])

        hooks = [self._backbone.register_forward_hook(record_answer)]
        hooks += [module.register_forward_pre_hook(stop) for module in self._candidates]
        return _check_frozen(_run_until_hook(run, hooks))

    @contextlib.contextmanager
    def enter(self, hidden: Tensor) -> Iterator[None]:
        if self._module is None:
            raise RuntimeError("outputs() must run before enter()")
        output = _zero_output(self._answer, hidden.shape[0])
        hook = self._module.register_forward_pre_hook(lambda module, args: (hidden, *args[1:]))
        try:
            with forward_replaced(self._backbone, lambda *args, **kwargs: output):
                yield
        finally:
            hook.remove()


def frozen_digest(model: PreTrainedModel, level: Level) -> str:
    """Return a hash of all frozen values below ``level``, at about 1.7 GB per second on one thread."""
    above: set[int] = set()
    block_list = blocks_of(model.base_model)
    if level.kind == "block" and block_list is not None:
        above = {id(t) for block in list(block_list[1])[level.index :] for t in (*block.parameters(), *block.buffers())}
    tensors = [*model.named_parameters(), *model.named_buffers()]
    below = [(name, t) for name, t in tensors if not t.requires_grad and id(t) not in above]
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
        digests = pool.map(lambda pair: _digest(pair[1]), below)
        total = hashlib.sha256()
        for (name, _), digest in zip(below, digests, strict=True):
            total.update(name.encode() + digest)
    return total.hexdigest()


class _StopForward(Exception):
    """Stops a forward pass and carries a value."""

    def __init__(self, value: object) -> None:
        super().__init__("stopped on purpose")
        self.value = value


def _run_until(module: nn.Module, run: Callable[[], object]) -> object:
    def stop(module: nn.Module, args: object, output: object) -> NoReturn:
        raise _StopForward(output)

    return _run_until_hook(run, [module.register_forward_hook(stop)])


def _run_until_hook(run: Callable[[], object], hooks: list[torch.utils.hooks.RemovableHandle]) -> object:
    """Return the value with which a hook stopped ``run``. Removes the hooks."""
    try:
        # Enable gradients, which detects trainable parameters and is free in the frozen part.
        with torch.enable_grad():
            run()
    except _StopForward as stop:
        return stop.value
    finally:
        for hook in hooks:
            hook.remove()
    raise RuntimeError("the forward pass does not reach the layer entry point")


def _check_frozen(value: object) -> Tensor:
    """Return ``value`` after checking that it does not depend on trainable parameters."""
    if not isinstance(value, Tensor) or value.dim() < 2:
        raise RuntimeError("the value at the layer entry point is not a tensor of rows")
    if value.requires_grad:
        raise RuntimeError("the value at the layer entry point depends on trainable parameters")
    return value.detach()


def _zero_output(output: object, rows: int) -> object:
    """Return zeros in the form of a backbone's output, with one token per row. They take no memory."""
    if isinstance(output, ModelOutput):
        fields = {key: _zero_output(value, rows) for key, value in output.items() if isinstance(value, Tensor)}
        return type(output)(**fields)
    if isinstance(output, tuple):
        return tuple(_zero_output(value, rows) if isinstance(value, Tensor) else None for value in output)
    if not isinstance(output, Tensor):
        raise RuntimeError(f"the backbone returns a {type(output).__name__}")
    shape = (1, output.shape[2]) if output.dim() == 3 else output.shape[1:]
    return torch.zeros((), dtype=output.dtype, device=output.device).expand(rows, *shape)


def _digest(tensor: Tensor) -> bytes:
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    flat = tensor.detach().reshape(-1)
    if flat.numel():
        flat = flat.view(torch.uint8)
        for start in range(0, flat.numel(), HASH_CHUNK_BYTES):
            digest.update(flat[start : start + HASH_CHUNK_BYTES].cpu().numpy().data)
    return digest.digest()
