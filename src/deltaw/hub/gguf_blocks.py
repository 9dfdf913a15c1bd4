"""A model whose weights stay in the blocks of its ``.gguf`` file, read from there into memory as they are.

The folder that belongs to the file (``hub/gguf.py``) has the configuration, the index of the blocks and the
plain tensors. Layers take the places of the linear layers and embeddings whose weights are in the index, one
after another: bytes go from the file into the tensor that is kept, and no other form of them exists.

Knows folders, files and layers; not what a model is used for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltaw.cache import of_files
from deltaw.errors import UserError
from deltaw.hub.gguf_index import INDEX, ORDERS, BlockEntry
from deltaw.kernels.block_formats import FORMATS, BlockWeight
from deltaw.kernels.torch_private import own_parameters
from deltaw.lora.fingerprint import Values, note_values, values_of_blocks
from deltaw.lora.layers_blocks import BlockEmbedding, BlockLinear

# What the values of a file's blocks depend on, besides the file.
MADE_BY = ("transformers", "gguf", "deltaw.hub.gguf_index", "deltaw.hub.gguf_blocks", "deltaw.kernels")
# Bytes that are read at a time where rows are put into another order.
READ_AT_ONCE = 1 << 22


def entries_of(folder: Path) -> list[BlockEntry]:
    """The index of a folder.

    Raises:
        UserError: it cannot be read.
    """
    try:
        listed = json.loads((folder / INDEX).read_text(encoding="utf-8"))["parameters"]
        entries = [BlockEntry(**entry) for entry in listed]
        assert all(entry.format in FORMATS and entry.rows > 0 and entry.offset > 0 for entry in entries)
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise UserError(
            "the index of the file's blocks cannot be read",
            where=str(folder / INDEX),
            hint="remove the folder; it is made anew",
        ) from error
    return entries


def fill(model: PreTrainedModel, folder: Path, file: Path) -> list[str]:
    """Give a model its values: blocks from the file, plain tensors from the folder.

    Returns:
        names of the parameters that neither holds.

    Raises:
        UserError: the file is shorter than its index says, or was replaced.
    """
    orders = load_file(folder / ORDERS) if (folder / ORDERS).is_file() else {}
    known = set()
    try:
        with file.open("rb") as source:
            length = os.fstat(source.fileno()).st_size

            def read(entry: BlockEntry) -> Tensor:
                size = entry.rows * FORMATS[entry.format].bytes_of_row(entry.columns)
                if entry.offset + size > length:
                    raise UserError(
                        "the .gguf file is shorter than its own header says",
                        where=str(file),
                        hint="fetch the file again",
                    )
                return _read(source, entry, orders.get(entry.order or ""))

            entries = entries_of(folder)
            known |= put_blocks(model, entries, read)
    except OSError as error:
        raise UserError(
            f"the file cannot be read: {error.strerror or error}", where=str(file), hint="fetch it again"
        ) from error
    named = dict(model.named_parameters(remove_duplicate=False))
    told_by = [path for path in (file, folder / INDEX, folder / ORDERS) if path.is_file()]
    _note_values(model, told_by, {e.name: full for e in entries for full in _names_in(model, e.name, named)})
    with safe_open(folder / "model.safetensors", framework="pt") as plain, torch.no_grad():
        for name in plain.keys():  # noqa: SIM118 - it is no dictionary
            for full in _names_in(model, name, named):
                named[full].copy_(plain.get_tensor(name))
                known.add(full)
    tied = {id(named[name]) for name in known if name in named}
    return sorted(name for name, p in named.items() if name not in known and id(p) not in tied)


def _note_values(model: nn.Module, files: Sequence[Path], names: Mapping[str, str]) -> None:
    """Note on a model's weights the values that their blocks stand for, remembered until a file changes.

    Args:
        files: that the blocks and their order come from. names: of the weights in the model, by the entries'
            names.
    """

    def read() -> dict[str, Values]:
        layers = {entry: model.get_submodule(name.removesuffix(".weight")) for entry, name in names.items()}
        return {entry: values_of_blocks(layer) for entry, layer in layers.items()}

    for entry, (shape, digests) in of_files("blocks", files, read, MADE_BY).items():
        if entry in names:  # a model for another task may lack some
            note_values(model.get_parameter(names[entry]), Values(tuple(shape), tuple(digests)))


def put_blocks(
    model: PreTrainedModel, entries: Iterable[BlockEntry], read: Callable[[BlockEntry], Tensor] | None = None
) -> set[str]:
    """Put layers that keep their weights in blocks in the places that the index names.

    Args:
        read: gives an entry's bytes; without it, they are empty tensors, as a dry run has them.

    Returns:
        names of the parameters that are there now.
    """
    known: set[str] = set()
    modules = dict(model.named_modules())
    weights = {f"{name}.weight" for name in modules}
    for entry in entries:
        for name in _names_in(model, entry.name, weights):
            path = name.removesuffix(".weight")
            module = modules[path]
            width = FORMATS[entry.format].bytes_of_row(entry.columns)
            data = read(entry) if read is not None else torch.empty(entry.rows, width, dtype=torch.uint8)
            stored = BlockWeight(data, entry.format, entry.columns)
            tied = _tied_to(modules, module)
            layer = _layer(module, stored, None)
            _put(model, path, layer)
            known.add(name)
            for other, head in tied:
                shared = layer.get_parameter("weight")
                _put(model, other, _layer(head, stored, shared))
                known.add(f"{other}.weight")
    return known


def block_bytes(folder: Path) -> int:
    """Bytes of the blocks in a folder's index."""
    return sum(e.rows * FORMATS[e.format].bytes_of_row(e.columns) for e in entries_of(folder))


def _layer(module: nn.Module, stored: BlockWeight, parameter: nn.Parameter | None) -> nn.Module:
    if isinstance(module, nn.Embedding):
        return BlockEmbedding.of(module, stored)
    assert isinstance(module, nn.Linear)
    return BlockLinear.of(module, stored, parameter)


def _tied_to(modules: dict[str, nn.Module], module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Other linear layers that have the same weight."""
    weight = own_parameters(module)["weight"]
    return [
        (name, other)
        for name, other in modules.items()
        if other is not module
        and isinstance(other, nn.Linear)
        and own_parameters(other).get("weight") is weight
    ]


def _put(model: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def _names_in(model: PreTrainedModel, name: str, known: Container[str]) -> list[str]:
    """A causal language model's name in a model for another task, which has the same base model."""
    if name in known:
        return [name]
    bare = name.partition(".")[2]
    full = f"{model.base_model_prefix}.{bare}"
    return [full] if full in known else [bare] if bare in known else []


def _read(source: BinaryIO, entry: BlockEntry, order: Tensor | None) -> Tensor:
    """An entry's bytes (rows, bytes of a row), its rows in the model's order."""
    width = FORMATS[entry.format].bytes_of_row(entry.columns)
    data = torch.empty(entry.rows, width, dtype=torch.uint8)
    source.seek(entry.offset)
    if order is None:
        _read_into(source, data)
        return data
    places = torch.empty_like(order)
    places[order] = torch.arange(entry.rows)
    step = max(1, READ_AT_ONCE // width)
    for first in range(0, entry.rows, step):
        part = torch.empty(min(step, entry.rows - first), width, dtype=torch.uint8)
        _read_into(source, part)
        data[places[first : first + len(part)]] = part
    return data


def _read_into(source: BinaryIO, data: Tensor) -> None:
    """Fill a tensor from a file, whose pages the system need not keep."""
    view = data.numpy().data.cast("B")
    done = 0
    while done < len(view):
        count = source.readinto(view[done : done + READ_AT_ONCE])  # type: ignore[attr-defined]
        if not count:
            raise OSError("it ends early")
        done += count
