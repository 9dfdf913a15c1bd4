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
    explicit Finishing(const Product &p) : p(p) {}

    // Rows m …, columns n0 … of the product; `low`: the low-rank part of the same tile where it is not in the sums, or null.
    void begin(const float *sums, int count, int wide, bool of_int32, int64_t m, int64_t n0, const float *low_products) {
        tile = sums, low = low_products, rows = count, vecs = wide, from_int32 = of_int32, row = m, column = n0, at = 0;
    }
    void some(int count) {
        const int stop = std::min(rows, at + count);
        if (at == stop) return;
        p.out_type == F32 ? of_type<float>(stop) : of_type<bf16>(stop);
        at = stop;
    }
    void rest() { some(rows); }

  private:
    const Product &p;
    const float *tile = nullptr, *low = nullptr;
    int rows = 0, vecs = 0, at = 0;
    bool from_int32 = false;
    int64_t row = 0, column = 0;

    template <class T>
    void of_type(int stop) const {
        const bool scaled = from_int32 || p.row_scale || p.column_scale;
        if (vecs == 2) scaled ? write<T, 2, true>(stop) : write<T, 2, false>(stop);
        else scaled ? write<T, 1, true>(stop) : write<T, 1, false>(stop);
    }

    // All that is asked of the product is copied first, since what is written might change it for all that a compiler knows.
    template <class T, int VECS, bool SCALED>
    void write(int stop) const {
        F16 bias[VECS], by_column[VECS];
        First mask[VECS];
#pragma GCC unroll 2
        for (int v = 0; v < VECS; v++) {
            const int64_t n = column + 16 * v;
            mask[v] = first(p.N - n), bias[v] = bias_of(p, n, mask[v]);
            by_column[v] = SCALED && p.column_scale ? load16(p.column_scale + n, mask[v]) : set_f(1.0f);
        }
        const F16 scale = set_f(p.out_scale);
        const bool whole = VECS == 2 && p.N - column >= PANEL, int32 = from_int32;
        const int64_t out_ld = p.out_ld, added_ld = p.added_ld;
        const float *sums = tile + at * PANEL, *more = low ? low + at * PANEL : nullptr, *by_row = p.row_scale ? p.row_scale + row + at : nullptr;
        const T *added = p.added ? (const T *)p.added + (row + at) * added_ld + column : nullptr;
        T *out = p.transposed ? nullptr : (T *)p.out + (row + at) * out_ld + column;
        for (int i = at; i < stop; i++, sums += PANEL) {
            F16 y[VECS];
#pragma GCC unroll 2
            for (int v = 0; v < VECS; v++) {
                y[v] = SCALED && int32 ? to_f(load_i(sums + 16 * v)) : load16(sums + 16 * v);
                if (SCALED) y[v] = y[v] * by_column[v];
                if (SCALED && by_row) y[v] = y[v] * set_f(*by_row);
                if (more) y[v] = y[v] + load16(more + 16 * v);
                y[v] = fma(y[v], scale, bias[v]);
                if (added) y[v] = y[v] + load16(added + 16 * v, mask[v]);
            }
            if (more) more += PANEL;
            if (by_row) by_row++;
            if (added) added += added_ld;
            if (!out) {
                for (int v = 0; v < VECS; v++) store_transposed(p, row + i, column + 16 * v, y[v]);
                continue;
            }
            if (whole) store_both(out, y[0], y[VECS - 1]);
            else
                for (int v = 0; v < VECS; v++) store16(out + 16 * v, y[v], mask[v]);
            out += out_ld;
        }
    }

    static void store_both(bf16 *to, F16 one, F16 two) { store_i(to, bf16_bits_of_both(one, two)); }
    static void store_both(float *to, F16 one, F16 two) { store16(to, one), store16(to + 16, two); }
};

}  // namespace deltaw
