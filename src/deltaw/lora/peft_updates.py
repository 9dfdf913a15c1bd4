"""Read the updates ΔW from an adapter file without the base model.

Settings and shapes determine the number of experts that share a pair of matrices, the rank and alpha of a wrapper, and
whether PEFT adds an update twice. One thing is not in the file: the wrappers of several parameters of a module are
nested in the module's parameter order. If ``target_parameters`` names several of them, updates are therefore numbered.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from deltaw.lora.config import LoRAConfig, scaling
from deltaw.lora.expressions import matches
from deltaw.lora.files import AdapterFile
from deltaw.lora.initialize import from_peft
from deltaw.lora.peft_format import attention_counts_twice, without_wrappers
from deltaw.lora.select import endings, values_by_pattern

_FACTOR = re.compile(r"(?P<path>.+)\.lora_(?:embedding_)?(?P<factor>[AB])(?:\.weight)?")
_INNER = ".base_layer"
_MAX_ORDERS = 720
"""Maximum number of parameter orders to try, the number of permutations of six parameters."""

Factors = Mapping[str, Tensor]


@dataclass(frozen=True)
class FileUpdate:
    """One ΔW = times · scaling · B·A, for each expert.

    Attributes:
        name: Adapted module or parameter (``experts.down_proj``), or a parameter's number in the order of its module
            (``experts #2``).
        path: Name of the module in the file, including wrappers.
        rank: Rank of one expert.
        scaling: Factor of B·A.
        factor_A: A as in the file, (experts·r, in).
        factor_B: B as in the file, (out, r·experts).
        times: Number of times that PEFT adds the update: 2 for an attention's output projection, else 1.
        experts: Number of matrices that share the factors, or None for a single matrix.
        certain: False if patterns assign different ranks or alphas to a module's parameters and the shapes are
            ambiguous.
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
        """Return A (r, in) and B (out, r) of each expert, or one pair with the file's shapes without experts."""
        if self.experts is None:
            return [(self.factor_A, self.factor_B)]
        stacks = (from_peft(self.factor_A, "lora_A", self.experts), from_peft(self.factor_B, "lora_B", self.experts))
        return [(a.t(), b.t()) for a, b in zip(*stacks, strict=True)]


@dataclass(frozen=True)
class FileContent:
    """Tensors of an adapter file by type.

    Attributes:
        updates: All ΔW in file order.
        incomplete: Modules with only one of the two factors.
        biases: Biases on B (``lora_bias``) times scaling, by module.
        token_rows: New rows of tokens (k, dim) by module. They are values, not differences.
        other_tensors: All other tensors by the model's names: extra trainable modules, biases, magnitudes.
    """

    updates: list[FileUpdate]
    incomplete: list[str]
    biases: dict[str, Tensor]
    token_rows: dict[str, Tensor]
    other_tensors: dict[str, Tensor]


def read_content(adapter: AdapterFile) -> FileContent:
    """Classify an adapter's tensors."""
    config = adapter.config
    factors: dict[str, dict[str, Tensor]] = defaultdict(dict)
    biases = {}
    rows = {}
    other_tensors = {}
    for name, tensor in adapter.tensors.items():
        plain = without_wrappers(name)
        if match := _FACTOR.fullmatch(name):
            factors[match["path"]][match["factor"]] = tensor
        elif plain.endswith(".lora_B.bias"):
            biases[plain.removesuffix(".lora_B.bias")] = tensor
        elif plain.endswith(".token_adapter.trainable_tokens_delta"):
            rows[plain.removesuffix(".token_adapter.trainable_tokens_delta")] = tensor
        else:
            other_tensors[plain] = tensor
    complete = {path: pair for path, pair in factors.items() if len(pair) == 2}
    updates = list(_updates(complete, config, attention_counts_twice(adapter.metadata.get("peft_version"))))
    scalings = {update.name: update.scaling for update in updates}
    biases = {name: c.double() * scalings.get(name, 1.0) for name, c in biases.items()}
    incomplete = [without_wrappers(path) for path, pair in factors.items() if len(pair) != 2]
    return FileContent(updates, incomplete, biases, rows, other_tensors)


def _updates(factors: Mapping[str, Factors], config: LoRAConfig, doubled: bool) -> Iterator[FileUpdate]:
    by_module: dict[str, list[str]] = defaultdict(list)
    for path in factors:
        by_module[without_wrappers(path)].append(path)
    patterns = _ResolvedPatterns(config, list(by_module))
    for module, paths in by_module.items():
        if parameters := patterns.parameters(module):
            yield from _parameter_updates(module, paths, parameters, factors, patterns)
            continue
        for path in paths:
            attention = _find_attention(path, factors)
            # PEFT gives the output projection the rank and the alpha of its attention.
            owner = module if attention is None else without_wrappers(attention)
            rank = factors[path]["A"].shape[0]
            times = 2 if doubled and attention is not None else 1
            yield patterns.update(module, path, factors[path], rank, patterns.alpha(owner), times)


def _parameter_updates(
    module: str, paths: list[str], parameters: list[str], factors: Mapping[str, Factors], patterns: _ResolvedPatterns
) -> Iterator[FileUpdate]:
    """Yield the updates of a module's parameters, of which the first has the innermost wrapper."""
    paths = sorted(paths, key=lambda path: -path.count(_INNER))
    rows = [factors[path]["A"].shape[0] for path in paths]
    fitting = []
    for order in itertools.islice(itertools.permutations(parameters, len(paths)), _MAX_ORDERS):
        ranks = [patterns.rank(name) for name in order]
        alphas = [patterns.alpha(name) for name in order]
        if all(row % rank == 0 for row, rank in zip(rows, ranks, strict=True)):
            fitting.append((order, ranks, alphas))
    # Prefer orders in which all parameters have the same number of experts.
    counts = [len({row // rank for row, rank in zip(rows, ranks, strict=True)}) for _, ranks, _ in fitting]
    best = [fit for fit, count in zip(fitting, counts, strict=True) if count == min(counts)]
    if not best:
        for path, row in zip(paths, rows, strict=True):
            yield replace(patterns.update(module, path, factors[path], row, patterns.config.alpha), certain=False)
        return
    order, ranks, alphas = best[0]
    certain = all(fit[1:] == (ranks, alphas) for fit in best)
    for number, (path, rank, alpha) in enumerate(zip(paths, ranks, alphas, strict=True)):
        name = order[0] if len(best) == 1 and len(order) == 1 else f"{module} #{number + 1}"
        update = patterns.update(name, path, factors[path], rank, alpha)
        count = update.factor_A.shape[0] // rank
        yield replace(update, experts=count if count > 1 else None, certain=certain)


class _ResolvedPatterns:
    """Ranks and alphas of the modules in a file according to the settings.

    Raises:
        UserError: if matching an expression exceeds the limits.
    """

    def __init__(self, config: LoRAConfig, modules: list[str]) -> None:
        self.config = config
        self._entries = [entry.rpartition(".") for entry in config.target_parameters]
        names = [*modules, *(f"{module}.{attribute}" for module in modules for _, _, attribute in self._entries)]
        self._ranks = values_by_pattern("rank_pattern", config.rank_pattern, names)
        self._alphas = values_by_pattern("alpha_pattern", config.alpha_pattern, names)
        self._adapted_modules: set[str] = set()  # modules of which only the weight is adapted
        if self._entries:
            excluded = _match_modules("exclude_modules", config.exclude_modules or [], modules)
            self._adapted_modules = _match_modules("target_modules", config.target_modules, modules) - excluded

    def update(self, name: str, path: str, pair: Factors, rank: int, alpha: float, times: int = 1) -> FileUpdate:
        """Return the update of a pair of factors."""
        return FileUpdate(name, path, rank, scaling(rank, alpha, self.config.rslora), pair["A"], pair["B"], times)

    def rank(self, name: str) -> int:
        """Return the rank of a module or a parameter."""
        return int(self._ranks.get(name, self.config.rank))

    def alpha(self, name: str) -> float:
        """Return the alpha of a module or a parameter."""
        return self._alphas.get(name, self.config.alpha)

    def parameters(self, module: str) -> list[str]:
        """Return the full names of the parameters of ``module`` that ``target_parameters`` can match."""
        if module in self._adapted_modules:
            return []
        module_endings = {"", *endings(module)}
        parameter_names = (f"{module}.{attribute}" for owner, _, attribute in self._entries if owner in module_endings)
        return list(dict.fromkeys(parameter_names))


def _match_modules(key: str, value: str | list[str], modules: list[str]) -> set[str]:
    """Return the modules that match a string (full expression) or a list (name endings)."""
    if isinstance(value, str):
        return set(matches(key, [value], modules)[0])
    return {module for module in modules if not set(value).isdisjoint(endings(module))}


def _find_attention(path: str, factors: Mapping[str, Factors]) -> str | None:
    """Return the ``nn.MultiheadAttention`` of which ``path`` is the output projection, or None.

    The output projection is inside the attention's wrapper, and their shapes are (dim, dim) and (3·dim, dim).
    """
    outer, separator, _ = path.rpartition(f"{_INNER}.out_proj")
    if not separator or outer not in factors or path != f"{outer}{separator}":
        return None
    dim = factors[path]["A"].shape[-1]
    shapes = (factors[path]["B"].shape[0], factors[outer]["A"].shape[-1], factors[outer]["B"].shape[0])
    return outer if shapes == (dim, dim, 3 * dim) else None
