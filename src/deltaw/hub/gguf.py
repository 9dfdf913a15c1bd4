"""A ``.gguf`` file becomes a folder of safetensors, once.

De-quantizing takes far longer than loading, so its result is kept in the cache under the file's own
digest, and every later run loads the folder. The tensors, the configuration and the tokenizer come from
transformers' reader; what it leaves out is restored here: the tokenizer's splitting of digits, the
terminators in the generation configuration, and the mark of a quantization that is no longer there.

With precision ``gguf`` the folder holds no matrices: an index says where their blocks lie in the file
(``gguf_index``), and the few plain tensors stand beside it.

It does not know what a model is used for, nor how one is loaded from a folder.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
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

from deltaw import durable, platforms
from deltaw.cache import Cache, file_digest, key, of_files
from deltaw.errors import UserError, first_line
from deltaw.hub import packages
from deltaw.hub.quiet import quiet
from deltaw.hub.terminators import terminators
from deltaw.hub.transformers_private import forget_origin, settle
from deltaw.kernels.block_linear import FORMATS, BlockWeight
from deltaw.kernels.torch_private import own_parameters
from deltaw.lora.fingerprint import Values, note_values, values_of_blocks
from deltaw.lora.layers_quantized import BlockEmbedding, BlockLinear
from deltaw.machine.choices import dtype_of
from deltaw.tensor_files import save_tensors
from deltaw.working import working

if not hasattr(gguf, "__version__"):
    # gguf's wheel does not list its modules, so in Python 3.10 transformers looks for its version here.
    vars(gguf)["__version__"] = metadata.version("gguf")

# Where each parameter's numbers lie in a ``.gguf`` file, told without reading them all.
#
# A parameter whose rows are stored in blocks that are kept as they are (``kernels/block_linear.py``) is an
# entry: its place in the file, its format, and the order of its rows, since some families store heads' rows in
# another order. What a family does to its tensors is transformers' own knowledge (its tensor processors). It is
# asked about numbered rows: where these come back whole, each somewhere, the order of the rows is known. All
# other tensors are few and small, or are processed otherwise, and become plain numbers.
#
# Runs in the process that converts a file; knows files and names, not layers.


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

    @property
    def width(self) -> int:
        """Bytes of a row."""
        return FORMATS[self.format].bytes_of_row(self.columns)

    @property
    def bytes(self) -> int:
        """Of all rows."""
        return self.rows * self.width


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
    reader = gguf.GGUFReader(str(path))
    architecture, config = _field(reader, "general.architecture") or "", model.config.to_dict()
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config)
    names = get_gguf_hf_weights_map(model, processor)
    family = _Family(processor, names, config)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    # A plain linear layer or a plain embedding can keep its weight in blocks.
    kept = {f"{name}.weight" for name, module in model.named_modules() if type(module) in (nn.Linear, nn.Embedding)}
    found = Indexed([], {}, {})
    formats: set[str] = set()
    orders: dict[bytes, str] = {}
    for tensor in reader.tensors:
        name = names.get(tensor.name)
        if len(tensor.shape) > 1:
            formats.add(tensor.tensor_type.name)
        order = None
        if name in kept and tensor.tensor_type.name in KEPT and tuple(parameters[name].shape) == _shape(tensor):
            order = family.order_of_rows(tensor)
        if name is None or order is None:
            if (plain := family.plain(tensor)) is not None and plain[0] in parameters:
                found.plain[plain[0]] = plain[1].to(dtype).view(parameters[plain[0]].shape)
            continue
        key = None
        if (order != np.arange(len(order))).any():
            key = orders.setdefault(order.tobytes(), f"order{len(orders)}")
            found.orders[key] = torch.from_numpy(order)
        rows, columns = _shape(tensor)
        entry = BlockEntry(name, tensor.tensor_type.name, rows, columns, int(tensor.data_offset), key)
        found.entries.append(entry)
    if not found.entries:
        there = ", ".join(sorted(formats)) or "not there"
        what = f"none of the file's matrices is in a format that is kept in blocks; they are {there}"
        hint = f"kept are {', '.join(sorted(KEPT))}; use precision: auto, which converts the file"
        raise UserError(what, where=str(path), hint=hint)
    return found


def _field(reader: GGUFReader, name: str) -> str | None:
    """What a file's header says under a name; None where it says nothing."""
    field = reader.get_field(name)
    return None if field is None else str(field.contents())


def _shape(tensor: ReaderTensor) -> tuple[int, ...]:
    """A tensor's shape, rows first; the file has columns first."""
    return tuple(int(size) for size in reversed(tensor.shape))


@dataclass(frozen=True)
class _Family:
    """What transformers' reader does to the tensors of a family of models."""

    processor: TensorProcessor
    names: dict[str, str]
    config: dict[str, Any]

    def _processed(self, tensor: ReaderTensor, weights: np.ndarray) -> tuple[str | None, Any, dict[str, Any]]:
        """The name and values that a tensor's values come to, and others made of them."""
        parsed: dict[str, Any] = {"config": self.config, "tensors": {}}
        result = self.processor.process(
            weights=weights, name=tensor.name, tensor_key_mapping=self.names, parsed_parameters=parsed
        )
        return result.name, result.weights, parsed["tensors"]

    def order_of_rows(self, tensor: ReaderTensor) -> np.ndarray | None:
        """int64 (rows): which stored row each row of the parameter is; None where rows do not stay whole."""
        rows, _ = _shape(tensor)
        # Numbers below 2^24 are exact in fp32. Two different columns tell a row from a column of a transpose.
        probe = np.stack([np.arange(rows), np.arange(rows) + rows], 1).astype(np.float32)
        try:
            name, made, _ = self._processed(tensor, probe)
        except Exception:  # a processor that expects the tensor's own width does more than move rows
            return None
        if name != tensor.name or not isinstance(made, np.ndarray) or made.shape != probe.shape:
            return None
        order = made[:, 0].astype(np.int64)
        moved = (np.sort(order) == np.arange(rows)).all() and (made == probe[order.clip(0, rows - 1)]).all()
        return order if moved else None

    def plain(self, tensor: ReaderTensor) -> tuple[str, Tensor] | None:
        """A parameter's name and its numbers, de-quantized; None where the tensor is none."""
        name, made, several = self._processed(tensor, dequantize(tensor.data, tensor.tensor_type))
        if several:
            what = f"'{tensor.name}' holds several parameters of the model, as experts do"
            raise UserError(what, where="precision: gguf", hint="use precision: auto for models with experts")
        name = self.names.get(name or "")
        return None if name is None or made is None else (name, torch.from_numpy(np.array(made)))


# A model whose weights stay in the blocks of its ``.gguf`` file, read from there into memory as they are.
#
# The folder that belongs to the file (``hub/gguf.py``) has the configuration, the index of the blocks and the
# plain tensors. Layers take the places of the linear layers and embeddings whose weights are in the index, one
# after another: bytes go from the file into the tensor that is kept, and no other form of them exists.
#
# Knows folders, files and layers; not what a model is used for.


# What the values of a file's blocks depend on, besides the file.
MADE_BY = ("transformers", "gguf", "deltaw.hub.gguf", "deltaw.kernels")
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
        what = "the index of the file's blocks cannot be read"
        raise UserError(what, where=str(folder / INDEX), hint="remove the folder; it is made anew") from error
    return entries


def fill(model: PreTrainedModel, folder: Path, file: Path) -> list[str]:
    """Give a model its values: blocks from the file, plain tensors from the folder.

    Returns:
        names of the parameters that neither holds.

    Raises:
        UserError: the file is shorter than its index says, or was replaced.
    """
    orders = load_file(folder / ORDERS) if (folder / ORDERS).is_file() else {}
    entries = entries_of(folder)
    try:
        with file.open("rb") as source:
            length = os.fstat(source.fileno()).st_size
            if any(entry.offset + entry.bytes > length for entry in entries):
                raise UserError("it is shorter than its own header says", where=str(file), hint="fetch the file again")
            known = put_blocks(model, entries, lambda entry: _read(source, entry, orders.get(entry.order or "")))
    except OSError as error:
        hint = "fetch it again"
        raise UserError(f"the file cannot be read: {error.strerror or error}", where=str(file), hint=hint) from error
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
            data = torch.empty(entry.rows, entry.width, dtype=torch.uint8) if read is None else read(entry)
            stored = BlockWeight(data, entry.format, entry.columns)
            tied = _tied_to(modules, module)
            is_embedding = isinstance(module, nn.Embedding)
            layer = BlockEmbedding.of(module, stored) if is_embedding else BlockLinear.of(module, stored)
            model.set_submodule(path, layer)
            known.add(name)
            for other, head in tied:
                model.set_submodule(other, BlockLinear.of(head, stored, layer.get_parameter("weight")))
                known.add(f"{other}.weight")
    return known


def block_bytes(folder: Path) -> int:
    """Bytes of the blocks in a folder's index."""
    return sum(entry.bytes for entry in entries_of(folder))


def _tied_to(modules: dict[str, nn.Module], module: nn.Module) -> list[tuple[str, nn.Linear]]:
    """Other linear layers that have the same weight."""
    weight = own_parameters(module)["weight"]
    return [
        (name, other)
        for name, other in modules.items()
        if other is not module and isinstance(other, nn.Linear) and own_parameters(other).get("weight") is weight
    ]


def _names_in(model: PreTrainedModel, name: str, known: Container[str]) -> list[str]:
    """A causal language model's name in a model for another task, which has the same base model."""
    if name in known:
        return [name]
    bare = name.partition(".")[2]
    full = f"{model.base_model_prefix}.{bare}"
    return [full] if full in known else [bare] if bare in known else []


def _read(source: BinaryIO, entry: BlockEntry, order: Tensor | None) -> Tensor:
    """An entry's bytes (rows, bytes of a row), its rows in the model's order."""
    source.seek(entry.offset)
    if order is None:
        return _read_rows(source, entry.rows, entry.width)
    data = torch.empty(entry.rows, entry.width, dtype=torch.uint8)
    for part_of in order.argsort().split(max(1, READ_AT_ONCE // entry.width)):
        data[part_of] = _read_rows(source, len(part_of), entry.width)
    return data


def _read_rows(source: BinaryIO, rows: int, width: int) -> Tensor:
    """The next (rows, width) bytes of a file, whose pages the system need not keep."""
    data = torch.empty(rows, width, dtype=torch.uint8)
    view = data.numpy().data.cast("B")
    done = 0
    while done < len(view):
        count = source.readinto(view[done : done + READ_AT_ONCE])  # type: ignore[attr-defined]
        if not count:
            raise OSError("it ends early")
        done += count
    return data


# All converted models together; a larger one is kept until the next is converted.
LIMIT_BYTES = 256 * 2**30
CONVERTED_BY = (
    *("transformers", "gguf", "tokenizers", "torch", "safetensors", "numpy"),
    *("deltaw.hub.gguf", "deltaw.hub.terminators", "deltaw.tensor_files", "deltaw.kernels.block_linear"),
)

# Vocabularies learned with every digit on its own, under the names that llama.cpp gives them.
_SINGLE_DIGITS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})
# Vocabularies split the way GPT-2's is, which is what transformers falls back to.
_LIKE_GPT2 = frozenset({"gpt-2", "phi-2", "olmo", "mpt", "default", "jina-es", "jina-de", "roberta-bpe"})

# The child takes this process's search path whole: its working folder must not come before the packages.
_CHILD = (
    "import sys; sys.path[:] = sys.argv[4:]; "
    "from deltaw.hub.gguf import convert_here; sys.exit(convert_here(*sys.argv[1:4]))"
)


def converted(gguf_path: Path, dtype: str, say: Callable[[str], None] = print) -> Path:
    """The folder that ``gguf_path`` de-quantizes to, made now if it is not in the cache.

    The folder holds safetensors in ``dtype``, the tokenizer with its chat template, and a generation
    configuration with all terminators. It appears whole or not at all; a second process that wants the
    same one waits for the first.

    Args:
        gguf_path: the file.
        dtype: a key of :data:`deltaw.machine.choices.PRECISIONS`.
        say: told in one line what is being done, when it is done.

    Raises:
        UserError: the file is damaged, or of an architecture that transformers does not read.
    """
    cache, name, dtype = _place(gguf_path, dtype)
    target = cache.folder / name
    if not target.is_dir():
        try:
            _convert(gguf_path, dtype, cache, name, say)
        except OSError as error:
            what = f"cannot keep the converted model: {error.strerror or error}"
            hint = "free space there, or choose another cache folder"
            raise UserError(what, where=str(cache.folder), hint=hint) from error
    cache.used(name)
    return target


def _place(path: Path, dtype: str) -> tuple[Cache, str, str]:
    """The cache and the name in it of what a .gguf file de-quantizes to, and the type that it is kept in."""
    _require_gguf(path)
    cache = Cache("gguf", LIMIT_BYTES, mark="{}", folder=packages.cache_folder() / "gguf")
    if dtype in ("int8", "nf4"):
        dtype = "bf16"  # they are made from bf16 once it is loaded
    with working(f"checking {path.name}"):
        digest = file_digest(path)
    return cache, f"{digest[:16]}-{dtype}-{key('gguf', [digest, dtype], CONVERTED_BY)[:16]}", dtype


def tokenizer_of(path: Path, dtype: str) -> Path | PreTrainedTokenizerFast:
    """The tokenizer of a .gguf file, without its weights; where they were converted before, the folder with it.

    Raises:
        UserError: it cannot be read.
    """
    cache, name, _ = _place(path, dtype)
    if (cache.folder / name).is_dir():
        return cache.folder / name
    with _parsed_once():
        return _tokenizer(path)[0]


def _convert(path: Path, dtype: str, cache: Cache, name: str, say: Callable[[str], None]) -> None:
    """Make the entry ``name``, unless another process makes it meanwhile."""
    lock = cache.lock(name)
    try:
        if (cache.folder / name).is_dir():
            return
        way, to = ("reading the index of", "") if dtype == "gguf" else ("converting", f" to {dtype}")
        say(f"{way} {path.name} ({path.stat().st_size / 1e6:.0f} MB){to}, once, into {cache.folder / name}")
        cache.make_room(but=name)
        _build(path, dtype, cache.folder / name, say)
    finally:
        lock.release()


def split_of_digits_restored(tokenizer: PreTrainedTokenizerFast, pre: str | None) -> bool:
    """Give the tokenizer the splitting that its vocabulary was learned with; False if it is not known.

    A GGUF names the splitting (``tokenizer.ggml.pre``) instead of holding it. transformers knows some of
    the names and takes GPT-2's for the rest, which joins a run of spaces or line breaks to the digit behind
    it: the same text then becomes other tokens than those the model was trained on.
    """
    backend = tokenizer.backend_tokenizer
    if pre in _SINGLE_DIGITS:
        letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), letters])
        return True
    # transformers sets a sequence where it knows the name; the bare byte level is its fallback.
    fell_back = isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel)
    return not fell_back or pre is None or pre in _LIKE_GPT2


def _build(path: Path, dtype: str, target: Path, say: Callable[[str], None]) -> None:
    """Convert into a folder beside ``target`` and rename it into place."""
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
    try:
        with working(f"converting {path.name}"):
            _convert_in_child(path, dtype, partial, say)
        for file in partial.iterdir():
            file.chmod(0o644)
            durable.sync_file(file)
        partial.chmod(0o755)
        platforms.renamed(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _convert_in_child(path: Path, dtype: str, into: Path, say: Callable[[str], None]) -> None:
    """Convert in a process of its own, which gives all of its memory back.

    Converting holds the model several times over. Done here, it would stay the peak of a run that itself
    needs far less, and a run could not be kept within what was planned for it.
    """
    command = [sys.executable, "-c", _CHILD, str(path.resolve()), dtype, str(into), *filter(None, sys.path)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    for entry in (json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')):
        if "note" in entry:
            say(entry["note"])
        if "what" in entry:
            raise UserError(entry["what"], where=entry["where"], hint=entry["hint"])
    if done.returncode < 0:
        hint = "it needs more memory than the model itself: free some, or convert where there is more"
        raise UserError(f"converting the file was stopped by signal {-done.returncode}", where=str(path), hint=hint)
    if done.returncode:
        raise RuntimeError(f"converting '{path}' failed:\n{done.stderr[-2000:]}")


def convert_here(path: str, dtype: str, into: str) -> int:
    """What the child process does: convert, and report on standard output, a JSON object a line.

    Returns:
        The exit status: 0 done, 2 a user's error, which is the last object printed.
    """
    answers = sys.stdout
    try:
        # The model library prints where it likes; only this function's own lines are an answer.
        with (
            quiet(),
            _parsed_once(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            model = _without_values(Path(path)) if dtype == "gguf" else _model(Path(path), dtype_of(dtype))
            tokenizer, note = _tokenizer(Path(path))
            _set_terminators(model, tokenizer)
            if dtype == "gguf":
                _save_index(Path(path), model, Path(into))
            else:
                model.save_pretrained(into)
            tokenizer.save_pretrained(into)
    except UserError as error:
        print(json.dumps({"what": error.what, "where": error.where, "hint": error.hint}), file=answers)
        return 2
    if note:
        print(json.dumps({"note": note}), file=answers)
    return 0


@contextlib.contextmanager
def _parsed_once() -> Iterator[None]:
    """While open, a file's header is parsed once and its names are mapped once. transformers does the one for the
    configuration, the weights and the tokenizer, the other for each module: half of a small model's conversion."""
    made = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    vars(gguf).update({name: functools.cache(of) for name, of in made.items()})
    try:
        yield
    finally:
        vars(gguf).update(made)


def _model(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    # Newer versions of transformers can keep the blocks packed; a trained model needs them unpacked.
    packed = getattr(transformers, "GgufConfig", None)
    extra = {} if packed is None else {"quantization_config": packed(dequantize=True)}
    with _damage_named(path, "converted"):
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=dtype, local_files_only=True, **extra
        )
    _clean(model)
    return model


def _without_values(path: Path) -> PreTrainedModel:
    """The model of the file's configuration on the meta device."""
    with _damage_named(path, "read"):
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    _clean(model)
    return model


@contextlib.contextmanager
def _damage_named(path: Path, done: str, what: str = "the .gguf file") -> Iterator[None]:
    """Make a UserError of what a damaged file lets its readers raise, whatever they stumble over.

    Args:
        done: what is done to the file meanwhile, as "read". what: of it is read.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        hint = "fetch the file again, or give the model's safetensors folder instead"
        raise UserError(f"{what} cannot be {done}: {first_line(error)}", where=str(path), hint=hint) from error


def _save_index(path: Path, model: PreTrainedModel, into: Path) -> None:
    """Write the configurations, the index, and the tensors that do not stay in blocks."""
    found = indexed(path, model, torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(into)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(into)
    save_tensors(into / "model.safetensors", found.plain, {"format": "pt"})
    save_tensors(into / ORDERS, found.orders, {})
    lines = {"parameters": [asdict(entry) for entry in found.entries]}
    (into / INDEX).write_text(json.dumps(lines), encoding="utf-8")


def _clean(model: PreTrainedModel) -> None:
    """Take out of a model's configuration what is of its reading alone."""
    # The mark of the quantization makes every later loader look for packed blocks.
    for owner, name in ((model.config, "quantization_config"), (model, "hf_quantizer")):
        if hasattr(owner, name):
            delattr(owner, name)
    model.__dict__.pop("is_quantized", None)
    forget_origin(model.config)
    # A GGUF keeps its numbers in 32 bits: 1e-05 comes back as 9.999999747378752e-06.
    for name, value in vars(model.config).items():
        if isinstance(value, float):
            setattr(model.config, name, float(str(np.float32(value))))


def _tokenizer(path: Path) -> tuple[PreTrainedTokenizerFast, str | None]:
    """The tokenizer, and what to say about it."""
    with _damage_named(path, "read", "the tokenizer inside the .gguf file"):
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        hint = "give the model's safetensors folder instead"
        raise UserError("the .gguf file's tokenizer is of a kind that cannot be saved", where=str(path), hint=hint)
    # How it was read just now is nobody's business later.
    for name in ("local_files_only", "is_local"):
        tokenizer.init_kwargs.pop(name, None)
    header = gguf.GGUFReader(str(path))
    end = _field(header, "tokenizer.ggml.eos_token_id")
    if end is not None and end.isdecimal() and int(end) < len(tokenizer):
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(int(end))  # transformers 5.11 takes another token
    kind, pre = _field(header, "tokenizer.ggml.model"), _field(header, "tokenizer.ggml.pre")
    if kind == "gpt2":
        tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()  # that of transformers 5.11 drops a first space
    if kind == "gpt2" and not split_of_digits_restored(tokenizer, pre):
        return tokenizer, (
            f"note: the file splits text as '{pre}', which is not known here; it is split as GPT-2 does, so "
            "some texts become other tokens than in training. The model's own folder has the exact tokenizer."
        )
    return tokenizer, None


def _set_terminators(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write every terminator where every program looks for them."""
    ends = terminators(model, tokenizer)
    if model.generation_config is not None and ends:
        model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
        # Else it would be made anew from the model's configuration, which names one terminator.
        settle(model.generation_config)


def _require_gguf(path: Path) -> None:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        hint = "check its path and that you may read it"
        raise UserError(f"the file cannot be read: {error.strerror or error}", where=str(path), hint=hint) from error
    if magic != b"GGUF":
        raise UserError("the file does not begin as a .gguf file does", where=str(path), hint="fetch the file again")
