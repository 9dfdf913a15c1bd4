"""Which blocks of a model can be fused, how that is verified, and putting them in place for a while.

A block's description is found and verified once for each kind of block, in fp32 on a small copy of the model
(``recognition``, ``small_copy``). The model itself runs a few tokens once, so that what each block's
attention is told (scaling, window, soft cap) is known. A model whose blocks cannot all be verified runs its
own code.

Knows transformers' models; not what a fused block computes (``fused_halves``), nor how layouts reach it: that
is said by a :class:`Mode`, one for packed rows (``packed``) and one for padded rows (``padded``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from deltaw.kernels.torch_private import own_modules
from deltaw.machine.choices import Choice
from deltaw.runtime.fused import FusedBlock, FusedNorm, Layouts
from deltaw.runtime.recognition import (
    BlockRoles,
    Call,
    Signature,
    Told,
    asked_once,
    blocks_of,
    norm_form,
    signature,
    verified,
)

# What was told to attention while it is noted: the module that called, and what it told.
_NOTED: list[list[tuple[nn.Module, Told]]] = []
# The norm behind the last block, by the names that transformers' models give it.
_LAST_NORMS = ("norm", "final_layer_norm", "final_layernorm", "ln_f", "layernorm")


def note(module: nn.Module, scaling: float, window: int | None, softcap: float | None) -> None:
    """Called by attention: note what ``module`` told it, where somebody listens."""
    for notes in _NOTED:
        notes.append((module, Told(scaling, window, softcap)))


@contextlib.contextmanager
def noting() -> Iterator[list[tuple[nn.Module, Told]]]:
    """While open, what attention is told is gathered in the list."""
    notes: list[tuple[nn.Module, Told]] = []
    _NOTED.append(notes)
    try:
        yield notes
    finally:
        _NOTED.remove(notes)


@dataclass(frozen=True)
class Mode:
    """A way in which rows go through a model.

    Args:
        name: of the mode.
        layouts: finds the layout of a block's call.
        attention: switches a model to this mode's attention while it is open.
        inputs: a few tokens or an image for a backbone, as keyword arguments.
    """

    name: str
    layouts: Layouts
    attention: Callable[[PreTrainedModel], AbstractContextManager[None]]
    inputs: Callable[[PreTrainedModel], dict[str, Any]]


@dataclass
class Recognized:
    """What the small copy of a model showed: descriptions by kind of block, and how well they fit."""

    kinds: dict[tuple[Signature, tuple[bool, bool]], BlockRoles] = field(default_factory=dict)
    why: str = ""


@dataclass
class FusedBlocks:
    """The fused blocks of a model, and what is known of them.

    Attributes:
        blocks: in the order of the model's own; empty where they were not recognized.
        choice: whether they are used, and why or why not.
        backbone, place: the model's part that holds them, and the path of their list within it.
        recognized, told: what descriptions there are, and what each block's attention is told, for blocks
            that are put in later.
        norm: the norm behind the last block, where it is one that is known.
    """

    blocks: list[FusedBlock]
    choice: Choice[bool]
    backbone: nn.Module | None = None
    place: str = ""
    recognized: Recognized = field(default_factory=Recognized)
    told: list[Told] = field(default_factory=list)
    layouts: Layouts | None = None
    norm: FusedNorm | None = None

    @property
    def last(self) -> FusedBlock | None:
        """The fused form of the model's last block."""
        if not self.choice.value or not self.blocks or self.backbone is None:
            return None
        blocks = list(self.backbone.get_submodule(self.place).children())
        return self.blocks[-1] if self.blocks[-1].block is blocks[-1] else None

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """While open, the blocks' forward is the fused one; afterwards it is what it was."""
        self._follow()
        parts: list[tuple[nn.Module, FusedBlock | FusedNorm]] = [(b.block, b) for b in self.blocks]
        if self.norm is not None:
            parts.append((self.norm.module, self.norm))
        used = [part for part in parts if self.choice.value and "forward" not in vars(part[0])]
        for module, fused in used:
            vars(module)["forward"] = fused
        try:
            yield
        finally:
            for module, fused in used:
                del vars(module)["forward"]
                if isinstance(fused, FusedBlock):
                    fused.forget()

    def _follow(self) -> None:
        """Take over blocks and the last norm that were replaced since: those of a known kind run fused."""
        if self.backbone is None or self.layouts is None or not self.choice.value:
            return
        current = list(self.backbone.get_submodule(self.place).children())
        if [fused.block for fused in self.blocks] != current:
            known = {id(fused.block): fused for fused in self.blocks}
            if len(current) == len(self.told):
                made = [known.get(id(b)) or self._fused(b, n) for n, b in enumerate(current)]
                self.blocks = [fused for fused in made if fused is not None]
            else:  # blocks were taken out or added: what each one's attention is told is not known any more
                self.blocks = []
        norm = last_norm(self.backbone)
        if norm is None or self.norm is None or self.norm.module is not norm:
            self.norm = None if norm is None else FusedNorm(norm)

    def _fused(self, block: nn.Module, number: int) -> FusedBlock | None:
        """The fused form of a block that was put in place ``number``, where its kind was verified."""
        roles = self.recognized.kinds.get((signature(block), self.told[number].kind))
        if roles is None or self.layouts is None:
            return None
        return FusedBlock(block, roles, self.told[number], self.layouts)


def last_norm(backbone: nn.Module) -> nn.Module | None:
    """The norm behind a backbone's blocks, where it is one that is known."""
    there = own_modules(backbone)
    module = next((there[name] for name in _LAST_NORMS if there.get(name) is not None), None)
    return module if module is not None and norm_form(module) is not None else None


def recognize(model: PreTrainedModel, mode: Mode) -> FusedBlocks:
    """The fused blocks of a model for rows that go through it in this mode, verified."""
    if model.device.type != "cpu":
        return FusedBlocks([], Choice(False, "on this device the model's own code runs"))
    backbone: PreTrainedModel = model.base_model  # type: ignore[assignment]
    found = blocks_of(backbone)
    if found is None:
        return FusedBlocks([], Choice(False, "the model has no list of blocks"))
    place, listed = found
    try:
        recognized = asked_once(_RECOGNIZED, backbone, lambda small: _verified_kinds(small, mode), mode.name)
        if not recognized.kinds:
            return FusedBlocks([], Choice(False, recognized.why))
        with mode.attention(model), torch.no_grad(), noting() as notes:
            backbone(**mode.inputs(backbone))
    except Exception as error:  # whatever foreign code raises here, it runs itself
        return FusedBlocks([], Choice(False, f"{type(error).__name__}: {str(error)[:100]}"))
    told = _told_by_block(list(listed), notes)
    blocks: list[FusedBlock] = []
    for number, block in enumerate(listed):
        given = told.get(number)
        roles = recognized.kinds.get((signature(block), (given or Told(1.0)).kind))
        if roles is None or (notes and given is None):
            why = f"block {number} ({type(block).__name__}) is of no kind that was verified"
            return FusedBlocks([], Choice(False, why))
        given = given or Told(roles.attention.head_size**-0.5)
        blocks.append(FusedBlock(block, roles, given, mode.layouts))
    norm = last_norm(backbone)
    told_blocks, last = [fused.told for fused in blocks], None if norm is None else FusedNorm(norm)
    choice = Choice(True, recognized.why)
    return FusedBlocks(blocks, choice, backbone, place, recognized, told_blocks, mode.layouts, last)


_RECOGNIZED: dict[tuple[Any, ...], Recognized] = {}


def _verified_kinds(small: PreTrainedModel, mode: Mode) -> Recognized:
    """Run a small model in this mode, and find for each of its blocks the description that fits it."""
    found = blocks_of(small)
    if found is None:
        return Recognized(why="the model has no list of blocks")
    blocks = list(found[1])
    calls: list[Call] = []

    def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        named = dict(kwargs)
        hidden = args[0] if args else named.pop("hidden_states")
        calls.append(Call(module, hidden, args[1:], named, output))

    hooks = [block.register_forward_hook(watch, with_kwargs=True) for block in blocks]
    recognized = Recognized()
    with mode.attention(small):
        try:
            with torch.no_grad(), noting() as notes:
                inputs = mode.inputs(small)
                small(**inputs)
        finally:
            for hook in hooks:
                hook.remove()
        told = _told_by_block(blocks, notes)
        if [call.block for call in calls] != blocks or (notes and len(told) != len(blocks)):
            return Recognized(why="attention is not called once in each block")

        def run(block: nn.Module, roles: BlockRoles, given: Told) -> FusedBlock:
            fused = FusedBlock(block, roles, given, mode.layouts)
            fused.own = _own_code_instead
            return fused

        for number, call in enumerate(calls):
            given = told.get(number)
            kind = (signature(call.block), (given or Told(1.0)).kind)
            if kind in recognized.kinds:
                continue
            roles, why = verified(dataclasses.replace(call, told=given, real=inputs.get("attention_mask")), run)
            if roles is None:
                return Recognized(why=f"{type(call.block).__name__} is not known here: {why}")
            recognized.kinds[kind] = roles
            recognized.why = why
    return recognized


def _own_code_instead(*args: Any, **kwargs: Any) -> Any:
    """Stands for a block's own code while a description is verified: equal to itself it would say nothing."""
    raise RuntimeError("this call cannot run fused")


def _told_by_block(blocks: list[nn.Module], notes: list[tuple[nn.Module, Told]]) -> dict[int, Told]:
    """What each block's attention was told, by the block's number; without those that were called twice."""
    owner = {id(module): number for number, block in enumerate(blocks) for module in block.modules()}
    told = [(owner[id(module)], given) for module, given in notes if id(module) in owner]
    times = Counter(number for number, _ in told)
    return {number: given for number, given in told if times[number] == 1}


_FUSED: weakref.WeakKeyDictionary[PreTrainedModel, dict[str, FusedBlocks]] = weakref.WeakKeyDictionary()


def fused_in_mode(model: PreTrainedModel, mode: Mode) -> FusedBlocks:
    """The model's fused blocks for this mode, recognized once."""
    known = _FUSED.setdefault(model, {})
    if mode.name not in known:
        known[mode.name] = recognize(model, mode)
    return known[mode.name]


def known_in_mode(model: PreTrainedModel, name: str) -> FusedBlocks | None:
    """The model's fused blocks for the mode of this name, if they were recognized before."""
    return _FUSED.get(model, {}).get(name)
