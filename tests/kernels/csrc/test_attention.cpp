// Tests of attention over prefix trees against a dense float64 reference with closed-form gradients.
#include <algorithm>

#include "check.h"
#include "kernels.h"
#include "tests.h"
#include "tree.h"

namespace {

struct How {
    int64_t heads, key_heads, d, dv, window;
    double cap;
    int causal;
    int64_t every;  // stride of the tokens with a query; 0: every token, without a list of rows
};

bool sees(const std::vector<int64_t> &t, int64_t S, int64_t query, int64_t key, const How &how) {
    auto segment = [&](int64_t at) {
        int64_t s = 0;
        while (at >= t[S + s]) s++;
        return s;
    };
    const int64_t a = segment(query), b = segment(key);
    const int64_t back = t[3 * S + a] + query - t[a] - (t[3 * S + b] + key - t[b]);
    if (how.window && back >= how.window) return false;
    if (a == b) return !how.causal || back >= 0;
    for (int64_t s = t[2 * S + a]; s >= 0; s = t[2 * S + s])
        if (s == b) return true;
    return false;
}

template <class T>
void test_tree(const Tree &tree, const How &how) {
    const std::string what = "attention type " + std::to_string(type_of<T>()) + " T " + std::to_string(tree.length()) + " window " +
                             std::to_string(how.window) + " heads " + std::to_string(how.heads) + "/" + std::to_string(how.key_heads) + " size " +
                             std::to_string(how.d);
    const int64_t L = tree.length(), S = tree.count(), H = how.heads, G = H / how.key_heads, d = how.d, dv = how.dv, gap = 2;
    const std::vector<int64_t> values = tree.table();
    Buffer<int64_t> table(4 * S);
    std::copy(values.begin(), values.end(), table.data());
    std::vector<int64_t> places;
    for (int64_t i = 0; i < L; i += std::max<int64_t>(1, how.every)) places.push_back(i);
    const int64_t P = (int64_t)places.size();
    Buffer<int64_t> picked(P);
    std::copy(places.begin(), places.end(), picked.data());
    const int64_t *const list = how.every ? picked.data() : nullptr;
    // Heads are separated by a gap. The last head has no gap after it.
    auto size = [&](int64_t tokens, int64_t heads, int64_t n) { return tokens * heads * (n + gap) - gap; };
    Buffer<T> q(size(P, H, d)), k(size(L, how.key_heads, d)), v(size(L, how.key_heads, dv)), out(size(P, H, dv)), grad(out.count), dq(q.count),
        dk(k.count), dv_out(v.count);
    Buffer<float> logs(H * P);
    q.fill(), k.fill(), v.fill(), grad.fill();
    const int64_t sq = H * (d + gap), sk = how.key_heads * (d + gap), sv = how.key_heads * (dv + gap), so = H * (dv + gap);
    const int64_t strides[16] = {sq, d + gap, sk, d + gap, sv, dv + gap, so, dv + gap, so, dv + gap, sq, d + gap, sk, d + gap, sv, dv + gap};
    const double scaling = 0.3;
    expect(dw_attention(type_of<T>(), table.data(), S, L, how.window, how.causal, H, how.key_heads, d, dv, (float)scaling, (float)how.cap, list, P,
                        q.data(), k.data(), v.data(), out.data(), strides, logs.data()) == 0, what);
    expect(dw_attention_backward(type_of<T>(), table.data(), S, L, how.window, how.causal, H, how.key_heads, d, dv, (float)scaling, (float)how.cap,
                                 list,
                                 P, q.data(), k.data(), v.data(), out.data(), grad.data(), dq.data(), dk.data(), dv_out.data(), strides,
                                 logs.data()) == 0, what + " backward");
    Numbers ours, exact, ours_q, exact_q, ours_k, ours_v, exact_k(L * how.key_heads * d), exact_v(L * how.key_heads * dv);
    for (int64_t h = 0; h < H; h++)
        for (int64_t p = 0; p < P; p++) {
            const int64_t kh = h / G;
            auto Q = [&](int64_t i) { return q.at(p * sq + h * (d + gap) + i); };
            auto K = [&](int64_t t, int64_t i) { return k.at(t * sk + kh * (d + gap) + i); };
            auto V = [&](int64_t t, int64_t i) { return v.at(t * sv + kh * (dv + gap) + i); };
            auto D = [&](int64_t i) { return grad.at(p * so + h * (dv + gap) + i); };
            std::vector<int64_t> seen;
            Numbers weight, bend;
            double top = -1e300, sum = 0, delta = 0;
            for (int64_t t = 0; t < L; t++) {
                if (!sees(values, S, places[p], t, how)) continue;
                double s = 0;
                for (int64_t i = 0; i < d; i++) s += scaling * Q(i) * K(t, i);
                bend.push_back(how.cap > 0 ? 1 - std::pow(std::tanh(s / how.cap), 2) : 1);
                if (how.cap > 0) s = how.cap * std::tanh(s / how.cap);
                seen.push_back(t), weight.push_back(s), top = std::max(top, s);
            }
            for (double &w : weight) sum += w = std::exp(w - top);
            for (double &w : weight) w /= sum;
            for (int64_t i = 0; i < dv; i++) {
                double o = 0;
                for (size_t j = 0; j < seen.size(); j++) o += weight[j] * V(seen[j], i);
                exact.push_back(o), ours.push_back(out.at(p * so + h * (dv + gap) + i));
                delta += o * D(i);
            }
            Numbers of_q(d);
            for (size_t j = 0; j < seen.size(); j++) {
                double slope = -delta;
                for (int64_t i = 0; i < dv; i++) {
                    slope += V(seen[j], i) * D(i);
                    exact_v[(seen[j] * how.key_heads + kh) * dv + i] += weight[j] * D(i);
                }
                slope *= weight[j] * bend[j] * scaling;
                for (int64_t i = 0; i < d; i++) {
                    of_q[i] += slope * K(seen[j], i);
                    exact_k[(seen[j] * how.key_heads + kh) * d + i] += slope * Q(i);
                }
            }
            for (int64_t i = 0; i < d; i++) exact_q.push_back(of_q[i]), ours_q.push_back(dq.at(p * sq + h * (d + gap) + i));
        }
    for (int64_t r = 0; r < L * how.key_heads; r++) {
        for (int64_t i = 0; i < d; i++) ours_k.push_back(dk.at(r * (d + gap) + i));
        for (int64_t i = 0; i < dv; i++) ours_v.push_back(dv_out.at(r * (dv + gap) + i));
    }
    const double near = sizeof(T) == 4 ? 2e-5 : 2e-2;
    expect_close(ours, exact, near, what + " out"), expect_close(ours_v, exact_v, near, what + " of values");
    // If a query sees only one key, the gradient of its score is zero. The rounding error of the difference between two
    // equal sums of dv products (about 2^-24 of their magnitude) is compared with values of size 0.25.
    expect_close(ours_q, exact_q, near, what + " of queries", 0.25), expect_close(ours_k, exact_k, near, what + " of keys", 0.25);
}

// Out-of-range arguments are rejected before anything is written.
void test_refusals() {
    Buffer<float> q(8 * 2 * 4), out(8 * 2 * 4), logs(16);
    q.fill(), out.fill();
    const Numbers before = out.numbers();
    const int64_t strides[8] = {8, 4, 8, 4, 8, 4, 8, 4};
    auto call = [&](std::vector<int64_t> table, std::vector<int64_t> picked) {
        return dw_attention(0, table.data(), (int64_t)table.size() / 4, 8, 0, 1, 2, 2, 4, 4, 1.0f, 0.0f, picked.empty() ? nullptr : picked.data(),
                            (int64_t)picked.size(), q.data(), q.data(), q.data(), out.data(), strides, logs.data());
    };
    expect(call({0, 5, 5, 9, -1, 0, 0, 5}, {}) == 2, "a segment beyond the row");
    expect(call({0, 5, 5, 7, -1, 0, 0, 5}, {}) == 2, "segments short of the row");
    expect(call({0, 6, 5, 8, -1, 0, 0, 5}, {}) == 2, "a gap between segments");
    expect(call({0, 4, 5, 8, -1, 0, 0, 5}, {}) == 2, "segments over each other");
    expect(call({0, 5, 5, 8, 1, -1, 0, 0}, {}) == 2, "a parent after its child");
    expect(call({0, 5, 5, 8, -1, -7, 0, 0}, {}) == 2, "a parent that is none");
    expect(call({0, 5, 5, 8, -1, 0, 0, 4}, {}) == 2, "a wrong offset");
    expect(call({0, 5, 5, 8, -1, 0, 0, 5}, {2, 8}) == 2, "a query beyond the row");
    expect(call({0, 5, 5, 8, -1, 0, 0, 5}, {-1, 3}) == 2, "a query before the row");
    expect(call({0, 5, 5, 8, -1, 0, 0, 5}, {3, 3}) == 2, "queries that do not ascend");
    expect_close(out.numbers(), before, 0, "a refusal writes nothing");
    expect(call({0, 5, 5, 8, -1, 0, 0, 5}, {}) == 0, "a layout that is right");
}

}  // namespace

void test_attention() {
    const Tree one{{1}, {-1}}, row{{70}, {-1}}, packed{{3, 1, 40, 17}, {-1, -1, -1, -1}}, tree{{40, 9, 1, 30, 12, 101}, {-1, 0, 0, 1, -1, 4}};
    for (const Tree &t : {one, row, packed, tree})
        for (const How &how : {How{4, 2, 8, 8, 0, 0, 1, 0}, How{9, 3, 20, 20, 5, 0, 1, 0}, How{3, 3, 48, 34, 0, 20, 1, 0}, How{5, 1, 6, 6, 1, 0, 1,
            0},
                               How{4, 2, 8, 8, 40, 0, 1, 3}, How{2, 1, 64, 64, 0, 0, 1, 7}, How{4, 4, 10, 12, 0, 0, 0, 0}})
            test_tree<float>(t, how), test_tree<bf16>(t, how);
    test_refusals();
}
