"""Two adapters side by side: what was set differently, and how alike their updates are, layer by layer.

From the adapters' files alone, and from factors alone: no ΔW is formed and no base model is loaded. Modules
are compared by name, so that two adapters of different base models of one architecture can be compared too;
that they have different bases is said.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor

from deltaw.export.low_rank import angles, inner, norm
from deltaw.lora import read_adapter
from deltaw.lora.files import AdapterFile
from deltaw.lora.fingerprint import FINGERPRINT_KEY, same_base
from deltaw.lora.peft_updates import FileUpdate, content_of
from deltaw.reports.inspect import natural, root_sum_of_squares, shortened, without_nan

_LAYERS_SHOWN = 40


@dataclass(frozen=True)
class LayerComparison:
    """ΔW of one module in both adapters.

    Attributes:
        module: its name.
        ranks, norms: in the first and the second adapter; norms are ‖ΔW‖_F.
        cosine: ⟨ΔW₁, ΔW₂⟩ / (‖ΔW₁‖·‖ΔW₂‖), from −1 to 1; None where one of them is zero.
        output_overlap: mean cos² of the principal angles between the spaces of outputs that the two reach:
            1 where the smaller lies in the larger, about r/n for random spaces of n dimensions.
        input_overlap: the same of the inputs that they read.
        angle: the smallest principal angle between the outputs' spaces, in degrees.
    """

    module: str
    ranks: tuple[int, int]
    norms: tuple[float, float]
    cosine: float | None
    output_overlap: float | None
    input_overlap: float | None
    angle: float | None


@dataclass(frozen=True)
class AdapterComparison:
    """What :func:`compare_adapters` found.

    Attributes:
        folders: of the two. base_models: as they name them.
        same_base: whether both were trained on the same weights; None where a file does not say.
        settings: those that differ, by name.
        layers: modules that both adapt.
        only: modules, and other tensors, that only one has.
        norms: ‖ΔW‖_F over all modules of each.
        cosine: between the two over all modules, what only one has counted in; None where one is zero.
        notes: what a person should know.
    """

    folders: tuple[str, str]
    base_models: tuple[str | None, str | None]
    same_base: bool | None
    settings: dict[str, tuple[object, object]]
    layers: list[LayerComparison]
    only: tuple[list[str], list[str]]
    norms: tuple[float, float]
    cosine: float | None
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON; a number that is not finite becomes None."""
        return {key: without_nan(value) for key, value in asdict(self).items()}

    def render(self) -> RenderableType:
        """One page for a terminal."""
        parts: list[RenderableType] = [self._head()]
        if self.settings:
            table = Table(box=None, pad_edge=False, header_style="bold", title_justify="left")
            for title in ("settings that differ", "A", "B"):
                table.add_column(title)
            for name, values in self.settings.items():
                table.add_row(name, *(str(value) for value in values))
            parts += [Text(), table]
        if self.layers:
            parts += [Text(), self._layers()]
        for letter, names in zip("AB", self.only, strict=True):
            if names:
                parts.append(Text(f"only {letter} has {len(names)}: {shortened(names)}"))
        parts += [Text(f"note: {note}") for note in self.notes]
        return Group(*parts)

    def _head(self) -> Table:
        head = Table.grid(padding=(0, 2))
        for letter, folder, base, size in zip("AB", self.folders, self.base_models, self.norms, strict=True):
            head.add_row(letter, folder, f"base {base or 'not named'}", f"‖ΔW‖ {size:.4g}")
        same = {True: "the same", False: "different", None: "cannot be told from the files"}[self.same_base]
        head.add_row("base", same)
        head.add_row("cosine", _shown(self.cosine), "over all modules")
        return head

    def _layers(self) -> Table:
        shared = _shared_prefix([layer.module for layer in self.layers])
        table = Table(box=None, pad_edge=False, header_style="bold", caption_justify="left")
        table.add_column(f"module, in {shared}" if shared else "module")
        for title in ("rank A", "rank B", "‖ΔW‖ A", "‖ΔW‖ B", "cosine", "outputs", "inputs"):
            table.add_column(title, justify="right")
        for layer in self.layers[:_LAYERS_SHOWN]:
            table.add_row(
                layer.module[len(shared) + 1 if shared else 0 :],
                *(str(rank) for rank in layer.ranks),
                *(f"{size:#.3g}" for size in layer.norms),
                *(_shown(value) for value in (layer.cosine, layer.output_overlap, layer.input_overlap)),
            )
        if len(self.layers) > _LAYERS_SHOWN:
            table.caption = f"and {len(self.layers) - _LAYERS_SHOWN} more; --json has all"
        return table


def _shared_prefix(names: Sequence[str]) -> str:
    """The modules that all of ``names`` lie in, as a name; '' where there are none."""
    first, last = (name.split(".")[:-1] for name in (min(names), max(names)))
    length = next((i for i, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), None)
    return ".".join(first[: min(len(first), len(last)) if length is None else length])


def compare_adapters(first: str | Path, second: str | Path) -> AdapterComparison:
    """Compare the LoRA adapters in two folders.

    Raises:
        UserError: a folder holds no adapter, or a damaged one.
    """
    folders = (Path(first), Path(second))
    adapters = tuple(read_adapter(folder) for folder in folders)
    contents = [content_of(adapter) for adapter in adapters]
    updates = [{update.name: update for update in content.updates} for content in contents]
    both = [name for name in updates[0] if name in updates[1]]
    layers, products, notes = [], [], []
    for name in sorted(both, key=natural):
        pairs = [_matrices(own[name]) for own in updates]
        if [_sizes(pair) for pair in pairs[0]] != [_sizes(pair) for pair in pairs[1]]:
            notes.append(f"'{name}' is of another size in B, and is not compared")
            continue
        layer, product = _layer(name, updates[0][name], updates[1][name], *pairs)
        layers.append(layer)
        products.append(product)
    compared = {layer.module for layer in layers}
    only = tuple(
        sorted([*(set(own) - compared), *(set(content.others) - set(other.others))], key=natural)
        for own, content, other in zip(updates, contents, contents[::-1], strict=True)
    )
    norms = tuple(
        root_sum_of_squares(norm(*pair) for update in own.values() for pair in _matrices(update))
        for own in updates
    )
    uncertain = [u.name for own in updates for u in own.values() if not u.certain]
    if uncertain:
        notes.append(f"rank and alpha of {shortened(sorted(set(uncertain)))} cannot be told from the files")
    return AdapterComparison(
        (str(folders[0]), str(folders[1])),
        (_base(adapters[0]), _base(adapters[1])),
        _same_base(adapters),
        _differing(adapters),
        layers,
        (only[0], only[1]),
        (norms[0], norms[1]),
        _cosine(sum(products), norms[0], norms[1]),
        notes,
    )


def _layer(
    name: str,
    first: FileUpdate,
    second: FileUpdate,
    ours: Sequence[tuple[Tensor, Tensor]],
    theirs: Sequence[tuple[Tensor, Tensor]],
) -> tuple[LayerComparison, float]:
    """One module, and ⟨ΔW₁, ΔW₂⟩; experts count together, their angles as means."""
    norms = (
        root_sum_of_squares(norm(*pair) for pair in ours),
        root_sum_of_squares(norm(*pair) for pair in theirs),
    )
    product = sum(inner(a, b) for a, b in zip(ours, theirs, strict=True))
    outputs, inputs = [], []
    for (left, right), (other_left, other_right) in zip(ours, theirs, strict=True):
        outputs.append(angles(_reached(left, right), _reached(other_left, other_right)))
        inputs.append(angles(_reached(right.T, left.T), _reached(other_right.T, other_left.T)))
    cosines = [float(found[0]) for found in outputs if found.numel()]
    return (
        LayerComparison(
            name,
            (first.rank, second.rank),
            norms,
            _cosine(product, *norms),
            _overlap(outputs),
            _overlap(inputs),
            math.degrees(math.acos(max(cosines))) if cosines else None,
        ),
        product,
    )


def _matrices(update: FileUpdate) -> list[tuple[Tensor, Tensor]]:
    """(L, R) with ΔW = L·R (outputs, inputs), of each expert; a kernel's inputs are flattened."""
    factor = update.scaling * update.times
    found = []
    for a, b in update.pairs():
        left, right = b.double().flatten(1), a.double().flatten(1)
        groups = right.shape[0] // max(1, left.shape[1])
        parts = zip(left.chunk(groups), right.chunk(groups), strict=True) if groups > 1 else [(left, right)]
        found += [(one * factor, other) for one, other in parts]
    return found


def _sizes(pair: tuple[Tensor, Tensor]) -> tuple[int, int]:
    return pair[0].shape[0], pair[1].shape[1]


def _reached(left: Tensor, right: Tensor) -> Tensor:
    """Columns that span the column space of L·R: those of L, weighted as ΔW uses them."""
    return left @ torch.linalg.qr(right.T, mode="r").R.T


def _overlap(cosines: Sequence[Tensor]) -> float | None:
    means = [float(found.square().mean()) for found in cosines if found.numel()]
    return sum(means) / len(means) if means else None


def _cosine(product: float, first: float, second: float) -> float | None:
    if not (first > 0 and second > 0):
        return None
    return max(-1.0, min(1.0, product / (first * second)))


def _same_base(adapters: Sequence[AdapterFile]) -> bool | None:
    first, second = (adapter.metadata.get(FINGERPRINT_KEY) for adapter in adapters)
    return same_base(first, second)


def _base(adapter: AdapterFile) -> str | None:
    return adapter.metadata.get("base_model_name_or_path") or None


def _differing(adapters: Sequence[AdapterFile]) -> dict[str, tuple[object, object]]:
    first, second = (dataclasses.asdict(adapter.config) for adapter in adapters)
    return {name: (first[name], second[name]) for name in first if first[name] != second[name]}


def _shown(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"
