"""Choice of the attention implementation of a model, for the time of a context."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from deltaw.hub.transformers_private import attention_name, quiet, set_attention_name


def set_attention(model: PreTrainedModel, name: str, *, must: bool = True) -> None:
    """Switch the model to another attention implementation.

    Configurations of copied modules, such as fully trained copies, are not shared with the model and are updated too.

    Args:
        must: True to check that the entire model uses the implementation.

    Raises:
        RuntimeError: if the model does not support the implementation.
    """
    with quiet():
        model.set_attn_implementation(name)
    if must and attention_name(model.config.get_text_config()) != name:
        raise RuntimeError(f"{type(model).__name__} does not support another attention implementation")
    for config in _copied_configs(model):
        set_attention_name(config, name)


@contextlib.contextmanager
def use_attention(model: PreTrainedModel, name: str, *, must: bool = True) -> Iterator[None]:
    """Context in which the model uses another attention implementation.

    Raises:
        RuntimeError: if ``must`` is True and the model does not support the implementation.
    """
    previous = attention_name(model.config)
    if previous is None:
        if must:
            raise RuntimeError(f"{type(model).__name__} does not specify its attention implementation")
        yield
        return
    try:
        set_attention(model, name, must=must)
        yield
    finally:
        with quiet():
            model.set_attn_implementation(previous)
        for config in _copied_configs(model):
            set_attention_name(config, previous)


def _copied_configs(model: nn.Module) -> list[PretrainedConfig]:
    """Return configurations of copied modules, which transformers does not update."""
    shared_ids: set[int] = set()
    configs: dict[int, PretrainedConfig] = {}
    for module in model.modules():
        config = vars(module).get("config")
        if isinstance(config, PretrainedConfig):
            configs[id(config)] = config
        if isinstance(module, PreTrainedModel):
            parts = (getattr(config, name, None) for name in getattr(config, "sub_configs", {}))
            shared_ids |= {id(config), *(id(part) for part in parts)}
    return [config for key, config in configs.items() if key not in shared_ids]
