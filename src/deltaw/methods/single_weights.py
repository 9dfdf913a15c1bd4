"""Methods that train individual weights. Optimizer state exists only for the selected weights.

A weight matrix remains dense and in the model's precision. The optimizer trains the fp32 values at the selected int32
positions. The backward pass computes each matrix's gradient, extracts the selected entries, and frees it before the
gradient of the next matrix is computed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from deltaw.errors import UserError, did_you_mean
from deltaw.lora.adapted import factor_dtype
from deltaw.lora.kinds import get_input_embedding
from deltaw.lora.replacements import ReplacedParameter
from deltaw.methods.base import INPUT_LAYER, Names, Start, Tensors
from deltaw.methods.files import SavedConfig
from deltaw.methods.in_place import InPlace, modules_outside
from deltaw.methods.parameters import find_modules, make_trainable, names_inside, parameters_by_name
from deltaw.methods.settings import InputSettings, RandomSettings
from deltaw.runtime.image_tokens import connector_module

INDICES = ".indices"
VALUES = ".values"


@dataclass
class _TrainedPositions:
    """Trained positions of one parameter.

    Attributes:
        name: Name of the parameter.
        weight: The parameter.
        indices: (k,) int32 flat positions.
        values: (k,) trained values.
        original: (k,) values of the base model.
    """

    name: str
    weight: nn.Parameter
    indices: Tensor
    values: nn.Parameter
    original: Tensor

    @torch.no_grad()
    def write(self, values: Tensor) -> None:
        """Set weight.flatten()[indices] = values, rounded to the weight's dtype."""
        self.weight.data.view(-1).index_copy_(0, self.indices.long(), values.detach().to(self.weight.dtype))


def _positions_are_valid(weight: Tensor, indices: Tensor, values: Tensor) -> bool:
    """True if positions and values from a file are valid for a weight."""
    if indices.dim() != 1 or indices.shape != values.shape:
        return False
    return not indices.numel() or 0 <= int(indices.min()) <= int(indices.max()) < weight.numel()


class SubsetInPlace(InPlace):
    """A method that can also train individual weights of otherwise frozen parameters."""

    def __init__(self, settings: object = None) -> None:
        super().__init__(settings)
        self._trained_positions: list[_TrainedPositions] = []

    def _train_entries(self, replacement: ReplacedParameter, indices: Tensor) -> None:
        """Train the entries of the replaced parameter at ``indices``, ascending flat positions (k,)."""
        weight = replacement.current
        positions = indices.to(device=weight.device, dtype=torch.int32)
        original = weight.data.view(-1).index_select(0, positions)
        values = nn.Parameter(original.to(factor_dtype(weight), copy=True))
        self._trained_positions.append(_TrainedPositions(replacement.name, weight, positions, values, original))

        def extract_gradient(parameter: Tensor) -> None:
            grad = parameter.grad
            assert grad is not None
            parameter.grad = None
            selected = grad.reshape(-1).index_select(0, positions).to(values.dtype)
            values.grad = selected if values.grad is None else values.grad.add_(selected)

        weight.register_post_accumulate_grad_hook(extract_gradient)

    def parameters(self, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
        return [*super().parameters(model), *((entry.name + VALUES, entry.values) for entry in self._trained_positions)]

    def after_step(self, model: nn.Module) -> None:
        for entry in self._trained_positions:
            entry.write(entry.values)

    @contextlib.contextmanager
    def base_model_active(self, model: nn.Module) -> Iterator[None]:
        with super().base_model_active(model):
            for entry in self._trained_positions:
                entry.write(entry.original)
            try:
                yield
            finally:
                self.after_step(model)

    def _copy_start(self, named: Tensors, stored: Tensors, start: Start) -> None:
        positions = [name for name in named if name.endswith(INDICES)]
        if any(name in stored and not torch.equal(named[name], stored[name].to(named[name])) for name in positions):
            message = f"method '{self.name}' of this run trains other weights than the adapter"
            hint = f"use the train.seed and the '{self.name}' settings of the adapter's run"
            raise UserError(message, location=start.location, hint=hint)
        super()._copy_start(named, stored, start)

    def tensors(self) -> dict[str, Tensor]:
        tensors = super().tensors()
        for entry in self._trained_positions:
            tensors |= {entry.name + INDICES: entry.indices, entry.name + VALUES: entry.values.detach()}
        return tensors

    def restore(self, model: nn.Module, tensors: Tensors, saved: SavedConfig, location: str) -> list[ReplacedParameter]:
        model.requires_grad_(False)
        parameters = parameters_by_name(model)
        loaded = []
        for key in (k for k in tensors if k.endswith(INDICES)):
            name = key.removesuffix(INDICES)
            weight = parameters.get(name)
            indices = tensors[key]
            values = tensors.get(name + VALUES)
            if weight is None or values is None or not _positions_are_valid(weight, indices, values):
                message = f"the adapter trains weights of '{name}' that the model does not have"
                raise UserError(message, location=location, hint="load it onto the base model that it was trained on")
            indices = indices.to(device=weight.device, dtype=torch.int32)
            original = weight.data.view(-1).index_select(0, indices)
            trained = nn.Parameter(values.to(device=weight.device), requires_grad=False)
            loaded.append(_TrainedPositions(name, weight, indices, trained, original))
        self._trained_positions = loaded
        self.after_step(model)
        remaining = {k: t for k, t in tensors.items() if not k.endswith((INDICES, VALUES))}
        return super().restore(model, remaining, saved, location)


class Random(SubsetInPlace):
    """Train a random subset of ``random.weights`` of the model's weights, spread evenly over all parameters.

    Gradients, optimizer state and the saved file contain only the selected weights.
    """

    name = "random"
    section = RandomSettings
    default_learning_rate = 5e-4
    settings: RandomSettings

    def parameter_names(self, model: nn.Module, extra_modules: Names) -> list[str]:
        return modules_outside(extra_modules, model)

    def enable_training(self, model: nn.Module, extra_modules: Names, seed: int) -> list[ReplacedParameter]:
        extra = names_inside(extra_modules, parameters_by_name(model))
        replacements = make_trainable(model, [*self.parameter_names(model, extra_modules), *extra])
        selected = [replacement for replacement in replacements if replacement.name not in extra]
        counts = self._counts([replacement.current.numel() for replacement in selected])
        rng = np.random.default_rng([seed, 3])
        for replacement, count in zip(selected, counts, strict=True):
            if count:
                indices = rng.choice(replacement.current.numel(), size=count, replace=False, shuffle=False)
                self._train_entries(replacement, torch.from_numpy(np.sort(indices).astype(np.int32)))
            else:
                replacement.current.requires_grad_(False)
        return [replacement for replacement in replacements if replacement.name in extra]

    def summary(self, model: nn.Module, total: int, extra_modules: Names) -> str:
        count = sum(entry.indices.numel() for entry in self._trained_positions)
        extra = sum(replacement.current.numel() for replacement in self._replacements)
        text = f"random: {count:,} of {total:,} weights trained ({count / total:.2%})"
        return text + (f", and {extra:,} of {', '.join(extra_modules)}" if extra else "")

    def _counts(self, sizes: list[int]) -> list[int]:
        """Return the number of weights to train per parameter: proportional to its size, with the exact total."""
        total = sum(sizes)
        num_weights = round(self.settings.weights * total) if self.settings.weights < 1 else int(self.settings.weights)
        if not 1 <= num_weights <= total:
            message = f"random.weights requests {num_weights:,} weights, but the model has {total:,}"
            raise UserError(message, location="random.weights", hint="use a share below 1, or a smaller number")
        bounds = [num_weights * end // total for end in np.cumsum(np.asarray(sizes, dtype=object))]
        return [int(end - start) for start, end in zip([0, *bounds[:-1]], bounds, strict=True)]


class Input(SubsetInPlace):
    """Train ``input.modules``, by default the input layer, or only the rows of ``input.tokens`` in it.

    The gradient passes through the entire network, so every block stores its activations. Gradients and optimizer state
    of the blocks' weights are not needed.
    """

    name = "input"
    section = InputSettings
    default_learning_rate = 5e-4
    settings: InputSettings

    @property
    def trained_modules(self) -> Sequence[str]:
        return self.settings.modules or ([] if self.settings.tokens else [INPUT_LAYER])

    def parameter_names(self, model: nn.Module, extra_modules: Names) -> list[str]:
        if self.settings.tokens:
            return []
        modules = find_modules(model, self.settings.modules, "input.modules") if self.settings.modules else None
        layer = connector_module(model) or _embedding_name(model)
        return names_inside(modules or [layer], parameters_by_name(model))

    def enable_training(self, model: nn.Module, extra_modules: Names, seed: int) -> list[ReplacedParameter]:
        if not self.settings.tokens:
            return super().enable_training(model, extra_modules, seed)
        rows = torch.tensor(sorted({self._token_id(token) for token in self.settings.tokens}), dtype=torch.int32)
        name = f"{_embedding_name(model)}.weight"
        # The rows are trained in the embedding. A tied output layer is unchanged.
        replacements = make_trainable(model, [name, *names_inside(extra_modules, parameters_by_name(model))])
        embedding = next(replacement for replacement in replacements if replacement.name == name)
        width = embedding.current.shape[1]
        self._train_entries(embedding, (rows[:, None] * width + torch.arange(width)).flatten())
        return [replacement for replacement in replacements if replacement is not embedding]

    def summary(self, model: nn.Module, total: int, extra_modules: Names) -> str:
        if not self.settings.tokens:
            return super().summary(model, total, extra_modules)
        count = len(set(self.settings.tokens))
        trained = sum(p.numel() for _, p in self.parameters(model))
        return f"input: the embeddings of {count} token{'s' if count != 1 else ''} trained, {trained:,} parameters"

    def _token_id(self, token: str) -> int:
        vocabulary = self.tokenizer.get_vocab() if self.tokenizer is not None else {}
        if token not in vocabulary:
            suggestion = did_you_mean(token, list(vocabulary)[-2000:])
            hint = f"{suggestion}; add new tokens to the tokenizer and the embedding first"
            raise UserError(f"'{token}' is not in the model's vocabulary", location="input.tokens", hint=hint)
        return int(vocabulary[token])

    def restore(self, model: nn.Module, tensors: Tensors, saved: SavedConfig, location: str) -> list[ReplacedParameter]:
        names = {key.removesuffix(INDICES) for key in tensors if key.endswith(INDICES)}
        # As in training, a tied embedding is copied first.
        make_trainable(model, [name for name in parameters_by_name(model) if name in names])
        return super().restore(model, tensors, saved, location)


def _embedding_name(model: nn.Module) -> str:
    """Return the name of the module that embeds tokens.

    Raises:
        UserError: if the model does not define its input layer.
    """
    layer = get_input_embedding(model)
    for name, module in model.named_modules():
        if module is layer and name:
            return str(name)
    message = f"a {type(model).__name__} does not define its input layer"
    raise UserError(message, location="input.modules", hint="name the modules to train")
