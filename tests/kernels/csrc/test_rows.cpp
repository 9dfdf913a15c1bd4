// Tests of norms, activations, rotary positions and cross-entropy against float64, and of gradients against differences.
#include "check.h"
#include "kernels.h"
#include "tests.h"

namespace {

template <class T>
double tolerance() { return sizeof(T) == 4 ? 4e-6 : 8e-3; }

template <class T>
void test_norm(int64_t M, int64_t D, bool centered) {
    const std::string what = "norm " + std::to_string(M) + "x" + std::to_string(D) + " type " + std::to_string(type_of<T>());
    const int64_t ld = D + 3;
    Buffer<T> x(M * ld - 3), w(D), bias(D), y(M * D), dy(M * D), added(M * D), dx(M * D);
    Buffer<float> stats(2 * M);
    x.fill(1, 0.3), w.fill(), bias.fill(), dy.fill(), added.fill();
    const double offset = 1, eps = 1e-2;
    expect(dw_norm(type_of<T>(), M, D, x.data(), ld, w.data(), bias.data(), 1.0f, 1e-2f, centered, y.data(), stats.data()) == 0, what);
    // The rows of x have the given stride, those of dy are contiguous.
    expect(dw_norm_backward(type_of<T>(), M, D, dy.data(), x.data(), ld, w.data(), 1.0f, centered, stats.data(), added.data(), dx.data()) == 0, what);
    Numbers expected(M * D), expected_dx(M * D);
    for (int64_t m = 0; m < M; m++) {
        double mean = 0, square = 0;
        for (int64_t d = 0; d < D && centered; d++) mean += x.at(m * ld + d) / (double)D;
        for (int64_t d = 0; d < D; d++) square += std::pow(x.at(m * ld + d) - mean, 2) / (double)D;
        const double rstd = 1 / std::sqrt(square + eps);
        double of_g = 0, of_hat = 0;
        for (int64_t d = 0; d < D; d++) {
            const double hat = (x.at(m * ld + d) - mean) * rstd, g = dy.at(m * D + d) * (w.at(d) + offset);
            expected[m * D + d] = hat * (w.at(d) + offset) + bias.at(d);
            of_g += centered ? g / (double)D : 0, of_hat += g * hat / (double)D;
        }
        for (int64_t d = 0; d < D; d++) {
            const double hat = (x.at(m * ld + d) - mean) * rstd, g = dy.at(m * D + d) * (w.at(d) + offset);
            expected_dx[m * D + d] = rstd * (g - of_g - hat * of_hat) + added.at(m * D + d);
        }
    }
    expect_close(y.numbers(), expected, tolerance<T>(), what);
    expect_close(dx.numbers(), expected_dx, tolerance<T>(), what + " backward");
    expect(dw_norm_backward(type_of<T>(), M, D, dy.data(), x.data(), ld, w.data(), 1.0f, centered, stats.data(), added.data(),
                            dy.data()) == 0 && dy.same(dx),
           what + " backward in place gives the same bits");
}

double activated(int kind, double x) {
    if (kind == 0) return x / (1 + std::exp(-x));
    if (kind == 1) return 0.5 * x * (1 + std::tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)));
    if (kind == 2) return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0)));
    return x > 0 ? x : 0;
}

template <class T>
void test_activation(int kind, int64_t M, int64_t D, bool gated) {
    const std::string what = "activation " + std::to_string(kind) + " type " + std::to_string(type_of<T>());
    Buffer<T> gate(M * D), up(M * D), y(M * D), again(M * D), dy(M * D), d_gate(M * D), d_up(gated ? M * D : 0);
    gate.fill(3), up.fill(), dy.fill();
    const void *const second = gated ? up.data() : nullptr;
    expect(dw_activation(type_of<T>(), kind, M, D, gate.data(), second, y.data()) == 0, what);
    expect(dw_activation_backward(type_of<T>(), kind, M, D, dy.data(), gate.data(), second, d_gate.data(), gated ? d_up.data() : nullptr,
                                  again.data()) == 0, what);
    expect(again.same(y), what + " again");
    Numbers expected(M * D), expected_gate(M * D), expected_up(d_up.count);
    for (int64_t i = 0; i < M * D; i++) {
        const double x = gate.at(i), u = gated ? up.at(i) : 1, step = 1e-6;
        expected[i] = activated(kind, x) * u;
        expected_gate[i] = dy.at(i) * u * (activated(kind, x + step) - activated(kind, x - step)) / (2 * step);
        if (gated) expected_up[i] = dy.at(i) * activated(kind, x);
    }
    expect_close(y.numbers(), expected, tolerance<T>(), what);
    expect_close(d_gate.numbers(), expected_gate, tolerance<T>(), what + " of gate");
    if (gated) expect_close(d_up.numbers(), expected_up, tolerance<T>(), what + " of up");
}

uint32_t random_bits(uint32_t index, uint64_t seed) {
    uint32_t h = index + (uint32_t)seed;
    h ^= h >> 16, h = h * 0x7feb352du + (uint32_t)(seed >> 32);
    h ^= h >> 15, h *= 0x846ca68bu;
    return (h ^ h >> 16) >> 8;
}

template <class T>
void test_dropout(int64_t count) {
    const std::string what = "dropout of " + std::to_string(count) + " type " + std::to_string(type_of<T>());
    Buffer<T> x(count), y(count), expected(count);
    x.fill();
    const int64_t seed = -0x123456789abcdefll;
    const float scale = 1.25f;
    for (int64_t i = 0; i < count; i++)
        expected[i] = random_bits((uint32_t)i, (uint64_t)seed) < (1u << 24) / 5 ? from_double<T>(0) : from_double<T>((float)x.at(i) * scale);
    expect(dw_dropout(type_of<T>(), count, x.data(), seed, (float)((1u << 24) / 5), scale, y.data()) == 0 && y.same(expected), what);
    expect(dw_dropout(type_of<T>(), count, x.data(), seed, (float)((1u << 24) / 5), scale, x.data()) == 0 && x.same(expected), what + " in place");
}

template <class T>
void test_rotate(int64_t M, int64_t heads, int64_t half, int64_t rest) {
    const int64_t turned = 2 * half, d = turned + rest;
    Buffer<T> x(M * heads * d), y(x.count), back(x.count);
    Buffer<float> cosine(M * turned), sine(M * turned);
    x.fill(), cosine.fill(), sine.fill();
    for (int backward = 0; backward < 2; backward++) {
        Buffer<T> &out = backward ? back : y;
        expect(dw_rotate(type_of<T>(), M, heads, d, turned, x.data(), heads * d, cosine.data(), sine.data(), backward, out.data(), heads * d) == 0, "rotate");
        Numbers expected(x.numbers());
        for (int64_t r = 0; r < M * heads; r++)
            for (int64_t i = 0; i < turned; i++) {
                const int64_t m = r / heads, other = (i + half) % turned;
                // The backward pass applies the transposed rotation.
                const double by = backward ? (i < half ? 1 : -1) * sine.at(m * turned + other) : (i < half ? -1 : 1) * sine.at(m * turned + i);
                expected[r * d + i] = x.at(r * d + i) * cosine.at(m * turned + i) + x.at(r * d + other) * by;
            }
        expect_close(out.numbers(), expected, tolerance<T>(), "rotate type " + std::to_string(type_of<T>()));
    }
    expect(dw_rotate(type_of<T>(), M, heads, d, turned, x.data(), heads * d, cosine.data(), sine.data(), 0, x.data(), heads * d) == 0, "rotate in place");
    expect(x.same(y), "rotate in place gives the same bits");
}

template <class T>
void test_cross_entropy(int64_t M, int64_t V, double scale, double cap) {
    const std::string what = "cross-entropy " + std::to_string(M) + "x" + std::to_string(V) + " type " + std::to_string(type_of<T>());
    Buffer<T> logits(M * V), before(M * V);
    Buffer<int64_t> targets(M), bad(M);
    Buffer<float> weights(M), losses(M), again(M);
    logits.fill(4);
    before.copy(logits);
    for (int64_t m = 0; m < M; m++) targets[m] = V - 1 - m % V, weights[m] = 0.2f + (float)(m % 5);
    for (int64_t value : {V, (int64_t)-1, (int64_t)1 << 40}) {
        bad.copy(targets)[M - 1] = value;
        expect(dw_cross_entropy(type_of<T>(), M, V, logits.data(), bad.data(), weights.data(), 1.0f, 0.0f, 1, losses.data()) == 2, what + " refuses");
        expect(logits.same(before), what + " wrote before it refused");
    }
    expect(dw_cross_entropy(type_of<T>(), M, V, logits.data(), targets.data(), nullptr, (float)scale, (float)cap, 0, again.data()) == 0, what);
    expect(logits.same(before), what + " wrote where no gradient was asked for");
    expect(dw_cross_entropy(type_of<T>(), M, V, logits.data(), targets.data(), weights.data(), (float)scale, (float)cap, 1, losses.data()) == 0,
           what);
    expect(losses.same(again), what + " gives one loss with and without a gradient");
    Numbers expected(M), slope(M * V);
    for (int64_t m = 0; m < M; m++) {
        Numbers z(V);
        double top = -1e300, sum = 0;
        for (int64_t v = 0; v < V; v++) {
            z[v] = scale * before.at(m * V + v);
            if (cap > 0) z[v] = cap * std::tanh(z[v] / cap);
            top = std::max(top, z[v]);
        }
        for (double value : z) sum += std::exp(value - top);
        expected[m] = std::log(sum) + top - z[targets[m]];
        for (int64_t v = 0; v < V; v++) {
            const double bend = cap > 0 ? 1 - std::pow(z[v] / cap, 2) : 1;
            slope[m * V + v] = weights[m] * (std::exp(z[v] - top) / sum - (v == targets[m])) * scale * bend;
        }
    }
    expect_close(losses.numbers(), expected, cap > 0 ? 1e-4 : 4e-6, what, 1.0);
    // If the target is nearly certain, p - 1 has few significant digits in fp32.
    expect_close(logits.numbers(), slope, sizeof(T) == 4 ? 1e-4 : 8e-3, what + " gradient", 1e-2);
}

struct Found {
    Buffer<float> losses, shares;
    Buffer<bf16> slopes, unlikely;
    Found(int64_t M, int64_t V, int64_t D, int64_t together) : losses(M), shares(M), slopes(M * D), unlikely((M + together - 1) / together * V) {}
};

// `flat`: all classes have similar probabilities. `noise` is added to the logits.
void test_head_gradient(int64_t M, int64_t V, int64_t D, double scale, double cap, bool biased, bool flat, double noise) {
    const std::string what = "head gradient " + std::to_string(M) + "x" + std::to_string(V) + "x" + std::to_string(D) + (biased ? " biased" : "");
    const int64_t together = 5, groups = (M + together - 1) / together;
    Buffer<bf16> logits(M * V), before(M * V), hidden(M * D), weight(V * D), bias(V);
    Buffer<int64_t> targets(M), bad(M);
    hidden.fill(), weight.fill(flat ? 1e-3 : 3 / std::sqrt((double)D)), bias.fill();
    // Neighboring rows are correlated.
    for (int64_t m = 1; m < M; m++)
        for (int64_t d = 0; d < D; d++) hidden[m * D + d] = from_double<bf16>(0.8 * hidden.at((m - 1) * D + d) + 0.6 * hidden.at(m * D + d));
    Numbers raw(M * V), losses(M), slope(M * V), exact(M * D);
    add_product(raw, hidden.numbers(), weight.numbers(), M, V, D, 1, true);
    for (int64_t m = 0; m < M; m++) {
        targets[m] = V - 1 - m * 7 % V;
        double sum = 0;
        Numbers z(V);
        for (int64_t v = 0; v < V; v++) {
            raw[m * V + v] += biased ? bias.at(v) : 0;
            logits[m * V + v] = from_double<bf16>(raw[m * V + v] + noise * random_number());
            z[v] = scale * raw[m * V + v], z[v] = cap > 0 ? cap * std::tanh(z[v] / cap) : z[v], sum += std::exp(z[v]);
        }
        losses[m] = std::log(sum) - z[targets[m]];
        for (int64_t v = 0; v < V; v++)
            slope[m * V + v] = (std::exp(z[v]) / sum - (v == targets[m])) * scale * (cap > 0 ? 1 - std::pow(z[v] / cap, 2) : 1);
    }
    add_product(exact, slope, weight.numbers(), M, D, V);
    before.copy(logits);
    const void *const added = biased ? bias.data() : nullptr;
    Found found(M, V, D, together), again(M, V, D, together);
    auto run = [&](Found &into, int64_t rows, const int64_t *of) {
        return dw_head_gradient(rows, V, D, logits.data(), of, hidden.data(), weight.data(), added, (float)scale, (float)cap, together,
                                into.losses.data(),
                                into.slopes.data(), into.shares.data(), into.unlikely.data());
    };
    for (int64_t value : {V, (int64_t)-1, (int64_t)1 << 40}) {
        bad.copy(targets)[M - 1] = value;
        expect(run(found, M, bad.data()) == 2, what + " refuses");
        expect(logits.same(before), what + " wrote before it refused");
    }
    expect(run(found, M, targets.data()) == 0, what);
    expect_close(found.losses.numbers(), losses, 2e-5 + 0.02 * noise, what + " loss", 1.0);
    Numbers whole = found.slopes.numbers(), sums(groups * D), exact_sums(groups * D), of_unlikely(groups * D);
    add_product(of_unlikely, found.unlikely.numbers(), weight.numbers(), groups, D, V);
    for (int64_t m = 0; m < M; m++)
        for (int64_t d = 0; d < D; d++) {
            const int64_t at = m / together * D + d;
            whole[m * D + d] += found.shares.at(m) * of_unlikely[at];
            sums[at] += whole[m * D + d], exact_sums[at] += exact[m * D + d];
        }
    expect_close(whole, exact, 0.012 + 0.1 * noise, what, 1e-4);
    expect_close(sums, exact_sums, 0.006 + 0.1 * noise, what + " in sum", 1e-4);
    // The result of a row's likely classes does not depend on other rows.
    logits.copy(before);
    const int64_t fewer = (M + 1) / 2;
    expect(run(again, fewer, targets.data()) == 0, what + " of fewer rows");
    expect(!memcmp(found.slopes.data(), again.slopes.data(), fewer * D * sizeof(bf16)) && !memcmp(found.losses.data(), again.losses.data(),
                                                                                                  fewer * 4),
           what + " of fewer rows gives the same bits");
}

template <class T>
void test_type() {
    for (int64_t D : {5, 15, 16, 17, 100}) test_norm<T>(7, D, false), test_norm<T>(900, D, true);
    for (int kind = 0; kind < 4; kind++) test_activation<T>(kind, 5, 37, true), test_activation<T>(kind, 3, 16, false);
    for (int64_t count : {1, 15, 16, 5000}) test_dropout<T>(count);
    test_rotate<T>(6, 3, 5, 0), test_rotate<T>(4, 2, 20, 7), test_rotate<T>(1, 1, 1, 1);
    for (int64_t V : {2, 16, 49, 1000}) test_cross_entropy<T>(1, V, 1, 0), test_cross_entropy<T>(41, V, 0.5, 3);
}

}  // namespace

void test_rows() {
    test_type<float>(), test_type<bf16>();
    test_head_gradient(1, 7, 2, 1, 0, false, false, 0), test_head_gradient(3, 40, 34, 0.5, 0, true, false, 0);
    for (double cap : {0.0, 6.0}) test_head_gradient(23, 3001, 64, 1, cap, cap > 0, false, 0), test_head_gradient(37, 2000, 30, 0.7, cap, cap == 0,
        false, 0.2);
    // More likely classes than the maximum, and only the target as a likely class.
    test_head_gradient(2, 6000, 32, 1, 0, false, true, 0), test_head_gradient(6, 9000, 16, 1, 0, false, true, 0);
    Buffer<bf16> numbers(40);
    Buffer<int64_t> target(1);
    Buffer<float> one(1);
    target[0] = 0;
    expect(dw_head_gradient(1, 2, 3, numbers.data(), target.data(), numbers.data(), numbers.data(), nullptr, 1, 0, 1, one.data(), numbers.data(),
                            one.data(),
                            numbers.data()) == 2, "head gradient refuses an odd width");
}
