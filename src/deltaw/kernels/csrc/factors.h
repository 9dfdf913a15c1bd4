// Gradients of a layer's low-rank factors; see dw_factors_backward.
#pragma once
#include <cstdint>

namespace deltaw {

struct FactorsBackward {
    int64_t M, in, out, rank;
    const void *x, *h, *grad, *narrow;
    float scaling;
    float *grad_A, *grad_B;
};

// Process several layers in one parallel region.
void factors_backward(int type, const FactorsBackward *layers, int count);

}  // namespace deltaw
