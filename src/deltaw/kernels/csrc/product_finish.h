// What becomes of a tile of sums: scales, the low-rank part, bias and what is added, all in registers, and out.
#pragma once
#include "product.h"

namespace deltaw {

// ROWS sums of 16 columns from n on go out in fp32, transposed.
inline void store_transposed(const Product &p, int64_t row, int64_t n, __m512 y) {
    alignas(64) float lanes[16];
    _mm512_store_ps(lanes, y);
    float *const out = (float *)p.out;
    for (int j = 0; j < 16 && n + j < p.N; j++) out[(n + j) * p.out_ld + row] = lanes[j];
}

inline __m512 bias_of(const Product &p, int64_t n, __mmask16 mask) {
    if (!p.bias) return _mm512_setzero_ps();
    return p.bias_f32 || p.out_type == F32 ? load16((const float *)p.bias + n, mask) : load16((const bf16 *)p.bias + n, mask);
}

// A tile (ROWS, 16·VECS) of sums, rows m …, columns n0 …; int32 sums become fp32 times their row's and column's scale.
template <class LowOp, int ROWS, int VECS>
inline void finish(const Product &p, const float *tile, bool from_int32, int64_t m, int64_t n0, const char *low_right, int64_t low_groups) {
    __m512 s[ROWS][VECS];
    for (int v = 0; v < VECS; v++) {
        const int64_t n = n0 + 16 * v;
        for (int i = 0; i < ROWS; i++) {
            const float *at = tile + i * PANEL + 16 * v;
            s[i][v] = from_int32 ? _mm512_cvtepi32_ps(_mm512_loadu_si512(at)) : _mm512_loadu_ps(at);
        }
        if (p.column_scale) {
            const __m512 by = load16(p.column_scale + n, first(p.N - n));
            for (int i = 0; i < ROWS; i++) s[i][v] = _mm512_mul_ps(s[i][v], by);
        }
    }
    if (p.row_scale)
        for (int i = 0; i < ROWS; i++)
            for (int v = 0; v < VECS; v++) s[i][v] = _mm512_mul_ps(s[i][v], _mm512_set1_ps(p.row_scale[m + i]));
    if (low_groups) {
        const int64_t stride = p.rank * (4 / LowOp::PER_GROUP);
        add_products<LowOp, ROWS, VECS>((const char *)p.low + m * stride, stride, low_right, low_groups, s);
    }
    const __m512 scale = _mm512_set1_ps(p.out_scale);
    for (int v = 0; v < VECS; v++) {
        const int64_t n = n0 + 16 * v;
        const __mmask16 mask = first(p.N - n);
        const __m512 bias = bias_of(p, n, mask);
        for (int i = 0; i < ROWS; i++) {
            const int64_t row = m + i;
            __m512 y = _mm512_fmadd_ps(s[i][v], scale, bias);
            if (p.transposed) {
                store_transposed(p, row, n, y);
                continue;
            }
            if (p.added) {
                if (p.out_type == F32) y = _mm512_add_ps(y, load16((const float *)p.added + row * p.added_ld + n, mask));
                else y = _mm512_add_ps(y, load16((const bf16 *)p.added + row * p.added_ld + n, mask));
            }
            if (p.out_type == F32) store16((float *)p.out + row * p.out_ld + n, y, mask);
            else store16((bf16 *)p.out + row * p.out_ld + n, y, mask);
        }
    }
}

template <class LowOp, int VECS>
inline void finish_rows(int rows, const Product &p, const float *tile, bool from_int32, int64_t m, int64_t n0, const char *low_right,
                        int64_t low_groups) {
    switch (rows) {
        case 12: finish<LowOp, 12, VECS>(p, tile, from_int32, m, n0, low_right, low_groups); break;
        case 8: finish<LowOp, 8, VECS>(p, tile, from_int32, m, n0, low_right, low_groups); break;
        case 4: finish<LowOp, 4, VECS>(p, tile, from_int32, m, n0, low_right, low_groups); break;
        case 2: finish<LowOp, 2, VECS>(p, tile, from_int32, m, n0, low_right, low_groups); break;
        default: finish<LowOp, 1, VECS>(p, tile, from_int32, m, n0, low_right, low_groups);
    }
}

}  // namespace deltaw
