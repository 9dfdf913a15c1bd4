// Dot products of rows in memory, for products that read a weight once: rows of the left side times rows of a weight
// (out, in). Each sum has a fixed order that does not depend on the other rows.
//
// A Dot is the part that depends on the instruction set: how STEP numbers are multiplied, and how a left row is stored.
#pragma once
#include "arithmetic.h"
#include "blocks.h"

namespace deltaw {

// ---- sums over the lanes of four vectors ------------------------------------------------------------------------
#if defined(__AVX512F__)
inline __m128 four_sums(F16 a, F16 b, F16 c, F16 d) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a.v, b.v), _mm512_unpackhi_ps(a.v, b.v));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c.v, d.v), _mm512_unpackhi_ps(c.v, d.v));
    const __m512 all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}
inline __m128i four_sums(I16 a, I16 b, I16 c, I16 d) {
    const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a.v, b.v), _mm512_unpackhi_epi32(a.v, b.v));
    const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c.v, d.v), _mm512_unpackhi_epi32(c.v, d.v));
    const __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}
template <class Sum>
inline void put_sums(Sum a, Sum b, Sum c, Sum d, float *out) {
    const auto four = four_sums(a, b, c, d);
    memcpy(out, &four, 16);
}
#else
inline void put_sum(F16 s, float *out) { *out = sum_lanes(s); }
inline void put_sum(I16 s, float *out) {
    vi sum = s.p[0];
    for (int i = 1; i < PARTS; i++) sum += s.p[i];
    int32_t lanes[LANES], total = 0;
    memcpy(lanes, &sum, sizeof(lanes));
    for (int32_t lane : lanes) total += lane;
    memcpy(out, &total, 4);
}
template <class Sum>
inline void put_sums(Sum a, Sum b, Sum c, Sum d, float *out) {
    put_sum(a, out), put_sum(b, out + 1), put_sum(c, out + 2), put_sum(d, out + 3);
}
#endif

// ---- multiplication of numbers ------------------------------------------------------------------------------------
struct SumsF { typedef F16 Sum; static constexpr bool IS_INTEGER = false; static Sum zero() { return zero_f(); } };
struct SumsI { typedef I16 Sum; static constexpr bool IS_INTEGER = true; static Sum zero() { return zero_i(); } };

// Part by part, because the compiler would spill a sum that is assigned as one struct.
inline void add_product(F16 &s, F16 a, F16 b) {
#if defined(__AVX512F__)
    s.v = _mm512_fmadd_ps(a.v, b.v, s.v);
#else
    for (int i = 0; i < PARTS; i++) s.p[i] = part_fma(a.p[i], b.p[i], s.p[i]);
#endif
}

struct DotF32 : SumsF {
    typedef float Left; typedef float Right; typedef F16 Word;
    static constexpr int STEP = 16;
    static Word left(const Left *p) { return load16(p); }
    static Word right(const Right *p) { return load16(p); }
    static void add(Sum &s, Word a, Word b) { add_product(s, a, b); }
    static void put(Left *p, F16 x) { store16(p, x); }
};

inline F16 rounded_to_bf16(F16 x) { return from_bits(bf16_bits(x) << 16); }

struct DotWide : SumsF {  // bf16 weights, widened to fp32
    typedef float Left; typedef bf16 Right; typedef F16 Word;
    static constexpr int STEP = 16;
    static Word left(const Left *p) { return load16(p); }
    static Word right(const Right *p) { return load16(p); }
    static void add(Sum &s, Word a, Word b) { add_product(s, a, b); }
    static void put(Left *p, F16 x) { store16(p, rounded_to_bf16(x)); }
};

#ifdef DW_BF16_DOT
struct DotBF16 : SumsF {
    typedef bf16 Left; typedef bf16 Right; typedef I16 Word;
    static constexpr int STEP = 32;
    static Word left(const Left *p) { return load_i(p); }
    static Word right(const Right *p) { return load_i(p); }
    static void add(Sum &s, Word a, Word b) {
#if defined(__AVX512BF16__)
        __m512 sum = s.v;
        __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a.v), "v"(b.v));
        s.v = sum;
#else
        for (int i = 0; i < PARTS; i++) s.p[i] = (vf)vbfdotq_f32((float32x4_t)s.p[i], (bfloat16x8_t)a.p[i], (bfloat16x8_t)b.p[i]);
#endif
    }
    static void put(Left *p, F16 x) { store16(p, x); }
};
#endif

// int8 weights. The left side contains integers from -127 to 127 plus OFFSET.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
struct DotInt8 : SumsI {
    typedef uint8_t Left; typedef int8_t Right; typedef I16 Word;
    static constexpr int STEP = 64, OFFSET = 128;
    static Word left(const Left *p) { return load_i(p); }
    static Word right(const Right *p) { return load_i(p); }
    static void add(Sum &s, Word a, Word b) {
#if defined(__AVX512VNNI__)
        __m512i sum = s.v;
        __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a.v), "v"(b.v));
        s.v = sum;
#else
        for (int i = 0; i < PARTS; i++) __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(s.p[i]) : "x"(a.p[i]), "x"(b.p[i]));
#endif
    }
    static void put(Left *p, I16 x) { store_u8(p, x + set_i(OFFSET), first(16)); }
};
#elif defined(__AVX2__)
struct DotInt8 : SumsI {  // widened to 16 bits
    typedef int16_t Left; typedef int8_t Right; typedef I16 Word;
    static constexpr int STEP = 32, OFFSET = 0;
    static Word left(const Left *p) { return load_i(p); }
    static Word right(const Right *p) {
#if defined(__AVX512F__)
        return {_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)p))};
#else
        return {{(vi)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)p)),
                 (vi)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(p + 16)))}};
#endif
    }
    static void add(Sum &s, Word a, Word b) {
#if defined(__AVX512F__)
        s.v = _mm512_add_epi32(s.v, _mm512_madd_epi16(a.v, b.v));
#else
        for (int i = 0; i < PARTS; i++) s.p[i] += (vi)_mm256_madd_epi16((__m256i)a.p[i], (__m256i)b.p[i]);
#endif
    }
    static void put(Left *p, I16 x) { store_u16((bf16 *)p, x & set_i(0xffff)); }
};
#elif defined(__ARM_NEON)
struct DotInt8 : SumsI {
    typedef int8_t Left; typedef int8_t Right; typedef I16 Word;
    static constexpr int STEP = 64, OFFSET = 0;
    static Word left(const Left *p) { return load_i(p); }
    static Word right(const Right *p) { return load_i(p); }
    static void add(Sum &s, Word a, Word b) {
        for (int i = 0; i < PARTS; i++) {
            const int8x16_t x = (int8x16_t)a.p[i], w = (int8x16_t)b.p[i];
#if defined(__ARM_FEATURE_DOTPROD)
            s.p[i] = (vi)vdotq_s32((int32x4_t)s.p[i], x, w);
#else
            const int32x4_t low = vpadalq_s16((int32x4_t)s.p[i], vmull_s8(vget_low_s8(x), vget_low_s8(w)));
            s.p[i] = (vi)vpadalq_s16(low, vmull_high_s8(x, w));
#endif
        }
    }
    static void put(Left *p, I16 x) { store_u8((uint8_t *)p, x & set_i(0xff), first(16)); }
};
#else
struct DotInt8 : SumsI {
    typedef int32_t Left; typedef int8_t Right; typedef I16 Word;
    static constexpr int STEP = 16, OFFSET = 0;
    static Word left(const Left *p) { return load_i(p); }
    static Word right(const Right *p) { return load_bytes(p); }
    static void add(Sum &s, Word a, Word b) { s = s + a * b; }
    static void put(Left *p, I16 x) { store_i(p, x); }
};
#endif

// The type that a weight is multiplied in. Blocks are decoded to bf16.
inline int64_t multiplied_as(int64_t type) { return stored_in_blocks((int)type) ? (int64_t)BF16 : type; }

// Call body(dot) with the Dot for weights of a type.
template <class Body>
inline void with_dot(int64_t type, Body &&body) {
    if (type == F32) return body(DotF32());
    if (type == INT8) return body(DotInt8());
#ifdef DW_BF16_DOT
    if (selected_arithmetic(BF16) != WIDE) return body(DotBF16());
#endif
    body(DotWide());
}

// ---- rows times rows -------------------------------------------------------------------------------------------
#if defined(__AVX512F__)
const int DOT_ROWS = 6;
constexpr int dot_columns(int rows) { return rows == 1 ? 16 : rows <= 3 ? 8 : 4; }
#else
const int DOT_ROWS = 2;
constexpr int dot_columns(int) { return 4; }
#endif

// Compute raw sums (ROWS, COLS) of left rows and weight rows, which are `ld` numbers apart and have `depth` numbers
// each. Left rows are padded to complete steps. `prefetch_bytes` bytes from `next` are prefetched.
template <class Dot, int ROWS, int COLS>
inline __attribute__((always_inline)) void dots(const typename Dot::Left *const *x, const typename Dot::Right *w, int64_t ld, int64_t depth,
                                                float *out,
                                                int64_t out_ld, const char *next, int64_t prefetch_bytes) {
    typedef typename Dot::Right Right;
    int64_t prefetched = 0;
    const int64_t a_step = depth ? (prefetch_bytes * Dot::STEP / depth + 63) / 64 * 64 : 0;
    const int64_t full_depth = depth / Dot::STEP * Dot::STEP;
    // The remainder is copied to a zero-padded buffer and processed by the same loop. It is copied first, because a
    // function call would spill sums from registers.
    Right ends[COLS * Dot::STEP];
    if (full_depth < depth) {
        memset(ends, 0, sizeof(ends));
        for (int c = 0; c < COLS; c++) memcpy(ends + c * Dot::STEP, w + c * ld + full_depth, (depth - full_depth) * sizeof(Right));
    }
    typename Dot::Sum s[ROWS][COLS];
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 16
        for (int c = 0; c < COLS; c++) s[r][c] = Dot::zero();
    for (int64_t k = 0, to = full_depth;;) {
        for (; k < to; k += Dot::STEP, w += Dot::STEP) {
            for (int64_t end = std::min(prefetch_bytes, prefetched + a_step); prefetched < end; prefetched += 64)
                __builtin_prefetch(next + prefetched, 0, 2);
            if constexpr (COLS > 4) {
                typename Dot::Word a[ROWS];
#pragma GCC unroll 6
                for (int r = 0; r < ROWS; r++) a[r] = Dot::left(x[r] + k);
#pragma GCC unroll 16
                for (int c = 0; c < COLS; c++) {
                    const typename Dot::Word b = Dot::right(w + c * ld);
#pragma GCC unroll 6
                    for (int r = 0; r < ROWS; r++) Dot::add(s[r][c], a[r], b);
                }
            } else {
                typename Dot::Word b[COLS];
#pragma GCC unroll 16
                for (int c = 0; c < COLS; c++) b[c] = Dot::right(w + c * ld);
#pragma GCC unroll 6
                for (int r = 0; r < ROWS; r++) {
                    const typename Dot::Word a = Dot::left(x[r] + k);
#pragma GCC unroll 16
                    for (int c = 0; c < COLS; c++) Dot::add(s[r][c], a, b[c]);
                }
            }
        }
        if (to >= depth) break;
        w = ends, ld = Dot::STEP, to += Dot::STEP;
    }
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++) {
        if constexpr (COLS % 4 == 0) {
#pragma GCC unroll 4
            for (int c = 0; c < COLS; c += 4) put_sums(s[r][c], s[r][c + 1], s[r][c + 2], s[r][c + 3], out + r * out_ld + c);
        } else {
            static_assert(COLS == 1, "whole fours, or one");
            float four[4];
            put_sums(s[r][0], s[r][0], s[r][0], s[r][0], four);
            out[r * out_ld] = four[0];
        }
    }
}

// Additional memory to prefetch while products run.
struct PrefetchSource {
    int64_t lines = 0;  // total number of 64-byte lines
    virtual void prefetch(int64_t count) = 0;

  protected:
    ~PrefetchSource() = default;
};

// A separate function, so that sums stay in registers. Prefetches `lines` of `other` after each tile.
template <class Dot, int ROWS>
__attribute__((noinline)) void dot_rows(const typename Dot::Left *const *x, const typename Dot::Right *w, int64_t ld, int64_t depth, int64_t columns,
                                            float *out, int64_t out_ld, const char *next, int64_t prefetch_bytes, PrefetchSource *other,
                                                int64_t lines) {
    constexpr int COLS = dot_columns(ROWS);
    const int64_t each = columns ? (prefetch_bytes * COLS / columns + 63) / 64 * 64 : 0;
    int64_t c = 0;
    for (; c + COLS <= columns; c += COLS, next += each, prefetch_bytes -= each) {
        if (other) other->prefetch(lines);
        dots<Dot, ROWS, COLS>(x, w + c * ld, ld, depth, out + c, out_ld, next, std::max<int64_t>(0, std::min(each, prefetch_bytes)));
    }
    if constexpr (COLS > 4)
        for (; c + 4 <= columns; c += 4) dots<Dot, ROWS, 4>(x, w + c * ld, ld, depth, out + c, out_ld, next, 0);
    for (; c < columns; c++) dots<Dot, ROWS, 1>(x, w + c * ld, ld, depth, out + c, out_ld, next, 0);
}

// Multiply all rows by `columns` rows of a weight and write raw sums (int32 for int8 weights) to `out`; see dots.
// Prefetching of `other` is spread over the tiles.
template <class Dot>
inline void all_dots(const typename Dot::Left *const *x, int64_t rows, const typename Dot::Right *w, int64_t ld, int64_t depth, int64_t columns,
                     float *out, int64_t out_ld, const char *next, int64_t prefetch_bytes, PrefetchSource *other) {
    const int64_t groups = (rows + DOT_ROWS - 1) / DOT_ROWS;
    const int64_t each = groups ? (prefetch_bytes / groups + 63) / 64 * 64 : 0;
    // Lines per tile of all groups, assuming at least dot_columns(DOT_ROWS) columns per tile.
    const int64_t lines = other ? other->lines / std::max<int64_t>(1, groups * (columns / dot_columns(DOT_ROWS))) + 1 : 0;
    for (int64_t g = 0; g < groups; g++) {
        const int64_t from = rows * g / groups, n = rows * (g + 1) / groups - from;
        const char *const at = next + g * each;
        const int64_t prefetched = std::max<int64_t>(0, std::min(each, prefetch_bytes - g * each));
        float *const to = out + from * out_ld;
        switch (n) {
#if defined(__AVX512F__)
            case 6: dot_rows<Dot, 6>(x + from, w, ld, depth, columns, to, out_ld, at, prefetched, other, lines); break;
            case 5: dot_rows<Dot, 5>(x + from, w, ld, depth, columns, to, out_ld, at, prefetched, other, lines); break;
            case 4: dot_rows<Dot, 4>(x + from, w, ld, depth, columns, to, out_ld, at, prefetched, other, lines); break;
            case 3: dot_rows<Dot, 3>(x + from, w, ld, depth, columns, to, out_ld, at, prefetched, other, lines); break;
#endif
            case 2: dot_rows<Dot, 2>(x + from, w, ld, depth, columns, to, out_ld, at, prefetched, other, lines); break;
            default: dot_rows<Dot, 1>(x + from, w, ld, depth, columns, to, out_ld, at, prefetched, other, lines);
        }
    }
}

}  // namespace deltaw
