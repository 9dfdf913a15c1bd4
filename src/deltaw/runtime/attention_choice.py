"""Choice of the attention implementation of a model, for the time of a context."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from deltaw.hub.transformers_private import attention_name, quiet, set_attention_name


@dataclass(eq=False)
class _AttentionEntry:
    """Entered context, with the implementation that its exit restores."""

    previous: str


_lock = threading.RLock()
# Contexts of each model that are entered, in order.
_entries: weakref.WeakKeyDictionary[PreTrainedModel, list[_AttentionEntry]] = weakref.WeakKeyDictionary()


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

    Contexts of one model may overlap in several threads if they use the same implementation. The last one that exits
    restores the original. The name is stored in the model's configuration, so a copy or pickle of the model that is
    made inside retains it. Call ``set_attn_implementation`` on the copy.

    Raises:
        RuntimeError: if ``must`` is True and the model does not support the implementation.
    """
    if attention_name(model.config) is None:
        if must:
            raise RuntimeError(f"{type(model).__name__} does not specify its attention implementation")
        yield
        return
    with _lock:
        entry = _AttentionEntry(str(attention_name(model.config)))
        entries = _entries.setdefault(model, [])
        entries.append(entry)
    try:
        with _lock:
            set_attention(model, name, must=must)
        yield
    finally:
        with _lock:
            index = entries.index(entry)
            del entries[index]
            if index < len(entries):  # a later context of another thread restores it
                entries[index].previous = entry.previous
            else:
                set_attention(model, entry.previous, must=False)


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
