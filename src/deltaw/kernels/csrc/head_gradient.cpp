// Loss of a language model's head and its gradient with respect to the hidden vectors, from approximate logits.
//
// A row of the logits' gradient is the row's probabilities minus one at the target. Most of their sum, and so most of
// the gradient's error, is in a small number of classes. The logits of a row's likely classes are therefore recomputed
// from the exact weight, and their part of the gradient is added from the same weight rows while they are cached. The
// remaining probabilities are similar in nearby rows. They are summed over `group_rows` rows, and each row gets a share
// of the sum's gradient in proportion to its remaining probability. The sum of the gradient over these rows is exact
// for the given probabilities.
#include "kernels.h"
#include "logits.h"
#include "scratch.h"
#include "threads.h"

using namespace deltaw;

namespace {

// A class is likely if it has at least this share of the probability outside the target.
const float LIKELY_SHARE = 1.0f / 8192;
const int64_t MAX_LIKELY = 4096;  // per row; further classes count as unlikely
// Rows whose likely classes a thread processes together. Several of them share likely classes, whose weight rows are
// then read from memory once.
const int64_t CURSOR_ROWS = 16;
const int64_t CACHED_BYTES = 256 << 10;  // bytes of weight rows that one row processes before the next row continues
const int64_t BATCH = 16;  // classes whose e^z are computed together
const int ROWS = 4;  // weight rows that are read together
const bf16 LIKELY_MARK = 0xff80;  // marker in the logits: the class is a likely class

int64_t round_up_32(int64_t D) { return (D + 31) / 32 * 32; }

template <class Transform>
struct Head {
    int64_t V, D;
    const bf16 *weight;
    const bf16 *bias;  // or null
    Transform transform;

    float bias_of(int64_t v) const { return bias ? to_float(bias[v]) : 0; }
};

// bf16 numbers are read as pairs: of 32 numbers, the even ones are the lower halves of 16 words and the odd ones the
// upper halves. The corresponding fp32 vectors contain 16 even numbers first, then 16 odd ones, and so on.
DW_INLINE F16 even_numbers(I16 pairs) { return from_bits(pairs << 16); }
DW_INLINE F16 odd_numbers(I16 pairs) { return from_bits(pairs & set_i((int32_t)0xffff0000)); }

// Call body(index of 32 numbers, their words, mask of valid words) for each 32 numbers of a row.
template <class Body>
DW_INLINE void for_each_32(int64_t D, Body &&body) {
    int64_t d = 0;
    for (; d + 32 <= D; d += 32) body(d, first(16));
    if (d < D) body(d, first((D - d) / 2));
}

// into += dot products of ROWS weight rows with h.
void add_dots(int64_t D, const bf16 *const *w, const float *h, float *into) {
    F16 sum[ROWS] = {};
    for_each_32(D, [&](int64_t d, First k) {
        const F16 even = load16(h + d), odd = load16(h + d + 16);
        for (int i = 0; i < ROWS; i++) {
            const I16 pairs = load_i(w[i] + d, k);
            sum[i] = fma(odd_numbers(pairs), odd, fma(even_numbers(pairs), even, sum[i]));
        }
    });
    for (int i = 0; i < ROWS; i++) into[i] += sum_lanes(sum[i]);
}

// to += Σ byᵢ · wᵢ over ROWS rows.
void add_rows(int64_t D, const float *by, const bf16 *const *w, float *to) {
    F16 factor[ROWS];
    for (int i = 0; i < ROWS; i++) factor[i] = set_f(by[i]);
    for_each_32(D, [&](int64_t d, First k) {
        F16 even = load16(to + d), odd = load16(to + d + 16);
        for (int i = 0; i < ROWS; i++) {
            const I16 pairs = load_i(w[i] + d, k);
            even = fma(factor[i], even_numbers(pairs), even), odd = fma(factor[i], odd_numbers(pairs), odd);
        }
        store16(to + d, even), store16(to + d + 16, odd);
    });
}

// log Σ e^z of a row.
template <class Transform>
float log_sum(const Head<Transform> &head, const bf16 *row) {
    F16 maxima = set_f(-3e38f), sum = zero_f();
    for (int64_t v = 0; v < head.V; v += 16) maxima = max(maxima, head.transform.value(logits_at(row, v, head.V)));
    const float top = max_lane(maxima);
    for (int64_t v = 0; v < head.V; v += 16)
        sum = sum + exp2_16_for_bf16((head.transform.value(logits_at(row, v, head.V)) - set_f(top)) * set_f(LOG2E));
    return top + __builtin_logf(sum_lanes(sum));
}

// Find the target and the classes with z above `threshold`. Writes them to `classes` in ascending order and returns
// their number.
template <class Transform>
int64_t likely_classes(const Head<Transform> &head, const bf16 *row, int64_t target, float threshold, int32_t *classes) {
    int64_t count = 0, num_others = 0;
    for (int64_t v = 0; v < head.V; v += 16) {
        uint32_t bits = bits_of(set_f(threshold) < head.transform.value(logits_at(row, v, head.V)));
        if (target >= v && target < v + 16) bits |= 1u << (target - v);
        for (; bits; bits &= bits - 1) {
            const int64_t likely_class = v + __builtin_ctz(bits);
            if (likely_class != target && num_others++ >= MAX_LIKELY - 1) continue;  // leave room for the target
            classes[count++] = (int32_t)likely_class;
        }
    }
    return count;
}

// Results of a row after its likely classes.
struct RowResult {
    float log_sum;  // log Σ e^z, with exact logits of the likely classes
    float unlikely;  // total probability of the other classes
};

// Iterates over the likely classes of a row.
struct LikelyClassCursor {
    bf16 *logits;
    const float *hidden;  // (D, rounded up to 32)
    float *slopes;  // (D, rounded up to 32): Σ e^z · ∂z/∂hidden of the processed classes, divided like the sums below
    const int32_t *classes;  // remaining likely classes, ascending
    int64_t remaining;  // number of remaining classes
    int64_t target;
    float log_sum;  // log Σ e^z of the approximate logits: divisor of all sums of e^z
    F16 rough = zero_f(), accurate = rough;  // Σ e^z of the processed classes, with approximate and with exact logits
    float target_logit = 0;  // the target's exact z
};

// Process the next `count` classes. Their logits become LIKELY_MARK. All except the last classes of a row are processed
// in multiples of BATCH, so the order of additions does not depend on other rows.
template <class Transform>
void add_likely(const Head<Transform> &head, LikelyClassCursor &cursor, int64_t count) {
    for (int64_t i = 0; i < count; i += BATCH) {
        const int64_t n = std::min(BATCH, count - i);
        const int32_t *const classes = cursor.classes + i;
        const bf16 *w[BATCH];
        alignas(64) float approximate[BATCH], z[BATCH], by[BATCH];
        int64_t at = BATCH;
        for (int64_t j = 0; j < BATCH; j++) {  // pads with the last class, which is masked below
            const int64_t v = classes[std::min(j, n - 1)];
            w[j] = head.weight + v * head.D, approximate[j] = to_float(cursor.logits[v]), z[j] = head.bias_of(v);
            if (v == cursor.target) at = std::min(at, j);
        }
        for (int64_t j = 0; j < n; j += ROWS) add_dots(head.D, w + j, cursor.hidden, z + j);
        for (int64_t j = 0; j < n; j++) cursor.logits[classes[j]] = LIKELY_MARK;
        const First k = first(n);
        const F16 value = head.transform.value(load16(z)), e = select_first(k, exp_16(value - set_f(cursor.log_sum)));
        cursor.rough = cursor.rough + select_first(k, exp_16(head.transform.value(load16(approximate)) - set_f(cursor.log_sum)));
        cursor.accurate = cursor.accurate + e;
        store16(by, e * head.transform.slope(value));
        for (int64_t j = 0; j < n; j += ROWS) add_rows(head.D, by + j, w + j, cursor.slopes);
        store16(z, value);
        if (at < BATCH) cursor.target_logit = z[at];
    }
    cursor.classes += count, cursor.remaining -= count;
}

template <class Transform>
LikelyClassCursor init_cursor(const Head<Transform> &head, bf16 *logits, int64_t target, const bf16 *hidden, float *widened, float *slopes,
                              int32_t *classes) {
    for_each_32(head.D, [&](int64_t d, First k) {
        const I16 pairs = load_i(hidden + d, k);
        store16(widened + d, even_numbers(pairs)), store16(widened + d + 16, odd_numbers(pairs));
        store16(slopes + d, zero_f()), store16(slopes + d + 16, zero_f());
    });
    const float sum = log_sum(head, logits), non_target = 1 - __builtin_expf(head.transform.value(to_float(logits[target])) - sum);
    const int64_t count = likely_classes(head, logits, target, sum + __builtin_logf(LIKELY_SHARE * std::max(non_target, 1e-6f)), classes);
    LikelyClassCursor cursor;
    cursor.logits = logits, cursor.hidden = widened, cursor.slopes = slopes, cursor.classes = classes, cursor.remaining = count,
        cursor.target = target, cursor.log_sum = sum;
    return cursor;
}

// Return the loss of a row after its likely classes, and write their part of the gradient (D).
template <class Transform>
RowResult finish_row(const Head<Transform> &head, const LikelyClassCursor &cursor, float *loss, bf16 *slope) {
    const float unlikely = std::max(0.0f, 1 - sum_lanes(cursor.rough)), total = unlikely + sum_lanes(cursor.accurate),
        exact_log_sum = cursor.log_sum + __builtin_logf(total);
    const F16 by = set_f(1 / total), target_slope = set_f(head.transform.slope(cursor.target_logit));
    const bf16 *const w = head.weight + cursor.target * head.D;
    for_each_32(head.D, [&](int64_t d, First k) {
        const I16 pairs = load_i(w + d, k);
        const F16 even = fnma(target_slope, even_numbers(pairs), load16(cursor.slopes + d) * by);
        const F16 odd = fnma(target_slope, odd_numbers(pairs), load16(cursor.slopes + d + 16) * by);
        store_i(slope + d, bf16_bits_interleaved(even, odd), k);
    });
    *loss = exact_log_sum - cursor.target_logit;
    return {exact_log_sum, unlikely / total};
}

// Process the likely classes of up to ROW_ALIGNMENT rows, in parts whose weight rows fit in the cache.
template <class Transform>
void process_likely_classes(const Head<Transform> &head, LikelyClassCursor *cursors, int64_t rows) {
    const int64_t step = std::max(BATCH, CACHED_BYTES / (head.D * (int64_t)sizeof(bf16)));
    for (;;) {
        const LikelyClassCursor *longest = cursors;
        for (int64_t r = 1; r < rows; r++)
            if (cursors[r].remaining > longest->remaining) longest = cursors + r;
        if (!longest->remaining) return;
        const int32_t last = longest->classes[std::min(step, longest->remaining) - 1];
        for (int64_t r = 0; r < rows; r++) {
            const int64_t num_classes = std::upper_bound(cursors[r].classes, cursors[r].classes + cursors[r].remaining, last) - cursors[r].classes;
            add_likely(head, cursors[r], std::min(cursors[r].remaining, (num_classes + BATCH - 1) / BATCH * BATCH));
        }
    }
}

// Process everything of rows [begin, end) except for their unlikely classes.
template <class Transform>
void likely_parts(const Head<Transform> &head, int64_t begin, int64_t end, bf16 *logits, const int64_t *targets, const bf16 *hidden,
                  RowResult *rows, float *losses,
                  bf16 *slopes) {
    if (begin == end) return;
    const int64_t D = head.D, padded_size = round_up_32(D);
    Scratch scratch;
    float *const row_buffers = scratch.take<float>(2 * CURSOR_ROWS * padded_size);
    int32_t *const classes = scratch.take<int32_t>(CURSOR_ROWS * MAX_LIKELY);
    for (int64_t m = begin; m < end; m += CURSOR_ROWS) {
        const int64_t count = std::min(CURSOR_ROWS, end - m);
        LikelyClassCursor cursors[CURSOR_ROWS];
        for (int64_t r = 0; r < count; r++)
            cursors[r] = init_cursor(head, logits + (m + r) * head.V, targets[m + r], hidden + (m + r) * D, row_buffers + 2 * r * padded_size,
                                 row_buffers + (2 * r + 1) * padded_size, classes + r * MAX_LIKELY);
        process_likely_classes(head, cursors, count);
        for (int64_t r = 0; r < count; r++) rows[m + r] = finish_row(head, cursors[r], losses + m + r, slopes + (m + r) * D);
    }
}

// Sum ∂loss/∂logit of the unlikely classes [v0, v1) over `rows` rows.
template <class Transform>
void unlikely_part(const Head<Transform> &head, int64_t rows, const bf16 *logits, const RowResult *results, int64_t v0, int64_t v1, bf16 *sums) {
    for (int64_t v = v0; v < v1; v += 16) {
        F16 sum = zero_f();
        for (int64_t m = 0; m < rows; m++) {
            const F16 z = head.transform.value(logits_at(logits + m * head.V, v, head.V));
            sum = fma(exp2_16_for_bf16((z - set_f(results[m].log_sum)) * set_f(LOG2E)), head.transform.slope(z), sum);
        }
        store16(sums + v, sum, first(v1 - v));
    }
}

// shares[m]: the row's share of the unlikely probability in its group of `group_rows` rows.
void compute_shares(int64_t M, int64_t group_rows, const RowResult *rows, float *shares) {
    for (int64_t from = 0; from < M; from += group_rows) {
        const int64_t to = std::min(M, from + group_rows);
        float all = 0;
        for (int64_t m = from; m < to; m++) all += rows[m].unlikely;
        for (int64_t m = from; m < to; m++) shares[m] = all > 0 ? rows[m].unlikely / all : 0;
    }
}

}  // namespace

// losses (M) = log Σ e^z - z[target]. slopes (M, D): likely classes' part of ∂loss/∂hidden. unlikely (⌈M / group_rows⌉,
// V): sums of the other classes' ∂loss/∂logits over `group_rows` rows, of which row m has the share shares[m]. logits
// (M, V), hidden (M, D), the weight (V, D) and the bias are bf16. Overwrites the logits.
int dw_head_gradient(int64_t M, int64_t V, int64_t D, void *logits, const int64_t *targets, const void *hidden, const void *weight, const void *bias,
                     float scale, float cap, int64_t group_rows, float *losses, void *slopes, float *shares, void *unlikely) {
    return guarded([&] {
        require_in_bounds(group_rows > 0 && V <= INT32_MAX && D % 2 == 0);
        for (int64_t m = 0; m < M; m++) require_in_bounds(targets[m] >= 0 && targets[m] < V);
        Scratch scratch;
        RowResult *const rows = scratch.take<RowResult>(M);
        bf16 *const all_logits = (bf16 *)logits, *const summed = (bf16 *)unlikely;
        with_transform(scale, cap, [&](const auto &transform) {
            const Head<std::decay_t<decltype(transform)>> head{V, D, (const bf16 *)weight, (const bf16 *)bias, transform};
            in_parallel([&](int thread, int threads) {
                int64_t begin, end;
                split_range(M, thread, threads, begin, end);
                likely_parts(head, begin, end, all_logits, targets, (const bf16 *)hidden, rows, losses, (bf16 *)slopes);
            });
            in_parallel([&](int thread, int threads) {
                int64_t begin, end;
                split_range((V + 31) / 32, thread, threads, begin, end);
                for (int64_t m = 0; m < M; m += group_rows)
                    unlikely_part(head, std::min(group_rows, M - m), all_logits + m * V, rows + m, 32 * begin, std::min(V, 32 * end),
                                  summed + m / group_rows * V);
            });
        });
        compute_shares(M, group_rows, rows, shares);
    });
}

// Peak bytes that dw_head_gradient takes from the threads' arenas.
int64_t dw_head_gradient_scratch_size(int64_t M, int64_t D) {
    return M * (int64_t)sizeof(RowResult) + std::min<int64_t>(M, thread_count()) * CURSOR_ROWS * (2 * round_up_32(D) + MAX_LIKELY) * 4;
}
