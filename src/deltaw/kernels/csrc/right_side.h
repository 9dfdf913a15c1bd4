// The right side of a product: where it lies, and how 32 of its columns are laid out for `products` to read.
// It is laid out anew for each call, which costs 1 to 3 % of the product and needs no second copy of the weights.
#pragma once
#include "multiply.h"
#include "scratch.h"

namespace deltaw {

const int PANEL = 32;  // columns that are laid out at a time

struct Right {  // (K, N): element (k, n) at n·ld + k where `by_column`, else at k·ld + n
    const void *data;
    int64_t ld;
    int type;
    int by_column;
    float scale;  // of fp32 data
    // Of bf16 data that are rounded to int8 here: what they are divided by, (N) where `by_column`, else (K).
    const float *int8_scale = nullptr;

    int64_t number_size() const { return type == F32 ? 4 : type == BF16 ? 2 : 1; }
};

namespace packing {

inline __m256i to_bf16(const float *p, __mmask16 m, __m512 scale) { return round_to_bf16(_mm512_mul_ps(load16(p, m), scale)); }
inline __m512 inverse(float scale) { return _mm512_set1_ps(scale > 0 ? 1.0f / scale : 0.0f); }

// Where `by_column`: fp32 numbers that are rounded to bf16.
inline void columns_to_bf16(const Right &b, int64_t N, int64_t n0, int64_t k0, int64_t depth, int64_t groups, int vecs, char *into) {
    Scratch scratch;
    bf16 *const lines = scratch.take<bf16>(16 * groups * 2);
    const float *const data = (const float *)b.data;
    const __m512 scale = _mm512_set1_ps(b.scale);
    for (int v = 0; v < vecs; v++) {
        const char *rows[16];
        for (int i = 0; i < 16; i++) {
            const int64_t n = n0 + 16 * v + i;
            bf16 *const to = lines + i * groups * 2;
            rows[i] = n < N ? (const char *)to : nullptr;
            if (n >= N) continue;
            for (int64_t k = 0; k < groups * 2; k += 16)
                _mm256_mask_storeu_epi16(to + k, first(groups * 2 - k), to_bf16(data + n * b.ld + k0 + k, first(depth - k), scale));
        }
        pack_rows16(rows, groups, into + 64 * v, 128);
    }
}

// Where `by_column`: bf16 numbers that are rounded to int8.
inline void columns_to_int8(const Right &b, int64_t N, int64_t n0, int64_t k0, int64_t depth, int64_t groups, int vecs, char *into) {
    Scratch scratch;
    char *const lines = scratch.take(16 * (groups * 4 + 16));
    for (int v = 0; v < vecs; v++) {
        const char *rows[16];
        for (int i = 0; i < 16; i++) {
            const int64_t n = n0 + 16 * v + i;
            char *const to = lines + i * groups * 4;
            rows[i] = n < N ? to : nullptr;
            if (n >= N) continue;
            const __m512 by = inverse(b.int8_scale[n]);
            for (int64_t k = 0; k < groups * 4; k += 16) {
                const __m512 x = load16((const bf16 *)b.data + n * b.ld + k0 + k, first(depth - k));
                _mm_storeu_si128((__m128i *)(to + k), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(x, by))));
            }
        }
        pack_rows16(rows, groups, into + 64 * v, 128);
    }
}

template <class Op>
inline void columns_as_they_are(const Right &b, int64_t N, int64_t n0, int64_t k0, int64_t groups, int vecs, char *into) {
    const int64_t size = 4 / Op::PER_GROUP;
    for (int v = 0; v < vecs; v++) {
        const char *rows[16];
        for (int i = 0; i < 16; i++) {
            const int64_t n = n0 + 16 * v + i;
            rows[i] = n < N ? (const char *)b.data + (n * b.ld + k0) * size : nullptr;
        }
        pack_rows16(rows, groups, into + 64 * v, 128);
        if (Op::PER_GROUP == 1 && b.scale != 1.0f)
            for (int64_t g = 0; g < groups; g++) {
                float *const at = (float *)(into + 128 * g + 64 * v);
                _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), _mm512_set1_ps(b.scale)));
            }
    }
}

// Not `by_column`: 16 columns from n on, whose groups span rows.
inline void rows_of_f32(const Right &b, int64_t n, int64_t k0, int64_t groups, __mmask16 m, char *to) {
    const __m512 scale = _mm512_set1_ps(b.scale);
    for (int64_t g = 0; g < groups; g++, to += 128)
        _mm512_store_ps((float *)to, _mm512_mul_ps(load16((const float *)b.data + (k0 + g) * b.ld + n, m), scale));
}

inline void rows_to_bf16(const Right &b, int64_t n, int64_t k0, int64_t depth, int64_t groups, __mmask16 m, char *to) {
    const __m512 scale = _mm512_set1_ps(b.scale);
    const float *const data = (const float *)b.data;
    for (int64_t g = 0; g < groups; g++, to += 128) {
        const float *const at = data + (k0 + 2 * g) * b.ld + n;
        __m512i low = _mm512_cvtepu16_epi32(to_bf16(at, m, scale)), high = _mm512_setzero_si512();
        if (2 * g + 1 < depth) high = _mm512_cvtepu16_epi32(to_bf16(at + b.ld, m, scale));
        _mm512_store_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
}

inline void rows_of_bf16(const Right &b, int64_t n, int64_t k0, int64_t depth, int64_t groups, __mmask16 m, char *to) {
    const bf16 *const data = (const bf16 *)b.data;
    for (int64_t g = 0; g < groups; g++, to += 128) {
        const bf16 *const at = data + (k0 + 2 * g) * b.ld + n;
        __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, at)), high = _mm512_setzero_si512();
        if (2 * g + 1 < depth) high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, at + b.ld));
        _mm512_store_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
}

inline void rows_to_int8(const Right &b, int64_t n, int64_t k0, int64_t depth, int64_t groups, __mmask16 m, char *to) {
    const bf16 *const data = (const bf16 *)b.data + n;
    for (int64_t g = 0; g < groups; g++, to += 128) {
        __m512i sum = _mm512_setzero_si512();
        for (int j = 0; j < 4 && 4 * g + j < depth; j++) {
            const int64_t k = k0 + 4 * g + j;
            const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(load16(data + k * b.ld, m), inverse(b.int8_scale[k])));
            sum = _mm512_or_si512(sum, _mm512_slli_epi32(_mm512_and_si512(q, _mm512_set1_epi32(255)), 8 * j));
        }
        _mm512_store_si512(to, sum);
    }
}

inline void rows_of_int8(const Right &b, int64_t n, int64_t k0, int64_t depth, int64_t groups, __mmask16 m, char *to) {
    const int8_t *q = (const int8_t *)b.data + k0 * b.ld + n;
    const __m128i none = _mm_setzero_si128();
    for (int64_t g = 0; g < groups; g++, q += 4 * b.ld, to += 128) {
        __m128i r[4];
        for (int j = 0; j < 4; j++) r[j] = 4 * g + j < depth ? _mm_maskz_loadu_epi8(m, q + j * b.ld) : none;
        const __m128i low = _mm_unpacklo_epi8(r[0], r[1]), high = _mm_unpackhi_epi8(r[0], r[1]);
        const __m128i low2 = _mm_unpacklo_epi8(r[2], r[3]), high2 = _mm_unpackhi_epi8(r[2], r[3]);
        _mm_store_si128((__m128i *)to, _mm_unpacklo_epi16(low, low2));
        _mm_store_si128((__m128i *)to + 1, _mm_unpackhi_epi16(low, low2));
        _mm_store_si128((__m128i *)to + 2, _mm_unpacklo_epi16(high, high2));
        _mm_store_si128((__m128i *)to + 3, _mm_unpackhi_epi16(high, high2));
    }
}

}  // namespace packing

// Columns n0 … n0+31 and groups g0 … g0+groups-1 of the right side, as `products` reads them.
template <class Op>
inline void pack(const Right &b, int64_t K, int64_t N, int64_t n0, int64_t g0, int64_t groups, char *into) {
    const int per = Op::PER_GROUP;
    const int64_t k0 = g0 * per, depth = std::min(K - k0, groups * per);
    const int vecs = N - n0 > 16 ? 2 : 1;
    if (b.by_column) {
        if (per == 2 && b.type == F32) packing::columns_to_bf16(b, N, n0, k0, depth, groups, vecs, into);
        else if (per == 4 && b.type == BF16) packing::columns_to_int8(b, N, n0, k0, depth, groups, vecs, into);
        else packing::columns_as_they_are<Op>(b, N, n0, k0, groups, vecs, into);
        return;
    }
    for (int v = 0; v < vecs; v++) {
        const int64_t n = n0 + 16 * v;
        const __mmask16 m = first(N - n);
        char *const to = into + 64 * v;
        if (per == 1) packing::rows_of_f32(b, n, k0, groups, m, to);
        else if (per == 2 && b.type == F32) packing::rows_to_bf16(b, n, k0, depth, groups, m, to);
        else if (per == 2) packing::rows_of_bf16(b, n, k0, depth, groups, m, to);
        else if (b.type == BF16) packing::rows_to_int8(b, n, k0, depth, groups, m, to);
        else packing::rows_of_int8(b, n, k0, depth, groups, m, to);
    }
}

// Fetches the memory that the next panel will be packed from, a few lines at a time while this one is worked on.
struct Ahead {
    const char *base = nullptr;
    int64_t rows = 0, bytes = 0, stride = 0, row = 0, at = 0;

    template <class Op>
    void panel(const Right &b, int64_t K, int64_t N, int64_t n0, int64_t g0, int64_t groups) {
        const int64_t size = b.number_size(), k0 = g0 * Op::PER_GROUP;
        const int64_t deep = std::min(K - k0, groups * Op::PER_GROUP), wide = std::min<int64_t>(N - n0, PANEL);
        base = (const char *)b.data + (b.by_column ? n0 * b.ld + k0 : k0 * b.ld + n0) * size;
        rows = b.by_column ? wide : deep;
        bytes = (b.by_column ? deep : wide) * size;
        stride = b.ld * size;
        row = at = 0;
    }
    int64_t lines() const { return rows * ((bytes + 63) / 64); }
    void fetch(int64_t count) {
        for (; count > 0 && row < rows; count--) {
            __builtin_prefetch(base + row * stride + at, 0, 2);
            at += 64;
            if (at >= bytes) at = 0, row++;
        }
    }
};

}  // namespace deltaw
