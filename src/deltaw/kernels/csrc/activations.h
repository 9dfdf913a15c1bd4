// The activation functions of an MLP, on sixteen numbers at a time.
#pragma once
#include "vector.h"

namespace deltaw {

enum Activation { SILU = 0, GELU_TANH = 1, GELU = 2, RELU = 3 };

// erf by Abramowitz and Stegun 7.1.26's form with a better fit is too coarse for fp32; this is the series of
// the complementary error function in Numerical Recipes (erfcc, section 6.2), relative error below 1.2e-7.
inline F16 erf_16(F16 x) {
    const F16 one = set_f(1.0f), z = abs(x);
    const F16 t = one / fma(set_f(0.5f), z, one);
    const float c[] = {0.17087277f, -0.82215223f, 1.48851587f, -1.13520398f, 0.27886807f,
                       -0.18628806f, 0.09678418f, 0.37409196f, 1.00002368f, -1.26551223f};
    F16 p = set_f(c[0]);
    for (int i = 1; i < 10; i++) p = fma(p, t, set_f(c[i]));
    F16 tail = t * exp_16(fnma(z, z, p));
    F16 value = one - tail;
    return select(x < zero_f(), zero_f() - value, value);
}

// f(x) and f'(x).
inline void activate(int kind, F16 x, F16 &f, F16 &slope) {
    const F16 one = set_f(1.0f), half = set_f(0.5f), zero = zero_f();
    if (kind == SILU) {
        F16 s = sigmoid_16(x);
        f = x * s;
        slope = s * fma(x, one - s, one);
    } else if (kind == GELU_TANH) {
        const F16 a = set_f(0.7978845608f), c = set_f(0.044715f);
        F16 square = x * x;
        F16 t = tanh_16(a * (x * fma(c, square, one)));
        F16 inner = a * fma(set_f(3 * 0.044715f), square, one);
        F16 lifted = half * (one + t);
        f = x * lifted;
        slope = fma((half * x) * fnma(t, t, one), inner, lifted);
    } else if (kind == GELU) {
        F16 lifted = half * (one + erf_16(x * set_f(0.70710678f)));
        F16 density = set_f(0.39894228f) * exp_16(set_f(-0.5f) * (x * x));
        f = x * lifted;
        slope = fma(x, density, lifted);
    } else {
        const M16 up = x > zero;
        f = select(up, x, zero);
        slope = select(up, one, zero);
    }
}

}  // namespace deltaw
