// What the forward and the backward of attention share (arXiv 2205.14135).
//
// Columns are (query, head) pairs of the heads that share keys; 32 of them are computed at a time, against the keys that
// they see. Scores stand as (keys, columns), so that maxima and sums over keys are plain vector operations, and the
// weights come out as the next product reads them. Kept for the backward is one number for each column, the logarithm
// of its sum.
#pragma once
#include "multiply.h"
#include "scratch.h"
#include "segments.h"
#include "threads.h"

namespace deltaw {

const int KEYS = 96;  // that are computed at a time

struct HeadRows {  // number (token, head, i) at token·by_token + head·by_head + i
    const void *data;
    int64_t by_token, by_head;

    HeadRows(const void *data, const int64_t *strides) : data(data), by_token(strides[0]), by_head(strides[1]) {}
};
struct OutRows {  // the same, to be written
    void *data;
    int64_t by_token, by_head;

    OutRows(void *data, const int64_t *strides) : data(data), by_token(strides[0]), by_head(strides[1]) {}
};

struct Sizes {
    int64_t heads, key_heads, d, dv;
    float scaling, cap;

    int64_t group() const { return heads / key_heads; }
    // Scores times scale() are what cap · tanh is taken of, or exponents of 2.
    __m512 scale() const { return _mm512_set1_ps(cap > 0 ? scaling / cap : scaling * LOG2E); }
};

inline int64_t padded_length(int64_t length) { return (length + 15) / 16 * 16 + 16; }

// What the columns of one block are: tokens, heads, and up to where each sees.
struct Columns {
    int64_t token[COLUMNS], head[COLUMNS];  // rows of the queries
    alignas(64) int32_t last[COLUMNS];      // the last key (a place in the row) of the own segment
    alignas(64) int32_t earliest[COLUMNS];  // the first position seen
    int64_t lowest_key, latest_earliest;
    int vecs;

    Columns(const Segments &f, const Block &b, int64_t key_head, int64_t group) {
        const int64_t s = b.segment;
        for (int64_t c = 0; c < COLUMNS; c++) {
            const int64_t x = b.first + std::min(c, b.count - 1);
            const int64_t place = f.place(s, x / group);
            token[c] = f.row(s, x / group);
            head[c] = key_head * group + x % group;
            last[c] = (int32_t)(f.causal ? place : f.stops[s] - 1);
            earliest[c] = (int32_t)(f.window ? f.offsets[s] + place - f.starts[s] - f.window + 1 : INT32_MIN / 2);
        }
        lowest_key = last[0];
        latest_earliest = earliest[COLUMNS - 1];
        vecs = b.count > 16 ? 2 : 1;
    }

    // Whether all columns see all of these keys.
    bool clear(const Range &r, int64_t key, int64_t count) const {
        return !(r.own && key + count - 1 > lowest_key) && r.position + key - r.begin >= latest_earliest;
    }

    // Which of 16 columns a key is hidden from.
    __mmask16 hidden(int v, const Range &r, int64_t key) const {
        __mmask16 m = 0;
        if (r.own && key > lowest_key)
            m |= _mm512_cmpgt_epi32_mask(_mm512_set1_epi32((int32_t)key), _mm512_load_si512(last + 16 * v));
        const int64_t position = r.position + key - r.begin;
        if (position < latest_earliest)
            m |= _mm512_cmplt_epi32_mask(_mm512_set1_epi32((int32_t)position), _mm512_load_si512(earliest + 16 * v));
        return m;
    }
};

// Rows of heads in the forms that products read, by type.
template <class Op>
struct Tiles {
    typedef typename Op::Element T;
    static constexpr int PER = Op::PER_GROUP;

    static const T *at(const HeadRows &r, int64_t token, int64_t head) { return (const T *)r.data + token * r.by_token + head * r.by_head; }
    static T *at(const OutRows &r, int64_t token, int64_t head) { return (T *)r.data + token * r.by_token + head * r.by_head; }

    // Columns' rows as the right side of a product over the numbers of a head: lanes are columns.
    static void pack_across(const HeadRows &r, const Columns &c, const Block &b, int64_t d, char *into) {
        for (int v = 0; v < 2; v++) {
            const char *rows[16];
            for (int i = 0; i < 16; i++) {
                const int64_t x = 16 * v + i;
                rows[i] = x < b.count ? (const char *)at(r, c.token[x], c.head[x]) : nullptr;
            }
            pack_rows16(rows, d / PER, into + 64 * v, 128);
        }
    }

    // The same rows as the right side of a product over columns: lanes are the numbers of a head, 32 a panel.
    static void pack_along(const HeadRows &r, const Columns &c, const Block &b, int64_t d, char *into) {
        for (int64_t d0 = 0; d0 < d; d0 += 32)
            for (int64_t x = 0; x < COLUMNS; x += PER)
                for (int v = 0; v < 2; v++, into += 64) {
                    __mmask16 m = first(d - d0 - 16 * v);
                    __m512 one = _mm512_setzero_ps(), two = one;
                    if (x < b.count) one = load16(at(r, c.token[x], c.head[x]) + d0 + 16 * v, m);
                    if (PER == 2 && x + 1 < b.count) two = load16(at(r, c.token[x + 1], c.head[x + 1]) + d0 + 16 * v, m);
                    store_pair(into, one, two);
                }
    }

    static __m512 raise(__m512 x) { return PER == 1 ? exp2_16(x) : exp2_16_for_bf16(x); }

    // Two rows of 16 lanes, interleaved as one line of groups; of fp32 the first alone.
    static __m512i pair(__m512 one, __m512 two) {
        if (PER == 1) return (__m512i)one;
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(two, one), low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(both));
        return _mm512_or_si512(low, _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(both, 1)), 16));
    }
    static void store_pair(char *into, __m512 one, __m512 two) { _mm512_store_si512(into, pair(one, two)); }

    // Two rows of 16 lanes, `step` numbers apart; of fp32 the first alone.
    static void store_two(T *rows, int64_t step, __m512 one, __m512 two) {
        store16(rows, one);
        if (PER == 2) store16(rows + step, two);
    }

    // The same, and as a pair.
    static void store_rows_and_pair(T *rows, int64_t step, char *into, __m512 one, __m512 two) {
        if (PER == 1) {
            store16((float *)rows, one);
            _mm512_store_ps((float *)into, one);
            return;
        }
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(two, one);
        const __m256i low = _mm512_castsi512_si256(both), high = _mm512_extracti64x4_epi64(both, 1);
        _mm256_storeu_si256((__m256i *)rows, low);
        _mm256_storeu_si256((__m256i *)(rows + step), high);
        _mm512_store_si512(into, _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16)));
    }

    // (T, heads, d) to (heads, d, padded T), a part of the heads' tiles for each thread. What a group may read beyond the
    // last token is 0.
    static void transpose_heads(const HeadRows &r, int64_t heads, int64_t d, int64_t length, T *into) {
        const int64_t padded = padded_length(length), tiles = (length + 15) / 16;
        in_parallel([&](int thread, int threads) {
            int64_t begin, end;
            part_of(heads * tiles, thread, threads, begin, end);
            for (int64_t i = begin; i < end; i++)
                transpose_head(r, i / tiles, d, length, i % tiles * 16, padded, into + i / tiles * d * padded);
        });
        for (int64_t i = 0; i < heads * d; i++) memset(into + i * padded + padded - 16, 0, 16 * sizeof(T));
    }

    // 16 tokens of one head.
    static void transpose_head(const HeadRows &r, int64_t head, int64_t d, int64_t length, int64_t t0, int64_t padded, T *to) {
        for (int64_t d0 = 0; d0 < d; d0 += 16) {
            __mmask16 m = first(d - d0);
            __m512i lines[16];
            for (int i = 0; i < 16; i++) {
                lines[i] = _mm512_setzero_si512();
                if (t0 + i >= length) continue;
                const T *row = at(r, t0 + i, head) + d0;
                if (PER == 1) lines[i] = _mm512_maskz_loadu_epi32(m, row);
                else lines[i] = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, row));
            }
            transpose16(lines);
            for (int i = 0; i < 16 && d0 + i < d; i++) {
                T *line = to + (d0 + i) * padded + t0;
                if (PER == 1) _mm512_storeu_si512(line, lines[i]);
                else _mm256_storeu_si256((__m256i *)line, _mm512_cvtepi32_epi16(lines[i]));
            }
        }
    }

    // A (d, 32) tile of sums goes to the columns' rows, each times its lane of `by`.
    static void write_columns(const float *tile, const OutRows &r, const Columns &c, const Block &b, int64_t d, const __m512 by[2]) {
        for (int v = 0; v < c.vecs; v++)
            for (int64_t d0 = 0; d0 < d; d0 += 16) {
                __m512i lines[16];
                for (int i = 0; i < 16; i++)
                    lines[i] = d0 + i < d ? (__m512i)_mm512_mul_ps(_mm512_loadu_ps(tile + (d0 + i) * COLUMNS + 16 * v), by[v]) : _mm512_setzero_si512();
                transpose16(lines);
                for (int i = 0; i < 16 && 16 * v + i < b.count; i++)
                    store16(at(r, c.token[16 * v + i], c.head[16 * v + i]) + d0, (__m512)lines[i], first(d - d0));
            }
    }
};

}  // namespace deltaw
