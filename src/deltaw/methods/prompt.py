"""Prompt tuning: train k vectors prepended to every row, with the model frozen.

"The Power of Scale for Parameter-Efficient Prompt Tuning" (Lester et al. 2021, arXiv 2104.08691). The vectors are the
embeddings of virtual tokens (:mod:`deltaw.runtime.virtual_tokens`), whose ids are prepended to each row and handled
like other tokens. The prompt is computed once for all rows that share it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltaw.errors import UserError
from deltaw.lora.files import read_tensors, task_type_of
from deltaw.lora.fingerprint import FINGERPRINT_KEY, base_fingerprint, warn_other_base
from deltaw.lora.peft_format import PEFT_FORMAT, base_reference, base_settings
from deltaw.lora.replacements import ReplacedParameter
from deltaw.lora.stored import count_logical_parameters
from deltaw.methods.base import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Calibration, Folder, Metadata, Method, Names, Start
from deltaw.methods.files import read_config, read_metadata, text_or_none, write_adapter
from deltaw.methods.parameters import (
    base_restored,
    has_base,
    load_parameters,
    make_trainable,
    names_inside,
    parameters_by_name,
)
from deltaw.methods.settings import PromptSettings
from deltaw.runtime.virtual_tokens import (
    VirtualTokens,
    attach,
    attached,
    detach,
    embedding_weight,
    input_embedding,
    original_embedding,
)

# File format of a soft prompt, compatible with PEFT in both directions.
#
# The prompt is the tensor ``prompt_embeddings`` (k, d). Tensors of extra trainable modules have their parameter names
# with the prefix ``base_model.``. Only safetensors files are read, never pickles.


KIND = "PROMPT_TUNING"
PROMPT = "prompt_embeddings"
PREFIX = "base_model."
CLASSIFIER_MODULES = ("classifier", "score")
"""Name endings of modules that PEFT expects in a classifier's file, even if they were not trained."""

_TASKS = ("CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION", None)


@dataclass(frozen=True)
class PromptFile:
    """Content of an adapter's two files.

    Attributes:
        prompt: (k, d) trained vectors.
        extra_tensors: Tensors of the extra trainable modules, by their names in the model.
        init: Initialization by its PEFT name: RANDOM, SAMPLE_VOCAB or TEXT.
        text: Text of the initialization TEXT.
        base_model: Reference of the base model.
        task_type: PEFT's name of the task, or None if unknown.
        extra_modules: Names of the extra trainable modules.
        heads: Attention heads of a block. PEFT requires it and ignores it.
        layers: Number of blocks. PEFT requires it and ignores it.
    """

    prompt: Tensor
    extra_tensors: Mapping[str, Tensor]
    init: str = "RANDOM"
    text: str | None = None
    base_model: str | None = None
    task_type: str | None = None
    extra_modules: Sequence[str] = ()
    heads: int = 1
    layers: int = 1

    def settings(self) -> dict[str, object]:
        """Return the content of ``adapter_config.json`` with every key that PEFT writes."""
        return {
            "auto_mapping": None,
            **base_settings(self.base_model),
            "inference_mode": True,
            "modules_to_save": list(self.extra_modules) or None,
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
            # PEFT requires a tokenizer name with a text, although only training needs the tokenizer.
            "tokenizer_name_or_path": (self.base_model or "unknown") if self.init == "TEXT" else None,
        }


def write_prompt(folder: Path, file: PromptFile, metadata: Mapping[str, str]) -> None:
    """Write both files atomically.

    Raises:
        UserError: if the folder cannot be written.
    """
    tensors = {PROMPT: file.prompt, **{f"{PREFIX}{name}": tensor for name, tensor in file.extra_tensors.items()}}
    # The format does not allow tensors that share memory, so they are copied.
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_adapter(folder, copies, file.settings(), metadata)


def read_prompt(folder: Path) -> PromptFile:
    """Read the soft prompt in ``folder``, saved by deltaw or PEFT.

    Raises:
        UserError: if a file is missing or damaged, the adapter is of another kind, or its parts are inconsistent.
    """
    settings = read_config(folder)
    location = str(folder / ADAPTER_CONFIG)
    kind = settings.get("peft_type") or settings.get("method")
    if kind != KIND:
        message = f"the adapter was made by {kind!r}, not by prompt tuning"
        raise UserError(message, location=location, hint="use the method that it was trained with")
    task = settings.get("task_type")
    parts = settings.get("num_transformer_submodules")
    if task not in _TASKS or parts not in (1, None):
        message = f"a soft prompt for task_type {task!r} with {parts} parts is not supported"
        raise UserError(message, location=location, hint="use a soft prompt of a model with one input sequence")
    tensors, _ = read_tensors(folder)
    location = str(folder / ADAPTER_WEIGHTS)
    if (prompt := tensors.pop(PROMPT, None)) is None:
        raise UserError(f"tensor '{PROMPT}' is missing", location=location, hint="save or copy the adapter again")
    shape = (settings.get("num_virtual_tokens"), settings.get("token_dim"))
    if tuple(prompt.shape) != shape:
        message = f"tensor '{PROMPT}' is {tuple(prompt.shape)}, but {shape} in {ADAPTER_CONFIG}"
        raise UserError(message, location=location, hint="save or copy the adapter again")
    for name in tensors:
        if not name.startswith(PREFIX):
            raise UserError(f"tensor '{name}' is not part of a soft prompt", location=location, hint="save it again")
    return PromptFile(
        prompt=prompt,
        extra_tensors={name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()},
        init=text_or_none(settings.get("prompt_tuning_init")) or "RANDOM",
        text=text_or_none(settings.get("prompt_tuning_init_text")),
        base_model=base_reference(settings),
        task_type=text_or_none(settings.get("task_type")),
    )


class SoftPrompt(Method):
    """Train ``settings.length`` vectors prepended to every row.

    Args:
        settings: Settings for training. A loaded prompt replaces them. With ``text``, :attr:`tokenizer` must be set.
    """

    name = "prompt"
    section = PromptSettings
    settings: PromptSettings
    default_learning_rate = 0.03
    rate_scales_with_width = False

    def __init__(self, settings: PromptSettings | None = None) -> None:
        super().__init__(settings)
        self.virtual_tokens = self.settings.length
        self._replacements: list[ReplacedParameter] = []
        self._virtual_ids: np.ndarray | None = None
        self._base_fingerprint: str | None = None

    def prepare(self, model: nn.Module, *, seed: int, extra_modules: Names = (), calibrate: Calibration = None) -> str:
        embedding = input_embedding(model)
        weight = embedding_weight(embedding)
        tokens, init_summary = self._initial_tokens(int(weight.shape[0]), seed)
        parameters = parameters_by_name(model)
        replaced = names_inside(extra_modules, parameters)
        self._base_fingerprint = base_fingerprint(model, [parameters[name] for name in replaced])
        with torch.no_grad():
            initial = embedding(tokens.to(weight.device))
        self._replacements = make_trainable(model, replaced)
        layer = attach(model, initial)
        self._set_virtual_ids(layer)
        total = count_logical_parameters(model)
        trained = sum(p.numel() for _, p in self.parameters(model))
        share = f"prompt: {trained:,} of {total:,} parameters trained ({trained / total:.2%})"
        vectors = f"{self.settings.length} vectors of {layer.prompt.shape[1]} prepended to every row"
        extra = f"\n  extra trainable modules: {', '.join(extra_modules)}" if extra_modules else ""
        return f"{share}: {vectors}, {init_summary}{extra}"

    def prepare_from(self, model: nn.Module, start: Start, *, seed: int, extra_modules: Names = ()) -> str:
        summary = self.prepare(model, seed=seed, extra_modules=extra_modules)
        start.require_base(self._base_fingerprint)
        file = read_prompt(start.folder)
        trained = {name: parameter.detach() for name, parameter in self.parameters(model)}
        extra = {name: tensor for name, tensor in file.extra_tensors.items() if name in trained}
        self._copy_start(trained, {"prompt": file.prompt, **extra}, start)
        return summary

    def can_restore_base(self, model: nn.Module) -> bool:
        return has_base(self._replacements)

    @contextlib.contextmanager
    def base_model_active(self, model: nn.Module) -> Iterator[None]:
        """Context manager in which the model behaves as the base model. Rows must not contain virtual tokens."""
        with original_embedding(model), base_restored(model, self._replacements, self.name):
            yield

    def parameters(self, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
        return [("prompt", _layer(model).prompt), *((r.name, r.current) for r in self._replacements)]

    def with_virtual_tokens(self, tokens: np.ndarray) -> np.ndarray:
        """Prepend the ids of the virtual tokens to a row: (length,) to (k + length,).

        They precede the first special token of an encoder too, as in PEFT.
        """
        if self._virtual_ids is None:
            raise RuntimeError("call prepare or load first: they set the ids of the virtual tokens")
        return np.concatenate([self._virtual_ids.astype(tokens.dtype), tokens])

    def save(self, model: nn.Module, folder: Folder, *, base_model: str, metadata: Metadata | None = None) -> None:
        task = task_type_of(model)
        task = task if task in _TASKS else None
        trained = {replacement.name.rpartition(".")[0] for replacement in self._replacements}
        modules = _find_extra_modules(model, [*trained, *(CLASSIFIER_MODULES if task == "SEQ_CLS" else ())])
        current = parameters_by_name(model)
        config = model.config.get_text_config() if isinstance(model, PreTrainedModel) else None
        file = PromptFile(
            prompt=_layer(model).prompt,
            extra_tensors={name: current[name] for name in names_inside(modules, current)},
            init="TEXT" if self.settings.init == "text" else "SAMPLE_VOCAB",
            text=self.settings.text,
            base_model=base_model,
            task_type=task,
            extra_modules=modules,
            heads=getattr(config, "num_attention_heads", 1),
            layers=getattr(config, "num_hidden_layers", 1),
        )
        fingerprint = {} if self._base_fingerprint is None else {FINGERPRINT_KEY: self._base_fingerprint}
        write_prompt(Path(folder), file, {**(metadata or {}), **fingerprint})

    def load(self, model: nn.Module, folder: Folder) -> str:
        file = read_prompt(Path(folder))
        parameters = parameters_by_name(model)
        replaced = [parameters[name] for name in file.extra_tensors if name in parameters]
        self._base_fingerprint = base_fingerprint(model, replaced)
        warn_other_base("the soft prompt", read_metadata(Path(folder)), self._base_fingerprint, folder, file.base_model)
        model.requires_grad_(False)
        layer = attach(model, file.prompt)
        try:
            self._replacements = load_parameters(model, file.extra_tensors, {}, str(folder))
        except UserError:
            detach(model)
            raise
        layer.prompt.requires_grad_(False)
        self._set_virtual_ids(layer)
        text = file.text if file.init == "TEXT" else None
        self.settings = PromptSettings(len(layer.prompt), "text" if text else "random", text or None)
        self.virtual_tokens = self.settings.length
        modules = sorted({name.rpartition(".")[0] for name in file.extra_tensors})
        extras = f", and {', '.join(modules)}" if modules else ""
        return f"a soft prompt of {len(layer.prompt)} vectors{extras} from {folder}"

    def _set_virtual_ids(self, layer: VirtualTokens) -> None:
        self._virtual_ids = np.arange(layer.first_id, layer.first_id + len(layer.prompt), dtype=np.int32)

    def _initial_tokens(self, vocabulary: int, seed: int) -> tuple[Tensor, str]:
        """Return the tokens (k,) whose embeddings initialize the vectors, and a description.

        Token embeddings are inputs that the model has seen in training. Noise with the same variance learned more
        slowly, and N(0, 1), PEFT's default, has a norm that is many times larger.
        """
        length = self.settings.length
        text = self.settings.text
        if text is None:
            generator = torch.Generator().manual_seed(seed)
            return torch.randint(vocabulary, (length,), generator=generator), "initialized with random tokens"
        if self.tokenizer is None:
            hint = "set prompt.init: random"
            raise UserError("the model has no tokenizer to tokenize prompt.text", location="prompt.init", hint=hint)
        # Includes the special tokens that the tokenizer adds to a text, as in PEFT.
        ids = [int(i) for i in self.tokenizer(text)["input_ids"]]
        if not ids or max(ids) >= vocabulary:
            message = "prompt.text has no tokens of the model's vocabulary"
            raise UserError(message, location="prompt.text", hint="use a different text")
        if len(ids) == length:
            description = "initialized with prompt.text"
        elif len(ids) > length:
            description = f"initialized with the first {length} of prompt.text's {len(ids)} tokens"
        else:
            description = f"initialized with prompt.text's {len(ids)} tokens, repeated"
        return torch.tensor((ids * -(-length // len(ids)))[:length]), description


def _layer(model: nn.Module) -> VirtualTokens:
    if (layer := attached(model)) is None:
        raise UserError("the model has no soft prompt", hint="call prepare or load first")
    return layer


def _find_extra_modules(model: nn.Module, endings: Sequence[str]) -> list[str]:
    """Return the outermost modules that PEFT's ``modules_to_save`` would match."""
    suffixes = tuple(endings)
    matches = [name for name, _ in model.named_modules() if name and suffixes and name.endswith(suffixes)]
    return [name for name in matches if not any(name.startswith(f"{other}.") for other in matches)]
