// MLP activation functions on 16 numbers at a time.
#pragma once
#include "vector.h"

namespace deltaw {

enum Activation { SILU = 0, GELU_TANH = 1, GELU = 2, RELU = 3 };

// 1 - erf(z) for z ≥ 0. Series of Numerical Recipes (erfcc, section 6.2), relative error below 1.2e-7.
inline F16 erfc_16(F16 z) {
    const F16 one = set_f(1.0f), t = one / fma(set_f(0.5f), z, one);
    const float c[] = {0.17087277f, -0.82215223f, 1.48851587f, -1.13520398f, 0.27886807f,
                       -0.18628806f, 0.09678418f, 0.37409196f, 1.00002368f, -1.26551223f};
    F16 p = set_f(c[0]);
    for (int i = 1; i < 10; i++) p = fma(p, t, set_f(c[i]));
    return t * exp_16(fnma(z, z, p));
}

// s = 1/(1 + exp(-x)), and s·(1 - s). Accurate to a small number of units in the last place at both ends, where
// computing 1 - s directly would leave only rounding error, which factors such as x could amplify.
inline void logistic(F16 x, F16 &s, F16 &complement) {
    const F16 one = set_f(1.0f), e = exp_16(zero_f() - abs(x)), r = one / (one + e);
    s = select(x < zero_f(), e * r, r);
    complement = e * r * r;
}

// f(x) and f'(x).
inline void activate(int kind, F16 x, F16 &f, F16 &slope) {
    const F16 one = set_f(1.0f), half = set_f(0.5f), zero = zero_f();
    if (kind == SILU) {
        F16 s, complement;
        logistic(x, s, complement);
        f = x * s;
        slope = fma(x, complement, s);
    } else if (kind == GELU_TANH) {
        // (1 + tanh(u))/2 is the logistic function of 2u.
        const F16 a = set_f(2 * 0.7978845608f), c = set_f(0.044715f), square = x * x;
        F16 s, complement;
        logistic(a * (x * fma(c, square, one)), s, complement);
        f = x * s;
        slope = fma(x * complement, a * fma(set_f(3 * 0.044715f), square, one), s);
    } else if (kind == GELU) {
        const F16 tail = half * erfc_16(abs(x) * set_f(0.70710678f));
        const F16 lifted = select(x < zero, tail, one - tail);
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
