"""Quantization of frozen weights to int8 with calibration, or to NF4.

For int8, the blocks run once on rows of the user. Before a block's weights are replaced, the inputs of its linear
layers are recorded. For each input, scales per column are chosen that minimize the rounding error (SmoothQuant, arXiv
2211.10438: magnitude moves from inputs with outliers into the weights), and scales per block of a row if they reduce it
considerably. A layer whose outputs would still differ by more than ``MAX_OUTPUT_ERROR`` keeps its weights. Then the
memory of the block's weights is released before the next block runs, so the model never exists entirely in both forms.
"""

from __future__ import annotations

import ctypes
import functools
import math
from base64 import b64decode, b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from deltaw.errors import first_names
from deltaw.kernels import large_pages, loader
from deltaw.kernels.block_linear import quantize_nf4 as rounded_nf4
from deltaw.kernels.quantize import expand_scales, quantize_activations, quantize_rows
from deltaw.kernels.torch_private import direct_parameters
from deltaw.lora.fingerprint import record_base_digest
from deltaw.lora.kinds import PLAIN_LINEAR_CLASSES, get_input_embedding, is_conv1d
from deltaw.lora.layers import LoRALinear
from deltaw.lora.layers_quantized import Int8Conv1D, Int8Linear, quantize_linear_nf4, supports_nf4
from deltaw.machine.memory import free_memory_bytes
from deltaw.runtime.recognition import blocks_of
from deltaw.tensor_files import has_values

# Maximum relative output error of an int8 layer. With a larger error, the layer keeps its weights.
MAX_OUTPUT_ERROR = 0.04
# Candidate exponents of SmoothQuant. 0 disables smoothing.
SMOOTHING_EXPONENTS = (0.0, 0.5, 0.7)
# Scales per block of an input row are slower than scales per row. They are used if they reduce the error below this
# share.
MAX_BLOCK_ERROR_RATIO = 0.85
# Number of tokens, and approximate number of outputs, for the calibration of a layer.
CALIBRATION_TOKENS, CALIBRATION_OUTPUTS = 512, 256


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
        for slot in _layer_slots(prefix, blocks, _can_be_int8):
            if roundings is None:
                slot.replace(_in_int8(slot.layer))
            elif slot.name in rounding_by_name:
                slot.round(rounding_by_name[slot.name])
            report.layers += roundings is None or slot.name in rounding_by_name
        return report
    handles: list[Any] = []
    for index, block in enumerate(blocks):
        inputs: dict[int, Tensor] = {}
        layers = _layer_slots(f"{prefix}.{index}", block, _can_be_int8)
        for slot in layers:
            handles.append(slot.layer.register_forward_pre_hook(functools.partial(_record_input, inputs)))
        handles.append(block.register_forward_hook(functools.partial(_quantize_block, layers, inputs, report)))
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return report


class _LayerSlot(NamedTuple):
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


def _layer_slots(prefix: str, root: nn.Module, predicate: Callable[[nn.Module], bool]) -> list[_LayerSlot]:
    """Return the layers below ``root``, the module ``prefix`` of the model, that match a predicate."""
    return [
        _LayerSlot(".".join(filter(None, (prefix, name, child))), module, child, layer)
        for name, module in root.named_modules()
        for child, layer in module.named_children()
        if predicate(layer)
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
    """Return the weight of a linear layer as (out, in)."""
    weight = layer.get_parameter("weight")
    return weight if isinstance(layer, nn.Linear) else weight.t()


def _record_input(inputs: dict[int, Tensor], module: nn.Module, args: tuple[Tensor, ...]) -> None:
    if id(module) not in inputs:
        inputs[id(module)] = args[0].detach().flatten(0, -2)[:CALIBRATION_TOKENS]


def _quantize_block(layers: list[_LayerSlot], inputs: dict[int, Tensor], report: Int8Report, *_: object) -> None:
    """Quantize the layers of a block after its forward pass, and release its weights."""
    slots_by_input: dict[int, list[_LayerSlot]] = {}
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


# NF4 (arXiv 2305.14314) quantizes the linear layers of the blocks one by one. Embeddings, norms and the head are not
# quantized. The memory of each original weight is released immediately, so a memory-mapped model never exists entirely
# in both forms.


@dataclass
class Nf4Report:
    """Result of a quantization to NF4.

    Attributes:
        layers: Number of linear layers in the blocks.
        unquantized: Names of layers that keep their weights.
    """

    layers: int = 0
    unquantized: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.layers:
            return "the blocks have no linear layers, so no weight is in NF4"
        summary = f"{self.layers - len(self.unquantized)} of {self.layers} layers are in NF4"
        if self.unquantized:
            summary += f"; not in NF4 because their input size is not a multiple of 64: {first_names(self.unquantized)}"
        return summary


def quantize_nf4(model: nn.Module) -> Nf4Report:
    """Replace the linear layers of the blocks by NF4 layers.

    Args:
        model: Frozen model without adapters.
    """
    report = Nf4Report()
    for slot, layer in _linear_layers(model):
        report.layers += 1
        if not supports_nf4(layer):
            report.unquantized.append(slot.name)
            continue
        slot.replace(quantize_linear_nf4(layer))
        release_pages(layer.weight)
    return report


# Inputs above this value are multiplied in 16 bits by bitsandbytes' int8 layers (LLM.int8, arXiv 2208.07339).
INT8_OUTLIER_THRESHOLD = 6.0


def bitsandbytes_linear(linear: nn.Linear, precision: str, device: str) -> nn.Linear:
    """Create a bitsandbytes layer on ``device`` with the weight of ``linear`` quantized there, and its bias.

    Args:
        linear: Layer to quantize. Activations are in the dtype of its weight.
        precision: ``nf4``, with double quantization of the scales, or ``int8``.
        device: Device of the new layer. The bias is moved by the caller.
    """
    from bitsandbytes import nn as bnb

    weight, sizes = linear.weight.detach(), (linear.in_features, linear.out_features)
    layer: Any
    if precision == "nf4":
        layer = bnb.Linear4bit(*sizes, compute_dtype=weight.dtype, quant_type="nf4", device="meta")
        layer.weight = bnb.Params4bit(weight, quant_type="nf4").to(device)
    else:
        options = {"has_fp16_weights": False, "threshold": INT8_OUTLIER_THRESHOLD}
        layer = bnb.Linear8bitLt(*sizes, **options, device="meta")
        layer.weight = bnb.Int8Params(weight, requires_grad=False).to(device)
    layer.register_parameter("bias", direct_parameters(linear).get("bias"))
    layer.training = linear.training
    record_base_digest(layer.weight, linear.weight)
    return cast(nn.Linear, layer)


class SimulatedLinear(nn.Linear):
    """Stand-in for a bitsandbytes layer in a dry run, with the tensors of its CUDA code. It has no values.

    Products of a few tokens need less, because they do not dequantize the weight.
    """

    simulated_library = "bitsandbytes"
    scales: Tensor

    def __init__(self, linear: nn.Linear, precision: str, device: str) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        values, is_nf4 = linear.weight.detach().view(-1), precision == "nf4"
        codes = values[: len(values) // 2].to(torch.uint8)[:, None] if is_nf4 else linear.weight.detach().to(torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_parameter("bias", direct_parameters(linear).get("bias"))
        scales = values[: len(values) // 64].to(torch.uint8) if is_nf4 else values[: linear.out_features].float()
        self.register_buffer("scales", scales)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        return cast(Tensor, _SimulatedProduct.apply(input, self))

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """Return the weight in this type."""
        scales = self.scales.float()
        return scales.new_empty(self.out_features, self.in_features, dtype=dtype)


class _SimulatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: SimulatedLinear) -> Tensor:
        ctx.layer = layer
        if layer.weight.dtype == torch.uint8:
            return nn.functional.linear(x, layer.dequantized(x.dtype), layer.bias)
        ctx.x = x  # also kept with activation checkpointing
        _codes, sums = x.to(torch.int8), x.new_empty(*x.shape[:-1], layer.out_features, dtype=torch.float32)
        y = sums.half().to(x.dtype)
        return y if layer.bias is None else y.add_(layer.bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.layer.dequantized(grads[0].dtype), None


@torch.no_grad()
def quantize_with_bitsandbytes(
    model: nn.Module, precision: str, device: str, create: Callable[..., nn.Linear] = bitsandbytes_linear
) -> str:
    """Replace the linear layers of the blocks by bitsandbytes layers, which are quantized on ``device`` one by one.

    Args:
        model: Frozen model without adapters, on the CPU. Its other tensors are not moved.
        precision: ``nf4`` or ``int8``.
        device: Device of the new layers.
        create: Returns the new layer of a linear layer.

    Returns:
        Message for the user.
    """
    slots = _layer_slots(
        *(blocks_of(model) or ("", nn.ModuleList())), lambda layer: _is_plain(layer) or is_conv1d(layer)
    )
    supports = supports_nf4 if precision == "nf4" else _can_be_int8
    linears = {s.name: (s, s.layer) for s in slots if isinstance(s.layer, nn.Linear) and supports(s.layer)}
    for slot, linear in linears.values():
        slot.replace(create(linear, precision, device))
        release_pages(linear.weight)
    summary = f"{len(linears)} of {len(slots)} layers are in {precision}, with bitsandbytes"
    unquantized = [slot.name for slot in slots if slot.name not in linears]
    return f"{summary}; not supported: {first_names(unquantized)}" if unquantized else summary


@torch.no_grad()
def round_to_nf4(model: nn.Module) -> int:
    """Round the bf16 weights of the blocks' linear layers to NF4 values, in place.

    Args:
        model: Frozen model. Adapters on it are not changed.

    Returns:
        Number of layers.
    """
    layers = [layer for _, layer in _linear_layers(model, adapted=True) if supports_nf4(layer)]
    for layer in layers:
        layer.weight.copy_(rounded_nf4(layer.weight.to(torch.bfloat16)).dequantized(torch.bfloat16))
    return len(layers)


def _linear_layers(model: nn.Module, adapted: bool = False) -> list[tuple[_LayerSlot, nn.Linear]]:
    """Return the linear layers of the blocks, and with ``adapted`` also base layers of adapted ones."""
    block_list = blocks_of(model)
    if block_list is None:
        return []
    slots = _layer_slots(*block_list, lambda layer: _is_plain(layer) or (adapted and type(layer) is LoRALinear))
    return [(slot, slot.layer) for slot in slots if isinstance(slot.layer, nn.Linear)]


# Training moves large frozen weights into huge pages. A matmul with a transposed weight reads strips across all rows.
# With 4 KiB pages, each row of a large weight is on a different page, and the strips exceed the TLB.


MOVE_CHUNK_BYTES = 16 << 20  # bytes that exist twice while a weight is moved
MAX_FREE_MEMORY_SHARE = 0.5  # larger weights remain memory-mapped, so that the system can evict them


@torch.no_grad()
def use_large_pages(model: nn.Module) -> int:
    """Move a model's large frozen weights from memory-mapped files into huge pages.

    Values, parameters and weight sharing are preserved. Weights allocated by torch are not moved, nor is an input
    embedding without tied weights, because the system reads only the rows of its file that occur. Call this after the
    weights have their final values.

    Returns:
        Number of bytes moved. 0 if the system has no huge pages, the compiled kernels are unavailable, or memory is
        scarce.
    """
    if not large_pages.large_page_bytes() or loader.unavailable_reason():
        return 0
    weights = _large_weights(model)
    if sum(weight.nbytes for weight in weights) > MAX_FREE_MEMORY_SHARE * free_memory_bytes():
        return 0
    for weight in weights:
        _move(weight)
    return sum(weight.nbytes for weight in weights)


def _large_weights(model: nn.Module) -> list[Tensor]:
    """Return the large weights without duplicates."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    embedding = getattr(get_input_embedding(model), "weight", None)
    if embedding is not None and sum(tensor is embedding for _, tensor in tensors) > 1:
        embedding = None
    return list({id(tensor): tensor for _, tensor in tensors if tensor is not embedding and _is_large(tensor)}.values())


def _is_large(tensor: Tensor) -> bool:
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    frozen = plain and has_values(tensor) and tensor.device.type == "cpu" and not tensor.requires_grad
    large = frozen and tensor.nbytes >= large_pages.MIN_BYTES and tensor.dim() >= 2 and tensor.is_contiguous()
    return large and mapped_file(tensor.data_ptr()) is not None


def _move(weight: Tensor) -> None:
    original = weight.data
    target = large_pages.empty_in_large_pages(weight.numel(), weight.dtype).view(weight.shape)
    rows = max(1, MOVE_CHUNK_BYTES // (original.nbytes // len(original)))
    for start in range(0, len(original), rows):
        target[start : start + rows] = original[start : start + rows]
        release_pages(original[start : start + rows])
    release_pages(original)  # including pages at chunk boundaries
    weight.data = target
