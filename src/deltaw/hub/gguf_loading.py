"""Loading of models with weights in the blocks of a ``.gguf`` file.

The converted folder contains the configuration, the block index and the plain tensors. Linear layers and embeddings in
the index are replaced one at a time by layers with block weights, which are read directly from the file.
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

from deltaw.cache.results import compute_for_files
from deltaw.errors import UserError
from deltaw.hub.gguf_blocks import INDEX, ORDERS, GGUFBlockTensor
from deltaw.kernels.block_linear import FORMATS, BlockWeight
from deltaw.kernels.torch_modules import direct_parameters
from deltaw.lora.fingerprint import TensorDigest, digest_blocks, record_digest
from deltaw.lora.layers_quantized import BlockEmbedding, BlockLinear

# Code that the digests of block values depend on, in addition to the file.
CACHE_DEPENDENCIES = ("transformers", "gguf", "deltaw.hub.gguf_blocks", "deltaw.hub.gguf_loading", "deltaw.kernels")
# Bytes to read at once while reordering rows.
READ_BYTES = 1 << 22


def read_block_index(folder: Path) -> list[GGUFBlockTensor]:
    """Read the block index of a folder.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        listed = json.loads((folder / INDEX).read_text(encoding="utf-8"))["parameters"]
        entries = [GGUFBlockTensor(**entry) for entry in listed]
        assert all(entry.format in FORMATS and entry.rows > 0 and entry.offset > 0 for entry in entries)
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        message = "the block index cannot be read"
        raise UserError(message, location=str(folder / INDEX), hint="remove the folder to convert it again") from error
    return entries


def fill_from_blocks(model: PreTrainedModel, folder: Path, file: Path) -> list[str]:
    """Load the values of a model: blocks from the file, plain tensors from the folder.

    Returns:
        Names of parameters that are missing from both.

    Raises:
        UserError: if the file is truncated or was replaced.
    """
    orders = load_file(folder / ORDERS) if (folder / ORDERS).is_file() else {}
    entries = read_block_index(folder)
    try:
        with file.open("rb") as source:
            length = os.fstat(source.fileno()).st_size
            if any(entry.offset + entry.bytes > length for entry in entries):
                raise UserError("the file is truncated", location=str(file), hint="download the file again")
            loaded = insert_block_layers(model, entries, lambda e: _read(source, e, orders.get(e.order or "")))
    except OSError as error:
        hint = "download it again"
        raise UserError(f"the file cannot be read: {error.strerror or error}", location=str(file), hint=hint) from error
    parameters = dict(model.named_parameters(remove_duplicate=False))
    files = [path for path in (file, folder / INDEX, folder / ORDERS) if path.is_file()]
    _record_digests(model, files, {e.name: full for e in entries for full in _names_in(model, e.name, parameters)})
    with safe_open(folder / "model.safetensors", framework="pt") as plain, torch.no_grad():
        for name in plain.keys():  # noqa: SIM118 - not a dictionary
            for full in _names_in(model, name, parameters):
                parameters[full].copy_(plain.get_tensor(name))
                loaded.add(full)
    tied = {id(parameters[name]) for name in loaded if name in parameters}
    return sorted(name for name, p in parameters.items() if name not in loaded and id(p) not in tied)


def _record_digests(model: nn.Module, files: Sequence[Path], names: Mapping[str, str]) -> None:
    """Record the digests of dequantized block values on a model's weights. They are cached until a file changes.

    Args:
        model: Model with block layers.
        files: Files with the blocks and their order.
        names: Names of the weights in the model by names of the index entries.
    """

    def read() -> dict[str, TensorDigest]:
        layers = {entry: model.get_submodule(name.removesuffix(".weight")) for entry, name in names.items()}
        return {entry: digest_blocks(layer) for entry, layer in layers.items()}

    for entry, (shape, digests) in compute_for_files("blocks", files, read, CACHE_DEPENDENCIES).items():
        if entry in names:  # models for other tasks may lack some weights
            record_digest(model.get_parameter(names[entry]), TensorDigest(tuple(shape), tuple(digests)))


def insert_block_layers(
    model: PreTrainedModel, entries: Iterable[GGUFBlockTensor], read: Callable[[GGUFBlockTensor], Tensor] | None = None
) -> set[str]:
    """Replace the indexed modules by layers with block weights.

    Args:
        model: Model to modify.
        entries: Block index.
        read: Returns the bytes of an entry. None creates empty tensors, for dry runs.

    Returns:
        Names of the replaced parameters.
    """
    replaced: set[str] = set()
    modules = dict(model.named_modules())
    weights = {f"{name}.weight" for name in modules}
    for entry in entries:
        for name in _names_in(model, entry.name, weights):
            path = name.removesuffix(".weight")
            module = modules[path]
            data = torch.empty(entry.rows, entry.width, dtype=torch.uint8) if read is None else read(entry)
            stored = BlockWeight(data, entry.format, entry.columns)
            weight = direct_parameters(module)["weight"]
            linear = [(n, m) for n, m in modules.items() if isinstance(m, nn.Linear) and m is not module]
            tied = [(n, m) for n, m in linear if direct_parameters(m).get("weight") is weight]
            is_embedding = isinstance(module, nn.Embedding)
            layer = BlockEmbedding.of(module, stored) if is_embedding else BlockLinear.of(module, stored)
            model.set_submodule(path, layer)
            replaced.add(name)
            for other, head in tied:
                model.set_submodule(other, BlockLinear.of(head, stored, layer.get_parameter("weight")))
                replaced.add(f"{other}.weight")
    return replaced


def block_bytes(folder: Path) -> int:
    """Return the total size of the blocks in a folder's index in bytes."""
    return sum(entry.bytes for entry in read_block_index(folder))


def _names_in(model: PreTrainedModel, name: str, known: Container[str]) -> list[str]:
    """Return the names of a causal language model's parameter in a model for another task with the same backbone."""
    if name in known:
        return [name]
    bare = name.partition(".")[2]
    full = f"{model.base_model_prefix}.{bare}"
    return [full] if full in known else [bare] if bare in known else []


def _read(source: BinaryIO, entry: GGUFBlockTensor, order: Tensor | None) -> Tensor:
    """Read the bytes of an entry as (rows, bytes per row), in the model's row order."""
    source.seek(entry.offset)
    if order is None:
        return _read_rows(source, entry.rows, entry.width)
    data = torch.empty(entry.rows, entry.width, dtype=torch.uint8)
    for row_indices in order.argsort().split(max(1, READ_BYTES // entry.width)):
        data[row_indices] = _read_rows(source, len(row_indices), entry.width)
    return data


def _read_rows(source: BinaryIO, rows: int, width: int) -> Tensor:
    """Read the next (rows, width) bytes of a file without caching its pages."""
    data = torch.empty(rows, width, dtype=torch.uint8)
    view = data.numpy().data.cast("B")
    filled = 0
    while filled < len(view):
        count = source.readinto(view[filled : filled + READ_BYTES])  # type: ignore[attr-defined]
        if not count:
            raise OSError("unexpected end of file")
        filled += count
    return data
