// Small products whose sums stay in registers: up to 12 rows of the left side, as it lies in memory, times a right
// side that was laid out in groups (see pack_rows16), 16 or 32 columns at a time. All types share one shape of code.
#pragma once
#include "numbers.h"

namespace deltaw {

struct OpF32 {
    typedef float Element;
    static constexpr int PER_GROUP = 1;
    typedef __m512 Sum;
    static Sum zero() { return _mm512_setzero_ps(); }
    static Sum load(const float *p) { return _mm512_loadu_ps(p); }
    static void store(float *p, Sum s) { _mm512_storeu_ps(p, s); }
    static Sum add(Sum s, __m512i a, __m512i b) {
        return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), s);
    }
};
struct OpBF16 {
    typedef bf16 Element;
    static constexpr int PER_GROUP = 2;
    typedef __m512 Sum;
    static Sum zero() { return _mm512_setzero_ps(); }
    static Sum load(const float *p) { return _mm512_loadu_ps(p); }
    static void store(float *p, Sum s) { _mm512_storeu_ps(p, s); }
    // As assembly, since the compiler would copy sums to and fro between registers around its own form.
    static Sum add(Sum s, __m512i a, __m512i b) {
        __asm__("vdpbf16ps %2, %1, %0" : "+v"(s) : "v"(a), "v"(b));
        return s;
    }
};
struct OpInt8 {  // unsigned on the left, signed on the right; sums are integers
    typedef int8_t Element;
    static constexpr int PER_GROUP = 4;
    typedef __m512i Sum;
    static Sum zero() { return _mm512_setzero_si512(); }
    static Sum load(const float *p) { return _mm512_loadu_si512(p); }
    static void store(float *p, Sum s) { _mm512_storeu_si512(p, s); }
    static Sum add(Sum s, __m512i a, __m512i b) {
        __asm__("vpdpbusd %2, %1, %0" : "+v"(s) : "v"(a), "v"(b));
        return s;
    }
};

// s (ROWS, 16·VECS) += left (ROWS rows, `stride` bytes apart) · right (`groups` lines of 128 bytes).
template <class Op, int ROWS, int VECS>
inline void add_products(const char *left, int64_t stride, const char *right, int64_t groups, typename Op::Sum (&s)[ROWS][VECS]) {
    for (int64_t g = 0; g < groups; g++) {
        __m512i b[VECS];
        for (int v = 0; v < VECS; v++) b[v] = _mm512_load_si512(right + 128 * g + 64 * v);
        for (int i = 0; i < ROWS; i++) {
            int32_t word;
            memcpy(&word, left + i * stride + 4 * g, 4);
            __m512i a = _mm512_set1_epi32(word);
            for (int v = 0; v < VECS; v++) s[i][v] = Op::add(s[i][v], a, b[v]);
        }
    }
}

// tile (ROWS, 16·VECS) = from + left · right; without ONTO, from nothing. `from_ld` 0: all rows begin alike.
// A function of its own, since the compiler's loop takes more instructions where it is a part of another.
template <class Op, int ROWS, int VECS, bool ONTO>
__attribute__((noinline)) void product(const char *left, int64_t stride, const char *right, int64_t groups, const float *from, int64_t from_ld, float *tile, int64_t ld) {
    typename Op::Sum s[ROWS][VECS];
    for (int i = 0; i < ROWS; i++)
        for (int v = 0; v < VECS; v++) s[i][v] = ONTO ? Op::load(from + i * from_ld + 16 * v) : Op::zero();
    add_products<Op, ROWS, VECS>(left, stride, right, groups, s);
    for (int i = 0; i < ROWS; i++)
        for (int v = 0; v < VECS; v++) Op::store(tile + i * ld + 16 * v, s[i][v]);
}

const int MOST_ROWS = 12;  // 12 x 2 sums, 2 right and a few left vectors fill the 32 registers

// The largest number of rows that `product` is made for and that is not above `rows`.
inline int rows_at_once(int64_t rows) { return rows >= 12 ? 12 : rows >= 8 ? 8 : rows >= 4 ? 4 : rows >= 2 ? 2 : 1; }

template <class Op, int VECS, bool ONTO>
inline void product_of(int rows, const char *left, int64_t stride, const char *right, int64_t groups, const float *from, int64_t from_ld, float *tile, int64_t ld) {
    switch (rows) {
        case 12: product<Op, 12, VECS, ONTO>(left, stride, right, groups, from, from_ld, tile, ld); break;
        case 8: product<Op, 8, VECS, ONTO>(left, stride, right, groups, from, from_ld, tile, ld); break;
        case 4: product<Op, 4, VECS, ONTO>(left, stride, right, groups, from, from_ld, tile, ld); break;
        case 2: product<Op, 2, VECS, ONTO>(left, stride, right, groups, from, from_ld, tile, ld); break;
        default: product<Op, 1, VECS, ONTO>(left, stride, right, groups, from, from_ld, tile, ld);
    }
}

template <class Op, bool ONTO>
inline void products_from(int64_t rows, int vecs, const char *left, int64_t stride, const char *right, int64_t groups, const float *from,
                          int64_t from_ld, float *tile, int64_t ld) {
    for (int64_t i = 0; i < rows;) {
        const int n = rows_at_once(rows - i);
        const char *l = left + i * stride;
        if (vecs == 2) product_of<Op, 2, ONTO>(n, l, stride, right, groups, from + i * from_ld, from_ld, tile + i * ld, ld);
        else product_of<Op, 1, ONTO>(n, l, stride, right, groups, from + i * from_ld, from_ld, tile + i * ld, ld);
        i += n;
    }
}

// All rows: tile (rows, 16·vecs) = left · right, `ld` floats from row to row.
template <class Op>
inline void products(int64_t rows, int vecs, const char *left, int64_t stride, const char *right, int64_t groups, float *tile, int64_t ld) {
    products_from<Op, false>(rows, vecs, left, stride, right, groups, tile, ld, tile, ld);
}

// The same, added to `from`, which may be the tile.
template <class Op>
inline void products_onto(int64_t rows, int vecs, const char *left, int64_t stride, const char *right, int64_t groups, const float *from,
                          int64_t from_ld, float *tile, int64_t ld) {
    products_from<Op, true>(rows, vecs, left, stride, right, groups, from, from_ld, tile, ld);
}

}  // namespace deltaw
