"""An adapter with one rank and one alpha, in PEFT's format, as every reader of that format understands it.

Readers drop rank and alpha patterns in silence, and some take no rsLoRA. Here every update gets the largest
rank, smaller ones by zeros, which changes nothing, and a scaling beyond alpha / r goes into B.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from deltaw.data.chat_template import with_chat_template
from deltaw.errors import UserError
from deltaw.export.base import Base, Say, base_of, fingerprint_on_disk
from deltaw.export.output_folder import appearing, check_target
from deltaw.export.plain_adapter import PlainAdapter, PlainUpdate, plain_adapter, read_plain, require_lora
from deltaw.hub.checkpoint import names_on_disk, read_checkpoint
from deltaw.hub.folders import resolve
from deltaw.hub.loading import read_config
from deltaw.hub.quiet import quiet
from deltaw.hub.tokenizers import tokenizer_in
from deltaw.lora.files import CONFIG_NAME, WEIGHTS_NAME
from deltaw.lora.fingerprint import FINGERPRINT_KEY, same_base
from deltaw.lora.peft_format import DEFAULTS, PREFIX, target_entries
from deltaw.tasks import entry_of
from deltaw.tensor_files import save_tensors
from deltaw.training.origin import CHAT_TEMPLATE

# ---- What an export has to know of a base model beyond its weights: configuration, tokenizer, fingerprint.
#
# Knows model folders and ``.gguf`` files; knows no format to export to.


@dataclass(frozen=True)
class DescribedBase:
    """A base model on disk.

    Attributes:
        files: its reference and folder, and what the run says of it.
        name: a short name for a person.
        config: its configuration.
        gguf: the ``.gguf`` file that the folder was converted from; None where it was none.
    """

    files: Base
    name: str
    config: PretrainedConfig
    gguf: Path | None

    @property
    def folder(self) -> Path:
        return self.files.folder

    def tokenizer(self, run: Path) -> PreTrainedTokenizerBase | None:
        """The tokenizer, with the chat template of ``run`` where that has one of its own."""
        found = tokenizer_in(self.folder, self.files.trust_remote_code)
        if found is None:
            return None
        if self.files.run is not None:
            return with_chat_template(found, self.files.run.data.chat_template)
        template = run / CHAT_TEMPLATE
        return with_chat_template(found, str(template)) if template.is_file() else found

    def fingerprint(self) -> str | None:
        """Of its weights, read without loading them; None where the files do not hold them one by one."""
        skeleton = self.files.skeleton()
        checkpoint = read_checkpoint(self.folder)
        return fingerprint_on_disk(skeleton, checkpoint, names_on_disk(skeleton, checkpoint.tensors))


def describe_base(
    run: Path, model: str | None, *, say: Say, precision: str = "fp32", trust_remote_code: bool = False
) -> DescribedBase:
    """The base model of the adapter in ``run``.

    Args:
        run: a run's folder, or an adapter's.
        model: given by the user, instead of the one that the folder names.
        precision: what a ``.gguf`` base is converted to, once.
        trust_remote_code: run the Python files that came with it.

    Raises:
        UserError: no base model is named or found, its config.json cannot be read, or it writes no text.
    """
    files = base_of(run, model, precision, say, trust_remote_code=trust_remote_code)
    if not entry_of(files.task).writes_text:
        raise UserError(
            f"this is an adapter for {files.task}, and exports are for models that write text",
            where=str(run),
            hint="the run's folder is in PEFT's format already; deltaw merge makes a model of it",
        )
    with quiet():
        config = read_config(files.folder, files.task, None, files.trust_remote_code)
    source = resolve(files.reference)
    return DescribedBase(files, source.name, config, source.path if source.kind == "gguf" else None)


def read_updates(run: Path, base: DescribedBase, format_name: str, *, say: Say) -> PlainAdapter:
    """The plain updates of the adapter in ``run``; a share that its initialization took out of W is put back.

    Raises:
        UserError: the adapter consists of more than plain updates.
    """
    with plain_adapter(run, base.files, say) as folder:
        return read_plain(folder, format_name)


def require_same_base(base: DescribedBase, fingerprint: str | None, run: Path, say: Say) -> str | None:
    """The base's fingerprint, compared with that of the base that the adapter was trained on.

    Raises:
        UserError: they differ: what is exported would answer otherwise than what was trained.
    """
    own = base.fingerprint()
    same = same_base(fingerprint, own)
    if same is None:
        say("note: whether this is the base model that the adapter was trained on cannot be told")
    elif not same:
        raise UserError(
            f"the adapter was trained on other weights than those of '{base.files.reference}'",
            where=str(run),
            hint="name its own base with --model",
        )
    return own


# ---- portable


_MERGE_INTO_BASE = "merge it into its base instead (deltaw merge), which needs no adapter"


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

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True)
class WrittenFolder:
    """What was written: the folder, how many modules it adapts, and how the updates were made alike."""

    path: Path
    modules: int
    rank: int
    alpha: float
    padded: int
    folded: int


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
    padded = sum(update.rank < rank for update in updates)
    return Uniform(rank, alpha, factors, padded, folded)


def export_peft(
    run: Path,
    folder: Path,
    *,
    reader: str = "peft",
    model: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> WrittenFolder:
    """Write the adapter in ``run`` in its most portable form.

    Args:
        run: a run's folder, or an adapter's in PEFT's format.
        folder: to make.
        reader: ``peft``, or ``vllm``, which takes less.
        model: the base model, where it is not the one that the folder names.
        trust_remote_code: run the Python files that came with the base model.
        overwrite: whether a folder with files is replaced.
        say: told a line where something should be known.

    Raises:
        UserError: the adapter holds more than the reader takes, the base is another one, or the folder cannot
            be written. Nothing is written then.
    """
    require_lora(run, reader)
    check_target(folder, overwrite=overwrite)
    base = describe_base(run, model, say=say, precision="bf16", trust_remote_code=trust_remote_code)
    adapter = read_updates(run, base, reader, say=say)
    if reader == "vllm":
        _refuse_for_vllm(adapter, base, run)
    fingerprint = require_same_base(base, adapter.fingerprint, run, say)
    alike = uniform(adapter.updates)
    tensors = {}
    for update, (factor_A, factor_B) in zip(adapter.updates, alike.factors, strict=True):
        end = "lora_embedding_{}" if update.embedding else "lora_{}.weight"
        tensors[f"{PREFIX}{update.module}.{end.format('A')}"] = factor_A.contiguous()
        tensors[f"{PREFIX}{update.module}.{end.format('B')}"] = factor_B.contiguous()
    metadata = {"format": "pt"} | ({FINGERPRINT_KEY: fingerprint} if fingerprint else {})
    settings = _settings(adapter, alike, base)
    with appearing(folder, overwrite=overwrite, say=say) as partial:
        save_tensors(partial / WEIGHTS_NAME, tensors, metadata)
        text = json.dumps(settings, indent=2, ensure_ascii=False)
        (partial / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")
    return WrittenFolder(folder, len(adapter.updates), alike.rank, alike.alpha, alike.padded, alike.folded)


def _settings(adapter: PlainAdapter, alike: Uniform, base: DescribedBase) -> dict[str, object]:
    names = [name for name, _ in base.files.skeleton().named_modules() if name]
    whole = int(alike.alpha)
    return {
        **DEFAULTS,
        "alora_invocation_tokens": None if adapter.invocation is None else list(adapter.invocation),
        "base_model_name_or_path": base.files.reference,
        "fan_in_fan_out": base.config.model_type == "gpt2",
        "lora_alpha": whole,
        "r": alike.rank,
        "target_modules": target_entries(names, [update.module for update in adapter.updates]),
        "task_type": adapter.task_type,
    }


def _refuse_for_vllm(adapter: PlainAdapter, base: DescribedBase, run: Path) -> None:
    if adapter.invocation is not None:
        raise UserError(
            "the adapter acts only from its invocation tokens on, and vLLM would apply it to every token",
            where=str(run),
            hint="serve it with deltaw serve, or llama.cpp (--format gguf-adapter)",
        )
    skeleton = base.files.skeleton()
    head = skeleton.get_output_embeddings()
    outer = {name for name, module in skeleton.named_modules() if isinstance(module, nn.Embedding) or module is head}
    for update in adapter.updates:
        if update.module in outer:
            raise UserError(
                f"the adapter changes '{update.module}', and vLLM takes no updates of embeddings and heads "
                "for most models",
                where=str(run),
                hint=_MERGE_INTO_BASE,
            )
