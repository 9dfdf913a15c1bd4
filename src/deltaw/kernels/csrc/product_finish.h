// What becomes of a tile of sums: scales, the low-rank part, bias and what is added, all in registers, and out.
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

    // For what begins so many rows and columns further on.
    LowRank at(int rows, int columns) const {
        if (!groups) return *this;
        return {left + rows * stride, right + 4 * columns, stride, groups, products ? products + rows * PANEL + columns : nullptr};
    }
};

// A tile (ROWS, 16·VECS) of sums, rows m …, columns n0 …; int32 sums become fp32 times their row's and column's scale.
template <class LowOp, int ROWS, int VECS>
inline void finish(const Product &p, const float *tile, bool from_int32, int64_t m, int64_t n0, const LowRank &low) {
    F16 s[ROWS][VECS];
#pragma GCC unroll 2
    for (int v = 0; v < VECS; v++) {
        const int64_t n = n0 + 16 * v;
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; i++) {
            const float *at = tile + i * PANEL + 16 * v;
            s[i][v] = from_int32 ? to_f(load_i(at)) : load16(at);
        }
        if (p.column_scale) {
            const F16 by = load16(p.column_scale + n, first(p.N - n));
#pragma GCC unroll 12
            for (int i = 0; i < ROWS; i++) s[i][v] = s[i][v] * by;
        }
    }
    if (p.row_scale)
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 2
            for (int v = 0; v < VECS; v++) s[i][v] = s[i][v] * set_f(p.row_scale[m + i]);
    if constexpr (InTiles<LowOp>::value) {
        if (low.products)
#pragma GCC unroll 12
            for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 2
                for (int v = 0; v < VECS; v++) s[i][v] = s[i][v] + load16(low.products + i * PANEL + 16 * v);
    } else if (low.groups) add_products<LowOp, ROWS, VECS>(low.left, low.stride, low.right, low.groups, s);
    const F16 scale = set_f(p.out_scale);
#pragma GCC unroll 2
    for (int v = 0; v < VECS; v++) {
        const int64_t n = n0 + 16 * v;
        const First mask = first(p.N - n);
        const F16 bias = bias_of(p, n, mask);
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; i++) {
            const int64_t row = m + i;
            F16 y = fma(s[i][v], scale, bias);
            if (p.transposed) {
                store_transposed(p, row, n, y);
                continue;
            }
            if (p.added) {
                if (p.out_type == F32) y = y + load16((const float *)p.added + row * p.added_ld + n, mask);
                else y = y + load16((const bf16 *)p.added + row * p.added_ld + n, mask);
            }
            if (p.out_type == F32) store16((float *)p.out + row * p.out_ld + n, y, mask);
            else store16((bf16 *)p.out + row * p.out_ld + n, y, mask);
        }
    }
}

// Any number of rows.
template <class LowOp>
inline void finish_rows(int rows, int vecs, const Product &p, const float *tile, bool from_int32, int64_t m, int64_t n0, const LowRank &low) {
    for (int i = 0; i < rows;) {
        const int some = rows_at_once(rows - i);
        with_rows(some, [&](auto count) {
            with_vecs(vecs, [&](auto wide, int v) {
                finish<LowOp, decltype(count)::value, decltype(wide)::value>(p, tile + i * PANEL + 16 * v, from_int32, m + i, n0 + 16 * v,
                                                                             low.at(i, 16 * v));
            });
        });
        i += some;
    }
}

}  // namespace deltaw
