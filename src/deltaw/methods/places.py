"""Parameters of a model by where they stand: found by name, trained in place, untied, and put back.

It knows modules and names; not which parameters a method wants.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from deltaw.errors import UserError, did_you_mean


@dataclass
class Place:
    """Where one trained parameter stands, what stood there before, and what stands there now.

    ``names`` are several for a parameter that is tied among places which are all trained; the first is the
    one that files use. ``before`` is None where a layer had no such parameter (a bias that was added).
    """

    names: tuple[str, ...]
    spots: list[tuple[nn.Module, str]]
    before: nn.Parameter | None
    now: nn.Parameter

    @property
    def name(self) -> str:
        return self.names[0]

    def put(self, parameter: nn.Parameter | None) -> None:
        """Let ``parameter`` stand there."""
        for module, attribute in self.spots:
            module._parameters[attribute] = parameter


def names_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter under every name that it has, tied ones several times."""
    return dict(model.named_parameters(remove_duplicate=False))


def inside(modules: Iterable[str], names: Iterable[str]) -> list[str]:
    """The parameter names that lie in one of the modules."""
    prefixes = tuple(f"{module}." for module in modules)
    return [name for name in names if name.startswith(prefixes)] if prefixes else []


def modules_named(model: nn.Module, entries: Iterable[str], where: str) -> list[str]:
    """Full names of the modules whose name is an entry or ends with it after a dot.

    Raises:
        UserError: an entry matches nothing; the message names the nearest.
    """
    names = [name for name, _ in model.named_modules() if name]
    found: dict[str, None] = {}
    for entry in entries:
        hits = [name for name in names if name == entry or name.endswith(f".{entry}")]
        if not hits:
            raise UserError(
                f"'{entry}' is no module of the model", where=where, hint=did_you_mean(entry, names)
            )
        found.update(dict.fromkeys(hits))
    return list(found)


def train_places(model: nn.Module, names: Iterable[str]) -> list[Place]:
    """Freeze the model, and make the parameters of these names trainable where they stand.

    A parameter that is tied to a place which is not among ``names`` is copied first, so that training one
    of the two leaves the other as it was.
    """
    wanted = list(dict.fromkeys(names))
    everywhere = names_of(model)
    model.requires_grad_(False)
    chosen = set(wanted)
    outside = {id(p) for name, p in everywhere.items() if name not in chosen}
    together: dict[int, list[str]] = {}
    for name in wanted:
        if everywhere[name].is_floating_point():
            together.setdefault(id(everywhere[name]), []).append(name)
    places: list[Place] = []
    for same in together.values():
        before = everywhere[same[0]]
        now: nn.Parameter = before
        if id(before) in outside:
            now = nn.Parameter(before.detach().clone())
        place = Place(tuple(same), [_spot(model, name) for name in same], before, now)
        now.requires_grad_(True)
        place.put(now)
        places.append(place)
    return places


def add_biases(model: nn.Module, modules: Sequence[tuple[str, nn.Module]]) -> list[Place]:
    """Give linear layers that have no bias one of zeros (out,), trainable."""
    places = []
    for name, module in modules:
        weight = module._parameters["weight"]
        assert weight is not None
        bias = nn.Parameter(torch.zeros(weight.shape[0], dtype=weight.dtype, device=weight.device))
        place = Place((f"{name}.bias",), [(module, "bias")], None, bias)
        place.put(bias)
        places.append(place)
    return places


@contextlib.contextmanager
def as_before(places: Iterable[Place]) -> Iterator[None]:
    """While open, every place holds what it held before."""
    places = list(places)
    try:
        for place in places:
            place.put(place.before)
        yield
    finally:
        for place in places:
            place.put(place.now)


def put_loaded(
    model: nn.Module, tensors: Mapping[str, torch.Tensor], tied: Mapping[str, Sequence[str]], where: str
) -> list[Place]:
    """Let tensors from a file stand in the places of their names, frozen.

    What stood there is kept, so that it can be put back. A bias may stand where the model has none.

    Args:
        tied: further names that a tensor's parameter has.

    Raises:
        UserError: a name or a shape does not fit the model; nothing is changed then.
    """
    places: list[Place] = []
    hint = "load it onto the base model that it was trained on"
    for name, tensor in tensors.items():
        names = (name, *tied.get(name, ()))
        try:
            spots = [_spot(model, each) for each in names]
        except AttributeError:
            spots = []
        if not spots or any(attribute not in module._parameters for module, attribute in spots):
            raise UserError(
                f"the adapter trains '{name}', which the model does not have", where=where, hint=hint
            )
        module, attribute = spots[0]
        before = module._parameters[attribute]
        weight = module._parameters.get("weight")
        like = before
        if before is None and attribute == "bias" and weight is not None:
            like = weight
        shape = None if like is None else tuple(like.shape[:1] if before is None else like.shape)
        if like is None or tuple(tensor.shape) != shape:
            raise UserError(
                f"'{name}' is {tuple(tensor.shape)} in the adapter and {shape} in the model",
                where=where,
                hint=hint,
            )
        now = nn.Parameter(tensor.to(device=like.device, dtype=like.dtype), requires_grad=False)
        places.append(Place(names, spots, before, now))
    for place in places:
        place.put(place.now)
    return places


def _spot(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module and attribute behind a parameter's full name."""
    owner, _, attribute = name.rpartition(".")
    return model.get_submodule(owner), attribute
