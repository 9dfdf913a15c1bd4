// Description of a transformer block by the caller. kernels/structs.py mirrors these structs; see dw_struct_layout.
#pragma once
#include <cstdint>

struct Layer {  // y (M, out) = x·Wᵀ + bias + scaling·(x·A)·B; see dw_linear. The layer is absent if weight is null.
    const void *weight;
    const float *scale, *smooth;
    const void *bias;
    const float *A, *B;
    int64_t in, out, rank, weight_type, by_column, bias_f32, in_blocks;
    float scaling;
};

struct RowNorm {  // see dw_norm; the norm is absent if `used` is 0
    const void *weight, *bias;
    float eps, offset;
    int64_t centered, used;
};

struct HalfNorms {  // before the half's first layers, after its last layer, and over the sum with the residual stream
    RowNorm before, after, post;
};

// Order of queries, keys and values in the outputs of their layers. SEPARATE: one layer each. STACKED: one layer with
// all queries, then all keys, then all values. GROUPED: one layer with the queries, key and value of each key head.
enum Split { SEPARATE = 0, STACKED = 1, GROUPED = 2 };

struct BlockParts {
    int64_t type, heads, key_heads, head_size, activation, window, rotary_dims;
    int64_t causal, split, gated, parallel;  // if gated and `up` is absent, the gate's layer computes gates, then ups
    int64_t int8_gradients;  // quantize bf16 weights to int8 in the backward; see dw_linear_backward
    float scaling, softcap;
    HalfNorms first, second;
    RowNorm query_norm, key_norm;  // over each head
    Layer query, key, value, output, gate, up, down;

    int64_t hidden() const { return query.in; }
    int64_t query_size() const { return heads * head_size; }
    int64_t key_size() const { return key_heads * head_size; }
    int64_t inner() const { return down.in; }
    int64_t number() const { return type == 0 ? 4 : 2; }  // bytes
    bool gate_has_up() const { return gated && !up.weight; }
    // True if the gradient of a layer's input is computed in int8. Sizes must be multiples of four.
    bool has_int8_gradient(const Layer &l) const {
        return l.scale || (int8_gradients && type == 1 && l.weight_type == 1 && l.in % 4 == 0 && l.out % 4 == 0);
    }
    bool head_norms() const { return query_norm.used || key_norm.used; }
};
