"""Chat template rendering as in transformers, with limits on time, memory and output length.

Chat templates are untrusted programs of a model or an adapter. They run in a worker process
(:mod:`deltaw.data.template_worker`), which is killed if a template exceeds a limit.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np

from deltaw.child_process import minimal_environment, python_command
from deltaw.data.messages import REASONING
from deltaw.data.template_worker import MAX_OUTPUT_CHARS, MAX_OUTPUT_CHARS_PER_BYTE, PYTHON_FAULTS
from deltaw.errors import UserError
from deltaw.worker_process import PipeWorker, WorkerError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS = 5.0
"""Maximum processor time of a rendering."""
TIMEOUT = 30.0
"""Maximum time of a rendering, for systems without a limit on processor time and for busy machines."""
MAX_TEMPLATE_CHARS = 1 << 18
"""Maximum number of characters of a template. Published templates have up to 30,000."""
FAULTS = (jinja2.TemplateError, *PYTHON_FAULTS)
"""Errors that are raised for unsupported conversations, in addition to :class:`TemplateLimitError`."""
# Maximum number of bytes of a character in an answer, and of the rest of an answer.
_BYTES_PER_CHAR = 6
_ANSWER_BYTES = 1 << 16
_CODE = "from deltaw.data.template_worker import main; main()"

STAND_IN = "an-answer-of-the-assistant"
"""Placeholder of an answer."""

# The worker of each process, by process id. A forked process must not use the pipes of its parent.
_workers: dict[int, PipeWorker] = {}


class TemplateLimitError(UserError):
    """A chat template exceeds the limits of a rendering."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"the chat template was stopped: {reason}",
            location="the chat template",
            hint="set data.template: plain, or name another template in data.chat_template",
        )


@dataclass(frozen=True)
class ConversationPrefixes:
    """Prefixes of a conversation to render.

    Attributes:
        messages: Messages of the complete conversation.
        prefixes: For each prefix, the number of messages, and True to append the prefix of the assistant's turn.
        tools: Function definitions.
    """

    messages: Sequence[Mapping[str, object]]
    prefixes: Sequence[tuple[int, bool]]
    tools: Sequence[Mapping[str, object]] = ()


def render_conversation(
    template: str,
    messages: Sequence[Mapping[str, object]],
    *,
    generation: bool,
    tools: Sequence[Mapping[str, object]] = (),
    variables: Mapping[str, object],
) -> str:
    """Render a conversation. Thread-safe.

    Args:
        template: Jinja template, as in transformers.
        generation: Append the prefix of the assistant's turn (``add_generation_prompt``).
        tools: Function definitions.
        variables: Additional variables, for example the special tokens by name.

    Raises:
        TemplateLimitError: if the template exceeds a limit.
        Exception: one of :data:`FAULTS`.
    """
    prefixes = [(len(messages), generation)]
    ((text,),) = render_batch(template, [ConversationPrefixes(messages, prefixes, tools)], variables)
    if isinstance(text, Exception):
        raise text
    return text


def render_batch(
    template: str, conversations: Sequence[ConversationPrefixes], variables: Mapping[str, object]
) -> list[list[str | Exception]]:
    """Render prefixes of several conversations with one request to the worker. Thread-safe.

    Returns:
        For each prefix of each conversation, the text, or the error: one of :data:`FAULTS`.

    Raises:
        TemplateLimitError: if the template exceeds a limit in any rendering.
    """
    if len(template) > MAX_TEMPLATE_CHARS:
        raise TemplateLimitError(f"it has {len(template):,} characters, more than the limit of {MAX_TEMPLATE_CHARS:,}")
    encoded = [_encode(conversation) for conversation in conversations]
    lines = [line for line in encoded if isinstance(line, bytes)]
    counts = [len(conversation.prefixes) for conversation in conversations]
    num_answers = sum(count for line, count in zip(encoded, counts, strict=True) if isinstance(line, bytes))
    texts = iter(_request(template, lines, variables, num_answers))
    return [
        [next(texts) if isinstance(line, bytes) else line for _ in range(count)]
        for line, count in zip(encoded, counts, strict=True)
    ]


def _encode(conversation: ConversationPrefixes) -> bytes | Exception:
    """Return a conversation as a line of JSON, or the error."""
    try:
        values = {
            "messages": [_with_reasoning(message) for message in conversation.messages],
            "tools": list(conversation.tools) or None,
            "prefixes": conversation.prefixes,
        }
        return _to_json(values)
    except FAULTS as error:
        return error


def _to_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, default=_plain).encode("utf-8", "surrogatepass")


def _request(
    template: str, lines: Sequence[bytes], variables: Mapping[str, object], num_answers: int
) -> list[str | Exception]:
    """Return the texts or errors of all prefixes.

    Args:
        lines: Conversations as JSON.
        num_answers: Number of prefixes of all conversations.
    """
    now = datetime.datetime.now().isoformat()
    header = {"count": len(lines), "variables": dict(variables), "now": now, "seconds": SECONDS}
    request = b"\n".join((_to_json(header), *lines, template.encode("utf-8", "surrogatepass")))
    max_bytes = (
        _BYTES_PER_CHAR * (MAX_OUTPUT_CHARS + MAX_OUTPUT_CHARS_PER_BYTE * max(map(len, lines), default=0))
        + _ANSWER_BYTES
    )
    worker = _worker()
    with worker.lock:
        if not worker.is_running:
            worker.close()
        try:
            answers = worker.request(request, TIMEOUT, max_bytes=max_bytes, count=num_answers)
            return [_text(json.loads(answer.decode("utf-8", "surrogatepass"))) for answer in answers]
        except WorkerError as error:
            raise TemplateLimitError(f"it takes more than {SECONDS:g} seconds, or its process exited") from error
        except TemplateLimitError:
            worker.close()  # frees the memory of the template
            raise


def render_with_tokenizer(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, object]], *, generation: bool
) -> str:
    """Render a conversation with the tokenizer's default template, as ``apply_chat_template`` does.

    Raises:
        Exception: see :func:`render_conversation`. ValueError if the tokenizer has several templates and no default.
    """
    template = tokenizer.get_chat_template()
    variables = tokenizer.special_tokens_map
    template = complete_template(template, missing_prefix(template, variables))
    return render_conversation(template, messages, generation=generation, variables=variables)


def missing_prefix(template: str, variables: Mapping[str, object]) -> str:
    """Return the role header of an answer if the template ignores ``add_generation_prompt``, else an empty string.

    Without the header in the prompt, it would be part of the labels and of generated answers.

    Raises:
        TemplateLimitError: if the template exceeds a limit.
    """
    return _missing_prefix(template, _to_json(dict(variables)))


@functools.lru_cache(64)
def _missing_prefix(template: str, variables: bytes) -> str:
    system = {"role": "system", "content": "instructions"}
    user = {"role": "user", "content": "a-question"}
    answer = {"role": "assistant", "content": STAND_IN}
    conversations = [
        ConversationPrefixes(
            [*question, answer], [(len(question), False), (len(question), True), (len(question) + 1, False)]
        )
        for question in ([user], [system, user])  # some templates require a system message, others reject it
    ]
    for without_prefix, prompt, full in render_batch(template, conversations, json.loads(variables)):
        if isinstance(prompt, str) and isinstance(full, str) and prompt == without_prefix and full.startswith(prompt):
            header, stand_in, _ = full[len(prompt) :].partition(STAND_IN)
            header = header.partition("<think>")[0]  # the model generates its thoughts
            return header if stand_in and header.strip() else ""
    return ""


def complete_template(template: str, prefix: str) -> str:
    """Return the template with ``prefix`` as its generation prompt. An empty prefix has no effect."""
    if not prefix:
        return template
    # Jinja ignores a line break at the end of a template, but not before the addition.
    body = template.removesuffix("\n").removesuffix("\r")
    return f"{body}{{% if add_generation_prompt %}}{{{{ {json.dumps(prefix)} }}}}{{% endif %}}"


def _worker() -> PipeWorker:
    """Return the worker of this process."""
    worker = _workers.get(os.getpid())
    if worker is None:
        command = python_command(_CODE, options=["-I"])
        worker = _workers.setdefault(os.getpid(), PipeWorker(command, environment=minimal_environment()))
    return worker


def _text(answer: dict[str, Any]) -> str | Exception:
    """Return the text or the error of an answer."""
    if "limit" in answer:
        raise TemplateLimitError(str(answer["limit"]))
    if "line" in answer:
        error = jinja2.TemplateSyntaxError(str(answer["error"]), int(answer["line"]))
        error.translated = True  # str(error) is the message only
        return error
    return jinja2.TemplateError(str(answer["error"])) if "error" in answer else str(answer["text"])


def _plain(value: Any) -> Any:
    """Convert a value that is not JSON, as transformers does."""
    if isinstance(value, np.generic):
        return value.item()
    return dict(value) if isinstance(value, Mapping) else f"<{type(value).__name__}>"


def _with_reasoning(message: Mapping[str, object]) -> Mapping[str, object]:
    """Return the message with its reasoning under all keys that templates read, if transformers does the same."""
    if not isinstance(message, Mapping):
        raise TypeError(f"a message of a conversation is a dictionary, not {message!r}")
    text = next((message[key] for key in REASONING if message.get(key) is not None), None)
    if text is None or not _fills_reasoning():
        return message
    return {"thinking": text, **message, "reasoning_content": text}


@functools.cache
def _fills_reasoning() -> bool:
    """Return True if this version of transformers sets ``reasoning_content``."""
    from transformers.utils.chat_template_utils import render_jinja_template

    conversation: Any = [[{"role": "assistant", "thinking": "yes"}]]
    result: Any = render_jinja_template(conversation, chat_template="{{ messages[0].reasoning_content }}")
    return str(result[0][0]) == "yes"
