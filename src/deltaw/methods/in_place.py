"""Methods that train some of the model's own parameters in place.

They share freezing, untying, saving, loading and putting back. Each of them only says which parameters it
trains.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from deltaw.errors import UserError
from deltaw.lora.fingerprint import FINGERPRINT_KEY, base_fingerprint, warn_of_base
from deltaw.lora.places import ParameterPlace
from deltaw.lora.stored import count_numbers
from deltaw.methods.base import REPLACED_KEY, MethodBase
from deltaw.methods.files import metadata_of, read_trained, write_trained
from deltaw.methods.parameters import as_base, inside, keep_base, names_of, put_loaded, train_places
from deltaw.methods.subset import Subset


class InPlace(MethodBase):
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
        self,
        model: nn.Module,
        *,
        seed: int,
        extra_modules: Sequence[str] = (),
        calibrate: Callable[[], None] | None = None,
    ) -> str:
        total = count_numbers(model)
        self._note_base(model, extra_modules)
        self._places = self.start(model, extra_modules, seed)
        if not self.parameters(model):
            raise UserError(
                f"method '{self.name}' finds nothing to train in a {type(model).__name__}",
                where="method",
                hint="choose another method",
            )
        return self.summary(model, total, extra_modules)

    def _note_base(self, model: nn.Module, extra_modules: Sequence[str]) -> None:
        """Take the base model's fingerprint, before anything is trained."""
        own = names_of(model)
        replaced = inside(extra_modules, own)
        self._base_fingerprint = base_fingerprint(model, [own[name] for name in replaced])
        self._replaced = replaced

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
        for place in self._places:
            if place.current is not place.original and place.original is not None:
                lines.append(
                    f"  note: '{place.name}' was tied; its copy is trained, the other weight stays as it is"
                )
        return "\n".join(lines)

    def keeps_base(self, model: nn.Module) -> bool:
        return keep_base(self._places)

    def without(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        return as_base(model, self._places, self.name)

    def parameters(self, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
        return [(place.name, place.current) for place in self._places]

    def save(
        self,
        model: nn.Module,
        folder: str | os.PathLike[str],
        *,
        base_model: str,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        write_trained(
            Path(folder),
            self.name,
            self.tensors(),
            settings=dataclasses.asdict(self.settings) if dataclasses.is_dataclass(self.settings) else {},  # type: ignore[arg-type]
            tied={p.name: list(p.names[1:]) for p in self._places if len(p.names) > 1},
            base_model=base_model,
            metadata={**(metadata or {}), **self._of_base()},
        )

    def _of_base(self) -> dict[str, str]:
        """What the weights file says of the base model that was trained."""
        if self._base_fingerprint is None:
            return {}
        return {FINGERPRINT_KEY: self._base_fingerprint, REPLACED_KEY: json.dumps(self._replaced)}

    def tensors(self) -> dict[str, Tensor]:
        """The content of the weights file, by name."""
        return {place.name: place.current.detach() for place in self._places}

    def load(self, model: nn.Module, folder: str | os.PathLike[str]) -> str:
        tensors, settings = read_trained(Path(folder), self.name)
        metadata = metadata_of(Path(folder))
        own = names_of(model)
        replaced = [own[name] for name in json.loads(metadata.get(REPLACED_KEY, "[]")) if name in own]
        warn_of_base("the adapter", metadata, base_fingerprint(model, replaced), folder, settings.base_model)
        self._places = self.put(model, tensors, settings.tied, str(folder))
        return f"{sum(t.numel() for t in tensors.values()):,} parameters of '{self.name}' from {folder}"

    def put(
        self, model: nn.Module, tensors: Mapping[str, Tensor], tied: Mapping[str, Sequence[str]], where: str
    ) -> list[ParameterPlace]:
        """Put the file's tensors into the model, frozen."""
        model.requires_grad_(False)
        return put_loaded(model, tensors, tied, where)


class SubsetInPlace(InPlace):
    """A method that also trains single weights of parameters that otherwise stay frozen."""

    def __init__(self, settings: object = None) -> None:
        super().__init__(settings)
        self._subset = Subset()

    def parameters(self, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
        return [*super().parameters(model), *self._subset.parameters()]

    def after_step(self, model: nn.Module) -> None:
        self._subset.write()

    def without(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        return self._subset.without(super().without(model))

    def tensors(self) -> dict[str, Tensor]:
        return {**super().tensors(), **self._subset.tensors()}

    def put(
        self, model: nn.Module, tensors: Mapping[str, Tensor], tied: Mapping[str, Sequence[str]], where: str
    ) -> list[ParameterPlace]:
        model.requires_grad_(False)
        return super().put(model, self._subset.put(model, tensors, where), tied, where)
