"""Private names of transformers, with fallbacks, and a context that silences its messages.

Like :mod:`deltaw.kernels.torch_private`, for model and configuration classes. If a name is missing, a slower
implementation is used (padded rows, eager attention), or an error names the missing feature.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
from collections.abc import Callable, Container, Iterator
from typing import Any

import torch
import transformers
from torch import nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from deltaw.errors import UserError, look_up


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within the block, transformers reports only errors and displays no progress bars."""
    verbosity = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def silence_missing_kernels() -> None:
    """Stop transformers' advice to install kernels for recurrent layers, which deltaw's operators replace."""
    logging.get_logger("transformers.integrations.hub_kernels").setLevel(logging.ERROR)


# Option of from_pretrained. Without it, transformers 5.25 and later download and run code for devices other than CPUs.
WITHOUT_HUB_KERNELS = {"use_kernels": False}
_NAMES_ATTENTION = look_up(PretrainedConfig, "_attn_implementation") is not None
# Keys of configuration files: source of the configuration, and flag for generation settings derived from it.
NAME_OR_PATH = "_name_or_path"
FROM_MODEL_CONFIG = "_from_model_config"


def attention_name(config: object) -> str | None:
    """Return the attention implementation of a configuration, or None if unknown."""
    return getattr(config, "_attn_implementation", None) if _NAMES_ATTENTION else None


def set_attention_name(config: PretrainedConfig, name: str) -> None:
    """Set the attention implementation of all modules that share this configuration."""
    if _NAMES_ATTENTION:
        config._attn_implementation = name


def has_sdpa(model: nn.Module) -> bool:
    """Return True if the model declares support for torch's fused attention."""
    return bool(look_up(model, "_supports_sdpa"))


def dispatches_attention(model: nn.Module) -> bool:
    """Return True if the model declares that it dispatches attention by name."""
    return bool(look_up(model, "_supports_attention_backend"))


def has_split_experts(module: nn.Module) -> bool:
    """Return True if a module of routed experts contains only those of one of several processes."""
    return bool(getattr(module, "_is_expert_parallel", False))


def configurations_of(auto_model: str) -> Container[type[PretrainedConfig]] | None:
    """Return the configuration classes that an auto class supports, or None if unknown."""
    return look_up(getattr(transformers, auto_model), "_model_mapping")


def build_from_config(kind: type[PreTrainedModel], config: PretrainedConfig, dtype: torch.dtype) -> Any:
    """Build a model of a class with parameters of this type."""
    factory = look_up(kind, "_from_config")
    return nn.Module.to(kind(config), dtype) if factory is None else factory(config, dtype=dtype)


def complete_skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """Return a vision-language model with this configuration on the meta device."""
    with torch.device("meta"), quiet():
        model: PreTrainedModel = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    return model.requires_grad_(False).eval()


def initialize(model: PreTrainedModel, module: nn.Module) -> None:
    """Initialize a module with the initialization of the model.

    Raises:
        UserError: if this version of transformers lacks the required method.
    """
    initializer = look_up(model, "_init_weights")
    if initializer is None:
        message = f"transformers {transformers.__version__} lacks PreTrainedModel._init_weights, needed for a new head"
        raise UserError(message, hint="install another version of transformers, or of deltaw")
    initializer(module)


def remove_source_path(config: PretrainedConfig) -> None:
    """Remove the source file of a configuration."""
    vars(config).pop("_model_name_or_path", None)


def detach_from_model_config(config: GenerationConfig) -> None:
    """Mark generation settings as independent of the model's configuration."""
    if look_up(config, FROM_MODEL_CONFIG) is not None:
        setattr(config, FROM_MODEL_CONFIG, False)


# Functions of modeling modules that carry a state from token to token.
CONVOLUTION_FUNCTION = "causal_conv1d_fn"
DELTA_RULE_FUNCTION = "torch_chunk_gated_delta_rule"
STATE_SPACE_FUNCTION = "mamba2_chunk_scan"
_REPLACED = "_deltaw_original"


def replace_functions(model: nn.Module, name: str, replacement: Callable[..., Any]) -> None:
    """Replace a function of the modules of transformers that define the layers of ``model``, once per module.

    Args:
        name: Name of the function. Modules without it are unchanged.
        replacement: Called with the original function and the arguments.
    """
    for module_name in {type(layer).__module__ for layer in model.modules()}:
        if not module_name.startswith("transformers.models."):
            continue
        namespace = vars(sys.modules[module_name])
        original = namespace.get(name)
        if original is not None and not hasattr(original, _REPLACED):
            replaced = functools.wraps(original)(functools.partial(replacement, original))
            setattr(replaced, _REPLACED, original)
            namespace[name] = replaced
