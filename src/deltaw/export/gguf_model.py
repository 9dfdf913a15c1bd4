"""GGUF export for llama.cpp: an adapter merged into its base model, or only the adapter.

Tensors are merged, packed and written one at a time. Metadata is copied from the base model's GGUF file, or created
from the configuration and the tokenizer if the base model is not a GGUF file.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import MODEL_ARCH, GGUFReader, GGUFType, GGUFWriter, RopeScalingType
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from deltaw.errors import UserError
from deltaw.export.base import AdapterBase, ExportResult
from deltaw.export.gguf_architectures import (
    CONVERTER_HINT,
    Architecture,
    TensorNames,
    find_architecture,
    head_size,
    key_heads,
)
from deltaw.export.gguf_file import (
    KINDS,
    Shapes,
    add_optional,
    copy_metadata,
    open_gguf,
    require_kind,
    storage_type,
    write_gguf,
)
from deltaw.export.gguf_tokenizer import add_chat_template, add_tokenizer, extract_vocabulary, require_tokenizer
from deltaw.export.gguf_vision import mmproj_path, split_tensors, vision_file
from deltaw.export.merge_plan import MergeOptions, MergePlan, prepare_merge
from deltaw.export.merged import MergedModel, MergedTensor, NeedsMemoryMerge, assemble
from deltaw.export.portable import require_text
from deltaw.hub.terminators import terminators_in
from deltaw.progress import LogFunction, ignore_line

Rope = Mapping[str, Any]


def add_hyperparameters(out: GGUFWriter, architecture: Architecture, config: PretrainedConfig) -> list[str]:
    """Write the hyperparameters of the model.

    Returns:
        Notes for the user about differences in llama.cpp.

    Raises:
        UserError: if llama.cpp does not support the scaling of the rotary embeddings.
    """
    notes = []
    context = int(config.max_position_embeddings)
    window = getattr(config, "sliding_window", None)
    if architecture.window_ignored and window and window < context:
        notes.append(f"note: llama.cpp ignores the model's sliding window; the context is limited to {window} tokens")
        context = int(window)
    out.add_context_length(context)
    out.add_embedding_length(config.hidden_size)
    out.add_block_count(config.num_hidden_layers)
    out.add_head_count(config.num_attention_heads)
    out.add_vocab_size(config.vocab_size)
    if architecture.arch == MODEL_ARCH.GPT2:
        out.add_feed_forward_length(config.n_inner or 4 * config.hidden_size)
        out.add_layer_norm_eps(config.layer_norm_epsilon)
        return notes
    size = head_size(config)
    if architecture.arch == MODEL_ARCH.LFM2:
        _add_convolutions(out, config)
    else:
        out.add_feed_forward_length(config.intermediate_size)
        out.add_head_count_kv(key_heads(config))
        out.add_layer_norm_rms_eps(config.rms_norm_eps)
    if architecture.arch == MODEL_ARCH.GRANITE:
        out.add_embedding_scale(config.embedding_multiplier)
        out.add_residual_scale(config.residual_multiplier)
        out.add_attention_scale(config.attention_multiplier)
        out.add_logit_scale(config.logits_scaling)
    out.add_key_length(size)
    out.add_value_length(size)
    _add_positions(out, architecture, config, size)
    if architecture.arch == MODEL_ARCH.PHI3:
        out.add_sliding_window(0)  # 0 disables the sliding window in llama.cpp
    elif architecture.arch in (MODEL_ARCH.GEMMA2, MODEL_ARCH.GEMMA3):
        out.add_sliding_window(config.sliding_window)
        add_optional(out.add_attn_logit_softcapping, config.attn_logit_softcapping)
        add_optional(out.add_final_logit_softcapping, config.final_logit_softcapping)
    return notes


def _add_convolutions(out: GGUFWriter, config: PretrainedConfig) -> None:
    """Add the sizes of LFM2, whose layers have attention or a short convolution. Those have no key heads."""
    inner = config.intermediate_size
    if config.block_auto_adjust_ff_dim:
        inner = int(2 * inner / 3)
        inner = int(config.block_ffn_dim_multiplier * inner)
        inner = config.block_multiple_of * -(-inner // config.block_multiple_of)
    out.add_feed_forward_length(inner)
    out.add_head_count_kv([key_heads(config) if kind == "full_attention" else 0 for kind in config.layer_types])
    out.add_layer_norm_rms_eps(config.norm_eps)
    out.add_shortconv_l_cache(config.conv_L_cache)


def rope_tensors(config: PretrainedConfig) -> dict[str, np.ndarray]:
    """Return the rotary frequency divisors that are stored as tensors, for Llama 3 and Phi-3's long contexts."""
    rope = _rope(config)
    kind = rope.get("rope_type", "default")
    if kind == "llama3":
        return {"rope_freqs.weight": llama3_divisors(rope, head_size(config))}
    if kind == "longrope":
        factors = {f"rope_factors_{name}.weight": rope[f"{name}_factor"] for name in ("long", "short")}
        return {name: np.asarray(values, np.float32) for name, values in factors.items()}
    return {}


def llama3_divisors(rope: Rope, size: int) -> np.ndarray:
    """Return the (size / 2) divisors of a head's rotary frequencies in Llama 3.

    Wavelengths above ``context / low_freq_factor`` are stretched by ``factor``. Those below ``context /
    high_freq_factor`` are unchanged. In between, the two frequencies are interpolated linearly in ``context /
    wavelength``.
    """
    frequencies = rope["rope_theta"] ** -(np.arange(0, size, 2) / size)
    rotations = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low = rope["low_freq_factor"]
    high = rope["high_freq_factor"]
    share = np.clip((rotations - low) / (high - low), 0.0, 1.0)
    return (1 / ((1 - share) / rope["factor"] + share)).astype(np.float32)


def _add_positions(out: GGUFWriter, architecture: Architecture, config: PretrainedConfig, head_size: int) -> None:
    rope = _rope(config)
    out.add_rope_dimension_count(int(head_size * rope.get("partial_rotary_factor", 1.0)))
    out.add_rope_freq_base(float(rope["rope_theta"]))
    if (local := config.rope_parameters.get("sliding_attention")) is not None:
        if local.get("rope_type", "default") != "default":
            raise _unknown(f"{local['rope_type']} in windowed layers")
        out.add_rope_freq_base_swa(float(local["rope_theta"]))
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        out.add_rope_scaling_type(RopeScalingType(kind))
        out.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        out.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        add_optional(out.add_rope_scaling_yarn_attn_factor, rope.get("attention_factor"))
        add_optional(out.add_rope_scaling_yarn_beta_fast, rope.get("beta_fast"))
        add_optional(out.add_rope_scaling_yarn_beta_slow, rope.get("beta_slow"))
    elif kind == "longrope" and architecture.arch == MODEL_ARCH.PHI3:
        out.add_rope_scaling_attn_factors(_long_attention(rope, config))
    elif kind not in ("default", "linear") and (kind != "llama3" or architecture.arch != MODEL_ARCH.LLAMA):
        raise _unknown(kind)
    if architecture.arch == MODEL_ARCH.PHI3:
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        out.add_rope_scaling_orig_ctx_len(int(original))


def _long_attention(rope: Rope, config: PretrainedConfig) -> float:
    """Return LongRoPE's factor of sine and cosine: √(1 + ln s / ln original context)."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    original = rope["original_max_position_embeddings"]
    stretch = config.max_position_embeddings / original
    return math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0


def _rope(config: PretrainedConfig) -> Rope:
    """Return the rotary settings of full-attention layers."""
    nested: Rope = getattr(config, "rope_parameters", None) or {}
    settings: Rope = nested.get("full_attention", nested)
    return settings


def _unknown(kind: str) -> UserError:
    message = f"deltaw does not export rotary embeddings of type '{kind}' to GGUF"
    return UserError(message, location="model: rope_parameters", hint=CONVERTER_HINT)


_HEAD = "output.weight"
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
        names = TensorNames(architecture, base.config)
        tokenizer = base.tokenizer(run)
        vision = None
        language = merged.tensors
        if base.is_view:
            language, others = split_tensors(merged)
            vision = vision_file(base, tokenizer, others)
        outputs = _outputs(merged, language, names, architecture)
        source = None if base.gguf is None else open_gguf(base.gguf)
        if source is None:
            extra_tensors = rope_tensors(base.config)
            tokenizer = require_tokenizer(tokenizer, base.folder)
            extract_vocabulary(tokenizer, int(base.config.vocab_size))  # raises an error for unsupported tokenizers
        else:
            _require_architecture(source, architecture, base)
            extra_tensors = {tensor.name: np.array(tensor.data) for tensor in source.tensors if "rope_" in tensor.name}
        notes = list(merged.notes)

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
                yield name, names.values(output.name, output.load()).numpy()

        tensor_shapes = {name: numbers.shape for name, numbers in extra_tensors.items()}
        tensor_shapes |= {name: names.shape(output.name, output.shape) for name, output in outputs.items()}
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


def _outputs(
    merged: MergedModel, tensors: Iterable[MergedTensor], names: TensorNames, architecture: Architecture
) -> dict[str, MergedTensor]:
    """Return the merged tensors by their names in the file.

    Raises:
        UserError: if llama.cpp has no such tensor.
    """
    base = merged.job.base
    tied = base.config.tie_word_embeddings if base.is_view else merged.config.get("tie_word_embeddings", False)
    outputs: dict[str, MergedTensor] = {}
    for output in tensors:
        if output.name.endswith((".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")):
            continue  # masks and frequencies stored by old versions of transformers
        name = names.of_tensor(output.name)
        is_head = name == _HEAD or output.name == "lm_head.weight"
        if is_head and (tied or architecture.always_tied) and not merged.untied:
            continue
        if name is None or (is_head and architecture.always_tied):
            message = f"llama.cpp has no tensor for the merged model's '{output.name}'"
            raise UserError(message, location=str(merged.job.base.folder), hint="serve it with deltaw serve instead")
        outputs[name] = output
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
