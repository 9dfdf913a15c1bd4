"""Index of the blocks of each parameter in a ``.gguf`` file.

An index entry contains the offset, the format and the row order of a parameter whose blocks can be used directly
(:mod:`deltaw.kernels.block_linear`). Some families store the rows of heads in another order. The order is determined
by passing numbered rows through the tensor processors of transformers. All other tensors are stored in plain form.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGUFReader, ReaderTensor, dequantize
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from deltaw.errors import UserError
from deltaw.kernels.block_linear import FORMATS

INDEX = "blocks.json"
ORDERS = "row_orders.safetensors"
BLOCK_FORMATS = frozenset(name for name in FORMATS if name != "NF4")


@dataclass(frozen=True)
class GGUFBlockTensor:
    """Parameter (rows, columns) that remains in the blocks of the file.

    Attributes:
        name: Name of the parameter.
        format: Block format.
        rows, columns: Shape of the parameter.
        offset: Offset of its first byte in the file.
        order: Name of a tensor in ``ORDERS`` with the stored row index of each row, or None for the file order.
    """

    name: str
    format: str
    rows: int
    columns: int
    offset: int
    order: str | None = None

    @property
    def width(self) -> int:
        """Number of bytes per row."""
        return FORMATS[self.format].bytes_of_row(self.columns)

    @property
    def bytes(self) -> int:
        """Total number of bytes."""
        return self.rows * self.width


@dataclass
class BlockIndex:
    """Content of a file: block entries, row orders by name, and plain tensors by parameter."""

    entries: list[GGUFBlockTensor]
    orders: dict[str, Tensor]
    plain: dict[str, Tensor]


def index_parameters(path: Path, model: PreTrainedModel, dtype: torch.dtype) -> BlockIndex:
    """Index the parameters of ``model`` in a file. Values of the model are not used.

    Raises:
        UserError: if the file contains no supported block format, or a tensor cannot be processed.
    """
    reader = gguf.GGUFReader(str(path))
    architecture = string_field(reader, "general.architecture") or ""
    config = model.config.to_dict()
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config)
    try:
        names = get_gguf_hf_weights_map(model, processor)
    except NotImplementedError as error:
        message = f"the weights of {model.config.model_type} models cannot remain in the blocks of a .gguf file"
        hint = "use precision: auto, which converts the file"
        raise UserError(message, location="precision: gguf", hint=hint) from error
    family = _ModelFamily(processor, names, config)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    # Only plain linear layers and embeddings support weights in blocks.
    block_parameters = {f"{name}.weight" for name, m in model.named_modules() if type(m) in (nn.Linear, nn.Embedding)}
    index = BlockIndex([], {}, {})
    formats: set[str] = set()
    orders: dict[bytes, str] = {}
    for tensor in reader.tensors:
        name = names.get(tensor.name)
        kind = tensor.tensor_type.name
        if len(tensor.shape) > 1:
            formats.add(kind)
        order = None
        if name in block_parameters and kind in BLOCK_FORMATS and tuple(parameters[name].shape) == _shape(tensor):
            order = family.row_order(tensor)
        if name is None or order is None:
            if (plain := family.plain(tensor)) is not None and plain[0] in parameters:
                index.plain[plain[0]] = plain[1].to(dtype).view(parameters[plain[0]].shape)
            continue
        key = None
        if (order != np.arange(len(order))).any():
            key = orders.setdefault(order.tobytes(), f"order{len(orders)}")
            index.orders[key] = torch.from_numpy(order)
        rows, columns = _shape(tensor)
        index.entries.append(GGUFBlockTensor(name, kind, rows, columns, int(tensor.data_offset), key))
    if not index.entries:
        found_formats = ", ".join(sorted(formats)) or "no matrices"
        message = f"the file contains no matrices in a supported block format, only {found_formats}"
        hint = f"supported are {', '.join(sorted(BLOCK_FORMATS))}; use precision: auto, which converts the file"
        raise UserError(message, location=str(path), hint=hint)
    return index


def string_field(reader: GGUFReader, name: str) -> str | None:
    """Return a header field as a string, or None."""
    field = reader.get_field(name)
    return None if field is None else str(field.contents())


def _shape(tensor: ReaderTensor) -> tuple[int, ...]:
    """Return the shape of a tensor with rows first. The file stores columns first."""
    return tuple(int(size) for size in reversed(tensor.shape))


@dataclass(frozen=True)
class _ModelFamily:
    """Tensor processing of a model family in transformers."""

    processor: TensorProcessor
    names: dict[str, str]
    config: dict[str, Any]

    def _processed(self, tensor: ReaderTensor, weights: np.ndarray) -> tuple[str | None, Any, dict[str, Any]]:
        """Return the processed name and values of a tensor, and additional tensors created from it."""
        parsed: dict[str, Any] = {"config": self.config, "tensors": {}}
        options = {"tensor_key_mapping": self.names, "parsed_parameters": parsed}
        result = self.processor.process(weights=weights, name=tensor.name, **options)
        return result.name, result.weights, parsed["tensors"]

    def row_order(self, tensor: ReaderTensor) -> np.ndarray | None:
        """Return the (rows,) int64 stored row index of each row of the parameter, or None if rows are modified."""
        rows, _ = _shape(tensor)
        # Integers below 2^24 are exact in fp32. Two different columns distinguish a permutation from a transpose.
        probe = np.stack([np.arange(rows), np.arange(rows) + rows], 1).astype(np.float32)
        try:
            name, processed, _ = self._processed(tensor, probe)
        except Exception:  # a processor that depends on the width does more than reorder rows
            return None
        if name != tensor.name or not isinstance(processed, np.ndarray) or processed.shape != probe.shape:
            return None
        order = processed[:, 0].astype(np.int64)
        is_reordered = (np.sort(order) == np.arange(rows)).all() and (processed == probe[order.clip(0, rows - 1)]).all()
        return order if is_reordered else None

    def plain(self, tensor: ReaderTensor) -> tuple[str, Tensor] | None:
        """Return the name of a parameter and its dequantized values, or None if the tensor is not a parameter."""
        name, values, additional = self._processed(tensor, dequantize(tensor.data, tensor.tensor_type))
        if additional:
            message = f"'{tensor.name}' contains several parameters, such as experts"
            raise UserError(message, location="precision: gguf", hint="use precision: auto for models with experts")
        name = self.names.get(name or "")
        return None if name is None or values is None else (name, torch.from_numpy(np.array(values)))
