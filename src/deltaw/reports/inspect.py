"""What an adapter holds, and what its training has moved, on one page.

Read from the adapter's files alone: the base model is not needed, so norms are those of ΔW itself and not
relative to W. It does not know how the adapter was trained.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from deltaw.lora import read_adapter
from deltaw.lora.files import AdapterFile
from deltaw.lora.peft_updates import FileContent, FileUpdate, content_of
from deltaw.reports.adapter_math import effective_rank, frobenius_norm, singular_values, stable_rank

_BARS = "▁▂▃▄▅▆▇█"
_KINDS_SHOWN = 14
_LAYERS_NAMED = 5


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
        for module, kind in zip(self.modules, _kinds([m.module for m in self.modules]), strict=True):
            grouped[kind].append(module)
        kinds = [
            KindUpdate(
                kind=kind,
                count=len(group),
                ranks=sorted({m.rank for m in group}),
                parameters=sum(m.parameters for m in group),
                norm=root_sum_of_squares(m.norm for m in group),
                effective_rank=sum(m.effective_rank for m in group) / len(group),
                stable_rank=sum(m.stable_rank for m in group) / len(group),
            )
            for kind, group in grouped.items()
        ]
        return sorted(kinds, key=lambda kind: (-_finite(kind.norm), kind.kind))

    def layers(self) -> dict[str, float]:
        """‖ΔW‖_F of each layer, in the order of the layers; without modules outside of layers."""
        squares: dict[str, list[float]] = defaultdict(list)
        for module in self.modules:
            layer = _layer(module.module)
            if layer is not None:
                squares[layer].append(module.norm)
        ordered = sorted(squares, key=natural)
        return {layer: root_sum_of_squares(squares[layer]) for layer in ordered}

    def most_moved(self, count: int = _LAYERS_NAMED) -> list[tuple[str, float]]:
        """The layers with the largest ‖ΔW‖_F, largest first; modules where there are no layers."""
        norms = self.layers() or {module.module: module.norm for module in self.modules}
        moved = [(name, norm) for name, norm in norms.items() if norm > 0]
        return sorted(moved, key=lambda entry: -entry[1])[:count]

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
        moved = self.most_moved()
        if moved:
            said = ", ".join(f"{name} ({norm:.3g})" for name, norm in moved)
            parts.append(Text(f"moved most: {said}"))
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
            head.add_row("token rows", shortened(rows))
        trained = f"{self.trained_parameters:,} parameters"
        if self.other_parameters:
            trained += (
                f", {self.other_parameters:,} of them outside A and B ({shortened(self.other_tensors)})"
            )
        head.add_row("trained", trained)
        head.add_row("on disk", f"{self.size_bytes / 1e6:.2f} MB")
        return head

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("module kind")
        for title in ("modules", "rank", "parameters", "‖ΔW‖", "effective rank", "stable rank"):
            table.add_column(title, justify="right")
        kinds = self.kinds()
        for kind in kinds[:_KINDS_SHOWN]:
            table.add_row(
                kind.kind,
                str(kind.count),
                "–".join(str(rank) for rank in sorted({kind.ranks[0], kind.ranks[-1]})),
                f"{kind.parameters:,}",
                f"{kind.norm:.4g}",
                f"{kind.effective_rank:.1f}",
                f"{kind.stable_rank:.1f}",
            )
        if len(kinds) > _KINDS_SHOWN:
            table.add_row(f"and {len(kinds) - _KINDS_SHOWN} more kinds")
        return table


def inspect_adapter(folder: str | Path) -> AdapterReport:
    """Measure the adapter in ``folder``.

    Raises:
        UserError: the folder holds no adapter, or a damaged one.
    """
    return describe(read_adapter(folder), Path(folder))


def describe(adapter: AdapterFile, folder: Path) -> AdapterReport:
    """Measure an adapter that has been read; ``folder`` is where it lies, for its size."""
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
        size_bytes=sum(file.stat().st_size for file in folder.glob("adapter_*") if file.is_file()),
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


def _update(update: FileUpdate) -> ModuleUpdate:
    a, b = update.factor_A, update.factor_B
    parameters = a.numel() + b.numel()
    if not (bool(torch.isfinite(a).all()) and bool(torch.isfinite(b).all())):
        norm = largest = effective = stable = math.nan
    else:
        pairs = update.pairs()
        factor = update.scaling * update.times
        values = [singular_values(left, right, factor) for left, right in pairs]
        norm = root_sum_of_squares(frobenius_norm(left, right, factor) for left, right in pairs)
        largest = max((float(of_one[0]) for of_one in values if of_one.numel()), default=0.0)
        effective = sum(effective_rank(of_one) for of_one in values) / len(values)
        stable = sum(stable_rank(of_one) for of_one in values) / len(values)
    return ModuleUpdate(
        module=update.name,
        rank=update.rank,
        scaling=update.scaling,
        parameters=parameters,
        norm=norm,
        largest=largest,
        effective_rank=effective,
        stable_rank=stable,
        untrained=not (math.isnan(norm) or bool(b.any())),
        experts=update.experts,
    )


def _warnings(
    modules: list[ModuleUpdate], content: FileContent, tensors: Mapping[str, torch.Tensor]
) -> list[str]:
    found = []
    untrained = [module.module for module in modules if module.untrained]
    if untrained and len(untrained) == len(modules):
        if content.others or content.biases or content.token_rows:
            found.append("B is zero in all modules: only what is outside A and B can change the model")
        else:
            found.append("B is zero in all modules: the adapter is untrained and changes nothing")
    elif untrained:
        found.append(f"B is zero in {len(untrained)} of {len(modules)} modules: {shortened(untrained)}")
    broken = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        found.append(f"{len(broken)} tensors hold numbers that are not finite: {shortened(broken)}")
    if content.halves:
        found.append(
            f"{len(content.halves)} modules have one factor without the other: {shortened(content.halves)}"
        )
    unsure = [update.name for update in content.updates if not update.certain]
    if unsure:
        found.append(
            "rank_pattern or alpha_pattern tells parameters of one module apart, and the file does not: "
            f"rank and norm are uncertain for {shortened(unsure)}"
        )
    return found


def _kinds(modules: list[str]) -> list[str]:
    """What kind each module is: the last part of its name, or the last two where that is ambiguous."""
    pattern = [re.sub(r"(?<=\.)\d+(?=\.|$)", "*", module) for module in modules]
    homes: dict[str, set[str]] = defaultdict(set)
    for path in pattern:
        homes[path.rpartition(".")[2]].add(path)
    kinds = []
    for path in pattern:
        last = path.rpartition(".")[2]
        kinds.append(last if len(homes[last]) == 1 and last != "*" else ".".join(path.split(".")[-2:]))
    return kinds


def _layer(module: str) -> str | None:
    """The name up to its first number, which is the layer's; None outside of layers."""
    found = re.match(r"(?:.*?\.)?\d+(?=\.|$)", module)
    return found[0] if found else None


def natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts layer 10 behind layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _sparkline(layers: Mapping[str, float]) -> Text:
    top = max((_finite(norm) for norm in layers.values()), default=0.0)
    bars = ""
    for norm in layers.values():
        step = 0 if top == 0 else round(_finite(norm) / top * (len(_BARS) - 1))
        bars += _BARS[step] if math.isfinite(norm) else "?"
    names = list(layers)
    return Text(f"‖ΔW‖ by layer, {names[0]} to {names[-1]} (highest {top:.3g})\n{bars}")


def shortened(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def root_sum_of_squares(values: Iterable[float]) -> float:
    """The norm of a whole from those of its parts."""
    return math.sqrt(sum(value * value for value in values))


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def without_nan(value: object) -> object:
    """``value`` with every number in it that is not finite as None, for JSON."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(entry) for entry in value]
    return value
