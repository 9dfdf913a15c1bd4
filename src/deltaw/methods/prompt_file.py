"""A soft prompt on disk, in PEFT's format: each loads what the other writes.

The prompt is the tensor ``prompt_embeddings`` (k, d). Extra trainable modules have their names in the model
with the prefix ``base_model.``. Safetensors only: nothing is unpickled. It knows no models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from deltaw.errors import UserError
from deltaw.lora.peft_format import PEFT_FORMAT
from deltaw.methods.base import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from deltaw.methods.files import read_config, read_tensors, text_or_none, write_adapter

KIND = "PROMPT_TUNING"
PROMPT = "prompt_embeddings"
PREFIX = "base_model."
ALWAYS_WHOLE = ("classifier", "score")
"""PEFT expects every module with such a name ending in a classifier's file, trained or not."""

_TASKS = ("CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION", None)


@dataclass(frozen=True)
class PromptFile:
    """The content of both files.

    Attributes:
        prompt: (k, d).
        whole: tensors of the extra trainable modules, by the model's own names.
        init: its initialization, in PEFT's words: RANDOM, SAMPLE_VOCAB, TEXT.
        text: of the initialization TEXT.
        base_model: the reference of the base model.
        task_type: PEFT's name of the task; None if unknown.
        whole_modules: names of the modules in ``whole``.
        heads: attention heads of a block. layers: blocks. PEFT requires both and ignores them.
    """

    prompt: Tensor
    whole: Mapping[str, Tensor]
    init: str = "RANDOM"
    text: str | None = None
    base_model: str | None = None
    task_type: str | None = None
    whole_modules: Sequence[str] = ()
    heads: int = 1
    layers: int = 1

    def settings(self) -> dict[str, object]:
        """The content of ``adapter_config.json``: every key that PEFT writes."""
        return {
            "auto_mapping": None,
            "base_model_name_or_path": self.base_model,
            "inference_mode": True,
            "modules_to_save": list(self.whole_modules) or None,
            "num_attention_heads": self.heads,
            "num_layers": self.layers,
            "num_transformer_submodules": 1,
            "num_virtual_tokens": self.prompt.shape[0],
            "peft_type": KIND,
            "peft_version": PEFT_FORMAT,
            "prompt_tuning_init": self.init,
            "prompt_tuning_init_text": self.text,
            "revision": None,
            "task_type": self.task_type,
            "token_dim": self.prompt.shape[1],
            "tokenizer_kwargs": None,
            # PEFT requires a name with a text, though it needs the tokenizer only for training.
            "tokenizer_name_or_path": (self.base_model or "unknown") if self.init == "TEXT" else None,
        }


def write_prompt(folder: Path, file: PromptFile, metadata: Mapping[str, str]) -> None:
    """Write both files, each whole or not at all.

    Raises:
        UserError: the folder cannot be written.
    """
    tensors = {PROMPT: file.prompt, **{f"{PREFIX}{name}": tensor for name, tensor in file.whole.items()}}
    # Copies, since the format refuses tensors that share memory.
    kept = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_adapter(folder, kept, file.settings(), metadata)


def read_prompt(folder: Path) -> PromptFile:
    """Read the soft prompt in ``folder``, deltaw's or PEFT's own.

    Raises:
        UserError: a file is missing or damaged, it is an adapter of another kind, or its parts disagree.
    """
    settings = read_config(folder)
    _refuse_others(settings, folder)
    tensors = read_tensors(folder)
    where = str(folder / ADAPTER_WEIGHTS)
    prompt = tensors.pop(PROMPT, None)
    if prompt is None:
        raise UserError(f"tensor '{PROMPT}' is missing", where=where, hint="save or copy the adapter again")
    shape = (settings.get("num_virtual_tokens"), settings.get("token_dim"))
    if tuple(prompt.shape) != shape:
        raise UserError(
            f"tensor '{PROMPT}' is {tuple(prompt.shape)}, and {ADAPTER_CONFIG} says {shape}",
            where=where,
            hint="save or copy the adapter again",
        )
    for name in tensors:
        if not name.startswith(PREFIX):
            raise UserError(
                f"tensor '{name}' is not part of a soft prompt", where=where, hint="save the adapter again"
            )
    return PromptFile(
        prompt=prompt,
        whole={name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()},
        init=text_or_none(settings.get("prompt_tuning_init")) or "RANDOM",
        text=text_or_none(settings.get("prompt_tuning_init_text")),
        base_model=text_or_none(settings.get("base_model_name_or_path")),
        task_type=text_or_none(settings.get("task_type")),
    )


def _refuse_others(settings: Mapping[str, object], folder: Path) -> None:
    """Raise a UserError if the settings are not those of a prompt for one row of tokens."""
    where = str(folder / ADAPTER_CONFIG)
    kind = settings.get("peft_type") or settings.get("method")
    if kind != KIND:
        raise UserError(
            f"the adapter was made by {kind!r}, not by prompt tuning", where=where, hint="name its own method"
        )
    task, parts = settings.get("task_type"), settings.get("num_transformer_submodules")
    if task not in _TASKS or parts not in (1, None):
        raise UserError(
            f"a soft prompt for task_type {task!r} with {parts} parts is not supported",
            where=where,
            hint="use one for a model that reads one row of tokens",
        )
