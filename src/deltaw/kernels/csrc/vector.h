// Arithmetic on 16 lanes of 32 bits, in the number of registers that the processor needs. All code except products is
// written with it. F16 and I16 are 16 numbers of fp32 and int32, M16 is a lane mask, First selects the first lanes at
// the end of a row.
#pragma once
#if defined(__AVX512F__)
#include "vector_avx512.h"
#else
#include "vector_parts.h"
#endif

namespace deltaw {

enum Type { F32 = 0, BF16 = 1, INT8 = 2 };  // type codes of the caller

DW_INLINE F16 load16(const bf16 *p) { return from_bits(load_u16(p) << 16); }
DW_INLINE F16 load16(const bf16 *p, First m) { return from_bits(load_u16(p, m) << 16); }

// 2^x with an error of about 2 units in the last place of fp32. 0 below -126, infinity from 128, NaN stays NaN.
DW_INLINE F16 exp2_16(F16 x) {
    const F16 n = nearest(x), f = x - n;  // f in [-0.5, 0.5]
    // Near-minimax polynomial of 2^f on [-0.5, 0.5].
    F16 p = set_f(1.5353362e-4f);
    p = fma(p, f, set_f(1.3398874e-3f));
    p = fma(p, f, set_f(9.6184374e-3f));
    p = fma(p, f, set_f(5.5503324e-2f));
    p = fma(p, f, set_f(2.4022648e-1f));
    p = fma(p, f, set_f(6.9314720e-1f));
    p = fma(p, f, set_f(1.0f));
    return select(x < set_f(-126.0f), zero_f(), times_power_of_two(p, n));
}
// 2^x with a relative error of 3e-6, far below the precision of bf16.
DW_INLINE F16 exp2_16_for_bf16(F16 x) {
    const F16 n = nearest(x), f = x - n;
    F16 p = set_f(9.57010002e-3f);
    p = fma(p, f, set_f(5.59178602e-2f));
    p = fma(p, f, set_f(2.40247449e-1f));
    p = fma(p, f, set_f(6.93121815e-1f));
    p = fma(p, f, set_f(9.99999261e-1f));
    return select(not_less(x, set_f(-126.0f)), times_power_of_two(p, n), zero_f());
}
const float LOG2E = 1.44269504088896341f, LN2 = 0.693147180559945309f;
DW_INLINE F16 exp_16(F16 x) { return exp2_16(x * set_f(LOG2E)); }
// 1 - 2 / (1 + e^2x), which saturates on both sides.
DW_INLINE F16 tanh_16(F16 x) {
    const F16 one = set_f(1.0f);
    return one - set_f(2.0f) / (one + exp_16(x + x));
}

// A group is the data that one lane multiplies in one operation: one fp32 number, two 16-bit numbers or four 8-bit
// numbers. This transposes 16 rows of `groups` groups each (a null row is zeros) to `groups` vectors of 16 lanes,
// `step` bytes apart, starting at `into`. Products read their right side in this layout.
inline void pack_rows16(const char *const rows[16], int64_t groups, char *into, int64_t step) {
    for (int64_t g = 0; g < groups; g += 16) {
        const First m = first(groups - g);
        I16 r[16];
        for (int i = 0; i < 16; i++) r[i] = rows[i] ? load_i(rows[i] + 4 * g, m) : zero_i();
        transpose16(r);
        const int64_t n = std::min<int64_t>(16, groups - g);
        for (int i = 0; i < n; i++) store_i(into + (g + i) * step, r[i]);
    }
}

}  // namespace deltaw
