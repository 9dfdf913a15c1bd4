"""A LoRA adapter as a GGUF file, which llama.cpp applies to a GGUF base model.

llama.cpp computes W·x + s·B·(A·x) with s = alpha / r, where r is the tensor's own rank and alpha the file's
one number. So what a scaling has beyond that (rsLoRA, patterns) goes into B. Rows of B are in the order in
which the base model's file has the rows of W. Updates of the token embedding are refused: llama.cpp reads
them, and adds them twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf import GGUFType, GGUFValueType, GGUFWriter
from torch import Tensor

from deltaw.errors import UserError, did_you_mean
from deltaw.export.described_base import describe_base, read_updates, require_same_base
from deltaw.export.gguf_architectures import TensorNames, architecture_of
from deltaw.export.gguf_file import write_gguf
from deltaw.export.gguf_types import ADAPTER_KINDS, KINDS
from deltaw.export.plain_adapter import PlainUpdate, require_lora
from deltaw.lora.fingerprint import FINGERPRINT_KEY

FORMAT = "gguf-adapter"
_MERGE = "merge it instead: --format gguf"


@dataclass(frozen=True)
class WrittenAdapter:
    """What was written.

    Attributes:
        path: of the file. size: its bytes. tensors: pairs of A and B.
        alpha: the file's. folded: how many B took a part of their scaling in.
        architecture: llama.cpp's name of the base's.
    """

    path: Path
    size: int
    tensors: int
    alpha: float
    folded: int
    architecture: str


def export_gguf_adapter(
    run: Path,
    path: Path,
    *,
    kind: str = "f32",
    model: str | None = None,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> WrittenAdapter:
    """Write the adapter in ``run`` to the GGUF file ``path``.

    Args:
        run: a run's folder, or an adapter's in PEFT's format.
        path: of the file; it appears when it is complete.
        kind: how A and B are stored: ``f32``, ``f16`` or ``bf16``.
        model: the base model, where it is not the one that the folder names.
        trust_remote_code: run the Python files that came with the base model.
        say: told a line where something should be known.

    Raises:
        UserError: the adapter holds more than the format can, the base is another one or of a family that is
            not known, or the file cannot be written. Nothing is written then.
    """
    if kind not in ADAPTER_KINDS:
        raise UserError(
            f"an adapter's factors are not stored as '{kind}'",
            where="--type",
            hint=did_you_mean(kind, ADAPTER_KINDS),
        )
    require_lora(run, FORMAT)
    base = describe_base(run, model, say=say, precision="bf16", trust_remote_code=trust_remote_code)
    adapter = read_updates(run, base, FORMAT, say=say)
    architecture = architecture_of(base.config)
    names = TensorNames(architecture, base.config)
    fingerprint = require_same_base(base, adapter.fingerprint, run, say)
    tied = bool(base.config.tie_word_embeddings) or architecture.always_tied
    named = [(_name(update, names, tied, run), update) for update in adapter.updates]
    alpha, factors = with_one_alpha(adapter.updates)

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for (name, update), factor in zip(named, factors, strict=True):
            factor_B = update.factor_B if factor == 1 else update.factor_B * factor
            yield f"{name}.lora_a", _array(update.factor_A)
            yield f"{name}.lora_b", _array(names.outputs(update.module, factor_B))

    def metadata(out: GGUFWriter) -> None:
        out.add_type(GGUFType.ADAPTER)
        out.add_string(gguf.Keys.Adapter.TYPE, "lora")
        out.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        if adapter.invocation is not None:
            out.add_key_value(
                gguf.Keys.Adapter.ALORA_INVOCATION_TOKENS,
                list(adapter.invocation),
                GGUFValueType.ARRAY,
                GGUFValueType.UINT32,
            )
        out.add_name(run.resolve().name)
        out.add_base_model_count(1)
        out.add_base_model_name(0, base.name)
        out.add_file_type(int(KINDS[kind][2]))
        if fingerprint is not None:
            out.add_string(FINGERPRINT_KEY, fingerprint)

    stored = KINDS[kind][0]
    shapes = {
        f"{name}.lora_{letter}": (shape, stored)
        for name, update in named
        for letter, shape in zip("ab", _shapes(update), strict=True)
    }
    size = write_gguf(path, architecture.name, metadata, shapes, tensors())
    folded = sum(factor != 1 for factor in factors)
    return WrittenAdapter(path, size, len(named), alpha, folded, architecture.name)


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
    if found is None:
        raise UserError(
            f"the adapted module '{update.module}' is no tensor of such a model in llama.cpp",
            where=str(run),
            hint="export it with the base model that it was trained on, named with --model",
        )
    if update.embedding:
        raise UserError(
            f"the adapter changes the embedding '{update.module}', and llama.cpp adds such an update twice",
            where=str(run),
            hint=_MERGE,
        )
    if tied and found == "output":
        raise UserError(
            f"the adapter changes the head '{update.module}', which is tied to the embedding: llama.cpp has "
            "one tensor for both",
            where=str(run),
            hint=_MERGE,
        )
    return f"{found}.weight"


def _shapes(update: PlainUpdate) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(update.factor_A.shape), tuple(update.factor_B.shape)


def _array(tensor: Tensor) -> np.ndarray:
    numbers: np.ndarray = tensor.contiguous().numpy()
    return numbers
