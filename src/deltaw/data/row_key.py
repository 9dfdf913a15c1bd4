"""What stored rows depend on: files, tokenizer, template, settings, and the code that makes rows of them.

It knows how to tell whether one of these changed; not what is stored.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from deltaw.cache import versions
from deltaw.data.mixture import Source
from deltaw.data.row_store import FORMAT
from deltaw.data.settings import DataSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Settings that change nothing about a row's tokens. All others count, also those to come.
_WITHOUT = ("train", "eval", "duplicates", "cache", "rows", "columns", "form", "classes", "other_classes")
MADE_BY = (
    *("transformers", "tokenizers", "jinja2", "datasets", "pyarrow", "numpy"),
    *("deltaw.data", "deltaw.hub.terminators"),
)


def facts_of(
    sources: Sequence[Source],
    contents: Sequence[object],
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    encoder: str,
    seed: int,
) -> dict[str, object] | None:
    """Everything that the rows depend on, as JSON can hold it; None where the tokenizer does not say.

    Args:
        contents: of each source. encoder: how records are rendered, the template and its date included.
        seed: decides which rows are chosen, where fewer are asked for.
    """
    identity = tokenizer_identity(tokenizer)
    if identity is None:
        return None
    values = dataclasses.asdict(settings)
    return {
        "format": FORMAT,
        "made by": versions(MADE_BY),
        "sources": [
            [
                content,
                settings.columns if source.columns is None else source.columns,
                source.form or settings.form,
            ]
            for source, content in zip(sources, contents, strict=True)
        ],
        "settings": {key: value for key, value in values.items() if key not in _WITHOUT},
        "chosen": None if settings.rows is None else [settings.rows, seed],
        "tokenizer": identity,
        "encoder": encoder,
    }


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A hash of what a tokenizer does; None for one whose vocabulary is not at hand as text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    digest = hashlib.blake2b(backend.to_str().encode(), digest_size=16)
    told = [
        type(tokenizer).__name__,
        tokenizer.chat_template,
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
    ]
    digest.update(json.dumps(told, sort_keys=True, default=str).encode())
    return digest.hexdigest()
