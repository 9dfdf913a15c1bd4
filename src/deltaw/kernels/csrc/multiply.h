// Small products with sums in registers: some rows of the left side times a right side packed in groups (see
// pack_rows16), 16 or 32 columns at a time. An Op is the part that depends on the instruction set: how one group is
// multiplied.
#pragma once
#include "vector.h"

namespace deltaw {

#if defined(__AVX512F__)
const int MAX_ROWS = 12, VECS_PER_PASS = 2;  // 12 x 2 sums, 2 right and some left vectors fill the 32 registers
typedef I16 Word;  // one group of the left side, broadcast to all lanes
inline Word spread(int32_t x) { return set_i(x); }
#else
// 6 sums of 16 lanes, the right side's lanes and one of the left side fill 16 registers of AVX2, or 32 of NEON.
const int MAX_ROWS = 6, VECS_PER_PASS = 1;
typedef vi Word;
inline Word spread(int32_t x) { return part_i(x); }
#endif
// Load the group at p.
#if defined(__ARM_NEON)
// Load into the first lane only. NEON multiplies by a single lane, so a broadcast would waste an instruction.
inline Word word_at(const void *p) {
    typedef int32_t __attribute__((may_alias, aligned(1))) Group;
    Word word;
    __asm__("ldr %s0, %1" : "=w"(word) : "m"(*(const Group *)p));
    return word;
}
#else
inline Word word_at(const void *p) {
    int32_t x;
    memcpy(&x, p, 4);
    return spread(x);
}
#endif

// ---- multiplication of a group --------------------------------------------------------------------------------

// ROWS_PER_SUM: 2 if the processor can also multiply two rows by two columns, with add2; else 1.
struct FloatSums {
    typedef F16 Sum;
    static constexpr int ROWS_PER_SUM = 1;
    static Sum zero() { return zero_f(); }
    static Sum load(const float *p) { return load16(p); }
    static void store(float *p, Sum s) { store16(p, s); }
};
struct IntSums {
    typedef I16 Sum;
    static constexpr int ROWS_PER_SUM = 1;
    static Sum zero() { return zero_i(); }
    static Sum load(const float *p) { return load_i(p); }
    static void store(float *p, Sum s) { store_i(p, s); }
};

// fp32, one number per group.
struct Fma : FloatSums {
    static constexpr int PER_GROUP = 1;
    static void add(Sum &s, Word a, const I16 &b) {
#if defined(__AVX512F__)
        s.v = _mm512_fmadd_ps(_mm512_castsi512_ps(a.v), _mm512_castsi512_ps(b.v), s.v);
#elif defined(__ARM_NEON)
        for (int i = 0; i < PARTS; i++) s.p[i] = (vf)vfmaq_laneq_f32((float32x4_t)s.p[i], (float32x4_t)b.p[i], (float32x4_t)a, 0);
#else
        for (int i = 0; i < PARTS; i++) s.p[i] = part_fma((vf)a, (vf)b.p[i], s.p[i]);
#endif
    }
};

#if defined(__AVX512BF16__)
#define DW_BF16_DOT 1
struct Bf16Dot : FloatSums {
    static constexpr int PER_GROUP = 2;
    // Assembly, because the compiler would move sums between registers around its intrinsic.
    static void add(Sum &s, Word a, const I16 &b) { __asm__("vdpbf16ps %2, %1, %0" : "+v"(s.v) : "v"(a.v), "v"(b.v)); }
};
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define DW_BF16_DOT 1
struct Bf16Dot : FloatSums {
    static constexpr int PER_GROUP = 2, ROWS_PER_SUM = 2;
    // Assembly for the same reason.
    static void add2(vf &s, vi a, vi b) { __asm__("bfmmla %0.4s, %1.8h, %2.8h" : "+w"(s) : "w"(a), "w"(b)); }
    static void add(Sum &s, Word a, const I16 &b) {
        for (int i = 0; i < PARTS; i++) s.p[i] = (vf)vbfdotq_laneq_f32((float32x4_t)s.p[i], (bfloat16x8_t)b.p[i], (bfloat16x8_t)a, 0);
    }
};
#endif

// Four numbers per group: unsigned minus LEFT_OFFSET on the left, signed on the right.
#if defined(__AVX512VNNI__)
#define DW_INT8_DOT 1
struct Int8Dot : IntSums {
    static constexpr int PER_GROUP = 4, ONES = 0x01010101, LEFT_OFFSET = 0;
    static void add(Sum &s, Word a, const I16 &b) { __asm__("vpdpbusd %2, %1, %0" : "+v"(s.v) : "v"(a.v), "v"(b.v)); }
};
#elif defined(__AVXVNNI__)
#define DW_INT8_DOT 1
struct Int8Dot : IntSums {
    static constexpr int PER_GROUP = 4, ONES = 0x01010101, LEFT_OFFSET = 0;
    static void add(Sum &s, Word a, const I16 &b) {
        for (int i = 0; i < PARTS; i++) __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(s.p[i]) : "x"(a), "x"(b.p[i]));
    }
};
#elif defined(__ARM_FEATURE_MATMUL_INT8)
#define DW_INT8_DOT 1
struct Int8Dot : IntSums {
    static constexpr int PER_GROUP = 4, ONES = 0x01010101, LEFT_OFFSET = 0, ROWS_PER_SUM = 2;
    static void add2(vi &s, vi a, vi b) { __asm__("usmmla %0.4s, %1.16b, %2.16b" : "+w"(s) : "w"(a), "w"(b)); }
    static void add(Sum &s, Word a, const I16 &b) {
        for (int i = 0; i < PARTS; i++) s.p[i] = (vi)vsudotq_laneq_s32((int32x4_t)s.p[i], (int8x16_t)b.p[i], (uint8x16_t)a, 0);
    }
};
#elif defined(__ARM_FEATURE_DOTPROD)
#define DW_INT8_DOT 1
#define DW_INT8_DOT_SIGNED 1
struct Int8Dot : IntSums {  // multiplies signed numbers only: the left side minus 128
    static constexpr int PER_GROUP = 4, ONES = 0x01010101, LEFT_OFFSET = 128;
    static void add(Sum &s, Word a, const I16 &b) {
        for (int i = 0; i < PARTS; i++) s.p[i] = (vi)vdotq_laneq_s32((int32x4_t)s.p[i], (int8x16_t)b.p[i], (int8x16_t)a, 0);
    }
};
#endif

// Two 16-bit numbers per group, widened from 8 bits. Exact on processors without an 8-bit dot product.
struct Int16Dot : IntSums {
    static constexpr int PER_GROUP = 2, ONES = 0x00010001, LEFT_OFFSET = 0;
    static void add(Sum &s, Word a, const I16 &b) {
#if defined(__AVX512F__)
        s.v = _mm512_add_epi32(s.v, _mm512_madd_epi16(a.v, b.v));
#elif defined(__AVX2__)
        for (int i = 0; i < PARTS; i++) s.p[i] += (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b.p[i]);
#elif defined(__ARM_NEON)
        // Moves each column's first number to one half of a register and the second to the other. The same for all
        // rows.
        const uint8x16_t shuffle = {0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15};
        for (int i = 0; i < PARTS; i++) {
            const int16x8_t column = (int16x8_t)vqtbl1q_u8((uint8x16_t)b.p[i], shuffle);
            const int32x4_t sum = vmlal_laneq_s16((int32x4_t)s.p[i], vget_low_s16(column), (int16x8_t)a, 0);
            s.p[i] = (vi)vmlal_high_laneq_s16(sum, column, (int16x8_t)a, 1);
        }
#else
        for (int i = 0; i < PARTS; i++) s.p[i] += ((a << 16) >> 16) * ((b.p[i] << 16) >> 16) + (a >> 16) * (b.p[i] >> 16);
#endif
    }
};

// ---- left sides: stored and multiplied types ------------------------------------------------------------------

template <class Dot>
struct StoredOperand : Dot {
    static constexpr bool WIDENS = false;
};

struct OpF32 : StoredOperand<Fma> {
    typedef float Left;
    static void widen(const Left *, int64_t, int64_t, void *) {}
};
// bf16 numbers widened to fp32 on both sides: exact products at the speed of fp32.
struct OpWide : Fma {
    typedef bf16 Left;
    static constexpr bool WIDENS = true;
    // Widen `count` numbers and pad with zeros to `padded_count`, which is below count + 16.
    static void widen(const Left *from, int64_t count, int64_t padded_count, void *to) {
        for (int64_t k = 0; k < padded_count; k += 16) store16((float *)to + k, load16(from + k, first(count - k)), first(padded_count - k));
    }
};
#ifdef DW_BF16_DOT
struct OpBF16 : StoredOperand<Bf16Dot> {
    typedef bf16 Left;
    static void widen(const Left *, int64_t, int64_t, void *) {}
};
#endif
#ifdef DW_INT8_DOT_SIGNED
struct OpInt8 : Int8Dot {
    typedef uint8_t Left;
    static constexpr bool WIDENS = true;
    // Converts to signed numbers without widening.
    static void widen(const Left *from, int64_t count, int64_t padded_count, void *to) {
        int64_t k = 0;
        for (; k + 16 <= count; k += 16) vst1q_u8((uint8_t *)to + k, veorq_u8(vld1q_u8(from + k), vdupq_n_u8(128)));
        for (; k < padded_count; k++) ((uint8_t *)to)[k] = k < count ? from[k] ^ 128 : 0;
    }
};
#elif defined(DW_INT8_DOT)
struct OpInt8 : StoredOperand<Int8Dot> {
    typedef uint8_t Left;
    static void widen(const Left *, int64_t, int64_t, void *) {}
};
#else
struct OpInt8 : Int16Dot {
    typedef uint8_t Left;
    static constexpr bool WIDENS = true;
    static void widen(const Left *from, int64_t count, int64_t padded_count, void *to) {
        for (int64_t k = 0; k < padded_count; k += 16) store_u16((bf16 *)to + k, load_u8(from + k, first(count - k)), first(padded_count - k));
    }
};
#endif

// ---- traits for products in tiles (multiply_tiles.h) -----------------------------------------------------------

template <class Op> struct InTiles : std::false_type {};
// RAII object that a thread needs while it multiplies.
template <class Op> struct ProductScope {
    ProductScope() {}
};
// The Op with sums in registers, for small parts of a product in tiles.
template <class Op> struct RegisterOp { typedef Op type; };

template <class Op, bool ONTO>
inline void products_in_tiles(int64_t rows, int vecs, const char *left, int64_t stride, const char *right, int64_t groups, const float *from,
                              int64_t from_ld, float *tile, int64_t ld);

// ---- rows of the left side times a panel ----------------------------------------------------------------------

#if defined(__ARM_FEATURE_MATMUL_INT8) && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
// Exchange the halves of two registers. Converts four sums of each of two rows to two blocks of two rows by two
// columns, and back.
template <class V>
inline void swap_halves(V &a, V &b) {
    const int64x2_t one = (int64x2_t)a, two = (int64x2_t)b;
    a = (V)vtrn1q_s64(one, two), b = (V)vtrn2q_s64(one, two);
}
// Like add_products for two rows and two groups at a time. Returns the number of groups processed; the last may remain.
template <class Op, int ROWS>
inline __attribute__((always_inline)) int64_t add_in_twos(const char *left, int64_t stride, const char *right, int64_t groups,
                                                          typename Op::Sum (&s)[ROWS][1]) {
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i += 2)
        for (int p = 0; p < PARTS; p++) swap_halves(s[i][0].p[p], s[i + 1][0].p[p]);
    const int64_t twos = groups / 2 * 2;
    for (int64_t g = 0; g < twos; g += 2) {
        vi a[ROWS / 2];
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; i += 2) {
            const int32_t *const at = (const int32_t *)(left + i * stride + 4 * g);
            a[i / 2] = (vi)vcombine_s32(vld1_s32(at), vld1_s32((const int32_t *)((const char *)at + stride)));
        }
#pragma GCC unroll 4
        for (int p = 0; p < PARTS; p++) {
            const int32x4_t one = vld1q_s32((const int32_t *)(right + 128 * g + 16 * p));
            const int32x4_t two = vld1q_s32((const int32_t *)(right + 128 * (g + 1) + 16 * p));
            const vi b = (vi)vzip1q_s32(one, two), b2 = (vi)vzip2q_s32(one, two);
#pragma GCC unroll 12
            for (int i = 0; i < ROWS; i += 2) {
                Op::add2(s[i][0].p[p], a[i / 2], b);
                Op::add2(s[i + 1][0].p[p], a[i / 2], b2);
            }
            __asm__ volatile("" ::: "memory");  // keeps the next columns' loads below, since they would spill sums
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i += 2)
        for (int p = 0; p < PARTS; p++) swap_halves(s[i][0].p[p], s[i + 1][0].p[p]);
    return twos;
}
#else
template <class Op, int ROWS, int VECS>
inline int64_t add_in_twos(const char *, int64_t, const char *, int64_t, typename Op::Sum (&)[ROWS][VECS]) {
    return 0;
}
#endif

// s (ROWS, 16·VECS) += left (ROWS rows, `stride` bytes apart) · right (`groups` lines of 128 bytes).
template <class Op, int ROWS, int VECS>
inline __attribute__((always_inline)) void add_products(const char *left, int64_t stride, const char *right, int64_t groups,
                                                        typename Op::Sum (&s)[ROWS][VECS]) {
    int64_t g = 0;
    if constexpr (ROWS % 2 == 0 && Op::ROWS_PER_SUM == 2) g = add_in_twos<Op>(left, stride, right, groups, s);
    for (; g < groups; g++) {
        I16 b[VECS];
#pragma GCC unroll 2
        for (int v = 0; v < VECS; v++) b[v] = load_i(right + 128 * g + 64 * v);
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; i++) {
            const Word a = word_at(left + i * stride + 4 * g);
#pragma GCC unroll 2
            for (int v = 0; v < VECS; v++) Op::add(s[i][v], a, b[v]);
        }
    }
}

// tile (ROWS, 16·VECS) = from + left · right, or left · right without ONTO. If `from_ld` is 0, all rows start with the
// same sums. A separate function, because the compiler generates a longer loop if it is inlined.
template <class Op, int ROWS, int VECS, bool ONTO>
__attribute__((noinline)) void product(const char *left, int64_t stride, const char *right, int64_t groups, const float *from, int64_t from_ld,
                                       float *tile, int64_t ld) {
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

// Call body(number) with `rows` as a constant. `rows` must be a result of max_tile_rows.
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
// The largest supported number of rows that is not above `rows`.
inline int max_tile_rows(int64_t rows) {
    if (rows >= MAX_ROWS) return MAX_ROWS;
    if (MAX_ROWS > 8 && rows >= 8) return 8;
    return rows >= 4 ? 4 : rows >= 2 ? 2 : 1;
}
// Call body(Constant<vectors>, first) for the 16-column vectors of a panel, as many at a time as registers allow.
template <class Body>
inline void with_vecs(int vecs, Body &&body) {
    if (VECS_PER_PASS == 2 && vecs == 2) return body(Constant<VECS_PER_PASS>(), 0);
    for (int v = 0; v < vecs; v++) body(Constant<1>(), v);
}

template <class Op, bool ONTO>
inline void products_from(int64_t rows, int vecs, const char *left, int64_t stride, const char *right, int64_t groups, const float *from,
                          int64_t from_ld, float *tile, int64_t ld) {
    if constexpr (InTiles<Op>::value) return products_in_tiles<Op, ONTO>(rows, vecs, left, stride, right, groups, from, from_ld, tile, ld);
    for (int64_t i = 0; i < rows;) {
        const int n = max_tile_rows(rows - i);
        with_rows(n, [&](auto count) {
            with_vecs(vecs, [&](auto wide, int v) {
                product<Op, decltype(count)::value, decltype(wide)::value, ONTO>(left + i * stride, stride, right + 64 * v, groups,
                                                                                  from + i * from_ld + 16 * v, from_ld, tile + i * ld + 16 * v, ld);
            });
        });
        i += n;
    }
}

// Multiply all rows: tile (rows, 16·vecs) = left · right, with `ld` floats from row to row.
template <class Op>
inline void products(int64_t rows, int vecs, const char *left, int64_t stride, const char *right, int64_t groups, float *tile, int64_t ld) {
    products_from<Op, false>(rows, vecs, left, stride, right, groups, tile, ld, tile, ld);
}

// Like multiply_rows, added to `from`, which can be the tile.
template <class Op>
inline void products_onto(int64_t rows, int vecs, const char *left, int64_t stride, const char *right, int64_t groups, const float *from,
                          int64_t from_ld, float *tile, int64_t ld) {
    products_from<Op, true>(rows, vecs, left, stride, right, groups, from, from_ld, tile, ld);
}

}  // namespace deltaw
