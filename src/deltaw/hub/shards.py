"""Index of a checkpoint that is divided into several files."""

from __future__ import annotations

import json
from pathlib import Path

from deltaw.errors import UserError

UNTRUSTED_HINT = "download the model from a source that you trust"


def shard_names(index: Path) -> list[str]:
    """Return the file names in the index of a sharded checkpoint.

    Raises:
        UserError: if the index cannot be read, or refers to a file in another folder.
    """
    try:
        files = sorted({str(file) for file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        hint = "download or copy the model again"
        raise UserError(f"the index of the weights cannot be read: {error}", location=str(index), hint=hint) from error
    for file in files:
        if Path(file).name != file or file in ("", ".", ".."):
            message = f"the index refers to the file '{file}', which is not in the model's folder"
            raise UserError(message, location=str(index), hint=UNTRUSTED_HINT)
    return files


def require_shards(index: Path) -> list[str]:
    """Return the file names in the index of a sharded checkpoint, after checking that they exist.

    Raises:
        UserError: if a file is missing or the index is invalid.
    """
    shards = shard_names(index)
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        message = f"{len(missing)} of {len(shards)} weight files are missing, for example '{missing[0]}'"
        raise UserError(message, location=str(index.parent), hint="download the model again")
    return shards
