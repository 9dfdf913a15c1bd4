"""Conversion of ``.gguf`` files to folders of safetensors, with a cache.

Dequantizing takes much longer than loading, so the result is cached by the digest of the file. Tensors, configuration
and tokenizer are read by transformers. This module restores information that transformers ignores: the splitting of
digits, the terminators in the generation configuration, and the removal of quantization settings.

With precision ``gguf``, matrices remain in the file. The folder contains an index of their blocks and the few other
tensors.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
import torch
import transformers
from gguf import GGUFReader, ReaderTensor, dequantize
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import decoders, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from deltaw.cache import Cache, compute_for_files, file_digest, key
from deltaw.errors import UserError, first_line
from deltaw.hub import packages
from deltaw.hub.terminators import terminators
from deltaw.hub.transformers_private import detach_from_model_config, forget_origin, quiet
from deltaw.kernels.block_linear import FORMATS, BlockWeight
from deltaw.kernels.torch_private import direct_parameters
from deltaw.lora.fingerprint import TensorDigest, digest_blocks, record_digest
from deltaw.lora.layers_quantized import BlockEmbedding, BlockLinear
from deltaw.machine.choices import dtype_of
from deltaw.progress import track_progress
from deltaw.tensor_files import save_tensors

if not hasattr(gguf, "__version__"):
    # The metadata of gguf's wheel lacks its modules, so transformers reads this attribute in Python 3.10.
    vars(gguf)["__version__"] = metadata.version("gguf")

# Index of the blocks of each parameter in a ``.gguf`` file.
#
# An index entry contains the offset, the format and the row order of a parameter whose blocks can be used directly
# (``kernels/block_linear.py``). Some families store the rows of heads in another order. The order is determined by
# passing numbered rows through the tensor processors of transformers. All other tensors are stored in plain form.


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
    architecture, config = _field(reader, "general.architecture") or "", model.config.to_dict()
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config)
    names = get_gguf_hf_weights_map(model, processor)
    family = _ModelFamily(processor, names, config)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    # Only plain linear layers and embeddings support weights in blocks.
    block_parameters = {f"{name}.weight" for name, m in model.named_modules() if type(m) in (nn.Linear, nn.Embedding)}
    index = BlockIndex([], {}, {})
    formats: set[str] = set()
    orders: dict[bytes, str] = {}
    for tensor in reader.tensors:
        name, kind = names.get(tensor.name), tensor.tensor_type.name
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


def _field(reader: GGUFReader, name: str) -> str | None:
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


# Loading of models with weights in the blocks of a ``.gguf`` file.
#
# The converted folder contains the configuration, the block index and the plain tensors. Linear layers and embeddings
# in the index are replaced one at a time by layers with block weights, which are read directly from the file.


# Code that the digests of block values depend on, in addition to the file.
CACHE_DEPENDENCIES = ("transformers", "gguf", "deltaw.hub.gguf", "deltaw.kernels")
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


# Maximum size of all converted models. A larger model remains until the next conversion.
LIMIT_BYTES = 256 * 2**30
CONVERSION_DEPENDENCIES = (
    *("transformers", "gguf", "tokenizers", "torch", "safetensors", "numpy"),
    *("deltaw.hub.gguf", "deltaw.hub.terminators", "deltaw.tensor_files", "deltaw.kernels.block_linear"),
)

# llama.cpp's names of pre-tokenizers that split every digit.
_SINGLE_DIGITS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})
# llama.cpp's names of pre-tokenizers equivalent to GPT-2's, the fallback of transformers.
_GPT2_SPLITTING = frozenset({"gpt-2", "phi-2", "olmo", "mpt", "default", "jina-es", "jina-de", "roberta-bpe"})

# The child process gets this process's sys.path, so that its working directory cannot shadow packages.
_IMPORT = "import sys; sys.path[:] = sys.argv[4:]; from deltaw.hub.gguf import convert_in_process"
_CHILD = f"{_IMPORT}; sys.exit(convert_in_process(*sys.argv[1:4]))"


def converted_folder(gguf_path: Path, dtype: str, log: Callable[[str], None] = print) -> Path:
    """Return the folder of a converted ``.gguf`` file, converting it if it is not cached.

    The folder contains safetensors in ``dtype``, the tokenizer with its chat template, and a generation configuration
    with all terminators. It is created atomically. Concurrent processes wait for the first one.

    Args:
        gguf_path: Path of the file.
        dtype: Key of :data:`deltaw.machine.choices.PRECISIONS`.
        log: Receives a message if the file is converted.

    Raises:
        UserError: if the file is damaged, or transformers does not support its architecture.
    """
    cache, name, dtype = _cache_entry(gguf_path, dtype)

    def convert(folder: Path) -> None:
        action, suffix = ("reading the index of", "") if dtype == "gguf" else ("converting", f" to {dtype}")
        size = gguf_path.stat().st_size / 1e6
        log(f"{action} {gguf_path.name} ({size:.0f} MB){suffix}, once, into {cache.folder / name}")
        with track_progress(f"converting {gguf_path.name}"):
            _convert_in_child(gguf_path, dtype, folder, log)

    return cache.create_folder(name, convert)


def _cache_entry(path: Path, dtype: str) -> tuple[Cache, str, str]:
    """Return the cache, the key of a converted file, and the type of its tensors."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        message, hint = f"the file cannot be read: {error.strerror or error}", "check its path and permissions"
        raise UserError(message, location=str(path), hint=hint) from error
    if magic != b"GGUF":
        raise UserError("the file is not a .gguf file", location=str(path), hint="download the file again")
    cache = Cache("gguf", LIMIT_BYTES, mark="{}", folder=packages.cache_folder() / "gguf")
    if dtype in ("int8", "nf4"):
        dtype = "bf16"  # quantized after loading
    with track_progress(f"checking {path.name}"):
        digest = file_digest(path)
    return cache, f"{digest[:16]}-{dtype}-{key('gguf', [digest, dtype], CONVERSION_DEPENDENCIES)[:16]}", dtype


def tokenizer_of(path: Path, dtype: str) -> Path | PreTrainedTokenizerFast:
    """Return the tokenizer of a .gguf file without converting weights, or the folder of an earlier conversion.

    Raises:
        UserError: if it cannot be read.
    """
    cache, name, _ = _cache_entry(path, dtype)
    if (cache.folder / name).is_dir():
        return cache.folder / name
    with _cached_parsing():
        return _tokenizer(path)[0]


def restore_digit_splitting(tokenizer: PreTrainedTokenizerFast, pre: str | None) -> bool:
    """Set the pre-tokenizer that the vocabulary was trained with. Return False if it is unknown.

    A GGUF file contains only its name (``tokenizer.ggml.pre``). transformers uses GPT-2's pre-tokenizer for unknown
    names, which joins spaces and line breaks with a following digit. Texts would then have other tokens than in
    training.
    """
    backend = tokenizer.backend_tokenizer
    if pre in _SINGLE_DIGITS:
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
        return True
    # transformers uses a Sequence for known names, and a plain ByteLevel as its fallback.
    is_fallback = isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel)
    return not is_fallback or pre is None or pre in _GPT2_SPLITTING


def _convert_in_child(path: Path, dtype: str, target: Path, log: Callable[[str], None]) -> None:
    """Convert in a child process, so that its memory is released completely.

    A conversion needs several times the memory of the model and would otherwise determine the peak memory of a run.
    """
    command = [sys.executable, "-c", _CHILD, str(path.resolve()), dtype, str(target), *filter(None, sys.path)]
    completed = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    for entry in (json.loads(line) for line in completed.stdout.splitlines() if line.startswith('{"')):
        if "note" in entry:
            log(entry["note"])
        if "what" in entry:
            raise UserError(entry["what"], location=entry["where"], hint=entry["hint"])
    if completed.returncode < 0:
        hint = "the conversion needs more memory than the model: free some, or convert on a larger machine"
        raise UserError(f"conversion was stopped by signal {-completed.returncode}", location=str(path), hint=hint)
    if completed.returncode:
        raise RuntimeError(f"converting '{path}' failed:\n{completed.stderr[-2000:]}")


def convert_in_process(path: str, dtype: str, target: str) -> int:
    """Convert a file in the child process and report to standard output, with one JSON object per line.

    Returns:
        Exit status: 0 on success, 2 for a UserError, which is the last object in the output.
    """
    output = sys.stdout
    try:
        # Libraries may print to standard output, which is reserved for the JSON objects.
        sink = io.StringIO()
        with quiet(), _cached_parsing(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            model = _meta_model(Path(path)) if dtype == "gguf" else _model(Path(path), dtype_of(dtype))
            _clean_config(model)
            tokenizer, note = _tokenizer(Path(path))
            terminator_ids = terminators(model, tokenizer)
            if model.generation_config is not None and terminator_ids:
                model.generation_config.eos_token_id = terminator_ids if len(terminator_ids) > 1 else terminator_ids[0]
                # Otherwise transformers regenerates it from the model's configuration, which has only one terminator.
                detach_from_model_config(model.generation_config)
            if dtype == "gguf":
                _save_index(Path(path), model, Path(target))
            else:
                model.save_pretrained(target)
            tokenizer.save_pretrained(target)
    except UserError as error:
        print(json.dumps({"what": error.message, "where": error.location, "hint": error.hint}), file=output)
        return 2
    if note:
        print(json.dumps({"note": note}), file=output)
    return 0


@contextlib.contextmanager
def _cached_parsing() -> Iterator[None]:
    """Cache the parsed header and the tensor names of a file within the block.

    transformers parses the header for the configuration, the weights and the tokenizer, and maps names for each module,
    which takes half of the conversion time of a small model.
    """
    originals = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    vars(gguf).update({name: functools.cache(function) for name, function in originals.items()})
    try:
        yield
    finally:
        vars(gguf).update(originals)


def _model(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    # Newer versions of transformers do not dequantize blocks by default.
    packed = getattr(transformers, "GgufConfig", None)
    options = {} if packed is None else {"quantization_config": packed(dequantize=True)}
    options |= {"gguf_file": path.name, "dtype": dtype, "local_files_only": True}
    with _report_damage(path, "converted"):
        return AutoModelForCausalLM.from_pretrained(path.parent, **options)


def _meta_model(path: Path) -> PreTrainedModel:
    """Build the model of the file's configuration on the meta device."""
    with _report_damage(path, "read"):
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


@contextlib.contextmanager
def _report_damage(path: Path, operation: str, part: str = "the .gguf file") -> Iterator[None]:
    """Convert any exception in the block to a UserError about a damaged file.

    Args:
        path: Path of the file.
        operation: Participle of the failed operation, for example "read".
        part: Name of the part that is read.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        hint = "download the file again, or use the model's safetensors folder"
        raise UserError(f"{part} cannot be {operation}: {first_line(error)}", location=str(path), hint=hint) from error


def _save_index(path: Path, model: PreTrainedModel, target: Path) -> None:
    """Write the configurations, the block index, and the plain tensors."""
    index = index_parameters(path, model, torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(target)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(target)
    save_tensors(target / "model.safetensors", index.plain, {"format": "pt"})
    save_tensors(target / ORDERS, index.orders, {})
    lines = {"parameters": [asdict(entry) for entry in index.entries]}
    (target / INDEX).write_text(json.dumps(lines), encoding="utf-8")


def _clean_config(model: PreTrainedModel) -> None:
    """Remove settings that only apply to reading the GGUF file from a model's configuration."""
    # With this setting, loaders would expect quantized blocks.
    for owner, name in ((model.config, "quantization_config"), (model, "hf_quantizer")):
        if hasattr(owner, name):
            delattr(owner, name)
    model.__dict__.pop("is_quantized", None)
    forget_origin(model.config)
    # GGUF stores fp32 values: 1e-05 is read as 9.999999747378752e-06.
    for name, value in vars(model.config).items():
        if isinstance(value, float):
            setattr(model.config, name, float(str(np.float32(value))))


def _tokenizer(path: Path) -> tuple[PreTrainedTokenizerFast, str | None]:
    """Return the tokenizer, and a note for the user if its splitting is unknown."""
    with _report_damage(path, "read", "the tokenizer inside the .gguf file"):
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        hint = "use the model's safetensors folder"
        raise UserError("the type of the .gguf file's tokenizer is not supported", location=str(path), hint=hint)
    # Do not save settings of this call.
    for name in ("local_files_only", "is_local"):
        tokenizer.init_kwargs.pop(name, None)
    header = gguf.GGUFReader(str(path))
    end = _field(header, "tokenizer.ggml.eos_token_id")
    if end is not None and end.isdecimal() and int(end) < len(tokenizer):
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(int(end))  # transformers 5.11 sets another token
    kind, pre = _field(header, "tokenizer.ggml.model"), _field(header, "tokenizer.ggml.pre")
    if kind == "gpt2":
        tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()  # transformers 5.11 drops a leading space
    if kind == "gpt2" and not restore_digit_splitting(tokenizer, pre):
        effect = "so some texts have other tokens than in training. The safetensors folder has the exact tokenizer."
        return tokenizer, f"note: the file's pre-tokenizer '{pre}' is not supported and replaced by GPT-2's, {effect}"
    return tokenizer, None
