"""What is adapted below the level of a module: parameters (``target_parameters``) and rows of embeddings
(``trainable_token_indices``).

Names match by PEFT's rules. ``layers`` and ``exclude_modules`` are about modules and do not concern these, as
in PEFT. It looks at names, types and shapes, and changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from deltaw.errors import UserError
from deltaw.kernels.torch_private import own_parameters
from deltaw.lora.config import LoRAConfig
from deltaw.lora.kinds import is_conv1d, read_directly, refusal
from deltaw.lora.layers_parameter import parameter_refusal
from deltaw.lora.matching import Named, match_entries
from deltaw.lora.stored import quantized_as


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


def _refuse_tokens(
    named: Named, tokens: tuple[int, ...], adapted: set[int], inside: set[int], strict: bool
) -> None:
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
