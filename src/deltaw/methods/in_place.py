"""Methods that train some of the model's own parameters where they stand.

What is common to all of them: freezing, untying, saving, loading, putting back. Which parameters are trained
is the one thing that each of them says for itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from deltaw.errors import UserError
from deltaw.methods.files import read_trained, write_trained
from deltaw.methods.places import Place, as_before, inside, names_of, put_loaded, train_places


class InPlace:
    """The frame of such a method; a subclass has a name, a usual rate, and :meth:`chosen`."""

    name = ""
    usual_rate = 1e-4
    falls_with_width = True
    virtual_tokens = 0

    def __init__(self, settings: object = None) -> None:
        self.settings = settings
        self._places: list[Place] = []

    def chosen(self, model: nn.Module, extra_modules: Sequence[str]) -> list[str]:
        """Names of the parameters that are trained, without those of ``beside``."""
        raise UserError(
            f"{type(self).__name__} does not say what it trains", hint="use one of its subclasses"
        )

    def prepare(
        self,
        model: nn.Module,
        *,
        seed: int,
        extra_modules: Sequence[str] = (),
        calibrate: Callable[[], None] | None = None,
    ) -> str:
        names = [*self.chosen(model, extra_modules), *inside(extra_modules, names_of(model))]
        if not names:
            raise UserError(
                f"method '{self.name}' finds nothing to train in a {type(model).__name__}",
                where="method",
                hint="choose another method",
            )
        total = sum(p.numel() for p in model.parameters())
        self._places = train_places(model, names)
        return self.summary(model, total)

    def summary(self, model: nn.Module, total: int) -> str:
        """What is trained, and how much of the model's ``total`` parameters that is."""
        trained = sum(p.numel() for _, p in self.parameters(model))
        names = [place.name for place in self._places]
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        lines = [f"{self.name}: {trained:,} of {total:,} parameters trained ({trained / total:.2%}): {shown}"]
        for place in self._places:
            if place.now is not place.before and place.before is not None:
                lines.append(
                    f"  note: '{place.name}' was tied; its copy is trained, the other stays as it is"
                )
        return "\n".join(lines)

    def evaluating(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def without(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        return as_before(self._places)

    def parameters(self, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
        return [(place.name, place.now) for place in self._places]

    def rate_factor(self, name: str) -> float:
        return 1.0

    def after_step(self, model: nn.Module) -> None:
        """Nothing: the optimizer changes the model's own parameters."""

    def with_virtual_tokens(self, tokens: np.ndarray) -> np.ndarray:
        return tokens

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
            metadata=metadata or {},
        )

    def tensors(self) -> dict[str, Tensor]:
        """What a file holds, by name."""
        return {place.name: place.now.detach() for place in self._places}

    def load(self, model: nn.Module, folder: str | os.PathLike[str]) -> str:
        tensors, settings = read_trained(Path(folder), self.name)
        self._places = self.put(model, tensors, settings.tied, str(folder))
        return f"{sum(t.numel() for t in tensors.values()):,} parameters of '{self.name}' from {folder}"

    def put(
        self, model: nn.Module, tensors: Mapping[str, Tensor], tied: Mapping[str, Sequence[str]], where: str
    ) -> list[Place]:
        """Let the file's tensors stand in the model, frozen."""
        model.requires_grad_(False)
        return put_loaded(model, tensors, tied, where)

    def can_share_prefixes(self) -> bool:
        return True
