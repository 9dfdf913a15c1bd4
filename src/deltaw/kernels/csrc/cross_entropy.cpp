// Cross-entropy of rows of logits, and its gradient in their place.
#include "kernels.h"
#include "vector.h"
#include "scratch.h"
#include "threads.h"

using namespace deltaw;

namespace {

// What becomes of a logit before the soft-max: cap · tanh(scale · logit / cap), or scale · logit where cap is 0.
struct Change {
    float scale, cap;
    F16 by = set_f(scale), limit = set_f(cap), inverse = set_f(cap > 0 ? 1 / cap : 0);

    Change(float scale, float cap) : scale(scale), cap(cap) {}

    template <class T>
    F16 value(const T *at, First k) const {
        const F16 z = load16(at, k) * by;
        return cap > 0 ? (limit * tanh_16(z * inverse)) : z;
    }
};

// The row's logits become weight · ∂loss/∂logits; `raised` holds e^(z - top), `total` their sum, z the target's value.
template <class T>
void to_gradient(int64_t V, T *row, int64_t target, float weight, const Change &change, const float *raised, float total, float top, float z) {
    const F16 w = set_f(weight / total), one = set_f(1.0f);
    const float cap = change.cap;
    float slope = change.scale;
    if (cap > 0) slope *= 1 - z / cap * (z / cap);
    const float at_target = weight * (__builtin_expf(z - top) / total - 1) * slope;
    for (int64_t v = 0; v < V; v += 16) {
        const First k = first(V - v);
        F16 g = (load16(raised + v) * w) * change.by;
        if (cap > 0) {
            const F16 t = change.value(row + v, k) * change.inverse;
            g = g * fnma(t, t, one);
        }
        store16(row + v, g, k);
    }
    alignas(64) const float single[16] = {at_target};
    store16(row + target, load16(single), first(1));
}

// raised: room for V numbers, rounded up to 16, or null where no gradient is wanted.
template <class T>
float loss_of_row(int64_t V, T *row, int64_t target, float weight, const Change &change, float *raised) {
    F16 most = set_f(-3e38f);
    for (int64_t v = 0; v < V; v += 16) {
        const First k = first(V - v);
        most = keep_first(k, max(most, change.value(row + v, k)), most);
    }
    const float top = largest_of(most);
    const F16 peak = set_f(top);
    F16 sum = zero_f();
    for (int64_t v = 0; v < V; v += 16) {
        const First k = first(V - v);
        const F16 e = exp_16(change.value(row + v, k) - peak);
        if (raised) store16(raised + v, e);
        sum = keep_first(k, sum + e, sum);
    }
    const float total = sum_of(sum);
    alignas(64) float lane[16];
    const int64_t there = target / 16 * 16;
    store16(lane, change.value(row + there, first(V - there)));
    const float z = lane[target % 16];
    if (raised) to_gradient(V, row, target, weight, change, raised, total, top, z);
    return __builtin_logf(total) + top - z;
}

template <class T>
void cross_entropy(int64_t M, int64_t V, T *logits, const int64_t *targets, const float *weights, const Change &change, int grad, float *losses) {
    in_parallel([&](int thread, int threads) {
        int64_t begin, end;
        part_of(M, thread, threads, begin, end);
        Scratch scratch;
        float *const raised = grad && begin < end ? scratch.take<float>((V + 15) / 16 * 16) : nullptr;
        for (int64_t m = begin; m < end; m++)
            losses[m] = loss_of_row(V, logits + m * V, targets[m], grad ? weights[m] : 0.0f, change, raised);
    });
}

}  // namespace

// losses[m] = log Σ exp z - z[target]; where `grad`, logits (M, V) become weights[m] · ∂loss/∂logits, in place.
int dw_cross_entropy(int type, int64_t M, int64_t V, void *logits, const int64_t *targets, const float *weights, float scale, float cap, int grad,
                     float *losses) {
    return guarded([&] {
        for (int64_t m = 0; m < M; m++) require_in_bounds(targets[m] >= 0 && targets[m] < V);
        const Change change(scale, cap);
        if (type == F32) cross_entropy(M, V, (float *)logits, targets, weights, change, grad, losses);
        else cross_entropy(M, V, (bf16 *)logits, targets, weights, change, grad, losses);
    });
}
