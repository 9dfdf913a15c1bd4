"""Selection of approximate computations, verified on the run's model and rows.

Some bf16 products of a training step run several times as fast in int8. A language model's head is also faster if the
gradients of unlikely classes are summed over rows. The effect on the gradient depends on the model: it is large if a
few columns contain large values. Therefore the gradient is computed on a few rows in fp32, in bf16 and with the
approximations. They are used only if they add little to the rounding error of bf16. The check is repeated during the
run.
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

import numpy as np
import torch
from torch import Tensor, nn

from deltaw.data.example import Example
from deltaw.kernels import loader
from deltaw.kernels.arithmetic import APPROXIMATIONS
from deltaw.machine.choices import Choice
from deltaw.machine.memory import trim_memory
from deltaw.progress import Advance
from deltaw.runtime.recognition import blocks_of
from deltaw.runtime.widened import widened
from deltaw.training.batcher import Batcher
from deltaw.training.objective import Objective
from deltaw.training.reducer import SINGLE_PROCESS, Reducer

# Descriptions for messages.
NAMES = {
    "int8_gradients": "gradients of frozen layers in int8",
    "int8_logits": "unlikely logits in int8",
    "summed_classes": "unlikely classes of the head's gradient summed over rows",
}
# Errors are relative to the norm of the fp32 gradient. Approximations may add half of bf16's error plus this value.
# A single block may add twice as much, because errors of blocks are independent and average out in a step.
MAX_ADDED_ERROR = 0.01
MAX_ADDED_BLOCK_ERROR = 0.02
# Minimum cosine similarity of the gradients with and without approximations. It applies if more than half of bf16's
# error is added.
MIN_COSINE = 0.999
MIN_BLOCK_COSINE = 0.996
# An approximation is accepted only below this share of the limit, so that noise does not decide.
MARGIN = 0.9
# Blocks with a smaller share of the gradient norm are not checked individually.
SMALL_BLOCK = 1e-3
# Minimum computed tokens and labels of the checked rows, and the maximum tokens of one row.
MIN_TOKENS = 128
MIN_LABELS = 16
MAX_ROW_TOKENS = 512
# The checked rows are selected from this number of rows, in training order.
MAX_CANDIDATE_ROWS = 64
# Repeated checks take at most this share of the run's tokens. A check computes two gradients. Each counts twice,
# because small batches are less efficient.
MAX_TIME_SHARE = 0.005
TOKEN_COST = 4.0
# Approximate number of gradient elements that are compared.
MAX_COMPARED = 1 << 22


@dataclass(frozen=True)
class Errors:
    """Relative errors of a gradient.

    Attributes:
        own: Error of the gradient without approximations: norm of its difference from fp32, relative to fp32.
        error: The same with approximations.
        cosine: Cosine similarity of the gradients with and without approximations.
    """

    own: float
    error: float
    cosine: float

    def within(self, margin: float, *, of_block: bool) -> bool:
        """Return True if the error allows the approximations."""
        added = self.error - self.own
        if not math.isfinite(added):
            return False
        if added <= margin * self.own / 2:
            return True
        max_added, min_cosine = (MAX_ADDED_BLOCK_ERROR, MIN_BLOCK_COSINE) if of_block else (MAX_ADDED_ERROR, MIN_COSINE)
        return added <= margin * (self.own / 2 + max_added) and 1 - self.cosine <= margin * (1 - min_cosine)


@dataclass(frozen=True)
class ApproximationErrors:
    """Measured errors of a set of approximations.

    Attributes:
        names: Enabled approximations.
        whole: Errors of the entire gradient.
        blocks: Errors by block.
        tokens: Number of tokens in the checked rows.
        seconds: Duration of the check, or 0 if it is from an earlier run.
    """

    names: tuple[str, ...]
    whole: Errors
    blocks: Mapping[str, Errors] = field(default_factory=dict)
    tokens: int = 0
    seconds: float = 0.0

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> ApproximationErrors:
        """Restore from the result of ``asdict``, possibly read from JSON."""
        blocks = {name: Errors(**errors) for name, errors in plain["blocks"].items()}
        return cls(tuple(plain["names"]), Errors(**plain["whole"]), blocks, plain["tokens"], plain["seconds"])

    def failing(self, margin: float = 1.0) -> str | None:
        """Describe the first error above the limit, if any."""
        for name, errors in {"": self.whole, **self.blocks}.items():
            if not errors.within(margin, of_block=bool(name)):
                part = f" of {name}" if name else ""
                return f"the gradient{part} is off from fp32 by {errors.error:.1%} and not {errors.own:.1%}"
        return None

    def __str__(self) -> str:
        when = f"checked in {self.seconds:.1f} s" if self.seconds else "by an earlier run"
        off = f"gradient off from fp32 by {self.whole.error:.1%}, bf16 by {self.whole.own:.1%}"
        return f"{off}: {self.tokens} tokens, {when}"


@dataclass(frozen=True)
class AllowedApproximations:
    """Result of a check.

    Attributes:
        names: Approximations that may be used.
        measured: Their combined errors, or None without approximations.
        refused: Reasons for the rejected approximations, by name.
    """

    names: tuple[str, ...]
    measured: ApproximationErrors | None
    refused: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_cache(cls, plain: Mapping[str, Any]) -> AllowedApproximations:
        """Restore the cached result of another run from ``asdict``."""
        measured = plain["measured"] and replace(ApproximationErrors.from_dict(plain["measured"]), seconds=0.0)
        return cls(tuple(plain["names"]), measured, plain["refused"])


# Number of gradients that a check computes: in fp32, in the base precision, and approximate.
_PASSES = 3


@dataclass
class GradientCheck:
    """Computes the gradient of some rows in several ways and compares the results.

    Args:
        model: Trained model.
        objective: Objective of the training.
        batcher: Batcher of the training.
        named: Trained parameters by name.
        rows: Rows to check.
        advance: Receives the completed share of the check.
    """

    model: nn.Module
    objective: Objective
    batcher: Batcher
    named: Mapping[str, nn.Parameter]
    rows: Sequence[Any]
    advance: Advance = lambda done: None

    def __post_init__(self) -> None:
        self._passes, self._batches = 0.0, max(1, sum(1 for _ in self.batcher.batches(self.rows)))
        self.tokens = tokens_of(self.batcher, self.rows)
        numbers = sum(parameter.numel() for parameter in self.named.values())
        # An odd stride visits all columns of a matrix.
        self._distance = 1 if numbers <= MAX_COMPARED else -(-numbers // MAX_COMPARED) | 1

    def choose(self, candidates: Sequence[str]) -> AllowedApproximations:
        """Return the candidates with sufficiently small errors, tested together first and then one by one."""
        start = time.perf_counter()
        exact = dict(self.gradients((), wide=True)), dict(self.gradients(()))

        def measured(names: Sequence[str]) -> ApproximationErrors:
            whole, blocks = self._errors(names, *exact)
            return ApproximationErrors(tuple(names), whole, blocks, self.tokens, time.perf_counter() - start)

        errors = measured(candidates)
        if errors.failing(MARGIN) is None:
            return AllowedApproximations(tuple(candidates), errors)
        chosen = AllowedApproximations((), None)
        refused = {}
        for name in sorted(candidates, key=APPROXIMATIONS.index, reverse=True):  # largest error last
            errors = measured([*chosen.names, name])
            if failing := errors.failing(MARGIN):
                refused[name] = failing
            else:
                chosen = AllowedApproximations(errors.names, errors)
        return replace(chosen, refused=refused)

    def relative_errors(self, names: Sequence[str]) -> tuple[Errors, dict[str, Errors]]:
        """Return the errors relative to the gradient without approximations: of the entire gradient and by block."""
        exact = dict(self.gradients(()))
        return self._errors(names, exact, exact)

    def gradients(self, approximations: Sequence[str], *, wide: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Yield the gradient of each parameter with its name, subsampled to ``MAX_COMPARED`` elements in total."""
        head = getattr(self.model, "get_output_embeddings", lambda: None)()
        excluded = [head] if head is not None and not any(p.requires_grad for p in head.parameters()) else []
        exact = widened(self.model, excluded=excluded) if wide else contextlib.nullcontext()
        random = torch.random.fork_rng(devices=[])
        arithmetic = _compute_with(approximations)
        trim_memory()  # fp32 and bf16 blocks fragment the heap
        with random, arithmetic, _force_rough_logits(self.objective), exact:
            self.objective.start_step(self.rows, self.batcher, SINGLE_PROCESS)
            for batch in self.batcher.batches(self.rows):
                self.objective(batch).backward()
                self._passes += 1 / self._batches
                self.advance(min(self._passes / _PASSES, 0.99))
        for name, parameter in self.named.items():
            gradient = parameter.grad
            parameter.grad = None
            if gradient is not None:
                yield name, gradient.flatten()[:: self._distance].float()

    def _errors(
        self, names: Sequence[str], reference: Mapping[str, Tensor], exact: Mapping[str, Tensor]
    ) -> tuple[Errors, dict[str, Errors]]:
        sums: dict[str, Tensor] = {}
        for name, approximate in self.gradients(names):
            products = _products(reference[name].double(), exact[name].double(), approximate.double())
            block = block_of(name)
            sums[block] = sums[block] + products if block in sums else products
        whole = torch.stack(list(sums.values())).sum(0)
        large = {block: values for block, values in sums.items() if values[0] > SMALL_BLOCK**2 * whole[0]}
        return _errors_of(whole), {block: _errors_of(values) for block, values in large.items()}


@contextlib.contextmanager
def _compute_with(approximations: Sequence[str]) -> Iterator[None]:
    """Enable exactly these approximations in the process inside this context."""
    with loader.temporary_arithmetic():
        loader.use_arithmetic(loader.arithmetic().with_approximations(approximations))
        yield


def block_of(name: str) -> str:
    """Return the block of a parameter: its name up to and including the first number."""
    match = re.match(r"(?:.*?\.)?\d+(?=\.|$)", name)
    return match.group() if match else name


def _products(reference: Tensor, exact: Tensor, approximate: Tensor) -> Tensor:
    """Return the (6) scalar products that the errors are computed from. Those of several parameters are added."""
    squared_errors = [(gradient - reference).square().sum() for gradient in (exact, approximate)]
    lengths = exact @ exact, approximate @ approximate
    return torch.stack([reference @ reference, *squared_errors, *lengths, exact @ approximate])


def _errors_of(sums: Tensor) -> Errors:
    reference, exact, approximate, ee, aa, ea = sums.tolist()
    if not reference > 0:
        return Errors(0.0, 0.0 if approximate == 0 else math.inf, 1.0)
    cosine = ea / math.sqrt(ee * aa) if ee * aa > 0 else math.nan
    return Errors(math.sqrt(exact / reference), math.sqrt(approximate / reference), cosine)


@contextlib.contextmanager
def _force_rough_logits(objective: Objective) -> Iterator[None]:
    """Make an objective use its code path for large numbers of labels."""
    rows = objective.min_rough_rows
    objective.min_rough_rows = 1
    try:
        yield
    finally:
        objective.min_rough_rows = rows


class Approximations:
    """Approximations that a training uses.

    Args:
        names: Enabled approximations.
        measured: Their errors, or None if they were not measured.

    Attributes:
        off_since: First step without the disabled approximations, if any.
        on_change: Receives a description of the disabled approximations and that step.
    """

    def __init__(self, names: Iterable[str] = (), measured: ApproximationErrors | None = None) -> None:
        self.names = tuple(name for name in APPROXIMATIONS if name in set(names))
        self.measured = measured
        self.off_since: int | None = None
        self.on_change: Callable[[str, int], None] = lambda line, step: None

    def on(self) -> AbstractContextManager[None]:
        """Enable the approximations in the process inside this context."""
        return _compute_with(self.names)

    def recheck(self, check: GradientCheck, step: int, processes: Reducer) -> None:
        """Disable approximations before this step if their errors have become too large.

        Process 0 decides for all processes. fp32 gradients are computed only if the gradients with and without
        approximations have diverged.
        """
        names, reason = json.loads(processes.texts(json.dumps(self._still_used(check)))[0])
        if tuple(names) == self.names:
            return
        self.names = tuple(names)
        self.off_since = step
        loader.use_arithmetic(loader.arithmetic().with_approximations(self.names))
        self.on_change(reason, step)

    def _still_used(self, check: GradientCheck) -> tuple[tuple[str, ...], str]:
        """Return the approximations that may still be used, and the reasons against the rejected ones."""
        if self.measured is not None:
            whole, blocks = check.relative_errors(self.names)
            measured = self.measured.blocks
            blocks = {name: _combine_errors(measured[name], blocks[name]) for name in blocks if name in measured}
            current = replace(self.measured, whole=_combine_errors(self.measured.whole, whole), blocks=blocks)
            if current.failing() is None:
                return self.names, ""
        allowed = check.choose(self.names)
        self.measured = allowed.measured
        return allowed.names, "; ".join(f"{NAMES[name]}: {reason}" for name, reason in allowed.refused.items())

    def choice(self, refused: Mapping[str, str]) -> Choice[str]:
        """Return the setting that was chosen and the measurement or the reasons behind it."""
        enabled = ", ".join(NAMES[name] for name in self.names)
        if enabled and self.measured:
            enabled = f"{enabled}; {self.measured}"
        return Choice("auto" if enabled else "off", enabled or "; ".join(dict.fromkeys(refused.values())))

    def lines(self, refused: Mapping[str, str]) -> list[str]:
        """Return a description of the enabled and the rejected approximations."""
        lines = [f"approximate: {NAMES[name]}" for name in self.names]
        if self.names and self.measured:
            lines.append(f"  {self.measured}")
        reasons = refused.items()
        return lines + [line for name, why in reasons for line in (f"not approximate: {NAMES[name]}", f"  {why}")]

    def state(self) -> dict[str, Any]:
        """Return plain values for a checkpoint.

        The names of enabled approximations are not included, because they are part of the training state's arithmetic.
        """
        return {"measured": None if self.measured is None else asdict(self.measured), "off_since": self.off_since}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore the result of :meth:`state`."""
        self.off_since = state["off_since"]
        if state["measured"] is not None:
            self.measured = ApproximationErrors.from_dict(state["measured"])

    def as_dict(self) -> dict[str, object]:
        """Return the values for the run's result."""
        result: dict[str, object] = {"used": list(self.names), "off_since_step": self.off_since}
        if (measured := self.measured) is not None:
            result |= {**asdict(measured.whole), "tokens": measured.tokens, "seconds": round(measured.seconds, 2)}
        return result


def _combine_errors(initial: Errors, current: Errors) -> Errors:
    """Combine the initial error of bf16 with the current error of the approximations, as independent errors."""
    return Errors(initial.own, math.hypot(initial.own, current.error), current.cosine)


def applicable(model: nn.Module, objective: Objective, candidates: Iterable[str]) -> tuple[str, ...]:
    """Return the candidates that have an effect on this model and objective."""
    blocks = blocks_of(model)
    block_root = model if blocks is None else blocks[1]
    has_bf16_matrices = any(p.dtype == torch.bfloat16 and p.dim() == 2 for p in block_root.parameters())
    supported = {*objective.approximable, *(["int8_gradients"] if has_bf16_matrices else [])}
    return tuple(name for name in candidates if name in supported)


def select_check_rows(rows: Iterable[Any], batcher: Batcher, objective: Objective) -> list[Any]:
    """Return the first rows with enough tokens and labels for a check.

    Very long rows are skipped. If all rows are, the shortest one is truncated.
    """
    selected: list[Any] = []
    longer: list[tuple[int, Any]] = []
    for row in itertools.islice(rows, MAX_CANDIDATE_ROWS):
        tokens = tokens_of(batcher, [row])
        if tokens > MAX_ROW_TOKENS:
            longer.append((tokens, row))
            continue
        selected.append(row)
        computed = tokens_of(batcher, selected)
        if computed >= MIN_TOKENS and (objective.units(selected) >= MIN_LABELS or computed >= MAX_ROW_TOKENS):
            break
    return selected or [_truncate(min(longer, key=operator.itemgetter(0))[1])]


def _truncate(row: Any) -> Any:
    """Return the start of a row of text with enough tokens and labels for a check."""
    if not isinstance(row, Example) or row.reference is not None:
        return row
    labels = np.flatnonzero(row.is_label)
    last_label = int(labels[:MIN_LABELS][-1]) if len(labels) else 0
    return row.truncate(max(MAX_ROW_TOKENS, last_label + 1))


def tokens_of(batcher: Batcher, rows: Sequence[Any]) -> int:
    """Return the number of tokens that are computed for these rows."""
    return sum(batch.tokens for batch in batcher.batches(rows))


def check_interval(check_tokens: int, step_tokens: int) -> int:
    """Return the number of optimizer steps between two checks.

    Args:
        check_tokens: Tokens of a check.
        step_tokens: Tokens of an optimizer step.
    """
    return max(1, math.ceil(TOKEN_COST * check_tokens / (MAX_TIME_SHARE * max(1, step_tokens))))
