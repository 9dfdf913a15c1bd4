"""GGUF export for llama.cpp: an adapter merged into its base model, or only the adapter.

Tensors are merged, packed and written one at a time. Metadata is copied from the base model's GGUF file, or created
from the configuration and the tokenizer if the base model is not a GGUF file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import gguf
import numpy as np
from gguf import GGUFReader, GGUFType, GGUFWriter
from transformers import PreTrainedTokenizerBase

from deltaw.errors import UserError
from deltaw.export.base import AdapterBase, ExportResult
from deltaw.export.gguf_architectures import CONVERTER_HINT, Architecture, find_architecture
from deltaw.export.gguf_file import KINDS, Shapes, copy_metadata, open_gguf, require_kind, storage_type, write_gguf
from deltaw.export.gguf_hyperparameters import add_hyperparameters, rope_tensors
from deltaw.export.gguf_tensors import GGUFTensor, is_in_language_model, language_name
from deltaw.export.gguf_tokenizer import add_chat_template, add_tokenizer, extract_vocabulary, require_tokenizer
from deltaw.export.gguf_vision import has_vision_file, mmproj_path, split_tensors, vision_file
from deltaw.export.merge_plan import MergeOptions, MergePlan, prepare_merge
from deltaw.export.merged import MergedModel, MergedTensor, NeedsMemoryMerge, assemble
from deltaw.export.portable import require_text
from deltaw.hub.terminators import terminators_in
from deltaw.progress import LogFunction, ignore_line

_TEXT_ONLY = (
    "note: the file contains only the language model; for images, use the vision file (mmproj) of the base model"
)
# Masks and frequencies stored by old versions of transformers.
_UNUSED = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
# Metadata of the base model's file that does not apply to the new file or is written separately.
_NOT_COPIED = ("general.", "split.", "quantize.", "deltaw.")


def export_gguf(
    run: Path, path: Path, kind: str = "f16", options: MergeOptions | None = None, log: LogFunction = ignore_line
) -> ExportResult:
    """Merge the adapter of a run into its base model and write a GGUF file.

    The vision tower and the connector of a vision-language model are written to :func:`mmproj_path`.

    Args:
        run: Folder of a run, or of a PEFT adapter.
        path: Path of the file, which is written atomically.
        kind: Storage type of matrices, a key of :data:`~deltaw.export.gguf_file.KINDS`.
        options: Options of the merge, for example the base model.
        log: Receives messages for the user.

    Raises:
        UserError: if the adapter cannot be merged, the model family or its tokenizer is not supported, or the file
            cannot be written. In this case no file is written.
    """
    require_kind(kind)
    with prepare_merge(run, options or MergeOptions(precision="fp32"), log) as job:
        base = job.base
        require_text(base, run)
        architecture = find_architecture(base.config)
        merged = assemble_streamed(job)
        tokenizer = base.tokenizer(run)
        notes = list(merged.notes)
        vision = None
        language = merged.tensors
        if base.is_view:
            language, others = split_tensors(merged)
            model_type = base.skeleton().config.model_type
            if has_vision_file(model_type) or any(tensor.changes for tensor in others.values()):
                vision = vision_file(base, tokenizer, others)
            else:
                notes.append(_TEXT_ONLY)
        elif any("language_model." in tensor.name for tensor in language):
            language = tuple(t for t in language if t.changes or is_in_language_model(t.name))
            notes.append(_TEXT_ONLY)
        outputs = _outputs(merged, language, architecture)
        source = None if base.gguf is None else open_gguf(base.gguf)
        if source is None:
            extra_tensors = rope_tensors(base.config)
            tokenizer = require_tokenizer(tokenizer, base.folder)
            extract_vocabulary(tokenizer, int(base.config.vocab_size))  # raises an error for unsupported tokenizers
        else:
            _require_architecture(source, architecture, base)
            extra_tensors = {tensor.name: np.array(tensor.data) for tensor in source.tensors if "rope_" in tensor.name}

        def metadata(out: GGUFWriter) -> None:
            out.add_type(GGUFType.MODEL)
            add_origin(out, run, base)
            out.add_file_type(int(KINDS[kind][2]))
            out.add_quantization_version(gguf.GGML_QUANT_VERSION)
            if source is not None:
                _copy(source, out, tokenizer)
                return
            assert tokenizer is not None
            notes.extend(add_hyperparameters(out, architecture, base.config))
            add_tokenizer(out, tokenizer, int(base.config.vocab_size), terminators_in(base.folder, tokenizer))

        def tensors() -> Iterator[tuple[str, np.ndarray]]:
            yield from extra_tensors.items()
            for name, output in outputs.items():
                yield name, output.load().numpy()

        tensor_shapes = {name: numbers.shape for name, numbers in extra_tensors.items()}
        tensor_shapes |= {name: output.shape for name, output in outputs.items()}
        shapes: Shapes = {name: (shape, storage_type(name, shape, kind)) for name, shape in tensor_shapes.items()}
        write_gguf(path, architecture.name, metadata, shapes, tensors())
        if vision is not None:
            vision.write(mmproj_path(path), kind, lambda out: add_origin(out, run, base))
            notes += vision.notes
    for note in notes:
        log(note)
    types = Counter(stored.name for _, stored in shapes.values())
    type_counts = ", ".join(f"{count} {name}" for name, count in sorted(types.items()))
    summary = f"{len(shapes)} tensors ({type_counts})"
    details: dict[str, object] = {"tensors": len(shapes), "kind": kind, "types": dict(types), "notes": notes}
    if vision is not None:
        details["mmproj"] = str(mmproj_path(path))
    return export_result(path, architecture, summary, **details)


def assemble_streamed(job: MergePlan) -> MergedModel:
    try:
        return assemble(job)
    except NeedsMemoryMerge as error:
        message = f"the model cannot be exported tensor by tensor: {error}"
        raise UserError(message, location=str(job.run), hint=CONVERTER_HINT) from error


def export_result(path: Path, architecture: Architecture, summary: str, **details: object) -> ExportResult:
    """Return the result for a written file."""
    size = path.stat().st_size
    lines = [f"architecture {architecture.name}", summary, f"{size / 1e6:.1f} MB"]
    return ExportResult({"path": str(path), "size": size, "architecture": architecture.name, **details}, lines)


def add_origin(out: GGUFWriter, run: Path, base: AdapterBase) -> None:
    """Write the file's name and its base model."""
    out.add_name(run.resolve().name)
    out.add_base_model_count(1)
    out.add_base_model_name(0, base.source.name)


def _outputs(merged: MergedModel, tensors: Iterable[MergedTensor], architecture: Architecture) -> dict[str, GGUFTensor]:
    """Return the tensors of the file by name.

    Raises:
        UserError: if llama.cpp has no such tensor.
    """
    base = merged.job.base
    tied = bool(base.config.tie_word_embeddings) and not merged.untied
    forms = architecture.forms(base.config, tied=tied)
    outputs: dict[str, GGUFTensor] = {}
    for tensor in tensors:
        # "mtp" predicts later tokens. transformers does not load it.
        if tensor.name.endswith(_UNUSED) or tensor.name.startswith("mtp."):
            continue
        name = language_name(tensor.name)
        stored = forms.of_tensor(name)
        is_head = name == "lm_head.weight"
        if is_head and tied:
            continue
        is_missing = not stored or not all(architecture.has_tensor(form.name) for form in stored)
        if is_missing or (is_head and architecture.always_tied):
            message = f"llama.cpp has no tensor for the merged model's '{tensor.name}'"
            raise UserError(message, location=str(base.folder), hint="serve it with deltaw serve instead")
        for form in stored:
            outputs.setdefault(form.name, GGUFTensor(form.rule, {})).sources[form.expert] = tensor
    return outputs


def _require_architecture(source: GGUFReader, architecture: Architecture, base: AdapterBase) -> None:
    entry = source.get_field(gguf.Keys.General.ARCHITECTURE)
    file_architecture = None if entry is None else entry.contents()
    if file_architecture != architecture.name:
        message = f"the base model's file has the architecture '{file_architecture}', expected '{architecture.name}'"
        raise UserError(message, location=str(base.gguf), hint="set the model's safetensors folder with --model")


def _copy(source: GGUFReader, out: GGUFWriter, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Copy the metadata of the base model's file, with the run's chat template."""
    template = gguf.Keys.Tokenizer.CHAT_TEMPLATE
    run_template = None if tokenizer is None else tokenizer.chat_template

    def include(key: str) -> bool:
        return not key.startswith(_NOT_COPIED) and not (run_template and key.startswith(template))

    copy_metadata(source, out, include=include)
    if run_template:
        add_chat_template(out, run_template)
