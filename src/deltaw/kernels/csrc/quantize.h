// Rounding rows to int8.
#pragma once
#include <cstdint>

#include "bf16.h"

namespace deltaw {

const int64_t INT8_BLOCK = 128;  // numbers of a gradient, or classes, that are rounded with one scale
inline int64_t int8_blocks(int64_t n) { return (n + INT8_BLOCK - 1) / INT8_BLOCK; }

// Rows of fp32 or bf16, times `smooth` (K) where given, as unsigned int8 around 128 with a scale for each `at_once`
// numbers: value = (int8 - 128) · scale, from -127 to 127. scales (M, K / at_once rounded up).
void quantize_rows(int type, int64_t M, int64_t K, const void *x, const float *smooth, int64_t at_once, uint8_t *out, float *scales);

// What each row of a bf16 matrix is divided by to be rounded to signed int8, -127 to 127.
void scales_of_rows(int64_t rows, int64_t width, const bf16 *matrix, float *scales);

}  // namespace deltaw
