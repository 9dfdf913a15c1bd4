"""Texts that must match a JSON schema, a regular expression or a grammar.

Each constraint is compiled and followed in a process of its own, which can be ended
(:mod:`deltaw.serving.constraint_process`). Here are the bounds on all of them together: how many there are,
how many are compiled at once, and when one that nobody uses goes.

It knows neither the model nor how a token is chosen.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from deltaw.errors import UserError
from deltaw.serving.constraint_process import ProcessLimits
from deltaw.serving.matcher import ConstraintProcess, Launcher, Matcher
from deltaw.serving.request import BusyError, Constraint, UnsupportedError

LONGEST_CONSTRAINT = 256 * 1024  # characters
_MOST_REFUSED = 32  # constraints that are known to be unusable
_Key = tuple[int, Constraint]  # a constraint, and whose it is
_NAMES = {
    "json_schema": "JSON schema",
    "json_object": "JSON object",
    "regex": "regular expression",
    "grammar": "grammar",
}


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
            raise UserError(
                f"the {_NAMES[constraint.kind]} has {len(constraint.value)} characters",
                where=constraint.kind,
                hint=f"at most {LONGEST_CONSTRAINT}",
            )
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
        launcher = self._launcher
        return ConstraintProcess(launcher.connection(), self._vocabulary, launcher.ends, each, self._watch)

    def _watch(self, process: ConstraintProcess) -> None:
        """A process needs more memory, or has been silent for a while, or is gone; told from its thread."""
        with self._changed:
            if process.gone is not None or (process.idle and process.silent):
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


def _unusable(constraint: Constraint, reason: str) -> UserError:
    return UserError(
        f"the {_NAMES[constraint.kind]} cannot be used: {reason}",
        where=constraint.kind,
        hint="correct it, or make it simpler",
    )
