// 16 lanes of 32 bits in one AVX-512 register; see vector.h.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "bf16.h"

#define DW_INLINE inline

namespace deltaw {

typedef __mmask16 First;  // valid lanes at the end of a row
typedef __mmask16 M16;
struct F16 { __m512 v; };
struct I16 { __m512i v; };

inline First first(int64_t n) { return n >= 16 ? (First)0xffff : (First)((1u << (n < 0 ? 0 : n)) - 1); }

inline F16 zero_f() { return {_mm512_setzero_ps()}; }
inline F16 set_f(float x) { return {_mm512_set1_ps(x)}; }
inline F16 operator+(F16 a, F16 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F16 operator-(F16 a, F16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F16 operator*(F16 a, F16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F16 operator/(F16 a, F16 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F16 fma(F16 a, F16 b, F16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F16 fnma(F16 a, F16 b, F16 c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
inline F16 max(F16 a, F16 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F16 min(F16 a, F16 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F16 abs(F16 a) { return {_mm512_abs_ps(a.v)}; }
inline F16 nearest(F16 a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline F16 times_power_of_two(F16 a, F16 n) { return {_mm512_scalef_ps(a.v, n.v)}; }
inline float sum_lanes(F16 a) { return _mm512_reduce_add_ps(a.v); }
inline float max_lane(F16 a) { return _mm512_reduce_max_ps(a.v); }
inline float min_lane(F16 a) { return _mm512_reduce_min_ps(a.v); }

inline I16 zero_i() { return {_mm512_setzero_si512()}; }
inline I16 set_i(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline I16 operator+(I16 a, I16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline I16 operator*(I16 a, I16 b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
inline I16 operator&(I16 a, I16 b) { return {_mm512_and_si512(a.v, b.v)}; }
inline I16 operator|(I16 a, I16 b) { return {_mm512_or_si512(a.v, b.v)}; }
inline I16 operator^(I16 a, I16 b) { return {_mm512_xor_si512(a.v, b.v)}; }
inline I16 operator<<(I16 a, int n) { return {_mm512_slli_epi32(a.v, n)}; }
inline I16 operator>>(I16 a, int n) { return {(__m512i)((__v16su)a.v >> n)}; }  // for nonnegative numbers
inline I16 max(I16 a, I16 b) { return {_mm512_max_epi32(a.v, b.v)}; }
inline I16 min(I16 a, I16 b) { return {_mm512_min_epi32(a.v, b.v)}; }
inline I16 to_int(F16 a) { return {_mm512_cvtps_epi32(a.v)}; }
inline F16 to_f(I16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline I16 bits_of(F16 a) { return {_mm512_castps_si512(a.v)}; }
inline F16 from_bits(I16 a) { return {_mm512_castsi512_ps(a.v)}; }

inline M16 no_lanes() { return 0; }
inline M16 either(M16 a, M16 b) { return a | b; }
inline bool any(M16 m) { return m != 0; }
inline uint32_t bits_of(M16 m) { return m; }
inline M16 operator<(F16 a, F16 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
inline M16 operator>(F16 a, F16 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }
inline M16 not_less(F16 a, F16 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_NLT_UQ); }
inline M16 operator<(I16 a, I16 b) { return _mm512_cmplt_epi32_mask(a.v, b.v); }
inline M16 operator>(I16 a, I16 b) { return _mm512_cmpgt_epi32_mask(a.v, b.v); }
inline F16 select(M16 m, F16 yes, F16 no) { return {_mm512_mask_mov_ps(no.v, m, yes.v)}; }
inline F16 select_first(First m, F16 a, F16 otherwise = zero_f()) { return {_mm512_mask_mov_ps(otherwise.v, m, a.v)}; }

inline I16 load_i(const void *p) { return {_mm512_loadu_si512(p)}; }
inline I16 load_i(const void *p, First m) { return {_mm512_maskz_loadu_epi32(m, p)}; }
inline void store_i(void *p, I16 a) { _mm512_storeu_si512(p, a.v); }
inline void store_i(void *p, I16 a, First m) { _mm512_mask_storeu_epi32(p, m, a.v); }
// 16-bit numbers: widen with zeros, and truncate to the lower halves.
inline I16 load_u16(const bf16 *p) { return {_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p))}; }
inline I16 load_u16(const bf16 *p, First m) { return {_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, p))}; }
inline void store_u16(bf16 *p, I16 a) { _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(a.v)); }
inline void store_u16(bf16 *p, I16 a, First m) { _mm256_mask_storeu_epi16(p, m, _mm512_cvtepi32_epi16(a.v)); }
// 8-bit numbers. Stores saturate.
inline I16 load_u8(const uint8_t *p) { return {_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p))}; }
inline I16 load_s8(const int8_t *p) { return {_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p))}; }
inline I16 load_u8(const uint8_t *p, First m) { return {_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(m, p))}; }
inline I16 load_s8(const int8_t *p, First m) { return {_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(m, p))}; }
inline void store_u8(uint8_t *p, I16 a, First m) { _mm_mask_storeu_epi8(p, m, _mm512_cvtusepi32_epi8(max(a, zero_i()).v)); }
inline void store_s8(int8_t *p, I16 a) { _mm_storeu_si128((__m128i *)p, _mm512_cvtsepi32_epi8(a.v)); }

inline F16 load16(const float *p) { return {_mm512_loadu_ps(p)}; }
inline F16 load16(const float *p, First m) { return {_mm512_maskz_loadu_ps(m, p)}; }
inline void store16(float *p, F16 a) { _mm512_storeu_ps(p, a.v); }
inline void store16(float *p, F16 a, First m) { _mm512_mask_storeu_ps(p, m, a.v); }

#ifdef __AVX512BF16__
// Round 16 numbers to bf16 and return the bits in the lower halves of the lanes.
inline I16 bf16_bits(F16 a) { return {_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(a.v))}; }
inline void store16(bf16 *p, F16 a) { _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh(a.v)); }
inline void store16(bf16 *p, F16 a, First m) { _mm256_mask_storeu_epi16(p, m, (__m256i)_mm512_cvtneps_pbh(a.v)); }
#else
// Rounds to nearest, ties to even. NaN stays NaN.
inline I16 bf16_bits(F16 a) {
    const __m512i x = _mm512_castps_si512(a.v), one = _mm512_set1_epi32(1);
    const __m512i tie = _mm512_and_si512(_mm512_srli_epi32(x, 16), one);
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(x, _mm512_add_epi32(tie, _mm512_set1_epi32(0x7fff))), 16);
    return {_mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0))};
}
inline void store16(bf16 *p, F16 a) { store_u16(p, bf16_bits(a)); }
inline void store16(bf16 *p, F16 a, First m) { store_u16(p, bf16_bits(a), m); }
#endif

// Round 32 numbers to bf16 and return their bits, those of a first.
inline I16 bf16_bits_concat(F16 a, F16 b) {
#ifdef __AVX512BF16__
    return {(__m512i)_mm512_cvtne2ps_pbh(b.v, a.v)};
#else
    const __m256i low = _mm512_cvtepi32_epi16(bf16_bits(a).v), high = _mm512_cvtepi32_epi16(bf16_bits(b).v);
    return {_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1)};
#endif
}
// Round pairs of numbers to bf16: bits of a in the lower halves of the lanes, of b in the upper halves.
inline I16 bf16_bits_interleaved(F16 a, F16 b) {
#ifdef __AVX512BF16__
    alignas(64) static const int16_t interleave[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return {_mm512_permutexvar_epi16(_mm512_load_si512(interleave), bf16_bits_concat(a, b).v)};
#else
    return bf16_bits(a) | bf16_bits(b) << 16;
#endif
}
// Look up 16 indices below 16 in a table.
inline F16 lookup_16(const float *table, I16 indices) { return {_mm512_permutexvar_ps(indices.v, _mm512_loadu_ps(table))}; }

inline void transpose16(I16 r[16]) {
    __m512i t[16];
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i].v, r[2 * i + 1].v);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i].v, r[2 * i + 1].v);
    }
    for (int i = 0; i < 4; i++) {
        r[4 * i].v = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1].v = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2].v = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3].v = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i].v, r[i + 4].v, 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i].v, r[i + 4].v, 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8].v, r[i + 12].v, 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8].v, r[i + 12].v, 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        r[i].v = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8].v = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4].v = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12].v = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

}  // namespace deltaw
