"""The values in a model's weight files, for the fingerprint of its weights (``lora/fingerprint.py``).

Every tensor of a file is hashed once, and the result is remembered until the file changes. Files are read a
piece at a time and not mapped, so that they do not count as memory of the process.

Knows files and parameters; not what a fingerprint is compared with.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from deltaw.cache import file_state, of_files, require_unchanged
from deltaw.hub.checkpoint import read_checkpoint
from deltaw.hub.tensor_names import names_on_disk
from deltaw.lora import fingerprint
from deltaw.lora.fingerprint import Values, in_threads, note_values, saved_tensors, values_of
from deltaw.tensor_files import DTYPES, StoredTensor, read_header
from deltaw.working import working

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
        numbers = sum(one.numel for one in tensors)
        found = in_threads(lambda one: values_of(one.shape, pieces(one)), tensors, numbers)
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
