"""From a live model to a decoder over its own weights, and whether that decoder says what the model says.

Blocks are recognized as for training (``runtime/fused_blocks``), what stands around them is found by
running the model's code (``probes``). Then logits of some forty tokens, in chunks and one by one, are
compared with the model's own: in fp32 on a small copy of the model, which verifies the code, and in the
model's own precision on the model, which verifies the weights. A model that does not pass is decoded by
transformers.

Weights are read where they lie; only transposed layers (``Conv1D``) and a head in int8 are copies. A
decoder is of the model as it is now: within a method's ``without``, of the base model.

Knows models; not requests, adapters or pages.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltaw.hub.loading import attention_of, ordinary_attention
from deltaw.kernels.decode import Decoder, PackedAdapter
from deltaw.kernels.decode_reference import DecoderBlock, DecoderLinear
from deltaw.kernels.quantize import quantized_rows
from deltaw.kernels.rows import HalfNorms, Norm
from deltaw.kernels.torch_private import own_parameters
from deltaw.runtime.fused import FusedBlock
from deltaw.runtime.fused_blocks import last_norm, recognize
from deltaw.runtime.packed import PACKED, PADDED
from deltaw.runtime.projections import Projection
from deltaw.runtime.recognition import BlockRoles, Norms, activation_kind, blocks_of, norm_form, part, small_copy
from deltaw.serving.adapters import ActiveAdapter
from deltaw.serving.probes import Entry, NotDecodable, Prober

# Tokens that are compared, and how many of them come one by one behind a first chunk.
SAMPLE, CHUNK, SINGLE = 40, 17, 3
# Relative difference of logits in fp32 that is rounding and no more.
TOLERANCE = 1e-4
# Cosines and sines are kept for every position, so there is a bound.
MOST_POSITIONS = 1 << 17
# Numbers of a head that are rounded to int8 at once.
ROUNDED_AT_ONCE = 1 << 21


@dataclass(frozen=True)
class Decodable:
    """A model as a decoder.

    Attributes:
        decoder: over the model's weights. entry: how tokens become its rows.
        blocks, roles: of the model, in order, with their descriptions.
        vocabulary: how many logits there are.
        why: how well it was verified, in a few words.
    """

    decoder: Decoder
    entry: Entry
    blocks: tuple[nn.Module, ...]
    roles: tuple[BlockRoles, ...]
    vocabulary: int
    why: str = ""

    @property
    def positions(self) -> int:
        """How many positions a text may have."""
        return self.entry.limit


def decodable(
    model: PreTrainedModel,
    *,
    cache_bytes: int | None = None,
    fused: Sequence[FusedBlock] | None = None,
    positions: int = MOST_POSITIONS,
) -> Decodable:
    """A verified decoder of the model as it is now, its low-rank factors left out.

    Where the model's blocks are in int8, its head is decoded in int8 too, as a copy.

    Args:
        cache_bytes: memory for keys and values: what it has no room for, there are no positions for.
        fused: what :func:`recognized_blocks` found; for a model with biases that its own code does not have,
            what it found without them.
        positions: the most that are wanted.

    Raises:
        NotDecodable: the model cannot be decoded so; says why.
    """
    if model.device.type != "cpu":
        raise NotDecodable("on this device the model's own code runs")
    int8_head = any(p.dtype == torch.int8 for p in model.parameters())
    with evaluating(model):
        try:
            small = small_copy(model)
        except Exception as error:  # whatever foreign code raises for a small configuration
            raise NotDecodable(f"{type(error).__name__}: {str(error)[:100]}") from error
        exact = difference(_assembled(small, recognized_blocks(small), None, False, max(positions, SAMPLE)), small)
        if not exact < TOLERANCE:
            raise NotDecodable(f"a small copy's logits differ from its own by {exact:.1e}")
        made = _assembled(model, fused or recognized_blocks(model), cache_bytes, int8_head, positions)
        rough = difference(made, model)
    if not rough < tolerance(model, int8_head):
        raise NotDecodable(f"its logits differ from the model's own by {rough:.1e}")
    why = f"logits equal the model's own (relative difference {rough:.1e}, in fp32 {exact:.1e})"
    return replace(made, why=why)


def tolerance(model: PreTrainedModel, int8_head: bool = False) -> float:
    """How far logits may be from the model's own in the precision of its weights.

    Every half of a block rounds what it adds to the stream; errors of halves are independent, so their sum
    grows with the root of their number. One rounding to bf16 errs by 2^-9, and a half rounds about ten
    numbers on the way; int8 errs by about 1 % of a product (``runtime/int8_weights``).
    """
    types = {p.dtype for p in model.parameters()}
    halves = 2 * int(getattr(model.config.get_text_config(), "num_hidden_layers", 1)) + 1
    if torch.int8 in types or int8_head:
        return min(0.3, 0.03 * math.sqrt(halves))
    return TOLERANCE if types == {torch.float32} else min(0.3, 10 * 2.0**-9 * math.sqrt(halves))


@contextlib.contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """While open, the model is in evaluation mode, without graphs; afterwards as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad(), attention_of(model, ordinary_attention(model)):
            yield
    finally:
        for module in training:
            module.training = True


def _assembled(
    model: PreTrainedModel,
    fused: Sequence[FusedBlock],
    cache_bytes: int | None,
    int8_head: bool,
    most: int = MOST_POSITIONS,
) -> Decodable:
    """A decoder of a model, not verified."""
    listed = blocks_of(model.base_model)
    if listed is None or [block.block for block in fused] != list(listed[1]):
        raise NotDecodable("blocks were replaced since they were recognized")
    types = {p.dtype for block in fused for p in block.block.parameters()}
    cache_dtype = torch.float32 if types == {torch.float32} else torch.bfloat16
    if cache_bytes is not None:
        heads = sum(block.roles.attention.heads(block.block)[1] * block.roles.attention.head_size for block in fused)
        most = min(most, cache_bytes // (2 * heads * cache_dtype.itemsize))  # of a token's keys and values
    roles = tuple(block.roles for block in fused)
    blocks = tuple(block.block for block in fused)
    prober = Prober(model, blocks, [r.extra_outputs for r in roles])
    head = model.get_output_embeddings()
    final = last_norm(model.base_model)
    if final is None:
        raise NotDecodable("no norm is known behind its blocks")
    try:
        entry = prober.entry(most, [r.attention.rotary for r in roles])
        form = prober.logits_form()
        described = [_block(f, entry.tables, table) for f, table in zip(fused, entry.table_of, strict=True)]
        linear = _linear(head, quantize=int8_head)
        last: dict[str, Any] = {"logits_softcap": form.cap, "logits_scale": form.factor}
        decoder = Decoder(described, _norm(final), linear, list(entry.tables), cache_dtype=cache_dtype, **last)
    except (ValueError, RuntimeError, TypeError, AttributeError, KeyError) as error:
        raise NotDecodable(f"{type(error).__name__}: {str(error)[:120]}") from error
    return Decodable(decoder, entry, blocks, roles, linear.outputs)


def recognized_blocks(model: PreTrainedModel) -> list[FusedBlock]:
    """The model's blocks with their descriptions, in order.

    Raises:
        NotDecodable: they are not known, or see later tokens.
    """
    why = ""
    for mode in (PACKED, PADDED):
        found = recognize(model, mode)
        if found.choice.value and found.blocks:
            if not all(block.roles.attention.causal for block in found.blocks):
                raise NotDecodable("its tokens see both ways")
            return found.blocks
        why = why or found.choice.why
    raise NotDecodable(f"its blocks are not known: {why}")


def _block(fused: FusedBlock, tables: Sequence[tuple[Tensor, Tensor]], table: int | None) -> DecoderBlock:
    """A block by its description."""
    block, roles, told = fused.block, fused.roles, fused.told
    attention, mlp = roles.attention, roles.mlp
    heads, key_heads = attention.heads(block)
    # One layer may give several parts; it stands for the first of them.
    query, *others = (_linear(part(block, path)) for path in attention.inputs)
    key, value = others or (None, None)
    gate, *up = (_linear(part(block, path)) for path in mlp.inputs)
    kind = activation_kind(part(block, mlp.activation))
    if kind is None:
        raise NotDecodable("an activation that is not known")
    return DecoderBlock(
        heads=heads,
        key_heads=key_heads,
        head_size=attention.head_size,
        query=query,
        key=key,
        value=value,
        output=_linear(part(block, attention.output)),
        gate=gate,
        up=up[0] if up else None,
        down=_linear(part(block, mlp.output)),
        first=_norms(block, attention.norms),
        second=_norms(block, mlp.norms),
        query_norm=None if attention.query_norm is None else _norm(part(block, attention.query_norm)),
        key_norm=None if attention.key_norm is None else _norm(part(block, attention.key_norm)),
        split=attention.split,
        gated=mlp.gated,
        parallel=roles.parallel,
        activation=kind,
        scaling=told.scaling,
        window=told.window,
        softcap=told.softcap,
        turned=0 if table is None else tables[table][0].shape[1],
        table=table or 0,
    )


def _norms(block: nn.Module, places: Norms) -> HalfNorms:
    made = (None if path is None else _norm(part(block, path)) for path in (places.before, places.after, places.post))
    return HalfNorms(*made)


def _norm(module: nn.Module) -> Norm:
    form = norm_form(module)
    if form is None:
        raise NotDecodable(f"{type(module).__name__} is no norm that is known")
    own = own_parameters(module)
    weight, bias = (None if (t := own.get(n)) is None else t.detach().float().contiguous() for n in ("weight", "bias"))
    return Norm(weight, bias, form.eps, form.offset, form.centered)


def _linear(module: nn.Module | None, quantize: bool = False) -> DecoderLinear:
    """A linear layer's own weights, without factors."""
    if module is None or not isinstance(own_parameters(module).get("weight"), Tensor):
        raise NotDecodable("a layer has no weight")
    layer = Projection(module).product
    bias = None if layer.bias is None else layer.bias.detach().float().contiguous()
    if (blocks := layer.blocks) is not None:
        return DecoderLinear(blocks, bias)
    weight, scale = layer.weight.detach(), layer.scale
    if not layer.by_column:
        weight = weight.t()
    if quantize and weight.dtype != torch.int8:
        # A vocabulary's matrix in parts, since rounding it takes eight bytes a number.
        parts = [quantized_rows(part) for part in weight.split(max(1, ROUNDED_AT_ONCE // weight.shape[1]))]
        weight, scale = torch.cat([rows for rows, _ in parts]), torch.cat([scales for _, scales in parts])
    return DecoderLinear(weight.contiguous(), bias, scale, layer.smooth_scales)


def difference(
    made: Decodable, model: PreTrainedModel, *, adapter: ActiveAdapter | None = None, tokens: Tensor | None = None
) -> float:
    """The relative difference (of norms) between a decoder's logits and the model's own.

    Args:
        adapter: which acts on all tokens; the model must have it on.
        tokens: (n) to compare on, without virtual ones; some of the vocabulary where they are not given.
    """
    known = made.entry.known
    if tokens is None:
        count = min(SAMPLE, made.positions)
        tokens = torch.randint(0, known, (count,), generator=torch.Generator().manual_seed(0))
    soft = None if adapter is None else adapter.soft_prompt
    rows, seen = made.entry.rows(tokens), tokens
    if soft is not None:
        rows = torch.cat([soft.float() * made.entry.outer, rows])
        seen = torch.cat([torch.arange(known, known + len(soft)), tokens])
    own = model(input_ids=seen[None], use_cache=False).logits[0]
    off = whole = torch.zeros((), dtype=torch.float64)
    packed = None if adapter is None else adapter.packed
    # A chunk at a time: with a vocabulary of 262,144 the logits of all tokens take 42 MB in fp32.
    for start, stop, logits in _logits(made, rows, packed):
        expected = own[start:stop].float()
        whole = whole + expected.norm().double().square()
        off = off + expected.sub_(logits).norm().double().square()
    return float((off / whole.clamp_min(1e-60)).sqrt())


def _logits(made: Decodable, rows: Tensor, adapter: PackedAdapter | None) -> Iterator[tuple[int, int, Tensor]]:
    """Yield the decoder's logits for rows (n, D) without positions: a chunk, some tokens one by one, then the rest.

    Yields:
        Index of the first row, index after the last row, and logits (rows, V).
    """
    decoder, count = made.decoder, len(rows)
    if made.entry.positions is not None:
        rows = rows + made.entry.positions[:count]
    pages = -(-count // decoder.page_tokens)
    memory = decoder.new_pages(pages)
    table = torch.arange(pages, dtype=torch.int32)[None]
    stops = sorted({*(min(count, CHUNK + n) for n in range(SINGLE + 1)), count})
    for start, stop in zip([0, *stops], stops, strict=False):
        positions = torch.arange(start, stop, dtype=torch.int32)
        zeros = torch.zeros_like(positions)
        which = zeros if adapter is not None else zeros - 1
        packed = [] if adapter is None else [adapter]
        yield (
            start,
            stop,
            decoder.step(memory, rows[start:stop].contiguous(), positions, zeros, table, which, packed)[1],
        )
