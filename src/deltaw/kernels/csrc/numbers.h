// Arithmetic on 16 lanes of 32 bits (AVX-512): conversions, exponentials, transposition.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

typedef uint16_t bf16;

namespace deltaw {

enum Type { F32 = 0, BF16 = 1, INT8 = 2 };  // as the caller numbers them

inline float to_float(bf16 v) { uint32_t b = (uint32_t)v << 16; float f; memcpy(&f, &b, 4); return f; }
inline float to_float(float v) { return v; }

inline __m512 widen(__m256i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }
inline __m256i round_to_bf16(__m512 v) { return (__m256i)_mm512_cvtneps_pbh(v); }

inline __m512 load16(const float *p) { return _mm512_loadu_ps(p); }
inline __m512 load16(const bf16 *p) { return widen(_mm256_loadu_si256((const __m256i *)p)); }
inline __m512 load16(const float *p, __mmask16 m) { return _mm512_maskz_loadu_ps(m, p); }
inline __m512 load16(const bf16 *p, __mmask16 m) { return widen(_mm256_maskz_loadu_epi16(m, p)); }
inline void store16(float *p, __m512 v) { _mm512_storeu_ps(p, v); }
inline void store16(bf16 *p, __m512 v) { _mm256_storeu_si256((__m256i *)p, round_to_bf16(v)); }
inline void store16(float *p, __m512 v, __mmask16 m) { _mm512_mask_storeu_ps(p, m, v); }
inline void store16(bf16 *p, __m512 v, __mmask16 m) { _mm256_mask_storeu_epi16(p, m, round_to_bf16(v)); }
inline __mmask16 first(int64_t n) { return n >= 16 ? (__mmask16)0xffff : (__mmask16)((1u << (n < 0 ? 0 : n)) - 1); }

// 2^x, to about 2 units in the last place of fp32; 0 below -126, infinity above 128, NaN stays NaN.
inline __m512 exp2_16(__m512 x) {
    __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 f = _mm512_sub_ps(x, n);  // [-0.5, 0.5]
    // Near-minimax polynomial of 2^f on [-0.5, 0.5].
    __m512 p = _mm512_set1_ps(1.5353362e-4f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.3398874e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.6184374e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5503324e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022648e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314720e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    __mmask16 low = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.0f), _CMP_LT_OQ);
    return _mm512_mask_mov_ps(_mm512_scalef_ps(p, n), low, _mm512_setzero_ps());
}
// The same to 3e-6, which is far below what a bf16 number tells apart.
inline __m512 exp2_16_for_bf16(__m512 x) {
    __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 f = _mm512_sub_ps(x, n);
    __m512 p = _mm512_set1_ps(9.57010002e-3f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.59178602e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.40247449e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.93121815e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.99999261e-1f));
    __mmask16 seen = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
    return _mm512_maskz_scalef_ps(seen, p, n);
}
const float LOG2E = 1.44269504088896341f, LN2 = 0.693147180559945309f;
inline __m512 exp_16(__m512 x) { return exp2_16(_mm512_mul_ps(x, _mm512_set1_ps(LOG2E))); }
inline __m512 sigmoid_16(__m512 x) {
    __m512 e = exp_16(_mm512_sub_ps(_mm512_setzero_ps(), x));
    return _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_add_ps(_mm512_set1_ps(1.0f), e));
}
inline __m512 tanh_16(__m512 x) {  // 1 - 2 / (1 + e^2x): saturates cleanly on both sides
    __m512 one = _mm512_set1_ps(1.0f), e = exp_16(_mm512_add_ps(x, x));
    return _mm512_sub_ps(one, _mm512_div_ps(_mm512_set1_ps(2.0f), _mm512_add_ps(one, e)));
}

inline void transpose16(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

// A "group" is what one lane of a product takes at a time: one fp32 number, two bf16 numbers or four int8 numbers.
// 16 rows of `groups` groups each (a null row counts as zeros) become `groups` vectors of 16 lanes, `step` bytes
// apart at `into`: the form in which a product reads its right side.
inline void pack_rows16(const char *const rows[16], int64_t groups, char *into, int64_t step) {
    for (int64_t g = 0; g < groups; g += 16) {
        __mmask16 m = first(groups - g);
        __m512i r[16];
        for (int i = 0; i < 16; i++)
            r[i] = rows[i] ? _mm512_maskz_loadu_epi32(m, rows[i] + 4 * g) : _mm512_setzero_si512();
        transpose16(r);
        int64_t n = std::min<int64_t>(16, groups - g);
        for (int i = 0; i < n; i++) _mm512_storeu_si512(into + (g + i) * step, r[i]);
    }
}

}  // namespace deltaw
