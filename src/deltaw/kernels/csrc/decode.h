// Description of a decoder and one step of it by the caller. kernels/structs.py mirrors these structs; see
// dw_struct_layout.
#pragma once
#include "block.h"

struct DecodeLinear {  // y = x·Wᵀ + bias, weight (out, in). int8: (x ∘ columns)·(W · scale)ᵀ, sums are the row sums of W.
    const void *weight;  // BlockData for block formats
    const float *scale, *columns, *bias;
    const int32_t *sums;
    int64_t in, out, type;
};

struct DecodeBlock {  // see BlockParts; all tensors except layer weights are fp32
    int64_t heads, key_heads, head_size, activation, window, rotary_dims, table;
    int64_t split, gated, parallel, cache_offset;  // offset of the block's numbers within a page
    float scaling, softcap;
    HalfNorms first, second;
    RowNorm query_norm, key_norm;
    DecodeLinear query, key, value, output, gate, up, down;

    int64_t hidden() const { return query.in; }
    int64_t query_size() const { return heads * head_size; }
    int64_t key_size() const { return key_heads * head_size; }
    int64_t inner() const { return down.in; }
    int64_t group() const { return heads / key_heads; }
    bool gate_has_up() const { return gated && !up.weight; }
};

// A page contains for each block and key head the keys (head_size, page_tokens), then the values (page_tokens,
// head_size). In bf16, pairs of numbers that are multiplied and summed together are interleaved: keys (⌈head_size / 2⌉,
// page_tokens, 2), values (page_tokens / 2, head_size, 2).
struct DecodeModel {
    const DecodeBlock *blocks;
    const float *const *cosines, *const *sines;  // each table is (positions, rotary_dims)
    int64_t count, tables, positions, hidden, cache_type, page_tokens, page_numbers;
    float logits_scale, logits_softcap;
    RowNorm final_norm;
    DecodeLinear head;
};

// Low-rank update (x·Aᵀ)·B of one layer: A (rank, in), and B in zero-padded panels of FACTOR_PANEL outputs. If the
// layer's weight is fp32, B is fp32 (panels, rank, FACTOR_PANEL). Otherwise it is bf16 with two rows interleaved:
// (panels, ⌈rank / 2⌉, FACTOR_PANEL, 2), zero-padded for odd ranks. Rank 0 means no update.
struct DecodeFactors {
    const void *A, *B;
    int64_t rank;
};
const int64_t FACTOR_PANEL = 16;
const int64_t LAYERS_PER_BLOCK = 7;  // query, key, value, output, gate, up, down; an adapter has this number of factors per block, plus the head's

struct DecodeStep {
    const float *hidden;  // (rows, hidden)
    const int32_t *positions, *sequence, *adapter;  // (rows); adapter -1 is the base model
    const int32_t *page_table, *output_rows;  // (sequences, pages_per_sequence), (output_count)
    const DecodeFactors *const *adapters;  // (adapter_count) tables of count·LAYERS_PER_BLOCK + 1 factors
    void *pages;                                     // (page_count, page_numbers)
    float *out, *logits;  // (output_count, hidden), (output_count, head.out)
    int64_t rows, sequences, pages_per_sequence, output_count, adapter_count, page_count;
};
