// Sums of rows that cannot be fused into a product or norm.
#include "kernels.h"
#include "threads.h"
#include "vector.h"

using namespace deltaw;

namespace {

template <class T>
void add(int64_t count, const T *a, const T *b, T *out) {
    in_parallel([&](int thread, int threads) {
        int64_t begin, end;
        split_range(count, thread, threads, begin, end);
        for (int64_t i = begin; i < end; i += 16) {
            const First m = first(end - i);
            store16(out + i, load16(a + i, m) + load16(b + i, m), m);
        }
    });
}

}  // namespace

// out = a + b for `count` elements, each rounded once. out may alias a or b.
int dw_add(int type, int64_t count, const void *a, const void *b, void *out) {
    return guarded([&] {
        if (type == F32) add(count, (const float *)a, (const float *)b, (float *)out);
        else add(count, (const bf16 *)a, (const bf16 *)b, (bf16 *)out);
    });
}
