"""Forward methods that run packed rows on a shared copy: of a backbone, and of a language model at its labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from deltaw.acceleration import trl_head
from deltaw.acceleration.accelerated_model import AcceleratedModel, PackedCopy, PaddingRead, Unsupported
from deltaw.acceleration.bridge import run_bridged
from deltaw.acceleration.call_arguments import MissingCache, returns_cache, row_inputs
from deltaw.acceleration.padding import OriginalOutputs, check_padding_is_unread, with_original_padding
from deltaw.acceleration.replaced_method import ReplacedMethod
from deltaw.acceleration.rows import NotPackable, PackedCall, PositionRules, pack_call
from deltaw.acceleration.verification import sample_of
from deltaw.runtime.packed import backbone_of, without_cache

IGNORED_LABEL = -100
# Names of the cache in outputs, by versions of transformers.
_CACHE_FIELDS = ("cache", "past_key_values")


class BackboneForward(ReplacedMethod):
    """Forward of a backbone, with the same arguments and the outputs of each token in the shape of the call."""

    def __init__(self, backbone: PreTrainedModel, accelerated: AcceleratedModel) -> None:
        super().__init__(backbone)
        self.accelerated = accelerated
        self._is_whole_model = backbone is accelerated.model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.accelerated.paused:
            return self.original(*args, **kwargs)
        try:
            arguments = self.arguments(args, kwargs)
            inputs = row_inputs(self.module, arguments)
            if returns_cache(self.module, arguments) and not (torch.is_grad_enabled() or self.module.training):
                raise Unsupported("calls that return keys and values")
            found = self.accelerated.current_copy()
            self._check_use_of_padding(self._pack(found, inputs), inputs)
            self._verify(found, inputs)
            call = self._pack(found, inputs)
        except (Unsupported, NotPackable, TypeError) as error:
            self.accelerated.fall_back(str(error))
            return self.original(*args, **kwargs)
        output, hidden = self._run(found, call)
        if call.has_padding:
            hidden = self._complete(found, call, hidden, inputs)
        return self._result(output, hidden, with_cache=returns_cache(self.module, arguments))

    def _pack(self, found: PackedCopy, inputs: Mapping[str, Any]) -> PackedCall:
        return pack_call(self.accelerated.positions, inputs, share=found.share)

    def _run(self, found: PackedCopy, call: PackedCall) -> tuple[Any, Tensor]:
        """Return the output of the copy, and the last hidden states in the shape of the call, with zeros at padding."""
        backbone = self._part_of(found)
        outputs: list[Any] = []

        def run() -> Tensor:
            with found.autocast():
                outputs.append(backbone(**call.batch.inputs, **without_cache(backbone)))
            hidden: Tensor = outputs[0].last_hidden_state
            return hidden

        hidden = call.unpack(run_bridged(run, found.shared.leaves(backbone)))
        return outputs[0], hidden.to(self._dtype_of_outputs(hidden))

    def _part_of(self, found: PackedCopy) -> PreTrainedModel:
        """Return the backbone of a copy."""
        return found.shared.model if self._is_whole_model else backbone_of(found.shared.model)

    def _verify(self, found: PackedCopy, inputs: Mapping[str, Any]) -> None:
        sample = sample_of(inputs)
        padding = self._pack(found, sample).padding()[..., None]

        def original() -> Tensor:
            return self._original_hidden(sample).masked_fill(padding, 0.0)

        def accelerated() -> Tensor:
            return self._run(found, self._pack(found, sample))[1]

        self.accelerated.verify("backbone", found, original, accelerated)

    def _original_hidden(self, inputs: Mapping[str, Any]) -> Tensor:
        hidden: Tensor = self.original(**inputs, **without_cache(self.module)).last_hidden_state
        return hidden

    def _check_use_of_padding(self, call: PackedCall, inputs: Mapping[str, Any]) -> None:
        """Check that the script does not read outputs at padding, or that a backward pass will show it.

        Raises:
            Unsupported: if it may read them.
        """
        if not call.has_padding:
            return
        use = self.accelerated.padding
        if use.is_read:
            raise Unsupported("the loss depends on outputs at padding")
        is_trained = any(p.requires_grad for p in self.accelerated.model.parameters())
        # The forward pass of reentrant checkpointing is a training call without gradient.
        is_trained = is_trained and (torch.is_grad_enabled() or self.module.training)
        is_unread = use.is_read is False and use.same_in_evaluation
        if not is_trained and not is_unread and not self._returns_one_per_row(call, inputs):
            raise Unsupported("a call without gradient, whose outputs at padding may be read")

    def _returns_one_per_row(self, call: PackedCall, inputs: Mapping[str, Any]) -> bool:
        """True if the model has a head that reads one token of each row."""
        model = self.accelerated.model
        name = f"{type(model).__module__}.{type(model).__name__}"
        if not (name.startswith("transformers.") and name.endswith("ForSequenceClassification")):
            return False
        padding = call.padding()
        is_pad_token = inputs["input_ids"][padding] == model.config.get_text_config().pad_token_id
        return not bool(padding[:, 0].any()) and bool(torch.as_tensor(is_pad_token).all())

    def _complete(self, found: PackedCopy, call: PackedCall, hidden: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Return hidden states with values at padding as long as it is unknown whether the loss depends on them."""
        use = self.accelerated.padding
        is_evaluation = not (torch.is_grad_enabled() or self.module.training)
        if is_evaluation or use.is_read is False:
            check_padding_is_unread(hidden, call.padding())
            return hidden

        def run_original() -> Tensor:
            with self.accelerated.original_code():
                return self._original_hidden(inputs)

        parameters = [source for _, source, _ in found.shared.leaves(self._part_of(found))]
        return with_original_padding(hidden, call.padding(), OriginalOutputs(run_original), use, parameters)

    def _result(self, output: Any, hidden: Tensor, *, with_cache: bool) -> Any:
        fields: dict[str, Any] = dict.fromkeys(output)
        fields["last_hidden_state"] = hidden
        pooler = getattr(self.module, "pooler", None)
        if "pooler_output" in fields and pooler is not None:
            fields["pooler_output"] = pooler(hidden)
        names = {field.name for field in dataclasses.fields(output)}
        if with_cache:
            fields.update({name: MissingCache() for name in _CACHE_FIELDS if name in names})
        return type(output)(**fields)

    @staticmethod
    def _dtype_of_outputs(hidden: Tensor) -> torch.dtype:
        return torch.float32 if torch.is_autocast_enabled("cpu") else hidden.dtype


def _entropy(logits: Tensor, targets: Tensor) -> Tensor:
    log_probs = logits.log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1)


# Functions of logits (n, classes) and targets (n,) that return (n,).
STATISTICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "entropy": _entropy,
    "is_top1": lambda logits, targets: logits.argmax(-1) == targets,
    "mean_logits": lambda logits, targets: logits.mean(-1),
}


class LabelLogProbs:
    """Log-probabilities of the labels of a call.

    Args:
        found: Copy with an objective.
        call: Packed rows.
        targets: (rows, columns) label that the token in each cell predicts, or -100.
    """

    def __init__(self, found: PackedCopy, call: PackedCall, targets: np.ndarray) -> None:
        assert found.objective is not None
        self.objective = found.objective
        self.shared = found.shared
        self.autocast = found.autocast
        self.shape = targets.shape
        cells = np.flatnonzero(targets.ravel() != IGNORED_LABEL)
        indices = call.index_of_cells().ravel()[cells]
        if not len(cells):
            raise Unsupported("batches without labels")
        if (indices < 0).any():
            raise PaddingRead("labels at padding")
        pairs = np.stack([indices, targets.ravel()[cells]])
        (predictors, labels), inverse = np.unique(pairs, axis=1, return_inverse=True)
        self.cells = torch.from_numpy(cells)
        self.inverse = torch.from_numpy(inverse.reshape(-1))
        self.batch = dataclasses.replace(
            call.batch,
            targets=torch.from_numpy(labels),
            predictors=torch.from_numpy(predictors),
            weights=torch.ones(len(labels)),
            predictor_indices=torch.from_numpy(np.unique(predictors)),
        )

    def log_probs(self, temperature: float = 1.0, statistics: Sequence[str] = ()) -> tuple[Tensor, dict[str, Tensor]]:
        """Return log-probabilities (n,) of the labels, by cell, and statistics (n,) of their predictions.

        Args:
            temperature: Divisor of the logits.
            statistics: Names in :data:`STATISTICS`.
        """
        computed: dict[str, Tensor] = {}

        def run() -> Tensor:
            with self.autocast():
                outputs = self.objective.label_outputs(self.batch)
                if temperature != 1.0:
                    outputs = outputs / temperature
                if statistics:
                    computed.update(self._statistics(outputs, statistics))
                return self.objective.log_probs_of(outputs, self.batch.targets)

        values = run_bridged(run, self.shared.leaves(self.shared.model))
        by_cell = {name: numbers.index_select(0, self.inverse) for name, numbers in computed.items()}
        return values.index_select(0, self.inverse), by_cell

    @torch.no_grad()
    def _statistics(self, outputs: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        chunks: dict[str, list[Tensor]] = {name: [] for name in names}
        size = self.objective.chunk
        for rows, targets in zip(outputs.split(size), self.batch.targets.split(size), strict=True):
            logits = self.objective.logits_of(rows).float()
            for name in names:
                chunks[name].append(STATISTICS[name](logits, targets))
        return {name: torch.cat(parts) for name, parts in chunks.items()}

    def in_cells(self, values: Tensor) -> Tensor:
        """Return values (n,) of the labels in the shape of the call, with zeros elsewhere."""
        rows, columns = self.shape
        return values.new_zeros(rows * columns).index_copy(0, self.cells, values).view(rows, columns)


class CausalForward(ReplacedMethod):
    """Forward of a language model that computes only the loss for calls with labels.

    Attributes:
        needs_logits: True if the caller reads the logits of calls with labels. Then the model computes them.
    """

    def __init__(self, model: PreTrainedModel, accelerated: AcceleratedModel, *, needs_logits: bool) -> None:
        super().__init__(model)
        self.accelerated = accelerated
        self.needs_logits = needs_logits

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("labels") is None or args or self.accelerated.paused:
            return self.original(*args, **kwargs)
        try:
            _check_labels(kwargs["labels"], kwargs.get("attention_mask"))
            if kwargs.get(trl_head.FLAG):
                return self._run_trl_head(kwargs)
            if self.needs_logits or not self.module.training:
                return self.original(*args, **kwargs)
            return CausalLMOutputWithPast(loss=self._loss(kwargs))
        except PaddingRead as error:
            self.accelerated.fall_back(str(error))
            with self.accelerated.original_code():
                return self.original(*args, **kwargs)
        except (Unsupported, NotPackable) as error:
            self.accelerated.fall_back(str(error))
            return self.original(*args, **kwargs)

    def _run_trl_head(self, arguments: dict[str, Any]) -> Any:
        """Return the result of TRL's head."""
        head = trl_head.find_head(self.original)
        if head is None or arguments.get("shift_labels") is not None:
            raise Unsupported("an unknown output head of TRL")
        text_config = self.module.config.get_text_config()
        if head.temperature != 1.0 and getattr(text_config, "final_logit_softcapping", None):
            raise Unsupported("a temperature with a soft cap")
        inputs = row_inputs(self.module, arguments, trl_head.CALL_ARGUMENTS)
        self._check_router()
        labels = arguments["labels"]
        label_values = self._find_labels(inputs, labels, head.temperature)
        statistics = [name for name in head.fields if name != "log_probs"]
        log_probs, measured = label_values.log_probs(head.temperature, statistics)
        fields = {name: label_values.in_cells(values)[:, :-1] for name, values in measured.items()}
        if "entropy" in fields:
            fields["entropy"] = _WithoutGradient.apply(fields["entropy"], log_probs)
        fields["log_probs"] = label_values.in_cells(log_probs)[:, :-1]
        mask = labels[:, 1:] != IGNORED_LABEL
        count = arguments.get("num_items_in_batch")
        loss = -fields["log_probs"].sum() / (mask.sum().clamp(min=1) if count is None else count)
        return head.output_class(loss=loss, label_mask=mask, **fields)

    def _find_labels(self, inputs: dict[str, Any], labels: Tensor, temperature: float = 1.0) -> LabelLogProbs:
        """Return the labels of a call, after a comparison with the model's original code for the first call.

        Raises:
            Unsupported, NotPackable: if the model has to run its original code.
        """
        found = self.accelerated.current_copy()
        sample = sample_of({**inputs, "labels": labels})
        targets = next_tokens(sample.pop("labels"))

        def accelerated() -> Tensor:
            return find_labels(found, self.accelerated.positions, sample, targets).log_probs(temperature)[0]

        def original() -> Tensor:
            logits = self.original(**sample, **without_cache(self.module)).logits.flatten(0, 1)
            flat = torch.from_numpy(targets.ravel())
            cells = (flat != IGNORED_LABEL).nonzero()[:, 0]
            log_probs = (logits.index_select(0, cells).float() / temperature).log_softmax(-1)
            return log_probs.gather(1, flat[cells, None])[:, 0]

        self.accelerated.verify("loss of labels", found, original, accelerated)
        return find_labels(found, self.accelerated.positions, inputs, next_tokens(labels))

    def _check_router(self) -> None:
        if getattr(self.module.config.get_text_config(), "output_router_logits", False):
            raise Unsupported("a loss of routed experts")

    def _loss(self, arguments: dict[str, Any]) -> Tensor:
        inputs = row_inputs(self.module, arguments, frozenset({"labels", "num_items_in_batch"}))
        labels = arguments["labels"]
        if getattr(self.module.loss_function, "__name__", "") != "ForCausalLMLoss":
            raise Unsupported("a loss function of the model")
        self._check_router()
        label_values = self._find_labels(inputs, labels)
        total = -label_values.log_probs()[0].sum()
        count = arguments.get("num_items_in_batch")
        return total / (len(label_values.cells) if count is None else count)


class _WithoutGradient(torch.autograd.Function):
    """Values whose gradient is not computed. A loss that needs it fails instead of training without it."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, connected: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        raise RuntimeError("deltaw.accelerate computes no gradient of the entropy; call deltaw.restore before training")


def _check_labels(labels: Any, mask: Any) -> None:
    """Check that no label is predicted at padding.

    Raises:
        PaddingRead: if one is.
    """
    if not isinstance(labels, Tensor) or not isinstance(mask, Tensor) or mask.shape != labels.shape:
        return
    if bool(((labels[:, 1:] != IGNORED_LABEL) & (mask[:, :-1] == 0)).any()):
        raise PaddingRead("labels at padding")


def next_tokens(labels: Tensor) -> np.ndarray:
    """Return the labels (rows, columns) moved to the tokens that predict them."""
    targets = np.full(tuple(labels.shape), IGNORED_LABEL)
    targets[:, :-1] = labels[:, 1:].numpy()
    return targets


def find_labels(
    found: PackedCopy, positions: PositionRules, inputs: Mapping[str, Any], targets: np.ndarray
) -> LabelLogProbs:
    """Return the labels of a call on a shared copy.

    Raises:
        Unsupported, NotPackable: if the model has to run its original code.
    """
    if found.objective is None:
        raise Unsupported("an unknown output head")
    call = pack_call(positions, inputs, share=found.share)
    return LabelLogProbs(found, call, targets)
