// A linear layer with its low-rank update, forward and backward.
#include <algorithm>
#include <optional>

#include "kernels.h"
#include "product.h"
#include "quantize.h"
#include "threads.h"

using namespace deltaw;

namespace {

template <class T>
T *at_row(T *data, int64_t row, int64_t width) {
    return data ? data + row * width : nullptr;
}
// Of a matrix in fp32 or bf16.
const void *at_row(const void *data, int64_t row, int64_t width, int type) {
    return at_row((const char *)data, row, width * (type == F32 ? 4 : 2));
}
void *at_row(void *data, int64_t row, int64_t width, int type) {
    return at_row((char *)data, row, width * (type == F32 ? 4 : 2));
}

}  // namespace

// y (M, out) = x·Wᵀ + bias + scaling·h·B + added, and h (M, r) = x·A; A (in, r) and B (r, out) in fp32, r may be 0.
// W is (out, in) where `by_column`, else (in, out). In int8 (`scale` is not null) x goes as x_int8 with x_scales, one for
// each row, or `in_blocks` for each INT8_BLOCK numbers of a row; they are made here where `quantize`. A bf16 weight with a `scale` is rounded to int8 as it is read. A weight in
// blocks is a BlockData, (out, in) without a `scale`.
int dw_linear(int type, int64_t M, int64_t out, int64_t in, const void *x, int weight_type, const void *weight, int by_column, const float *scale,
              const float *smooth, const void *bias, int bias_f32, const float *A, const float *B, int64_t rank, float scaling, const void *added,
              uint8_t *x_int8, float *x_scales, int in_blocks, int quantize, void *y, void *h) {
    return guarded([&] {
        rows_apart(M, [&](int64_t first, int64_t rows) {
            const void *const left = at_row(x, first, in, type);
            void *const low = at_row(h, first, rank, type);
            uint8_t *const left_int8 = scale ? at_row(x_int8, first, in) : nullptr;
            float *const left_scale = scale ? at_row(x_scales, first, in_blocks ? int8_blocks(in) : 1) : nullptr;
            if (rank) run_product(plain_product(type, rows, rank, in, left, Right{A, rank, F32, 0, 1.0f}, low), type);
            if (scale && quantize)
                quantize_rows(type, rows, in, left, smooth, in_blocks ? INT8_BLOCK : std::max<int64_t>(in, 1), left_int8, left_scale);
            Product p = plain_product(type, rows, out, in, scale ? left_int8 : left,
                                      Right{weight, by_column ? in : out, weight_type, by_column, 1.0f, scale}, at_row(y, first, out, type));
            if (scale) (in_blocks ? p.block_scale : p.row_scale) = left_scale, p.column_scale = scale;
            if (rank) p.low = low, p.rank = rank, p.low_right = Right{B, out, F32, 0, scaling};
            p.bias = bias, p.bias_f32 = bias_f32;
            p.added = at_row(added, first, out, type), p.added_ld = out;
            run_product(p, scale ? INT8 : type);
        });
    });
}

// narrow (M, r) = scaling·grad·Bᵀ, and where dx (M, in) is not null dx = grad·W + narrow·Aᵀ + added. In int8 the gradient
// is rounded here, times `scale`, into grad_int8, with a scale for each INT8_BLOCK numbers: few numbers of a row are large.
// A bf16 weight without a `scale` is multiplied so too where grad_int8 is given: it is rounded as it is read, each of the
// rows that it is stored in by a scale of its own, found here.
int dw_linear_backward(int type, int64_t M, int64_t out, int64_t in, const void *grad, int weight_type, const void *weight, int by_column,
                       const float *scale, const float *smooth, const float *A, const float *B, int64_t rank, float scaling, const void *added, uint8_t *grad_int8,
                       float *grad_scales, void *dx, void *narrow) {
    return guarded([&] {
        Scratch scratch;
        const bool as_read = dx && grad_int8 && !scale, int8 = scale || as_read;
        const float *of_grad = scale, *of_dx = smooth, *of_rows = nullptr;
        if (as_read) {
            const int64_t height = by_column ? out : in;
            float *const found = scratch.take<float>(height);
            scales_of_rows(height, by_column ? in : out, (const bf16 *)weight, found);
            of_rows = (by_column ? of_grad : of_dx) = found;
        }
        rows_apart(M, [&](int64_t first, int64_t rows) {
            const void *const left = at_row(grad, first, out, type);
            void *const low = at_row(narrow, first, rank, type);
            if (rank) run_product(plain_product(type, rows, rank, out, left, Right{B, out, F32, 1, scaling}, low), type);
            if (!dx) return;
            uint8_t *const left_int8 = int8 ? at_row(grad_int8, first, out) : nullptr;
            float *const left_scale = int8 ? at_row(grad_scales, first, int8_blocks(out)) : nullptr;
            if (int8) quantize_rows(type, rows, out, left, of_grad, INT8_BLOCK, left_int8, left_scale);
            Product p = plain_product(type, rows, in, out, int8 ? left_int8 : left,
                                      Right{weight, by_column ? in : out, weight_type, !by_column, 1.0f, of_rows}, at_row(dx, first, in, type));
            if (int8) p.block_scale = left_scale, p.column_scale = of_dx;
            if (rank) p.low = low, p.rank = rank, p.low_right = Right{A, rank, F32, 1, 1.0f};
            p.added = at_row(added, first, in, type), p.added_ld = in;
            run_product(p, int8 ? INT8 : type);
        });
    });
}

// Bytes of the threads' arenas that dw_linear takes at its peak, or with `backward` dw_linear_backward; `dx`: where a gradient
// of the input is wanted. The products are those of the functions above, of which only the sizes count here.
int64_t dw_linear_room(int type, int64_t M, int64_t out, int64_t in, int weight_type, int by_column, int scaled, int in_blocks, int64_t rank,
                       int backward, int dx) {
    const int threads = thread_count();
    const bool apart = shares_rows(M, threads);
    const int64_t rows = apart ? (M + threads - 1) / threads : M, N = backward ? in : out, K = backward ? out : in;
    const float unit = 1.0f;
    std::optional<Alone> alone;
    if (apart) alone.emplace(rows, rows);
    auto room = [&](Product p, int of_type) { return apart ? threads * product_room(p, of_type, 1) : product_room(p, of_type, threads); };
    int64_t most = 0;
    if (rank) most = room(plain_product(type, rows, rank, K, nullptr, Right{nullptr, rank, F32, backward, unit}, nullptr), type);
    if (backward && !dx) return most;
    const Right right{nullptr, by_column ? in : out, weight_type, backward ? !by_column : by_column, unit, scaled ? &unit : nullptr};
    Product p = plain_product(type, rows, N, K, nullptr, right, nullptr);
    if (scaled) (backward || in_blocks ? p.block_scale : p.row_scale) = &unit;
    p.rank = rank, p.low_right = Right{nullptr, rank, F32, backward, unit};
    const int64_t scales = backward && scaled && weight_type == BF16 ? (apart ? threads : 1) * (by_column ? out : in) * 4 : 0;
    return scales + std::max(most, room(p, scaled ? INT8 : type));
}
