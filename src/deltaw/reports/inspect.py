"""Inspect, compare and merge adapters: sizes, ranks, norm and spectrum of ΔW per module, and results of merges.

For inspection, only the adapter's files are read. The base model is not needed, so norms are those of ΔW and not
relative to W.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor

from deltaw.errors import first_names
from deltaw.experiments.comparison import without_nan
from deltaw.hub.folders import adapter_folder
from deltaw.lora import read_adapter
from deltaw.lora.peft_updates import FileContent, FileUpdate, read_content
from deltaw.methods.start import lineage_lines, read_lineage
from deltaw.reports.tables import table

# All measurements are computed from the factors of ΔW = scaling · B·A in float64, without forming ΔW. The cost is
# O((n + m)·r²) for a weight of n inputs and m outputs.


def factor_pairs(a: Tensor, b: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return the factors as float64 matrices A (r, n) and B (m, r), one pair per group.

    Linear layers and embeddings have one group. A convolution has A (r, inputs, kernel…) and B (outputs, r / groups,
    1…). The updates of its groups act on disjoint channels, so the singular values of ΔW are the union of those of the
    groups.
    """
    a = a.double().flatten(1)
    b = b.double().flatten(1)
    groups = max(1, a.shape[0] // max(1, b.shape[1]))
    return list(zip(a.chunk(groups), b.chunk(groups), strict=True))


def singular_values(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Return the r singular values of ΔW = scaling · B·A in descending order, as float64.

    With B = Q_B·R_B and Aᵀ = Q_A·R_A, B·A = Q_B·(R_B·R_Aᵀ)·Q_Aᵀ, so they are those of the r × r matrix R_B·R_Aᵀ.
    """
    values = []
    for group_a, group_b in factor_pairs(a, b):
        r_a, r_b = (torch.linalg.qr(matrix, mode="r").R for matrix in (group_a.T, group_b))
        values.append(torch.linalg.svdvals(r_b @ r_a.T))
    return torch.cat(values).sort(descending=True).values * abs(scaling)


def effective_rank(values: Tensor) -> float:
    """Return exp of the entropy of σ / Σσ: from 1 (one direction) to the rank (equal singular values), or 0 if ΔW = 0.

    O. Roy and M. Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007, eq. 4.
    """
    if not values.any():
        return 0.0
    shares = values[values > 0] / values.sum()
    return float(torch.exp(-(shares * shares.log()).sum()))


def stable_rank(values: Tensor) -> float:
    """Return ‖ΔW‖_F² / σ_max², or 0 if ΔW = 0.

    M. Rudelson and R. Vershynin, "Sampling from large matrices", J. ACM 54(4), 2007, section 1.
    """
    return float((values / values.max()).square().sum()) if values.any() else 0.0


_BARS = "▁▂▃▄▅▆▇█"
_MAX_KINDS = 14
PLAIN: dict[str, Any] = {"box": None, "padding": (0, 1), "header_style": "bold"}


@dataclass(frozen=True)
class ModuleUpdate:
    """ΔW of a module, or of one of its parameters.

    Attributes:
        module: Name in the base model (see :class:`~deltaw.lora.peft_updates.FileUpdate`).
        rank: Rank r. For stacked experts, the rank of one expert.
        scaling: Factor of B·A.
        parameters: Number of trained parameters in A and B.
        norm: ‖ΔW‖_F over all experts, or NaN if a factor is not finite.
        largest: Largest singular value of ΔW over all experts.
        effective_rank: Effective rank (Roy and Vetterli), averaged over experts.
        stable_rank: ‖ΔW‖_F² / σ_max², averaged over experts.
        untrained: True if B is zero.
        experts: Number of matrices that are stacked in the weight, or None for a single matrix.
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
    """Summary of the modules of one kind, such as ``q_proj``: mean ranks, and the norm over all ΔW."""

    kind: str
    count: int
    ranks: list[int]
    parameters: int
    norm: float
    effective_rank: float
    stable_rank: float


@dataclass(frozen=True)
class AdapterReport:
    """Result of :func:`inspect_adapter`.

    Attributes:
        folder: Folder of the adapter.
        base_model: Name of the base model in the adapter's metadata, or None.
        alpha: Alpha of the adapter. Individual modules may differ, see their scaling.
        ranks: Distinct ranks in ascending order.
        scalings: Distinct scalings in ascending order.
        size_bytes: Size of the files on disk.
        trained_parameters: Number of parameters in the adapter.
        other_parameters: Number of parameters outside of A and B: entire modules, biases, token rows.
        other_tensors: Names of the tensors with these parameters.
        bias_parameters: Number of parameters in biases of B (``lora_bias``).
        bias_norm: Norm of everything that these biases add to outputs, scaling · c.
        token_rows: Number of trained token rows by embedding or head.
        norm: ‖ΔW‖_F over all modules.
        modules: All adapted modules.
        warnings: Problems to consider before using the adapter.
        trained_from: Earlier runs that the adapter was trained from, the latest first.
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
    trained_from: list[str] = field(default_factory=list)

    def kinds(self) -> list[KindUpdate]:
        """Return the modules grouped by kind, largest norm first."""
        grouped: dict[str, list[ModuleUpdate]] = defaultdict(list)
        for module, kind in zip(self.modules, module_kinds([m.module for m in self.modules]), strict=True):
            grouped[kind].append(module)
        kinds = []
        for kind, group in grouped.items():
            ranks = sorted({m.rank for m in group})
            parameters = sum(m.parameters for m in group)
            norm = root_sum_of_squares(m.norm for m in group)
            effective = sum(m.effective_rank for m in group) / len(group)
            stable = sum(m.stable_rank for m in group) / len(group)
            kinds.append(KindUpdate(kind, len(group), ranks, parameters, norm, effective, stable))
        return sorted(kinds, key=lambda kind: (-kind.norm if math.isfinite(kind.norm) else 0.0, kind.kind))

    def layers(self) -> dict[str, float]:
        """Return ‖ΔW‖_F of each layer in order, without modules outside of layers."""
        norms: dict[str, list[float]] = defaultdict(list)
        for module in self.modules:
            if match := re.match(r"(?:.*?\.)?\d+(?=\.|$)", module.module):  # up to the first number
                norms[match[0]].append(module.norm)
        return {layer: root_sum_of_squares(norms[layer]) for layer in sorted(norms, key=natural_key)}

    def largest_changes(self) -> list[tuple[str, float]]:
        """Return the five layers with the largest ‖ΔW‖_F, largest first, or modules if the model has no layers."""
        norms = self.layers() or {module.module: module.norm for module in self.modules}
        return sorted([(name, norm) for name, norm in norms.items() if norm > 0], key=lambda entry: -entry[1])[:5]

    def as_dict(self) -> dict[str, object]:
        """Return plain values for JSON. Non-finite numbers become None."""
        values = asdict(self)
        values["kinds"] = [asdict(kind) for kind in self.kinds()]
        values["layers"] = [{"layer": layer, "norm": norm} for layer, norm in self.layers().items()]
        values["largest_changes"] = [{"name": name, "norm": norm} for name, norm in self.largest_changes()]
        return {key: without_nan(value) for key, value in values.items()}

    def render(self) -> RenderableType:
        """Return the report for a terminal."""
        parts: list[RenderableType] = [self._head()]
        if self.modules:
            parts += [Text(), self._table()]
        layers = self.layers()
        if len(layers) > 1:
            parts += [Text(), _sparkline(layers)]
        if largest := self.largest_changes():
            parts.append(Text("largest changes: " + ", ".join(f"{name} ({norm:.3g})" for name, norm in largest)))
        parts += [Text(f"warning: {warning}", style="yellow") for warning in self.warnings]
        return Group(*parts)

    def _head(self) -> Table:
        head = Table.grid(padding=(0, 2))
        head.add_row("adapter", self.folder)
        head.add_row("base model", self.base_model or "not named")
        for line in self.trained_from:
            head.add_row("trained", line)
        if self.modules:
            ranks = ", ".join(str(rank) for rank in self.ranks)
            scalings = ", ".join(f"{value:g}" for value in self.scalings)
            head.add_row("rank", f"{ranks}   alpha {self.alpha:g}   scaling {scalings}")
            head.add_row("‖ΔW‖", f"{self.norm:.4g} over {len(self.modules)} modules")
        if self.bias_parameters:
            head.add_row("bias on B", f"norm {self.bias_norm:.4g}, {self.bias_parameters:,} parameters")
        if self.token_rows:
            head.add_row("token rows", first_names([f"{count} of {name}" for name, count in self.token_rows.items()]))
        trained = f"{self.trained_parameters:,} parameters"
        if self.other_parameters:
            trained += f", {self.other_parameters:,} of them outside A and B ({first_names(self.other_tensors)})"
        head.add_row("trained", trained)
        head.add_row("on disk", f"{self.size_bytes / 1e6:.2f} MB")
        return head

    def _table(self) -> Table:
        kinds = self.kinds()
        rows = []
        for kind in kinds[:_MAX_KINDS]:
            ranks = "–".join(map(str, sorted({kind.ranks[0], kind.ranks[-1]})))
            measurements = (f"{kind.norm:.4g}", f"{kind.effective_rank:.1f}", f"{kind.stable_rank:.1f}")
            rows.append([kind.kind, str(kind.count), ranks, f"{kind.parameters:,}", *measurements])
        if len(kinds) > _MAX_KINDS:
            rows.append([f"and {len(kinds) - _MAX_KINDS} more kinds"])
        heads = ("module kind", "modules", "rank", "parameters", "‖ΔW‖", "effective rank", "stable rank")
        return table(heads, rows, **PLAIN)


def inspect_adapter(folder: str | Path) -> AdapterReport:
    """Measure the adapter in ``folder``.

    Raises:
        UserError: If the folder contains no adapter, or a damaged one.
    """
    folder = adapter_folder(folder)
    adapter = read_adapter(folder)
    content = read_content(adapter)
    modules = [_update(update) for update in sorted(content.updates, key=lambda item: natural_key(item.name))]
    other_sizes = {name: tensor.numel() for name, tensor in content.other_tensors.items()}
    other_sizes |= {f"{name}.lora_B.bias": tensor.numel() for name, tensor in content.biases.items()}
    other_sizes |= {f"{name} (token rows)": rows.numel() for name, rows in content.token_rows.items()}
    return AdapterReport(
        folder=str(folder),
        base_model=adapter.metadata.get("base_model_name_or_path") or None,
        alpha=adapter.config.alpha,
        ranks=sorted({module.rank for module in modules}),
        scalings=sorted({module.scaling for module in modules}),
        size_bytes=sum(file.stat().st_size for file in Path(folder).glob("adapter_*") if file.is_file()),
        trained_parameters=sum(tensor.numel() for tensor in adapter.tensors.values()),
        other_parameters=sum(other_sizes.values()),
        other_tensors=sorted(other_sizes, key=natural_key),
        bias_parameters=sum(tensor.numel() for tensor in content.biases.values()),
        bias_norm=root_sum_of_squares(float(bias.norm()) for bias in content.biases.values()),
        token_rows={name: rows.shape[0] for name, rows in content.token_rows.items()},
        norm=root_sum_of_squares(module.norm for module in modules),
        modules=modules,
        warnings=_warnings(modules, content, adapter.tensors),
        trained_from=lineage_lines(read_lineage(Path(folder))),
    )


def update_singular_values(update: FileUpdate) -> list[Tensor]:
    """Return the singular values of each finite ΔW of an update."""
    pairs = [pair for pair in update.pairs() if all(factor.isfinite().all() for factor in pair)]
    return [singular_values(*pair, update.scaling * update.times) for pair in pairs]


def _update(update: FileUpdate) -> ModuleUpdate:
    a = update.factor_A
    b = update.factor_B
    if a.isfinite().all() and b.isfinite().all():
        values = update_singular_values(update)
        norm = root_sum_of_squares(float(matrix_values.norm()) for matrix_values in values)
        largest = max((float(matrix_values[0]) for matrix_values in values if matrix_values.numel()), default=0.0)
        effective = sum(effective_rank(matrix_values) for matrix_values in values) / len(values)
        stable = sum(stable_rank(matrix_values) for matrix_values in values) / len(values)
    else:
        norm = largest = effective = stable = math.nan
    untrained = not (math.isnan(norm) or bool(b.any()))
    measurements = (norm, largest, effective, stable)
    parameters = a.numel() + b.numel()
    return ModuleUpdate(update.name, update.rank, update.scaling, parameters, *measurements, untrained, update.experts)


def _warnings(modules: list[ModuleUpdate], content: FileContent, tensors: Mapping[str, Tensor]) -> list[str]:
    messages = []
    untrained = [module.module for module in modules if module.untrained]
    if untrained and len(untrained) == len(modules):
        has_other_tensors = content.other_tensors or content.biases or content.token_rows
        consequence = "only its other tensors change the model" if has_other_tensors else "the adapter is untrained"
        messages.append(f"B is zero in all modules: {consequence}")
    elif untrained:
        messages.append(f"B is zero in {len(untrained)} of {len(modules)} modules: {first_names(untrained)}")
    if broken := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        messages.append(f"{len(broken)} tensors contain numbers that are not finite: {first_names(broken)}")
    if content.incomplete:
        messages.append(f"{len(content.incomplete)} modules have only one factor: {first_names(content.incomplete)}")
    if unsure := [update.name for update in content.updates if not update.certain]:
        messages.append(f"rank and norm are uncertain for {first_names(unsure)}: a pattern names single parameters")
    return messages


def module_kinds(names: Sequence[str]) -> list[str]:
    """Return the kind of each module: its name without numbers, reduced to the last parts that distinguish kinds."""
    patterns = [tuple(part for part in name.split(".") if not part.isdigit()) for name in names]
    distinct = set(patterns)
    kinds: dict[tuple[str, ...], str] = {}
    for pattern in distinct:
        lengths = range(1, len(pattern))
        length = next((n for n in lengths if sum(other[-n:] == pattern[-n:] for other in distinct) == 1), len(pattern))
        kinds[pattern] = ".".join(pattern[-length:])
    return [kinds[pattern] for pattern in patterns]


def natural_key(name: str) -> list[tuple[int, str]]:
    """Return a sort key that orders layer 10 after layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _sparkline(layers: Mapping[str, float]) -> Text:
    top = max((norm for norm in layers.values() if math.isfinite(norm)), default=0.0)
    steps = (len(_BARS) - 1) / (top or 1.0)
    bars = "".join(_BARS[round(norm * steps)] if math.isfinite(norm) else "?" for norm in layers.values())
    names = list(layers)
    return Text(f"‖ΔW‖ by layer, {names[0]} to {names[-1]} (highest {top:.3g})\n{bars}")


def root_sum_of_squares(values: Iterable[float]) -> float:
    """Return the norm of a vector from the norms of its parts."""
    return math.sqrt(sum(value * value for value in values))
