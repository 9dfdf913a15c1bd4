"""Reader of adapters that consist only of plain low-rank updates, the common subset of other programs' formats.

A plain update is ΔW = scaling · B·A of one weight matrix. Other contents (DoRA magnitudes, fully trained modules, token
rows, soft prompts) are rejected with a specific message before an export writes files.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from deltaw.errors import UserError
from deltaw.lora.config import CHANGING_INITS
from deltaw.lora.files import CONFIG_NAME, WEIGHTS_NAME, AdapterFile, read_adapter
from deltaw.lora.fingerprint import FINGERPRINT_KEY
from deltaw.lora.peft_updates import FileContent, FileUpdate, read_content
from deltaw.methods.files import read_config

_MERGE = "merge it into its base instead: --format gguf, or deltaw merge"


@dataclass(frozen=True)
class PlainUpdate:
    """Update ΔW = scaling · B·A of shape (out, in). For an embedding (vocabulary, dim) it is (scaling · B·A)ᵀ.

    Attributes:
        module: Name of the adapted module in the base model.
        factor_A: (r, in) fp32 factor, or (r, vocabulary) for an embedding.
        factor_B: (out, r) fp32 factor, or (dim, r) for an embedding.
        scaling: Factor of B·A.
        embedding: True if the module is an embedding.
    """

    module: str
    factor_A: Tensor
    factor_B: Tensor
    scaling: float
    embedding: bool = False

    @property
    def rank(self) -> int:
        return self.factor_A.shape[0]


@dataclass(frozen=True)
class PlainAdapter:
    """Adapter that consists only of plain updates.

    Attributes:
        updates: Updates in file order.
        invocation: Token ids that activate the adapter, or None if it is always active.
        fingerprint: Fingerprint of the base model used in training, or None if unknown.
        task_type: PEFT's name of the task.
    """

    updates: list[PlainUpdate]
    invocation: tuple[int, ...] | None
    fingerprint: str | None
    task_type: str | None


def read_plain(folder: Path, format_name: str) -> PlainAdapter:
    """Read the plain updates of an adapter.

    Args:
        folder: Folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        format_name: Name of the export format for error messages.

    Raises:
        UserError: if the folder contains no adapter or an adapter with other changes.
    """
    require_lora(folder, format_name)
    adapter = read_adapter(folder)
    content = read_content(adapter)
    _refuse_settings(adapter, folder, format_name)
    _refuse_tensors(content, folder, format_name)
    updates = [_plain(update, adapter, folder, format_name) for update in content.updates]
    invocation, metadata = _invocation(adapter, folder, format_name), adapter.metadata
    return PlainAdapter(updates, invocation, metadata.get(FINGERPRINT_KEY), metadata.get("task_type"))


def require_lora(folder: Path, format_name: str) -> None:
    """Raise a UserError if the folder does not contain a LoRA adapter."""
    if not folder.is_dir():
        raise UserError(f"the folder '{folder}' does not exist", location=str(folder), hint="give the folder of a run")
    if not (folder / CONFIG_NAME).is_file():
        hint = "give the folder of a finished run or of a PEFT adapter"
        raise UserError(f"the folder has no {CONFIG_NAME}", location=str(folder), hint=hint)
    settings = read_config(folder)
    kind = str(settings.get("peft_type") or settings.get("method"))
    if kind != "LORA":
        input_hint = "it changes the model's input, which cannot be merged: use deltaw serve or generate"
        hint = input_hint if kind.lower() in ("prompt", "prompt_tuning", "input") else _MERGE
        message = f"{format_name} supports only LoRA, not adapters of method '{kind}'"
        raise UserError(message, location=str(folder / CONFIG_NAME), hint=hint)


def _refuse_settings(adapter: AdapterFile, folder: Path, format_name: str) -> None:
    config = adapter.config
    if config.dora:
        raise _refusal("DoRA's magnitudes", folder / CONFIG_NAME, format_name)
    if config.init in CHANGING_INITS:
        message = f"the initialization '{config.init}' changed the base weights, and the file lacks this change"
        hint = "load it on its base model and save it again with deltaw.save_adapter"
        raise UserError(message, location=str(folder / CONFIG_NAME), hint=hint)


def _refuse_tensors(content: FileContent, folder: Path, format_name: str) -> None:
    location = folder / WEIGHTS_NAME
    for names, content_name in (
        (content.biases, "a bias on B (of {})"),
        (content.token_rows, "trained rows of tokens (of {})"),
        (content.other_tensors, "tensors trained in full ({})"),
    ):
        if names:
            raise _refusal(content_name.format(_first_names(names)), location, format_name)
    if content.incomplete or not content.updates:
        halves = f"the file has only one of two factors for {_first_names(content.incomplete)}"
        content_name = halves if content.incomplete else "the file contains no LoRA factors"
        raise UserError(content_name, location=str(location), hint="save the adapter again")


def _plain(update: FileUpdate, adapter: AdapterFile, folder: Path, format_name: str) -> PlainUpdate:
    location = folder / WEIGHTS_NAME
    for is_unsupported, message in (
        (update.experts is not None or not update.certain, "updates of stacked experts"),
        (update.factor_A.dim() != 2 or update.factor_B.dim() != 2, "an update of a convolution"),
        (update.name in adapter.config.target_parameters, "an update of a single parameter"),
    ):
        if is_unsupported:
            raise _refusal(f"{message} ({update.name})", location, format_name)
    embedding = f"{update.path}.lora_embedding_A" in adapter.tensors
    factor_A, factor_B = update.factor_A.float(), update.factor_B.float()
    for letter, factor in (("A", factor_A), ("B", factor_B)):
        if not bool(factor.isfinite().all()):
            message = f"{letter} of '{update.name}' contains values that are not finite"
            raise UserError(message, location=str(location), hint="train the adapter again")
    return PlainUpdate(update.name, factor_A, factor_B, update.scaling * update.times, embedding)


def _invocation(adapter: AdapterFile, folder: Path, format_name: str) -> tuple[int, ...] | None:
    if adapter.config.active != "completion":
        return None
    tokens = adapter.config.invocation_tokens
    if isinstance(tokens, list):
        return tuple(tokens)
    message = f"the activated adapter has no invocation tokens, which {format_name} requires"
    raise UserError(message, location=str(folder / CONFIG_NAME), hint="set alora_invocation_tokens in this file")


def _refusal(feature: str, location: Path, format_name: str) -> UserError:
    message = f"the adapter contains {feature}, which {format_name} does not support"
    return UserError(message, location=str(location), hint=_MERGE)


def _first_names(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(f"'{name}'" for name in names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
