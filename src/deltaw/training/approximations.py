"""What a run computes approximately: verified on the model and the rows at hand, before it is used and later.

Some products of a training in bf16 are several times as fast in int8, and a language model's head as fast
again where unlikely classes are summed over rows. How much that moves a gradient depends on the model: one
with a few columns of large numbers loses most of it. So the gradient of what is trained is computed on a few
of the run's rows in fp32, in bf16, and with the approximations, and these are used only where they add little
to what bf16 itself rounds. Along the run the same is looked at again.

Knows sessions and gradients; not how anything is approximated (``kernels/arithmetic.py`` names it).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import operator
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.kernels import loader
from deltaw.kernels.arithmetic import APPROXIMATIONS
from deltaw.machine.choices import Choice
from deltaw.machine.memory import trim_memory
from deltaw.runtime.recognition import blocks_of
from deltaw.runtime.widened import widened
from deltaw.training.microbatches import AnyBatcher, AnyObjective
from deltaw.training.parallel.reducer import ALONE, Reducer
from deltaw.working import Advance

# How each is called for a person.
NAMES = {
    "int8_gradients": "gradients of frozen layers in int8",
    "int8_logits": "unlikely logits in int8",
    "summed_classes": "unlikely classes of the head's gradient summed over rows",
}
# A gradient is off from that in fp32 by some share of its length. What is approximate may add half of what
# bf16 is off by and this much. A single block may add twice as much: blocks err independently of each other,
# and a step follows all of them together.
ADDED, ADDED_IN_BLOCK = 0.01, 0.02
# Unless it adds less than half of that, the gradient with it and without it must also point the same way.
COSINE, COSINE_IN_BLOCK = 0.999, 0.996
# To be taken, it must stay below this share of what is allowed, so that noise does not decide.
MARGIN = 0.9
# Blocks with less of the gradient than this count in the whole alone.
SMALL_BLOCK = 1e-3
# Rows that are looked at hold so many computed tokens and labels at least, where there are as many, and the
# most tokens that a row of them may have.
TOKENS, LABELS, LONGEST_ROW = 128, 16, 512
# Rows that they are taken from, in the order of the training.
CANDIDATES = 64
# Looking again takes at most this share of a run's time, counted in tokens. A gradient is computed twice for
# it; each counts twice, since few tokens take longer for each.
SHARE, COST = 0.005, 4.0
# Numbers of the gradient that are compared, about.
COMPARED = 1 << 22


@dataclass(frozen=True)
class Errors:
    """How far a gradient is from one in fp32, and from the one without approximations.

    Attributes:
        own: of the gradient without approximations, the length of its difference from fp32's, by fp32's.
        error: the same with them. cosine: of the gradients with and without them.
    """

    own: float
    error: float
    cosine: float

    def within(self, margin: float, *, of_block: bool) -> bool:
        """Whether what is approximate may be used."""
        added = self.error - self.own
        if not math.isfinite(added):
            return False
        if added <= margin * self.own / 2:
            return True
        most, cosine = (ADDED_IN_BLOCK, COSINE_IN_BLOCK) if of_block else (ADDED, COSINE)
        return added <= margin * (self.own / 2 + most) and 1 - self.cosine <= margin * (1 - cosine)


@dataclass(frozen=True)
class Measured:
    """One look at approximations.

    Attributes:
        names: of those that were on. whole: of the whole gradient. blocks: by block.
        tokens: of the rows. seconds: that it took; 0 where an earlier run did it.
    """

    names: tuple[str, ...]
    whole: Errors
    blocks: Mapping[str, Errors] = field(default_factory=dict)
    tokens: int = 0
    seconds: float = 0.0

    @classmethod
    def of_dict(cls, plain: Mapping[str, Any]) -> Measured:
        """What ``asdict`` gave, perhaps read from JSON."""
        blocks = {name: Errors(**errors) for name, errors in plain["blocks"].items()}
        changed = {"names": tuple(plain["names"]), "whole": Errors(**plain["whole"]), "blocks": blocks}
        return cls(**{**plain, **changed})

    def failing(self, margin: float = 1.0) -> str | None:
        """What is off by too much, in words; None where nothing is."""
        for name, errors in {"": self.whole, **self.blocks}.items():
            if not errors.within(margin, of_block=bool(name)):
                of = f" of {name}" if name else ""
                return f"the gradient{of} is off from fp32 by {errors.error:.1%} and not {errors.own:.1%}"
        return None

    def __str__(self) -> str:
        when = f"looked at in {self.seconds:.1f} s" if self.seconds else "by an earlier run"
        off = f"gradient off from fp32 by {self.whole.error:.1%}, bf16 by {self.whole.own:.1%}"
        return f"{off}: {self.tokens} tokens, {when}"


@dataclass(frozen=True)
class Chosen:
    """Which approximations may be used.

    Attributes:
        names: of those. measured: what they add together; None where there are none.
        refused: why not the others, by name.
    """

    names: tuple[str, ...]
    measured: Measured | None
    refused: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of_earlier_run(cls, plain: Mapping[str, Any]) -> Chosen:
        """What another run found in the same case, as ``asdict`` gave it."""
        measured = plain["measured"] and replace(Measured.of_dict(plain["measured"]), seconds=0.0)
        return cls(tuple(plain["names"]), measured, plain["refused"])


# Gradients that a comparison computes: exact ones, those of the base precision, and approximate ones.
_PASSES = 3


@dataclass
class GradientCheck:
    """Computes the gradient of a few of a training's rows in several ways, and compares them.

    Args:
        model, objective, batcher: as in the training. named: what is trained, by name.
        rows: those that are looked at.
        advance: Receives the share of the comparison that is done.
    """

    model: nn.Module
    objective: AnyObjective
    batcher: AnyBatcher
    named: Mapping[str, nn.Parameter]
    rows: Sequence[Any]
    advance: Advance = lambda done: None

    def __post_init__(self) -> None:
        self._passes, self._batches = 0.0, max(1, sum(1 for _ in self.batcher.batches(self.rows)))
        self.tokens = tokens_of(self.batcher, self.rows)
        numbers = sum(parameter.numel() for parameter in self.named.values())
        # An odd distance goes through all columns of a matrix.
        self._distance = 1 if numbers <= COMPARED else -(-numbers // COMPARED) | 1

    def choose(self, offered: Sequence[str]) -> Chosen:
        """Which of those offered add so little that they may be used; all together if they can be."""
        begun = time.perf_counter()
        exact = dict(self.gradients((), wide=True)), dict(self.gradients(()))

        def measured(names: Sequence[str]) -> Measured:
            whole, blocks = self._errors(names, *exact)
            return Measured(tuple(names), whole, blocks, self.tokens, time.perf_counter() - begun)

        found = measured(offered)
        if found.failing(MARGIN) is None:
            return Chosen(tuple(offered), found)
        chosen, refused = Chosen((), None), {}
        for name in sorted(offered, key=APPROXIMATIONS.index, reverse=True):  # what errs most comes last
            found = measured([*chosen.names, name])
            if failing := found.failing(MARGIN):
                refused[name] = failing
            else:
                chosen = Chosen(found.names, found)
        return replace(chosen, refused=refused)

    def moved(self, names: Sequence[str]) -> tuple[Errors, dict[str, Errors]]:
        """The errors of approximations relative to the gradient without them, which counts as fp32's: of the
        whole gradient and by block."""
        exact = dict(self.gradients(()))
        return self._errors(names, exact, exact)

    def gradients(self, approximations: Sequence[str], *, wide: bool = False) -> Iterator[tuple[str, Tensor]]:
        """The gradient of each parameter by its name, or some of its numbers."""
        head = getattr(self.model, "get_output_embeddings", lambda: None)()
        apart = [head] if head is not None and not any(p.requires_grad for p in head.parameters()) else []
        exact = widened(self.model, apart=apart) if wide else contextlib.nullcontext()
        trim_memory()  # blocks in fp32 and bf16 leave holes of different sizes, which would add up over the passes
        with torch.random.fork_rng(devices=[]), _with(approximations), _as_with_many_labels(self.objective), exact:
            if (begin := getattr(self.objective, "begin", None)) is not None:
                begin(self.rows, self.batcher, ALONE)
            for batch in self.batcher.batches(self.rows):
                self.objective(batch).backward()
                self._passes += 1 / self._batches
                self.advance(min(self._passes / _PASSES, 0.99))
        for name, parameter in self.named.items():
            gradient, parameter.grad = parameter.grad, None
            if gradient is not None:
                yield name, gradient.flatten()[:: self._distance].float()

    def _errors(
        self, names: Sequence[str], reference: Mapping[str, Tensor], exact: Mapping[str, Tensor]
    ) -> tuple[Errors, dict[str, Errors]]:
        sums: dict[str, Tensor] = {}
        for name, approximate in self.gradients(names):
            found = _products(reference[name].double(), exact[name].double(), approximate.double())
            block = block_of(name)
            sums[block] = sums[block] + found if block in sums else found
        whole = torch.stack(list(sums.values())).sum(0)
        large = {block: of for block, of in sums.items() if of[0] > SMALL_BLOCK**2 * whole[0]}
        return _errors_of(whole), {block: _errors_of(of) for block, of in large.items()}


@contextlib.contextmanager
def _with(approximations: Sequence[str]) -> Iterator[None]:
    """While open, the process computes with these approximations and no others."""
    with loader.computing():
        loader.compute_with(loader.arithmetic().approximating(approximations))
        yield


def block_of(name: str) -> str:
    """The block that a parameter belongs to: its name as far as the first number in it."""
    found = re.match(r"(?:.*?\.)?\d+(?=\.|$)", name)
    return found.group() if found else name


def _products(reference: Tensor, exact: Tensor, approximate: Tensor) -> Tensor:
    """(6) what errors follow from; those of several parameters are added."""
    off = [(found - reference).square().sum() for found in (exact, approximate)]
    lengths = exact @ exact, approximate @ approximate
    return torch.stack([reference @ reference, *off, *lengths, exact @ approximate])


def _errors_of(sums: Tensor) -> Errors:
    reference, exact, approximate, ee, aa, ea = sums.tolist()
    if not reference > 0:
        return Errors(0.0, 0.0 if approximate == 0 else math.inf, 1.0)
    cosine = ea / math.sqrt(ee * aa) if ee * aa > 0 else math.nan
    return Errors(math.sqrt(exact / reference), math.sqrt(approximate / reference), cosine)


@contextlib.contextmanager
def _as_with_many_labels(objective: AnyObjective) -> Iterator[None]:
    """While open, an objective computes the few labels that are looked at as it computes many."""
    with contextlib.ExitStack() as stack:
        if (rows := getattr(objective, "rough_rows", None)) is not None:
            stack.callback(setattr, objective, "rough_rows", rows)
            objective.rough_rows = 1  # type: ignore[attr-defined]
        yield


class Approximations:
    """What one training computes approximately.

    Args:
        names: of those that are on.
        measured: what they add; None where that was not measured.

    Attributes:
        off_since: the step from which on they were left out; None where they were not.
        on_change: told in a line what was left out, and from which step on.
    """

    def __init__(self, names: Iterable[str] = (), measured: Measured | None = None) -> None:
        self.names = tuple(name for name in APPROXIMATIONS if name in set(names))
        self.measured = measured
        self.off_since: int | None = None
        self.on_change: Callable[[str, int], None] = lambda line, step: None

    def on(self) -> AbstractContextManager[None]:
        """While open, the process computes with those that are on."""
        return _with(self.names)

    def look_again(self, check: GradientCheck, step: int, processes: Reducer) -> None:
        """Leave out, before this step, what adds too much by now; in each process what process 0 finds.

        Nothing is computed in fp32 unless the gradients with and without what is approximate have moved
        apart.
        """
        names, said = json.loads(processes.texts(json.dumps(self._still_used(check)))[0])
        if tuple(names) == self.names:
            return
        self.names, self.off_since = tuple(names), step
        loader.compute_with(loader.arithmetic().approximating(self.names))
        self.on_change(said, step)

    def _still_used(self, check: GradientCheck) -> tuple[tuple[str, ...], str]:
        """Those that may be used further, and why not the others."""
        if self.measured is not None:
            whole, blocks = check.moved(self.names)
            known = self.measured.blocks
            blocks = {name: _added(known[name], of) for name, of in blocks.items() if name in known}
            now = replace(self.measured, whole=_added(self.measured.whole, whole), blocks=blocks)
            if now.failing() is None:
                return self.names, ""
        chosen = check.choose(self.names)
        self.measured = chosen.measured
        return chosen.names, "; ".join(f"{NAMES[name]}: {why}" for name, why in chosen.refused.items())

    def choice(self, refused: Mapping[str, str]) -> Choice[str]:
        """Whether anything is approximate, what, and how that was verified."""
        used = ", ".join(NAMES[name] for name in self.names)
        if used and self.measured:
            used = f"{used}; {self.measured}"
        return Choice("auto" if used else "off", used or "; ".join(dict.fromkeys(refused.values())))

    def lines(self, refused: Mapping[str, str]) -> list[str]:
        """The same for a person, and what is left out."""
        lines = [f"approximate: {NAMES[name]}" for name in self.names]
        if self.names and self.measured:
            lines.append(f"  {self.measured}")
        return lines + [
            line for name, why in refused.items() for line in (f"not approximate: {NAMES[name]}", f"  {why}")
        ]

    def state(self) -> dict[str, Any]:
        """Plain values, for a checkpoint. Which are on is part of the arithmetic of the training's state."""
        return {"measured": None if self.measured is None else asdict(self.measured), "off_since": self.off_since}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` gave."""
        self.off_since = saved["off_since"]
        if saved["measured"] is not None:
            self.measured = Measured.of_dict(saved["measured"])

    def as_dict(self) -> dict[str, object]:
        """For a run's result."""
        found: dict[str, object] = {"used": list(self.names), "off_since_step": self.off_since}
        if (seen := self.measured) is not None:
            found |= {**asdict(seen.whole), "tokens": seen.tokens, "seconds": round(seen.seconds, 2)}
        return found


def _added(before: Errors, moved: Errors) -> Errors:
    """The errors now, if bf16 alone is off by what it was, and what is approximate adds to that at random."""
    return Errors(before.own, math.hypot(before.own, moved.error), moved.cosine)


def applicable(model: nn.Module, objective: AnyObjective, offered: Iterable[str]) -> tuple[str, ...]:
    """Those of the approximations offered that would change anything in a training."""
    found = blocks_of(model)
    in_blocks = model if found is None else found[1]
    rounded = any(p.dtype == torch.bfloat16 and p.dim() == 2 for p in in_blocks.parameters())
    can = {*getattr(objective, "approximable", ()), *(["int8_gradients"] if rounded else [])}
    return tuple(name for name in offered if name in can)


def rows_to_look_at(rows: Iterable[Any], batcher: AnyBatcher, objective: AnyObjective) -> list[Any]:
    """The first of these rows that are enough to look at, without very long ones where there are others."""
    found: list[Any] = []
    longer: list[tuple[int, Any]] = []
    for row in itertools.islice(rows, CANDIDATES):
        tokens = tokens_of(batcher, [row])
        if tokens > LONGEST_ROW:
            longer.append((tokens, row))
            continue
        found.append(row)
        computed = tokens_of(batcher, found)
        if computed >= TOKENS and (objective.units(found) >= LABELS or computed >= LONGEST_ROW):
            break
    return found or [min(longer, key=operator.itemgetter(0))[1]]


def tokens_of(batcher: AnyBatcher, rows: Sequence[Any]) -> int:
    """Tokens that are computed for these rows."""
    return sum(batch.tokens for batch in batcher.batches(rows))


def steps_between(looked_at: int, step: int) -> int:
    """Optimizer steps between two looks at so many tokens, where a step computes so many."""
    return max(1, math.ceil(COST * looked_at / (SHARE * max(1, step))))
