// Dot products with rows of a weight in blocks. Decoded numbers are rounded to bf16 and multiplied in the same order as
// a bf16 weight, so results are bitwise equal to those of the decoded weight.
//
// For a single row of a step, numbers are multiplied as they are decoded. For several rows, some rows of the weight are
// first decoded into memory.
#pragma once
#include "blocks.h"
#include "decode_dots.h"

namespace deltaw {

// Unroll over the units of a block. With emulated vectors the code of a unit is long and slow to compile, so it is not
// unrolled.
#if defined(__AVX2__) || defined(__ARM_NEON)
#define DW_EACH_UNIT(BlockType) _Pragma("GCC unroll 8") for (int unit = 0; unit < BlockType::NUMBERS / UNIT; unit++)
#else
#define DW_EACH_UNIT(BlockType) _Pragma("GCC unroll 2") for (int unit = 0; unit < BlockType::NUMBERS / UNIT; unit++)
#endif

// 32 weights in the form of a bf16 Dot's right side.
template <class Dot>
struct UnitOperand {
    static constexpr int WORDS = UNIT / Dot::STEP;
    static_assert(WORDS == 1 || WORDS == 2, "a unit is 32 numbers");
    typename Dot::Word words[WORDS];

    explicit UnitOperand(const F16 (&x)[2]) {
        if constexpr (WORDS == 1) words[0] = bf16_bits_concat(x[0], x[1]);
        else words[0] = rounded_to_bf16(x[0]), words[1] = rounded_to_bf16(x[1]);
    }
};

// COLS dot products of the left row x with rows `row` … of the weight, while the next rows are prefetched.
template <class Dot, int FORMAT, int COLS>
inline __attribute__((always_inline)) void block_dots(const typename Dot::Left *x, const BlockRows<FORMAT> &w, int64_t row, int64_t depth,
                                                      float *out) {
    typedef Blocks<FORMAT> BlockType;
    typename Dot::Sum s[COLS];
#pragma GCC unroll 4
    for (int c = 0; c < COLS; c++) s[c] = Dot::zero();
    for (int64_t block = 0; block * BlockType::NUMBERS < depth; block++) {
        const char *const prefetch_bytes = (const char *)w.at(row + COLS, 0) + COLS * block * BlockType::BYTES;
        for (int i = 0; i < COLS * BlockType::BYTES; i += 64) __builtin_prefetch(prefetch_bytes + i, 0, 2);
        const typename Dot::Left *const left = x + block * BlockType::NUMBERS;
#pragma GCC unroll 4
        for (int c = 0; c < COLS; c++)
            DW_EACH_UNIT(BlockType) {
                F16 numbers[2];
                w.read_unit(row + c, block, unit, numbers);
                const UnitOperand<Dot> right(numbers);
                for (int i = 0; i < right.WORDS; i++) Dot::add(s[c], Dot::left(left + unit * UNIT + i * Dot::STEP), right.words[i]);
            }
    }
    float four[4];
    put_sums(s[0], s[COLS > 1], s[2 * (COLS > 2)], s[3 * (COLS > 3)], four);
    memcpy(out, four, COLS * sizeof(float));
}

// Multiply one left row by `columns` rows of the weight, starting at `first`.
template <class Dot, int FORMAT>
__attribute__((noinline)) void dot_one_row(const typename Dot::Left *x, const BlockRows<FORMAT> &w, int64_t first, int64_t depth, int64_t columns,
                                           float *out,
                                               PrefetchSource *other) {
    const int64_t lines = other ? other->lines / std::max<int64_t>(1, columns / 4) + 1 : 0;
    int64_t c = 0;
    for (; c + 4 <= columns; c += 4) {
        if (other) other->prefetch(lines);
        block_dots<Dot, FORMAT, 4>(x, w, first + c, depth, out + c);
    }
    for (; c < columns; c++) block_dots<Dot, FORMAT, 1>(x, w, first + c, depth, out + c);
}

// Decode `columns` rows of the weight, starting at `first`, into `buffer` (columns, depth).
template <int FORMAT>
__attribute__((noinline)) void write_numbers(const BlockRows<FORMAT> &w, int64_t first, int64_t columns, int64_t depth, bf16 *buffer) {
    typedef Blocks<FORMAT> BlockType;
    for (int64_t c = 0; c < columns; c++)
        for (int64_t block = 0; block * BlockType::NUMBERS < depth; block++, buffer += BlockType::NUMBERS) {
            const char *const prefetch_bytes = (const char *)w.at(first + c, block) + 1024;
            for (int i = 0; i < BlockType::BYTES; i += 64) __builtin_prefetch(prefetch_bytes + i, 0, 2);
            DW_EACH_UNIT(BlockType) {
                F16 numbers[2];
                w.read_unit(first + c, block, unit, numbers);
                store_i(buffer + unit * UNIT, bf16_bits_concat(numbers[0], numbers[1]));
            }
        }
}

#undef DW_EACH_UNIT

}  // namespace deltaw
