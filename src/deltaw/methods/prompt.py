"""Prompt tuning: train k vectors prepended to every row, and nothing of the model.

"The Power of Scale for Parameter-Efficient Prompt Tuning" (Lester et al. 2021, arXiv 2104.08691). The
vectors are the embeddings of virtual tokens (:mod:`deltaw.runtime.virtual_tokens`). Their k ids are prepended
to each row; the rest of the program treats them like any token. The prompt is computed once for all rows that
share it.

It knows models and their embeddings; not data files or training.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltaw.errors import UserError
from deltaw.lora.files import read_tensors, task_type_of
from deltaw.lora.fingerprint import FINGERPRINT_KEY, base_fingerprint, warn_of_base
from deltaw.lora.peft_format import PEFT_FORMAT, base_reference, base_settings
from deltaw.lora.places import ParameterPlace
from deltaw.lora.stored import count_numbers
from deltaw.methods.base import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Calibration, Folder, Metadata, Method
from deltaw.methods.files import metadata_of, read_config, text_or_none, write_adapter
from deltaw.methods.parameters import as_base, inside, keep_base, names_of, put_loaded, train_places
from deltaw.methods.settings import PromptSettings
from deltaw.runtime.virtual_tokens import (
    VirtualTokens,
    attach,
    attached,
    detach,
    input_embedding,
    own_embedding,
    weight_of,
)

# A soft prompt on disk, in PEFT's format: each loads what the other writes.
#
# The prompt is the tensor ``prompt_embeddings`` (k, d). Extra trainable modules have their names in the model
# with the prefix ``base_model.``. Safetensors only: nothing is unpickled. It knows no models.


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
            **base_settings(self.base_model),
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
    settings, where = read_config(folder), str(folder / ADAPTER_CONFIG)
    kind = settings.get("peft_type") or settings.get("method")
    if kind != KIND:
        what = f"the adapter was made by {kind!r}, not by prompt tuning"
        raise UserError(what, where=where, hint="name its own method")
    task, parts = settings.get("task_type"), settings.get("num_transformer_submodules")
    if task not in _TASKS or parts not in (1, None):
        what = f"a soft prompt for task_type {task!r} with {parts} parts is not supported"
        raise UserError(what, where=where, hint="use one for a model that reads one row of tokens")
    tensors, _ = read_tensors(folder)
    where = str(folder / ADAPTER_WEIGHTS)
    if (prompt := tensors.pop(PROMPT, None)) is None:
        raise UserError(f"tensor '{PROMPT}' is missing", where=where, hint="save or copy the adapter again")
    shape = (settings.get("num_virtual_tokens"), settings.get("token_dim"))
    if tuple(prompt.shape) != shape:
        what = f"tensor '{PROMPT}' is {tuple(prompt.shape)}, and {ADAPTER_CONFIG} says {shape}"
        raise UserError(what, where=where, hint="save or copy the adapter again")
    for name in tensors:
        if not name.startswith(PREFIX):
            raise UserError(f"tensor '{name}' is not part of a soft prompt", where=where, hint="save the adapter again")
    return PromptFile(
        prompt=prompt,
        whole={name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()},
        init=text_or_none(settings.get("prompt_tuning_init")) or "RANDOM",
        text=text_or_none(settings.get("prompt_tuning_init_text")),
        base_model=base_reference(settings),
        task_type=text_or_none(settings.get("task_type")),
    )


class Prompt(Method):
    """Train ``settings.length`` vectors prepended to every row.

    Args:
        settings: for training; a loaded prompt brings its own length.
        tokenizer: tokenizes ``settings.text``; needed for that alone.
    """

    name = "prompt"
    section = PromptSettings
    settings: PromptSettings
    usual_rate = 0.03
    falls_with_width = False

    def __init__(
        self, settings: PromptSettings | None = None, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        super().__init__(settings)
        self.tokenizer = tokenizer
        self.virtual_tokens = self.settings.length
        self._places: list[ParameterPlace] = []
        self._virtual_ids: np.ndarray | None = None
        self._base_fingerprint: str | None = None

    def prepare(
        self, model: nn.Module, *, seed: int, extra_modules: Sequence[str] = (), calibrate: Calibration | None = None
    ) -> str:
        embedding = input_embedding(model)
        weight = weight_of(embedding)
        tokens, said = self._first_tokens(int(weight.shape[0]), seed)
        own = names_of(model)
        replaced = inside(extra_modules, own)
        self._base_fingerprint = base_fingerprint(model, [own[name] for name in replaced])
        with torch.no_grad():
            start = embedding(tokens.to(weight.device))
        self._places = train_places(model, replaced)
        layer = attach(model, start)
        self._know(layer)
        total = count_numbers(model)
        trained = sum(p.numel() for _, p in self.parameters(model))
        share = f"prompt: {trained:,} of {total:,} parameters trained ({trained / total:.2%})"
        vectors = f"{self.settings.length} vectors of {layer.prompt.shape[1]} prepended to every row"
        extra = f"\n  extra trainable modules: {', '.join(extra_modules)}" if extra_modules else ""
        return f"{share}: {vectors}, {said}{extra}"

    def keeps_base(self, model: nn.Module) -> bool:
        return keep_base(self._places)

    @contextlib.contextmanager
    def without(self, model: nn.Module) -> Iterator[None]:
        """Rows must then come without virtual tokens: the base model's embedding knows real tokens only."""
        with own_embedding(model), as_base(model, self._places, self.name):
            yield

    def parameters(self, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
        return [("prompt", _layer(model).prompt), *((place.name, place.current) for place in self._places)]

    def with_virtual_tokens(self, tokens: np.ndarray) -> np.ndarray:
        """The row with the ids of the virtual tokens prepended: (length,) to (k + length,).

        An encoder's first token comes after the prompt too, as in PEFT.
        """
        if self._virtual_ids is None:
            raise RuntimeError("prepare or load the method first: that fixes the ids of virtual tokens")
        return np.concatenate([self._virtual_ids.astype(tokens.dtype), tokens])

    def save(self, model: nn.Module, folder: Folder, *, base_model: str, metadata: Metadata | None = None) -> None:
        task = task_type_of(model)
        task = task if task in _TASKS else None
        trained = {place.name.rpartition(".")[0] for place in self._places}
        modules = _whole_modules(model, [*trained, *(ALWAYS_WHOLE if task == "SEQ_CLS" else ())])
        current = names_of(model)
        config = model.config.get_text_config() if isinstance(model, PreTrainedModel) else None
        file = PromptFile(
            prompt=_layer(model).prompt,
            whole={name: current[name] for name in inside(modules, current)},
            init="TEXT" if self.settings.init == "text" else "SAMPLE_VOCAB",
            text=self.settings.text,
            base_model=base_model,
            task_type=task,
            whole_modules=modules,
            heads=getattr(config, "num_attention_heads", 1),
            layers=getattr(config, "num_hidden_layers", 1),
        )
        of_base = {} if self._base_fingerprint is None else {FINGERPRINT_KEY: self._base_fingerprint}
        write_prompt(Path(folder), file, {**(metadata or {}), **of_base})

    def load(self, model: nn.Module, folder: Folder) -> str:
        file = read_prompt(Path(folder))
        own = names_of(model)
        replaced = [own[name] for name in file.whole if name in own]
        self._base_fingerprint = base_fingerprint(model, replaced)
        metadata = metadata_of(Path(folder))
        warn_of_base("the soft prompt", metadata, self._base_fingerprint, folder, file.base_model)
        model.requires_grad_(False)
        layer = attach(model, file.prompt)
        try:
            self._places = put_loaded(model, file.whole, {}, str(folder))
        except UserError:
            detach(model)
            raise
        layer.prompt.requires_grad_(False)
        self._know(layer)
        text = file.text if file.init == "TEXT" else None
        self.settings = PromptSettings(len(layer.prompt), "text" if text else "random", text or None)
        self.virtual_tokens = self.settings.length
        whole = sorted({name.rpartition(".")[0] for name in file.whole})
        extras = f", and {', '.join(whole)}" if whole else ""
        return f"a soft prompt of {len(layer.prompt)} vectors{extras} from {folder}"

    def _know(self, layer: VirtualTokens) -> None:
        self._virtual_ids = np.arange(layer.first_id, layer.first_id + len(layer.prompt), dtype=np.int32)

    def _first_tokens(self, vocabulary: int, seed: int) -> tuple[Tensor, str]:
        """The tokens (k,) whose embeddings initialize the vectors, and a few words on them.

        Token embeddings are inputs that the model knows. Noise with the same variance learned more slowly.
        N(0, 1), PEFT's default, has many times their norm.
        """
        length, text = self.settings.length, self.settings.text
        if text is None:
            generator = torch.Generator().manual_seed(seed)
            return torch.randint(vocabulary, (length,), generator=generator), "initialized with random tokens"
        if self.tokenizer is None:
            hint = "set prompt.init: random"
            raise UserError("the model has no tokenizer to tokenize prompt.text", where="prompt.init", hint=hint)
        # With the special tokens that the tokenizer adds to a text, as in PEFT.
        ids = [int(i) for i in self.tokenizer(text)["input_ids"]]
        if not ids or max(ids) >= vocabulary:
            what = "prompt.text has no tokens of the model's vocabulary"
            raise UserError(what, where="prompt.text", hint="give another text")
        if len(ids) == length:
            said = "initialized with prompt.text"
        elif len(ids) > length:
            said = f"initialized with the first {length} of prompt.text's {len(ids)} tokens"
        else:
            said = f"initialized with prompt.text's {len(ids)} tokens, repeated"
        repeated = ids * -(-length // len(ids))
        return torch.tensor(repeated[:length]), said


def _layer(model: nn.Module) -> VirtualTokens:
    if (layer := attached(model)) is None:
        raise UserError("the model has no soft prompt", hint="prepare the method, or load a prompt, first")
    return layer


def _whole_modules(model: nn.Module, endings: Sequence[str]) -> list[str]:
    """The modules that PEFT's ``modules_to_save`` would match, without those inside others."""
    ends = tuple(endings)
    hits = [name for name, _ in model.named_modules() if name and ends and name.endswith(ends)]
    return [name for name in hits if not any(name.startswith(f"{other}.") for other in hits)]
