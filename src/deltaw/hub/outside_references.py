"""Rejection of references out of a model's folder.

A model's index, configuration and tokenizer settings refer to other files, and transformers opens some of them outside
of the folder. An untrusted folder could make it read arbitrary files, so such references are rejected.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from deltaw.errors import UserError
from deltaw.hub.shards import UNTRUSTED_HINT, shard_names
from deltaw.untrusted_paths import AllowedFolders, is_inside, require_contained

ADAPTER_CONFIG = "adapter_config.json"
# Tokenizer settings that transformers opens as files, in addition to those that end in "_file". The exception is
# never opened, and old tokenizers contain paths in it.
_OPENED = ("vocab", "merges", "init_inputs")
_NOT_OPENED = "special_tokens_map_file"


def require_own_files(folder: Path) -> None:
    """Reject a model's folder that refers to files outside of it.

    Raises:
        UserError: if a link, an index or a setting refers to a file outside of the folder, the weights are not
            safetensors, or the folder also contains an adapter, which transformers would apply.
    """
    require_contained(folder)
    if (folder / ADAPTER_CONFIG).is_file() and (folder / "config.json").is_file():
        hint = "move one of them into a separate folder"
        raise UserError(
            f"the folder contains both model and adapter ({ADAPTER_CONFIG})", location=str(folder), hint=hint
        )
    for index in sorted(folder.glob("*.index.json")):
        shard_names(index)
    weights = read_json_object(folder / "config.json").get("transformers_weights")
    if weights is not None and not (str(weights).endswith(".safetensors") and is_inside(folder, str(weights))):
        message = f"the configuration refers to the weights '{weights}', which is not a safetensors file in its folder"
        raise UserError(message, location=str(folder / "config.json"), hint=UNTRUSTED_HINT)
    for key, value in read_json_object(folder / "tokenizer_config.json").items():
        if key in _OPENED or (key.endswith("_file") and key != _NOT_OPENED):
            for name in value if isinstance(value, list) else [value]:
                _require_inside(folder, key, name)


def _require_inside(folder: Path, key: str, name: object) -> None:
    # A path that does not exist comes from its author's machine and is not opened.
    if not isinstance(name, str) or is_inside(folder, name):
        return
    try:
        exists = os.path.exists(folder / name)
    except ValueError:  # not a valid path
        return
    # A restricted process must not reveal which files exist.
    if exists or AllowedFolders.of_process() is not None:
        message = f"the tokenizer's '{key}' is the file '{name}', which is not in the model's folder"
        raise UserError(message, location=str(folder / "tokenizer_config.json"), hint=UNTRUSTED_HINT)


def read_json_object(file: Path) -> dict[str, object]:
    """Return the object in a JSON file, or an empty dictionary if the file is missing or invalid."""
    try:
        value = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None  # not a pipe
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
