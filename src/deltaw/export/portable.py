"""Adapters as folders of other programs: PEFT's format with one rank and one alpha, and mlx-lm's.

Readers drop rank and alpha patterns in silence, and some take no rsLoRA. Here every update gets the largest
rank, smaller ones by zeros, which changes nothing, and a scaling beyond alpha / r goes into B.

mlx-lm puts an update on every module that ``keys`` names in the last ``num_layers`` layers, with one rank and
one scale, and then reads what the file has. A module that the file has nothing for keeps a B of zeros, so it
changes nothing. A is (in, r) and B (r, out) there.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from deltaw.errors import UserError
from deltaw.export.base import Base, MergeOptions, Say, Written, base_of, other_base, plain_adapter
from deltaw.export.merged import write_json
from deltaw.export.output_folder import appearing, check_target
from deltaw.export.plain_adapter import PlainAdapter, PlainUpdate, read_plain, require_lora
from deltaw.lora.files import CONFIG_NAME, WEIGHTS_NAME
from deltaw.lora.fingerprint import FINGERPRINT_KEY, same_base
from deltaw.lora.peft_format import DEFAULTS, PREFIX, base_settings, target_entries
from deltaw.tasks import entry_of
from deltaw.tensor_files import save_tensors

MLX_WEIGHTS = "adapters.safetensors"
_LAYER = re.compile(r"model\.layers\.(?P<number>\d+)\.(?P<inside>.+)")
# Families whose modules mlx-lm names as transformers does.
_SAME_NAMES = ("llama", "mistral", "smollm3", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3")
_CONVERT = "merge the adapter (deltaw merge) and convert the model with mlx_lm.convert"


def require_text(base: Base, run: Path) -> None:
    """Raise a UserError if the adapter in ``run`` is for another task than writing text, or the base model
    has no configuration that can be read."""
    if not entry_of(base.task).writes_text:
        hint = "the run's folder is in PEFT's format already; deltaw merge makes a model of it"
        raise UserError(f"adapters for {base.task} are not exported, only for text", where=str(run), hint=hint)
    assert base.config is not None  # read now


def read_pair(run: Path, format_name: str, options: MergeOptions, say: Say) -> tuple[PlainAdapter, Base]:
    """The plain updates of the adapter in ``run``, and its base model.

    A share that the adapter's initialization took out of W is put back.

    Args:
        format_name: for messages: what cannot hold the rest.

    Raises:
        UserError: the adapter consists of more than plain updates, or its base model cannot be found.
    """
    require_lora(run, format_name)
    base = base_of(run, "bf16", options, say)
    require_text(base, run)
    with plain_adapter(run, base, say) as folder:
        return read_plain(folder, format_name), base


def require_same_base(base: Base, fingerprint: str | None, run: Path, say: Say) -> str | None:
    """The base's fingerprint, compared with that of the base that the adapter was trained on.

    Raises:
        UserError: they differ: what is exported would answer otherwise than what was trained.
    """
    own = base.fingerprint()
    same = same_base(fingerprint, own)
    if same is None:
        say("note: whether this is the base model that the adapter was trained on cannot be told")
    elif not same:
        raise other_base(base, run, "name its own base with --model")
    return own


@dataclass(frozen=True)
class Uniform:
    """Updates of one rank and one scaling.

    Attributes:
        rank: r. alpha: such that alpha / r is the scaling of all.
        factors: A (r, in) and B (out, r) of each update, in their order.
        padded: how many had a smaller rank. folded: how many B took a part of their scaling in.
    """

    rank: int
    alpha: float
    factors: list[tuple[Tensor, Tensor]]
    padded: int
    folded: int


def folded_lines(folded: int) -> list[str]:
    """For a person: how many B took a part of their scaling in."""
    return [f"of {folded} modules, a part of the scaling is in B"] if folded else []


def uniform(updates: Sequence[PlainUpdate]) -> Uniform:
    """The same ΔW with one rank and one whole alpha.

    The scaling is the one that most updates have where that makes alpha a whole number, as some readers want
    it; their factors then stay as they are, to the bit.
    """
    rank = max(update.rank for update in updates)
    usual = Counter(update.scaling for update in updates).most_common(1)[0][0]
    alpha = float(max(1, round(usual * rank)))
    factors, folded = [], 0
    for update in updates:
        factor = update.scaling * rank / alpha
        factor_A, factor_B = update.factor_A, update.factor_B
        if factor != 1:
            factor_B, folded = factor_B * factor, folded + 1
        missing = rank - update.rank
        if missing:
            factor_A = torch.cat([factor_A, factor_A.new_zeros(missing, factor_A.shape[1])])
            factor_B = torch.cat([factor_B, factor_B.new_zeros(factor_B.shape[0], missing)], 1)
        factors.append((factor_A, factor_B))
    return Uniform(rank, alpha, factors, sum(update.rank < rank for update in updates), folded)


def export_folder(
    run: Path, folder: Path, reader: str = "peft", options: MergeOptions | None = None, say: Say = lambda line: None
) -> Written:
    """Write the adapter in ``run`` in its most portable form, or for mlx-lm's ``--adapter-path``.

    Args:
        run: a run's folder, or an adapter's in PEFT's format.
        folder: to make.
        reader: ``peft``; ``vllm``, which takes less; or ``mlx``.
        options: name the base model, and allow replacing a folder with files.
        say: told a line if something should be known.

    Raises:
        UserError: the adapter holds more than the reader takes, the base is another one or of a family that
            the reader names otherwise, or the folder cannot be written. Nothing is written then.
    """
    options = options or MergeOptions()
    require_lora(run, reader)
    check_target(folder, overwrite=options.overwrite)
    adapter, base = read_pair(run, reader, options, say)
    if reader in _REFUSALS:
        _REFUSALS[reader](adapter, base, run)
    fingerprint = require_same_base(base, adapter.fingerprint, run, say)
    alike = uniform(adapter.updates)
    tensors, settings = (_for_mlx if reader == "mlx" else _for_peft)(adapter, alike, base)
    metadata = {"format": "mlx" if reader == "mlx" else "pt"} | ({FINGERPRINT_KEY: fingerprint} if fingerprint else {})
    with appearing(folder, overwrite=options.overwrite, say=say) as partial:
        save_tensors(partial / file_names(reader)[0], tensors, metadata)
        write_json(partial / CONFIG_NAME, settings)
    made = {"rank": alike.rank, "alpha": alike.alpha, "padded": alike.padded, "folded": alike.folded}
    lines = [f"{len(alike.factors)} modules, rank {alike.rank}, alpha {alike.alpha:g}"]
    if alike.padded:
        lines.append(f"{alike.padded} modules of smaller rank were padded with zeros")
    return Written({"path": str(folder), "modules": len(alike.factors), **made}, lines + folded_lines(alike.folded))


def file_names(reader: str) -> tuple[str, str]:
    """The files that a reader takes: the weights and their configuration."""
    return MLX_WEIGHTS if reader == "mlx" else WEIGHTS_NAME, CONFIG_NAME


def _for_peft(adapter: PlainAdapter, alike: Uniform, base: Base) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Tensors and settings in PEFT's format."""
    tensors = {}
    for update, (factor_A, factor_B) in zip(adapter.updates, alike.factors, strict=True):
        end = "lora_embedding_{}" if update.embedding else "lora_{}.weight"
        tensors[f"{PREFIX}{update.module}.{end.format('A')}"] = factor_A.contiguous()
        tensors[f"{PREFIX}{update.module}.{end.format('B')}"] = factor_B.contiguous()
    names = [name for name, _ in base.skeleton().named_modules() if name]
    return tensors, {
        **DEFAULTS,
        "alora_invocation_tokens": None if adapter.invocation is None else list(adapter.invocation),
        **base_settings(base.reference),
        "fan_in_fan_out": base.config.model_type == "gpt2",
        "lora_alpha": int(alike.alpha),
        "r": alike.rank,
        "target_modules": target_entries(names, [update.module for update in adapter.updates]),
        "task_type": adapter.task_type,
    }


def _for_mlx(adapter: PlainAdapter, alike: Uniform, base: Base) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Tensors and settings in mlx-lm's format, whose modules are named inside a layer."""
    tensors = {}
    for update, (factor_A, factor_B) in zip(adapter.updates, alike.factors, strict=True):
        tensors[f"{update.module}.lora_a"] = factor_A.t().contiguous()
        tensors[f"{update.module}.lora_b"] = factor_B.t().contiguous()
    found = {update.module: _LAYER.fullmatch(update.module) for update in adapter.updates}
    numbers = [int(match["number"]) for match in found.values() if match is not None]
    keys = {module if match is None else match["inside"] for module, match in found.items()}
    # mlx-lm takes 0 for none of the layers.
    layers = int(base.config.num_hidden_layers) - min(numbers) if numbers else 0
    scaled = {"rank": alike.rank, "scale": alike.alpha / alike.rank, "dropout": 0.0, "keys": sorted(keys)}
    return tensors, {"fine_tune_type": "lora", "model": base.reference, "num_layers": layers, "lora_parameters": scaled}


def _refuse_invocation(adapter: PlainAdapter, run: Path, reader: str) -> None:
    if adapter.invocation is not None:
        what = f"the adapter acts only from its invocation tokens on, and {reader} would apply it to every token"
        raise UserError(what, where=str(run), hint="use deltaw serve, or llama.cpp (--format gguf-adapter)")


def _refuse_for_mlx(adapter: PlainAdapter, base: Base, run: Path) -> None:
    kind = base.config.model_type
    if kind not in _SAME_NAMES:
        hint = f"known are {', '.join(_SAME_NAMES)}; otherwise {_CONVERT}"
        raise UserError(f"the modules of '{kind}' models have other names in mlx-lm", where=str(run), hint=hint)
    _refuse_invocation(adapter, run, "mlx-lm")
    outer = [u.module for u in adapter.updates if u.embedding or u.module == "lm_head"]
    if outer and base.config.tie_word_embeddings:
        what = f"the adapter changes '{outer[0]}', which is tied: mlx-lm would change both weights"
        raise UserError(what, where=str(run), hint=_CONVERT)


def _refuse_for_vllm(adapter: PlainAdapter, base: Base, run: Path) -> None:
    _refuse_invocation(adapter, run, "vLLM")
    skeleton = base.skeleton()
    head = skeleton.get_output_embeddings()
    outer = {name for name, module in skeleton.named_modules() if isinstance(module, nn.Embedding) or module is head}
    changed = [update.module for update in adapter.updates if update.module in outer]
    if changed:
        what = f"the adapter changes '{changed[0]}', and vLLM updates no embeddings and heads of most models"
        raise UserError(what, where=str(run), hint="merge it into its base instead (deltaw merge)")


_REFUSALS = {"mlx": _refuse_for_mlx, "vllm": _refuse_for_vllm}
