// Dequantization of rows of a weight in blocks.
#include "blocks.h"
#include "kernels.h"
#include "threads.h"

using namespace deltaw;

namespace {

template <int FORMAT, class T>
void dequantize(const BlockRows<FORMAT> &rows, int64_t row, int64_t columns, T *out) {
    for (int64_t k = 0; k < columns; k += UNIT) {
        F16 x[2];
        rows.read(row, k, x);
        store16(out + k, x[0]), store16(out + k + 16, x[1]);
    }
}

}  // namespace

// out (M, columns), in fp32 or rounded to bf16: rows first … first+M-1 of a weight of `height` rows, or the rows
// `indices` (M).
int dw_dequantize(int type, int weight_type, const BlockData *weight, int64_t height, int64_t columns, int64_t first, const int64_t *indices,
                  int64_t M,
                  void *out) {
    return guarded([&] {
        require_in_bounds(indices || (first >= 0 && first + M <= height));
        for (int64_t m = 0; indices && m < M; m++) require_in_bounds(indices[m] >= 0 && indices[m] < height);
        with_format(weight_type, [&](auto format) {
            const BlockRows<decltype(format)::value> rows(weight, columns);
            rows_in_parallel(M, [&](int64_t m) {
                const int64_t row = indices ? indices[m] : first + m;
                if (type == F32) dequantize(rows, row, columns, (float *)out + m * columns);
                else dequantize(rows, row, columns, (bf16 *)out + m * columns);
            });
        });
    });
}
