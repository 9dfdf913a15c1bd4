// The loss of a language model's head and its gradient in the hidden vectors, from logits that need not be accurate.
//
// A row of the logits' gradient is the row's probabilities, less one at the target. Most of their sum is in few classes,
// and the error of the gradient is in those. So the logits of a row's likely classes are computed once more, from the
// weight's own numbers, and their part of the gradient is added from the same rows of the weight while the cache has
// them. What is left of the probabilities is alike in rows near each other: it is summed over `together` rows, and each
// of them gets a share of the sum's gradient, by how much of its own is in it. The sum of the gradient over these rows
// is then that of the unlikely classes' own probabilities.
#include "kernels.h"
#include "logits.h"
#include "scratch.h"
#include "threads.h"

using namespace deltaw;

namespace {

// A class is likely if it has this part of the probability beside the target's.
const float LIKELY = 1.0f / 8192;
const int64_t MOST_LIKELY = 4096;  // of a row; further ones count as unlikely
// Rows whose likely classes a thread goes through side by side: many are likely in several of them, and their rows of the
// weight are read from memory once.
const int64_t SIDE_BY_SIDE = 16;
const int64_t CACHED = 256 << 10;  // bytes of the weight's rows that one of them goes through before the next one's turn
const int64_t AT_ONCE = 16;        // classes whose e^z are computed at once
const int ROWS = 4;                // of the weight that are read at once
const bf16 COUNTED = 0xff80;       // NO_LOGIT: this class is among the likely ones

int64_t up_to_32(int64_t D) { return (D + 31) / 32 * 32; }

template <class Change>
struct Head {
    int64_t V, D;
    const bf16 *weight;
    const bf16 *bias;  // or null
    Change change;

    float bias_of(int64_t v) const { return bias ? to_float(bias[v]) : 0; }
};

// Numbers of bf16 are read as pairs: the even ones of 32 are 16 words' lower halves, the odd ones their upper halves.
// Vectors in fp32 that meet them have 16 even ones first, then 16 odd ones, and so on.
DW_INLINE F16 even_of(I16 pairs) { return from_bits(pairs << 16); }
DW_INLINE F16 odd_of(I16 pairs) { return from_bits(pairs & set_i((int32_t)0xffff0000)); }

// body(number of 32, its words, which of them are there) for each 32 numbers of a row.
template <class Body>
DW_INLINE void each_32(int64_t D, Body &&body) {
    int64_t d = 0;
    for (; d + 32 <= D; d += 32) body(d, first(16));
    if (d < D) body(d, first((D - d) / 2));
}

// into += the products of ROWS rows with h.
void add_dots(int64_t D, const bf16 *const *w, const float *h, float *into) {
    F16 sum[ROWS] = {};
    each_32(D, [&](int64_t d, First k) {
        const F16 even = load16(h + d), odd = load16(h + d + 16);
        for (int i = 0; i < ROWS; i++) {
            const I16 pairs = load_i(w[i] + d, k);
            sum[i] = fma(odd_of(pairs), odd, fma(even_of(pairs), even, sum[i]));
        }
    });
    for (int i = 0; i < ROWS; i++) into[i] += sum_of(sum[i]);
}

// to += Σ byᵢ · wᵢ over ROWS rows.
void add_rows(int64_t D, const float *by, const bf16 *const *w, float *to) {
    F16 factor[ROWS];
    for (int i = 0; i < ROWS; i++) factor[i] = set_f(by[i]);
    each_32(D, [&](int64_t d, First k) {
        F16 even = load16(to + d), odd = load16(to + d + 16);
        for (int i = 0; i < ROWS; i++) {
            const I16 pairs = load_i(w[i] + d, k);
            even = fma(factor[i], even_of(pairs), even), odd = fma(factor[i], odd_of(pairs), odd);
        }
        store16(to + d, even), store16(to + d + 16, odd);
    });
}

// log Σ e^z of a row.
template <class Change>
float log_sum(const Head<Change> &head, const bf16 *row) {
    F16 most = set_f(-3e38f), sum = zero_f();
    for (int64_t v = 0; v < head.V; v += 16) most = max(most, head.change.value(logits_at(row, v, head.V)));
    const float top = largest_of(most);
    for (int64_t v = 0; v < head.V; v += 16)
        sum = sum + exp2_16_for_bf16((head.change.value(logits_at(row, v, head.V)) - set_f(top)) * set_f(LOG2E));
    return top + __builtin_logf(sum_of(sum));
}

// The target and the classes whose z is above `least`, into `which` as they ascend; returns how many.
template <class Change>
int64_t likely_classes(const Head<Change> &head, const bf16 *row, int64_t target, float least, int32_t *which) {
    int64_t count = 0, others = 0;
    for (int64_t v = 0; v < head.V; v += 16) {
        uint32_t bits = bits_of(set_f(least) < head.change.value(logits_at(row, v, head.V)));
        if (target >= v && target < v + 16) bits |= 1u << (target - v);
        for (; bits; bits &= bits - 1) {
            const int64_t found = v + __builtin_ctz(bits);
            if (found != target && others++ >= MOST_LIKELY - 1) continue;  // there is room for the target
            which[count++] = (int32_t)found;
        }
    }
    return count;
}

// What is known of a row after its likely classes.
struct Row {
    float log_sum;   // log Σ e^z, with the likely classes' accurate logits
    float unlikely;  // probability of the other classes
};

// A row on its way through its likely classes.
struct Walk {
    bf16 *logits;
    const float *hidden;   // (D, rounded up to 32)
    float *slopes;         // the same: Σ e^z · ∂z/∂hidden of the classes gone through, divided as below
    const int32_t *which;  // the likely classes ahead, as they ascend
    int64_t left;          // how many
    int64_t target;
    float log_sum;                            // log Σ e^z of the given logits: what all sums of e^z are divided by
    F16 rough = zero_f(), accurate = rough;   // Σ e^z of the classes gone through, with the given logits and with accurate ones
    float at_target = 0;                      // the target's accurate z
};

// Goes through the next `count` classes; their logits become COUNTED. All but the last ones of a row come in whole
// numbers of AT_ONCE, so that what is added to what does not depend on the other rows.
template <class Change>
void add_likely(const Head<Change> &head, Walk &walk, int64_t count) {
    for (int64_t i = 0; i < count; i += AT_ONCE) {
        const int64_t n = std::min(AT_ONCE, count - i);
        const int32_t *const which = walk.which + i;
        const bf16 *w[AT_ONCE];
        alignas(64) float given[AT_ONCE], z[AT_ONCE], by[AT_ONCE];
        int64_t at = AT_ONCE;
        for (int64_t j = 0; j < AT_ONCE; j++) {  // beyond the last, the last again: it is left out below
            const int64_t v = which[std::min(j, n - 1)];
            w[j] = head.weight + v * head.D, given[j] = to_float(walk.logits[v]), z[j] = head.bias_of(v);
            if (v == walk.target) at = std::min(at, j);
        }
        for (int64_t j = 0; j < n; j += ROWS) add_dots(head.D, w + j, walk.hidden, z + j);
        for (int64_t j = 0; j < n; j++) walk.logits[which[j]] = COUNTED;
        const First k = first(n);
        const F16 value = head.change.value(load16(z)), e = keep_first(k, exp_16(value - set_f(walk.log_sum)));
        walk.rough = walk.rough + keep_first(k, exp_16(head.change.value(load16(given)) - set_f(walk.log_sum)));
        walk.accurate = walk.accurate + e;
        store16(by, e * head.change.slope(value));
        for (int64_t j = 0; j < n; j += ROWS) add_rows(head.D, by + j, w + j, walk.slopes);
        store16(z, value);
        if (at < AT_ONCE) walk.at_target = z[at];
    }
    walk.which += count, walk.left -= count;
}

template <class Change>
Walk begin_row(const Head<Change> &head, bf16 *logits, int64_t target, const bf16 *hidden, float *wide, float *slopes, int32_t *which) {
    each_32(head.D, [&](int64_t d, First k) {
        const I16 pairs = load_i(hidden + d, k);
        store16(wide + d, even_of(pairs)), store16(wide + d + 16, odd_of(pairs));
        store16(slopes + d, zero_f()), store16(slopes + d + 16, zero_f());
    });
    const float sum = log_sum(head, logits), beside = 1 - __builtin_expf(head.change.value(to_float(logits[target])) - sum);
    const int64_t count = likely_classes(head, logits, target, sum + __builtin_logf(LIKELY * std::max(beside, 1e-6f)), which);
    Walk walk;
    walk.logits = logits, walk.hidden = wide, walk.slopes = slopes, walk.which = which, walk.left = count, walk.target = target, walk.log_sum = sum;
    return walk;
}

// The loss of a row that went through its likely classes, and their part of the gradient (D).
template <class Change>
Row end_row(const Head<Change> &head, const Walk &walk, float *loss, bf16 *slope) {
    const float unlikely = std::max(0.0f, 1 - sum_of(walk.rough)), total = unlikely + sum_of(walk.accurate), after = walk.log_sum + __builtin_logf(total);
    const F16 by = set_f(1 / total), of_target = set_f(head.change.slope(walk.at_target));
    const bf16 *const w = head.weight + walk.target * head.D;
    each_32(head.D, [&](int64_t d, First k) {
        const I16 pairs = load_i(w + d, k);
        const F16 even = fnma(of_target, even_of(pairs), load16(walk.slopes + d) * by);
        const F16 odd = fnma(of_target, odd_of(pairs), load16(walk.slopes + d + 16) * by);
        store_i(slope + d, bf16_bits_in_turn(even, odd), k);
    });
    *loss = after - walk.at_target;
    return {after, unlikely / total};
}

// All of the rows, up to SIDE_BY_SIDE, go through their likely classes, in parts whose rows of the weight the cache holds.
template <class Change>
void walk_together(const Head<Change> &head, Walk *walks, int64_t rows) {
    const int64_t step = std::max(AT_ONCE, CACHED / (head.D * (int64_t)sizeof(bf16)));
    for (;;) {
        const Walk *longest = walks;
        for (int64_t r = 1; r < rows; r++)
            if (walks[r].left > longest->left) longest = walks + r;
        if (!longest->left) return;
        const int32_t last = longest->which[std::min(step, longest->left) - 1];
        for (int64_t r = 0; r < rows; r++) {
            const int64_t up_to_last = std::upper_bound(walks[r].which, walks[r].which + walks[r].left, last) - walks[r].which;
            add_likely(head, walks[r], std::min(walks[r].left, (up_to_last + AT_ONCE - 1) / AT_ONCE * AT_ONCE));
        }
    }
}

// The rows [begin, end): all that does not concern their unlikely classes.
template <class Change>
void likely_parts(const Head<Change> &head, int64_t begin, int64_t end, bf16 *logits, const int64_t *targets, const bf16 *hidden, Row *rows, float *losses,
                  bf16 *slopes) {
    if (begin == end) return;
    const int64_t D = head.D, wide = up_to_32(D);
    Scratch scratch;
    float *const of_rows = scratch.take<float>(2 * SIDE_BY_SIDE * wide);
    int32_t *const which = scratch.take<int32_t>(SIDE_BY_SIDE * MOST_LIKELY);
    for (int64_t m = begin; m < end; m += SIDE_BY_SIDE) {
        const int64_t count = std::min(SIDE_BY_SIDE, end - m);
        Walk walks[SIDE_BY_SIDE];
        for (int64_t r = 0; r < count; r++)
            walks[r] = begin_row(head, logits + (m + r) * head.V, targets[m + r], hidden + (m + r) * D, of_rows + 2 * r * wide,
                                 of_rows + (2 * r + 1) * wide, which + r * MOST_LIKELY);
        walk_together(head, walks, count);
        for (int64_t r = 0; r < count; r++) rows[m + r] = end_row(head, walks[r], losses + m + r, slopes + (m + r) * D);
    }
}

// Σ over `rows` rows of the unlikely classes' ∂loss/∂logit, for the classes [v0, v1).
template <class Change>
void unlikely_part(const Head<Change> &head, int64_t rows, const bf16 *logits, const Row *of, int64_t v0, int64_t v1, bf16 *sums) {
    for (int64_t v = v0; v < v1; v += 16) {
        F16 sum = zero_f();
        for (int64_t m = 0; m < rows; m++) {
            const F16 z = head.change.value(logits_at(logits + m * head.V, v, head.V));
            sum = fma(exp2_16_for_bf16((z - set_f(of[m].log_sum)) * set_f(LOG2E)), head.change.slope(z), sum);
        }
        store16(sums + v, sum, first(v1 - v));
    }
}

// shares[m]: the row's part of what is unlikely in the `together` rows that it belongs to.
void share_out(int64_t M, int64_t together, const Row *rows, float *shares) {
    for (int64_t from = 0; from < M; from += together) {
        const int64_t to = std::min(M, from + together);
        float all = 0;
        for (int64_t m = from; m < to; m++) all += rows[m].unlikely;
        for (int64_t m = from; m < to; m++) shares[m] = all > 0 ? rows[m].unlikely / all : 0;
    }
}

}  // namespace

// losses (M) = log Σ e^z - z[target]. slopes (M, D): the likely classes' part of ∂loss/∂hidden. unlikely (M / together,
// rounded up, V): sums over `together` rows of the other classes' ∂loss/∂logits, of which row m has the part shares[m].
// logits (M, V), hidden (M, D), the weight (V, D) and the bias are in bf16; the logits are overwritten.
int dw_head_gradient(int64_t M, int64_t V, int64_t D, void *logits, const int64_t *targets, const void *hidden, const void *weight, const void *bias,
                     float scale, float cap, int64_t together, float *losses, void *slopes, float *shares, void *unlikely) {
    return guarded([&] {
        require_in_bounds(together > 0 && V <= INT32_MAX && D % 2 == 0);
        for (int64_t m = 0; m < M; m++) require_in_bounds(targets[m] >= 0 && targets[m] < V);
        Scratch scratch;
        Row *const rows = scratch.take<Row>(M);
        bf16 *const of_all = (bf16 *)logits, *const summed = (bf16 *)unlikely;
        with_change(scale, cap, [&](const auto &change) {
            const Head<std::decay_t<decltype(change)>> head{V, D, (const bf16 *)weight, (const bf16 *)bias, change};
            in_parallel([&](int thread, int threads) {
                int64_t begin, end;
                part_of(M, thread, threads, begin, end);
                likely_parts(head, begin, end, of_all, targets, (const bf16 *)hidden, rows, losses, (bf16 *)slopes);
            });
            in_parallel([&](int thread, int threads) {
                int64_t begin, end;
                part_of((V + 31) / 32, thread, threads, begin, end);
                for (int64_t m = 0; m < M; m += together)
                    unlikely_part(head, std::min(together, M - m), of_all + m * V, rows + m, 32 * begin, std::min(V, 32 * end), summed + m / together * V);
            });
        });
        share_out(M, together, rows, shares);
    });
}

// Bytes of the threads' arenas that dw_head_gradient takes at its peak.
int64_t dw_head_gradient_room(int64_t M, int64_t D) {
    return M * (int64_t)sizeof(Row) + std::min<int64_t>(M, thread_count()) * SIDE_BY_SIDE * (2 * up_to_32(D) + MOST_LIKELY) * 4;
}
