// AVX-512 building blocks: conversions, exponentials, transposition, and threads borrowed from torch's OpenMP.
//
// Everything here works on 16 lanes of 32 bits. A "group" is what one lane of a product takes at a time:
// one fp32 number, two bf16 numbers, or four bytes; so all products share one shape of code.
#pragma once
#include <immintrin.h>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <cstdlib>
#include <algorithm>
#include <vector>
#include <cmath>

typedef uint16_t bf16;

// ---- threads ---------------------------------------------------------------------------------------------
// The addresses of GOMP_parallel, omp_get_thread_num, omp_get_num_threads and omp_get_max_threads of the library
// that torch itself uses: a second pool of threads would fight the first one for the same cores.
typedef void (*ParallelFn)(void (*)(void *), void *, unsigned, unsigned);
typedef int (*CountFn)(void);
extern ParallelFn parallel_fn;
extern CountFn thread_number_fn, team_size_fn, thread_count_fn;

// While true, a thread that is one of several works through kernels by itself, on rows of its own.
inline thread_local bool alone = false;

inline int thread_count() { return alone || !parallel_fn || !thread_count_fn ? 1 : thread_count_fn(); }

template <class Body>
inline void in_parallel(Body &&body) {
    const int count = thread_count();
    if (count <= 1) {
        body(0, 1);
        return;
    }
    struct Job { Body *body; int count; } job{&body, count};
    parallel_fn([](void *data) {
        Job *job = static_cast<Job *>(data);
        // A team may come out smaller than asked for; every part is worked on all the same.
        for (int part = thread_number_fn(); part < job->count; part += team_size_fn()) (*job->body)(part, job->count);
    }, &job, (unsigned)count, 0);
}

// [begin, end) of part `which` of `parts` of n things.
inline void part_of(int64_t n, int which, int parts, int64_t &begin, int64_t &end) {
    begin = n * which / parts;
    end = n * (which + 1) / parts;
}

const int64_t ROWS_FOR_EACH = 384;  // so many rows for each thread are shared out, rather than the columns of a product

// body(first row, number of rows) of kernels that treat each row by itself. Many rows are shared out among the
// threads, each of which goes through all kernels with its own; of few rows, the kernels share out their columns.
template <class Body>
inline void rows_apart(int64_t rows, Body &&body) {
    if (rows < ROWS_FOR_EACH * thread_count()) {
        body(0, rows);
        return;
    }
    in_parallel([&](int thread, int threads) {
        int64_t begin, end;
        part_of(rows, thread, threads, begin, end);
        const bool before = alone;
        alone = true;
        body(begin, end - begin);
        alone = before;
    });
}

// A thread's own room, grown when needed and kept; `slot` tells rooms of one thread apart.
inline void *room(int slot, size_t bytes) {
    struct Rooms {
        void *at[16] = {};
        size_t size[16] = {};
        ~Rooms() { for (void *p : at) free(p); }
    };
    static thread_local Rooms rooms;
    if (rooms.size[slot] < bytes) {
        free(rooms.at[slot]);
        size_t rounded = (bytes + 4095) / 4096 * 4096;
        rooms.at[slot] = aligned_alloc(64, rounded);
        rooms.size[slot] = rounded;
    }
    return rooms.at[slot];
}

// ---- numbers ---------------------------------------------------------------------------------------------
inline float to_float(bf16 v) { uint32_t b = (uint32_t)v << 16; float f; memcpy(&f, &b, 4); return f; }
inline float to_float(float v) { return v; }

inline __m512 widen(__m256i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }
inline __m256i narrow(__m512 v) { return (__m256i)_mm512_cvtneps_pbh(v); }

inline __m512 load16(const float *p) { return _mm512_loadu_ps(p); }
inline __m512 load16(const bf16 *p) { return widen(_mm256_loadu_si256((const __m256i *)p)); }
inline __m512 load16(const float *p, __mmask16 m) { return _mm512_maskz_loadu_ps(m, p); }
inline __m512 load16(const bf16 *p, __mmask16 m) { return widen(_mm256_maskz_loadu_epi16(m, p)); }
inline void store16(float *p, __m512 v) { _mm512_storeu_ps(p, v); }
inline void store16(bf16 *p, __m512 v) { _mm256_storeu_si256((__m256i *)p, narrow(v)); }
inline void store16(float *p, __m512 v, __mmask16 m) { _mm512_mask_storeu_ps(p, m, v); }
inline void store16(bf16 *p, __m512 v, __mmask16 m) { _mm256_mask_storeu_epi16(p, m, narrow(v)); }
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

// ---- layout ----------------------------------------------------------------------------------------------
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

// 16 rows of `groups` groups each (null rows count as zeros) become `groups` vectors of 16 lanes, `step`
// bytes apart at `into`: what a product takes as its right side.
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

// ---- products --------------------------------------------------------------------------------------------
struct OpF32 {
    typedef float Element;
    static const int PER_GROUP = 1;
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
    static const int PER_GROUP = 2;
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
struct OpS8 {  // unsigned bytes on the left, signed ones on the right; sums are whole numbers
    typedef int8_t Element;
    static const int PER_GROUP = 4;
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
template <class Op, int ROWS, int VECS, bool ONTO>
inline void product(const char *left, int64_t stride, const char *right, int64_t groups, const float *from, int64_t from_ld, float *tile, int64_t ld) {
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
