// What becomes of a tile of sums, while it is in the first-level cache: scales, the low-rank part, bias and what is added, and
// out.
#pragma once
#include "product.h"

namespace deltaw {

// ROWS sums of 16 columns from n on go out in fp32, transposed.
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

// The low-rank side: rows of the left as they are multiplied, `stride` bytes apart, the first for the tile's first row; and
// the right side, laid out.
struct LowRank {
    const char *left, *right;
    int64_t stride, groups;
};

// int32 or fp32 sums become fp32 times their row's and column's scale, in place.
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

// Sums go out as numbers of type T, with bias and what is added.
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
            if (p.added) y = y + load16((const T *)p.added + row * p.added_ld + n, mask);
            if (p.transposed) store_transposed(p, row, n, y);
            else store16((T *)p.out + row * p.out_ld + n, y, mask);
        }
    }
}

// A tile (rows, 16·vecs) of sums, rows m …, columns n0 …, which is changed on the way.
template <class LowOp>
inline void finish_rows(int rows, int vecs, const Product &p, float *tile, bool from_int32, int64_t m, int64_t n0, const LowRank &low) {
    if (from_int32 || p.column_scale || p.row_scale) scale_sums(p, rows, vecs, tile, from_int32, m, n0);
    if (low.groups) products_onto<LowOp>(rows, vecs, low.left, low.stride, low.right, low.groups, tile, PANEL, tile, PANEL);
    if (p.out_type == F32) write_sums<float>(p, rows, vecs, tile, m, n0);
    else write_sums<bf16>(p, rows, vecs, tile, m, n0);
}

// What the sums of a panel's columns are given when they go out, read once for all of its rows.
struct Columns {
    alignas(64) float bias[PANEL], scale[PANEL];

    void of(const Product &p, int64_t n0) {
        for (int v = 0; v < 2; v++) {
            const int64_t n = n0 + 16 * v;
            const First mask = first(p.N - n);
            store16(bias + 16 * v, bias_of(p, n, mask));
            store16(scale + 16 * v, p.column_scale ? load16(p.column_scale + n, mask) : set_f(1.0f));
        }
    }
};

inline F16 float_of(F16 sum) { return sum; }
inline F16 float_of(I16 sum) { return to_f(sum); }
template <int VECS, class T>
inline __attribute__((always_inline)) void store_row(T *to, const F16 *y) {
    if constexpr (VECS == 2 && std::is_same<T, bf16>::value) store_i(to, bf16_bits_of_both(y[0], y[1]));
    else
        for (int v = 0; v < VECS; v++) store16(to + 16 * v, y[v]);
}

// What sums are begun with: nothing, numbers of their own kind, or of a block of int8 numbers, whose sums have scales of their
// own, the fp32 sums of the blocks before.
enum Begun { FROM_NOTHING, FROM_SUMS, FROM_BLOCKS };

// Rows of a tile before its last product: `from` is null or the sums so far, `from_ld` numbers from row to row.
struct Before {
    const float *from = nullptr;
    int64_t from_ld = 0;
    const int32_t *starts = nullptr;  // of a block of int8 numbers
    const float *scales = nullptr;    // of it in each row, `blocks` numbers apart
    int64_t blocks = 0;
};

// MOST_ROWS rows from m on, 16·VECS columns from n on of a panel that has all of its columns: the last of the product, left · right,
// and all that is done to the sums, which go out without coming to memory before. They have the bits that finish_rows gives.
template <class Op, class LowOp, class T, Begun BEGUN, int VECS>
__attribute__((noinline)) void product_out(const Product &p, const char *left, int64_t stride, const char *right, int64_t groups, const Before &before,
                                           const LowRank &low, const Columns &columns, int64_t m, int64_t n) {
    constexpr int ROWS = MOST_ROWS;
    const int64_t place = n % PANEL, out_ld = p.out_ld, added_ld = p.added_ld, from_ld = before.from_ld;
    const float *const from = before.from;
    T *const out = (T *)p.out + m * out_ld + n;
    const T *const added = p.added ? (const T *)p.added + m * added_ld + n : nullptr;
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++) __builtin_prefetch(out + i * out_ld, 1);
    if (added)
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; i++) __builtin_prefetch(added + i * added_ld);

    typename Op::Sum s[ROWS][VECS];
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 2
        for (int v = 0; v < VECS; v++)
            s[i][v] = BEGUN == FROM_NOTHING ? Op::zero() : Op::load(BEGUN == FROM_BLOCKS ? (const float *)before.starts + 16 * v : from + i * from_ld + 16 * v);
    add_products<Op, ROWS, VECS>(left, stride, right, groups, s);

    F16 y[ROWS][VECS];
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 2
        for (int v = 0; v < VECS; v++) y[i][v] = float_of(s[i][v]);
    if (BEGUN == FROM_BLOCKS) {
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; i++) {
            const F16 by = set_f(before.scales[i * before.blocks]);
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
            for (int v = 0; v < VECS; v++) y[i][v] = y[i][v] * load16(columns.scale + place + 16 * v) * by;
        }
    }
    add_products<LowOp, ROWS, VECS>(low.left, low.stride, low.right, low.groups, y);

    const F16 scale = set_f(p.out_scale);
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++) {
#pragma GCC unroll 2
        for (int v = 0; v < VECS; v++) {
            y[i][v] = fma(y[i][v], scale, load16(columns.bias + place + 16 * v));
            if (added) y[i][v] = y[i][v] + load16(added + i * added_ld + 16 * v);
        }
        store_row<VECS>(out + i * out_ld, y[i]);
    }
}

// Where rows m … and columns n0 … of the result lie.
inline Ahead place_of_result(const Product &p, int64_t m, int rows, int64_t n0) {
    Ahead ahead;
    if (p.transposed) return ahead;
    const int64_t size = p.out_type == F32 ? 4 : 2;
    ahead.base = (const char *)p.out + (m * p.out_ld + n0) * size;
    ahead.stride = p.out_ld * size, ahead.bytes = std::min<int64_t>(p.N - n0, PANEL) * size, ahead.rows = rows;
    return ahead;
}

// A tile of sums that goes out a few rows at a time, beside the products of the next one.
class Finishing {
  public:
    explicit Finishing(const Product &p)
        : p(p), out_step(p.out_ld * number_size()), added_step(p.added_ld * number_size()) {}

    // Rows m …, columns n0 … of the product; `low_products`: the low-rank part of the same tile where it is not in the sums,
    // or null.
    void begin(const float *tile, int count, int vecs, bool of_int32, int64_t m, int64_t n0, const float *low_products) {
        sums = tile, low = low_products, left = count, from_int32 = of_int32, row = m, column = n0;
        out = (char *)p.out + n0 * number_size() + m * out_step;
        if (p.added) added = (const char *)p.added + n0 * number_size() + m * added_step;
        for (int v = 0; v < vecs; v++) {
            const First mask = first(p.N - n0 - 16 * v);
            store16(bias + 16 * v, bias_of(p, n0 + 16 * v, mask));
            store16(by_column + 16 * v, p.column_scale ? load16(p.column_scale + n0 + 16 * v, mask) : set_f(1.0f));
        }
        write = p.out_type == F32 ? writer<float>(vecs) : writer<bf16>(vecs);
    }
    void some(int count) {
        if (!left) return;
        count = std::min(count, left);
        left -= count;
        write(*this, count);
    }
    void rest() { some(left); }

  private:
    typedef void (*Write)(Finishing &, int);

    const Product &p;
    const int64_t out_step, added_step;  // bytes
    int left = 0;  // rows
    bool from_int32 = false;
    const float *sums = nullptr, *low = nullptr;
    char *out = nullptr;
    const char *added = nullptr;
    int64_t row = 0, column = 0;
    Write write = nullptr;
    alignas(64) float bias[PANEL], by_column[PANEL];

    int64_t number_size() const { return p.out_type == F32 ? 4 : 2; }

    template <class T>
    Write writer(int vecs) const {
        if (p.transposed || p.N - column < PANEL) return vecs == 2 ? write_any<T, 2, false> : write_any<T, 1, false>;
        if (low || from_int32 || p.row_scale || p.column_scale) return write_any<T, 2, true>;
        return p.added ? write_plain<T, true> : write_plain<T, false>;
    }

    // `count` rows of 32 sums of which nothing is asked but bias and what is added. All is copied first, since what is written
    // might change it for all that a compiler knows.
    template <class T, bool ADDED>
    static void write_plain(Finishing &f, int count) {
        const F16 scale = set_f(f.p.out_scale), bias[2] = {load16(f.bias), load16(f.bias + 16)};
        const int64_t out_step = f.out_step, added_step = f.added_step;
        const float *sums = f.sums;
        const char *added = f.added;
        char *out = f.out;
        for (int i = 0; i < count; i++, sums += PANEL, out += out_step) {
            F16 y[2] = {fma(load16(sums), scale, bias[0]), fma(load16(sums + 16), scale, bias[1])};
            if constexpr (ADDED) {
                y[0] = y[0] + load16((const T *)added), y[1] = y[1] + load16((const T *)added + 16);
                added += added_step;
            }
            store_both((T *)out, y[0], y[1]);
        }
        f.sums = sums, f.added = added, f.out = out;
    }

    // `count` rows of any sums. WHOLE: of 32 columns that are there, not transposed.
    template <class T, int VECS, bool WHOLE>
    static void write_any(Finishing &f, int count) {
        const Product &p = f.p;
        const F16 scale = set_f(p.out_scale);
        const float *const by_row = p.row_scale ? p.row_scale + f.row : nullptr;
        const bool int32 = f.from_int32;
        const float *sums = f.sums, *low = f.low;
        const char *added = f.added;
        char *out = f.out;
        for (int i = 0; i < count; i++, sums += PANEL, out += f.out_step) {
            const F16 of_row = set_f(by_row ? by_row[i] : 1.0f);
            F16 y[2];
#pragma GCC unroll 2
            for (int v = 0; v < VECS; v++) {
                const First mask = WHOLE ? first(16) : first(p.N - f.column - 16 * v);
                y[v] = (int32 ? to_f(load_i(sums + 16 * v)) : load16(sums + 16 * v)) * load16(f.by_column + 16 * v) * of_row;
                if (low) y[v] = y[v] + load16(low + 16 * v);
                y[v] = fma(y[v], scale, load16(f.bias + 16 * v));
                if (added) y[v] = y[v] + load16((const T *)added + 16 * v, mask);
                if (WHOLE) continue;
                if (p.transposed) store_transposed(p, f.row + i, f.column + 16 * v, y[v]);
                else store16((T *)out + 16 * v, y[v], mask);
            }
            if (WHOLE) store_both((T *)out, y[0], y[1]);
            if (low) low += PANEL;
            if (added) added += f.added_step;
        }
        f.sums = sums, f.low = low, f.added = added, f.out = out, f.row += count;
    }

    static void store_both(bf16 *to, F16 one, F16 two) { store_i(to, bf16_bits_of_both(one, two)); }
    static void store_both(float *to, F16 one, F16 two) { store16(to, one), store16(to + 16, two); }
};

}  // namespace deltaw
