"""Recognition, verification and installation of fused blocks.

The description of each kind of block is found and verified once, in fp32 on a small copy of the model
(``recognition``), and that of its attention module before it. The model also runs a sample, to record the attention
parameters of each block (scaling, window, soft cap). A block that cannot be verified runs the model's code, with fused
attention if its attention module was verified, and with fused norms and MLPs.

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
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltaw.hub.skeletons import has_values
from deltaw.kernels import compiled
from deltaw.kernels.operators import simulated_device
from deltaw.kernels.torch_modules import direct_modules
from deltaw.machine.choices import Choice
from deltaw.runtime.block_roles import AttentionRoles, BlockRoles, norm_form
from deltaw.runtime.dropout_sites import with_dropout_sites
from deltaw.runtime.fused import FusedBlock, FusedNorm, Layouts
from deltaw.runtime.fused_parts import FusedPart, fused_parts
from deltaw.runtime.recognition import (
    AttentionConfig,
    BlockCall,
    blocks_of,
    candidates,
    find_roles,
    module_candidates,
    relative_difference,
)
from deltaw.runtime.signatures import Signature, signature
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


Kind = tuple[Signature, tuple[bool, bool]]


@dataclass
class RecognizedBlocks:
    """Result of the recognition on a small copy.

    Attributes:
        kinds: Descriptions by kind of block.
        attention: Descriptions by kind of attention module.
        rejected: Reasons by kind of block.
        why: Reason for the acceptance of the last kind, or for the rejection of all.
    """

    kinds: dict[Kind, BlockRoles] = field(default_factory=dict)
    attention: dict[Kind, BlockRoles] = field(default_factory=dict)
    rejected: dict[Kind, str] = field(default_factory=dict)
    why: str = ""


@dataclass
class FusedBlocks:
    """Fused blocks of a model.

    Other blocks run the model's code with fused attention, norms and MLPs, as far as these were recognized.

    Attributes:
        blocks: Fused blocks in the order of the model.
        choice: True if all blocks are fused, with the reason.
        backbone: Module that contains the blocks.
        path: Path of the list of blocks within the backbone.
        recognized: Descriptions, for blocks that are replaced later.
        configs: Attention parameters of each block, for blocks that are replaced later. None for other blocks.
        attention: Attention parameters by path of the attention modules in other blocks.
        norm: Norm after the last block, if supported.
        separate_parts: True if parts inside of other blocks run fused.
        fuses_attention: True if attention runs fused in all blocks that have attention.
    """

    blocks: list[FusedBlock]
    choice: Choice[bool]
    backbone: nn.Module | None = None
    path: str = ""
    recognized: RecognizedBlocks = field(default_factory=RecognizedBlocks)
    configs: list[AttentionConfig | None] = field(default_factory=list)
    attention: dict[str, AttentionConfig] = field(default_factory=dict)
    layouts: Layouts | None = None
    norm: FusedNorm | None = None
    separate_parts: bool = False
    fuses_attention: bool = False
    _fused_attention: dict[str, FusedBlock] = field(default_factory=dict)

    @property
    def last(self) -> FusedBlock | None:
        """The fused form of the model's last block, if available."""
        if not self.blocks or self.backbone is None:
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

    def _parts(self) -> list[tuple[nn.Module, FusedBlock | FusedPart]]:
        """Return modules with their fused forward functions."""
        parts: list[tuple[nn.Module, FusedBlock | FusedPart]] = [(b.block, b) for b in self.blocks]
        if self.separate_parts and self.backbone is not None:
            attention = self._attention_parts(self.backbone)
            parts += [(fused.block, fused) for fused in attention]
            modules = [module for module, _ in parts]
            block_list = blocks_of(self.backbone)
            for block in [] if block_list is None else block_list[1]:
                if block not in modules:
                    parts += [(part.module, part) for part in fused_parts(block, modules)]
        if self.norm is not None:
            parts.append((self.norm.module, self.norm))
        return parts

    def _attention_parts(self, backbone: nn.Module) -> list[FusedBlock]:
        """Return the fused attention modules, updated for modules that were replaced."""
        modules = dict(backbone.named_modules())
        current = {}
        for path, config in self.attention.items():
            fused = self._fused_attention.get(path)
            module = modules.get(path)
            if fused is not None and fused.block is module:
                current[path] = fused
            elif module is not None and self.layouts is not None:
                roles = self.recognized.attention.get((signature(module), config.kind))
                if roles is not None:
                    current[path] = FusedBlock(module, roles, config, self.layouts)
        self._fused_attention = current
        return list(current.values())

    def _update_blocks(self) -> None:
        """Update the blocks and the final norm for modules that were replaced.

        Modules of a recognized kind run fused.
        """
        if self.backbone is None:
            return
        if self.configs:
            current = list(self.backbone.get_submodule(self.path).children())
            fused_by_id = {id(fused.block): fused for fused in self.blocks}
            if len(current) == len(self.configs):
                updated = [fused_by_id.get(id(b)) or self._fuse(b, n) for n, b in enumerate(current)]
                self.blocks = [fused for fused in updated if fused is not None]
            else:  # blocks were added or removed, so the recorded attention parameters do not apply
                self.blocks = []
        norm = final_norm(self.backbone)
        if norm is None or self.norm is None or self.norm.module is not norm:
            self.norm = None if norm is None else FusedNorm(norm)

    def _fuse(self, block: nn.Module, index: int) -> FusedBlock | None:
        """Return the fused form of a block at an index, if its kind was verified."""
        config = self.configs[index]
        if config is None or self.layouts is None:
            return None
        roles = self.recognized.kinds.get((signature(block), config.kind))
        return None if roles is None else FusedBlock(block, roles, config, self.layouts)


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
        if not recognized.kinds and not recognized.attention:
            return _separate_parts(backbone, recognized.why)
        recorded = recording_configs(), _recorded_calls(list(block_modules))
        with mode.attention(model), torch.no_grad(), recorded[0] as notes, recorded[1] as calls:
            backbone(**mode.inputs(backbone))
    except Exception as error:  # any error of third-party code means that its blocks run unfused
        return _separate_parts(backbone, f"{type(error).__name__}: {str(error)[:100]}")
    configs = _configs(list(block_modules), notes)
    blocks: list[FusedBlock] = []
    reasons: list[str] = []
    for index, block in enumerate(block_modules):
        config = configs.get(index)
        kind = signature(block), (config or AttentionConfig(1.0)).kind
        roles = recognized.kinds.get(kind) if config is not None or not notes else None
        if roles is None:
            unverified = f"block {index} ({type(block).__name__}) has an unverified kind"
            reasons.append(recognized.rejected.get(kind, unverified))
        else:
            config = config or AttentionConfig(roles.attention.head_size**-0.5)
            blocks.append(FusedBlock(block, roles, config, mode.layouts))
    if model.device.type != "cpu" and has_values(model) and (why := _mismatch(calls, blocks, mode, model)):
        return FusedBlocks([], Choice(False, why))
    config_of_block = {id(fused.block): fused.config for fused in blocks}
    norm = final_norm(backbone)
    result = FusedBlocks(
        blocks=blocks,
        choice=Choice(False, reasons[0]) if reasons else Choice(True, recognized.why),
        backbone=backbone,
        path=path,
        recognized=recognized,
        configs=[config_of_block.get(id(block)) for block in block_modules],
        layouts=mode.layouts,
        norm=None if norm is None else FusedNorm(norm),
        separate_parts=bool(reasons),
    )
    inside = {id(module) for fused in blocks for module in fused.block.modules()}
    others = [(module, config) for module, config in notes if id(module) not in inside]
    if model.device.type == "cpu":
        paths = {id(module): path for path, module in backbone.named_modules()}
        result.attention = {
            paths[id(module)]: config
            for module, config in others
            if (signature(module), config.kind) in recognized.attention and id(module) in paths
        }
    result.fuses_attention = bool(notes) and len(result.attention) == len(others)
    return result


def _separate_parts(backbone: PreTrainedModel, why: str) -> FusedBlocks:
    """Return fused norms and MLPs of blocks that are not recognized for the given reason."""
    return FusedBlocks([], Choice(False, why), backbone, separate_parts=True)


_RECOGNIZED: dict[tuple[Any, ...], RecognizedBlocks] = {}


def _recognize_kinds(small: PreTrainedModel, mode: Mode) -> RecognizedBlocks:
    """Run a small model in this mode, and find a matching description for each kind of block and attention module."""
    block_list = blocks_of(small)
    if block_list is None:
        return RecognizedBlocks(why="the model has no list of blocks")
    blocks = list(block_list[1])
    recognized = RecognizedBlocks()
    with mode.attention(small):
        with torch.no_grad(), recording_configs() as notes:
            inputs = mode.inputs(small)
            small(**inputs)
        configs = _configs(blocks, notes)
        modules = {index: next(m for m, _ in notes if m in set(blocks[index].modules())) for index in configs}
        with torch.no_grad(), _recorded_calls([*blocks, *modules.values()]) as recorded:
            small(**inputs)
        counts = Counter(id(call.block) for call in recorded)
        token_mask = inputs.get("attention_mask")
        once = [call for call in recorded if counts[id(call.block)] == 1]
        calls = {id(call.block): dataclasses.replace(call, token_mask=token_mask) for call in once}

        def run(block: nn.Module, roles: BlockRoles, config: AttentionConfig) -> FusedBlock:
            fused = FusedBlock(block, roles, config, mode.layouts)
            fused.original_forward = _reject_call
            return fused

        tried: set[Kind] = set()
        for index, module in modules.items():
            config = configs[index]
            kind = signature(module), config.kind
            if kind not in tried and id(module) in calls:
                call = dataclasses.replace(calls[id(module)], config=config)
                roles, _ = find_roles(call, module_candidates(module), run)
                if roles is not None:
                    recognized.attention[kind] = with_dropout_sites(call, roles, run)
            tried.add(kind)
        for index, block in enumerate(blocks):
            block_config = configs.get(index)
            kind = signature(block), (block_config or AttentionConfig(1.0)).kind
            if kind in recognized.kinds or kind in recognized.rejected:
                continue
            if id(block) not in calls or (notes and block_config is None):
                why = "it does not call attention exactly once"
                roles = None
            else:
                call = dataclasses.replace(calls[id(block)], config=block_config)
                known = _attention_of(block, modules.get(index), block_config, recognized)
                roles, why = find_roles(call, candidates(block, known), run)
                roles = None if roles is None else with_dropout_sites(call, roles, run)
            if roles is None:
                recognized.rejected[kind] = f"{type(block).__name__} is not supported: {why}"
            else:
                recognized.kinds[kind] = roles
            recognized.why = recognized.rejected.get(kind, why)
    return recognized


def _attention_of(
    block: nn.Module, module: nn.Module | None, config: AttentionConfig | None, recognized: RecognizedBlocks
) -> AttentionRoles | None:
    """Return the verified description of the attention module in a block, with paths in the block."""
    roles = None if module is None or config is None else recognized.attention.get((signature(module), config.kind))
    path = next((path for path, inner in block.named_modules() if inner is module), "")
    return roles.attention.inside(path) if roles is not None and path else None


@contextlib.contextmanager
def _recorded_calls(modules: list[nn.Module]) -> Iterator[list[BlockCall]]:
    """Context that records the calls of blocks or attention modules in a list."""
    calls: list[BlockCall] = []

    def record_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        kwargs_copy = dict(kwargs)
        hidden = args[0] if args else kwargs_copy.pop("hidden_states", None)
        if isinstance(hidden, Tensor):
            calls.append(BlockCall(module, hidden, args[1:], kwargs_copy, output))

    hooks = [module.register_forward_hook(record_call, with_kwargs=True) for module in modules]
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
    call_of = {id(call.block): call for call in calls}
    kinds = {(fused.roles, fused.config.kind): (call_of[id(fused.block)], fused) for fused in blocks}
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
