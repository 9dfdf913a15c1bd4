"""The frozen prefix of a model: what lies below the lowest module that is trained, and how to pass it over.

A layer entry point has two sides. Stopping there, a forward computes the frozen part alone and hands out what
comes out of it. Entering there, the model's own forward runs with the frozen part skipped and stored values
in its place. Nothing is listed by architecture: forms are seen while the model runs, and whoever uses a layer
entry point compares results with and without it before relying on it.

Knows transformers' models; not data files, losses or where the values are kept.
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

from deltaw.runtime.recognition import blocks_of, forward_replaced

# Bytes of a weight that are hashed, and copied from a device, at a time.
HASHED_AT_ONCE = 64 * 2**20


@dataclass(frozen=True)
class Level:
    """How far up a model is frozen.

    Args:
        kind: ``block``: the blocks below ``index``, of ``count``, and all that stands before them; ``head``:
            the whole backbone.
    """

    kind: Literal["block", "head"]
    index: int = 0
    count: int = 0

    def __str__(self) -> str:
        return "all but the output head" if self.kind == "head" else f"the lower {self.index} of {self.count} blocks"


class LayerEntry(Protocol):
    """A place in a model at which a forward pass can stop, and start."""

    def outputs(self, run: Callable[[], object]) -> Tensor:
        """What comes out of the frozen part in ``run``, which runs the model and is stopped here.

        Raises:
            RuntimeError: the model does not come by here, or what comes by depends on what is trained.
        """

    def entering(self, hidden: Tensor) -> AbstractContextManager[None]:
        """While open, the model's forward starts here with ``hidden``; :meth:`outputs` must have run once.

        The backward may come after it is closed, with activation checkpointing or without.
        """


def lowest_trained(model: PreTrainedModel, trained: Iterable[nn.Parameter]) -> Level | None:
    """The level up to which ``model`` is frozen while ``trained`` are trained.

    A parameter that stands in several places counts where it stands lowest.

    Returns:
        None where nothing is frozen but perhaps the embeddings, or where the model has no list of blocks.
    """
    wanted = {id(p) for p in trained}
    backbone = model.base_model
    found = blocks_of(backbone)
    name, count = (found[0], len(found[1])) if found is not None else ("", 0)
    places: dict[int, int] = {}
    passed = False
    for full, parameter in backbone.named_parameters(remove_duplicate=False):
        if found is not None and full.startswith(f"{name}."):
            passed = True
            place = int(full[len(name) + 1 :].partition(".")[0])
        else:
            # Parts are made in the order that they are used in; a layer entry point notices if not.
            place = count if passed else -1
        places[id(parameter)] = min(place, places.get(id(parameter), place))
    above = count + 1
    heights = {places.get(id(p), above) for _, p in model.named_parameters(remove_duplicate=False) if id(p) in wanted}
    if not heights or len(wanted - {id(p) for p in model.parameters()}):
        return None
    lowest = min(heights)
    if lowest == above:
        return Level("head")
    return Level("block", lowest, count) if lowest > 0 else None


class BlockEntry:
    """The way out of block ``index - 1``, which is the way into block ``index`` or to what follows the last.

    Values have the form that blocks hand on: (rows, tokens, d), one row where rows are packed.
    """

    def __init__(self, model: PreTrainedModel, index: int) -> None:
        found = blocks_of(model.base_model)
        if found is None or not 0 < index <= len(found[1]):
            raise RuntimeError("the model has no such block")
        self._passed = list(found[1])[:index]
        self._form: int | None = None  # entries of the tuple that a block returns; None for a bare tensor

    def outputs(self, run: Callable[[], object]) -> Tensor:
        output = _stopped_after(self._passed[-1], run)
        self._form = len(output) if isinstance(output, tuple) else None
        return _frozen(output[0] if isinstance(output, tuple) else output)

    @contextlib.contextmanager
    def entering(self, hidden: Tensor) -> Iterator[None]:
        # Values come out of the last block that is skipped, and do not go into the next by a hook: a
        # checkpointed block gets the arguments that it had, but no hook by then.
        form = self._form
        output = hidden if form is None else (hidden, *[None] * (form - 1))

        def passed_over(*args: object, **kwargs: object) -> object:
            return output

        with contextlib.ExitStack() as stack:
            for block in self._passed:
                stack.enter_context(forward_replaced(block, passed_over))
            yield


class BackboneEntry:
    """The way out of a causal model's backbone; values are (1, any number of outputs, d)."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._backbone = model.base_model

    def outputs(self, run: Callable[[], object]) -> Tensor:
        return _frozen(getattr(_stopped_after(self._backbone, run), "last_hidden_state", None))

    @contextlib.contextmanager
    def entering(self, hidden: Tensor) -> Iterator[None]:
        output = BaseModelOutput(last_hidden_state=hidden)
        with forward_replaced(self._backbone, lambda *args, **kwargs: output):
            yield


class HeadEntry:
    """The way into the first trained module beyond the backbone.

    Values are what that module is given, (rows, d). Entering, the backbone answers with zeros of one token a
    row, which nobody sees; so the batch that the model is run with needs no more than one token a row either.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        inside = {id(m) for m in model.base_model.modules()}
        self._backbone = model.base_model
        beyond = [module for module in model.modules() if id(module) not in inside]
        self._candidates = [m for m in beyond if any(p.requires_grad for p in m.parameters(recurse=False))]
        self._module: nn.Module | None = None
        self._answer: object = None  # the backbone's, of one row of zeros

    def outputs(self, run: Callable[[], object]) -> Tensor:
        def answered(module: nn.Module, args: object, output: object) -> None:
            self._answer = _answer_like(output, 1)

        def arrived(module: nn.Module, args: tuple[object, ...]) -> NoReturn:
            self._module = module
            raise _Stop(args[0])

        hooks = [self._backbone.register_forward_hook(answered)]
        hooks += [module.register_forward_pre_hook(arrived) for module in self._candidates]
        return _frozen(_stopped(run, hooks))

    @contextlib.contextmanager
    def entering(self, hidden: Tensor) -> Iterator[None]:
        if self._module is None:
            raise RuntimeError("the layer entry point has not been found yet")
        output = _answer_like(self._answer, hidden.shape[0])
        hook = self._module.register_forward_pre_hook(lambda module, args: (hidden, *args[1:]))
        try:
            with forward_replaced(self._backbone, lambda *args, **kwargs: output):
                yield
        finally:
            hook.remove()


def frozen_digest(model: PreTrainedModel, level: Level) -> str:
    """A hash of every frozen value below ``level``, to the last bit: about 1.7 GB a second on one thread."""
    above: set[int] = set()
    found = blocks_of(model.base_model)
    if level.kind == "block" and found is not None:
        above = {id(t) for block in list(found[1])[level.index :] for t in (*block.parameters(), *block.buffers())}
    named = [*model.named_parameters(), *model.named_buffers()]
    below = [(name, t) for name, t in named if not t.requires_grad and id(t) not in above]
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
        digests = pool.map(lambda pair: _digest(pair[1]), below)
        whole = hashlib.sha256()
        for (name, _), digest in zip(below, digests, strict=True):
            whole.update(name.encode() + digest)
    return whole.hexdigest()


class _Stop(Exception):
    """Carries a value out of a forward pass that goes no further."""

    def __init__(self, value: object) -> None:
        super().__init__("stopped on purpose")
        self.value = value


def _stopped_after(module: nn.Module, run: Callable[[], object]) -> object:
    def arrived(module: nn.Module, args: object, output: object) -> NoReturn:
        raise _Stop(output)

    return _stopped(run, [module.register_forward_hook(arrived)])


def _stopped(run: Callable[[], object], hooks: list[torch.utils.hooks.RemovableHandle]) -> object:
    """The value with which ``run`` was stopped by one of ``hooks``, which are removed."""
    try:
        # With gradients on, which costs nothing below what is trained, and shows if it is not.
        with torch.enable_grad():
            run()
    except _Stop as stop:
        return stop.value
    finally:
        for hook in hooks:
            hook.remove()
    raise RuntimeError("the forward does not come by the layer entry point")


def _frozen(value: object) -> Tensor:
    """``value`` as it is, where nothing that is trained has a part in it."""
    if not isinstance(value, Tensor) or value.dim() < 2:
        raise RuntimeError("what comes by the layer entry point is no tensor of rows")
    if value.requires_grad:
        raise RuntimeError("what comes by the layer entry point depends on what is trained")
    return value.detach()


def _answer_like(output: object, rows: int) -> object:
    """A backbone's output for so many rows: zeros in the form of ``output``, one token a row, which take no memory."""
    if isinstance(output, ModelOutput):
        fields = {key: _answer_like(value, rows) for key, value in output.items() if isinstance(value, Tensor)}
        return type(output)(**fields)
    if isinstance(output, tuple):
        return tuple(_answer_like(value, rows) if isinstance(value, Tensor) else None for value in output)
    if not isinstance(output, Tensor):
        raise RuntimeError(f"the backbone answers with a {type(output).__name__}")
    shape = (1, output.shape[2]) if output.dim() == 3 else output.shape[1:]
    return torch.zeros((), dtype=output.dtype, device=output.device).expand(rows, *shape)


def _digest(tensor: Tensor) -> bytes:
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    flat = tensor.detach().reshape(-1)
    if flat.numel():
        flat = flat.view(torch.uint8)
        for start in range(0, flat.numel(), HASHED_AT_ONCE):
            digest.update(flat[start : start + HASHED_AT_ONCE].cpu().numpy().data)
    return digest.digest()
