// 16 lanes of 32 bits in several compiler vectors (GCC, clang): two AVX2 registers, four NEON registers, or generic
// vectors; see vector.h.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "bf16.h"

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define DW_VECTOR_BYTES 32
#else
#define DW_VECTOR_BYTES 16
#if defined(__ARM_NEON)
#include <arm_neon.h>
#endif
#endif

// Always inline, because arrays of registers are passed to functions through memory.
#define DW_INLINE inline __attribute__((always_inline))

namespace deltaw {

typedef float vf __attribute__((vector_size(DW_VECTOR_BYTES)));
typedef int32_t vi __attribute__((vector_size(DW_VECTOR_BYTES)));
typedef uint32_t vu __attribute__((vector_size(DW_VECTOR_BYTES)));  // for sums that can wrap
const int LANES = DW_VECTOR_BYTES / 4, PARTS = 16 / LANES;

struct F16 { vf p[PARTS]; };
struct I16 { vi p[PARTS]; };
struct M16 { vi p[PARTS]; };  // lanes are all ones or all zeros
struct First { int64_t n; };  // valid lanes at the end of a row

DW_INLINE First first(int64_t n) { return {n >= 16 ? 16 : n < 0 ? 0 : n}; }

#define DW_EACH _Pragma("GCC unroll 4") for (int i = 0; i < PARTS; i++)
// Build a value of `type` from an expression of the part index i.
#define DW_PARTS(type, expression) type r; DW_EACH r.p[i] = expression; return r

DW_INLINE vf part_f(float x) { return x - (vf){}; }
DW_INLINE vi part_i(int32_t x) { return x - (vi){}; }
#if DW_VECTOR_BYTES == 32
DW_INLINE vf part_fma(vf a, vf b, vf c) { return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
DW_INLINE vf part_fnma(vf a, vf b, vf c) { return (vf)_mm256_fnmadd_ps((__m256)a, (__m256)b, (__m256)c); }
DW_INLINE vi part_to_int(vf a) { return (vi)_mm256_cvtps_epi32((__m256)a); }
DW_INLINE vf part_nearest(vf a) { return (vf)_mm256_round_ps((__m256)a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
#elif defined(__ARM_NEON)
DW_INLINE vf part_fma(vf a, vf b, vf c) { return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
DW_INLINE vf part_fnma(vf a, vf b, vf c) { return (vf)vfmsq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
DW_INLINE vi part_to_int(vf a) { return (vi)vcvtnq_s32_f32((float32x4_t)a); }
DW_INLINE vf part_nearest(vf a) { return (vf)vrndnq_f32((float32x4_t)a); }
#else
DW_INLINE vf part_fma(vf a, vf b, vf c) { return a * b + c; }
DW_INLINE vf part_fnma(vf a, vf b, vf c) { return c - a * b; }
DW_INLINE vi part_to_int(vf a) {
    vi r;
    for (int i = 0; i < LANES; i++) r[i] = (int32_t)lrintf(a[i]);
    return r;
}
DW_INLINE vf part_nearest(vf a) {
    vf r;
    for (int i = 0; i < LANES; i++) r[i] = nearbyintf(a[i]);
    return r;
}
#endif

DW_INLINE F16 zero_f() { return {}; }
DW_INLINE F16 set_f(float x) { DW_PARTS(F16, part_f(x)); }
DW_INLINE F16 operator+(F16 a, F16 b) { DW_PARTS(F16, a.p[i] + b.p[i]); }
DW_INLINE F16 operator-(F16 a, F16 b) { DW_PARTS(F16, a.p[i] - b.p[i]); }
DW_INLINE F16 operator*(F16 a, F16 b) { DW_PARTS(F16, a.p[i] * b.p[i]); }
DW_INLINE F16 operator/(F16 a, F16 b) { DW_PARTS(F16, a.p[i] / b.p[i]); }
DW_INLINE F16 fma(F16 a, F16 b, F16 c) { DW_PARTS(F16, part_fma(a.p[i], b.p[i], c.p[i])); }
DW_INLINE F16 fnma(F16 a, F16 b, F16 c) { DW_PARTS(F16, part_fnma(a.p[i], b.p[i], c.p[i])); }
// If one is NaN, returns the second, like x86.
DW_INLINE F16 max(F16 a, F16 b) { DW_PARTS(F16, a.p[i] > b.p[i] ? a.p[i] : b.p[i]); }
DW_INLINE F16 min(F16 a, F16 b) { DW_PARTS(F16, a.p[i] < b.p[i] ? a.p[i] : b.p[i]); }
DW_INLINE F16 abs(F16 a) { DW_PARTS(F16, (vf)((vi)a.p[i] & part_i(0x7fffffff))); }
DW_INLINE F16 nearest(F16 a) { DW_PARTS(F16, part_nearest(a.p[i])); }
// a · 2^n for integers n from -126 to 128 and a from 0.5 to 1.5. Infinity for n = 128 and a ≥ 1. NaN stays NaN.
DW_INLINE F16 times_power_of_two(F16 a, F16 n) {
    DW_PARTS(F16, (n.p[i] > part_f(128) || (n.p[i] == part_f(128) && a.p[i] >= part_f(1))) ? part_f(INFINITY)
             : n.p[i] != n.p[i] ? n.p[i] : (vf)((vu)a.p[i] + ((vu)part_to_int(n.p[i]) << 23)));
}
DW_INLINE float sum_lanes(F16 a) {
    vf s = a.p[0];
    for (int i = 1; i < PARTS; i++) s += a.p[i];
#if defined(__ARM_NEON)
    return vaddvq_f32((float32x4_t)s);
#else
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) s[i] += s[i + width];
    return s[0];
#endif
}
DW_INLINE float max_lane(F16 a) {
    float highest = a.p[0][0];
    DW_EACH for (int j = 0; j < LANES; j++) highest = highest < a.p[i][j] ? a.p[i][j] : highest;
    return highest;
}
DW_INLINE float min_lane(F16 a) {
    float lowest = a.p[0][0];
    DW_EACH for (int j = 0; j < LANES; j++) lowest = a.p[i][j] < lowest ? a.p[i][j] : lowest;
    return lowest;
}

DW_INLINE I16 zero_i() { return {}; }
DW_INLINE I16 set_i(int32_t x) { DW_PARTS(I16, part_i(x)); }
DW_INLINE I16 operator+(I16 a, I16 b) { DW_PARTS(I16, a.p[i] + b.p[i]); }
DW_INLINE I16 operator*(I16 a, I16 b) { DW_PARTS(I16, a.p[i] * b.p[i]); }
DW_INLINE I16 operator&(I16 a, I16 b) { DW_PARTS(I16, a.p[i] & b.p[i]); }
DW_INLINE I16 operator|(I16 a, I16 b) { DW_PARTS(I16, a.p[i] | b.p[i]); }
DW_INLINE I16 operator^(I16 a, I16 b) { DW_PARTS(I16, a.p[i] ^ b.p[i]); }
DW_INLINE I16 operator<<(I16 a, int n) { DW_PARTS(I16, a.p[i] << n); }
DW_INLINE I16 operator>>(I16 a, int n) { DW_PARTS(I16, a.p[i] >> n); }  // for nonnegative numbers
DW_INLINE I16 max(I16 a, I16 b) { DW_PARTS(I16, a.p[i] > b.p[i] ? a.p[i] : b.p[i]); }
DW_INLINE I16 min(I16 a, I16 b) { DW_PARTS(I16, a.p[i] < b.p[i] ? a.p[i] : b.p[i]); }
DW_INLINE I16 to_int(F16 a) { DW_PARTS(I16, part_to_int(a.p[i])); }
DW_INLINE F16 to_f(I16 a) { DW_PARTS(F16, __builtin_convertvector(a.p[i], vf)); }
DW_INLINE I16 bits_of(F16 a) { DW_PARTS(I16, (vi)a.p[i]); }
DW_INLINE F16 from_bits(I16 a) { DW_PARTS(F16, (vf)a.p[i]); }

DW_INLINE M16 no_lanes() { return {}; }
DW_INLINE M16 either(M16 a, M16 b) { DW_PARTS(M16, a.p[i] | b.p[i]); }
DW_INLINE bool any(M16 m) {
    vi all = m.p[0];
    for (int i = 1; i < PARTS; i++) all |= m.p[i];
    int64_t words[DW_VECTOR_BYTES / 8], sum = 0;
    memcpy(words, &all, sizeof(words));
    for (int64_t word : words) sum |= word;
    return sum != 0;
}
// Bit i is set if lane i is selected.
DW_INLINE uint32_t bits_of(M16 m) {
    uint32_t bits = 0;
#if DW_VECTOR_BYTES == 32
    DW_EACH bits |= (uint32_t)_mm256_movemask_ps((__m256)m.p[i]) << 8 * i;
#else
    DW_EACH for (int j = 0; j < LANES; j++) bits |= (uint32_t)(m.p[i][j] & 1) << (4 * i + j);
#endif
    return bits;
}
DW_INLINE M16 operator<(F16 a, F16 b) { DW_PARTS(M16, (vi)(a.p[i] < b.p[i])); }
DW_INLINE M16 operator>(F16 a, F16 b) { DW_PARTS(M16, (vi)(a.p[i] > b.p[i])); }
DW_INLINE M16 not_less(F16 a, F16 b) { DW_PARTS(M16, ~(vi)(a.p[i] < b.p[i])); }
DW_INLINE M16 operator<(I16 a, I16 b) { DW_PARTS(M16, (vi)(a.p[i] < b.p[i])); }
DW_INLINE M16 operator>(I16 a, I16 b) { DW_PARTS(M16, (vi)(a.p[i] > b.p[i])); }
DW_INLINE F16 select(M16 m, F16 yes, F16 no) { DW_PARTS(F16, (vf)(((vi)yes.p[i] & m.p[i]) | ((vi)no.p[i] & ~m.p[i]))); }
DW_INLINE M16 lane_mask(First f) {
    static const int32_t ones[32] = {-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
    M16 m;
    memcpy(&m, ones + 16 - f.n, sizeof(m));
    return m;
}
DW_INLINE F16 select_first(First f, F16 a, F16 otherwise = {}) { return f.n == 16 ? a : select(lane_mask(f), a, otherwise); }

// The end of a row is copied through a buffer, so that memory beyond it is not accessed.
template <class T>
struct Buffered {
    T numbers[16];
    Buffered() {}
    Buffered(const T *p, First f) {
        memset(numbers, 0, sizeof(numbers));
        memcpy(numbers, p, f.n * sizeof(T));
    }
    void write(T *p, First f) const { memcpy(p, numbers, f.n * sizeof(T)); }
};

// Part by part, because a copy of the struct would force it into memory.
DW_INLINE I16 load_i(const void *p) {
    I16 a;
    DW_EACH memcpy(&a.p[i], (const char *)p + i * DW_VECTOR_BYTES, DW_VECTOR_BYTES);
    return a;
}
DW_INLINE void store_i(void *p, I16 a) { DW_EACH memcpy((char *)p + i * DW_VECTOR_BYTES, &a.p[i], DW_VECTOR_BYTES); }
DW_INLINE I16 load_i(const void *p, First f) { return f.n == 16 ? load_i(p) : load_i(Buffered<int32_t>((const int32_t *)p, f).numbers); }
DW_INLINE void store_i(void *p, I16 a, First f) {
    if (f.n == 16) store_i(p, a);
    else memcpy(p, &a, f.n * 4);
}
// Load 16 narrow numbers with the compiler's vector conversion.
template <class T>
DW_INLINE I16 widened(const T *p) {
    typedef T narrow __attribute__((vector_size(LANES * sizeof(T))));
    I16 a;
    DW_EACH {
        narrow part;
        memcpy(&part, p + i * LANES, sizeof(part));
        a.p[i] = __builtin_convertvector(part, vi);
    }
    return a;
}
#if DW_VECTOR_BYTES == 32
DW_INLINE I16 load_u16(const bf16 *p) {
    I16 a;
    DW_EACH a.p[i] = (vi)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p + 8 * i)));
    return a;
}
DW_INLINE void store_u16(bf16 *p, I16 a) {
    const __m256i low = _mm256_set1_epi32(0xffff);
    const __m256i packed = _mm256_packus_epi32(_mm256_and_si256((__m256i)a.p[0], low), _mm256_and_si256((__m256i)a.p[1], low));
    _mm256_storeu_si256((__m256i *)p, _mm256_permute4x64_epi64(packed, 0xd8));
}
#elif defined(__ARM_NEON)
DW_INLINE I16 load_u16(const bf16 *p) {
    const uint16x8_t low = vld1q_u16(p), high = vld1q_u16(p + 8);
    return {{(vi)vmovl_u16(vget_low_u16(low)), (vi)vmovl_high_u16(low), (vi)vmovl_u16(vget_low_u16(high)), (vi)vmovl_high_u16(high)}};
}
DW_INLINE void store_u16(bf16 *p, I16 a) {
    // The lower halves of the lanes of two registers.
    vst1q_u16(p, vuzp1q_u16((uint16x8_t)a.p[0], (uint16x8_t)a.p[1]));
    vst1q_u16(p + 8, vuzp1q_u16((uint16x8_t)a.p[2], (uint16x8_t)a.p[3]));
}
#else
DW_INLINE I16 load_u16(const bf16 *p) {
    return widened(p);
}
DW_INLINE void store_u16(bf16 *p, I16 a) { DW_EACH for (int j = 0; j < LANES; j++) p[i * LANES + j] = (bf16)a.p[i][j]; }
#endif
DW_INLINE I16 load_u16(const bf16 *p, First f) { return f.n == 16 ? load_u16(p) : load_u16(Buffered<bf16>(p, f).numbers); }
DW_INLINE void store_u16(bf16 *p, I16 a, First f) {
    if (f.n == 16) return store_u16(p, a);
    Buffered<bf16> b;
    store_u16(b.numbers, a);
    b.write(p, f);
}
template <class T>
DW_INLINE I16 load_bytes(const T *p) {
#if DW_VECTOR_BYTES == 32
    const __m128i b = _mm_loadu_si128((const __m128i *)p), upper = _mm_srli_si128(b, 8);
    if (sizeof(T) && std::is_signed<T>::value) return {{(vi)_mm256_cvtepi8_epi32(b), (vi)_mm256_cvtepi8_epi32(upper)}};
    return {{(vi)_mm256_cvtepu8_epi32(b), (vi)_mm256_cvtepu8_epi32(upper)}};
#elif defined(__ARM_NEON)
    if (std::is_signed<T>::value) {
        const int8x16_t b = vld1q_s8((const int8_t *)p);
        const int16x8_t low = vmovl_s8(vget_low_s8(b)), high = vmovl_high_s8(b);
        return {{(vi)vmovl_s16(vget_low_s16(low)), (vi)vmovl_high_s16(low), (vi)vmovl_s16(vget_low_s16(high)), (vi)vmovl_high_s16(high)}};
    }
    const uint8x16_t b = vld1q_u8((const uint8_t *)p);
    const uint16x8_t low = vmovl_u8(vget_low_u8(b)), high = vmovl_high_u8(b);
    return {{(vi)vmovl_u16(vget_low_u16(low)), (vi)vmovl_high_u16(low), (vi)vmovl_u16(vget_low_u16(high)), (vi)vmovl_high_u16(high)}};
#else
    return widened(p);
#endif
}
DW_INLINE I16 load_u8(const uint8_t *p) { return load_bytes(p); }
DW_INLINE I16 load_s8(const int8_t *p) { return load_bytes(p); }
DW_INLINE I16 load_u8(const uint8_t *p, First f) { return load_bytes(f.n == 16 ? p : Buffered<uint8_t>(p, f).numbers); }
DW_INLINE I16 load_s8(const int8_t *p, First f) { return load_bytes(f.n == 16 ? p : Buffered<int8_t>(p, f).numbers); }
// Saturates to the range of T.
template <class T>
DW_INLINE void store_bytes(T *p, I16 a) {
#if DW_VECTOR_BYTES == 32
    a = min(max(a, set_i(std::is_signed<T>::value ? -128 : 0)), set_i(std::is_signed<T>::value ? 127 : 255));
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32((__m256i)a.p[0], (__m256i)a.p[1]), 0xd8);
    const __m128i low = _mm256_castsi256_si128(words), high = _mm256_extracti128_si256(words, 1);
    _mm_storeu_si128((__m128i *)p, std::is_signed<T>::value ? _mm_packs_epi16(low, high) : _mm_packus_epi16(low, high));
#elif defined(__ARM_NEON)
    const int16x8_t low = vqmovn_high_s32(vqmovn_s32((int32x4_t)a.p[0]), (int32x4_t)a.p[1]);
    const int16x8_t high = vqmovn_high_s32(vqmovn_s32((int32x4_t)a.p[2]), (int32x4_t)a.p[3]);
    if (std::is_signed<T>::value) vst1q_s8((int8_t *)p, vqmovn_high_s16(vqmovn_s16(low), high));
    else vst1q_u8((uint8_t *)p, vqmovun_high_s16(vqmovun_s16(low), high));
#else
    a = min(max(a, set_i(std::is_signed<T>::value ? -128 : 0)), set_i(std::is_signed<T>::value ? 127 : 255));
    DW_EACH for (int j = 0; j < LANES; j++) p[i * LANES + j] = (T)a.p[i][j];
#endif
}
DW_INLINE void store_s8(int8_t *p, I16 a) { store_bytes(p, a); }
DW_INLINE void store_u8(uint8_t *p, I16 a, First f) {
    if (f.n == 16) return store_bytes(p, a);
    Buffered<uint8_t> b;
    store_bytes(b.numbers, a);
    b.write(p, f);
}

DW_INLINE F16 load16(const float *p) { return from_bits(load_i(p)); }
DW_INLINE F16 load16(const float *p, First f) { return from_bits(load_i(p, f)); }
DW_INLINE void store16(float *p, F16 a) { store_i(p, bits_of(a)); }
DW_INLINE void store16(float *p, F16 a, First f) { store_i(p, bits_of(a), f); }

// Round 16 numbers to bf16 (nearest, ties to even; NaN stays NaN) and return the bits in the lower halves of the lanes.
DW_INLINE I16 bf16_bits(F16 a) {
    I16 r;
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    DW_EACH r.p[i] = (vi)vmovl_u16((uint16x4_t)vcvt_bf16_f32((float32x4_t)a.p[i]));
#else
    DW_EACH {
        const vu x = (vu)a.p[i], rounded = (x + (((x >> 16) & 1) + 0x7fff)) >> 16;
        r.p[i] = a.p[i] == a.p[i] ? (vi)rounded : part_i(0x7fc0);
    }
#endif
    return r;
}
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
DW_INLINE void store16(bf16 *p, F16 a) {
    for (int i = 0; i < PARTS; i += 2) {
        const bfloat16x8_t low = vcvtq_low_bf16_f32((float32x4_t)a.p[i]);
        const uint16x8_t packed = (uint16x8_t)vcvtq_high_bf16_f32(low, (float32x4_t)a.p[i + 1]);
        vst1q_u16(p + 4 * i, packed);
    }
}
#else
DW_INLINE void store16(bf16 *p, F16 a) { store_u16(p, bf16_bits(a)); }
#endif
DW_INLINE void store16(bf16 *p, F16 a, First f) { store_u16(p, bf16_bits(a), f); }

// Round 32 numbers to bf16 and return their bits, those of a first.
DW_INLINE I16 bf16_bits_concat(F16 a, F16 b) {
    bf16 packed[32];
    store16(packed, a), store16(packed + 16, b);
    return load_i(packed);
}
// Round pairs of numbers to bf16: bits of a in the lower halves of the lanes, of b in the upper halves.
DW_INLINE I16 bf16_bits_interleaved(F16 a, F16 b) { return bf16_bits(a) | bf16_bits(b) << 16; }
// Look up 16 indices below 16 in a table.
DW_INLINE F16 lookup_16(const float *table, I16 indices) {
#if DW_VECTOR_BYTES == 32
    const __m256 low = _mm256_loadu_ps(table), high = _mm256_loadu_ps(table + 8);
    // Bit 3 of an index, moved to the bit that blendv reads.
    DW_PARTS(F16, (vf)_mm256_blendv_ps(_mm256_permutevar8x32_ps(low, (__m256i)indices.p[i]), _mm256_permutevar8x32_ps(high, (__m256i)indices.p[i]),
                                       (__m256)(indices.p[i] << 28)));
#elif defined(__ARM_NEON)
    // The four bytes of each number.
    const uint8x16x4_t bytes = {vld1q_u8((const uint8_t *)table), vld1q_u8((const uint8_t *)(table + 4)), vld1q_u8((const uint8_t *)(table + 8)),
                                vld1q_u8((const uint8_t *)(table + 12))};
    DW_PARTS(F16, (vf)vqtbl4q_u8(bytes, (uint8x16_t)(indices.p[i] * 0x04040404 + 0x03020100)));
#else
    F16 r;
    DW_EACH for (int j = 0; j < LANES; j++) r.p[i][j] = table[indices.p[i][j]];
    return r;
#endif
}

DW_INLINE void transpose16(I16 r[16]) {
#if DW_VECTOR_BYTES == 32
    for (int rows = 0; rows < 16; rows += 8)
        for (int part = 0; part < 2; part++) {
            __m256i a[8], b[8];
            for (int i = 0; i < 8; i++) a[i] = (__m256i)r[rows + i].p[part];
            for (int i = 0; i < 4; i++) {
                b[2 * i] = _mm256_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
                b[2 * i + 1] = _mm256_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
            }
            for (int i = 0; i < 2; i++) {
                a[4 * i] = _mm256_unpacklo_epi64(b[4 * i], b[4 * i + 2]);
                a[4 * i + 1] = _mm256_unpackhi_epi64(b[4 * i], b[4 * i + 2]);
                a[4 * i + 2] = _mm256_unpacklo_epi64(b[4 * i + 1], b[4 * i + 3]);
                a[4 * i + 3] = _mm256_unpackhi_epi64(b[4 * i + 1], b[4 * i + 3]);
            }
            for (int i = 0; i < 4; i++) {
                r[rows + i].p[part] = (vi)_mm256_permute2x128_si256(a[i], a[i + 4], 0x20);
                r[rows + 4 + i].p[part] = (vi)_mm256_permute2x128_si256(a[i], a[i + 4], 0x31);
            }
        }
    for (int i = 0; i < 8; i++) std::swap(r[i].p[1], r[8 + i].p[0]);
#elif defined(__ARM_NEON)
    for (int rows = 0; rows < 16; rows += 4)
        for (int part = 0; part < 4; part++) {
            const int32x4_t a = (int32x4_t)r[rows].p[part], b = (int32x4_t)r[rows + 1].p[part];
            const int32x4_t c = (int32x4_t)r[rows + 2].p[part], d = (int32x4_t)r[rows + 3].p[part];
            const int64x2_t ab = (int64x2_t)vtrn1q_s32(a, b), ab2 = (int64x2_t)vtrn2q_s32(a, b);
            const int64x2_t cd = (int64x2_t)vtrn1q_s32(c, d), cd2 = (int64x2_t)vtrn2q_s32(c, d);
            r[rows].p[part] = (vi)vtrn1q_s64(ab, cd), r[rows + 1].p[part] = (vi)vtrn1q_s64(ab2, cd2);
            r[rows + 2].p[part] = (vi)vtrn2q_s64(ab, cd), r[rows + 3].p[part] = (vi)vtrn2q_s64(ab2, cd2);
        }
    for (int i = 0; i < 4; i++)
        for (int part = 1; part < 4; part++)
            for (int rows = 0; rows < 4 * part; rows += 4) std::swap(r[rows + i].p[part], r[4 * part + i].p[rows / 4]);
#else
    int32_t from[16][16], to[16][16];
    memcpy(from, r, sizeof(from));
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 16; j++) to[j][i] = from[i][j];
    memcpy(r, to, sizeof(to));
#endif
}

#undef DW_PARTS
#undef DW_EACH

}  // namespace deltaw
