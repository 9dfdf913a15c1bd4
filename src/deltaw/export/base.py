"""Base model of an adapter in a merge or an export, and the check that it is the one used in training."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from deltaw.data.chat_template import with_chat_template
from deltaw.errors import UserError
from deltaw.export.adapters import AdapterChanges
from deltaw.hub.app_stores import StoredModel
from deltaw.hub.checkpoint import WeightFiles, read_checkpoint
from deltaw.hub.empty_models import read_config
from deltaw.hub.folders import ModelSource, local_folder, resolve
from deltaw.hub.loading import LoadedModel, load
from deltaw.hub.parameter_names import ParameterNames, match_names
from deltaw.hub.skeletons import skeleton
from deltaw.hub.tokenizers import tokenizer_in
from deltaw.hub.transformers_private import complete_skeleton, quiet
from deltaw.hub.vision import loads_as_text_view, text_view
from deltaw.hub.weight_digests import folder_digests, record_stored_digests
from deltaw.lora.fingerprint import base_fingerprint, same_base
from deltaw.machine.memory import free_memory_bytes
from deltaw.methods.files import read_classes, read_num_outputs
from deltaw.methods.parameters import parameters_by_name
from deltaw.methods.trust import CHAT_TEMPLATE, read_folder
from deltaw.progress import LogFunction
from deltaw.settings import task_registry
from deltaw.settings.config import RunConfig
from deltaw.tensor_files import row_blocks


@dataclass(frozen=True)
class ExportResult:
    """Result of an export.

    Attributes:
        details: Values for JSON output.
        lines: Lines for the user.
    """

    details: dict[str, object]
    lines: list[str]


@dataclass(frozen=True)
class AdapterBase:
    """Base model of an adapter.

    Attributes:
        reference: Reference of the model.
        folder: Folder with config.json and safetensors files.
        task: Task of the adapter.
        outputs: Number of outputs of a classification head.
        classes: Names of the classes.
        run: Settings of the run, if the folder is a run.
        trust_remote_code: Whether the caller trusts the model's Python code.
    """

    reference: str
    folder: Path
    task: str
    outputs: int | None
    classes: tuple[str, ...] | None
    run: RunConfig | None
    trust_remote_code: bool

    def skeleton(self, folder: Path | None = None) -> PreTrainedModel:
        """Return the model on the meta device, built from the base's config.json or from the one in ``folder``.

        A vision-language model is returned completely, with its vision tower.
        """
        if self.is_view:
            return complete_skeleton(self._read_config(folder or self.folder))
        with torch.device("meta"):
            return skeleton(str(folder or self.folder), dtype="fp32", **self._for_task)

    def load(self, precision: str, folder: Path | None = None) -> LoadedModel:
        """Load the model, or the one in ``folder``, for the adapter's task."""
        with quiet():
            path = str(folder or self.folder)
            return load(path, precision=precision, device="cpu", log=lambda line: None, **self._for_task)

    @property
    def _for_task(self) -> dict[str, Any]:
        return {"task": self.task, "num_labels": self.outputs, "trust_remote_code": self.trust_remote_code}

    @functools.cached_property
    def source(self) -> ModelSource:
        """Source of the model: its display name, and the path of a converted ``.gguf`` file."""
        return resolve(self.reference)

    @property
    def gguf(self) -> Path | None:
        """``.gguf`` file that the folder was converted from, if any."""
        return self.source.path if self.source.kind == "gguf" else None

    @property
    def in_ollama(self) -> StoredModel | None:
        """The model in Ollama's store, if it is there."""
        stored = self.source.stored
        return stored if stored is not None and stored.is_in_ollama else None

    @functools.cached_property
    def is_view(self) -> bool:
        """True if the model is a vision-language model, which is trained through its text view."""
        return loads_as_text_view(self._read_config(self.folder), task_registry.entry_of(self.task).auto_model)

    @functools.cached_property
    def config(self) -> PretrainedConfig:
        """Configuration of the model, or of the language model of a vision-language model."""
        text: PretrainedConfig = self._read_config(self.folder).get_text_config(decoder=True)
        if not self.is_view:
            return text
        model = self.skeleton()
        text.tie_word_embeddings = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        return text

    def _read_config(self, folder: Path) -> PretrainedConfig:
        with quiet():
            return read_config(folder, self.task, None, self.trust_remote_code)

    def tokenizer(self, run: Path) -> PreTrainedTokenizerBase | None:
        """Return the tokenizer, with the chat template of ``run`` if it has one."""
        tokenizer = tokenizer_in(self.folder, self.trust_remote_code)
        if tokenizer is None:
            return None
        if self.run is not None:
            return with_chat_template(tokenizer, self.run.data.chat_template)
        template = run / CHAT_TEMPLATE
        return with_chat_template(tokenizer, str(template)) if template.is_file() else tokenizer

    def fingerprint(self) -> str | None:
        """Compute the fingerprint of the weights, or None (:func:`fingerprint_on_disk`)."""
        model = self.skeleton()
        checkpoint = read_checkpoint(self.folder)
        return fingerprint_on_disk(self, model, checkpoint, match_names(model, checkpoint.tensors))

    def trained_part(self, model: PreTrainedModel) -> PreTrainedModel:
        """Return the part of a skeleton that was trained: the text view of a vision-language model."""
        return text_view(model).view if self.is_view else model


def resolve_base(
    adapter: Path, *, dtype: str, model: str | None, trust_remote_code: bool, log: LogFunction
) -> AdapterBase:
    """Resolve the base model of an adapter.

    Args:
        adapter: Folder of a run or of an adapter.
        dtype: Type that a ``.gguf`` base model is converted to.
        model: Base model, if it is not the one that the adapter names.
        trust_remote_code: Whether the caller trusts the Python code of the base model.
        log: Receives messages for the user.

    Raises:
        UserError: if the adapter or its base model is not found, or if the caller has to confirm the base model.
    """
    source = read_folder(adapter, trust_remote_code=trust_remote_code)
    classes = read_classes(adapter)
    outputs = len(classes) if classes is not None else task_registry.entry_of(source.task).outputs
    if outputs is None and task_registry.entry_of(source.task).new_head:
        outputs = read_num_outputs(adapter)
    return AdapterBase(
        reference=source.base_name(model),
        folder=local_folder(resolve(source.base(model)), dtype, log, trust_remote_code),
        task=source.task,
        outputs=outputs,
        classes=classes,
        run=source.run,
        trust_remote_code=trust_remote_code,
    )


def wrong_base_error(base: AdapterBase, adapter: Path, hint: str) -> UserError:
    """Return the error for an adapter that was trained on another base model."""
    message = f"the adapter was trained on other weights than those of '{base.reference}'"
    return UserError(message, location=str(adapter), hint=hint)


def check_base(
    base: AdapterBase, model: PreTrainedModel, checkpoint: WeightFiles, names: ParameterNames, adapter: AdapterChanges
) -> bool | None:
    """Return True if the files are the base model that an adapter was trained on, or None if this is unknown.

    Args:
        base: Base model.
        model: Its skeleton, without an adapter.
        checkpoint: Weight files of the base model.
        names: Names of the parameters in the files.
        adapter: Changes of the adapter.

    Raises:
        UserError: if the adapter's file contains copies of base weights that differ from the files.
    """
    for name, tensor in adapter.copies.items():
        stored = checkpoint.tensors.get(names.stored.get(name, ""))
        blocks = row_blocks(tensor.shape)
        if stored is None or not all(torch.equal(tensor[a:b].to(stored.dtype), stored.rows(a, b)) for a, b in blocks):
            message = f"the base weight '{name}' in the adapter's file differs from the model's"
            hint = "merge it into the base model that it was trained on"
            raise UserError(message, location=str(adapter.folder), hint=hint)
    if adapter.fingerprint is None:
        return None
    return same_base(fingerprint_on_disk(base, model, checkpoint, names, adapter.replaced), adapter.fingerprint)


def fingerprint_on_disk(
    base: AdapterBase,
    model: PreTrainedModel,
    checkpoint: WeightFiles,
    names: ParameterNames,
    replaced: frozenset[str] = frozenset(),
) -> str | None:
    """Compute :func:`~deltaw.lora.fingerprint.base_fingerprint` of a model from its files.

    Parameters that are assembled from several tensors, such as stacked experts, exist only in a loaded model. It is
    loaded if it fits into free memory. Otherwise the result is None.
    """
    if names.converted:
        in_bf16 = 2 * sum(parameter.numel() for parameter in model.parameters())
        if base.is_view or in_bf16 > free_memory_bytes():
            return None
        model = base.load("bf16").model
        return base_fingerprint(model, _parameters_named(model, replaced))
    record_stored_digests(model, folder_digests(checkpoint.folder))
    return base_fingerprint(base.trained_part(model), _parameters_named(model, replaced))


def _parameters_named(model: PreTrainedModel, names: frozenset[str]) -> list[nn.Parameter]:
    return [parameter for name, parameter in parameters_by_name(model).items() if name in names]
