// Quantization of blocks to NF4.
#include "kernels.h"
#include "quantize.h"
#include "threads.h"

using namespace deltaw;

namespace {

constexpr int BLOCK = 64, VECS = BLOCK / 16, BOUNDS = 15;

// Number of bounds below each x, which is the index of the nearest level.
DW_INLINE F16 level(F16 x, const F16 bounds[BOUNDS]) {
    const F16 one = set_f(1.0f);
    F16 index = zero_f();
#pragma GCC unroll 15
    for (int b = 0; b < BOUNDS; b++) index = index + select(x > bounds[b], one, zero_f());
    return index;
}

template <class T>
void quantize_block(const T *x, const F16 bounds[BOUNDS], uint8_t *codes, float *maximum) {
    const First all = first(16);
    F16 numbers[VECS];
    LargestMagnitude magnitude;
#pragma GCC unroll 4
    for (int v = 0; v < VECS; v++) {
        numbers[v] = load16(x + 16 * v, all);
        magnitude.add_value(numbers[v]);
    }
    *maximum = magnitude.value();
    const F16 by = set_f(*maximum > 0 ? 1.0f / *maximum : 0.0f);
#pragma GCC unroll 2
    for (int v = 0; v < VECS / 2; v++) {
        const F16 low = level(numbers[v] * by, bounds), high = level(numbers[v + VECS / 2] * by, bounds);
        store_u8(codes + 16 * v, to_int(low + high * set_f(16.0f)), all);
    }
}

template <class T>
void quantize(int64_t rows, int64_t row_blocks, const T *x, const float *bounds, uint8_t *codes, float *maxima) {
    rows_in_parallel(rows, [&](int64_t row) {
        F16 limits[BOUNDS];
        for (int b = 0; b < BOUNDS; b++) limits[b] = set_f(bounds[b]);
        for (int64_t block = row * row_blocks; block < (row + 1) * row_blocks; block++)
            quantize_block(x + BLOCK * block, limits, codes + BLOCK / 2 * block, maxima + block);
    });
}

}  // namespace

// codes (rows, row_blocks, 32): of each block of 64 numbers of x, divided by its largest magnitude, the number of bounds
// (15) below each number. The first 32 are in the low nibbles. maxima (rows, row_blocks): the largest magnitudes, NaN if
// a number is not finite.
int dw_quantize_nf4(int type, int64_t rows, int64_t row_blocks, const void *x, const float *bounds, uint8_t *codes, float *maxima) {
    return guarded([&] {
        if (type == F32) quantize(rows, row_blocks, (const float *)x, bounds, codes, maxima);
        else quantize(rows, row_blocks, (const bf16 *)x, bounds, codes, maxima);
    });
}
