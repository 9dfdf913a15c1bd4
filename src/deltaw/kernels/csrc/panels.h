// fp32 matrices in panels of 32 columns, the layout that products read on both sides.
#pragma once
#include <algorithm>
#include <cstring>

#include "multiply.h"

namespace deltaw {

const int64_t PANEL = 32;

inline int64_t num_panels(int64_t columns) { return (columns + PANEL - 1) / PANEL; }

// A matrix (rows, columns). Column c of row r is panel(c / 32)[32 · r + c % 32]. Columns beyond the last are padding.
struct Panels {
    float *at;
    int64_t rows, columns;

    static int64_t numbers(int64_t rows, int64_t columns) { return num_panels(columns) * rows * PANEL; }
    int64_t size() const { return numbers(rows, columns); }
    int64_t panels() const { return num_panels(columns); }
    float *panel(int64_t index) const { return at + index * rows * PANEL; }
    float *row(int64_t panel_index, int64_t row) const { return panel(panel_index) + row * PANEL; }
    void clear() const { memset(at, 0, size() * sizeof(float)); }
    // The same memory as a matrix with fewer rows.
    Panels with_rows(int64_t count) const { return {at, count, columns}; }
};

// out += left · right.
inline void multiply_onto(const Panels &left, const Panels &right, const Panels &out) {
    for (int64_t j = 0; j < right.panels(); j++)
        for (int64_t p = 0; p < left.panels(); p++)
            products_onto<OpF32>(left.rows, 2, (const char *)left.panel(p), PANEL * 4, (const char *)right.row(j, p * PANEL),
                                 std::min(PANEL, left.columns - p * PANEL), out.panel(j), PANEL, out.panel(j), PANEL);
}
// out = left · right.
inline void multiply(const Panels &left, const Panels &right, const Panels &out) {
    out.clear();
    multiply_onto(left, right, out);
}

// out = inᵀ. Padding columns of `out` become 0.
inline void transpose(const Panels &in, const Panels &out) {
    for (int64_t r = 0; r < num_panels(in.rows) * PANEL; r += 16)
        for (int64_t c = 0; c < in.columns; c += 16) {
            I16 block[16];
            for (int64_t i = 0; i < 16; i++) block[i] = r + i < in.rows ? load_i(in.row(c / PANEL, r + i) + c % PANEL) : zero_i();
            transpose16(block);
            const int64_t count = std::min<int64_t>(16, in.columns - c);
            for (int64_t i = 0; i < count; i++) store_i(out.row(r / PANEL, c + i) + r % PANEL, block[i]);
        }
}

// out = factors[row] · in, for each row. `out` can be `in`.
inline void scale_rows(const Panels &in, const float *factors, const Panels &out) {
    for (int64_t p = 0; p < in.panels(); p++)
        for (int64_t r = 0; r < in.rows; r++) {
            const F16 by = set_f(factors[r]);
            for (int64_t c = 0; c < PANEL; c += 16) store16(out.row(p, r) + c, load16(in.row(p, r) + c) * by);
        }
}
// out += factors[row] · in, for each row.
inline void add_scaled_rows(const Panels &in, const float *factors, const Panels &out) {
    for (int64_t p = 0; p < in.panels(); p++)
        for (int64_t r = 0; r < in.rows; r++) {
            const F16 by = set_f(factors[r]);
            for (int64_t c = 0; c < PANEL; c += 16) store16(out.row(p, r) + c, fma(load16(in.row(p, r) + c), by, load16(out.row(p, r) + c)));
        }
}
// sums[row] += sign · Σ a · b over the row. Padding columns must be 0 in one of both.
inline void add_row_dots(const Panels &a, const Panels &b, float sign, float *sums) {
    for (int64_t r = 0; r < a.rows; r++) {
        F16 sum = zero_f();
        for (int64_t p = 0; p < a.panels(); p++)
            for (int64_t c = 0; c < PANEL; c += 16) sum = fma(load16(a.row(p, r) + c), load16(b.row(p, r) + c), sum);
        sums[r] += sign * sum_lanes(sum);
    }
}
inline void add_to(const Panels &in, const Panels &out) {
    for (int64_t i = 0; i < in.size(); i += 16) store16(out.at + i, load16(out.at + i) + load16(in.at + i));
}

// Read `rows` rows of `columns` numbers, `ld` apart. Padding columns become 0.
template <class T>
inline void load_rows(const T *from, int64_t ld, const Panels &to) {
    for (int64_t p = 0; p < to.panels(); p++)
        for (int64_t r = 0; r < to.rows; r++)
            for (int64_t c = 0; c < PANEL; c += 16)
                store16(to.row(p, r) + c, load16(from + r * ld + p * PANEL + c, first(to.columns - p * PANEL - c)));
}
template <class T>
inline void store_rows(const Panels &from, T *to, int64_t ld) {
    for (int64_t p = 0; p < from.panels(); p++)
        for (int64_t r = 0; r < from.rows; r++)
            for (int64_t c = 0; c < PANEL && p * PANEL + c < from.columns; c += 16)
                store16(to + r * ld + p * PANEL + c, load16(from.row(p, r) + c), first(from.columns - p * PANEL - c));
}

// to += from, for rows `ld` apart.
inline void add_rows(const Panels &from, float *to, int64_t ld) {
    for (int64_t p = 0; p < from.panels(); p++)
        for (int64_t r = 0; r < from.rows; r++)
            for (int64_t c = 0; c < PANEL && p * PANEL + c < from.columns; c += 16) {
                float *const at = to + r * ld + p * PANEL + c;
                const First m = first(from.columns - p * PANEL - c);
                store16(at, load16(at, m) + load16(from.row(p, r) + c), m);
            }
}

}  // namespace deltaw
