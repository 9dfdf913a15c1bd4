"""Files of a merged model.

Configuration, tokenizer, chat template and terminators are copied from the base model. Files of the run take
precedence.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from deltaw.export.base import AdapterBase
from deltaw.export.merged import MergedModel, MergedTensor
from deltaw.export.merged_config import CONFIG
from deltaw.hub.checkpoint import INDEX, WEIGHTS
from deltaw.hub.sentence_layout import LAYOUT_FILES, copy_layout
from deltaw.hub.terminators import terminators_in
from deltaw.hub.tokenizers import CONFIG_FILES, TOKENIZER_FILES, tokenizer_in
from deltaw.hub.transformers_private import FROM_MODEL_CONFIG
from deltaw.inference.prompting import copy_system
from deltaw.progress import track_progress
from deltaw.settings.task_registry import entry_of
from deltaw.tensor_files import TensorEntry, TensorWriter
from deltaw.version import __version__

GENERATION = "generation_config.json"
# Metadata files to copy from the base model
_COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "NOTICE*")
_NOT_COPIED = (CONFIG, "*.index.json", "adapter_config.json", "run.yaml", "run.json", "summary.json")
RUN_TOKENIZER_FILES = (*TOKENIZER_FILES, *CONFIG_FILES[1:], "chat_template.jinja", "chat_template.json")


def write_weights(model: MergedModel, folder: Path, shard_size: int | None) -> list[str]:
    """Write the merged weights into ``folder`` and return the file names.

    Args:
        model: Merged model.
        folder: Existing folder.
        shard_size: Maximum bytes of tensors per file. A larger tensor gets a separate file. None means the same
            division as in the base model's files.
    """
    shards = split_shards(model.tensors, shard_size)
    count = len(shards)
    names = [WEIGHTS] if count == 1 else [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    total = sum(output.bytes for output in model.tensors)
    num_bytes = 0
    with track_progress("merging", total) as advance:
        for name, shard in zip(names, shards, strict=True):
            # Wider types first, so that each tensor is aligned to its type.
            ordered = sorted(shard, key=lambda output: -output.dtype.itemsize)
            entries = [TensorEntry(output.name, output.dtype, output.shape) for output in ordered]
            with (folder / name).open("wb") as file, TensorWriter(file, entries, {"format": "pt"}) as writer:
                for output in ordered:
                    for rows in output.blocks():
                        writer.write(rows)
                        num_bytes += rows.numel() * rows.element_size()
                        advance(num_bytes)
    if count > 1:
        weights = {output.name: name for name, shard in zip(names, shards, strict=True) for output in shard}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weights.items()))})
    return names


def split_shards(outputs: Sequence[MergedTensor], size: int | None) -> list[list[MergedTensor]]:
    """Group the tensors by output file."""
    if size is None:
        files: dict[str, list[MergedTensor]] = {}
        for output in outputs:
            files.setdefault(output.file, []).append(output)
        return list(files.values())
    shards: list[list[MergedTensor]] = [[]]
    free_bytes = size
    for output in outputs:
        if output.bytes > free_bytes and shards[-1]:
            shards.append([])
            free_bytes = size
        shards[-1].append(output)
        free_bytes -= output.bytes
    return shards


def write_metadata_files(model: MergedModel, folder: Path) -> None:
    """Write all files except the weights: configuration, tokenizer, terminators and model card.

    The tokenizer and the chat template of the adapter's folder take precedence.
    """
    job, base, run = model.job, model.job.base, model.job.run
    has_tokenizer = any((run / name).is_file() for name in TOKENIZER_FILES)
    patterns = [*_COPIED, "*.py"] if base.trust_remote_code else _COPIED
    for source in {path for pattern in patterns for path in base.folder.glob(pattern) if path.is_file()}:
        is_replaced = has_tokenizer and source.name in RUN_TOKENIZER_FILES
        if base.outputs is not None and source.name in LAYOUT_FILES:
            continue  # they describe the vectors of the base model, which the merged model with a head does not return
        if not is_replaced and not any(source.match(pattern) for pattern in _NOT_COPIED):
            shutil.copyfile(source, folder / source.name)
    copy_system(run, folder)
    copy_layout(run, folder)
    for name in RUN_TOKENIZER_FILES if has_tokenizer else ("chat_template.jinja",):
        if (run / name).is_file():
            shutil.copyfile(run / name, folder / name)
    write_json(folder / CONFIG, model.config)
    if entry_of(base.task).generates_text:
        _write_terminators(base, folder)
    properties = {"adapter": str(run), "method": job.adapters[0].method, "precision": job.options.precision}
    if (recipe := job.options.recipe) is not None:
        folders = [run, *job.options.additional_adapters]
        parts = [f"{weight:g} × {path}" for weight, path in zip(recipe.weights, folders, strict=True)]
        properties["combined"] = f"{recipe.method}: {' + '.join(parts)}"
    title = f"`{base.reference}` with an adapter merged into its weights by deltaw {__version__}."
    tags = f"{job.adapters[0].method}, {base.task}, merged, deltaw"
    header = f"---\nbase_model: {base.reference!r}\nlibrary_name: transformers\ntags: [{tags}]\n---\n"
    table = "".join(f"| {name} | {value} |\n" for name, value in properties.items())
    (folder / "README.md").write_text(f"{header}\n{title}\n\n| | |\n| --- | --- |\n{table}", encoding="utf-8")


def _write_terminators(base: AdapterBase, folder: Path) -> None:
    """Add all tokens that end a text of this model to its generation configuration."""
    tokenizer, path = tokenizer_in(folder, base.trust_remote_code), folder / GENERATION
    if tokenizer is None:
        return
    terminators = terminators_in(folder, tokenizer)
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if terminators and isinstance(settings, dict):
        settings["eos_token_id"] = terminators if len(terminators) > 1 else terminators[0]
        settings.pop(FROM_MODEL_CONFIG, None)  # otherwise transformers regenerates the file with a single terminator
        write_json(path, settings)


def write_json(path: Path, value: object) -> None:
    """Write a value as indented JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
