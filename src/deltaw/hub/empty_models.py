"""Configurations of models, and models with uninitialized values built from them.

Pages that are never written use no physical memory, so a large model can be created before its weights are read.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import transformers
from huggingface_hub import errors as hub_errors
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from deltaw.errors import UserError, first_line
from deltaw.hub import vision
from deltaw.hub.folders import remote_code_error
from deltaw.hub.transformers_private import configurations_of, quiet
from deltaw.machine.choices import Choice, dtype_of
from deltaw.settings import task_registry

T = TypeVar("T")


def build_empty(
    folder: Path, config: PretrainedConfig, task: str, dtype: str, attention: str, trust_remote_code: bool
) -> tuple[PreTrainedModel, str]:
    """Build a model with tied weights and uninitialized values.

    Returns:
        The model, and the attention implementation that it uses.

    Raises:
        UserError: if the architecture does not support the task or the configuration is invalid.
    """
    auto = auto_class(config, task)

    def make(attention: str) -> PreTrainedModel:
        options = {"attn_implementation": attention, "trust_remote_code": trust_remote_code}
        with no_init_weights():
            return auto.from_config(config, dtype=dtype_of(dtype), **options)

    model, attention = with_attention(make, attention, config, task, folder)
    model.tie_weights()  # skipped by no_init_weights
    return used_part(model, task), attention


def auto_class(config: PretrainedConfig, task: str) -> Any:
    """Return transformers' class that builds a model for a task."""
    name = task_registry.entry_of(task).auto_model
    return getattr(transformers, vision.AUTO_MODEL if vision.loads_as_text_view(config, name) else name)


def with_attention(
    make: Callable[[str], T], attention: str, config: PretrainedConfig, task: str, folder: Path
) -> tuple[T, str]:
    """Return the result of ``make`` and the attention implementation, with eager attention as the fallback for sdpa.

    Raises:
        UserError: if the architecture does not support the task, the files cannot be read, or the model requires its
            own code.
    """
    if attention == "sdpa" and caps_scores(config):
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
    return with_attention(make, "eager", config, task, folder)


def caps_scores(config: object) -> bool:
    """Return True if attention scores are capped.

    torch's fused attention does not support this, and transformers before 5.21 ignores it.
    """
    text = config.get_text_config(decoder=True) if isinstance(config, PretrainedConfig) else None
    return bool(getattr(text, "attn_logit_softcapping", None))


def attention_choice(used: str, requested: str, config: PretrainedConfig) -> Choice[str]:
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


def used_part(model: PreTrainedModel, task: str) -> PreTrainedModel:
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
