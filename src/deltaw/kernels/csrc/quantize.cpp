#include "quantize.h"

#include "kernels.h"
#include "threads.h"

using namespace deltaw;

namespace {

// Factor that quantizes numbers with the maximum magnitude `top` to int8.
DW_INLINE F16 inverse_scale(float top, float *scale) {
    *scale = top / 127.0f;
    return set_f(top > 0 ? 127.0f / top : 0.0f);
}
// 1 to 255, since the maximum becomes 127.
DW_INLINE I16 rounded(F16 x, F16 by) { return to_int(x * by) + set_i(128); }

template <class T>
DW_INLINE F16 number(const T *row, const float *smooth, First mask) {
    const F16 x = load16(row, mask);
    return smooth ? x * load16(smooth, mask) : x;
}

template <class T>
void quantize_row(int64_t K, const T *row, const float *smooth, uint8_t *out, float *scale) {
    LargestMagnitude magnitude;
    for (int64_t k = 0; k < K; k += 16) magnitude.add_value(number(row + k, smooth ? smooth + k : nullptr, first(K - k)));
    const F16 by = inverse_scale(magnitude.value(), scale);
    for (int64_t k = 0; k < K; k += 16) {
        const First mask = first(K - k);
        store_u8(out + k, rounded(number(row + k, smooth ? smooth + k : nullptr, mask), by), mask);
    }
}

// A complete block, whose numbers stay in registers.
template <class T>
void quantize_block(const T *row, const float *smooth, uint8_t *out, float *scale) {
    constexpr int VECS = INT8_BLOCK / 16;
    const First all = first(16);
    F16 x[VECS];
    LargestMagnitude magnitude;
#pragma GCC unroll 8
    for (int v = 0; v < VECS; v++) {
        x[v] = number(row + 16 * v, smooth ? smooth + 16 * v : nullptr, all);
        magnitude.add_value(x[v]);
    }
    const F16 by = inverse_scale(magnitude.value(), scale);
#pragma GCC unroll 8
    for (int v = 0; v < VECS; v++) store_u8(out + 16 * v, rounded(x[v], by), all);
}

template <class T>
void quantize(int64_t M, int64_t K, const T *x, const float *smooth, int64_t block_size, uint8_t *out, float *scales) {
    const int64_t blocks = (K + block_size - 1) / block_size;
    rows_in_parallel(M, [&](int64_t m) {
        for (int64_t k = 0, b = 0; k < K; k += block_size, b++) {
            const int64_t count = std::min(block_size, K - k);
            const T *const row = x + m * K + k;
            const float *const by = smooth ? smooth + k : nullptr;
            if (count == INT8_BLOCK) quantize_block(row, by, out + m * K + k, scales + m * blocks + b);
            else quantize_row(count, row, by, out + m * K + k, scales + m * blocks + b);
        }
    });
}

}  // namespace

void deltaw::quantize_rows(int type, int64_t M, int64_t K, const void *x, const float *smooth, int64_t block_size, uint8_t *out, float *scales) {
    if (type == F32) quantize(M, K, (const float *)x, smooth, block_size, out, scales);
    else quantize(M, K, (const bf16 *)x, smooth, block_size, out, scales);
}

void deltaw::row_scales(int64_t rows, int64_t width, const bf16 *matrix, float *scales) {
    const First all = first(16);
    rows_in_parallel(rows, [&](int64_t r) {
        const bf16 *const row = matrix + r * width;
        LargestMagnitude magnitude[4];
        int64_t k = 0;
        for (; k + 64 <= width; k += 64)
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) magnitude[i].add_value(load16(row + k + 16 * i, all));
        for (; k < width; k += 16) magnitude[0].add_value(load16(row + k, first(width - k)));
        for (int i = 1; i < 4; i++) magnitude[0].add_value(magnitude[i]);
        scales[r] = magnitude[0].value() / 127.0f;
    });
}

// Quantize x (M, K) to out (M, K) with a scale per row, scales (M), or per INT8_BLOCK numbers if `in_blocks`, (M,
// blocks).
int dw_quantize(int type, int64_t M, int64_t K, const void *x, const float *smooth, int in_blocks, uint8_t *out, float *scales) {
    return guarded([&] { quantize_rows(type, M, K, x, smooth, in_blocks ? INT8_BLOCK : std::max<int64_t>(K, 1), out, scales); });
}
