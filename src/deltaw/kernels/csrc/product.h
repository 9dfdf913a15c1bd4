// A matrix product and the operations on its sums while they are in registers.
//
//  C = out_scale · (row_scale ∘ (A · B) ∘ column_scale + H · L) + bias + addend
//
// A is read in place, B is packed panel by panel, and H (M, r) and L (r, N) are the low-rank part. In int8, A contains
// unsigned numbers with zero point `left_zero` and a scale per row or per INT8_BLOCK numbers of a row, and B contains
// signed numbers with a scale per column of C.
#pragma once
#include "right_side.h"

namespace deltaw {

struct Product {
    int64_t M, N, K;
    const void *left;                       // (M, K), `left_ld` numbers from row to row
    int64_t left_ld;
    int left_zero;  // int8: the number that represents 0, either 128 or 0
    Right right;
    const float *row_scale, *column_scale;  // (M), (N), or null
    const float *block_scale;  // (M, blocks) of int8, one per INT8_BLOCK numbers along K, or null
    const void *low;  // H (M, r) in the product's type (fp32 if C is fp32), or null
    Right low_right;                        // L (r, N)
    int64_t rank;
    const void *bias;  // (N) or null; in the type of C unless bias_f32
    const void *addend;  // (M, N) in the type of C, or null; can be C itself
    int64_t addend_ld;
    void *out;  // C (M, N), or (N, M) if `transposed`
    int64_t out_ld;
    int out_type, transposed, bias_f32;
    float out_scale;  // of the product, before bias and addend
};

// A plain product in `type`: left rows of K contiguous numbers, result rows of N.
inline Product plain_product(int type, int64_t M, int64_t N, int64_t K, const void *left, const Right &right, void *out) {
    Product p{};
    p.M = M, p.N = N, p.K = K;
    p.left = left, p.left_ld = K, p.left_zero = 128, p.right = right;
    p.out = out, p.out_ld = N, p.out_type = type, p.out_scale = 1.0f;
    return p;
}

// `type` is the type in which the left side is multiplied.
void run_product(const Product &product, int type);
// Bytes that the product takes from the threads' arenas.
int64_t product_scratch_size(const Product &product, int type, int threads);

}  // namespace deltaw
