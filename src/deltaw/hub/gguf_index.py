"""Where each parameter's numbers lie in a ``.gguf`` file, told without reading them all.

A parameter whose rows are stored in blocks that are kept as they are (``kernels/block_formats.py``) is an
entry: its place in the file, its format, and the order of its rows, since some families store heads' rows in
another order. What a family does to its tensors is transformers' own knowledge (its tensor processors). It is
asked about numbered rows: where these come back whole, each somewhere, the order of the rows is known. All
other tensors are few and small, or are processed otherwise, and become plain numbers.

Runs in the process that converts a file; knows files and names, not layers.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, ReaderTensor, dequantize
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
)

from deltaw.errors import UserError
from deltaw.kernels.block_formats import FORMATS

INDEX = "blocks.json"
ORDERS = "row_orders.safetensors"
KEPT = frozenset(name for name in FORMATS if name != "NF4")


@dataclass(frozen=True)
class BlockEntry:
    """A parameter (rows, columns) of the model that stays in the file's blocks.

    Attributes:
        offset: of its first byte in the file.
        order: the name of a tensor in ``ORDERS``: the stored row of each of its rows; None where they stand
            in the file as they are.
    """

    name: str
    format: str
    rows: int
    columns: int
    offset: int
    order: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """For a JSON file."""
        return asdict(self)


@dataclass
class Indexed:
    """What a file holds: entries, orders of rows by name, and plain tensors by parameter."""

    entries: list[BlockEntry]
    orders: dict[str, Tensor]
    plain: dict[str, Tensor]


def indexed(path: Path, model: PreTrainedModel, dtype: torch.dtype) -> Indexed:
    """The parameters of ``model`` in the file; the model's own values are not used.

    Raises:
        UserError: the file is stored in no format that can be kept, or lacks a part of the model.
    """
    reader = GGUFReader(path)
    field = reader.get_field("general.architecture")
    architecture = "" if field is None else str(field.contents())
    config = model.config.to_dict()
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config)
    names = get_gguf_hf_weights_map(model, processor)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    kept = {f"{name}.weight" for name, module in model.named_modules() if _keeps(module)}
    found = Indexed([], {}, {})
    formats: set[str] = set()
    orders: dict[bytes, str] = {}
    for tensor in reader.tensors:
        name = names.get(tensor.name)
        if len(tensor.shape) > 1:
            formats.add(tensor.tensor_type.name)
        if name in kept and tensor.tensor_type.name in KEPT:
            order = _order_of_rows(tensor, processor, names, config)
            if order is not None and tuple(parameters[name].shape) == _shape(tensor):
                key = orders.setdefault(order.tobytes(), f"order{len(orders)}")
                whole = bool((order == np.arange(len(order))).all())
                if not whole:
                    found.orders[key] = torch.from_numpy(order)
                rows, columns = _shape(tensor)
                found.entries.append(
                    BlockEntry(
                        name,
                        tensor.tensor_type.name,
                        rows,
                        columns,
                        int(tensor.data_offset),
                        None if whole else key,
                    )
                )
                continue
        _add_plain(found.plain, tensor, processor, names, config, parameters, dtype)
    if not found.entries:
        raise UserError(
            f"none of the file's matrices is in a format that is kept in blocks; they are "
            f"{', '.join(sorted(formats)) or 'not there'}",
            where=str(path),
            hint=f"kept are {', '.join(sorted(KEPT))}; use precision: auto, which converts the file",
        )
    return found


def _keeps(module: nn.Module) -> bool:
    """Whether a module's weight can stay in blocks: a plain linear layer or a plain embedding."""
    return type(module) is nn.Linear or type(module) is nn.Embedding


def _shape(tensor: ReaderTensor) -> tuple[int, ...]:
    """A tensor's shape, rows first; the file has columns first."""
    return tuple(int(size) for size in reversed(tensor.shape))


def _order_of_rows(
    tensor: ReaderTensor, processor: TensorProcessor, names: dict[str, str], config: dict[str, Any]
) -> np.ndarray | None:
    """int64 (rows): which stored row each row of the parameter is; None where rows do not stay whole."""
    rows, _ = _shape(tensor)
    # Numbers below 2^24 are exact in fp32. Two different columns tell a row from a column of a transpose.
    probe = np.stack([np.arange(rows), np.arange(rows) + rows], 1).astype(np.float32)
    try:
        result = processor.process(
            weights=probe,
            name=tensor.name,
            tensor_key_mapping=names,
            parsed_parameters={"config": config, "tensors": {}},
        )
    except Exception:  # a processor that expects the tensor's own width does more than move rows
        return None
    made = result.weights
    if result.name != tensor.name or not isinstance(made, np.ndarray) or made.shape != probe.shape:
        return None
    order = made[:, 0].astype(np.int64)
    moved = (np.sort(order) == np.arange(rows)).all() and (made == probe[order.clip(0, rows - 1)]).all()
    return order if moved else None


def _add_plain(
    plain: dict[str, Tensor],
    tensor: ReaderTensor,
    processor: TensorProcessor,
    names: dict[str, str],
    config: dict[str, Any],
    parameters: dict[str, nn.Parameter],
    dtype: torch.dtype,
) -> None:
    """De-quantize a tensor as transformers' reader does; one that the model does not have is left out."""
    parsed: dict[str, Any] = {"config": config, "tensors": {}}
    result = processor.process(
        weights=dequantize(tensor.data, tensor.tensor_type),
        name=tensor.name,
        tensor_key_mapping=names,
        parsed_parameters=parsed,
    )
    if parsed["tensors"]:
        raise UserError(
            f"'{tensor.name}' holds several parameters of the model, as experts do",
            where="precision",
            hint="precision: gguf is for models without experts; use precision: auto",
        )
    name = names.get(result.name or "")
    if name is None or result.weights is None or name not in parameters:
        return
    plain[name] = torch.from_numpy(np.array(result.weights)).to(dtype).view(parameters[name].shape)
