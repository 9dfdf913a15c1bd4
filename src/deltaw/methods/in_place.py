"""Methods that train some of the base model's parameters in place.

They share freezing, untying, saving, loading and restoring. A subclass selects the parameters.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor, nn

from deltaw.errors import UserError
from deltaw.lora.complete_names import complete_names
from deltaw.lora.files import names_in_model
from deltaw.lora.fingerprint import FINGERPRINT_KEY, base_fingerprint, warn_other_base
from deltaw.lora.replacements import ReplacedParameter
from deltaw.lora.stored import count_logical_parameters
from deltaw.methods.base import REPLACED_KEY, Calibration, Folder, Metadata, Method, Names, Start, Tensors
from deltaw.methods.files import SavedConfig, read_metadata, read_trained_parameters, write_trained_parameters
from deltaw.methods.parameters import (
    base_restored,
    has_base,
    load_parameters,
    make_trainable,
    names_inside,
    parameters_by_name,
)


def modules_outside(modules: Sequence[str], model: nn.Module) -> list[str]:
    """Return the names of the parameters that are not inside one of the modules."""
    names = parameters_by_name(model)
    excluded = set(names_inside(modules, names))
    return [name for name in names if name not in excluded]


class InPlace(Method):
    """Base class of these methods. Subclasses set a name and a learning rate and implement :meth:`parameter_names`."""

    name = ""
    default_learning_rate = 1e-4

    def __init__(self, settings: object = None) -> None:
        super().__init__(settings)
        self._replacements: list[ReplacedParameter] = []
        self._base_fingerprint: str | None = None
        self._replaced: list[str] = []

    def parameter_names(self, model: nn.Module, extra_modules: Names) -> list[str]:
        """Return the names of the parameters to train, except those of the extra trainable modules."""
        raise NotImplementedError(f"{type(self).__name__} does not implement parameter_names")

    def prepare(self, model: nn.Module, *, seed: int, extra_modules: Names = (), calibrate: Calibration = None) -> str:
        total = count_logical_parameters(model)
        parameters = parameters_by_name(model)
        # The fingerprint must be computed before training changes the parameters.
        self._replaced = names_inside(extra_modules, parameters)
        self._base_fingerprint = base_fingerprint(model, [parameters[name] for name in self._replaced])
        self._replacements = self.enable_training(model, extra_modules, seed)
        if not self.parameters(model):
            message = f"method '{self.name}' finds no parameters to train in a {type(model).__name__}"
            raise UserError(message, location="method", hint="choose another method")
        return self.summary(model, total, extra_modules)

    def prepare_from(self, model: nn.Module, start: Start, *, seed: int, extra_modules: Names = ()) -> str:
        summary = self.prepare(model, seed=seed, extra_modules=extra_modules)
        start.require_base(self._base_fingerprint)
        self._copy_start(self.tensors(), self._read(model, start.folder)[0], start)
        self.after_step(model)
        return summary

    def enable_training(self, model: nn.Module, extra_modules: Names, seed: int) -> list[ReplacedParameter]:
        """Freeze the model, enable gradients of the selected parameters, and return those that are trained in full."""
        names = [*self.parameter_names(model, extra_modules), *names_inside(extra_modules, parameters_by_name(model))]
        return make_trainable(model, names)

    def summary(self, model: nn.Module, total: int, extra_modules: Names) -> str:
        """Describe the trainable parameters and their share of the model's ``total`` parameters."""
        trained = sum(p.numel() for _, p in self.parameters(model))
        names = [replacement.name for replacement in self._replacements]
        examples = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        lines = [f"{self.name}: {trained:,} of {total:,} parameters trained ({trained / total:.2%}): {examples}"]
        tied = [p.name for p in self._replacements if p.current is not p.original and p.original is not None]
        lines += [f"  note: '{name}' was tied; a copy is trained, and the other weight is unchanged" for name in tied]
        return "\n".join(lines)

    def can_restore_base(self, model: nn.Module) -> bool:
        return has_base(self._replacements)

    def base_model_active(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        return base_restored(model, self._replacements, self.name)

    def parameters(self, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
        return [(replacement.name, replacement.current) for replacement in self._replacements]

    def save(self, model: nn.Module, folder: Folder, *, base_model: str, metadata: Metadata | None = None) -> None:
        entries = dict(metadata or {})
        mapping = complete_names(model)
        rename: Callable[[str], str] = str if mapping is None else mapping.to_complete
        if self._base_fingerprint is not None:
            replaced = [rename(name) for name in self._replaced]
            entries |= {FINGERPRINT_KEY: self._base_fingerprint, REPLACED_KEY: json.dumps(replaced)}
        settings = {} if self.settings is None else dataclasses.asdict(self.settings)
        tied = {rename(p.name): [rename(n) for n in p.names[1:]] for p in self._replacements if len(p.names) > 1}
        saved = SavedConfig(self.name, base_model, settings, tied)
        tensors = {rename(name): tensor for name, tensor in self.tensors().items()}
        write_trained_parameters(Path(folder), saved, tensors, entries)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors to save by name."""
        return {replacement.name: replacement.current.detach() for replacement in self._replacements}

    def load(self, model: nn.Module, folder: Folder) -> str:
        tensors, saved = self._read(model, Path(folder))
        metadata = read_metadata(Path(folder))
        parameters = parameters_by_name(model)
        names = names_in_model(model, json.loads(metadata.get(REPLACED_KEY, "[]")), str(folder)).values()
        replaced = [parameters[name] for name in names if name in parameters]
        warn_other_base("the adapter", metadata, base_fingerprint(model, replaced), folder, saved.base_model)
        self._replacements = self.restore(model, tensors, saved, str(folder))
        return f"{sum(t.numel() for t in tensors.values()):,} parameters of '{self.name}' from {folder}"

    def _read(self, model: nn.Module, folder: Path) -> tuple[dict[str, Tensor], SavedConfig]:
        """Read the tensors and settings in a folder, with the model's names."""
        tensors, saved = read_trained_parameters(folder, self.name)
        names = names_in_model(model, [*tensors, *saved.tied, *itertools.chain(*saved.tied.values())], str(folder))
        tied = {names[name]: [names[other] for other in others] for name, others in saved.tied.items()}
        return {names[name]: tensor for name, tensor in tensors.items()}, dataclasses.replace(saved, tied=tied)

    def restore(self, model: nn.Module, tensors: Tensors, saved: SavedConfig, location: str) -> list[ReplacedParameter]:
        """Put the saved tensors into the model, frozen."""
        model.requires_grad_(False)
        return load_parameters(model, tensors, saved.tied, location)
