// Sums over rows of a weight in blocks, whose numbers are rounded to bf16 and then multiplied as a bf16 weight's are, in the same
// order: so they have the same bits as those of the weight that the blocks stand for.
//
// One row of a step is multiplied with numbers as they come from the blocks. For more, some of the weight's rows become numbers
// in memory first, once for all of them.
#pragma once
#include "blocks.h"
#include "decode_dots.h"

namespace deltaw {

// Over the units of a block. Where vectors have no instructions of their own a unit is long, and longer to compile.
#if defined(__AVX2__) || defined(__ARM_NEON)
#define DW_EACH_UNIT(Of) _Pragma("GCC unroll 8") for (int unit = 0; unit < Of::NUMBERS / UNIT; unit++)
#else
#define DW_EACH_UNIT(Of) _Pragma("GCC unroll 2") for (int unit = 0; unit < Of::NUMBERS / UNIT; unit++)
#endif

// 32 numbers of a weight as a bf16 Dot's right side takes them.
template <class Dot>
struct UnitOf {
    static constexpr int WORDS = UNIT / Dot::STEP;
    static_assert(WORDS == 1 || WORDS == 2, "a unit is 32 numbers");
    typename Dot::Word words[WORDS];

    explicit UnitOf(const F16 (&x)[2]) {
        if constexpr (WORDS == 1) words[0] = bf16_bits_of_both(x[0], x[1]);
        else words[0] = rounded_to_bf16(x[0]), words[1] = rounded_to_bf16(x[1]);
    }
};

// COLS sums of the left row x and rows `row` … of the weight. Meanwhile the bytes of the rows behind them are asked for.
template <class Dot, int FORMAT, int COLS>
inline __attribute__((always_inline)) void block_dots(const typename Dot::Left *x, const BlockRows<FORMAT> &w, int64_t row, int64_t depth, float *out) {
    typedef Blocks<FORMAT> Of;
    typename Dot::Sum s[COLS];
#pragma GCC unroll 4
    for (int c = 0; c < COLS; c++) s[c] = Dot::zero();
    for (int64_t block = 0; block * Of::NUMBERS < depth; block++) {
        const char *const ahead = (const char *)w.at(row + COLS, 0) + COLS * block * Of::BYTES;
        for (int i = 0; i < COLS * Of::BYTES; i += 64) __builtin_prefetch(ahead + i, 0, 2);
        const typename Dot::Left *const left = x + block * Of::NUMBERS;
#pragma GCC unroll 4
        for (int c = 0; c < COLS; c++)
            DW_EACH_UNIT(Of) {
                F16 numbers[2];
                w.read_unit(row + c, block, unit, numbers);
                const UnitOf<Dot> right(numbers);
                for (int i = 0; i < right.WORDS; i++) Dot::add(s[c], Dot::left(left + unit * UNIT + i * Dot::STEP), right.words[i]);
            }
    }
    float four[4];
    put_sums(s[0], s[COLS > 1], s[2 * (COLS > 2)], s[3 * (COLS > 3)], four);
    memcpy(out, four, COLS * sizeof(float));
}

// One left row times `columns` rows of the weight from `first` on.
template <class Dot, int FORMAT>
__attribute__((noinline)) void dots_of_one_row(const typename Dot::Left *x, const BlockRows<FORMAT> &w, int64_t first, int64_t depth, int64_t columns, float *out,
                                               Ahead *other) {
    const int64_t lines = other ? other->lines / std::max<int64_t>(1, columns / 4) + 1 : 0;
    int64_t c = 0;
    for (; c + 4 <= columns; c += 4) {
        if (other) other->ask(lines);
        block_dots<Dot, FORMAT, 4>(x, w, first + c, depth, out + c);
    }
    for (; c < columns; c++) block_dots<Dot, FORMAT, 1>(x, w, first + c, depth, out + c);
}

// Rows first … of the weight, `columns` of them, as numbers into `room` (columns, depth).
template <int FORMAT>
__attribute__((noinline)) void write_numbers(const BlockRows<FORMAT> &w, int64_t first, int64_t columns, int64_t depth, bf16 *room) {
    typedef Blocks<FORMAT> Of;
    for (int64_t c = 0; c < columns; c++)
        for (int64_t block = 0; block * Of::NUMBERS < depth; block++, room += Of::NUMBERS) {
            const char *const ahead = (const char *)w.at(first + c, block) + 1024;
            for (int i = 0; i < Of::BYTES; i += 64) __builtin_prefetch(ahead + i, 0, 2);
            DW_EACH_UNIT(Of) {
                F16 numbers[2];
                w.read_unit(first + c, block, unit, numbers);
                store_i(room + unit * UNIT, bf16_bits_of_both(numbers[0], numbers[1]));
            }
        }
}

#undef DW_EACH_UNIT

}  // namespace deltaw
