// Row-wise operators between products: norms, activations, rotary positions. Sums are fp32, and results are rounded
// once. Values that the backward can recompute are not saved.
#include "activations.h"
#include "kernels.h"
#include "threads.h"

using namespace deltaw;

namespace {

// ---- norms -----------------------------------------------------------------------------------------------------
//
// y = (x - mean) · rstd · (w + offset) + bias. Without `centered` the mean is 0 (RMSNorm, arXiv 1910.07467). weight and
// bias can be null. stats (M, 2): mean and rstd.
template <class T>
void norm(int64_t M, int64_t D, const T *x, int64_t ld, const T *weight, const T *bias, float offset, float eps, int centered,
          T *y, float *stats) {
    rows_in_parallel(M, [&](int64_t m) {
        const T *row = x + m * ld;
        float mean = 0;
        if (centered) {
            F16 sum = zero_f();
            for (int64_t d = 0; d < D; d += 16) sum = sum + load16(row + d, first(D - d));
            mean = sum_lanes(sum) / D;
        }
        F16 sum = zero_f(), mu = set_f(mean);
        for (int64_t d = 0; d < D; d += 16) {
            First k = first(D - d);
            F16 v = select_first(k, load16(row + d, k) - mu);
            sum = fma(v, v, sum);
        }
        const float rstd = 1.0f / __builtin_sqrtf(sum_lanes(sum) / D + eps);
        stats[2 * m] = mean;
        stats[2 * m + 1] = rstd;
        const F16 by = set_f(rstd), shift = set_f(offset);
        for (int64_t d = 0; d < D; d += 16) {
            First k = first(D - d);
            F16 v = (load16(row + d, k) - mu) * by;
            if (weight) v = v * (load16(weight + d, k) + shift);
            if (bias) v = v + load16(bias + d, k);
            store16(y + m * D + d, v, k);
        }
    });
}

// dx = rstd · (g - mean(g) - x̂ · mean(g · x̂)) + addend, with g = dy · (w + offset). mean(g) only if centered.
template <class T>
void norm_backward(int64_t M, int64_t D, const T *dy, const T *x, int64_t ld, const T *weight, float offset, int centered,
                   const float *stats, const T *addend, T *dx) {
    rows_in_parallel(M, [&](int64_t m) {
        const T *row = x + m * ld, *grad = dy + m * D;
        const F16 mu = set_f(stats[2 * m]), by = set_f(stats[2 * m + 1]), shift = set_f(offset);
        F16 sum = zero_f(), dot = zero_f();
        for (int64_t d = 0; d < D; d += 16) {
            First k = first(D - d);
            F16 g = load16(grad + d, k);
            if (weight) g = g * (load16(weight + d, k) + shift);
            sum = select_first(k, sum + g, sum);
            dot = select_first(k, fma(g, (load16(row + d, k) - mu) * by, dot), dot);
        }
        const F16 mean = set_f(centered ? sum_lanes(sum) / D : 0.0f);
        const F16 slope = set_f(sum_lanes(dot) / D);
        for (int64_t d = 0; d < D; d += 16) {
            First k = first(D - d);
            F16 g = load16(grad + d, k);
            if (weight) g = g * (load16(weight + d, k) + shift);
            F16 hat = (load16(row + d, k) - mu) * by;
            F16 v = by * ((g - mean) - (hat * slope));
            if (addend) v = v + load16(addend + m * D + d, k);
            store16(dx + m * D + d, v, k);
        }
    });
}

// ---- activations -----------------------------------------------------------------------------------------------
//
// y = f(gate) · up, or f(gate) if up is null. All are (M, D). Rows of gate and up are `ld` apart.
template <class T>
void activation(int kind, int64_t M, int64_t D, const T *gate, const T *up, T *y) {
    rows_in_parallel(M, [&](int64_t m) {
        for (int64_t d = 0; d < D; d += 16) {
            const int64_t at = m * D + d;
            First k = first(D - d);
            F16 f, slope;
            activate(kind, load16(gate + at, k), f, slope);
            if (up) f = f * load16(up + at, k);
            store16(y + at, f, k);
        }
    });
}

// Compute d_gate = dy · up · f'(gate), d_up = dy · f(gate), and y again unless it is null.
template <class T>
void activation_backward(int kind, int64_t M, int64_t D, const T *dy, const T *gate, const T *up, T *d_gate, T *d_up, T *y) {
    rows_in_parallel(M, [&](int64_t m) {
        for (int64_t d = 0; d < D; d += 16) {
            const int64_t at = m * D + d;
            First k = first(D - d);
            F16 f, slope, g = load16(dy + at, k);
            activate(kind, load16(gate + at, k), f, slope);
            if (up) {
                F16 u = load16(up + at, k);
                store16(d_gate + at, (g * u) * slope, k);
                store16(d_up + at, g * f, k);
                if (y) store16(y + at, f * u, k);
            } else {
                store16(d_gate + at, g * slope, k);
                if (y) store16(y + at, f, k);
            }
        }
    });
}

// ---- rotary positions (arXiv 2104.09864) -----------------------------------------------------------------------
//
// Rotate the two halves of a head's first `rotary_dims` numbers. The other numbers are copied. x (M, heads, d), rows
// `ld` apart; cos, sin (M, rotary_dims) in fp32. out can be x. The backward applies the transposed rotation.
template <class T>
void rotate(int64_t M, int64_t heads, int64_t d, int64_t rotary_dims, const T *x, int64_t ld, const float *cosine, const float *sine,
            int backward, T *out, int64_t out_ld) {
    const int64_t half = rotary_dims / 2;
    rows_in_parallel(M, [&](int64_t m) {
        const float *c = cosine + m * rotary_dims, *s = sine + m * rotary_dims;
        for (int64_t h = 0; h < heads; h++) {
            const T *from = x + m * ld + h * d;
            T *to = out + m * out_ld + h * d;
            for (int64_t i = 0; i < half; i += 16) {
                First k = first(half - i);
                F16 a = load16(from + i, k), b = load16(from + half + i, k);
                F16 c1 = load16(c + i, k), c2 = load16(c + half + i, k), s1 = load16(s + i, k), s2 = load16(s + half + i, k);
                F16 first_half, second_half;
                if (!backward) {
                    first_half = fnma(b, s1, a * c1);
                    second_half = fma(a, s2, b * c2);
                } else {
                    first_half = fma(b, s2, a * c1);
                    second_half = fnma(a, s1, b * c2);
                }
                store16(to + i, first_half, k);
                store16(to + half + i, second_half, k);
            }
            if (to != from)
                for (int64_t i = rotary_dims; i < d; i++) to[i] = from[i];
        }
    });
}

}  // namespace

int dw_norm(int type, int64_t M, int64_t D, const void *x, int64_t ld, const void *weight, const void *bias, float offset,
            float eps, int centered, void *y, float *stats) {
    return guarded([&] {
        if (type == F32) norm(M, D, (const float *)x, ld, (const float *)weight, (const float *)bias, offset, eps, centered, (float *)y, stats);
        else norm(M, D, (const bf16 *)x, ld, (const bf16 *)weight, (const bf16 *)bias, offset, eps, centered, (bf16 *)y, stats);
    });
}
int dw_norm_backward(int type, int64_t M, int64_t D, const void *dy, const void *x, int64_t ld, const void *weight,
                     float offset, int centered, const float *stats, const void *addend, void *dx) {
    return guarded([&] {
        if (type == F32)
            norm_backward(M, D, (const float *)dy, (const float *)x, ld, (const float *)weight, offset, centered, stats, (const float *)addend,
                          (float *)dx);
        else
            norm_backward(M, D, (const bf16 *)dy, (const bf16 *)x, ld, (const bf16 *)weight, offset, centered, stats, (const bf16 *)addend,
                          (bf16 *)dx);
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

int dw_rotate(int type, int64_t M, int64_t heads, int64_t d, int64_t rotary_dims, const void *x, int64_t ld, const float *cosine,
              const float *sine, int backward, void *out, int64_t out_ld) {
    return guarded([&] {
        if (type == F32) rotate(M, heads, d, rotary_dims, (const float *)x, ld, cosine, sine, backward, (float *)out, out_ld);
        else rotate(M, heads, d, rotary_dims, (const bf16 *)x, ld, cosine, sine, backward, (bf16 *)out, out_ld);
    });
}
