// Gradient of a classifier's input from the gradient of its logits, in int8.
//
// In each row of a cross-entropy gradient, all entries but the target's have the same sign, so they fit uint8. They are
// quantized in place with one scale per row and INT8_BLOCK classes, because a single scale per row would round most of
// them to 0. The target's contribution is added in floating point. The bf16 weight (V, D) is quantized to int8 as it is
// read.
#include "kernels.h"
#include "product.h"
#include "quantize.h"
#include "threads.h"

using namespace deltaw;

namespace {

// Multiply the gradient of one row by the weight's scale of each class, and quantize it to uint8. The target becomes 0.
// Works in place because writes never overtake reads.
void quantize_classes(int64_t V, bf16 *row, int64_t target, const float *scales, float *block_scales) {
    uint8_t *const out = (uint8_t *)row;
    row[target] = 0;
    for (int64_t v0 = 0; v0 < V; v0 += INT8_BLOCK, block_scales++) {
        const int64_t end = std::min(V, v0 + INT8_BLOCK);
        F16 highest = zero_f(), lowest = highest;
        LargestMagnitude magnitude;
        for (int64_t v = v0; v < end; v += 16) {
            const F16 x = load16(row + v, first(end - v)) * load16(scales + v, first(end - v));
            highest = max(highest, x);
            lowest = min(lowest, x);
            magnitude.add_value(x);
        }
        const float high = max_lane(highest), low = min_lane(lowest), top = high >= -low ? high : low;
        const bool finite = magnitude.value() == magnitude.value();
        *block_scales = finite ? top / 255.0f : NAN;
        const F16 by = set_f(finite && top != 0 ? 255.0f / top : 0.0f);
        for (int64_t v = v0; v < end; v += 16) {
            const F16 x = (load16(row + v, first(end - v)) * load16(scales + v, first(end - v))) * by;
            const I16 q = max(to_int(x), zero_i());
            store_u8(out + v, q, first(end - v));
        }
    }
}

Product class_product(int64_t M, int64_t V, int64_t D, const void *grad, const void *weight, const float *scales, const float *block_scales,
                      float *sums) {
    Product p = plain_product(F32, M, D, V, grad, Right{weight, D, BF16, 0, 1.0f, scales}, sums);
    p.left_ld = 2 * V, p.left_zero = 0, p.block_scale = block_scales;
    return p;
}

}  // namespace

// Peak number of bytes that dw_class_gradient allocates from the threads' arenas.
int64_t dw_class_gradient_scratch_size(int64_t M, int64_t V, int64_t D) {
    const float unit = 1.0f;
    return M * (D + 1) * 4 + product_scratch_size(class_product(M, V, D, nullptr, nullptr, &unit, &unit, nullptr), INT8, thread_count());
}

// dh (M, D) = grad (M, V) · weight (V, D), all bf16. Overwrites grad. scales (V) are the int8 scales of the weight's
// rows. block_scales (M, ⌈V / INT8_BLOCK⌉) is scratch space.
int dw_class_gradient(int64_t M, int64_t V, int64_t D, void *grad, const int64_t *targets, const void *weight, const float *scales,
                      float *block_scales, void *dh) {
    return guarded([&] {
        for (int64_t m = 0; m < M; m++) require_in_bounds(targets[m] >= 0 && targets[m] < V);
        Scratch scratch;
        float *const target_gradient = scratch.take<float>(M), *const sums = scratch.take<float>(M * D);
        rows_in_parallel(M, [&](int64_t m) {
            bf16 *const row = (bf16 *)grad + m * V;
            target_gradient[m] = to_float(row[targets[m]]);
            quantize_classes(V, row, targets[m], scales, block_scales + m * int8_blocks(V));
        });
        run_product(class_product(M, V, D, grad, weight, scales, block_scales, sums), INT8);
        rows_in_parallel(M, [&](int64_t m) {
            const F16 by = set_f(target_gradient[m]);
            const bf16 *const row = (const bf16 *)weight + targets[m] * D;
            for (int64_t n = 0; n < D; n += 16) {
                const First mask = first(D - n);
                store16((bf16 *)dh + m * D + n, fma(by, load16(row + n, mask), load16(sums + m * D + n, mask)), mask);
            }
        });
    });
}
