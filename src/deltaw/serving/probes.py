"""What a model does before its first block and behind its last one, found by running the model's own code.

The blocks are replaced by recorders that hand on what they are given. Then the model's code shows, without
any list of families: what a token's row at the first block is made of (embedding, scale, learned
positions), the cosines and sines that each block is given, and how logits follow from the head's outputs.

    row = scale · E[token] + P[position],     logits = cap · tanh(factor · head(norm(row)) / cap)

Knows transformers' models; not what a decoder makes of it.
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

from deltaw.kernels.block_linear import BlockWeight
from deltaw.lora.stored import block_weight
from deltaw.runtime.generation import position_limit
from deltaw.runtime.recognition import forward_replaced

# Positions that one call of the model goes through; a mask for them is small.
CHUNK = 512
# Positions of a model that does not say how many it has.
UNSAID = 32768
# Relative differences that are rounding: of sums in fp32, and of bf16 (2^-8) with some room.
_EXACT, _ROUNDED = 1e-5, 2.0**-6


class NotDecodable(Exception):
    """The model's code does something else than this module knows; says what."""


@dataclass(frozen=True)
class Entry:
    """How tokens become rows at the first block, and how positions turn queries and keys.

    Attributes:
        weight: (V, D), the embedding's own; one in blocks stays so.
        scale: what it is multiplied with.
        outer: what embeddings that are given instead of tokens are multiplied with.
        positions: (P, D) fp32, learned positions; None where there are none.
        tables: (cosine, sine) in fp32, each (P, n), the different ones.
        table_of: for each block the number of its table; None where it is given none.
        limit: P, the positions that there are.
    """

    weight: Tensor | BlockWeight
    scale: float
    outer: float
    positions: Tensor | None
    tables: tuple[tuple[Tensor, Tensor], ...]
    table_of: tuple[int | None, ...]
    limit: int

    @property
    def known(self) -> int:
        """V, the tokens that there are, virtual ones left out."""
        return int(self.weight.shape[0])

    def rows(self, tokens: Tensor) -> Tensor:
        """(n) token ids to (n, D) in fp32, without positions."""
        rows = _rows(self.weight, tokens).float()
        return rows if self.scale == 1.0 else rows.mul_(self.scale)


@dataclass(frozen=True)
class LogitsForm:
    """How logits follow from the head's outputs: times ``factor``, then between -cap and cap."""

    factor: float = 1.0
    cap: float | None = None


class _Enough(Exception):
    """Raised behind the last recorder, where what follows is of no interest."""


class _Recorders:
    """Stand in for blocks: each hands on its input, and notes it and the cosines and sines that it is given.

    Attributes:
        ending: whether the call ends behind the last of them, by an exception.
    """

    def __init__(self, blocks: Sequence[nn.Module], extra: Sequence[int | None]) -> None:
        self._blocks, self._extra = blocks, extra
        self._names = [list(inspect.signature(type(block).forward).parameters)[2:] for block in blocks]
        self.rows: list[Any] = []
        self.turns: list[tuple[Tensor, Tensor] | None] = []
        self.ending = False

    def forget(self) -> None:
        self.rows, self.turns = [None] * len(self._blocks), [None] * len(self._blocks)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for number, block in enumerate(self._blocks):
                stack.enter_context(forward_replaced(block, self._recorder(number)))
            yield

    def _recorder(self, number: int) -> Any:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            named = {**kwargs, **dict(zip(self._names[number], args, strict=False))}
            self.rows[number] = hidden_states
            self.turns[number] = named.get("position_embeddings")
            if self.ending and number == len(self._blocks) - 1:
                raise _Enough
            extra = self._extra[number]
            return hidden_states if extra is None else (hidden_states, *[None] * extra)

        return forward


class Prober:
    """Runs a model's code around its blocks.

    Args:
        model: a causal language model on the processor, in evaluation mode.
        blocks: of its backbone. extra: how many values each returns behind its rows; see ``BlockRoles``.

    Raises:
        NotDecodable: from every function, where the code is not of the form above.
    """

    def __init__(self, model: PreTrainedModel, blocks: Sequence[nn.Module], extra: Sequence[int | None]) -> None:
        self.model = model
        self.backbone: PreTrainedModel = model.base_model  # type: ignore[assignment]
        self.seen = _Recorders(blocks, extra)
        self._placed = "position_ids" in inspect.signature(self.backbone.forward).parameters

    def entry(self, most: int, rotary: Sequence[bool]) -> Entry:
        """What enters the blocks.

        Args:
            most: positions to look at, at most. rotary: whether each block uses the cosines it is given.
        """
        weight = _table(self.model.get_input_embeddings())
        limit = min(position_limit(self.model) or UNSAID, most)
        with torch.no_grad(), self.seen.in_place():
            limit = self._steady(limit, weight.shape[1], rotary)
            learned, tables, table_of = self._along(limit, weight.shape[1], rotary)
            outer, scale = self._scales(weight, learned)
        return Entry(weight, scale, outer, learned, tables, table_of, limit)

    def _run(self, positions: Tensor, **inputs: Tensor) -> None:
        """Call the backbone on one row at these positions (T)."""
        self.seen.forget()
        named: dict[str, Any] = {**inputs, "use_cache": False}
        if self._placed:
            named["position_ids"] = positions[None]
        elif int(positions[0]) != 0:
            raise NotDecodable("it takes no positions")
        self.seen.ending = True
        with contextlib.suppress(_Enough):  # the rows that were asked for are noted
            self.backbone(**named)
        self.seen.ending = False
        if any(rows is None for rows in self.seen.rows):
            raise NotDecodable("not every block is called")
        first = self.seen.rows[0]
        if any(rows is not first and not torch.equal(rows, first) for rows in self.seen.rows):
            raise NotDecodable("something happens between its blocks")

    @property
    def _first(self) -> Tensor:
        """The rows (T, D) that entered the first block."""
        return self.seen.rows[0][0].float()

    def _turns(self, rotary: Sequence[bool]) -> tuple[list[tuple[Tensor, Tensor]], list[int | None]]:
        """The cosines and sines (T, n) that were given, each once, and which of them each block uses."""
        different: list[tuple[Tensor, Tensor]] = []
        which: list[int | None] = []
        for given, used in zip(self.seen.turns, rotary, strict=True):
            if used and given is None:
                raise NotDecodable("its blocks make rotary positions themselves")
            if given is None or not used:
                which.append(None)
                continue
            same = [n for n, one in enumerate(different) if all(map(torch.equal, one, given))]
            if not same:
                different.append(given)
            which.append(same[0] if same else len(different) - 1)
        return [(cosine[0].float(), sine[0].float()) for cosine, sine in different], which

    def _steady(self, limit: int, width: int, rotary: Sequence[bool]) -> int:
        """The most positions at which the first ones' cosines do not hang on how many there are."""
        if not any(rotary) or not self._placed:
            return limit
        few = torch.arange(min(16, limit))
        self._run(few, inputs_embeds=torch.zeros(1, len(few), width))
        alone, _ = self._turns(rotary)
        while limit > len(few):
            far = torch.cat([few, torch.tensor([limit - 1])])
            self._run(far, inputs_embeds=torch.zeros(1, len(far), width))
            among, _ = self._turns(rotary)
            same = [torch.equal(a[0], b[0][:-1]) for a, b in zip(alone, among, strict=False)]
            if len(among) == len(alone) and all(same):
                break
            limit //= 2
        return limit

    def _along(
        self, limit: int, width: int, rotary: Sequence[bool]
    ) -> tuple[Tensor | None, tuple[tuple[Tensor, Tensor], ...], tuple[int | None, ...]]:
        """Learned positions, and the cosines and sines of all positions: embeddings of zeros show them."""
        learned: list[Tensor] = []
        parts: list[list[tuple[Tensor, Tensor]]] = []
        which: list[int | None] = []
        chunk = CHUNK if self._placed else limit
        for start in range(0, limit, chunk):
            places = torch.arange(start, min(limit, start + chunk))
            self._run(places, inputs_embeds=torch.zeros(1, len(places), width))
            rows = self._first
            learned.append(rows.clone() if bool(rows.any()) else rows[:0])
            part, of_blocks = self._turns(rotary)
            if parts and of_blocks != which:
                raise NotDecodable("which positions a block uses hangs on how many there are")
            parts.append(part)
            which = of_blocks
        tables = [
            (torch.cat([part[n][0] for part in parts]), torch.cat([part[n][1] for part in parts]))
            for n in range(len(parts[0]))
        ]
        together = torch.cat(learned)
        if 0 < len(together) < limit:
            raise NotDecodable("some of its positions are zeros")
        return (together if len(together) else None), tuple(tables), tuple(which)

    def _scales(self, weight: Tensor | BlockWeight, learned: Tensor | None) -> tuple[float, float]:
        """What given embeddings, and what the table's rows, are multiplied with."""
        length = min(48, CHUNK if learned is None else len(learned))
        tokens = torch.arange(0, weight.shape[0], max(1, weight.shape[0] // length))[:length]
        places = torch.arange(len(tokens))
        rows = _rows(weight, tokens)
        taken = rows.float()
        shift = 0.0 if learned is None else learned[: len(tokens)]
        self._run(places, inputs_embeds=taken[None])
        outer = _factor(self._first - shift, taken, _EXACT)
        self._run(places, input_ids=tokens[None])
        found = self._first
        scale = _factor(found - shift, taken, _EXACT if rows.dtype == torch.float32 else _ROUNDED)
        rounded = float(torch.tensor(scale).to(rows.dtype))  # a model in bf16 has its scale in bf16
        if torch.equal((taken * rounded + shift).to(rows.dtype).float(), found):
            scale = rounded
        return outer, scale

    def logits_form(self) -> LogitsForm:
        """How logits follow from the head's outputs: the head is replaced by numbers that are known."""
        head = self.model.get_output_embeddings()
        if head is None:
            raise NotDecodable("it has no output head")
        wide = int(head.weight.shape[0])  # type: ignore[union-attr, index]
        steps = torch.linspace(-40.0, 40.0, wide)
        small = _factor(self._through(head, steps * 1e-4), steps * 1e-4, 1e-3)
        if torch.allclose(self._through(head, steps), steps * small, rtol=1e-3, atol=1e-3):
            return LogitsForm(small)
        cap = float(self._through(head, torch.full((wide,), 1e6)).mean())
        expected = cap * torch.tanh(steps * small / cap)
        if not (cap > 0 and torch.allclose(self._through(head, steps), expected, rtol=1e-3, atol=1e-3)):
            raise NotDecodable("it changes logits in a way that is not known")
        return LogitsForm(small, cap)

    def _through(self, head: nn.Module, values: Tensor) -> Tensor:
        """The logits (V) of one token for these outputs (V) of the head."""
        if "forward" in vars(head):
            raise NotDecodable("its output head is not its own")
        vars(head)["forward"] = lambda hidden: values.expand(*hidden.shape[:-1], -1)
        try:
            with torch.no_grad(), self.seen.in_place():
                logits = self.model(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=False).logits
        finally:
            del vars(head)["forward"]
        return logits.flatten().float()  # type: ignore[no-any-return]


def _table(embedding: nn.Module | None) -> Tensor | BlockWeight:
    """The rows of a token embedding."""
    weight = getattr(embedding, "weight", None)
    if embedding is None or not isinstance(weight, Tensor) or weight.dim() != 2:
        raise NotDecodable("its token embedding is not a table")
    return block_weight(embedding) or weight.detach()


def _rows(table: Tensor | BlockWeight, tokens: Tensor) -> Tensor:
    """Rows (n, D) of a token embedding."""
    if isinstance(table, BlockWeight):
        return table.rows_at(tokens, torch.bfloat16)
    return table.index_select(0, tokens)


def _factor(found: Tensor, of: Tensor, tolerance: float) -> float:
    """The number c of found = c · of, by least squares; 1 exactly where it is that."""
    value = float((found * of).sum() / of.square().sum().clamp_min(1e-30))
    if float((found - value * of).norm()) > tolerance * max(float(found.norm()), 1e-30):
        raise NotDecodable("its rows are more than an embedding, a scale and a position")
    return 1.0 if abs(value - 1.0) < 1e-6 else value
