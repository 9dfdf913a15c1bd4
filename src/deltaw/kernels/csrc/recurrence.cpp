// Linear recurrences over a prefix tree of segments: gated delta rule and state-space scan, forward and backward.
// recurrence.py contains the formulas. Each thread computes some heads, chunk by chunk.
#include <vector>

#include "kernels.h"
#include "panels.h"
#include "scratch.h"
#include "segments.h"
#include "threads.h"

using namespace deltaw;

namespace {

const int64_t CHUNK = 64;  // tokens
const float NORM_EPS = 1e-6f;  // added to the squared norm of queries and keys
const int64_t MAX_HEADS = 4;  // heads that share the products of queries and keys, which bounds the memory of their states

struct Sizes {
    int64_t length, heads, key_heads, d, dv;
    float scaling;
    int unit_vectors;

    int64_t shared() const { return heads / key_heads; }
    int64_t state() const { return d * dv; }
};

struct Chunk {
    int64_t start, count;
    int64_t previous;  // index of the chunk whose state it continues, or -1
    int64_t segment;
    bool is_last;  // the last chunk of its segment
};

std::vector<Chunk> cut(const Segments &f) {
    std::vector<Chunk> chunks;
    std::vector<int64_t> last(f.count);  // chunk of each segment or of its parent if it is empty, or -1
    for (int64_t s = 0; s < f.count; s++) {
        int64_t previous = f.parents[s] < 0 ? -1 : last[f.parents[s]];
        for (int64_t t = f.starts[s]; t < f.stops[s]; t += CHUNK) {
            chunks.push_back({t, std::min(CHUNK, f.stops[s] - t), previous, s, t + CHUNK >= f.stops[s]});
            previous = (int64_t)chunks.size() - 1;
        }
        last[s] = previous;
    }
    return chunks;
}

template <class T>
struct Inputs {
    const T *query, *key, *value;  // (length, key heads, d), (length, key heads, d), (length, heads, dv)
    const float *decay, *rate;  // (length, heads); rate is null for a state-space scan
};

// Queries and keys of a chunk, and their products, which the heads of a key head share.
struct KeyChunk {
    Panels query, key, key_columns, scores, similarity;
    float *query_rnorm, *key_rnorm;

    KeyChunk(Scratch &scratch, const Sizes &z)
        : query(take(scratch, CHUNK, z.d)), key(take(scratch, CHUNK, z.d)), key_columns(take(scratch, z.d, CHUNK)),
          scores(take(scratch, CHUNK, CHUNK)), similarity(take(scratch, CHUNK, CHUNK)), query_rnorm(scratch.take<float>(CHUNK)),
          key_rnorm(scratch.take<float>(CHUNK)) {}
    static Panels take(Scratch &scratch, int64_t rows, int64_t columns) {
        return {scratch.take<float>(Panels::numbers(rows, columns)), rows, columns};
    }

    template <class T>
    void load(const Inputs<T> &in, const Sizes &z, const Chunk &c, int64_t key_head) {
        const int64_t n = c.count, ld = z.key_heads * z.d, at = c.start * ld + key_head * z.d;
        query.rows = key.rows = scores.rows = similarity.rows = n;
        key_columns.columns = scores.columns = similarity.columns = n;
        load_rows(in.query + at, ld, query);
        load_rows(in.key + at, ld, key);
        if (z.unit_vectors) {
            to_unit(query, query_rnorm);
            to_unit(key, key_rnorm);
        }
        std::vector<float> by(n, z.scaling);
        scale_rows(query, by.data(), query);
        transpose(key, key_columns);
        multiply(query, key_columns, scores);
        if (in.rate) multiply(key, key_columns, similarity);
    }

  private:
    static void to_unit(const Panels &x, float *rnorm) {
        float squares[CHUNK] = {0};
        add_row_dots(x, x, 1, squares);
        for (int64_t r = 0; r < x.rows; r++) rnorm[r] = 1.0f / __builtin_sqrtf(squares[r] + NORM_EPS);
        scale_rows(x, rnorm, x);
    }
};

// Values of one head in a chunk.
struct HeadChunk {
    Panels pair_decay, weights, system;  // (n, n): D; scores ∘ D; -β·similarity ∘ D below the diagonal
    Panels value, recalled, corrected;  // (n, dv): V; K S; U
    float before[CHUNK], after[CHUNK], rate[CHUNK];  // exp of the sums of g up to each token, and after it; β
    float chunk_decay;

    HeadChunk(Scratch &scratch, const Sizes &z)
        : pair_decay(KeyChunk::take(scratch, CHUNK, CHUNK)), weights(KeyChunk::take(scratch, CHUNK, CHUNK)),
          system(KeyChunk::take(scratch, CHUNK, CHUNK)), value(KeyChunk::take(scratch, CHUNK, z.dv)),
          recalled(KeyChunk::take(scratch, CHUNK, z.dv)), corrected(KeyChunk::take(scratch, CHUNK, z.dv)) {}

    // Compute everything from the inputs and the state before the chunk, which is null at a root.
    template <class T>
    void load(const Inputs<T> &in, const Sizes &z, const Chunk &c, int64_t head, const KeyChunk &k, const float *state) {
        const int64_t n = c.count;
        for (Panels *m : {&pair_decay, &weights, &system}) m->rows = m->columns = n;
        for (Panels *m : {&value, &recalled, &corrected}) m->rows = n;
        float decay[CHUNK], sum = 0;
        for (int64_t i = 0; i < n; i++) {
            decay[i] = in.decay[(c.start + i) * z.heads + head];
            before[i] = sum += decay[i];
            rate[i] = in.rate ? in.rate[(c.start + i) * z.heads + head] : 1.0f;
        }
        sum = 0;
        for (int64_t i = n - 1; i >= 0; i--) {
            after[i] = sum;
            sum += decay[i];
        }
        for (int64_t i = 0; i < n; i += 16) {
            const First m = first(n - i);
            store16(before + i, exp_16(load16(before + i, m)), m);
            store16(after + i, exp_16(load16(after + i, m)), m);
        }
        chunk_decay = before[n - 1];
        compute_weights(k, decay, in.rate != nullptr);
        load_rows(in.value + c.start * z.heads * z.dv + head * z.dv, z.heads * z.dv, value);
        memcpy(corrected.at, value.at, value.size() * sizeof(float));
        if (!in.rate) return;
        if (state) {
            multiply(k.key, {const_cast<float *>(state), z.d, z.dv}, recalled);
            float factors[CHUNK];
            for (int64_t i = 0; i < n; i++) factors[i] = -before[i];
            add_scaled_rows(recalled, factors, corrected);
        }
        scale_rows(corrected, rate, corrected);
        solve(corrected);
    }

    // state = chunk_decay · state + Kᵀ (after ∘ U). `state` holds the state before the chunk unless `is_root`.
    void update(const KeyChunk &k, const Panels &scaled, const Panels &state, bool is_root) const {
        const Panels u = scaled.with_rows(corrected.rows);
        scale_rows(corrected, after, u);
        if (is_root) state.clear();
        else {
            const F16 by = set_f(chunk_decay);
            for (int64_t i = 0; i < state.size(); i += 16) store16(state.at + i, load16(state.at + i) * by);
        }
        multiply_onto(k.key_columns, u, state);
    }

    // x = (1 + β·similarity ∘ D)⁻¹ x.
    void solve(const Panels &x) const {
        const int64_t n = x.rows;
        for (int64_t low = 0; low < n; low += BLOCK) {
            const int64_t high = std::min(n, low + BLOCK);
            add_products(system, low, high, 0, low, x);
            for (int64_t i = low; i < high; i++)
                for (int64_t j = low; j < i; j++) add_row(x, i, j, system.row(j / PANEL, i)[j % PANEL]);
        }
    }
    // x = (1 + β·similarity ∘ D)⁻ᵀ x. `columns` is the transposed system.
    void solve_transposed(const Panels &columns, const Panels &x) const {
        const int64_t n = x.rows;
        for (int64_t low = (n - 1) / BLOCK * BLOCK; low >= 0; low -= BLOCK) {
            const int64_t high = std::min(n, low + BLOCK);
            add_products(columns, low, high, high, n, x);
            for (int64_t i = high - 1; i >= low; i--)
                for (int64_t j = i + 1; j < high; j++) add_row(x, i, j, columns.row(j / PANEL, i)[j % PANEL]);
        }
    }

  private:
    static constexpr int64_t BLOCK = 16;

    // The logarithm of D_ij is the sum of g from token j + 1 to i, not a difference of cumulative sums, which would be
    // inaccurate after a strong decay and NaN after an infinite one.
    void compute_weights(const KeyChunk &k, const float *decay, bool delta) const {
        const int64_t n = pair_decay.rows;
        for (int64_t p = 0; p < pair_decay.panels(); p++)
            for (int64_t c = 0; c < PANEL; c += 16) {
                const int64_t j = p * PANEL + c;
                F16 sum = zero_f();
                for (int64_t i = 0; i < n; i++) {
                    const First seen = first(i + 1 - j), below = first(i - j);
                    sum = select_first(below, sum + set_f(decay[i]));
                    const F16 d = select_first(seen, exp_16(sum));
                    store16(pair_decay.row(p, i) + c, d);
                    store16(weights.row(p, i) + c, select_first(seen, d * load16(k.scores.row(p, i) + c)));
                    if (delta)
                        store16(system.row(p, i) + c, select_first(below, set_f(-rate[i]) * d * load16(k.similarity.row(p, i) + c)));
                }
            }
    }
    // x[low … high - 1] += m[low … high - 1, from … to - 1] · x[from … to - 1].
    static void add_products(const Panels &m, int64_t low, int64_t high, int64_t from, int64_t to, const Panels &x) {
        for (int64_t j = 0; j < x.panels(); j++)
            for (int64_t a = from; a < to;) {
                const int64_t b = std::min(to, (a / PANEL + 1) * PANEL);
                products_onto<OpF32>(high - low, 2, (const char *)(m.row(a / PANEL, low) + a % PANEL), PANEL * 4, (const char *)x.row(j, a), b - a,
                                     x.row(j, low), PANEL, x.row(j, low), PANEL);
                a = b;
            }
    }
    static void add_row(const Panels &x, int64_t to, int64_t from, float by) {
        const F16 factor = set_f(by);
        for (int64_t p = 0; p < x.panels(); p++)
            for (int64_t c = 0; c < PANEL; c += 16)
                store16(x.row(p, to) + c, fma(load16(x.row(p, from) + c), factor, load16(x.row(p, to) + c)));
    }
};

// Divide the heads among the threads, and run body(key head, first head, last head + 1) for groups of heads that share a
// key head.
template <class Body>
void for_heads_of(const Sizes &z, int thread, int threads, Body &&body) {
    int64_t begin, end;
    split_range(z.heads, thread, threads, begin, end);
    const int64_t shared = z.shared();
    for (int64_t low = begin; low < end;) {
        const int64_t high = std::min({end, low + MAX_HEADS, (low / shared + 1) * shared});
        body(low / shared, low, high);
        low = high;
    }
}

// Slots for the states after chunks that another chunk continues, for the forward pass one that is not the next. -1 for
// other chunks.
struct KeptStates {
    std::vector<int64_t> slot;
    int64_t count = 0;

    KeptStates(const std::vector<Chunk> &chunks, bool backward) : slot(chunks.size(), -1) {
        for (size_t i = 0; i < chunks.size(); i++) {
            const int64_t previous = chunks[i].previous;
            if (previous >= 0 && (backward || previous + 1 != (int64_t)i) && slot[previous] < 0) slot[previous] = count++;
        }
    }
};

// Load a query or key and multiply it by `factor` and, if `unit`, by its reciprocal norm.
template <class T>
void load_vector(const T *from, int64_t d, bool unit, float factor, float *to) {
    F16 squares = zero_f();
    for (int64_t i = 0; i < d; i += 16) {
        const F16 x = load16(from + i);
        squares = fma(x, x, squares);
        store16(to + i, x);
    }
    const F16 by = set_f(unit ? factor / __builtin_sqrtf(sum_lanes(squares) + NORM_EPS) : factor);
    for (int64_t i = 0; i < d; i += 16) store16(to + i, load16(to + i) * by);
}

// A single token of one head, whose state (d, dv) in panels is updated in place. `query` and `key` are (d).
template <class T>
void run_token(const Inputs<T> &in, const Sizes &z, int64_t t, int64_t head, const float *query, const float *key, float *state, T *out) {
    const int64_t at = t * z.heads + head;
    const F16 decay = exp_16(set_f(in.decay[at]));
    for (int64_t c = 0; c < z.dv; c += PANEL, state += z.d * PANEL) {
        F16 u[2] = {load16(in.value + at * z.dv + c), load16(in.value + at * z.dv + c + 16)}, y[2] = {zero_f(), zero_f()};
        if (in.rate) {
            F16 recalled[2] = {zero_f(), zero_f()};
            for (int64_t i = 0; i < z.d; i++)
                for (int j = 0; j < 2; j++) recalled[j] = fma(load16(state + i * PANEL + 16 * j), set_f(key[i]), recalled[j]);
            for (int j = 0; j < 2; j++) u[j] = fnma(decay, recalled[j], u[j]) * set_f(in.rate[at]);
        }
        for (int64_t i = 0; i < z.d; i++)
            for (int j = 0; j < 2; j++) {
                float *const number = state + i * PANEL + 16 * j;
                const F16 updated = fma(set_f(key[i]), u[j], load16(number) * decay);
                store16(number, updated);
                y[j] = fma(updated, set_f(query[i]), y[j]);
            }
        for (int j = 0; j < 2; j++) store16(out + at * z.dv + c + 16 * j, y[j]);
    }
}

// `states`: null, or (heads, d, dv) in panels for each segment. A segment without a parent starts with this state, and the
// state after a segment replaces it.
template <class T>
void forward(const Segments &f, const Sizes &z, const Inputs<T> &in, float *const *states, T *out) {
    const std::vector<Chunk> chunks = cut(f);
    const KeptStates kept(chunks, false);
    in_parallel([&](int thread, int threads) {
        for_heads_of(z, thread, threads, [&](int64_t key_head, int64_t low, int64_t high) {
            Scratch scratch;
            KeyChunk k(scratch, z);
            HeadChunk h(scratch, z);
            const Panels read = KeyChunk::take(scratch, CHUNK, z.dv), scaled = KeyChunk::take(scratch, CHUNK, z.dv);
            float *const current = scratch.take<float>((high - low) * z.state());
            float *const kept_states = scratch.take<float>((high - low) * kept.count * z.state());
            float *const token = scratch.take<float>(2 * z.d);
            for (size_t i = 0; i < chunks.size(); i++) {
                const Chunk &c = chunks[i];
                if (states && c.count == 1 && c.previous < 0 && kept.slot[i] < 0 && (i + 1 == chunks.size() || chunks[i + 1].previous < 0)) {
                    const int64_t at = (c.start * z.key_heads + key_head) * z.d;
                    load_vector(in.query + at, z.d, z.unit_vectors, z.scaling, token);
                    load_vector(in.key + at, z.d, z.unit_vectors, 1.0f, token + z.d);
                    for (int64_t head = low; head < high; head++)
                        run_token(in, z, c.start, head, token, token + z.d, states[c.segment] + head * z.state(), out);
                    continue;
                }
                k.load(in, z, c, key_head);
                for (int64_t head = low; head < high; head++) {
                    const Panels state{current + (head - low) * z.state(), z.d, z.dv};
                    float *const slots = kept_states + (head - low) * kept.count * z.state();
                    if (c.previous >= 0 && c.previous + 1 != (int64_t)i)
                        memcpy(state.at, slots + kept.slot[c.previous] * z.state(), z.state() * sizeof(float));
                    float *const given = states ? states[c.segment] + head * z.state() : nullptr;
                    const bool is_root = c.previous < 0 && !given;
                    if (c.previous < 0 && given) memcpy(state.at, given, z.state() * sizeof(float));
                    h.load(in, z, c, head, k, is_root ? nullptr : state.at);
                    const Panels y = read.with_rows(c.count);
                    if (is_root) y.clear();
                    else {
                        multiply(k.query, state, y);
                        scale_rows(y, h.before, y);
                    }
                    multiply_onto(h.weights, h.corrected, y);
                    store_rows(y, out + c.start * z.heads * z.dv + head * z.dv, z.heads * z.dv);
                    h.update(k, scaled, state, is_root);
                    if (c.is_last && given) memcpy(given, state.at, z.state() * sizeof(float));
                    if (kept.slot[i] >= 0) memcpy(slots + kept.slot[i] * z.state(), state.at, z.state() * sizeof(float));
                }
            }
        });
    });
}

template <class T>
struct Gradients {
    T *query, *key, *value;
    float *decay, *rate;
};

// Buffers of the backward pass of a chunk of one head.
struct BackwardBuffers {
    Panels grad, values, state_columns, grad_columns, corrected_columns, wide, pairs, pair_columns, scaled, recalled_grad;
    float decay[CHUNK], before[CHUNK], after[CHUNK], rate[CHUNK];

    BackwardBuffers(Scratch &s, const Sizes &z)
        : grad(KeyChunk::take(s, CHUNK, z.dv)), values(KeyChunk::take(s, CHUNK, z.dv)), state_columns(KeyChunk::take(s, z.dv, z.d)),
          grad_columns(KeyChunk::take(s, z.dv, z.d)), corrected_columns(KeyChunk::take(s, z.dv, CHUNK)), wide(KeyChunk::take(s, CHUNK, z.d)),
          pairs(KeyChunk::take(s, CHUNK, CHUNK)), pair_columns(KeyChunk::take(s, CHUNK, CHUNK)), scaled(KeyChunk::take(s, CHUNK, z.dv)),
          recalled_grad(KeyChunk::take(s, CHUNK, z.dv)) {}
    void set_rows(int64_t n) {
        for (Panels *m : {&grad, &values, &wide, &pairs, &pair_columns, &scaled, &recalled_grad}) m->rows = n;
        pairs.columns = pair_columns.columns = corrected_columns.columns = n;
    }
};

// Gradients of the queries and keys of a chunk, summed over the heads that share them.
struct KeyGradients {
    Panels query, key, scores, similarity, query_columns;

    KeyGradients(Scratch &s, const Sizes &z)
        : query(KeyChunk::take(s, CHUNK, z.d)), key(KeyChunk::take(s, CHUNK, z.d)), scores(KeyChunk::take(s, CHUNK, CHUNK)),
          similarity(KeyChunk::take(s, CHUNK, CHUNK)), query_columns(KeyChunk::take(s, z.d, CHUNK)) {}
    void clear(const KeyChunk &k) {
        query.rows = key.rows = scores.rows = similarity.rows = k.query.rows;
        scores.columns = similarity.columns = query_columns.columns = k.query.rows;
        query.clear(), key.clear(), scores.clear(), similarity.clear();
        transpose(k.query, query_columns);
    }
    // Add the gradients that pass through the products of the chunk. `columns`: buffer (CHUNK, CHUNK).
    void finish(const KeyChunk &k, bool delta, const Panels &columns) const {
        const Panels transposed{columns.at, scores.columns, scores.rows};
        multiply_onto(scores, k.key, query);
        transpose(scores, transposed);
        multiply_onto(transposed, k.query, key);
        if (!delta) return;
        transpose(similarity, transposed);
        multiply_onto(similarity, k.key, key);
        multiply_onto(transposed, k.key, key);
    }
};

template <class T>
class Backward {
    const Segments &f;
    const Sizes &z;
    const Inputs<T> in;
    const T *const grad;
    const Gradients<T> to;
    const std::vector<Chunk> chunks = cut(f);
    const bool delta = in.rate != nullptr;
    const KeptStates kept{chunks, true};
    std::vector<int64_t> key_groups;  // number of groups of heads of each key head

  public:
    Backward(const Segments &f, const Sizes &z, const Inputs<T> &in, const T *grad, const Gradients<T> &to)
        : f(f), z(z), in(in), grad(grad), to(to) {}

    void run() {
        const int count = thread_count();
        key_groups.assign(z.key_heads, 0);
        for (int thread = 0; thread < count; thread++)
            for_heads_of(z, thread, count, [&](int64_t key_head, int64_t, int64_t) { key_groups[key_head]++; });
        // Each thread sums the gradients of queries and keys of key heads with several groups.
        std::vector<Sum> sums;
        for (int thread = 0; thread < count; thread++)
            for_heads_of(z, thread, count, [&](int64_t key_head, int64_t, int64_t) {
                const bool is_known = !sums.empty() && sums.back().thread == thread && sums.back().key_head == key_head;
                if (key_groups[key_head] > 1 && !is_known) sums.push_back({thread, key_head, nullptr});
            });
        Scratch scratch;
        for (Sum &sum : sums) sum.at = scratch.take<float>(2 * z.length * z.d);
        in_parallel([&](int thread, int threads) {
            for (const Sum &sum : sums)
                if (sum.thread == thread) std::fill_n(sum.at, 2 * z.length * z.d, 0.0f);
            for_heads_of(z, thread, threads, [&](int64_t key_head, int64_t low, int64_t high) {
                float *at = nullptr;
                for (const Sum &sum : sums)
                    if (sum.thread == thread && sum.key_head == key_head) at = sum.at;
                run_heads(key_head, low, high, at);
            });
        });
        add_sums(sums);
    }

  private:
    // Gradients of queries (length, d) and keys (length, d) of a key head.
    struct Sum {
        int thread;
        int64_t key_head;
        float *at;
    };

    void run_heads(int64_t key_head, int64_t low, int64_t high, float *shared_sums) const {
        Scratch scratch;
        KeyChunk k(scratch, z);
        HeadChunk h(scratch, z);
        BackwardBuffers b(scratch, z);
        KeyGradients sums(scratch, z);
        const int64_t num_heads = high - low, count = (int64_t)chunks.size(), size = z.state();
        // The states after the chunks that are continued, and their gradients.
        float *const states = scratch.take<float>(num_heads * kept.count * size), *const slopes = scratch.take<float>(num_heads * kept.count * size);
        std::vector<char> has_slope(count, 0);
        auto at = [&](float *from, int64_t head, int64_t i) {
            return kept.slot[i] < 0 ? nullptr : from + ((head - low) * kept.count + kept.slot[i]) * size;
        };
        for (int64_t i = 0; i < count; i++) {
            const Chunk &c = chunks[i];
            if (kept.slot[i] < 0) continue;
            k.load(in, z, c, key_head);
            for (int64_t head = low; head < high; head++) {
                const bool is_root = c.previous < 0;
                const Panels after{at(states, head, i), z.d, z.dv};
                if (!is_root) memcpy(after.at, at(states, head, c.previous), size * sizeof(float));
                h.load(in, z, c, head, k, is_root ? nullptr : after.at);
                h.update(k, b.scaled, after, is_root);
            }
        }
        for (int64_t i = count - 1; i >= 0; i--) {
            const Chunk &c = chunks[i];
            k.load(in, z, c, key_head);
            sums.clear(k);
            for (int64_t head = low; head < high; head++) {
                const bool is_root = c.previous < 0;
                const float *const state = is_root ? nullptr : at(states, head, c.previous);
                h.load(in, z, c, head, k, state);
                run_chunk(c, head, k, h, b, sums, state, at(slopes, head, i), is_root ? nullptr : at(slopes, head, c.previous),
                          !is_root && has_slope[c.previous]);
            }
            if (c.previous >= 0) has_slope[c.previous] = 1;
            sums.finish(k, delta, b.pairs);
            write_keys(c, key_head, k, sums, shared_sums);
        }
    }

    // Gradients of a chunk of one head. `slope`: gradient of the state after it, or null. `before`: receives the
    // gradient of the state before it, added if `add`.
    void run_chunk(const Chunk &c, int64_t head, const KeyChunk &k, const HeadChunk &h, BackwardBuffers &b, KeyGradients &sums,
                   const float *state_at, float *slope_at, float *before_at, bool add) const {
        const int64_t n = c.count, value_at = c.start * z.heads * z.dv + head * z.dv;
        const Panels state{const_cast<float *>(state_at), z.d, z.dv}, slope{slope_at, z.d, z.dv}, before{before_at, z.d, z.dv};
        b.set_rows(n);
        std::fill_n(b.before, n, 0.0f), std::fill_n(b.after, n, 0.0f), std::fill_n(b.rate, n, 0.0f);
        float last = 0;
        load_rows(grad + value_at, z.heads * z.dv, b.grad);
        transpose(h.weights, b.pair_columns);
        multiply(b.pair_columns, b.grad, b.values);
        if (slope_at) {
            multiply(k.key, slope, b.scaled);
            add_scaled_rows(b.scaled, h.after, b.values);
            transpose(slope, b.grad_columns);
            multiply(h.corrected, b.grad_columns, b.wide);
            add_scaled_rows(b.wide, h.after, sums.key);
            add_row_dots(b.wide, k.key, 1, b.after);
        }
        if (delta) {
            transpose(h.system, b.pair_columns);
            h.solve_transposed(b.pair_columns, b.values);
        }
        if (state_at) {
            if (!add) before.clear();
            transpose(state, b.state_columns);
            multiply(b.grad, b.state_columns, b.wide);
            add_scaled_rows(b.wide, h.before, sums.query);
            add_row_dots(b.wide, k.query, 1, b.before);
            scale_rows(b.grad, h.before, b.scaled);
            multiply_onto(sums.query_columns, b.scaled, before);
            if (slope_at) last = add_decayed(slope, state, h.chunk_decay, before);
            if (delta) {
                scale_rows(b.values, h.rate, b.scaled);
                add_row_dots(b.scaled, h.recalled, -1, b.before);
                float factors[CHUNK];
                for (int64_t i = 0; i < n; i++) factors[i] = -h.before[i];
                scale_rows(b.scaled, factors, b.recalled_grad);
                multiply_onto(b.recalled_grad, b.state_columns, sums.key);
                multiply_onto(k.key_columns, b.recalled_grad, before);
            }
        }
        std::fill_n(b.decay, n, 0.0f);
        transpose(h.corrected, b.corrected_columns);
        multiply(b.grad, b.corrected_columns, b.pairs);
        add_pairs(b, h.weights, h.pair_decay, 1, nullptr, sums.scores);
        if (delta) add_system(c, k, h, b, sums, state_at != nullptr);
        write_head(c, head, h, b, last);
    }

    // before += decay · slope. Returns the sum of slope ∘ state.
    static float add_decayed(const Panels &slope, const Panels &state, float decay, const Panels &before) {
        F16 sum = zero_f(), by = set_f(decay);
        for (int64_t i = 0; i < slope.size(); i += 16) {
            const F16 s = load16(slope.at + i);
            store16(before.at + i, fma(s, by, load16(before.at + i)));
            sum = fma(s, load16(state.at + i), sum);
        }
        return sum_lanes(sum);
    }

    // Add b.pairs, the gradient of `weights`: to the gradients of g, and through `factor` · D (· rates) to `products`.
    // A decay g_t affects the pairs from a column before t to a row from t on.
    static void add_pairs(BackwardBuffers &b, const Panels &weights, const Panels &pair_decay, float factor, const float *rates,
                          const Panels &products) {
        float column_sums[CHUNK] = {0};  // of the rows from i on
        for (int64_t i = weights.rows - 1; i >= 0; i--) {
            F16 sum = zero_f();
            const F16 by = set_f(rates ? factor * rates[i] : factor);
            for (int64_t j = 0; j <= i; j += 16) {
                const int64_t p = j / PANEL, c = j % PANEL;
                const F16 g = select_first(first(i + 1 - j), load16(b.pairs.row(p, i) + c));
                const F16 column = fma(g, load16(weights.row(p, i) + c), load16(column_sums + j));
                store16(column_sums + j, column);
                sum = sum + select_first(first(i - j), column);
                float *const product = products.row(p, i) + c;
                store16(product, fma(g * by, load16(pair_decay.row(p, i) + c), load16(product)));
            }
            b.decay[i] += sum_lanes(sum);
        }
    }

    // Gradients through the triangular system: of rates, decays and similarity.
    void add_system(const Chunk &c, const KeyChunk &k, const HeadChunk &h, BackwardBuffers &b, KeyGradients &sums, bool has_state) const {
        const int64_t n = c.count;
        multiply(b.values, b.corrected_columns, b.pairs);  // minus the gradient of the system, which is stored negated
        for (int64_t i = 0; i < n; i++) {
            F16 rate = zero_f();
            for (int64_t j = 0; j < n; j += 16) {
                const int64_t p = j / PANEL, x = j % PANEL;
                float *const pair = b.pairs.row(p, i) + x;
                const F16 g = select_first(first(std::min(n, i) - j), load16(pair));
                store16(pair, g);
                rate = fma(g * load16(k.similarity.row(p, i) + x), load16(h.pair_decay.row(p, i) + x), rate);
            }
            b.rate[i] -= sum_lanes(rate);
        }
        add_pairs(b, h.system, h.pair_decay, -1, h.rate, sums.similarity);
        memcpy(b.scaled.at, h.value.at, b.scaled.size() * sizeof(float));
        if (has_state) {
            float factors[CHUNK];
            for (int64_t i = 0; i < n; i++) factors[i] = -h.before[i];
            add_scaled_rows(h.recalled, factors, b.scaled);
        }
        add_row_dots(b.values, b.scaled, 1, b.rate);
        scale_rows(b.values, h.rate, b.values);
    }

    void write_head(const Chunk &c, int64_t head, const HeadChunk &h, BackwardBuffers &b, float last) const {
        const int64_t n = c.count;
        store_rows(b.values, to.value + c.start * z.heads * z.dv + head * z.dv, z.heads * z.dv);
        float sum = last * h.chunk_decay;
        for (int64_t i = n - 1; i >= 0; i--) {
            sum += b.before[i] * h.before[i];
            b.decay[i] += sum;
        }
        sum = 0;
        for (int64_t i = 0; i < n; i++) {
            to.decay[(c.start + i) * z.heads + head] = b.decay[i] + sum;
            sum += b.after[i] * h.after[i];
            if (delta) to.rate[(c.start + i) * z.heads + head] = b.rate[i];
        }
    }

    // Write the gradients of a key head, or its part to the sums of the thread.
    void write_keys(const Chunk &c, int64_t key_head, const KeyChunk &k, const KeyGradients &sums, float *shared_sums) const {
        if (shared_sums) {
            add_rows(sums.query, shared_sums + c.start * z.d, z.d);
            add_rows(sums.key, shared_sums + (z.length + c.start) * z.d, z.d);
            return;
        }
        const int64_t ld = z.key_heads * z.d, at = c.start * ld + key_head * z.d;
        finish_keys(k, sums.query, sums.key);
        store_rows(sums.query, to.query + at, ld);
        store_rows(sums.key, to.key + at, ld);
    }

    // Apply the derivatives of scaling and normalization.
    void finish_keys(const KeyChunk &k, const Panels &query, const Panels &key) const {
        std::vector<float> by(query.rows, z.scaling);
        if (z.unit_vectors) {
            // k.query is scaling · q̂. The projection is computed with q̂, from grad · scaling.
            float dots[CHUNK] = {0};
            add_row_dots(query, k.query, 1, dots);
            for (int64_t r = 0; r < query.rows; r++) dots[r] = z.scaling == 0 ? 0 : -dots[r] / (z.scaling * z.scaling);
            add_scaled_rows(k.query, dots, query);
            for (int64_t r = 0; r < query.rows; r++) by[r] = z.scaling * k.query_rnorm[r];
            float key_dots[CHUNK] = {0};
            add_row_dots(key, k.key, -1, key_dots);
            add_scaled_rows(k.key, key_dots, key);
            scale_rows(key, k.key_rnorm, key);
        }
        scale_rows(query, by.data(), query);
    }

    // Add the threads' sums of each key head, and write them.
    void add_sums(const std::vector<Sum> &sums) const {
        const int64_t ld = z.key_heads * z.d;
        for (int64_t key_head = 0; key_head < z.key_heads; key_head++) {
            if (key_groups[key_head] < 2) continue;
            in_parallel([&](int thread, int threads) {
                Scratch scratch;
                KeyChunk k(scratch, z);
                Panels query = KeyChunk::take(scratch, CHUNK, z.d), key = KeyChunk::take(scratch, CHUNK, z.d), part = KeyChunk::take(scratch, CHUNK, z.d);
                for (size_t i = thread; i < chunks.size(); i += threads) {
                    const Chunk &c = chunks[i];
                    query.rows = key.rows = part.rows = c.count;
                    query.clear(), key.clear();
                    for (const Sum &sum : sums) {
                        if (sum.key_head != key_head) continue;
                        load_rows(sum.at + c.start * z.d, z.d, part);
                        add_to(part, query);
                        load_rows(sum.at + (z.length + c.start) * z.d, z.d, part);
                        add_to(part, key);
                    }
                    k.load(in, z, c, key_head);
                    finish_keys(k, query, key);
                    const int64_t at = c.start * ld + key_head * z.d;
                    store_rows(query, to.query + at, ld);
                    store_rows(key, to.key + at, ld);
                }
            });
        }
    }
};

// Peak bytes of a thread's buffers for a group of heads.
int64_t group_bytes(const Sizes &z, int64_t heads, int64_t kept, bool backward) {
    auto of = [](int64_t rows, int64_t columns) { return Panels::numbers(rows, columns); };
    const int64_t square = of(CHUNK, CHUNK), wide = of(CHUNK, z.d), columns = of(z.d, CHUNK), values = of(CHUNK, z.dv);
    int64_t numbers = 2 * wide + columns + 2 * square + 2 * CHUNK + 3 * square + 3 * values;
    if (backward) numbers += 4 * values + 2 * of(z.dv, z.d) + of(z.dv, CHUNK) + 3 * wide + 4 * square + columns + 2 * heads * kept * z.state();
    else numbers += 2 * values + heads * (1 + kept) * z.state() + 2 * z.d;
    return numbers * 4;
}

template <class T>
void run_forward(const Segments &f, const Sizes &z, const void *query, const void *key, const void *value, const float *decay, const float *rate,
                 float *const *states, void *out) {
    forward(f, z, Inputs<T>{(const T *)query, (const T *)key, (const T *)value, decay, rate}, states, (T *)out);
}
template <class T>
void run_backward(const Segments &f, const Sizes &z, const void *query, const void *key, const void *value, const float *decay, const float *rate,
                  const void *grad, void *d_query, void *d_key, void *d_value, float *d_decay, float *d_rate) {
    const Inputs<T> in{(const T *)query, (const T *)key, (const T *)value, decay, rate};
    Backward<T>(f, z, in, (const T *)grad, Gradients<T>{(T *)d_query, (T *)d_key, (T *)d_value, d_decay, d_rate}).run();
}

}  // namespace

// Peak bytes of all threads' arenas during dw_recurrence or dw_recurrence_backward.
int64_t dw_recurrence_scratch_size(int backward, const int64_t *segments, int64_t count, int64_t length, int64_t heads, int64_t key_heads, int64_t d,
                                   int64_t dv) {
    int64_t bytes = 0;
    guarded([&] {
        const Segments f(segments, count, length, 0, 1, nullptr, 0);
        const Sizes z{length, heads, key_heads, d, dv, 1.0f, 0};
        const int64_t kept = KeptStates(cut(f), backward).count;
        const int threads = thread_count();
        std::vector<int64_t> groups(key_heads, 0);
        for (int thread = 0; thread < threads; thread++) {
            int64_t peak = 0;
            for_heads_of(z, thread, threads, [&](int64_t key_head, int64_t low, int64_t high) {
                peak = std::max(peak, group_bytes(z, high - low, kept, backward));
                groups[key_head]++;
            });
            bytes += peak;
        }
        for (int thread = 0; backward && thread < threads; thread++) {
            int64_t last = -1;
            for_heads_of(z, thread, threads, [&](int64_t key_head, int64_t, int64_t) {
                if (groups[key_head] > 1 && key_head != last) bytes += 2 * length * d * 4;
                last = key_head;
            });
        }
    });
    return bytes;
}

// Outputs (length, heads, dv) of a recurrence. `segments` is a table of Segments (4, count). Queries and keys are
// (length, key heads, d), values (length, heads, dv), decay and rate (length, heads). rate is null for a state-space
// scan. d and dv are multiples of 32. states is null, or contains a state (heads, dv / 32, d, 32) per segment: the state
// before a segment without a parent, which the state after the segment replaces.
int dw_recurrence(int type, const int64_t *segments, int64_t count, int64_t length, int64_t heads, int64_t key_heads, int64_t d, int64_t dv,
                  float scaling, int unit_vectors, const void *query, const void *key, const void *value, const float *decay, const float *rate,
                  float *const *states, void *out) {
    return guarded([&] {
        require_in_bounds(key_heads > 0 && heads % key_heads == 0 && d % PANEL == 0 && dv % PANEL == 0);
        const Segments f(segments, count, length, 0, 1, nullptr, 0);
        const Sizes z{length, heads, key_heads, d, dv, scaling, unit_vectors};
        if (type == F32) run_forward<float>(f, z, query, key, value, decay, rate, states, out);
        else run_forward<bf16>(f, z, query, key, value, decay, rate, states, out);
    });
}

// Gradients of all inputs of dw_recurrence from the gradient of its outputs.
int dw_recurrence_backward(int type, const int64_t *segments, int64_t count, int64_t length, int64_t heads, int64_t key_heads, int64_t d, int64_t dv,
                           float scaling, int unit_vectors, const void *query, const void *key, const void *value, const float *decay,
                           const float *rate, const void *grad, void *d_query, void *d_key, void *d_value, float *d_decay, float *d_rate) {
    return guarded([&] {
        require_in_bounds(key_heads > 0 && heads % key_heads == 0 && d % PANEL == 0 && dv % PANEL == 0);
        const Segments f(segments, count, length, 0, 1, nullptr, 0);
        const Sizes z{length, heads, key_heads, d, dv, scaling, unit_vectors};
        if (type == F32) run_backward<float>(f, z, query, key, value, decay, rate, grad, d_query, d_key, d_value, d_decay, d_rate);
        else run_backward<bf16>(f, z, query, key, value, decay, rate, grad, d_query, d_key, d_value, d_decay, d_rate);
    });
}
