// Sums of rows that no product or norm can take along.
#include "bf16.h"
#include "kernels.h"
#include "threads.h"

using namespace deltaw;

namespace {

inline bf16 rounded(float f) {  // to the nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &f, 4);
    const bf16 near = (bf16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    return (bits & 0x7fffffff) > 0x7f800000 ? (bf16)0x7fc0 : near;  // not a number stays so
}

}  // namespace

// out = a + b, `count` numbers, each sum rounded once; out may be a or b.
int dw_add(int type, int64_t count, const void *a, const void *b, void *out) {
    return guarded([&] {
        in_parallel([&](int thread, int threads) {
            int64_t begin, end;
            part_of(count, thread, threads, begin, end);
            if (type == 0) {
                for (int64_t i = begin; i < end; i++) ((float *)out)[i] = ((const float *)a)[i] + ((const float *)b)[i];
                return;
            }
            for (int64_t i = begin; i < end; i++) ((bf16 *)out)[i] = rounded(to_float(((const bf16 *)a)[i]) + to_float(((const bf16 *)b)[i]));
        });
    });
}
