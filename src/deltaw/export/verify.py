"""Whether a merged model answers as its base and adapter do: how far logits and choices (of a model that embeds
texts, its tokens' vectors) moved, and how far rounding alone would move them.

Merging rounds weights, which moves logits; how far depends on the model. So the bound is measured on the
model itself: the adapter is merged in memory, by other code (:mod:`deltaw.lora.attachment`), its weights are
rounded to the type of the merged ones and multiplied by 1 + u·ε, with ε drawn evenly from [−1, 1] and u the
type's unit roundoff, and the logits move by what rounding does. Random factors alone would be too little: of
an update that is small beside the steps of bf16, rounding takes the same share everywhere.

A merge that moves logits :data:`MEAN_FACTOR` times as far (at any single logit :data:`MAX_FACTOR` times) is
not explained by rounding, and refused. So is one whose rounding moves them by more than :data:`SHARE` of what
the adapter itself does: the merged model would have lost what was trained.

A few rows show that clearly, so :data:`FEW` are compared first; what comes near a bound is compared on :data:`MANY`.

Models are held one after the other. Knows runs, tasks and models; not how a merge is done.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltaw.data.prepare import encode_prompt
from deltaw.errors import UserError
from deltaw.export.base import Merging, Say
from deltaw.export.merge import apply_changes
from deltaw.export.merged import usual_type
from deltaw.hub.checkpoint import read_checkpoint
from deltaw.lora import merge
from deltaw.machine.memory import free_memory_bytes, release_free_memory
from deltaw.methods.parameters import names_of
from deltaw.runtime.quantized_weights import round_to_nf4
from deltaw.tensor_files import CODES
from deltaw.training.embedding.pooling import reader_of
from deltaw.training.evaluation.general_prompts import MEASURED
from deltaw.training.origin import InferenceSession, open_run
from deltaw.training.process import own_random_numbers
from deltaw.training.tasks.base import read_run_data
from deltaw.working import working

MEAN_FACTOR, MAX_FACTOR, SHARE = 2.0, 4.0, 0.5
# The share of the adapter's own effect from which on a person is told.
TOLD = 0.1
# Tokens of a row, and bytes of kept logits, at most.
TOKENS, KEPT_BYTES = 512, 256 << 20
# From this share of a bound on, more rows are compared.
NEAR = 0.75
# Sums over some thousand products differ by more than the roundoff of fp32 itself, 2⁻²⁴.
_WIDE = dict.fromkeys((torch.float32, torch.float64), 2.0**-20)
UNIT_ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, **_WIDE}
_SPARE = 1.3


class Amount(NamedTuple):
    """How much is compared: rows, and positions at the end of each."""

    rows: int
    positions: int


FEW, MANY = Amount(4, 64), Amount(24, TOKENS)


@dataclass(frozen=True)
class Movement:
    """How far logits moved from the unmerged model's; a shift of all logits of a position counts as none.

    Attributes:
        mean: root mean square over all logits. largest: the largest of all.
        divergence: mean KL(unmerged ‖ moved) over positions, in nats; 0 where there is one output.
        changed: share of positions at which another token (class) has the largest logit.
    """

    mean: float
    largest: float
    divergence: float
    changed: float

    def __str__(self) -> str:
        return f"{self.mean:.2g} (largest {self.largest:.2g})"

    def of_choices(self, verb: str) -> str:
        return f"KL {self.divergence:.2g} nats, and {verb} {self.changed:.2%} of the choices"


@dataclass(frozen=True)
class Verification:
    """What :class:`Verify` found.

    Attributes:
        rows: where the rows came from, in words. count: of rows. positions: of logits' rows.
        computed_in: the type of both models' arithmetic. stored_in: of the merged weights.
        merged: how far merging moved the logits. rounding: how far rounding of that size does.
        adapter: how far the adapter itself moves them; None where there are several.
        narrowed: whether the merged weights have a narrower type than the base's.
        allowed_mean, allowed_largest: what was allowed.
        nf4: of an adapter that was trained over NF4, how far its rounding of the base moves the unmerged
            model's logits: from what was trained to what is merged into. No part of what merging does.
        outputs: what was compared: "logits", or "vectors" of tokens.
    """

    rows: str
    count: int
    positions: int
    computed_in: str
    stored_in: str
    merged: Movement
    rounding: Movement
    adapter: Movement | None
    narrowed: bool
    allowed_mean: float
    allowed_largest: float
    nf4: Movement | None = None
    outputs: str = "logits"

    @property
    def explained(self) -> bool:
        """Whether rounding explains all of it; a number that is not finite passes nothing."""
        return self.merged.mean <= self.allowed_mean and self.merged.largest <= self.allowed_largest

    @property
    def lost(self) -> float:
        """What merging moved, as a share of what the adapter does; 0 where that is not known."""
        if self.adapter is None or self.merged.mean == 0:
            return 0.0
        return self.merged.mean / max(self.adapter.mean, 1e-30)

    @property
    def passed(self) -> bool:
        """Whether the merged model is the pair, and still has what the adapter learned. Where the user asked
        for a narrower type than the base's, rounding of the base counts, and nobody is refused for it."""
        return self.explained and (self.narrowed or self.lost <= SHARE)

    @property
    def clear(self) -> bool:
        """Whether it passed, and is near no bound."""
        merged = self.merged
        explained = merged.mean <= NEAR * self.allowed_mean and merged.largest <= NEAR * self.allowed_largest
        return explained and (self.narrowed or self.lost <= NEAR * SHARE)

    def as_dict(self) -> dict[str, object]:
        """Ready for JSON."""
        return {**asdict(self), "passed": self.passed}

    def lines(self) -> list[str]:
        """For a person."""
        merged, rounding, outputs = self.merged, self.rounding, self.outputs

        def choices(moved: Movement, verb: str) -> str:
            return f", {moved.of_choices(verb)}" if outputs == "logits" else ""

        said = [
            f"verified on {self.rows}: {self.count} rows, {self.positions:,} positions, computed in {self.computed_in}",
            f"  merging moved {outputs} by {merged}{choices(merged, 'changed')}",
            f"  rounding to {self.stored_in} alone moves them by {rounding}; "
            f"allowed {self.allowed_mean:.2g} ({self.allowed_largest:.2g})",
        ]
        if self.adapter is not None:
            said.append(f"  the adapter itself moves them by {self.adapter.mean:.2g}{choices(self.adapter, 'changes')}")
            if self.passed and self.lost > TOLD:
                said.append(
                    f"  note: rounding to {self.stored_in} moves {outputs} by {self.lost:.0%} of what the "
                    "adapter does; --precision fp32 keeps all of it"
                )
        if self.nf4 is not None:
            said.append(
                "  apart from merging, the adapter was trained over NF4, whose rounding of the base moves "
                f"{outputs} by {self.nf4}{choices(self.nf4, 'changes')}"
            )
        return said


class Verify:
    """Compares a merged model with the unmerged pair, for :func:`deltaw.export.merge.merge_run`."""

    def __init__(self, say: Say = lambda line: None) -> None:
        self._say = say

    def __call__(self, job: Merging, folder: Path) -> Verification:
        """See the module; raises where the merged model is not the pair.

        Raises:
            UserError: logits moved further than rounding explains.
        """
        with working("verifying the merged model"), torch.no_grad(), own_random_numbers(0):
            found = _compared(job, folder, FEW, self._say)
            if not found.clear:
                found = _compared(job, folder, MANY, lambda line: None)
        for line in found.lines():
            self._say(line)
        if found.explained and not found.passed:
            what = f"rounding to {found.stored_in} moves {found.outputs} by {found.lost:.0%} of what the adapter does"
            hint = "merge with --precision fp32, or keep the adapter separate"
            raise UserError(what, where=str(job.run), hint=hint)
        if not found.passed:
            most = f"{found.allowed_mean:.2g} ({found.allowed_largest:.2g})"
            moved = (
                f"{found.outputs} moved by {found.merged}, and rounding to {found.stored_in} explains at most {most}"
            )
            hint = "look at it with --keep, merge with --precision fp32, or report the model as not merged correctly"
            what = f"the merged model is not what base and adapter are together: {moved}"
            raise UserError(what, where=str(job.run), hint=hint)
        return found


def _compared(job: Merging, folder: Path, amount: Amount, say: Say) -> Verification:
    stored, narrowed = _stored_type(job, folder)
    parameters = sum(tensor.numel for tensor in read_checkpoint(folder).tensors.values())
    fits = parameters * 4 * _SPARE < free_memory_bytes()
    precision = "fp32" if fits else "bf16"
    if not fits:
        say("verifying in bf16, since the model in fp32 does not fit into free memory")
    opened = _opened(job, precision)
    questions, rows = _questions(opened, amount, say)
    single = job.combination is None
    if single:
        model = opened.model
    else:
        # Several adapters cannot be on one model: their unrounded sum is put into the loaded weights.
        model = job.base.load(precision).model
        apply_changes(model, job.trained)
    kept = list(questions.logits(model))
    adapter = None
    if single:
        with opened.base():
            adapter = _moved(kept, questions.logits(model))
    nf4 = _moved_by_nf4(job, kept, questions, precision) if single else None
    step = max(UNIT_ROUNDOFF[stored], UNIT_ROUNDOFF[torch.bfloat16] if precision == "bf16" else 0.0)
    everything = narrowed or precision == "bf16"
    if single and opened.method is not None and opened.method.name == "lora":
        with contextlib.suppress(UserError):  # an adapter that the weights cannot take stays beside them
            merge(model, keep_original=False)
    _perturb(model, None if everything else {n for one in job.trained for n in one.names}, step, stored)
    rounding = _moved(kept, questions.logits(model))
    del model
    # The session is needed for its task alone; whatever holds the unmerged model lets go of it.
    opened.loaded.model, opened.method = None, None  # type: ignore[assignment]
    release_free_memory()
    merged = _moved(kept, questions.logits(job.base.load(precision, folder).model))
    floor = 1e-6 * max(float(logits.abs().max()) for logits in kept)
    allowed = max(MEAN_FACTOR * rounding.mean, floor), max(MAX_FACTOR * rounding.largest, 10 * floor)
    positions, types = sum(len(logits) for logits in kept), (precision, CODES[stored].lower())
    outputs = "vectors" if opened.task.sees_steps else "logits"
    count = len(kept)
    return Verification(rows, count, positions, *types, merged, rounding, adapter, narrowed, *allowed, nf4, outputs)


def _moved_by_nf4(job: Merging, kept: Sequence[Tensor], questions: _Questions, precision: str) -> Movement | None:
    """How far NF4 moves the logits of base and adapter; None where it was not trained over NF4."""
    run = job.base.run
    if run is None or run.precision != "nf4":
        return None
    rounded = _opened(job, precision)
    round_to_nf4(rounded.model.base_model)
    return _moved(kept, questions.logits(rounded.model))


def _opened(job: Merging, precision: str) -> InferenceSession:
    """Base and adapter, unmerged."""
    base, trust = str(job.base.folder), job.base.trust_remote_code
    return open_run(
        str(job.run), model=base, precision=precision, device="cpu", trust_remote_code=trust, say=lambda line: None
    )


def _stored_type(job: Merging, folder: Path) -> tuple[torch.dtype, bool]:
    """The type of most merged weights, and whether the base's are wider."""

    merged, base = (usual_type(read_checkpoint(f).tensors.values()) for f in (folder, job.base.folder))
    assert merged is not None and base is not None
    return merged, UNIT_ROUNDOFF[merged] > UNIT_ROUNDOFF[base]


@torch.no_grad()
def _perturb(model: PreTrainedModel, names: set[str] | None, step: float, stored: torch.dtype) -> None:
    """Round weights to ``stored`` and multiply them by 1 + step·ε, ε evenly from [−1, 1]; all of them for
    ``names`` None."""
    seen: set[int] = set()
    for name, parameter in names_of(model).items():
        wanted = names is None or name in names
        if wanted and parameter.is_floating_point() and id(parameter) not in seen:
            seen.add(id(parameter))
            parameter.data.copy_(parameter.data.to(stored))
            parameter.data.mul_(torch.rand_like(parameter).mul_(2 * step).add_(1 - step))


def _moved(kept: Sequence[Tensor], others: Iterator[Tensor]) -> Movement:
    """How far the second logits are from the first, (positions, outputs) each."""
    squares = divergence = 0.0
    numbers = positions = changed = 0
    largest = 0.0
    for logits, other in zip(kept, others, strict=True):
        difference = other - logits
        if logits.shape[-1] > 1:
            difference -= difference.mean(-1, keepdim=True)
            before, after = (nn.functional.log_softmax(one, -1) for one in (logits, other))
            divergence += float(nn.functional.kl_div(after, before, reduction="sum", log_target=True))
            changed += int((logits.argmax(-1) != other.argmax(-1)).sum())
        squares += float(torch.linalg.vector_norm(difference, dtype=torch.float64)) ** 2
        furthest = float(difference.abs().max())
        largest = max(largest, furthest) if math.isfinite(furthest) else math.inf
        numbers += difference.numel()
        positions += len(logits)
    return Movement((squares / numbers) ** 0.5, largest, max(divergence, 0.0) / positions, changed / positions)


class _Questions:
    """Rows, and how their logits are had from a model."""

    def __init__(self, opened: InferenceSession, rows: Sequence[Any], positions: int, *, labeled: bool) -> None:
        self._opened, self._rows, self._positions, self._labeled = opened, rows, positions, labeled

    def logits(self, model: PreTrainedModel) -> Iterator[Tensor]:
        """(positions, outputs) in fp32 of each row."""
        if self._labeled:
            yield from self._of_labels(model)
            return
        if self._opened.task.sees_steps:
            for tokens in self._rows:
                read = reader_of(model)(input_ids=torch.as_tensor(tokens).long()[None, :TOKENS])
                yield read.last_hidden_state[0, -self._positions :].float()
            return
        left = KEPT_BYTES
        few = "logits_to_keep" in inspect.signature(model.forward).parameters
        how = {"logits_to_keep": self._positions} if few else {}
        for tokens in self._rows:
            if left <= 0:
                return
            logits = model(input_ids=torch.as_tensor(tokens).long()[None, :TOKENS], **how).logits[0].float()
            logits = logits.view(1, -1) if logits.dim() == 1 else logits
            most = max(1, min(self._positions, left // (4 * logits.shape[-1])))
            logits = logits[-most:].clone()  # the answer is at a row's end
            left -= logits.numel() * 4
            yield logits

    def _of_labels(self, model: PreTrainedModel) -> Iterator[Tensor]:
        task = self._opened.task
        batcher, _ = task.batcher(model, self._rows, device="cpu")
        objective = task.objective(model)
        with task.running(model, batcher):
            for batch in batcher.batches(self._rows):
                found = objective.predictions(batch).float()  # type: ignore[attr-defined]
                yield found[:, None] if found.dim() == 1 else found


def _questions(opened: InferenceSession, amount: Amount, say: Say) -> tuple[_Questions, str]:
    """The run's held-out rows, its training rows where it held none out, else general prompts."""
    rows: Sequence[Any] = ()
    where = ""
    why = "the adapter comes without the settings of its data"
    if opened.config is not None and opened.found is not None:
        try:
            opened.found.require_rows()
            data = read_run_data(opened.task, opened.config.data, seed=opened.config.data_seed)
            rows, where = data.held_out, "held-out rows of the run"
            if not len(rows):
                rows, where = data.train, "training rows of the run"
        except UserError as error:
            why = f"the run's data cannot be read ({error.what})"
    if len(rows):
        chosen = _evenly(rows, amount.rows)
        if opened.task.has_labels:
            return _Questions(opened, chosen, amount.positions, labeled=True), where
        tokens = [row.tokens for row in _single(chosen)]
        return _Questions(opened, tokens, amount.positions, labeled=False), where
    if opened.task.tokenizer is None:
        what = f"{why}, and there are no images to verify the merged model on"
        raise UserError(what, where=opened.loaded.reference, hint="use --no-verify")
    say(f"{why}: verifying on general prompts")
    tokenizer, settings = opened.task.tokenizer, opened.data
    prompts = [encode_prompt(p, settings or "auto", tokenizer) for p in _evenly(MEASURED, amount.rows)]
    return _Questions(opened, [p for p in prompts if len(p)], amount.positions, labeled=False), "general prompts"


def _evenly(rows: Sequence[Any], count: int) -> list[Any]:
    return [rows[index] for index in range(0, len(rows), max(1, len(rows) // count))][:count]


def _single(rows: Sequence[Any]) -> Iterator[Any]:
    """Rows, and those of groups."""
    for row in rows:
        yield from getattr(row, "rows", (row,))
