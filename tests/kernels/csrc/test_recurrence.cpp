// Tests of linear recurrences over prefix trees against float64, and of gradients against differences along them.
#include "check.h"
#include "kernels.h"
#include "tests.h"
#include "tree.h"

namespace {

struct Shape {
    int64_t length, heads, key_heads, d, dv;
    bool unit_vectors;
};
const double SCALING = 0.3;

void to_unit(double *x, int64_t d) {
    double squares = 1e-6;
    for (int64_t i = 0; i < d; i++) squares += x[i] * x[i];
    for (int64_t i = 0; i < d; i++) x[i] /= std::sqrt(squares);
}

// Outputs token by token. inputs: query, key, value, decay, rate (empty for a state-space scan).
Numbers outputs(const Shape &z, const Tree &tree, std::vector<Numbers> inputs) {
    Numbers &query = inputs[0], &key = inputs[1], y(z.length * z.heads * z.dv);
    for (int64_t i = 0; z.unit_vectors && i < z.length * z.key_heads; i++) to_unit(&query[i * z.d], z.d), to_unit(&key[i * z.d], z.d);
    const std::vector<int64_t> table = tree.table();
    for (int64_t head = 0; head < z.heads; head++) {
        std::vector<Numbers> ends;
        for (int64_t s = 0; s < tree.count(); s++) {
            Numbers state = tree.parents[s] < 0 ? Numbers(z.d * z.dv) : ends[tree.parents[s]];
            for (int64_t t = table[s]; t < table[tree.count() + s]; t++) {
                const int64_t at = t * z.heads + head;
                const double *const q = &query[(t * z.key_heads + head * z.key_heads / z.heads) * z.d], *const k = q - &query[0] + &key[0];
                for (double &x : state) x *= std::exp(inputs[3][at]);
                for (int64_t j = 0; j < z.dv; j++) {
                    double u = inputs[2][at * z.dv + j];
                    if (!inputs[4].empty()) {
                        for (int64_t i = 0; i < z.d; i++) u -= state[i * z.dv + j] * k[i];
                        u *= inputs[4][at];
                    }
                    for (int64_t i = 0; i < z.d; i++) {
                        state[i * z.dv + j] += k[i] * u;
                        y[at * z.dv + j] += SCALING * q[i] * state[i * z.dv + j];
                    }
                }
            }
            ends.push_back(state);
        }
    }
    return y;
}

template <class T>
void test(const Tree &tree, Shape z, bool delta) {
    z.length = tree.length();
    const std::string what = "recurrence of " + std::to_string(z.length) + " tokens, " + std::to_string(z.heads) + "/" + std::to_string(z.key_heads) +
                             " heads, type " + std::to_string(type_of<T>()) + (delta ? " delta" : "");
    const std::vector<int64_t> table = tree.table();
    const int64_t keys = z.length * z.key_heads * z.d, values = z.length * z.heads * z.dv, numbers = z.length * z.heads;
    Buffer<T> query(keys), key(keys), value(values), out(values), grad(values), d_query(keys), d_key(keys), d_value(values);
    Buffer<float> decay(numbers), rate(delta ? numbers : 0), d_decay(numbers), d_rate(rate.count);
    query.fill(), key.fill(0.2), value.fill(), grad.fill(), rate.fill(0.1, 0.5);
    for (int64_t i = 0; i < numbers; i++) decay[i] = -(float)std::fabs(random_number());
    const float *const rates = delta ? rate.data() : nullptr;
    expect(dw_recurrence(type_of<T>(), table.data(), tree.count(), z.length, z.heads, z.key_heads, z.d, z.dv, (float)SCALING, z.unit_vectors,
                         query.data(), key.data(), value.data(), decay.data(), rates, nullptr, out.data()) == 0, what);
    // States of zeros, which the states after the segments replace.
    Buffer<float> states(tree.count() * z.heads * z.d * z.dv);
    Buffer<T> continued(values);
    std::fill_n(states.data(), states.count, 0.0f);
    std::vector<float *> rows;
    for (int64_t s = 0; s < tree.count(); s++) rows.push_back(states.data() + s * z.heads * z.d * z.dv);
    expect(dw_recurrence(type_of<T>(), table.data(), tree.count(), z.length, z.heads, z.key_heads, z.d, z.dv, (float)SCALING, z.unit_vectors,
                         query.data(), key.data(), value.data(), decay.data(), rates, rows.data(), continued.data()) == 0, what + " with states");
    expect(dw_recurrence_backward(type_of<T>(), table.data(), tree.count(), z.length, z.heads, z.key_heads, z.d, z.dv, (float)SCALING,
                                  z.unit_vectors, query.data(), key.data(), value.data(), decay.data(), rates, grad.data(), d_query.data(),
                                  d_key.data(), d_value.data(), d_decay.data(), delta ? d_rate.data() : nullptr) == 0, what + " backward");
    const double tolerance = sizeof(T) == 4 ? 1e-5 : 1e-2;
    const std::vector<Numbers> inputs{query.numbers(), key.numbers(), value.numbers(), decay.numbers(), rate.numbers()};
    const std::vector<Numbers> slopes{d_query.numbers(), d_key.numbers(), d_value.numbers(), d_decay.numbers(), d_rate.numbers()};
    expect_close(out.numbers(), outputs(z, tree, inputs), tolerance, what);
    expect_close(continued.numbers(), out.numbers(), tolerance, what + " with states");
    expect_gradients([&](const std::vector<Numbers> &moved) { return outputs(z, tree, moved); }, inputs, slopes, grad.numbers(), tolerance, what);
}

}  // namespace

void test_recurrence() {
    const Tree rows{{70, 0, 64, 1, 33, 5}, {-1, 0, 1, 1, -1, 4}}, branches{{3, 1, 1, 1, 65, 1, 2}, {-1, 0, 0, 1, 0, 4, 2}};
    for (const Tree &tree : {rows, branches})
        for (const bool delta : {false, true})
            for (const Shape &shape : {Shape{0, 2, 2, 32, 64, delta}, Shape{0, 6, 1, 64, 32, !delta}}) {
                test<float>(tree, shape, delta);
                test<bf16>(tree, shape, delta);
            }
    const std::vector<int64_t> table = rows.table();
    const int64_t length = rows.length();
    expect(dw_recurrence(0, table.data(), rows.count(), length + 1, 1, 1, 32, 32, 1, 0, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr) != 0,
           "a length that differs from the segments is rejected");
    expect(dw_recurrence(0, table.data(), rows.count(), length, 1, 1, 33, 32, 1, 0, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr) != 0,
           "a head size that is no multiple of 32 is rejected");
}
