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
// No more classes than this can be likely, but for rounding, and the target is one; further ones count as unlikely.
const int64_t MOST_LIKELY = 8192 + 1;
const bf16 COUNTED = 0xff80;  // NO_LOGIT: this class is among the likely ones
const int64_t LINE = 64;      // bytes that the cache takes at a time
const int ROWS = 4;           // of the weight that are read side by side

template <class Change>
struct Head {
    int64_t V, D;
    const bf16 *weight;
    const bf16 *bias;  // or null
    Change change;

    float bias_of(int64_t v) const { return bias ? to_float(bias[v]) : 0; }
    void fetch(int64_t v) const {
        const char *const row = (const char *)(weight + v * D);
        for (int64_t at = 0; at < D * (int64_t)sizeof(bf16); at += LINE) __builtin_prefetch(row + at);
    }
};

// into += the products of ROWS rows with h.
void add_dots(int64_t D, const bf16 *const *w, const float *h, float *into) {
    F16 sum[ROWS] = {};
    int64_t d = 0;
    for (; d + 16 <= D; d += 16) {
        const F16 x = load16(h + d);
        for (int i = 0; i < ROWS; i++) sum[i] = fma(load16(w[i] + d), x, sum[i]);
    }
    if (d < D) {
        const First k = first(D - d);
        for (int i = 0; i < ROWS; i++) sum[i] = fma(load16(w[i] + d, k), load16(h + d, k), sum[i]);
    }
    for (int i = 0; i < ROWS; i++) into[i] += sum_of(sum[i]);
}

// to += Σ byᵢ · wᵢ over ROWS rows.
void add_rows(int64_t D, const float *by, const bf16 *const *w, float *to) {
    F16 factor[ROWS];
    for (int i = 0; i < ROWS; i++) factor[i] = set_f(by[i]);
    int64_t d = 0;
    for (; d + 16 <= D; d += 16) {
        F16 sum = load16(to + d);
        for (int i = 0; i < ROWS; i++) sum = fma(factor[i], load16(w[i] + d), sum);
        store16(to + d, sum);
    }
    if (d < D) {
        const First k = first(D - d);
        F16 sum = load16(to + d, k);
        for (int i = 0; i < ROWS; i++) sum = fma(factor[i], load16(w[i] + d, k), sum);
        store16(to + d, sum, k);
    }
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

// The target and the other classes whose z is above `least`, into `which`; returns how many.
template <class Change>
int64_t likely_classes(const Head<Change> &head, const bf16 *row, int64_t target, float least, int32_t *which) {
    int64_t count = 0;
    which[count++] = (int32_t)target;
    for (int64_t v = 0; v < head.V; v += 16)
        for (uint32_t bits = bits_of(set_f(least) < head.change.value(logits_at(row, v, head.V))); bits; bits &= bits - 1) {
            const int64_t found = v + __builtin_ctz(bits);
            if (found != target && count < MOST_LIKELY) which[count++] = (int32_t)found;
        }
    return count;
}

// What is known of a row after its likely classes.
struct Row {
    float log_sum;   // log Σ e^z, with the likely classes' accurate logits
    float unlikely;  // probability of the other classes
};

// What the likely classes of a row come to. Their e^z are divided by the row's sum of all, as the given logits have it.
struct Sums {
    float rough = 0, accurate = 0;  // of e^z, with the given logits and with accurate ones
    float at_target = 0;            // the target's z
};

// slopes += Σ e^z · ∂z/∂hidden of the likely classes, the first of which is the target; their logits become COUNTED.
template <class Change>
Sums add_likely(const Head<Change> &head, bf16 *row, const int32_t *which, int64_t count, float log_sum, const float *h, float *slopes) {
    Sums sums;
    F16 rough = zero_f(), accurate = zero_f();
    for (int64_t i = 0; i < count; i += 16) {
        const int64_t n = std::min<int64_t>(16, count - i);
        const bf16 *w[16];
        alignas(64) float given[16], z[16], by[16];
        for (int64_t j = 0; j < 16; j++) {  // beyond the last, the last again: it is left out below
            const int64_t v = which[i + std::min(j, n - 1)];
            w[j] = head.weight + v * head.D, given[j] = to_float(row[v]), z[j] = head.bias_of(v);
        }
        for (int64_t j = 0; j < n; j += ROWS) {
            for (int64_t next = i + 16 + j; next < std::min(i + 16 + j + ROWS, count); next++) head.fetch(which[next]);
            add_dots(head.D, w + j, h, z + j);
        }
        for (int64_t j = 0; j < n; j++) row[which[i + j]] = COUNTED;
        const First k = first(n);
        const F16 value = head.change.value(load16(z)), e = keep_first(k, exp_16(value - set_f(log_sum)));
        rough = rough + keep_first(k, exp_16(head.change.value(load16(given)) - set_f(log_sum)));
        accurate = accurate + e;
        store16(by, e * head.change.slope(value));
        for (int64_t j = 0; j < n; j += ROWS) add_rows(head.D, by + j, w + j, slopes);
        store16(z, value);
        if (i == 0) sums.at_target = z[0];
    }
    sums.rough = sum_of(rough), sums.accurate = sum_of(accurate);
    return sums;
}

// The loss of one row, and its likely classes' part of the gradient (D).
template <class Change>
Row likely_part(const Head<Change> &head, bf16 *row, int64_t target, const bf16 *hidden, float *loss, bf16 *slope) {
    const int64_t D = head.D;
    Scratch scratch;
    float *const h = scratch.take<float>(D), *const sum = scratch.take<float>(D);
    int32_t *const which = scratch.take<int32_t>(MOST_LIKELY);
    for (int64_t d = 0; d < D; d += 16) {
        const First k = first(D - d);
        store16(h + d, load16(hidden + d, k), k), store16(sum + d, zero_f(), k);
    }
    const float before = log_sum(head, row), beside = 1 - __builtin_expf(head.change.value(to_float(row[target])) - before);
    const int64_t count = likely_classes(head, row, target, before + __builtin_logf(LIKELY * std::max(beside, 1e-6f)), which);
    const Sums sums = add_likely(head, row, which, count, before, h, sum);

    const float unlikely = std::max(0.0f, 1 - sums.rough), total = unlikely + sums.accurate;
    const F16 by = set_f(1 / total), of_target = set_f(head.change.slope(sums.at_target));
    for (int64_t d = 0; d < D; d += 16) {
        const First k = first(D - d);
        store16(slope + d, fnma(of_target, load16(head.weight + target * D + d, k), load16(sum + d, k) * by), k);
    }
    const float after = before + __builtin_logf(total);
    *loss = after - sums.at_target;
    return {after, unlikely / total};
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
        require_in_bounds(together > 0 && V <= INT32_MAX);
        for (int64_t m = 0; m < M; m++) require_in_bounds(targets[m] >= 0 && targets[m] < V);
        Scratch scratch;
        Row *const rows = scratch.take<Row>(M);
        bf16 *const of_all = (bf16 *)logits, *const summed = (bf16 *)unlikely;
        with_change(scale, cap, [&](const auto &change) {
            const Head<std::decay_t<decltype(change)>> head{V, D, (const bf16 *)weight, (const bf16 *)bias, change};
            rows_in_parallel(M, [&](int64_t m) {
                rows[m] = likely_part(head, of_all + m * V, targets[m], (const bf16 *)hidden + m * D, losses + m, (bf16 *)slopes + m * D);
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
    return M * (int64_t)sizeof(Row) + thread_count() * (2 * D * (int64_t)sizeof(float) + MOST_LIKELY * (int64_t)sizeof(int32_t));
}
