// Tests of the short convolution against float64, and of its gradients against differences along them.
#include "check.h"
#include "kernels.h"
#include "tests.h"

namespace {

struct Shape {
    int64_t length, channels, width;
    bool silu;
};

// inputs: x, weight, bias
Numbers outputs(const Shape &z, const std::vector<int64_t> &before, const std::vector<Numbers> &inputs) {
    Numbers y(z.length * z.channels);
    for (int64_t t = 0; t < z.length; t++)
        for (int64_t c = 0; c < z.channels; c++) {
            double sum = inputs[2].empty() ? 0 : inputs[2][c];
            for (int64_t step = 0; step < z.width; step++) {
                const int64_t source = before[step * z.length + t];
                if (source < z.length) sum += inputs[0][source * z.channels + c] * inputs[1][step * z.channels + c];
            }
            y[t * z.channels + c] = z.silu ? sum / (1 + std::exp(-sum)) : sum;
        }
    return y;
}

template <class T>
void test(const Shape &z, bool with_bias) {
    const std::string what = "convolution " + std::to_string(z.length) + "x" + std::to_string(z.channels) + " width " + std::to_string(z.width) +
                             " type " + std::to_string(type_of<T>());
    std::vector<int64_t> before(z.width * z.length);
    for (int64_t step = 0; step < z.width; step++)
        for (int64_t t = 0; t < z.length; t++) before[step * z.length + t] = t >= step ? t - step : z.length;
    Buffer<T> x(z.length * z.channels), y(x.count), grad(x.count), d_x(x.count);
    Buffer<float> weight(z.width * z.channels), bias(with_bias ? z.channels : 0), d_weight(weight.count), d_bias(bias.count);
    x.fill(), grad.fill(), weight.fill(), bias.fill();
    const float *const shift = with_bias ? bias.data() : nullptr;
    expect(dw_convolution(type_of<T>(), z.length, z.channels, z.width, z.silu, x.data(), weight.data(), shift, before.data(), y.data()) == 0, what);
    expect(dw_convolution_backward(type_of<T>(), z.length, z.channels, z.width, z.silu, grad.data(), x.data(), weight.data(), shift, before.data(),
                                   d_x.data(), d_weight.data(), with_bias ? d_bias.data() : nullptr) == 0, what + " backward");
    Buffer<T> again(x.count);
    expect(dw_convolution_backward(type_of<T>(), z.length, z.channels, z.width, z.silu, grad.data(), x.data(), weight.data(), shift, before.data(),
                                   again.data(), nullptr, nullptr) == 0 && again.same(d_x), what + " backward of x alone");
    const double tolerance = sizeof(T) == 4 ? 1e-5 : 1e-2;
    const std::vector<Numbers> inputs{x.numbers(), weight.numbers(), bias.numbers()}, slopes{d_x.numbers(), d_weight.numbers(), d_bias.numbers()};
    expect_close(y.numbers(), outputs(z, before, inputs), tolerance, what);
    expect_gradients([&](const std::vector<Numbers> &moved) { return outputs(z, before, moved); }, inputs, slopes, grad.numbers(), tolerance, what);
    before[0] = z.length + 1;
    expect(dw_convolution(type_of<T>(), z.length, z.channels, z.width, z.silu, x.data(), weight.data(), shift, before.data(), y.data()) != 0,
           what + ": a position outside the row is rejected");
}

}  // namespace

void test_convolution() {
    for (const Shape &shape : {Shape{1, 1, 1, false}, Shape{7, 16, 4, true}, Shape{30, 130, 3, true}, Shape{9, 33, 7, false}})
        for (const bool with_bias : {false, true}) {
            test<float>(shape, with_bias);
            test<bf16>(shape, with_bias);
        }
}
