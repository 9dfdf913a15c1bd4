"""Which modules are adapted, which parameters and tokens, and which modules are trained in full.

Entries match by PEFT's rules (``matching``). Beyond those, 'all-linear', 'attention' and 'mlp' choose by kind
and by usual names. An entry that matches nothing is an error that names the nearest modules; PEFT ignores it
without a word. ``layers`` and ``exclude_modules`` are about modules and do not concern parameters
(``target_parameters``) and rows of embeddings (``trainable_token_indices``), as in PEFT.

It looks at names, types and shapes only, and changes nothing. Everything is linear in the number of modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import nn

from deltaw.errors import UserError
from deltaw.kernels.torch_private import own_parameters
from deltaw.lora.config import KEYWORDS, LoRAConfig, parse_layers
from deltaw.lora.kinds import is_conv1d, is_linear, own_embedding, own_head, read_directly, refusal
from deltaw.lora.layers_parts import parameter_refusal
from deltaw.lora.matching import Named, match_entries, match_patterns, modules_once, shown
from deltaw.lora.stored import quantized_as

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

_MLP_WORDS = ("mlp", "ffn", "feed_forward", "feedforward", "expert", "densereludense")
"""In the name of a module, they make what is below it an MLP."""

ROUTER_NAMES = frozenset({"gate", "router", "shared_expert_gate"})
"""Choose between experts; they are no part of what 'mlp' means."""


@dataclass(frozen=True)
class Target:
    """A module to adapt, or a parameter of its own: all names of the module, and rank and alpha.

    Attributes:
        attribute: the parameter's name in the module; empty for a module that is adapted itself.
    """

    names: tuple[str, ...]
    module: nn.Module
    rank: int
    alpha: float
    attribute: str = ""


@dataclass(frozen=True)
class TokenTarget:
    """An embedding or a head whose rows of ``tokens`` are trained, and those whose weight is tied to its."""

    names: tuple[str, ...]
    module: nn.Module
    tokens: tuple[int, ...]
    tied: tuple[Named, ...] = ()


@dataclass(frozen=True)
class Selection:
    """What a config means on one model; ``matches`` gives each entry of it the names that it matched."""

    targets: list[Target] = field(default_factory=list)
    extra_modules: list[Named] = field(default_factory=list)
    parameters: list[Target] = field(default_factory=list)
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
    return _Search(model, config, strict).selection()


def layer_index(name: str) -> int | None:
    """The layer that a module belongs to: the first number in its name, as PEFT counts."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


class _Search:
    """A selection while it is made.

    Attributes:
        matches: see :class:`Selection`.
        inside: ids of the modules that are trained in full. adapted: of those that ``target_modules`` means.
    """

    def __init__(self, model: nn.Module, config: LoRAConfig, strict: bool) -> None:
        self.model, self.config, self.strict = model, config, strict
        self.modules = modules_once(model)
        self.by_name = {name: named.module for named in self.modules for name in named.names}
        self.matches: dict[str, tuple[str, ...]] = {}
        self.inside: set[int] = set()
        self.adapted: set[int] = set()

    def selection(self) -> Selection:
        """What the config means."""
        config = self.config
        extra = self._extra_modules()
        self.inside = {id(m) for whole in extra for m in whole.module.modules()}
        kept = self._targeted()
        self.adapted = {id(m.module) for m in kept}
        parameters = self._parameters()
        tokens = self._tokens()
        if not (kept or parameters or tokens) and self.strict:
            hint = "write 'all-linear', 'attention', 'mlp', or a list of module names"
            raise UserError("target_modules names nothing", where="target_modules", hint=hint)
        patterned = [*kept, *(full for full, _, _ in parameters)]
        ranks = match_patterns("rank_pattern", config.rank_pattern, patterned, self.matches, self.strict)
        alphas = match_patterns("alpha_pattern", config.alpha_pattern, patterned, self.matches, self.strict)

        def target(named: Named, name: str, attribute: str = "") -> Target:
            rank, alpha = int(ranks.get(name, config.rank)), alphas.get(name, config.alpha)
            return Target(named.names, named.module, rank, alpha, attribute)

        return Selection(
            [target(named, named.names[0]) for named in kept],
            extra,
            [target(named, full.names[0], attribute) for full, named, attribute in parameters],
            tokens,
            self.matches,
        )

    def _match(self, key: str, wanted: str | Iterable[str], among: list[Named] | None = None) -> list[Named]:
        """The modules, or what is given, that the entries of a setting match."""
        kind = "module" if among is None else "parameter"
        return match_entries(key, wanted, self.modules if among is None else among, self.matches, self.strict, kind)

    def _extra_modules(self) -> list[Named]:
        """The outermost modules that train_modules names and that have parameters."""
        if not self.config.train_modules:
            return []
        found = self._match("train_modules", self.config.train_modules)
        below = {id(inner) for m in found for inner in m.module.modules() if inner is not m.module}
        outer = [m for m in found if id(m.module) not in below]
        for named in outer:
            if (kept := next(filter(None, map(quantized_as, named.module.modules())), None)) is not None:
                what = f"'{named.names[0]}' cannot be trained in full: its weight is {kept}"
                raise UserError(what, where="train_modules", hint="leave it out, or load the model with precision bf16")
            if not any(p.is_floating_point() for p in named.module.parameters()):
                what = f"'{named.names[0]}' has no parameters to train"
                raise UserError(what, where="train_modules", hint="leave it out")
        return outer

    def _targeted(self) -> list[Named]:
        """The modules to adapt, without those that are trained in full."""
        if not self.config.target_modules:
            return []
        chosen = self._matched_targets()
        excluded = self._excluded()
        chosen = [m for m in chosen if id(m.module) not in excluded]
        if not chosen and self.strict:
            what = "exclude_modules leaves nothing to adapt"
            raise UserError(what, where="exclude_modules", hint="exclude fewer modules")
        kept = [m for m in chosen if id(m.module) not in self.inside]
        if not kept and self.strict:
            what = "train_modules holds everything that target_modules matches"
            raise UserError(what, where="train_modules", hint="name the modules in one of the two")
        kept = self._in_layers(kept)
        for named in kept:
            self._refuse_unsupported(named)
        return kept

    def _matched_targets(self) -> list[Named]:
        wanted = self.config.target_modules
        if not (isinstance(wanted, str) and wanted in KEYWORDS):
            return self._match("target_modules", wanted)
        found = [m for m in self._all_linear() if wanted == "all-linear" or _role(m) == wanted]
        if not found and self.strict:
            linear = [m.names[0] for m in self.modules if is_linear(m.module)]
            hint = f"the linear modules are {shown(linear)}" if linear else "the model has no linear module"
            if is_linear(self.model):
                hint = "the model is itself one linear layer: use LoRALinear.from_linear"
            raise UserError(f"target_modules: '{wanted}' matches no module", where="target_modules", hint=hint)
        self.matches[f"target_modules '{wanted}'"] = tuple(m.names[0] for m in found)
        return found

    def _all_linear(self) -> list[Named]:
        """All linear modules but the output head: the one the model names, else those of usual names.

        ``nn.MultiheadAttention`` counts as one, with both of its projections.
        """
        head = own_head(self.model)
        attentions = [m.module for m in self.modules if isinstance(m.module, nn.MultiheadAttention)]
        excluded = {id(head), *(id(attention.out_proj) for attention in attentions)}
        among = [m for m in self.modules if id(m.module) not in excluded]
        linear = [m for m in among if is_linear(m.module) or isinstance(m.module, nn.MultiheadAttention)]
        return [m for m in linear if head is not None or m.names[0].split(".")[0] not in HEAD_NAMES]

    def _excluded(self) -> set[int]:
        """What exclude_modules leaves out: the modules that it names, and for a list all below them."""
        if (wanted := self.config.exclude_modules) is None:
            return set()
        found = self._match("exclude_modules", wanted)
        if isinstance(wanted, str):
            return {id(m.module) for m in found}
        return {id(below) for m in found for below in m.module.modules()}

    def _in_layers(self, chosen: list[Named]) -> list[Named]:
        if self.config.layers is None:
            return chosen
        by_index: dict[int, list[Named]] = {}
        for named in chosen:
            if (index := layer_index(named.names[0])) is not None:
                by_index.setdefault(index, []).append(named)
        kept: set[int] = set()
        for first, last in parse_layers(self.config.layers):
            entry = f"{first}-" if last is None else f"{first}" if first == last else f"{first}-{last}"
            stop = max(by_index, default=-1) if last is None else last
            inside = [index for index in by_index if first <= index <= stop]
            if self.strict and (not inside or stop not in by_index):
                there = f"0 to {max(by_index)}" if by_index else "none"
                hint = f"the layers that target_modules matches in are {there}"
                raise UserError(f"layers '{entry}' names layers with nothing to adapt", where="layers", hint=hint)
            kept.update(inside)
            self.matches[f"layers '{entry}'"] = tuple(m.names[0] for i in sorted(inside) for m in by_index[i])
        return [m for m in chosen if layer_index(m.names[0]) in kept]

    def _refuse_unsupported(self, named: Named) -> None:
        name = named.names[0]
        above, _, last = name.rpartition(".")
        parent = self.by_name.get(above, self.model)
        attention = isinstance(named.module, nn.MultiheadAttention)
        reason = read_directly(self.model, name, parent) or refusal(named.module)
        if reason is None and attention:
            unknown = (f"nn.MultiheadAttention has no {k}" for k in ("dora", "lora_bias") if getattr(self.config, k))
            reason = next(unknown, None)
        if reason is None:
            return
        below = [f"{name}.{n}" for n, m in named.module.named_modules() if n and is_linear(m)]
        hint = f"leave it out: exclude_modules: ['{last}']"
        if isinstance(self.by_name.get(above), nn.MultiheadAttention):
            hint = f"adapt the attention as a whole: '{above}'"
        elif below and not attention:
            hint = f"name what is in it: {shown(below)}"
        raise UserError(f"'{name}' cannot be adapted: {reason}", where=name, hint=hint)

    def _parameters(self) -> list[tuple[Named, Named, str]]:
        """The parameters that ``target_parameters`` means, in the order of the model: each one's full names,
        its module, and its own name there.

        Raises:
            UserError: an entry matches nothing, or a parameter that cannot be adapted.
        """
        if not (wanted := self.config.target_parameters):
            return []
        every = [
            (Named(tuple(f"{name}.{attribute}" for name in named.names), named.module), named, attribute)
            for named in self.modules
            for attribute, parameter in own_parameters(named.module).items()
            if parameter is not None
        ]
        own = [entry for entry in wanted if entry in own_parameters(self.model)]
        if own and self.strict:
            what = f"'{own[0]}' is a parameter of the model itself, not of a module in it"
            hint = "put the model into another module, or leave the parameter out"
            raise UserError(what, where="target_parameters", hint=hint)
        by_name = {full.names[0]: (full, named, attribute) for full, named, attribute in every}
        found = self._match("target_parameters", wanted, [full for full, _, _ in every])
        chosen = [by_name[full.names[0]] for full in found]
        for full, named, attribute in chosen:
            name = named.names[0]
            parent = self.by_name.get(name.rpartition(".")[0], self.model)
            reason = read_directly(self.model, name, parent) or parameter_refusal(named.module, attribute)
            if id(named.module) in self.adapted:
                reason = "target_modules adapts its module already"
            elif id(named.module) in self.inside:
                reason = "train_modules trains its module in full"
            if reason is not None:
                hint = "leave it out of target_parameters"
                raise UserError(f"'{full.names[0]}' cannot be adapted: {reason}", where="target_parameters", hint=hint)
        return chosen

    def _tokens(self) -> list[TokenTarget]:
        """The embeddings (and heads) that ``trainable_token_indices`` means, each with what is tied to it.

        Raises:
            UserError: no embedding is found, a token is not in it, or another setting trains the same weight.
        """
        if not (wanted := self.config.trainable_token_indices):
            return []
        if isinstance(wanted, Mapping):
            chosen = [
                (named, tuple(ids))
                for entry, ids in wanted.items()
                for named in self._match("trainable_token_indices", [entry])
            ]
        else:
            named = self._input_embedding()
            self.matches[f"trainable_token_indices of {len(wanted)} tokens"] = (named.names[0],)
            chosen = [(named, tuple(wanted))]
        for named, tokens in chosen:
            self._refuse_tokens(named, tokens)
        return self._with_tied(chosen)

    def _input_embedding(self) -> Named:
        """The embedding that the model names, else the one called ``embed_tokens`` as in PEFT."""
        embedding = own_embedding(self.model)
        own = [named for named in self.modules if named.module is embedding]
        usual = [m for m in self.modules if any(name.rpartition(".")[2] == "embed_tokens" for name in m.names)]
        if own or usual:
            return (own or usual)[0]
        what = "the model does not say which of its modules is the input embedding"
        raise UserError(what, where="trainable_token_indices", hint="name it: trainable_token_indices: {embed: [5, 6]}")

    def _refuse_tokens(self, named: Named, tokens: tuple[int, ...]) -> None:
        name, module = named.names[0], named.module
        if (reason := self._rows_refusal(named)) is not None:
            what = f"tokens of '{name}' cannot be trained: {reason}"
            hint = "name the module in one setting only, and only an embedding or a linear head here"
            raise UserError(what, where="trainable_token_indices", hint=hint)
        rows = module.get_parameter("weight").shape[0]
        for token in tokens:
            if token >= rows:
                what = f"token {token} is not in '{name}', which has {rows} rows"
                hint = "resize the model's embeddings first, or name tokens that are there"
                raise UserError(what, where="trainable_token_indices", hint=hint)
            if self.strict and token == getattr(module, "padding_idx", None):
                what = f"token {token} of '{name}' is the padding token, whose row gets no gradient"
                raise UserError(what, where="trainable_token_indices", hint="leave it out")

    def _rows_refusal(self, named: Named) -> str | None:
        module = named.module
        if id(module) in self.adapted:
            return "target_modules adapts it already"
        if id(module) in self.inside:
            return "train_modules trains it in full"
        if is_conv1d(module) or not isinstance(module, nn.Embedding | nn.Linear):
            return f"it is a {type(module).__name__}, neither an embedding nor a linear head"
        if (kept := quantized_as(module)) is not None:
            return f"its weight is {kept}"
        return refusal(module)

    def _with_tied(self, chosen: list[tuple[Named, tuple[int, ...]]]) -> list[TokenTarget]:
        """What is tied to the input embedding gets its rows; a module named with other tokens keeps its own.

        As in PEFT, weights count as tied where the model's configuration says so; elsewhere another user of the
        same weight keeps the old rows.
        """
        says_tied = bool(getattr(getattr(self.model, "config", None), "tie_word_embeddings", False))
        source = own_embedding(self.model) if says_tied else None
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
                for other in self.modules
                if named.module is source
                and other.module is not source
                and own_parameters(other.module).get("weight") is weight
                and tokens_of.get(id(other.module), tokens) == tokens
            ]
            for other in tied:
                if (reason := self._rows_refusal(other)) is not None:
                    what = f"'{named.names[0]}' is tied to '{other.names[0]}', whose rows cannot be trained: {reason}"
                    hint = f"leave '{other.names[0]}' out of the other setting, or untie the two"
                    raise UserError(what, where="trainable_token_indices", hint=hint)
            done |= {id(named.module), *(id(other.module) for other in tied)}
            targets.append(TokenTarget(named.names, named.module, tokens, tuple(tied)))
        return targets


def _role(named: Named) -> str | None:
    """'attention' or 'mlp', by the module's own name and those above it; None for neither."""
    parts = named.names[0].split(".")
    last, small = parts[-1], [part.lower() for part in parts]
    if last in ATTENTION_NAMES or any("attn" in part or "attention" in part for part in small):
        return "attention"
    if last in ROUTER_NAMES:
        return None
    if last in MLP_NAMES or any(word in part for part in small[:-1] for word in _MLP_WORDS):
        return "mlp"
    # BERT and its kin: layer.N.intermediate.dense and layer.N.output.dense are the two halves of the MLP.
    bert = len(parts) >= 3 and last == "dense" and parts[-2] in ("intermediate", "output")
    return "mlp" if bert and parts[-3].isdigit() else None
