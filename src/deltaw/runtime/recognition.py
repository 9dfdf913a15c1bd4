"""Which description fits a block: candidates by names and sizes, verified against the model's own code.

Names propose: which layer gives queries, which stands last in the MLP. What names do not say (whether halves
run one after the other or side by side, where norms stand, how one layer's outputs hold queries and keys,
whether positions are rotary) is verified: a candidate is taken only if the block computed by it equals the
block's own code in fp32, forward and backward, on a small copy of the model (see ``small_copy``).

Every parameter of a block must have a role. What is found holds for all blocks of the same signature, the
classes and flags of everything inside.

Knows roles and modules; how a described block is run is handed in.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.configuration_utils import PretrainedConfig
from transformers.initialization import no_init_weights

from deltaw.hub.quiet import quiet
from deltaw.hub.transformers_private import made_from_config
from deltaw.kernels import loader
from deltaw.kernels.torch_private import own_modules, own_parameters, with_tensors, without_dispatch
from deltaw.lora.kinds import is_conv1d
from deltaw.lora.layers import LoRAConv1D
from deltaw.lora.stored import stored_form, weight_shape

Answer = TypeVar("Answer")


def blocks_of(model: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """The name and list of the model's blocks; None where it has no such list.

    Found by structure: of all lists of modules the one with the most parameters, lists inside of its own
    blocks (experts) left out, since they have fewer.
    """
    lists = [pair for pair in model.named_modules() if isinstance(pair[1], nn.ModuleList)]
    sizes = [sum(p.numel() for p in module.parameters()) for _, module in lists]
    return lists[sizes.index(max(sizes))] if any(sizes) else None  # type: ignore[return-value]


# A transformer block is described by roles: which child does what, and how the parts are put together. A description
# holds paths, not modules. The parts are looked up in a block whenever they are needed, so a module that was replaced
# meanwhile (by an adapted layer, by a trained copy) is the one that is found. One description fits every block of its
# kind, whatever the sizes.
#
# sequential   x₁ = x + attention(norm(x)),       y = x₁ + mlp(norm(x₁))
# parallel     y  = x + attention(norm(x)) + mlp(norm(x))
#
# Each half has up to three norms: ``before`` its first projection, ``after`` its last one, inside the residual
# branch (Gemma 2, arXiv 2408.00118), and ``post``, over the sum with the residual stream (BERT,
# arXiv 1810.04805).


# Activation functions by the class names that transformers and torch give them, and the kernels' own names.
ACTIVATIONS = {
    **dict.fromkeys(("SiLU", "SiLUActivation"), "silu"),
    **dict.fromkeys(("PytorchGELUTanh", "GELUTanh", "NewGELUActivation", "FastGELUActivation"), "gelu_tanh"),
    **dict.fromkeys(("GELUActivation", "GELU"), "gelu"),
    "ReLU": "relu",
}
# How one layer's outputs hold queries, keys and values, d numbers a head: all queries, then all keys, then
# all values (Phi-3, GPT-2); or for each key head its queries, its key and its value (GPT-NeoX, Falcon).
Split = Literal["apart", "stacked", "grouped"]


@dataclass(frozen=True)
class Norms:
    """Paths of a half's norms over the hidden size; None where there is none."""

    before: str | None = None
    after: str | None = None
    post: str | None = None

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(path for path in (self.before, self.after, self.post) if path is not None)


@dataclass(frozen=True)
class AttentionRoles:
    """The attention of a block.

    Args:
        inputs: paths of the projections of queries, keys and values; one path where one layer gives all.
        output: path of the output projection.
        split: how queries, keys and values lie in the projections' outputs.
        head_size: numbers of one head (d). The numbers of heads follow from the layers' sizes.
        query_norm, key_norm: paths of norms over each head.
        rotary: whether rotary positions (arXiv 2104.09864) turn queries and keys.
        causal: whether a token sees no later ones.
    """

    inputs: tuple[str, ...]
    output: str
    norms: Norms
    split: Split
    head_size: int
    query_norm: str | None = None
    key_norm: str | None = None
    rotary: bool = True
    causal: bool = True

    def heads(self, block: nn.Module) -> tuple[int, int]:
        """Query heads and key heads, from the sizes of the block's layers."""
        heads = sizes(part(block, self.output))[0] // self.head_size
        if self.split == "apart":
            return heads, sizes(part(block, self.inputs[1]))[1] // self.head_size
        return heads, (sizes(part(block, self.inputs[0]))[1] // self.head_size - heads) // 2


@dataclass(frozen=True)
class MLPRoles:
    """The feed-forward half of a block: output(f(gate)·up), or output(f(inner)) where it is not gated.

    Args:
        inputs: paths of gate and up, or of one layer that gives the gate and then up, or of the one inner
            layer of an MLP without a gate.
        activation: path of f; see :func:`activation_kind`.
    """

    inputs: tuple[str, ...]
    output: str
    norms: Norms
    gated: bool
    activation: str


@dataclass(frozen=True)
class BlockRoles:
    """A whole block.

    Args:
        parallel: whether both halves read the block's input; else the MLP reads attention's sum.
        extra_outputs: how many values (all None) the block returns behind its hidden states, in a tuple; None
            where it returns them bare.
    """

    attention: AttentionRoles
    mlp: MLPRoles
    parallel: bool = False
    extra_outputs: int | None = None

    @property
    def layers(self) -> tuple[str, ...]:
        """Paths of the linear layers: attention's inputs and output, the MLP's inputs and output."""
        return (*self.attention.inputs, self.attention.output, *self.mlp.inputs, self.mlp.output)

    @property
    def norms(self) -> tuple[str, ...]:
        """Paths of the norms, each once."""
        attention = self.attention
        heads = tuple(path for path in (attention.query_norm, attention.key_norm) if path is not None)
        return tuple(dict.fromkeys((*attention.norms.paths, *heads, *self.mlp.norms.paths)))


@dataclass(frozen=True)
class NormForm:
    """(x - mean)·rstd·(weight + offset) + bias.

    Args:
        eps: added to the variance.
        offset: 1 where the weight is kept as its difference from one (Gemma), else 0.
        centered: LayerNorm (arXiv 1607.06450); without it the mean is 0: RMSNorm (arXiv 1910.07467).
    """

    eps: float
    offset: float
    centered: bool


def part(block: nn.Module, path: str) -> nn.Module:
    """The module that stands at ``path`` in a block now.

    Raises:
        KeyError: there is none.
    """
    found: nn.Module | None = block
    for name in path.split("."):
        found = None if found is None else own_modules(found)[name]
    if found is None:
        raise KeyError(path)
    return found


def sizes(layer: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear layer, by its weight."""
    rows, columns = weight_shape(layer)
    return (columns, rows) if by_column(layer) else (rows, columns)


def by_column(layer: nn.Module) -> bool:
    """Whether the weight is (out, in), as of ``nn.Linear`` and quantized; else (in, out), as ``Conv1D``."""
    return stored_form(layer) is not None or not _is_conv1d(layer)


def _is_conv1d(layer: nn.Module) -> bool:
    return isinstance(layer, LoRAConv1D) or is_conv1d(layer)


def activation_kind(module: nn.Module) -> str | None:
    """The kernels' name of an activation function; None where it is none of theirs."""
    if isinstance(module, nn.GELU) and module.approximate == "tanh":
        return "gelu_tanh"
    return ACTIVATIONS.get(type(module).__name__)


def norm_form(module: nn.Module) -> NormForm | None:
    """What a norm over the last dimension computes; None where it is no norm that is known here.

    A class that is not torch's own is run on a few fp32 numbers and compared with the formula.
    """
    weight = own_parameters(module).get("weight")
    if weight is None or weight.dim() != 1 or own_modules(module):
        return None
    eps = next((vars(module)[name] for name in ("variance_epsilon", "eps") if name in vars(module)), None)
    if not isinstance(eps, float):
        return None
    if type(module) is nn.LayerNorm:
        return NormForm(eps, 0.0, True) if weight.shape == tuple(module.normalized_shape) else None
    bias = own_parameters(module).get("bias")
    size = weight.numel()
    with torch.no_grad(), real_tensors():
        x = torch.linspace(-1.5, 2.0, size, dtype=torch.float32)[None]
        values = {"weight": torch.linspace(0.3, 0.7, size), "bias": torch.linspace(-0.2, 0.1, size)}
        used = [name for name, tensor in (("weight", weight), ("bias", bias)) if tensor is not None]
        copy = with_tensors(module, {name: nn.Parameter(values[name], False) for name in used})
        own = type(module).forward(copy, x)
        added = values["bias"] if bias is not None else torch.zeros(size)
        for centered in (False, True):
            middle = x - x.mean() if centered else x
            hat = middle * torch.rsqrt(middle.square().mean() + eps)
            for offset in (0.0, 1.0):
                given = hat * (values["weight"] + offset) + added
                if isinstance(own, Tensor) and torch.allclose(own, given, rtol=1e-4, atol=1e-5):
                    return NormForm(eps, offset, centered)
    return None


@contextlib.contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """While open, ``module`` answers with ``forward``; hooks and whatever else stands around it stay."""
    table = vars(module)
    before = table.get("forward")
    table["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del table["forward"]
        else:
            table["forward"] = before


@contextlib.contextmanager
def real_tensors() -> Iterator[None]:
    """While open, new tensors have values, in a dry run on fake tensors too."""
    with without_dispatch():
        yield


# A small fp32 copy of a model has the same classes and settings, few and narrow blocks, random weights. What a model's
# code computes does not depend on its size, nor on its weights. So questions about the code are answered on such a
# copy: in fp32, where a difference is a difference, in a few milliseconds and megabytes, and alike in a dry run on fake
# tensors. The size of a head stays, as rotary positions hang on it; so do the ratios that tell layouts apart (several
# queries to a key, several keys).


VOCABULARY = 97
HIDDEN = 64
INNER = 96
# Below this many tokens a window hides something from the sample.
WINDOW = 8
# More distinct layers than this are not copied.
MOST_LAYERS = 16
_INNER = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "hidden_dim", "moe_intermediate_size")


def small_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A small copy of a backbone, in evaluation mode and frozen, with real fp32 values on the processor.

    Torch's random state is left as it is. Whatever foreign code raises for a small configuration is raised.
    """
    config = small_config(model.config)
    with real_tensors(), quiet(), torch.random.fork_rng(devices=[]):
        with no_init_weights():
            made = made_from_config(type(model), config, torch.float32)
        generator = torch.Generator().manual_seed(0)
        for name, parameter in made.named_parameters():
            _fill(name, parameter.data, generator)
        made.tie_weights()
    return made.requires_grad_(False).eval()


def asked_once(
    known: dict[Any, Answer], model: PreTrainedModel, ask: Callable[[PreTrainedModel], Answer], of: str = ""
) -> Answer:
    """What ``ask`` finds out on a small copy of a backbone; remembered in ``known`` by what it can depend on: class
    and configuration, how products are computed, and what it is asked ``of``."""
    arithmetic = loader.library() is not None, loader.arithmetic().approximating(())
    key = (type(model), model.config.to_json_string(use_diff=False), of, *arithmetic)
    if key not in known:
        with real_tensors():
            known[key] = ask(small_copy(model))
    return known[key]


def small_config(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration of a small copy."""
    small = copy.deepcopy(config)
    heads, keys, size = _heads(config)
    few_keys = min(keys, 2)
    few_heads = few_keys * min(heads // keys, 2) if keys > 1 else 2
    apart = getattr(config, "head_dim", None) == size and hasattr(config, "num_key_value_heads")
    _set(small, "num_attention_heads", few_heads)
    for name in ("num_key_value_heads", "num_kv_heads"):
        if getattr(config, name, None) is not None:
            setattr(small, name, few_keys if getattr(config, name) == keys else few_heads)
    _set(small, "hidden_size", HIDDEN if apart else few_heads * size)
    for name in _INNER:
        if isinstance(getattr(config, name, None), int):
            setattr(small, name, INNER)
    if getattr(config, "vocab_size", None) is not None:
        small.vocab_size = VOCABULARY
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(config, name, None) is not None:
            setattr(small, name, 0)
    if getattr(config, "sliding_window", None) is not None:
        small.sliding_window = WINDOW
    _few_layers(small, config)
    patch = getattr(config, "patch_size", None)
    if isinstance(getattr(config, "image_size", None), int) and isinstance(patch, int):
        small.image_size = 2 * patch
    return small


def _heads(config: PretrainedConfig) -> tuple[int, int, int]:
    """Query heads, key heads and the size of one."""
    heads = int(config.num_attention_heads)
    keys = getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None) or heads
    if not isinstance(keys, int) or keys < 1 or heads % keys:
        raise ValueError("heads are not a multiple of key heads")
    size = getattr(config, "head_dim", None) or int(config.hidden_size) // heads
    return heads, keys, int(size)


def _few_layers(small: PretrainedConfig, config: PretrainedConfig) -> None:
    """As many layers as show every kind that the lists in the configuration tell apart, two at least."""
    count = int(config.num_hidden_layers)
    every = {name: value for name, value in config.to_dict().items() if isinstance(value, (list, tuple))}
    lists = {name: value for name, value in every.items() if len(value) == count > 1}
    kinds = list(zip(*(map(str, value) for value in lists.values()), strict=True))
    last = max((kinds.index(kind) for kind in set(kinds)), default=0)
    few = min(count, max(2, last + 1))
    if few > MOST_LAYERS:
        raise ValueError("its kinds of layers show only far up")
    _set(small, "num_hidden_layers", few)
    for name, value in lists.items():
        setattr(small, name, list(value)[:few])


def _set(config: PretrainedConfig, name: str, value: int) -> None:
    """Set a number by the name that all configurations know it by (``attribute_map``)."""
    if getattr(config, name, None) is None:
        raise ValueError(f"the configuration has no {name}")
    setattr(config, name, value)


def _fill(name: str, values: torch.Tensor, generator: torch.Generator) -> None:
    """Random values at which every part of a block counts: weights of unit gain, biases and norms that differ
    from 0 and 1."""
    noise = torch.randn(values.shape, generator=generator)
    if values.dim() > 1:
        fan_in = values[0].numel() if "embed" not in name else 1
        values.copy_(noise / math.sqrt(fan_in))
    elif name.endswith("bias"):
        values.copy_(0.2 * noise)
    else:
        values.copy_(1 + 0.2 * noise)


# Relative difference of outputs and of gradients, in fp32, that is rounding and no more.
TOLERANCE = 1e-4
_APART = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q_lin", "k_lin", "v_lin"))
_TOGETHER = ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv")
_HEAD_NORMS = (("q_norm", "k_norm"), ("q_layernorm", "k_layernorm"))
_HEAD_SIZES = ("head_dim", "head_size", "attention_head_size")
_GATED = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), ("gate", "up", "down"))
# What differs from one block to the next of the same kind, or hangs on sizes.
_OF_A_LAYER = ("layer_idx", "layer_number", "scaling", "training", "gradient_checkpointing", "enabled", "merged")
Signature = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Told:
    """What a block's attention is told besides the tokens.

    Args:
        scaling: of scores. window: positions that a token sees, itself among them. softcap: of scores; see
            :func:`deltaw.kernels.attention.packed_attention`.
    """

    scaling: float
    window: int | None = None
    softcap: float | None = None

    @property
    def kind(self) -> tuple[bool, bool]:
        """What of it makes another kind of block."""
        return self.window is not None, self.softcap is not None


def signature(block: nn.Module) -> Signature:
    """What a block's code depends on, sizes and weights left out: the class of each part and its flags.

    Adapted and int8-quantized layers count as the layers that they stand for.
    """
    return tuple((path, *_kind_of(module), *_flags_of(module)) for path, module in block.named_modules())


def _kind_of(module: nn.Module) -> tuple[str, ...]:
    if isinstance(module, nn.Linear):
        return ("linear", str(own_parameters(module).get("bias") is not None))
    if _is_conv1d(module):
        return ("conv1d",)
    kind = type(module)
    parameters = sorted(name for name, parameter in own_parameters(module).items() if parameter is not None)
    return (f"{kind.__module__}.{kind.__qualname__}", *parameters)


def _flags_of(module: nn.Module) -> Iterator[str]:
    if isinstance(module, nn.Linear) or _is_conv1d(module):
        return
    for name, value in sorted(vars(module).items()):
        if name.startswith("_") or name in _OF_A_LAYER:
            continue
        whole = isinstance(value, int) and not isinstance(value, bool)
        if isinstance(value, bool | float | str) or (whole and name.startswith("use")):
            yield f"{name}={value}"


def candidates(block: nn.Module) -> list[BlockRoles] | str:
    """Descriptions that the names and sizes of a block's parts allow, likeliest first; or what it lacks."""
    modules = dict(block.named_modules())
    linear = {path: m for path, m in modules.items() if isinstance(m, nn.Linear) or _is_conv1d(m)}
    found = _attention_inputs(linear)
    if found is None:
        return "no attention with projections of queries, keys and values"
    inputs, holder = found
    head_size = _head_size(part(block, holder) if holder else block)
    if head_size is None:
        return "the size of its heads"
    top = holder.partition(".")[0]
    rest = [path for path in linear if path not in inputs]
    outputs = [path for path in rest if path.startswith(f"{top}.")]
    inner = [path for path in rest if path not in outputs]
    if len(outputs) != 1:
        return "no single output projection"
    activations = [p for p, m in modules.items() if activation_kind(m) is not None and not p.startswith(f"{top}.")]
    if len(activations) != 1:
        return "no known activation"
    shapes = _mlp_shapes(inner, linear)
    if shapes is None:
        return "no MLP of two or three layers"
    norms = [path for path, m in modules.items() if path and path not in linear and norm_form(m) is not None]
    pair = next((p for p in _HEAD_NORMS if all(f"{holder}.{name}" in norms for name in p)), None)
    heads = [f"{holder}.{name}" for name in pair] if pair is not None else []
    if any(own_parameters(part(block, path))["weight"].numel() != head_size for path in heads):  # type: ignore[union-attr]
        return "norms of queries that are not over each head"
    wide = [path for path in norms if path not in heads]
    known = {id(p) for path in (*linear, *norms) for p in modules[path].parameters()}
    if any(id(p) not in known for p in block.parameters()):
        return "parameters besides its norms and projections"
    causal = vars(part(block, holder)).get("is_causal", True) is not False
    splits: tuple[Split, ...] = ("apart",) if len(inputs) == 3 else ("stacked", "grouped")
    query_norm, key_norm = heads or (None, None)
    found_roles = []
    ways = itertools.product((True, False), list(_norm_places(wide)), splits, shapes)
    for rotary, (first, second, parallel), split, (into, out, gated) in ways:
        attention = AttentionRoles(inputs, outputs[0], first, split, head_size, query_norm, key_norm, rotary, causal)
        found_roles.append(BlockRoles(attention, MLPRoles(into, out, second, gated, activations[0]), parallel))
    return found_roles


def _norm_places(wide: list[str]) -> Iterator[tuple[Norms, Norms, bool]]:
    """Where norms may stand: those of attention, those of the MLP, and whether the two run side by side."""
    if len(wide) == 1:
        yield Norms(before=wide[0]), Norms(before=wide[0]), True
    if len(wide) == 2:
        for first, second in (wide, wide[::-1]):
            yield Norms(before=first), Norms(before=second), False
            yield Norms(before=first), Norms(before=second), True
            yield Norms(post=first), Norms(post=second), False
            yield Norms(after=first), Norms(after=second), False
    if len(wide) == 4:
        yield Norms(wide[0], wide[1]), Norms(wide[2], wide[3]), False
        yield Norms(wide[0], wide[2]), Norms(wide[1], wide[3]), False


def _attention_inputs(linear: dict[str, nn.Module]) -> tuple[tuple[str, ...], str] | None:
    """Paths of the projections of queries, keys and values, and of the module that holds them."""
    for path in linear:
        holder, _, name = path.rpartition(".")
        for names in _APART:
            paths = tuple(f"{holder}.{n}" if holder else n for n in names)
            if name == names[0] and all(p in linear for p in paths):
                return paths, holder
        if name in _TOGETHER and holder:
            return (path,), holder
    return None


def _head_size(holder: nn.Module) -> int | None:
    for name in _HEAD_SIZES:
        value = vars(holder).get(name)
        if isinstance(value, int) and value > 0:
            return value
    heads, dim = vars(holder).get("n_heads"), vars(holder).get("dim")
    return dim // heads if isinstance(heads, int) and isinstance(dim, int) else None


def _mlp_shapes(inner: list[str], linear: dict[str, nn.Module]) -> list[tuple[tuple[str, ...], str, bool]] | None:
    """(inputs, output, gated) that the MLP's layers may have."""
    by_name = {path.rpartition(".")[2]: path for path in inner}
    for gate, up, down in _GATED:
        if len(inner) == 3 and {gate, up, down} == set(by_name):
            return [((by_name[gate], by_name[up]), by_name[down], True)]
    if len(inner) != 2:
        return None
    (_, wide), (narrow, _) = (sizes(linear[path]) for path in inner)
    return [((inner[0],), inner[1], wide != narrow)] if wide in (narrow, 2 * narrow) else None


@dataclass(frozen=True)
class Call:
    """One call of a block by its model, in fp32: what it was given, what it gave, and what its attention was
    told. ``real`` (rows, length) tells tokens from padding, whose outputs may be anything; None for all."""

    block: nn.Module
    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    told: Told | None = None
    real: Tensor | None = None


def verified(
    call: Call, run: Callable[[nn.Module, BlockRoles, Told], Callable[..., Any]]
) -> tuple[BlockRoles | None, str]:
    """The first candidate that equals the block's own code, and how well; or None and why.

    Args:
        run: makes of a block, a description and what its attention is told a function that is called as the
            block is.
    """
    proposed = candidates(call.block)
    if isinstance(proposed, str):
        return None, proposed
    extra = len(call.output) - 1 if isinstance(call.output, tuple) else None
    if isinstance(call.output, tuple) and any(value is not None for value in call.output[1:]):
        return None, "it returns more than its hidden states"
    expected = _with_gradient(call.block.forward, call)
    best, why = float("inf"), "no way to compute it fits"
    for roles in proposed:
        roles = BlockRoles(roles.attention, roles.mlp, roles.parallel, extra)
        told = call.told or Told(roles.attention.head_size**-0.5)
        try:
            found = _with_gradient(run(call.block, roles, told), call)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            why = f"{type(error).__name__}: {str(error)[:80]}"
            continue
        hidden = call.hidden if call.real is None else call.hidden * call.real[..., None]
        difference = max(_off(found[0], expected[0], hidden), _off(found[1], expected[1]))
        if difference < TOLERANCE:
            return roles, f"equal to the model's own in fp32 (relative difference {difference:.1e})"
        if difference < best:
            best, why = difference, f"outputs differ from the model's own by {difference:.1e}"
    return None, why


def _with_gradient(way: Callable[..., Any], call: Call) -> tuple[Tensor, Tensor]:
    """A block's output, zero at padding, and the gradient of a weighted sum of it for the block's input."""
    leaf = call.hidden.detach().clone().requires_grad_()
    with torch.enable_grad():
        output = way(leaf, *call.args, **call.kwargs)
        output = output[0] if isinstance(output, tuple) else output
        if call.real is not None:
            output = output * call.real[..., None]
        weights = torch.linspace(-1, 1, output.numel()).view(output.shape)
        (grad,) = torch.autograd.grad((output * weights).sum(), leaf)
    return output.detach(), grad


def _off(ours: Tensor, own: Tensor, hidden: Tensor | None = None) -> float:
    """The relative difference; of outputs, relative to what the block adds to its input if that is less."""
    if ours.shape != own.shape:
        return float("inf")
    size = float(own.norm())
    if hidden is not None and hidden.shape == own.shape:
        size = min(size, float((own - hidden).norm()))
    difference = float((ours - own).norm()) / max(size, 1e-30)
    return difference if math.isfinite(difference) else float("inf")
