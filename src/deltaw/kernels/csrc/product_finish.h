// What becomes of a tile of sums, while it is in the first-level cache: scales, the low-rank part, bias and what is added, and
// out.
#pragma once
#include "product.h"

namespace deltaw {

// ROWS sums of 16 columns from n on go out in fp32, transposed.
inline void store_transposed(const Product &p, int64_t row, int64_t n, F16 y) {
    alignas(64) float lanes[16];
    store16(lanes, y);
    float *const out = (float *)p.out;
    for (int j = 0; j < 16 && n + j < p.N; j++) out[(n + j) * p.out_ld + row] = lanes[j];
}

inline F16 bias_of(const Product &p, int64_t n, First mask) {
    if (!p.bias) return zero_f();
    return p.bias_f32 || p.out_type == F32 ? load16((const float *)p.bias + n, mask) : load16((const bf16 *)p.bias + n, mask);
}

// The low-rank side: rows of the left as they are multiplied, `stride` bytes apart, the first for the tile's first row; and
// the right side, laid out. Or a tile of their products.
struct LowRank {
    const char *left, *right;
    int64_t stride, groups;
    const float *products;
};

// int32 or fp32 sums become fp32 times their row's and column's scale, in place.
inline void scale_sums(const Product &p, int rows, int vecs, float *tile, bool from_int32, int64_t m, int64_t n0) {
    for (int v = 0; v < vecs; v++) {
        const int64_t n = n0 + 16 * v;
        const F16 by_column = p.column_scale ? load16(p.column_scale + n, first(p.N - n)) : set_f(1.0f);
        for (int i = 0; i < rows; i++) {
            float *const at = tile + i * PANEL + 16 * v;
            F16 x = (from_int32 ? to_f(load_i(at)) : load16(at)) * by_column;
            if (p.row_scale) x = x * set_f(p.row_scale[m + i]);
            store16(at, x);
        }
    }
}

// Sums go out as numbers of type T, with bias and what is added.
template <class T>
inline void write_sums(const Product &p, int rows, int vecs, const float *tile, int64_t m, int64_t n0) {
    const F16 scale = set_f(p.out_scale);
    for (int v = 0; v < vecs; v++) {
        const int64_t n = n0 + 16 * v;
        const First mask = first(p.N - n);
        const F16 bias = bias_of(p, n, mask);
        for (int i = 0; i < rows; i++) {
            const int64_t row = m + i;
            F16 y = fma(load16(tile + i * PANEL + 16 * v), scale, bias);
            if (p.added) y = y + load16((const T *)p.added + row * p.added_ld + n, mask);
            if (p.transposed) store_transposed(p, row, n, y);
            else store16((T *)p.out + row * p.out_ld + n, y, mask);
        }
    }
}

// A tile (rows, 16·vecs) of sums, rows m …, columns n0 …, which is changed on the way.
template <class LowOp>
inline void finish_rows(int rows, int vecs, const Product &p, float *tile, bool from_int32, int64_t m, int64_t n0, const LowRank &low) {
    if (from_int32 || p.column_scale || p.row_scale) scale_sums(p, rows, vecs, tile, from_int32, m, n0);
    if constexpr (InTiles<LowOp>::value) {
        for (int i = 0; low.products && i < rows; i++)
            for (int v = 0; v < vecs; v++) {
                float *const at = tile + i * PANEL + 16 * v;
                store16(at, load16(at) + load16(low.products + i * PANEL + 16 * v));
            }
    } else if (low.groups)
        products_onto<LowOp>(rows, vecs, low.left, low.stride, low.right, low.groups, tile, PANEL, tile, PANEL);
    if (p.out_type == F32) write_sums<float>(p, rows, vecs, tile, m, n0);
    else write_sums<bf16>(p, rows, vecs, tile, m, n0);
}

}  // namespace deltaw
