"""A soft prompt on disk, in PEFT's format: PEFT loads what is written here, and the other way round.

The prompt is the tensor ``prompt_embeddings`` (k, d); modules trained whole beside it stand by their names in
the model, behind ``base_model.``. Safetensors only: nothing is unpickled. It knows no models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from deltaw import durable
from deltaw.errors import UserError
from deltaw.lora.peft_format import PEFT_FORMAT
from deltaw.methods.base import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from deltaw.methods.files import read_config

KIND = "PROMPT_TUNING"
PROMPT = "prompt_embeddings"
PREFIX = "base_model."
ALWAYS_WHOLE = ("classifier", "score")
"""PEFT expects every module whose name ends so in the file of a classifier, trained or not."""

_PICKLED = "adapter_model.bin"
_TASKS = ("CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION", None)


@dataclass(frozen=True)
class PromptFile:
    """A soft prompt as it stands on disk.

    Attributes:
        prompt: (k, d).
        whole: tensors of modules trained beside it, by the model's own names.
        init: how it was started, in PEFT's words: RANDOM, SAMPLE_VOCAB, TEXT.
        text: of the start TEXT.
        base_model: what the base model was called.
        task_type: PEFT's name of the task; None where it is not known.
        whole_modules: names of the modules in ``whole``.
        heads: attention heads of a block. layers: blocks. PEFT insists on both, and makes nothing of them.
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
            # PEFT insists on a name beside a text, though it needs the tokenizer only to train.
            "tokenizer_name_or_path": (self.base_model or "unknown") if self.init == "TEXT" else None,
        }


def write_prompt(folder: Path, file: PromptFile, metadata: Mapping[str, str]) -> None:
    """Write both files, each whole or not at all.

    Raises:
        UserError: the folder cannot be written.
    """
    tensors = {PROMPT: file.prompt, **{f"{PREFIX}{name}": tensor for name, tensor in file.whole.items()}}
    # Copies, since tensors that share memory are refused by the format.
    kept = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with durable.replacing(folder / ADAPTER_WEIGHTS) as temporary:
        safetensors.torch.save_file(kept, temporary, metadata={"format": "pt", **metadata})
    text = json.dumps(file.settings(), indent=2, ensure_ascii=False)
    durable.write_text(folder / ADAPTER_CONFIG, text + "\n")


def read_prompt(folder: Path) -> PromptFile:
    """Read the soft prompt in ``folder``, deltaw's or PEFT's own.

    Raises:
        UserError: a file is missing or damaged, it is an adapter of another kind, or its parts disagree.
    """
    settings = read_config(folder)
    _refuse_others(settings, folder)
    tensors = _tensors(folder)
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
                f"tensor '{name}' is no part of a soft prompt", where=where, hint="save the adapter again"
            )
    return PromptFile(
        prompt=prompt,
        whole={name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()},
        init=_text(settings.get("prompt_tuning_init")) or "RANDOM",
        text=_text(settings.get("prompt_tuning_init_text")),
        base_model=_text(settings.get("base_model_name_or_path")),
        task_type=_text(settings.get("task_type")),
    )


def _refuse_others(settings: Mapping[str, object], folder: Path) -> None:
    """Raise where the settings are not those of a prompt in front of one row of tokens."""
    where = str(folder / ADAPTER_CONFIG)
    kind = settings.get("peft_type") or settings.get("method")
    if kind != KIND:
        raise UserError(
            f"the adapter was made by {kind!r}, not by prompt tuning", where=where, hint="name its own method"
        )
    task, parts = settings.get("task_type"), settings.get("num_transformer_submodules")
    if task not in _TASKS or parts not in (1, None):
        raise UserError(
            f"a soft prompt for task_type {task!r} with {parts} parts is not read here",
            where=where,
            hint="give one for a model that reads one row of tokens",
        )


def _tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / ADAPTER_WEIGHTS
    if not path.is_file() and (folder / _PICKLED).exists():
        raise UserError(
            f"the adapter is in {_PICKLED}, a pickle, which could run any code and is not read",
            where=str(folder / _PICKLED),
            hint=f"have whoever made it save it again as {ADAPTER_WEIGHTS}",
        )
    try:
        return dict(safetensors.torch.load_file(path))
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(
            f"the adapter's weights cannot be read: {error}", where=str(path), hint="save or copy it again"
        ) from error


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
