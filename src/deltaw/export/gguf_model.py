"""An adapter for llama.cpp: merged into its base model as one GGUF file, or as a GGUF file of its own.

Tensors are merged, packed and written one after the other. The metadata is that of the base's own GGUF file
where it is one; else it is made from the configuration and the tokenizer.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import MODEL_ARCH, GGUFReader, GGUFType, GGUFValueType, GGUFWriter, RopeScalingType
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from deltaw.errors import UserError
from deltaw.export.base import Base, MergeOptions, Say, Written, prepared
from deltaw.export.gguf_architectures import (
    OWN_CONVERTER,
    Architecture,
    TensorNames,
    architecture_of,
    head_size,
    key_heads,
)
from deltaw.export.gguf_file import KINDS, Shapes, copy_metadata, open_gguf, require_kind, type_of, write_gguf
from deltaw.export.gguf_tokenizer import add_chat_template, add_tokenizer, vocabulary_of
from deltaw.export.merged import MergedModel, NotByName, Output, assemble
from deltaw.export.plain_adapter import PlainUpdate
from deltaw.export.portable import folded_lines, read_pair, require_same_base, require_text
from deltaw.hub.terminators import terminators_in
from deltaw.lora.fingerprint import FINGERPRINT_KEY

Rope = Mapping[str, Any]


def add_hyperparameters(out: GGUFWriter, architecture: Architecture, config: PretrainedConfig) -> list[str]:
    """Write the metadata that llama.cpp builds the model from.

    Returns:
        Lines about what the file's reader computes otherwise, for a person.

    Raises:
        UserError: the model's rotary positions are scaled in a way that llama.cpp does not know.
    """
    notes = []
    context = int(config.max_position_embeddings)
    window = getattr(config, "sliding_window", None)
    if architecture.window_ignored and window and window < context:
        notes.append(f"note: llama.cpp ignores this model's sliding window, so its context is set to {window} tokens")
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
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count_kv(key_heads(config))
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_key_length(size)
    out.add_value_length(size)
    _add_positions(out, architecture, config, size)
    if architecture.arch == MODEL_ARCH.PHI3:
        out.add_sliding_window(0)  # which llama.cpp takes for a model without windows
    elif architecture.arch in (MODEL_ARCH.GEMMA2, MODEL_ARCH.GEMMA3):
        out.add_sliding_window(config.sliding_window)
        _add_given(out.add_attn_logit_softcapping, config.attn_logit_softcapping)
        _add_given(out.add_final_logit_softcapping, config.final_logit_softcapping)
    return notes


def _add_given(add: Callable[[float], None], value: float | None) -> None:
    if value is not None:
        add(value)


def rope_tensors(config: PretrainedConfig) -> dict[str, np.ndarray]:
    """Divisors of the rotary frequencies that are stored as tensors: Llama 3's, and Phi-3's long contexts."""
    rope = _rope(config)
    kind = rope.get("rope_type", "default")
    if kind == "llama3":
        return {"rope_freqs.weight": llama3_divisors(rope, head_size(config))}
    if kind == "longrope":
        factors = {f"rope_factors_{name}.weight": rope[f"{name}_factor"] for name in ("long", "short")}
        return {name: np.asarray(values, np.float32) for name, values in factors.items()}
    return {}


def llama3_divisors(rope: Rope, size: int) -> np.ndarray:
    """By what Llama 3 divides each of a head's size / 2 frequencies.

    Wavelengths above ``context / low_freq_factor`` are stretched by ``factor``, those below
    ``context / high_freq_factor`` not at all; in between, the two frequencies are mixed linearly in
    ``context / wavelength``.
    """
    frequencies = rope["rope_theta"] ** -(np.arange(0, size, 2) / size)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    share = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 / ((1 - share) / rope["factor"] + share)).astype(np.float32)


def _add_positions(out: GGUFWriter, architecture: Architecture, config: PretrainedConfig, head_size: int) -> None:
    rope = _rope(config)
    out.add_rope_dimension_count(int(head_size * rope.get("partial_rotary_factor", 1.0)))
    out.add_rope_freq_base(float(rope["rope_theta"]))
    local = config.rope_parameters.get("sliding_attention")
    if local is not None:
        if local.get("rope_type", "default") != "default":
            raise _unknown(f"{local['rope_type']} in windowed layers")
        out.add_rope_freq_base_swa(float(local["rope_theta"]))
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        out.add_rope_scaling_type(RopeScalingType(kind))
        out.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        out.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        _add_given(out.add_rope_scaling_yarn_attn_factor, rope.get("attention_factor"))
        _add_given(out.add_rope_scaling_yarn_beta_fast, rope.get("beta_fast"))
        _add_given(out.add_rope_scaling_yarn_beta_slow, rope.get("beta_slow"))
    elif kind == "longrope" and architecture.arch == MODEL_ARCH.PHI3:
        out.add_rope_scaling_attn_factors(_long_attention(rope, config))
    elif kind not in ("default", "linear") and (kind != "llama3" or architecture.arch != MODEL_ARCH.LLAMA):
        raise _unknown(kind)
    if architecture.arch == MODEL_ARCH.PHI3:
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        out.add_rope_scaling_orig_ctx_len(int(original))


def _long_attention(rope: Rope, config: PretrainedConfig) -> float:
    """The factor of attention scores' sine and cosine in LongRoPE: √(1 + ln s / ln original context)."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    original = rope["original_max_position_embeddings"]
    stretch = config.max_position_embeddings / original
    return math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0


def _rope(config: PretrainedConfig) -> Rope:
    """The rotary settings of the layers that attend to everything."""
    nested: Rope = getattr(config, "rope_parameters", None) or {}
    found: Rope = nested.get("full_attention", nested)
    return found


def _unknown(kind: str) -> UserError:
    what = f"rotary positions of kind '{kind}' are not exported to GGUF here"
    return UserError(what, where="model: rope_parameters", hint=OWN_CONVERTER)


_HEAD = "output.weight"
# Metadata of a base's file that is not true of another file any more, or is written anew.
_NOT_COPIED = ("general.", "split.", "quantize.", "deltaw.")


def export_gguf(
    run: Path, path: Path, kind: str = "f16", options: MergeOptions | None = None, say: Say = lambda line: None
) -> Written:
    """Merge the adapter in ``run`` into its base and write the GGUF file ``path``.

    Args:
        run: a run's folder, or an adapter's in PEFT's format.
        path: of the file; it appears when it is complete.
        kind: how matrices are stored, a key of :data:`~deltaw.export.gguf_file.KINDS`.
        options: name the base model.
        say: told a line if something should be known.

    Raises:
        UserError: the adapter cannot be merged, the model's family or its tokenizer is not known, or the file
            cannot be written. Nothing is written then.
    """
    require_kind(kind)
    with prepared(run, options or MergeOptions(precision="fp32"), say) as job:
        base = job.base
        require_text(base, run)
        architecture = architecture_of(base.config)
        try:
            merged = assemble(job)
        except NotByName as error:
            what = f"the model cannot be exported tensor by tensor: {error}"
            raise UserError(what, where=str(run), hint=OWN_CONVERTER) from error
        names = TensorNames(architecture, base.config)
        outputs = _outputs(merged, names, architecture)
        tokenizer = base.tokenizer(run)
        source = None if base.gguf is None else open_gguf(base.gguf)
        if source is None:
            extra = rope_tensors(base.config)
            if tokenizer is None:
                what = "the model's folder holds no tokenizer, and a GGUF file needs one"
                raise UserError(what, where=str(base.folder), hint="copy the tokenizer's files there")
            vocabulary_of(tokenizer, int(base.config.vocab_size))  # refuses one that is not known
        else:
            _require_architecture(source, architecture, base)
            extra = {tensor.name: np.array(tensor.data) for tensor in source.tensors if "rope_" in tensor.name}
        notes = list(merged.notes)

        def metadata(out: GGUFWriter) -> None:
            out.add_type(GGUFType.MODEL)
            _add_origin(out, run, base, kind)
            out.add_quantization_version(gguf.GGML_QUANT_VERSION)
            if source is not None:
                _copy(source, out, tokenizer)
                return
            assert tokenizer is not None
            notes.extend(add_hyperparameters(out, architecture, base.config))
            add_tokenizer(out, tokenizer, int(base.config.vocab_size), terminators_in(base.folder, tokenizer))

        def tensors() -> Iterator[tuple[str, np.ndarray]]:
            yield from extra.items()
            for name, output in outputs.items():
                yield name, names.values(output.name, output.whole()).numpy()

        plain = {name: numbers.shape for name, numbers in extra.items()}
        plain |= {name: names.shape(output.name, output.shape) for name, output in outputs.items()}
        shapes: Shapes = {name: (shape, type_of(name, shape, kind)) for name, shape in plain.items()}
        size = write_gguf(path, architecture.name, metadata, shapes, tensors())
    for note in notes:
        say(note)
    types = Counter(stored.name for _, stored in shapes.values())
    told = ", ".join(f"{count} {name}" for name, count in sorted(types.items()))
    facts: dict[str, object] = {"kind": kind, "types": dict(types), "notes": notes}
    return _written(path, size, len(shapes), architecture, facts, f"{len(shapes)} tensors ({told})")


def _written(
    path: Path, size: int, tensors: int, architecture: Architecture, facts: dict[str, object], told: str
) -> Written:
    """What is reported of a file of ``size`` bytes."""
    facts = {"path": str(path), "size": size, "tensors": tensors, "architecture": architecture.name, **facts}
    return Written(facts, [f"architecture {architecture.name}", told, f"{size / 1e6:.1f} MB"])


def _add_origin(out: GGUFWriter, run: Path, base: Base, kind: str) -> None:
    """What a file is called, what it was made of, and how its numbers are stored."""
    out.add_name(run.resolve().name)
    out.add_base_model_count(1)
    out.add_base_model_name(0, base.source.name)
    out.add_file_type(int(KINDS[kind][2]))


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
            what = f"the merged model's '{output.name}' is no tensor of such a model in llama.cpp"
            raise UserError(what, where=str(merged.job.base.folder), hint="serve it with deltaw serve instead")
        found[name] = output
    return found


def _require_architecture(source: GGUFReader, architecture: Architecture, base: Base) -> None:
    entry = source.get_field(gguf.Keys.General.ARCHITECTURE)
    named = None if entry is None else entry.contents()
    if named != architecture.name:
        what = f"the base's file is of architecture '{named}', and '{architecture.name}' would be written"
        raise UserError(what, where=str(base.gguf), hint="name the model's safetensors folder with --model")


def _copy(source: GGUFReader, out: GGUFWriter, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """The base file's own metadata, with the run's chat template."""
    template = gguf.Keys.Tokenizer.CHAT_TEMPLATE
    own = None if tokenizer is None else tokenizer.chat_template

    def keep(key: str) -> bool:
        return not key.startswith(_NOT_COPIED) and not (own and key.startswith(template))

    copy_metadata(source, out, keep=keep)
    if own:
        add_chat_template(out, own)


# Of a LoRA adapter as a GGUF file, llama.cpp computes W·x + s·B·(A·x) with s = alpha / r, where r is the tensor's own
# rank and alpha the file's one number. So what a scaling has beyond that (rsLoRA, patterns) goes into B. Rows of B are
# in the order in which the base model's file has the rows of W. Updates of the token embedding are refused: llama.cpp
# reads them, and adds them twice.


_MERGE = "merge it instead: --format gguf"


def export_gguf_adapter(
    run: Path, path: Path, kind: str = "f32", options: MergeOptions | None = None, say: Say = lambda line: None
) -> Written:
    """Write the adapter in ``run`` to the GGUF file ``path``.

    Args:
        run: a run's folder, or an adapter's in PEFT's format.
        path: of the file; it appears when it is complete.
        kind: how A and B are stored, one of :data:`~deltaw.export.gguf_file.ADAPTER_KINDS`.
        options: name the base model.
        say: told a line if something should be known.

    Raises:
        UserError: the adapter holds more than the format can, the base is another one or of a family that is
            not known, or the file cannot be written. Nothing is written then.
    """
    adapter, base = read_pair(run, "gguf-adapter", options or MergeOptions(), say)
    architecture = architecture_of(base.config)
    names = TensorNames(architecture, base.config)
    fingerprint = require_same_base(base, adapter.fingerprint, run, say)
    tied = bool(base.config.tie_word_embeddings) or architecture.always_tied
    named = [(_name(update, names, tied, run), update) for update in adapter.updates]
    alpha, factors = with_one_alpha(adapter.updates)

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for (name, update), factor in zip(named, factors, strict=True):
            factor_B = update.factor_B if factor == 1 else update.factor_B * factor
            yield f"{name}.lora_a", update.factor_A.contiguous().numpy()
            yield f"{name}.lora_b", names.outputs(update.module, factor_B).contiguous().numpy()

    def metadata(out: GGUFWriter) -> None:
        out.add_type(GGUFType.ADAPTER)
        out.add_string(gguf.Keys.Adapter.TYPE, "lora")
        out.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        if adapter.invocation is not None:
            key, tokens = gguf.Keys.Adapter.ALORA_INVOCATION_TOKENS, list(adapter.invocation)
            out.add_key_value(key, tokens, GGUFValueType.ARRAY, GGUFValueType.UINT32)
        _add_origin(out, run, base, kind)
        if fingerprint is not None:
            out.add_string(FINGERPRINT_KEY, fingerprint)

    stored = KINDS[kind][0]
    shapes = {
        f"{name}.lora_{letter}": (tuple(factor.shape), stored)
        for name, update in named
        for letter, factor in (("a", update.factor_A), ("b", update.factor_B))
    }
    size = write_gguf(path, architecture.name, metadata, shapes, tensors())
    folded = sum(factor != 1 for factor in factors)
    facts: dict[str, object] = {"alpha": alpha, "folded": folded}
    written = _written(path, size, len(named), architecture, facts, f"{len(named)} modules, alpha {alpha:g}")
    return Written(written.facts, written.lines + folded_lines(folded))


def with_one_alpha(updates: Sequence[PlainUpdate]) -> tuple[float, list[float]]:
    """One alpha for all, and for each update the factor that its B needs beyond alpha / r.

    The alpha is that of most updates, whose factors stay as they are, to the bit.
    """
    own = [update.scaling * update.rank for update in updates]
    rounded = [float(np.float32(alpha)) for alpha in own]
    alpha = Counter(rounded).most_common(1)[0][0]
    return alpha, [1.0 if one == alpha else exact / alpha for one, exact in zip(rounded, own, strict=True)]


def _name(update: PlainUpdate, names: TensorNames, tied: bool, run: Path) -> str:
    """The base tensor's name in llama.cpp, which an update must have to be applied."""
    found = names.of_module(update.module)
    what, hint = None, _MERGE
    if found is None:
        what = f"the adapted module '{update.module}' is no tensor of such a model in llama.cpp"
        hint = "name the base model that it was trained on with --model"
    elif update.embedding:
        what = f"the adapter changes the embedding '{update.module}', and llama.cpp adds such an update twice"
    elif tied and found == "output":
        what = f"the adapter changes the head '{update.module}', which is tied: llama.cpp has one tensor for both"
    if what is not None:
        raise UserError(what, where=str(run), hint=hint)
    return f"{found}.weight"
