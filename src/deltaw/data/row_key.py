"""What stored rows depend on: files, tokenizer, template, settings, and the code that makes rows of them.

It knows how to tell whether one of these changed; not what is stored.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deltaw.data.mixture import Source
from deltaw.data.row_store import FORMAT
from deltaw.data.settings import DataSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Settings that change nothing about a row's tokens. All others count, also those to come.
_WITHOUT = ("train", "eval", "duplicates", "cache", "rows", "columns", "form", "classes", "other_classes")
_LIBRARIES = ("transformers", "tokenizers", "jinja2")


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
        contents: of each source. encoder: how records are rendered.
        seed: decides which rows are chosen, where fewer are asked for.
    """
    identity = tokenizer_identity(tokenizer)
    if identity is None:
        return None
    values = dataclasses.asdict(settings)
    template = settings.chat_template
    return {
        "format": FORMAT,
        "code": _code(),
        "libraries": [importlib.metadata.version(name) for name in _LIBRARIES],
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
        "template": None if template is None else _content(template),
        "date": settings.date or _date(tokenizer, template),
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


def _date(tokenizer: PreTrainedTokenizerBase, template: str | None) -> str | None:
    """Today, where the template may show it."""
    texts = [json.dumps(tokenizer.chat_template, default=str)]
    if template is not None and Path(template).is_file():
        texts.append(Path(template).read_text(encoding="utf-8", errors="replace"))
    return _today() if any("strftime_now" in text for text in texts) else None


def _today() -> str:
    return str(datetime.date.today())


def _content(path: str) -> str:
    try:
        return hashlib.blake2b(Path(path).expanduser().read_bytes(), digest_size=16).hexdigest()
    except OSError:
        return ""  # whoever renders with it says what is wrong


@functools.cache
def _code() -> str:
    """The state of this package's own text."""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
