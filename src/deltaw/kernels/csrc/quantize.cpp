#include "quantize.h"

#include "kernels.h"
#include "vector.h"
#include "threads.h"

using namespace deltaw;

namespace {

template <class T>
void quantize_row(int64_t K, const T *row, const float *smooth, uint8_t *out, float *scale) {
    F16 most = zero_f();
    for (int64_t k = 0; k < K; k += 16) {
        const First mask = first(K - k);
        F16 v = load16(row + k, mask);
        if (smooth) v = v * load16(smooth + k, mask);
        most = max(most, abs(v));
    }
    const float top = largest_of(most);
    *scale = top / 127.0f;
    const F16 by = set_f(top > 0 ? 127.0f / top : 0.0f);
    const I16 low = set_i(1), high = set_i(255), shift = set_i(128);
    for (int64_t k = 0; k < K; k += 16) {
        const First mask = first(K - k);
        F16 v = load16(row + k, mask);
        if (smooth) v = v * load16(smooth + k, mask);
        I16 q = to_int(v * by) + shift;
        q = min(max(q, low), high);
        store_u8(out + k, q, mask);
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
