// A decoder and one step of it as the caller describes them; kernels/structs.py mirrors these structs, see dw_layout_of.
#pragma once
#include "block.h"

struct DecodeLinear {  // y = x·Wᵀ + bias, weight (out, in). Of int8: (x ∘ columns)·(W · scale)ᵀ, with the sums of W's rows.
    const void *weight;  // in blocks (BlockFormat): its BlockData
    const float *scale, *columns, *bias;
    const int32_t *sums;
    int64_t in, out, type;
};

struct DecodeBlock {  // the parts of BlockParts; all but products' weights are in fp32
    int64_t heads, key_heads, head_size, activation, window, turned, table;
    int64_t split, gated, parallel, cache_offset;  // numbers of a page before this block's own
    float scaling, softcap;
    HalfNorms first, second;
    RowNorm of_query, of_key;
    DecodeLinear query, key, value, output, gate, up, down;

    int64_t hidden() const { return query.in; }
    int64_t wide() const { return heads * head_size; }
    int64_t narrow() const { return key_heads * head_size; }
    int64_t inner() const { return down.in; }
    int64_t group() const { return heads / key_heads; }
    bool gate_gives_up() const { return gated && !up.weight; }
};

// Of one page and block lie, for each key head, keys (head_size, page_tokens) and then values (page_tokens, head_size). In bf16
// two numbers that are multiplied and summed together are neighbors: keys (⌈head_size / 2⌉, page_tokens, 2), values
// (page_tokens / 2, head_size, 2).
struct DecodeModel {
    const DecodeBlock *blocks;
    const float *const *cosines, *const *sines;  // of each table (positions, turned)
    int64_t count, tables, positions, hidden, cache_type, page_tokens, page_numbers;
    float logits_scale, logits_softcap;
    RowNorm final_norm;
    DecodeLinear head;
};

// An update (x·Aᵀ)·B of one layer: A (rank, in), B in panels of FACTOR_PANEL outputs, the last filled up with zeros. In fp32
// where the layer's weight is: B (panels, rank, FACTOR_PANEL). Else in bf16, two rows of B interleaved, as instructions
// take them: (panels, ⌈rank / 2⌉, FACTOR_PANEL, 2), beside the last of an odd number zeros. Rank 0: none.
struct DecodeFactors {
    const void *A, *B;
    int64_t rank;
};
const int64_t FACTOR_PANEL = 16;
const int64_t LAYERS_OF_BLOCK = 7;  // query, key, value, output, gate, up, down; an adapter has so many factors a block, and the head's

struct DecodeStep {
    const float *hidden;                             // (rows, hidden)
    const int32_t *positions, *sequence, *adapter;   // (rows); adapter -1 is none
    const int32_t *page_table, *wanted;              // (sequences, most), (wanted_count)
    const DecodeFactors *const *adapters;            // (adapter_count) tables of count·LAYERS_OF_BLOCK + 1 factors
    void *pages;                                     // (page_count, page_numbers)
    float *out, *logits;                             // (wanted_count, hidden), (wanted_count, head.out)
    int64_t rows, sequences, most, wanted_count, adapter_count, page_count;
};
