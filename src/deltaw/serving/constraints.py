"""Texts that must match a JSON schema, a regular expression or a grammar.

Each constraint is compiled and followed in a process of its own, which can be ended
(:mod:`deltaw.serving.constraints`). Here are the bounds on all of them together: how many there are,
how many are compiled at once, and when one that nobody uses goes.

It knows neither the model nor how a token is chosen.
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
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from deltaw.errors import UserError
from deltaw.serving.request import BusyError, Constraint, UnsupportedError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions


# The processes in which constraints are compiled and followed: code that runs there, and what is said there.
#
# llguidance counts its work and bounds it, and a hostile grammar or schema has steps that no count sees: they
# take minutes and gigabytes, while compiling or at the thousandth token. So each constraint has a process of
# its own, which the kernel ends when an operation takes too much processor time or memory. A launcher reads
# the tokenizer once, and forks a process for each connection that it is sent; what they have in common is in
# memory once. Its interpreter imports neither torch nor transformers.

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
# It is one line, with at most a space after a comma or colon: small models otherwise break lines anywhere.
_JSON: JsonCompileOptions = {
    "coerce_one_of": True,
    "whitespace_flexible": False,
    "item_separator": r",\x20?",
    "key_separator": r":\x20?",
}
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


def launch(control: int) -> None:
    """The launcher's life: read settings from standard input, say on standard output whether the tokenizer
    can be used, then fork a process for each connection that comes through the socket ``control``."""
    told = json.loads(sys.stdin.buffer.read())
    limits = ProcessLimits(**told["limits"])
    with contextlib.suppress(OSError):  # where memory runs out, these processes go before their server
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    try:
        from llguidance import LLTokenizer

        tokenizer = LLTokenizer(told["tokenizer"], n_vocab=told["vocabulary"], eos_token=told["eos"])
    except BaseException as error:  # a panic of Rust is no Exception
        print(json.dumps({"error": _first_line(str(error)) or type(error).__name__}), flush=True)
        return
    print(json.dumps({"ends": list(tokenizer.eos_tokens)}), flush=True)
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
                    _serve(Connection(received[0]), tokenizer, limits)
                finally:
                    os._exit(0)
            os.close(received[0])


def _serve(connection: Connection, tokenizer: LLTokenizer, limits: ProcessLimits) -> None:
    """The life of a constraint's process: compile what comes first, then follow its texts to their ends."""
    _limit_memory(limits.memory)
    own = _memory()
    with contextlib.suppress(EOFError, OSError):  # nobody asks any more
        kind, value = json.loads(connection.recv_bytes())
        texts = _Texts(tokenizer, limits)

        def answer(text: int, flags: int, rest: bytes) -> None:
            connection.send_bytes(ANSWER.pack(text, flags, max(0, _memory() - own)) + rest)

        answer(0, *texts.compile(kind, value))
        while True:
            for text, token in REQUEST.iter_unpack(connection.recv_bytes()):
                if token == END:
                    texts.following.pop(text, None)
                else:
                    answer(text, *(texts.begin(text) if token == BEGIN else texts.accept(text, token)))


def _limit_memory(most: int) -> None:
    """Let this process take ``most`` bytes more, where the system keeps to that: an allocation beyond it ends
    the process."""
    import resource

    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if sys.platform == "linux":
            pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
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
        self.following: dict[int, _Text] = {}
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
        self.following[number] = _Text(matcher)
        return flags, rest

    def accept(self, number: int, token: int) -> tuple[int, bytes]:
        text, began = self.following[number], time.process_time()
        with self._limited():
            text.matcher.consume_token(token)
            flags, rest = self._state(text.matcher)
        text.seconds += time.process_time() - began
        if text.seconds > self._limits.text_seconds:
            return FAILED, f"its text takes more than {self._limits.text_seconds:g} s of work".encode()
        return flags, rest

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
        fuel: dict[str, Any] = {"initial_lexer_fuel": 300_000, "step_lexer_fuel": 100_000, "max_grammar_size": 100_000}
        limits = LLParserLimits(**fuel, max_lexer_states=self._limits.states, verbose_errors=False)
        return LLMatcher(self._tokenizer, self._grammar, log_level=0, limits=limits)

    def _state(self, matcher: LLMatcher) -> tuple[int, bytes]:
        mask = b"" if matcher.is_error() else matcher.compute_bitmask()  # may pass a limit
        if matcher.is_error():
            # What follows the first line of llguidance's messages is the state of its parser.
            message = _first_line(matcher.get_error())
            unmatched = not message or message.startswith("NoExtension")
            return FAILED, ("no text matches it" if unmatched else message).encode()
        return STOPPED * matcher.is_stopped() | ACCEPTING * matcher.is_accepting(), mask


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
        raise UserError(f"it has too many properties: at most {MOST_PROPERTIES} in one object, fewer in several")
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


# Handles of texts that are followed in other processes, and of those processes. Nobody has to wait for a handle:
# a thread of each process takes its answers. A process ends with its connection, and with this process.

# Seconds for a tokenizer to be read; for an answer on a machine that has much else to do.
_START_SECONDS = 120.0
_ANSWER_SECONDS = 60.0
# Messages that a process is sent before it answers: so few have room in a socket that nobody reads.
_MOST_ASKED = 64
_ENDED = "the process that compiles constraints has ended"
# Run by the interpreter of a launcher, which finds modules where this one does.
_LAUNCH = (
    "import sys; control, *sys.path = sys.argv[1:]; from deltaw.serving.constraints import launch; launch(int(control))"
)


class Launcher:
    """The process that forks the others, seen from here.

    Attributes:
        ends: what llguidance takes for terminators of the tokenizer.

    Raises:
        UnsupportedError: there can be none on this system, or for this tokenizer.
        BusyError: it has ended before it was ready.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, limits: ProcessLimits) -> None:
        if not hasattr(os, "fork"):
            raise UnsupportedError("constrained texts need Linux or macOS")
        if find_spec("llguidance") is None:
            raise UnsupportedError("constrained texts need the package llguidance", hint='pip install "deltaw[serve]"')
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise _unreadable(f"it is a {type(tokenizer).__name__}, not a fast one")
        backend = copy(tokenizer.backend_tokenizer)  # a copy, since batches of rows are padded by it
        backend.no_padding()
        backend.no_truncation()
        settings = {"tokenizer": backend.to_str(), "vocabulary": vocabulary, "eos": tokenizer.eos_token_id}
        self._control, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _LAUNCH, str(theirs.fileno()), *map(str, sys.path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={name: value for name, value in os.environ.items() if not name.startswith("DELTAW_")},
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # it is ended with all that it forked, and not by Ctrl-C
            )
        told = self._told(settings | {"limits": asdict(limits)})
        if "error" in told:
            self.kill()
            raise _unreadable(str(told["error"]))
        self.ends: Sequence[int] = told["ends"]

    @property
    def alive(self) -> bool:
        """Whether it can still fork."""
        return self._process.poll() is None

    def connection(self) -> Connection:
        """A connection to a process of its own.

        Raises:
            BusyError: the launcher has just ended.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                socket.send_fds(self._control, [b"+"], [theirs.fileno()])
            except OSError as error:
                ours.close()
                raise BusyError(_ENDED, hint="ask again later") from error
        return Connection(ours.detach())

    def kill(self) -> None:
        """End it with all processes that it forked."""
        if self.alive:  # so that nobody else has its number
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._control.close()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _told(self, settings: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        patience = threading.Timer(_START_SECONDS, self._process.kill)
        patience.start()
        try:
            with contextlib.suppress(BrokenPipeError), self._process.stdin as stdin:
                stdin.write(json.dumps(settings).encode())
            line = self._process.stdout.readline()
        finally:
            patience.cancel()
        if not line:
            self.kill()
            raise BusyError(_ENDED, hint="ask again later")
        return dict(json.loads(line))


class ConstraintProcess:
    """A constraint's process, seen from here. A thread takes its answers.

    Args:
        changed: called from that thread when the process takes more memory, when it has been silent for a
            while, and when it has ended.

    Attributes:
        compiled: whether texts can begin. memory: bytes that it takes, as far as is known.
        heard: when it last answered.
        gone: why it has ended; None while it has not.
    """

    def __init__(
        self, launcher: Launcher, vocabulary: int, limits: ProcessLimits, changed: Callable[[ConstraintProcess], None]
    ) -> None:
        self.compiled, self.memory = False, 0
        self.gone: str | None = None
        self._connection, self._limits, self._changed = launcher.connection(), limits, changed
        self._vocabulary, self._own_ends = vocabulary, launcher.ends
        self._lock = threading.Lock()
        self.heard = time.monotonic()
        self._numbers = itertools.count(1)
        self._texts: weakref.WeakValueDictionary[int, Matcher] = weakref.WeakValueDictionary()
        self.ended: deque[int] = deque()  # texts that nobody holds any more
        self._unsent: deque[bytes] = deque()
        self._asked = 0  # messages that wait for their answers
        threading.Thread(target=self._listen, name="deltaw-constraint", daemon=True).start()

    @property
    def idle(self) -> bool:
        """Whether it is compiled, and has no text."""
        return self.compiled and not len(self._texts)

    def compile(self, constraint: Constraint) -> str | None:
        """Compile its constraint; why that is not possible, or None."""
        whole = self._matcher(0, ())
        self._send(whole, json.dumps([constraint.kind, constraint.value]).encode())
        failed = whole.failed
        self.compiled = failed is None
        return failed

    def begin(self, ends: Sequence[int]) -> Matcher:
        """A new text; see :meth:`Grammars.compile`."""
        matcher = self._matcher(next(self._numbers), ends)
        self.ask(matcher, BEGIN)
        return matcher

    def ask(self, matcher: Matcher, token: int) -> None:
        """Let a text take a token; the answer comes to the matcher."""
        self._send(matcher, REQUEST.pack(matcher.number, token))

    def end(self, reason: str) -> None:
        """End the process, as soon as it has done what it is doing."""
        with self._lock:
            self.gone = self.gone or reason
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self._connection.fileno())) as connected:
                connected.shutdown(socket.SHUT_RDWR)  # wakes whoever reads, on both sides

    def _matcher(self, number: int, ends: Sequence[int]) -> Matcher:
        matcher = self._texts[number] = Matcher(self, number, self._vocabulary, ends, self._own_ends)
        return matcher

    def _send(self, matcher: Matcher, message: bytes) -> None:
        with self._lock:
            if self.gone is None:
                self._unsent.append(message)
                self._send_some()
                return
        matcher.answer(FAILED, self.gone.encode())

    def _send_some(self) -> None:
        """Send what waits, as far as nobody has to wait for its being read."""
        with contextlib.suppress(OSError):  # then the process has ended; who listens says so
            while self._unsent and self._asked < _MOST_ASKED:
                ended = [REQUEST.pack(self.ended.popleft(), END) for _ in range(len(self.ended))]
                self._connection.send_bytes(b"".join(ended) + self._unsent.popleft())
                self._asked += 1

    def _listen(self) -> None:
        collected = 0.0
        with contextlib.suppress(EOFError, OSError):
            while True:
                if not self._connection.poll(self._limits.idle_seconds):
                    if len(self._texts) and collected != self.heard:
                        # A text that nobody holds may stand in a circle of references, as with an error's frames.
                        collected = self.heard
                        gc.collect()
                    self._changed(self)
                    continue
                answer = self._connection.recv_bytes()
                number, flags, memory = ANSWER.unpack_from(answer)
                self.heard = time.monotonic()
                with self._lock:
                    self._asked -= 1
                    self._send_some()
                matcher = self._texts.get(number)
                if matcher is not None:
                    matcher.answer(flags, answer[ANSWER.size :])
                del matcher  # or its text would not end while nothing comes
                if memory << 10 > self.memory:
                    self.memory = memory << 10
                    self._changed(self)
        limits = self._limits
        self.end(f"it takes more than {limits.seconds:g} s of work at once, or {limits.memory >> 20} MiB of memory")
        for matcher in list(self._texts.values()):
            matcher.answer(FAILED, str(self.gone).encode())
        with self._lock:
            self._connection.close()
        self._changed(self)


class Matcher:
    """Where one text stands in its grammar. It belongs to one request.

    A token's consequences are computed in another process: whatever is asked before it is ``ready`` waits.

    Args:
        process: of its constraint. number: by which that knows the text.
        ends: the request's terminators. own_ends: those that llguidance takes for terminators.

    Attributes:
        late: whether somebody has waited for what comes now, in vain.
    """

    def __init__(
        self, process: ConstraintProcess, number: int, vocabulary: int, ends: Sequence[int], own_ends: Sequence[int]
    ) -> None:
        self.number, self.late = number, False
        self.process = process
        self._ends = _words(vocabulary, ends)
        self._no_ends = ~_words(vocabulary, [*ends, *own_ends])
        self._state = 0, b""  # one value, since it comes from another thread
        self._asked = time.monotonic()
        self._answered = threading.Event()

    def __del__(self) -> None:
        self.process.ended.append(self.number)

    @property
    def ready(self) -> bool:
        """Whether it is known which tokens may come next."""
        return self._answered.is_set()

    @property
    def pending(self) -> float:
        """For how many seconds it has not been ``ready``."""
        return 0.0 if self.ready else time.monotonic() - self._asked

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until it is ``ready``, or for so long; whether it is."""
        self.late = not self._answered.wait(_ANSWER_SECONDS if seconds is None else max(0.0, seconds))
        if self.late and seconds is None:
            self.process.end("its process does not answer")
            self._answered.wait()
        return self.ready

    @property
    def ended(self) -> bool:
        """Whether the text is whole and nothing but a terminator may follow."""
        self.wait()
        return self._state[0] & (STOPPED | FAILED) == STOPPED

    @property
    def failed(self) -> str | None:
        """Why the text cannot go on, where a limit was passed or a token taken that is not allowed; None
        otherwise."""
        self.wait()
        flags, rest = self._state
        return rest.decode() if flags & FAILED else None

    def allowed(self) -> np.ndarray:
        """The tokens that may come next, as int32 words (ceil(vocabulary / 32)), lowest bit first; none where
        it has ``failed``, and terminators alone where it has ``ended``."""
        self.wait()
        flags, rest = self._state
        if flags & FAILED:
            return np.zeros_like(self._ends)
        words: np.ndarray = np.frombuffer(rest, dtype=np.int32)[: len(self._ends)] & self._no_ends
        return words | self._ends if flags & ACCEPTING else words

    def accept(self, token: int) -> None:
        """Take a token of the text, no terminator; it fails where the grammar does not allow it."""
        self.wait()
        if not self._state[0] & FAILED:
            self._asked = time.monotonic()
            self._answered.clear()
            self.process.ask(self, token)

    def answer(self, flags: int, rest: bytes) -> None:
        """What follows from the last token; told by the process."""
        self._state, self.late = (flags, rest), False
        self._answered.set()


def _words(vocabulary: int, tokens: Sequence[int]) -> np.ndarray:
    """Tokens as a mask: int32 words (ceil(vocabulary / 32)), lowest bit first."""
    bits = np.zeros((vocabulary + 31) // 32 * 32, dtype=np.uint8)
    bits[list(tokens)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


def _unreadable(reason: str) -> UnsupportedError:
    what = f"texts cannot be constrained with this model's tokenizer: {reason}"
    return UnsupportedError(what, where="tokenizer", hint="leave the constraint out")


LONGEST_CONSTRAINT = 256 * 1024  # characters
_MOST_REFUSED = 32  # constraints that are known to be unusable
_Key = tuple[int, Constraint]  # a constraint, and whose it is
_NAMES = {"json_schema": "JSON schema", "json_object": "JSON object", "regex": "regular expression"}


@dataclass(frozen=True)
class ConstraintLimits:
    """What all constraints may take together.

    Args:
        each: what one of them may take.
        memory: bytes of all of their processes, besides what these share.
        processes: constraints that are in use at once. compiling: that are compiled at once.
        waiting: requests that may wait for their turn to be compiled.
    """

    each: ProcessLimits = field(default_factory=ProcessLimits)
    memory: int = 1 << 30
    processes: int = 128
    compiling: int = 4
    waiting: int = 16


class Grammars:
    """Compiles constraints for one tokenizer. It may be used from several threads.

    Args:
        vocabulary: how many logits the model gives, at least the tokenizer's number of tokens.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, limits: ConstraintLimits | None = None
    ) -> None:
        self._tokenizer, self._vocabulary = tokenizer, vocabulary
        self._limits = limits or ConstraintLimits()
        self._launcher: Launcher | None = None
        self._unsupported: UnsupportedError | None = None
        self._processes: OrderedDict[_Key, ConstraintProcess] = OrderedDict()
        self._refused: OrderedDict[_Key, tuple[str, float]] = OrderedDict()
        self._changed = threading.Condition()
        self._compiling = self._waiting = 0
        self._closed = False

    def compile(self, constraint: Constraint, ends: Sequence[int], owner: int = 0) -> Matcher:
        """A matcher at the start of a text, once its constraint is compiled.

        Args:
            ends: the request's terminators; they are allowed where the text may end, and only there.
            owner: whose compiled constraints may be used; nobody else can tell by the time that they are.

        Raises:
            UserError: the constraint cannot be read, takes too much, or can match no text.
            UnsupportedError: the package is missing, or cannot read the tokenizer.
            BusyError: too many others are in use, or wait to be compiled.
        """
        if len(constraint.value) > LONGEST_CONSTRAINT:
            what = f"the {_name(constraint)} has {len(constraint.value)} characters"
            raise UserError(what, where=constraint.kind, hint=f"at most {LONGEST_CONSTRAINT}")
        key = owner, constraint
        while isinstance(matcher := self._begun(key, ends), ConstraintProcess):
            self._compile(key, matcher)
        if matcher.failed is not None or not (matcher.allowed().any() or matcher.ended):
            raise _unusable(constraint, matcher.failed or "no text matches it")
        return matcher

    def close(self) -> None:
        """End all processes at once; whoever waits for one is told so."""
        with self._changed:
            self._closed = True
            processes, launcher = list(self._processes.values()), self._launcher
            self._changed.notify_all()
        for process in processes:
            process.end("the engine is shut down")
        if launcher is not None:
            launcher.kill()

    def _begun(self, key: _Key, ends: Sequence[int]) -> Matcher | ConstraintProcess:
        """A text of a constraint's process; or the process, where the caller has to compile it first."""
        with self._changed:
            while True:
                if self._closed:
                    raise UserError("the engine is shut down", hint="start it again")
                process = self._processes.get(key)
                if process is not None and process.compiled:
                    self._processes.move_to_end(key)
                    return process.begin(ends)
                refused = self._refused.get(key)
                if refused is not None and time.monotonic() < refused[1] + self._limits.each.idle_seconds:
                    raise _unusable(key[1], refused[0])
                if process is not None:  # somebody else compiles it
                    self._changed.wait()
                elif self._compiling < self._limits.compiling:
                    process = self._processes[key] = self._started()
                    self._compiling += 1
                    return process
                elif self._waiting < self._limits.waiting:
                    self._waiting += 1
                    self._changed.wait()
                    self._waiting -= 1
                else:
                    raise BusyError("too many constraints wait to be compiled", hint="ask again later")

    def _compile(self, key: _Key, process: ConstraintProcess) -> None:
        """Compile a constraint in its process; where that fails, the reason is known for a while."""
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
                    while len(self._refused) > _MOST_REFUSED:
                        self._refused.popitem(last=False)

    def _started(self) -> ConstraintProcess:
        """A new process, which knows no constraint yet."""
        if self._unsupported is not None:
            raise self._unsupported
        if len(self._processes) >= self._limits.processes:
            idle = next((process for process in self._processes.values() if process.idle), None)
            if idle is None:
                raise BusyError("too many constraints are in use", hint="ask again later")
            self._forget(idle)
        each = self._limits.each
        if self._launcher is None or not self._launcher.alive:
            try:
                self._launcher = Launcher(self._tokenizer, self._vocabulary, each)
            except UnsupportedError as error:
                self._unsupported = error
                raise
        return ConstraintProcess(self._launcher, self._vocabulary, each, self._watch)

    def _watch(self, process: ConstraintProcess) -> None:
        """A process needs more memory, or has been silent for a while, or is gone; told from its thread."""
        with self._changed:
            silent = time.monotonic() - process.heard >= self._limits.each.idle_seconds
            if process.gone is not None or (process.idle and silent):
                self._forget(process)
            # Memory is given back only by processes that end: those without texts first, then the largest.
            while sum(one.memory for one in self._processes.values()) > self._limits.memory:
                self._forget(max(self._processes.values(), key=lambda one: (one.idle, one.memory)))

    def _forget(self, process: ConstraintProcess) -> None:
        for key, known in list(self._processes.items()):
            if known is process:
                del self._processes[key]
        process.end("all constraints together take too much memory")
        self._changed.notify_all()


def _name(constraint: Constraint) -> str:
    return _NAMES.get(constraint.kind, constraint.kind)


def _unusable(constraint: Constraint, reason: str) -> UserError:
    what = f"the {_name(constraint)} cannot be used: {reason}"
    return UserError(what, where=constraint.kind, hint="correct it, or make it simpler")
