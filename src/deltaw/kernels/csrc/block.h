// A transformer's block as the caller describes it; kernels/structs.py mirrors these structs, see dw_layout_of.
#pragma once
#include <cstdint>

struct Layer {  // y (M, out) = x·Wᵀ + bias + scaling·(x·A)·B; see dw_linear. Without a weight there is no such layer.
    const void *weight;
    const float *scale, *smooth;
    const void *bias;
    const float *A, *B;
    int64_t in, out, rank, weight_type, by_column, bias_f32, in_blocks;
    float scaling;
};

struct RowNorm {  // see dw_norm; where not `used`, there is no such norm
    const void *weight, *bias;
    float eps, offset;
    int64_t centered, used;
};

struct HalfNorms {  // before a half's first layers, after its last one, and over the sum with the residual stream
    RowNorm before, after, post;
};

// How queries, keys and values lie in the outputs of the layers that give them: each of its own layer; or all of `query`'s
// layer, first all queries, then all keys, then all values, or for each key head its queries, its key and its value.
enum Split { APART = 0, STACKED = 1, GROUPED = 2 };

struct BlockParts {
    int64_t type, heads, key_heads, head_size, activation, window, turned;
    int64_t causal, split, gated, parallel;  // gated without `up`: the gate's layer gives gates and then ups
    int64_t int8_gradients;                  // bf16 weights are rounded to int8 in the backward, see dw_linear_backward
    float scaling, softcap;
    HalfNorms first, second;
    RowNorm of_query, of_key;  // over each head
    Layer query, key, value, output, gate, up, down;

    int64_t hidden() const { return query.in; }
    int64_t wide() const { return heads * head_size; }
    int64_t narrow() const { return key_heads * head_size; }
    int64_t inner() const { return down.in; }
    int64_t number() const { return type == 0 ? 4 : 2; }  // bytes
    bool gate_gives_up() const { return gated && !up.weight; }
    // Whether a layer's gradient is rounded to int8; groups of four numbers are multiplied at a time.
    bool rounds_gradient(const Layer &l) const {
        return l.scale || (int8_gradients && type == 1 && l.weight_type == 1 && l.in % 4 == 0 && l.out % 4 == 0);
    }
    bool head_norms() const { return of_query.used || of_key.used; }
};
