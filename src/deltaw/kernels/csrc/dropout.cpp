// Dropout with masks that follow from a seed, so that the backward pass does not store them.
#include "kernels.h"
#include "threads.h"
#include "vector.h"

using namespace deltaw;

namespace {

// Random bits of 16 elements: a hash of their index, "lowbias32" by Chris Wellons, with the second half of the seed added
// between its rounds.
I16 random_bits(I16 index, I16 seed, I16 second) {
    I16 h = index + seed;
    h = h ^ (h >> 16 & set_i(0xffff));
    h = h * set_i(0x7feb352d) + second;
    h = h ^ (h >> 15 & set_i(0x1ffff));
    h = h * set_i((int32_t)0x846ca68bu);
    return h ^ (h >> 16 & set_i(0xffff));
}

template <class T>
void drop(int64_t count, const T *x, int64_t seed, float dropped, float scale, T *out) {
    const I16 low = set_i((int32_t)(uint32_t)seed), high = set_i((int32_t)(uint32_t)((uint64_t)seed >> 32));
    int32_t lanes[16];
    for (int i = 0; i < 16; i++) lanes[i] = i;
    const I16 lane = load_i(lanes);
    in_parallel([&](int thread, int threads) {
        int64_t begin, end;
        split_range(count, thread, threads, begin, end);
        for (int64_t i = begin; i < end; i += 16) {
            const First m = first(end - i);
            const I16 bits = random_bits(lane + set_i((int32_t)(uint32_t)i), low, high) >> 8 & set_i(0xffffff);
            const F16 kept = load16(x + i, m) * set_f(scale);
            store16(out + i, select(to_f(bits) < set_f(dropped), zero_f(), kept), m);
        }
    });
}

}  // namespace

// out = x·scale, or 0 for an element whose random number of 24 bits is less than `dropped`. out may be x.
int dw_dropout(int type, int64_t count, const void *x, int64_t seed, float dropped, float scale, void *out) {
    return guarded([&] {
        if (type == F32) drop(count, (const float *)x, seed, dropped, scale, (float *)out);
        else drop(count, (const bf16 *)x, seed, dropped, scale, (bf16 *)out);
    });
}
