"""A base model's weight files, and which of their tensors is which parameter of the model.

Files are not always named as the model's modules are, see :mod:`deltaw.hub.checkpoint`. No weight is read.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from deltaw.cache import file_state, of_files, require_unchanged
from deltaw.errors import UserError
from deltaw.hub.folders import every_shard
from deltaw.lora import fingerprint
from deltaw.lora.fingerprint import Values, in_threads, note_values, saved_tensors, values_of
from deltaw.tensor_files import DTYPES, StoredTensor, read_header
from deltaw.working import working

# Which tensor of a model's weight files is which of its parameters.
#
# Files are not always named as the model's modules are: the base model's prefix may be missing, transformers
# renames, and it may build one parameter of several tensors (experts that are fused while they are loaded).
# Its own rules say which (``conversion_mapping``), applied to the names alone; no weight is read.


@dataclass(frozen=True)
class Names:
    """How a checkpoint's tensors and a model's parameters belong together.

    Attributes:
        stored: by a parameter's or buffer's name, its name on disk.
        converted: by a parameter that is built of several tensors, or of one that is changed on the way: the
            tensors' names on disk.
        unused: on disk, and not in the model.
    """

    stored: dict[str, str]
    converted: dict[str, list[str]]
    unused: list[str]


def names_on_disk(model: PreTrainedModel, tensors: Mapping[str, object]) -> Names:
    """Which tensor of a checkpoint is which parameter of ``model``.

    Args:
        model: need not have values; its weights' names and its class count.
        tensors: by their names on disk.
    """
    known: dict[str, Tensor] = dict(model.state_dict())
    stored: dict[str, str] = {}
    converted: dict[str, list[str]] = {}
    unused = []
    renamed = _renaming(model, known)
    for name in tensors:
        target, changed = renamed(name)
        if target not in known:
            unused.append(name)
        elif changed:
            converted.setdefault(target, []).append(name)
        else:
            stored[target] = name
    return Names(stored, converted, unused)


def _renaming(model: PreTrainedModel, known: dict[str, Tensor]) -> Callable[[str], tuple[str, bool]]:
    """transformers' own renaming of a name on disk, and whether the tensor itself is changed."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]

    def renamed(name: str) -> tuple[str, bool]:
        target, converter = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        return target, converter is not None

    return renamed


WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """The weight files of a model's folder.

    Attributes:
        folder: of the model.
        tensors: by their names on disk, file after file.
        files: the weight files' names.
    """

    folder: Path
    tensors: dict[str, StoredTensor]
    files: tuple[str, ...]


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read the headers of all weight files of ``folder``.

    Raises:
        UserError: there are none, one is damaged, or the index names a file outside of the folder.
    """
    if (folder / WEIGHTS).is_file():
        files = [WEIGHTS]
    elif (folder / INDEX).is_file():
        files = every_shard(folder / INDEX)
    else:
        files = sorted(file.name for file in folder.glob("*.safetensors"))
    if not files:
        raise UserError("the folder has no safetensors weights", where=str(folder), hint="convert them to safetensors")
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        tensors |= read_header(folder / file)
    return Checkpoint(folder, tensors, tuple(files))


def name_for(model: PreTrainedModel, parameter: str, names: Names) -> str | None:
    """A name on disk that transformers will read as ``parameter``; None where none is found.

    For a tensor that the checkpoint does not have yet, such as a head that was tied.
    """
    if parameter in names.stored:
        return names.stored[parameter]
    renamed = _renaming(model, dict(model.state_dict()))
    taken = {*names.stored.values(), *names.unused, *(n for some in names.converted.values() for n in some)}
    prefix = f"{model.base_model_prefix}."
    candidates = [parameter, parameter.removeprefix(prefix)]
    owner, _, last = parameter.rpartition(".")
    for beside, name in names.stored.items():
        if beside.rpartition(".")[0] == owner:  # a bias is named as its weight is
            candidates.insert(0, f"{name.rpartition('.')[0]}.{last}")
    for candidate in candidates:
        if candidate not in taken and renamed(candidate) == (parameter, False):
            return candidate
    return None


# The values in a model's weight files, for the fingerprint of its weights (``lora/fingerprint.py``).
#
# Every tensor of a file is hashed once, and the result is remembered until the file changes. Files are read a
# piece at a time and not mapped, so that they do not count as memory of the process.
#
# Knows files and parameters; not what a fingerprint is compared with.


MADE_BY = ("deltaw.lora.fingerprint", "deltaw.tensor_files")


def values_of_file(file: Path, over: threading.Event | None = None) -> dict[str, Values]:
    """The values of a safetensors file's tensors, by their names on disk; of the types that models are loaded
    from here.

    Args:
        over: set by another thread if the values are not needed any more.

    Raises:
        UserError: the file is damaged, or changes meanwhile.
        OSError: it cannot be read.
        CancelledError: ``over`` was set.
    """

    def pieces(stored: StoredTensor) -> Iterator[Tensor]:
        for piece in stored.pieces(fingerprint.AT_ONCE):
            if over is not None and over.is_set():
                raise CancelledError("the values are not needed any more")
            yield piece

    def make() -> dict[str, Values]:
        tensors = [one for one in read_header(file).values() if one.code in DTYPES]
        tensors.sort(key=lambda one: -one.bytes)  # the largest must not be the last to begin
        found = in_threads(lambda one: values_of(one.shape, pieces(one)), tensors, sum(one.numel for one in tensors))
        return dict(zip((one.name for one in tensors), found, strict=True))

    kept = of_files("weights", [file], make, MADE_BY)
    return {name: Values(tuple(shape), tuple(digests)) for name, (shape, digests) in kept.items()}


def values_in_folder(folder: Path, over: threading.Event | None = None) -> dict[str, Values]:
    """The values of all tensors in a model's folder, by their names on disk.

    Raises:
        UserError, OSError, CancelledError: as :func:`values_of_file`.
    """
    found: dict[str, Values] = {}
    for file in read_checkpoint(folder).files:
        found |= values_of_file(folder / file, over)
    return found


@contextlib.contextmanager
def reading_values(folder: Path) -> Iterator[Callable[[PreTrainedModel], None]]:
    """Hash the weight files of a folder in other threads while the block loads a model from them.

    Yields:
        what notes the values on the model that was loaded. It waits for them, and raises a UserError if a
        file has changed meanwhile.
    """
    over = threading.Event()
    files = sorted(folder.glob("*.safetensors"))
    before = [file_state(file) for file in files]
    with ThreadPoolExecutor(1, thread_name_prefix="weight files") as pool:
        reading = pool.submit(values_in_folder, folder, over)

        def note(model: PreTrainedModel) -> None:
            with working("hashing the weights, once"):
                values = reading.result()
            require_unchanged(files, before)
            note_stored(model, values)

        try:
            yield note
        finally:
            over.set()


def note_stored(model: PreTrainedModel, stored: Mapping[str, Values]) -> None:
    """Note on a model's parameters and buffers the values that its files hold.

    A parameter that transformers builds of several tensors counts with the values that it has in memory; the
    others then count as exactly as the type that they were loaded in can hold.

    Args:
        model: as it was loaded, or on the meta device. stored: by the tensors' names on disk.
    """
    names = names_on_disk(model, stored)
    known: dict[int, Values] = {}  # tied parameters have several names, of which the files hold one
    for name, tensor in model.state_dict(keep_vars=True).items():
        values = stored.get(names.stored.get(name, ""))
        if values is not None and values.shape == tuple(tensor.shape):
            known.setdefault(id(tensor), values)
    for name, tensor in saved_tensors(model):
        if name in names.converted:
            note_values(tensor, fingerprint.values_in_memory(tensor))
        elif (values := known.get(id(tensor))) is not None:
            levels = fingerprint.levels_of(tensor.dtype) if names.converted else None
            note_values(tensor, Values(values.shape, values.digests[:levels]))
