"""What an export has to know of a base model beyond its weights: configuration, tokenizer, fingerprint.

Knows model folders and ``.gguf`` files; knows no format to export to.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from deltaw.data.chat_template import with_chat_template
from deltaw.errors import UserError
from deltaw.export.base import Base, Say, base_of, fingerprint_on_disk
from deltaw.export.plain import plain_adapter
from deltaw.export.plain_adapter import PlainAdapter, read_plain
from deltaw.hub.checkpoint import names_on_disk, read_checkpoint
from deltaw.hub.loading import read_config
from deltaw.hub.quiet import quiet
from deltaw.hub.references import resolve
from deltaw.hub.tokenizers import tokenizer_in
from deltaw.lora.fingerprint import same_base
from deltaw.tasks import entry_of
from deltaw.training.origin import CHAT_TEMPLATE


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
