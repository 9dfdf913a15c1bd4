"""Build a decoder over a model's weights and verify it against the model.

The roles of the blocks' layers come from ``runtime/fused_blocks``, and the computation outside the blocks from
``probes``. If the blocks are not recognized, the decoder runs the model's own code (``model_decoder``).

Verification compares logits of about forty tokens, in chunks and one by one: in fp32 with a small copy of the model,
which checks the code, and in the model's precision with the model, which checks the weights. Transformers decodes a
model that fails.

Weights are shared with the model. Only transposed layers (``Conv1D``) and an int8 head are copied. The decoder
represents the model as it is when it is built, for example without a method's changes inside its ``without`` context.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltaw.decoding.adapters import ActiveAdapter
from deltaw.decoding.generation import position_limit
from deltaw.decoding.model_decoder import ModelAdapter, ModelDecoder, ModelInputs
from deltaw.decoding.probes import DEFAULT_POSITIONS, InputProbe, NotDecodable, Prober
from deltaw.hub.loading import default_attention, use_attention
from deltaw.kernels.decode import Decoder, PackedAdapter
from deltaw.kernels.decode_reference import DecoderBlock, DecoderLinear
from deltaw.kernels.quantize import quantize_rows
from deltaw.kernels.rows import HalfNorms, Norm
from deltaw.kernels.torch_modules import direct_parameters
from deltaw.lora.kinds import get_output_head
from deltaw.lora.stored import weight_shape
from deltaw.runtime.block_roles import BlockRoles, Norms, module_at, norm_form
from deltaw.runtime.fused import FusedBlock
from deltaw.runtime.fused_blocks import final_norm, recognize
from deltaw.runtime.packed import PACKED
from deltaw.runtime.padded import PADDED
from deltaw.runtime.projections import Projection
from deltaw.runtime.recognition import blocks_of
from deltaw.runtime.small_copy import small_copy
from deltaw.runtime.virtual_tokens import input_embedding

# Number of compared tokens, size of the first chunk, and number of single tokens after it.
SAMPLE = 40
CHUNK = 17
SINGLE = 3
# Relative difference of fp32 logits that is explained by rounding.
TOLERANCE = 1e-4
# Limits the memory for cosines and sines, which are stored for every position.
MAX_POSITIONS = 1 << 17
# Elements of a head that are quantized to int8 at a time.
QUANTIZE_CHUNK = 1 << 21


@dataclass(frozen=True)
class Decodable:
    """Model with its decoder.

    Attributes:
        decoder: Decoder over the model's weights.
        entry: Computes the input rows of tokens.
        blocks: Blocks of the model, in order. Empty if the decoder runs the model's code.
        roles: Roles of the layers of each block.
        vocabulary: Number of logits.
        why: Result of the verification, as text.
    """

    decoder: Decoder | ModelDecoder
    entry: InputProbe | ModelInputs
    blocks: tuple[nn.Module, ...]
    roles: tuple[BlockRoles, ...]
    vocabulary: int
    why: str = ""

    @property
    def positions(self) -> int:
        """Maximum number of positions of a sequence."""
        return self.entry.limit


def build_decodable(
    model: PreTrainedModel,
    *,
    cache_bytes: int | None = None,
    fused: Sequence[FusedBlock] | None = None,
    positions: int = MAX_POSITIONS,
) -> Decodable:
    """Build and verify a decoder of the model in its current state, without its low-rank factors.

    If the blocks of the model are in int8, the head is quantized to int8 as a copy.

    Args:
        model: The model.
        cache_bytes: Memory for keys and values. It limits the number of positions.
        fused: Result of :func:`recognized_blocks`. For a model with added biases, the result without them.
        positions: Maximum number of positions.

    Raises:
        NotDecodable: if the model is not supported.
    """
    if model.device.type != "cpu":
        raise NotDecodable("the decoder supports only CPUs")
    with eval_mode(model):
        try:
            tiny = small_copy(model)
        except Exception as error:  # model code may raise anything for a small configuration
            raise NotDecodable(f"{type(error).__name__}: {str(error)[:100]}") from error

        def build(blocks_model: PreTrainedModel, limit: int) -> Decodable:
            of_model = fused if blocks_model is model else None
            budget = cache_bytes if blocks_model is model else None
            return _build(blocks_model, of_model or recognized_blocks(blocks_model), budget, limit)

        try:
            return _verified(build, model, tiny, positions)
        except NotDecodable as reason:
            try:
                result = _verified(partial(_build_from_code, cache_bytes=cache_bytes), model, tiny, positions)
            except NotDecodable as other:
                raise NotDecodable(f"{reason}; in the model's own code: {other}") from reason
            return replace(result, why=f"runs the model's own code, because {reason}; {result.why}")


def _verified(
    build: Callable[[PreTrainedModel, int], Decodable], model: PreTrainedModel, tiny: PreTrainedModel, positions: int
) -> Decodable:
    """Return the decoder that ``build`` returns for a model and a number of positions, after its verification."""
    tiny_error = logit_difference(build(tiny, max(positions, SAMPLE)), tiny)
    if not tiny_error < TOLERANCE:
        raise NotDecodable(f"the decoder's logits of a small copy of the model differ by {tiny_error:.1e}")
    result = build(model, positions)
    model_error = logit_difference(result, model)
    if not model_error < tolerance(model):
        raise NotDecodable(f"the decoder's logits differ from the model's by {model_error:.1e}")
    description = f"logits equal the model's own (relative difference {model_error:.1e}, in fp32 {tiny_error:.1e})"
    return replace(result, why=description)


def tolerance(model: PreTrainedModel) -> float:
    """Return the relative difference of logits that the precision of the weights allows.

    Each half of a block rounds its contribution to the residual stream. These errors are independent, so their sum
    grows with the square root of the number of halves. Rounding to bf16 has a relative error of 2^-9, and a half rounds
    about ten times. int8 has an error of about 1% of a product (``runtime/int8_weights``).
    """
    types = {p.dtype for p in model.parameters()}
    halves = 2 * int(getattr(model.config.get_text_config(), "num_hidden_layers", 1)) + 1
    if torch.int8 in types:
        return min(0.3, 0.03 * math.sqrt(halves))
    return TOLERANCE if types == {torch.float32} else min(0.3, 10 * 2.0**-9 * math.sqrt(halves))


@contextlib.contextmanager
def eval_mode(model: PreTrainedModel) -> Iterator[None]:
    """Put the model into evaluation mode without gradients, and restore its mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad(), use_attention(model, default_attention(model)):
            yield
    finally:
        for module in training:
            module.training = True


def _build(model: PreTrainedModel, fused: Sequence[FusedBlock], cache_bytes: int | None, positions: int) -> Decodable:
    """Build a decoder without verification."""
    model_blocks = blocks_of(model.base_model)
    if model_blocks is None or [block.block for block in fused] != list(model_blocks[1]):
        raise NotDecodable("its blocks were replaced after they were recognized")
    types = {p.dtype for block in fused for p in block.block.parameters()}
    cache_dtype = torch.float32 if types == {torch.float32} else torch.bfloat16
    if cache_bytes is not None:
        heads = sum(block.roles.attention.heads(block.block)[1] * block.roles.attention.head_size for block in fused)
        positions = min(positions, cache_bytes // (2 * heads * cache_dtype.itemsize))  # keys and values
    roles = tuple(block.roles for block in fused)
    blocks = tuple(block.block for block in fused)
    prober = Prober(model, blocks, [r.extra_outputs for r in roles])
    final = final_norm(model.base_model)
    if final is None:
        raise NotDecodable("the norm after its blocks is not recognized")
    try:
        entry = prober.entry(positions, [r.attention.rotary is not None for r in roles])
        form = prober.logits_form()
        decoder_blocks = [_block(f, entry.tables, table) for f, table in zip(fused, entry.table_of, strict=True)]
        linear = _linear(get_output_head(model), quantize=any(p.dtype == torch.int8 for p in model.parameters()))
        parts = decoder_blocks, _norm(final), linear, entry.tables
        decoder = Decoder(*parts, cache_dtype=cache_dtype, logits_softcap=form.cap, logits_scale=form.factor)
    except (ValueError, RuntimeError, TypeError, AttributeError, KeyError) as error:
        raise NotDecodable(f"{type(error).__name__}: {str(error)[:120]}") from error
    return Decodable(decoder, entry, blocks, roles, linear.outputs)


def _build_from_code(model: PreTrainedModel, positions: int, cache_bytes: int | None) -> Decodable:
    """Build a decoder that runs the model's code, without verification."""
    head = get_output_head(model)
    types = {p.dtype for p in model.parameters()}
    cache_dtype = torch.float32 if types == {torch.float32} else torch.bfloat16

    def linear(module: nn.Module) -> DecoderLinear:
        return _linear(module, quantize=module is head and torch.int8 in types)

    try:
        embedding = input_embedding(model)
        decoder = ModelDecoder(model, embedding, linear, cache_dtype)
    except Exception as error:  # model code may raise anything
        raise NotDecodable(f"{type(error).__name__}: {str(error)[:120]}") from error
    if head is None:
        raise NotDecodable("it has no output head")
    if cache_bytes is not None:
        positions = min(positions, cache_bytes // decoder.bytes_per_page * decoder.page_tokens)
    entry = ModelInputs(embedding, min(position_limit(model) or DEFAULT_POSITIONS, positions))
    if entry.images is not None and entry.images.has_grid_positions:
        raise NotDecodable("its image tokens have three-dimensional positions")
    return Decodable(decoder, entry, (), (), weight_shape(head)[0])


def recognized_blocks(model: PreTrainedModel) -> list[FusedBlock]:
    """Return the recognized blocks of the model, in order.

    Raises:
        NotDecodable: if the blocks are not recognized or attend to later tokens.
    """
    reason = ""
    for mode in (PACKED, PADDED):
        result = recognize(model, mode)
        if result.choice.value and result.blocks:
            if not all(block.roles.attention.causal for block in result.blocks):
                raise NotDecodable("its attention is bidirectional")
            return result.blocks
        reason = reason or result.choice.why
    raise NotDecodable(f"its blocks are not recognized: {reason}")


def _block(fused: FusedBlock, tables: Sequence[tuple[Tensor, Tensor]], table: int | None) -> DecoderBlock:
    """Return the decoder's description of a block."""
    block = fused.block
    roles = fused.roles
    attention_config = fused.config
    attention = roles.attention
    mlp = roles.mlp
    if mlp is None or not roles.is_basic:
        raise NotDecodable("its blocks have parts that the decoder does not support")
    heads, key_heads = attention.heads(block)
    # A fused layer is represented by its first part.
    query, *key_value = (_linear(module_at(block, path)) for path in attention.inputs)
    key, value = key_value or (None, None)
    gate, *up = (_linear(module_at(block, path)) for path in mlp.inputs)
    return DecoderBlock(
        heads=heads,
        key_heads=key_heads,
        head_size=attention.head_size,
        query=query,
        key=key,
        value=value,
        output=_linear(module_at(block, attention.output)),
        gate=gate,
        up=up[0] if up else None,
        down=_linear(module_at(block, mlp.output)),
        first=_half_norms(block, attention.norms),
        second=_half_norms(block, mlp.norms),
        query_norm=None if attention.query_norm is None else _norm(module_at(block, attention.query_norm)),
        key_norm=None if attention.key_norm is None else _norm(module_at(block, attention.key_norm)),
        split=attention.split,
        gated=mlp.gated,
        parallel=roles.parallel,
        activation=mlp.kind,
        scaling=attention_config.scaling,
        window=attention_config.window,
        softcap=attention_config.softcap,
        rotary_dims=0 if table is None else tables[table][0].shape[1],
        table=table or 0,
    )


def _half_norms(block: nn.Module, norms: Norms) -> HalfNorms:
    paths = norms.before, norms.after, norms.post
    return HalfNorms(*(None if path is None else _norm(module_at(block, path)) for path in paths))


def _norm(module: nn.Module) -> Norm:
    form = norm_form(module)
    if form is None:
        raise NotDecodable(f"the norm {type(module).__name__} is not supported")
    tensors = map(direct_parameters(module).get, ("weight", "bias"))
    weight, bias = (None if t is None else t.detach().float().contiguous() for t in tensors)
    return Norm(weight, bias, form.eps, form.offset, form.centered)


def _linear(module: nn.Module | None, quantize: bool = False) -> DecoderLinear:
    """Return a linear layer without low-rank factors."""
    if module is None or not isinstance(direct_parameters(module).get("weight"), Tensor):
        raise NotDecodable("a layer has no weight")
    layer = Projection(module).product
    bias = None if layer.bias is None else layer.bias.detach().float().contiguous()
    if (blocks := layer.blocks) is not None:
        return DecoderLinear(blocks, bias)
    weight = layer.weight.detach()
    scale = layer.scale
    if not layer.by_column:
        weight = weight.t()
    if quantize and weight.dtype != torch.int8:
        # Quantize in parts, because quantization uses eight bytes per element.
        parts = [quantize_rows(module_at) for module_at in weight.split(max(1, QUANTIZE_CHUNK // weight.shape[1]))]
        weight = torch.cat([rows for rows, _ in parts])
        scale = torch.cat([scales for _, scales in parts])
    return DecoderLinear(weight.contiguous(), bias, scale, layer.smooth_scales)


def logit_difference(
    decodable: Decodable, model: PreTrainedModel, *, adapter: ActiveAdapter | None = None, tokens: Tensor | None = None
) -> float:
    """Return the relative difference, in norm, between the logits of a decoder and its model.

    Args:
        decodable: The decoder.
        model: The model.
        adapter: Adapter that acts on all tokens. It must be attached to the model too.
        tokens: (n,) token ids without virtual tokens, or None for random tokens.
    """
    num_tokens = decodable.entry.num_tokens
    if tokens is None:
        count = min(SAMPLE, decodable.positions)
        tokens = torch.randint(0, num_tokens, (count,), generator=torch.Generator().manual_seed(0))
    soft = None if adapter is None else adapter.soft_prompt
    rows = decodable.entry.rows(tokens)
    model_tokens = tokens
    if soft is not None:
        rows = torch.cat([soft.float() * decodable.entry.outer, rows])
        model_tokens = torch.cat([torch.arange(num_tokens, num_tokens + len(soft)), tokens])
    model_logits = model(input_ids=model_tokens[None], use_cache=False).logits[0]
    error = total = torch.zeros((), dtype=torch.float64)
    # Chunks limit memory: with a vocabulary of 262,144, the fp32 logits of all tokens take 42 MB.
    for start, stop, logits in _logits(decodable, rows, None if adapter is None else adapter.packed):
        expected = model_logits[start:stop].float()
        total = total + expected.norm().double().square()
        error = error + expected.sub_(logits).norm().double().square()
    return float((error / total.clamp_min(1e-60)).sqrt())


def _logits(
    decodable: Decodable, rows: Tensor, adapter: PackedAdapter | ModelAdapter | None
) -> Iterator[tuple[int, int, Tensor]]:
    """Yield the decoder's logits for rows (n, D) without positions: a chunk, single tokens, then the rest.

    Yields:
        Index of the first row, index after the last row, and logits (rows, V).
    """
    decoder = decodable.decoder
    count = len(rows)
    if decodable.entry.positions is not None:
        rows = rows + decodable.entry.positions[:count]
    pages = -(-count // decoder.page_tokens)
    memory = decoder.new_pages(pages)
    table = torch.arange(pages, dtype=torch.int32)[None]
    stops = sorted({*(min(count, CHUNK + n) for n in range(SINGLE + 1)), count})
    for start, stop in zip([0, *stops], stops, strict=False):
        positions = torch.arange(start, stop, dtype=torch.int32)
        zeros = torch.zeros_like(positions)
        adapter_rows = zeros if adapter is not None else zeros - 1
        packed: list[Any] = [] if adapter is None else [adapter]
        logits = decoder.step(memory, rows[start:stop].contiguous(), positions, zeros, table, adapter_rows, packed)[1]
        yield start, stop, logits
