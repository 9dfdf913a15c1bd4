// A decoder's block in one call forward and one backward, made of the other kernels.
//
//   x1 = x  + output(attention(rotate(queries, keys), values))     all of norm(x)
//   y  = x1 + down(f(gate) · up)                                    both of norm(x1)
//
// What it does and in which order is what the caller's own composition of the single kernels does, to the bit. It
// is here because some thirty calls a block and direction, each with its tensors, take as long as the kernels
// themselves where rows are short. What must outlive the call lies in one piece of memory, `kept`; what need not
// in another, `scratch`. Both are the caller's.
#include <algorithm>

#include "kernels.h"
#include "vectors.h"

struct Layer {  // y (M, out) = x·Wᵀ + bias + scaling·(x·A)·B; see dw_linear
    const void *weight;
    const float *scale, *columns;
    const void *bias;
    const float *A, *B;
    int64_t in, out, rank, weight_type, bias_f32;
    float scaling;
};

struct RowNorm {
    const void *weight, *bias;
    float eps, offset;
    int64_t centred;
};

struct BlockParts {
    int64_t type, heads, key_heads, head_size, activation, window, turned;
    float scaling, softcap;
    RowNorm first, second;
    Layer query, key, value, output, gate, up, down;

    int64_t hidden() const { return query.in; }
    int64_t wide() const { return query.out; }
    int64_t narrow() const { return key.out; }
    int64_t inner() const { return gate.out; }
    int64_t number() const { return type == 0 ? 4 : 2; }  // bytes
};

// Rows side by side in memory.
struct Rows {
    char *data;
    int64_t stride;  // bytes

    void *operator[](int64_t row) const { return data + row * stride; }
    operator void *() const { return data; }
};

// Memory given out piece by piece; from null it only counts.
struct Piece {
    char *base;
    int64_t used = 0, most = 0;

    Rows take(int64_t rows, int64_t stride) {
        char *at = base + used;
        used += (rows * stride + 63) / 64 * 64;
        most = std::max(most, used);
        return Rows{at, stride};
    }
};

// What the backward is given of the forward, for T tokens.
struct Kept {
    Rows stats, stats1, logs;
    Rows q, k, v, out, x1, gate, up;
    Rows h_query, h_key, h_value, h_output, h_gate, h_up, h_down;

    Kept(const BlockParts &b, int64_t T, Piece &from) {
        auto rows = [&](int64_t width) { return from.take(T, width * b.number()); };
        stats = from.take(T, 8), stats1 = from.take(T, 8), logs = from.take(T, b.heads * 4);
        q = rows(b.wide()), k = rows(b.narrow()), v = rows(b.narrow()), out = rows(b.wide());
        x1 = rows(b.hidden()), gate = rows(b.inner()), up = rows(b.inner());
        h_query = rows(b.query.rank), h_key = rows(b.key.rank), h_value = rows(b.value.rank), h_output = rows(b.output.rank);
        h_gate = rows(b.gate.rank), h_up = rows(b.up.rank), h_down = rows(b.down.rank);
    }
};

struct Scratch {
    Rows n, bytes, scales;
    // Of the second half forward; of both backward, where what one half alone wants lies in the same place.
    Rows inner, d_gate, d_up, d_out, d_q, d_k, d_v, d_n, d_x1;
    Rows g_query, g_key, g_value, g_output, g_gate, g_up, g_down;

    Scratch(const BlockParts &b, int64_t T, bool backward, Piece &from) {
        auto rows = [&](int64_t width) { return from.take(T, width * b.number()); };
        n = rows(b.hidden());
        int64_t widest = 0;
        bool any = false;
        for (const Layer *l : {&b.query, &b.key, &b.value, &b.output, &b.gate, &b.up, &b.down}) {
            any |= l->scale != nullptr;
            widest = std::max({widest, l->in, l->out});
        }
        bytes = from.take(any ? T : 0, widest), scales = from.take(any ? T : 0, (widest + BYTES_AT_ONCE - 1) / BYTES_AT_ONCE * 4);
        if (!backward) {
            inner = rows(b.inner());
            return;
        }
        d_n = rows(b.hidden()), d_x1 = rows(b.hidden());
        g_query = rows(b.query.rank), g_key = rows(b.key.rank), g_value = rows(b.value.rank), g_output = rows(b.output.rank);
        g_gate = rows(b.gate.rank), g_up = rows(b.up.rank), g_down = rows(b.down.rank);
        const int64_t here = from.used;
        d_gate = rows(b.inner()), d_up = rows(b.inner()), inner = rows(b.inner());
        from.used = here;
        d_out = rows(b.wide()), d_q = rows(b.wide()), d_k = rows(b.narrow()), d_v = rows(b.narrow());
    }
};

// Some of a block's rows on their way through it.
struct Pass {
    const BlockParts &b;
    const int64_t first, rows;
    uint8_t *const bytes;
    float *const scales;
    const void *bytes_of = nullptr;  // which rows stand in `bytes`, and times which columns
    const float *bytes_columns = nullptr;

    Pass(const BlockParts &b, const Scratch &scratch, int64_t first, int64_t rows)
        : b(b), first(first), rows(rows), bytes((uint8_t *)scratch.bytes[first]), scales((float *)scratch.scales[first]) {}

    void norm(const RowNorm &norm, const Rows &x, const Rows &y, const Rows &stats) {
        dw_norm(b.type, rows, b.hidden(), x[first], b.hidden(), norm.weight, norm.bias, norm.offset, norm.eps, norm.centred, y[first],
                (float *)stats[first]);
        bytes_of = nullptr;
    }
    void norm_backward(const RowNorm &norm, const Rows &dy, const Rows &x, const Rows &stats, const Rows &added, const Rows &dx) {
        dw_norm_backward(b.type, rows, b.hidden(), dy[first], x[first], b.hidden(), norm.weight, norm.offset, norm.centred, (float *)stats[first],
                         added[first], dx[first]);
    }
    // Rows that several layers take as bytes are rounded once.
    void linear(const Layer &l, const Rows &x, const Rows *added, const Rows &y, const Rows &h) {
        const bool make = l.scale && !(bytes_of == x.data && bytes_columns == l.columns);
        if (make) bytes_of = x.data, bytes_columns = l.columns;
        dw_linear(b.type, rows, l.out, l.in, x[first], l.weight_type, l.weight, 1, l.scale, l.columns, l.bias, l.bias_f32, l.A, l.B, l.rank, l.scaling,
                  added ? (*added)[first] : nullptr, bytes, scales, make, y[first], h[first]);
    }
    // dx = the gradient of the input + added, where dx is wanted, and g, which the factors' own gradients want.
    void linear_backward(const Layer &l, const Rows &grad, const Rows *added, const Rows *dx, const Rows &g) {
        dw_linear_backward(b.type, rows, l.out, l.in, grad[first], l.weight, 1, l.scale, l.columns, l.A, l.B, l.rank, l.scaling,
                           added ? (*added)[first] : nullptr, bytes, scales, dx ? (*dx)[first] : nullptr, g[first]);
    }
    void rotate(int64_t heads, const Rows &x, const float *cosine, const float *sine, int backward) {
        const int64_t width = heads * b.head_size, at = first * b.turned;
        if (b.turned) dw_rotate(b.type, rows, heads, b.head_size, b.turned, x[first], width, cosine + at, sine + at, backward, x[first], width);
    }
};

// The layers whose factors want gradients, collected to be computed at once.
struct Wanted {
    const BlockParts &b;
    const int64_t T;
    FactorsBackward of[7];
    int count = 0;

    void add(const Layer &l, const Rows &x, const Rows &h, const Rows &grad, const Rows &g, float *const *into) {
        if (into[0]) of[count++] = FactorsBackward{T, l.in, l.out, l.rank, x, h, grad, g, l.scaling, into[0], into[1]};
    }
    void compute() {
        factors_backward(b.type, of, count);
        count = 0;
    }
};

// Bytes of `kept`, of the forward's scratch and of the backward's.
extern "C" void dw_block_sizes(const BlockParts *block, int64_t T, int64_t *sizes) {
    Piece kept{nullptr}, forward{nullptr}, backward{nullptr};
    Kept(*block, T, kept), Scratch(*block, T, false, forward), Scratch(*block, T, true, backward);
    sizes[0] = kept.most, sizes[1] = forward.most, sizes[2] = backward.most;
}

// in, out (T, hidden); forest (4, segments); cosine, sine (T, turned) in fp32.
extern "C" void dw_block(const BlockParts *block, int64_t T, void *in, const int64_t *forest, int64_t segments, const float *cosine, const float *sine,
                         void *kept_memory, void *scratch_memory, void *out) {
    const BlockParts &b = *block;
    Piece kept_piece{(char *)kept_memory}, scratch_piece{(char *)scratch_memory};
    const Kept kept(b, T, kept_piece);
    const Scratch scratch(b, T, false, scratch_piece);
    const Rows x{(char *)in, b.hidden() * b.number()}, y{(char *)out, b.hidden() * b.number()};
    const int64_t d = b.head_size, strides[8] = {b.wide(), d, b.narrow(), d, b.narrow(), d, b.wide(), d};

    rows_apart(T, [&](int64_t first, int64_t rows) {
        Pass pass(b, scratch, first, rows);
        pass.norm(b.first, x, scratch.n, kept.stats);
        pass.linear(b.key, scratch.n, nullptr, kept.k, kept.h_key);
        pass.linear(b.value, scratch.n, nullptr, kept.v, kept.h_value);
        pass.linear(b.query, scratch.n, nullptr, kept.q, kept.h_query);
        pass.rotate(b.heads, kept.q, cosine, sine, 0);
        pass.rotate(b.key_heads, kept.k, cosine, sine, 0);
    });
    dw_attention(b.type, forest, segments, T, b.window, 1, b.heads, b.key_heads, d, d, b.scaling, b.softcap, nullptr, T, kept.q, kept.k, kept.v,
                 kept.out, strides, (float *)kept.logs[0]);
    rows_apart(T, [&](int64_t first, int64_t rows) {
        Pass pass(b, scratch, first, rows);
        pass.linear(b.output, kept.out, &x, kept.x1, kept.h_output);
        pass.norm(b.second, kept.x1, scratch.n, kept.stats1);
        pass.linear(b.gate, scratch.n, nullptr, kept.gate, kept.h_gate);
        pass.linear(b.up, scratch.n, nullptr, kept.up, kept.h_up);
        dw_activation(b.type, b.activation, rows, b.inner(), kept.gate[first], kept.up[first], scratch.inner[first]);
        pass.linear(b.down, scratch.inner, &kept.x1, y, kept.h_down);
    });
}

// dx (T, hidden), or null where nobody wants it. factors: where ∂L/∂A and ∂L/∂B of query, key, value, output, gate, up
// and down go, null for a layer that wants none.
extern "C" void dw_block_backward(const BlockParts *block, int64_t T, void *in, const int64_t *forest, int64_t segments, const float *cosine,
                                  const float *sine, void *kept_memory, void *scratch_memory, void *grad_memory, void *dx_memory,
                                  float *const *factors) {
    const BlockParts &b = *block;
    Piece kept_piece{(char *)kept_memory}, scratch_piece{(char *)scratch_memory};
    const Kept kept(b, T, kept_piece);
    const Scratch s(b, T, true, scratch_piece);
    const int64_t stride = b.hidden() * b.number();
    const Rows x{(char *)in, stride}, grad{(char *)grad_memory, stride}, dx{(char *)dx_memory, stride};
    const Rows *d_n = dx_memory ? &s.d_n : nullptr;
    float *const *const of_query = factors, *const *const of_key = factors + 2, *const *const of_value = factors + 4;
    float *const *const of_output = factors + 6, *const *const of_gate = factors + 8, *const *const of_up = factors + 10;
    float *const *const of_down = factors + 12;
    Wanted wanted{b, T};

    rows_apart(T, [&](int64_t first, int64_t rows) {
        Pass pass(b, s, first, rows);
        pass.linear_backward(b.down, grad, nullptr, &s.d_gate, s.g_down);
        dw_activation_backward(b.type, b.activation, rows, b.inner(), s.d_gate[first], kept.gate[first], kept.up[first], s.d_gate[first], s.d_up[first],
                               s.inner[first]);
        if (of_gate[0] || of_up[0]) pass.norm(b.second, kept.x1, s.n, kept.stats1);
        pass.linear_backward(b.gate, s.d_gate, nullptr, &s.d_n, s.g_gate);
        pass.linear_backward(b.up, s.d_up, &s.d_n, &s.d_n, s.g_up);
        pass.norm_backward(b.second, s.d_n, kept.x1, kept.stats1, grad, s.d_x1);
    });
    wanted.add(b.down, s.inner, kept.h_down, grad, s.g_down, of_down);
    wanted.add(b.gate, s.n, kept.h_gate, s.d_gate, s.g_gate, of_gate);
    wanted.add(b.up, s.n, kept.h_up, s.d_up, s.g_up, of_up);
    wanted.compute();

    const int64_t d = b.head_size, wide = b.wide(), narrow = b.narrow();
    const int64_t strides[16] = {wide, d, narrow, d, narrow, d, wide, d, wide, d, wide, d, narrow, d, narrow, d};
    rows_apart(T, [&](int64_t first, int64_t rows) { Pass(b, s, first, rows).linear_backward(b.output, s.d_x1, nullptr, &s.d_out, s.g_output); });
    dw_attention_backward(b.type, forest, segments, T, b.window, 1, b.heads, b.key_heads, d, d, b.scaling, b.softcap, nullptr, T, kept.q, kept.k,
                          kept.v, kept.out, s.d_out, s.d_q, s.d_k, s.d_v, strides, (float *)kept.logs[0]);
    rows_apart(T, [&](int64_t first, int64_t rows) {
        Pass pass(b, s, first, rows);
        pass.rotate(b.heads, s.d_q, cosine, sine, 1);
        pass.rotate(b.key_heads, s.d_k, cosine, sine, 1);
        if (of_query[0] || of_key[0] || of_value[0]) pass.norm(b.first, x, s.n, kept.stats);
        pass.linear_backward(b.query, s.d_q, nullptr, d_n, s.g_query);
        pass.linear_backward(b.key, s.d_k, d_n, d_n, s.g_key);
        pass.linear_backward(b.value, s.d_v, d_n, d_n, s.g_value);
        if (d_n) pass.norm_backward(b.first, s.d_n, x, kept.stats, s.d_x1, dx);
    });
    wanted.add(b.query, s.n, kept.h_query, s.d_q, s.g_query, of_query);
    wanted.add(b.key, s.n, kept.h_key, s.d_k, s.g_key, of_key);
    wanted.add(b.value, s.n, kept.h_value, s.d_v, s.g_value, of_value);
    wanted.add(b.output, kept.out, kept.h_output, s.d_x1, s.g_output, of_output);
    wanted.compute();
}
