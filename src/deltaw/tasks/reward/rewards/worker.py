"""Worker processes that run user code: requests and answers are JSON.

:class:`RewardWorker` starts a worker and sends requests. The worker is a module whose function ``main`` calls
:func:`answer_requests`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from deltaw.child_process import python_command
from deltaw.errors import UserError, redact
from deltaw.worker_process import PipeWorker, WorkerError, serve

RequestHandler = Callable[[Any], dict[str, Any]]

# Maximum length of an answer.
_MAX_ANSWER_BYTES = 1 << 24
# Maximum number of characters of an exception's text.
_MAX_TEXT_LENGTH = 2000


class RewardWorker:
    """A worker process. It starts at the first request, and again at the first request after it was killed.

    Args:
        module: Module with the function ``main``.
        settings: JSON text, passed as the only command-line argument.
        extra_start_seconds: Time allowed for the start, in addition to the default.

    Attributes:
        process: The process.
        failure: Why the last request has no answer, as a verb phrase: "gave an answer that cannot be read".
    """

    def __init__(self, module: str, settings: str, extra_start_seconds: float) -> None:
        command = python_command(f"from {module} import main; main()", [settings])
        self.process = PipeWorker(command, extra_start_seconds=extra_start_seconds)
        self.failure = ""

    def request(self, request: Any, seconds: float) -> dict[str, Any] | None:
        """Send a request and return the worker's answer.

        If the answer is missing or invalid, set ``failure``, kill the worker and return None.

        Args:
            request: JSON-serializable value. Other objects are converted with ``str``.
            seconds: Time limit for the answer.
        """
        content = json.dumps(request, default=str).encode()
        try:
            (answer,) = self.process.request(content, seconds, max_bytes=_MAX_ANSWER_BYTES)
            if isinstance(result := json.loads(answer), dict):
                return result
            self.failure = "gave an answer that cannot be read"
        except WorkerError as error:
            self.failure = str(error)
        except (ValueError, RecursionError):
            self.failure = "gave an answer that cannot be read"
        self.close()
        return None

    def close(self) -> None:
        """Kill the worker."""
        self.process.close()


def answer_requests(make_handler: Callable[[], RequestHandler]) -> None:
    """Answer requests from standard input until it is closed. Standard output is redirected to standard error.

    Args:
        make_handler: Returns the handler of requests. If it raises UserError, the error is the answer to every request.
    """

    def make_frame_handler() -> Callable[[bytes], list[bytes]]:
        try:
            handler = make_handler()
        except UserError as error:
            error_answer = {"error": error.message, "hint": error.hint}

            def handler(request: Any) -> dict[str, Any]:
                return error_answer

        return lambda request: [json.dumps(handler(json.loads(request)), default=_describe_value).encode()]

    serve(make_frame_handler)


def _describe_value(value: Any) -> dict[str, str]:
    return {"not JSON": repr(value)[:100]}


def as_number(value: Any) -> Any:
    """Return the value as a float, or a truncated ``repr`` if it is not a number."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return repr(value)[:100]


def describe_error(error: Exception) -> str:
    """Return the type and message of an exception raised by user code, truncated and with secrets redacted."""
    return redact(f"{type(error).__name__}: {str(error)[:_MAX_TEXT_LENGTH]}")
