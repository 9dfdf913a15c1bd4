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
from deltaw.config import DEFAULT_TASK, RunConfig
from deltaw.errors import UserError
from deltaw.export.adapters import AdapterChanges
from deltaw.hub.checkpoint import Checkpoint, Names
from deltaw.hub.folders import local_folder
from deltaw.hub.references import resolve
from deltaw.hub.skeleton import skeleton
from deltaw.hub.weight_values import note_stored, values_in_folder
from deltaw.lora.fingerprint import base_fingerprint, same_base
from deltaw.methods.base import ADAPTER_CONFIG
from deltaw.methods.files import classes_of, outputs_of, read_config
from deltaw.methods.parameters import names_of
from deltaw.tensor_files import row_blocks
from deltaw.training.run_folder import SETTINGS

Say = Callable[[str], None]


@dataclass(frozen=True)
class Base:
    """A base model, as an adapter needs it.

    Attributes:
        reference: what names it. folder: with config.json and safetensors.
        task: what the model does with the adapter. outputs: of a classifier's head, else None.
        classes: their names. run: the settings of the run, None where the folder is no run.
        trust_remote_code: as in the run.
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


def base_of(adapter: Path, model: str | None, dtype: str, say: Say) -> Base:
    """The base model of the adapter in a folder.

    Args:
        adapter: a run's folder, or an adapter's.
        model: names the base model, where it is not the one that the folder names.
        dtype: what a ``.gguf`` base is converted to.

    Raises:
        UserError: there is no adapter, or no base model to be found.
    """
    if not (adapter / ADAPTER_CONFIG).is_file():
        unfinished = (adapter / SETTINGS).is_file()
        raise UserError(
            "the run has no adapter: it did not get as far as its end"
            if unfinished
            else f"there is no adapter in '{adapter}'",
            where=str(adapter),
            hint=f"train it again: deltaw train {adapter / SETTINGS}"
            if unfinished
            else "name a run's folder, or an adapter's",
        )
    run = RunConfig.read(adapter / SETTINGS) if (adapter / SETTINGS).is_file() else None
    settings = read_config(adapter)
    named = settings.get("base_model_name_or_path")
    reference = model or (run.model if run is not None else named if isinstance(named, str) else None)
    if not reference:
        raise UserError(
            "the adapter does not say which model it belongs to",
            where=str(adapter / ADAPTER_CONFIG),
            hint="name the base model with --model",
        )
    task = run.task if run is not None else tasks.name_of_adapter(settings.get("task_type")) or DEFAULT_TASK
    classes = classes_of(adapter)
    outputs = len(classes) if classes is not None else tasks.entry_of(task).outputs
    if outputs is None and tasks.entry_of(task).new_head:
        outputs = outputs_of(adapter)
    trust = run.trust_remote_code if run is not None else False
    folder = local_folder(resolve(reference), dtype, say, trust)
    return Base(reference, folder, task, outputs, classes, run, trust)


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
                f"the adapter's file has its own copy of the base weight '{name}', which is not that of the "
                "model",
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
