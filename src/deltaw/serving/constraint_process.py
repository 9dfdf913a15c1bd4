"""The processes in which constraints are compiled and followed: code that runs there, and what is said there.

llguidance counts its work and bounds it, and a hostile grammar or schema has steps that no count sees: they
take minutes and gigabytes, while compiling or at the thousandth token. So each constraint has a process of
its own, which the kernel ends when an operation takes too much processor time or memory. A launcher reads
the tokenizer once, and forks a process for each connection that it is sent; what they have in common is in
memory once.

This module runs in an interpreter that has imported neither torch nor transformers. It knows llguidance; not
models, requests, or which process is on the other side.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from deltaw.errors import UserError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions

# To a constraint's process: a text, and a token of it; or instead of the token, that the text begins or ends.
REQUEST = struct.Struct("<QI")
BEGIN, END = (1 << 32) - 1, (1 << 32) - 2
# From it: the text (0 for the constraint itself), what holds of it, and the KiB of memory that the process
# has taken. Then the tokens that may come next, as words of int32, lowest bit first; or why it failed.
ANSWER = struct.Struct("<QBI")
STOPPED, ACCEPTING, FAILED = 1, 2, 4

# The work for an object grows with the square of its properties: the sum of the squares, over all objects of
# a schema, is at most that of one with so many.
MOST_PROPERTIES = 1000
_LONGEST_REASON = 300  # characters; a whole regular expression may stand in it
# Of JSON: that exactly one of several schemas matches cannot be followed a token at a time, so that any may.
# White space is short, since small models would otherwise write it without end.
_JSON: JsonCompileOptions = {"coerce_one_of": True, "whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,16}"}
# An operation of so many seconds lowers the priority of its process: those that cost little come first.
_EXPENSIVE = 0.1
_NICER = 10


@dataclass(frozen=True)
class ProcessLimits:
    """What a constraint's process may take.

    Args:
        seconds: of processor time for compiling the constraint, and for each token of a text.
        text_seconds: of processor time for all tokens of a text.
        memory: bytes besides what all processes share; enforced on Linux.
        states: of the constraint's lexer, which its texts share.
        idle_seconds: for which it stays after its last text.
    """

    seconds: float = 1.0
    text_seconds: float = 30.0
    memory: int = 128 << 20
    states: int = 20_000
    idle_seconds: float = 5.0


@dataclass(frozen=True)
class Settings:
    """What a launcher is told.

    Args:
        tokenizer: the JSON of a fast tokenizer. vocabulary: how many logits the model gives.
        eos: its own terminator.
    """

    tokenizer: str
    vocabulary: int
    eos: int | None
    limits: ProcessLimits

    def written(self) -> bytes:
        """As the launcher reads it."""
        return json.dumps(asdict(self)).encode()


def launch(control: int) -> None:
    """The launcher's life: read settings from standard input, say on standard output whether the tokenizer
    can be used, then fork a process for each connection that comes through the socket ``control``."""
    told = json.loads(sys.stdin.buffer.read())
    settings = Settings(**told | {"limits": ProcessLimits(**told["limits"])})
    with contextlib.suppress(OSError):  # where memory runs out, these processes go before their server
        Path("/proc/self/oom_score_adj").write_text("1000")
    try:
        from llguidance import LLTokenizer

        tokenizer = LLTokenizer(settings.tokenizer, n_vocab=settings.vocabulary, eos_token=settings.eos)
    except BaseException as error:  # a panic of Rust is no Exception
        _say({"error": _first_line(str(error)) or type(error).__name__})
        return
    _say({"ends": list(tokenizer.eos_tokens)})
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends a process whose time is up
    gc.collect()
    gc.freeze()  # so that what is shared stays shared
    with socket.socket(fileno=control) as connections:
        while True:
            _, received, _, _ = socket.recv_fds(connections, 1, 1)
            if not received:
                return
            if not os.fork():
                try:
                    connections.close()
                    _serve(Connection(received[0]), tokenizer, settings.limits)
                finally:
                    os._exit(0)
            os.close(received[0])


def _say(told: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(told) + "\n")
    sys.stdout.flush()


def _serve(connection: Connection, tokenizer: LLTokenizer, limits: ProcessLimits) -> None:
    """The life of a constraint's process: compile what comes first, then follow its texts to their ends."""
    _limit_memory(limits.memory)
    own = _memory()
    with contextlib.suppress(EOFError, OSError):  # nobody asks any more
        kind, value = json.loads(connection.recv_bytes())
        texts = _Texts(tokenizer, limits)
        flags, rest = texts.compile(kind, value)
        connection.send_bytes(ANSWER.pack(0, flags, max(0, _memory() - own)) + rest)
        while True:
            for text, token in REQUEST.iter_unpack(connection.recv_bytes()):
                if token == END:
                    texts.end(text)
                    continue
                flags, rest = texts.begin(text) if token == BEGIN else texts.accept(text, token)
                connection.send_bytes(ANSWER.pack(text, flags, max(0, _memory() - own)) + rest)


def _limit_memory(most: int) -> None:
    """Let this process take ``most`` bytes more, where the system keeps to that: an allocation beyond it ends
    the process."""
    import resource

    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if sys.platform == "linux":
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + most
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _memory() -> int:
    """KiB of memory that this process has had at most."""
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most // 1024 if sys.platform == "darwin" else most


@dataclass
class _Text:
    matcher: LLMatcher
    seconds: float = 0.0


class _Texts:
    """The texts of one constraint. Each operation gives flags, and what follows them in an answer."""

    def __init__(self, tokenizer: LLTokenizer, limits: ProcessLimits) -> None:
        self._tokenizer, self._limits = tokenizer, limits
        self._texts: dict[int, _Text] = {}
        self._grammar = ""
        self._compiled: LLMatcher | None = None
        self._nice = False

    def compile(self, kind: str, value: str) -> tuple[int, bytes]:
        with self._limited():
            try:
                self._grammar = grammar_of(kind, value)
            except (UserError, ValueError) as error:
                return FAILED, _first_line(str(error)).encode()
            self._compiled = self._anew()
            return self._state(self._compiled.deep_copy())

    def begin(self, number: int) -> tuple[int, bytes]:
        assert self._compiled is not None
        with self._limited():
            matcher = self._compiled.deep_copy()
            flags, rest = self._state(matcher)
            if flags & FAILED:
                # Copies share what they have learned; where that has passed a limit, it is learned anew.
                self._compiled = self._anew()
                matcher = self._compiled.deep_copy()
                flags, rest = self._state(matcher)
        self._texts[number] = _Text(matcher)
        return flags, rest

    def accept(self, number: int, token: int) -> tuple[int, bytes]:
        text = self._texts[number]
        began = time.process_time()
        with self._limited():
            text.matcher.consume_token(token)
            flags, rest = self._state(text.matcher)
        text.seconds += time.process_time() - began
        if text.seconds > self._limits.text_seconds:
            return FAILED, f"its text takes more than {self._limits.text_seconds:g} s of work".encode()
        return flags, rest

    def end(self, number: int) -> None:
        self._texts.pop(number, None)

    @contextlib.contextmanager
    def _limited(self) -> Iterator[None]:
        """Within, this process ends when it has computed for too long."""
        signal.setitimer(signal.ITIMER_PROF, self._limits.seconds)
        try:
            yield
        finally:
            left, _ = signal.setitimer(signal.ITIMER_PROF, 0)
        if self._limits.seconds - left > _EXPENSIVE and not self._nice:
            self._nice = True
            os.nice(_NICER)

    def _anew(self) -> LLMatcher:
        from llguidance import LLMatcher, LLParserLimits

        # Past these a constraint is refused, or its text ends, with a reason that a person can read; the
        # limits of the process are for what they do not count.
        limits = LLParserLimits(
            initial_lexer_fuel=300_000,
            step_lexer_fuel=100_000,
            max_lexer_states=self._limits.states,
            max_grammar_size=100_000,
            verbose_errors=False,
        )
        return LLMatcher(self._tokenizer, self._grammar, log_level=0, limits=limits)

    def _state(self, matcher: LLMatcher) -> tuple[int, bytes]:
        if matcher.is_error():
            return FAILED, _reason(matcher).encode()
        mask = matcher.compute_bitmask()  # may pass a limit
        if matcher.is_error():
            return FAILED, _reason(matcher).encode()
        flags = STOPPED if matcher.is_stopped() else 0
        return flags | (ACCEPTING if matcher.is_accepting() else 0), mask


def _reason(matcher: LLMatcher) -> str:
    """What is wrong, in a line: what follows in llguidance's messages is the state of its parser."""
    message = _first_line(matcher.get_error())
    return "no text matches it" if not message or message.startswith("NoExtension") else message


def _first_line(message: str) -> str:
    line = (message.splitlines() or [""])[0].strip()
    return line if len(line) <= _LONGEST_REASON else line[: _LONGEST_REASON - 1] + "…"


def grammar_of(kind: str, value: str) -> str:
    """A constraint in llguidance's own form.

    Args:
        kind, value: as in :class:`deltaw.serving.request.Constraint`.

    Raises:
        UserError: it is a JSON schema that cannot be used.
    """
    from llguidance import LLMatcher

    if kind == "regex":
        return LLMatcher.grammar_from_regex(value)
    if kind == "grammar":
        return LLMatcher.grammar_from_lark(value)
    if kind == "json_object":
        return LLMatcher.grammar_from_json_schema('{"type": "object"}', overrides=_JSON)
    try:
        schema = json.loads(value)
        cost = _property_squares(schema)
        text = json.dumps({} if schema is True else schema)
    except ValueError as error:
        raise UserError(f"it is not JSON: {_first_line(str(error))}") from error
    except RecursionError as error:
        raise UserError("it is nested too deeply") from error
    if cost > MOST_PROPERTIES**2:
        raise UserError(
            f"it has too many properties: at most {MOST_PROPERTIES} in one object, fewer in several"
        )
    if not isinstance(schema, dict) and schema is not True:
        raise UserError('it is no object, such as {"type": "object"}')
    return LLMatcher.grammar_from_json_schema(text, overrides=_JSON)


def _property_squares(schema: object) -> int:
    """The squares of the numbers of properties of all objects in a schema, summed."""
    if isinstance(schema, list):
        return sum(map(_property_squares, schema))
    if not isinstance(schema, dict):
        return 0
    return len(schema) ** 2 + sum(map(_property_squares, schema.values()))
