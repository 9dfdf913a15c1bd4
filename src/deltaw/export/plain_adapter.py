"""An adapter as plain low-rank updates, which is all that other programs' formats hold.

A plain update is ΔW = scaling · B·A of one weight matrix. Everything else that an adapter folder may hold
(magnitudes of DoRA, whole modules, rows of tokens, soft prompts) is refused by name here, before an export
writes anything. This module knows files and mathematics; it knows no base model and no format.
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
from deltaw.lora.peft_updates import FileContent, FileUpdate, content_of
from deltaw.methods.files import read_config

_MERGE = "merge it into its base instead: --format gguf, or deltaw merge"


@dataclass(frozen=True)
class PlainUpdate:
    """ΔW = scaling · B·A, which is (out, in); of an embedding (vocabulary, dim) it is (scaling · B·A)ᵀ.

    Attributes:
        module: the adapted module's name in the base model.
        factor_A: (r, in), fp32; of an embedding (r, vocabulary).
        factor_B: (out, r), fp32; of an embedding (dim, r).
        scaling: the factor of B·A.
        embedding: whether the module looks rows up by token.
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
    """A folder's adapter, where it consists of plain updates alone.

    Attributes:
        updates: in the order of the file.
        invocation: the token ids from which on it acts; None where it always acts.
        fingerprint: of the base model that it was trained on; None where the file does not tell.
        task_type: PEFT's name of the task.
    """

    updates: list[PlainUpdate]
    invocation: tuple[int, ...] | None
    fingerprint: str | None
    task_type: str | None


def read_plain(folder: Path, format_name: str) -> PlainAdapter:
    """The plain updates of the adapter in ``folder``.

    Args:
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.
        format_name: for messages: what cannot hold the rest.

    Raises:
        UserError: the folder holds no adapter, or one that consists of more than plain updates.
    """
    require_lora(folder, format_name)
    adapter = read_adapter(folder)
    content = content_of(adapter)
    _refuse_settings(adapter, folder, format_name)
    _refuse_tensors(content, folder, format_name)
    updates = [_plain(update, adapter, folder, format_name) for update in content.updates]
    invocation, metadata = _invocation(adapter, folder, format_name), adapter.metadata
    return PlainAdapter(updates, invocation, metadata.get(FINGERPRINT_KEY), metadata.get("task_type"))


def require_lora(folder: Path, format_name: str) -> None:
    """Raise a UserError where another method than LoRA made the folder."""
    if not folder.is_dir():
        raise UserError(f"there is no adapter folder '{folder}'", where=str(folder), hint="name the folder of a run")
    if not (folder / CONFIG_NAME).is_file():
        hint = "name the folder of a finished run, or of an adapter in PEFT's format"
        raise UserError(f"the folder has no {CONFIG_NAME}", where=str(folder), hint=hint)
    settings = read_config(folder)
    kind = str(settings.get("peft_type") or settings.get("method"))
    if kind != "LORA":
        by_input = "it acts through the model's input, which no merge can hold: use deltaw serve or generate"
        hint = by_input if kind.lower() in ("prompt", "prompt_tuning", "input") else _MERGE
        what = f"the adapter was made by method '{kind}', and {format_name} holds LoRA alone"
        raise UserError(what, where=str(folder / CONFIG_NAME), hint=hint)


def _refuse_settings(adapter: AdapterFile, folder: Path, format_name: str) -> None:
    config = adapter.config
    if config.dora:
        raise _refusal("DoRA's magnitudes", folder / CONFIG_NAME, format_name)
    if config.init in CHANGING_INITS:
        what = f"the adapter was initialized with '{config.init}', whose share of the base's weights is not in the file"
        hint = "load it on its base and save it again: deltaw.save_adapter writes a plain one"
        raise UserError(what, where=str(folder / CONFIG_NAME), hint=hint)


def _refuse_tensors(content: FileContent, folder: Path, format_name: str) -> None:
    where = folder / WEIGHTS_NAME
    for names, what in (
        (content.biases, "a bias on B (of {})"),
        (content.token_rows, "trained rows of tokens (of {})"),
        (content.others, "tensors trained in full ({})"),
    ):
        if names:
            raise _refusal(what.format(_some(names)), where, format_name)
    if content.halves or not content.updates:
        halves = f"the file has one factor without the other for {_some(content.halves)}"
        what = halves if content.halves else "the file holds no LoRA factors"
        raise UserError(what, where=str(where), hint="save the adapter again")


def _plain(update: FileUpdate, adapter: AdapterFile, folder: Path, format_name: str) -> PlainUpdate:
    where = folder / WEIGHTS_NAME
    for refused, what in (
        (update.experts is not None or not update.certain, "updates of stacked experts"),
        (update.factor_A.dim() != 2 or update.factor_B.dim() != 2, "an update of a convolution"),
        (update.name in adapter.config.target_parameters, "an update of a single parameter"),
    ):
        if refused:
            raise _refusal(f"{what} ({update.name})", where, format_name)
    embedding = f"{update.path}.lora_embedding_A" in adapter.tensors
    factor_A, factor_B = update.factor_A.float(), update.factor_B.float()
    for letter, factor in (("A", factor_A), ("B", factor_B)):
        if not bool(factor.isfinite().all()):
            what = f"{letter} of '{update.name}' holds numbers that are not finite"
            raise UserError(what, where=str(where), hint="train the adapter again: it cannot be used anywhere")
    return PlainUpdate(update.name, factor_A, factor_B, update.scaling * update.times, embedding)


def _invocation(adapter: AdapterFile, folder: Path, format_name: str) -> tuple[int, ...] | None:
    if adapter.config.activation != "completion":
        return None
    tokens = adapter.config.invocation_tokens
    if isinstance(tokens, list):
        return tuple(tokens)
    what = f"the activated adapter names no token ids to act from, and {format_name} needs them"
    raise UserError(what, where=str(folder / CONFIG_NAME), hint="write alora_invocation_tokens there")


def _refusal(what: str, where: Path, format_name: str) -> UserError:
    return UserError(f"the adapter holds {what}, and {format_name} cannot", where=str(where), hint=_MERGE)


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(f"'{name}'" for name in names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
