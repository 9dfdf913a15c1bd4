"""Attention of one layer over pages of keys and values, for models whose other layers run as torch modules.

The pages and the results are those of :mod:`deltaw.kernels.decode`.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from deltaw.kernels import loader
from deltaw.kernels.decode import PAGE_TOKENS, Pages
from deltaw.kernels.decode_reference import (
    AttentionForm,
    Tokens,
    attention_reference,
    cache_numbers_per_token,
    cache_views,
)
from deltaw.kernels.loader import DecodeBlock, DecodeModel, DecodeStep


@dataclass(frozen=True)
class PagedRows:
    """Rows of a step.

    Attributes:
        pages: Page pool.
        positions: (n) int32 positions from 0. Rows of one sequence ascend by one.
        sequence: (n) int32 row of each token in ``page_table``.
        page_table: (s, p) int32 page numbers.
    """

    pages: Pages
    positions: Tensor
    sequence: Tensor
    page_table: Tensor


def page_numbers(form: AttentionForm, dtype: torch.dtype) -> int:
    """Return the numbers of a layer in a page."""
    return form.key_heads * cache_numbers_per_token(form.head_size, dtype) * PAGE_TOKENS


class PagedAttention:
    """Causal attention of a layer.

    Args:
        form: Sizes and parameters.
        offset: Offset of the layer's numbers in a page.
        numbers: Numbers of all layers in a page.
        dtype: Type of keys and values, fp32 or bf16.
    """

    def __init__(self, form: AttentionForm, offset: int, numbers: int, dtype: torch.dtype) -> None:
        self.form = form
        self._offset = offset
        block = DecodeBlock(heads=form.heads, key_heads=form.key_heads, head_size=form.head_size)
        block.window = form.window or 0
        block.cache_offset = offset
        block.scaling = form.scaling
        block.softcap = form.softcap or 0.0
        self._block = block
        self._model = DecodeModel(blocks=ctypes.addressof(block), count=1, positions=2**31 - 1)
        self._model.cache_type = loader.dtype_code(dtype)
        self._model.page_tokens = PAGE_TOKENS
        self._model.page_numbers = numbers

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, rows: PagedRows) -> Tensor:
        """Write keys and values (n, key heads, d) to the pages, and return the attention of queries (n, heads, d).

        Raises:
            IndexError: if a position, sequence or page is out of bounds.
        """
        n = len(query)
        minus_ones = torch.full((n,), -1, dtype=torch.int32)
        if loader.library() is None:
            tokens = Tokens(rows.positions, rows.sequence, rows.page_table, minus_ones, [], PAGE_TOKENS)
            cache = cache_views(rows.pages.data, self.form, self._offset, PAGE_TOKENS)
            return attention_reference(query, key, value, self.form, cache, tokens)
        inputs = [t.float().contiguous() for t in (query * self.form.scaling, key, value)]
        out = torch.empty_like(inputs[0])
        step = DecodeStep(rows=n, adapter=minus_ones.data_ptr(), pages=rows.pages.data.data_ptr())
        step.positions = rows.positions.data_ptr()
        step.sequence = rows.sequence.data_ptr()
        step.page_table = rows.page_table.data_ptr()
        step.sequences, step.pages_per_sequence = rows.page_table.shape
        step.page_count = rows.pages.count
        addresses = map(ctypes.addressof, (self._model, step))
        loader.kernels().dw_decode_attention(*addresses, *(t.data_ptr() for t in inputs), out.data_ptr())
        return out.to(query.dtype)
