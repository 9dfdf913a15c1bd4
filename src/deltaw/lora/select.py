"""Which modules are adapted, which parameters and tokens, and which modules are trained in full.

Entries match by PEFT's rules (``matching``). Beyond those, 'all-linear', 'attention' and 'mlp' choose by kind
and by usual names. An entry that matches nothing is an error that names the nearest modules; PEFT ignores it
without a word.

It looks at names and types only, and changes nothing. Everything is linear in the number of modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from deltaw.errors import UserError
from deltaw.kernels.torch_private import own_parameters
from deltaw.lora.config import KEYWORDS, LoRAConfig, parse_layers
from deltaw.lora.kinds import is_conv1d, is_linear, read_directly, refusal
from deltaw.lora.layers_parameter import parameter_refusal
from deltaw.lora.matching import Named, match_entries, match_patterns, modules_once, shown
from deltaw.lora.stored import quantized_as

# ---- What is adapted below the level of a module: parameters (``target_parameters``) and rows of embeddings
# (``trainable_token_indices``).
#
# Names match by PEFT's rules. ``layers`` and ``exclude_modules`` are about modules and do not concern these, as
# in PEFT. It looks at names, types and shapes, and changes nothing.


@dataclass(frozen=True)
class ParameterPath:
    """A parameter: the names of its module, the module, and the parameter's own name there."""

    names: tuple[str, ...]
    module: nn.Module
    attribute: str

    @property
    def full_names(self) -> tuple[str, ...]:
        """The parameter's names in the model."""
        return tuple(f"{name}.{self.attribute}" for name in self.names)


@dataclass(frozen=True)
class TokenTarget:
    """An embedding or a head whose rows of ``tokens`` are trained, and those whose weight is tied to its."""

    names: tuple[str, ...]
    module: nn.Module
    tokens: tuple[int, ...]
    tied: tuple[Named, ...] = ()


def match_parameters(
    model: nn.Module,
    config: LoRAConfig,
    modules: list[Named],
    adapted: set[int],
    inside: set[int],
    matches: dict[str, tuple[str, ...]],
    strict: bool,
) -> list[ParameterPath]:
    """The parameters that ``target_parameters`` means, in the order of the model.

    Args:
        adapted: ids of the modules that ``target_modules`` means.
        inside: ids of those that are trained in full.

    Raises:
        UserError: an entry matches nothing, or a parameter that cannot be adapted.
    """
    if not config.target_parameters:
        return []
    paths = [
        ParameterPath(named.names, named.module, attribute)
        for named in modules
        for attribute, parameter in own_parameters(named.module).items()
        if parameter is not None
    ]
    by_name = {name: path for path in paths for name in path.full_names}
    named = [Named(path.full_names, path.module) for path in paths]
    own = [entry for entry in config.target_parameters if entry in own_parameters(model)]
    if own and strict:
        raise UserError(
            f"'{own[0]}' is a parameter of the model itself, not of a module in it",
            where="target_parameters",
            hint="put the model into another module, or leave the parameter out",
        )
    found = match_entries("target_parameters", config.target_parameters, named, matches, strict, "parameter")
    chosen = [by_name[match.names[0]] for match in found]
    parents = {name: m.module for m in modules for name in m.names}
    for path in chosen:
        parent = parents.get(path.names[0].rpartition(".")[0], model)
        reason = read_directly(model, path.names[0], parent) or parameter_refusal(path.module, path.attribute)
        if id(path.module) in adapted:
            reason = "target_modules adapts its module already"
        elif id(path.module) in inside:
            reason = "train_modules trains its module in full"
        if reason is not None:
            raise UserError(
                f"'{path.full_names[0]}' cannot be adapted: {reason}",
                where="target_parameters",
                hint="leave it out of target_parameters",
            )
    return chosen


def match_tokens(
    model: nn.Module,
    config: LoRAConfig,
    modules: list[Named],
    adapted: set[int],
    inside: set[int],
    matches: dict[str, tuple[str, ...]],
    strict: bool,
) -> list[TokenTarget]:
    """The embeddings (and heads) that ``trainable_token_indices`` means, each with what is tied to it.

    Raises:
        UserError: no embedding is found, a token is not in it, or another setting trains the same weight.
    """
    wanted = config.trainable_token_indices
    if not wanted:
        return []
    chosen: list[tuple[Named, tuple[int, ...]]] = []
    if isinstance(wanted, Mapping):
        for entry, ids in wanted.items():
            for named in match_entries("trainable_token_indices", [entry], modules, matches, strict):
                chosen.append((named, tuple(ids)))
    else:
        named = _input_embedding(model, modules)
        matches[f"trainable_token_indices of {len(wanted)} tokens"] = (named.names[0],)
        chosen.append((named, tuple(wanted)))
    for named, tokens in chosen:
        _refuse_tokens(named, tokens, adapted, inside, strict)
    return _with_tied(model, chosen, modules, adapted, inside)


def _input_embedding(model: nn.Module, modules: list[Named]) -> Named:
    """The embedding that the model names, else the one called ``embed_tokens`` as in PEFT."""
    getter = getattr(model, "get_input_embeddings", None)
    embedding = getter() if callable(getter) else None
    for named in modules:
        if named.module is embedding:
            return named
    for named in modules:
        if any(name.rpartition(".")[2] == "embed_tokens" for name in named.names):
            return named
    raise UserError(
        "the model does not say which of its modules is the input embedding",
        where="trainable_token_indices",
        hint="name it: trainable_token_indices: {embed: [5, 6]}",
    )


def _refuse_tokens(named: Named, tokens: tuple[int, ...], adapted: set[int], inside: set[int], strict: bool) -> None:
    name, module = named.names[0], named.module
    reason = _rows_refusal(named, adapted, inside)
    if reason is not None:
        raise UserError(
            f"tokens of '{name}' cannot be trained: {reason}",
            where="trainable_token_indices",
            hint="name the module in one setting only, and only an embedding or a linear head here",
        )
    weight = own_parameters(module)["weight"]
    assert weight is not None  # else it was refused
    rows = int(weight.shape[0])
    for token in tokens:
        if token >= rows:
            raise UserError(
                f"token {token} is not in '{name}', which has {rows} rows",
                where="trainable_token_indices",
                hint="resize the model's embeddings first, or name tokens that are there",
            )
        if strict and token == getattr(module, "padding_idx", None):
            raise UserError(
                f"token {token} of '{name}' is the padding token, whose row gets no gradient",
                where="trainable_token_indices",
                hint="leave it out",
            )


def _rows_refusal(named: Named, adapted: set[int], inside: set[int]) -> str | None:
    if id(named.module) in adapted:
        return "target_modules adapts it already"
    if id(named.module) in inside:
        return "train_modules trains it in full"
    if is_conv1d(named.module) or not isinstance(named.module, nn.Embedding | nn.Linear):
        return f"it is a {type(named.module).__name__}, neither an embedding nor a linear head"
    if (kept := quantized_as(named.module)) is not None:
        return f"its weight is {kept}"
    return refusal(named.module)


def _with_tied(
    model: nn.Module,
    chosen: list[tuple[Named, tuple[int, ...]]],
    modules: list[Named],
    adapted: set[int],
    inside: set[int],
) -> list[TokenTarget]:
    """What is tied to the input embedding gets its rows; a module named with other tokens keeps its own.

    As in PEFT, weights count as tied where the model's configuration says so; elsewhere another user of the
    same weight keeps the old rows.
    """
    getter = getattr(model, "get_input_embeddings", None)
    says_tied = bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))
    source = getter() if says_tied and callable(getter) else None
    tokens_of = {id(named.module): tokens for named, tokens in chosen}
    targets: list[TokenTarget] = []
    done: set[int] = set()
    # An embedding comes before the head that is tied to it, whatever order the settings name them in.
    for named, tokens in sorted(chosen, key=lambda pair: not isinstance(pair[0].module, nn.Embedding)):
        if id(named.module) in done:
            continue
        weight = own_parameters(named.module)["weight"]
        tied = [
            other
            for other in modules
            if named.module is source
            and other.module is not source
            and own_parameters(other.module).get("weight") is weight
            and tokens_of.get(id(other.module), tokens) == tokens
        ]
        for other in tied:
            reason = _rows_refusal(other, adapted, inside)
            if reason is not None:
                raise UserError(
                    f"the weight of '{named.names[0]}' is tied to that of '{other.names[0]}', whose rows "
                    f"cannot be trained: {reason}",
                    where="trainable_token_indices",
                    hint=f"leave '{other.names[0]}' out of the other setting, or untie the two",
                )
        done |= {id(named.module), *(id(other.module) for other in tied)}
        targets.append(TokenTarget(named.names, named.module, tokens, tuple(tied)))
    return targets


# ---- select


HEAD_NAMES = frozenset({"lm_head", "score", "classifier", "classification_head", "qa_outputs", "embed_out", "head"})
"""Output heads, by the first part of their name; asked only where the model itself names none."""

_ATTENTION = """
    q_proj k_proj v_proj o_proj qkv_proj out_proj query key value query_key_value qkv c_attn Wqkv
    q_lin k_lin v_lin out_lin q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj
"""
_MLP = """
    gate_proj up_proj down_proj gate_up_proj fc1 fc2 fc_in fc_out c_fc dense_h_to_4h dense_4h_to_h
    wi wi_0 wi_1 wo w1 w2 w3 lin1 lin2 linear1 linear2 ffn ffn_output
"""
ATTENTION_NAMES, MLP_NAMES = frozenset(_ATTENTION.split()), frozenset(_MLP.split())
"""Last parts of names that mean attention or an MLP wherever they stand."""

ROUTER_NAMES = frozenset({"gate", "router", "shared_expert_gate"})
"""Choose between experts; they are no part of what 'mlp' means."""

_NOT_OF_ATTENTION = ("dora", "lora_bias")
"""Settings that an adapted ``nn.MultiheadAttention`` has no arithmetic for."""


@dataclass(frozen=True)
class Target:
    """A module to adapt: all the names it stands under, and its rank and alpha."""

    names: tuple[str, ...]
    module: nn.Module
    rank: int
    alpha: float


@dataclass(frozen=True)
class ParameterTarget:
    """A parameter to adapt: the names of the module that has it, its own, and its rank and alpha."""

    names: tuple[str, ...]
    module: nn.Module
    attribute: str
    rank: int
    alpha: float


@dataclass(frozen=True)
class ExtraModule:
    """A module to train in full, and all the names it stands under."""

    names: tuple[str, ...]
    module: nn.Module


@dataclass(frozen=True)
class Selection:
    """What a config means on one model; ``matches`` gives each entry of it the names that it matched."""

    targets: list[Target] = field(default_factory=list)
    extra_modules: list[ExtraModule] = field(default_factory=list)
    parameters: list[ParameterTarget] = field(default_factory=list)
    tokens: list[TokenTarget] = field(default_factory=list)
    matches: dict[str, tuple[str, ...]] = field(default_factory=dict)


def select(model: nn.Module, config: LoRAConfig, strict: bool = True) -> Selection:
    """Find what ``config`` means on ``model``.

    Args:
        model: any module; it is not changed.
        config: the settings.
        strict: False passes over entries that match nothing, as files of other programs may hold some.

    Raises:
        UserError: an entry matches nothing, or a module that cannot be adapted.
    """
    modules = modules_once(model)
    matches: dict[str, tuple[str, ...]] = {}
    extra = _match_extra_modules(config, modules, matches, strict)
    inside = {id(m) for whole in extra for m in whole.module.modules()}
    kept = _targeted(model, config, modules, inside, matches, strict)
    adapted = {id(m.module) for m in kept}
    paths = match_parameters(model, config, modules, adapted, inside, matches, strict)
    tokens = match_tokens(model, config, modules, adapted, inside, matches, strict)
    if not (kept or paths or tokens) and strict:
        raise UserError(
            "target_modules names nothing",
            where="target_modules",
            hint="write 'all-linear', 'attention', 'mlp', or a list of module names",
        )
    patterned = [*kept, *(Named(path.full_names, path.module) for path in paths)]
    ranks = match_patterns("rank_pattern", config.rank_pattern, patterned, matches, strict)
    alphas = match_patterns("alpha_pattern", config.alpha_pattern, patterned, matches, strict)

    def scale(name: str) -> tuple[int, float]:
        return int(ranks.get(name, config.rank)), alphas.get(name, config.alpha)

    targets = [Target(m.names, m.module, *scale(m.names[0])) for m in kept]
    parameters = [ParameterTarget(p.names, p.module, p.attribute, *scale(p.full_names[0])) for p in paths]
    return Selection(targets, extra, parameters, tokens, matches)


def _targeted(
    model: nn.Module,
    config: LoRAConfig,
    modules: list[Named],
    inside: set[int],
    matches: dict[str, tuple[str, ...]],
    strict: bool,
) -> list[Named]:
    """The modules to adapt, without those ``inside`` modules that are trained in full."""
    if not config.target_modules:
        return []
    chosen = _match_targets(model, config, modules, matches, strict)
    excluded = _match_excluded(config, modules, matches, strict)
    chosen = [m for m in chosen if id(m.module) not in excluded]
    if not chosen and strict:
        raise UserError(
            "exclude_modules leaves nothing to adapt", where="exclude_modules", hint="exclude fewer modules"
        )
    kept = [m for m in chosen if id(m.module) not in inside]
    if not kept and strict:
        raise UserError(
            "train_modules holds everything that target_modules matches",
            where="train_modules",
            hint="name the modules in one of the two",
        )
    kept = _in_layers(config, kept, matches, strict)
    _refuse_unsupported(model, config, kept, modules)
    return kept


def _match_targets(
    model: nn.Module, config: LoRAConfig, modules: list[Named], matches: dict[str, tuple[str, ...]], strict: bool
) -> list[Named]:
    wanted = config.target_modules
    if isinstance(wanted, str) and wanted in KEYWORDS:
        found = [m for m in _all_linear(model, modules) if wanted == "all-linear" or _role(m) == wanted]
        if not found and strict:
            raise UserError(
                f"target_modules: '{wanted}' matches no module",
                where="target_modules",
                hint=_linear_there(model, modules),
            )
        matches[f"target_modules '{wanted}'"] = tuple(m.names[0] for m in found)
        return found
    return match_entries("target_modules", wanted, modules, matches, strict)


def _linear_there(model: nn.Module, modules: list[Named]) -> str:
    if is_linear(model):
        return "the model is itself one linear layer: use LoRALinear.from_linear"
    linear = [m.names[0] for m in modules if is_linear(m.module)]
    return f"the linear modules are {shown(linear)}" if linear else "the model has no linear module"


def _all_linear(model: nn.Module, modules: list[Named]) -> list[Named]:
    """All linear modules but the output head: the one the model names, else those of usual names.

    ``nn.MultiheadAttention`` counts as one, with both of its projections.
    """
    head = None
    if callable(getter := getattr(model, "get_output_embeddings", None)):
        head = getter()
    attentions = [m.module for m in modules if isinstance(m.module, nn.MultiheadAttention)]
    below = {id(attention.out_proj) for attention in attentions}
    linear = [
        m
        for m in modules
        if (is_linear(m.module) or isinstance(m.module, nn.MultiheadAttention))
        and m.module is not head
        and id(m.module) not in below
    ]
    if head is not None:
        return linear
    return [m for m in linear if m.names[0].split(".")[0] not in HEAD_NAMES]


def _role(named: Named) -> str | None:
    """'attention' or 'mlp', by the module's own name and those above it; None for neither."""
    parts = named.names[0].split(".")
    last = parts[-1]
    if any("attn" in part.lower() or "attention" in part.lower() for part in parts):
        return "attention"
    if last in ATTENTION_NAMES:
        return "attention"
    if last in ROUTER_NAMES:
        return None
    if last in MLP_NAMES or any(_is_mlp(part) for part in parts[:-1]):
        return "mlp"
    # BERT and its kin: layer.N.intermediate.dense and layer.N.output.dense are the two halves of the MLP.
    bert = len(parts) >= 3 and last == "dense" and parts[-2] in ("intermediate", "output")
    return "mlp" if bert and parts[-3].isdigit() else None


def _is_mlp(part: str) -> bool:
    part = part.lower()
    return any(word in part for word in ("mlp", "ffn", "feed_forward", "feedforward", "expert", "densereludense"))


def _match_excluded(
    config: LoRAConfig, modules: list[Named], matches: dict[str, tuple[str, ...]], strict: bool
) -> set[int]:
    """What exclude_modules leaves out: the modules that it names, and for a list all below them."""
    if config.exclude_modules is None:
        return set()
    found = match_entries("exclude_modules", config.exclude_modules, modules, matches, strict)
    if isinstance(config.exclude_modules, str):
        return {id(m.module) for m in found}
    return {id(below) for m in found for below in m.module.modules()}


def _match_extra_modules(
    config: LoRAConfig, modules: list[Named], matches: dict[str, tuple[str, ...]], strict: bool
) -> list[ExtraModule]:
    """The outermost modules that train_modules names and that have parameters."""
    if not config.train_modules:
        return []
    found = match_entries("train_modules", config.train_modules, modules, matches, strict)
    below = {id(inner) for m in found for inner in m.module.modules() if inner is not m.module}
    outer = [m for m in found if id(m.module) not in below]
    for named in outer:
        kept = next(filter(None, map(quantized_as, named.module.modules())), None)
        if kept is not None:
            raise UserError(
                f"'{named.names[0]}' cannot be trained in full: its weight is {kept}",
                where="train_modules",
                hint="leave it out, or load the model with precision bf16",
            )
        if not any(p.is_floating_point() for p in named.module.parameters()):
            raise UserError(
                f"'{named.names[0]}' has no parameters to train", where="train_modules", hint="leave it out"
            )
    return [ExtraModule(m.names, m.module) for m in outer]


def layer_index(name: str) -> int | None:
    """The layer that a module belongs to: the first number in its name, as PEFT counts."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _in_layers(
    config: LoRAConfig, chosen: list[Named], matches: dict[str, tuple[str, ...]], strict: bool
) -> list[Named]:
    if config.layers is None:
        return chosen
    by_index: dict[int, list[Named]] = {}
    for named in chosen:
        index = layer_index(named.names[0])
        if index is not None:
            by_index.setdefault(index, []).append(named)
    kept: set[int] = set()
    for first, last in parse_layers(config.layers):
        entry = f"{first}-" if last is None else f"{first}" if first == last else f"{first}-{last}"
        stop = max(by_index, default=-1) if last is None else last
        inside = [index for index in by_index if first <= index <= stop]
        if strict and (not inside or stop not in by_index):
            there = f"0 to {max(by_index)}" if by_index else "none"
            raise UserError(
                f"layers '{entry}' names layers with nothing to adapt",
                where="layers",
                hint=f"the layers that target_modules matches in are {there}",
            )
        kept.update(inside)
        matches[f"layers '{entry}'"] = tuple(m.names[0] for i in sorted(inside) for m in by_index[i])
    return [m for m in chosen if layer_index(m.names[0]) in kept]


def _refuse_unsupported(model: nn.Module, config: LoRAConfig, chosen: list[Named], modules: list[Named]) -> None:
    by_name = {name: m.module for m in modules for name in m.names}
    for named in chosen:
        name = named.names[0]
        parent, _, last = name.rpartition(".")
        reason = read_directly(model, name, by_name.get(parent, model)) or refusal(named.module)
        if reason is None and isinstance(named.module, nn.MultiheadAttention):
            reason = next(
                (f"nn.MultiheadAttention has no {key}" for key in _NOT_OF_ATTENTION if getattr(config, key)), None
            )
        if reason is None:
            continue
        below = [f"{name}.{n}" for n, m in named.module.named_modules() if n and is_linear(m)]
        hint = f"leave it out: exclude_modules: ['{last}']"
        if isinstance(by_name.get(parent), nn.MultiheadAttention):
            hint = f"adapt the attention as a whole: '{parent}'"
        elif below and not isinstance(named.module, nn.MultiheadAttention):
            hint = f"name what is in it: {shown(below)}"
        raise UserError(f"'{name}' cannot be adapted: {reason}", where=name, hint=hint)
