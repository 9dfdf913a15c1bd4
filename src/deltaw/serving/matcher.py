"""Handles of texts that are followed in other processes, and of those processes.

The other side is :mod:`deltaw.serving.constraint_process`. Nobody has to wait for a handle: a thread of each
process takes its answers. A process ends with its connection, and with this process.

It knows tokenizers, sockets and tokens; not which constraints there are, nor how many processes there may be.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from importlib.util import find_spec
from multiprocessing.connection import Connection

import numpy as np
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from deltaw.serving.constraint_process import (
    ACCEPTING,
    ANSWER,
    BEGIN,
    END,
    FAILED,
    REQUEST,
    STOPPED,
    ProcessLimits,
    Settings,
)
from deltaw.serving.request import BusyError, Constraint, UnsupportedError

# Seconds for a tokenizer to be read; for an answer on a machine that has much else to do.
_START_SECONDS = 120.0
_ANSWER_SECONDS = 60.0
# Messages that a process is sent before it answers: so few have room in a socket that nobody reads.
_MOST_ASKED = 64
# Run by the interpreter of a launcher, which finds modules where this one does.
_LAUNCH = (
    "import sys; control, *sys.path = sys.argv[1:]; "
    "from deltaw.serving.constraint_process import launch; launch(int(control))"
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
            raise UnsupportedError(
                "constrained texts need the package llguidance", hint="pip install 'deltaw[serve]'"
            )
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise _unreadable(f"it is a {type(tokenizer).__name__}, not a fast one")
        backend = copy(tokenizer.backend_tokenizer)  # a copy, since batches of rows are padded by it
        backend.no_padding()
        backend.no_truncation()
        settings = Settings(backend.to_str(), vocabulary, tokenizer.eos_token_id, limits)
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
        told = self._told(settings)
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
                raise _ended() from error
        return Connection(ours.detach())

    def kill(self) -> None:
        """End it with all processes that it forked."""
        if self.alive:  # so that nobody else has its number
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._control.close()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _told(self, settings: Settings) -> dict:
        assert self._process.stdin is not None and self._process.stdout is not None
        patience = threading.Timer(_START_SECONDS, self._process.kill)
        patience.start()
        try:
            with contextlib.suppress(BrokenPipeError), self._process.stdin as stdin:
                stdin.write(settings.written())
            line = self._process.stdout.readline()
        finally:
            patience.cancel()
        if not line:
            self.kill()
            raise _ended()
        return dict(json.loads(line))


class ConstraintProcess:
    """A constraint's process, seen from here. A thread takes its answers.

    Args:
        changed: called from that thread when the process takes more memory, when it has been silent for a
            while, and when it has ended.

    Attributes:
        compiled: whether texts can begin. memory: bytes that it takes, as far as is known.
        gone: why it has ended; None while it has not.
    """

    def __init__(
        self,
        connection: Connection,
        vocabulary: int,
        own_ends: Sequence[int],
        limits: ProcessLimits,
        changed: Callable[[ConstraintProcess], None],
    ) -> None:
        self.compiled, self.memory = False, 0
        self.gone: str | None = None
        self._connection, self._limits, self._changed = connection, limits, changed
        self._vocabulary, self._own_ends = vocabulary, own_ends
        self._lock = threading.Lock()
        self._heard = time.monotonic()
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

    @property
    def silent(self) -> bool:
        """Whether it has been quiet for as long as an unused one stays."""
        return time.monotonic() - self._heard >= self._limits.idle_seconds

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
            with contextlib.suppress(OSError), self._socket() as connected:
                connected.shutdown(socket.SHUT_RDWR)  # wakes whoever reads, on both sides

    def _matcher(self, number: int, ends: Sequence[int]) -> Matcher:
        matcher = self._texts[number] = Matcher(self, number, self._vocabulary, ends, self._own_ends)
        return matcher

    def _socket(self) -> socket.socket:
        return socket.fromfd(self._connection.fileno(), socket.AF_UNIX, socket.SOCK_STREAM)

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
        with contextlib.suppress(EOFError, OSError):
            while True:
                if not self._connection.poll(self._limits.idle_seconds):
                    self._changed(self)
                    continue
                answer = self._connection.recv_bytes()
                number, flags, memory = ANSWER.unpack_from(answer)
                self._heard = time.monotonic()
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
        self.end(self._overrun)
        for matcher in list(self._texts.values()):
            matcher.answer(FAILED, str(self.gone).encode())
        with self._lock:
            self._connection.close()
        self._changed(self)

    @property
    def _overrun(self) -> str:
        limits = self._limits
        return (
            f"it takes more than {limits.seconds:g} s of work at once, or {limits.memory >> 20} MiB of memory"
        )


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
        self,
        process: ConstraintProcess,
        number: int,
        vocabulary: int,
        ends: Sequence[int],
        own_ends: Sequence[int],
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


def masks(matchers: Mapping[int, Matcher]) -> dict[int, np.ndarray]:
    """What each row's matcher allows, as :func:`deltaw.serving.sampling.choose` takes it."""
    return {row: matcher.allowed() for row, matcher in matchers.items()}


def _unreadable(reason: str) -> UnsupportedError:
    return UnsupportedError(
        f"texts cannot be constrained with this model's tokenizer: {reason}",
        where="tokenizer",
        hint="leave the constraint out",
    )


def _ended() -> BusyError:
    return BusyError("the process that compiles constraints has ended", hint="ask again later")
