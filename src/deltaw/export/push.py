"""`deltaw push`: upload a finished run to a model hub in one commit.

Only known files are uploaded. Rows, sample answers, checkpoints and logs are not. The hub's client skips large files
that already exist. The token is read from the environment or the hub's login, and is never stored.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltaw.errors import UserError, validate_key
from deltaw.export.base import resolve_base
from deltaw.export.hub_card import PublicBase, local_paths, model_card, public_name, public_settings
from deltaw.export.secrets import path_in, remove_secrets
from deltaw.hub.app_stores import SCHEMES, is_store_reference
from deltaw.hub.folders import find_cached, resolve, resolve_hub_id
from deltaw.hub.hub_errors import LOGIN, push_error
from deltaw.hub.outside_references import read_json_object, require_own_files
from deltaw.hub.sentence_layout import layout_files
from deltaw.hub.tokenizers import CONFIG_FILES, TOKENIZER_FILES
from deltaw.inference.prompting import FILE as PROMPTS
from deltaw.inference.prompting import copy_system, read_prompting
from deltaw.lora.fingerprint import FINGERPRINT_KEY, same_base
from deltaw.lora.peft_format import base_settings
from deltaw.methods.base import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from deltaw.methods.files import read_metadata
from deltaw.methods.trust import CHAT_TEMPLATE, read_folder
from deltaw.progress import LogFunction, ignore_line, track_progress
from deltaw.runs.folder import FINISHED, Run, mapping, read_run, settings_text
from deltaw.settings.config import SETTINGS, RunConfig
from deltaw.untrusted_paths import require_contained
from deltaw.version import __version__

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CARD = "README.md"
# Files of a run's folder in addition to the adapter. config.json belongs to the base model.
_TOKENIZER = (*TOKENIZER_FILES, *CONFIG_FILES[1:], CHAT_TEMPLATE)
# Suffixes of files of a merged model.
_OF_MODEL = (".json", ".safetensors", ".txt", ".model", ".jinja")
_REPOSITORY = re.compile(r"(?=.{3,96}\Z)[A-Za-z0-9][\w-]*(?:\.[\w-]+)*/[A-Za-z0-9][\w-]*(?:\.[\w-]+)*")
# Files written by users, which are scanned for secrets. Vocabularies are excluded.
_TEXT_SUFFIXES = (".json", ".jinja", ".txt", ".md")
_VOCABULARY = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt")


@dataclass(frozen=True)
class PushResult:
    """Result of :func:`push`.

    Attributes:
        repository: ``user/name``.
        private: True if the repository is private.
        files: Size in bytes by file name.
        base: Public identity of the base model.
        url: URL of the repository, unset in a dry run.
        commit: Commit id, unset in a dry run.
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
    log: LogFunction = ignore_line,
) -> PushResult:
    """Upload a finished run to a hub repository, which is created if it does not exist.

    Args:
        folder: Folder of the run.
        repository: ``user/name``.
        public: Create a public repository.
        revision: Branch to push to, created if missing. None means the main branch.
        merged: Folder of the merged model, uploaded instead of the adapter.
        base: Hub id of the base model, if it differs from the run's settings.
        dry_run: Do not upload or contact the hub.
        log: Receives messages for the user.

    Raises:
        UserError: if the run is not finished, arguments are invalid, or the hub cannot be reached or rejects the push.
    """
    from huggingface_hub import constants, get_token

    if not _REPOSITORY.fullmatch(repository):
        hint = "use user/name: your user name or organization on the hub, then letters, digits, '-', '_' and '.'"
        raise UserError(f"'{repository}' is not a valid repository name", location="push", hint=hint)
    run = read_run(folder)
    if run.state != FINISHED or not (run.path / ADAPTER_WEIGHTS).is_file() or not run.result:
        hint = f"finish it: deltaw train --resume {run.path}"
        raise UserError(f"the run is not finished ({run.state})", location=str(run.path), hint=hint)
    config = read_folder(run.path, trust_remote_code=None).run
    assert config is not None
    public_model = public_base(run, config, base, log)
    files = collect_files(run, config, public_model, repository, None if merged is None else Path(merged), log)
    sizes = {name: len(f) if isinstance(f, bytes) else f.stat().st_size for name, f in files.items()}
    result = PushResult(repository, not public, sizes, public_model)
    if dry_run:
        return result
    if constants.HF_HUB_OFFLINE:
        hint = "unset it to push, or use --dry-run to list the files"
        raise UserError("HF_HUB_OFFLINE is set, but pushing requires the hub", location=repository, hint=hint)
    if not (token := get_token()):
        raise UserError("no token for the hub is configured", location=repository, hint=LOGIN)
    validate_key(token, "the hub's token", repository)
    try:
        return _send(result, files, revision, token, log)
    except UserError:
        raise
    except Exception as error:  # the client does not convert errors of its transport
        raise push_error(error, repository, token) from None


def public_base(run: Run, config: RunConfig, hub_id: str | None, log: LogFunction) -> PublicBase:
    """Return the public identity of the base model. Logs a warning if other users cannot load it.

    Raises:
        UserError: if ``hub_id`` is not a hub id, or has other weights than the run was trained on.
    """
    source = resolve_hub_id(hub_id or config.model)
    if hub_id is not None and source is None:
        raise UserError(f"'{hub_id}' is not a hub id", location="--base-model", hint="write owner/name[@revision]")
    if source is None:
        name = public_name(config.model)
        reason = f"its base model '{name}' is not on the hub. If a copy of it is, set --base-model owner/name"
        log(f"warning: other users cannot load this adapter: {reason}")
        digest = f" (`{run.part('revisions').get(name)}`)" if is_store_reference(name) else ""
        note = f"The base model `{name}`{digest} is not on the hub. Set your copy of it with `--model`."
        return PublicBase(name, note=note)
    public_model = PublicBase(str(source.location), source.revision)
    if hub_id is None or hub_id == config.model:
        commit = run.part("revisions").get(config.model)
        if commit is None:  # may be a local path that looks like a hub id
            log(f"warning: the run does not record a hub commit of '{config.model}', which may be a local folder")
        return replace(public_model, revision=commit or source.revision)
    cached = find_cached(hub_id)
    is_same = None
    if cached is not None:
        with track_progress("comparing the base model's weights"):
            base = resolve_base(run.path, dtype="bf16", model=cached, trust_remote_code=False, log=log)
            fingerprint = base.fingerprint()
            is_same = same_base(read_metadata(run.path).get(FINGERPRINT_KEY), fingerprint)
        public_model = replace(public_model, revision=cached.rpartition("@")[2])
    may_be_quantized = ".gguf" in config.model.lower() or config.model.startswith(("pypi:", *SCHEMES))
    if is_same is False and not may_be_quantized:
        hint = "give the base model that the run was trained on"
        raise UserError(f"'{hub_id}' has other weights than the run was trained on", location="--base-model", hint=hint)
    if is_same:
        return public_model
    note = f"Trained on '{public_name(config.model)}'; the weights of `{public_model.name}` were not compared."
    if is_same is False:
        note = f"Trained on '{public_name(config.model)}', whose weights differ from those of `{public_model.name}`."
    log(f"warning: {note.replace('`', chr(39))}" + ("" if cached else " It is not in the local hub cache."))
    return replace(public_model, note=note)


def collect_files(
    run: Run, config: RunConfig, base: PublicBase, repository: str, merged: Path | None, log: LogFunction
) -> dict[str, bytes | Path]:
    """Return the files to upload by their names in the repository: paths of files, and content of generated texts.

    Secrets are removed from generated texts, with a message to ``log``. Files are uploaded unchanged.

    Raises:
        UserError: if a file contains a secret or is a link that leads elsewhere, or if ``merged`` is not a model's
            folder.
    """
    require_contained(run.path)
    public = public_settings(config, base)
    private_paths = [str(run.path.resolve()), str(Path.home()), *local_paths(config)]
    choices = {k: c for k, c in run.chosen.items() if isinstance(c, Mapping) and not path_in(str(c))}
    choices = {k: c for k, c in choices.items() if not any(path in str(c) for path in private_paths)}
    public_choices = {k: (c["value"], c.get("why", "")) for k, c in choices.items()}
    card = model_card(run, config, base, repository, merged=merged is not None)
    texts = {CARD: card, SETTINGS: settings_text(public, public_choices)}
    if merged is None:
        texts |= _adapter_texts(run, config, base)
        tokenizer_files = [name for name in _TOKENIZER if (run.path / name).is_file()]
        files = {name: run.path / name for name in [ADAPTER_WEIGHTS, *tokenizer_files]}
    else:
        source = resolve(str(merged))
        if source.kind != "folder":
            raise UserError(f"'{merged}' is not a model's folder", location="--merged", hint="use deltaw merge")
        require_own_files(source.path)
        files = {file.name: file for file in sorted(source.path.iterdir()) if file.suffix in _OF_MODEL}
    upload_folder = run.path if merged is None else Path(merged)
    files |= {file.relative_to(upload_folder).as_posix(): file for file in layout_files(upload_folder)}
    for name, file in files.items():
        _require_no_secrets(name, file)
    return files | {name: _public_content(name, text, log) for name, text in texts.items()}


def _adapter_texts(run: Run, config: RunConfig, base: PublicBase) -> dict[str, str]:
    """Return the public settings of the adapter, and the prompts if the run has a system prompt, by file name."""
    settings = mapping(read_json_object(run.path / ADAPTER_CONFIG))
    paths = [value for value in settings.values() if isinstance(value, str) and value.startswith(("/", "~"))]
    replacements = {**{path: public_name(path) for path in paths}, config.model: base.name}
    public_values = {k: replacements.get(v, v) if isinstance(v, str) else v for k, v in settings.items()}
    texts = {ADAPTER_CONFIG: json.dumps({**public_values, **base_settings(base.reference)}, indent=2) + "\n"}
    if read_prompting(run.path).system:
        with tempfile.TemporaryDirectory() as temporary:
            copy_system(run.path, Path(temporary))
            texts[PROMPTS] = (Path(temporary) / PROMPTS).read_text(encoding="utf-8")
    return texts


def _require_no_secrets(name: str, file: Path) -> None:
    if Path(name).suffix not in _TEXT_SUFFIXES or Path(name).name in _VOCABULARY:
        return
    _, kinds = remove_secrets(file.read_text(encoding="utf-8", errors="replace"))
    if kinds:
        hint = "remove it from the file and push again; no files were uploaded"
        raise UserError(f"the file contains a secret: {', '.join(kinds)}", location=str(file), hint=hint)


def _public_content(name: str, text: str, log: LogFunction) -> bytes:
    """Return a generated text without secrets, and log the kinds of removed secrets and any remaining path."""
    public_text, kinds = remove_secrets(text)
    if kinds:
        log(f"warning: removed from {name}: {', '.join(kinds)}")
    if path := path_in(public_text):
        log(f"warning: {name} contains what looks like a path of this machine: {path[:80]}")
    return public_text.encode()


def _send(
    result: PushResult, files: Mapping[str, bytes | Path], revision: str | None, token: str, log: LogFunction
) -> PushResult:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    is_model = ADAPTER_CONFIG not in files
    api = HfApi(token=token, library_name="deltaw", library_version=__version__)
    with track_progress("contacting the hub"):
        existing, private = _existing(api, result, is_model, revision)
        if private is not None and private != result.private:
            log(f"{result.repository} remains private: change its visibility on the hub")
        api.create_repo(result.repository, private=result.private, exist_ok=True)
        if revision is not None and revision != "main":
            api.create_branch(result.repository, branch=revision, exist_ok=True)
    own_files = {*_TOKENIZER, PROMPTS}  # files of an earlier push that this push may lack
    operations: list[Any] = [CommitOperationDelete(name) for name in sorted((existing & own_files) - files.keys())]
    operations += [CommitOperationAdd(name, file) for name, file in files.items()]
    with track_progress(f"uploading {sum(result.files.values()) / 1e6:,.1f} MB"):
        message = f"{'A merged model' if is_model else 'An adapter'}, trained with deltaw {__version__}"
        commit = api.create_commit(result.repository, operations, commit_message=message, revision=revision)
    url = f"{api.endpoint}/{result.repository}"
    return replace(result, url=url, commit=commit.oid, private=result.private if private is None else private)


def _existing(api: HfApi, result: PushResult, is_model: bool, revision: str | None) -> tuple[set[str], bool | None]:
    """Return the file names of an existing repository and whether it is private, or None if it does not exist.

    Raises:
        UserError: if the repository is public, but not the push, or it contains an incompatible model or adapter.
    """
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        try:
            info = api.model_info(result.repository, revision=revision)
        except RevisionNotFoundError:
            info = api.model_info(result.repository)  # a new branch starts from the main branch
    except RepositoryNotFoundError:
        return set(), None
    names = {file.rfilename for file in info.siblings or ()}
    problem = ""
    hint = "push to another name"
    if info.private is False and result.private:
        problem = "the repository is public, but pushes are private by default"
        hint = "add --public, or push to another name"
    elif (ADAPTER_CONFIG if is_model else "config.json") in names:
        problem = f"the repository already contains {'an adapter' if is_model else 'a model'}"
    elif ADAPTER_CONFIG in names:
        with tempfile.TemporaryDirectory() as folder:
            file = api.hf_hub_download(result.repository, ADAPTER_CONFIG, revision=info.sha, local_dir=folder)
            base = read_json_object(Path(file)).get("base_model_name_or_path")
        if base not in (None, result.base.name):
            problem = f"the repository contains an adapter for another base model, '{base}'"
    elif is_model and info.card_data is not None and info.card_data.base_model not in (None, result.base.name):
        problem = f"the repository contains a model merged from another base model, '{info.card_data.base_model}'"
    if problem:
        raise UserError(problem, location=result.repository, hint=hint)
    return names, bool(info.private)
