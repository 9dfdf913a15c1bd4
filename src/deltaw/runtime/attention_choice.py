"""Switching a model to another attention function for a while, wherever its modules look that up.

Each module reads the name of its attention from the configuration object that it holds. These are all one,
unless a module was copied: a copy that is trained whole brings its own, which transformers does not know of.

Knows transformers' models; not what the attention computes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from deltaw.hub.quiet import quiet
from deltaw.hub.transformers_private import attention_name, set_attention_name


def set_attention(model: PreTrainedModel, name: str, *, must: bool = True) -> None:
    """Switch to another attention implementation, and check with ``must`` that the whole model followed.

    Raises:
        RuntimeError: the model's own code does not take it.
    """
    with quiet():
        model.set_attn_implementation(name)
    if must and attention_name(model.config.get_text_config()) != name:
        raise RuntimeError(f"{type(model).__name__} does not take another attention implementation")
    for config in _copied(model):
        set_attention_name(config, name)


@contextlib.contextmanager
def attending_by(model: PreTrainedModel, name: str, *, must: bool = True) -> Iterator[None]:
    """While open, the model attends by the function of this name; afterwards as before.

    Raises:
        RuntimeError: with ``must``, where the model does not take it.
    """
    before = attention_name(model.config)
    if before is None:
        if must:
            raise RuntimeError(f"{type(model).__name__} does not tell by which function it attends")
        yield
        return
    try:
        set_attention(model, name, must=must)
        yield
    finally:
        with quiet():
            model.set_attn_implementation(before)
        for config in _copied(model):
            set_attention_name(config, before)


def _copied(model: nn.Module) -> list[PretrainedConfig]:
    """Configurations within the model that are copies of those that transformers switches."""
    known: set[int] = set()
    found: dict[int, PretrainedConfig] = {}
    for module in model.modules():
        config = vars(module).get("config")
        if not isinstance(config, PretrainedConfig):
            continue
        found[id(config)] = config
        if isinstance(module, PreTrainedModel):
            parts = (getattr(config, name, None) for name in getattr(config, "sub_configs", {}))
            known |= {id(config), *(id(part) for part in parts)}
    return [config for key, config in found.items() if key not in known]
