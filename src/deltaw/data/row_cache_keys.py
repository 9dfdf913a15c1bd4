"""Parts of the cache key of tokenized rows: tokenizer, template, settings and code versions."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Settings that do not affect the tokens of a row. All other settings are part of the cache key.
IGNORED_SETTINGS = ("train", "eval", "duplicates", "cache", "rows", "columns", "form", "classes", "other_classes")
_PACKAGES = ("transformers", "tokenizers", "jinja2", "datasets", "pyarrow", "numpy")
_SETTINGS = tuple(f"deltaw.settings.{name}" for name in ("columns", "data", "mixture", "row_kinds"))
CACHE_DEPENDENCIES = (*_PACKAGES, *_SETTINGS, "deltaw.data", "deltaw.hub.terminators")


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return a hash of a tokenizer's behavior, or None if its vocabulary cannot be serialized."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    digest = hashlib.blake2b(backend.to_str().encode(), digest_size=16)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    config = [type(tokenizer).__name__, tokenizer.chat_template, special]
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    return digest.hexdigest()
