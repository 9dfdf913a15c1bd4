// A decoder's block in one call forward and one backward, made of the other exported kernels.
//
//   x1 = x  + output(attention(rotate(queries, keys), values))     all of norm(x)
//   y  = x1 + down(f(gate) · up)                                    both of norm(x1)
//
// It does what the caller's own composition of the single kernels does, in the same order, and gives the same bits. It
// exists because some thirty calls a block and direction, each with its tensors, take as long as the kernels themselves
// where rows are short. What the backward needs lies in one piece of memory, `kept`; what only this call needs in
// another, `scratch`. Both are the caller's.
#include "block.h"

#include <algorithm>

#include "factors.h"
#include "kernels.h"
#include "quantize.h"
#include "threads.h"

using namespace deltaw;

namespace {

// Rows side by side in memory.
struct Rows {
    char *data;
    int64_t stride;  // bytes

    void *operator[](int64_t row) const { return data + row * stride; }
    operator void *() const { return data; }
};

// Memory given out piece by piece; without any, it is only counted.
struct Room {
    char *base;
    int64_t used = 0, most = 0;

    explicit Room(void *base) : base((char *)base) {}
    Rows take(int64_t rows, int64_t stride) {
        char *const at = base ? base + used : nullptr;
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

    Kept(const BlockParts &b, int64_t T, Room &from) {
        auto rows = [&](int64_t width) { return from.take(T, width * b.number()); };
        stats = from.take(T, 8), stats1 = from.take(T, 8), logs = from.take(T, b.heads * 4);
        q = rows(b.wide()), k = rows(b.narrow()), v = rows(b.narrow()), out = rows(b.wide());
        x1 = rows(b.hidden()), gate = rows(b.inner()), up = rows(b.inner());
        h_query = rows(b.query.rank), h_key = rows(b.key.rank), h_value = rows(b.value.rank), h_output = rows(b.output.rank);
        h_gate = rows(b.gate.rank), h_up = rows(b.up.rank), h_down = rows(b.down.rank);
    }
};

// What one call needs beside.
struct Work {
    Rows n, int8, scales;
    // Of the second half forward; of both backward, where what one half alone needs lies in the same place.
    Rows inner{}, d_gate{}, d_up{}, d_out{}, d_q{}, d_k{}, d_v{}, d_n{}, d_x1{};
    Rows g_query{}, g_key{}, g_value{}, g_output{}, g_gate{}, g_up{}, g_down{};

    Work(const BlockParts &b, int64_t T, bool backward, Room &from) {
        auto rows = [&](int64_t width) { return from.take(T, width * b.number()); };
        n = rows(b.hidden());
        int64_t widest = 0;
        bool any_int8 = false;
        for (const Layer *l : {&b.query, &b.key, &b.value, &b.output, &b.gate, &b.up, &b.down}) {
            any_int8 |= l->scale != nullptr;
            widest = std::max({widest, l->in, l->out});
        }
        int8 = from.take(any_int8 ? T : 0, widest), scales = from.take(any_int8 ? T : 0, int8_blocks(widest) * 4);
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

// The kernels of a block on some of its rows. A failure of one ends the block's call.
struct SomeRows {
    const BlockParts &b;
    const int64_t first, rows;
    uint8_t *const int8;
    float *const scales;
    const void *int8_of = nullptr;  // which rows stand in `int8`, and with which SmoothQuant scales
    const float *int8_smooth = nullptr;

    SomeRows(const BlockParts &b, const Work &work, int64_t first, int64_t rows)
        : b(b), first(first), rows(rows), int8((uint8_t *)work.int8[first]), scales((float *)work.scales[first]) {}

    void norm(const RowNorm &norm, const Rows &x, const Rows &y, const Rows &stats) {
        check(dw_norm((int)b.type, rows, b.hidden(), x[first], b.hidden(), norm.weight, norm.bias, norm.offset, norm.eps, (int)norm.centred,
                      y[first], (float *)stats[first]));
        int8_of = nullptr;
    }
    void norm_backward(const RowNorm &norm, const Rows &dy, const Rows &x, const Rows &stats, const Rows &added, const Rows &dx) {
        check(dw_norm_backward((int)b.type, rows, b.hidden(), dy[first], x[first], b.hidden(), norm.weight, norm.offset, (int)norm.centred,
                               (float *)stats[first], added[first], dx[first]));
    }
    // Rows that several layers take as int8 are rounded once.
    void linear(const Layer &l, const Rows &x, const Rows *added, const Rows &y, const Rows &h) {
        const bool quantize = l.scale && !(int8_of == x.data && int8_smooth == l.smooth);
        if (quantize) int8_of = x.data, int8_smooth = l.smooth;
        check(dw_linear((int)b.type, rows, l.out, l.in, x[first], (int)l.weight_type, l.weight, 1, l.scale, l.smooth, l.bias, (int)l.bias_f32, l.A,
                        l.B, l.rank, l.scaling, added ? (*added)[first] : nullptr, int8, scales, quantize, y[first], h[first]));
    }
    // dx = the gradient of the input + added, where dx is wanted, and g, which the factors' own gradients need.
    void linear_backward(const Layer &l, const Rows &grad, const Rows *added, const Rows *dx, const Rows &g) {
        check(dw_linear_backward((int)b.type, rows, l.out, l.in, grad[first], l.weight, 1, l.scale, l.smooth, l.A, l.B, l.rank, l.scaling,
                                 added ? (*added)[first] : nullptr, int8, scales, dx ? (*dx)[first] : nullptr, g[first]));
    }
    void rotate(int64_t heads, const Rows &x, const float *cosine, const float *sine, int backward) {
        if (!b.turned) return;
        const int64_t width = heads * b.head_size, at = first * b.turned;
        check(dw_rotate((int)b.type, rows, heads, b.head_size, b.turned, x[first], width, cosine + at, sine + at, backward, x[first], width));
    }
    void activation(const Rows &gate, const Rows &up, const Rows &y) {
        check(dw_activation((int)b.type, (int)b.activation, rows, b.inner(), gate[first], up[first], y[first]));
    }
    void activation_backward(const Rows &dy, const Rows &gate, const Rows &up, const Rows &d_gate, const Rows &d_up, const Rows &y) {
        check(dw_activation_backward((int)b.type, (int)b.activation, rows, b.inner(), dy[first], gate[first], up[first], d_gate[first], d_up[first],
                                     y[first]));
    }
};

// The layers whose factors need gradients, collected to be computed at once.
struct FactorGradients {
    const BlockParts &b;
    const int64_t T;
    FactorsBackward of[7];
    int count = 0;

    FactorGradients(const BlockParts &b, int64_t T) : b(b), T(T) {}

    void add(const Layer &l, const Rows &x, const Rows &h, const Rows &grad, const Rows &g, float *const *into) {
        if (into[0]) of[count++] = FactorsBackward{T, l.in, l.out, l.rank, x, h, grad, g, l.scaling, into[0], into[1]};
    }
    void compute() {
        factors_backward((int)b.type, of, count);
        count = 0;
    }
};

// What both directions are told beside the block itself.
struct Call {
    const BlockParts &b;
    const int64_t T;
    const int64_t *const segments, count;
    const float *const cosine, *const sine;

    int64_t stride() const { return b.hidden() * b.number(); }
};

void forward(const Call &call, const Rows &x, const Kept &kept, const Work &work, const Rows &y) {
    const BlockParts &b = call.b;
    rows_apart(call.T, [&](int64_t first, int64_t rows) {
        SomeRows some(b, work, first, rows);
        some.norm(b.first, x, work.n, kept.stats);
        some.linear(b.key, work.n, nullptr, kept.k, kept.h_key);
        some.linear(b.value, work.n, nullptr, kept.v, kept.h_value);
        some.linear(b.query, work.n, nullptr, kept.q, kept.h_query);
        some.rotate(b.heads, kept.q, call.cosine, call.sine, 0);
        some.rotate(b.key_heads, kept.k, call.cosine, call.sine, 0);
    });
    const int64_t d = b.head_size, strides[8] = {b.wide(), d, b.narrow(), d, b.narrow(), d, b.wide(), d};
    check(dw_attention((int)b.type, call.segments, call.count, call.T, b.window, 1, b.heads, b.key_heads, d, d, b.scaling, b.softcap, nullptr, call.T,
                       kept.q, kept.k, kept.v, kept.out, strides, (float *)kept.logs[0]));
    rows_apart(call.T, [&](int64_t first, int64_t rows) {
        SomeRows some(b, work, first, rows);
        some.linear(b.output, kept.out, &x, kept.x1, kept.h_output);
        some.norm(b.second, kept.x1, work.n, kept.stats1);
        some.linear(b.gate, work.n, nullptr, kept.gate, kept.h_gate);
        some.linear(b.up, work.n, nullptr, kept.up, kept.h_up);
        some.activation(kept.gate, kept.up, work.inner);
        some.linear(b.down, work.inner, &kept.x1, y, kept.h_down);
    });
}

// From grad to work.d_x1, the gradient of the first half's output. factors: of gate, up and down.
void second_half_backward(const Call &call, const Kept &kept, const Work &work, const Rows &grad, float *const *factors) {
    const BlockParts &b = call.b;
    float *const *const of_gate = factors, *const *const of_up = factors + 2, *const *const of_down = factors + 4;
    rows_apart(call.T, [&](int64_t first, int64_t rows) {
        SomeRows some(b, work, first, rows);
        some.linear_backward(b.down, grad, nullptr, &work.d_gate, work.g_down);
        some.activation_backward(work.d_gate, kept.gate, kept.up, work.d_gate, work.d_up, work.inner);
        if (of_gate[0] || of_up[0]) some.norm(b.second, kept.x1, work.n, kept.stats1);
        some.linear_backward(b.gate, work.d_gate, nullptr, &work.d_n, work.g_gate);
        some.linear_backward(b.up, work.d_up, &work.d_n, &work.d_n, work.g_up);
        some.norm_backward(b.second, work.d_n, kept.x1, kept.stats1, grad, work.d_x1);
    });
    FactorGradients wanted(b, call.T);
    wanted.add(b.down, work.inner, kept.h_down, grad, work.g_down, of_down);
    wanted.add(b.gate, work.n, kept.h_gate, work.d_gate, work.g_gate, of_gate);
    wanted.add(b.up, work.n, kept.h_up, work.d_up, work.g_up, of_up);
    wanted.compute();
}

// From work.d_x1 to dx, or where that is null to the factors alone: of query, key, value and output.
void first_half_backward(const Call &call, const Rows &x, const Kept &kept, const Work &work, const Rows *dx, float *const *factors) {
    const BlockParts &b = call.b;
    float *const *const of_query = factors, *const *const of_key = factors + 2, *const *const of_value = factors + 4, *const *const of_output = factors + 6;
    const Rows *const d_n = dx ? &work.d_n : nullptr;
    const int64_t d = b.head_size, wide = b.wide(), narrow = b.narrow();
    const int64_t strides[16] = {wide, d, narrow, d, narrow, d, wide, d, wide, d, wide, d, narrow, d, narrow, d};
    rows_apart(call.T, [&](int64_t first, int64_t rows) {
        SomeRows(b, work, first, rows).linear_backward(b.output, work.d_x1, nullptr, &work.d_out, work.g_output);
    });
    check(dw_attention_backward((int)b.type, call.segments, call.count, call.T, b.window, 1, b.heads, b.key_heads, d, d, b.scaling, b.softcap,
                                nullptr, call.T, kept.q, kept.k, kept.v, kept.out, work.d_out, work.d_q, work.d_k, work.d_v, strides,
                                (float *)kept.logs[0]));
    rows_apart(call.T, [&](int64_t first, int64_t rows) {
        SomeRows some(b, work, first, rows);
        some.rotate(b.heads, work.d_q, call.cosine, call.sine, 1);
        some.rotate(b.key_heads, work.d_k, call.cosine, call.sine, 1);
        if (of_query[0] || of_key[0] || of_value[0]) some.norm(b.first, x, work.n, kept.stats);
        some.linear_backward(b.query, work.d_q, nullptr, d_n, work.g_query);
        some.linear_backward(b.key, work.d_k, d_n, d_n, work.g_key);
        some.linear_backward(b.value, work.d_v, d_n, d_n, work.g_value);
        if (dx) some.norm_backward(b.first, work.d_n, x, kept.stats, work.d_x1, *dx);
    });
    FactorGradients wanted(b, call.T);
    wanted.add(b.query, work.n, kept.h_query, work.d_q, work.g_query, of_query);
    wanted.add(b.key, work.n, kept.h_key, work.d_k, work.g_key, of_key);
    wanted.add(b.value, work.n, kept.h_value, work.d_v, work.g_value, of_value);
    wanted.add(b.output, kept.out, kept.h_output, work.d_x1, work.g_output, of_output);
    wanted.compute();
}

}  // namespace

// Bytes of `kept`, of the forward's scratch and of the backward's, for T tokens.
int dw_block_sizes(const BlockParts *block, int64_t T, int64_t *sizes) {
    return guarded([&] {
        Room kept(nullptr), forward(nullptr), backward(nullptr);
        Kept(*block, T, kept), Work(*block, T, false, forward), Work(*block, T, true, backward);
        sizes[0] = kept.most, sizes[1] = forward.most, sizes[2] = backward.most;
    });
}

// in, out (T, hidden); segments (4, count), see Segments; cosine, sine (T, turned) in fp32.
int dw_block(const BlockParts *block, int64_t T, void *in, const int64_t *segments, int64_t count, const float *cosine, const float *sine,
             void *kept_memory, void *scratch_memory, void *out) {
    return guarded([&] {
        const Call call{*block, T, segments, count, cosine, sine};
        Room kept_room(kept_memory), scratch_room(scratch_memory);
        const Kept kept(*block, T, kept_room);
        const Work work(*block, T, false, scratch_room);
        forward(call, Rows{(char *)in, call.stride()}, kept, work, Rows{(char *)out, call.stride()});
    });
}

// dx (T, hidden), or null where nobody wants it. factors: where ∂L/∂A and ∂L/∂B of query, key, value, output, gate, up and
// down go, null for a layer that wants none.
int dw_block_backward(const BlockParts *block, int64_t T, void *in, const int64_t *segments, int64_t count, const float *cosine, const float *sine,
                      void *kept_memory, void *scratch_memory, void *grad_memory, void *dx_memory, float *const *factors) {
    return guarded([&] {
        const Call call{*block, T, segments, count, cosine, sine};
        Room kept_room(kept_memory), scratch_room(scratch_memory);
        const Kept kept(*block, T, kept_room);
        const Work work(*block, T, true, scratch_room);
        const Rows x{(char *)in, call.stride()}, grad{(char *)grad_memory, call.stride()}, dx{(char *)dx_memory, call.stride()};
        second_half_backward(call, kept, work, grad, factors + 8);
        first_half_backward(call, x, kept, work, dx_memory ? &dx : nullptr, factors);
    });
}
