"""Weight files of a model, and the headers of their tensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from deltaw.errors import UserError
from deltaw.hub.shards import require_shards
from deltaw.tensor_files import StoredTensor, read_header

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class WeightFiles:
    """Weight files of a model.

    Attributes:
        folder: Folder of the model.
        tensors: Tensors by name on disk, in file order.
        files: Names of the weight files.
    """

    folder: Path
    tensors: dict[str, StoredTensor]
    files: tuple[str, ...]


def read_checkpoint(folder: Path) -> WeightFiles:
    """Read the headers of all weight files in a folder.

    Raises:
        UserError: if there are no weight files, a file is damaged, or the index refers to a file outside of the folder.
    """
    if (folder / WEIGHTS).is_file():
        files = [WEIGHTS]
    elif (folder / INDEX).is_file():
        files = require_shards(folder / INDEX)
    else:
        files = sorted(file.name for file in folder.glob("*.safetensors"))
    if not files:
        raise UserError("the folder has no safetensors weights", location=str(folder), hint="convert to safetensors")
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        tensors |= read_header(folder / file)
    return WeightFiles(folder, tensors, tuple(files))
