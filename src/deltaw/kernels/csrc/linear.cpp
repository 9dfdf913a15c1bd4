// Linear layer with a low-rank update, forward and backward.
#include <algorithm>
#include <optional>

#include "kernels.h"
#include "product.h"
#include "quantize.h"
#include "threads.h"

using namespace deltaw;

namespace {

template <class T>
T *row_address(T *data, int64_t row, int64_t width) {
    return data ? data + row * width : nullptr;
}
// Address of a row of an fp32 or bf16 matrix.
const void *row_address(const void *data, int64_t row, int64_t width, int type) {
    return row_address((const char *)data, row, width * (type == F32 ? 4 : 2));
}
void *row_address(void *data, int64_t row, int64_t width, int type) {
    return row_address((char *)data, row, width * (type == F32 ? 4 : 2));
}

}  // namespace

// y (M, out) = x·Wᵀ + bias + scaling·h·B + addend, and h (M, r) = x·A. A (in, r) and B (r, out) are fp32, and r can be
// 0. W is (out, in) if `by_column`, else (in, out).
//
// In int8 (`scale` is not null), x is given as x_int8 with x_scales, one per row, or per INT8_BLOCK numbers of a row if
// `in_blocks`. They are computed here if `quantize`. A bf16 weight with a `scale` is quantized to int8 as it is read. A
// weight in blocks is a BlockData, (out, in) without a `scale`.
int dw_linear(int type, int64_t M, int64_t out, int64_t in, const void *x, int weight_type, const void *weight, int by_column, const float *scale,
              const float *smooth, const void *bias, int bias_f32, const float *A, const float *B, int64_t rank, float scaling, const void *addend,
              uint8_t *x_int8, float *x_scales, int in_blocks, int quantize, void *y, void *h) {
    return guarded([&] {
        for_each_row_range(M, [&](int64_t first, int64_t rows) {
            const void *const left = row_address(x, first, in, type);
            void *const low = row_address(h, first, rank, type);
            uint8_t *const left_int8 = scale ? row_address(x_int8, first, in) : nullptr;
            float *const left_scale = scale ? row_address(x_scales, first, in_blocks ? int8_blocks(in) : 1) : nullptr;
            if (rank) run_product(plain_product(type, rows, rank, in, left, Right{A, rank, F32, 0, 1.0f}, low), type);
            if (scale && quantize)
                quantize_rows(type, rows, in, left, smooth, in_blocks ? INT8_BLOCK : std::max<int64_t>(in, 1), left_int8, left_scale);
            Product p = plain_product(type, rows, out, in, scale ? left_int8 : left,
                                      Right{weight, by_column ? in : out, weight_type, by_column, 1.0f, scale}, row_address(y, first, out, type));
            if (scale) (in_blocks ? p.block_scale : p.row_scale) = left_scale, p.column_scale = scale;
            if (rank) p.low = low, p.rank = rank, p.low_right = Right{B, out, F32, 0, scaling};
            p.bias = bias, p.bias_f32 = bias_f32;
            p.addend = row_address(addend, first, out, type), p.addend_ld = out;
            run_product(p, scale ? INT8 : type);
        });
    });
}

// narrow (M, r) = scaling·grad·Bᵀ, and dx = grad·W + narrow·Aᵀ + addend if dx (M, in) is not null.
//
// In int8 the gradient times `scale` is quantized here into grad_int8, with a scale per INT8_BLOCK numbers, because
// only some numbers of a row are large. A bf16 weight without a `scale` is also multiplied in int8 if grad_int8 is
// given. It is quantized as it is read, with a scale per stored row that is computed here.
int dw_linear_backward(int type, int64_t M, int64_t out, int64_t in, const void *grad, int weight_type, const void *weight, int by_column,
                       const float *scale, const float *smooth, const float *A, const float *B, int64_t rank, float scaling, const void *addend,
                           uint8_t *grad_int8,
                       float *grad_scales, void *dx, void *narrow) {
    return guarded([&] {
        Scratch scratch;
        const bool quantizes_weight = dx && grad_int8 && !scale, int8 = scale || quantizes_weight;
        const float *grad_scale = scale, *dx_scale = smooth, *weight_scales = nullptr;
        if (quantizes_weight) {
            const int64_t height = by_column ? out : in;
            float *const row_scales_buffer = scratch.take<float>(height);
            row_scales(height, by_column ? in : out, (const bf16 *)weight, row_scales_buffer);
            weight_scales = (by_column ? grad_scale : dx_scale) = row_scales_buffer;
        }
        for_each_row_range(M, [&](int64_t first, int64_t rows) {
            const void *const left = row_address(grad, first, out, type);
            void *const low = row_address(narrow, first, rank, type);
            if (rank) run_product(plain_product(type, rows, rank, out, left, Right{B, out, F32, 1, scaling}, low), type);
            if (!dx) return;
            uint8_t *const left_int8 = int8 ? row_address(grad_int8, first, out) : nullptr;
            float *const left_scale = int8 ? row_address(grad_scales, first, int8_blocks(out)) : nullptr;
            if (int8) quantize_rows(type, rows, out, left, grad_scale, INT8_BLOCK, left_int8, left_scale);
            Product p = plain_product(type, rows, in, out, int8 ? left_int8 : left,
                                      Right{weight, by_column ? in : out, weight_type, !by_column, 1.0f, weight_scales}, row_address(dx, first, in,
                                          type));
            if (int8) p.block_scale = left_scale, p.column_scale = dx_scale;
            if (rank) p.low = low, p.rank = rank, p.low_right = Right{A, rank, F32, 1, 1.0f};
            p.addend = row_address(addend, first, in, type), p.addend_ld = in;
            run_product(p, int8 ? INT8 : type);
        });
    });
}

// Peak bytes that dw_linear, or with `backward` dw_linear_backward, takes from the threads' arenas. `dx`: the gradient
// of the input is computed. Builds the same products as the functions above, of which only sizes matter.
int64_t dw_linear_scratch_size(int type, int64_t M, int64_t out, int64_t in, int weight_type, int by_column, int scaled, int in_blocks, int64_t rank,
                       int backward, int dx) {
    const int threads = thread_count();
    const bool is_partitioned = partitions_rows(M, threads);
    const int64_t rows = is_partitioned ? (M + threads - 1) / threads : M, N = backward ? in : out, K = backward ? out : in;
    const float unit = 1.0f;
    std::optional<SingleThreadScope> scope;
    if (is_partitioned) scope.emplace(rows, rows);
    auto scratch_bytes = [&](Product p, int left_type) { return is_partitioned ? threads * product_scratch_size(p, left_type,
        1) : product_scratch_size(p, left_type, threads); };
    int64_t peak = 0;
    if (rank) peak = scratch_bytes(plain_product(type, rows, rank, K, nullptr, Right{nullptr, rank, F32, backward, unit}, nullptr), type);
    if (backward && !dx) return peak;
    const Right right{nullptr, by_column ? in : out, weight_type, backward ? !by_column : by_column, unit, scaled ? &unit : nullptr};
    Product p = plain_product(type, rows, N, K, nullptr, right, nullptr);
    if (scaled) (backward || in_blocks ? p.block_scale : p.row_scale) = &unit;
    p.rank = rank, p.low_right = Right{nullptr, rank, F32, backward, unit};
    const int64_t scales = backward && scaled && weight_type == BF16 ? (is_partitioned ? threads : 1) * (by_column ? out : in) * 4 : 0;
    return scales + std::max(peak, scratch_bytes(p, scaled ? INT8 : type));
}
