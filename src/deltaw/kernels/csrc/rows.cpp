// What is done to each row of tokens between the products: norms, activations, rotary positions. Sums are in fp32,
// results are rounded once; what a backward can compute again is not kept.
#include "kernels.h"
#include "numbers.h"
#include "threads.h"

using namespace deltaw;

namespace {

// ---- norms -----------------------------------------------------------------------------------------------
// y = (x - mean) · rstd · (w + offset) + bias; without `centred` the mean is 0 (RMSNorm, arXiv 1910.07467).
// weight and bias may be null. stats (M, 2): mean and rstd.
template <class T>
void norm(int64_t M, int64_t D, const T *x, int64_t ld, const T *weight, const T *bias, float offset, float eps, int centred,
          T *y, float *stats) {
    rows_in_parallel(M, [&](int64_t m) {
        const T *row = x + m * ld;
        float mean = 0;
        if (centred) {
            __m512 sum = _mm512_setzero_ps();
            for (int64_t d = 0; d < D; d += 16) sum = _mm512_add_ps(sum, load16(row + d, first(D - d)));
            mean = _mm512_reduce_add_ps(sum) / D;
        }
        __m512 sum = _mm512_setzero_ps(), mu = _mm512_set1_ps(mean);
        for (int64_t d = 0; d < D; d += 16) {
            __mmask16 k = first(D - d);
            __m512 v = _mm512_maskz_sub_ps(k, load16(row + d, k), mu);
            sum = _mm512_fmadd_ps(v, v, sum);
        }
        const float rstd = 1.0f / __builtin_sqrtf(_mm512_reduce_add_ps(sum) / D + eps);
        stats[2 * m] = mean;
        stats[2 * m + 1] = rstd;
        const __m512 by = _mm512_set1_ps(rstd), shift = _mm512_set1_ps(offset);
        for (int64_t d = 0; d < D; d += 16) {
            __mmask16 k = first(D - d);
            __m512 v = _mm512_mul_ps(_mm512_sub_ps(load16(row + d, k), mu), by);
            if (weight) v = _mm512_mul_ps(v, _mm512_add_ps(load16(weight + d, k), shift));
            if (bias) v = _mm512_add_ps(v, load16(bias + d, k));
            store16(y + m * D + d, v, k);
        }
    });
}

// dx = rstd · (g - mean(g) - x̂ · mean(g · x̂)) + added, with g = dy · (w + offset); mean(g) only if centred.
template <class T>
void norm_backward(int64_t M, int64_t D, const T *dy, const T *x, int64_t ld, const T *weight, float offset, int centred,
                   const float *stats, const T *added, T *dx) {
    rows_in_parallel(M, [&](int64_t m) {
        const T *row = x + m * ld, *grad = dy + m * D;
        const __m512 mu = _mm512_set1_ps(stats[2 * m]), by = _mm512_set1_ps(stats[2 * m + 1]), shift = _mm512_set1_ps(offset);
        __m512 sum = _mm512_setzero_ps(), dot = _mm512_setzero_ps();
        for (int64_t d = 0; d < D; d += 16) {
            __mmask16 k = first(D - d);
            __m512 g = load16(grad + d, k);
            if (weight) g = _mm512_mul_ps(g, _mm512_add_ps(load16(weight + d, k), shift));
            sum = _mm512_mask_add_ps(sum, k, sum, g);
            dot = _mm512_mask3_fmadd_ps(g, _mm512_mul_ps(_mm512_sub_ps(load16(row + d, k), mu), by), dot, k);
        }
        const __m512 mean = _mm512_set1_ps(centred ? _mm512_reduce_add_ps(sum) / D : 0.0f);
        const __m512 slope = _mm512_set1_ps(_mm512_reduce_add_ps(dot) / D);
        for (int64_t d = 0; d < D; d += 16) {
            __mmask16 k = first(D - d);
            __m512 g = load16(grad + d, k);
            if (weight) g = _mm512_mul_ps(g, _mm512_add_ps(load16(weight + d, k), shift));
            __m512 hat = _mm512_mul_ps(_mm512_sub_ps(load16(row + d, k), mu), by);
            __m512 v = _mm512_mul_ps(by, _mm512_sub_ps(_mm512_sub_ps(g, mean), _mm512_mul_ps(hat, slope)));
            if (added) v = _mm512_add_ps(v, load16(added + m * D + d, k));
            store16(dx + m * D + d, v, k);
        }
    });
}

// ---- activations -----------------------------------------------------------------------------------------
enum Activation { SILU = 0, GELU_TANH = 1, GELU = 2, RELU = 3 };

// erf by Abramowitz and Stegun 7.1.26's form with a better fit is too coarse for fp32; this is the series of
// the complementary error function in Numerical Recipes (erfcc, section 6.2), relative error below 1.2e-7.
inline __m512 erf_16(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f), z = _mm512_abs_ps(x);
    const __m512 t = _mm512_div_ps(one, _mm512_fmadd_ps(_mm512_set1_ps(0.5f), z, one));
    const float c[] = {0.17087277f, -0.82215223f, 1.48851587f, -1.13520398f, 0.27886807f,
                       -0.18628806f, 0.09678418f, 0.37409196f, 1.00002368f, -1.26551223f};
    __m512 p = _mm512_set1_ps(c[0]);
    for (int i = 1; i < 10; i++) p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(c[i]));
    __m512 tail = _mm512_mul_ps(t, exp_16(_mm512_fnmadd_ps(z, z, p)));
    __m512 value = _mm512_sub_ps(one, tail);
    return _mm512_mask_sub_ps(value, _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ), _mm512_setzero_ps(), value);
}

// f(x) and f'(x).
inline void activate(int kind, __m512 x, __m512 &f, __m512 &slope) {
    const __m512 one = _mm512_set1_ps(1.0f), half = _mm512_set1_ps(0.5f), zero = _mm512_setzero_ps();
    if (kind == SILU) {
        __m512 s = sigmoid_16(x);
        f = _mm512_mul_ps(x, s);
        slope = _mm512_mul_ps(s, _mm512_fmadd_ps(x, _mm512_sub_ps(one, s), one));
    } else if (kind == GELU_TANH) {
        const __m512 a = _mm512_set1_ps(0.7978845608f), c = _mm512_set1_ps(0.044715f);
        __m512 square = _mm512_mul_ps(x, x);
        __m512 t = tanh_16(_mm512_mul_ps(a, _mm512_mul_ps(x, _mm512_fmadd_ps(c, square, one))));
        __m512 inner = _mm512_mul_ps(a, _mm512_fmadd_ps(_mm512_set1_ps(3 * 0.044715f), square, one));
        __m512 lifted = _mm512_mul_ps(half, _mm512_add_ps(one, t));
        f = _mm512_mul_ps(x, lifted);
        slope = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_mul_ps(half, x), _mm512_fnmadd_ps(t, t, one)), inner, lifted);
    } else if (kind == GELU) {
        __m512 lifted = _mm512_mul_ps(half, _mm512_add_ps(one, erf_16(_mm512_mul_ps(x, _mm512_set1_ps(0.70710678f)))));
        __m512 density = _mm512_mul_ps(_mm512_set1_ps(0.39894228f), exp_16(_mm512_mul_ps(_mm512_set1_ps(-0.5f), _mm512_mul_ps(x, x))));
        f = _mm512_mul_ps(x, lifted);
        slope = _mm512_fmadd_ps(x, density, lifted);
    } else {
        __mmask16 up = _mm512_cmp_ps_mask(x, zero, _CMP_GT_OQ);
        f = _mm512_maskz_mov_ps(up, x);
        slope = _mm512_maskz_mov_ps(up, one);
    }
}

// y = f(gate) · up, or f(gate) where up is null; all (M, D) with rows `ld` apart on the left side.
template <class T>
void activation(int kind, int64_t M, int64_t D, const T *gate, const T *up, T *y) {
    rows_in_parallel(M, [&](int64_t m) {
        for (int64_t d = 0; d < D; d += 16) {
            const int64_t at = m * D + d;
            __mmask16 k = first(D - d);
            __m512 f, slope;
            activate(kind, load16(gate + at, k), f, slope);
            if (up) f = _mm512_mul_ps(f, load16(up + at, k));
            store16(y + at, f, k);
        }
    });
}

// From dy: d_gate = dy · up · f'(gate), d_up = dy · f(gate), and y again where wanted.
template <class T>
void activation_backward(int kind, int64_t M, int64_t D, const T *dy, const T *gate, const T *up, T *d_gate, T *d_up, T *y) {
    rows_in_parallel(M, [&](int64_t m) {
        for (int64_t d = 0; d < D; d += 16) {
            const int64_t at = m * D + d;
            __mmask16 k = first(D - d);
            __m512 f, slope, g = load16(dy + at, k);
            activate(kind, load16(gate + at, k), f, slope);
            if (up) {
                __m512 u = load16(up + at, k);
                store16(d_gate + at, _mm512_mul_ps(_mm512_mul_ps(g, u), slope), k);
                store16(d_up + at, _mm512_mul_ps(g, f), k);
                if (y) store16(y + at, _mm512_mul_ps(f, u), k);
            } else {
                store16(d_gate + at, _mm512_mul_ps(g, slope), k);
                if (y) store16(y + at, f, k);
            }
        }
    });
}

// ---- rotary positions (arXiv 2104.09864) ------------------------------------------------------------------
// The two halves of a head's first `turned` numbers are turned against each other; the other d - turned stay.
// x (M, heads, d), rows `ld` apart; cos, sin (M, turned) fp32; d - turned numbers of a head stay. In place if
// out is x. Backward is the transposed turn.
template <class T>
void rotate(int64_t M, int64_t heads, int64_t d, int64_t turned, const T *x, int64_t ld, const float *cosine, const float *sine,
            int backward, T *out, int64_t out_ld) {
    const int64_t half = turned / 2;
    rows_in_parallel(M, [&](int64_t m) {
        const float *c = cosine + m * turned, *s = sine + m * turned;
        for (int64_t h = 0; h < heads; h++) {
            const T *from = x + m * ld + h * d;
            T *to = out + m * out_ld + h * d;
            for (int64_t i = 0; i < half; i += 16) {
                __mmask16 k = first(half - i);
                __m512 a = load16(from + i, k), b = load16(from + half + i, k);
                __m512 c1 = load16(c + i, k), c2 = load16(c + half + i, k), s1 = load16(s + i, k), s2 = load16(s + half + i, k);
                __m512 first_half, second_half;
                if (!backward) {
                    first_half = _mm512_fnmadd_ps(b, s1, _mm512_mul_ps(a, c1));
                    second_half = _mm512_fmadd_ps(a, s2, _mm512_mul_ps(b, c2));
                } else {
                    first_half = _mm512_fmadd_ps(b, s2, _mm512_mul_ps(a, c1));
                    second_half = _mm512_fnmadd_ps(a, s1, _mm512_mul_ps(b, c2));
                }
                store16(to + i, first_half, k);
                store16(to + half + i, second_half, k);
            }
            if (to != from)
                for (int64_t i = turned; i < d; i++) to[i] = from[i];
        }
    });
}

}  // namespace

int dw_norm(int type, int64_t M, int64_t D, const void *x, int64_t ld, const void *weight, const void *bias, float offset,
            float eps, int centred, void *y, float *stats) {
    return guarded([&] {
        if (type == F32) norm(M, D, (const float *)x, ld, (const float *)weight, (const float *)bias, offset, eps, centred, (float *)y, stats);
        else norm(M, D, (const bf16 *)x, ld, (const bf16 *)weight, (const bf16 *)bias, offset, eps, centred, (bf16 *)y, stats);
    });
}
int dw_norm_backward(int type, int64_t M, int64_t D, const void *dy, const void *x, int64_t ld, const void *weight,
                     float offset, int centred, const float *stats, const void *added, void *dx) {
    return guarded([&] {
        if (type == F32)
            norm_backward(M, D, (const float *)dy, (const float *)x, ld, (const float *)weight, offset, centred, stats, (const float *)added, (float *)dx);
        else
            norm_backward(M, D, (const bf16 *)dy, (const bf16 *)x, ld, (const bf16 *)weight, offset, centred, stats, (const bf16 *)added, (bf16 *)dx);
    });
}

int dw_activation(int type, int kind, int64_t M, int64_t D, const void *gate, const void *up, void *y) {
    return guarded([&] {
        if (type == F32) activation(kind, M, D, (const float *)gate, (const float *)up, (float *)y);
        else activation(kind, M, D, (const bf16 *)gate, (const bf16 *)up, (bf16 *)y);
    });
}
int dw_activation_backward(int type, int kind, int64_t M, int64_t D, const void *dy, const void *gate, const void *up,
                           void *d_gate, void *d_up, void *y) {
    return guarded([&] {
        if (type == F32)
            activation_backward(kind, M, D, (const float *)dy, (const float *)gate, (const float *)up, (float *)d_gate, (float *)d_up, (float *)y);
        else
            activation_backward(kind, M, D, (const bf16 *)dy, (const bf16 *)gate, (const bf16 *)up, (bf16 *)d_gate, (bf16 *)d_up, (bf16 *)y);
    });
}

int dw_rotate(int type, int64_t M, int64_t heads, int64_t d, int64_t turned, const void *x, int64_t ld, const float *cosine,
              const float *sine, int backward, void *out, int64_t out_ld) {
    return guarded([&] {
        if (type == F32) rotate(M, heads, d, turned, (const float *)x, ld, cosine, sine, backward, (float *)out, out_ld);
        else rotate(M, heads, d, turned, (const bf16 *)x, ld, cosine, sine, backward, (bf16 *)out, out_ld);
    });
}
