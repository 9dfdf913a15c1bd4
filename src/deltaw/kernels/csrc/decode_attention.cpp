#include "decode_attention.h"

#include <limits>

#include "vector.h"

namespace deltaw {

namespace {

const float NOTHING = -std::numeric_limits<float>::infinity();

template <class T>
T *head_of_page(const DecodeModel &model, const DecodeBlock &block, const DecodeStep &step, int64_t sequence, int64_t page, int64_t key_head) {
    const int64_t number = step.page_table[sequence * step.most + page];
    return (T *)step.pages + number * model.page_numbers + block.cache_offset + key_head * 2 * block.head_size * PAGE_TOKENS;
}

// ---- scores ----------------------------------------------------------------------------------------------------
#if defined(__AVX512F__)
const int SCORES_AT_ONCE = 12, SCORE_VECS = 2, VALUE_QUERIES = 6, VALUE_VECS = 4;
#else
const int SCORES_AT_ONCE = 4, SCORE_VECS = 1, VALUE_QUERIES = 2, VALUE_VECS = 2;
#endif

// scores (N, 32) of one page, `ld` floats from query to query, of N queries of `size` numbers.
template <class T, int N>
__attribute__((noinline)) void scores_of_page(const float *const *q, const T *keys, int64_t size, float *scores, int64_t ld) {
    for (int half = 0; half < 2; half += SCORE_VECS) {
        F16 s[N][SCORE_VECS];
#pragma GCC unroll 12
        for (int i = 0; i < N; i++)
#pragma GCC unroll 2
            for (int v = 0; v < SCORE_VECS; v++) s[i][v] = zero_f();
        for (int64_t d = 0; d < size; d++) {
            F16 k[SCORE_VECS];
#pragma GCC unroll 2
            for (int v = 0; v < SCORE_VECS; v++) k[v] = load16(keys + d * PAGE_TOKENS + 16 * (half + v));
#pragma GCC unroll 12
            for (int i = 0; i < N; i++) {
                const F16 a = set_f(q[i][d]);
#pragma GCC unroll 2
                for (int v = 0; v < SCORE_VECS; v++) s[i][v] = fma(a, k[v], s[i][v]);
            }
        }
#pragma GCC unroll 12
        for (int i = 0; i < N; i++)
#pragma GCC unroll 2
            for (int v = 0; v < SCORE_VECS; v++) store16(scores + i * ld + 16 * (half + v), s[i][v]);
    }
}

template <class T>
void all_scores(const float *const *q, int64_t count, const T *keys, int64_t size, float *scores, int64_t ld) {
    int64_t i = 0;
#if defined(__AVX512F__)
    for (; i + 12 <= count; i += 12) scores_of_page<T, 12>(q + i, keys, size, scores + i * ld, ld);
    for (; i + 6 <= count; i += 6) scores_of_page<T, 6>(q + i, keys, size, scores + i * ld, ld);
#endif
    for (; i + 4 <= count; i += 4) scores_of_page<T, 4>(q + i, keys, size, scores + i * ld, ld);
    for (; i + 3 <= count; i += 3) scores_of_page<T, 3>(q + i, keys, size, scores + i * ld, ld);
    for (; i < count; i++) scores_of_page<T, 1>(q + i, keys, size, scores + i * ld, ld);
}

// ---- values ----------------------------------------------------------------------------------------------------
// sums (N, 16·VECS) += weights (N, tokens) · values (tokens, size), at most 16·VECS columns of them.
template <class T, int N, int VECS>
__attribute__((noinline)) void add_values(const float *weights, int64_t ld, const T *values, int64_t size, int64_t from, int64_t to, int64_t columns,
                                          float *const *sums) {
    F16 s[N][VECS];
    First mask[VECS];
#pragma GCC unroll 4
    for (int v = 0; v < VECS; v++) mask[v] = first(columns - 16 * v);
#pragma GCC unroll 6
    for (int i = 0; i < N; i++)
#pragma GCC unroll 4
        for (int v = 0; v < VECS; v++) s[i][v] = load16(sums[i] + 16 * v, mask[v]);
    for (int64_t t = from; t < to; t++) {
        F16 x[VECS];
#pragma GCC unroll 4
        for (int v = 0; v < VECS; v++) x[v] = load16(values + t * size + 16 * v, mask[v]);
#pragma GCC unroll 6
        for (int i = 0; i < N; i++) {
            const F16 w = set_f(weights[i * ld + t]);
#pragma GCC unroll 4
            for (int v = 0; v < VECS; v++) s[i][v] = fma(w, x[v], s[i][v]);
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < N; i++)
#pragma GCC unroll 4
        for (int v = 0; v < VECS; v++) store16(sums[i] + 16 * v, s[i][v], mask[v]);
}

template <class T, int N>
void values_of_queries(const float *weights, int64_t ld, const T *values, int64_t size, int64_t from, int64_t to, const Attended *a) {
    for (int64_t c = 0; c < size;) {
        float *sums[N];
        for (int i = 0; i < N; i++) sums[i] = a[i].values + c;
        if (size - c > 16 * (VALUE_VECS / 2)) add_values<T, N, VALUE_VECS>(weights, ld, values + c, size, from, to, size - c, sums), c += 16 * VALUE_VECS;
        else add_values<T, N, 1>(weights, ld, values + c, size, from, to, size - c, sums), c += 16;
    }
}

template <class T>
void all_values(const float *weights, int64_t ld, int64_t count, const T *values, int64_t size, int64_t from, int64_t to, const Attended *a) {
    int64_t i = 0;
#if defined(__AVX512F__)
    for (; i + 6 <= count; i += 6) values_of_queries<T, 6>(weights + i * ld, ld, values, size, from, to, a + i);
    for (; i + 3 <= count; i += 3) values_of_queries<T, 3>(weights + i * ld, ld, values, size, from, to, a + i);
#else
    for (; i + 2 <= count; i += 2) values_of_queries<T, 2>(weights + i * ld, ld, values, size, from, to, a + i);
#endif
    for (; i < count; i++) values_of_queries<T, 1>(weights + i * ld, ld, values, size, from, to, a + i);
}

// ---- the soft-max, stretch by stretch --------------------------------------------------------------------------
inline float exp_of(float x) {
    alignas(64) float lanes[16];
    store16(lanes, exp_16(set_f(x)));
    return lanes[0];
}

void scale_values(float *values, int64_t size, float by) {
    for (int64_t c = 0; c < size; c += 16) store16(values + c, load16(values + c, first(size - c)) * set_f(by), first(size - c));
}

// Scores [from, to) of a stretch become weights, zeros around them; what was attended before is scaled to the new maximum.
__attribute__((noinline)) void weigh(float *scores, int64_t tokens, int64_t from, int64_t to, float softcap, int64_t size, Attended &a) {
    from = std::max<int64_t>(0, from), to = std::min(tokens, to);
    if (from >= to) {
        for (int64_t t = 0; t < tokens; t += 16) store16(scores + t, zero_f());
        return;
    }
    // Lanes of a vector that are seen; the vector begins at t.
    auto seen = [&](int64_t t, F16 x, F16 otherwise) { return keep_first(first(from - t), otherwise, keep_first(first(to - t), x, otherwise)); };
    F16 most = set_f(NOTHING);
    for (int64_t t = 0; t < tokens; t += 16) {
        F16 s = load16(scores + t);
        if (softcap > 0) s = set_f(softcap) * tanh_16(s / set_f(softcap));
        s = seen(t, s, set_f(NOTHING));
        store16(scores + t, s);
        most = max(s, most);
    }
    const float top = std::max(a.most, largest_of(most));
    F16 sum = zero_f();
    for (int64_t t = 0; t < tokens; t += 16) {
        const F16 w = seen(t, exp_16(load16(scores + t) - set_f(top)), zero_f());
        store16(scores + t, w);
        sum = sum + w;
    }
    if (a.most == NOTHING) a.sum = sum_of(sum);
    else {
        const float by = exp_of(a.most - top);
        a.sum = std::fma(a.sum, by, sum_of(sum));
        if (by != 1.0f) scale_values(a.values, size, by);
    }
    a.most = top;
}

// `to` becomes what was attended in both.
__attribute__((noinline)) void join(Attended &to, const Attended &other, int64_t size) {
    if (other.most == NOTHING) return;
    const float top = std::max(to.most, other.most);
    const float by = to.most == NOTHING ? 0.0f : exp_of(to.most - top), with = exp_of(other.most - top);
    to.sum = std::fma(to.sum, by, other.sum * with);
    for (int64_t c = 0; c < size; c += 16) {
        const First mask = first(size - c);
        store16(to.values + c, fma(load16(to.values + c, mask), set_f(by), load16(other.values + c, mask) * set_f(with)), mask);
    }
    to.most = top;
}

void clear(Attended &a, int64_t size) {
    a.most = NOTHING, a.sum = 0;
    memset(a.values, 0, size * sizeof(float));
}

// ---- a unit of work --------------------------------------------------------------------------------------------
struct Unit {  // some rows' queries of one key head; where many heads share it, MOST_QUERIES of them at a time
    const Attention &a;
    const Queries &rows;
    const int64_t key_head, slice, heads, count;  // heads: of each row; count: of (row, head)
    const float *q[MOST_QUERIES];

    Unit(const Attention &a, const Queries &rows, int64_t key_head, int64_t slice)
        : a(a), rows(rows), key_head(key_head), slice(slice), heads(std::min(MOST_QUERIES, a.block->group() - slice * MOST_QUERIES)), count(rows.count * heads) {
        for (int64_t i = 0; i < count; i++) q[i] = a.q + place(i);
    }
    int64_t row(int64_t i) const { return rows.first + i / heads; }
    int64_t head(int64_t i) const { return key_head * a.block->group() + slice * MOST_QUERIES + i % heads; }
    int64_t place(int64_t i) const { return (row(i) * a.block->heads + head(i)) * a.block->head_size; }
    int64_t position(int64_t i) const { return a.step->positions[row(i)]; }
    // The first token that is seen from a position.
    int64_t seen_from(int64_t position) const { return a.block->window > 0 ? std::max<int64_t>(0, position - a.block->window + 1) : 0; }
};

template <class T>
void ask_for(const T *at, int64_t count) {
    for (int64_t i = 0; i < count * (int64_t)sizeof(T); i += 64) __builtin_prefetch((const char *)at + i, 0, 2);
}

// What the unit's queries attend to in one range of tokens, into `to`.
template <class T>
void attend_range(const Unit &u, int64_t begin, int64_t end, float *scores, Attended *to) {
    const DecodeBlock &block = *u.a.block;
    const DecodeStep &step = *u.a.step;
    const int64_t size = block.head_size, sequence = step.sequence[u.rows.first];
    const int64_t last = std::min(end, u.position(u.count - 1) + 1), begins = u.seen_from(u.position(0));
    for (int64_t i = 0; i < u.count; i++) clear(to[i], size);
    for (int64_t s = begin; s < last; s += STRETCH) {
        // Whole pages from the first one that any query sees.
        const int64_t from = std::max(s, begins / PAGE_TOKENS * PAGE_TOKENS), until = std::min(s + STRETCH, last);
        if (from >= until) continue;
        const T *pages[STRETCH / PAGE_TOKENS];
        int64_t count = 0;
        for (int64_t t = from; t < until; t += PAGE_TOKENS) pages[count++] = head_of_page<T>(*u.a.model, block, step, sequence, t / PAGE_TOKENS, u.key_head);
        // Pages lie anywhere, so the processor does not guess the next one: it and this one's values are asked for.
        ask_for(pages[0], size * PAGE_TOKENS);
        for (int64_t p = 0; p < count; p++) {
            ask_for(pages[p] + size * PAGE_TOKENS, size * PAGE_TOKENS);
            if (p + 1 < count) ask_for(pages[p + 1], size * PAGE_TOKENS);
            all_scores(u.q, u.count, pages[p], size, scores + p * PAGE_TOKENS, STRETCH);
        }
        for (int64_t i = 0; i < u.count; i++) {
            const int64_t at = u.position(i);
            weigh(scores + i * STRETCH, count * PAGE_TOKENS, u.seen_from(at) - from, at + 1 - from, block.softcap, size, to[i]);
        }
        for (int64_t p = 0; p < count; p++) {
            const int64_t t = from + p * PAGE_TOKENS, first_seen = std::max<int64_t>(0, begins - t);
            all_values(scores + p * PAGE_TOKENS, STRETCH, u.count, pages[p] + size * PAGE_TOKENS, size, first_seen, std::min(PAGE_TOKENS, until - t), to);
        }
    }
}

Attended part_of_row(const Attention &a, int64_t m, int64_t head, int64_t range, float *&at) {
    at = a.partial + ((m * a.block->heads + head) * (MOST_RANGES + 1) + range) * (2 + a.block->head_size);
    return {at[0], at[1], at + 2};
}

void write_out(const Attended &a, int64_t size, float *out) {
    const F16 by = set_f(1.0f / a.sum);
    for (int64_t c = 0; c < size; c += 16) store16(out + c, load16(a.values + c, first(size - c)) * by, first(size - c));
}

int64_t first_range(const Unit &u) { return u.seen_from(u.position(0)) / range_tokens(u.position(0)); }
int64_t last_range(const Unit &u) { return u.position(u.count - 1) / range_tokens(u.position(0)); }

template <class T>
void attend_unit(const Unit &u, float *room) {
    const int64_t size = u.a.block->head_size;
    Attended whole[MOST_QUERIES], part[MOST_QUERIES];
    for (int64_t i = 0; i < u.count; i++) {
        whole[i].values = room + MOST_QUERIES * STRETCH + i * size;
        part[i].values = room + MOST_QUERIES * (STRETCH + size) + i * size;
        clear(whole[i], size);
    }
    const int64_t tokens = range_tokens(u.position(0));
    for (int64_t r = first_range(u); r <= last_range(u); r++) {
        attend_range<T>(u, r * tokens, (r + 1) * tokens, room, part);
        for (int64_t i = 0; i < u.count; i++) join(whole[i], part[i], size);
    }
    for (int64_t i = 0; i < u.count; i++) write_out(whole[i], size, u.a.mixed + u.place(i));
}

template <class T>
void attend_split(const Unit &u, int64_t range, float *room) {
    Attended part[MOST_QUERIES];
    float *at[MOST_QUERIES];
    for (int64_t i = 0; i < u.count; i++) part[i] = part_of_row(u.a, u.row(i), u.head(i), range, at[i]);
    if (range < first_range(u) || range > last_range(u)) {
        for (int64_t i = 0; i < u.count; i++) at[i][0] = NOTHING;
        return;
    }
    const int64_t tokens = range_tokens(u.position(0));
    attend_range<T>(u, range * tokens, (range + 1) * tokens, room, part);
    for (int64_t i = 0; i < u.count; i++) at[i][0] = part[i].most, at[i][1] = part[i].sum;
}

}  // namespace

int64_t range_tokens(int64_t position) {
    int64_t tokens = STRETCH;
    while (position >= MOST_RANGES * tokens) tokens *= 2;
    return tokens;
}

int64_t rows_at_once(const DecodeBlock &block) { return std::max<int64_t>(1, MOST_QUERIES / block.group()); }

int64_t attention_room(const DecodeModel &model) {
    int64_t size = 0;
    for (int64_t b = 0; b < model.count; b++) size = std::max(size, model.blocks[b].head_size);
    return MOST_QUERIES * (STRETCH + 2 * size) + 16;
}

int64_t head_slices(const DecodeBlock &block) { return (block.group() + MOST_QUERIES - 1) / MOST_QUERIES; }

void attend(Crew &crew, const Attention &a, float *room) {
    const int64_t slices = head_slices(*a.block), heads = a.block->key_heads * slices, ranges = a.partial ? MOST_RANGES : 1;
    const bool wide = a.model->cache_type == F32;
    crew.share(a.count * heads * ranges, [&](int64_t i) {
        const int64_t head = i / ranges % heads, range = i % ranges;
        const Unit u(a, a.queries[i / ranges / heads], head / slices, head % slices);
        if (a.partial) wide ? attend_split<float>(u, range, room) : attend_split<bf16>(u, range, room);
        else wide ? attend_unit<float>(u, room) : attend_unit<bf16>(u, room);
    });
}

void join_ranges(const Attention &a, int64_t m) {
    const int64_t size = a.block->head_size;
    for (int64_t head = 0; head < a.block->heads; head++) {
        float *at;
        Attended whole = part_of_row(a, m, head, MOST_RANGES, at);
        clear(whole, size);
        for (int64_t r = 0; r < MOST_RANGES; r++) join(whole, part_of_row(a, m, head, r, at), size);
        write_out(whole, size, a.mixed + (m * a.block->heads + head) * size);
    }
}

void write_cache(const DecodeModel &model, const DecodeBlock &block, const DecodeStep &step, int64_t m, int64_t key_head, const float *key, const float *value) {
    const int64_t size = block.head_size, position = step.positions[m], slot = position % PAGE_TOKENS;
    auto write = [&](auto *at) {
        alignas(64) typename std::remove_reference<decltype(*at)>::type lanes[16];
        for (int64_t c = 0; c < size; c += 16) {
            store16(lanes, load16(key + c, first(size - c)));
            for (int64_t j = c; j < std::min(size, c + 16); j++) at[j * PAGE_TOKENS + slot] = lanes[j - c];
            store16(at + (PAGE_TOKENS + slot) * size + c, load16(value + c, first(size - c)), first(size - c));
        }
    };
    if (model.cache_type == F32) write(head_of_page<float>(model, block, step, step.sequence[m], position / PAGE_TOKENS, key_head));
    else write(head_of_page<bf16>(model, block, step, step.sequence[m], position / PAGE_TOKENS, key_head));
}

}  // namespace deltaw
