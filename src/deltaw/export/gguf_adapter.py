"""Export of a LoRA adapter to GGUF.

llama.cpp computes W·x + s·B·(A·x) with s = alpha / r, where r is the rank of the tensor and alpha a single value per
file. Other scalings (rsLoRA, patterns) are folded into B. Rows of B and columns of A have the order of the rows and
columns of W in the base model's file, and an update of a weight that is split there becomes an update of each part.
Updates of the token embedding are rejected because llama.cpp adds them twice.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
from gguf import GGUFType, GGUFValueType, GGUFWriter
from torch import Tensor

from deltaw.errors import UserError
from deltaw.export.base import ExportResult
from deltaw.export.gguf_architectures import find_architecture
from deltaw.export.gguf_file import KINDS, write_gguf
from deltaw.export.gguf_model import add_origin, assemble_streamed, export_result
from deltaw.export.gguf_tensors import StoredForm, TensorForms, language_name
from deltaw.export.gguf_vision import CONNECTOR_PREFIXES, mmproj_path, split_tensors, vision_file
from deltaw.export.merge_plan import MergeOptions, prepare_merge
from deltaw.export.portable import PlainUpdate, folded_lines, read_pair, require_same_base, with_language_names
from deltaw.lora.fingerprint import FINGERPRINT_KEY
from deltaw.progress import LogFunction, ignore_line

_MERGE = "merge it instead: deltaw merge (or --format gguf, except for experts)"


def export_gguf_adapter(
    run: Path, path: Path, kind: str = "f32", options: MergeOptions | None = None, log: LogFunction = ignore_line
) -> ExportResult:
    """Write the adapter of a run to a GGUF file.

    If the run trained the connector of a vision-language model, the connector and the vision tower are written to
    :func:`mmproj_path`.

    Args:
        run: Folder of a run, or of a PEFT adapter.
        path: Path of the file, which is written atomically.
        kind: Storage type of A and B, one of :data:`~deltaw.export.gguf_file.ADAPTER_KINDS`.
        options: Options of the merge, for example the base model.
        log: Receives messages for the user.

    Raises:
        UserError: if the format does not support the adapter, the base model differs or its family is not supported, or
            the file cannot be written. In this case no file is written.
    """
    options = options or MergeOptions()
    adapter, base = read_pair(run, "gguf-adapter", options, log, CONNECTOR_PREFIXES)
    adapter = with_language_names(adapter, base, run)
    architecture = find_architecture(base.config)
    fingerprint = require_same_base(base, adapter.fingerprint, run, log)
    tied = bool(base.config.tie_word_embeddings) or architecture.always_tied
    forms = architecture.forms(base.config, tied=tied)
    alpha, factors = unify_alpha(adapter.updates)
    tensors: dict[str, np.ndarray] = {}
    for update, factor in zip(adapter.updates, factors, strict=True):
        factor_B = update.factor_B if factor == 1 else update.factor_B * factor
        for form in _forms(update, forms, tied, run):
            columns = form.rule.columns or _unchanged
            rows = form.rule.rows or _unchanged
            tensors[f"{form.name}.lora_a"] = columns(update.factor_A).contiguous().numpy()
            tensors[f"{form.name}.lora_b"] = rows(factor_B).contiguous().numpy()

    def metadata(out: GGUFWriter) -> None:
        out.add_type(GGUFType.ADAPTER)
        out.add_string(gguf.Keys.Adapter.TYPE, "lora")
        out.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        if adapter.invocation is not None:
            key = gguf.Keys.Adapter.ALORA_INVOCATION_TOKENS
            tokens = list(adapter.invocation)
            out.add_key_value(key, tokens, GGUFValueType.ARRAY, GGUFValueType.UINT32)
        add_origin(out, run, base)
        out.add_file_type(int(KINDS[kind][2]))
        if fingerprint is not None:
            out.add_string(FINGERPRINT_KEY, fingerprint)

    shapes = {name: (values.shape, KINDS[kind][0]) for name, values in tensors.items()}
    details: dict[str, object] = {}
    with contextlib.ExitStack() as stack:
        vision = None
        if adapter.separate:
            job = stack.enter_context(prepare_merge(run, replace(options, precision="fp32"), ignore_line))
            vision = vision_file(base, base.tokenizer(run), split_tensors(assemble_streamed(job))[1])
        write_gguf(path, architecture.name, metadata, shapes, tensors.items())
        if vision is not None:
            details["mmproj"] = str(mmproj_path(path))
            vision.write(mmproj_path(path), kind, lambda out: add_origin(out, run, base))
            for note in vision.notes:
                log(note)
    folded = sum(factor != 1 for factor in factors)
    count = len(adapter.updates)
    summary = f"{count} modules, alpha {alpha:g}"
    result = export_result(path, architecture, summary, tensors=count, alpha=alpha, folded=folded, **details)
    return replace(result, lines=result.lines + folded_lines(folded))


def unify_alpha(updates: Sequence[PlainUpdate]) -> tuple[float, list[float]]:
    """Return one alpha for all updates, and for each update the factor that its B needs in addition to alpha / r.

    The alpha is the most frequent one. Factors of its updates remain bit-identical.
    """
    alphas = [update.scaling * update.rank for update in updates]
    rounded = [float(np.float32(alpha)) for alpha in alphas]
    alpha = Counter(rounded).most_common(1)[0][0]
    return alpha, [1.0 if value == alpha else exact / alpha for value, exact in zip(rounded, alphas, strict=True)]


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


def _forms(update: PlainUpdate, forms: TensorForms, tied: bool, run: Path) -> list[StoredForm]:
    """Return the forms of the updated weight in llama.cpp.

    Raises:
        UserError: if llama.cpp cannot apply the update.
    """
    stored = forms.of_tensor(f"{language_name(update.module)}.weight")
    message = None
    hint = _MERGE
    if not stored:
        message = f"llama.cpp has no tensor for the adapted module '{update.module}'"
        hint = "set the base model that the adapter was trained on with --model"
    elif update.embedding:
        message = f"the adapter changes the embedding '{update.module}', whose update llama.cpp would add twice"
    elif tied and stored[0].name == "output.weight":
        message = f"the adapter changes the tied head '{update.module}', which is also llama.cpp's embedding"
    elif any(not form.rule.adaptable for form in stored):
        message = f"the adapter changes '{update.module}', whose updates llama.cpp ignores"
    elif any(form.rule.values is not None or form.expert is not None for form in stored):
        message = f"the adapter changes '{update.module}', which a GGUF file stores in a form without updates"
    if message is not None:
        raise UserError(message, location=str(run), hint=hint)
    return stored
