// Products in AMX tiles. Up to 32 rows of the left side times a panel of 32 columns use four tiles of sums, to which
// each step adds 16 groups. Panels have the same layout as for other products. The left side is read in place.
#pragma once
#include "multiply.h"
#include "tiles.h"

namespace deltaw {

#ifdef DW_AMX

struct TilesBF16 : OpBF16 {
    // Copy `count` numbers and pad with zeros to `padded_count`.
    static void widen(const Left *from, int64_t count, int64_t padded_count, void *to) {
        for (int64_t k = 0; k < padded_count; k += 16) store_u16((bf16 *)to + k, load_u16(from + k, first(count - k)), first(padded_count - k));
    }
    template <int SUMS, int LEFT, int RIGHT>
    static void add_tiles() { tiles::add_bf16<SUMS, LEFT, RIGHT>(); }
};
struct TilesInt8 : OpInt8 {
    template <int SUMS, int LEFT, int RIGHT>
    static void add_tiles() { tiles::add_int8<SUMS, LEFT, RIGHT>(); }
};

template <> struct InTiles<TilesBF16> : std::true_type {};
template <> struct InTiles<TilesInt8> : std::true_type {};
template <> struct ProductScope<TilesBF16> : TileScope {};
template <> struct ProductScope<TilesInt8> : TileScope {};
template <> struct RegisterOp<TilesBF16> { typedef OpBF16 type; };

namespace tiles {

const int64_t GROUPS = 16;  // per step

// One step: rows of the left side at `low` and at `high` times 16 lines of the panel. The panel stays in the
// first-level cache. The left side is streamed.
template <class Op, int LEFTS, int VECS>
inline __attribute__((always_inline)) void step(const char *low, const char *high, int64_t stride, const char *right) {
    load<6>(right, 128);
    load_streamed<4>(low, stride);
    Op::template add_tiles<0, 4, 6>();
    if constexpr (VECS == 2) {
        load<7>(right + 64, 128);
        Op::template add_tiles<1, 4, 7>();
    }
    if constexpr (LEFTS == 2) {
        load_streamed<5>(high, stride);
        Op::template add_tiles<2, 5, 6>();
        if constexpr (VECS == 2) Op::template add_tiles<3, 5, 7>();
    }
}

// Copy `count` of a step's 16 lines, each with `lanes` valid words of 4 bytes, and pad with zeros.
inline void copy_padded(const char *from, int64_t stride, int64_t count, int64_t padded_count, First lanes, int64_t bytes, char *to) {
    for (int64_t i = 0; i < padded_count; i++) store_i(to + i * bytes, i < count ? load_i(from + i * stride, lanes) : zero_i());
}

// Empty callback between the steps of a product.
struct NoStepWork {
    void operator()() const {}
};

// Sums += left · right, calling step_work() between the steps. An incomplete last step is copied and padded, because
// memory beyond its groups can contain NaN.
template <class Op, int LEFTS, int VECS, class StepWork>
inline void add_steps(int rows, const char *left, int64_t stride, const char *right, int64_t groups, StepWork &step_work) {
    // First row of the second tile. With fewer than 32 rows, some rows are in both tiles.
    const int64_t second = LEFTS == 2 ? rows - ROWS : 0;
    int64_t g = 0;
    for (; g + GROUPS <= groups; g += GROUPS) {
        step<Op, LEFTS, VECS>(left + 4 * g, left + second * stride + 4 * g, stride, right + 128 * g);
        step_work();
    }
    if (g == groups) return;
    alignas(64) char last_left[2 * ROWS * BYTES], last_right[GROUPS * 128];
    copy_padded(left + 4 * g, stride, rows, rows, first(groups - g), BYTES, last_left);
    for (int v = 0; v < VECS; v++) copy_padded(right + 128 * g + 64 * v, 128, groups - g, GROUPS, first(16), 128, last_right + 64 * v);
    step<Op, LEFTS, VECS>(last_left, last_left + second * BYTES, BYTES, last_right);
    step_work();
}

template <int LEFTS, int VECS>
inline void load_sums(int64_t second, const float *from, int64_t from_ld) {
    if (!from) {
        clear<0>();
        if constexpr (VECS == 2) clear<1>();
        if constexpr (LEFTS == 2) clear<2>();
        if constexpr (LEFTS == 2 && VECS == 2) clear<3>();
        return;
    }
    const int64_t step = from_ld * 4;
    const float *const high = from + second * from_ld;
    load<0>(from, step);
    if constexpr (VECS == 2) load<1>(from + 16, step);
    if constexpr (LEFTS == 2) load<2>(high, step);
    if constexpr (LEFTS == 2 && VECS == 2) load<3>(high + 16, step);
}

template <int LEFTS, int VECS>
inline void store_sums(int64_t second, float *tile, int64_t ld) {
    const int64_t step = ld * 4;
    float *const high = tile + second * ld;
    store<0>(tile, step);
    if constexpr (VECS == 2) store<1>(tile + 16, step);
    if constexpr (LEFTS == 2) store<2>(high, step);
    if constexpr (LEFTS == 2 && VECS == 2) store<3>(high + 16, step);
}

// A second product added to the sums before they are stored. `left` is null if there is no second product.
struct SecondProduct {
    const char *left = nullptr;
    int64_t stride = 0;
    const char *right = nullptr;
    int64_t groups = 0;
};

// Multiply at most 16 rows, or up to 32 with two left tiles. If `from` is null, sums start at zero.
template <class Op, int LEFTS, int VECS, class StepWork>
__attribute__((noinline)) void product(int rows, const char *left, int64_t stride, const char *right, int64_t groups, const float *from,
                                       int64_t from_ld, float *tile, int64_t ld, const SecondProduct &second_product, StepWork &step_work) {
    const int64_t second = LEFTS == 2 ? rows - ROWS : 0;
    load_sums<LEFTS, VECS>(second, from, from_ld);
    add_steps<Op, LEFTS, VECS>(rows, left, stride, right, groups, step_work);
    if (second_product.left) add_steps<Op, LEFTS, VECS>(rows, second_product.left, second_product.stride, second_product.right,
                                                        second_product.groups, step_work);
    store_sums<LEFTS, VECS>(second, tile, ld);
}

// Rows per call. Chosen so that a remainder below 16 rows occurs only if there are fewer than 16 rows in total.
inline int max_tile_rows(int64_t rows) { return rows <= 2 * ROWS ? (int)rows : rows < 3 * ROWS ? ROWS : 2 * ROWS; }

// Multiply a number of rows returned by max_tile_rows.
template <class Op, class StepWork>
inline void multiply_rows_in_tiles(int rows, int vecs, const char *left, int64_t stride, const char *right, int64_t groups, const float *from,
                                   int64_t from_ld,
                             float *tile, int64_t ld, const SecondProduct &second_product, StepWork &step_work) {
    auto run = [&](auto lefts, auto wide) {
        product<Op, decltype(lefts)::value, decltype(wide)::value>(rows, left, stride, right, groups, from, from_ld, tile, ld,
                                                                   second_product, step_work);
    };
    auto run_width = [&](auto lefts) { vecs == 2 ? run(lefts, Constant<2>()) : run(lefts, Constant<1>()); };
    if (rows > ROWS) return run_width(Constant<2>());
    if (rows == ROWS) return run_width(Constant<1>());
    const RowCountScope row_count(rows);
    run_width(Constant<1>());
}

}  // namespace tiles

template <class Op, bool ONTO>
inline void products_in_tiles(int64_t rows, int vecs, const char *left, int64_t stride, const char *right, int64_t groups, const float *from,
                              int64_t from_ld, float *tile, int64_t ld) {
    tiles::NoStepWork no_work;
    for (int64_t i = 0; i < rows;) {
        const int n = tiles::max_tile_rows(rows - i);
        tiles::multiply_rows_in_tiles<Op>(n, vecs, left + i * stride, stride, right, groups, ONTO ? from + i * from_ld : nullptr, from_ld,
                                          tile + i * ld, ld,
                                    {}, no_work);
        i += n;
    }
}

#endif

}  // namespace deltaw
