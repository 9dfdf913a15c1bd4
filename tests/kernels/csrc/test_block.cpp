// A whole block in one call each way against the single kernels called one after another: the same bits.
#include <memory>

#include "block.h"
#include "check.h"
#include "kernels.h"
#include "tests.h"

namespace {

template <class T>
struct Weights {  // of one layer
    const int64_t in, out, rank;
    Buffer<T> w, bias;
    Buffer<int8_t> w_int8;
    Buffer<float> scale, A, B, of_A, of_B, A_again, B_again;
    const bool int8;

    Weights(int64_t in, int64_t out, int64_t rank, bool int8)
        : in(in), out(out), rank(rank), w(in * out), bias(out), w_int8(in * out), scale(out), A(in * rank), B(rank * out), of_A(A.count), of_B(B.count),
          A_again(A.count), B_again(B.count), int8(int8) {
        w.fill(0.2), bias.fill(0.1), A.fill(0.2), B.fill(0.2);
        for (int64_t i = 0; i < w_int8.count; i++) w_int8[i] = (int8_t)(random_number() * 40);
        for (int64_t i = 0; i < out; i++) scale[i] = 0.003f;
    }
    const void *weight() const { return int8 ? (const void *)w_int8.data() : w.data(); }
    const float *scales() const { return int8 ? scale.data() : nullptr; }
    Layer layer() const {
        return Layer{weight(), scales(), nullptr, bias.data(), rank ? A.data() : nullptr, rank ? B.data() : nullptr, in, out, rank,
                     int8 ? 2 : type_of<T>(), 0, 0.5f};
    }
};

// The tensors of a block that is composed of single calls.
template <class T>
struct Composed {
    const BlockParts &b;
    const int64_t M;
    const int64_t *const table, count;
    const float *const cosine, *const sine;
    std::vector<std::unique_ptr<Buffer<T>>> kept;

    T *room(int64_t width) { return (kept.push_back(std::make_unique<Buffer<T>>(M * width)), kept.back()->data()); }

    void linear(const Layer &l, const T *x, const T *added, T *y, T *h) {
        Buffer<uint8_t> x_int8(M * l.in);
        Buffer<float> scales(M);
        expect(dw_linear((int)b.type, M, l.out, l.in, x, (int)l.weight_type, l.weight, 1, l.scale, l.smooth, l.bias, 0, l.A, l.B, l.rank, l.scaling,
                         added, x_int8.data(), scales.data(), 1, y, h) == 0, "linear");
    }
    void linear_backward(const Layer &l, const T *grad, const T *added, T *dx, T *narrow) {
        Buffer<uint8_t> grad_int8(M * l.out);
        Buffer<float> scales(M * ((l.out + 127) / 128));
        expect(dw_linear_backward((int)b.type, M, l.out, l.in, grad, l.weight, 1, l.scale, l.smooth, l.A, l.B, l.rank, l.scaling, added,
                                  grad_int8.data(), scales.data(), dx, narrow) == 0, "linear backward");
    }
    void factors(const Layer &l, const T *x, const T *h, const T *grad, const T *narrow, Weights<T> &into) {
        if (l.rank)
            expect(dw_factors_backward((int)b.type, M, l.in, l.out, l.rank, x, h, grad, narrow, l.scaling, into.A_again.data(), into.B_again.data()) == 0,
                   "factors");
    }
    void norm(const RowNorm &n, const T *x, T *y, float *stats) {
        expect(dw_norm((int)b.type, M, b.hidden(), x, b.hidden(), n.weight, n.bias, n.offset, n.eps, (int)n.centred, y, stats) == 0, "norm");
    }
    void norm_backward(const RowNorm &n, const T *dy, const T *x, const float *stats, const T *added, T *dx) {
        expect(dw_norm_backward((int)b.type, M, b.hidden(), dy, x, b.hidden(), n.weight, n.offset, (int)n.centred, stats, added, dx) == 0, "norm backward");
    }
    void rotate(T *x, int64_t heads, int backward) {
        const int64_t width = heads * b.head_size;
        if (b.turned)
            expect(dw_rotate((int)b.type, M, heads, b.head_size, b.turned, x, width, cosine, sine, backward, x, width) == 0, "rotate");
    }

    void run(const T *x, const T *grad, T *y, T *dx, std::vector<std::unique_ptr<Weights<T>>> &w) {
        const Layer layers[7] = {b.query, b.key, b.value, b.output, b.gate, b.up, b.down};
        T *h[7], *g[7];
        for (int i = 0; i < 7; i++) h[i] = room(layers[i].rank), g[i] = room(layers[i].rank);
        Buffer<float> stats(2 * M), stats1(2 * M), logs(M * b.heads);
        T *const n = room(b.hidden()), *const q = room(b.wide()), *const k = room(b.narrow()), *const v = room(b.narrow()), *const o = room(b.wide());
        T *const x1 = room(b.hidden()), *const n1 = room(b.hidden()), *const gate = room(b.inner()), *const up = room(b.inner()), *const f = room(b.inner());
        norm(b.first, x, n, stats.data());
        linear(b.query, n, nullptr, q, h[0]), linear(b.key, n, nullptr, k, h[1]), linear(b.value, n, nullptr, v, h[2]);
        rotate(q, b.heads, 0), rotate(k, b.key_heads, 0);
        const int64_t d = b.head_size, W = b.wide(), N = b.narrow(), s[16] = {W, d, N, d, N, d, W, d, W, d, W, d, N, d, N, d};
        expect(dw_attention((int)b.type, table, count, M, b.window, 1, b.heads, b.key_heads, d, d, b.scaling, b.softcap, nullptr, M, q, k, v, o, s,
                            logs.data()) == 0, "attention");
        linear(b.output, o, x, x1, h[3]);
        norm(b.second, x1, n1, stats1.data());
        linear(b.gate, n1, nullptr, gate, h[4]), linear(b.up, n1, nullptr, up, h[5]);
        expect(dw_activation((int)b.type, (int)b.activation, M, b.inner(), gate, up, f) == 0, "activation");
        linear(b.down, f, x1, y, h[6]);

        T *const df = room(b.inner()), *const dg = room(b.inner()), *const du = room(b.inner()), *const fa = room(b.inner()), *const dn = room(b.hidden());
        T *const dn1 = room(b.hidden()), *const dx1 = room(b.hidden()), *const d_o = room(W), *const dq = room(W), *const dk = room(N), *const dv = room(N);
        linear_backward(b.down, grad, nullptr, df, g[6]);
        expect(dw_activation_backward((int)b.type, (int)b.activation, M, b.inner(), df, gate, up, dg, du, fa) == 0, "activation backward");
        factors(b.down, fa, h[6], grad, g[6], *w[6]);
        linear_backward(b.gate, dg, nullptr, dn1, g[4]), linear_backward(b.up, du, dn1, dn1, g[5]);
        factors(b.gate, n1, h[4], dg, g[4], *w[4]), factors(b.up, n1, h[5], du, g[5], *w[5]);
        norm_backward(b.second, dn1, x1, stats1.data(), grad, dx1);
        linear_backward(b.output, dx1, nullptr, d_o, g[3]);
        factors(b.output, o, h[3], dx1, g[3], *w[3]);
        expect(dw_attention_backward((int)b.type, table, count, M, b.window, 1, b.heads, b.key_heads, d, d, b.scaling, b.softcap, nullptr, M, q, k, v, o,
                                     d_o, dq, dk, dv, s, logs.data()) == 0, "attention backward");
        rotate(dq, b.heads, 1), rotate(dk, b.key_heads, 1);
        linear_backward(b.query, dq, nullptr, dn, g[0]), linear_backward(b.key, dk, dn, dn, g[1]), linear_backward(b.value, dv, dn, dn, g[2]);
        factors(b.query, n, h[0], dq, g[0], *w[0]), factors(b.key, n, h[1], dk, g[1], *w[1]), factors(b.value, n, h[2], dv, g[2], *w[2]);
        norm_backward(b.first, dn, x, stats.data(), dx1, dx);
    }
};

template <class T>
void test_once(const std::vector<int64_t> &lengths, int64_t rank, bool int8, bool turned) {
    const std::string what = "block type " + std::to_string(type_of<T>()) + " rank " + std::to_string(rank) + (int8 ? " int8" : "");
    const int64_t hidden = 36, heads = 3, key_heads = 1, d = 12, inner = 52, S = (int64_t)lengths.size();
    int64_t M = 0;
    Buffer<int64_t> table(4 * S);
    for (int64_t s = 0; s < S; M += lengths[s], s++) table[s] = M, table[S + s] = M + lengths[s], table[2 * S + s] = -1, table[3 * S + s] = 0;
    const int64_t sizes[7][2] = {{hidden, heads * d}, {hidden, key_heads * d}, {hidden, key_heads * d}, {heads * d, hidden}, {hidden, inner},
                                 {hidden, inner},     {inner, hidden}};
    std::vector<std::unique_ptr<Weights<T>>> w;
    for (auto &size : sizes) w.push_back(std::make_unique<Weights<T>>(size[0], size[1], rank, int8));
    Buffer<T> norm1(hidden), norm2(hidden), x(M * hidden), y(x.count), y_again(x.count), grad(x.count), dx(x.count), dx_again(x.count);
    Buffer<float> cosine(M * d), sine(M * d);
    norm1.fill(), norm2.fill(), x.fill(), grad.fill(), cosine.fill(), sine.fill();
    const BlockParts b{type_of<T>(), heads, key_heads, d, 1, 0, turned ? d : 0, 0.3f, 0.0f, RowNorm{norm1.data(), nullptr, 1e-5f, 0, 0},
                       RowNorm{norm2.data(), nullptr, 1e-5f, 1, 1}, w[0]->layer(), w[1]->layer(), w[2]->layer(), w[3]->layer(), w[4]->layer(),
                       w[5]->layer(), w[6]->layer()};
    int64_t bytes[3];
    expect(dw_block_sizes(&b, M, bytes) == 0, what + " sizes");
    // Whole numbers of lines: what the caller gives begins on one.
    auto room = [](int64_t n) { return std::make_unique<Buffer<char>>((n + 63) / 64 * 64); };
    const auto kept = room(bytes[0]), scratch = room(bytes[1]), scratch_backward = room(bytes[2]);
    const float *const c = turned ? cosine.data() : nullptr, *const s = turned ? sine.data() : nullptr;
    expect(dw_block(&b, M, x.data(), table.data(), S, c, s, kept->data(), scratch->data(), y.data()) == 0, what);
    float *into[14];
    for (int i = 0; i < 7; i++) into[2 * i] = rank ? w[i]->of_A.data() : nullptr, into[2 * i + 1] = rank ? w[i]->of_B.data() : nullptr;
    expect(dw_block_backward(&b, M, x.data(), table.data(), S, c, s, kept->data(), scratch_backward->data(), grad.data(), dx.data(), into) == 0,
           what + " backward");
    Composed<T> composed{b, M, table.data(), S, c, s, {}};
    composed.run(x.data(), grad.data(), y_again.data(), dx_again.data(), w);
    expect(y.same(y_again), what + " gives the same outputs"), expect(dx.same(dx_again), what + " gives the same gradient");
    for (int i = 0; i < 7 && rank; i++)
        expect(w[i]->of_A.same(w[i]->A_again) && w[i]->of_B.same(w[i]->B_again), what + " gives the same gradients of factors " + std::to_string(i));
    // Factors alone, where nobody needs dx.
    if (!rank) return;
    Buffer<float> before(w[0]->of_A.count);
    before.copy(w[0]->of_A);
    expect(dw_block_backward(&b, M, x.data(), table.data(), S, c, s, kept->data(), scratch_backward->data(), grad.data(), nullptr, into) == 0, what);
    expect(w[0]->of_A.same(before), what + " gives the same factors without dx");
}

}  // namespace

void test_block() {
    for (bool int8 : {false, true})
        for (int64_t rank : {0, 4, 18}) {
            test_once<float>({9, 1, 20}, rank, int8, true), test_once<bf16>({9, 1, 20}, rank, int8, true);
            test_once<bf16>({1}, rank, int8, false), test_once<bf16>({600, 700}, rank, int8, true);
        }
}
