"""The files of a merged model: weights in shards with their index, and all else that a model's folder has.

Weights are written block by block. Configuration, tokenizer, chat template and terminators come from the base
model, and from the run where that has its own.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from deltaw.errors import UserError
from deltaw.export.base import Base
from deltaw.export.merged import MergedModel, Output
from deltaw.export.merged_config import CONFIG
from deltaw.hub.checkpoint import INDEX, WEIGHTS
from deltaw.hub.terminators import terminators_in
from deltaw.hub.tokenizers import TOKENIZER_FILES, tokenizer_in
from deltaw.hub.transformers_private import FOLLOWS_MODEL
from deltaw.tasks import entry_of
from deltaw.tensor_files import Entry, TensorWriter
from deltaw.version import __version__
from deltaw.working import working

GENERATION = "generation_config.json"
# Of the base model: what describes it, and no other weights.
_COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "NOTICE*")
_NOT_COPIED = (CONFIG, "*.index.json", "adapter_config.json", "run.yaml", "summary.json")
OF_TOKENIZER = (
    *TOKENIZER_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "B": 1.0}


def write_weights(model: MergedModel, folder: Path, shard_size: int | None) -> list[str]:
    """Write the merged weights into ``folder``; returns the files' names.

    Args:
        shard_size: the most bytes of tensors in a file (a larger tensor has a file of its own); None divides
            them as the base model's files do.
    """
    shards = shards_of(model.tensors, shard_size)
    count = len(shards)
    names = (
        [WEIGHTS]
        if count == 1
        else [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    )
    total = sum(output.bytes for output in model.tensors)
    done = 0
    with working("merging", total) as advance:
        for name, shard in zip(names, shards, strict=True):
            # Wider types first, so that each tensor lies aligned to its type.
            ordered = sorted(shard, key=lambda output: -output.dtype.itemsize)
            entries = [Entry(output.name, output.dtype, output.shape) for output in ordered]
            with (
                (folder / name).open("wb") as file,
                TensorWriter(file, entries, {"format": "pt"}) as writer,
            ):
                for output in ordered:
                    for rows in output.blocks():
                        writer.write(rows)
                        done += rows.numel() * rows.element_size()
                        advance(done)
    if count > 1:
        weights = {output.name: name for name, shard in zip(names, shards, strict=True) for output in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weights.items()))}
        _write_json(folder / INDEX, index)
    return names


def shards_of(outputs: Sequence[Output], size: int | None) -> list[list[Output]]:
    """The tensors by the file that they will be in."""
    if size is None:
        files: dict[str, list[Output]] = {}
        for output in outputs:
            files.setdefault(output.file, []).append(output)
        return list(files.values())
    shards: list[list[Output]] = [[]]
    room = size
    for output in outputs:
        if output.bytes > room and shards[-1]:
            shards.append([])
            room = size
        shards[-1].append(output)
        room -= output.bytes
    return shards


def write_beside(model: MergedModel, run: Path, folder: Path, facts: Mapping[str, str]) -> None:
    """Write all but the weights: configuration, tokenizer, terminators, a card.

    Args:
        run: the adapter's folder, whose tokenizer and chat template come before the base model's.
        facts: lines of the card.
    """
    base = model.base
    own_tokenizer = any((run / name).is_file() for name in TOKENIZER_FILES)
    for source in _described_by(base, own_tokenizer):
        shutil.copyfile(source, folder / source.name)
    if own_tokenizer:
        for name in OF_TOKENIZER:
            if (run / name).is_file():
                shutil.copyfile(run / name, folder / name)
    elif (run / "chat_template.jinja").is_file():
        shutil.copyfile(run / "chat_template.jinja", folder / "chat_template.jinja")
    _write_json(folder / CONFIG, model.config)
    if entry_of(base.task).writes_text:
        _write_terminators(base, folder)
    write_card(folder, base, model.adapters[0].method, facts)


def write_card(folder: Path, base: Base, method: str, facts: Mapping[str, str]) -> None:
    """``README.md`` of a merged model."""
    lines = [
        "---",
        f"base_model: {base.reference!r}",
        "library_name: transformers",
        f"tags: [{method}, {base.task}, merged, deltaw]",
        "---",
        "",
        f"`{base.reference}` with an adapter merged into its weights by deltaw {__version__}.",
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {name} | {value} |" for name, value in facts.items()),
        "",
    ]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")


def parse_size(text: str) -> int:
    """Bytes of a size such as ``5GB`` or ``200MB``.

    Raises:
        UserError: it is none.
    """
    stripped = text.strip().upper()
    for unit, factor in sorted(_UNITS.items(), key=lambda entry: -len(entry[0])):
        if stripped.endswith(unit):
            try:
                size = int(float(stripped.removesuffix(unit)) * factor)
            except (ValueError, OverflowError):
                break
            if size >= 1:
                return size
            break
    raise UserError(f"'{text}' is no size", where="--shard-size", hint="write it as 5GB or 200MB")


def _described_by(base: Base, own_tokenizer: bool) -> list[Path]:
    """The base model's files that the merged model needs too."""
    patterns = [*_COPIED, "*.py"] if base.trust_remote_code else list(_COPIED)
    found = {path for pattern in patterns for path in base.folder.glob(pattern) if path.is_file()}
    left = {path for pattern in _NOT_COPIED for path in found if path.match(pattern)}
    if own_tokenizer:
        left |= {path for path in found if path.name in OF_TOKENIZER}
    return sorted(found - left)


def _write_terminators(base: Base, folder: Path) -> None:
    """Let every token that ends a text of this model be in its generation configuration."""
    tokenizer = tokenizer_in(folder, base.trust_remote_code)
    if tokenizer is None:
        return
    ends = terminators_in(folder, tokenizer)
    path = folder / GENERATION
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if ends and isinstance(settings, dict):
        settings["eos_token_id"] = ends if len(ends) > 1 else ends[0]
        settings.pop(FOLLOWS_MODEL, None)  # it would be made anew from config.json, with one end
        _write_json(path, settings)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
