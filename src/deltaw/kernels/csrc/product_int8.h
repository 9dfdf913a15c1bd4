// Sums of int8 products: where they begin, and how those of blocks with scales of their own are added up.
#pragma once
#include "product.h"
#include "quantize.h"

namespace deltaw {

// Where the int32 sums of a panel's columns begin: minus the left side's zero times the sum of each column.
inline void starts_of_columns(const char *right, int64_t groups, int vecs, int left_zero, int32_t *starts) {
    const __m512i ones = _mm512_set1_epi32(0x01010101);
    for (int v = 0; v < vecs; v++) {
        __m512i s = _mm512_setzero_si512();
        for (int64_t g = 0; g < groups; g++) s = _mm512_dpbusd_epi32(s, ones, _mm512_load_si512(right + 128 * g + 64 * v));
        _mm512_store_si512(starts + 16 * v, _mm512_mullo_epi32(s, _mm512_set1_epi32(-left_zero)));
    }
}

inline void add_starts(float *tile, int rows, int vecs, const int32_t *starts) {
    for (int i = 0; i < rows; i++)
        for (int v = 0; v < vecs; v++) {
            void *at = tile + i * PANEL + 16 * v;
            _mm512_storeu_si512(at, _mm512_add_epi32(_mm512_loadu_si512(at), _mm512_load_si512(starts + 16 * v)));
        }
}

// tile (ROWS, 16·VECS) = or += for each block of the left side its int32 sums times the row's scale for that block.
template <int ROWS, int VECS>
inline void add_blocks(const char *left, int64_t stride, const char *right, int64_t groups, const int32_t *starts, const float *scales,
                       int64_t blocks, bool fresh, float *tile) {
    const int64_t at_once = INT8_BLOCK / 4;
    for (int64_t g = 0; g < groups; g += at_once, starts += PANEL, scales++, fresh = false) {
        __m512i s[ROWS][VECS];
        for (int i = 0; i < ROWS; i++)
            for (int v = 0; v < VECS; v++) s[i][v] = _mm512_load_si512(starts + 16 * v);
        add_products<OpInt8, ROWS, VECS>(left + 4 * g, stride, right + 128 * g, std::min(at_once, groups - g), s);
        for (int i = 0; i < ROWS; i++) {
            const __m512 by = _mm512_set1_ps(scales[i * blocks]);
            for (int v = 0; v < VECS; v++) {
                float *to = tile + i * PANEL + 16 * v;
                const __m512 x = _mm512_cvtepi32_ps(s[i][v]);
                _mm512_storeu_ps(to, fresh ? _mm512_mul_ps(x, by) : _mm512_fmadd_ps(x, by, _mm512_loadu_ps(to)));
            }
        }
    }
}

template <int VECS>
inline void add_blocks_of(int rows, const char *left, int64_t stride, const char *right, int64_t groups, const int32_t *starts,
                          const float *scales, int64_t blocks, bool fresh, float *tile) {
    switch (rows) {
        case 12: add_blocks<12, VECS>(left, stride, right, groups, starts, scales, blocks, fresh, tile); break;
        case 8: add_blocks<8, VECS>(left, stride, right, groups, starts, scales, blocks, fresh, tile); break;
        case 4: add_blocks<4, VECS>(left, stride, right, groups, starts, scales, blocks, fresh, tile); break;
        case 2: add_blocks<2, VECS>(left, stride, right, groups, starts, scales, blocks, fresh, tile); break;
        default: add_blocks<1, VECS>(left, stride, right, groups, starts, scales, blocks, fresh, tile);
    }
}

}  // namespace deltaw
