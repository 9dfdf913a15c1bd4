"""Digests of weight files, for the fingerprint of a model (:mod:`deltaw.lora.fingerprint`).

Digests are cached until the file changes. Files are read in chunks instead of being mapped, so that they do not count
as memory of the process.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from deltaw.cache.results import compute_for_files, file_state, require_unchanged
from deltaw.hub.checkpoint import read_checkpoint
from deltaw.hub.parameter_names import match_names
from deltaw.lora import fingerprint
from deltaw.lora.fingerprint import TensorDigest, digest_pieces, map_in_threads, record_digest, saved_tensors
from deltaw.progress import track_progress
from deltaw.tensor_files import DTYPES, StoredTensor, read_header

CACHE_DEPENDENCIES = ("deltaw.lora.fingerprint", "deltaw.tensor_files")


def file_digests(file: Path, cancelled: threading.Event | None = None) -> dict[str, TensorDigest]:
    """Return digests of the tensors of a safetensors file by name on disk, for supported types.

    Args:
        file: Path of the file.
        cancelled: Set by another thread to cancel the computation.

    Raises:
        UserError: if the file is damaged or changes during the call.
        OSError: if the file cannot be read.
        CancelledError: if ``cancelled`` was set.
    """

    def chunks(stored: StoredTensor) -> Iterator[Tensor]:
        for chunk in stored.chunks(fingerprint.HASH_CHUNK):
            if cancelled is not None and cancelled.is_set():
                raise CancelledError("the digests are no longer needed")
            yield chunk

    def make() -> dict[str, TensorDigest]:
        tensors = [tensor for tensor in read_header(file).values() if tensor.code in DTYPES]
        tensors.sort(key=lambda tensor: -tensor.bytes)  # start with the largest tensors to balance the threads
        numel = sum(tensor.numel for tensor in tensors)
        digests = map_in_threads(lambda tensor: digest_pieces(tensor.shape, chunks(tensor)), tensors, numel)
        return dict(zip((tensor.name for tensor in tensors), digests, strict=True))

    cached = compute_for_files("weights", [file], make, CACHE_DEPENDENCIES)
    return {name: TensorDigest(tuple(shape), tuple(digests)) for name, (shape, digests) in cached.items()}


def folder_digests(folder: Path, cancelled: threading.Event | None = None) -> dict[str, TensorDigest]:
    """Return digests of all tensors in a model's folder by name on disk.

    Raises:
        UserError, OSError, CancelledError: as in :func:`file_digests`.
    """
    digests: dict[str, TensorDigest] = {}
    for file in read_checkpoint(folder).files:
        digests |= file_digests(folder / file, cancelled)
    return digests


@contextlib.contextmanager
def hash_in_background(folder: Path) -> Iterator[Callable[[PreTrainedModel], None]]:
    """Hash the weight files of a folder in a thread while the block loads a model from them.

    Yields:
        Function that records the digests on the loaded model. It waits for the thread, and raises a UserError if a file
        changed during the block.
    """
    cancelled = threading.Event()
    files = sorted(folder.glob("*.safetensors"))
    file_states = [file_state(file) for file in files]
    with ThreadPoolExecutor(1, thread_name_prefix="weight files") as pool:
        future = pool.submit(folder_digests, folder, cancelled)

        def record(model: PreTrainedModel) -> None:
            with track_progress("hashing the weights, once"):
                digests = future.result()
            require_unchanged(files, file_states)
            record_stored_digests(model, digests)

        try:
            yield record
        finally:
            cancelled.set()


def record_stored_digests(model: PreTrainedModel, stored: Mapping[str, TensorDigest]) -> None:
    """Record on a model's parameters and buffers the digests of their values on disk.

    Parameters that transformers assembles from several tensors get digests of their values in memory. The precision of
    the other digests is then limited to that of the loaded type.

    Args:
        model: Loaded model, or a model on the meta device.
        stored: Digests by name on disk.
    """
    names = match_names(model, stored)
    digests_by_id: dict[int, TensorDigest] = {}  # tied parameters have several names but are stored once
    for name, tensor in model.state_dict(keep_vars=True).items():
        digest = stored.get(names.stored.get(name, ""))
        if digest is not None and digest.shape == tuple(tensor.shape):
            digests_by_id.setdefault(id(tensor), digest)
    for name, tensor in saved_tensors(model):
        if name in names.converted:
            record_digest(tensor, fingerprint.digest_tensor(tensor))
        elif (digest := digests_by_id.get(id(tensor))) is not None:
            levels = fingerprint.num_digests(tensor.dtype) if names.converted else None
            record_digest(tensor, TensorDigest(digest.shape, digest.digests[:levels]))
