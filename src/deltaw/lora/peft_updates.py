"""The updates ΔW that an adapter file holds, told from the file alone, without the base model.

A file names factors by PEFT's wrappers, not by what they adapt. Three facts follow from the settings and the
shapes: how many experts share one pair of matrices, whose rank and alpha a wrapper has, and whether PEFT
adds the update twice.

One thing cannot be told. Wrappers around one module nest in the order of the module's own parameters, which
no file has. So where ``target_parameters`` names several of them, an update is called by its number.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from deltaw.lora.config import LoRAConfig, scaling
from deltaw.lora.expressions import matches
from deltaw.lora.files import AdapterFile
from deltaw.lora.initialize import from_peft
from deltaw.lora.matching import endings, values_by_pattern
from deltaw.lora.peft_format import attention_counts_twice, without_wrappers

_FACTOR = re.compile(r"(?P<path>.+)\.lora_(?:embedding_)?(?P<factor>[AB])(?:\.weight)?")
_INNER = ".base_layer"
_MOST_ORDERS = 720
"""Orders of a module's parameters that are tried; as many as six parameters have."""

Factors = Mapping[str, Tensor]


@dataclass(frozen=True)
class FileUpdate:
    """One ΔW = times · scaling · B·A, for each expert alike.

    Attributes:
        name: what it adapts: a module, a parameter (``experts.down_proj``), or one of several parameters of a
            module by its number in the module's order (``experts #2``).
        path: the module's name in the file, wrappers included.
        rank: r, of one expert.
        scaling: the factor of B·A.
        times: how often PEFT adds the update to its weight: 2 for an attention's output projection, else 1.
        experts: how many matrices share the factors; None for a weight that is one matrix.
        factor_A, factor_B: as in the file: A (experts·r, in) and B (out, r·experts).
        certain: whether rank and alpha are certain; not where patterns give a module's parameters different
            ones and shapes do not tell which is which.
    """

    name: str
    path: str
    rank: int
    scaling: float
    factor_A: Tensor
    factor_B: Tensor
    times: int = 1
    experts: int | None = None
    certain: bool = True

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """A (r, in) and B (out, r) of each expert; one pair, in the file's shapes, where there are none."""
        if self.experts is None:
            return [(self.factor_A, self.factor_B)]
        stacks = (from_peft(self.factor_A, "lora_A", self.experts), from_peft(self.factor_B, "lora_B", self.experts))
        return [(a.t(), b.t()) for a, b in zip(*stacks, strict=True)]


@dataclass(frozen=True)
class FileContent:
    """An adapter file's tensors by what they are.

    Attributes:
        updates: all ΔW, in the order of the file.
        halves: modules with one factor and not the other.
        biases: c, the bias on B (``lora_bias``), by module, times scaling.
        token_rows: new rows of tokens (k, dim), by module: values, not differences.
        others: everything else, by the model's own names: extra trainable modules, biases, magnitudes.
    """

    updates: list[FileUpdate]
    halves: list[str]
    biases: dict[str, Tensor]
    token_rows: dict[str, Tensor]
    others: dict[str, Tensor]


def content_of(adapter: AdapterFile) -> FileContent:
    """Sort an adapter's tensors."""
    config = adapter.config
    factors: dict[str, dict[str, Tensor]] = defaultdict(dict)
    biases, rows, others = {}, {}, {}
    for name, tensor in adapter.tensors.items():
        plain = without_wrappers(name)
        if found := _FACTOR.fullmatch(name):
            factors[found["path"]][found["factor"]] = tensor
        elif plain.endswith(".lora_B.bias"):
            biases[plain.removesuffix(".lora_B.bias")] = tensor
        elif plain.endswith(".token_adapter.trainable_tokens_delta"):
            rows[plain.removesuffix(".token_adapter.trainable_tokens_delta")] = tensor
        else:
            others[plain] = tensor
    whole = {path: pair for path, pair in factors.items() if len(pair) == 2}
    twice = attention_counts_twice(adapter.metadata.get("peft_version"))
    updates = list(_updates(whole, config, twice))
    scalings = {update.name: update.scaling for update in updates}
    biases = {name: c.double() * scalings.get(name, 1.0) for name, c in biases.items()}
    halves = [without_wrappers(path) for path, pair in factors.items() if len(pair) != 2]
    return FileContent(updates, halves, biases, rows, others)


def _updates(factors: Mapping[str, Factors], config: LoRAConfig, twice: bool) -> Iterator[FileUpdate]:
    by_module: dict[str, list[str]] = defaultdict(list)
    for path in factors:
        by_module[without_wrappers(path)].append(path)
    meant = _Meant(config, list(by_module))
    for module, paths in by_module.items():
        if parameters := meant.parameters(module):
            yield from _of_parameters(module, paths, parameters, factors, meant)
            continue
        for path in paths:
            attention = _attention_of(path, factors)
            # PEFT gives the output projection the rank and the alpha of its attention.
            owner = module if attention is None else without_wrappers(attention)
            rank, times = factors[path]["A"].shape[0], 2 if twice and attention is not None else 1
            yield meant.update(module, path, factors[path], rank, meant.alpha(owner), times=times)


def _of_parameters(
    module: str, paths: list[str], parameters: list[str], factors: Mapping[str, Factors], meant: _Meant
) -> Iterator[FileUpdate]:
    """The updates of a module's parameters, of which the first has the innermost wrapper."""
    paths = sorted(paths, key=lambda path: -path.count(_INNER))
    rows = [factors[path]["A"].shape[0] for path in paths]
    fitting = []
    for order in itertools.islice(itertools.permutations(parameters, len(paths)), _MOST_ORDERS):
        ranks = [meant.rank(name) for name in order]
        alphas = [meant.alpha(name) for name in order]
        if all(row % rank == 0 for row, rank in zip(rows, ranks, strict=True)):
            fitting.append((order, ranks, alphas))
    # Most modules have as many experts in one parameter as in another.
    counts = [len({row // rank for row, rank in zip(rows, ranks, strict=True)}) for _, ranks, _ in fitting]
    best = [fit for fit, count in zip(fitting, counts, strict=True) if count == min(counts)]
    if not best:
        for path, row in zip(paths, rows, strict=True):
            yield meant.update(module, path, factors[path], row, meant.config.alpha, certain=False)
        return
    order, ranks, alphas = best[0]
    certain = all(fit[1:] == (ranks, alphas) for fit in best)
    for number, (path, rank, alpha) in enumerate(zip(paths, ranks, alphas, strict=True)):
        name = order[0] if len(best) == 1 and len(order) == 1 else f"{module} #{number + 1}"
        count = factors[path]["A"].shape[0] // rank
        experts = count if count > 1 else None
        yield meant.update(name, path, factors[path], rank, alpha, experts=experts, certain=certain)


class _Meant:
    """What settings mean for the modules that a file has factors of.

    Raises:
        UserError: an expression of the settings takes more than the limits.
    """

    def __init__(self, config: LoRAConfig, modules: list[str]) -> None:
        self.config = config
        self._lasts = [entry.rpartition(".") for entry in config.target_parameters]
        names = [*modules, *(f"{module}.{last}" for module in modules for _, _, last in self._lasts)]
        self._ranks = values_by_pattern("rank_pattern", config.rank_pattern, names)
        self._alphas = values_by_pattern("alpha_pattern", config.alpha_pattern, names)
        self._whole: set[str] = set()  # modules whose weight is adapted, not other parameters
        if self._lasts:
            excluded = _means("exclude_modules", config.exclude_modules or [], modules)
            self._whole = _means("target_modules", config.target_modules, modules) - excluded

    def update(self, name: str, path: str, pair: Factors, rank: int, alpha: float, **more: Any) -> FileUpdate:
        """The update of a pair of factors."""
        factor = scaling(rank, alpha, self.config.rslora)
        return FileUpdate(name, path, rank, factor, pair["A"], pair["B"], **more)

    def rank(self, name: str) -> int:
        """Of a module or a parameter."""
        return int(self._ranks.get(name, self.config.rank))

    def alpha(self, name: str) -> float:
        """Of a module or a parameter."""
        return self._alphas.get(name, self.config.alpha)

    def parameters(self, module: str) -> list[str]:
        """Full names of the parameters of ``module`` that ``target_parameters`` may mean."""
        if module in self._whole:
            return []
        of_module = {"", *endings(module)}
        found = (f"{module}.{last}" for owner, _, last in self._lasts if owner in of_module)
        return list(dict.fromkeys(found))


def _means(key: str, wanted: str | list[str], modules: list[str]) -> set[str]:
    """The modules that a text (full expression) or a list (name endings) means."""
    if isinstance(wanted, str):
        return set(matches(key, [wanted], modules)[0])
    return {module for module in modules if not set(wanted).isdisjoint(endings(module))}


def _attention_of(path: str, factors: Mapping[str, Factors]) -> str | None:
    """The ``nn.MultiheadAttention`` whose output projection ``path`` is; None for anything else.

    Its projection lies inside its own wrapper, and its shapes are (3·dim, dim) and (dim, dim).
    """
    outer, found, _ = path.rpartition(f"{_INNER}.out_proj")
    if not found or outer not in factors or path != f"{outer}{found}":
        return None
    dim = factors[path]["A"].shape[-1]
    shapes = (factors[path]["B"].shape[0], factors[outer]["A"].shape[-1], factors[outer]["B"].shape[0])
    return outer if shapes == (dim, dim, 3 * dim) else None
