// Products in tiles of AMX: up to 32 rows of the left side times a panel of 32 columns are four tiles of sums, to which
// each step adds 16 groups. Panels are the same as for other products; the left side is read as it lies.
#pragma once
#include "multiply.h"
#include "tiles.h"

namespace deltaw {

#ifdef DW_AMX

struct TilesBF16 : OpBF16 {
    // `count` numbers, and zeros up to `room`.
    static void widen(const Left *from, int64_t count, int64_t room, void *to) {
        for (int64_t k = 0; k < room; k += 16) store_u16((bf16 *)to + k, load_u16(from + k, first(count - k)), first(room - k));
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
template <> struct Ready<TilesBF16> : UseOfTiles {};
template <> struct Ready<TilesInt8> : UseOfTiles {};
template <> struct InRegisters<TilesBF16> { typedef OpBF16 type; };

namespace tiles {

const int64_t GROUPS = 16;  // of a step

// One step: rows of the left side from `low` and from `high` on times 16 lines of the panel. The panel stays in the
// first-level cache, where the left side only passes by.
template <class Op, int LEFTS, int VECS>
inline __attribute__((always_inline)) void step(const char *low, const char *high, int64_t stride, const char *right) {
    load<6>(right, 128);
    load_passing<4>(low, stride);
    Op::template add_tiles<0, 4, 6>();
    if constexpr (VECS == 2) {
        load<7>(right + 64, 128);
        Op::template add_tiles<1, 4, 7>();
    }
    if constexpr (LEFTS == 2) {
        load_passing<5>(high, stride);
        Op::template add_tiles<2, 5, 6>();
        if constexpr (VECS == 2) Op::template add_tiles<3, 5, 7>();
    }
}

// `count` lines of a step's 16, each with `lanes` of 4 bytes that count, where the rest is zeros.
inline void copy_padded(const char *from, int64_t stride, int64_t count, int64_t room, First lanes, int64_t bytes, char *to) {
    for (int64_t i = 0; i < room; i++) store_i(to + i * bytes, i < count ? load_i(from + i * stride, lanes) : zero_i());
}

// What is done between the steps of a product, while tiles are multiplied: nothing.
struct Nothing {
    void operator()() const {}
};

// Sums += left · right, with beside() between the steps. The last groups, where they are fewer than a step's, are copied:
// what lies beyond them may be no number.
template <class Op, int LEFTS, int VECS, class Beside>
inline void add_steps(int rows, const char *left, int64_t stride, const char *right, int64_t groups, Beside &beside) {
    // The second tile's first row: where there are less than twice 16 rows, some are in both.
    const int64_t second = LEFTS == 2 ? rows - ROWS : 0;
    int64_t g = 0;
    for (; g + GROUPS <= groups; g += GROUPS) {
        step<Op, LEFTS, VECS>(left + 4 * g, left + second * stride + 4 * g, stride, right + 128 * g);
        beside();
    }
    if (g == groups) return;
    alignas(64) char last_left[2 * ROWS * BYTES], last_right[GROUPS * 128];
    copy_padded(left + 4 * g, stride, rows, rows, first(groups - g), BYTES, last_left);
    for (int v = 0; v < VECS; v++) copy_padded(right + 128 * g + 64 * v, 128, groups - g, GROUPS, first(16), 128, last_right + 64 * v);
    step<Op, LEFTS, VECS>(last_left, last_left + second * BYTES, BYTES, last_right);
    beside();
}

template <int LEFTS, int VECS>
inline void begin_sums(int64_t second, const float *from, int64_t from_ld) {
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
inline void end_sums(int64_t second, float *tile, int64_t ld) {
    const int64_t step = ld * 4;
    float *const high = tile + second * ld;
    store<0>(tile, step);
    if constexpr (VECS == 2) store<1>(tile + 16, step);
    if constexpr (LEFTS == 2) store<2>(high, step);
    if constexpr (LEFTS == 2 && VECS == 2) store<3>(high + 16, step);
}

// A product that is added to the sums of another before they are stored; null on the left for none.
struct More {
    const char *left = nullptr;
    int64_t stride = 0;
    const char *right = nullptr;
    int64_t groups = 0;
};

// At most 16 rows, or with two left tiles up to 32. `from` is null where sums begin with nothing.
template <class Op, int LEFTS, int VECS, class Beside>
__attribute__((noinline)) void product(int rows, const char *left, int64_t stride, const char *right, int64_t groups, const float *from,
                                       int64_t from_ld, float *tile, int64_t ld, const More &more, Beside &beside) {
    const int64_t second = LEFTS == 2 ? rows - ROWS : 0;
    begin_sums<LEFTS, VECS>(second, from, from_ld);
    add_steps<Op, LEFTS, VECS>(rows, left, stride, right, groups, beside);
    if (more.left) add_steps<Op, LEFTS, VECS>(rows, more.left, more.stride, more.right, more.groups, beside);
    end_sums<LEFTS, VECS>(second, tile, ld);
}

// Rows of one go, and what is done with them: no rest is left with fewer than 16 rows unless all are fewer.
inline int rows_at_once(int64_t rows) { return rows <= 2 * ROWS ? (int)rows : rows < 3 * ROWS ? ROWS : 2 * ROWS; }

// As many rows as rows_at_once gives.
template <class Op, class Beside>
inline void products_at_once(int rows, int vecs, const char *left, int64_t stride, const char *right, int64_t groups, const float *from, int64_t from_ld,
                             float *tile, int64_t ld, const More &more, Beside &beside) {
    auto with = [&](auto lefts, auto wide) {
        product<Op, decltype(lefts)::value, decltype(wide)::value>(rows, left, stride, right, groups, from, from_ld, tile, ld, more, beside);
    };
    auto of_width = [&](auto lefts) { vecs == 2 ? with(lefts, Constant<2>()) : with(lefts, Constant<1>()); };
    if (rows > ROWS) return of_width(Constant<2>());
    if (rows == ROWS) return of_width(Constant<1>());
    const FewRows fewer(rows);
    of_width(Constant<1>());
}

}  // namespace tiles

template <class Op, bool ONTO>
inline void products_in_tiles(int64_t rows, int vecs, const char *left, int64_t stride, const char *right, int64_t groups, const float *from,
                              int64_t from_ld, float *tile, int64_t ld) {
    tiles::Nothing nothing;
    for (int64_t i = 0; i < rows;) {
        const int n = tiles::rows_at_once(rows - i);
        tiles::products_at_once<Op>(n, vecs, left + i * stride, stride, right, groups, ONTO ? from + i * from_ld : nullptr, from_ld, tile + i * ld, ld,
                                    {}, nothing);
        i += n;
    }
}

#endif

}  // namespace deltaw
