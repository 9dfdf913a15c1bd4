#include "quantize.h"

#include "kernels.h"
#include "numbers.h"
#include "threads.h"

using namespace deltaw;

namespace {

template <class T>
void quantize_row(int64_t K, const T *row, const float *smooth, uint8_t *out, float *scale) {
    __m512 most = _mm512_setzero_ps();
    for (int64_t k = 0; k < K; k += 16) {
        const __mmask16 mask = first(K - k);
        __m512 v = load16(row + k, mask);
        if (smooth) v = _mm512_mul_ps(v, load16(smooth + k, mask));
        most = _mm512_max_ps(most, _mm512_abs_ps(v));
    }
    const float top = _mm512_reduce_max_ps(most);
    *scale = top / 127.0f;
    const __m512 by = _mm512_set1_ps(top > 0 ? 127.0f / top : 0.0f);
    const __m512i low = _mm512_set1_epi32(1), high = _mm512_set1_epi32(255), shift = _mm512_set1_epi32(128);
    for (int64_t k = 0; k < K; k += 16) {
        const __mmask16 mask = first(K - k);
        __m512 v = load16(row + k, mask);
        if (smooth) v = _mm512_mul_ps(v, load16(smooth + k, mask));
        __m512i q = _mm512_add_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(v, by)), shift);
        q = _mm512_min_epi32(_mm512_max_epi32(q, low), high);
        _mm_mask_storeu_epi8(out + k, mask, _mm512_cvtepi32_epi8(q));
    }
}

template <class T>
void quantize(int64_t M, int64_t K, const T *x, const float *smooth, int64_t at_once, uint8_t *out, float *scales) {
    const int64_t blocks = (K + at_once - 1) / at_once;
    rows_in_parallel(M, [&](int64_t m) {
        for (int64_t k = 0, b = 0; k < K; k += at_once, b++)
            quantize_row(std::min(at_once, K - k), x + m * K + k, smooth ? smooth + k : nullptr, out + m * K + k, scales + m * blocks + b);
    });
}

}  // namespace

void deltaw::quantize_rows(int type, int64_t M, int64_t K, const void *x, const float *smooth, int64_t at_once, uint8_t *out, float *scales) {
    if (type == F32) quantize(M, K, (const float *)x, smooth, at_once, out, scales);
    else quantize(M, K, (const bf16 *)x, smooth, at_once, out, scales);
}

// x (M, K) to out (M, K) with one scale a row, scales (M).
int dw_quantize(int type, int64_t M, int64_t K, const void *x, const float *smooth, uint8_t *out, float *scales) {
    return guarded([&] { quantize_rows(type, M, K, x, smooth, std::max<int64_t>(K, 1), out, scales); });
}
