"""Constrained decoding: completions that match a JSON schema, a regular expression or a grammar.

Each constraint is compiled and tracked by llguidance in a separate process, which can be killed. This module contains
the code of these processes, the handles to them, and :class:`Grammars`, which limits their number and memory.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from functools import partial
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from deltaw.child_process import minimal_environment, python_command
from deltaw.decoding.request import BusyError, Constraint, UnsupportedError
from deltaw.errors import UserError
from deltaw.worker_process import PipeWorker, WorkerError, serve

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions


# Message to a constraint process: text number, and a token or START_TEXT or END_TEXT.
REQUEST = struct.Struct("<QI")
START_TEXT = (1 << 32) - 1
END_TEXT = (1 << 32) - 2
# Reply: text number (0 for the constraint itself), flags, and memory of the process in KiB. The payload is the mask of
# allowed tokens as int32 words, lowest bit first, or the reason of a failure.
ANSWER = struct.Struct("<QBI")
STOPPED = 1
ACCEPTING = 2
FAILED = 4

# The cost of an object grows with the square of its number of properties. The sum of squares over all objects of a
# schema is limited to that of one object with this number of properties.
MAX_PROPERTIES = 1000
_MAX_INT64 = 2**63 - 1
_MAX_REASON_LENGTH = 300  # characters; a reason can quote an entire regular expression
# "oneOf" is treated as "anyOf", because it cannot be tracked token by token. JSON is written on one line with at most
# one space after a comma or colon, because small models otherwise insert line breaks anywhere.
_JSON: JsonCompileOptions = {
    "coerce_one_of": True,
    "whitespace_flexible": False,
    "item_separator": r",\x20?",
    "key_separator": r":\x20?",
}
# A process gets a lower priority after an operation of this duration in seconds, so that cheap constraints run first.
_EXPENSIVE_SECONDS = 0.1
_NICE_INCREMENT = 10


@dataclass(frozen=True)
class ProcessLimits:
    """Limits of a constraint process.

    Args:
        seconds: CPU time for compiling the constraint, and for each token.
        text_seconds: CPU time for all tokens of a text.
        memory: Bytes in addition to shared memory. Enforced on Linux.
        states: Maximum number of lexer states. The texts of a constraint share them.
        idle_seconds: Seconds until a process without texts is stopped.
    """

    seconds: float = 1.0
    text_seconds: float = 30.0
    memory: int = 128 << 20
    states: int = 20_000
    idle_seconds: float = 5.0


class _ForkServer:
    """Forks constraint processes in the launcher process.

    Args:
        control: Descriptor of the socket that receives the connection of each process.
    """

    def __init__(self, control: int) -> None:
        self._control = socket.socket(fileno=control)
        self._tokenizer: LLTokenizer | None = None
        self._limits = ProcessLimits()

    def answer(self, request: bytes) -> Iterator[bytes]:
        """Load the tokenizer of the settings in the first request. Fork a process at each further request."""
        if self._tokenizer is None:
            yield json.dumps(self._load(**json.loads(request))).encode()
        else:
            self._fork(self._tokenizer)

    def _load(
        self, tokenizer: str, vocabulary: int, eos: int | None, limits: Mapping[str, Any]
    ) -> Mapping[str, object]:
        """Return the terminators, or the reason why the tokenizer is not usable."""
        self._limits = ProcessLimits(**limits)
        with contextlib.suppress(OSError):  # if memory runs out, the kernel kills these processes before the server
            Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
        try:
            from llguidance import LLTokenizer

            self._tokenizer = LLTokenizer(tokenizer, n_vocab=vocabulary, eos_token=eos)
        except BaseException as error:  # a Rust panic is not an Exception
            return {"error": _first_line(str(error)) or type(error).__name__}
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # reap children automatically
        signal.signal(signal.SIGPROF, signal.SIG_DFL)  # kills a process that has used its CPU time
        gc.collect()
        gc.freeze()  # avoid copy-on-write of shared pages
        return {"terminators": list(self._tokenizer.eos_tokens)}

    def _fork(self, tokenizer: LLTokenizer) -> None:
        _, received, _, _ = socket.recv_fds(self._control, 1, 1)
        if not received:  # the control socket was closed
            return
        if not os.fork():
            try:
                self._control.close()
                os.dup2(received[0], 0)  # so that the process cannot read requests of the launcher
                os.close(received[0])
                _serve(Connection(0), tokenizer, self._limits)
            finally:
                os._exit(0)
        os.close(received[0])


def launch(control: int) -> None:
    """Run the launcher process. See :class:`_ForkServer`."""
    serve(lambda: _ForkServer(control).answer)


def _serve(connection: Connection, tokenizer: LLTokenizer, limits: ProcessLimits) -> None:
    """Run a constraint process: compile the constraint, then track its texts."""
    _limit_memory(limits.memory)
    initial = _memory()
    with contextlib.suppress(EOFError, OSError):  # the connection was closed
        kind, value = json.loads(connection.recv_bytes())
        texts = _Texts(tokenizer, limits)

        def answer(text: int, flags: int, payload: bytes) -> None:
            connection.send_bytes(ANSWER.pack(text, flags, max(0, _memory() - initial)) + payload)

        answer(0, *texts.compile(kind, value))
        while True:
            for text, token in REQUEST.iter_unpack(connection.recv_bytes()):
                if token == END_TEXT:
                    texts.active.pop(text, None)
                else:
                    answer(text, *(texts.start_text(text) if token == START_TEXT else texts.accept(text, token)))


def _limit_memory(max_bytes: int) -> None:
    """Limit this process to ``max_bytes`` additional bytes, if the system supports it. A larger allocation kills the
    process.
    """
    import resource

    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if sys.platform == "linux":
            pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
            limit = pages * resource.getpagesize() + max_bytes
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _memory() -> int:
    """Return the peak memory of this process in KiB."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // 1024 if sys.platform == "darwin" else peak


@dataclass
class _TextConstraint:
    matcher: LLMatcher
    seconds: float = 0.0


class _Texts:
    """Texts of one constraint. Operations return the flags and the payload of a reply."""

    def __init__(self, tokenizer: LLTokenizer, limits: ProcessLimits) -> None:
        self._tokenizer = tokenizer
        self._limits = limits
        self.active: dict[int, _TextConstraint] = {}
        self._grammar = ""
        self._compiled: LLMatcher | None = None
        self._nice = False

    def compile(self, kind: str, value: str) -> tuple[int, bytes]:
        with self._limited():
            try:
                self._grammar = grammar_of(kind, value)
            except (UserError, ValueError) as error:
                return FAILED, _first_line(str(error)).encode()
            self._compiled = self._new_matcher()
            return self._state(self._compiled.deep_copy())

    def start_text(self, number: int) -> tuple[int, bytes]:
        assert self._compiled is not None
        with self._limited():
            matcher = self._compiled.deep_copy()
            flags, payload = self._state(matcher)
            if flags & FAILED:
                # Copies share lexer states. If these exceed a limit, compile the grammar again.
                self._compiled = self._new_matcher()
                matcher = self._compiled.deep_copy()
                flags, payload = self._state(matcher)
        self.active[number] = _TextConstraint(matcher)
        return flags, payload

    def accept(self, number: int, token: int) -> tuple[int, bytes]:
        text = self.active[number]
        start = time.process_time()
        with self._limited():
            text.matcher.consume_token(token)
            flags, payload = self._state(text.matcher)
        text.seconds += time.process_time() - start
        if text.seconds > self._limits.text_seconds:
            return FAILED, f"its text needs more than {self._limits.text_seconds:g} s of CPU time".encode()
        return flags, payload

    @contextlib.contextmanager
    def _limited(self) -> Iterator[None]:
        """Kill this process if the block takes too much CPU time."""
        signal.setitimer(signal.ITIMER_PROF, self._limits.seconds)
        try:
            yield
        finally:
            remaining, _ = signal.setitimer(signal.ITIMER_PROF, 0)
        if self._limits.seconds - remaining > _EXPENSIVE_SECONDS and not self._nice:
            self._nice = True
            os.nice(_NICE_INCREMENT)

    def _new_matcher(self) -> LLMatcher:
        from llguidance import LLMatcher, LLParserLimits

        # Exceeding these limits produces a readable error. The limits of the process cover the rest.
        fuel = partial(LLParserLimits, initial_lexer_fuel=300_000, step_lexer_fuel=100_000, max_grammar_size=100_000)
        limits = fuel(max_lexer_states=self._limits.states, verbose_errors=False)
        return LLMatcher(self._tokenizer, self._grammar, log_level=0, limits=limits)

    def _state(self, matcher: LLMatcher) -> tuple[int, bytes]:
        mask = b"" if matcher.is_error() else matcher.compute_bitmask()  # may exceed a limit
        if matcher.is_error():
            # The first line is the error. The rest is parser state.
            message = _first_line(matcher.get_error()) or "NoExtension"
            return FAILED, ("no text matches it" if message.startswith("NoExtension") else message).encode()
        return STOPPED * matcher.is_stopped() | ACCEPTING * matcher.is_accepting(), mask


def _first_line(message: str) -> str:
    line = (message.splitlines() or [""])[0].strip()
    return line if len(line) <= _MAX_REASON_LENGTH else line[: _MAX_REASON_LENGTH - 1] + "…"


def grammar_of(kind: str, value: str) -> str:
    """Return a constraint as an llguidance grammar.

    Args:
        kind: Kind of the constraint (see :class:`deltaw.decoding.request.Constraint`).
        value: Its value.

    Raises:
        UserError: if a JSON schema is unusable.
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
        _require_exact(json.loads(value, parse_float=Decimal))
        cost = _property_squares(schema)
        text = json.dumps({} if schema is True else schema)
    except (ValueError, ArithmeticError) as error:
        raise UserError(f"it is not JSON: {_first_line(str(error))}") from error
    except RecursionError as error:
        raise UserError("it is nested too deeply") from error
    if cost > MAX_PROPERTIES**2:
        raise UserError(f"it has too many properties: at most {MAX_PROPERTIES} in one object, fewer in several")
    if not isinstance(schema, dict) and schema is not True:
        raise UserError('it is not an object, such as {"type": "object"}')
    return LLMatcher.grammar_from_json_schema(text, overrides=_JSON)


def _require_exact(schema: object, key: str = "", *, is_value: bool = False) -> None:
    """Reject numbers that llguidance replaces by other numbers, because it reads them in double precision.

    Upper limits above the largest int64 are allowed: llguidance lowers them to it.

    Args:
        schema: Part of a schema, with Decimal instead of float.
        key: Key of the part.
        is_value: The part is in a ``const`` or ``enum``, where ``maximum`` is an ordinary key.

    Raises:
        UserError: if a number has too many digits.
    """
    if isinstance(schema, dict):
        for name, value in schema.items():
            _require_exact(value, name, is_value=is_value or name in ("const", "enum"))
    elif isinstance(schema, list):
        for value in schema:
            _require_exact(value, is_value=is_value)
    elif isinstance(schema, int | Decimal):
        number = Decimal(schema)
        is_clamped = key == "maximum" and number >= _MAX_INT64
        is_clamped |= key == "exclusiveMaximum" and number > _MAX_INT64
        # The next integer after an exclusive limit must be exact, too.
        has_exact_neighbors = not key.startswith("exclusive") or abs(number) < 2**53
        is_exact = _is_exact(number) and has_exact_neighbors
        if not (is_clamped and not is_value) and not is_exact:
            limit = "write integers up to 2^53, or up to 15 digits"
            raise UserError(f"the number {str(schema)[:50]} cannot be represented exactly: {limit}")


def _is_exact(number: Decimal) -> bool:
    """True if a number survives a conversion to double precision and back.

    Numbers of 15 digits do, within the powers of ten that double precision contains exactly.
    """
    _, digits, exponent = number.as_tuple()
    assert isinstance(exponent, int), "JSON has no infinity"
    significant = "".join(map(str, digits)).strip("0")
    is_short = len(significant) <= 15 and abs(number.adjusted()) <= 22 and abs(exponent) <= 22
    return is_short or (number == number.to_integral_value() and number.copy_abs() <= 2**53)


def _property_squares(schema: object) -> int:
    """Return the sum of squared numbers of properties over all objects in a schema."""
    if isinstance(schema, list):
        return sum(map(_property_squares, schema))
    if not isinstance(schema, dict):
        return 0
    return len(schema) ** 2 + sum(map(_property_squares, schema.values()))


# Seconds to load a tokenizer, and to reply on a busy machine.
_START_SECONDS = 120.0
_ANSWER_SECONDS = 60.0
# Maximum number of unanswered messages. They fit into the buffer of a socket that is not being read.
_MAX_UNANSWERED = 64
_LAUNCH = "from deltaw.decoding.constraints import launch; launch(int(sys.argv[1]))"


class Launcher:
    """Handle to the launcher process.

    Attributes:
        terminators: Tokens that llguidance treats as terminators of the tokenizer.

    Raises:
        UnsupportedError: if this system or the tokenizer does not support constraints.
        BusyError: if the launcher exits before it is ready.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, limits: ProcessLimits) -> None:
        self.vocabulary = vocabulary
        self.limits = limits
        if not hasattr(os, "fork"):
            raise UnsupportedError("constrained decoding needs Linux or macOS")
        if find_spec("llguidance") is None:
            raise UnsupportedError("constrained decoding needs llguidance", hint='pip install "deltaw[serve]"')
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise _unreadable(f"it is a {type(tokenizer).__name__}, not a fast one")
        backend = copy(tokenizer.backend_tokenizer)  # a copy, because batches of rows use its padding
        backend.no_padding()
        backend.no_truncation()
        settings = {"tokenizer": backend.to_str(), "vocabulary": vocabulary, "eos": tokenizer.eos_token_id}
        settings |= {"limits": asdict(limits)}
        self._control, remote_end = socket.socketpair()
        with remote_end:
            self._worker = PipeWorker(
                python_command(_LAUNCH, [str(remote_end.fileno())], options=["-I"]),
                environment=minimal_environment(),
                extra_start_seconds=_START_SECONDS,
                restart=False,  # the descriptor is closed below
                stderr=subprocess.DEVNULL,
                pass_fds=[remote_end.fileno()],
            )
            try:
                answers = self._worker.request(json.dumps(settings).encode(), _START_SECONDS, max_bytes=1 << 20)
            except WorkerError as error:
                self.kill()
                raise _launcher_exited() from error
        status = json.loads(answers[0])
        if "error" in status:
            self.kill()
            raise _unreadable(str(status["error"]))
        self.terminators: Sequence[int] = status["terminators"]

    @property
    def alive(self) -> bool:
        """True if the launcher can fork. It is not started again."""
        return self._worker.is_running

    def connection(self) -> Connection:
        """Fork a constraint process and return a connection to it.

        Raises:
            BusyError: if the launcher has exited.
        """
        local_end, remote_end = socket.socketpair()
        with remote_end:
            try:
                socket.send_fds(self._control, [b"+"], [remote_end.fileno()])
                self._worker.request(b"", _ANSWER_SECONDS, max_bytes=0, count=0)
            except (OSError, WorkerError) as error:
                local_end.close()
                raise _launcher_exited() from error
        return Connection(local_end.detach())

    def kill(self) -> None:
        """Kill the launcher and all processes that it forked."""
        self._worker.close()
        self._control.close()


def _launcher_exited() -> BusyError:
    return BusyError("the process that compiles constraints has exited", hint="retry later")


class ConstraintProcess:
    """Handle to a constraint process.

    Args:
        launcher: Launcher that forks the process.
        changed: Called on the receiver thread if the process uses more memory, was silent for a while, or has exited.

    Attributes:
        compiled: True if texts can start.
        memory: Bytes that the process uses, as of its last reply.
        last_reply: Time of its last reply.
        exit_reason: Reason of its exit, or None while it is running.
        deleted_texts: Numbers of texts whose matchers were deleted.
    """

    def __init__(self, launcher: Launcher, changed: Callable[[ConstraintProcess], None]) -> None:
        self.compiled = False
        self.memory = 0
        self.exit_reason: str | None = None
        self.launcher = launcher
        self._connection = launcher.connection()
        self._changed = changed
        self._lock = threading.Lock()
        self.last_reply = time.monotonic()
        self._numbers = itertools.count(1)
        self._texts: weakref.WeakValueDictionary[int, Matcher] = weakref.WeakValueDictionary()
        self.deleted_texts: deque[int] = deque()
        self._unsent: deque[bytes] = deque()
        self._unanswered = 0  # number of unanswered messages
        threading.Thread(target=self._receive, name="deltaw-constraint", daemon=True).start()

    @property
    def idle(self) -> bool:
        """True if the constraint is compiled and no text uses it."""
        return self.compiled and not len(self._texts)

    def compile(self, constraint: Constraint) -> str | None:
        """Compile the constraint. Return the error, or None."""
        matcher = self._matcher(0, ())
        self._send(matcher, json.dumps([constraint.kind, constraint.value]).encode())
        failed = matcher.failed
        self.compiled = failed is None
        return failed

    def start_text(self, terminators: Sequence[int]) -> Matcher:
        """Start a text. See :meth:`Grammars.compile`."""
        matcher = self._matcher(next(self._numbers), terminators)
        self.advance(matcher, START_TEXT)
        return matcher

    def advance(self, matcher: Matcher, token: int) -> None:
        """Send a token of a text. The matcher receives the reply."""
        self._send(matcher, REQUEST.pack(matcher.number, token))

    def end(self, reason: str) -> None:
        """Stop the process after its current operation."""
        with self._lock:
            self.exit_reason = self.exit_reason or reason
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self._connection.fileno())) as connected:
                connected.shutdown(socket.SHUT_RDWR)  # wakes the readers on both sides

    def _matcher(self, number: int, terminators: Sequence[int]) -> Matcher:
        matcher = self._texts[number] = Matcher(self, number, terminators)
        return matcher

    def _send(self, matcher: Matcher, message: bytes) -> None:
        with self._lock:
            if self.exit_reason is None:
                self._unsent.append(message)
                self._send_queued()
                return
        matcher.answer(FAILED, self.exit_reason.encode())

    def _send_queued(self) -> None:
        """Send queued messages, as far as the socket does not block."""
        with contextlib.suppress(OSError):  # the process has exited, which the receiver thread reports
            while self._unsent and self._unanswered < _MAX_UNANSWERED:
                endings = [REQUEST.pack(self.deleted_texts.popleft(), END_TEXT) for _ in range(len(self.deleted_texts))]
                self._connection.send_bytes(b"".join(endings) + self._unsent.popleft())
                self._unanswered += 1

    def _receive(self) -> None:
        collected = 0.0
        with contextlib.suppress(EOFError, OSError):
            while True:
                if not self._connection.poll(self.launcher.limits.idle_seconds):
                    if len(self._texts) and collected != self.last_reply:
                        # An unused text can be part of a reference cycle, for example through the frames of an error.
                        collected = self.last_reply
                        gc.collect()
                    self._changed(self)
                    continue
                answer = self._connection.recv_bytes()
                number, flags, memory = ANSWER.unpack_from(answer)
                self.last_reply = time.monotonic()
                with self._lock:
                    self._unanswered -= 1
                    self._send_queued()
                matcher = self._texts.get(number)
                if matcher is not None:
                    matcher.answer(flags, answer[ANSWER.size :])
                del matcher  # a reference here would keep the text alive until the next reply
                if memory << 10 > self.memory:
                    self.memory = memory << 10
                    self._changed(self)
        limits = self.launcher.limits
        self.end(f"it needs more than {limits.seconds:g} s of CPU time at once, or {limits.memory >> 20} MiB of memory")
        for matcher in list(self._texts.values()):
            matcher.answer(FAILED, str(self.exit_reason).encode())
        with self._lock:
            self._connection.close()
        self._changed(self)


class Matcher:
    """Position of one text in its grammar. Used by a single request.

    The allowed tokens are computed in another process. Methods block until the matcher is ``ready``.

    Args:
        process: Process of the constraint.
        number: Number of the text within the process.
        terminators: Terminators of the request.

    Attributes:
        late: True if a :meth:`wait` for the current state timed out.
    """

    def __init__(self, process: ConstraintProcess, number: int, terminators: Sequence[int]) -> None:
        self.process = process
        self.number = number
        self.late = False
        vocabulary = process.launcher.vocabulary
        native_terminators = process.launcher.terminators
        self._terminator_mask = _words(vocabulary, terminators)
        self._non_terminator_mask = ~_words(vocabulary, [*terminators, *native_terminators])
        self._state = 0, b""  # a single tuple, because another thread assigns it
        self._unanswered = time.monotonic()
        self._answered = threading.Event()

    def __del__(self) -> None:
        self.process.deleted_texts.append(self.number)

    @property
    def ready(self) -> bool:
        """True if the allowed next tokens are known."""
        return self._answered.is_set()

    @property
    def pending(self) -> float:
        """Seconds since the matcher was last ``ready``, or 0."""
        return 0.0 if self.ready else time.monotonic() - self._unanswered

    def wait(self, seconds: float | None = None) -> bool:
        """Wait up to ``seconds`` until the matcher is ``ready``. Return True if it is."""
        self.late = not self._answered.wait(_ANSWER_SECONDS if seconds is None else max(0.0, seconds))
        if self.late and seconds is None:
            self.process.end("its process does not answer")
            self._answered.wait()
        return self.ready

    @property
    def is_complete(self) -> bool:
        """True if the text is complete and only a terminator may follow."""
        self.wait()
        return self._state[0] & (STOPPED | FAILED) == STOPPED

    @property
    def failed(self) -> str | None:
        """Reason if a limit was exceeded or a token was not allowed, otherwise None."""
        self.wait()
        flags, payload = self._state
        return payload.decode() if flags & FAILED else None

    def allowed(self) -> np.ndarray:
        """Return the allowed next tokens as int32 words (ceil(vocabulary / 32),), lowest bit first.

        The mask is empty if the matcher has ``failed``, and contains only terminators if the text has ``is_complete``.
        """
        self.wait()
        flags, payload = self._state
        if flags & FAILED:
            return np.zeros_like(self._terminator_mask)
        words: np.ndarray = np.frombuffer(payload, np.int32)[: len(self._terminator_mask)] & self._non_terminator_mask
        return words | self._terminator_mask if flags & ACCEPTING else words

    def accept(self, token: int) -> None:
        """Advance by a token of the text, which is not a terminator. The matcher fails if the grammar does not allow
        it.
        """
        self.wait()
        if not self._state[0] & FAILED:
            self._unanswered = time.monotonic()
            self._answered.clear()
            self.process.advance(self, token)

    def answer(self, flags: int, payload: bytes) -> None:
        """Store a reply. Called by the receiver thread of the process."""
        self._state = (flags, payload)
        self.late = False
        self._answered.set()


def _words(vocabulary: int, tokens: Sequence[int]) -> np.ndarray:
    """Return a mask of tokens as int32 words (ceil(vocabulary / 32),), lowest bit first."""
    bits = np.zeros((vocabulary + 31) // 32 * 32, dtype=np.uint8)
    bits[list(tokens)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


def _unreadable(reason: str) -> UnsupportedError:
    message = f"constrained decoding does not support this model's tokenizer: {reason}"
    return UnsupportedError(message, location="tokenizer", hint="remove the constraint")


MAX_CONSTRAINT_LENGTH = 256 * 1024  # characters
_MAX_REFUSED = 32  # number of unusable constraints to remember
_Key = tuple[int, Constraint]  # owner and constraint
_NAMES = {"json_schema": "JSON schema", "json_object": "JSON object", "regex": "regular expression"}


@dataclass(frozen=True)
class ConstraintLimits:
    """Limits of all constraints of an engine together.

    Args:
        each: Limits of one constraint.
        memory: Total bytes of all processes, in addition to shared memory.
        processes: Maximum number of constraints in use.
        compiling: Maximum number of constraints that are compiled concurrently.
        waiting: Maximum number of requests that wait for compilation.
    """

    each: ProcessLimits = field(default_factory=ProcessLimits)
    memory: int = 1 << 30
    processes: int = 128
    compiling: int = 4
    waiting: int = 16


class Grammars:
    """Compiles constraints for one tokenizer. All methods are thread-safe.

    Args:
        tokenizer: The tokenizer.
        vocabulary: Number of logits, at least the number of tokens.
        limits: Limits of all constraints.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab: int, limits: ConstraintLimits | None = None) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocab
        self._limits = limits or ConstraintLimits()
        self._launcher: Launcher | None = None
        self._unsupported: UnsupportedError | None = None
        self._processes: OrderedDict[_Key, ConstraintProcess] = OrderedDict()
        self._refused: OrderedDict[_Key, tuple[str, float]] = OrderedDict()
        self._changed = threading.Condition()
        self._compiling = self._waiting = 0
        self._closed = False

    def compile(self, constraint: Constraint, terminators: Sequence[int], owner: int = 0) -> Matcher:
        """Compile a constraint, if necessary, and return a matcher at the start of a text.

        Args:
            constraint: The constraint.
            terminators: Terminators of the request. They are allowed only if the text may end.
            owner: Owner of the request. Compiled constraints are not shared between owners, because timing would reveal
                them.

        Raises:
            UserError: if the constraint is malformed, exceeds a limit, or matches no text.
            UnsupportedError: if llguidance is not installed or does not support the tokenizer.
            BusyError: if too many constraints are in use or waiting for compilation.
        """
        if len(constraint.value) > MAX_CONSTRAINT_LENGTH:
            message = f"the {_name(constraint)} has {len(constraint.value)} characters"
            raise UserError(message, location=constraint.kind, hint=f"at most {MAX_CONSTRAINT_LENGTH}")
        key = owner, constraint
        while isinstance(matcher := self._start_text(key, terminators), ConstraintProcess):
            self._compile(key, matcher)
        if matcher.failed is not None or not (matcher.allowed().any() or matcher.is_complete):
            raise _unusable(constraint, matcher.failed or "no text matches it")
        return matcher

    def close(self) -> None:
        """Kill all processes. Waiting requests fail."""
        with self._changed:
            self._closed = True
            processes = list(self._processes.values())
            launcher = self._launcher
            self._changed.notify_all()
        for process in processes:
            process.end("the engine is shut down")
        if launcher is not None:
            launcher.kill()

    def _start_text(self, key: _Key, terminators: Sequence[int]) -> Matcher | ConstraintProcess:
        """Start a text, or return a new process whose constraint the caller must compile first."""
        with self._changed:
            while True:
                if self._closed:
                    raise UserError("the engine is shut down", hint="start it again")
                process = self._processes.get(key)
                if process is not None and process.compiled:
                    self._processes.move_to_end(key)
                    return process.start_text(terminators)
                refused = self._refused.get(key)
                if refused is not None and time.monotonic() < refused[1] + self._limits.each.idle_seconds:
                    raise _unusable(key[1], refused[0])
                if process is not None:  # another thread compiles it
                    self._changed.wait()
                elif self._compiling < self._limits.compiling:
                    process = self._processes[key] = self._start_process()
                    self._compiling += 1
                    return process
                elif self._waiting < self._limits.waiting:
                    self._waiting += 1
                    self._changed.wait()
                    self._waiting -= 1
                else:
                    raise BusyError("too many constraints are waiting to be compiled", hint="retry later")

    def _compile(self, key: _Key, process: ConstraintProcess) -> None:
        """Compile a constraint in its process. A failure is remembered for a while."""
        reason: str | None = "it was interrupted"
        try:
            reason = process.compile(key[1])
        finally:
            with self._changed:
                self._compiling -= 1
                self._changed.notify_all()
                if reason is not None:
                    self._forget(process)
                    self._refused[key] = reason, time.monotonic()
                    while len(self._refused) > _MAX_REFUSED:
                        self._refused.popitem(last=False)

    def _start_process(self) -> ConstraintProcess:
        """Start a process without a constraint."""
        if self._unsupported is not None:
            raise self._unsupported
        if len(self._processes) >= self._limits.processes:
            idle = next((process for process in self._processes.values() if process.idle), None)
            if idle is None:
                raise BusyError("too many constraints are in use", hint="retry later")
            self._forget(idle)
        if self._launcher is None or not self._launcher.alive:
            try:
                self._launcher = Launcher(self._tokenizer, self._vocabulary, self._limits.each)
            except UnsupportedError as error:
                self._unsupported = error
                raise
        return ConstraintProcess(self._launcher, self._on_change)

    def _on_change(self, process: ConstraintProcess) -> None:
        """Stop processes that have exited, are idle or exceed the total memory. Called on the receiver threads."""
        with self._changed:
            silent = time.monotonic() - process.last_reply >= self._limits.each.idle_seconds
            if process.exit_reason is not None or (process.idle and silent):
                self._forget(process)
            # Only stopping a process frees memory. Stop idle ones first, then the largest.
            while sum(candidate.memory for candidate in self._processes.values()) > self._limits.memory:
                self._forget(max(self._processes.values(), key=lambda candidate: (candidate.idle, candidate.memory)))

    def _forget(self, process: ConstraintProcess) -> None:
        for key, candidate in list(self._processes.items()):
            if candidate is process:
                del self._processes[key]
        process.end("all constraints together take too much memory")
        self._changed.notify_all()


def _name(constraint: Constraint) -> str:
    return _NAMES.get(constraint.kind, constraint.kind)


def _unusable(constraint: Constraint, reason: str) -> UserError:
    message = f"the {_name(constraint)} cannot be used: {reason}"
    return UserError(message, location=constraint.kind, hint="correct or simplify it")
