"""``deltaw.accelerate`` and ``deltaw.restore``: one line in a script with transformers, PEFT, TRL or
sentence-transformers.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, Trainer

from deltaw.acceleration.accelerated_model import SWITCH, AcceleratedModel, Unsupported
from deltaw.acceleration.generation import GenerateMethod
from deltaw.acceleration.model_calls import BackboneForward, CausalForward
from deltaw.acceleration.padding import PaddingUse
from deltaw.acceleration.quantization import calibration_rows, is_quantized, quantize_frozen
from deltaw.acceleration.replaced_method import ReplacedMethod
from deltaw.acceleration.report import Report
from deltaw.errors import UserError
from deltaw.runtime.packed import backbone_of

# Libraries whose trainers read outputs only at tokens, not at padding.
SUPPORTED_LIBRARIES = frozenset({"transformers", "trl", "sentence_transformers"})


class Acceleration:
    """Replaced methods of a model.

    Args:
        model: The model.
        logits: False if the caller does not read the logits of training calls with labels.
        tokenizer: Tokenizer of a model that generates completions for a trainer, or None.
        padding: What is known about the caller's use of outputs at padding.
    """

    def __init__(
        self, model: PreTrainedModel, *, logits: bool, tokenizer: PreTrainedTokenizerBase | None, padding: PaddingUse
    ) -> None:
        self.report = Report()
        self.accelerated = AcceleratedModel(model, self.report, padding)
        self.methods: list[ReplacedMethod] = [BackboneForward(backbone_of(model), self.accelerated)]
        if model.base_model is not model and model.get_output_embeddings() is not None:
            self.methods.append(CausalForward(model, self.accelerated, needs_logits=logits))
        if tokenizer is not None:
            self.methods.append(GenerateMethod(model, self.accelerated, tokenizer))
        for method in self.methods:
            method.owner = self
            method.install()

    def close(self) -> None:
        """Use the original methods."""
        for method in reversed(self.methods):
            method.remove()
        self.accelerated.close()


def accelerate(
    target: nn.Module | Trainer,
    *,
    precision: str | None = None,
    rows: Iterable[Any] = (),
    logits: bool = True,
    padding: bool = True,
) -> Report:
    """Accelerate training on a CPU in a script for another library.

    Recognized blocks run fused, rows run without padding, and prefixes that rows of a batch share are computed once.
    Parameters, names, hooks and files of the model are unchanged. The first batch is compared with the model's
    original code, which runs if they differ. ``DELTAW_ACCELERATE=0`` in the environment disables everything.

    Args:
        target: A model of transformers, plain, with PEFT's or deltaw's adapters, or inside another module; or a trainer
            of transformers, TRL or sentence-transformers.
        precision: ``int8`` or ``nf4`` to quantize the frozen linear layers of the blocks in place. :func:`restore` does
            not undo this.
        rows: Lists of token ids, with which int8 is calibrated. A trainer's first rows by default.
        logits: False if your loop reads only ``loss`` of a call with labels. Then ``logits`` is None while
            training, and the output head is computed only at labels. Trainers set it themselves.
        padding: False if your code never reads outputs at padding. Then they are zero in evaluation as well. By
            default, calls without gradient run the model's original code if rows are padded, and the first backward
            pass shows whether a loss depends on them. Trainers set it themselves.

    Returns:
        A report, which can be printed. As a context manager, it restores the model at the end.

    Raises:
        UserError: if the target contains no model of transformers, or if its weights cannot be quantized.
    """
    if not isinstance(target, nn.Module | Trainer):
        raise UserError(f"a {type(target).__name__} is neither a model nor a trainer of transformers")
    if os.environ.get(SWITCH) == "0":
        report = Report()
        report.refuse("everything", f"{SWITCH}=0")
        return report
    if isinstance(target, nn.Module):
        use = PaddingUse() if padding else PaddingUse(is_read=False, same_in_evaluation=True)
        return _accelerate_model(target, precision, rows, logits=logits, tokenizer=None, padding=use)
    if (unknown := _unknown_loss(target)) is not None:
        report = Report()
        report.refuse("trainer", f"{unknown} is not supported; deltaw.accelerate(trainer.model) accelerates its model")
        return report
    models = [model for name in ("model", "ref_model") if isinstance(model := getattr(target, name, None), nn.Module)]
    with torch.autocast("cpu", torch.bfloat16, enabled=bool(getattr(target.args, "bf16", False))):
        calibration = list(rows) or calibration_rows(getattr(target, "train_dataset", None))
        reports = []
        logits = _reads_logits(target)
        use = PaddingUse(same_in_evaluation=True)
        for model in models:
            tokenizer = _tokenizer_of_generation(target) if model is target.model else None
            reports.append(
                _accelerate_model(model, precision, calibration, logits=logits, tokenizer=tokenizer, padding=use)
            )
    report = reports[0]
    report.restore = lambda: restore(target)
    return report


def restore(target: nn.Module | Trainer) -> None:
    """Undo :func:`accelerate`. A model that is not accelerated is unchanged."""
    models = [target] if isinstance(target, nn.Module) else [target.model, getattr(target, "ref_model", None)]
    for model in models:
        acceleration = None if model is None else _acceleration_of(find_model(model))
        if acceleration is not None:
            acceleration.close()


def _acceleration_of(model: PreTrainedModel) -> Acceleration | None:
    """Return the acceleration of a model, which its replaced method refers to, or None."""
    method = vars(backbone_of(model)).get("forward")
    owner = method.owner if isinstance(method, ReplacedMethod) else None
    return owner if isinstance(owner, Acceleration) else None


def find_model(module: nn.Module) -> PreTrainedModel:
    """Return the outermost model of transformers in a module.

    Raises:
        UserError: if the module contains no such model.
    """
    for inner in module.modules():
        if isinstance(inner, PreTrainedModel):
            return inner
    raise UserError(f"a {type(module).__name__} contains no model of transformers")


def _accelerate_model(
    module: nn.Module,
    precision: str | None,
    rows: Iterable[Any],
    *,
    logits: bool,
    tokenizer: PreTrainedTokenizerBase | None,
    padding: PaddingUse,
) -> Report:
    model = find_model(module)
    restore(model)
    quantized = None if precision is None or is_quantized(model) else quantize_frozen(model, precision, rows)
    acceleration = Acceleration(model, logits=logits, tokenizer=tokenizer, padding=padding)
    if quantized is not None:
        acceleration.report.accept("weights", f"{precision}: {quantized}")
    acceleration.report.restore = lambda: restore(model)
    with contextlib.suppress(Unsupported):  # the report contains the reason
        acceleration.accelerated.current_copy()
    return acceleration.report


def _tokenizer_of_generation(trainer: Trainer) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer of a trainer that generates completions, or None."""
    tokenizer = getattr(trainer, "processing_class", None)
    generates = isinstance(getattr(trainer, "generation_config", None), GenerationConfig)
    return tokenizer if generates and isinstance(tokenizer, PreTrainedTokenizerBase) else None


def _unknown_loss(trainer: Trainer) -> str | None:
    """Return the name of a loss that may read outputs at padding, which are zero in an accelerated model, or None."""
    for name in ("compute_loss", "_compute_loss", "training_step"):
        function = vars(trainer).get(name, getattr(type(trainer), name, None))
        if function is not None and not _is_of_library(function):
            return f"{type(trainer).__name__}.{name}"
    loss = getattr(trainer, "loss", None)  # of sentence-transformers
    for module in loss.values() if isinstance(loss, dict) else [loss]:
        if isinstance(module, nn.Module) and not _is_of_library(type(module)):
            return f"the loss {type(module).__name__}"
    # TRL 1.0 sets a string, which makes transformers skip its scaling of the loss.
    return "compute_loss_func" if callable(getattr(trainer, "compute_loss_func", None)) else None


def _is_of_library(function_or_class: Any) -> bool:
    return str(function_or_class.__module__).partition(".")[0] in SUPPORTED_LIBRARIES


def _reads_logits(trainer: Trainer) -> bool:
    """Return True unless a trainer reads only the loss of calls with labels."""
    is_overridden = type(trainer).compute_loss is not Trainer.compute_loss
    return is_overridden or getattr(trainer, "label_smoother", None) is not None
