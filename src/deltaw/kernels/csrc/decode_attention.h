// Attention of a step's rows over paged keys and values.
#pragma once
#include "decode_products.h"

namespace deltaw {

const int64_t PAGE_TOKENS = 32;  // value of DecodeModel::page_tokens
const int64_t STRETCH = 256;  // tokens whose scores are in memory at the same time
const int64_t MAX_RANGES = 16;  // maximum number of ranges that a context is split into
const int64_t MAX_QUERIES = 16;  // maximum number of (row, head) pairs that share loads of keys and values

// Consecutive rows of one sequence that share context ranges.
struct QueryGroup {
    int64_t first, count;
};

// Partial attention result of a query: maximum score, sum of weights, and weighted sum of values (head_size).
struct PartialAttention {
    float maximum, sum;
    float *values;
};

struct Attention {
    const DecodeModel *model;
    const DecodeBlock *block;
    const DecodeStep *step;
    const QueryGroup *queries;
    int64_t count;
    const float *q;  // (rows, heads, head_size), after norm, rotation and scaling
    float *attended;    // (rows, heads, head_size)
    // (rows, heads, MAX_RANGES + 1, 2 + head_size) if contexts are split, else null.
    float *partial;
};

// Tokens per range of a row's context. It depends only on the position, so that a row's sums always have the same
// order.
int64_t range_tokens(int64_t position);
// Maximum number of rows in a QueryGroup for a block.
int64_t max_group_rows(const DecodeBlock &block);
// Number of work units per key head.
int64_t head_slices(const DecodeBlock &block);

int64_t attention_scratch_size(const DecodeModel &model);  // floats per thread
// Process all (query group, key head) pairs, or with `partial` all (query group, key head, range) triples.
void attend(Worker &worker, const Attention &a, float *thread_scratch);
// Combine the ranges of row m after a split.
void merge_ranges(const Attention &a, int64_t m);

// Write a key and a value of one token and key head to the cache.
void write_cache(const DecodeModel &model, const DecodeBlock &block, const DecodeStep &step, int64_t m, int64_t key_head, const float *key,
                 const float *value);

}  // namespace deltaw
