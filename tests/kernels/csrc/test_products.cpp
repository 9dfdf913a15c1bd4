// Tests of products with low-rank updates, their gradients, int8 products and class gradients against float64.
#include "check.h"
#include "kernels.h"
#include "tests.h"

namespace {

const int64_t BLOCK = 128;  // values that share a scale

template <class T>
double tolerance() { return sizeof(T) == 4 ? 2e-6 : 6e-3; }

struct Shape { int64_t M, in, out, rank; };

// Terms added to a product, in addition to its low-rank update.
enum Parts { BIAS = 1, BIAS_IN_FP32 = 2, ADDED = 4, ALL_PARTS = BIAS | ADDED };

template <class T>
void test_linear(const Shape &s, bool by_column, int parts = ALL_PARTS) {
    const std::string what = "linear " + std::to_string(s.M) + "x" + std::to_string(s.in) + "x" + std::to_string(s.out) + " type " +
                             std::to_string(type_of<T>()) + (by_column ? "" : " by row") + " parts " + std::to_string(parts);
    Buffer<T> x(s.M * s.in), w(s.in * s.out), bias(s.out), added(s.M * s.out), grad(s.M * s.out), y(s.M * s.out), h(s.M * s.rank), dx(s.M * s.in),
        narrow(s.M * s.rank);
    Buffer<float> A(s.in * s.rank), B(s.rank * s.out), bias_f32(s.out);
    for (Buffer<T> *b : {&x, &w, &bias, &added, &grad}) b->fill();
    bias_f32.fill();
    for (int64_t i = 0; i < A.count; i++) A[i] = (float)to_double(from_double<T>(random_number()));
    for (int64_t i = 0; i < B.count; i++) B[i] = (float)to_double(from_double<T>(random_number()));
    const double scaling = 0.5;
    const float *const a = s.rank ? A.data() : nullptr, *const b = s.rank ? B.data() : nullptr;
    const void *const given_bias = parts & BIAS ? (const void *)bias.data() : parts & BIAS_IN_FP32 ? bias_f32.data() : nullptr;
    auto forward = [&](Buffer<T> &y, Buffer<T> &h) {
        expect(dw_linear(type_of<T>(), s.M, s.out, s.in, x.data(), type_of<T>(), w.data(), by_column, nullptr, nullptr, given_bias,
                         (parts & BIAS_IN_FP32) > 0, a, b, s.rank, (float)scaling, parts & ADDED ? added.data() : nullptr, nullptr, nullptr, 0, 0,
                             y.data(),
                         h.data()) == 0, what);
    };
    forward(y, h);
    Numbers expected_h(h.count), expected(y.count);
    add_product(expected_h, x.numbers(), A.numbers(), s.M, s.rank, s.in);
    expect_close(h.numbers(), expected_h, tolerance<T>(), what + " h");
    for (int64_t i = 0; i < y.count; i++)
        expected[i] = (parts & BIAS ? bias.at(i % s.out) : parts & BIAS_IN_FP32 ? bias_f32.at(i % s.out) : 0) + (parts & ADDED ? added.at(i) : 0);
    add_product(expected, x.numbers(), w.numbers(), s.M, s.out, s.in, 1, by_column);
    add_product(expected, h.numbers(), B.numbers(), s.M, s.out, s.rank, scaling);
    expect_close(y.numbers(), expected, tolerance<T>(), what + " y");
    Buffer<T> y_again(y.count), h_again(h.count);
    forward(y_again, h_again);
    expect(y_again.same(y) && h_again.same(h), what + " gives the same bits again");

    auto backward = [&](T *dx, Buffer<T> &narrow) {
        expect(dw_linear_backward(type_of<T>(), s.M, s.out, s.in, grad.data(), type_of<T>(), w.data(), by_column, nullptr, nullptr, a, b, s.rank,
                                  (float)scaling,
                                  parts & ADDED ? x.data() : nullptr, nullptr, nullptr, dx, narrow.data()) == 0, what);
    };
    backward(dx.data(), narrow);
    Numbers expected_narrow(narrow.count), expected_dx = parts & ADDED ? x.numbers() : Numbers(dx.count);
    add_product(expected_narrow, grad.numbers(), B.numbers(), s.M, s.rank, s.out, scaling, true);
    expect_close(narrow.numbers(), expected_narrow, tolerance<T>(), what + " narrow");
    add_product(expected_dx, grad.numbers(), w.numbers(), s.M, s.in, s.out, 1, !by_column);
    add_product(expected_dx, narrow.numbers(), A.numbers(), s.M, s.in, s.rank, 1, true);
    expect_close(dx.numbers(), expected_dx, tolerance<T>(), what + " dx");
    Buffer<T> dx_again(dx.count), narrow_again(narrow.count);
    backward(dx_again.data(), narrow_again);
    expect(dx_again.same(dx) && narrow_again.same(narrow), what + " gives the same bits again, backward");
    if (s.rank) backward(nullptr, h_again), expect(h_again.same(narrow), what + " narrow alone");
    if (!s.rank) return;

    Buffer<float> grad_A(A.count), grad_B(B.count), of_A_again(A.count), of_B_again(B.count);
    auto factors = [&](Buffer<float> &grad_A, Buffer<float> &grad_B) {
        expect(dw_factors_backward(type_of<T>(), s.M, s.in, s.out, s.rank, x.data(), h.data(), grad.data(), narrow.data(), (float)scaling,
                                   grad_A.data(),
                                   grad_B.data()) == 0, what);
    };
    factors(grad_A, grad_B), factors(of_A_again, of_B_again);
    Numbers expected_A(A.count), expected_B(B.count);
    add_product(expected_A, transposed(x.numbers(), s.M, s.in), narrow.numbers(), s.in, s.rank, s.M);
    add_product(expected_B, transposed(h.numbers(), s.M, s.rank), grad.numbers(), s.rank, s.out, s.M, scaling);
    expect_close(grad_A.numbers(), expected_A, 2e-6, what + " of A");
    expect_close(grad_B.numbers(), expected_B, 2e-6, what + " of B");
    expect(of_A_again.same(grad_A) && of_B_again.same(grad_B), what + " gives the same factors again");
}

// Return the values represented by the int8 rows, with a scale per block of `at_once` columns.
template <class T>
Numbers rounded(const Buffer<T> &x, int64_t M, int64_t K, const Buffer<float> *smooth, int64_t at_once) {
    Numbers found(x.count);
    for (int64_t m = 0; m < M; m++)
        for (int64_t k0 = 0; k0 < K; k0 += at_once) {
            const int64_t end = std::min(K, k0 + at_once);
            float top = 0;
            for (int64_t k = k0; k < end; k++) top = std::max(top, std::fabs((float)x.at(m * K + k) * (smooth ? (*smooth)[k] : 1.0f)));
            for (int64_t k = k0; k < end; k++) {
                const float by = top > 0 ? 127.0f / top : 0.0f;
                found[m * K + k] = std::nearbyint((float)x.at(m * K + k) * (smooth ? (*smooth)[k] : 1.0f) * by) * (top / 127.0f);
            }
        }
    return found;
}

template <class T>
void test_int8(const Shape &s, bool by_column, bool in_blocks) {
    const std::string what = "int8 " + std::to_string(s.M) + "x" + std::to_string(s.in) + "x" + std::to_string(s.out) + " type " +
                             std::to_string(type_of<T>()) + (by_column ? "" : " by row") + (in_blocks ? " in blocks" : "");
    Buffer<T> x(s.M * s.in), y(s.M * s.out), h(s.M * s.rank), grad(s.M * s.out), dx(s.M * s.in), narrow(s.M * s.rank);
    Buffer<int8_t> w(s.in * s.out);
    Buffer<uint8_t> x_int8(x.count), grad_int8(grad.count), again(x.count);
    const int64_t blocks = (s.out + BLOCK - 1) / BLOCK, at_once = in_blocks ? BLOCK : s.in, of_row = (s.in + at_once - 1) / at_once;
    Buffer<float> scale(s.out), smooth(s.in), A(s.in * s.rank), B(s.rank * s.out), x_scales(s.M * of_row), grad_scales(s.M * blocks);
    Buffer<float> again_scales(x_scales.count);
    x.fill(), grad.fill(), A.fill(0.1), B.fill(0.1);
    for (int64_t i = 0; i < w.count; i++) w[i] = (int8_t)(random_number() * 40);
    for (int64_t i = 0; i < s.out; i++) scale[i] = 0.02f + 0.001f * (float)(i % 7);
    for (int64_t i = 0; i < s.in; i++) smooth[i] = 0.5f + 0.1f * (float)(i % 11);
    const float *const a = s.rank ? A.data() : nullptr, *const b = s.rank ? B.data() : nullptr;
    auto forward = [&](Buffer<T> &y) {
        expect(dw_linear(type_of<T>(), s.M, s.out, s.in, x.data(), 2, w.data(), by_column, scale.data(), smooth.data(), nullptr, 0, a, b, s.rank,
                         1.0f,
                         nullptr, x_int8.data(), x_scales.data(), in_blocks, 1, y.data(), h.data()) == 0, what);
    };
    forward(y);
    expect(dw_quantize(type_of<T>(), s.M, s.in, x.data(), smooth.data(), in_blocks, again.data(), again_scales.data()) == 0, what);
    expect(again.same(x_int8) && again_scales.same(x_scales), what + " is rounded alike");
    Numbers signed_x(x.count), signed_w(w.count), expected(y.count);
    for (int64_t i = 0; i < x.count; i++) signed_x[i] = ((double)x_int8[i] - 128) * x_scales[i / s.in * of_row + i % s.in / at_once];
    expect_close(signed_x, rounded(x, s.M, s.in, &smooth, at_once), 1e-3, what + " x");
    for (int64_t i = 0; i < w.count; i++) signed_w[i] = (double)w[i] * scale[by_column ? i / s.in : i % s.out];
    add_product(expected, signed_x, signed_w, s.M, s.out, s.in, 1, by_column);
    add_product(expected, h.numbers(), B.numbers(), s.M, s.out, s.rank);
    expect_close(y.numbers(), expected, tolerance<T>(), what + " y");
    Buffer<T> y_again(y.count);
    forward(y_again);
    expect(y_again.same(y), what + " gives the same bits again");

    auto backward = [&](Buffer<T> &dx) {
        expect(dw_linear_backward(type_of<T>(), s.M, s.out, s.in, grad.data(), 2, w.data(), by_column, scale.data(), smooth.data(), a, b, s.rank,
                                  1.0f,
                                  nullptr, grad_int8.data(), grad_scales.data(), dx.data(), narrow.data()) == 0, what);
    };
    backward(dx);
    Numbers expected_dx(dx.count), low(dx.count);
    add_product(expected_dx, rounded(grad, s.M, s.out, &scale, BLOCK), w.numbers(), s.M, s.in, s.out, 1, !by_column);
    add_product(low, narrow.numbers(), A.numbers(), s.M, s.in, s.rank, 1, true);
    for (int64_t i = 0; i < dx.count; i++) expected_dx[i] = expected_dx[i] * smooth[i % s.in] + low[i];
    expect_close(dx.numbers(), expected_dx, std::max(tolerance<T>(), 1e-3), what + " dx");
    Buffer<T> dx_again(dx.count);
    backward(dx_again);
    expect(dx_again.same(dx), what + " gives the same bits again, backward");
}

// Sums of int8 products are integers that fp32 represents exactly, so the result must be exact for the largest values too.
void test_int8_is_exact(int64_t M, int64_t in, int64_t out) {
    const std::string what = "exact int8 " + std::to_string(M) + "x" + std::to_string(in) + "x" + std::to_string(out);
    Buffer<uint8_t> x(M * in);
    Buffer<int8_t> w(in * out);
    Buffer<float> ones(std::max(M, out)), y(M * out);
    for (int64_t i = 0; i < ones.count; i++) ones[i] = 1.0f;
    const int left[] = {255, 0, 128, 1}, right[] = {-128, 127, -127, 0, 1};
    for (int64_t i = 0; i < x.count; i++) x[i] = (uint8_t)(i / in < 4 ? left[i / in] : (int)(random_number() * 90 + 128) & 255);
    for (int by_column = 0; by_column < 2; by_column++) {
        for (int64_t i = 0; i < w.count; i++) {
            const int64_t column = by_column ? i / in : i % out;
            w[i] = (int8_t)(column < 5 ? right[column] : (int)(random_number() * 90) & 255);
        }
        expect(dw_linear(0, M, out, in, nullptr, 2, w.data(), by_column, ones.data(), nullptr, nullptr, 0, nullptr, nullptr, 0, 1.0f, nullptr,
                         x.data(),
                         ones.data(), 0, 0, y.data(), nullptr) == 0, what);
        Numbers expected(y.count), signed_x(x.count);
        for (int64_t i = 0; i < x.count; i++) signed_x[i] = (double)x[i] - 128;
        add_product(expected, signed_x, w.numbers(), M, out, in, 1, by_column);
        expect_close(y.numbers(), expected, 0, what + (by_column ? "" : " by row"));
    }
}

// The largest value of a row becomes 127 steps and never 128, regardless of how its scale is rounded. Zero rows remain zero.
template <class T>
void test_quantize(int64_t M, int64_t K) {
    const std::string what = "quantize " + std::to_string(M) + "x" + std::to_string(K) + " type " + std::to_string(type_of<T>());
    Buffer<T> x(M * K);
    Buffer<uint8_t> out(M * K);
    Buffer<float> scales(M);
    x.fill();
    for (int64_t k = 0; k < K; k++) x[k] = 0;
    expect(dw_quantize(type_of<T>(), M, K, x.data(), nullptr, 0, out.data(), scales.data()) == 0, what);
    int low = 255, high = 0;
    double most = 0;
    bool peaks = true;
    for (int64_t m = 0; m < M; m++) {
        int peak = 0;
        for (int64_t i = m * K; i < (m + 1) * K; i++) {
            low = std::min<int>(low, out[i]), high = std::max<int>(high, out[i]), peak = std::max(peak, std::abs((int)out[i] - 128));
            if (m) most = std::max(most, std::fabs(((double)out[i] - 128) * scales[m] - x.at(i)) / scales[m]);
        }
        peaks = peaks && peak == (m ? 127 : 0);
    }
    expect(low >= 1 && high <= 255 && peaks && scales[0] == 0, what + " stays in range and reaches its ends");
    expect(most <= 0.501, what + " is off by no more than half a step, but by " + std::to_string(most));
}

// Quantize each row of a bf16 matrix to signed int8 with a scale. Zero rows remain zero.
void round_rows(const Buffer<bf16> &w, int64_t rows, int64_t width, Buffer<int8_t> &w_int8, Buffer<float> &scale) {
    for (int64_t n = 0; n < rows; n++) {
        float top = 0;
        for (int64_t k = 0; k < width; k++) top = std::max(top, std::fabs((float)w.at(n * width + k)));
        scale[n] = top / 127.0f;
        const float by = top > 0 ? 1.0f / scale[n] : 0.0f;
        for (int64_t k = 0; k < width; k++)
            w_int8[n * width + k] = (int8_t)std::max(-128.0f, std::min(127.0f, std::nearbyint((float)w.at(n * width + k) * by)));
    }
}

// Quantizing a bf16 weight while it is read gives the same input gradient as a quantized copy.
void test_gradient_rounded_on_the_way(const Shape &s, bool by_column) {
    const std::string what = "gradient rounded on the way " + std::to_string(s.M) + "x" + std::to_string(s.in) + "x" + std::to_string(s.out) +
                             (by_column ? "" : " by row");
    const int64_t height = by_column ? s.out : s.in, blocks = (s.out + BLOCK - 1) / BLOCK;
    Buffer<bf16> grad(s.M * s.out), w(s.in * s.out), added(s.M * s.in), dx(added.count), same(added.count), narrow(s.M * s.rank), again(s.M * s.rank);
    Buffer<int8_t> w_int8(w.count);
    Buffer<uint8_t> grad_int8(grad.count);
    Buffer<float> scale(height), ones(s.out), A(s.in * s.rank), B(s.rank * s.out), grad_scales(s.M * blocks);
    grad.fill(), w.fill(), added.fill(), A.fill(0.1), B.fill(0.1);
    for (int64_t k = 0; k < w.count / height; k++) w[k] = 0;
    for (int64_t i = 0; i < s.out; i++) ones[i] = 1.0f;
    round_rows(w, height, w.count / height, w_int8, scale);
    const float *const a = s.rank ? A.data() : nullptr, *const b = s.rank ? B.data() : nullptr;
    auto run = [&](int type, const void *weight, const float *of_grad, const float *of_dx, Buffer<bf16> &dx, Buffer<bf16> &narrow) {
        expect(dw_linear_backward(1, s.M, s.out, s.in, grad.data(), type, weight, by_column, of_grad, of_dx, a, b, s.rank, 0.5f, added.data(),
                                  grad_int8.data(), grad_scales.data(), dx.data(), narrow.data()) == 0, what);
    };
    run(1, w.data(), nullptr, nullptr, dx, narrow);
    run(2, w_int8.data(), by_column ? scale.data() : ones.data(), by_column ? nullptr : scale.data(), same, again);
    expect(dx.same(same) && narrow.same(again), what + " gives the same bits");
    Numbers expected = added.numbers();
    add_product(expected, grad.numbers(), w.numbers(), s.M, s.in, s.out, 1, !by_column);
    add_product(expected, narrow.numbers(), A.numbers(), s.M, s.in, s.rank, 1, true);
    expect_close(dx.numbers(), expected, 2e-2, what + " is near the exact one");
}

// Quantizing a bf16 weight while it is read gives the same product as a quantized copy.
void test_rounded_on_the_way(const Shape &s) {
    Buffer<bf16> x(s.M * s.in), w(s.in * s.out), y(s.M * s.out), same(s.M * s.out);
    Buffer<int8_t> w_int8(w.count);
    Buffer<uint8_t> x_int8(x.count);
    Buffer<float> scale(s.out), x_scales(s.M);
    x.fill(), w.fill();
    round_rows(w, s.out, s.in, w_int8, scale);
    expect(dw_linear(1, s.M, s.out, s.in, x.data(), 1, w.data(), 1, scale.data(), nullptr, nullptr, 0, nullptr, nullptr, 0, 1.0f, nullptr,
                     x_int8.data(),
                     x_scales.data(), 0, 1, y.data(), nullptr) == 0, "rounded on the way");
    expect(dw_linear(1, s.M, s.out, s.in, x.data(), 2, w_int8.data(), 1, scale.data(), nullptr, nullptr, 0, nullptr, nullptr, 0, 1.0f, nullptr,
                     x_int8.data(), x_scales.data(), 0, 0, same.data(), nullptr) == 0, "rounded before");
    expect(y.same(same), "rounding on the way gives the same bits");
}

// Reference implementation of dw_class_gradient with the same quantization.
Numbers class_gradient(const Buffer<bf16> &grad, const Buffer<int64_t> &targets, const Buffer<bf16> &w, const Buffer<float> &scales, int64_t M,
                       int64_t V,
                       int64_t D) {
    Numbers rest(M * V), w_int8(V * D), found(M * D);
    for (int64_t v = 0; v < V; v++)
        for (int64_t d = 0; d < D; d++)
            w_int8[v * D + d] = std::max(-128.0f, std::min(127.0f, std::nearbyint((float)w.at(v * D + d) * (1.0f / scales[v]))));
    for (int64_t m = 0; m < M; m++)
        for (int64_t v0 = 0; v0 < V; v0 += BLOCK) {
            const int64_t end = std::min(V, v0 + BLOCK);
            float high = 0, low = 0;
            auto value = [&](int64_t v) { return v == targets[m] ? 0.0f : (float)grad.at(m * V + v) * scales[v]; };
            for (int64_t v = v0; v < end; v++) high = std::max(high, value(v)), low = std::min(low, value(v));
            const float top = high >= -low ? high : low, by = top != 0 ? 255.0f / top : 0.0f;
            for (int64_t v = v0; v < end; v++) rest[m * V + v] = std::max(0.0f, std::nearbyint(value(v) * by)) * (double)(top / 255.0f);
        }
    add_product(found, rest, w_int8, M, D, V);
    for (int64_t m = 0; m < M; m++)
        for (int64_t d = 0; d < D; d++) found[m * D + d] += grad.at(m * V + targets[m]) * w.at(targets[m] * D + d);
    return found;
}

void test_class_gradient(int64_t M, int64_t V, int64_t D, bool negative) {
    const std::string what = "class gradient " + std::to_string(M) + "x" + std::to_string(V) + "x" + std::to_string(D) + (negative ? " negative" : "");
    Buffer<bf16> grad(M * V), before(M * V), w(V * D), dh(M * D), dh_again(M * D);
    Buffer<int64_t> targets(M);
    const int64_t blocks = (V + BLOCK - 1) / BLOCK;
    Buffer<float> scales(V), block_scales(M * blocks);
    w.fill();
    for (int64_t v = 0; v < V; v++) {
        float top = 0;
        for (int64_t d = 0; d < D; d++) top = std::max(top, std::fabs((float)w.at(v * D + d)));
        scales[v] = top / 127.0f;
    }
    for (int64_t m = 0; m < M; m++) {
        targets[m] = m * 7 % V;
        double sum = 0;
        Numbers p(V);
        for (double &value : p) sum += value = std::exp(2 * random_number());
        for (int64_t v = 0; v < V; v++) grad[m * V + v] = from_double<bf16>((negative ? -1 : 1) * (p[v] / sum - (v == targets[m])));
    }
    for (int64_t v = 0; v < V && M > 1; v++) grad[V + v] = 0;  // a zero row
    before.copy(grad);
    Numbers exact(M * D);
    add_product(exact, grad.numbers(), w.numbers(), M, D, V);
    const Numbers expected = class_gradient(grad, targets, w, scales, M, V, D);
    Buffer<int64_t> bad(M);
    for (int64_t value : {V, (int64_t)-1, (int64_t)1 << 40}) {
        bad.copy(targets)[M - 1] = value;
        expect(dw_class_gradient(M, V, D, grad.data(), bad.data(), w.data(), scales.data(), block_scales.data(), dh.data()) == 2, what + " refuses");
        expect(grad.same(before), what + " wrote before it refused");
    }
    expect(dw_class_gradient(M, V, D, grad.data(), targets.data(), w.data(), scales.data(), block_scales.data(), dh.data()) == 0, what);
    expect_close(dh.numbers(), expected, tolerance<bf16>(), what);
    expect_close(dh.numbers(), exact, 0.03, what + " beside the exact one");
    grad.copy(before);
    expect(dw_class_gradient(M, V, D, grad.data(), targets.data(), w.data(), scales.data(), block_scales.data(), dh_again.data()) == 0, what);
    expect(dh_again.same(dh), what + " gives the same bits again");
}

}  // namespace

void test_products() {
    for (const Shape &s : {Shape{1, 4, 4, 2}, Shape{5, 12, 36, 4}, Shape{33, 100, 68, 18}, Shape{70, 64, 16, 32}, Shape{13, 3200, 36, 2}, Shape{26,
        1600, 40, 16},
                           Shape{45, 160, 36, 6}, Shape{1300, 32, 48, 8}, Shape{11, 20, 52, 0}}) {
        for (bool by_column : {true, false}) test_linear<float>(s, by_column), test_linear<bf16>(s, by_column);
        test_int8<float>(s, s.M % 2, s.M % 3 == 0), test_int8<bf16>(s, true, false), test_int8<bf16>(s, false, false);
        test_int8<bf16>(s, true, true);
        test_rounded_on_the_way(s);
        for (bool by_column : {true, false}) test_gradient_rounded_on_the_way(s, by_column);
    }
    for (int parts : {0, (int)BIAS, (int)BIAS_IN_FP32, (int)ADDED, (int)(BIAS_IN_FP32 | ADDED)})
        test_linear<float>(Shape{9, 28, 20, 6}, parts % 2, parts), test_linear<bf16>(Shape{9, 28, 20, 6}, parts % 2, parts);
    // Row stride of a power of two, processed in several parts.
    test_linear<bf16>(Shape{40, 4096, 64, 2}, true);
    for (bool in_blocks : {false, true}) test_int8<bf16>(Shape{9, 4096, 24, 4}, true, in_blocks);
    for (int64_t in : {4, 60, 128, 1000}) test_int8_is_exact(9, in, 37);
    for (int64_t K : {1, 15, 16, 33, 300}) test_quantize<float>(60, K), test_quantize<bf16>(60, K);
    for (int64_t V : {2, 5, 129, 1001, 4100}) test_class_gradient(3, V, 20, V % 2), test_class_gradient(V > 2000 ? 19 : 67, V, 33, V % 2 == 0);
    Buffer<bf16> nothing(0), w(8 * 12);
    w.fill();
    expect(dw_linear(1, 0, 12, 8, nothing.data(), 1, w.data(), 1, nullptr, nullptr, nullptr, 0, nullptr, nullptr, 0, 1.0f, nullptr, nullptr,
                     nullptr, 0,
                     0, nothing.data(), nullptr) == 0, "no rows");
}
