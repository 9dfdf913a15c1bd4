"""The base model of an adapter: its files, its shape on the meta device, and whether it is the one.

Knows folders and transformers' classes; the adapter's own tensors are read elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from deltaw import tasks
from deltaw.errors import UserError
from deltaw.export.adapters import AdapterChanges
from deltaw.hub.checkpoint import Checkpoint, Names, note_stored, values_in_folder
from deltaw.hub.folders import local_folder, resolve
from deltaw.hub.loading import skeleton
from deltaw.lora.fingerprint import base_fingerprint, same_base
from deltaw.methods.files import classes_of, outputs_of
from deltaw.methods.parameters import names_of
from deltaw.settings import RunConfig
from deltaw.tensor_files import row_blocks
from deltaw.training.origin import read_folder

Say = Callable[[str], None]


@dataclass(frozen=True)
class Base:
    """A base model, as an adapter needs it.

    Attributes:
        reference: what names it. folder: with config.json and safetensors.
        task: what the model does with the adapter. outputs: of a classifier's head, else None.
        classes: their names. run: the settings of the run, None where the folder is no run.
        trust_remote_code: the caller's.
    """

    reference: str
    folder: Path
    task: str
    outputs: int | None
    classes: tuple[str, ...] | None
    run: RunConfig | None
    trust_remote_code: bool

    def skeleton(self, folder: Path | None = None) -> PreTrainedModel:
        """The model on the meta device, of the base's config.json or that in another ``folder``."""
        with torch.device("meta"):
            return skeleton(
                str(folder or self.folder),
                dtype="fp32",
                task=self.task,
                num_labels=self.outputs,
                trust_remote_code=self.trust_remote_code,
            )


def base_of(adapter: Path, model: str | None, dtype: str, say: Say, *, trust_remote_code: bool) -> Base:
    """The base model of the adapter in a folder.

    Args:
        adapter: a run's folder, or an adapter's.
        model: names the base model, where it is not the one that the folder names.
        dtype: what a ``.gguf`` base is converted to.
        trust_remote_code: whether the caller wants Python code to be run that comes with the base model.

    Raises:
        UserError: there is no adapter, no base model to be found, or one that the caller has to allow.
    """
    found = read_folder(adapter, trust_remote_code=trust_remote_code)
    reference = found.base_name(model)
    classes = classes_of(adapter)
    outputs = len(classes) if classes is not None else tasks.entry_of(found.task).outputs
    if outputs is None and tasks.entry_of(found.task).new_head:
        outputs = outputs_of(adapter)
    folder = local_folder(resolve(found.base(model)), dtype, say, trust_remote_code)
    return Base(reference, folder, found.task, outputs, classes, found.run, trust_remote_code)


def check_base(
    base: Base, model: PreTrainedModel, checkpoint: Checkpoint, names: Names, adapter: AdapterChanges
) -> bool | None:
    """Whether the files are the base model that an adapter was trained on; None where that cannot be told.

    Args:
        model: on the meta device, and without an adapter.

    Raises:
        UserError: the adapter's file has weights of its base model, and they are not these.
    """
    for name, tensor in adapter.copies.items():
        stored = checkpoint.tensors.get(names.stored.get(name, ""))
        same = stored is not None and all(
            torch.equal(tensor[start:stop].to(stored.dtype), stored.rows(start, stop))
            for start, stop in row_blocks(tensor.shape)
        )
        if not same:
            raise UserError(
                f"the adapter's file has its own copy of the base weight '{name}', which is not that of the model",
                where=str(adapter.folder),
                hint="merge it into the base model that it was trained on",
            )
    if adapter.fingerprint is None:
        return None
    found = fingerprint_on_disk(model, checkpoint, names, adapter.replaced)
    return same_base(found, adapter.fingerprint)


def fingerprint_on_disk(
    model: PreTrainedModel, checkpoint: Checkpoint, names: Names, replaced: frozenset[str] = frozenset()
) -> str | None:
    """:func:`~deltaw.lora.fingerprint.base_fingerprint` of the model in these files, read without loading it;
    None where a parameter is built of several tensors."""
    if names.converted:
        return None
    note_stored(model, values_in_folder(checkpoint.folder))
    return base_fingerprint(model, [p for name, p in names_of(model).items() if name in replaced])
