"""Recognition of transformer blocks: find a description of a block and verify it against the model's code.

Candidates follow from the names and sizes of a block's parts. The names do not determine everything: the order of
halves, the positions of norms, the layout of combined projections, and rotary positions. A candidate is therefore
accepted only if the block computed by it equals the model's code in fp32, forward and backward, on a small copy of
the model.

Every parameter of a block must have a role. A description is valid for all blocks with the same signature, which
consists of classes and flags of all modules inside.
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

from deltaw.hub.transformers_private import build_from_config, quiet
from deltaw.kernels import loader
from deltaw.kernels.torch_private import direct_modules, direct_parameters, with_tensors, without_dispatch
from deltaw.lora.kinds import is_conv1d
from deltaw.lora.layers import LoRAConv1D
from deltaw.lora.stored import stored_form, weight_shape

Result = TypeVar("Result")


def blocks_of(model: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """Return the name and the list of the model's blocks, or None if it has no such list.

    This is the list of modules with the largest number of parameters. Lists inside blocks (experts) have fewer. Lists
    inside an embedding belong to a vision tower.
    """
    embeddings = {id(inner) for m in model.modules() if isinstance(m, nn.Embedding) for inner in m.modules()}
    named = [pair for pair in model.named_modules() if id(pair[1]) not in embeddings]
    lists = [pair for pair in named if isinstance(pair[1], nn.ModuleList)]
    sizes = [sum(p.numel() for p in module.parameters()) for _, module in lists]
    return lists[sizes.index(max(sizes))] if any(sizes) else None  # type: ignore[return-value]


# A description assigns roles to the children of a transformer block. It contains paths instead of modules, so that
# modules that were replaced (adapted layers, trained copies) are found. It is valid for all blocks of a kind,
# independent of their sizes.
#
# sequential   x₁ = x + attention(norm(x)),       y = x₁ + mlp(norm(x₁))
# parallel     y  = x + attention(norm(x)) + mlp(norm(x))
#
# Each half has up to three norms: ``before`` its first projection, ``after`` its last one inside the residual branch
# (Gemma 2, arXiv 2408.00118), and ``post`` after the sum with the residual stream (BERT, arXiv 1810.04805).


# Kernel names of activation functions, by their class names in transformers and torch.
ACTIVATIONS = {
    **dict.fromkeys(("SiLU", "SiLUActivation"), "silu"),
    **dict.fromkeys(("PytorchGELUTanh", "GELUTanh", "NewGELUActivation", "FastGELUActivation"), "gelu_tanh"),
    **dict.fromkeys(("GELUActivation", "GELU"), "gelu"),
    "ReLU": "relu",
}
# Layout of queries, keys and values, with d numbers per head: separate layers ("apart"), or the outputs of one layer.
# "stacked": all queries, then all keys, then all values (Phi-3, GPT-2). "grouped": for each key head its queries, its
# key and its value (GPT-NeoX, Falcon).
Split = Literal["apart", "stacked", "grouped"]


@dataclass(frozen=True)
class Norms:
    """Paths of the norms of a half block over the hidden size, None if not present."""

    before: str | None = None
    after: str | None = None
    post: str | None = None

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(path for path in (self.before, self.after, self.post) if path is not None)


@dataclass(frozen=True)
class AttentionRoles:
    """Attention of a block.

    Args:
        inputs: Paths of the projections of queries, keys and values, or the path of a combined projection.
        output: Path of the output projection.
        split: Layout of queries, keys and values in the outputs of the projections.
        head_size: Size d of a head. The numbers of heads follow from the sizes of the layers.
        query_norm: Path of a norm over each query head.
        key_norm: Path of a norm over each key head.
        rotary: True for rotary positions (arXiv 2104.09864).
        causal: True for causal attention.
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
        """Return the numbers of query heads and key heads, from the sizes of the block's layers."""
        heads = sizes(module_at(block, self.output))[0] // self.head_size
        if self.split == "apart":
            return heads, sizes(module_at(block, self.inputs[1]))[1] // self.head_size
        return heads, (sizes(module_at(block, self.inputs[0]))[1] // self.head_size - heads) // 2


@dataclass(frozen=True)
class MLPRoles:
    """MLP of a block: output(f(gate)·up), or output(f(inner)) if it is not gated.

    Args:
        inputs: Paths of gate and up, or of one layer that computes gate and up, or of the inner layer of an MLP without
            gate.
        activation: Path of f, see :func:`activation_kind`.
    """

    inputs: tuple[str, ...]
    output: str
    norms: Norms
    gated: bool
    activation: str


@dataclass(frozen=True)
class BlockRoles:
    """A transformer block.

    Args:
        parallel: True if both halves read the block's input, False if the MLP reads the sum of the attention half.
        extra_outputs: Number of values (all None) after the hidden states in the returned tuple, or None if the block
            returns a tensor.
    """

    attention: AttentionRoles
    mlp: MLPRoles
    parallel: bool = False
    extra_outputs: int | None = None

    @property
    def layers(self) -> tuple[str, ...]:
        """Paths of the linear layers: inputs and output of attention, inputs and output of the MLP."""
        return (*self.attention.inputs, self.attention.output, *self.mlp.inputs, self.mlp.output)

    @property
    def norms(self) -> tuple[str, ...]:
        """Paths of the norms without duplicates."""
        attention = self.attention
        heads = tuple(path for path in (attention.query_norm, attention.key_norm) if path is not None)
        return tuple(dict.fromkeys((*attention.norms.paths, *heads, *self.mlp.norms.paths)))


@dataclass(frozen=True)
class NormForm:
    """Formula of a norm: (x - mean)·rstd·(weight + offset) + bias.

    Args:
        eps: Added to the variance.
        offset: 1 if the weight is stored as its difference from one (Gemma), else 0.
        centered: True for LayerNorm (arXiv 1607.06450). False for RMSNorm (arXiv 1910.07467), which has mean 0.
    """

    eps: float
    offset: float
    centered: bool


def module_at(block: nn.Module, path: str) -> nn.Module:
    """Return the current module at ``path`` in a block.

    Raises:
        KeyError: if the path does not exist.
    """
    module: nn.Module | None = block
    for name in path.split("."):
        module = None if module is None else direct_modules(module)[name]
    if module is None:
        raise KeyError(path)
    return module


def sizes(layer: nn.Module) -> tuple[int, int]:
    """Return input and output size of a linear layer."""
    rows, columns = weight_shape(layer)
    return (columns, rows) if by_column(layer) else (rows, columns)


def by_column(layer: nn.Module) -> bool:
    """True for a weight (out, in), as in ``nn.Linear`` and quantized layers. False for (in, out), as in ``Conv1D``."""
    return stored_form(layer) is not None or not _is_conv1d(layer)


def _is_conv1d(layer: nn.Module) -> bool:
    return isinstance(layer, LoRAConv1D) or is_conv1d(layer)


def activation_kind(module: nn.Module) -> str | None:
    """Return the kernel name of an activation function, or None if the kernels do not support it."""
    if isinstance(module, nn.GELU) and module.approximate == "tanh":
        return "gelu_tanh"
    return ACTIVATIONS.get(type(module).__name__)


def norm_form(module: nn.Module) -> NormForm | None:
    """Return the formula of a norm over the last dimension, or None if the module is not a supported norm.

    Classes that are not from torch run on fp32 sample values, which are compared with the formula.
    """
    weight = direct_parameters(module).get("weight")
    if weight is None or weight.dim() != 1 or direct_modules(module):
        return None
    eps = next((vars(module)[name] for name in ("variance_epsilon", "eps") if name in vars(module)), None)
    if not isinstance(eps, float):
        return None
    if type(module) is nn.LayerNorm:
        return NormForm(eps, 0.0, True) if weight.shape == tuple(module.normalized_shape) else None
    bias = direct_parameters(module).get("bias")
    size = weight.numel()
    with torch.no_grad(), without_dispatch():
        x = torch.linspace(-1.5, 2.0, size, dtype=torch.float32)[None]
        values = {"weight": torch.linspace(0.3, 0.7, size), "bias": torch.linspace(-0.2, 0.1, size)}
        used = [name for name, tensor in (("weight", weight), ("bias", bias)) if tensor is not None]
        copy = with_tensors(module, {name: nn.Parameter(values[name], False) for name in used})
        expected = type(module).forward(copy, x)
        added = values["bias"] if bias is not None else torch.zeros(size)
        for centered in (False, True):
            middle = x - x.mean() if centered else x
            hat = middle * torch.rsqrt(middle.square().mean() + eps)
            for offset in (0.0, 1.0):
                computed = hat * (values["weight"] + offset) + added
                if isinstance(expected, Tensor) and torch.allclose(expected, computed, rtol=1e-4, atol=1e-5):
                    return NormForm(eps, offset, centered)
    return None


@contextlib.contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Context in which ``module`` uses another forward function. Its hooks still run."""
    table = vars(module)
    previous = table.get("forward")
    table["forward"] = forward
    try:
        yield
    finally:
        if previous is None:
            del table["forward"]
        else:
            table["forward"] = previous


# A small fp32 copy of a model has the same classes and settings, with a small number of narrow blocks and random
# weights. The function that a model's code computes does not depend on its sizes and weights, so its properties are
# tested on such a copy. This is exact in fp32, takes milliseconds, and works in a dry run on fake tensors. The copy
# preserves the head size, which affects rotary positions, and the structure of grouped heads, which distinguishes
# layouts.


VOCABULARY, HIDDEN, INNER = 97, 64, 96
# Sliding window of the copy, smaller than the sample.
WINDOW = 8
# Maximum number of layers of the copy.
MAX_LAYERS = 16
_INNER = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "hidden_dim", "moe_intermediate_size")


def small_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Return a small, frozen copy of a backbone in evaluation mode, with fp32 values on the CPU.

    Torch's random state is preserved. Errors of third-party code for the small configuration propagate.
    """
    config = small_config(model.config)
    with without_dispatch(), quiet(), torch.random.fork_rng(devices=[]):
        with no_init_weights():
            copied = build_from_config(type(model), config, torch.float32)
        generator = torch.Generator().manual_seed(0)
        for name, parameter in copied.named_parameters():
            _fill(name, parameter.data, generator)
        copied.tie_weights()
    return copied.requires_grad_(False).eval()


def measure_once(
    cache: dict[Any, Result], model: PreTrainedModel, measure: Callable[[PreTrainedModel], Result], variant: str = ""
) -> Result:
    """Return the result of ``measure`` on a small copy of a backbone, cached in ``cache``.

    The key contains all dependencies: class, configuration, kernels, arithmetic, and ``variant``.
    """
    arithmetic = loader.library() is not None, loader.arithmetic().with_approximations(())
    key = (type(model), model.config.to_json_string(use_diff=False), variant, *arithmetic)
    if key not in cache:
        with without_dispatch():
            cache[key] = measure(small_copy(model))
    return cache[key]


def small_config(config: PretrainedConfig) -> PretrainedConfig:
    """Return the configuration of a small copy."""
    small = copy.deepcopy(config)
    heads, keys, size = _heads(config)
    num_keys = min(keys, 2)
    num_heads = num_keys * min(heads // keys, 2) if keys > 1 else 2
    has_head_size = getattr(config, "head_dim", None) == size and hasattr(config, "num_key_value_heads")
    _set(small, "num_attention_heads", num_heads)
    for name in ("num_key_value_heads", "num_kv_heads"):
        if getattr(config, name, None) is not None:
            setattr(small, name, num_keys if getattr(config, name) == keys else num_heads)
    _set(small, "hidden_size", HIDDEN if has_head_size else num_heads * size)
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
    _reduce_layers(small, config)
    patch = getattr(config, "patch_size", None)
    if isinstance(getattr(config, "image_size", None), int) and isinstance(patch, int):
        small.image_size = 2 * patch
    return small


def _heads(config: PretrainedConfig) -> tuple[int, int, int]:
    """Return the numbers of query heads and key heads, and the head size."""
    heads = int(config.num_attention_heads)
    keys = getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None) or heads
    if not isinstance(keys, int) or keys < 1 or heads % keys:
        raise ValueError("heads are not a multiple of key heads")
    return heads, keys, int(getattr(config, "head_dim", None) or int(config.hidden_size) // heads)


def _reduce_layers(small: PretrainedConfig, config: PretrainedConfig) -> None:
    """Set a number of layers that includes every kind of layer listed in the configuration, at least two."""
    count = int(config.num_hidden_layers)
    sequences = {name: value for name, value in config.to_dict().items() if isinstance(value, (list, tuple))}
    lists = {name: value for name, value in sequences.items() if len(value) == count > 1}
    layer_kinds = list(zip(*(map(str, value) for value in lists.values()), strict=True))
    last = max((layer_kinds.index(layer_kind) for layer_kind in set(layer_kinds)), default=0)
    num_layers = min(count, max(2, last + 1))
    if num_layers > MAX_LAYERS:
        raise ValueError("too many layers are needed to include all kinds")
    _set(small, "num_hidden_layers", num_layers)
    for name, value in lists.items():
        setattr(small, name, list(value)[:num_layers])


def _set(config: PretrainedConfig, name: str, value: int) -> None:
    """Set an attribute by its standard name, which configurations map to their own (``attribute_map``)."""
    if getattr(config, name, None) is None:
        raise ValueError(f"the configuration has no {name}")
    setattr(config, name, value)


def _fill(name: str, values: torch.Tensor, generator: torch.Generator) -> None:
    """Fill with random values for which every part of a block has an effect: weights of unit gain, nonzero biases, and
    norm weights different from 1.
    """
    noise = torch.randn(values.shape, generator=generator)
    if values.dim() > 1:
        values.copy_(noise / math.sqrt(values[0].numel() if "embed" not in name else 1))
    elif name.endswith("bias"):
        values.copy_(0.2 * noise)
    else:
        values.copy_(1 + 0.2 * noise)


# Maximum relative difference of outputs and gradients that is attributed to fp32 rounding.
TOLERANCE = 1e-4
_SEPARATE_NAMES = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q_lin", "k_lin", "v_lin"))
_COMBINED_NAMES = ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv")
_HEAD_NORMS = (("q_norm", "k_norm"), ("q_layernorm", "k_layernorm"))
_HEAD_SIZES = ("head_dim", "head_size", "attention_head_size")
_GATED = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), ("gate", "up", "down"))
# Attributes that differ between blocks of a kind, or depend on sizes.
_PER_LAYER_FLAGS = ("layer_idx", "layer_number", "scaling", "training", "gradient_checkpointing", "enabled", "merged")
Signature = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class AttentionConfig:
    """Attention parameters of a block.

    Args:
        scaling: Factor applied to the scores.
        window: Number of positions that a token attends to, including itself, or None.
        softcap: Soft cap of the scores, see :func:`deltaw.kernels.attention.packed_attention`.
    """

    scaling: float
    window: int | None = None
    softcap: float | None = None

    @property
    def kind(self) -> tuple[bool, bool]:
        """The part of the parameters that distinguishes kinds of blocks."""
        return self.window is not None, self.softcap is not None


def signature(block: nn.Module) -> Signature:
    """Return the properties that a block's code depends on, without sizes and weights: class and flags of each part.

    Adapted and int8-quantized layers count as the layers that they replace.
    """
    return tuple((path, *_kind_of(module), *_flags_of(module)) for path, module in block.named_modules())


def _kind_of(module: nn.Module) -> tuple[str, ...]:
    if isinstance(module, nn.Linear):
        return ("linear", str(direct_parameters(module).get("bias") is not None))
    if _is_conv1d(module):
        return ("conv1d",)
    kind = type(module)
    parameters = sorted(name for name, parameter in direct_parameters(module).items() if parameter is not None)
    return (f"{kind.__module__}.{kind.__qualname__}", *parameters)


def _flags_of(module: nn.Module) -> Iterator[str]:
    if isinstance(module, nn.Linear) or _is_conv1d(module):
        return
    for name, value in sorted(vars(module).items()):
        if name.startswith("_") or name in _PER_LAYER_FLAGS:
            continue
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        if isinstance(value, bool | float | str) or (is_integer and name.startswith("use")):
            yield f"{name}={value}"


def candidates(block: nn.Module) -> list[BlockRoles] | str:
    """Return descriptions that the names and sizes of a block's parts allow, most likely first.

    Without candidates, return a text that states the missing part.
    """
    modules = dict(block.named_modules())
    linear = {path: m for path, m in modules.items() if isinstance(m, nn.Linear) or _is_conv1d(m)}
    attention_inputs = _attention_inputs(linear)
    if attention_inputs is None:
        return "no query, key and value projections found"
    inputs, parent = attention_inputs
    head_size = _head_size(module_at(block, parent) if parent else block)
    if head_size is None:
        return "unknown head size"
    top = parent.partition(".")[0]
    other_paths = [path for path in linear if path not in inputs]
    outputs = [path for path in other_paths if path.startswith(f"{top}.")]
    inner = [path for path in other_paths if path not in outputs]
    if len(outputs) != 1:
        return "no single output projection"
    activations = [p for p, m in modules.items() if activation_kind(m) is not None and not p.startswith(f"{top}.")]
    if len(activations) != 1:
        return "no known activation"
    shapes = _mlp_shapes(inner, linear)
    if shapes is None:
        return "no MLP of two or three layers"
    norms = [path for path, m in modules.items() if path and path not in linear and norm_form(m) is not None]
    pair = next((p for p in _HEAD_NORMS if all(f"{parent}.{name}" in norms for name in p)), None)
    heads = [f"{parent}.{name}" for name in pair] if pair is not None else []
    if any(direct_parameters(module_at(block, path))["weight"].numel() != head_size for path in heads):  # type: ignore[union-attr]
        return "query norms do not match the head size"
    block_norms = [path for path in norms if path not in heads]
    covered_ids = {id(p) for path in (*linear, *norms) for p in modules[path].parameters()}
    if any(id(p) not in covered_ids for p in block.parameters()):
        return "it has parameters outside of norms and projections"
    causal = vars(module_at(block, parent)).get("is_causal", True) is not False
    splits: tuple[Split, ...] = ("apart",) if len(inputs) == 3 else ("stacked", "grouped")
    query_norm, key_norm = heads or (None, None)
    roles = []
    combinations = itertools.product((True, False), list(_norm_places(block_norms)), splits, shapes)
    for rotary, (first, second, parallel), split, (into, out, gated) in combinations:
        attention = AttentionRoles(inputs, outputs[0], first, split, head_size, query_norm, key_norm, rotary, causal)
        roles.append(BlockRoles(attention, MLPRoles(into, out, second, gated, activations[0]), parallel))
    return roles


def _norm_places(paths: list[str]) -> Iterator[tuple[Norms, Norms, bool]]:
    """Yield possible roles of the norms: norms of attention, norms of the MLP, and True if the halves are parallel."""
    if len(paths) == 1:
        yield Norms(before=paths[0]), Norms(before=paths[0]), True
    if len(paths) == 2:
        for first, second in (paths, paths[::-1]):
            yield Norms(before=first), Norms(before=second), False
            yield Norms(before=first), Norms(before=second), True
            yield Norms(post=first), Norms(post=second), False
            yield Norms(after=first), Norms(after=second), False
    if len(paths) == 4:
        yield Norms(paths[0], paths[1]), Norms(paths[2], paths[3]), False
        yield Norms(paths[0], paths[2]), Norms(paths[1], paths[3]), False


def _attention_inputs(linear: dict[str, nn.Module]) -> tuple[tuple[str, ...], str] | None:
    """Return the paths of the query, key and value projections, and of their parent module."""
    for path in linear:
        parent, _, name = path.rpartition(".")
        for names in _SEPARATE_NAMES:
            paths = tuple(f"{parent}.{n}" if parent else n for n in names)
            if name == names[0] and all(p in linear for p in paths):
                return paths, parent
        if name in _COMBINED_NAMES and parent:
            return (path,), parent
    return None


def _head_size(attention: nn.Module) -> int | None:
    for name in _HEAD_SIZES:
        value = vars(attention).get(name)
        if isinstance(value, int) and value > 0:
            return value
    heads, dim = vars(attention).get("n_heads"), vars(attention).get("dim")
    return dim // heads if isinstance(heads, int) and isinstance(dim, int) else None


def _mlp_shapes(inner: list[str], linear: dict[str, nn.Module]) -> list[tuple[tuple[str, ...], str, bool]] | None:
    """Return possible (inputs, output, gated) of the MLP's layers."""
    by_name = {path.rpartition(".")[2]: path for path in inner}
    for gate, up, down in _GATED:
        if len(inner) == 3 and {gate, up, down} == set(by_name):
            return [((by_name[gate], by_name[up]), by_name[down], True)]
    if len(inner) != 2:
        return None
    (_, inner_size), (outer_size, _) = (sizes(linear[path]) for path in inner)
    return [((inner[0],), inner[1], inner_size != outer_size)] if inner_size in (outer_size, 2 * outer_size) else None


@dataclass(frozen=True)
class BlockCall:
    """A recorded call of a block in fp32.

    Attributes:
        block: The block.
        hidden: Input hidden states.
        args: Further positional arguments.
        kwargs: Keyword arguments.
        output: Output of the block.
        config: Attention parameters, or None if attention was not recorded.
        token_mask: (rows, length) True for tokens, False for padding with undefined outputs. None without padding.
    """

    block: nn.Module
    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    config: AttentionConfig | None = None
    token_mask: Tensor | None = None


def find_roles(
    call: BlockCall, run: Callable[[nn.Module, BlockRoles, AttentionConfig], Callable[..., Any]]
) -> tuple[BlockRoles | None, str]:
    """Return the first candidate that equals the model's code, or None, and the reason.

    Args:
        run: Creates the replacement of a block from its description and attention parameters.
    """
    proposed = candidates(call.block)
    if isinstance(proposed, str):
        return None, proposed
    extra = len(call.output) - 1 if isinstance(call.output, tuple) else None
    if isinstance(call.output, tuple) and any(value is not None for value in call.output[1:]):
        return None, "it returns values in addition to the hidden states"
    expected = _with_gradient(call.block.forward, call)
    best, why = float("inf"), "no description matches"
    for roles in proposed:
        roles = BlockRoles(roles.attention, roles.mlp, roles.parallel, extra)
        config = call.config or AttentionConfig(roles.attention.head_size**-0.5)
        try:
            computed = _with_gradient(run(call.block, roles, config), call)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            why = f"{type(error).__name__}: {str(error)[:80]}"
            continue
        hidden = call.hidden if call.token_mask is None else call.hidden * call.token_mask[..., None]
        difference = max(_difference(computed[0], expected[0], hidden), _difference(computed[1], expected[1]))
        if difference < TOLERANCE:
            return roles, f"equal to the model's code in fp32 (relative difference {difference:.1e})"
        if difference < best:
            best, why = difference, f"outputs differ from the model's code by {difference:.1e}"
    return None, why


def relative_difference(call: BlockCall, replacement: Callable[..., Any]) -> float:
    """Return the relative difference of outputs and input gradients between a block and its replacement."""
    return max(map(_difference, _with_gradient(replacement, call), _with_gradient(call.block.forward, call)))


def _with_gradient(function: Callable[..., Any], call: BlockCall) -> tuple[Tensor, Tensor]:
    """Return a block's output, with zeros at padding, and the input gradient of a weighted sum of the output."""
    leaf = call.hidden.detach().clone().requires_grad_()
    with torch.enable_grad():
        output = function(leaf, *call.args, **call.kwargs)
        output = output[0] if isinstance(output, tuple) else output
        if call.token_mask is not None:
            output = output * call.token_mask[..., None]
        slopes = torch.linspace(-1, 1, output.numel(), device=output.device).view(output.shape)
        (grad,) = torch.autograd.grad((output * slopes).sum(), leaf)
    return output.detach(), grad


def _difference(computed: Tensor, expected: Tensor, hidden: Tensor | None = None) -> float:
    """Return the relative difference. For outputs, it is relative to the block's residual update if that is smaller."""
    if computed.shape != expected.shape:
        return float("inf")
    size = float(expected.norm())
    if hidden is not None and hidden.shape == expected.shape:
        size = min(size, float((expected - hidden).norm()))
    difference = float((computed - expected).norm()) / max(size, 1e-30)
    return difference if math.isfinite(difference) else float("inf")
