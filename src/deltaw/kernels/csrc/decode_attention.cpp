#include "decode_attention.h"

#include <limits>

#include "decode_words.h"

namespace deltaw {

namespace {

const float NO_SCORE = -std::numeric_limits<float>::infinity();

// Words of a key.
int64_t key_words(const DecodeModel &model, const DecodeBlock &block) { return words_of(model.cache_type, block.head_size); }
// Bytes of a key head's keys in a page. Its values follow.
int64_t key_bytes(const DecodeModel &model, const DecodeBlock &block) { return key_words(model, block) * PAGE_TOKENS * 4; }

char *page_head(const DecodeModel &model, const DecodeBlock &block, const DecodeStep &step, int64_t sequence, int64_t page, int64_t key_head) {
    const int64_t number = step.page_table[sequence * step.pages_per_sequence + page], number_bytes = model.cache_type == F32 ? 4 : 2;
    const int64_t head_bytes = key_bytes(model, block) + PAGE_TOKENS * block.head_size * number_bytes;
    return (char *)step.pages + (number * model.page_numbers + block.cache_offset) * number_bytes + key_head * head_bytes;
}

// ---- scores ----------------------------------------------------------------------------------------------------
#if defined(__AVX512F__)
const int SCORE_VECS = 2, VALUE_VECS = 4;
#else
const int SCORE_VECS = 1, VALUE_VECS = 2;
#endif

// Compute scores (N, 32) of one page for N queries of `words` words, `ld` floats from query to query.
template <class Words, int N>
__attribute__((noinline)) void page_scores(const char *const *q, const char *keys, int64_t words, float *scores, int64_t ld) {
    for (int half = 0; half < 2; half += SCORE_VECS) {
        F16 s[N][SCORE_VECS];
#pragma GCC unroll 12
        for (int i = 0; i < N; i++)
#pragma GCC unroll 2
            for (int v = 0; v < SCORE_VECS; v++) s[i][v] = zero_f();
        for (int64_t d = 0; d < words; d++) {
            I16 k[SCORE_VECS];
#pragma GCC unroll 2
            for (int v = 0; v < SCORE_VECS; v++) k[v] = load_i(keys + (d * PAGE_TOKENS + 16 * (half + v)) * 4);
#pragma GCC unroll 12
            for (int i = 0; i < N; i++) {
                const I16 a = set_i(word_at(q[i], d));
#pragma GCC unroll 2
                for (int v = 0; v < SCORE_VECS; v++) Words::add(s[i][v], a, k[v]);
            }
        }
#pragma GCC unroll 12
        for (int i = 0; i < N; i++)
#pragma GCC unroll 2
            for (int v = 0; v < SCORE_VECS; v++) store16(scores + i * ld + 16 * (half + v), s[i][v]);
    }
}

template <class Words>
void all_scores(const char *const *q, int64_t count, const char *keys, int64_t words, float *scores, int64_t ld) {
    int64_t i = 0;
#if defined(__AVX512F__)
    for (; i + 12 <= count; i += 12) page_scores<Words, 12>(q + i, keys, words, scores + i * ld, ld);
    for (; i + 6 <= count; i += 6) page_scores<Words, 6>(q + i, keys, words, scores + i * ld, ld);
#endif
    for (; i + 4 <= count; i += 4) page_scores<Words, 4>(q + i, keys, words, scores + i * ld, ld);
    for (; i + 3 <= count; i += 3) page_scores<Words, 3>(q + i, keys, words, scores + i * ld, ld);
    for (; i < count; i++) page_scores<Words, 1>(q + i, keys, words, scores + i * ld, ld);
}

// ---- values ----------------------------------------------------------------------------------------------------
//
// sums (N, 16·VECS) += weights (N, tokens) · values (tokens, size) for at most 16·VECS columns and tokens [from, to) of
// a page. A word of weights or values covers EACH tokens. Other tokens are masked, because they can be NaN.
template <class Words, int N, int VECS>
__attribute__((noinline)) void add_values(const char *weights, int64_t ld, const char *values, int64_t size, int64_t from, int64_t to,
                                          int64_t columns,
                                          float *const *sums) {
    F16 s[N][VECS];
    First mask[VECS];
#pragma GCC unroll 4
    for (int v = 0; v < VECS; v++) mask[v] = first(columns - 16 * v);
#pragma GCC unroll 6
    for (int i = 0; i < N; i++)
#pragma GCC unroll 4
        for (int v = 0; v < VECS; v++) s[i][v] = load16(sums[i] + 16 * v, mask[v]);
    const int64_t begin = from / Words::EACH, end = (to + Words::EACH - 1) / Words::EACH;
    int64_t t = begin;
    auto add = [&](int32_t keep_visible) __attribute__((always_inline)) {
        I16 x[VECS];
#pragma GCC unroll 4
        for (int v = 0; v < VECS; v++) x[v] = load_i(values + (t * size + 16 * v) * 4, mask[v]) & set_i(keep_visible);
#pragma GCC unroll 6
        for (int i = 0; i < N; i++) {
            const I16 w = set_i(word_at(weights + i * ld, t));
#pragma GCC unroll 4
            for (int v = 0; v < VECS; v++) Words::add(s[i][v], w, x[v]);
        }
    };
    // The first and last word can contain a token outside of the range.
    const int32_t first_mask = from % Words::EACH ? (int32_t)0xffff0000 : -1, last_mask = to % Words::EACH ? 0xffff : -1;
    if (first_mask != -1) add(begin + 1 == end ? first_mask & last_mask : first_mask), t++;
    for (const int64_t full_end = last_mask == -1 ? end : end - 1; t < full_end; t++) add(-1);
    if (t < end) add(last_mask);
#pragma GCC unroll 6
    for (int i = 0; i < N; i++)
#pragma GCC unroll 4
        for (int v = 0; v < VECS; v++) store16(sums[i] + 16 * v, s[i][v], mask[v]);
}

template <class Words, int N>
void query_values(const char *weights, int64_t ld, const char *values, int64_t size, int64_t from, int64_t to, const PartialAttention *a) {
    for (int64_t c = 0; c < size;) {
        float *sums[N];
        for (int i = 0; i < N; i++) sums[i] = a[i].values + c;
        if (size - c > 16 * (VALUE_VECS / 2)) add_values<Words, N, VALUE_VECS>(weights, ld, values + c * 4, size, from, to, size - c, sums),
            c += 16 * VALUE_VECS;
        else add_values<Words, N, 1>(weights, ld, values + c * 4, size, from, to, size - c, sums), c += 16;
    }
}

// Weights are `ld` bytes apart from query to query.
template <class Words>
void all_values(const char *weights, int64_t ld, int64_t count, const char *values, int64_t size, int64_t from, int64_t to,
                const PartialAttention *a) {
    int64_t i = 0;
#if defined(__AVX512F__)
    for (; i + 6 <= count; i += 6) query_values<Words, 6>(weights + i * ld, ld, values, size, from, to, a + i);
    for (; i + 3 <= count; i += 3) query_values<Words, 3>(weights + i * ld, ld, values, size, from, to, a + i);
#else
    for (; i + 2 <= count; i += 2) query_values<Words, 2>(weights + i * ld, ld, values, size, from, to, a + i);
#endif
    for (; i < count; i++) query_values<Words, 1>(weights + i * ld, ld, values, size, from, to, a + i);
}

// ---- softmax, stretch by stretch -------------------------------------------------------------------------------
inline float exp_scalar(float x) {
    alignas(64) float lanes[16];
    store16(lanes, exp_16(set_f(x)));
    return lanes[0];
}

void scale_values(float *values, int64_t size, float by) {
    for (int64_t c = 0; c < size; c += 16) store16(values + c, load16(values + c, first(size - c)) * set_f(by), first(size - c));
}

// Replace scores [from, to) of a stretch by weights, in words and surrounded by zeros. Rescales the result so far to
// the new maximum.
template <class Words>
__attribute__((noinline)) void compute_weights(float *scores, int64_t tokens, int64_t from, int64_t to, float softcap, int64_t size,
                                               PartialAttention &a) {
    from = std::max<int64_t>(0, from), to = std::min(tokens, to);
    if (from >= to) {
        for (int64_t t = 0; t < tokens; t += 16) store16(scores + t, zero_f());
        return;
    }
    // Keep visible lanes of a vector that starts at t.
    auto keep_visible = [&](int64_t t, F16 x, F16 otherwise) { return select_first(first(from - t), otherwise, select_first(first(to - t), x,
        otherwise)); };
    F16 maximum = set_f(NO_SCORE);
    for (int64_t t = 0; t < tokens; t += 16) {
        F16 s = load16(scores + t);
        if (softcap > 0) s = set_f(softcap) * tanh_16(s / set_f(softcap));
        s = keep_visible(t, s, set_f(NO_SCORE));
        store16(scores + t, s);
        maximum = max(s, maximum);
    }
    const float top = std::max(a.maximum, max_lane(maximum));
    F16 sum = zero_f();
    for (int64_t t = 0; t < tokens; t += 16) {
        F16 w = keep_visible(t, exp_16(load16(scores + t) - set_f(top)), zero_f());
        if (Words::EACH == 2) w = rounded_to_bf16(w), store_u16((bf16 *)scores + t, bf16_bits(w));  // written after the position that is read next
        else store16(scores + t, w);
        sum = sum + w;
    }
    if (a.maximum == NO_SCORE) a.sum = sum_lanes(sum);
    else {
        const float by = exp_scalar(a.maximum - top);
        a.sum = std::fma(a.sum, by, sum_lanes(sum));
        if (by != 1.0f) scale_values(a.values, size, by);
    }
    a.maximum = top;
}

// Merge the partial results of two ranges into `to`.
__attribute__((noinline)) void merge(PartialAttention &to, const PartialAttention &other, int64_t size) {
    if (other.maximum == NO_SCORE) return;
    const float top = std::max(to.maximum, other.maximum);
    const float by = to.maximum == NO_SCORE ? 0.0f : exp_scalar(to.maximum - top), other_factor = exp_scalar(other.maximum - top);
    to.sum = std::fma(to.sum, by, other.sum * other_factor);
    for (int64_t c = 0; c < size; c += 16) {
        const First mask = first(size - c);
        store16(to.values + c, fma(load16(to.values + c, mask), set_f(by), load16(other.values + c, mask) * set_f(other_factor)), mask);
    }
    to.maximum = top;
}

void clear(PartialAttention &a, int64_t size) {
    a.maximum = NO_SCORE, a.sum = 0;
    memset(a.values, 0, size * sizeof(float));
}

// ---- units of work ---------------------------------------------------------------------------------------------
struct Unit {  // queries of some rows and one key head; at most MAX_QUERIES at a time if it is shared by more heads
    const Attention &a;
    const QueryGroup &rows;
    const int64_t key_head, slice, heads, count;  // heads: per row; count: of (row, head)
    const char *q[MAX_QUERIES];

    // thread_scratch: buffer for the queries in words.
    Unit(const Attention &a, const QueryGroup &rows, int64_t key_head, int64_t slice, char *thread_scratch)
        : a(a), rows(rows), key_head(key_head), slice(slice), heads(std::min(MAX_QUERIES, a.block->group() - slice * MAX_QUERIES)),
            count(rows.count * heads) {
        const int64_t type = a.model->cache_type, bytes = key_words(*a.model, *a.block) * 4;
        for (int64_t i = 0; i < count; i++) {
            q[i] = thread_scratch + i * bytes;
            write_words(type, a.q + query_offset(i), a.block->head_size, thread_scratch + i * bytes);
        }
    }
    int64_t row(int64_t i) const { return rows.first + i / heads; }
    int64_t head(int64_t i) const { return key_head * a.block->group() + slice * MAX_QUERIES + i % heads; }
    int64_t query_offset(int64_t i) const { return (row(i) * a.block->heads + head(i)) * a.block->head_size; }
    int64_t position(int64_t i) const { return a.step->positions[row(i)]; }
    // First visible token at a position.
    int64_t first_visible_position(int64_t position) const { return a.block->window > 0 ? std::max<int64_t>(0, position - a.block->window + 1) : 0; }
};

void prefetch_bytes_at(const char *at, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + i, 0, 2);
}

// Keys of the same sequence that are read next. They are prefetched while values are summed.
struct KeyRange {
    int64_t key_head, from, until;
    bool any() const { return from < until; }
};

void prefetch_keys(const Unit &u, const KeyRange &next_keys, int64_t part, int64_t parts) {
    const int64_t first = next_keys.from / PAGE_TOKENS, pages = next_keys.any() ? (next_keys.until + PAGE_TOKENS - 1) / PAGE_TOKENS - first : 0;
    const DecodeModel &model = *u.a.model;
    for (int64_t p = pages * part / parts; p < pages * (part + 1) / parts; p++)
        prefetch_bytes_at(page_head(model, *u.a.block, *u.a.step, u.a.step->sequence[u.rows.first], first + p, next_keys.key_head),
                          key_bytes(model, *u.a.block));
}

// Attend to one range of tokens. Writes to `to`. `prefetched`: the first keys have already been prefetched.
template <class Words>
void attend_range(const Unit &u, int64_t begin, int64_t end, float *scores, PartialAttention *to, bool prefetched, const KeyRange &after) {
    const DecodeModel &model = *u.a.model;
    const DecodeBlock &block = *u.a.block;
    const DecodeStep &step = *u.a.step;
    const int64_t size = block.head_size, sequence = step.sequence[u.rows.first], ld = STRETCH * sizeof(float);
    const int64_t last = std::min(end, u.position(u.count - 1) + 1), first_visible_token = u.first_visible_position(u.position(0));
    const int64_t keys_size = key_bytes(model, block), values_size = PAGE_TOKENS / Words::EACH * size * 4;
    for (int64_t i = 0; i < u.count; i++) clear(to[i], size);
    for (int64_t s = begin; s < last; s += STRETCH) {
        // Complete pages, starting with the first page that a query sees.
        const int64_t from = std::max(s, first_visible_token / PAGE_TOKENS * PAGE_TOKENS), until = std::min(s + STRETCH, last);
        if (from >= until) continue;
        const char *pages[STRETCH / PAGE_TOKENS];
        int64_t count = 0;
        for (int64_t t = from; t < until; t += PAGE_TOKENS) pages[count++] = page_head(model, block, step, sequence, t / PAGE_TOKENS, u.key_head);
        // Pages are scattered in memory, so the hardware prefetcher cannot predict the next one.
        const KeyRange next_keys = s + STRETCH < last ? KeyRange{u.key_head, s + STRETCH, std::min(s + 2 * STRETCH, last)} : after;
        if (!prefetched) prefetch_bytes_at(pages[0], keys_size);
        for (int64_t p = 0; p < count; p++) {
            if (!prefetched && p + 1 < count) prefetch_bytes_at(pages[p + 1], keys_size);
            prefetch_bytes_at(pages[p] + keys_size, values_size);
            all_scores<Words>(u.q, u.count, pages[p], keys_size / (4 * PAGE_TOKENS), scores + p * PAGE_TOKENS, STRETCH);
        }
        for (int64_t i = 0; i < u.count; i++) {
            const int64_t at = u.position(i);
            compute_weights<Words>(scores + i * STRETCH, count * PAGE_TOKENS, u.first_visible_position(at) - from, at + 1 - from, block.softcap,
                                   size, to[i]);
        }
        for (int64_t p = 0; p < count; p++) {
            const int64_t t = from + p * PAGE_TOKENS, first_visible = std::max<int64_t>(0, first_visible_token - t);
            const char *const weights = (const char *)scores + p * (PAGE_TOKENS / Words::EACH) * 4;
            prefetch_keys(u, next_keys, p, count);
            all_values<Words>(weights, ld, u.count, pages[p] + keys_size, size, first_visible, std::min(PAGE_TOKENS, until - t), to);
        }
        prefetched = next_keys.any();
    }
}

PartialAttention load_partial(const Attention &a, int64_t m, int64_t head, int64_t range, float *&at) {
    at = a.partial + ((m * a.block->heads + head) * (MAX_RANGES + 1) + range) * (2 + a.block->head_size);
    return {at[0], at[1], at + 2};
}

void write_out(const PartialAttention &a, int64_t size, float *out) {
    const F16 by = set_f(1.0f / a.sum);
    for (int64_t c = 0; c < size; c += 16) store16(out + c, load16(a.values + c, first(size - c)) * by, first(size - c));
}

int64_t first_range(const Unit &u) { return u.first_visible_position(u.position(0)) / range_tokens(u.position(0)); }
int64_t last_range(const Unit &u) { return u.position(u.count - 1) / range_tokens(u.position(0)); }

// First stretch of the unit's ranges, starting at `range`.
KeyRange first_stretch(const Unit &u, int64_t range) {
    const int64_t tokens = range_tokens(u.position(0)), first_visible_token = u.first_visible_position(u.position(0)) / PAGE_TOKENS * PAGE_TOKENS;
    const int64_t s = std::max(range * tokens, first_visible_token / STRETCH * STRETCH);
    return {u.key_head, std::max(s, first_visible_token), std::min(s + STRETCH, u.position(u.count - 1) + 1)};
}

// `prefetched`: the first keys have already been prefetched. `after`: keys that are read after this unit.
template <class Words>
void attend_unit(const Unit &u, float *thread_scratch, bool prefetched, const KeyRange &after) {
    const int64_t size = u.a.block->head_size;
    PartialAttention totals[MAX_QUERIES], part[MAX_QUERIES];
    for (int64_t i = 0; i < u.count; i++) {
        totals[i].values = thread_scratch + MAX_QUERIES * STRETCH + i * size;
        part[i].values = thread_scratch + MAX_QUERIES * (STRETCH + size) + i * size;
        clear(totals[i], size);
    }
    const int64_t tokens = range_tokens(u.position(0));
    for (int64_t r = first_range(u); r <= last_range(u); r++) {
        const KeyRange next_keys = r < last_range(u) ? first_stretch(u, r + 1) : after;
        attend_range<Words>(u, r * tokens, (r + 1) * tokens, thread_scratch, part, prefetched, next_keys);
        prefetched = next_keys.any();
        for (int64_t i = 0; i < u.count; i++) merge(totals[i], part[i], size);
    }
    for (int64_t i = 0; i < u.count; i++) write_out(totals[i], size, u.a.attended + u.query_offset(i));
}

template <class Words>
void attend_split(const Unit &u, int64_t range, float *thread_scratch) {
    PartialAttention part[MAX_QUERIES];
    float *at[MAX_QUERIES];
    for (int64_t i = 0; i < u.count; i++) part[i] = load_partial(u.a, u.row(i), u.head(i), range, at[i]);
    if (range < first_range(u) || range > last_range(u)) {
        for (int64_t i = 0; i < u.count; i++) at[i][0] = NO_SCORE;
        return;
    }
    const int64_t tokens = range_tokens(u.position(0));
    attend_range<Words>(u, range * tokens, (range + 1) * tokens, thread_scratch, part, false, KeyRange{0, 0, 0});
    for (int64_t i = 0; i < u.count; i++) at[i][0] = part[i].maximum, at[i][1] = part[i].sum;
}

}  // namespace

int64_t range_tokens(int64_t position) {
    int64_t tokens = STRETCH;
    while (position >= MAX_RANGES * tokens) tokens *= 2;
    return tokens;
}

int64_t max_group_rows(const DecodeBlock &block) { return std::max<int64_t>(1, MAX_QUERIES / block.group()); }

int64_t attention_scratch_size(const DecodeModel &model) {
    int64_t size = 0;
    for (int64_t b = 0; b < model.count; b++) size = std::max(size, model.blocks[b].head_size);
    return MAX_QUERIES * (STRETCH + 3 * size) + 16;
}

int64_t head_slices(const DecodeBlock &block) { return (block.group() + MAX_QUERIES - 1) / MAX_QUERIES; }

void attend(Worker &worker, const Attention &a, float *thread_scratch) {
    const int64_t slices = head_slices(*a.block), heads = a.block->key_heads * slices, ranges = a.partial ? MAX_RANGES : 1;
    char *const query_buffer = (char *)(thread_scratch + attention_scratch_size(*a.model) - MAX_QUERIES * a.block->head_size);
    auto unit = [&](int64_t queries, int64_t head) { return Unit(a, a.queries[queries], head / slices, head % slices, query_buffer); };
    with_words(a.model->cache_type, [&](auto words) {
        typedef decltype(words) Words;
        if (a.partial) {
            worker.run_loop(a.count * heads * ranges, [&](int64_t i) {
                attend_split<Words>(unit(i / ranges / heads, i / ranges % heads), i % ranges, thread_scratch);
            });
            return;
        }
        // A thread processes all heads of some rows, which are contiguous, if that leaves enough units for the other
        // threads.
        const int64_t heads_per_unit = a.count >= 4 * worker.threads ? heads : 1;
        worker.run_loop(a.count * heads / heads_per_unit, [&](int64_t i) {
            bool prefetched = false;
            for (int64_t j = i * heads_per_unit; j < (i + 1) * heads_per_unit; j++) {
                const Unit u = unit(j / heads, j % heads);
                KeyRange next_keys{0, 0, 0};
                if (j + 1 < (i + 1) * heads_per_unit) next_keys = first_stretch(u, first_range(u)), next_keys.key_head = (j + 1) % heads / slices;
                attend_unit<Words>(u, thread_scratch, prefetched, next_keys);
                prefetched = next_keys.any();
            }
        });
    });
}

void merge_ranges(const Attention &a, int64_t m) {
    const int64_t size = a.block->head_size;
    for (int64_t head = 0; head < a.block->heads; head++) {
        float *at;
        PartialAttention totals = load_partial(a, m, head, MAX_RANGES, at);
        clear(totals, size);
        for (int64_t r = 0; r < MAX_RANGES; r++) merge(totals, load_partial(a, m, head, r, at), size);
        write_out(totals, size, a.attended + (m * a.block->heads + head) * size);
    }
}

void write_cache(const DecodeModel &model, const DecodeBlock &block, const DecodeStep &step, int64_t m, int64_t key_head, const float *key,
                 const float *value) {
    const int64_t size = block.head_size, position = step.positions[m], slot = position % PAGE_TOKENS, words = key_words(model, block);
    char *const head = page_head(model, block, step, step.sequence[m], position / PAGE_TOKENS, key_head);
    char *const values = head + key_bytes(model, block);
    if (model.cache_type == F32) {
        for (int64_t d = 0; d < size; d++) memcpy(head + (d * PAGE_TOKENS + slot) * 4, key + d, 4);
        memcpy(values + slot * size * 4, value, size * 4);
        return;
    }
    alignas(64) bf16 lanes[16];
    for (int64_t c = 0; c < 2 * words; c += 16) {  // two numbers of a key form a word; the last can be single
        store_u16(lanes, bf16_bits(load16(key + c, first(size - c))));
        for (int64_t j = c; j < std::min(2 * words, c + 16); j += 2) memcpy(head + (j / 2 * PAGE_TOKENS + slot) * 4, lanes + (j - c), 4);
    }
    for (int64_t c = 0; c < size; c += 16) {  // numbers of two tokens form a word: this token writes its half
        store_u16(lanes, bf16_bits(load16(value + c, first(size - c))));
        for (int64_t j = c; j < std::min(size, c + 16); j++) memcpy(values + (slot / 2 * size + j) * 4 + slot % 2 * 2, lanes + (j - c), 2);
    }
}

}  // namespace deltaw
