"""Worker process that renders chat templates, which are untrusted programs.

It has limits on processor time, memory and output length, and gets neither files nor secrets. A request is a line of
JSON followed by the template; see :func:`answer`. Only Jinja and small modules are imported, for a fast start.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import gc
import json
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from deltaw.data.template_functions import (
    Attributes,
    Dictionary,
    GenerationTag,
    format_date,
    raise_template_error,
    to_json,
)
from deltaw.worker_process import serve

MEMORY_BYTES = 1 << 30
"""Maximum address space of the worker process, if the platform has such a limit."""
MAX_OUTPUT_CHARS = 1 << 20
MAX_OUTPUT_CHARS_PER_BYTE = 8
"""Maximum number of output characters: a constant, plus an amount per byte of the request."""
_MAX_ERROR_CHARS = 2000
PYTHON_FAULTS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError, MemoryError)


class OutputLimitError(Exception):
    """The output of a template is too long."""


@functools.lru_cache(maxsize=64)
def _compiled(text: str) -> jinja2.Template | jinja2.TemplateSyntaxError:
    """Return the compiled template, or the error."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": raise_template_error, "dict": Dictionary(), "namespace": Attributes}
    try:
        return environment.from_string(text)
    except jinja2.TemplateSyntaxError as error:
        return error
    except (*PYTHON_FAULTS, SyntaxError) as error:  # from compiling the generated Python code
        return jinja2.TemplateSyntaxError(f"it cannot be compiled ({type(error).__name__}: {error})", 1)


def _render(text: str, context: dict[str, Any], limit: int) -> str:
    template = _compiled(text)
    if isinstance(template, Exception):
        raise template.with_traceback(None)  # a cached error would otherwise accumulate tracebacks
    pieces: list[str] = []
    for piece in template.generate(context):
        limit -= len(piece)
        if limit < 0:
            raise OutputLimitError
        pieces.append(piece)
    rendered = "".join(pieces)
    rendered.encode("utf-8")  # raises for lone surrogates, which tokenizers do not accept
    return rendered


def _result(text: str, context: dict[str, Any], limit: int) -> dict[str, Any]:
    try:
        return {"text": _render(text, context, limit)}
    except OutputLimitError:
        return {"limit": "its output exceeds the limit for a conversation of this length"}
    except MemoryError:
        return {"limit": f"it needs more than {MEMORY_BYTES >> 20} MiB of memory"}
    except jinja2.TemplateSyntaxError as error:
        return {"error": str(error.message)[:_MAX_ERROR_CHARS], "line": error.lineno}
    except Exception as error:
        try:
            return {"error": str(error)[:_MAX_ERROR_CHARS]}
        except Exception:  # the template passed an object whose text cannot be computed
            return {"error": type(error).__name__}


def answer(request: bytes) -> Iterator[bytes]:
    """Yield the renderings of a request as JSON: the text, an exceeded limit, or an error.

    The first line of the request is JSON with the number of conversations, variables, the time, and the limit of
    processor time for each rendering. Each conversation is another line, with the prefixes of it to render: their
    number of messages, and whether to add the prefix of an answer. The rest is the template.
    """
    line, _, rest = request.partition(b"\n")
    values = json.loads(line.decode("utf-8", "surrogatepass"))
    *conversations, template = rest.split(b"\n", values["count"])
    text = template.decode("utf-8", "surrogatepass")
    now = datetime.datetime.fromisoformat(values["now"])

    def strftime_now(format: str) -> str:
        return format_date(now, format)

    context = {"strftime_now": strftime_now, **values["variables"], "documents": None}
    gc.collect()  # a template can leave large values in reference cycles
    for encoded in conversations:
        conversation = json.loads(encoded.decode("utf-8", "surrogatepass"))
        limit = MAX_OUTPUT_CHARS + MAX_OUTPUT_CHARS_PER_BYTE * len(encoded)
        for count, generation in conversation["prefixes"]:
            context |= {"tools": conversation["tools"], "messages": conversation["messages"][:count]}
            context["add_generation_prompt"] = generation
            _set_timer(values["seconds"])
            result = _result(text, context, limit)
            _set_timer(0.0)
            yield json.dumps(result, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _set_timer(seconds: float) -> None:
    """Let the system kill this process after this CPU time, which a template cannot prevent; 0 disables the timer.

    Windows has no such timer.
    """
    if sys.platform != "win32":
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _make_handler() -> Callable[[bytes], Iterator[bytes]]:
    if sys.platform != "win32":
        import resource

        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        for kind, limit in ((resource.RLIMIT_AS, MEMORY_BYTES), (resource.RLIMIT_CORE, 0)):
            with contextlib.suppress(ValueError, OSError):  # macOS has no limit on memory
                resource.setrlimit(kind, (limit, limit))
    return answer


def main() -> None:
    """Answer requests until standard input is closed."""
    serve(_make_handler)
