"""Frozen weights kept as bytes: which layers, with what columns, and what it costs in loss.

The model's blocks are gone through once, on rows of the user's own. While a block still has its weights, the
inputs of its linear layers are seen; for each input the columns are chosen that round best (SmoothQuant,
arXiv 2211.10438: size moves from inputs with outliers into the weights), and a scale for each block of a row
where that helps much. A layer whose outputs would still be off by more than LARGEST_ERROR keeps its weights.
Then the block's weights are given back and the next block is reached, so that a model never stands whole in
both forms.

Knows modules; not data files or training.
"""

from __future__ import annotations

import ctypes
import functools
import math
from base64 import b64decode, b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deltaw.errors import first_names
from deltaw.kernels import large_pages, loader
from deltaw.kernels.block_linear import quantize_nf4 as rounded_nf4
from deltaw.kernels.quantize import quantized, quantized_rows, spread_scales
from deltaw.lora.fingerprint import has_values
from deltaw.lora.kinds import PLAIN_LINEAR_CLASSES, is_conv1d, own_embedding
from deltaw.lora.layers import LoRALinear
from deltaw.lora.layers_quantized import Int8Conv1D, Int8Linear, can_be_nf4, in_nf4
from deltaw.machine.memory import free_memory_bytes
from deltaw.runtime.recognition import blocks_of

# A layer keeps its weights where rounding to bytes moves its outputs by more than this share of their norm.
LARGEST_ERROR = 0.04
# How much of the inputs' size is moved into the weights, tried in turn; 0 leaves both as they are.
MOVED = (0.0, 0.5, 0.7)
# A scale for each block of an input, not for each row, takes a little longer; it is for layers whose outputs
# are then off by less than this share of what they were off by.
WORTH_BLOCKS = 0.85
# Tokens, and about as many outputs, that each layer is calibrated on.
TOKENS, ROWS = 512, 256


@dataclass(frozen=True)
class Rounding:
    """How layers with one input are rounded.

    Attributes:
        errors: of each layer by name, its outputs' relative error on the calibration rows.
        columns: (in,) in fp32, what the input is multiplied with; None leaves it as it is.
        in_blocks: whether each block of an input's row has a scale of its own.
    """

    errors: dict[str, float]
    columns: Tensor | None
    in_blocks: bool

    def as_json(self) -> dict[str, Any]:
        """Exact, as JSON can hold it."""
        columns = self.columns if self.columns is None else b64encode(self.columns.numpy().tobytes()).decode()
        return {"errors": self.errors, "columns": columns, "in_blocks": self.in_blocks}

    @classmethod
    def of_json(cls, kept: dict[str, Any]) -> Rounding:
        """What :meth:`as_json` gave."""
        columns = kept["columns"] and torch.frombuffer(bytearray(b64decode(kept["columns"])), dtype=torch.float32)
        return cls(kept["errors"], columns, kept["in_blocks"])


@dataclass
class Int8Report:
    """What was done.

    Attributes:
        layers: how many layers the blocks have. roundings: how they are rounded, if that was calibrated.
    """

    layers: int = 0
    roundings: list[Rounding] = field(default_factory=list)

    @property
    def errors(self) -> dict[str, float]:
        """Of every layer that was calibrated, its outputs' relative error on the calibration rows."""
        return {name: error for rounding in self.roundings for name, error in rounding.errors.items()}

    @property
    def kept(self) -> dict[str, float]:
        """Names of the layers that keep their weights, with their error."""
        return {name: error for name, error in self.errors.items() if error > LARGEST_ERROR}

    def __str__(self) -> str:
        if not self.layers:
            return "no linear layer stands in the blocks, so no weight is int8-quantized"
        said = f"{self.layers - len(self.kept)} of {self.layers} layers are int8-quantized"
        if self.errors:
            said += f", with outputs off by {sum(self.errors.values()) / len(self.errors):.1%} on average"
        worst = sorted(self.kept, key=lambda name: -self.kept[name])
        shown = first_names([f"{name} ({self.kept[name]:.0%})" for name in worst])
        return f"{said}; off by more than {LARGEST_ERROR:.0%}, and so left as they were: {shown}" if worst else said


def quantize_int8(
    model: nn.Module, run: Callable[[], object] | None = None, *, known: Sequence[Rounding] | None = None
) -> Int8Report:
    """Put layers with weights in int8 in the place of the blocks' linear layers.

    Args:
        model: frozen, without adapters.
        run: runs the model on some rows; without it there is no calibration and every layer is taken.
        known: what an earlier calibration found, which saves this one.
    """
    report = Int8Report(roundings=list(known or ()))
    found = blocks_of(model)
    if found is None:
        return report
    prefix, blocks = found
    if run is None or known is not None:
        of_name = {name: rounding for rounding in report.roundings for name in rounding.errors}
        for held in _held(prefix, blocks, _can_be_int8):
            if known is None:
                held.replace(_in_int8(held.layer))
            elif held.name in of_name:
                held.round(of_name[held.name])
            report.layers += known is None or held.name in of_name
        return report
    handles: list[Any] = []
    for number, block in enumerate(blocks):
        inputs: dict[int, Tensor] = {}
        layers = _held(f"{prefix}.{number}", block, _can_be_int8)
        for held in layers:
            handles.append(held.layer.register_forward_pre_hook(functools.partial(_note, inputs)))
        handles.append(block.register_forward_hook(functools.partial(_change, layers, inputs, report)))
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return report


class _Held(NamedTuple):
    """A layer of the model, and who holds it: its name, its parent, and its name there."""

    name: str
    parent: nn.Module
    child: str
    layer: nn.Module

    def replace(self, other: nn.Module) -> None:
        """Put another layer in its place."""
        setattr(self.parent, self.child, other)

    def round(self, rounding: Rounding) -> None:
        """Put the layer in int8 in its place, unless that would be off by too much."""
        if not rounding.errors[self.name] > LARGEST_ERROR:
            self.replace(_in_int8(self.layer, rounding.columns, rounding.in_blocks))
            give_back(self.layer.get_parameter("weight"))


def _held(prefix: str, root: nn.Module, wanted: Callable[[nn.Module], bool]) -> list[_Held]:
    """The layers below ``root``, the module ``prefix`` of the model, that are wanted."""
    return [
        _Held(".".join(filter(None, (prefix, name, child))), module, child, layer)
        for name, module in root.named_modules()
        for child, layer in module.named_children()
        if wanted(layer)
    ]


def _is_plain(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear or type(layer).__name__ in PLAIN_LINEAR_CLASSES


def _can_be_int8(layer: nn.Module) -> bool:
    linear = _is_plain(layer) or (is_conv1d(layer) and not isinstance(layer, Int8Conv1D))
    return linear and all(size % 4 == 0 for size in layer.get_parameter("weight").shape)


def _in_int8(layer: nn.Module, columns: Tensor | None = None, in_blocks: bool = False) -> nn.Module:
    if isinstance(layer, nn.Linear):
        return Int8Linear.from_linear(layer, columns, in_blocks)
    return Int8Conv1D.from_conv1d(layer, columns, in_blocks)


def _rows(layer: nn.Module) -> Tensor:
    """The weight of a linear layer as (out, in)."""
    weight = layer.get_parameter("weight")
    return weight if isinstance(layer, nn.Linear) else weight.t()


def _note(inputs: dict[int, Tensor], module: nn.Module, args: tuple[Tensor, ...]) -> None:
    if id(module) not in inputs:
        inputs[id(module)] = args[0].detach().flatten(0, -2)[:TOKENS]


def _change(layers: list[_Held], inputs: dict[int, Tensor], report: Int8Report, *_: object) -> None:
    """After a block's own forward: its layers in int8, and its weights given back."""
    together: dict[int, list[_Held]] = {}
    for held in layers:
        if id(held.layer) in inputs:
            together.setdefault(inputs[id(held.layer)].data_ptr(), []).append(held)
    for sharing in together.values():
        x = inputs[id(sharing[0].layer)].float()
        columns, in_blocks, errors = _best(x, [held.layer for held in sharing])
        rounding = Rounding({held.name: error for held, error in zip(sharing, errors, strict=True)}, columns, in_blocks)
        report.roundings.append(rounding)
        report.layers += len(sharing)
        for held in sharing:
            held.round(rounding)
    inputs.clear()


def _best(x: Tensor, linears: list[nn.Module]) -> tuple[Tensor | None, bool, list[float]]:
    """The columns for layers with one input that give the least error in sum, whether the input is rounded
    in blocks, and each layer's error."""
    size = x.abs().amax(0)
    every = [_rows(linear) for linear in linears]
    reach = torch.stack([rows.abs().amax(0).float() for rows in every]).amax(0)
    # Rows are rounded each by itself, so that some of them tell of all.
    weights = [rows[:: max(1, len(rows) // ROWS)].float() for rows in every]
    wanted = [x @ w.t() for w in weights]
    # With a scale for each row, and for each block of it: the error, columns, and each layer's error.
    best: list[tuple[float, Tensor | None, list[float]]] = [(math.inf, None, [])] * 2
    for moved in MOVED:
        columns = None
        if moved:
            by = size.clamp_min(1e-5).pow(moved) / reach.clamp_min(1e-5).pow(1 - moved)
            columns = 1.0 / (by / by.log().mean().exp())
        rounded_weights = [quantized_rows(w if columns is None else w / columns) for w in weights]
        for in_blocks in (False, True):
            steps, scales = quantized(x, columns, in_blocks)
            rounded = (steps.float() - 128) * spread_scales(scales, x.shape[1])
            errors = []
            for (int8, scale), y in zip(rounded_weights, wanted, strict=True):
                error = (rounded @ int8.float().t()) * scale - y
                errors.append(float(error.norm() / y.norm().clamp_min(1e-20)))
            if sum(errors) < best[in_blocks][0]:
                best[in_blocks] = sum(errors), columns, errors
    in_blocks = best[True][0] < WORTH_BLOCKS * best[False][0]
    return best[in_blocks][1], in_blocks, best[in_blocks][2]


def give_back(weight: Tensor) -> None:
    """Let the system take back the pages of a weight that is read from a mapped file and no longer used.

    They stay in the file; whoever reads them again gets them from there. In a dry run there are none.
    """
    if not has_values(weight) or file_mapped_at(weight.data_ptr()) is None:
        return
    page = 4096
    begin = -(-weight.data_ptr() // page) * page
    end = (weight.data_ptr() + weight.nbytes) // page * page
    if begin < end:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), 4)  # MADV_DONTNEED


def file_mapped_at(address: int) -> str | None:
    """The file that is mapped at an address; None where it is memory of the process's own."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                parts = line.split(maxsplit=5)
                begin, _, end = parts[0].partition("-")
                if int(begin, 16) <= address < int(end, 16):
                    name = parts[5].strip() if len(parts) > 5 else ""
                    return name if name.startswith("/") else None
    except OSError:
        return None
    return None


# Rounded to NF4 (arXiv 2305.14314), layers are taken one after another. The linear layers of the model's blocks are
# taken; embeddings, norms and the head stay as they are. Each layer's own weight is given back as soon as its blocks
# stand, so a model whose weights are mapped from its files never stands whole in both forms.


@dataclass
class Nf4Report:
    """What was done: how many layers the blocks have, and the names of those that keep their weights."""

    layers: int = 0
    kept: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.layers:
            return "no linear layer stands in the blocks, so no weight is rounded to NF4"
        said = f"{self.layers - len(self.kept)} of {self.layers} layers are in NF4"
        return f"{said}; their inputs are no multiple of 64: {first_names(self.kept)}" if self.kept else said


def quantize_nf4(model: nn.Module) -> Nf4Report:
    """Put layers with weights in NF4 in the place of the blocks' linear layers.

    Args:
        model: frozen, without adapters.
    """
    report = Nf4Report()
    for held, layer in _linear_layers(model):
        report.layers += 1
        if not can_be_nf4(layer):
            report.kept.append(held.name)
            continue
        held.replace(in_nf4(layer))
        give_back(layer.weight)
    return report


@torch.no_grad()
def round_to_nf4(model: nn.Module) -> int:
    """Give the blocks' linear layers, in place, the numbers that NF4 makes of their weights in bf16.

    Args:
        model: frozen; adapters on it stay as they are.

    Returns:
        how many layers.
    """
    layers = [layer for _, layer in _linear_layers(model, adapted=True) if can_be_nf4(layer)]
    for layer in layers:
        layer.weight.copy_(rounded_nf4(layer.weight.to(torch.bfloat16)).dequantized(torch.bfloat16))
    return len(layers)


def _linear_layers(model: nn.Module, adapted: bool = False) -> list[tuple[_Held, nn.Linear]]:
    """The linear layers of the blocks, and with ``adapted`` those under an adapter."""
    found = blocks_of(model)
    if found is None:
        return []
    every = _held(*found, lambda layer: _is_plain(layer) or (adapted and type(layer) is LoRALinear))
    return [(held, held.layer) for held in every if isinstance(held.layer, nn.Linear)]


# Large frozen weights of a training lie in large pages of memory. A product's right side is read in strips of a few
# columns, so a product with the transposed weight reads a line of each row. Of a large weight each row is another page
# of 4 KiB, more of them than the processor remembers the places of.


AT_ONCE = 16 << 20  # bytes that are there twice while a weight moves
OF_FREE_MEMORY = 0.5  # weights that take more stay in their files, from where the system can drop them


@torch.no_grad()
def use_large_pages(model: nn.Module) -> int:
    """Move a model's large frozen weights out of their mapped files into large pages of memory.

    Values, parameters and who shares them stay; only where the numbers lie changes. Left out are weights
    that torch has allocated, and an input embedding that no other layer shares: of its file the system reads
    only the rows that occur. Comes once the weights have the values that a training starts from.

    Returns:
        bytes that were moved; 0 where the system has no large pages, without compiled kernels, and where
        memory is scarce.
    """
    if not large_pages.large_page_bytes() or loader.why_not():
        return 0
    weights = _large_weights(model)
    if sum(weight.nbytes for weight in weights) > OF_FREE_MEMORY * free_memory_bytes():
        return 0
    for weight in weights:
        _move(weight)
    return sum(weight.nbytes for weight in weights)


def _large_weights(model: nn.Module) -> list[Tensor]:
    """Each once, however many names it has."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    rows = getattr(own_embedding(model), "weight", None)
    if rows is not None and sum(tensor is rows for _, tensor in tensors) > 1:
        rows = None
    found = {id(tensor): tensor for _, tensor in tensors if tensor is not rows and _is_large(tensor)}
    return list(found.values())


def _is_large(tensor: Tensor) -> bool:
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    frozen = plain and has_values(tensor) and tensor.device.type == "cpu" and not tensor.requires_grad
    large = frozen and tensor.nbytes >= large_pages.WORTH and tensor.dim() >= 2 and tensor.is_contiguous()
    return large and file_mapped_at(tensor.data_ptr()) is not None


def _move(weight: Tensor) -> None:
    before = weight.data
    moved = large_pages.large_empty(weight.numel(), weight.dtype).view(weight.shape)
    rows = max(1, AT_ONCE // (before.nbytes // len(before)))
    for row in range(0, len(before), rows):
        moved[row : row + rows] = before[row : row + rows]
        give_back(before[row : row + rows])
    give_back(before)  # with the pages that two pieces shared
    weight.data = moved
