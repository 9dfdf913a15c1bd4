#include "decode_attention.h"

#include <limits>

#include "decode_words.h"

namespace deltaw {

namespace {

const float NOTHING = -std::numeric_limits<float>::infinity();

// Words of a key.
int64_t key_words(const DecodeModel &model, const DecodeBlock &block) { return words_of(model.cache_type, block.head_size); }
// Bytes of a page that a key head's keys take; its values lie behind them.
int64_t key_bytes(const DecodeModel &model, const DecodeBlock &block) { return key_words(model, block) * PAGE_TOKENS * 4; }

char *head_of_page(const DecodeModel &model, const DecodeBlock &block, const DecodeStep &step, int64_t sequence, int64_t page, int64_t key_head) {
    const int64_t number = step.page_table[sequence * step.most + page], each = model.cache_type == F32 ? 4 : 2;
    const int64_t of_head = key_bytes(model, block) + PAGE_TOKENS * block.head_size * each;
    return (char *)step.pages + (number * model.page_numbers + block.cache_offset) * each + key_head * of_head;
}

// ---- scores ----------------------------------------------------------------------------------------------------
#if defined(__AVX512F__)
const int SCORE_VECS = 2, VALUE_VECS = 4;
#else
const int SCORE_VECS = 1, VALUE_VECS = 2;
#endif

// scores (N, 32) of one page, `ld` floats from query to query, of N queries of `words` words.
template <class Words, int N>
__attribute__((noinline)) void scores_of_page(const char *const *q, const char *keys, int64_t words, float *scores, int64_t ld) {
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
    for (; i + 12 <= count; i += 12) scores_of_page<Words, 12>(q + i, keys, words, scores + i * ld, ld);
    for (; i + 6 <= count; i += 6) scores_of_page<Words, 6>(q + i, keys, words, scores + i * ld, ld);
#endif
    for (; i + 4 <= count; i += 4) scores_of_page<Words, 4>(q + i, keys, words, scores + i * ld, ld);
    for (; i + 3 <= count; i += 3) scores_of_page<Words, 3>(q + i, keys, words, scores + i * ld, ld);
    for (; i < count; i++) scores_of_page<Words, 1>(q + i, keys, words, scores + i * ld, ld);
}

// ---- values ----------------------------------------------------------------------------------------------------
// sums (N, 16·VECS) += weights (N, tokens) · values (tokens, size), at most 16·VECS columns of them, of a page's tokens
// [from, to). A word of weights, and of values, is of EACH tokens; nothing is read as a number beside those tokens.
template <class Words, int N, int VECS>
__attribute__((noinline)) void add_values(const char *weights, int64_t ld, const char *values, int64_t size, int64_t from, int64_t to, int64_t columns,
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
    auto add = [&](int32_t seen) __attribute__((always_inline)) {
        I16 x[VECS];
#pragma GCC unroll 4
        for (int v = 0; v < VECS; v++) x[v] = load_i(values + (t * size + 16 * v) * 4, mask[v]) & set_i(seen);
#pragma GCC unroll 6
        for (int i = 0; i < N; i++) {
            const I16 w = set_i(word_at(weights + i * ld, t));
#pragma GCC unroll 4
            for (int v = 0; v < VECS; v++) Words::add(s[i][v], w, x[v]);
        }
    };
    // Of a word at an end, one token may lie outside.
    const int32_t of_first = from % Words::EACH ? (int32_t)0xffff0000 : -1, of_last = to % Words::EACH ? 0xffff : -1;
    if (of_first != -1) add(begin + 1 == end ? of_first & of_last : of_first), t++;
    for (const int64_t whole = of_last == -1 ? end : end - 1; t < whole; t++) add(-1);
    if (t < end) add(of_last);
#pragma GCC unroll 6
    for (int i = 0; i < N; i++)
#pragma GCC unroll 4
        for (int v = 0; v < VECS; v++) store16(sums[i] + 16 * v, s[i][v], mask[v]);
}

template <class Words, int N>
void values_of_queries(const char *weights, int64_t ld, const char *values, int64_t size, int64_t from, int64_t to, const Attended *a) {
    for (int64_t c = 0; c < size;) {
        float *sums[N];
        for (int i = 0; i < N; i++) sums[i] = a[i].values + c;
        if (size - c > 16 * (VALUE_VECS / 2)) add_values<Words, N, VALUE_VECS>(weights, ld, values + c * 4, size, from, to, size - c, sums), c += 16 * VALUE_VECS;
        else add_values<Words, N, 1>(weights, ld, values + c * 4, size, from, to, size - c, sums), c += 16;
    }
}

// Weights lie `ld` bytes from query to query.
template <class Words>
void all_values(const char *weights, int64_t ld, int64_t count, const char *values, int64_t size, int64_t from, int64_t to, const Attended *a) {
    int64_t i = 0;
#if defined(__AVX512F__)
    for (; i + 6 <= count; i += 6) values_of_queries<Words, 6>(weights + i * ld, ld, values, size, from, to, a + i);
    for (; i + 3 <= count; i += 3) values_of_queries<Words, 3>(weights + i * ld, ld, values, size, from, to, a + i);
#else
    for (; i + 2 <= count; i += 2) values_of_queries<Words, 2>(weights + i * ld, ld, values, size, from, to, a + i);
#endif
    for (; i < count; i++) values_of_queries<Words, 1>(weights + i * ld, ld, values, size, from, to, a + i);
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

// Scores [from, to) of a stretch become weights, zeros around them, in words in the scores' place; what was attended before is
// scaled to the new maximum.
template <class Words>
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
        F16 w = seen(t, exp_16(load16(scores + t) - set_f(top)), zero_f());
        if (Words::EACH == 2) w = rounded_to_bf16(w), store_u16((bf16 *)scores + t, bf16_bits(w));  // behind what is read next
        else store16(scores + t, w);
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
    const char *q[MOST_QUERIES];

    // room: of the queries in words.
    Unit(const Attention &a, const Queries &rows, int64_t key_head, int64_t slice, char *room)
        : a(a), rows(rows), key_head(key_head), slice(slice), heads(std::min(MOST_QUERIES, a.block->group() - slice * MOST_QUERIES)), count(rows.count * heads) {
        const int64_t type = a.model->cache_type, bytes = key_words(*a.model, *a.block) * 4;
        for (int64_t i = 0; i < count; i++) {
            q[i] = room + i * bytes;
            write_words(type, a.q + place(i), a.block->head_size, room + i * bytes);
        }
    }
    int64_t row(int64_t i) const { return rows.first + i / heads; }
    int64_t head(int64_t i) const { return key_head * a.block->group() + slice * MOST_QUERIES + i % heads; }
    int64_t place(int64_t i) const { return (row(i) * a.block->heads + head(i)) * a.block->head_size; }
    int64_t position(int64_t i) const { return a.step->positions[row(i)]; }
    // The first token that is seen from a position.
    int64_t seen_from(int64_t position) const { return a.block->window > 0 ? std::max<int64_t>(0, position - a.block->window + 1) : 0; }
};

void ask_for(const char *at, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + i, 0, 2);
}

// Tokens whose keys are read next, of the same sequence; they are asked for while values are summed, which are there already.
struct Next {
    int64_t key_head, from, until;
    bool any() const { return from < until; }
};

void ask_for_keys(const Unit &u, const Next &next, int64_t part, int64_t parts) {
    const int64_t first = next.from / PAGE_TOKENS, pages = next.any() ? (next.until + PAGE_TOKENS - 1) / PAGE_TOKENS - first : 0;
    const DecodeModel &model = *u.a.model;
    for (int64_t p = pages * part / parts; p < pages * (part + 1) / parts; p++)
        ask_for(head_of_page(model, *u.a.block, *u.a.step, u.a.step->sequence[u.rows.first], first + p, next.key_head), key_bytes(model, *u.a.block));
}

// What the unit's queries attend to in one range of tokens, into `to`. asked: whether the first keys are asked for already.
template <class Words>
void attend_range(const Unit &u, int64_t begin, int64_t end, float *scores, Attended *to, bool asked, const Next &after) {
    const DecodeModel &model = *u.a.model;
    const DecodeBlock &block = *u.a.block;
    const DecodeStep &step = *u.a.step;
    const int64_t size = block.head_size, sequence = step.sequence[u.rows.first], ld = STRETCH * sizeof(float);
    const int64_t last = std::min(end, u.position(u.count - 1) + 1), begins = u.seen_from(u.position(0));
    const int64_t of_keys = key_bytes(model, block), of_values = PAGE_TOKENS / Words::EACH * size * 4;
    for (int64_t i = 0; i < u.count; i++) clear(to[i], size);
    for (int64_t s = begin; s < last; s += STRETCH) {
        // Whole pages from the first one that any query sees.
        const int64_t from = std::max(s, begins / PAGE_TOKENS * PAGE_TOKENS), until = std::min(s + STRETCH, last);
        if (from >= until) continue;
        const char *pages[STRETCH / PAGE_TOKENS];
        int64_t count = 0;
        for (int64_t t = from; t < until; t += PAGE_TOKENS) pages[count++] = head_of_page(model, block, step, sequence, t / PAGE_TOKENS, u.key_head);
        // Pages lie anywhere, so the processor does not guess the next one.
        const Next next = s + STRETCH < last ? Next{u.key_head, s + STRETCH, std::min(s + 2 * STRETCH, last)} : after;
        if (!asked) ask_for(pages[0], of_keys);
        for (int64_t p = 0; p < count; p++) {
            if (!asked && p + 1 < count) ask_for(pages[p + 1], of_keys);
            ask_for(pages[p] + of_keys, of_values);
            all_scores<Words>(u.q, u.count, pages[p], of_keys / (4 * PAGE_TOKENS), scores + p * PAGE_TOKENS, STRETCH);
        }
        for (int64_t i = 0; i < u.count; i++) {
            const int64_t at = u.position(i);
            weigh<Words>(scores + i * STRETCH, count * PAGE_TOKENS, u.seen_from(at) - from, at + 1 - from, block.softcap, size, to[i]);
        }
        for (int64_t p = 0; p < count; p++) {
            const int64_t t = from + p * PAGE_TOKENS, first_seen = std::max<int64_t>(0, begins - t);
            const char *const weights = (const char *)scores + p * (PAGE_TOKENS / Words::EACH) * 4;
            ask_for_keys(u, next, p, count);
            all_values<Words>(weights, ld, u.count, pages[p] + of_keys, size, first_seen, std::min(PAGE_TOKENS, until - t), to);
        }
        asked = next.any();
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

// The first stretch of the unit's ranges from `range` on.
Next stretch_of(const Unit &u, int64_t range) {
    const int64_t tokens = range_tokens(u.position(0)), begins = u.seen_from(u.position(0)) / PAGE_TOKENS * PAGE_TOKENS;
    const int64_t s = std::max(range * tokens, begins / STRETCH * STRETCH);
    return {u.key_head, std::max(s, begins), std::min(s + STRETCH, u.position(u.count - 1) + 1)};
}

// asked: whether the first keys are asked for already. after: what is read when the unit is done.
template <class Words>
void attend_unit(const Unit &u, float *room, bool asked, const Next &after) {
    const int64_t size = u.a.block->head_size;
    Attended whole[MOST_QUERIES], part[MOST_QUERIES];
    for (int64_t i = 0; i < u.count; i++) {
        whole[i].values = room + MOST_QUERIES * STRETCH + i * size;
        part[i].values = room + MOST_QUERIES * (STRETCH + size) + i * size;
        clear(whole[i], size);
    }
    const int64_t tokens = range_tokens(u.position(0));
    for (int64_t r = first_range(u); r <= last_range(u); r++) {
        const Next next = r < last_range(u) ? stretch_of(u, r + 1) : after;
        attend_range<Words>(u, r * tokens, (r + 1) * tokens, room, part, asked, next);
        asked = next.any();
        for (int64_t i = 0; i < u.count; i++) join(whole[i], part[i], size);
    }
    for (int64_t i = 0; i < u.count; i++) write_out(whole[i], size, u.a.mixed + u.place(i));
}

template <class Words>
void attend_split(const Unit &u, int64_t range, float *room) {
    Attended part[MOST_QUERIES];
    float *at[MOST_QUERIES];
    for (int64_t i = 0; i < u.count; i++) part[i] = part_of_row(u.a, u.row(i), u.head(i), range, at[i]);
    if (range < first_range(u) || range > last_range(u)) {
        for (int64_t i = 0; i < u.count; i++) at[i][0] = NOTHING;
        return;
    }
    const int64_t tokens = range_tokens(u.position(0));
    attend_range<Words>(u, range * tokens, (range + 1) * tokens, room, part, false, Next{0, 0, 0});
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
    return MOST_QUERIES * (STRETCH + 3 * size) + 16;
}

int64_t head_slices(const DecodeBlock &block) { return (block.group() + MOST_QUERIES - 1) / MOST_QUERIES; }

void attend(Crew &crew, const Attention &a, float *room) {
    const int64_t slices = head_slices(*a.block), heads = a.block->key_heads * slices, ranges = a.partial ? MOST_RANGES : 1;
    char *const of_queries = (char *)(room + attention_room(*a.model) - MOST_QUERIES * a.block->head_size);
    auto unit = [&](int64_t queries, int64_t head) { return Unit(a, a.queries[queries], head / slices, head % slices, of_queries); };
    with_words(a.model->cache_type, [&](auto words) {
        typedef decltype(words) Words;
        if (a.partial) {
            crew.share(a.count * heads * ranges, [&](int64_t i) { attend_split<Words>(unit(i / ranges / heads, i / ranges % heads), i % ranges, room); });
            return;
        }
        // One thread takes all heads of some rows, which lie beside each other, where that leaves enough for the others.
        const int64_t together = a.count >= 4 * crew.threads ? heads : 1;
        crew.share(a.count * heads / together, [&](int64_t i) {
            bool asked = false;
            for (int64_t j = i * together; j < (i + 1) * together; j++) {
                const Unit u = unit(j / heads, j % heads);
                Next next{0, 0, 0};
                if (j + 1 < (i + 1) * together) next = stretch_of(u, first_range(u)), next.key_head = (j + 1) % heads / slices;
                attend_unit<Words>(u, room, asked, next);
                asked = next.any();
            }
        });
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
    const int64_t size = block.head_size, position = step.positions[m], slot = position % PAGE_TOKENS, words = key_words(model, block);
    char *const head = head_of_page(model, block, step, step.sequence[m], position / PAGE_TOKENS, key_head);
    char *const values = head + key_bytes(model, block);
    if (model.cache_type == F32) {
        for (int64_t d = 0; d < size; d++) memcpy(head + (d * PAGE_TOKENS + slot) * 4, key + d, 4);
        memcpy(values + slot * size * 4, value, size * 4);
        return;
    }
    alignas(64) bf16 lanes[16];
    for (int64_t c = 0; c < 2 * words; c += 16) {  // a pair of a key's numbers is a word; the last may be alone
        store_u16(lanes, bf16_bits(load16(key + c, first(size - c))));
        for (int64_t j = c; j < std::min(2 * words, c + 16); j += 2) memcpy(head + (j / 2 * PAGE_TOKENS + slot) * 4, lanes + (j - c), 4);
    }
    for (int64_t c = 0; c < size; c += 16) {  // numbers of two tokens are a word: this one writes its half
        store_u16(lanes, bf16_bits(load16(value + c, first(size - c))));
        for (int64_t j = c; j < std::min(size, c + 16); j++) memcpy(values + (slot / 2 * size + j) * 4 + slot % 2 * 2, lanes + (j - c), 2);
    }
}

}  // namespace deltaw
