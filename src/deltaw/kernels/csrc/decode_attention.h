// Attention of a step's rows over keys and values that lie in pages.
#pragma once
#include "decode_products.h"

namespace deltaw {

const int64_t PAGE_TOKENS = 32;        // of DecodeModel::page_tokens
const int64_t STRETCH = 256;           // tokens whose scores stand at the same time
const int64_t MOST_RANGES = 16;        // parts of a context that threads share out
const int64_t MOST_QUERIES = 16;       // (row, head) that share loads of keys and values

// Rows that stand one behind another in one sequence, and share ranges.
struct Queries {
    int64_t first, count;
};

// What attention over some tokens has given a query so far: the largest score, the sum of weights, and (head_size) values.
struct Attended {
    float most, sum;
    float *values;
};

struct Attention {
    const DecodeModel *model;
    const DecodeBlock *block;
    const DecodeStep *step;
    const Queries *queries;
    int64_t count;
    const float *q;  // (rows, heads, head_size), normed, turned and scaled
    float *mixed;    // (rows, heads, head_size)
    // Where contexts are split: (rows, heads, MOST_RANGES + 1, 2 + head_size); else null.
    float *partial;
};

// Tokens of a range of a row's context. A function of the position alone, so that a row's sums always are made alike.
int64_t range_tokens(int64_t position);
// Rows of `queries` at most, for a block.
int64_t rows_at_once(const DecodeBlock &block);
// Units that the heads of one key head are worked on in.
int64_t head_slices(const DecodeBlock &block);

int64_t attention_room(const DecodeModel &model);  // floats of each thread
// All (queries, key head), or with `partial` all (queries, key head, range).
void attend(Crew &crew, const Attention &a, float *room);
// After a split: the parts of row m are put together.
void join_ranges(const Attention &a, int64_t m);

// A key and a value of one token and key head, at their places.
void write_cache(const DecodeModel &model, const DecodeBlock &block, const DecodeStep &step, int64_t m, int64_t key_head, const float *key, const float *value);

}  // namespace deltaw
