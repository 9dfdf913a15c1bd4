// Small products whose sums stay in registers: some rows of the left side times a right side that was laid out in groups
// (see pack_rows16), 16 or 32 columns at a time. What differs by instruction set is an Op: how one group is multiplied.
#pragma once
#include "vector.h"

namespace deltaw {

#if defined(__AVX512F__)
const int MOST_ROWS = 12, VECS_AT_ONCE = 2;  // 12 x 2 sums, 2 right and a few left vectors fill the 32 registers
typedef I16 Word;                            // one group of the left side, in each lane
inline Word spread(int32_t x) { return set_i(x); }
#else
// 6 sums of 16 lanes, the right side's lanes and one of the left side fill 16 registers of AVX2, or 32 of NEON.
const int MOST_ROWS = 6, VECS_AT_ONCE = 1;
typedef vi Word;
inline Word spread(int32_t x) { return one_i(x); }
#endif

// ---- how a group is multiplied -------------------------------------------------------------------------------

struct FloatSums {
    typedef F16 Sum;
    static Sum zero() { return zero_f(); }
    static Sum load(const float *p) { return load16(p); }
    static void store(float *p, Sum s) { store16(p, s); }
};
struct IntSums {
    typedef I16 Sum;
    static Sum zero() { return zero_i(); }
    static Sum load(const float *p) { return load_i(p); }
    static void store(float *p, Sum s) { store_i(p, s); }
};

// fp32 numbers, one a group.
struct Fma : FloatSums {
    static constexpr int PER_GROUP = 1;
    static void add(Sum &s, Word a, const I16 &b) {
#if defined(__AVX512F__)
        s.v = _mm512_fmadd_ps(_mm512_castsi512_ps(a.v), _mm512_castsi512_ps(b.v), s.v);
#else
        for (int i = 0; i < PARTS; i++) s.p[i] = one_fma((vf)a, (vf)b.p[i], s.p[i]);
#endif
    }
};

#if defined(__AVX512BF16__)
#define DW_BF16_DOT 1
struct Bf16Dot : FloatSums {
    static constexpr int PER_GROUP = 2;
    // As assembly, since the compiler would copy sums to and fro between registers around its own form.
    static void add(Sum &s, Word a, const I16 &b) { __asm__("vdpbf16ps %2, %1, %0" : "+v"(s.v) : "v"(a.v), "v"(b.v)); }
};
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define DW_BF16_DOT 1
struct Bf16Dot : FloatSums {
    static constexpr int PER_GROUP = 2;
    static void add(Sum &s, Word a, const I16 &b) {
        for (int i = 0; i < PARTS; i++) s.p[i] = (vf)vbfdotq_f32((float32x4_t)s.p[i], (bfloat16x8_t)a, (bfloat16x8_t)b.p[i]);
    }
};
#endif

// Four numbers a group: unsigned ones less LEFT_OFFSET on the left, signed ones on the right.
#if defined(__AVX512VNNI__)
#define DW_INT8_DOT 1
struct Int8Dot : IntSums {
    static constexpr int PER_GROUP = 4, ONES = 0x01010101, LEFT_OFFSET = 0;
    static void add(Sum &s, Word a, const I16 &b) { __asm__("vpdpbusd %2, %1, %0" : "+v"(s.v) : "v"(a.v), "v"(b.v)); }
    static Word of_left(int32_t x) { return spread(x); }
};
#elif defined(__AVXVNNI__)
#define DW_INT8_DOT 1
struct Int8Dot : IntSums {
    static constexpr int PER_GROUP = 4, ONES = 0x01010101, LEFT_OFFSET = 0;
    static void add(Sum &s, Word a, const I16 &b) {
        for (int i = 0; i < PARTS; i++) __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(s.p[i]) : "x"(a), "x"(b.p[i]));
    }
    static Word of_left(int32_t x) { return spread(x); }
};
#elif defined(__ARM_FEATURE_MATMUL_INT8)
#define DW_INT8_DOT 1
struct Int8Dot : IntSums {
    static constexpr int PER_GROUP = 4, ONES = 0x01010101, LEFT_OFFSET = 0;
    static void add(Sum &s, Word a, const I16 &b) {
        for (int i = 0; i < PARTS; i++) s.p[i] = (vi)vusdotq_s32((int32x4_t)s.p[i], (uint8x16_t)a, (int8x16_t)b.p[i]);
    }
    static Word of_left(int32_t x) { return spread(x); }
};
#elif defined(__ARM_FEATURE_DOTPROD)
#define DW_INT8_DOT 1
struct Int8Dot : IntSums {  // of signed numbers alone: the left side's less 128
    static constexpr int PER_GROUP = 4, ONES = 0x01010101, LEFT_OFFSET = 128;
    static void add(Sum &s, Word a, const I16 &b) {
        for (int i = 0; i < PARTS; i++) s.p[i] = (vi)vdotq_s32((int32x4_t)s.p[i], (int8x16_t)a, (int8x16_t)b.p[i]);
    }
    static Word of_left(int32_t x) { return spread((int32_t)((uint32_t)x ^ 0x80808080u)); }
};
#endif

// Two numbers of 16 bits a group, which 8-bit ones are widened to: exact where the processor has no dot product of 8 bits.
struct Int16Dot : IntSums {
    static constexpr int PER_GROUP = 2, ONES = 0x00010001, LEFT_OFFSET = 0;
    static void add(Sum &s, Word a, const I16 &b) {
#if defined(__AVX512F__)
        s.v = _mm512_add_epi32(s.v, _mm512_madd_epi16(a.v, b.v));
#elif defined(__AVX2__)
        for (int i = 0; i < PARTS; i++) s.p[i] += (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b.p[i]);
#else
        for (int i = 0; i < PARTS; i++) s.p[i] += ((a << 16) >> 16) * ((b.p[i] << 16) >> 16) + (a >> 16) * (b.p[i] >> 16);
#endif
    }
};

// ---- what lies in memory on the left, and how it comes to be multiplied --------------------------------------

template <class Dot>
struct AsItLies : Dot {
    static constexpr bool WIDENS = false;
    static Word of_left(int32_t x) { return spread(x); }
};

struct OpF32 : AsItLies<Fma> {
    typedef float Left;
    static void widen(const Left *, int64_t, int64_t, void *) {}
};
// bf16 numbers, widened to fp32 on both sides: exact products, at the rate of fp32.
struct OpWide : Fma {
    typedef bf16 Left;
    static constexpr bool WIDENS = true;
    static Word of_left(int32_t x) { return spread(x); }
    // `count` numbers, and zeros up to `room`, which is below count + 16.
    static void widen(const Left *from, int64_t count, int64_t room, void *to) {
        for (int64_t k = 0; k < room; k += 16) store16((float *)to + k, load16(from + k, first(count - k)), first(room - k));
    }
};
#ifdef DW_BF16_DOT
struct OpBF16 : AsItLies<Bf16Dot> {
    typedef bf16 Left;
    static void widen(const Left *, int64_t, int64_t, void *) {}
};
#endif
#ifdef DW_INT8_DOT
struct OpInt8 : Int8Dot {
    typedef uint8_t Left;
    static constexpr bool WIDENS = false;
    static void widen(const Left *, int64_t, int64_t, void *) {}
};
#else
struct OpInt8 : Int16Dot {
    typedef uint8_t Left;
    static constexpr bool WIDENS = true;
    static Word of_left(int32_t x) { return spread(x); }
    static void widen(const Left *from, int64_t count, int64_t room, void *to) {
        for (int64_t k = 0; k < room; k += 16) store_u16((bf16 *)to + k, load_u8(from + k, first(count - k)), first(room - k));
    }
};
#endif

// ---- what is known of products in tiles here (multiply_tiles.h) -----------------------------------------------

template <class Op> struct InTiles : std::false_type {};
// What a thread holds while it multiplies.
template <class Op> struct Ready {
    Ready() {}
};
// The Op whose sums are in registers, for what is a part of something else there.
template <class Op> struct InRegisters { typedef Op type; };

template <class Op, bool ONTO>
inline void products_in_tiles(int64_t rows, int vecs, const char *left, int64_t stride, const char *right, int64_t groups, const float *from,
                              int64_t from_ld, float *tile, int64_t ld);

// ---- rows of the left side times a panel ---------------------------------------------------------------------

// s (ROWS, 16·VECS) += left (ROWS rows, `stride` bytes apart) · right (`groups` lines of 128 bytes).
template <class Op, int ROWS, int VECS>
inline __attribute__((always_inline)) void add_products(const char *left, int64_t stride, const char *right, int64_t groups,
                                                        typename Op::Sum (&s)[ROWS][VECS]) {
    for (int64_t g = 0; g < groups; g++) {
        I16 b[VECS];
#pragma GCC unroll 2
        for (int v = 0; v < VECS; v++) b[v] = load_i(right + 128 * g + 64 * v);
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; i++) {
            int32_t word;
            memcpy(&word, left + i * stride + 4 * g, 4);
            const Word a = Op::of_left(word);
#pragma GCC unroll 2
            for (int v = 0; v < VECS; v++) Op::add(s[i][v], a, b[v]);
        }
    }
}

// tile (ROWS, 16·VECS) = from + left · right; without ONTO, from nothing. `from_ld` 0: all rows begin alike.
// A function of its own, since the compiler's loop takes more instructions where it is a part of another.
template <class Op, int ROWS, int VECS, bool ONTO>
__attribute__((noinline)) void product(const char *left, int64_t stride, const char *right, int64_t groups, const float *from, int64_t from_ld, float *tile, int64_t ld) {
    typename Op::Sum s[ROWS][VECS];
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 2
        for (int v = 0; v < VECS; v++) s[i][v] = ONTO ? Op::load(from + i * from_ld + 16 * v) : Op::zero();
    add_products<Op, ROWS, VECS>(left, stride, right, groups, s);
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 2
        for (int v = 0; v < VECS; v++) Op::store(tile + i * ld + 16 * v, s[i][v]);
}

// Calls body(number) with `rows` as a constant, which is one that rows_at_once gives.
template <int N>
struct Constant {
    static constexpr int value = N;
};
template <class Body>
inline void with_rows(int rows, Body &&body) {
    switch (rows) {
#if defined(__AVX512F__)
        case 12: body(Constant<12>()); break;
        case 8: body(Constant<8>()); break;
#else
        case 6: body(Constant<6>()); break;
#endif
        case 4: body(Constant<4>()); break;
        case 2: body(Constant<2>()); break;
        default: body(Constant<1>());
    }
}
// The largest number of rows that is made for and that is not above `rows`.
inline int rows_at_once(int64_t rows) {
    if (rows >= MOST_ROWS) return MOST_ROWS;
    if (MOST_ROWS > 8 && rows >= 8) return 8;
    return rows >= 4 ? 4 : rows >= 2 ? 2 : 1;
}
// body(Constant<vectors>, first) for the 16-column vectors of a panel, as many at a time as there are registers for.
template <class Body>
inline void with_vecs(int vecs, Body &&body) {
    if (VECS_AT_ONCE == 2 && vecs == 2) return body(Constant<VECS_AT_ONCE>(), 0);
    for (int v = 0; v < vecs; v++) body(Constant<1>(), v);
}

template <class Op, bool ONTO>
inline void products_from(int64_t rows, int vecs, const char *left, int64_t stride, const char *right, int64_t groups, const float *from,
                          int64_t from_ld, float *tile, int64_t ld) {
    if constexpr (InTiles<Op>::value) return products_in_tiles<Op, ONTO>(rows, vecs, left, stride, right, groups, from, from_ld, tile, ld);
    for (int64_t i = 0; i < rows;) {
        const int n = rows_at_once(rows - i);
        with_rows(n, [&](auto count) {
            with_vecs(vecs, [&](auto wide, int v) {
                product<Op, decltype(count)::value, decltype(wide)::value, ONTO>(left + i * stride, stride, right + 64 * v, groups,
                                                                                  from + i * from_ld + 16 * v, from_ld, tile + i * ld + 16 * v, ld);
            });
        });
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
