// Products with their low-rank update, their gradients, int8, and the gradient of classes, against sums in double.
#include "check.h"
#include "kernels.h"
#include "tests.h"

namespace {

const int64_t BLOCK = 128;  // numbers that are rounded with one scale

template <class T>
double tolerance() { return sizeof(T) == 4 ? 2e-6 : 6e-3; }

struct Shape { int64_t M, in, out, rank; };

template <class T>
void test_linear(const Shape &s, bool by_column) {
    const std::string what = "linear " + std::to_string(s.M) + "x" + std::to_string(s.in) + "x" + std::to_string(s.out) + " type " +
                             std::to_string(type_of<T>()) + (by_column ? "" : " by row");
    Buffer<T> x(s.M * s.in), w(s.in * s.out), bias(s.out), added(s.M * s.out), grad(s.M * s.out), y(s.M * s.out), h(s.M * s.rank), dx(s.M * s.in),
        narrow(s.M * s.rank);
    Buffer<float> A(s.in * s.rank), B(s.rank * s.out), of_A(A.count), of_B(B.count);
    for (Buffer<T> *b : {&x, &w, &bias, &added, &grad}) b->fill();
    for (int64_t i = 0; i < A.count; i++) A[i] = (float)to_double(from_double<T>(random_number()));
    for (int64_t i = 0; i < B.count; i++) B[i] = (float)to_double(from_double<T>(random_number()));
    const double scaling = 0.5;
    expect(dw_linear(type_of<T>(), s.M, s.out, s.in, x.data(), type_of<T>(), w.data(), by_column, nullptr, nullptr, bias.data(), 0, A.data(), B.data(),
                     s.rank, (float)scaling, added.data(), nullptr, nullptr, 0, y.data(), h.data()) == 0, what);
    Numbers expected_h(h.count), expected(y.count);
    add_product(expected_h, x.numbers(), A.numbers(), s.M, s.rank, s.in);
    expect_close(h.numbers(), expected_h, tolerance<T>(), what + " h");
    for (int64_t i = 0; i < y.count; i++) expected[i] = bias.at(i % s.out) + added.at(i);
    add_product(expected, x.numbers(), w.numbers(), s.M, s.out, s.in, 1, by_column);
    add_product(expected, h.numbers(), B.numbers(), s.M, s.out, s.rank, scaling);
    expect_close(y.numbers(), expected, tolerance<T>(), what + " y");

    expect(dw_linear_backward(type_of<T>(), s.M, s.out, s.in, grad.data(), w.data(), by_column, nullptr, nullptr, A.data(), B.data(), s.rank,
                              (float)scaling, x.data(), nullptr, nullptr, dx.data(), narrow.data()) == 0, what);
    Numbers expected_narrow(narrow.count), expected_dx = x.numbers();
    add_product(expected_narrow, grad.numbers(), B.numbers(), s.M, s.rank, s.out, scaling, true);
    expect_close(narrow.numbers(), expected_narrow, tolerance<T>(), what + " narrow");
    add_product(expected_dx, grad.numbers(), w.numbers(), s.M, s.in, s.out, 1, !by_column);
    add_product(expected_dx, narrow.numbers(), A.numbers(), s.M, s.in, s.rank, 1, true);
    expect_close(dx.numbers(), expected_dx, tolerance<T>(), what + " dx");

    expect(dw_factors_backward(type_of<T>(), s.M, s.in, s.out, s.rank, x.data(), h.data(), grad.data(), narrow.data(), (float)scaling, of_A.data(),
                               of_B.data()) == 0, what);
    Numbers expected_A(A.count), expected_B(B.count);
    add_product(expected_A, transposed(x.numbers(), s.M, s.in), narrow.numbers(), s.in, s.rank, s.M);
    add_product(expected_B, transposed(h.numbers(), s.M, s.rank), grad.numbers(), s.rank, s.out, s.M, scaling);
    expect_close(of_A.numbers(), expected_A, 2e-6, what + " of A");
    expect_close(of_B.numbers(), expected_B, 2e-6, what + " of B");
}

// The columns that a row's int8 numbers stand for, in blocks of `at_once` with a scale each.
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
void test_int8(const Shape &s) {
    const std::string what = "int8 " + std::to_string(s.M) + "x" + std::to_string(s.in) + "x" + std::to_string(s.out) + " type " +
                             std::to_string(type_of<T>());
    Buffer<T> x(s.M * s.in), y(s.M * s.out), h(s.M * s.rank), grad(s.M * s.out), dx(s.M * s.in), narrow(s.M * s.rank);
    Buffer<int8_t> w(s.in * s.out);
    Buffer<uint8_t> x_int8(x.count), grad_int8(grad.count), again(x.count);
    const int64_t blocks = (s.out + BLOCK - 1) / BLOCK;
    Buffer<float> scale(s.out), smooth(s.in), A(s.in * s.rank), B(s.rank * s.out), x_scales(s.M), grad_scales(s.M * blocks), again_scales(s.M);
    x.fill(), grad.fill(), A.fill(0.1), B.fill(0.1);
    for (int64_t i = 0; i < w.count; i++) w[i] = (int8_t)(random_number() * 40);
    for (int64_t i = 0; i < s.out; i++) scale[i] = 0.02f + 0.001f * (float)(i % 7);
    for (int64_t i = 0; i < s.in; i++) smooth[i] = 0.5f + 0.1f * (float)(i % 11);
    expect(dw_linear(type_of<T>(), s.M, s.out, s.in, x.data(), 2, w.data(), 1, scale.data(), smooth.data(), nullptr, 0, A.data(), B.data(), s.rank, 1.0f,
                     nullptr, x_int8.data(), x_scales.data(), 1, y.data(), h.data()) == 0, what);
    expect(dw_quantize(type_of<T>(), s.M, s.in, x.data(), smooth.data(), again.data(), again_scales.data()) == 0, what);
    expect(again.same(x_int8) && again_scales.same(x_scales), what + " is rounded alike");
    Numbers signed_x(x.count), signed_w(w.count), expected(y.count);
    for (int64_t i = 0; i < x.count; i++) signed_x[i] = ((double)x_int8[i] - 128) * x_scales[i / s.in];
    expect_close(signed_x, rounded(x, s.M, s.in, &smooth, s.in), 1e-3, what + " x");
    for (int64_t i = 0; i < w.count; i++) signed_w[i] = (double)w[i] * scale[i / s.in];
    add_product(expected, signed_x, signed_w, s.M, s.out, s.in, 1, true);
    add_product(expected, h.numbers(), B.numbers(), s.M, s.out, s.rank);
    expect_close(y.numbers(), expected, tolerance<T>(), what + " y");

    expect(dw_linear_backward(type_of<T>(), s.M, s.out, s.in, grad.data(), w.data(), 1, scale.data(), smooth.data(), A.data(), B.data(), s.rank, 1.0f,
                              nullptr, grad_int8.data(), grad_scales.data(), dx.data(), narrow.data()) == 0, what);
    Numbers expected_dx(dx.count), low(dx.count);
    add_product(expected_dx, rounded(grad, s.M, s.out, &scale, BLOCK), Numbers(w.numbers()), s.M, s.in, s.out);
    add_product(low, narrow.numbers(), A.numbers(), s.M, s.in, s.rank, 1, true);
    for (int64_t i = 0; i < dx.count; i++) expected_dx[i] = expected_dx[i] * smooth[i % s.in] + low[i];
    expect_close(dx.numbers(), expected_dx, std::max(tolerance<T>(), 1e-3), what + " dx");
}

// A bf16 weight that is rounded as it is read gives what its rounded copy gives.
void test_rounded_on_the_way(const Shape &s) {
    Buffer<bf16> x(s.M * s.in), w(s.in * s.out), y(s.M * s.out), same(s.M * s.out);
    Buffer<int8_t> w_int8(w.count);
    Buffer<uint8_t> x_int8(x.count);
    Buffer<float> scale(s.out), x_scales(s.M);
    x.fill(), w.fill();
    for (int64_t n = 0; n < s.out; n++) {
        float top = 0;
        for (int64_t k = 0; k < s.in; k++) top = std::max(top, std::fabs((float)w.at(n * s.in + k)));
        scale[n] = top / 127.0f;
        for (int64_t k = 0; k < s.in; k++)
            w_int8[n * s.in + k] = (int8_t)std::max(-128.0f, std::min(127.0f, std::nearbyint((float)w.at(n * s.in + k) * (1.0f / scale[n]))));
    }
    expect(dw_linear(1, s.M, s.out, s.in, x.data(), 1, w.data(), 1, scale.data(), nullptr, nullptr, 0, nullptr, nullptr, 0, 1.0f, nullptr, x_int8.data(),
                     x_scales.data(), 1, y.data(), nullptr) == 0, "rounded on the way");
    expect(dw_linear(1, s.M, s.out, s.in, x.data(), 2, w_int8.data(), 1, scale.data(), nullptr, nullptr, 0, nullptr, nullptr, 0, 1.0f, nullptr,
                     x_int8.data(), x_scales.data(), 0, same.data(), nullptr) == 0, "rounded before");
    expect(y.same(same), "rounding on the way gives the same bits");
}

void test_class_gradient(int64_t M, int64_t V, int64_t D) {
    const std::string what = "class gradient " + std::to_string(M) + "x" + std::to_string(V) + "x" + std::to_string(D);
    Buffer<bf16> grad(M * V), before(M * V), w(V * D), dh(M * D);
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
        for (int64_t v = 0; v < V; v++) grad[m * V + v] = from_double<bf16>(p[v] / sum - (v == targets[m]));
    }
    before.copy(grad);
    Numbers expected(M * D);
    add_product(expected, grad.numbers(), w.numbers(), M, D, V);
    Buffer<int64_t> bad(M);
    for (int64_t value : {V, (int64_t)-1, (int64_t)1 << 40}) {
        bad.copy(targets)[M - 1] = value;
        expect(dw_class_gradient(M, V, D, grad.data(), bad.data(), w.data(), scales.data(), block_scales.data(), dh.data()) == 2, what + " refuses");
        expect(grad.same(before), what + " wrote before it refused");
    }
    expect(dw_class_gradient(M, V, D, grad.data(), targets.data(), w.data(), scales.data(), block_scales.data(), dh.data()) == 0, what);
    expect_close(dh.numbers(), expected, 0.03, what);
}

}  // namespace

void test_products() {
    for (const Shape &s : {Shape{1, 4, 4, 2}, Shape{5, 12, 36, 4}, Shape{33, 100, 68, 18}, Shape{70, 64, 16, 32}, Shape{13, 3200, 36, 2}, Shape{26, 1600, 40, 16},
                           Shape{45, 160, 36, 6}, Shape{1300, 32, 48, 8}}) {
        for (bool by_column : {true, false}) test_linear<float>(s, by_column), test_linear<bf16>(s, by_column);
        test_int8<float>(s), test_int8<bf16>(s);
        test_rounded_on_the_way(s);
    }
    // Rows a power of two apart, in several parts.
    test_linear<bf16>(Shape{40, 4096, 64, 2}, true);
    test_int8<bf16>(Shape{9, 4096, 24, 4});
    for (int64_t V : {2, 5, 129, 1001, 4100}) test_class_gradient(3, V, 20), test_class_gradient(67, V, 33);
    Buffer<bf16> nothing(0), w(8 * 12);
    w.fill();
    expect(dw_linear(1, 0, 12, 8, nothing.data(), 1, w.data(), 1, nullptr, nullptr, nullptr, 0, nullptr, nullptr, 0, 1.0f, nullptr, nullptr, nullptr, 0,
                     nothing.data(), nullptr) == 0, "no rows");
}
