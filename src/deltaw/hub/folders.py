"""A reference becomes a folder on this machine: one that is here, a converted ``.gguf``, or a fetched hub id.

Knows files and the hub; reads neither weights nor tokenizers. What converts or fetches is imported when it is
needed.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from deltaw.errors import UserError
from deltaw.hub import packages
from deltaw.hub.model_folder import require_own_files
from deltaw.hub.references import Source, resolve, resolve_hub_id

# What is fetched from a hub: no pickles, no other frameworks' weights, no second copy in a subfolder.
_FETCHED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_COMMIT = re.compile(r"[0-9a-f]{40}")
_NOT_FETCHED = ["*/*", "consolidated*.safetensors", "*.bin", "*.pt", "*.h5", "*.msgpack"]


def say_on_stderr(line: str) -> None:
    """Print a line where it does not mix with a program's answer."""
    print(line, file=sys.stderr, flush=True)


def config_folder(
    reference: str, dtype: str, trust_remote_code: bool, *, say: Callable[[str], None] = say_on_stderr
) -> Path:
    """The local folder with the config.json of what ``reference`` means; it need not hold weights.

    Raises:
        UserError: the reference leads nowhere.
    """
    given = Path(os.path.expanduser(reference))
    if dtype != "gguf" and (given / "config.json").is_file():
        require_own_files(given)
        return given
    return local_folder(resolve(reference), dtype, say, trust_remote_code)


def local_folder(source: Source, dtype: str, say: Callable[[str], None], trust_remote_code: bool) -> Path:
    """The local folder with config.json and safetensors behind a source."""
    if dtype == "gguf":
        require_gguf_source(source)
    if source.kind == "folder":
        return source.path
    if source.kind == "gguf":
        from deltaw.hub import gguf

        return gguf.converted(source.path, dtype, say)
    return _from_hub(str(source.location), source.revision, trust_remote_code)


def already_here(reference: str) -> str | None:
    """``reference`` where it names a model in a cache of this machine: a package that is installed or was
    fetched, or a hub id, pinned to the commit that is here. None for a path, and for what is not here.

    Raises:
        UserError: the package that is named is malformed, or has no such member.
    """
    if packages.is_package_reference(reference):
        return reference if packages.is_here(reference) else None
    if (source := resolve_hub_id(reference)) is None:
        return None
    snapshot = _whole_snapshot(str(source.location), source.revision)
    return None if snapshot is None else f"{source.location}@{snapshot.name}"


def require_gguf_source(source: Source) -> None:
    """Raise a UserError unless a model comes from a ``.gguf`` file, whose blocks precision gguf keeps."""
    if source.kind != "gguf":
        raise UserError(
            "precision: gguf keeps the blocks of a .gguf file, and the model is none",
            where=str(source.location),
            hint="give a .gguf file as the model, or use precision: nf4, which rounds any model's weights",
        )


def _from_hub(model_id: str, revision: str | None, trust_remote_code: bool) -> Path:
    """Fetch a hub id into the hub's own cache; from there alone where that is all there is."""
    from huggingface_hub import errors as hub_errors

    patterns = [*_FETCHED, "*.py"] if trust_remote_code else _FETCHED
    if not trust_remote_code and _COMMIT.fullmatch(revision or ""):  # a commit never changes
        held = _whole_snapshot(model_id, revision)
        if held is not None:
            return held
    try:
        fetched = _snapshot(model_id, revision, patterns)
    except hub_errors.GatedRepoError as error:
        hint = "accept its license on the hub, and log in or set HF_TOKEN"
        raise UserError("access to the model is restricted", where=model_id, hint=hint) from error
    except hub_errors.RevisionNotFoundError as error:
        hint = "give a branch, tag or commit that the model has, or none for the newest"
        raise UserError(f"the model has no revision '{revision}'", where=model_id, hint=hint) from error
    except hub_errors.RepositoryNotFoundError as error:
        hint = "check the spelling; for a private model log in or set HF_TOKEN"
        raise UserError("the hub has no such model", where=model_id, hint=hint) from error
    except hub_errors.HFValidationError as error:
        raise UserError("this is no hub id", where=model_id, hint="a hub id is written owner/name") from error
    except Exception as error:  # the hub's client passes on whatever its transport raises
        raise UserError(
            f"the model is neither a folder here nor in the hub's cache, and the hub cannot be reached "
            f"({type(error).__name__})",
            where=model_id,
            hint="check the connection and HF_HUB_OFFLINE, or give a local folder, a .gguf file or "
            "pypi:package==version",
        ) from error
    return resolve(str(fetched)).path


def _snapshot(model_id: str, revision: str | None, patterns: list[str], *, local: bool = False) -> Path:
    """The folder of a hub id in the hub's cache, fetched unless ``local``.

    Raises:
        Exception: whatever the hub's client and its transport raise.
    """
    from huggingface_hub import snapshot_download

    fetched = snapshot_download(
        model_id,
        revision=revision,
        allow_patterns=patterns,
        ignore_patterns=_NOT_FETCHED,
        local_files_only=local,
    )
    return Path(fetched)


def _whole_snapshot(model_id: str, revision: str | None) -> Path | None:
    """The folder of a hub id in the hub's cache, without asking the hub; None where it is not whole."""
    try:
        return resolve(str(_snapshot(model_id, revision, _FETCHED, local=True))).path
    except (UserError, OSError, ValueError):
        return None


def asks_for_code(folder: Path) -> UserError:
    """The refusal of a model that needs its own code to run."""
    return UserError(
        "the model brings Python code of its own, which is not run unasked",
        where=str(folder),
        hint="read the code; if you trust it, add --trust-remote-code, or trust_remote_code: true to "
        "settings of your own",
    )


def first_line(error: BaseException) -> str:
    """An error's own first line, for a refusal of ours."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
