// Quantization of rows to int8.
#pragma once
#include <cstdint>

#include "vector.h"

namespace deltaw {

const int64_t INT8_BLOCK = 128;  // numbers of a gradient, or classes, that share a scale
inline int64_t int8_blocks(int64_t n) { return (n + INT8_BLOCK - 1) / INT8_BLOCK; }

// Maximum magnitude of numbers. NaN if a number is NaN or infinite, so that numbers divided by it also become NaN.
// Magnitudes are compared as integers, which have the same order and sort NaN above infinity. A floating-point maximum
// could lose a NaN.
struct LargestMagnitude {
    I16 bits = zero_i();

    DW_INLINE void add_value(F16 x) { bits = max(bits, bits_of(x) & set_i(0x7fffffff)); }
    DW_INLINE void add_value(const LargestMagnitude &other) { bits = max(bits, other.bits); }
    float value() const { return any(bits > set_i(0x7f7fffff)) ? NAN : max_lane(from_bits(bits)); }
};

// Quantize rows of fp32 or bf16, multiplied by `smooth` (K) unless it is null, to uint8 with zero point 128 and a scale
// per `block_size` numbers: value = (int8 - 128) · scale, from -127 to 127. scales: (M, ⌈K / block_size⌉).
void quantize_rows(int type, int64_t M, int64_t K, const void *x, const float *smooth, int64_t block_size, uint8_t *out, float *scales);

// Compute the int8 quantization scale of each row of a bf16 matrix, for the range -127 to 127.
void row_scales(int64_t rows, int64_t width, const bf16 *matrix, float *scales);

}  // namespace deltaw
