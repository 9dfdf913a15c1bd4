"""Determine a model's computation before its first and after its last block by running the model's code.

The blocks are replaced by recorders that pass their input on. The recorded values show how the input rows of the first
block depend on tokens (embedding, scale, learned positions), the cosines and sines of each block, and how logits depend
on the outputs of the head. No list of model families is needed.

    row = scale · E[token] + P[position],     logits = cap · tanh(factor · head(norm(row)) / cap)
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltaw.decoding.generation import position_limit
from deltaw.kernels.block_linear import BlockWeight
from deltaw.lora.kinds import get_output_head
from deltaw.lora.stored import block_weight, weight_shape
from deltaw.runtime.block_roles import forward_replaced
from deltaw.runtime.image_tokens import ImageTokens

# Positions per forward pass. Attention masks of this size are small.
CHUNK = 512
# Number of positions if the model's configuration has no limit.
DEFAULT_POSITIONS = 32768
# Relative differences that are explained by rounding: of fp32 sums, and of bf16 (2^-8) with a margin.
_EXACT = 1e-5
_ROUNDED = 2.0**-6


class NotDecodable(Exception):
    """The decoder does not support the model. The message is the reason."""


@dataclass(frozen=True)
class InputProbe:
    """Computation of the first block's input rows from tokens, and the rotary tables.

    Attributes:
        weight: (V, D) token embedding. Weights stored in blocks remain in blocks.
        scale: Factor applied to token embeddings.
        outer: Factor applied to embeddings that are passed instead of tokens.
        positions: (P, D) fp32 learned position embeddings, or None.
        tables: Distinct (cosine, sine) tables in fp32, each (P, n).
        table_of: Index of the table of each block, or None for a block without rotary positions.
        limit: Number of positions P.
        images: Embedding that also maps image tokens, or None.
    """

    weight: Tensor | BlockWeight
    scale: float
    outer: float
    positions: Tensor | None
    tables: tuple[tuple[Tensor, Tensor], ...]
    table_of: tuple[int | None, ...]
    limit: int
    images: ImageTokens | None = None

    @property
    def num_tokens(self) -> int:
        """Number of tokens V, without virtual tokens and image tokens."""
        return int(self.weight.shape[0])

    def rows(self, tokens: Tensor) -> Tensor:
        """Return (n, D) fp32 rows of (n,) token ids, without position embeddings."""
        if self.images is None or not bool((tokens >= self.num_tokens).any()):
            rows = _rows(self.weight, tokens).float()
            return rows if self.scale == 1.0 else rows.mul_(self.scale)
        is_image = tokens >= self.num_tokens
        rows = self.rows(tokens.masked_fill(is_image, 0))
        rows[is_image] = self.images.image_rows(tokens[is_image]).float() * self.outer
        return rows


@dataclass(frozen=True)
class LogitsForm:
    """Transformation of the head's outputs to logits: multiplication by ``factor``, then a soft cap at ±``cap``."""

    factor: float = 1.0
    cap: float | None = None


class _StopProbe(Exception):
    """Raised after the last recorder to skip the rest of the forward pass."""


class _Recorders:
    """Replacements of blocks that record their input rows and rotary tables and pass the rows on.

    Attributes:
        rows: Recorded input of each block.
        rotary_tables: Recorded (cosine, sine) of each block.
        stop_after_last: True if the forward pass stops after the last block.
    """

    def __init__(self, blocks: Sequence[nn.Module], extra: Sequence[int | None]) -> None:
        self._blocks = blocks
        self._extra = extra
        self._names = [list(inspect.signature(type(block).forward).parameters)[2:] for block in blocks]
        self.rows: dict[int, Tensor] = {}
        self.rotary_tables: list[tuple[Tensor, Tensor] | None] = []
        self.stop_after_last = False

    def clear(self) -> None:
        self.rows, self.rotary_tables = {}, [None] * len(self._blocks)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for number, block in enumerate(self._blocks):
                stack.enter_context(forward_replaced(block, self._recorder(number)))
            yield

    def _recorder(self, number: int) -> Any:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            named = {**kwargs, **dict(zip(self._names[number], args, strict=False))}
            self.rows[number] = hidden_states
            self.rotary_tables[number] = named.get("position_embeddings")
            if self.stop_after_last and number == len(self._blocks) - 1:
                raise _StopProbe
            extra = self._extra[number]
            return hidden_states if extra is None else (hidden_states, *[None] * extra)

        return forward


class Prober:
    """Runs a model's code with recorders in place of its blocks.

    Args:
        model: Causal language model on the CPU, in evaluation mode.
        blocks: Blocks of its backbone.
        extra: Number of additional values that each block returns (see ``BlockRoles``).

    Raises:
        NotDecodable: by every method, if the code does not have the form above.
    """

    def __init__(self, model: PreTrainedModel, blocks: Sequence[nn.Module], extra: Sequence[int | None]) -> None:
        self.model = model
        self.backbone = model.base_model
        self.recorders = _Recorders(blocks, extra)
        self._takes_positions = "position_ids" in inspect.signature(self.backbone.forward).parameters

    def entry(self, max_positions: int, rotary: Sequence[bool]) -> InputProbe:
        """Probe the computation of the first block's input.

        Args:
            max_positions: Maximum number of positions to probe.
            rotary: True for each block that uses rotary positions.
        """
        weight = _table(self.model.get_input_embeddings())
        limit = min(position_limit(self.model) or DEFAULT_POSITIONS, max_positions)
        with torch.no_grad(), self.recorders.installed():
            limit = self._stable_limit(limit, weight.shape[1], rotary)
            learned, tables, table_of = self._probe_positions(limit, weight.shape[1], rotary)
            outer, scale = self._probe_scales(weight, learned)
        embedding = self.model.get_input_embeddings()
        images = embedding if isinstance(embedding, ImageTokens) else None
        if images is not None and images.has_grid_positions:
            raise NotDecodable("its image tokens have three-dimensional positions")
        return InputProbe(weight, scale, outer, learned, tables, table_of, limit, images)

    def _run(self, positions: Tensor, **inputs: Tensor) -> None:
        """Run the backbone on one sequence at these positions (T,)."""
        self.recorders.clear()
        if self._takes_positions:
            inputs["position_ids"] = positions[None]
        elif int(positions[0]) != 0:
            raise NotDecodable("its forward method has no position_ids")
        self.recorders.stop_after_last = True
        with contextlib.suppress(_StopProbe):
            self.backbone(**inputs, use_cache=False)
        self.recorders.stop_after_last = False
        rows = self.recorders.rows
        if len(rows) < len(self.recorders.rotary_tables):
            raise NotDecodable("some of its blocks are not called")
        if any(other is not rows[0] and not torch.equal(other, rows[0]) for other in rows.values()):
            raise NotDecodable("it computes something between its blocks")

    @property
    def _first_rows(self) -> Tensor:
        """(T, D) input rows of the first block."""
        return self.recorders.rows[0][0].float()

    def _distinct_tables(self, rotary: Sequence[bool]) -> tuple[list[tuple[Tensor, Tensor]], list[int | None]]:
        """Return the distinct (T, n) cosine and sine tables, and the index of the table that each block uses."""
        tables: list[tuple[Tensor, Tensor]] = []
        indices: list[int | None] = []
        for table, uses_rotary in zip(self.recorders.rotary_tables, rotary, strict=True):
            if uses_rotary and table is None:
                raise NotDecodable("its blocks compute rotary positions themselves")
            if table is None or not uses_rotary:
                indices.append(None)
                continue
            same = [index for index, known in enumerate(tables) if all(map(torch.equal, known, table))]
            if not same:
                tables.append(table)
            indices.append(same[0] if same else len(tables) - 1)
        return [(cosine[0].float(), sine[0].float()) for cosine, sine in tables], indices

    def _stable_limit(self, limit: int, width: int, rotary: Sequence[bool]) -> int:
        """Return the largest number of positions that does not change the cosines of the first positions.

        Some rotary embeddings depend on the sequence length.
        """
        if not any(rotary) or not self._takes_positions:
            return limit
        first = torch.arange(min(16, limit))
        self._run(first, inputs_embeds=torch.zeros(1, len(first), width))
        short_tables, _ = self._distinct_tables(rotary)
        while limit > len(first):
            extended = torch.cat([first, torch.tensor([limit - 1])])
            self._run(extended, inputs_embeds=torch.zeros(1, len(extended), width))
            long_tables, _ = self._distinct_tables(rotary)
            same = [torch.equal(a[0], b[0][:-1]) for a, b in zip(short_tables, long_tables, strict=False)]
            if len(long_tables) == len(short_tables) and all(same):
                break
            limit //= 2
        return limit

    def _probe_positions(
        self, limit: int, width: int, rotary: Sequence[bool]
    ) -> tuple[Tensor | None, tuple[tuple[Tensor, Tensor], ...], tuple[int | None, ...]]:
        """Return learned position embeddings, rotary tables of all positions, and the table index of each block.

        Embeddings of zeros reveal the position embeddings.
        """
        learned: list[Tensor] = []
        parts: list[list[tuple[Tensor, Tensor]]] = []
        table_of: list[int | None] = []
        chunk = CHUNK if self._takes_positions else limit
        for start in range(0, limit, chunk):
            positions = torch.arange(start, min(limit, start + chunk))
            self._run(positions, inputs_embeds=torch.zeros(1, len(positions), width))
            rows = self._first_rows
            learned.append(rows.clone() if bool(rows.any()) else rows[:0])
            part, indices = self._distinct_tables(rotary)
            if parts and indices != table_of:
                raise NotDecodable("the rotary positions of its blocks depend on the sequence length")
            parts.append(part)
            table_of = indices
        by_table = [zip(*pairs, strict=True) for pairs in zip(*parts, strict=True)]
        tables = tuple((torch.cat(cosines), torch.cat(sines)) for cosines, sines in by_table)
        position_rows = torch.cat(learned)
        if 0 < len(position_rows) < limit:
            raise NotDecodable("some of its position embeddings are zero")
        return (position_rows if len(position_rows) else None), tables, tuple(table_of)

    def _probe_scales(self, weight: Tensor | BlockWeight, learned: Tensor | None) -> tuple[float, float]:
        """Return the factors applied to passed embeddings and to token embeddings."""
        length = min(48, CHUNK if learned is None else len(learned))
        tokens = torch.arange(0, weight.shape[0], max(1, weight.shape[0] // length))[:length]
        positions = torch.arange(len(tokens))
        rows = _rows(weight, tokens)
        embeddings = rows.float()
        shift = 0.0 if learned is None else learned[: len(tokens)]
        self._run(positions, inputs_embeds=embeddings[None])
        outer = _factor(self._first_rows - shift, embeddings, _EXACT)
        self._run(positions, input_ids=tokens[None])
        first_rows = self._first_rows
        scale = _factor(first_rows - shift, embeddings, _EXACT if rows.dtype == torch.float32 else _ROUNDED)
        rounded = float(torch.tensor(scale).to(rows.dtype))  # a bf16 model stores its scale in bf16
        if torch.equal((embeddings * rounded + shift).to(rows.dtype).float(), first_rows):
            scale = rounded
        return outer, scale

    def logits_form(self) -> LogitsForm:
        """Probe the transformation of the head's outputs to logits by replacing these outputs with known values."""
        if (head := get_output_head(self.model)) is None:
            raise NotDecodable("it has no output head")
        num_outputs = weight_shape(head)[0]
        steps = torch.linspace(-40.0, 40.0, num_outputs)
        small = _factor(self._logits_of(head, steps * 1e-4), steps * 1e-4, 1e-3)
        if torch.allclose(self._logits_of(head, steps), steps * small, rtol=1e-3, atol=1e-3):
            return LogitsForm(small)
        cap = float(self._logits_of(head, torch.full((num_outputs,), 1e6)).mean())
        expected = cap * torch.tanh(steps * small / cap)
        if not (cap > 0 and torch.allclose(self._logits_of(head, steps), expected, rtol=1e-3, atol=1e-3)):
            raise NotDecodable("it transforms logits in an unsupported way")
        return LogitsForm(small, cap)

    def _logits_of(self, head: nn.Module, values: Tensor) -> Tensor:
        """Return the (V,) logits of one token if the head outputs ``values`` (V,)."""
        if "forward" in vars(head):
            raise NotDecodable("the forward method of its output head is replaced")
        vars(head)["forward"] = lambda hidden: values.expand(*hidden.shape[:-1], -1)
        try:
            with torch.no_grad(), self.recorders.installed():
                logits: Tensor = self.model(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=False).logits
        finally:
            del vars(head)["forward"]
        return logits.flatten().float()


def _table(embedding: nn.Module | None) -> Tensor | BlockWeight:
    """Return the weights of a token embedding."""
    weight = getattr(embedding, "weight", None)
    if embedding is None or not isinstance(weight, Tensor) or weight.dim() != 2:
        raise NotDecodable("its token embedding is not a table")
    return block_weight(embedding) or weight.detach()


def _rows(table: Tensor | BlockWeight, tokens: Tensor) -> Tensor:
    """Return (n, D) rows of a token embedding."""
    if isinstance(table, BlockWeight):
        return table.rows_at(tokens, torch.bfloat16)
    return table.index_select(0, tokens)


def _factor(values: Tensor, reference: Tensor, tolerance: float) -> float:
    """Return the factor c of ``values = c · reference`` by least squares, or exactly 1 if it is close to 1."""
    factor = float((values * reference).sum() / reference.square().sum().clamp_min(1e-30))
    if float((values - factor * reference).norm()) > tolerance * max(float(values.norm()), 1e-30):
        raise NotDecodable("its input rows are not a scaled embedding plus a position embedding")
    return 1.0 if abs(factor - 1.0) < 1e-6 else factor
