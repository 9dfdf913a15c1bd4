// A decoder's block as the caller describes it; kernels/structs.py mirrors these structs, see dw_layout_of.
#pragma once
#include <cstdint>

struct Layer {  // y (M, out) = x·Wᵀ + bias + scaling·(x·A)·B; see dw_linear
    const void *weight;
    const float *scale, *smooth;
    const void *bias;
    const float *A, *B;
    int64_t in, out, rank, weight_type, bias_f32;
    float scaling;
};

struct RowNorm {  // see dw_norm
    const void *weight, *bias;
    float eps, offset;
    int64_t centred;
};

struct BlockParts {
    int64_t type, heads, key_heads, head_size, activation, window, turned;
    float scaling, softcap;
    RowNorm first, second;
    Layer query, key, value, output, gate, up, down;

    int64_t hidden() const { return query.in; }
    int64_t wide() const { return query.out; }
    int64_t narrow() const { return key.out; }
    int64_t inner() const { return gate.out; }
    int64_t number() const { return type == 0 ? 4 : 2; }  // bytes
};
