"""What an adapter holds, and what its training has moved, on one page.

Read from the adapter's files alone: the base model is not needed, so norms are those of ΔW itself and not
relative to W. It does not know how the adapter was trained.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor

from deltaw.errors import first_names
from deltaw.experiments.comparison import without_nan
from deltaw.export.combine import angles, inner, norm
from deltaw.hub.folders import adapter_folder
from deltaw.lora import read_adapter
from deltaw.lora.fingerprint import FINGERPRINT_KEY, same_base
from deltaw.lora.peft_updates import FileContent, FileUpdate, content_of
from deltaw.reports.tables import table

# A low-rank update is measured from its factors. ΔW = scaling · B·A is as large as the weight that it changes, its
# factors are r columns wide. Everything here is computed from the factors, in float64, in O((n + m)·r²) for a weight
# of n inputs and m outputs.


def factor_pairs(a: Tensor, b: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The factors as float64 matrices A (r, n) and B (m, r), one pair a group.

    Linear layers and embeddings have one pair. A convolution's A is (r, inputs, kernel…) and its B is
    (outputs, r / groups, 1…); the groups' updates act on different channels, so that the singular values of
    the whole are those of the groups together.
    """
    a, b = a.double().flatten(1), b.double().flatten(1)
    groups = max(1, a.shape[0] // max(1, b.shape[1]))
    return list(zip(a.chunk(groups), b.chunk(groups), strict=True))


def singular_values(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """The singular values of ΔW = scaling · B·A that can be other than zero, descending, float64.

    With B = Q_B·R_B and Aᵀ = Q_A·R_A, B·A = Q_B·(R_B·R_Aᵀ)·Q_Aᵀ: those of the r × r matrix in the middle.
    """
    values = []
    for of_a, of_b in factor_pairs(a, b):
        r_a, r_b = (torch.linalg.qr(matrix, mode="r").R for matrix in (of_a.T, of_b))
        values.append(torch.linalg.svdvals(r_b @ r_a.T))
    return torch.cat(values).sort(descending=True).values * abs(scaling)


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of σ / Σσ: from 1 (one direction) to the rank (all alike); 0 for ΔW = 0.

    O. Roy and M. Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007, eq. 4.
    """
    if not values.any():
        return 0.0
    shares = values[values > 0] / values.sum()
    return float(torch.exp(-(shares * shares.log()).sum()))


def stable_rank(values: Tensor) -> float:
    """‖ΔW‖_F² / σ_max²: how many directions as strong as the strongest would carry it; 0 for ΔW = 0.

    M. Rudelson and R. Vershynin, "Sampling from large matrices", J. ACM 54(4), 2007, section 1.
    """
    return float((values / values.max()).square().sum()) if values.any() else 0.0


_BARS = "▁▂▃▄▅▆▇█"
_KINDS_SHOWN = 14
_PLAIN: dict[str, Any] = {"box": None, "padding": (0, 1), "header_style": "bold"}


@dataclass(frozen=True)
class ModuleUpdate:
    """ΔW of one module, or of one of its parameters.

    Attributes:
        module: its name in the base model; see :class:`~deltaw.lora.peft_updates.FileUpdate`.
        rank: r, of one expert where there are several.
        scaling: the factor of B·A.
        parameters: trained numbers in A and B.
        norm: ‖ΔW‖_F, over all experts; not a number where a factor is not finite.
        largest: the largest singular value of ΔW, of any expert.
        effective_rank: Roy and Vetterli's, the mean over experts.
        stable_rank: ‖ΔW‖_F² / σ_max², the mean over experts.
        untrained: B is zero throughout.
        experts: how many matrices the weight stacks; None for one matrix.
    """

    module: str
    rank: int
    scaling: float
    parameters: int
    norm: float
    largest: float
    effective_rank: float
    stable_rank: float
    untrained: bool
    experts: int | None = None


@dataclass(frozen=True)
class KindUpdate:
    """The modules of one kind (such as ``q_proj``) together: means, and the norm of all their ΔW."""

    kind: str
    count: int
    ranks: list[int]
    parameters: int
    norm: float
    effective_rank: float
    stable_rank: float


@dataclass(frozen=True)
class AdapterReport:
    """What :func:`inspect_adapter` found.

    Attributes:
        folder: the adapter's.
        base_model: the name that the adapter gives it, or None.
        alpha: its alpha; modules may have others, see their scaling.
        ranks: the ranks there are, ascending.
        scalings: the scalings there are, ascending.
        size_bytes: its files on disk.
        trained_parameters: all numbers that it holds.
        other_parameters: those that are not in A or B: whole modules, biases, tokens.
        other_tensors: the names of what holds them.
        bias_parameters: those of biases on B (``lora_bias``).
        bias_norm: the norm of all that these add to outputs, scaling · c.
        token_rows: how many tokens' rows are trained, by embedding or head.
        norm: ‖ΔW‖_F over all modules.
        modules: every adapted module.
        warnings: what a person should know before using the adapter.
    """

    folder: str
    base_model: str | None
    alpha: float
    ranks: list[int]
    scalings: list[float]
    size_bytes: int
    trained_parameters: int
    other_parameters: int
    other_tensors: list[str]
    bias_parameters: int
    bias_norm: float
    token_rows: dict[str, int]
    norm: float
    modules: list[ModuleUpdate]
    warnings: list[str] = field(default_factory=list)

    def kinds(self) -> list[KindUpdate]:
        """The modules by kind, the one that moved most first."""
        grouped: dict[str, list[ModuleUpdate]] = defaultdict(list)
        for module, kind in zip(self.modules, kinds_of([m.module for m in self.modules]), strict=True):
            grouped[kind].append(module)
        kinds = []
        for kind, group in grouped.items():
            ranks, parameters = sorted({m.rank for m in group}), sum(m.parameters for m in group)
            norm = root_sum_of_squares(m.norm for m in group)
            effective = sum(m.effective_rank for m in group) / len(group)
            stable = sum(m.stable_rank for m in group) / len(group)
            kinds.append(KindUpdate(kind, len(group), ranks, parameters, norm, effective, stable))
        return sorted(kinds, key=lambda kind: (-kind.norm if math.isfinite(kind.norm) else 0.0, kind.kind))

    def layers(self) -> dict[str, float]:
        """‖ΔW‖_F of each layer, in the order of the layers; without modules outside of layers."""
        norms: dict[str, list[float]] = defaultdict(list)
        for module in self.modules:
            if of_layer := re.match(r"(?:.*?\.)?\d+(?=\.|$)", module.module):  # up to the first number
                norms[of_layer[0]].append(module.norm)
        return {layer: root_sum_of_squares(norms[layer]) for layer in sorted(norms, key=natural)}

    def most_moved(self) -> list[tuple[str, float]]:
        """The five layers with the largest ‖ΔW‖_F, largest first; modules if there are no layers."""
        norms = self.layers() or {module.module: module.norm for module in self.modules}
        moved = [(name, norm) for name, norm in norms.items() if norm > 0]
        return sorted(moved, key=lambda entry: -entry[1])[:5]

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON; a number that is not finite becomes None."""
        values = asdict(self)
        values["kinds"] = [asdict(kind) for kind in self.kinds()]
        values["layers"] = [{"layer": layer, "norm": norm} for layer, norm in self.layers().items()]
        values["most_moved"] = [{"name": name, "norm": norm} for name, norm in self.most_moved()]
        return {key: without_nan(value) for key, value in values.items()}

    def render(self) -> RenderableType:
        """One page for a terminal."""
        parts: list[RenderableType] = [self._head()]
        if self.modules:
            parts += [Text(), self._table()]
        layers = self.layers()
        if len(layers) > 1:
            parts += [Text(), _sparkline(layers)]
        if moved := self.most_moved():
            parts.append(Text("moved most: " + ", ".join(f"{name} ({norm:.3g})" for name, norm in moved)))
        parts += [Text(f"warning: {warning}", style="yellow") for warning in self.warnings]
        return Group(*parts)

    def _head(self) -> Table:
        head = Table.grid(padding=(0, 2))
        head.add_row("adapter", self.folder)
        head.add_row("base model", self.base_model or "not named")
        if self.modules:
            ranks = ", ".join(str(rank) for rank in self.ranks)
            scalings = ", ".join(f"{value:g}" for value in self.scalings)
            head.add_row("rank", f"{ranks}   alpha {self.alpha:g}   scaling {scalings}")
            head.add_row("‖ΔW‖", f"{self.norm:.4g} over {len(self.modules)} modules")
        if self.bias_parameters:
            head.add_row("bias on B", f"norm {self.bias_norm:.4g}, {self.bias_parameters:,} parameters")
        if self.token_rows:
            rows = [f"{count} of {name}" for name, count in self.token_rows.items()]
            head.add_row("token rows", first_names(rows))
        trained = f"{self.trained_parameters:,} parameters"
        if self.other_parameters:
            trained += f", {self.other_parameters:,} of them outside A and B ({first_names(self.other_tensors)})"
        head.add_row("trained", trained)
        head.add_row("on disk", f"{self.size_bytes / 1e6:.2f} MB")
        return head

    def _table(self) -> Table:
        kinds, rows = self.kinds(), []
        for kind in kinds[:_KINDS_SHOWN]:
            ranks = "–".join(map(str, sorted({kind.ranks[0], kind.ranks[-1]})))
            measured = (f"{kind.norm:.4g}", f"{kind.effective_rank:.1f}", f"{kind.stable_rank:.1f}")
            rows.append([kind.kind, str(kind.count), ranks, f"{kind.parameters:,}", *measured])
        if len(kinds) > _KINDS_SHOWN:
            rows.append([f"and {len(kinds) - _KINDS_SHOWN} more kinds"])
        heads = ("module kind", "modules", "rank", "parameters", "‖ΔW‖", "effective rank", "stable rank")
        return table(heads, rows, **_PLAIN)


def inspect_adapter(folder: str | Path) -> AdapterReport:
    """Measure the adapter in ``folder``.

    Raises:
        UserError: the folder holds no adapter, or a damaged one.
    """
    folder = adapter_folder(folder)
    adapter = read_adapter(folder)
    content = content_of(adapter)
    modules = [_update(update) for update in sorted(content.updates, key=lambda one: natural(one.name))]
    outside = {name: tensor.numel() for name, tensor in content.others.items()}
    outside |= {f"{name}.lora_B.bias": tensor.numel() for name, tensor in content.biases.items()}
    outside |= {f"{name} (token rows)": rows.numel() for name, rows in content.token_rows.items()}
    return AdapterReport(
        folder=str(folder),
        base_model=adapter.metadata.get("base_model_name_or_path") or None,
        alpha=adapter.config.alpha,
        ranks=sorted({module.rank for module in modules}),
        scalings=sorted({module.scaling for module in modules}),
        size_bytes=sum(file.stat().st_size for file in Path(folder).glob("adapter_*") if file.is_file()),
        trained_parameters=sum(tensor.numel() for tensor in adapter.tensors.values()),
        other_parameters=sum(outside.values()),
        other_tensors=sorted(outside, key=natural),
        bias_parameters=sum(tensor.numel() for tensor in content.biases.values()),
        bias_norm=root_sum_of_squares(float(bias.norm()) for bias in content.biases.values()),
        token_rows={name: rows.shape[0] for name, rows in content.token_rows.items()},
        norm=root_sum_of_squares(module.norm for module in modules),
        modules=modules,
        warnings=_warnings(modules, content, adapter.tensors),
    )


def values_of(update: FileUpdate) -> list[Tensor]:
    """The singular values of each ΔW of an update whose factors are finite."""
    pairs = [pair for pair in update.pairs() if all(factor.isfinite().all() for factor in pair)]
    return [singular_values(*pair, update.scaling * update.times) for pair in pairs]


def _update(update: FileUpdate) -> ModuleUpdate:
    a, b = update.factor_A, update.factor_B
    if a.isfinite().all() and b.isfinite().all():
        values = values_of(update)
        norm = root_sum_of_squares(float(of_one.norm()) for of_one in values)
        largest = max((float(of_one[0]) for of_one in values if of_one.numel()), default=0.0)
        effective = sum(effective_rank(of_one) for of_one in values) / len(values)
        stable = sum(stable_rank(of_one) for of_one in values) / len(values)
    else:
        norm = largest = effective = stable = math.nan
    untrained, measured = not (math.isnan(norm) or bool(b.any())), (norm, largest, effective, stable)
    parameters = a.numel() + b.numel()
    return ModuleUpdate(update.name, update.rank, update.scaling, parameters, *measured, untrained, update.experts)


def _warnings(modules: list[ModuleUpdate], content: FileContent, tensors: Mapping[str, Tensor]) -> list[str]:
    found = []
    untrained = [module.module for module in modules if module.untrained]
    if untrained and len(untrained) == len(modules):
        others = content.others or content.biases or content.token_rows
        left = "only what is outside A and B can change the model" if others else "the adapter is untrained"
        found.append(f"B is zero in all modules: {left}")
    elif untrained:
        found.append(f"B is zero in {len(untrained)} of {len(modules)} modules: {first_names(untrained)}")
    if broken := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        found.append(f"{len(broken)} tensors hold numbers that are not finite: {first_names(broken)}")
    if content.halves:
        found.append(f"{len(content.halves)} modules have one factor without the other: {first_names(content.halves)}")
    if unsure := [update.name for update in content.updates if not update.certain]:
        found.append(f"rank and norm are uncertain for {first_names(unsure)}: a pattern names single parameters")
    return found


def kinds_of(names: Sequence[str]) -> list[str]:
    """What kind each module is: its name without numbers, cut to the last parts that tell kinds apart."""
    patterns = [tuple(part for part in name.split(".") if not part.isdigit()) for name in names]
    distinct = set(patterns)
    kinds: dict[tuple[str, ...], str] = {}
    for pattern in distinct:
        lengths = range(1, len(pattern))
        length = next((n for n in lengths if sum(other[-n:] == pattern[-n:] for other in distinct) == 1), len(pattern))
        kinds[pattern] = ".".join(pattern[-length:])
    return [kinds[pattern] for pattern in patterns]


def natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts layer 10 behind layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _sparkline(layers: Mapping[str, float]) -> Text:
    top = max((norm for norm in layers.values() if math.isfinite(norm)), default=0.0)
    steps = (len(_BARS) - 1) / (top or 1.0)
    bars = "".join(_BARS[round(norm * steps)] if math.isfinite(norm) else "?" for norm in layers.values())
    names = list(layers)
    return Text(f"‖ΔW‖ by layer, {names[0]} to {names[-1]} (highest {top:.3g})\n{bars}")


def root_sum_of_squares(values: Iterable[float]) -> float:
    """The norm of a whole from those of its parts."""
    return math.sqrt(sum(value * value for value in values))


# Two adapters side by side: what was set differently, and how alike their updates are, layer by layer.
#
# From the adapters' files alone, and from factors alone: no ΔW is formed and no base model is loaded. Modules
# are compared by name, so that two adapters of different base models of one architecture can be compared too;
# that they have different bases is said.


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
            rows = [(name, *map(str, values)) for name, values in self.settings.items()]
            parts += [Text(), table(("settings that differ", "A", "B"), rows, left=3, fold=True, **_PLAIN)]
        if self.layers:
            parts += [Text(), self._layers()]
        for letter, names in zip("AB", self.only, strict=True):
            if names:
                parts.append(Text(f"only {letter} has {len(names)}: {first_names(names)}"))
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
        heads = ("rank A", "rank B", "‖ΔW‖ A", "‖ΔW‖ B", "cosine", "outputs", "inputs")
        rows = [
            (
                layer.module[len(shared) + 1 if shared else 0 :],
                *(str(rank) for rank in layer.ranks),
                *(f"{size:#.3g}" for size in layer.norms),
                *(_shown(value) for value in (layer.cosine, layer.output_overlap, layer.input_overlap)),
            )
            for layer in self.layers[:_LAYERS_SHOWN]
        ]
        more = len(self.layers) - _LAYERS_SHOWN
        caption = f"and {more} more; --json has all" if more > 0 else None
        first = f"module, in {shared}" if shared else "module"
        return table((first, *heads), rows, fold=True, caption=caption, caption_justify="left", **_PLAIN)


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
    adapters = [read_adapter(folder) for folder in (first, second)]
    contents = [content_of(adapter) for adapter in adapters]
    updates = [{update.name: update for update in content.updates} for content in contents]
    layers, products, notes = [], [], []
    for name in sorted(updates[0].keys() & updates[1].keys(), key=natural):
        pairs = [_matrices(own[name]) for own in updates]
        sizes = [[(left.shape[0], right.shape[1]) for left, right in of_one] for of_one in pairs]
        if sizes[0] != sizes[1]:
            notes.append(f"'{name}' is of another size in B, and is not compared")
            continue
        layer, product = _compared_layer(name, (updates[0][name].rank, updates[1][name].rank), *pairs)
        layers.append(layer)
        products.append(product)
    compared = {layer.module for layer in layers}
    only = tuple(
        sorted([*(set(own) - compared), *(set(content.others) - set(other.others))], key=natural)
        for own, content, other in zip(updates, contents, contents[::-1], strict=True)
    )
    norms = [root_sum_of_squares(norm(*pair) for u in own.values() for pair in _matrices(u)) for own in updates]
    if uncertain := {update.name for own in updates for update in own.values() if not update.certain}:
        notes.append(f"rank and alpha of {first_names(sorted(uncertain))} cannot be told from the files")
    configs = [dataclasses.asdict(adapter.config) for adapter in adapters]
    metadata = [adapter.metadata for adapter in adapters]
    bases = [known.get("base_model_name_or_path") or None for known in metadata]
    return AdapterComparison(
        (str(first), str(second)),
        (bases[0], bases[1]),
        same_base(*(known.get(FINGERPRINT_KEY) for known in metadata)),
        {name: (value, configs[1][name]) for name, value in configs[0].items() if value != configs[1][name]},
        layers,
        (only[0], only[1]),
        (norms[0], norms[1]),
        _cosine(sum(products), *norms),
        notes,
    )


# L and R with ΔW = L·R, of each expert and group.
Matrices: TypeAlias = Sequence[tuple[Tensor, Tensor]]


def _compared_layer(
    name: str, ranks: tuple[int, int], ours: Matrices, theirs: Matrices
) -> tuple[LayerComparison, float]:
    """One module, and ⟨ΔW₁, ΔW₂⟩; experts count together, their angles as means."""
    norms = (root_sum_of_squares(norm(*pair) for pair in ours), root_sum_of_squares(norm(*pair) for pair in theirs))
    product = sum(inner(a, b) for a, b in zip(ours, theirs, strict=True))
    outputs, inputs = [], []
    for (left, right), (other_left, other_right) in zip(ours, theirs, strict=True):
        outputs.append(angles(_reached(left, right), _reached(other_left, other_right)))
        inputs.append(angles(_reached(right.T, left.T), _reached(other_right.T, other_left.T)))
    cosines = [float(found[0]) for found in outputs if found.numel()]
    angle = math.degrees(math.acos(max(cosines))) if cosines else None
    overlaps = _overlap(outputs), _overlap(inputs)
    return LayerComparison(name, ranks, norms, _cosine(product, *norms), *overlaps, angle), product


def _matrices(update: FileUpdate) -> Matrices:
    """(L, R) with ΔW = L·R (outputs, inputs), of each expert; a kernel's inputs are flattened."""
    factor = update.scaling * update.times
    return [(b * factor, a) for pair in update.pairs() for a, b in factor_pairs(*pair)]


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


def _shown(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"
