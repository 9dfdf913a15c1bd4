// The gradients of a layer's low-rank factors; see dw_factors_backward.
#pragma once
#include <cstdint>

namespace deltaw {

struct FactorsBackward {
    int64_t M, in, out, rank;
    const void *x, *h, *grad, *narrow;
    float scaling;
    float *of_A, *of_B;
};

// Of several layers at once.
void factors_backward(int type, const FactorsBackward *of, int count);

}  // namespace deltaw
