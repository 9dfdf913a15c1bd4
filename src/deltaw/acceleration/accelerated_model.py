"""Run the calls of a script's model on shared copies of it."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltaw.acceleration.padding import PaddingUse
from deltaw.acceleration.peft_layers import NotConvertible
from deltaw.acceleration.report import Report
from deltaw.acceleration.rows import PositionRules
from deltaw.acceleration.shared_copy import SharedCopy, dtype_of_products, is_observed, state_key, trains_base
from deltaw.acceleration.verification import (
    TOLERANCES,
    AccelerationWarning,
    measure,
    nonzero_factors,
    rounding_differences,
    warn_different,
    without_randomness,
)
from deltaw.kernels.torch_private import functorch_is_active
from deltaw.machine.choices import Choice
from deltaw.runtime.fused_blocks import fused_in_mode
from deltaw.runtime.packed import PACKED, PACKED_INDEPENDENT, backbone_of, packed_rows
from deltaw.runtime.packing_checks import can_pack, can_pack_independent
from deltaw.training.causal_objective import CausalObjective

# Maximum number of copies of a model. There is one per state, for example per active adapter.
MAX_COPIES = 4
SWITCH = "DELTAW_ACCELERATE"


class Unsupported(Exception):
    """The model's original code has to run. The message is the reason."""


class PaddingRead(Unsupported):
    """The original code of the whole model has to run, because a call reads outputs at padding."""


@dataclass(eq=False)
class PackedCopy:
    """A shared copy that runs packed rows.

    Attributes:
        shared: The shared copy.
        share: True if rows may share prefixes.
        objective: Loss of the labels, for language models with a known output head.
        autocast_dtype: Type of autocast in which the copy runs, or None to run it in the types of its parameters.
        verified: Kinds of calls that were compared with the model's original code, with and without gradient.
    """

    shared: SharedCopy
    share: bool
    objective: CausalObjective | None
    autocast_dtype: torch.dtype | None
    verified: set[tuple[str, bool]] = field(default_factory=set)

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of autocast in which the copy runs. It is disabled without ``autocast_dtype``."""
        return torch.autocast("cpu", self.autocast_dtype, enabled=self.autocast_dtype is not None)


class AcceleratedModel:
    """A model with shared copies of it, by its state.

    Args:
        model: Model of transformers, possibly with layers of PEFT.
        report: Receives the accelerated parts.
        padding: What is known about the script's use of outputs at padding.

    Attributes:
        positions: Positions of tokens in the model.
        paused: True while the model's original code runs.
    """

    def __init__(self, model: PreTrainedModel, report: Report, padding: PaddingUse) -> None:
        self.model = model
        self.report = report
        self.padding = padding
        self.positions = PositionRules.of(backbone_of(model))
        self.paused = False
        self._reported: set[str] = set()
        self._copies: OrderedDict[Any, PackedCopy | str] = OrderedDict()
        self._casts: dict[int, tuple[Any, nn.Parameter]] = {}

    def current_copy(self) -> PackedCopy:
        """Return an updated copy for the model's current state.

        Raises:
            Unsupported: if the model has to run its original code.
        """
        if os.environ.get(SWITCH) == "0":
            raise Unsupported(f"{SWITCH}=0")
        if torch.compiler.is_compiling():
            raise Unsupported("torch.compile")
        if functorch_is_active():
            raise Unsupported("torch.func")
        if self.model.device.type != "cpu":
            raise Unsupported(f"the model is on {self.model.device.type}")
        if is_observed(self.model):
            raise Unsupported("modules inside the model have hooks")
        dtype = dtype_of_products(self.model, "cpu")
        if (dtype or self.model.dtype) not in TOLERANCES:
            raise Unsupported(f"products in {str(dtype or self.model.dtype).removeprefix('torch.')}")
        key = state_key(self.model, dtype)
        if key not in self._copies:
            self._copies[key] = self._create(dtype)
            while len(self._copies) > MAX_COPIES:
                self._release(self._copies.popitem(last=False)[1])
        self._copies.move_to_end(key)
        found = self._copies[key]
        if isinstance(found, str):
            raise Unsupported(found)
        found.shared.update()
        return found

    def fall_back(self, reason: str) -> None:
        """Record a call that runs the model's original code. Each reason of a training call is reported once."""
        if os.environ.get(SWITCH) == "0":
            return
        if reason not in self._reported and self.model.training and torch.is_grad_enabled():
            self._reported.add(reason)
            message = f"deltaw.accelerate: the model's original code runs: {reason}"
            warnings.warn(message, AccelerationWarning, stacklevel=4)
        self.report.count_fallback(reason)

    def verify(
        self, kind: str, found: PackedCopy, original: Callable[[], Tensor], accelerated: Callable[[], Tensor]
    ) -> None:
        """Compare the first call of a kind with the model's original code, and disable acceleration if they differ.

        Args:
            kind: Kind of the call.
            found: Copy that runs the call.
            original: Runs the model's code on a sample of the call.
            accelerated: Computes the same on the copy.

        Raises:
            Unsupported: if the accelerated result differs from the model's.
        """
        key = kind, torch.is_grad_enabled()
        if key in found.verified:
            return
        leaves = found.shared.leaves(found.shared.model)
        with without_randomness(self.model), nonzero_factors(source for _, source, _ in leaves):
            found.shared.update()

            def run_original() -> Tensor:
                with self.original_code():
                    return original()

            parameters = [source for _, source, _ in leaves] if key[1] else []
            differences = measure(run_original, accelerated, parameters)
            dtype = dtype_of_products(self.model, "cpu") or self.model.dtype
            rounding = None
            if differences.exceed(dtype) and dtype == torch.bfloat16:
                rounding = rounding_differences(self.model, run_original, parameters)
            if differences.exceed(dtype, rounding) and found.share:
                found.share = False
                without_sharing = measure(run_original, accelerated, parameters)
                if not without_sharing.exceed(dtype, rounding):
                    warn_different("sharing of prefixes", differences)
                    self.report.refuse("shared prefixes", str(differences))
                differences = without_sharing
        found.shared.update()
        if differences.exceed(dtype, rounding):
            warn_different("the accelerated model", differences)
            self.report.refuse(kind, str(differences))
            self._disable(found, f"{kind}: {differences}")
        found.verified.add(key)
        has_gradient = key[1]
        if has_gradient or kind not in self.report.parts:
            because = "" if rounding is None else f"; with another rounding, {rounding}"
            self.report.accept(kind, f"compared with the model's original code: {differences}{because}")

    def _disable(self, found: PackedCopy, reason: str) -> NoReturn:
        """Do not use a copy again."""
        for key, copy in self._copies.items():
            if copy is found:
                self._copies[key] = reason
        found.shared.close()
        raise Unsupported(reason)

    @contextlib.contextmanager
    def original_code(self) -> Iterator[None]:
        """Context in which all calls run the model's original code."""
        self.paused = True
        try:
            yield
        finally:
            self.paused = False

    def close(self) -> None:
        """Release all copies."""
        while self._copies:
            self._release(self._copies.popitem()[1])
        self._casts.clear()

    @staticmethod
    def _release(found: PackedCopy | str) -> None:
        if isinstance(found, PackedCopy):
            found.shared.close()

    def _create(self, dtype: torch.dtype | None) -> PackedCopy | str:
        """Return a copy for the current state, or the reason if it cannot be created."""
        try:
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                shared = SharedCopy(self.model, dtype, self._casts)
                if dtype is None or not trains_base(shared.model):
                    return self._create_in_mode(shared, None)
                return self._create_in_mode(SharedCopy(self.model, None, self._casts), dtype)
        except NotConvertible as error:
            self.report.refuse("blocks", str(error))
            return str(error)

    def _create_in_mode(self, shared: SharedCopy, autocast_dtype: torch.dtype | None) -> PackedCopy | str:
        shared.update()
        model = shared.model
        with without_randomness(model):
            choice, share = _packing(model)
            if not choice.value:
                self.report.refuse("packed rows", choice.why)
                return choice.why
            self.report.accept("packed rows", choice.why)
            fused = fused_in_mode(model, PACKED if share else PACKED_INDEPENDENT)
            if fused.choice.value:
                self.report.accept("blocks", f"{len(fused.blocks)} blocks fused; {fused.choice.why}")
            else:
                self.report.refuse("blocks", fused.choice.why)
            shared.enter(packed_rows(model, independent=not share))
            objective = CausalObjective(model) if share and model.get_output_embeddings() is not None else None
            if objective is not None and not objective.chunked:
                self.report.refuse("output head", "the model changes the outputs of its head")
                objective = None
        return PackedCopy(shared, share, objective, autocast_dtype)


def _packing(model: PreTrainedModel) -> tuple[Choice, bool]:
    """Return whether the model can run packed rows, and True if rows can share prefixes."""
    choice = can_pack(model)
    if choice.value:
        return choice, True
    return can_pack_independent(model), False
