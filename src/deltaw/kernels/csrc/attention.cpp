// Attention over a forest of segments, forward and backward (arXiv 2205.14135), without a mask and without padding.
//
// Columns are (query, head) pairs of the heads that share keys; 32 of them are computed at a time, against the
// keys that they see: those of the segment's ancestors and its own. Scores stand as (keys, columns), so that
// maxima and sums over keys are plain vector operations, and the weights come out as the next product wants them.
// Kept for the backward is one number for each column, the logarithm of its sum.
#include "kernels.h"
#include "vectors.h"

const int COLUMNS = 32, KEYS = 96;

struct Rows {  // element (token, head, i) at token·by_token + head·by_head + i
    void *data;
    int64_t by_token, by_head;
};

struct Forest {
    int64_t count, length;
    const int64_t *starts, *stops, *parents, *offsets;
    int64_t window;  // 0: none
    int causal;
    // Where in the row the queries stand, in order; null where each token asks. Of segment s they are from[s] … from[s + 1].
    const int64_t *picked;
    std::vector<int64_t> from;
    int64_t queries;

    Forest(const int64_t *forest, int64_t segments, int64_t length, int64_t window, int causal, const int64_t *picked, int64_t picks)
        : count(segments), length(length), starts(forest), stops(forest + segments), parents(forest + 2 * segments),
          offsets(forest + 3 * segments), window(window), causal(causal), picked(picked), queries(picked ? picks : length) {
        if (!picked) return;
        for (int64_t s = 0; s < count; s++) from.push_back(std::lower_bound(picked, picked + picks, starts[s]) - picked);
        from.push_back(picks);
    }
    int64_t asking(int64_t s) const {
        return picked ? std::lower_bound(picked + from[s], picked + from.back(), stops[s]) - picked - from[s] : stops[s] - starts[s];
    }
    int64_t row(int64_t s, int64_t i) const { return (picked ? from[s] : starts[s]) + i; }    // among the queries
    int64_t place(int64_t s, int64_t i) const { return picked ? picked[from[s] + i] : starts[s] + i; }  // among the keys
};

struct Sizes {
    int64_t heads, key_heads, d, dv;
    float scaling, cap;
};

struct Block { int64_t segment, first, count, cost; };
struct Range { int64_t begin, end, position; bool own; };

static std::vector<Block> blocks_of(const Forest &f, int64_t group) {
    std::vector<Block> blocks;
    std::vector<int64_t> above(f.count);
    for (int64_t s = 0; s < f.count; s++) {
        const int64_t p = f.parents[s], size = f.asking(s);
        above[s] = p < 0 ? 0 : above[p] + f.stops[p] - f.starts[p];
        for (int64_t x = 0; x < size * group; x += COLUMNS) {
            int64_t n = std::min<int64_t>(COLUMNS, size * group - x);
            int64_t keys = f.causal ? f.place(s, (x + n - 1) / group) - f.starts[s] + 1 : f.stops[s] - f.starts[s];
            keys += above[s];
            if (f.window) keys = std::min(keys, f.window + COLUMNS);
            blocks.push_back({s, x, n, keys + 24});
        }
    }
    return blocks;
}

// Where each thread's share of the (key head, block) pairs begins, by cost.
static std::vector<int64_t> shares(const std::vector<Block> &blocks, int64_t key_heads, int threads) {
    double total = 0;
    for (const Block &b : blocks) total += b.cost;
    total *= key_heads;
    std::vector<int64_t> begins(threads + 1, (int64_t)blocks.size() * key_heads);
    begins[0] = 0;
    double sum = 0;
    int next = 1;
    for (int64_t i = 0; i < (int64_t)blocks.size() * key_heads && next < threads; i++) {
        sum += blocks[i % blocks.size()].cost;
        while (next < threads && sum >= total * next / threads) begins[next++] = i + 1;
    }
    return begins;
}

// The keys that a block's columns see, the root's first.
static int ranges_of(const Forest &f, const Block &b, int64_t group, std::vector<Range> &ranges) {
    ranges.clear();
    const int64_t s = b.segment, low = f.place(s, b.first / group), high = f.place(s, (b.first + b.count - 1) / group);
    const int64_t earliest = f.window ? f.offsets[s] + low - f.starts[s] - f.window + 1 : 0;
    for (int64_t at = s; at >= 0; at = f.parents[at]) {
        const int64_t end = at != s ? f.stops[at] : f.causal ? high + 1 : f.stops[s];
        const int64_t begin = f.starts[at] + std::max<int64_t>(0, earliest - f.offsets[at]);
        if (begin < end) ranges.push_back({begin, end, f.offsets[at] + begin - f.starts[at], at == s});
    }
    std::reverse(ranges.begin(), ranges.end());
    return (int)ranges.size();
}

// What the columns of one block are: tokens, heads, and up to where each sees.
struct Columns {
    int64_t token[COLUMNS], head[COLUMNS];  // rows of the queries
    alignas(64) int32_t last[COLUMNS];      // the last key (a place in the row) of the own segment
    alignas(64) int32_t earliest[COLUMNS];  // the first position seen
    int64_t lowest_key, latest_earliest;
    int vecs;

    Columns(const Forest &f, const Block &b, int64_t key_head, int64_t group) {
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

template <class Op>
struct Kernel {
    typedef typename Op::Element T;
    static const int PER = Op::PER_GROUP;

    static const T *at(const Rows &r, int64_t token, int64_t head) { return (const T *)r.data + token * r.by_token + head * r.by_head; }

    // Columns' rows as the right side of a product over the numbers of a head: lanes are columns.
    static void pack_across(const Rows &r, const Columns &c, const Block &b, int64_t d, char *into) {
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
    static void pack_along(const Rows &r, const Columns &c, const Block &b, int64_t d, char *into) {
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

    // (T, heads, d) to (heads, d, padded T).
    static void transpose_head(const Rows &r, int64_t head, int64_t d, int64_t length, int64_t t0, int64_t padded, T *to) {
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
    static void write_columns(const float *tile, const Rows &r, const Columns &c, const Block &b, int64_t d, const __m512 by[2]) {
        for (int v = 0; v < c.vecs; v++)
            for (int64_t d0 = 0; d0 < d; d0 += 16) {
                __m512i lines[16];
                for (int i = 0; i < 16; i++)
                    lines[i] = d0 + i < d ? (__m512i)_mm512_mul_ps(_mm512_loadu_ps(tile + (d0 + i) * COLUMNS + 16 * v), by[v]) : _mm512_setzero_si512();
                transpose16(lines);
                for (int i = 0; i < 16 && 16 * v + i < b.count; i++)
                    store16((T *)at(r, c.token[16 * v + i], c.head[16 * v + i]) + d0, (__m512)lines[i], first(d - d0));
            }
    }

    static void forward_block(const Forest &f, const Sizes &z, const Rows &q, const Rows &k, const Rows &out, const T *turned, int64_t padded,
                              const Block &b, int64_t key_head, float *logs, std::vector<Range> &ranges) {
        const int64_t group = z.heads / z.key_heads;
        Columns c(f, b, key_head, group);
        char *queries = (char *)room(4, z.d / PER * 128);
        float *scores = (float *)room(5, KEYS * COLUMNS * 4);
        char *weights = (char *)room(6, KEYS * 128);
        float *sums = (float *)room(7, z.dv * COLUMNS * 4);
        pack_across(q, c, b, z.d, queries);
        memset(sums, 0, z.dv * COLUMNS * 4);
        __m512 top[2], total[2];
        for (int v = 0; v < 2; v++) top[v] = _mm512_set1_ps(-1e30f), total[v] = _mm512_setzero_ps();
        const __m512 scale = _mm512_set1_ps(z.cap > 0 ? z.scaling / z.cap : z.scaling * LOG2E), cap = _mm512_set1_ps(z.cap * LOG2E);
        const __m512 minus = _mm512_set1_ps(-INFINITY);
        ranges_of(f, b, group, ranges);
        for (const Range &r : ranges)
            for (int64_t k0 = r.begin; k0 < r.end; k0 += KEYS) {
                const int64_t n = std::min<int64_t>(KEYS, r.end - k0);
                products<Op>(n, c.vecs, (const char *)at(k, k0, key_head), k.by_token * sizeof(T), queries, z.d / PER, scores, COLUMNS);
                __m512 most[2] = {top[0], top[1]};
                const bool clear = c.clear(r, k0, n);
                for (int64_t i = 0; i < n; i++)
                    for (int v = 0; v < c.vecs; v++) {
                        float *place = scores + i * COLUMNS + 16 * v;
                        __m512 s = _mm512_mul_ps(_mm512_loadu_ps(place), scale);
                        if (z.cap > 0) s = _mm512_mul_ps(cap, tanh_16(s));
                        if (!clear) s = _mm512_mask_mov_ps(s, c.hidden(v, r, k0 + i), minus);
                        _mm512_storeu_ps(place, s);
                        most[v] = _mm512_max_ps(most[v], s);
                    }
                for (int v = 0; v < c.vecs; v++) {
                    if (_mm512_cmp_ps_mask(most[v], top[v], _CMP_GT_OQ)) {
                        const __m512 by = exp2_16(_mm512_sub_ps(top[v], most[v]));
                        total[v] = _mm512_mul_ps(total[v], by);
                        for (int64_t i = 0; i < z.dv; i++) {
                            float *place = sums + i * COLUMNS + 16 * v;
                            _mm512_storeu_ps(place, _mm512_mul_ps(_mm512_loadu_ps(place), by));
                        }
                        top[v] = most[v];
                    }
                    for (int64_t i = 0; i < n; i += PER) {
                        __m512 one = raise(_mm512_sub_ps(_mm512_loadu_ps(scores + i * COLUMNS + 16 * v), top[v])), two = _mm512_setzero_ps();
                        if (PER == 2 && i + 1 < n) two = raise(_mm512_sub_ps(_mm512_loadu_ps(scores + (i + 1) * COLUMNS + 16 * v), top[v]));
                        total[v] = _mm512_add_ps(total[v], _mm512_add_ps(one, two));
                        store_pair(weights + i / PER * 128 + 64 * v, one, two);
                    }
                }
                products_onto<Op>(z.dv, c.vecs, (const char *)(turned + k0), padded * sizeof(T), weights, (n + PER - 1) / PER, sums, COLUMNS, sums, COLUMNS);
            }
        __m512 by[2];
        for (int v = 0; v < 2; v++) by[v] = _mm512_div_ps(_mm512_set1_ps(1.0f), total[v]);
        write_columns(sums, out, c, b, z.dv, by);
        alignas(64) float lanes[COLUMNS], tops[COLUMNS];
        for (int v = 0; v < 2; v++) _mm512_store_ps(lanes + 16 * v, total[v]), _mm512_store_ps(tops + 16 * v, top[v]);
        for (int64_t x = 0; x < b.count; x++) logs[c.head[x] * f.queries + c.token[x]] = tops[x] + __builtin_log2f(lanes[x]);
    }

    static void forward(const Forest &f, const Sizes &z, const Rows &q, const Rows &k, const Rows &v, const Rows &out, float *logs) {
        const int64_t group = z.heads / z.key_heads, padded = (f.length + 15) / 16 * 16 + 16, tiles = (f.length + 15) / 16;
        const std::vector<Block> blocks = blocks_of(f, group);
        T *turned = (T *)room(8, z.key_heads * z.dv * padded * sizeof(T));
        std::vector<int64_t> begins;
        in_parallel([&](int thread, int threads) {
            if (thread == 0) begins = shares(blocks, z.key_heads, threads);
            int64_t begin, end;
            part_of(z.key_heads * tiles, thread, threads, begin, end);
            for (int64_t i = begin; i < end; i++)
                transpose_head(v, i / tiles, z.dv, f.length, i % tiles * 16, padded, turned + i / tiles * z.dv * padded);
        });
        // What a pair may read beyond the last token must be finite.
        for (int64_t i = 0; i < z.key_heads * z.dv; i++) memset(turned + i * padded + padded - 16, 0, 16 * sizeof(T));
        in_parallel([&](int thread, int threads) {
            std::vector<Range> ranges;
            for (int64_t i = begins[thread]; i < begins[thread + 1]; i++) {
                const int64_t h = i / (int64_t)blocks.size();
                forward_block(f, z, q, k, out, turned + h * z.dv * padded, padded, blocks[i % blocks.size()], h, logs, ranges);
            }
        });
    }

    static void backward_block(const Forest &f, const Sizes &z, const Rows &q, const Rows &k, const Rows &v, const Rows &out, const Rows &grad,
                               const float *logs, const T *turned, int64_t padded, const Block &b, int64_t key_head, const Rows &dq,
                               float *dk, float *dv, int64_t wide_d, int64_t wide_dv, std::vector<Range> &ranges) {
        const int64_t group = z.heads / z.key_heads;
        Columns c(f, b, key_head, group);
        const int64_t groups = (c.vecs * 16) / PER, panel = COLUMNS / PER * 128;
        char *queries = (char *)room(4, z.d / PER * 128), *grads = (char *)room(5, z.dv / PER * 128);
        char *queries_along = (char *)room(6, (z.d + 31) / 32 * panel), *grads_along = (char *)room(7, (z.dv + 31) / 32 * panel);
        float *sums = (float *)room(9, z.d * COLUMNS * 4);
        char *scratch = (char *)room(10, KEYS * COLUMNS * (4 + 4 + 4 + 4 + 4));
        float *scores = (float *)scratch, *slopes = scores + KEYS * COLUMNS;
        char *pairs = (char *)(slopes + KEYS * COLUMNS);
        T *weights = (T *)(pairs + KEYS * COLUMNS * 4), *changes = weights + KEYS * COLUMNS * (4 / sizeof(T));
        pack_across(q, c, b, z.d, queries);
        pack_across(grad, c, b, z.dv, grads);
        pack_along(q, c, b, z.d, queries_along);
        pack_along(grad, c, b, z.dv, grads_along);
        memset(sums, 0, z.d * COLUMNS * 4);
        alignas(64) float log[COLUMNS], delta[COLUMNS];
        for (int64_t x = 0; x < COLUMNS; x++) {
            log[x] = INFINITY, delta[x] = 0;
            if (x >= b.count) continue;
            log[x] = logs[c.head[x] * f.queries + c.token[x]];
            __m512 dot = _mm512_setzero_ps();
            for (int64_t i = 0; i < z.dv; i += 16) {
                __mmask16 m = first(z.dv - i);
                dot = _mm512_fmadd_ps(load16(at(out, c.token[x], c.head[x]) + i, m), load16(at(grad, c.token[x], c.head[x]) + i, m), dot);
            }
            delta[x] = _mm512_reduce_add_ps(dot);
        }
        const __m512 scale = _mm512_set1_ps(z.cap > 0 ? z.scaling / z.cap : z.scaling * LOG2E), cap = _mm512_set1_ps(z.cap * LOG2E);
        const __m512 one = _mm512_set1_ps(1.0f), zero = _mm512_setzero_ps();
        ranges_of(f, b, group, ranges);
        for (const Range &r : ranges)
            for (int64_t k0 = r.begin; k0 < r.end; k0 += KEYS) {
                const int64_t n = std::min<int64_t>(KEYS, r.end - k0);
                products<Op>(n, c.vecs, (const char *)at(k, k0, key_head), k.by_token * sizeof(T), queries, z.d / PER, scores, COLUMNS);
                products<Op>(n, c.vecs, (const char *)at(v, k0, key_head), v.by_token * sizeof(T), grads, z.dv / PER, slopes, COLUMNS);
                const bool clear = c.clear(r, k0, n);
                for (int l = 0; l < c.vecs; l++) {
                    const __m512 by = _mm512_load_ps(log + 16 * l), less = _mm512_load_ps(delta + 16 * l);
                    // The weight of a key and the gradient of its score.
                    auto weigh = [&](int64_t i, __m512 &p, __m512 &change) {
                        const int64_t place = i * COLUMNS + 16 * l;
                        __m512 s = _mm512_mul_ps(_mm512_loadu_ps(scores + place), scale), bend = one;
                        if (z.cap > 0) {
                            __m512 t = tanh_16(s);
                            bend = _mm512_fnmadd_ps(t, t, one);
                            s = _mm512_mul_ps(cap, t);
                        }
                        p = raise(_mm512_sub_ps(s, by));
                        if (!clear) p = _mm512_mask_mov_ps(p, c.hidden(l, r, k0 + i), zero);
                        change = _mm512_mul_ps(p, _mm512_sub_ps(_mm512_loadu_ps(slopes + place), less));
                        if (z.cap > 0) change = _mm512_mul_ps(change, bend);
                    };
                    for (int64_t i = 0; i < n; i += PER) {
                        __m512 p, change, next_p = zero, next_change = zero;
                        weigh(i, p, change);
                        if (PER == 2 && i + 1 < n) weigh(i + 1, next_p, next_change);
                        const int64_t place = i * COLUMNS + 16 * l;
                        store_rows_and_pair(changes + place, COLUMNS, pairs + i / PER * 128 + 64 * l, change, next_change);
                        store_two(weights + place, COLUMNS, p, next_p);
                    }
                }
                for (int64_t d0 = 0; d0 < z.dv; d0 += 32)
                    products_onto<Op>(n, z.dv - d0 > 16 ? 2 : 1, (const char *)weights, COLUMNS * sizeof(T), grads_along + d0 / 32 * panel, groups,
                                 dv + k0 * wide_dv + d0, wide_dv, dv + k0 * wide_dv + d0, wide_dv);
                for (int64_t d0 = 0; d0 < z.d; d0 += 32)
                    products_onto<Op>(n, z.d - d0 > 16 ? 2 : 1, (const char *)changes, COLUMNS * sizeof(T), queries_along + d0 / 32 * panel, groups,
                                 dk + k0 * wide_d + d0, wide_d, dk + k0 * wide_d + d0, wide_d);
                products_onto<Op>(z.d, c.vecs, (const char *)(turned + k0), padded * sizeof(T), pairs, (n + PER - 1) / PER, sums, COLUMNS, sums, COLUMNS);
            }
        const __m512 by[2] = {_mm512_set1_ps(z.scaling), _mm512_set1_ps(z.scaling)};
        write_columns(sums, dq, c, b, z.d, by);
    }

    static void backward(const Forest &f, const Sizes &z, const Rows &q, const Rows &k, const Rows &v, const Rows &out, const Rows &grad,
                         const float *logs, const Rows &dq, const Rows &dk, const Rows &dv) {
        const int64_t group = z.heads / z.key_heads, padded = (f.length + 15) / 16 * 16 + 16, tiles = (f.length + 15) / 16;
        const int64_t wide_d = (z.d + 31) / 32 * 32, wide_dv = (z.dv + 31) / 32 * 32, wide = wide_d + wide_dv;
        const std::vector<Block> blocks = blocks_of(f, group);
        const int64_t count = (int64_t)blocks.size();
        const int most = thread_count_fn ? thread_count_fn() : 1;
        T *turned = (T *)room(8, z.key_heads * z.d * padded * sizeof(T));
        // Each thread sums into rooms of its own, one for each key head that it meets; they are added in order.
        const std::vector<int64_t> begins = shares(blocks, z.key_heads, std::max(most, 1));
        std::vector<int64_t> low(most), high(most), place(most);
        int64_t rooms = 0;
        for (int t = 0; t < most; t++) {
            low[t] = begins[t] / count;
            high[t] = begins[t + 1] > begins[t] ? (begins[t + 1] - 1) / count + 1 : low[t];
            place[t] = rooms;
            rooms += high[t] - low[t];
        }
        float *sums = (float *)room(11, rooms * f.length * wide * 4);
        in_parallel([&](int thread, int threads) {
            int64_t begin, end;
            part_of(z.key_heads * tiles, thread, threads, begin, end);
            for (int64_t i = begin; i < end; i++)
                transpose_head(k, i / tiles, z.d, f.length, i % tiles * 16, padded, turned + i / tiles * z.d * padded);
            if (thread < most) memset(sums + place[thread] * f.length * wide, 0, (high[thread] - low[thread]) * f.length * wide * 4);
        });
        for (int64_t i = 0; i < z.key_heads * z.d; i++) memset(turned + i * padded + padded - 16, 0, 16 * sizeof(T));
        in_parallel([&](int thread, int threads) {
            std::vector<Range> ranges;
            for (int64_t i = begins[thread]; i < begins[thread + 1]; i++) {
                const int64_t h = i / count;
                float *into = sums + (place[thread] + h - low[thread]) * f.length * wide;
                backward_block(f, z, q, k, v, out, grad, logs, turned + h * z.d * padded, padded, blocks[i % count], h, dq, into,
                               into + f.length * wide_d, wide_d, wide_dv, ranges);
            }
        });
        in_parallel([&](int thread, int threads) {
            int64_t begin, end;
            part_of(z.key_heads * f.length, thread, threads, begin, end);
            for (int64_t i = begin; i < end; i++) {
                const int64_t h = i / f.length, t = i % f.length;
                for (int which = 0; which < 2; which++) {
                    const int64_t d = which ? z.dv : z.d, line = which ? wide_dv : wide_d;
                    const __m512 by = _mm512_set1_ps(which ? 1.0f : z.scaling);
                    T *to = (T *)at(which ? dv : dk, t, h);
                    for (int64_t j = 0; j < d; j += 16) {
                        __m512 s = _mm512_setzero_ps();
                        for (int o = 0; o < most; o++)
                            if (h >= low[o] && h < high[o]) {
                                const float *from = sums + (place[o] + h - low[o]) * f.length * wide + (which ? f.length * wide_d : 0);
                                s = _mm512_add_ps(s, _mm512_loadu_ps(from + t * line + j));
                            }
                        store16(to + j, _mm512_mul_ps(s, by), first(d - j));
                    }
                }
            }
        });
    }
};

static Rows rows(void *data, int64_t by_token, int64_t by_head) { return Rows{data, by_token, by_head}; }

// picked (picks): where the queries stand among the keys, ascending; null where each token asks.
// strides: by token and by head, in elements, of q, k, v, out (then grad, dq, dk, dv). logs: (heads, queries) fp32.
extern "C" void dw_attention(int type, const int64_t *forest, int64_t segments, int64_t length, int64_t window, int causal, int64_t heads,
                             int64_t key_heads, int64_t d, int64_t dv, float scaling, float cap, const int64_t *picked, int64_t picks, void *q, void *k,
                             void *v, void *out, const int64_t *strides, float *logs) {
    const Forest f(forest, segments, length, window, causal, picked, picks);
    Sizes z{heads, key_heads, d, dv, scaling, cap};
    const int64_t *s = strides;
    Rows rq = rows(q, s[0], s[1]), rk = rows(k, s[2], s[3]), rv = rows(v, s[4], s[5]), ro = rows(out, s[6], s[7]);
    if (type == 0) Kernel<OpF32>::forward(f, z, rq, rk, rv, ro, logs);
    else Kernel<OpBF16>::forward(f, z, rq, rk, rv, ro, logs);
}
extern "C" void dw_attention_backward(int type, const int64_t *forest, int64_t segments, int64_t length, int64_t window, int causal,
                                      int64_t heads, int64_t key_heads, int64_t d, int64_t dv, float scaling, float cap, const int64_t *picked,
                                      int64_t picks, void *q, void *k, void *v, void *out, void *grad, void *dq, void *dk, void *dv_out, const int64_t *strides,
                                      const float *logs) {
    const Forest f(forest, segments, length, window, causal, picked, picks);
    Sizes z{heads, key_heads, d, dv, scaling, cap};
    const int64_t *s = strides;
    Rows rq = rows(q, s[0], s[1]), rk = rows(k, s[2], s[3]), rv = rows(v, s[4], s[5]), ro = rows(out, s[6], s[7]);
    Rows rg = rows(grad, s[8], s[9]), rdq = rows(dq, s[10], s[11]), rdk = rows(dk, s[12], s[13]), rdv = rows(dv_out, s[14], s[15]);
    if (type == 0) Kernel<OpF32>::backward(f, z, rq, rk, rv, ro, rg, logs, rdq, rdk, rdv);
    else Kernel<OpBF16>::backward(f, z, rq, rk, rv, ro, rg, logs, rdq, rdk, rdv);
}
