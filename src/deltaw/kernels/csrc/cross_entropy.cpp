// Cross-entropy of rows of logits, and its gradient in their place.
#include "kernels.h"
#include "logits.h"
#include "scratch.h"
#include "threads.h"

using namespace deltaw;

namespace {

// The row's logits become weight · ∂loss/∂logits; `raised` holds e^(z - top), `total` their sum, z the target's value.
template <class T, class Change>
void to_gradient(int64_t V, T *row, int64_t target, float weight, const Change &change, const float *raised, float total, float top, float z) {
    const F16 w = set_f(weight / total);
    const float at_target = weight * (__builtin_expf(z - top) / total - 1) * change.slope(z);
    for (int64_t v = 0; v < V; v += 16) {
        const F16 slope = change.slope(change.value(logits_at(row, v, V)));
        store16(row + v, (load16(raised + v) * w) * slope, first(V - v));
    }
    alignas(64) const float single[16] = {at_target};
    store16(row + target, load16(single), first(1));
}

// raised: room for V numbers, rounded up to 16, or null where no gradient is wanted.
template <class T, class Change>
float loss_of_row(int64_t V, T *row, int64_t target, float weight, const Change &change, float *raised) {
    F16 most = set_f(-3e38f);
    for (int64_t v = 0; v < V; v += 16) most = max(most, change.value(logits_at(row, v, V)));
    const float top = largest_of(most);
    const F16 peak = set_f(top);
    F16 sum = zero_f();
    for (int64_t v = 0; v < V; v += 16) {
        const F16 e = exp_16(change.value(logits_at(row, v, V)) - peak);
        if (raised) store16(raised + v, e);
        sum = sum + e;
    }
    const float total = sum_of(sum);
    alignas(64) float lane[16];
    const int64_t there = target / 16 * 16;
    store16(lane, change.value(logits_at(row, there, V)));
    const float z = lane[target % 16];
    if (raised) to_gradient(V, row, target, weight, change, raised, total, top, z);
    return __builtin_logf(total) + top - z;
}

template <class T>
void cross_entropy(int64_t M, int64_t V, T *logits, const int64_t *targets, const float *weights, float scale, float cap, int grad, float *losses) {
    with_change(scale, cap, [&](const auto &change) {
        in_parallel([&](int thread, int threads) {
            int64_t begin, end;
            part_of(M, thread, threads, begin, end);
            Scratch scratch;
            float *const raised = grad && begin < end ? scratch.take<float>((V + 15) / 16 * 16) : nullptr;
            for (int64_t m = begin; m < end; m++)
                losses[m] = loss_of_row(V, logits + m * V, targets[m], grad ? weights[m] : 0.0f, change, raised);
        });
    });
}

}  // namespace

// losses[m] = log Σ exp z - z[target]; where `grad`, logits (M, V) become weights[m] · ∂loss/∂logits, in place.
int dw_cross_entropy(int type, int64_t M, int64_t V, void *logits, const int64_t *targets, const float *weights, float scale, float cap, int grad,
                     float *losses) {
    return guarded([&] {
        for (int64_t m = 0; m < M; m++) require_in_bounds(targets[m] >= 0 && targets[m] < V);
        if (type == F32) cross_entropy(M, V, (float *)logits, targets, weights, scale, cap, grad, losses);
        else cross_entropy(M, V, (bf16 *)logits, targets, weights, scale, cap, grad, losses);
    });
}
