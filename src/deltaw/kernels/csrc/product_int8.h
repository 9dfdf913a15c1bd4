// Initial values of int8 sums, and accumulation of sums of blocks with separate scales.
#pragma once
#include "multiply_tiles.h"
#include "product.h"
#include "quantize.h"

namespace deltaw {

// Initial int32 sums of a panel's columns: minus the left zero point times the sum of each column.
template <class Op>
inline void column_starts(const char *right, int64_t groups, int vecs, int left_zero, int32_t *starts) {
    const Word ones = spread(Op::ONES);
    for (int v = 0; v < vecs; v++) {
        I16 s = zero_i();
        for (int64_t g = 0; g < groups; g++) Op::add(s, ones, load_i(right + 128 * g + 64 * v));
        store_i(starts + 16 * v, s * set_i(Op::LEFT_OFFSET - left_zero));
    }
}

inline void add_starts(float *tile, int rows, int vecs, const int32_t *starts) {
    for (int i = 0; i < rows; i++)
        for (int v = 0; v < vecs; v++) {
            void *at = tile + i * PANEL + 16 * v;
            store_i(at, load_i(at) + load_i(starts + 16 * v));
        }
}

// tile (ROWS, 16·VECS) = or += (starts + left · right) times a scale per row. A separate function, because the compiler
// would not keep the sums in registers if it were inlined.
template <class Op, int ROWS, int VECS, bool FRESH>
__attribute__((noinline)) void scaled_product(const char *left, int64_t stride, const char *right, int64_t groups, const int32_t *starts,
                                              const float *scales, int64_t blocks, float *tile) {
    typename Op::Sum s[ROWS][VECS];
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 2
        for (int v = 0; v < VECS; v++) s[i][v] = load_i(starts + 16 * v);
    add_products<Op, ROWS, VECS>(left, stride, right, groups, s);
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++) {
        const F16 by = set_f(scales[i * blocks]);
#pragma GCC unroll 2
        for (int v = 0; v < VECS; v++) {
            float *const at = tile + i * PANEL + 16 * v;
            store16(at, FRESH ? to_f(s[i][v]) * by : fma(to_f(s[i][v]), by, load16(at)));
        }
    }
}

// tile (ROWS, 16·VECS) = or += the sum over blocks of the left side of int32 sums times the row's scale of the block.
template <class Op, int ROWS, int VECS>
inline void add_blocks(const char *left, int64_t stride, const char *right, int64_t groups, const int32_t *starts, const float *scales,
                       int64_t blocks, bool fresh, float *tile) {
    const int64_t groups_per_block = INT8_BLOCK / Op::PER_GROUP;
    for (int64_t g = 0; g < groups; g += groups_per_block, starts += PANEL, scales++, fresh = false) {
        const auto add = fresh ? scaled_product<Op, ROWS, VECS, true> : scaled_product<Op, ROWS, VECS, false>;
        add(left + 4 * g, stride, right + 128 * g, std::min(groups_per_block, groups - g), starts, scales, blocks, tile);
    }
}

#ifdef DW_AMX
// tile (rows, 16·VECS) = or += int32 sums times a scale per row; scales are `blocks` numbers apart.
template <int VECS, bool FRESH>
inline void add_scaled(int rows, const float *sums, const float *scales, int64_t blocks, float *tile) {
    for (int i = 0; i < rows; i++, sums += PANEL, tile += PANEL, scales += blocks) {
        const F16 by = set_f(*scales);
#pragma GCC unroll 2
        for (int v = 0; v < VECS; v++) {
            const F16 x = to_f(load_i(sums + 16 * v));
            store16(tile + 16 * v, FRESH ? x * by : fma(x, by, load16(tile + 16 * v)));
        }
    }
}

// The same with AMX tiles.
template <class Op, class StepWork>
inline void add_blocks_in_tiles(int rows, int vecs, const char *left, int64_t stride, const char *right, int64_t groups, const int32_t *starts,
                                const float *scales, int64_t blocks, bool fresh, float *tile, StepWork &step_work) {
    const int64_t groups_per_block = INT8_BLOCK / Op::PER_GROUP;
    alignas(64) float sums[2 * tiles::ROWS * PANEL];
    for (int64_t g = 0; g < groups; g += groups_per_block, starts += PANEL, scales++, fresh = false) {
        tiles::multiply_rows_in_tiles<Op>(rows, vecs, left + 4 * g, stride, right + 128 * g, std::min(groups_per_block, groups - g),
                                          (const float *)starts, 0, sums,
                                    PANEL, {}, step_work);
        if (vecs == 2) fresh ? add_scaled<2, true>(rows, sums, scales, blocks, tile) : add_scaled<2, false>(rows, sums, scales, blocks, tile);
        else fresh ? add_scaled<1, true>(rows, sums, scales, blocks, tile) : add_scaled<1, false>(rows, sums, scales, blocks, tile);
    }
}
#endif

template <class Op>
inline void add_int8_blocks(int rows, int vecs, const char *left, int64_t stride, const char *right, int64_t groups, const int32_t *starts,
                          const float *scales, int64_t blocks, bool fresh, float *tile) {
    with_rows(rows, [&](auto count) {
        with_vecs(vecs, [&](auto wide, int v) {
            add_blocks<Op, decltype(count)::value, decltype(wide)::value>(left, stride, right + 64 * v, groups, starts + 16 * v, scales, blocks,
                                                                           fresh, tile + 16 * v);
        });
    });
}

}  // namespace deltaw
