// Epilogue of a tile of sums while it is in the first-level cache: scales, low-rank part, bias, addend and store.
#pragma once
#include "product.h"

namespace deltaw {

// Store a row of 16 sums, starting at column n, transposed in fp32.
inline void store_transposed(const Product &p, int64_t row, int64_t n, F16 y) {
    alignas(64) float lanes[16];
    store16(lanes, y);
    float *const out = (float *)p.out;
    for (int j = 0; j < 16 && n + j < p.N; j++) out[(n + j) * p.out_ld + row] = lanes[j];
}

inline F16 bias_of(const Product &p, int64_t n, First mask) {
    if (!p.bias) return zero_f();
    return p.bias_f32 || p.out_type == F32 ? load16((const float *)p.bias + n, mask) : load16((const bf16 *)p.bias + n, mask);
}

// Low-rank part of a tile: rows of the left side in multiplied form, `stride` bytes apart, starting at the tile's first
// row, and the packed right side.
struct LowRank {
    const char *left, *right;
    int64_t stride, groups;
};

// Convert int32 or fp32 sums to fp32 scaled by row and column, in place.
inline void scale_sums(const Product &p, int rows, int vecs, float *tile, bool from_int32, int64_t m, int64_t n0) {
    for (int v = 0; v < vecs; v++) {
        const int64_t n = n0 + 16 * v;
        const F16 by_column = p.column_scale ? load16(p.column_scale + n, first(p.N - n)) : set_f(1.0f);
        for (int i = 0; i < rows; i++) {
            float *const at = tile + i * PANEL + 16 * v;
            F16 x = (from_int32 ? to_f(load_i(at)) : load16(at)) * by_column;
            if (p.row_scale) x = x * set_f(p.row_scale[m + i]);
            store16(at, x);
        }
    }
}

// Store sums as type T with bias and addend.
template <class T>
inline void write_sums(const Product &p, int rows, int vecs, const float *tile, int64_t m, int64_t n0) {
    const F16 scale = set_f(p.out_scale);
    for (int v = 0; v < vecs; v++) {
        const int64_t n = n0 + 16 * v;
        const First mask = first(p.N - n);
        const F16 bias = bias_of(p, n, mask);
        for (int i = 0; i < rows; i++) {
            const int64_t row = m + i;
            F16 y = fma(load16(tile + i * PANEL + 16 * v), scale, bias);
            if (p.addend) y = y + load16((const T *)p.addend + row * p.addend_ld + n, mask);
            if (p.transposed) store_transposed(p, row, n, y);
            else store16((T *)p.out + row * p.out_ld + n, y, mask);
        }
    }
}

// Finish a tile (rows, 16·vecs) of sums for rows m … and columns n0 …. Overwrites the tile.
template <class LowOp>
inline void finish_rows(int rows, int vecs, const Product &p, float *tile, bool from_int32, int64_t m, int64_t n0, const LowRank &low) {
    if (from_int32 || p.column_scale || p.row_scale) scale_sums(p, rows, vecs, tile, from_int32, m, n0);
    if (low.groups) products_onto<LowOp>(rows, vecs, low.left, low.stride, low.right, low.groups, tile, PANEL, tile, PANEL);
    if (p.out_type == F32) write_sums<float>(p, rows, vecs, tile, m, n0);
    else write_sums<bf16>(p, rows, vecs, tile, m, n0);
}

// Scales, bias and low-rank part of a panel's columns, loaded once for all of its rows.
struct ColumnScales {
    alignas(64) float bias[PANEL], scale[PANEL];

    void load(const Product &p, int64_t n0) {
        for (int v = 0; v < 2; v++) {
            const int64_t n = n0 + 16 * v;
            const First mask = first(p.N - n);
            store16(bias + 16 * v, bias_of(p, n, mask));
            store16(scale + 16 * v, p.column_scale ? load16(p.column_scale + n, mask) : set_f(1.0f));
        }
    }
};

inline F16 as_float(F16 sum) { return sum; }
inline F16 as_float(I16 sum) { return to_f(sum); }
template <int VECS, class T>
inline __attribute__((always_inline)) void store_row(T *to, const F16 *y) {
    if constexpr (VECS == 2 && std::is_same<T, bf16>::value) store_i(to, bf16_bits_concat(y[0], y[1]));
    else
        for (int v = 0; v < VECS; v++) store16(to + 16 * v, y[v]);
}

// Initial value of sums: zero, earlier sums of the same kind, or for blocks of int8 numbers with scales, the fp32 sums
// of earlier blocks.
enum InitialSums { FROM_ZERO, FROM_SUMS, FROM_BLOCKS };

// Sums of a tile before its last product: `from` is null or the sums so far, `from_ld` numbers from row to row.
struct PreviousSums {
    const float *from = nullptr;
    int64_t from_ld = 0;
    const int32_t *starts = nullptr;  // of a block of int8 numbers
    const float *scales = nullptr;  // the block's scale in each row, `blocks` numbers apart
    int64_t blocks = 0;
};

// Compute the last product of MAX_ROWS rows from m and 16·VECS columns from n of a complete panel, and all operations
// on the sums, without storing intermediate sums. Results are bitwise equal to those of finish_rows.
template <class Op, class LowOp, class T, InitialSums INITIAL, int VECS>
__attribute__((noinline)) void product_out(const Product &p, const char *left, int64_t stride, const char *right, int64_t groups,
                                           const PreviousSums &previous,
                                           const LowRank &low, const ColumnScales &columns, int64_t m, int64_t n) {
    constexpr int ROWS = MAX_ROWS;
    const int64_t panel_column = n % PANEL, out_ld = p.out_ld, addend_ld = p.addend_ld, from_ld = previous.from_ld;
    const float *const from = previous.from;
    T *const out = (T *)p.out + m * out_ld + n;
    const T *const addend = p.addend ? (const T *)p.addend + m * addend_ld + n : nullptr;
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++) __builtin_prefetch(out + i * out_ld, 1);
    if (addend)
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; i++) __builtin_prefetch(addend + i * addend_ld);

    typename Op::Sum s[ROWS][VECS];
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 2
        for (int v = 0; v < VECS; v++)
            s[i][v] = INITIAL == FROM_ZERO ? Op::zero()
                                           : Op::load(INITIAL == FROM_BLOCKS ? (const float *)previous.starts + 16 * v : from + i * from_ld + 16 * v);
    add_products<Op, ROWS, VECS>(left, stride, right, groups, s);

    F16 y[ROWS][VECS];
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 2
        for (int v = 0; v < VECS; v++) y[i][v] = as_float(s[i][v]);
    if (INITIAL == FROM_BLOCKS) {
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; i++) {
            const F16 by = set_f(previous.scales[i * previous.blocks]);
#pragma GCC unroll 2
            for (int v = 0; v < VECS; v++) y[i][v] = from ? fma(y[i][v], by, load16(from + i * from_ld + 16 * v)) : y[i][v] * by;
        }
    }
    if (p.column_scale || p.row_scale) {
        const float *const by_row = p.row_scale ? p.row_scale + m : nullptr;
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; i++) {
            const F16 by = by_row ? set_f(by_row[i]) : set_f(1.0f);
#pragma GCC unroll 2
            for (int v = 0; v < VECS; v++) y[i][v] = y[i][v] * load16(columns.scale + panel_column + 16 * v) * by;
        }
    }
    add_products<LowOp, ROWS, VECS>(low.left, low.stride, low.right, low.groups, y);

    const F16 scale = set_f(p.out_scale);
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++) {
#pragma GCC unroll 2
        for (int v = 0; v < VECS; v++) {
            y[i][v] = fma(y[i][v], scale, load16(columns.bias + panel_column + 16 * v));
            if (addend) y[i][v] = y[i][v] + load16(addend + i * addend_ld + 16 * v);
        }
        store_row<VECS>(out + i * out_ld, y[i]);
    }
}

// Memory of rows m … and columns n0 … of the result.
inline Prefetcher result_memory(const Product &p, int64_t m, int rows, int64_t n0) {
    Prefetcher prefetcher;
    if (p.transposed) return prefetcher;
    const int64_t size = p.out_type == F32 ? 4 : 2;
    prefetcher.base = (const char *)p.out + (m * p.out_ld + n0) * size;
    prefetcher.stride = p.out_ld * size, prefetcher.bytes = std::min<int64_t>(p.N - n0, PANEL) * size, prefetcher.rows = rows;
    return prefetcher;
}

// Writes a tile of sums a number of rows at a time, interleaved with the products of the next tile.
class TileWriter {
  public:
    explicit TileWriter(const Product &p)
        : p(p), out_step(p.out_ld * number_size()), added_step(p.addend_ld * number_size()) {}

    // Start with rows m … and columns n0 …. `low_products`: the low-rank part of the tile if it is not included in the
    // sums, or null.
    void begin(const float *tile, int count, int vecs, bool is_int32, int64_t m, int64_t n0, const float *low_products) {
        sums = tile, low = low_products, remaining = count, from_int32 = is_int32, row = m, column = n0;
        out = (char *)p.out + n0 * number_size() + m * out_step;
        if (p.addend) addend = (const char *)p.addend + n0 * number_size() + m * added_step;
        for (int v = 0; v < vecs; v++) {
            const First mask = first(p.N - n0 - 16 * v);
            store16(bias + 16 * v, bias_of(p, n0 + 16 * v, mask));
            store16(by_column + 16 * v, p.column_scale ? load16(p.column_scale + n0 + 16 * v, mask) : set_f(1.0f));
        }
        write = p.out_type == F32 ? writer<float>(vecs) : writer<bf16>(vecs);
    }
    void write_rows(int count) {
        if (!remaining) return;
        count = std::min(count, remaining);
        remaining -= count;
        write(*this, count);
    }
    void write_rest() { write_rows(remaining); }

  private:
    typedef void (*Write)(TileWriter &, int);

    const Product &p;
    const int64_t out_step, added_step;  // in bytes
    int remaining = 0;  // rows to write
    bool from_int32 = false;
    const float *sums = nullptr, *low = nullptr;
    char *out = nullptr;
    const char *addend = nullptr;
    int64_t row = 0, column = 0;
    Write write = nullptr;
    alignas(64) float bias[PANEL], by_column[PANEL];

    int64_t number_size() const { return p.out_type == F32 ? 4 : 2; }

    template <class T>
    Write writer(int vecs) const {
        if (p.transposed || p.N - column < PANEL) return vecs == 2 ? write_any<T, 2, false> : write_any<T, 1, false>;
        if (low || from_int32 || p.row_scale || p.column_scale) return write_any<T, 2, true>;
        return p.addend ? write_plain<T, true> : write_plain<T, false>;
    }

    // Write `count` rows of 32 sums that need only bias and addend. Inputs are loaded before any store, since the
    // compiler must assume that stores alias them.
    template <class T, bool ADDED>
    static void write_plain(TileWriter &f, int count) {
        const F16 scale = set_f(f.p.out_scale), bias[2] = {load16(f.bias), load16(f.bias + 16)};
        const int64_t out_step = f.out_step, added_step = f.added_step;
        const float *sums = f.sums;
        const char *addend = f.addend;
        char *out = f.out;
        for (int i = 0; i < count; i++, sums += PANEL, out += out_step) {
            F16 y[2] = {fma(load16(sums), scale, bias[0]), fma(load16(sums + 16), scale, bias[1])};
            if constexpr (ADDED) {
                y[0] = y[0] + load16((const T *)addend), y[1] = y[1] + load16((const T *)addend + 16);
                addend += added_step;
            }
            store_pair((T *)out, y[0], y[1]);
        }
        f.sums = sums, f.addend = addend, f.out = out;
    }

    // Write `count` rows of arbitrary sums. FULL: all 32 columns exist and the result is not transposed.
    template <class T, int VECS, bool FULL>
    static void write_any(TileWriter &f, int count) {
        const Product &p = f.p;
        const F16 scale = set_f(p.out_scale);
        const float *const by_row = p.row_scale ? p.row_scale + f.row : nullptr;
        const bool int32 = f.from_int32;
        const float *sums = f.sums, *low = f.low;
        const char *addend = f.addend;
        char *out = f.out;
        for (int i = 0; i < count; i++, sums += PANEL, out += f.out_step) {
            const F16 row_factor = set_f(by_row ? by_row[i] : 1.0f);
            F16 y[2];
#pragma GCC unroll 2
            for (int v = 0; v < VECS; v++) {
                const First mask = FULL ? first(16) : first(p.N - f.column - 16 * v);
                y[v] = (int32 ? to_f(load_i(sums + 16 * v)) : load16(sums + 16 * v)) * load16(f.by_column + 16 * v) * row_factor;
                if (low) y[v] = y[v] + load16(low + 16 * v);
                y[v] = fma(y[v], scale, load16(f.bias + 16 * v));
                if (addend) y[v] = y[v] + load16((const T *)addend + 16 * v, mask);
                if (FULL) continue;
                if (p.transposed) store_transposed(p, f.row + i, f.column + 16 * v, y[v]);
                else store16((T *)out + 16 * v, y[v], mask);
            }
            if (FULL) store_pair((T *)out, y[0], y[1]);
            if (low) low += PANEL;
            if (addend) addend += f.added_step;
        }
        f.sums = sums, f.low = low, f.addend = addend, f.out = out, f.row += count;
    }

    static void store_pair(bf16 *to, F16 one, F16 two) { store_i(to, bf16_bits_concat(one, two)); }
    static void store_pair(float *to, F16 one, F16 two) { store16(to, one), store16(to + 16, two); }
};

}  // namespace deltaw
