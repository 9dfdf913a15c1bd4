// Common parts of the forward and backward of attention (arXiv 2205.14135).
//
// Columns are (query, head) pairs of heads that share keys. 32 columns are processed at a time against their visible
// keys. Scores are stored as (keys, columns), so maxima and sums over keys are vertical vector operations, and the
// weights are in the layout that the next product reads. The forward saves one number per column for the backward: the
// log-sum-exp of its scores.
#pragma once
#include "arithmetic.h"
#include "scratch.h"
#include "segments.h"
#include "threads.h"

namespace deltaw {

const int KEY_TILE = 96;  // keys per tile

struct HeadRows {  // number (token, head, i) is at token·by_token + head·by_head + i
    const void *data;
    int64_t by_token, by_head;

    HeadRows(const void *data, const int64_t *strides) : data(data), by_token(strides[0]), by_head(strides[1]) {}
};
struct OutRows {  // writable HeadRows
    void *data;
    int64_t by_token, by_head;

    OutRows(void *data, const int64_t *strides) : data(data), by_token(strides[0]), by_head(strides[1]) {}
};

struct AttentionSizes {
    int64_t heads, key_heads, d, dv;
    float scaling, cap;

    int64_t group() const { return heads / key_heads; }
    // Factor of the scores before cap · tanh, or before exponentiation with base 2 if there is no cap.
    F16 scale() const { return set_f(cap > 0 ? scaling / cap : scaling * LOG2E); }
};

inline int64_t padded_length(int64_t length) { return (length + 15) / 16 * 16 + 16; }

// Tokens, heads and visible ranges of the columns of one block.
struct QueryColumns {
    int64_t token[COLUMNS], head[COLUMNS];  // row of the query
    alignas(64) int32_t last[COLUMNS];  // last key (position in the row) of the query's segment
    alignas(64) int32_t earliest[COLUMNS];  // first visible position
    int64_t lowest_key, latest_earliest;
    int vecs;

    QueryColumns(const Segments &f, const Block &b, int64_t key_head, int64_t group) {
        const int64_t s = b.segment;
        for (int64_t c = 0; c < COLUMNS; c++) {
            const int64_t x = b.first + std::min(c, b.count - 1);
            const int64_t key_index = f.key_index(s, x / group);
            token[c] = f.row(s, x / group);
            head[c] = key_head * group + x % group;
            last[c] = (int32_t)(f.causal ? key_index : f.stops[s] - 1);
            earliest[c] = (int32_t)(f.window ? f.offsets[s] + key_index - f.starts[s] - f.window + 1 : INT32_MIN / 2);
        }
        lowest_key = last[0];
        latest_earliest = earliest[COLUMNS - 1];
        vecs = b.count > 16 ? 2 : 1;
    }

    // True if all columns see all of these keys.
    bool is_fully_visible(const Range &r, int64_t key, int64_t count) const {
        return !(r.is_query_segment && key + count - 1 > lowest_key) && r.position + key - r.begin >= latest_earliest;
    }

    // Mask of the 16 columns that must not see a key.
    M16 hidden(int v, const Range &r, int64_t key) const {
        M16 m = no_lanes();
        if (r.is_query_segment && key > lowest_key)
            m = either(m, set_i((int32_t)key) > load_i(last + 16 * v));
        const int64_t position = r.position + key - r.begin;
        if (position < latest_earliest)
            m = either(m, set_i((int32_t)position) < load_i(earliest + 16 * v));
        return m;
    }
};

// Packing of head rows for products. T is the stored type, Number the multiplied type. They differ only if bf16 is
// widened.
template <class Op>
struct Tiles {
    typedef typename Op::Left T;
    static constexpr int PER = Op::PER_GROUP;
    typedef typename std::conditional<PER == 1, float, bf16>::type Number;

    static const T *at(const HeadRows &r, int64_t token, int64_t head) { return (const T *)r.data + token * r.by_token + head * r.by_head; }
    static T *at(const OutRows &r, int64_t token, int64_t head) { return (T *)r.data + token * r.by_token + head * r.by_head; }

    // Load lanes of 16 numbers in the multiplied type.
    static I16 lanes(const float *p, First m) { return load_i(p, m); }
    static I16 lanes(const bf16 *p, First m) { return PER == 1 ? load_u16(p, m) << 16 : load_u16(p, m); }
    static void store_lanes(float *p, I16 x, First m) { store_i(p, x, m); }
    static void store_lanes(bf16 *p, I16 x, First m) { store_u16(p, x, m); }

    // Pack the columns' rows as the right side of a product over head dimensions. Lanes are columns.
    static void pack_across(const HeadRows &r, const QueryColumns &c, const Block &b, int64_t d, char *into) {
        for (int v = 0; v < 2; v++) {
            const T *rows[16];
            for (int i = 0; i < 16; i++) {
                const int64_t x = 16 * v + i;
                rows[i] = x < b.count ? at(r, c.token[x], c.head[x]) : nullptr;
            }
            if (!Op::WIDENS) {
                pack_rows16((const char *const *)rows, d / PER, into + 64 * v, 128);
                continue;
            }
            for (int64_t d0 = 0; d0 < d; d0 += 16) {
                I16 line[16];
                for (int i = 0; i < 16; i++) line[i] = rows[i] ? lanes(rows[i] + d0, first(d - d0)) : zero_i();
                transpose16(line);
                for (int i = 0; i < 16 && d0 + i < d; i++) store_i(into + (d0 + i) * 128 + 64 * v, line[i]);
            }
        }
    }

    // Pack the columns' rows as the right side of a product over columns. Lanes are head dimensions, 32 per panel.
    static void pack_along(const HeadRows &r, const QueryColumns &c, const Block &b, int64_t d, char *into) {
        for (int64_t d0 = 0; d0 < d; d0 += 32)
            for (int64_t x = 0; x < COLUMNS; x += PER)
                for (int v = 0; v < 2; v++, into += 64) {
                    const First m = first(d - d0 - 16 * v);
                    F16 one = zero_f(), two = one;
                    if (x < b.count) one = load16(at(r, c.token[x], c.head[x]) + d0 + 16 * v, m);
                    if (PER == 2 && x + 1 < b.count) two = load16(at(r, c.token[x + 1], c.head[x + 1]) + d0 + 16 * v, m);
                    store_i(into, pair(one, two));
                }
    }

    // Weights of bf16 rows need only bf16 precision.
    static F16 exponentiate(F16 x) { return std::is_same<T, float>::value ? exp2_16(x) : exp2_16_for_bf16(x); }

    // Interleave two rows of 16 lanes into a line of groups. For fp32 only the first row.
    static I16 pair(F16 one, F16 two) {
        if (PER == 1) return bits_of(one);
        return bf16_bits(one) | (bf16_bits(two) << 16);
    }
    static void store_pair(char *into, F16 one, F16 two) { store_i(into, pair(one, two)); }

    // Store two rows of 16 lanes, `step` numbers apart. For fp32 only the first row.
    static void store_two(Number *rows, int64_t step, F16 one, F16 two) {
        store16(rows, one);
        if (PER == 2) store16(rows + step, two);
    }

    // Store two rows like store_two, and interleaved like pair.
    static void store_rows_and_pair(Number *rows, int64_t step, char *into, F16 one, F16 two) {
        if (PER == 1) {
            store16((float *)rows, one);
            store_i(into, bits_of(one));
            return;
        }
        const I16 low = bf16_bits(one), high = bf16_bits(two);
        store_u16((bf16 *)rows, low);
        store_u16((bf16 *)rows + step, high);
        store_i(into, low | (high << 16));
    }

    // Transpose (T, heads, d) to (heads, d, padded T). Threads divide the heads' tiles. Padding that a group may read
    // is 0.
    static void transpose_heads(const HeadRows &r, int64_t heads, int64_t d, int64_t length, Number *into) {
        const int64_t padded = padded_length(length), tiles = (length + 15) / 16;
        in_parallel([&](int thread, int threads) {
            int64_t begin, end;
            split_range(heads * tiles, thread, threads, begin, end);
            for (int64_t i = begin; i < end; i++)
                transpose_head(r, i / tiles, d, length, i % tiles * 16, padded, into + i / tiles * d * padded);
        });
        for (int64_t i = 0; i < heads * d; i++) memset(into + i * padded + padded - 16, 0, 16 * sizeof(Number));
    }

    // Transpose 16 tokens of one head.
    static void transpose_head(const HeadRows &r, int64_t head, int64_t d, int64_t length, int64_t t0, int64_t padded, Number *to) {
        for (int64_t d0 = 0; d0 < d; d0 += 16) {
            const First m = first(d - d0);
            I16 line[16];
            for (int i = 0; i < 16; i++) line[i] = t0 + i < length ? lanes(at(r, t0 + i, head) + d0, m) : zero_i();
            transpose16(line);
            for (int i = 0; i < 16 && d0 + i < d; i++) store_lanes(to + (d0 + i) * padded + t0, line[i], first(16));
        }
    }

    // Write a (d, 32) tile of sums to the columns' rows, each scaled by its lane of `by`.
    static void write_columns(const float *tile, const OutRows &r, const QueryColumns &c, const Block &b, int64_t d, const F16 by[2]) {
        for (int v = 0; v < c.vecs; v++)
            for (int64_t d0 = 0; d0 < d; d0 += 16) {
                I16 line[16];
                for (int i = 0; i < 16; i++)
                    line[i] = d0 + i < d ? bits_of(load16(tile + (d0 + i) * COLUMNS + 16 * v) * by[v]) : zero_i();
                transpose16(line);
                for (int i = 0; i < 16 && 16 * v + i < b.count; i++)
                    store16(at(r, c.token[16 * v + i], c.head[16 * v + i]) + d0, from_bits(line[i]), first(d - d0));
            }
    }
};

// Rows of heads as the left side of products. They are read in place, or widened into a buffer (heads, length, d).
template <class Op>
class LeftOperand {
    typedef Tiles<Op> Tile;
    typedef typename Tile::Number Number;

    const HeadRows r;
    const int64_t d, length;
    Number *const wide;

  public:
    static int64_t numbers(int64_t heads, int64_t d, int64_t length) { return Op::WIDENS ? heads * d * length : 0; }

    // wide: buffer of numbers(…) elements.
    LeftOperand(const HeadRows &r, int64_t heads, int64_t d, int64_t length, Number *wide) : r(r), d(d), length(length), wide(wide) {
        if (!Op::WIDENS) return;
        rows_in_parallel(heads * length, [&](int64_t i) {
            Op::widen(Tile::at(r, i % length, i / length), d, d, wide + i * d);
        });
    }
    const char *at(int64_t token, int64_t head) const {
        return Op::WIDENS ? (const char *)(wide + (head * length + token) * d) : (const char *)Tile::at(r, token, head);
    }
    int64_t stride() const { return (Op::WIDENS ? d : r.by_token) * (int64_t)sizeof(Number); }
};

}  // namespace deltaw
