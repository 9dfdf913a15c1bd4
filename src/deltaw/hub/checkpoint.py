"""A base model's weight files, and which of their tensors is which parameter of the model.

Files are not always named as the model's modules are, see :mod:`deltaw.hub.tensor_names`. No weight is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from deltaw.errors import UserError
from deltaw.hub.model_folder import shards_of
from deltaw.hub.tensor_names import Names, Renaming, names_on_disk
from deltaw.tensor_files import StoredTensor, read_header

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
        files = _files_of_index(folder / INDEX)
    else:
        files = sorted(file.name for file in folder.glob("*.safetensors"))
    if not files:
        raise UserError(
            "the folder has no safetensors weights", where=str(folder), hint="convert them to safetensors"
        )
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
    renamed = Renaming(model, dict(model.state_dict()))
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


def _files_of_index(path: Path) -> list[str]:
    files = shards_of(path)
    for file in files:
        if not (path.parent / file).is_file():
            raise UserError(
                f"the weight file '{file}' is missing", where=str(path.parent), hint="fetch the model again"
            )
    return files


__all__ = ["Checkpoint", "Names", "name_for", "names_on_disk", "read_checkpoint"]
