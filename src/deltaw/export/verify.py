"""Verification that a merged model produces the outputs of the base model with its adapter.

Merging rounds the weights, which changes the logits (for embedding models: the token vectors) by an amount that depends
on the model. The expected amount is measured: the adapter is merged in memory by independent code
(:mod:`deltaw.lora.attachment`), its weights are rounded to the type of the merged ones and multiplied by 1 + u·ε, with
ε uniform in [−1, 1] and u the unit roundoff of the type. Noise without rounding would underestimate the effect, because
small updates are rounded systematically in bf16.

A merge fails if it changes logits by more than :data:`MEAN_FACTOR` times this amount on average, or
:data:`MAX_FACTOR` times for a single logit. It also fails if rounding changes them by more than :data:`SHARE` of the
adapter's effect, because training results would be lost.

:data:`SMALL_SAMPLE` is compared first, and :data:`LARGE_SAMPLE` if a value is close to a bound. Only one model is in
memory at a time.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltaw.data.prompt_tokens import encode_prompt
from deltaw.errors import UserError
from deltaw.export.adapters import ParameterChange
from deltaw.export.merge_in_memory import apply_changes
from deltaw.export.merge_plan import MergePlan
from deltaw.export.merged import dominant_dtype
from deltaw.hub.checkpoint import read_checkpoint
from deltaw.inference.open_run import open_run
from deltaw.inference.opened_run import OpenedRun
from deltaw.inference.pooling import text_encoder
from deltaw.lora import merge
from deltaw.lora.complete_names import complete_names
from deltaw.machine.memory import free_memory_bytes, release_free_memory
from deltaw.methods.parameters import parameters_by_name
from deltaw.progress import LogFunction, ignore_line, track_progress
from deltaw.runtime.nf4 import round_to_nf4
from deltaw.tensor_files import CODES
from deltaw.training.batchers import BatcherOptions
from deltaw.training.evaluation.general_prompts import DRIFT_PROMPTS
from deltaw.training.process import isolated_random_state
from deltaw.training.task import read_run_data

MEAN_FACTOR = 2.0
MAX_FACTOR = 4.0
SHARE = 0.5
# Share of the adapter's effect above which the user is notified.
NOTE_SHARE = 0.1
# Maximum tokens of a row, and maximum bytes of stored logits.
MAX_ROW_TOKENS = 512
MAX_LOGIT_BYTES = 256 << 20
# Share of a bound above which more rows are compared.
NEAR_BOUND = 0.75
# Sums over thousands of products differ by more than fp32's unit roundoff, 2⁻²⁴.
_WIDE = dict.fromkeys((torch.float32, torch.float64), 2.0**-20)
UNIT_ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, **_WIDE}
_MEMORY_FACTOR = 1.3


class SampleSize(NamedTuple):
    """Number of rows, and number of positions at the end of each row."""

    rows: int
    positions: int


SMALL_SAMPLE = SampleSize(4, 64)
LARGE_SAMPLE = SampleSize(24, MAX_ROW_TOKENS)


@dataclass(frozen=True)
class Movement:
    """Difference of logits to those of the unmerged model. A constant shift of all logits of a position is ignored.

    Attributes:
        mean: Root mean square over all logits.
        largest: Largest absolute difference.
        divergence: Mean KL(unmerged ‖ moved) over positions in nats, or 0 for a single output.
        changed: Share of positions with a different argmax.
    """

    mean: float
    largest: float
    divergence: float
    changed: float

    def __str__(self) -> str:
        return f"{self.mean:.2g} (largest {self.largest:.2g})"


@dataclass(frozen=True)
class Verification:
    """Result of :class:`MergeVerifier`.

    Attributes:
        rows: Description of the rows.
        count: Number of rows.
        positions: Number of positions.
        computed_in: Precision of the computation of both models.
        stored_in: Type of the merged weights.
        merged: Movement caused by the merge.
        rounding: Movement caused by rounding of that size.
        adapter: Movement caused by the adapter, or None for several adapters.
        narrowed: True if the merged weights have a narrower type than the base model.
        allowed_mean, allowed_largest: Bounds of the merge's movement.
        nf4: For an adapter trained on NF4 weights, movement of the unmerged model's logits caused by NF4 rounding of
            the base weights. It is not caused by the merge.
        outputs: Compared outputs: "logits", or "vectors" of tokens.
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
    def is_explained(self) -> bool:
        """True if rounding explains the movement. Values that are not finite fail."""
        return self.merged.mean <= self.allowed_mean and self.merged.largest <= self.allowed_largest

    @property
    def lost_share(self) -> float:
        """Movement caused by the merge as a share of the adapter's effect, or 0 if unknown."""
        if self.adapter is None or self.merged.mean == 0:
            return 0.0
        return self.merged.mean / max(self.adapter.mean, 1e-30)

    @property
    def passed(self) -> bool:
        """True if the merge is correct and retains the adapter's effect.

        If the user requested a narrower type than the base model's, the rounded base weights contribute to the
        movement, so the share of the adapter's effect is not checked.
        """
        return self.is_explained and (self.narrowed or self.lost_share <= SHARE)

    @property
    def is_clear(self) -> bool:
        """True if the verification passed and no value is close to a bound."""
        moved = self.merged
        explained = moved.mean <= NEAR_BOUND * self.allowed_mean and moved.largest <= NEAR_BOUND * self.allowed_largest
        return explained and (self.narrowed or self.lost_share <= NEAR_BOUND * SHARE)

    def as_dict(self) -> dict[str, object]:
        """Return the result for JSON."""
        return {**asdict(self), "passed": self.passed}

    def lines(self) -> list[str]:
        """Return a summary for the user."""
        merged = self.merged
        rounding = self.rounding
        outputs = self.outputs

        def choices(movement: Movement, verb: str) -> str:
            text = f", KL {movement.divergence:.2g} nats, and {verb} {movement.changed:.2%} of the choices"
            return text if outputs == "logits" else ""

        summary = [
            f"verified on {self.rows}: {self.count} rows, {self.positions:,} positions, computed in {self.computed_in}",
            f"  merging moved {outputs} by {merged}{choices(merged, 'changed')}",
            f"  rounding to {self.stored_in} alone moves them by {rounding}; "
            f"allowed {self.allowed_mean:.2g} ({self.allowed_largest:.2g})",
        ]
        if self.adapter is not None:
            summary.append(f"  the adapter moves them by {self.adapter.mean:.2g}{choices(self.adapter, 'changes')}")
            if self.passed and self.lost_share > NOTE_SHARE:
                note = f"rounding to {self.stored_in} moves {outputs} by {self.lost_share:.0%} of what the adapter does"
                summary.append(f"  note: {note}; use --precision fp32 to avoid this")
        if self.nf4 is not None:
            effect = f"whose rounding moves {outputs} by {self.nf4}{choices(self.nf4, 'changes')}"
            summary.append(f"  independent of the merge, the adapter was trained on NF4 weights, {effect}")
        return summary


class MergeVerifier:
    """Compares a merged model with base model and adapter, for :func:`deltaw.export.merge.merge_run`."""

    def __init__(self, log: LogFunction = ignore_line) -> None:
        self._log = log

    def __call__(self, job: MergePlan, folder: Path) -> Verification:
        """Verify the model in ``folder``.

        Raises:
            UserError: if the logits moved further than rounding explains.
        """
        with track_progress("verifying the merged model"), torch.no_grad(), isolated_random_state(0):
            result = _compare(job, folder, SMALL_SAMPLE, self._log)
            if not result.is_clear:
                result = _compare(job, folder, LARGE_SAMPLE, lambda line: None)
        for line in result.lines():
            self._log(line)
        if result.is_explained and not result.passed:
            message = f"rounding to {result.stored_in} removes {result.lost_share:.0%} of the adapter's effect"
            hint = "merge with --precision fp32, or keep the adapter separate"
            raise UserError(message, location=str(job.run), hint=hint)
        if not result.passed:
            allowed = f"{result.allowed_mean:.2g} ({result.allowed_largest:.2g})"
            details = f"{result.outputs} moved by {result.merged}, rounding to {result.stored_in} explains {allowed}"
            hint = "inspect it with --keep, merge with --precision fp32, or report a bug for this model"
            message = f"the merged model differs from base model and adapter: {details}"
            raise UserError(message, location=str(job.run), hint=hint)
        return result


def _compare(job: MergePlan, folder: Path, sample_size: SampleSize, log: LogFunction) -> Verification:
    # The dominant types of the merged weights and of the base model's.
    stored, base = (dominant_dtype(read_checkpoint(f).tensors.values()) for f in (folder, job.base.folder))
    assert stored is not None and base is not None
    narrowed = UNIT_ROUNDOFF[stored] > UNIT_ROUNDOFF[base]
    parameters = sum(tensor.numel for tensor in read_checkpoint(folder).tensors.values())
    fits = parameters * 4 * _MEMORY_FACTOR < free_memory_bytes()
    precision = "fp32" if fits else "bf16"
    if not fits:
        log("verifying in bf16 because the model in fp32 does not fit into free memory")
    session = _open_unmerged(job, precision)
    samples, rows = _select_rows(session, sample_size, log)
    is_single = job.combination is None
    if is_single:
        model = session.model
    else:
        # A model supports one attached adapter, so the unrounded sum is added to the loaded weights.
        model = job.base.load(precision).model
        apply_changes(model, _changes(job, model))
    reference = list(samples.logits(model))
    adapter = None
    if is_single:
        with session.base():
            adapter = _measure_movement(reference, samples.logits(model))
    nf4 = _measure_nf4(job, reference, samples, precision) if is_single else None
    noise = max(UNIT_ROUNDOFF[stored], UNIT_ROUNDOFF[torch.bfloat16] if precision == "bf16" else 0.0)
    perturb_all = narrowed or precision == "bf16"
    if is_single and session.method is not None and session.method.name == "lora":
        # An adapter that cannot be merged remains attached.
        with contextlib.suppress(UserError), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # rounding is measured below
            merge(model, keep_original=False)
    changed = {name for change in _changes(job, model) for name in change.names}
    _perturb(model, None if perturb_all else changed, noise, stored)
    rounding = _measure_movement(reference, samples.logits(model))
    del model
    # Only the task of the session is still needed. Release the unmerged model.
    session.loaded.model = None  # type: ignore[assignment]
    session.method = None
    release_free_memory()
    merged = _measure_movement(reference, samples.logits(job.base.load(precision, folder).model))
    floor = 1e-6 * max(float(logits.abs().max()) for logits in reference)
    allowed = max(MEAN_FACTOR * rounding.mean, floor), max(MAX_FACTOR * rounding.largest, 10 * floor)
    positions = sum(len(logits) for logits in reference)
    types = (precision, CODES[stored].lower())
    count = len(reference)
    outputs = session.inference.outputs
    return Verification(rows, count, positions, *types, merged, rounding, adapter, narrowed, *allowed, nf4, outputs)


def _changes(job: MergePlan, model: PreTrainedModel) -> list[ParameterChange]:
    """Return the changes of a loaded model, which may be the text view of the merged model."""
    if (mapping := complete_names(model)) is None:
        return list(job.changes)
    names = [tuple(filter(None, map(mapping.from_complete, change.names))) for change in job.changes]
    return [replace(change, names=own) for change, own in zip(job.changes, names, strict=True) if own]


def _measure_nf4(job: MergePlan, reference: Sequence[Tensor], samples: _SampleRows, precision: str) -> Movement | None:
    """Measure the effect of NF4 on the unmerged model's logits. Return None if NF4 was not used in training."""
    run = job.base.run
    if run is None or run.precision != "nf4":
        return None
    rounded = _open_unmerged(job, precision)
    round_to_nf4(rounded.model.base_model)
    return _measure_movement(reference, samples.logits(rounded.model))


def _open_unmerged(job: MergePlan, precision: str) -> OpenedRun:
    """Load the base model with its adapter, unmerged."""
    run = str(job.run)
    base = str(job.base.folder)
    trust = job.base.trust_remote_code
    return open_run(run, model=base, precision=precision, device="cpu", trust_remote_code=trust, log=ignore_line)


@torch.no_grad()
def _perturb(model: PreTrainedModel, names: set[str] | None, step: float, stored: torch.dtype) -> None:
    """Round weights to ``stored`` and multiply them by 1 + step·ε, with ε uniform in [−1, 1].

    Args:
        model: Model to modify.
        names: Names of the parameters, or None for all.
        step: Relative size of the noise.
        stored: Type to round to.
    """
    visited: set[int] = set()
    for name, parameter in parameters_by_name(model).items():
        if (names is None or name in names) and parameter.is_floating_point() and id(parameter) not in visited:
            visited.add(id(parameter))
            parameter.data.copy_(parameter.data.to(stored))
            parameter.data.mul_(torch.rand_like(parameter).mul_(2 * step).add_(1 - step))


def _measure_movement(reference: Sequence[Tensor], moved: Iterator[Tensor]) -> Movement:
    """Measure the difference of logits to ``reference``. Both are (positions, outputs) per row."""
    squares = divergence = 0.0
    count = positions = changed = 0
    largest = 0.0
    for logits, other in zip(reference, moved, strict=True):
        difference = other - logits
        if logits.shape[-1] > 1:
            difference -= difference.mean(-1, keepdim=True)
            before, after = (nn.functional.log_softmax(values, -1) for values in (logits, other))
            divergence += float(nn.functional.kl_div(after, before, reduction="sum", log_target=True))
            changed += int((logits.argmax(-1) != other.argmax(-1)).sum())
        squares += float(torch.linalg.vector_norm(difference, dtype=torch.float64)) ** 2
        max_difference = float(difference.abs().max())
        largest = max(largest, max_difference) if math.isfinite(max_difference) else math.inf
        count += difference.numel()
        positions += len(logits)
    return Movement((squares / count) ** 0.5, largest, max(divergence, 0.0) / positions, changed / positions)


class _SampleRows:
    """Rows of the verification, and computation of their logits."""

    def __init__(self, session: OpenedRun, rows: Sequence[Any], positions: int, *, labeled: bool) -> None:
        self._opened = session
        self._rows = rows
        self._positions = positions
        self._labeled = labeled

    def logits(self, model: PreTrainedModel) -> Iterator[Tensor]:
        """Yield the (positions, outputs) fp32 logits of each row."""
        if self._labeled:
            yield from self._of_labels(model)
            return
        if self._opened.inference.outputs == "vectors":
            for tokens in self._rows:
                encoded = text_encoder(model)(input_ids=torch.as_tensor(tokens).long()[None, :MAX_ROW_TOKENS])
                yield encoded.last_hidden_state[0, -self._positions :].float()
            return
        remaining_bytes = MAX_LOGIT_BYTES
        supports_limit = "logits_to_keep" in inspect.signature(model.forward).parameters
        options = {"logits_to_keep": self._positions} if supports_limit else {}
        for tokens in self._rows:
            if remaining_bytes <= 0:
                return
            logits = model(input_ids=torch.as_tensor(tokens).long()[None, :MAX_ROW_TOKENS], **options).logits[0].float()
            logits = logits.view(1, -1) if logits.dim() == 1 else logits
            max_positions = max(1, min(self._positions, remaining_bytes // (4 * logits.shape[-1])))
            logits = logits[-max_positions:].clone()  # the answer is at the end of a row
            remaining_bytes -= logits.numel() * 4
            yield logits

    def _of_labels(self, model: PreTrainedModel) -> Iterator[Tensor]:
        task = self._opened.task
        batcher, _ = task.batcher(model, self._rows, BatcherOptions("cpu"))
        objective = task.objective(model)
        with task.model_context(model, batcher):
            for batch in batcher.batches(self._rows):
                predictions = objective.predictions(batch).float()  # type: ignore[attr-defined]
                yield predictions[:, None] if predictions.dim() == 1 else predictions


def _select_rows(session: OpenedRun, sample_size: SampleSize, log: LogFunction) -> tuple[_SampleRows, str]:
    """Select held-out rows of the run, otherwise training rows, otherwise general prompts."""
    rows: Sequence[Any] = ()
    location = ""
    reason = "the adapter's folder has no data settings"
    if session.config is not None and session.adapter_folder is not None:
        try:
            session.adapter_folder.require_rows()
            data = read_run_data(session.task, session.config.data, seed=session.config.data_seed)
            rows = data.held_out
            location = "held-out rows of the run"
            if not len(rows):
                rows = data.train
                location = "training rows of the run"
        except UserError as error:
            reason = f"the run's data cannot be read ({error.message})"
    if len(rows):
        selected = _pick_evenly(rows, sample_size.rows)
        if session.task.trains_head:
            return _SampleRows(session, selected, sample_size.positions, labeled=True), location
        tokens = [row.tokens for item in selected for row in getattr(item, "rows", (item,))]
        if (images := getattr(session.task, "images", None)) is not None:
            # The merge does not change the vision tower, so the placeholder is compared instead of the images.
            tokens = [np.where(np.asarray(ids) < images.first_id, ids, images.token_id) for ids in tokens]
        return _SampleRows(session, tokens, sample_size.positions, labeled=False), location
    if session.task.tokenizer is None:
        message = f"{reason}, so images for the verification are not available"
        raise UserError(message, location=session.loaded.reference, hint="use --no-verify")
    log(f"{reason}: verifying on general prompts")
    tokenizer = session.task.tokenizer
    settings = session.data
    prompts = [encode_prompt(p, settings or "auto", tokenizer) for p in _pick_evenly(DRIFT_PROMPTS, sample_size.rows)]
    return _SampleRows(session, [p for p in prompts if len(p)], sample_size.positions, labeled=False), "general prompts"


def _pick_evenly(rows: Sequence[Any], count: int) -> list[Any]:
    return [rows[index] for index in range(0, len(rows), max(1, len(rows) // count))][:count]
