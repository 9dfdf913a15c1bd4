// Tests that a transformer block computed in one call is bit-identical to a sequence of single kernel calls.
#include <memory>

#include "block.h"
#include "check.h"
#include "kernels.h"
#include "stored_blocks.h"
#include "tests.h"

namespace {

// Configuration of a block. The sizes are the same for all tests.
struct Form {
    const char *name;
    int64_t split = 0, gated = 1, joint_gate = 0, parallel = 0, causal = 1, centered = 0, by_column = 1;
    bool before = true, after = false, post = false, head_norms = false, rotary_dims = true;
};

template <class T>
struct Weights {  // of one layer
    const int64_t in, out, rank;
    Buffer<T> w, bias;
    Buffer<int8_t> w_int8;
    Buffer<float> scale, A, B, grad_A, grad_B, A_again, B_again;
    const bool int8;
    std::unique_ptr<StoredBlocks> blocks;  // replaces w if set

    Weights(int64_t in, int64_t out, int64_t rank, bool int8, int format)
        : in(in), out(out), rank(rank), w(in * out), bias(out), w_int8(in * out), scale(out), A(in * rank), B(rank * out), grad_A(A.count),
            grad_B(B.count),
          A_again(A.count), B_again(B.count), int8(int8) {
        w.fill(0.2), bias.fill(0.1), A.fill(0.2), B.fill(0.2);
        for (int64_t i = 0; i < w_int8.count; i++) w_int8[i] = (int8_t)(random_number() * 40);
        for (int64_t i = 0; i < out; i++) scale[i] = 0.003f;
        if (format && in % StoredBlocks::numbers(format) == 0) blocks = std::make_unique<StoredBlocks>(format, out, in);
    }
    Layer layer(int64_t by_column) const {
        if (blocks)
            return Layer{&blocks->at, nullptr, nullptr, bias.data(), rank ? A.data() : nullptr, rank ? B.data() : nullptr, in, out, rank,
                blocks->format,
                         1,           0,       0,       0.5f};
        return Layer{int8 ? (const void *)w_int8.data() : w.data(),
                     int8 ? scale.data() : nullptr,
                     nullptr,
                     bias.data(),
                     rank ? A.data() : nullptr,
                     rank ? B.data() : nullptr,
                     in,
                     out,
                     rank,
                     int8 ? 2 : type_of<T>(),
                     int8 ? 1 : by_column,
                     0,
                     int8 && in > out,  // the block then has layers of both kinds
                     0.5f};
    }
};

// A block composed of single calls with separate tensors.
template <class T>
struct Composed {
    const BlockParts &b;
    const int64_t M, P;
    const int64_t *const output_rows, *const table, count;
    const float *const cosine, *const sine;
    std::vector<std::unique_ptr<Weights<T>>> &w;
    std::vector<std::unique_ptr<Buffer<T>>> kept;
    std::vector<std::unique_ptr<Buffer<float>>> floats;

    T *room(int64_t rows, int64_t width) { return (kept.push_back(std::make_unique<Buffer<T>>(rows * width)), kept.back()->data()); }
    float *numbers(int64_t n) { return (floats.push_back(std::make_unique<Buffer<float>>(n)), floats.back()->data()); }

    // Gather the output rows, and scatter rows to their positions in a tensor of zeros.
    template <class N>
    const N *at(const N *x, int64_t width) {
        if (!output_rows) return x;
        N *y;
        if constexpr (sizeof(N) == sizeof(T)) y = (N *)room(P, width);
        else y = (N *)numbers(P * width);
        for (int64_t p = 0; p < P; p++) memcpy(y + p * width, x + output_rows[p] * width, width * sizeof(N));
        return y;
    }
    const T *spread(const T *x, int64_t width) {
        if (!output_rows) return x;
        T *y = room(M, width);
        memset(y, 0, M * width * sizeof(T));
        for (int64_t p = 0; p < P; p++) memcpy(y + output_rows[p] * width, x + p * width, width * sizeof(T));
        return y;
    }
    const T *sum(const T *x, const T *y, int64_t rows) {
        T *z = room(rows, b.hidden());
        expect(dw_add((int)b.type, rows * b.hidden(), x, y, z) == 0, "sum");
        return z;
    }

    struct Linear {  // call of a layer and the values needed by its backward pass
        const Layer *l;
        int64_t rows;
        const T *x;
        T *y, *h, *g;
    };
    Linear linear(const Layer &l, const T *x, int64_t rows, const T *added = nullptr) {
        Linear c{&l, rows, x, room(rows, l.out), room(rows, l.rank), room(rows, l.rank)};
        Buffer<uint8_t> x_int8(rows * l.in);
        Buffer<float> scales(rows * ((l.in + 127) / 128));
        expect(dw_linear((int)b.type, rows, l.out, l.in, x, (int)l.weight_type, l.weight, (int)l.by_column, l.scale, l.smooth, l.bias, 0, l.A, l.B,
                         l.rank, l.scaling, added, x_int8.data(), scales.data(), (int)l.in_blocks, 1, c.y, c.h) == 0, "linear");
        return c;
    }
    const T *backward(const Linear &c, const T *grad, const T *added, const T *x = nullptr) {
        const Layer &l = *c.l;
        T *dx = room(c.rows, l.in);
        Buffer<uint8_t> grad_int8(c.rows * l.out);
        Buffer<float> scales(c.rows * ((l.out + 127) / 128));
        expect(dw_linear_backward((int)b.type, c.rows, l.out, l.in, grad, (int)l.weight_type, l.weight, (int)l.by_column, l.scale, l.smooth, l.A, l.B,
                                  l.rank, l.scaling, added, b.has_int8_gradient(l) ? grad_int8.data() : nullptr, scales.data(), dx, c.g) == 0,
               "linear backward");
        for (auto &one : w)
            if (l.rank && one->A.data() == l.A)
                expect(dw_factors_backward((int)b.type, c.rows, l.in, l.out, l.rank, x ? x : c.x, c.h, grad, c.g, l.scaling, one->A_again.data(),
                                           one->B_again.data()) == 0, "factors");
        return dx;
    }

    struct Norm {  // call of a norm; y is x if the norm is absent
        const RowNorm *n;
        int64_t rows, D;
        const T *x, *y;
        float *stats;
    };
    Norm norm(const RowNorm &n, const T *x, int64_t rows, int64_t D) {
        if (!n.used) return Norm{&n, rows, D, x, x, nullptr};
        T *y = room(rows, D);
        float *stats = numbers(2 * rows);
        expect(dw_norm((int)b.type, rows, D, x, D, n.weight, n.bias, n.offset, n.eps, (int)n.centered, y, stats) == 0, "norm");
        return Norm{&n, rows, D, x, y, stats};
    }
    const T *backward(const Norm &c, const T *dy, const T *added) {
        if (!c.n->used) return dy;
        T *dx = room(c.rows, c.D);
        expect(dw_norm_backward((int)b.type, c.rows, c.D, dy, c.x, c.D, c.n->weight, c.n->offset, (int)c.n->centered, c.stats, added, dx) == 0,
               "norm backward");
        return dx;
    }

    struct HalfEndTensors {
        Linear layer;
        Norm after, post;
    };
    HalfEndTensors end(const Layer &l, const T *x, const T *stream, const HalfNorms &norms) {
        Linear layer = linear(l, x, P, norms.after.used ? nullptr : stream);
        Norm after = norm(norms.after, layer.y, P, b.hidden());
        return HalfEndTensors{layer, after, norm(norms.post, norms.after.used ? sum(stream, after.y, P) : after.y, P, b.hidden())};
    }

    const T *rotated(const T *x, int64_t rows, int64_t heads, int backward) {
        const int64_t width = heads * b.head_size;
        if (!b.rotary_dims) return x;
        const float *c = rows == P ? at(cosine, b.rotary_dims) : cosine, *s = rows == P ? at(sine, b.rotary_dims) : sine;
        T *y = room(rows, width);
        expect(dw_rotate((int)b.type, rows, heads, b.head_size, b.rotary_dims, x, width, c, s, backward, y, width) == 0, "rotate");
        return y;
    }
    // Heads of part 0 (queries), 1 (keys) or 2 (values) of rows that contain all three.
    int64_t head_at(int part, int64_t head) const {
        const int64_t group = b.heads / b.key_heads;
        if (b.split == GROUPED) return part ? head * (group + 2) + group + part - 1 : head / group * (group + 2) + head % group;
        return (part > 0) * b.heads + (part > 1) * b.key_heads + head;
    }
    const T *split_range(const T *joint, int part) {
        const int64_t heads = part ? b.key_heads : b.heads, d = b.head_size;
        T *y = room(M, heads * d);
        for (int64_t m = 0; m < M; m++)
            for (int64_t h = 0; h < heads; h++) memcpy(y + (m * heads + h) * d, joint + m * b.query.out + head_at(part, h) * d, d * sizeof(T));
        return y;
    }
    void into_joint(const T *x, int part, T *joint) {
        const int64_t heads = part ? b.key_heads : b.heads, d = b.head_size;
        for (int64_t m = 0; m < M; m++)
            for (int64_t h = 0; h < heads; h++) memcpy(joint + m * b.query.out + head_at(part, h) * d, x + (m * heads + h) * d, d * sizeof(T));
    }

    void run(const T *x, const T *grad, T *y, T *dx) {
        const int64_t d = b.head_size, W = b.query_size(), N = b.key_size(), H = b.hidden(), I = b.inner();
        // forward
        const Norm n = norm(b.first.before, x, M, H);
        Linear of_q, of_k, of_v;
        const T *q, *k, *v;
        if (b.split == SEPARATE) {
            of_k = linear(b.key, n.y, M), of_v = linear(b.value, n.y, M), of_q = linear(b.query, at(n.y, H), P);
            q = of_q.y, k = of_k.y, v = of_v.y;
        } else {
            of_q = linear(b.query, n.y, M);
            q = at(split_range(of_q.y, 0), W), k = split_range(of_q.y, 1), v = split_range(of_q.y, 2);
        }
        const Norm n_q = norm(b.query_norm, q, P * b.heads, d), n_k = norm(b.key_norm, k, M * b.key_heads, d);
        q = rotated(n_q.y, P, b.heads, 0), k = rotated(n_k.y, M, b.key_heads, 0);
        T *const o = room(P, W);
        float *const logs = numbers(P * b.heads);
        const int64_t s[16] = {W, d, N, d, N, d, W, d, W, d, W, d, N, d, N, d};
        expect(dw_attention((int)b.type, table, count, M, b.window, (int)b.causal, b.heads, b.key_heads, d, d, b.scaling, b.softcap, output_rows,
                            P, q, k, v, o,
                            s, logs) == 0, "attention");
        const T *const x_p = at(x, H);
        const HalfEndTensors second_end = end(b.output, o, x_p, b.first);
        const T *const x1 = second_end.post.y, *const read = b.parallel ? x_p : x1;
        const Norm n1 = norm(b.second.before, read, P, H);
        const Linear of_gate = linear(b.gate, n1.y, P);
        Linear of_up{};
        const T *gate = of_gate.y, *up = nullptr;
        if (b.up.weight) of_up = linear(b.up, n1.y, P), up = of_up.y;
        if (b.gate_has_up()) {
            T *const one = room(P, I), *const other = room(P, I);
            for (int64_t p = 0; p < P; p++) memcpy(one + p * I, of_gate.y + 2 * p * I, I * sizeof(T)), memcpy(other + p * I,
                of_gate.y + (2 * p + 1) * I, I * sizeof(T));
            gate = one, up = other;
        }
        T *const f = room(P, I);
        expect(dw_activation((int)b.type, (int)b.activation, P, I, gate, up, f) == 0, "activation");
        const HalfEndTensors end2 = end(b.down, f, x1, b.second);
        memcpy(y, end2.post.y, P * H * sizeof(T));

        // backward
        const T *const g2 = backward(end2.post, grad, nullptr);
        const T *const df = backward(end2.layer, backward(end2.after, g2, nullptr), nullptr);
        T *const dg = room(P, I), *const du = room(P, I), *const fa = room(P, I);
        expect(dw_activation_backward((int)b.type, (int)b.activation, P, I, df, gate, up, dg, up ? du : nullptr, fa) == 0, "activation backward");
        const T *const of_stream = b.parallel ? nullptr : g2, *const begun1 = b.second.before.used ? nullptr : of_stream;
        const T *dn1;
        if (b.gate_has_up()) {
            T *const both = room(P, 2 * I);
            for (int64_t p = 0; p < P; p++) memcpy(both + 2 * p * I, dg + p * I, I * sizeof(T)), memcpy(both + (2 * p + 1) * I, du + p * I,
                I * sizeof(T));
            dn1 = backward(of_gate, both, begun1);
        } else dn1 = backward(of_gate, dg, begun1);
        if (b.up.weight) dn1 = backward(of_up, du, dn1);
        const T *const d_read = backward(n1, dn1, of_stream), *const d_x1 = b.parallel ? g2 : d_read;
        const T *const g1 = backward(second_end.post, d_x1, nullptr);
        const T *const d_o = backward(second_end.layer, backward(second_end.after, g1, nullptr), nullptr);
        T *const dq = room(P, W), *const dk = room(M, N), *const dv = room(M, N);
        expect(dw_attention_backward((int)b.type, table, count, M, b.window, (int)b.causal, b.heads, b.key_heads, d, d, b.scaling, b.softcap,
                                     output_rows, P, q,
                                     k, v, o, d_o, dq, dk, dv, s, logs) == 0, "attention backward");
        const T *const raw_q = backward(n_q, rotated(dq, P, b.heads, 1), nullptr), *const raw_k = backward(n_k, rotated(dk, M, b.key_heads, 1),
            nullptr);
        const T *const above = spread(g1, H), *const begun = b.first.before.used ? nullptr : above;
        const T *dn;
        if (b.split == SEPARATE) {
            dn = backward(of_q, raw_q, output_rows ? nullptr : begun);
            if (output_rows) dn = spread(dn, H), dn = begun ? sum(dn, begun, M) : dn;
            dn = backward(of_v, dv, backward(of_k, raw_k, dn));
        } else {
            T *const joint = room(M, b.query.out);
            into_joint(spread(raw_q, W), 0, joint), into_joint(raw_k, 1, joint), into_joint(dv, 2, joint);
            dn = backward(of_q, joint, begun);
        }
        const T *found = backward(n, dn, above);
        if (b.parallel) found = sum(found, spread(d_read, H), M);
        memcpy(dx, found, M * H * sizeof(T));
    }
};

template <class T>
void test_once(const Form &form, const std::vector<int64_t> &lengths, int64_t rank, bool int8, bool pick, int format = 0,
               bool int8_gradients = false) {
    const std::string what = std::string("block ") + form.name + " type " + std::to_string(type_of<T>()) + " rank " + std::to_string(rank) +
                             (int8 ? " int8" : int8_gradients ? " int8 gradients" : "") + (pick ? " picked" : "") + (format ? " format " + std::to_string(format) : "");
    // For block formats, the input sizes of all layers must be multiples of the block size.
    const int64_t hidden = format ? 64 : 36, heads = 4, key_heads = 2, d = format ? 16 : 12, inner = format ? 128 : 52, S = (int64_t)lengths.size();
    int64_t M = 0;
    Buffer<int64_t> table(4 * S);
    for (int64_t s = 0; s < S; M += lengths[s], s++) table[s] = M, table[S + s] = M + lengths[s], table[2 * S + s] = -1, table[3 * S + s] = 0;
    const int64_t P = pick ? (M + 2) / 3 : M;
    Buffer<int64_t> places(P);
    for (int64_t p = 0; p < P; p++) places[p] = 3 * p;
    const int64_t *const output_rows = pick ? places.data() : nullptr;
    const bool apart = form.split == 0;
    const int64_t sizes[7][2] = {{hidden, apart ? heads * d : (heads + 2 * key_heads) * d},
                                 {hidden, apart ? key_heads * d : 0},
                                 {hidden, apart ? key_heads * d : 0},
                                 {heads * d, hidden},
                                 {hidden, form.joint_gate ? 2 * inner : inner},
                                 {hidden, form.gated && !form.joint_gate ? inner : 0},
                                 {inner, hidden}};
    std::vector<std::unique_ptr<Weights<T>>> w;
    for (auto &size : sizes) w.push_back(std::make_unique<Weights<T>>(size[0], size[1], size[1] ? rank : 0, int8, format));
    std::vector<std::unique_ptr<Buffer<T>>> of_norms;
    auto norm = [&](bool used, int64_t width) {
        for (int i = 0; i < 2; i++) of_norms.push_back(std::make_unique<Buffer<T>>(width)), of_norms.back()->fill();
        if (!used) return RowNorm{};
        return RowNorm{of_norms[of_norms.size() - 2]->data(), form.centered ? of_norms.back()->data() : nullptr, 1e-5f, (float)!form.centered,
            form.centered, 1};
    };
    auto half = [&] {
        const RowNorm before = norm(form.before, hidden), after = norm(form.after, hidden), post = norm(form.post, hidden);
        return HalfNorms{before, after, post};
    };
    auto layer = [&](int i) { return sizes[i][1] ? w[i]->layer(form.by_column) : Layer{}; };
    Buffer<T> x(M * hidden), y(P * hidden), y_again(y.count), grad(y.count), dx(x.count), dx_again(x.count);
    Buffer<float> cosine(M * d), sine(M * d);
    x.fill(), grad.fill(), cosine.fill(), sine.fill();
    const HalfNorms first = half(), second = half();
    const RowNorm of_query = norm(form.head_norms, d), of_key = norm(form.head_norms, d);
    const BlockParts b{type_of<T>(), heads, key_heads, d, 1, 0, form.rotary_dims ? d : 0, form.causal, form.split, form.gated, form.parallel,
        int8_gradients, 0.3f,
                       0.0f, first, second, of_query, of_key, layer(0), layer(1), layer(2), layer(3), layer(4), layer(5), layer(6)};
    int64_t bytes[3];
    expect(dw_block_sizes(&b, M, pick ? P : 0, bytes) == 0, what + " sizes");
    // Multiples of a cache line, because the caller's memory must be aligned to cache lines.
    auto room = [](int64_t n) { return std::make_unique<Buffer<char>>((n + 63) / 64 * 64); };
    const auto kept = room(bytes[0]), scratch = room(bytes[1]), scratch_backward = room(bytes[2]);
    const float *const c = form.rotary_dims ? cosine.data() : nullptr, *const s = form.rotary_dims ? sine.data() : nullptr;
    expect(dw_block(&b, M, x.data(), table.data(), S, output_rows, pick ? P : 0, c, s, kept->data(), scratch->data(), y.data()) == 0, what);
    float *into[14];
    for (int i = 0; i < 7; i++) into[2 * i] = w[i]->rank ? w[i]->grad_A.data() : nullptr, into[2 * i + 1] = w[i]->rank ? w[i]->grad_B.data() :
        nullptr;
    auto back = [&](T *to) {
        expect(dw_block_backward(&b, M, x.data(), table.data(), S, output_rows, pick ? P : 0, c, s, kept->data(), scratch_backward->data(),
                                 grad.data(), to,
                                 into) == 0, what + " backward");
    };
    back(dx.data());
    Composed<T> composed{b, M, P, output_rows, table.data(), S, c, s, w, {}, {}};
    composed.run(x.data(), grad.data(), y_again.data(), dx_again.data());
    expect(y.same(y_again), what + " gives the same outputs"), expect(dx.same(dx_again), what + " gives the same gradient");
    for (int i = 0; i < 7; i++)
        expect(w[i]->grad_A.same(w[i]->A_again) && w[i]->grad_B.same(w[i]->B_again), what + " gives the same gradients of factors " + std::to_string(i));
    // Gradients of the factors only, without dx.
    if (!rank) return;
    back(nullptr);
    for (int i = 0; i < 7; i++) expect(w[i]->grad_A.same(w[i]->A_again) && w[i]->grad_B.same(w[i]->B_again), what + " gives the same factors without dx");
    if (!pick) return;
    for (int64_t bad : {M, (int64_t)-1, places[P - 1]}) {
        Buffer<int64_t> wrong(P);
        wrong.copy(places)[P > 1 ? P - 2 : 0] = bad;
        if (P > 1)
            expect(dw_block(&b, M, x.data(), table.data(), S, wrong.data(), P, c, s, kept->data(), scratch->data(), y.data()) == 2, what + " refuses a place");
    }
}

template <class T>
void test_sums(int64_t n) {
    Buffer<T> a(n), b(n), c(n);
    a.fill(), b.fill();
    Buffer<T> expected(n);
    for (int64_t i = 0; i < n; i++) expected[i] = from_double<T>((float)a.at(i) + (float)b.at(i));
    expect(dw_add(type_of<T>(), n, a.data(), b.data(), c.data()) == 0 && c.same(expected), "sums of " + std::to_string(n));
    expect(dw_add(type_of<T>(), n, a.data(), b.data(), a.data()) == 0 && a.same(expected), "sums in place");
}

}  // namespace

void test_block() {
    for (int64_t n : {1, 15, 1000}) test_sums<float>(n), test_sums<bf16>(n);
    std::vector<Form> forms(13);
    forms[0].name = "Llama";
    forms[1].name = "Qwen 3", forms[1].head_norms = true;
    forms[2].name = "Gemma 3", forms[2].head_norms = forms[2].after = true;
    forms[3].name = "BERT", forms[3].gated = forms[3].causal = 0, forms[3].centered = 1, forms[3].before = forms[3].rotary_dims = false, forms[3].post = true;
    forms[4].name = "ViT", forms[4].gated = forms[4].causal = 0, forms[4].centered = 1, forms[4].rotary_dims = false;
    forms[5].name = "GPT-2", forms[5].gated = forms[5].by_column = 0, forms[5].centered = forms[5].split = 1, forms[5].rotary_dims = false;
    forms[6].name = "GPT-NeoX", forms[6].gated = 0, forms[6].centered = forms[6].parallel = 1, forms[6].split = 2;
    forms[7].name = "Phi 3", forms[7].split = forms[7].joint_gate = 1;
    forms[8].name = "stacked, with norms of heads", forms[8].split = 1, forms[8].head_norms = true;
    forms[9].name = "Phi", forms[9].gated = 0, forms[9].centered = forms[9].parallel = 1;
    forms[10].name = "norms after alone", forms[10].before = false, forms[10].after = true;
    forms[11].name = "after and post", forms[11].after = forms[11].post = true;
    forms[12].name = "no norms", forms[12].before = false, forms[12].split = 2;
    for (const Form &form : forms)
        for (bool int8 : {false, true})
            for (bool pick : {false, true}) {
                test_once<float>(form, {9, 1, 20}, 4, int8, pick), test_once<bf16>(form, {9, 1, 20}, 18, int8, pick);
                test_once<bf16>(form, {1}, 0, int8, pick);
                if (!int8) test_once<bf16>(form, {9, 1, 20}, 18, false, pick, 0, true);
            }
    for (bool int8 : {false, true})
        for (int i : {0, 2, 3, 5}) test_once<bf16>(forms[i], {600, 700}, 4, int8, i == 2);
    for (int i : {0, 2, 5}) test_once<bf16>(forms[i], {600, 700}, 4, false, i == 2, 0, true);
    for (int format : {deltaw::Q4_1, deltaw::Q8_0, deltaw::NF4})
        for (bool pick : {false, true}) test_once<bf16>(forms[0], {9, 1, 20}, 4, false, pick, format), test_once<float>(forms[7], {9, 1, 20}, 4,
            false, pick, format);
}
