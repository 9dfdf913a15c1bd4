// Sixteen lanes of 32 bits in several registers of the compiler's own vectors (GCC, clang): two of AVX2, four of NEON or of
// any other processor; see vector.h.
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

// Arrays of registers that a function gives or takes go through memory where the compiler calls it.
#define DW_INLINE inline __attribute__((always_inline))

namespace deltaw {

typedef float vf __attribute__((vector_size(DW_VECTOR_BYTES)));
typedef int32_t vi __attribute__((vector_size(DW_VECTOR_BYTES)));
typedef uint32_t vu __attribute__((vector_size(DW_VECTOR_BYTES)));  // for sums that may wrap
const int LANES = DW_VECTOR_BYTES / 4, PARTS = 16 / LANES;

struct F16 { vf p[PARTS]; };
struct I16 { vi p[PARTS]; };
struct M16 { vi p[PARTS]; };    // a lane is all ones or all zeros
struct First { int64_t n; };    // which lanes of a row's end are there

DW_INLINE First first(int64_t n) { return {n >= 16 ? 16 : n < 0 ? 0 : n}; }

#define DW_EACH _Pragma("GCC unroll 4") for (int i = 0; i < PARTS; i++)
// One value of `type` from one expression of the parts' number i.
#define DW_PARTS(type, expression) type r; DW_EACH r.p[i] = expression; return r

DW_INLINE vf one_f(float x) { return x - (vf){}; }
DW_INLINE vi one_i(int32_t x) { return x - (vi){}; }
#if DW_VECTOR_BYTES == 32
DW_INLINE vf one_fma(vf a, vf b, vf c) { return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
DW_INLINE vf one_fnma(vf a, vf b, vf c) { return (vf)_mm256_fnmadd_ps((__m256)a, (__m256)b, (__m256)c); }
DW_INLINE vi one_to_int(vf a) { return (vi)_mm256_cvtps_epi32((__m256)a); }
DW_INLINE vf one_nearest(vf a) { return (vf)_mm256_round_ps((__m256)a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
#elif defined(__ARM_NEON)
DW_INLINE vf one_fma(vf a, vf b, vf c) { return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
DW_INLINE vf one_fnma(vf a, vf b, vf c) { return (vf)vfmsq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
DW_INLINE vi one_to_int(vf a) { return (vi)vcvtnq_s32_f32((float32x4_t)a); }
DW_INLINE vf one_nearest(vf a) { return (vf)vrndnq_f32((float32x4_t)a); }
#else
DW_INLINE vf one_fma(vf a, vf b, vf c) { return a * b + c; }
DW_INLINE vf one_fnma(vf a, vf b, vf c) { return c - a * b; }
DW_INLINE vi one_to_int(vf a) {
    vi r;
    for (int i = 0; i < LANES; i++) r[i] = (int32_t)lrintf(a[i]);
    return r;
}
DW_INLINE vf one_nearest(vf a) {
    vf r;
    for (int i = 0; i < LANES; i++) r[i] = nearbyintf(a[i]);
    return r;
}
#endif

DW_INLINE F16 zero_f() { return {}; }
DW_INLINE F16 set_f(float x) { DW_PARTS(F16, one_f(x)); }
DW_INLINE F16 operator+(F16 a, F16 b) { DW_PARTS(F16, a.p[i] + b.p[i]); }
DW_INLINE F16 operator-(F16 a, F16 b) { DW_PARTS(F16, a.p[i] - b.p[i]); }
DW_INLINE F16 operator*(F16 a, F16 b) { DW_PARTS(F16, a.p[i] * b.p[i]); }
DW_INLINE F16 operator/(F16 a, F16 b) { DW_PARTS(F16, a.p[i] / b.p[i]); }
DW_INLINE F16 fma(F16 a, F16 b, F16 c) { DW_PARTS(F16, one_fma(a.p[i], b.p[i], c.p[i])); }
DW_INLINE F16 fnma(F16 a, F16 b, F16 c) { DW_PARTS(F16, one_fnma(a.p[i], b.p[i], c.p[i])); }
// Where one is NaN, the second, as x86 has it.
DW_INLINE F16 max(F16 a, F16 b) { DW_PARTS(F16, a.p[i] > b.p[i] ? a.p[i] : b.p[i]); }
DW_INLINE F16 min(F16 a, F16 b) { DW_PARTS(F16, a.p[i] < b.p[i] ? a.p[i] : b.p[i]); }
DW_INLINE F16 abs(F16 a) { DW_PARTS(F16, (vf)((vi)a.p[i] & one_i(0x7fffffff))); }
DW_INLINE F16 nearest(F16 a) { DW_PARTS(F16, one_nearest(a.p[i])); }
// a · 2^n for whole n from -126 to 128, a from 0.5 to 1.5; infinity from n = 128 on where a ≥ 1, NaN stays NaN.
DW_INLINE F16 times_power_of_two(F16 a, F16 n) {
    DW_PARTS(F16, (n.p[i] > one_f(128) || (n.p[i] == one_f(128) && a.p[i] >= one_f(1))) ? one_f(INFINITY)
             : n.p[i] != n.p[i] ? n.p[i] : (vf)((vu)a.p[i] + ((vu)one_to_int(n.p[i]) << 23)));
}
DW_INLINE float sum_of(F16 a) {
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
DW_INLINE float largest_of(F16 a) {
    float most = a.p[0][0];
    DW_EACH for (int j = 0; j < LANES; j++) most = most < a.p[i][j] ? a.p[i][j] : most;
    return most;
}
DW_INLINE float least_of(F16 a) {
    float least = a.p[0][0];
    DW_EACH for (int j = 0; j < LANES; j++) least = a.p[i][j] < least ? a.p[i][j] : least;
    return least;
}

DW_INLINE I16 zero_i() { return {}; }
DW_INLINE I16 set_i(int32_t x) { DW_PARTS(I16, one_i(x)); }
DW_INLINE I16 operator+(I16 a, I16 b) { DW_PARTS(I16, a.p[i] + b.p[i]); }
DW_INLINE I16 operator*(I16 a, I16 b) { DW_PARTS(I16, a.p[i] * b.p[i]); }
DW_INLINE I16 operator&(I16 a, I16 b) { DW_PARTS(I16, a.p[i] & b.p[i]); }
DW_INLINE I16 operator|(I16 a, I16 b) { DW_PARTS(I16, a.p[i] | b.p[i]); }
DW_INLINE I16 operator<<(I16 a, int n) { DW_PARTS(I16, a.p[i] << n); }
DW_INLINE I16 operator>>(I16 a, int n) { DW_PARTS(I16, a.p[i] >> n); }  // of numbers that are not negative
DW_INLINE I16 max(I16 a, I16 b) { DW_PARTS(I16, a.p[i] > b.p[i] ? a.p[i] : b.p[i]); }
DW_INLINE I16 min(I16 a, I16 b) { DW_PARTS(I16, a.p[i] < b.p[i] ? a.p[i] : b.p[i]); }
DW_INLINE I16 to_int(F16 a) { DW_PARTS(I16, one_to_int(a.p[i])); }
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
// Bit i says whether lane i is chosen.
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
DW_INLINE M16 lanes_of(First f) {
    static const int32_t ones[32] = {-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
    M16 m;
    memcpy(&m, ones + 16 - f.n, sizeof(m));
    return m;
}
DW_INLINE F16 keep_first(First f, F16 a, F16 otherwise = {}) { return f.n == 16 ? a : select(lanes_of(f), a, otherwise); }

// Numbers of a row's end go through a buffer, so that nothing beyond them is touched.
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

// Part by part: a copy of the whole would keep the compiler from holding it in registers.
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
// 16 narrow numbers, by the compiler's own conversion.
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
    const __m256i both = _mm256_packus_epi32(_mm256_and_si256((__m256i)a.p[0], low), _mm256_and_si256((__m256i)a.p[1], low));
    _mm256_storeu_si256((__m256i *)p, _mm256_permute4x64_epi64(both, 0xd8));
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
// Clamped to the range of T.
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

// The bits of 16 numbers rounded to bf16, in the lower halves of the lanes: to nearest, ties to even; NaN stays NaN.
DW_INLINE I16 bf16_bits(F16 a) {
    I16 r;
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    DW_EACH r.p[i] = (vi)vmovl_u16((uint16x4_t)vcvt_bf16_f32((float32x4_t)a.p[i]));
#else
    DW_EACH {
        const vu x = (vu)a.p[i], rounded = (x + (((x >> 16) & 1) + 0x7fff)) >> 16;
        r.p[i] = a.p[i] == a.p[i] ? (vi)rounded : one_i(0x7fc0);
    }
#endif
    return r;
}
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
DW_INLINE void store16(bf16 *p, F16 a) {
    for (int i = 0; i < PARTS; i += 2) {
        const bfloat16x8_t low = vcvtq_low_bf16_f32((float32x4_t)a.p[i]);
        const uint16x8_t both = (uint16x8_t)vcvtq_high_bf16_f32(low, (float32x4_t)a.p[i + 1]);
        vst1q_u16(p + 4 * i, both);
    }
}
#else
DW_INLINE void store16(bf16 *p, F16 a) { store_u16(p, bf16_bits(a)); }
#endif
DW_INLINE void store16(bf16 *p, F16 a, First f) { store_u16(p, bf16_bits(a), f); }

// The bits of 32 numbers rounded to bf16, those of a first.
DW_INLINE I16 bf16_bits_of_both(F16 a, F16 b) {
    bf16 both[32];
    store16(both, a), store16(both + 16, b);
    return load_i(both);
}
// The bits of pairs of numbers rounded to bf16: of a in the lower halves of the lanes, of b in the upper ones.
DW_INLINE I16 bf16_bits_in_turn(F16 a, F16 b) { return bf16_bits(a) | bf16_bits(b) << 16; }
// Those of the table that 16 numbers below 16 ask for.
DW_INLINE F16 one_of_16(const float *table, I16 which) {
#if DW_VECTOR_BYTES == 32
    const __m256 low = _mm256_loadu_ps(table), high = _mm256_loadu_ps(table + 8);
    // An index' bit 3, moved to where a choice of lanes is read.
    DW_PARTS(F16, (vf)_mm256_blendv_ps(_mm256_permutevar8x32_ps(low, (__m256i)which.p[i]), _mm256_permutevar8x32_ps(high, (__m256i)which.p[i]),
                                       (__m256)(which.p[i] << 28)));
#elif defined(__ARM_NEON)
    // The four bytes of each number.
    const uint8x16x4_t bytes = {vld1q_u8((const uint8_t *)table), vld1q_u8((const uint8_t *)(table + 4)), vld1q_u8((const uint8_t *)(table + 8)),
                                vld1q_u8((const uint8_t *)(table + 12))};
    DW_PARTS(F16, (vf)vqtbl4q_u8(bytes, (uint8x16_t)(which.p[i] * 0x04040404 + 0x03020100)));
#else
    F16 r;
    DW_EACH for (int j = 0; j < LANES; j++) r.p[i][j] = table[which.p[i][j]];
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
