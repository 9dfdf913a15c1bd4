"""Recognition, verification and installation of fused blocks.

The description of each kind of block is found and verified once, in fp32 on a small copy of the model
(``recognition``). The model also runs a sample, to record the attention parameters of each block (scaling, window,
soft cap). If any block cannot be verified, the model runs unfused.

A :class:`Mode` defines the route of layouts to the blocks: packed rows (``packed``) or padded rows (``padded``).
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

from deltaw.hub.skeletons import has_values
from deltaw.kernels import compiled
from deltaw.kernels.operators import simulated_device
from deltaw.kernels.torch_modules import direct_modules
from deltaw.machine.choices import Choice
from deltaw.runtime.block_roles import BlockRoles, norm_form
from deltaw.runtime.fused import FusedBlock, FusedNorm, Layouts
from deltaw.runtime.fused_parts import FusedMLP, fused_parts
from deltaw.runtime.recognition import (
    AttentionConfig,
    BlockCall,
    Signature,
    blocks_of,
    find_roles,
    relative_difference,
    signature,
)
from deltaw.runtime.small_copy import measure_once

# Device types of fused blocks, and the maximum relative difference from the model's code in 16-bit types.
DEVICES = ("cpu", "cuda")
DEVICE_TOLERANCE = 5e-2
# Active recordings of attention calls: the calling module and its parameters.
_RECORDERS: list[list[tuple[nn.Module, AttentionConfig]]] = []
# Names of the norm after the last block in models of transformers.
_FINAL_NORMS = ("norm", "final_layer_norm", "final_layernorm", "ln_f", "layernorm")


def record_config(module: nn.Module, scaling: float, window: int | None, softcap: float | None) -> None:
    """Record the attention parameters of ``module``, if a recording is active. Called by attention functions."""
    for notes in _RECORDERS:
        notes.append((module, AttentionConfig(scaling, window, softcap)))


@contextlib.contextmanager
def recording_configs() -> Iterator[list[tuple[nn.Module, AttentionConfig]]]:
    """Context that records the parameters of all attention calls in a list."""
    notes: list[tuple[nn.Module, AttentionConfig]] = []
    _RECORDERS.append(notes)
    try:
        yield notes
    finally:
        _RECORDERS.remove(notes)


@dataclass(frozen=True)
class Mode:
    """A form of input rows.

    Args:
        name: Name of the mode.
        layouts: Returns the layout of a block's call.
        attention: Context that switches a model to this mode's attention.
        inputs: Returns sample inputs of a backbone, as keyword arguments.
    """

    name: str
    layouts: Layouts
    attention: Callable[[PreTrainedModel], AbstractContextManager[None]]
    inputs: Callable[[PreTrainedModel], dict[str, Any]]


@dataclass
class RecognizedBlocks:
    """Descriptions by kind of block, and the reason for their acceptance or rejection."""

    kinds: dict[tuple[Signature, tuple[bool, bool]], BlockRoles] = field(default_factory=dict)
    why: str = ""


@dataclass
class FusedBlocks:
    """Fused blocks of a model.

    Attributes:
        blocks: Blocks in the order of the model. Empty if they were not recognized.
        choice: True if they are used, with the reason.
        backbone: Module that contains the blocks.
        path: Path of the list of blocks within the backbone.
        recognized: Descriptions, for blocks that are replaced later.
        configs: Attention parameters of each block, for blocks that are replaced later.
        norm: Norm after the last block, if supported.
        separate_parts: True if norms and MLPs inside the blocks run fused because the blocks are not.
    """

    blocks: list[FusedBlock]
    choice: Choice[bool]
    backbone: nn.Module | None = None
    path: str = ""
    recognized: RecognizedBlocks = field(default_factory=RecognizedBlocks)
    config: list[AttentionConfig] = field(default_factory=list)
    layouts: Layouts | None = None
    norm: FusedNorm | None = None
    separate_parts: bool = False

    @property
    def last(self) -> FusedBlock | None:
        """The fused form of the model's last block, if available."""
        if not self.choice.value or not self.blocks or self.backbone is None:
            return None
        blocks = list(self.backbone.get_submodule(self.path).children())
        return self.blocks[-1] if self.blocks[-1].block is blocks[-1] else None

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Context in which the blocks use their fused forward."""
        self._update_blocks()
        used = [part for part in self._parts() if "forward" not in vars(part[0])]
        for module, fused in used:
            vars(module)["forward"] = fused
        try:
            yield
        finally:
            for module, fused in used:
                del vars(module)["forward"]
                if isinstance(fused, FusedBlock):
                    fused.reset()

    def _parts(self) -> list[tuple[nn.Module, FusedBlock | FusedNorm | FusedMLP]]:
        """Return modules with their fused forward functions."""
        if self.separate_parts and self.backbone is not None:
            blocks = blocks_of(self.backbone)
            norm = final_norm(self.backbone)
            last = [] if norm is None else [FusedNorm(norm)]
            inside = [] if blocks is None else fused_parts(blocks[1])
            return [(part.module, part) for part in (*inside, *last)]
        if not self.choice.value:
            return []
        parts: list[tuple[nn.Module, FusedBlock | FusedNorm | FusedMLP]] = [(b.block, b) for b in self.blocks]
        if self.norm is not None:
            parts.append((self.norm.module, self.norm))
        return parts

    def _update_blocks(self) -> None:
        """Update the blocks and the final norm for modules that were replaced.

        Modules of a recognized kind run fused.
        """
        if self.backbone is None or self.layouts is None or not self.choice.value:
            return
        current = list(self.backbone.get_submodule(self.path).children())
        if [fused.block for fused in self.blocks] != current:
            fused_by_id = {id(fused.block): fused for fused in self.blocks}
            if len(current) == len(self.config):
                updated = [fused_by_id.get(id(b)) or self._fuse(b, n) for n, b in enumerate(current)]
                self.blocks = [fused for fused in updated if fused is not None]
            else:  # blocks were added or removed, so the recorded attention parameters do not apply
                self.blocks = []
        norm = final_norm(self.backbone)
        if norm is None or self.norm is None or self.norm.module is not norm:
            self.norm = None if norm is None else FusedNorm(norm)

    def _fuse(self, block: nn.Module, index: int) -> FusedBlock | None:
        """Return the fused form of a block at an index, if its kind was verified."""
        roles = self.recognized.kinds.get((signature(block), self.config[index].kind))
        if roles is None or self.layouts is None:
            return None
        return FusedBlock(block, roles, self.config[index], self.layouts)


def final_norm(backbone: nn.Module) -> nn.Module | None:
    """Return the norm after a backbone's blocks, if supported."""
    children = direct_modules(backbone)
    module = next((children[name] for name in _FINAL_NORMS if children.get(name) is not None), None)
    return module if module is not None and norm_form(module) is not None else None


def recognize(model: PreTrainedModel, mode: Mode) -> FusedBlocks:
    """Recognize and verify the blocks of a model for a mode."""
    if model.device.type not in DEVICES:
        return FusedBlocks([], Choice(False, f"fused blocks require a CPU or CUDA, not {model.device.type}"))
    if simulated_device.compiles is False and model.device.type in compiled.DEVICES:
        return FusedBlocks([], Choice(False, "torch does not compile kernels for this device"))
    backbone: PreTrainedModel = model.base_model  # type: ignore[assignment]
    block_list = blocks_of(backbone)
    if block_list is None:
        return FusedBlocks([], Choice(False, "the model has no list of blocks"))
    path, block_modules = block_list
    try:
        recognized = measure_once(_RECOGNIZED, backbone, lambda small: _recognize_kinds(small, mode), mode.name)
        if not recognized.kinds:
            return _separate_parts(backbone, recognized.why)
        recorded = recording_configs(), _recorded_calls(list(block_modules))
        with mode.attention(model), torch.no_grad(), recorded[0] as notes, recorded[1] as calls:
            backbone(**mode.inputs(backbone))
    except Exception as error:  # any error of third-party code means that its blocks run unfused
        return _separate_parts(backbone, f"{type(error).__name__}: {str(error)[:100]}")
    configs = _configs(list(block_modules), notes)
    blocks: list[FusedBlock] = []
    for index, block in enumerate(block_modules):
        config = configs.get(index)
        roles = recognized.kinds.get((signature(block), (config or AttentionConfig(1.0)).kind))
        if roles is None or (notes and config is None):
            return _separate_parts(backbone, f"block {index} ({type(block).__name__}) has an unverified kind")
        config = config or AttentionConfig(roles.attention.head_size**-0.5)
        blocks.append(FusedBlock(block, roles, config, mode.layouts))
    if model.device.type != "cpu" and has_values(model) and (why := _mismatch(calls, blocks, mode, model)):
        return FusedBlocks([], Choice(False, why))
    norm = final_norm(backbone)
    block_configs = [fused.config for fused in blocks]
    fused_norm = None if norm is None else FusedNorm(norm)
    choice = Choice(True, recognized.why)
    return FusedBlocks(blocks, choice, backbone, path, recognized, block_configs, mode.layouts, fused_norm)


def _separate_parts(backbone: PreTrainedModel, why: str) -> FusedBlocks:
    """Return fused norms and MLPs of blocks that are not recognized for the given reason."""
    return FusedBlocks([], Choice(False, why), backbone, separate_parts=True)


_RECOGNIZED: dict[tuple[Any, ...], RecognizedBlocks] = {}


def _recognize_kinds(small: PreTrainedModel, mode: Mode) -> RecognizedBlocks:
    """Run a small model in this mode, and find a matching description for each kind of block."""
    block_list = blocks_of(small)
    if block_list is None:
        return RecognizedBlocks(why="the model has no list of blocks")
    blocks = list(block_list[1])
    recognized = RecognizedBlocks()
    with mode.attention(small):
        with torch.no_grad(), recording_configs() as notes, _recorded_calls(blocks) as calls:
            inputs = mode.inputs(small)
            small(**inputs)
        configs = _configs(blocks, notes)
        if [call.block for call in calls] != blocks or (notes and len(configs) != len(blocks)):
            return RecognizedBlocks(why="attention is not called exactly once per block")

        def run(block: nn.Module, roles: BlockRoles, config: AttentionConfig) -> FusedBlock:
            fused = FusedBlock(block, roles, config, mode.layouts)
            fused.original_forward = _reject_call
            return fused

        for index, call in enumerate(calls):
            config = configs.get(index)
            kind = (signature(call.block), (config or AttentionConfig(1.0)).kind)
            if kind in recognized.kinds:
                continue
            call = dataclasses.replace(call, config=config, token_mask=inputs.get("attention_mask"))
            roles, why = find_roles(call, run)
            if roles is None:
                return RecognizedBlocks(why=f"{type(call.block).__name__} is not supported: {why}")
            recognized.kinds[kind] = roles
            recognized.why = why
    return recognized


@contextlib.contextmanager
def _recorded_calls(blocks: list[nn.Module]) -> Iterator[list[BlockCall]]:
    """Context that records the calls of blocks in a list."""
    calls: list[BlockCall] = []

    def record_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        kwargs_copy = dict(kwargs)
        hidden = args[0] if args else kwargs_copy.pop("hidden_states")
        calls.append(BlockCall(module, hidden, args[1:], kwargs_copy, output))

    hooks = [block.register_forward_hook(record_call, with_kwargs=True) for block in blocks]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _mismatch(calls: list[BlockCall], blocks: list[FusedBlock], mode: Mode, model: PreTrainedModel) -> str | None:
    """Return why fused blocks cannot be used on the model's device, or None.

    The descriptions were verified on a CPU. This compares one block of each kind with the model's code on the device,
    in the precision of the weights.
    """
    kinds = {(fused.roles, fused.config.kind): (call, fused) for call, fused in zip(calls, blocks, strict=True)}
    for call, fused in kinds.values():
        original_forward = fused.original_forward
        fused.original_forward = _reject_call
        try:
            with mode.attention(model):
                difference = relative_difference(call, fused)
        except Exception as error:  # kernels of a device raise many types
            return f"{type(call.block).__name__} on {model.device.type}: {type(error).__name__}: {str(error)[:100]}"
        finally:
            fused.original_forward = original_forward
        if not difference < DEVICE_TOLERANCE:
            return (
                f"{type(call.block).__name__} on {model.device.type} differs from the model's code by {difference:.1e}"
            )
    return next(iter(compiled.notes()), None)  # torch's operators would need more memory than the model's code


def _reject_call(*args: Any, **kwargs: Any) -> Any:
    """Replace the model's code during verification, so that it is not compared with itself."""
    raise RuntimeError("this call cannot run fused")


def _configs(blocks: list[nn.Module], notes: list[tuple[nn.Module, AttentionConfig]]) -> dict[int, AttentionConfig]:
    """Return the attention parameters by block index, without blocks that called attention several times."""
    block_indices = {id(module): index for index, block in enumerate(blocks) for module in block.modules()}
    calls = [(block_indices[id(module)], config) for module, config in notes if id(module) in block_indices]
    call_counts = Counter(index for index, _ in calls)
    return {index: config for index, config in calls if call_counts[index] == 1}


_FUSED: weakref.WeakKeyDictionary[PreTrainedModel, dict[str, FusedBlocks]] = weakref.WeakKeyDictionary()


def fused_in_mode(model: PreTrainedModel, mode: Mode) -> FusedBlocks:
    """Return the model's fused blocks for this mode. Recognition runs once."""
    blocks_by_mode = _FUSED.setdefault(model, {})
    if mode.name not in blocks_by_mode:
        blocks_by_mode[mode.name] = recognize(model, mode)
    return blocks_by_mode[mode.name]


def cached_in_mode(model: PreTrainedModel, name: str) -> FusedBlocks | None:
    """Return the model's fused blocks for the named mode, if they were recognized before."""
    return _FUSED.get(model, {}).get(name)
