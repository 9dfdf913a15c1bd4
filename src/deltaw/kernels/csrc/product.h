// A matrix product with all that is done to its sums while they are in registers.
//
//   C = out_scale · (row_scale ∘ (A · B) ∘ column_scale + H · L) + bias + added
//
// A is read as it lies, B is laid out panel by panel, H (M, r) and L (r, N) are the low-rank part. In int8, A holds
// unsigned numbers around `left_zero` with a scale for each row, or for each INT8_BLOCK numbers of a row, and B signed
// numbers with a scale for each column of C.
#pragma once
#include "right_side.h"

namespace deltaw {

struct Product {
    int64_t M, N, K;
    const void *left;                       // (M, K), `left_ld` numbers from row to row
    int64_t left_ld;
    int left_zero;                          // of int8: which number stands for 0, 128 or 0
    Right right;
    const float *row_scale, *column_scale;  // (M), (N) or null
    const float *block_scale;               // (M, blocks) of int8, one for each INT8_BLOCK numbers along K, or null
    const void *low;                        // H (M, r) in the product's own type (fp32 where C is), or null
    Right low_right;                        // L (r, N)
    int64_t rank;
    const void *bias;                       // (N) or null; in the type of C unless bias_f32
    const void *added;                      // (M, N) in the type of C, or null; may be C itself
    int64_t added_ld;
    void *out;                              // C (M, N), or (N, M) where `transposed`
    int64_t out_ld;
    int out_type, transposed, bias_f32;
    float out_scale;                        // of the whole product, before bias and added
};

// A product whose left side has rows of K numbers and whose result has rows of N, in `type`, with nothing added.
inline Product plain_product(int type, int64_t M, int64_t N, int64_t K, const void *left, const Right &right, void *out) {
    Product p{};
    p.M = M, p.N = N, p.K = K;
    p.left = left, p.left_ld = K, p.left_zero = 128, p.right = right;
    p.out = out, p.out_ld = N, p.out_type = type, p.out_scale = 1.0f;
    return p;
}

// `type` is that of the left side as it is multiplied.
void run_product(const Product &product, int type);
// Bytes of the threads' arenas that it takes.
int64_t product_room(const Product &product, int type, int threads);

}  // namespace deltaw
