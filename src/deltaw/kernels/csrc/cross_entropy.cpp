// Cross-entropy of rows of logits, and its gradient in place.
#include "kernels.h"
#include "logits.h"
#include "scratch.h"
#include "threads.h"

using namespace deltaw;

namespace {

// Overwrite the row's logits by weight · ∂loss/∂logits. `exponentials` contains e^(z - top), `total` their sum, and z is the
// target's value.
template <class T, class Transform>
void to_gradient(int64_t V, T *row, int64_t target, float weight, const Transform &transform, const float *exponentials, float total, float top,
                 float z) {
    const F16 w = set_f(weight / total);
    const float target_gradient = weight * (__builtin_expf(z - top) / total - 1) * transform.slope(z);
    for (int64_t v = 0; v < V; v += 16) {
        const F16 slope = transform.slope(transform.value(logits_at(row, v, V)));
        store16(row + v, (load16(exponentials + v) * w) * slope, first(V - v));
    }
    alignas(64) const float single[16] = {target_gradient};
    store16(row + target, load16(single), first(1));
}

// raised: buffer of V numbers, rounded up to 16, or null without a gradient.
template <class T, class Transform>
float row_loss(int64_t V, T *row, int64_t target, float weight, const Transform &transform, float *exponentials) {
    F16 maxima = set_f(-3e38f);
    for (int64_t v = 0; v < V; v += 16) maxima = max(maxima, transform.value(logits_at(row, v, V)));
    const float top = max_lane(maxima);
    const F16 maximum = set_f(top);
    F16 sum = zero_f();
    for (int64_t v = 0; v < V; v += 16) {
        const F16 e = exp_16(transform.value(logits_at(row, v, V)) - maximum);
        if (exponentials) store16(exponentials + v, e);
        sum = sum + e;
    }
    const float total = sum_lanes(sum);
    alignas(64) float lane[16];
    const int64_t vector_start = target / 16 * 16;
    store16(lane, transform.value(logits_at(row, vector_start, V)));
    const float z = lane[target % 16];
    if (exponentials) to_gradient(V, row, target, weight, transform, exponentials, total, top, z);
    return __builtin_logf(total) + top - z;
}

template <class T>
void cross_entropy(int64_t M, int64_t V, T *logits, const int64_t *targets, const float *weights, float scale, float cap, int grad, float *losses) {
    with_transform(scale, cap, [&](const auto &transform) {
        in_parallel([&](int thread, int threads) {
            int64_t begin, end;
            split_range(M, thread, threads, begin, end);
            Scratch scratch;
            float *const exponentials = grad && begin < end ? scratch.take<float>((V + 15) / 16 * 16) : nullptr;
            for (int64_t m = begin; m < end; m++)
                losses[m] = row_loss(V, logits + m * V, targets[m], grad ? weights[m] : 0.0f, transform, exponentials);
        });
    });
}

}  // namespace

// losses[m] = log Σ exp z - z[target]. If `grad`, logits (M, V) are overwritten by weights[m] · ∂loss/∂logits.
int dw_cross_entropy(int type, int64_t M, int64_t V, void *logits, const int64_t *targets, const float *weights, float scale, float cap, int grad,
                     float *losses) {
    return guarded([&] {
        for (int64_t m = 0; m < M; m++) require_in_bounds(targets[m] >= 0 && targets[m] < V);
        if (type == F32) cross_entropy(M, V, (float *)logits, targets, weights, scale, cap, grad, losses);
        else cross_entropy(M, V, (bf16 *)logits, targets, weights, scale, cap, grad, losses);
    });
}
