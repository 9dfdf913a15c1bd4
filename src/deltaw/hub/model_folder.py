"""What a model's folder leads to besides itself, refused before anything of it is read by others.

Files of a model name other files: an index its shards, a configuration its weights, a tokenizer's settings
its vocabulary. transformers opens some of them wherever they lie. Whoever made the folder would choose which
files of this machine are read. Knows files; loads nothing.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from deltaw.contained import lies_in, require_contained
from deltaw.errors import UserError

_ADAPTER = "adapter_config.json"
# Settings of a tokenizer that are opened as files where they are text, besides those that end in "_file"; of
# these one is never opened, and older tokenizers were saved with the path that it had.
_OPENED, _NOT_OPENED = ("vocab", "merges", "init_inputs"), "special_tokens_map_file"
_SOURCE = "fetch the model from a source that you trust"


def require_own_files(folder: Path) -> None:
    """Refuse a model's folder whose files lead out of it.

    Raises:
        UserError: a link, an index or a setting leads to a file outside of the folder, the weights are not
            in safetensors, or an adapter lies in the same folder, which transformers would apply.
    """
    require_contained(folder)
    if (folder / _ADAPTER).is_file() and (folder / "config.json").is_file():
        raise UserError(
            f"the folder holds a model and an adapter ({_ADAPTER}) as well",
            where=str(folder),
            hint="move one of them into a folder of its own",
        )
    for index in sorted(folder.glob("*.index.json")):
        shards_of(index)
    weights = _setting(folder / "config.json").get("transformers_weights")
    if weights is not None and not (str(weights).endswith(".safetensors") and lies_in(folder, str(weights))):
        raise UserError(
            f"the configuration names '{weights}' as the model's weights, which is not a safetensors file of "
            "its folder",
            where=str(folder / "config.json"),
            hint=_SOURCE,
        )
    settings = _setting(folder / "tokenizer_config.json")
    for key, value in settings.items():
        if key in _OPENED or (key.endswith("_file") and key != _NOT_OPENED):
            for name in value if isinstance(value, list) else [value]:
                _refuse_outside(folder, key, name)


def shards_of(index: Path) -> list[str]:
    """The files that the index of a split checkpoint names.

    Raises:
        UserError: it cannot be read, or names a file that is not beside it.
    """
    try:
        weights = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted({str(file) for file in weights.values()})
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(
            f"the index of the weights cannot be read: {error}",
            where=str(index),
            hint="fetch or copy the model again",
        ) from error
    for file in files:
        if Path(file).name != file or file in ("", ".", ".."):
            raise UserError(
                f"the index names the file '{file}', which is not in the model's folder",
                where=str(index),
                hint=_SOURCE,
            )
    return files


def _refuse_outside(folder: Path, key: str, name: object) -> None:
    # A path that leads nowhere is what its author's machine had, and is not opened.
    if not isinstance(name, str) or lies_in(folder, name):
        return
    try:
        there = os.path.exists(folder / name)
    except ValueError:  # no path at all
        return
    if there:
        raise UserError(
            f"the tokenizer's '{key}' is the file '{name}', which is not in the model's folder",
            where=str(folder / "tokenizer_config.json"),
            hint=_SOURCE,
        )


def _setting(file: Path) -> dict[str, object]:
    """What a JSON file holds; nothing where it holds no settings, which whoever reads it will say."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
