// Rounding rows to int8.
#pragma once
#include <cstdint>

#include "vector.h"

namespace deltaw {

const int64_t INT8_BLOCK = 128;  // numbers of a gradient, or classes, that are rounded with one scale
inline int64_t int8_blocks(int64_t n) { return (n + INT8_BLOCK - 1) / INT8_BLOCK; }

// The largest magnitude of numbers; NaN where one of them is NaN or infinite, so that what is divided by it is NaN too. Magnitudes
// as whole numbers have the order of the numbers, and NaN above infinity; a maximum of numbers would lose a NaN.
struct LargestMagnitude {
    I16 bits = zero_i();

    DW_INLINE void see(F16 x) { bits = max(bits, bits_of(x) & set_i(0x7fffffff)); }
    DW_INLINE void see(const LargestMagnitude &other) { bits = max(bits, other.bits); }
    float value() const { return any(bits > set_i(0x7f7fffff)) ? NAN : largest_of(from_bits(bits)); }
};

// Rows of fp32 or bf16, times `smooth` (K) where given, as unsigned int8 around 128 with a scale for each `at_once`
// numbers: value = (int8 - 128) · scale, from -127 to 127. scales (M, K / at_once rounded up).
void quantize_rows(int type, int64_t M, int64_t K, const void *x, const float *smooth, int64_t at_once, uint8_t *out, float *scales);

// What each row of a bf16 matrix is divided by to be rounded to signed int8, -127 to 127.
void scales_of_rows(int64_t rows, int64_t width, const bf16 *matrix, float *scales);

}  // namespace deltaw
