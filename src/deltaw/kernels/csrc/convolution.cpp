// Depthwise causal convolution over a prefix tree of segments. short_convolution.py contains the formula.
#include <vector>

#include "activations.h"
#include "kernels.h"
#include "scratch.h"
#include "threads.h"

using namespace deltaw;

namespace {

const int64_t LANES = 64;  // channels that are computed together

struct Sizes {
    int64_t length, channels, width;
    int silu;
};

// Positions of the tokens `step` before each token: (width, length). `length` if there is none.
inline bool has_token(const int64_t *before, const Sizes &z, int64_t step, int64_t t) { return before[step * z.length + t] < z.length; }

void check_positions(const int64_t *before, const Sizes &z) {
    for (int64_t i = 0; i < z.width * z.length; i++) require_in_bounds(before[i] >= 0 && before[i] <= z.length);
}

// Sum of a token for 16 channels. weight (width, channels), step 0 first.
template <class T>
inline F16 weighted_sum(const Sizes &z, const T *x, const float *weight, const float *bias, const int64_t *before, int64_t t, int64_t c, First m) {
    F16 sum = bias ? load16(bias + c, m) : zero_f();
    for (int64_t step = 0; step < z.width; step++)
        if (has_token(before, z, step, t))
            sum = fma(load16(x + before[step * z.length + t] * z.channels + c, m), load16(weight + step * z.channels + c, m), sum);
    return sum;
}
inline F16 sigmoid(F16 x) { return set_f(1.0f) / (set_f(1.0f) + exp_16(zero_f() - x)); }

template <class T>
void forward(const Sizes &z, const T *x, const float *weight, const float *bias, const int64_t *before, T *y) {
    rows_in_parallel(z.length, [&](int64_t t) {
        for (int64_t c = 0; c < z.channels; c += 16) {
            const First m = first(z.channels - c);
            const F16 sum = weighted_sum(z, x, weight, bias, before, t, c, m);
            store16(y + t * z.channels + c, z.silu ? sum * sigmoid(sum) : sum, m);
        }
    });
}

template <class T>
void backward(const Sizes &z, const T *grad, const T *x, const float *weight, const float *bias, const int64_t *before, T *d_x, float *d_weight,
              float *d_bias) {
    const int64_t blocks = (z.channels + LANES - 1) / LANES;
    in_parallel([&](int thread, int threads) {
        int64_t begin, end;
        split_range(blocks, thread, threads, begin, end);
        Scratch scratch;
        float *const sums = scratch.take<float>((z.length + 1) * LANES);
        for (int64_t block = begin; block < end; block++) {
            std::fill_n(sums, z.length * LANES, 0.0f);
            for (int64_t c = block * LANES; c < std::min(z.channels, (block + 1) * LANES); c += 16) {
                const First m = first(z.channels - c);
                float *const lane = sums + c - block * LANES;
                std::vector<F16> weight_sums(d_weight ? z.width : 0, zero_f());
                F16 bias_sum = zero_f();
                for (int64_t t = 0; t < z.length; t++) {
                    F16 slope = select_first(m, load16(grad + t * z.channels + c, m));
                    if (z.silu) {
                        const F16 sum = weighted_sum(z, x, weight, bias, before, t, c, m), s = sigmoid(sum);
                        slope = select_first(m, slope * s * fma(sum, set_f(1.0f) - s, set_f(1.0f)));
                    }
                    bias_sum = bias_sum + slope;
                    for (int64_t step = 0; step < z.width; step++) {
                        if (!has_token(before, z, step, t)) continue;
                        const int64_t source = before[step * z.length + t];
                        float *const at = lane + source * LANES;
                        store16(at, fma(slope, load16(weight + step * z.channels + c, m), load16(at)));
                        if (d_weight) weight_sums[step] = fma(slope, load16(x + source * z.channels + c, m), weight_sums[step]);
                    }
                }
                for (int64_t t = 0; t < z.length; t++) store16(d_x + t * z.channels + c, load16(lane + t * LANES), m);
                for (int64_t step = 0; d_weight && step < z.width; step++) store16(d_weight + step * z.channels + c, weight_sums[step], m);
                if (d_bias) store16(d_bias + c, bias_sum, m);
            }
        }
    });
}

}  // namespace

// y (length, channels) of x. weight is (width, channels) from the current token back, bias (channels) or null. `before`
// (width, length) contains the positions of earlier tokens, `length` for none. silu is 1 to apply SiLU.
int dw_convolution(int type, int64_t length, int64_t channels, int64_t width, int silu, const void *x, const float *weight, const float *bias,
                   const int64_t *before, void *y) {
    return guarded([&] {
        const Sizes z{length, channels, width, silu};
        check_positions(before, z);
        if (type == F32) forward(z, (const float *)x, weight, bias, before, (float *)y);
        else forward(z, (const bf16 *)x, weight, bias, before, (bf16 *)y);
    });
}

// Gradients of dw_convolution. d_weight and d_bias can be null.
int dw_convolution_backward(int type, int64_t length, int64_t channels, int64_t width, int silu, const void *grad, const void *x, const float *weight,
                            const float *bias, const int64_t *before, void *d_x, float *d_weight, float *d_bias) {
    return guarded([&] {
        const Sizes z{length, channels, width, silu};
        check_positions(before, z);
        if (type == F32)
            backward(z, (const float *)grad, (const float *)x, weight, bias, before, (float *)d_x, d_weight, d_bias);
        else backward(z, (const bf16 *)grad, (const bf16 *)x, weight, bias, before, (bf16 *)d_x, d_weight, d_bias);
    });
}
