"""A base model with its adapter merged in, as one GGUF file for llama.cpp.

Tensors are merged, packed and written one after the other. The metadata is that of the base's own GGUF file
where it is one; else it is made from the configuration and the tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
from gguf import GGUFReader, GGUFType, GGUFWriter
from transformers import PreTrainedTokenizerBase

from deltaw.errors import UserError
from deltaw.export.described_base import DescribedBase, describe_base
from deltaw.export.gguf_architectures import Architecture, TensorNames, architecture_of
from deltaw.export.gguf_file import Shapes, copy_metadata, open_gguf, write_gguf
from deltaw.export.gguf_hyperparameters import add_hyperparameters, rope_tensors
from deltaw.export.gguf_tokenizer import add_chat_template, add_tokenizer, vocabulary_of
from deltaw.export.gguf_types import KINDS, require_kind, type_of
from deltaw.export.merged import MergedModel, NotByName, Output, merged_model
from deltaw.export.plain import plain_adapter
from deltaw.hub.terminators import terminators_in

FORMAT = "gguf"
_HEAD = "output.weight"
# Metadata of a base's file that is not true of another file any more, or is written anew.
_NOT_COPIED = ("general.", "split.", "quantize.", "deltaw.")


@dataclass(frozen=True)
class WrittenModel:
    """What was written.

    Attributes:
        path: of the file. size: its bytes. tensors: how many.
        kind: how matrices are stored. architecture: llama.cpp's name of the model's.
        types: how many tensors are stored as which type.
        notes: what a person should know.
    """

    path: Path
    size: int
    tensors: int
    kind: str
    architecture: str
    types: dict[str, int]
    notes: list[str] = field(default_factory=list)


def export_gguf(
    run: Path,
    path: Path,
    *,
    kind: str = "f16",
    model: str | None = None,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> WrittenModel:
    """Merge the adapter in ``run`` into its base and write the GGUF file ``path``.

    Args:
        run: a run's folder, or an adapter's in PEFT's format.
        path: of the file; it appears when it is complete.
        kind: how matrices are stored, a key of :data:`~deltaw.export.gguf_types.KINDS`.
        model: the base model, where it is not the one that the folder names.
        trust_remote_code: run the Python files that came with the base model.
        say: told a line where something should be known.

    Raises:
        UserError: the adapter cannot be merged, the model's family or its tokenizer is not known, or the file
            cannot be written. Nothing is written then.
    """
    require_kind(kind)
    base = describe_base(run, model, say=say, trust_remote_code=trust_remote_code)
    architecture = architecture_of(base.config)
    merged = _merged(run, base, say)
    names = TensorNames(architecture, base.config)
    outputs = _outputs(merged, names, architecture)
    extra = {} if base.gguf is not None else rope_tensors(base.config)
    tokenizer = base.tokenizer(run)
    source = None if base.gguf is None else open_gguf(base.gguf)
    if source is None:
        if tokenizer is None:
            raise UserError(
                "the model's folder holds no tokenizer, and a GGUF file needs one",
                where=str(base.folder),
                hint="copy the tokenizer's files there",
            )
        vocabulary_of(tokenizer, int(base.config.vocab_size))  # refuses one that is not known
    else:
        _require_architecture(source, architecture, base)
        extra = {tensor.name: np.array(tensor.data) for tensor in source.tensors if "rope_" in tensor.name}
    notes = list(merged.notes)

    def metadata(out: GGUFWriter) -> None:
        out.add_type(GGUFType.MODEL)
        out.add_name(run.resolve().name)
        out.add_base_model_count(1)
        out.add_base_model_name(0, base.name)
        out.add_file_type(int(KINDS[kind][2]))
        out.add_quantization_version(gguf.GGML_QUANT_VERSION)
        if source is not None:
            _copy(source, out, tokenizer)
            return
        assert tokenizer is not None
        notes.extend(add_hyperparameters(out, architecture, base.config))
        ends = terminators_in(base.folder, tokenizer)
        add_tokenizer(out, tokenizer, int(base.config.vocab_size), ends)

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        yield from extra.items()
        for name, output in outputs.items():
            yield name, names.values(output.name, output.whole()).numpy()

    shapes: Shapes = {
        **{name: (numbers.shape, type_of(name, numbers.shape, kind)) for name, numbers in extra.items()},
        **{
            name: (shape := names.shape(output.name, output.shape), type_of(name, shape, kind))
            for name, output in outputs.items()
        },
    }
    size = write_gguf(path, architecture.name, metadata, shapes, tensors())
    types: dict[str, int] = {}
    for _, stored in shapes.values():
        types[stored.name] = types.get(stored.name, 0) + 1
    for note in notes:
        say(note)
    return WrittenModel(path, size, len(shapes), kind, architecture.name, types, notes)


def _merged(run: Path, base: DescribedBase, say: Callable[[str], None]) -> MergedModel:
    try:
        with plain_adapter(run, base.files, say) as folder:
            return merged_model(
                folder,
                model=str(base.folder),
                precision="fp32",
                trust_remote_code=base.files.trust_remote_code,
                say=say,
            )
    except NotByName as error:
        raise UserError(
            f"the model cannot be exported tensor by tensor: {error}",
            where=str(run),
            hint="merge it first (deltaw merge), and use llama.cpp's own convert_hf_to_gguf.py",
        ) from error


def _outputs(merged: MergedModel, names: TensorNames, architecture: Architecture) -> dict[str, Output]:
    """The merged model's tensors by their names in the file.

    Raises:
        UserError: one has no place in llama.cpp's model.
    """
    tied = bool(merged.config.get("tie_word_embeddings", False))
    found: dict[str, Output] = {}
    for output in merged.tensors:
        if output.name.endswith((".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")):
            continue  # masks and frequencies that old versions of transformers stored as well
        name = names.of_tensor(output.name)
        head = name == _HEAD or output.name == "lm_head.weight"
        if head and (tied or architecture.always_tied) and not merged.untied:
            continue
        if name is None or (head and architecture.always_tied):
            raise UserError(
                f"the merged model's '{output.name}' is no tensor of such a model in llama.cpp",
                where=str(merged.base.folder),
                hint="keep the adapter apart: serve it with deltaw serve",
            )
        found[name] = output
    return found


def _require_architecture(source: GGUFReader, architecture: Architecture, base: DescribedBase) -> None:
    entry = source.get_field(gguf.Keys.General.ARCHITECTURE)
    named = None if entry is None else entry.contents()
    if named != architecture.name:
        raise UserError(
            f"the base's file is of architecture '{named}', and '{architecture.name}' would be written",
            where=str(base.gguf),
            hint="name the model's safetensors folder with --model",
        )


def _copy(source: GGUFReader, out: GGUFWriter, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """The base file's own metadata, with the run's chat template."""
    template = gguf.Keys.Tokenizer.CHAT_TEMPLATE
    own = None if tokenizer is None else tokenizer.chat_template

    def keep(key: str) -> bool:
        return not key.startswith(_NOT_COPIED) and not (own and key.startswith(template))

    copy_metadata(source, out, keep=keep)
    if own:
        add_chat_template(out, own)
