"""Methods that train some of the model's own parameters in place.

They share freezing, untying, saving, loading and putting back. Each of them only says which parameters it
trains.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from deltaw.errors import UserError, did_you_mean
from deltaw.lora.adapted import factor_dtype
from deltaw.lora.fingerprint import FINGERPRINT_KEY, base_fingerprint, warn_of_base
from deltaw.lora.kinds import is_linear, own_embedding, own_head
from deltaw.lora.places import ParameterPlace
from deltaw.lora.stored import count_numbers
from deltaw.methods.base import REPLACED_KEY, Calibration, Folder, Metadata, Method
from deltaw.methods.files import Saved, metadata_of, read_trained, write_trained
from deltaw.methods.parameters import (
    add_biases,
    as_base,
    inside,
    keep_base,
    modules_named,
    names_of,
    put_loaded,
    train_places,
)
from deltaw.methods.settings import HeadSettings, InputSettings, LastSettings, RandomSettings
from deltaw.runtime.recognition import blocks_of


def _outside(modules: Sequence[str], model: nn.Module) -> list[str]:
    """Names of the parameters that are not inside one of the modules."""
    names = names_of(model)
    within = set(inside(modules, names))
    return [name for name in names if name not in within]


class InPlace(Method):
    """The common part; a subclass has a name, a usual rate, and :meth:`chosen`."""

    name = ""
    usual_rate = 1e-4

    def __init__(self, settings: object = None) -> None:
        super().__init__(settings)
        self._places: list[ParameterPlace] = []
        self._base_fingerprint: str | None = None
        self._replaced: list[str] = []

    def chosen(self, model: nn.Module, extra_modules: Sequence[str]) -> list[str]:
        """Names of the parameters that are trained, without those of the extra trainable modules."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it trains")

    def prepare(
        self, model: nn.Module, *, seed: int, extra_modules: Sequence[str] = (), calibrate: Calibration | None = None
    ) -> str:
        total, own = count_numbers(model), names_of(model)
        # Before anything is trained.
        self._replaced = inside(extra_modules, own)
        self._base_fingerprint = base_fingerprint(model, [own[name] for name in self._replaced])
        self._places = self.start(model, extra_modules, seed)
        if not self.parameters(model):
            what = f"method '{self.name}' finds nothing to train in a {type(model).__name__}"
            raise UserError(what, where="method", hint="choose another method")
        return self.summary(model, total, extra_modules)

    def start(self, model: nn.Module, extra_modules: Sequence[str], seed: int) -> list[ParameterPlace]:
        """Freeze the model and make what is trained trainable; returns the parameters trained whole."""
        names = [*self.chosen(model, extra_modules), *inside(extra_modules, names_of(model))]
        return train_places(model, names)

    def summary(self, model: nn.Module, total: int, extra_modules: Sequence[str]) -> str:
        """What is trained, and its share of the model's ``total`` parameters."""
        trained = sum(p.numel() for _, p in self.parameters(model))
        names = [place.name for place in self._places]
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        lines = [f"{self.name}: {trained:,} of {total:,} parameters trained ({trained / total:.2%}): {shown}"]
        tied = [p.name for p in self._places if p.current is not p.original and p.original is not None]
        lines += [f"  note: '{name}' was tied; its copy is trained, the other weight stays as it is" for name in tied]
        return "\n".join(lines)

    def keeps_base(self, model: nn.Module) -> bool:
        return keep_base(self._places)

    def without(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        return as_base(model, self._places, self.name)

    def parameters(self, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
        return [(place.name, place.current) for place in self._places]

    def save(self, model: nn.Module, folder: Folder, *, base_model: str, metadata: Metadata | None = None) -> None:
        kept = dict(metadata or {})
        if self._base_fingerprint is not None:
            kept |= {FINGERPRINT_KEY: self._base_fingerprint, REPLACED_KEY: json.dumps(self._replaced)}
        settings = {} if self.settings is None else dataclasses.asdict(self.settings)
        tied = {p.name: list(p.names[1:]) for p in self._places if len(p.names) > 1}
        write_trained(Path(folder), Saved(self.name, base_model, settings, tied), self.tensors(), kept)

    def tensors(self) -> dict[str, Tensor]:
        """The content of the weights file, by name."""
        return {place.name: place.current.detach() for place in self._places}

    def load(self, model: nn.Module, folder: Folder) -> str:
        tensors, saved = read_trained(Path(folder), self.name)
        metadata = metadata_of(Path(folder))
        own = names_of(model)
        replaced = [own[name] for name in json.loads(metadata.get(REPLACED_KEY, "[]")) if name in own]
        warn_of_base("the adapter", metadata, base_fingerprint(model, replaced), folder, saved.base_model)
        self._places = self.put(model, tensors, saved, str(folder))
        return f"{sum(t.numel() for t in tensors.values()):,} parameters of '{self.name}' from {folder}"

    def put(self, model: nn.Module, tensors: Mapping[str, Tensor], saved: Saved, where: str) -> list[ParameterPlace]:
        """Put the file's tensors into the model, frozen."""
        model.requires_grad_(False)
        return put_loaded(model, tensors, saved.tied, where)


# Single weights of the model's parameters, trained: optimizer state exists for the chosen ones alone.
#
# A weight matrix stays dense and in the model's precision. The optimizer trains the values (fp32) at the chosen
# positions (int32). The backward pass computes each matrix's gradient, takes the chosen entries out of it, and
# frees it before it computes the next one.


INDICES, VALUES = ".indices", ".values"


@dataclass
class _Part:
    """Chosen positions of one parameter, their trained values, and the values there before."""

    name: str
    weight: nn.Parameter
    indices: Tensor
    values: nn.Parameter
    before: Tensor

    @torch.no_grad()
    def write(self, values: Tensor) -> None:
        """weight.flatten()[indices] = values, rounded to the weight's dtype."""
        rounded = values.detach().to(self.weight.dtype)
        self.weight.data.view(-1).index_copy_(0, self.indices.long(), rounded)


def _fit(weight: Tensor, indices: Tensor, values: Tensor) -> bool:
    """Whether a file's positions, and the values there, are those of a weight."""
    if indices.dim() != 1 or indices.shape != values.shape:
        return False
    return not indices.numel() or 0 <= int(indices.min()) <= int(indices.max()) < weight.numel()


class SubsetInPlace(InPlace):
    """A method that also trains single weights of parameters that otherwise stay frozen; none at first."""

    def __init__(self, settings: object = None) -> None:
        super().__init__(settings)
        self._parts: list[_Part] = []

    def _train_entries(self, place: ParameterPlace, indices: Tensor) -> None:
        """Train the entries of ``place``'s parameter at ``indices``, ascending flat positions (k,)."""
        weight = place.current
        at = indices.to(device=weight.device, dtype=torch.int32)
        before = weight.data.view(-1).index_select(0, at)
        values = nn.Parameter(before.to(factor_dtype(weight), copy=True))
        self._parts.append(_Part(place.name, weight, at, values, before))

        def take(parameter: Tensor) -> None:
            grad = parameter.grad
            assert grad is not None
            parameter.grad = None
            chosen = grad.reshape(-1).index_select(0, at).to(values.dtype)
            values.grad = chosen if values.grad is None else values.grad.add_(chosen)

        weight.register_post_accumulate_grad_hook(take)

    def parameters(self, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
        return [*super().parameters(model), *((part.name + VALUES, part.values) for part in self._parts)]

    def after_step(self, model: nn.Module) -> None:
        for part in self._parts:
            part.write(part.values)

    @contextlib.contextmanager
    def without(self, model: nn.Module) -> Iterator[None]:
        with super().without(model):
            for part in self._parts:
                part.write(part.before)
            try:
                yield
            finally:
                self.after_step(model)

    def tensors(self) -> dict[str, Tensor]:
        kept = super().tensors()
        for part in self._parts:
            kept |= {part.name + INDICES: part.indices, part.name + VALUES: part.values.detach()}
        return kept

    def put(self, model: nn.Module, tensors: Mapping[str, Tensor], saved: Saved, where: str) -> list[ParameterPlace]:
        model.requires_grad_(False)
        parameters = names_of(model)
        parts = []
        for key in (k for k in tensors if k.endswith(INDICES)):
            name = key.removesuffix(INDICES)
            weight, indices, values = parameters.get(name), tensors[key], tensors.get(name + VALUES)
            if weight is None or values is None or not _fit(weight, indices, values):
                what = f"the adapter trains weights of '{name}' that the model does not have"
                raise UserError(what, where=where, hint="load it onto the base model that it was trained on")
            indices = indices.to(device=weight.device, dtype=torch.int32)
            before = weight.data.view(-1).index_select(0, indices)
            trained = nn.Parameter(values.to(device=weight.device), requires_grad=False)
            parts.append(_Part(name, weight, indices, trained, before))
        self._parts = parts
        self.after_step(model)
        others = {k: t for k, t in tensors.items() if not k.endswith((INDICES, VALUES))}
        return super().put(model, others, saved, where)


# Train the biases alone (BitFit, arXiv 2106.10199).
#
# Newer models have none. There, each linear layer but the head gets a bias of zeros first, which changes
# nothing until it is trained.


class Bias(InPlace):
    """Train every parameter named ``bias``."""

    name = "bias"
    usual_rate = 5e-4
    _added = 0

    def chosen(self, model: nn.Module, extra_modules: Sequence[str]) -> list[str]:
        return [name for name in _outside(extra_modules, model) if name.rpartition(".")[2] == "bias"]

    def start(self, model: nn.Module, extra_modules: Sequence[str], seed: int) -> list[ParameterPlace]:
        if self.chosen(model, extra_modules):
            return super().start(model, extra_modules, seed)
        places = train_places(model, inside(extra_modules, names_of(model)))
        added = add_biases(model, _linear_layers(model, extra_modules))
        self._added = len(added)
        return [*places, *added]

    def summary(self, model: nn.Module, total: int, extra_modules: Sequence[str]) -> str:
        text = super().summary(model, total, extra_modules)
        note = f"\n  note: the model has no biases; {self._added} linear layers were given one of zeros"
        return text + note if self._added else text


def _linear_layers(model: nn.Module, extra_modules: Sequence[str]) -> list[tuple[str, nn.Module]]:
    """The linear layers below the output head."""
    head, excluded = own_head(model), tuple(f"{other}." for other in extra_modules)
    linear = [(name, module) for name, module in model.named_modules() if is_linear(module) and module is not head]
    return [(name, module) for name, module in linear if not f"{name}.".startswith(excluded)]


class Full(InPlace):
    """Train everything: the baseline that the other methods are measured against.

    A bf16 model has fp32 master weights, since small updates vanish in bf16.
    """

    name = "full"
    usual_rate = 2e-5

    def chosen(self, model: nn.Module, extra_modules: Sequence[str]) -> list[str]:
        return list(names_of(model))


# Train the output layer alone, everything below it frozen.
#
# No gradient flows through the backbone, and none of its activations are kept: it is a frozen prefix.


class Head(InPlace):
    """Train ``head.modules``, by default the model's output layer."""

    name = "head"
    section = HeadSettings
    usual_rate = 1e-3
    settings: HeadSettings

    def chosen(self, model: nn.Module, extra_modules: Sequence[str]) -> list[str]:
        modules: list[str] = []
        if self.settings.modules:
            modules = modules_named(model, self.settings.modules, "head.modules")
        elif not extra_modules and (head := own_head(model)) is not None:  # a new classifier is the head itself
            modules = [name for name, module in model.named_modules() if module is head]
        return inside(modules, names_of(model))


class Last(InPlace):
    """Train ``last.blocks`` blocks, counted from the top; the backward pass ends at the lowest of them."""

    name = "last"
    section = LastSettings
    usual_rate = 5e-5
    settings: LastSettings

    def chosen(self, model: nn.Module, extra_modules: Sequence[str]) -> list[str]:
        if (found := blocks_of(model)) is None:
            what = f"a {type(model).__name__} has no list of blocks"
            raise UserError(what, where="method", hint="choose another method")
        name, blocks = found
        if self.settings.blocks > len(blocks):
            what = f"last.blocks asks for {self.settings.blocks} blocks, and the model has {len(blocks)}"
            raise UserError(what, where="last.blocks", hint=f"give at most {len(blocks)}")
        return inside([f"{name}.{i}" for i in range(len(blocks) - self.settings.blocks, len(blocks))], names_of(model))


# Train a random subset of the weights, as many as asked for, spread evenly over all parameters.
#
# Gradients, optimizer state and the saved file exist for the chosen weights alone.


class Random(SubsetInPlace):
    """Train ``random.weights`` of the model's weights."""

    name = "random"
    section = RandomSettings
    usual_rate = 5e-4
    settings: RandomSettings

    def chosen(self, model: nn.Module, extra_modules: Sequence[str]) -> list[str]:
        return _outside(extra_modules, model)

    def start(self, model: nn.Module, extra_modules: Sequence[str], seed: int) -> list[ParameterPlace]:
        extra = inside(extra_modules, names_of(model))
        places = train_places(model, [*self.chosen(model, extra_modules), *extra])
        spread = [place for place in places if place.name not in extra]
        counts = self._counts([place.current.numel() for place in spread])
        rng = np.random.default_rng([seed, 3])
        for place, count in zip(spread, counts, strict=True):
            if count:
                drawn = rng.choice(place.current.numel(), size=count, replace=False, shuffle=False)
                self._train_entries(place, torch.from_numpy(np.sort(drawn).astype(np.int32)))
            else:
                place.current.requires_grad_(False)
        return [place for place in places if place.name in extra]

    def summary(self, model: nn.Module, total: int, extra_modules: Sequence[str]) -> str:
        count = sum(part.indices.numel() for part in self._parts)
        extra = sum(place.current.numel() for place in self._places)
        text = f"random: {count:,} of {total:,} weights trained ({count / total:.2%})"
        return text + (f", and {extra:,} of {', '.join(extra_modules)}" if extra else "")

    def _counts(self, sizes: list[int]) -> list[int]:
        """How many weights of each parameter: proportional to its size, and exactly as many as asked."""
        total = sum(sizes)
        wanted = round(self.settings.weights * total) if self.settings.weights < 1 else int(self.settings.weights)
        if not 1 <= wanted <= total:
            what = f"random.weights asks for {wanted:,} weights, and there are {total:,}"
            raise UserError(what, where="random.weights", hint="give a share below 1, or a smaller number")
        ends = [wanted * end // total for end in np.cumsum(np.asarray(sizes, dtype=object))]
        return [int(end - start) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


# Train the input layer, or another early part, with everything above it frozen.
#
# The gradient runs through the whole network to get there, so every block keeps its activations. The blocks'
# own gradients and their optimizer state are saved.


class Input(SubsetInPlace):
    """Train ``input.modules``, by default the input layer; or only the rows of ``input.tokens`` in it."""

    name = "input"
    section = InputSettings
    usual_rate = 5e-4
    settings: InputSettings

    def chosen(self, model: nn.Module, extra_modules: Sequence[str]) -> list[str]:
        if self.settings.tokens:
            return []
        named = modules_named(model, self.settings.modules, "input.modules") if self.settings.modules else None
        return inside(named or [_input_layer(model)], names_of(model))

    def start(self, model: nn.Module, extra_modules: Sequence[str], seed: int) -> list[ParameterPlace]:
        if not self.settings.tokens:
            return super().start(model, extra_modules, seed)
        rows = torch.tensor(sorted({self._token_id(token) for token in self.settings.tokens}), dtype=torch.int32)
        name = f"{_input_layer(model)}.weight"
        # The rows are trained in the embedding; a tied output layer stays as it is.
        places = train_places(model, [name, *inside(extra_modules, names_of(model))])
        embedding = next(place for place in places if place.name == name)
        width = embedding.current.shape[1]
        self._train_entries(embedding, (rows[:, None] * width + torch.arange(width)).flatten())
        return [place for place in places if place is not embedding]

    def summary(self, model: nn.Module, total: int, extra_modules: Sequence[str]) -> str:
        if not self.settings.tokens:
            return super().summary(model, total, extra_modules)
        count = len(set(self.settings.tokens))
        trained = sum(p.numel() for _, p in self.parameters(model))
        return f"input: the embeddings of {count} token{'s' if count != 1 else ''} trained, {trained:,} parameters"

    def _token_id(self, token: str) -> int:
        vocabulary = self.tokenizer.get_vocab() if self.tokenizer is not None else {}
        if token not in vocabulary:
            near = did_you_mean(token, list(vocabulary)[-2000:])
            hint = f"{near}; add a new token to the tokenizer, and its row to the embedding, first"
            raise UserError(f"'{token}' is no token of the model's vocabulary", where="input.tokens", hint=hint)
        return int(vocabulary[token])

    def put(self, model: nn.Module, tensors: Mapping[str, Tensor], saved: Saved, where: str) -> list[ParameterPlace]:
        names = {key.removesuffix(INDICES) for key in tensors if key.endswith(INDICES)}
        # As in training: rows of an embedding that is tied to the output layer change in a copy of it.
        train_places(model, [name for name in names_of(model) if name in names])
        return super().put(model, tensors, saved, where)


def _input_layer(model: nn.Module) -> str:
    """The name of the module that reads the input."""
    layer = own_embedding(model)
    for name, module in model.named_modules():
        if module is layer and name:
            return name
    what = f"a {type(model).__name__} does not say which module is its input layer"
    raise UserError(what, where="input.modules", hint="name the modules to train")
