"""Select the modules, parameters and tokens to adapt, and the modules to train in full.

Entries match by PEFT's rules. An entry of a list matches a full name, or the end of a name after a dot. A string is a
regular expression for the full name. A key of a pattern is a regular expression for the end of a name. In addition,
'all-linear', 'attention' and 'mlp' select modules by type and common names. An entry without a match is an error that
suggests similar names, whereas PEFT ignores it. As in PEFT, ``layers`` and ``exclude_modules`` do not affect parameters
(``target_parameters``) and token rows (``trainable_token_indices``).

Selection uses only names, types and shapes, has no side effects, and takes linear time in the number of modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from torch import nn

from deltaw.errors import UserError, did_you_mean, nearest
from deltaw.kernels.torch_modules import direct_parameters
from deltaw.lora.complete_names import NameMap, complete_names
from deltaw.lora.config import KEYWORDS, LoRAConfig, parse_layers
from deltaw.lora.expressions import matches as names_matching
from deltaw.lora.kinds import direct_read_reason, get_input_embedding, get_output_head, is_conv1d, is_linear, refusal
from deltaw.lora.layers_parts import parameter_refusal
from deltaw.lora.stored import describe_quantization

HEAD_NAMES = frozenset({"lm_head", "score", "classifier", "classification_head", "qa_outputs", "embed_out", "head"})
"""First parts of the names of output heads. Used only if the model does not define its head."""

_ATTENTION = """
    q_proj k_proj v_proj o_proj qkv_proj out_proj query key value query_key_value qkv c_attn Wqkv
    q_lin k_lin v_lin out_lin q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj
"""
_MLP = """
    gate_proj up_proj down_proj gate_up_proj fc1 fc2 fc_in fc_out c_fc dense_h_to_4h dense_4h_to_h
    wi wi_0 wi_1 wo w1 w2 w3 lin1 lin2 linear1 linear2 ffn ffn_output
"""
ATTENTION_NAMES = frozenset(_ATTENTION.split())
MLP_NAMES = frozenset(_MLP.split())
"""Last parts of the names of modules in attention and in MLPs."""

_MLP_WORDS = ("mlp", "ffn", "feed_forward", "feedforward", "expert", "densereludense")
"""Words in the name of an MLP module."""

ROUTER_NAMES = frozenset({"gate", "router", "shared_expert_gate"})
"""Names of expert routers, which 'mlp' does not include."""


@dataclass(frozen=True)
class NamedModule:
    """A module and all of its names.

    Attributes:
        names: Names in the model.
        module: The module.
        complete_names: Names in the complete model, if the model is a text view.
    """

    names: tuple[str, ...]
    module: nn.Module
    complete_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class NamedParameter:
    """A parameter of a module and all of its names.

    Attributes:
        owner: Module with the parameter.
        attribute: Name of the parameter in the module.
    """

    owner: NamedModule
    attribute: str

    @property
    def names(self) -> tuple[str, ...]:
        """Names in the model."""
        return tuple(f"{name}.{self.attribute}" for name in self.owner.names)

    @property
    def complete_names(self) -> tuple[str, ...]:
        """Names in the complete model, if the model is a text view."""
        return tuple(f"{name}.{self.attribute}" for name in self.owner.complete_names)


Named = TypeVar("Named", NamedModule, NamedParameter)


def matched_names(named: NamedModule | NamedParameter) -> tuple[str, ...]:
    """Return the names that the settings are compared with."""
    return named.names + named.complete_names


def unique_modules(model: nn.Module) -> list[NamedModule]:
    """Return every module once with all its names, without the root."""
    names_by_id: dict[int, tuple[nn.Module, list[str]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if name:
            names_by_id.setdefault(id(module), (module, []))[1].append(name)
    mapping = complete_names(model)
    convert = None if mapping is None else mapping.to_complete
    groups = names_by_id.values()
    return [NamedModule(tuple(n), module, () if convert is None else tuple(map(convert, n))) for module, n in groups]


def endings(name: str) -> Iterator[str]:
    """Yield ``a.b.c``, ``b.c``, ``c``."""
    yield name
    position = name.find(".")
    while position >= 0:
        yield name[position + 1 :]
        position = name.find(".", position + 1)


def values_by_pattern(
    key: str, pattern: Mapping[str, float], names: Iterable[str], mapping: NameMap | None = None
) -> dict[str, float]:
    """Return the value of the first matching key of ``pattern`` for each name whose ending matches a key.

    Args:
        key: Name of the setting.
        pattern: Values by regular expression.
        names: Names to match.
        mapping: If given, keys may also match the names in the complete model.
    """
    values: dict[str, float] = {}
    names = list(names)
    original = {} if mapping is None else {mapping.to_complete(name): name for name in names}
    matches = names_matching(key, pattern, [*names, *original], endings=True) if pattern else ()
    for entry, matched in zip(pattern, matches, strict=True):
        for name in matched:
            values.setdefault(original.get(name, name), pattern[entry])
    return values


# Maximum number of names in a message.
_MAX_LISTED = 6


def format_names(names: list[str]) -> str:
    listed = ", ".join(f"'{name}'" for name in names[:_MAX_LISTED])
    return listed + (f", … ({len(names)} in all)" if len(names) > _MAX_LISTED else "")


@dataclass(frozen=True)
class Target:
    """A module or parameter to adapt.

    Attributes:
        names: All names of the module.
        module: The module.
        rank: Rank of the update.
        alpha: Alpha of the update.
        attribute: Name of the parameter in the module. Empty if the module itself is adapted.
    """

    names: tuple[str, ...]
    module: nn.Module
    rank: int
    alpha: float
    attribute: str = ""


@dataclass(frozen=True)
class TokenTarget:
    """An embedding or a head with token rows to train.

    Attributes:
        names: All names of the module.
        module: The module.
        tokens: Token ids of the rows.
        tied: Modules with a tied weight, which share the rows.
    """

    names: tuple[str, ...]
    module: nn.Module
    tokens: tuple[int, ...]
    tied: tuple[NamedModule, ...] = ()


@dataclass(frozen=True)
class Selection:
    """The selection of a config on one model.

    Attributes:
        targets: Modules to adapt.
        extra_modules: Modules to train in full.
        parameters: Parameters to adapt.
        tokens: Token rows to train.
        matches: Matched names by entry of the config.
    """

    targets: list[Target] = field(default_factory=list)
    extra_modules: list[NamedModule] = field(default_factory=list)
    parameters: list[Target] = field(default_factory=list)
    tokens: list[TokenTarget] = field(default_factory=list)
    matches: dict[str, tuple[str, ...]] = field(default_factory=dict)


def select(model: nn.Module, config: LoRAConfig, strict: bool = True) -> Selection:
    """Select the modules of ``model`` to which ``config`` applies.

    Args:
        model: Any module. It is not changed.
        config: Settings of the adapter.
        strict: If False, entries without a match are ignored, since files of other programs can contain them.

    Raises:
        UserError: if an entry has no match, or matches a module that cannot be adapted.
    """
    return _TargetSelector(model, config, strict).selection()


def layer_index(name: str) -> int | None:
    """Return the layer of a module, the first number in its name as in PEFT, or None."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


class _TargetSelector:
    """Computes a selection.

    Attributes:
        matches: See :class:`Selection`.
        fully_trained: Ids of the modules that are trained in full.
        adapted: Ids of the modules selected by ``target_modules``.
    """

    def __init__(self, model: nn.Module, config: LoRAConfig, strict: bool) -> None:
        self.model = model
        self.config = config
        self.strict = strict
        self.modules = unique_modules(model)
        self.by_name = {name: named_module.module for named_module in self.modules for name in named_module.names}
        self.matches: dict[str, tuple[str, ...]] = {}
        self.fully_trained: set[int] = set()
        self.adapted: set[int] = set()

    def selection(self) -> Selection:
        """Return the selection."""
        config = self.config
        extra = self._extra_modules()
        self.fully_trained = {id(m) for extra_module in extra for m in extra_module.module.modules()}
        targeted = self._select_targets()
        self.adapted = {id(m.module) for m in targeted}
        parameters = self._parameters()
        tokens = self._tokens()
        if not (targeted or parameters or tokens) and self.strict:
            hint = "use 'all-linear', 'attention', 'mlp', or a list of module names"
            raise UserError("target_modules is empty", location="target_modules", hint=hint)
        patterned: list[NamedModule | NamedParameter] = [*targeted, *parameters]
        ranks = self._match_pattern("rank_pattern", config.rank_pattern, patterned)
        alphas = self._match_pattern("alpha_pattern", config.alpha_pattern, patterned)

        def target(named: NamedModule | NamedParameter) -> Target:
            owner, attribute = (named.owner, named.attribute) if isinstance(named, NamedParameter) else (named, "")
            return Target(
                owner.names,
                owner.module,
                rank=int(ranks.get(named.names[0], config.rank)),
                alpha=alphas.get(named.names[0], config.alpha),
                attribute=attribute,
            )

        return Selection(
            targets=[target(named_module) for named_module in targeted],
            extra_modules=extra,
            parameters=[target(parameter) for parameter in parameters],
            tokens=tokens,
            matches=self.matches,
        )

    def _match(self, key: str, value: str | Iterable[str], candidates: list[Named]) -> list[Named]:
        """Return the candidates that match a string (full expression) or a list (name endings).

        An entry without a match is an error if ``strict`` is True.
        """
        if isinstance(value, str):
            (matching,) = names_matching(key, [value], (name for m in candidates for name in matched_names(m)))
            matched = [m for m in candidates if not matching.isdisjoint(matched_names(m))]
            if not matched and self.strict:
                is_ending = any(value in endings(name) for m in candidates for name in m.names)
                raise _no_match(key, value, candidates, as_list=is_ending)
            self.matches[f"{key} '{value}'"] = tuple(m.names[0] for m in matched)
            return matched
        names_by_entry: dict[str, list[str]] = {entry: [] for entry in value}
        matched = []
        for candidate in candidates:
            entries = {end for name in matched_names(candidate) for end in endings(name) if end in names_by_entry}
            for entry in entries:
                names_by_entry[entry].append(candidate.names[0])
            if entries:
                matched.append(candidate)
        for entry, names in names_by_entry.items():
            if not names and self.strict:
                raise _no_match(key, entry, candidates)
            self.matches[f"{key} '{entry}'"] = tuple(names)
        return matched

    def _match_pattern(
        self, key: str, pattern: Mapping[str, float], named: Sequence[NamedModule | NamedParameter]
    ) -> dict[str, float]:
        """Return the value of the first matching key of ``pattern`` for each matched name."""
        names = {m.names[0]: {m.names[0], *m.complete_names[:1]} for m in named}
        candidates = [name for group in names.values() for name in group]
        for entry, matched in zip(pattern, names_matching(key, pattern, candidates, endings=True), strict=True):
            if not matched and self.strict:
                raise _no_match(key, entry, named)
            self.matches[f"{key} '{entry}'"] = tuple(name for name, group in names.items() if matched & group)
        return values_by_pattern(key, pattern, names, complete_names(self.model))

    def _extra_modules(self) -> list[NamedModule]:
        """Return the outermost modules matched by train_modules, which must have parameters to train."""
        if not self.config.train_modules:
            return []
        matched = self._match("train_modules", self.config.train_modules, self.modules)
        nested = {id(inner) for m in matched for inner in m.module.modules() if inner is not m.module}
        outer = [m for m in matched if id(m.module) not in nested]
        for named in outer:
            if (reason := next(filter(None, map(describe_quantization, named.module.modules())), None)) is not None:
                message = f"'{named.names[0]}' cannot be trained in full: its weight is {reason}"
                raise UserError(message, location="train_modules", hint="remove it, or load the model in bf16")
            if not any(p.is_floating_point() for p in named.module.parameters()):
                message = f"'{named.names[0]}' has no parameters to train"
                raise UserError(message, location="train_modules", hint="remove it")
        return outer

    def _select_targets(self) -> list[NamedModule]:
        """Return the modules to adapt, without those that are trained in full."""
        if not self.config.target_modules:
            return []
        candidates = self._match_targets()
        excluded = self._excluded_ids()
        candidates = [m for m in candidates if id(m.module) not in excluded]
        if not candidates and self.strict:
            message = "exclude_modules leaves nothing to adapt"
            raise UserError(message, location="exclude_modules", hint="exclude fewer modules")
        targets = [m for m in candidates if id(m.module) not in self.fully_trained]
        if not targets and self.strict:
            message = "train_modules contains all modules that target_modules matches"
            raise UserError(message, location="train_modules", hint="name each module in only one of the two")
        targets = self._filter_layers(targets)
        for named_module in targets:
            self._check_supported(named_module)
        return targets

    def _match_targets(self) -> list[NamedModule]:
        value = self.config.target_modules
        if not (isinstance(value, str) and value in KEYWORDS):
            return self._match("target_modules", value, self.modules)
        matched = [m for m in self._all_linear() if value == "all-linear" or _role(m) == value]
        if not matched and self.strict:
            linear = [m.names[0] for m in self.modules if is_linear(m.module)]
            hint = f"the linear modules are {format_names(linear)}" if linear else "the model has no linear module"
            if is_linear(self.model):
                hint = "the model is a single linear layer: use LoRALinear.from_linear"
            raise UserError(f"target_modules: '{value}' matches no module", location="target_modules", hint=hint)
        self.matches[f"target_modules '{value}'"] = tuple(m.names[0] for m in matched)
        return matched

    def _all_linear(self) -> list[NamedModule]:
        """Return all linear modules except the output head, which is the model's or recognized by common names.

        ``nn.MultiheadAttention`` counts as one module with both of its projections.
        """
        head = get_output_head(self.model)
        attentions = [m.module for m in self.modules if isinstance(m.module, nn.MultiheadAttention)]
        excluded = {id(head), *(id(attention.out_proj) for attention in attentions)}
        candidates = [m for m in self.modules if id(m.module) not in excluded]
        linear = [m for m in candidates if is_linear(m.module) or isinstance(m.module, nn.MultiheadAttention)]
        return [m for m in linear if head is not None or m.names[0].split(".")[0] not in HEAD_NAMES]

    def _excluded_ids(self) -> set[int]:
        """Return the ids of excluded modules. Entries of a list also exclude all modules below the matched ones."""
        if (value := self.config.exclude_modules) is None:
            return set()
        matched = self._match("exclude_modules", value, self.modules)
        if isinstance(value, str):
            return {id(m.module) for m in matched}
        return {id(nested) for m in matched for nested in m.module.modules()}

    def _filter_layers(self, modules: list[NamedModule]) -> list[NamedModule]:
        if self.config.layers is None:
            return modules
        by_index: dict[int, list[NamedModule]] = {}
        for named_module in modules:
            if (index := layer_index(named_module.names[0])) is not None:
                by_index.setdefault(index, []).append(named_module)
        indices: set[int] = set()
        for first, last in parse_layers(self.config.layers):
            entry = f"{first}-" if last is None else f"{first}" if first == last else f"{first}-{last}"
            stop = max(by_index, default=-1) if last is None else last
            matched = [index for index in by_index if first <= index <= stop]
            if self.strict and (not matched or stop not in by_index):
                available = f"0 to {max(by_index)}" if by_index else "none"
                hint = f"layers with modules that match target_modules: {available}"
                raise UserError(f"layers '{entry}' has layers without modules to adapt", location="layers", hint=hint)
            indices.update(matched)
            self.matches[f"layers '{entry}'"] = tuple(m.names[0] for i in sorted(matched) for m in by_index[i])
        return [m for m in modules if layer_index(m.names[0]) in indices]

    def _check_supported(self, named_module: NamedModule) -> None:
        name = named_module.names[0]
        parent_name, _, child_name = name.rpartition(".")
        parent = self.by_name.get(parent_name, self.model)
        attention = isinstance(named_module.module, nn.MultiheadAttention)
        reason = direct_read_reason(self.model, name, parent) or refusal(named_module.module)
        if reason is None and attention:
            missing = (f"nn.MultiheadAttention has no {k}" for k in ("dora", "lora_bias") if getattr(self.config, k))
            reason = next(missing, None)
        if reason is None:
            return
        linear_names = [f"{name}.{n}" for n, m in named_module.module.named_modules() if n and is_linear(m)]
        hint = f"exclude it: exclude_modules: ['{child_name}']"
        if isinstance(self.by_name.get(parent_name), nn.MultiheadAttention):
            hint = f"adapt the attention as a whole: '{parent_name}'"
        elif linear_names and not attention:
            hint = f"name the modules in it: {format_names(linear_names)}"
        raise UserError(f"'{name}' cannot be adapted: {reason}", location=name, hint=hint)

    def _parameters(self) -> list[NamedParameter]:
        """Return the parameters that match ``target_parameters`` in model order.

        Raises:
            UserError: if an entry has no match, or matches a parameter that cannot be adapted.
        """
        if not (entries := self.config.target_parameters):
            return []
        parameters = [
            NamedParameter(m, attribute)
            for m in self.modules
            for attribute, parameter in direct_parameters(m.module).items()
            if parameter is not None
        ]
        model_parameters = [entry for entry in entries if entry in direct_parameters(self.model)]
        if model_parameters and self.strict:
            message = f"'{model_parameters[0]}' is a parameter of the model itself, not of a submodule"
            hint = "wrap the model in another module, or remove the parameter"
            raise UserError(message, location="target_parameters", hint=hint)
        selected = self._match("target_parameters", entries, parameters)
        for parameter in selected:
            module = parameter.owner.module
            name = parameter.owner.names[0]
            parent = self.by_name.get(name.rpartition(".")[0], self.model)
            reason = direct_read_reason(self.model, name, parent) or parameter_refusal(module, parameter.attribute)
            if id(module) in self.adapted:
                reason = "target_modules adapts its module already"
            elif id(module) in self.fully_trained:
                reason = "train_modules trains its module in full"
            if reason is not None:
                message = f"'{parameter.names[0]}' cannot be adapted: {reason}"
                location = "target_parameters"
                raise UserError(message, location=location, hint=f"remove it from {location}")
        return selected

    def _tokens(self) -> list[TokenTarget]:
        """Return the embeddings and heads that match ``trainable_token_indices``, with the modules tied to them.

        Raises:
            UserError: if no embedding is found, a token is out of range, or another setting trains the same weight.
        """
        if not (value := self.config.trainable_token_indices):
            return []
        if isinstance(value, Mapping):
            selected = [
                (named_module, tuple(ids))
                for entry, ids in value.items()
                for named_module in self._match("trainable_token_indices", [entry], self.modules)
            ]
        else:
            named_module = self._input_embedding()
            self.matches[f"trainable_token_indices of {len(value)} tokens"] = (named_module.names[0],)
            selected = [(named_module, tuple(value))]
        for named_module, tokens in selected:
            self._check_tokens(named_module, tokens)
        return self._add_tied(selected)

    def _input_embedding(self) -> NamedModule:
        """Return the input embedding defined by the model, or the module named ``embed_tokens`` as in PEFT."""
        embedding = get_input_embedding(self.model)
        defined = [named_module for named_module in self.modules if named_module.module is embedding]
        usual_modules = [m for m in self.modules if any(name.rpartition(".")[2] == "embed_tokens" for name in m.names)]
        if defined or usual_modules:
            return (defined or usual_modules)[0]
        message = "the model does not define its input embedding"
        raise UserError(message, location="trainable_token_indices", hint="name it, for example {embed: [5, 6]}")

    def _check_tokens(self, named_module: NamedModule, tokens: tuple[int, ...]) -> None:
        name = named_module.names[0]
        module = named_module.module
        if (reason := self._rows_refusal(named_module)) is not None:
            message = f"tokens of '{name}' cannot be trained: {reason}"
            hint = "name each module in one setting only, and only embeddings or linear heads here"
            raise UserError(message, location="trainable_token_indices", hint=hint)
        rows = module.get_parameter("weight").shape[0]
        for token in tokens:
            if token >= rows:
                message = f"token {token} is not in '{name}', which has {rows} rows"
                hint = "resize the model's embeddings first, or use other tokens"
                raise UserError(message, location="trainable_token_indices", hint=hint)
            if self.strict and token == getattr(module, "padding_idx", None):
                message = f"token {token} of '{name}' is the padding token, whose row gets no gradient"
                raise UserError(message, location="trainable_token_indices", hint="remove it")

    def _rows_refusal(self, named_module: NamedModule) -> str | None:
        module = named_module.module
        if id(module) in self.adapted:
            return "target_modules adapts it already"
        if id(module) in self.fully_trained:
            return "train_modules trains it in full"
        if is_conv1d(module) or not isinstance(module, nn.Embedding | nn.Linear):
            return f"it is a {type(module).__name__}, neither an embedding nor a linear head"
        if (quantization := describe_quantization(module)) is not None:
            return f"its weight is {quantization}"
        return refusal(module)

    def _add_tied(self, selected: list[tuple[NamedModule, tuple[int, ...]]]) -> list[TokenTarget]:
        """Add the modules tied to the input embedding, which share its rows unless they are selected with other tokens.

        As in PEFT, weights count as tied if the model's configuration says so. Otherwise, other modules with the same
        weight use the original rows.
        """
        is_tied = bool(getattr(getattr(self.model, "config", None), "tie_word_embeddings", False))
        source = get_input_embedding(self.model) if is_tied else None
        tokens_of = {id(named_module.module): tokens for named_module, tokens in selected}
        targets: list[TokenTarget] = []
        processed: set[int] = set()
        # Process embeddings before the heads that are tied to them.
        for named_module, tokens in sorted(selected, key=lambda pair: not isinstance(pair[0].module, nn.Embedding)):
            if id(named_module.module) in processed:
                continue
            weight = direct_parameters(named_module.module)["weight"]
            tied = [
                other
                for other in self.modules
                if named_module.module is source
                and other.module is not source
                and direct_parameters(other.module).get("weight") is weight
                and tokens_of.get(id(other.module), tokens) == tokens
            ]
            for other in tied:
                if (reason := self._rows_refusal(other)) is not None:
                    message = f"'{named_module.names[0]}' is tied to '{other.names[0]}', which is unsupported: {reason}"
                    hint = f"remove '{other.names[0]}' from the other setting, or untie the weights"
                    raise UserError(message, location="trainable_token_indices", hint=hint)
            processed |= {id(named_module.module), *(id(other.module) for other in tied)}
            targets.append(TokenTarget(named_module.names, named_module.module, tokens, tuple(tied)))
        return targets


def _role(named_module: NamedModule) -> str | None:
    """Return 'attention' or 'mlp' by the name of the module and its parents, or None."""
    parts = named_module.names[0].split(".")
    child_name = parts[-1]
    lowercase = [part.lower() for part in parts]
    if child_name in ATTENTION_NAMES or any("attn" in part or "attention" in part for part in lowercase):
        return "attention"
    if child_name in ROUTER_NAMES:
        return None
    if child_name in MLP_NAMES or any(word in part for part in lowercase[:-1] for word in _MLP_WORDS):
        return "mlp"
    # In BERT-like models, layer.N.intermediate.dense and layer.N.output.dense are the two halves of the MLP.
    bert = len(parts) >= 3 and child_name == "dense" and parts[-2] in ("intermediate", "output")
    return "mlp" if bert and parts[-3].isdigit() else None


def _no_match(
    key: str, entry: str, candidates: Sequence[NamedModule | NamedParameter], *, as_list: bool = False
) -> UserError:
    """Return the error for an entry without a match, with a hint that suggests similar names."""
    names = [name for m in candidates for name in m.names]
    if as_list:
        hint = f"a string must match full names; to match name endings, use a list: ['{entry}']"
    elif entry in KEYWORDS:
        hint = f"use it without a list: {key}: {entry}"
    else:
        last_parts = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
        last_parts = [last for last in last_parts if not last.isdigit()]
        full = nearest(entry, names[:2000]) if "." in entry else []
        hint = did_you_mean(entry, full or last_parts)
    kind = "parameter" if key == "target_parameters" else "module"
    return UserError(f"{key}: '{entry}' matches no {kind}", location=key, hint=hint)
