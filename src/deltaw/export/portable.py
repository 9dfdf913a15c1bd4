"""Export of adapters as folders for other programs: PEFT's format with one rank and one alpha, and mlx-lm's format.

Some programs silently ignore rank and alpha patterns or rsLoRA. All updates are therefore padded with zeros to the
largest rank, and other scalings than alpha / r are folded into B.

mlx-lm adds an update to every module named in ``keys`` in the last ``num_layers`` layers, with one rank and one scale,
and then loads the file. Modules without tensors in the file have B = 0 and no effect. In its format, A is (in, r) and B
is (r, out).

Adapters may consist only of plain low-rank updates, the common subset of these formats and GGUF adapters. A plain
update is ΔW = scaling · B·A of one weight matrix. Other contents (DoRA magnitudes, fully trained modules, token rows,
soft prompts) are rejected with a specific message before an export writes files.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from deltaw.errors import UserError
from deltaw.export.base import AdapterBase, ExportResult, wrong_base_error
from deltaw.export.merge_plan import MergeOptions, plain_adapter
from deltaw.export.merged_folder import write_json
from deltaw.export.output_folder import atomic_folder, check_target
from deltaw.lora.config import CHANGING_INITS
from deltaw.lora.files import CONFIG_NAME, WEIGHTS_NAME, AdapterFile, names_in_model, read_adapter
from deltaw.lora.fingerprint import FINGERPRINT_KEY, same_base
from deltaw.lora.peft_format import DEFAULTS, PREFIX, base_settings, target_entries
from deltaw.lora.peft_updates import FileUpdate, read_content
from deltaw.methods.files import read_config
from deltaw.progress import LogFunction, ignore_line
from deltaw.settings.task_registry import entry_of
from deltaw.tensor_files import save_tensors

_MERGE = "merge it into its base instead: deltaw merge (or --format gguf, except for experts)"


@dataclass(frozen=True)
class PlainUpdate:
    """Update ΔW = scaling · B·A of shape (out, in). For an embedding (vocabulary, dim) it is (scaling · B·A)ᵀ.

    Attributes:
        module: Name of the adapted module in the base model.
        factor_A: (r, in) fp32 factor, or (r, vocabulary) for an embedding.
        factor_B: (out, r) fp32 factor, or (dim, r) for an embedding.
        scaling: Factor of B·A.
        embedding: True if the module is an embedding.
    """

    module: str
    factor_A: Tensor
    factor_B: Tensor
    scaling: float
    embedding: bool = False

    @property
    def rank(self) -> int:
        return self.factor_A.shape[0]


@dataclass(frozen=True)
class PlainAdapter:
    """Adapter that consists only of plain updates.

    Attributes:
        updates: Updates in file order.
        invocation: Token ids that activate the adapter, or None if it is always active.
        fingerprint: Fingerprint of the base model used in training, or None if unknown.
        task_type: PEFT's name of the task.
        separate: Names of tensors trained in full that are exported separately.
    """

    updates: list[PlainUpdate]
    invocation: tuple[int, ...] | None
    fingerprint: str | None
    task_type: str | None
    separate: tuple[str, ...] = ()


def read_plain(folder: Path, format_name: str, separate: tuple[str, ...] = ()) -> PlainAdapter:
    """Read the plain updates of an adapter.

    Args:
        folder: Folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        format_name: Name of the export format for error messages.
        separate: Prefixes of tensors that may be trained in full, because they are exported separately.

    Raises:
        UserError: if the folder contains no adapter or an adapter with other changes.
    """
    require_lora(folder, format_name)
    adapter = read_adapter(folder)
    content = read_content(adapter)
    config = adapter.config
    metadata = adapter.metadata
    config_file = folder / CONFIG_NAME
    weights = folder / WEIGHTS_NAME
    if config.dora:
        raise _refusal("DoRA's magnitudes", config_file, format_name)
    if config.init in CHANGING_INITS:
        message = f"the initialization '{config.init}' changed the base weights, and the file lacks this change"
        hint = "load it on its base model and save it again with deltaw.save_adapter"
        raise UserError(message, location=str(config_file), hint=hint)
    separate = tuple(name for name in content.other_tensors if name.startswith(separate))
    for names, feature in (
        (content.biases, "a bias on B (of {})"),
        (content.token_rows, "trained rows of tokens (of {})"),
        ([name for name in content.other_tensors if name not in separate], "tensors trained in full ({})"),
    ):
        if names:
            raise _refusal(feature.format(_first_names(names)), weights, format_name)
    if content.incomplete or not content.updates:
        halves = f"the file has only one of two factors for {_first_names(content.incomplete)}"
        message = halves if content.incomplete else "the file contains no LoRA factors"
        raise UserError(message, location=str(weights), hint="save the adapter again")
    updates = [_plain(update, adapter, weights, format_name) for update in content.updates]
    invocation = None
    if config.active == "completion":
        if not isinstance(config.invocation_tokens, list):
            message = f"the activated adapter has no invocation tokens, which {format_name} requires"
            raise UserError(message, location=str(config_file), hint="set alora_invocation_tokens in this file")
        invocation = tuple(config.invocation_tokens)
    return PlainAdapter(updates, invocation, metadata.get(FINGERPRINT_KEY), metadata.get("task_type"), separate)


def require_lora(folder: Path, format_name: str) -> None:
    """Raise a UserError if the folder does not contain a LoRA adapter."""
    if not folder.is_dir():
        raise UserError(f"the folder '{folder}' does not exist", location=str(folder), hint="give the folder of a run")
    if not (folder / CONFIG_NAME).is_file():
        hint = "give the folder of a finished run or of a PEFT adapter"
        raise UserError(f"the folder has no {CONFIG_NAME}", location=str(folder), hint=hint)
    settings = read_config(folder)
    kind = str(settings.get("peft_type") or settings.get("method"))
    if kind != "LORA":
        input_hint = "it changes the model's input, which cannot be merged: use deltaw serve or generate"
        hint = input_hint if kind.lower() in ("prompt", "prompt_tuning", "input") else _MERGE
        message = f"{format_name} supports only LoRA, not adapters of method '{kind}'"
        raise UserError(message, location=str(folder / CONFIG_NAME), hint=hint)


def _plain(update: FileUpdate, adapter: AdapterFile, location: Path, format_name: str) -> PlainUpdate:
    for is_unsupported, message in (
        (update.experts is not None or not update.certain, "updates of stacked experts"),
        (update.factor_A.dim() != 2 or update.factor_B.dim() != 2, "an update of a convolution"),
        (update.name in adapter.config.target_parameters, "an update of a single parameter"),
    ):
        if is_unsupported:
            raise _refusal(f"{message} ({update.name})", location, format_name)
    embedding = f"{update.path}.lora_embedding_A" in adapter.tensors
    factor_A = update.factor_A.float()
    factor_B = update.factor_B.float()
    for letter, factor in (("A", factor_A), ("B", factor_B)):
        if not bool(factor.isfinite().all()):
            message = f"{letter} of '{update.name}' contains values that are not finite"
            raise UserError(message, location=str(location), hint="train the adapter again")
    return PlainUpdate(update.name, factor_A, factor_B, update.scaling * update.times, embedding)


def _refusal(feature: str, location: Path, format_name: str) -> UserError:
    message = f"the adapter contains {feature}, which {format_name} does not support"
    return UserError(message, location=str(location), hint=_MERGE)


def _first_names(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(f"'{name}'" for name in names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")


MLX_WEIGHTS = "adapters.safetensors"
_LAYER = re.compile(r"model\.layers\.(?P<number>\d+)\.(?P<inside>.+)")
# Model families with equal module names in mlx-lm and transformers.
_SAME_NAMES = ("llama", "mistral", "smollm3", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3")
_CONVERT = "merge the adapter (deltaw merge) and convert the model with mlx_lm.convert"


def require_text(base: AdapterBase, run: Path) -> None:
    """Raise a UserError if the adapter is not for text generation or the base model's configuration cannot be read."""
    if not entry_of(base.task).generates_text:
        hint = "use the run's folder, which is in PEFT's format, or merge it with deltaw merge"
        raise UserError(f"only text generation is exported, not {base.task}", location=str(run), hint=hint)
    assert base.config is not None  # raises an error if it cannot be read


def read_pair(
    run: Path, format_name: str, options: MergeOptions, log: LogFunction, separate: tuple[str, ...] = ()
) -> tuple[PlainAdapter, AdapterBase]:
    """Return the plain updates of an adapter and its base model.

    Changes of the base weights by the adapter's initialization are converted to a plain update.

    Args:
        run: Folder of the adapter.
        format_name: Name of the export format for error messages.
        options: Options of the merge.
        log: Receives messages for the user.
        separate: As in :func:`read_plain`, for vision-language models.

    Raises:
        UserError: if the adapter contains other changes than plain updates, or its base model is not found.
    """
    require_lora(run, format_name)
    base = options.resolve_base(run, dtype="bf16", log=log)
    require_text(base, run)
    with plain_adapter(run, base, log) as folder:
        return read_plain(folder, format_name, separate if base.is_view else ()), base


def with_language_names(adapter: PlainAdapter, base: AdapterBase, run: Path) -> PlainAdapter:
    """Return an adapter with the names of a language model that other programs read without the vision tower.

    Raises:
        UserError: if it changes other modules of a vision-language model.
    """
    if not base.is_view:
        return adapter
    names = names_in_model(base.trained_part(base.skeleton()), (u.module for u in adapter.updates), str(run))
    return replace(adapter, updates=[replace(update, module=names[update.module]) for update in adapter.updates])


def require_same_base(base: AdapterBase, fingerprint: str | None, run: Path, log: LogFunction) -> str | None:
    """Return the base model's fingerprint, after comparing it with the one of the adapter.

    Raises:
        UserError: if they differ, because the export would produce other outputs.
    """
    actual = base.fingerprint()
    is_same = same_base(fingerprint, actual)
    if is_same is None:
        log("note: the base model was not compared with the one that the adapter was trained on")
    elif not is_same:
        raise wrong_base_error(base, run, "set its base model with --model")
    return actual


@dataclass(frozen=True)
class UniformUpdates:
    """Updates with one rank and one scaling.

    Attributes:
        rank: Rank r.
        alpha: Value such that alpha / r is the scaling of all updates.
        factors: (r, in) A and (out, r) B of each update.
        padded: Number of updates that were padded to the rank.
        folded: Number of updates with a part of the scaling folded into B.
    """

    rank: int
    alpha: float
    factors: list[tuple[Tensor, Tensor]]
    padded: int
    folded: int


def folded_lines(folded: int) -> list[str]:
    """Return a line for the user about folded scalings, if any."""
    return [f"a part of the scaling of {folded} modules was folded into B"] if folded else []


def make_uniform(updates: Sequence[PlainUpdate]) -> UniformUpdates:
    """Return equal updates with one rank and one integer alpha, as some programs require it.

    If the most common scaling results in an integer alpha, the factors of its updates remain bit-identical.
    """
    rank = max(update.rank for update in updates)
    common_scaling = Counter(update.scaling for update in updates).most_common(1)[0][0]
    alpha = float(max(1, round(common_scaling * rank)))
    factors = []
    folded = 0
    for update in updates:
        factor = update.scaling * rank / alpha
        factor_A = update.factor_A
        factor_B = update.factor_B
        if factor != 1:
            factor_B = factor_B * factor
            folded = folded + 1
        padding = rank - update.rank
        if padding:
            factor_A = torch.cat([factor_A, factor_A.new_zeros(padding, factor_A.shape[1])])
            factor_B = torch.cat([factor_B, factor_B.new_zeros(factor_B.shape[0], padding)], 1)
        factors.append((factor_A, factor_B))
    return UniformUpdates(rank, alpha, factors, sum(update.rank < rank for update in updates), folded)


def export_folder(
    run: Path, folder: Path, reader: str = "peft", options: MergeOptions | None = None, log: LogFunction = ignore_line
) -> ExportResult:
    """Write an adapter in a portable form of PEFT's format, or for mlx-lm's ``--adapter-path``.

    Args:
        run: Folder of a run, or of a PEFT adapter.
        folder: Folder to create.
        reader: ``peft``, ``vllm`` (supports fewer features) or ``mlx``.
        options: Options of the merge, for example the base model.
        log: Receives messages for the user.

    Raises:
        UserError: if the reader does not support the adapter or the model family, the base model differs, or the folder
            cannot be written. In this case no files are written.
    """
    options = options or MergeOptions()
    require_lora(run, reader)
    check_target(folder, overwrite=options.overwrite)
    adapter, base = read_pair(run, reader, options, log)
    if reader in _REFUSALS:
        _REFUSALS[reader](adapter, base, run)
    fingerprint = require_same_base(base, adapter.fingerprint, run, log)
    updates = make_uniform(adapter.updates)
    tensors, settings = (_for_mlx if reader == "mlx" else _for_peft)(adapter, updates, base)
    metadata = {"format": "mlx" if reader == "mlx" else "pt"} | ({FINGERPRINT_KEY: fingerprint} if fingerprint else {})
    with atomic_folder(folder, overwrite=options.overwrite, log=log) as partial:
        save_tensors(partial / file_names(reader)[0], tensors, metadata)
        write_json(partial / CONFIG_NAME, settings)
    statistics = {"rank": updates.rank, "alpha": updates.alpha, "padded": updates.padded, "folded": updates.folded}
    lines = [f"{len(updates.factors)} modules, rank {updates.rank}, alpha {updates.alpha:g}"]
    if updates.padded:
        lines.append(f"{updates.padded} modules of smaller rank were padded with zeros")
    lines += folded_lines(updates.folded)
    return ExportResult({"path": str(folder), "modules": len(updates.factors), **statistics}, lines)


def file_names(reader: str) -> tuple[str, str]:
    """Return the names of the weights file and the configuration file for a reader."""
    return MLX_WEIGHTS if reader == "mlx" else WEIGHTS_NAME, CONFIG_NAME


def _for_peft(adapter: PlainAdapter, uniform: UniformUpdates, base: AdapterBase) -> tuple[dict[str, Tensor], dict]:
    """Return tensors and settings in PEFT's format."""
    tensors = {}
    for update, (factor_A, factor_B) in zip(adapter.updates, uniform.factors, strict=True):
        suffix = "lora_embedding_{}" if update.embedding else "lora_{}.weight"
        tensors[f"{PREFIX}{update.module}.{suffix.format('A')}"] = factor_A.contiguous()
        tensors[f"{PREFIX}{update.module}.{suffix.format('B')}"] = factor_B.contiguous()
    names = [name for name, _ in base.skeleton().named_modules() if name]
    return tensors, {
        **DEFAULTS,
        "alora_invocation_tokens": None if adapter.invocation is None else list(adapter.invocation),
        **base_settings(base.reference),
        "fan_in_fan_out": base.config.model_type == "gpt2",
        "lora_alpha": int(uniform.alpha),
        "r": uniform.rank,
        "target_modules": target_entries(names, [update.module for update in adapter.updates]),
        "task_type": adapter.task_type,
    }


def _for_mlx(adapter: PlainAdapter, uniform: UniformUpdates, base: AdapterBase) -> tuple[dict[str, Tensor], dict]:
    """Return tensors and settings in mlx-lm's format, in which modules are named relative to a layer."""
    tensors = {}
    for update, (factor_A, factor_B) in zip(adapter.updates, uniform.factors, strict=True):
        tensors[f"{update.module}.lora_a"] = factor_A.t().contiguous()
        tensors[f"{update.module}.lora_b"] = factor_B.t().contiguous()
    matches = {update.module: _LAYER.fullmatch(update.module) for update in adapter.updates}
    numbers = [int(match["number"]) for match in matches.values() if match is not None]
    keys = {module if match is None else match["inside"] for module, match in matches.items()}
    # For mlx-lm, 0 means no layers.
    layers = int(base.config.num_hidden_layers) - min(numbers) if numbers else 0
    lora = {"rank": uniform.rank, "scale": uniform.alpha / uniform.rank, "dropout": 0.0, "keys": sorted(keys)}
    return tensors, {"fine_tune_type": "lora", "model": base.reference, "num_layers": layers, "lora_parameters": lora}


def _refuse_invocation(adapter: PlainAdapter, run: Path, reader: str) -> None:
    if adapter.invocation is not None:
        message = f"the adapter is active only after its invocation tokens, but {reader} applies it to all tokens"
        raise UserError(message, location=str(run), hint="use deltaw serve, or llama.cpp (--format gguf-adapter)")


def _refuse_for_mlx(adapter: PlainAdapter, base: AdapterBase, run: Path) -> None:
    kind = base.config.model_type
    if base.is_view:
        message = "mlx-lm does not read adapters of vision-language models"
        raise UserError(message, location=str(run), hint="export it with --format peft, or merge it (deltaw merge)")
    if kind not in _SAME_NAMES:
        hint = f"supported are {', '.join(_SAME_NAMES)}; otherwise {_CONVERT}"
        raise UserError(f"modules of '{kind}' models have other names in mlx-lm", location=str(run), hint=hint)
    _refuse_invocation(adapter, run, "mlx-lm")
    outer = [u.module for u in adapter.updates if u.embedding or u.module == "lm_head"]
    if outer and base.config.tie_word_embeddings:
        message = f"the adapter changes the tied weight '{outer[0]}', and mlx-lm would change both weights"
        raise UserError(message, location=str(run), hint=_CONVERT)


def _refuse_for_vllm(adapter: PlainAdapter, base: AdapterBase, run: Path) -> None:
    _refuse_invocation(adapter, run, "vLLM")
    skeleton = base.skeleton()
    head = skeleton.get_output_embeddings()
    outer = {name for name, module in skeleton.named_modules() if isinstance(module, nn.Embedding) or module is head}
    changed = [update.module for update in adapter.updates if update.module in outer]
    if changed:
        message = f"the adapter changes '{changed[0]}', but vLLM supports no embedding or head updates for most models"
        raise UserError(message, location=str(run), hint="merge it into its base instead (deltaw merge)")


_REFUSALS = {"mlx": _refuse_for_mlx, "vllm": _refuse_for_vllm}
