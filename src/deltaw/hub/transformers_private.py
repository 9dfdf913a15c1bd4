"""All private names of transformers that deltaw uses, in one place, each with what is done without it.

As :mod:`deltaw.kernels.torch_private`, for models' classes and configurations. If a name is missing, the
slower way is taken (padded rows instead of packed ones, plain attention), or what needs it is refused.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
import transformers
from torch import nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from deltaw.errors import UserError
from deltaw.private_names import look_up

_NAMES_ATTENTION = look_up(PretrainedConfig, "_attn_implementation") is not None
# In a configuration's file: where it was read from, and that generation's settings follow from it.
READ_FROM = "_name_or_path"
FOLLOWS_MODEL = "_from_model_config"


def attention_name(config: object) -> str | None:
    """The attention that a configuration's modules look up; None where it does not tell."""
    return getattr(config, "_attn_implementation", None) if _NAMES_ATTENTION else None


def set_attention_name(config: PretrainedConfig, name: str) -> None:
    """Let the modules that hold this configuration attend by another function."""
    if _NAMES_ATTENTION:
        config._attn_implementation = name


def has_sdpa(model: nn.Module) -> bool:
    """Whether a model says that it attends by torch's own function; without the name, it does not."""
    return bool(look_up(model, "_supports_sdpa"))


def dispatches_attention(model: nn.Module) -> bool:
    """Whether a model says that it looks up its attention; without the name, it does not."""
    return bool(look_up(model, "_supports_attention_backend"))


def configurations_of(auto_model: str) -> Container[type[PretrainedConfig]] | None:
    """The classes of configurations that an auto class makes models of; None where it does not tell."""
    return look_up(getattr(transformers, auto_model), "_model_mapping")


def made_from_config(kind: type[PreTrainedModel], config: PretrainedConfig, dtype: torch.dtype) -> Any:
    """A model of a class, with parameters of this type."""
    make = look_up(kind, "_from_config")
    return nn.Module.to(kind(config), dtype) if make is None else make(config, dtype=dtype)


def initialize(model: PreTrainedModel, module: nn.Module) -> None:
    """Give a module of a model its first values, as the model's own code does.

    Raises:
        UserError: this version of transformers does so in another way.
    """
    make = look_up(model, "_init_weights")
    if make is None:
        what = f"transformers {transformers.__version__} has no PreTrainedModel._init_weights, which a new head needs"
        raise UserError(what, hint="install another version of transformers, or of deltaw")
    make(module)


def forget_origin(config: PretrainedConfig) -> None:
    """Take out of a configuration which file it was read from."""
    vars(config).pop("_model_name_or_path", None)


def settle(config: GenerationConfig) -> None:
    """Let generation's settings be what they are, instead of following from the model's configuration."""
    if look_up(config, FOLLOWS_MODEL) is not None:
        setattr(config, FOLLOWS_MODEL, False)
