"""Quantization of frozen weights to int8 with calibration, or to NF4.

For int8, the blocks run once on rows of the user. Before a block's weights are replaced, the inputs of its linear
layers are recorded. For each input, scales per column are chosen that minimize the rounding error (SmoothQuant, arXiv
2211.10438: magnitude moves from inputs with outliers into the weights), and scales per block of a row if they reduce it
considerably. A layer whose outputs would still differ by more than ``MAX_OUTPUT_ERROR`` is not quantized. Then the
memory of the block's weights is released before the next block runs, so the model never exists entirely in both forms.
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
from deltaw.kernels.quantize import expand_scales, quantize_activations, quantize_rows
from deltaw.lora.kinds import PLAIN_LINEAR_CLASSES, is_conv1d
from deltaw.lora.layers_quantized import Int8Conv1D, Int8Linear
from deltaw.progress import track_progress
from deltaw.runtime.recognition import blocks_of
from deltaw.tensor_files import has_values

# Maximum relative output error of an int8 layer. With a larger error, the layer is not quantized.
MAX_OUTPUT_ERROR = 0.04
# Candidate exponents of SmoothQuant. 0 disables smoothing.
SMOOTHING_EXPONENTS = (0.0, 0.5, 0.7)
# Scales per block of an input row are slower than scales per row. They are used if they reduce the error below this
# share.
MAX_BLOCK_ERROR_RATIO = 0.85
# Number of tokens, and approximate number of outputs, for the calibration of a layer.
CALIBRATION_TOKENS = 512
CALIBRATION_OUTPUTS = 256


@dataclass(frozen=True)
class Rounding:
    """Rounding of layers with a common input.

    Attributes:
        errors: Relative output error on the calibration rows, by layer name.
        columns: (in,) fp32 factors applied to the input, if any.
        in_blocks: True if each block of an input row has a separate scale.
    """

    errors: dict[str, float]
    columns: Tensor | None
    in_blocks: bool

    def as_json(self) -> dict[str, Any]:
        """Return lossless JSON values."""
        columns = self.columns if self.columns is None else b64encode(self.columns.numpy().tobytes()).decode()
        return {"errors": self.errors, "columns": columns, "in_blocks": self.in_blocks}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Rounding:
        """Create a rounding from :meth:`as_json`."""
        columns = values["columns"] and torch.frombuffer(bytearray(b64decode(values["columns"])), dtype=torch.float32)
        return cls(values["errors"], columns, values["in_blocks"])


@dataclass
class Int8Report:
    """Result of a quantization to int8.

    Attributes:
        layers: Number of linear layers in the blocks.
        roundings: Roundings of the layers, if they were calibrated.
    """

    layers: int = 0
    roundings: list[Rounding] = field(default_factory=list)

    @property
    def errors(self) -> dict[str, float]:
        """Relative output errors on the calibration rows, by layer."""
        return {name: error for rounding in self.roundings for name, error in rounding.errors.items()}

    @property
    def unquantized(self) -> dict[str, float]:
        """Errors of the layers that keep their weights, by name."""
        return {name: error for name, error in self.errors.items() if error > MAX_OUTPUT_ERROR}

    def __str__(self) -> str:
        if not self.layers:
            return "the blocks have no linear layers, so no weight is int8-quantized"
        summary = f"{self.layers - len(self.unquantized)} of {self.layers} layers are int8-quantized"
        if self.errors:
            summary += f", with a mean output error of {sum(self.errors.values()) / len(self.errors):.1%}"
        worst = sorted(self.unquantized, key=lambda name: -self.unquantized[name])
        names = first_names([f"{name} ({self.unquantized[name]:.0%})" for name in worst])
        return f"{summary}; not quantized because of errors above {MAX_OUTPUT_ERROR:.0%}: {names}" if worst else summary


def quantize_int8(
    model: nn.Module, run: Callable[[], object] | None = None, *, roundings: Sequence[Rounding] | None = None
) -> Int8Report:
    """Replace the linear layers of the blocks by int8 layers.

    Args:
        model: Frozen model without adapters.
        run: Runs the model on calibration rows. Without it, all layers are quantized without calibration.
        roundings: Results of an earlier calibration, which replace a new one.
    """
    report = Int8Report(roundings=list(roundings or ()))
    block_list = blocks_of(model)
    if block_list is None:
        return report
    prefix, blocks = block_list
    if run is None or roundings is not None:
        rounding_by_name = {name: rounding for rounding in report.roundings for name in rounding.errors}
        for slot in layer_slots(prefix, blocks, can_be_int8):
            if roundings is None:
                slot.replace(_in_int8(slot.layer))
            elif slot.name in rounding_by_name:
                slot.round(rounding_by_name[slot.name])
            report.layers += roundings is None or slot.name in rounding_by_name
        return report
    handles: list[Any] = []
    with track_progress("quantizing the weights to int8", len(blocks)) as advance:
        for index, block in enumerate(blocks):
            inputs: dict[int, Tensor] = {}
            layers = layer_slots(f"{prefix}.{index}", block, can_be_int8)
            for slot in layers:
                handles.append(slot.layer.register_forward_pre_hook(functools.partial(_record_input, inputs)))
            handles.append(block.register_forward_hook(functools.partial(_quantize_block, layers, inputs, report)))
            handles.append(block.register_forward_hook(lambda *_, completed=index + 1: advance(completed)))
        try:
            with torch.no_grad():
                run()
        finally:
            for handle in handles:
                handle.remove()
    return report


class LayerSlot(NamedTuple):
    """A layer and its position in the model: full name, parent module and name in the parent."""

    name: str
    parent: nn.Module
    child: str
    layer: nn.Module

    def replace(self, other: nn.Module) -> None:
        """Replace the layer."""
        setattr(self.parent, self.child, other)

    def round(self, rounding: Rounding) -> None:
        """Replace the layer by an int8 layer, unless its error is too large."""
        if not rounding.errors[self.name] > MAX_OUTPUT_ERROR:
            self.replace(_in_int8(self.layer, rounding.columns, rounding.in_blocks))
            release_pages(self.layer.get_parameter("weight"))


def layer_slots(prefix: str, root: nn.Module, predicate: Callable[[nn.Module], bool]) -> list[LayerSlot]:
    """Return the layers below ``root``, the module ``prefix`` of the model, that match a predicate."""
    return [
        LayerSlot(".".join(filter(None, (prefix, name, child))), module, child, layer)
        for name, module in root.named_modules()
        for child, layer in module.named_children()
        if predicate(layer)
    ]


def is_plain(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear or type(layer).__name__ in PLAIN_LINEAR_CLASSES


def can_be_int8(layer: nn.Module) -> bool:
    linear = is_plain(layer) or (is_conv1d(layer) and not isinstance(layer, Int8Conv1D))
    return linear and all(size % 4 == 0 for size in layer.get_parameter("weight").shape)


def _in_int8(layer: nn.Module, columns: Tensor | None = None, in_blocks: bool = False) -> nn.Module:
    if isinstance(layer, nn.Linear):
        return Int8Linear.from_linear(layer, columns, in_blocks)
    return Int8Conv1D.from_conv1d(layer, columns, in_blocks)


def _rows(layer: nn.Module) -> Tensor:
    """Return the weight of a linear layer as (out, in)."""
    weight = layer.get_parameter("weight")
    return weight if isinstance(layer, nn.Linear) else weight.t()


def _record_input(inputs: dict[int, Tensor], module: nn.Module, args: tuple[Tensor, ...]) -> None:
    if id(module) not in inputs:
        inputs[id(module)] = args[0].detach().flatten(0, -2)[:CALIBRATION_TOKENS]


def _quantize_block(layers: list[LayerSlot], inputs: dict[int, Tensor], report: Int8Report, *_: object) -> None:
    """Quantize the layers of a block after its forward pass, and release its weights."""
    slots_by_input: dict[int, list[LayerSlot]] = {}
    for slot in layers:
        if id(slot.layer) in inputs:
            slots_by_input.setdefault(inputs[id(slot.layer)].data_ptr(), []).append(slot)
    for group in slots_by_input.values():
        columns, in_blocks, errors = _choose_columns(inputs[id(group[0].layer)].float(), [slot.layer for slot in group])
        rounding = Rounding({slot.name: error for slot, error in zip(group, errors, strict=True)}, columns, in_blocks)
        report.roundings.append(rounding)
        report.layers += len(group)
        for slot in group:
            slot.round(rounding)
    inputs.clear()


def _choose_columns(x: Tensor, linears: list[nn.Module]) -> tuple[Tensor | None, bool, list[float]]:
    """Choose the rounding with the least total error for layers with a common input.

    Returns:
        Column factors, True for scales per block, and the error of each layer.
    """
    input_max = x.abs().amax(0)
    layer_rows = [_rows(linear) for linear in linears]
    weight_max = torch.stack([rows.abs().amax(0).float() for rows in layer_rows]).amax(0)
    # Rows are rounded independently, so a sample of rows is representative.
    weights = [rows[:: max(1, len(rows) // CALIBRATION_OUTPUTS)].float() for rows in layer_rows]
    expected = [x @ w.t() for w in weights]
    # Best (error, columns, error of each layer) for scales per row and for scales per block.
    best: list[tuple[float, Tensor | None, list[float]]] = [(math.inf, None, [])] * 2
    for exponent in SMOOTHING_EXPONENTS:
        columns = None
        if exponent:
            factors = input_max.clamp_min(1e-5).pow(exponent) / weight_max.clamp_min(1e-5).pow(1 - exponent)
            columns = 1.0 / (factors / factors.log().mean().exp())
        rounded_weights = [quantize_rows(w if columns is None else w / columns) for w in weights]
        for in_blocks in (False, True):
            int8_inputs, scales = quantize_activations(x, columns, in_blocks)
            rounded = (int8_inputs.float() - 128) * expand_scales(scales, x.shape[1])
            errors = []
            for (int8, scale), y in zip(rounded_weights, expected, strict=True):
                errors.append(float(((rounded @ int8.float().t()) * scale - y).norm() / y.norm().clamp_min(1e-20)))
            if sum(errors) < best[in_blocks][0]:
                best[in_blocks] = sum(errors), columns, errors
    in_blocks = best[True][0] < MAX_BLOCK_ERROR_RATIO * best[False][0]
    return best[in_blocks][1], in_blocks, best[in_blocks][2]


def release_pages(weight: Tensor) -> None:
    """Let the system reclaim memory-mapped pages of a weight that is no longer used.

    Reading the weight again loads them from the file. No-op in a dry run.
    """
    if not has_values(weight) or mapped_file(weight.data_ptr()) is None:
        return
    page = 4096
    start = -(-weight.data_ptr() // page) * page
    stop = (weight.data_ptr() + weight.nbytes) // page * page
    if start < stop:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), 4)  # MADV_DONTNEED


def mapped_file(address: int) -> str | None:
    """Return the file that is mapped at an address, or None for anonymous memory."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                parts = line.split(maxsplit=5)
                start, _, stop = parts[0].partition("-")
                if int(start, 16) <= address < int(stop, 16):
                    name = parts[5].strip() if len(parts) > 5 else ""
                    return name if name.startswith("/") else None
    except OSError:
        return None
    return None
