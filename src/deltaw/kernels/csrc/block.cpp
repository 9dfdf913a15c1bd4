// A transformer's block in one call forward and one backward, made of the other exported kernels.
//
//   x1 = x + output(attention(rotate(queries, keys), values))     all of norm(x)
//   y  = x1 + down(f(gate) · up), or down(f(gate))                 of norm(x1), or of norm(x) where halves are parallel
//
// with norms where the block has them: before a half, after its last layer, over the sum (HalfNorms), over heads.
// It does what the caller's own composition of the single kernels does, in the same order, and gives the same bits. It
// exists because some thirty calls a block and direction, each with its tensors, take as long as the kernels themselves
// where rows are short. What the backward needs lies in one piece of memory, `kept`; what only this call needs in
// another, `scratch`. Both are the caller's.
//
// Of picked rows alone: queries, the attention's output and all that follows; of all rows: keys and values.
#include "block.h"

#include <algorithm>
#include <cstring>

#include "block_memory.h"
#include "factors.h"
#include "kernels.h"
#include "threads.h"

using namespace deltaw;

namespace {

// What both directions are told beside the block itself.
struct Call : Sizes {
    const BlockParts &b;
    const int64_t *const places;  // (P) of picked rows, null where all are asked for
    const int64_t *const segments, count;
    const float *const cosine, *const sine;

    Call(const BlockParts &b, int64_t T, const int64_t *places, int64_t picks, const int64_t *segments, int64_t count, const float *cosine,
         const float *sine)
        : Sizes(T, places ? picks : 0), b(b), places(places), segments(segments), count(count), cosine(cosine), sine(sine) {
        for (int64_t p = 0; places && p < picks; p++) require_in_bounds(places[p] >= 0 && places[p] < T && (p == 0 || places[p - 1] < places[p]));
    }
    Rows hidden(void *data) const { return Rows{(char *)data, b.hidden() * b.number()}; }
};

// Where in a row of all heads the queries (part 0), keys (1) or values (2) of a head begin, in numbers.
int64_t place_of(const BlockParts &b, int part, int64_t head) {
    const int64_t group = b.heads / b.key_heads;
    if (b.split == GROUPED) return (part == 0 ? head / group * (group + 2) + head % group : head * (group + 2) + group + part - 1) * b.head_size;
    return ((part > 0 ? b.heads : 0) + (part > 1 ? b.key_heads : 0) + head) * b.head_size;
}

enum Way { OUT, IN };

// One token's queries, keys or values out of the row that holds all of them, or into it; without `alone`, zeros go in.
void copy_heads(const BlockParts &b, int part, void *joint, void *alone, Way way) {
    const int64_t size = b.head_size * b.number();
    for (int64_t head = 0; head < (part == 0 ? b.heads : b.key_heads); head++) {
        char *const in_joint = (char *)joint + place_of(b, part, head) * b.number(), *const by_itself = (char *)alone + head * size;
        if (way == OUT) memcpy(by_itself, in_joint, size);
        else if (alone) memcpy(in_joint, by_itself, size);
        else memset(in_joint, 0, size);
    }
}

// The kernels of a block on some of its rows. A failure of one ends the block's call.
struct SomeRows {
    const Call &call;
    const BlockParts &b;
    const int64_t first, rows;
    uint8_t *const int8;
    float *const scales;
    const void *int8_of = nullptr;  // which rows stand in `int8`, with which SmoothQuant scales and how many scales
    const float *int8_smooth = nullptr;
    int int8_in_blocks = 0;

    SomeRows(const Call &call, const Work &work, int64_t first, int64_t rows)
        : call(call), b(call.b), first(first), rows(rows), int8((uint8_t *)work.int8[first]), scales((float *)work.scales[first]) {}

    int type() const { return (int)b.type; }
    void written(const Rows &y) {
        if (int8_of == y.data) int8_of = nullptr;
    }

    void norm(const RowNorm &norm, const Rows &x, const Rows &y, const Rows &stats) { norm_parts(norm, 1, b.hidden(), x, y, stats); }
    void norm_backward(const RowNorm &norm, const Rows &dy, const Rows &x, const Rows &stats, const Rows *added, const Rows &dx) {
        norm_parts_backward(norm, 1, b.hidden(), dy, x, stats, added, dx);
    }
    // Of each of `parts` parts of a row.
    void norm_parts(const RowNorm &norm, int64_t parts, int64_t D, const Rows &x, const Rows &y, const Rows &stats) {
        check(dw_norm(type(), rows * parts, D, x[first], D, norm.weight, norm.bias, norm.offset, norm.eps, (int)norm.centered, y[first],
                      (float *)stats[first]));
        written(y);
    }
    void norm_parts_backward(const RowNorm &norm, int64_t parts, int64_t D, const Rows &dy, const Rows &x, const Rows &stats, const Rows *added,
                             const Rows &dx) {
        check(dw_norm_backward(type(), rows * parts, D, dy[first], x[first], D, norm.weight, norm.offset, (int)norm.centered, (float *)stats[first],
                               added ? (*added)[first] : nullptr, dx[first]));
    }
    // Rows that several layers take as int8 are rounded once.
    void linear(const Layer &l, const Rows &x, const Rows *added, const Rows &y, const Rows &h) {
        const int in_blocks = (int)l.in_blocks;
        const bool quantize = l.scale && !(int8_of == x.data && int8_smooth == l.smooth && int8_in_blocks == in_blocks);
        if (quantize) int8_of = x.data, int8_smooth = l.smooth, int8_in_blocks = in_blocks;
        check(dw_linear(type(), rows, l.out, l.in, x[first], (int)l.weight_type, l.weight, (int)l.by_column, l.scale, l.smooth, l.bias,
                        (int)l.bias_f32, l.A, l.B, l.rank, l.scaling, added ? (*added)[first] : nullptr, int8, scales, in_blocks, quantize, y[first],
                        h[first]));
        written(y);
    }
    // dx = the gradient of the input + added, where dx is wanted, and g, which the factors' own gradients need.
    void linear_backward(const Layer &l, const Rows &grad, const Rows *added, const Rows *dx, const Rows &g) {
        check(dw_linear_backward(type(), rows, l.out, l.in, grad[first], (int)l.weight_type, l.weight, (int)l.by_column, l.scale, l.smooth, l.A, l.B,
                                 l.rank, l.scaling, added ? (*added)[first] : nullptr, b.rounds_gradient(l) ? int8 : nullptr, scales,
                                 dx ? (*dx)[first] : nullptr, g[first]));
        int8_of = nullptr;
    }
    void rotate(int64_t heads, const Rows &x, const Rows &cosine, const Rows &sine, int backward) {
        if (!b.turned) return;
        const int64_t ld = x.stride / b.number();
        check(dw_rotate(type(), rows, heads, b.head_size, b.turned, x[first], ld, (const float *)cosine[first], (const float *)sine[first], backward,
                        x[first], ld));
    }
    void activation(const Rows &gate, const Rows &up, const Rows &y) {
        check(dw_activation(type(), (int)b.activation, rows, b.inner(), gate[first], b.gated ? up[first] : nullptr, y[first]));
        written(y);
    }
    void activation_backward(const Rows &dy, const Rows &gate, const Rows &up, const Rows &d_gate, const Rows &d_up, const Rows &y) {
        check(dw_activation_backward(type(), (int)b.activation, rows, b.inner(), dy[first], gate[first], b.gated ? up[first] : nullptr, d_gate[first],
                                     b.gated ? d_up[first] : nullptr, y[first]));
    }
    void add(const Rows &a, const Rows &c, const Rows &y) {
        check(dw_add(type(), rows * b.hidden(), a[first], c[first], y[first]));
        written(y);
    }

    // y = the sum of the stream and the half's last layer, normed where the half says so.
    void end(const Layer &l, const Rows &x, const Rows &h, const Rows &stream, const HalfNorms &norms, const End &end, const Rows &y) {
        const Rows &total = norms.post.used ? end.total : y;
        if (norms.after.used) {
            linear(l, x, nullptr, end.branch, h);
            norm(norms.after, end.branch, total, end.stats_after);
            add(stream, total, total);
        } else linear(l, x, &stream, total, h);
        if (norms.post.used) norm(norms.post, total, y, end.stats_post);
    }
    // From grad to of_stream and of_layer, which are grad itself where no norm stands between.
    void end_backward(const Rows &grad, const HalfNorms &norms, const End &end, const Rows &of_stream, const Rows &of_layer) {
        if (norms.post.used) norm_backward(norms.post, grad, end.total, end.stats_post, nullptr, of_stream);
        if (norms.after.used) norm_backward(norms.after, of_stream, end.branch, end.stats_after, nullptr, of_layer);
    }

    // These are picked rows: `width` bytes of each.
    void gather(const Rows &from, const Rows &to, int64_t width) {
        for (int64_t p = first; p < first + rows; p++) memcpy(to[p], from[call.places[p]], width);
        written(to);
    }
    // These are all rows: body(row, its place among the picked, or -1).
    template <class Body>
    void each(Body &&body) {
        if (!call.picked) {
            for (int64_t t = first; t < first + rows; t++) body(t, t);
            return;
        }
        const int64_t *const stop = call.places + call.P, *next = std::lower_bound(call.places, stop, first);
        for (int64_t t = first; t < first + rows; t++) {
            const bool found = next < stop && *next == t;
            body(t, found ? next - call.places : -1);
            next += found;
        }
    }
    // Picked rows at their places, zeros elsewhere.
    void spread(const Rows &from, const Rows &to) {
        const int64_t width = b.hidden() * b.number();
        each([&](int64_t t, int64_t p) { p < 0 ? memset(to[t], 0, width) : memcpy(to[t], from[p], width); });
    }
};

// The layers whose factors need gradients, collected to be computed at once.
struct FactorGradients {
    const BlockParts &b;
    FactorsBackward of[7];
    int count = 0;

    explicit FactorGradients(const BlockParts &b) : b(b) {}

    void add(int64_t rows, const Layer &l, const Rows &x, const Rows &h, const Rows &grad, const Rows &g, float *const *into) {
        if (into[0]) of[count++] = FactorsBackward{rows, l.in, l.out, l.rank, x, h, grad, g, l.scaling, into[0], into[1]};
    }
    void compute() {
        factors_backward((int)b.type, of, count);
        count = 0;
    }
};

// The tables of rotary positions for all rows, and for those that ask.
struct Turns {
    Rows cosine, sine, cosine_p, sine_p;

    Turns(const Call &call, const Work &work)
        : cosine{(char *)call.cosine, call.b.turned * 4}, sine{(char *)call.sine, call.b.turned * 4}, cosine_p(call.picked ? work.cosine : cosine),
          sine_p(call.picked ? work.sine : sine) {}
    void gather(const Call &call, SomeRows &some) const {
        if (call.b.turned) some.gather(cosine, cosine_p, cosine.stride), some.gather(sine, sine_p, sine.stride);
    }
};

int64_t ld(const BlockParts &b, const Rows &rows) { return rows.stride / b.number(); }

// Queries of the rows that ask, keys and values of all rows.
void heads_forward(const Call &call, const Rows &x, const Kept &kept, const Work &work) {
    const BlockParts &b = call.b;
    const bool normed = b.first.before.used;
    const Rows &n = normed ? work.n : x, &joint = call.views(b) ? kept.joint : work.joint;
    const Turns turns(call, work);
    auto finish_queries = [&](SomeRows &some) {
        if (b.of_query.used) some.norm_parts(b.of_query, b.heads, b.head_size, kept.raw_q, kept.q, kept.stats_q);
        some.rotate(b.heads, kept.q, turns.cosine_p, turns.sine_p, 0);
    };
    rows_apart(call.T, [&](int64_t first, int64_t rows) {
        SomeRows some(call, work, first, rows);
        if (normed) some.norm(b.first.before, x, work.n, kept.stats);
        if (b.split == APART) {
            some.linear(b.key, n, nullptr, kept.raw_k, kept.h_key);
            some.linear(b.value, n, nullptr, kept.v, kept.h_value);
            if (!call.picked) some.linear(b.query, n, nullptr, kept.raw_q, kept.h_query);
        } else {
            some.linear(b.query, n, nullptr, joint, kept.h_query);
            if (!call.views(b))
                some.each([&](int64_t t, int64_t p) {
                    if (p >= 0) copy_heads(b, 0, joint[t], kept.raw_q[p], OUT);
                    copy_heads(b, 1, joint[t], kept.raw_k[t], OUT), copy_heads(b, 2, joint[t], kept.v[t], OUT);
                });
        }
        if (b.of_key.used) some.norm_parts(b.of_key, b.key_heads, b.head_size, kept.raw_k, kept.k, kept.stats_k);
        some.rotate(b.key_heads, kept.k, turns.cosine, turns.sine, 0);
        if (!call.picked) finish_queries(some);
    });
    if (!call.picked) return;
    rows_apart(call.P, [&](int64_t first, int64_t rows) {
        SomeRows some(call, work, first, rows);
        turns.gather(call, some);
        if (b.split == APART) {
            some.gather(n, work.n_p, n.stride);
            some.linear(b.query, work.n_p, nullptr, kept.raw_q, kept.h_query);
        }
        finish_queries(some);
    });
}

void forward(const Call &call, const Rows &x, const Kept &kept, const Work &work, const Rows &y) {
    const BlockParts &b = call.b;
    heads_forward(call, x, kept, work);
    const int64_t d = b.head_size, strides[8] = {ld(b, kept.q), d, ld(b, kept.k), d, ld(b, kept.v), d, ld(b, kept.out), d};
    check(dw_attention((int)b.type, call.segments, call.count, call.T, b.window, (int)b.causal, b.heads, b.key_heads, d, d, b.scaling, b.softcap,
                       call.places, call.P, kept.q, kept.k, kept.v, kept.out, strides, (float *)kept.logs[0]));
    const Rows &stream = call.picked ? work.x_p : x, &x1 = b.parallel ? y : kept.x1, &read = b.parallel ? stream : x1;
    const Rows &n = b.second.before.used ? work.n : read;
    rows_apart(call.P, [&](int64_t first, int64_t rows) {
        SomeRows some(call, work, first, rows);
        if (call.picked) some.gather(x, work.x_p, x.stride);
        some.end(b.output, kept.out, kept.h_output, stream, b.first, kept.end, x1);
        if (b.second.before.used) some.norm(b.second.before, read, work.n, kept.stats1);
        some.linear(b.gate, n, nullptr, b.gate_gives_up() ? work.gate_joint : kept.gate, kept.h_gate);
        if (b.gate_gives_up())
            for (int64_t t = first; t < first + rows; t++) {
                memcpy(kept.gate[t], work.gate_joint[t], kept.gate.stride);
                memcpy(kept.up[t], (char *)work.gate_joint[t] + kept.gate.stride, kept.up.stride);
            }
        else if (b.gated) some.linear(b.up, n, nullptr, kept.up, kept.h_up);
        some.activation(kept.gate, kept.up, work.inner);
        some.end(b.down, work.inner, kept.h_down, x1, b.second, kept.end1, y);
    });
}

// From grad to work.d_x1, the gradient of what the half reads (unless that is parallel and nobody wants it); it holds that
// of the stream too, unless halves are parallel. Returns the gradient of the stream. factors: of gate, up and down.
Rows second_half_backward(const Call &call, const Rows &x, const Kept &kept, const Work &work, const Rows &grad, bool need_x, float *const *factors) {
    const BlockParts &b = call.b;
    float *const *const of_gate = factors, *const *const of_up = factors + 2, *const *const of_down = factors + 4;
    const bool normed = b.second.before.used, wanted = need_x || !b.parallel, joint = b.gate_gives_up();
    const Rows &read = !b.parallel ? kept.x1 : call.picked ? work.x_p : x, &n = normed ? work.n : read;
    const Rows of_stream = b.second.post.used ? work.d_sum : grad, of_down_layer = b.second.after.used ? work.d_branch : of_stream;
    const Rows *const added = b.parallel ? nullptr : &of_stream, *const begun = normed ? nullptr : added;
    const Rows *const d_n = wanted ? &work.d_x1 : nullptr;  // before its norm, in the place of what is behind it
    const Rows &d_gate = joint ? work.gate_joint : work.d_gate;
    rows_apart(call.P, [&](int64_t first, int64_t rows) {
        SomeRows some(call, work, first, rows);
        some.end_backward(grad, b.second, kept.end1, of_stream, of_down_layer);
        some.linear_backward(b.down, of_down_layer, nullptr, &work.d_gate, work.g_down);
        some.activation_backward(work.d_gate, kept.gate, kept.up, work.d_gate, work.d_up, work.inner);
        if (b.parallel && call.picked) some.gather(x, work.x_p, x.stride);
        if (normed && (of_gate[0] || of_up[0])) some.norm(b.second.before, read, work.n, kept.stats1);
        for (int64_t t = first; joint && t < first + rows; t++) {
            memcpy(work.gate_joint[t], work.d_gate[t], work.d_gate.stride);
            memcpy((char *)work.gate_joint[t] + work.d_gate.stride, work.d_up[t], work.d_up.stride);
        }
        some.linear_backward(b.gate, d_gate, begun, d_n, work.g_gate);
        if (b.gated && !joint) some.linear_backward(b.up, work.d_up, d_n, d_n, work.g_up);
        if (normed && wanted) some.norm_backward(b.second.before, work.d_x1, read, kept.stats1, added, work.d_x1);
    });
    FactorGradients gradients(b);
    gradients.add(call.P, b.down, work.inner, kept.h_down, of_down_layer, work.g_down, of_down);
    gradients.add(call.P, b.gate, n, kept.h_gate, d_gate, work.g_gate, of_gate);
    if (b.gated && !joint) gradients.add(call.P, b.up, n, kept.h_up, work.d_up, work.g_up, of_up);
    gradients.compute();
    return of_stream;
}

// From the gradient of attention's outputs, work.d_out, to those of turned queries and keys, and of values.
void attention_backward(const Call &call, const Kept &kept, const Work &work) {
    const BlockParts &b = call.b;
    const int64_t d = b.head_size;
    const int64_t strides[16] = {ld(b, kept.q),     d, ld(b, kept.k),   d, ld(b, kept.v),   d, ld(b, kept.out), d,
                                 ld(b, work.d_out), d, ld(b, work.d_q), d, ld(b, work.d_k), d, ld(b, work.d_v), d};
    check(dw_attention_backward((int)b.type, call.segments, call.count, call.T, b.window, (int)b.causal, b.heads, b.key_heads, d, d, b.scaling,
                                b.softcap, call.places, call.P, kept.q, kept.k, kept.v, kept.out, work.d_out, work.d_q, work.d_k, work.d_v, strides,
                                (float *)kept.logs[0]));
}

// From grad, of the half's outputs, to dx, or where that is null to the factors alone: of query, key, value and output.
void first_half_backward(const Call &call, const Rows &x, const Kept &kept, const Work &work, const Rows &grad, const Rows *dx, float *const *factors) {
    const BlockParts &b = call.b;
    float *const *const of_query = factors, *const *const of_key = factors + 2, *const *const of_value = factors + 4, *const *const of_output = factors + 6;
    const bool normed = b.first.before.used, apart = b.split == APART;
    const Rows &n = normed ? work.n : x;
    const Rows of_stream = b.first.post.used ? work.d_sum : grad, of_output_layer = b.first.after.used ? work.d_branch : of_stream;
    const Rows &of_x = call.picked ? work.above : of_stream;  // the stream's share of dx
    const Rows *const begun = dx && !normed ? &of_x : nullptr;
    const Turns turns(call, work);
    rows_apart(call.P, [&](int64_t first, int64_t rows) {
        SomeRows some(call, work, first, rows);
        some.end_backward(grad, b.first, kept.end, of_stream, of_output_layer);
        some.linear_backward(b.output, of_output_layer, nullptr, &work.d_out, work.g_output);
    });
    attention_backward(call, kept, work);
    auto queries = [&](SomeRows &some) {
        some.rotate(b.heads, work.d_q, turns.cosine_p, turns.sine_p, 1);
        if (b.of_query.used) some.norm_parts_backward(b.of_query, b.heads, b.head_size, work.d_q, kept.raw_q, kept.stats_q, nullptr, work.d_q);
    };
    if (call.picked)
        rows_apart(call.P, [&](int64_t first, int64_t rows) {
            SomeRows some(call, work, first, rows);
            turns.gather(call, some);
            queries(some);
            if (apart) some.linear_backward(b.query, work.d_q, nullptr, dx ? &work.d_n_p : nullptr, work.g_query);
        });
    rows_apart(call.T, [&](int64_t first, int64_t rows) {
        SomeRows some(call, work, first, rows);
        if (!call.picked) queries(some);
        some.rotate(b.key_heads, work.d_k, turns.cosine, turns.sine, 1);
        if (b.of_key.used) some.norm_parts_backward(b.of_key, b.key_heads, b.head_size, work.d_k, kept.raw_k, kept.stats_k, nullptr, work.d_k);
        if (normed && (of_query[0] || of_key[0] || of_value[0])) some.norm(b.first.before, x, work.n, kept.stats);
        if (dx && call.picked) some.spread(of_stream, work.above);
        if (apart) {
            if (!call.picked) some.linear_backward(b.query, work.d_q, begun, dx, work.g_query);
            else if (dx) {
                some.spread(work.d_n_p, *dx);
                if (begun) some.add(*dx, *begun, *dx);
            }
            some.linear_backward(b.key, work.d_k, dx, dx, work.g_key);
            some.linear_backward(b.value, work.d_v, dx, dx, work.g_value);
        } else {
            if (!call.views(b))
                some.each([&](int64_t t, int64_t p) {
                    copy_heads(b, 0, work.joint[t], p < 0 ? nullptr : work.d_q[p], IN);
                    copy_heads(b, 1, work.joint[t], work.d_k[t], IN), copy_heads(b, 2, work.joint[t], work.d_v[t], IN);
                });
            some.linear_backward(b.query, work.joint, begun, dx, work.g_query);
        }
        if (!dx) return;
        if (normed) some.norm_backward(b.first.before, *dx, x, kept.stats, &of_x, *dx);
        if (!b.parallel) return;
        if (call.picked) some.spread(work.d_x1, work.above);
        some.add(*dx, call.picked ? work.above : work.d_x1, *dx);
    });
    if (call.picked && apart && of_query[0])
        rows_apart(call.P, [&](int64_t first, int64_t rows) { SomeRows(call, work, first, rows).gather(n, work.n_p, n.stride); });
    FactorGradients gradients(b);
    const bool gathered = call.picked && apart;
    gradients.add(gathered ? call.P : call.T, b.query, gathered ? work.n_p : n, kept.h_query, apart ? work.d_q : work.joint, work.g_query, of_query);
    if (apart) gradients.add(call.T, b.key, n, kept.h_key, work.d_k, work.g_key, of_key);
    if (apart) gradients.add(call.T, b.value, n, kept.h_value, work.d_v, work.g_value, of_value);
    gradients.add(call.P, b.output, kept.out, kept.h_output, of_output_layer, work.g_output, of_output);
    gradients.compute();
}

}  // namespace

// Bytes of `kept`, of the forward's scratch and of the backward's, for T tokens, of which `picks` are asked for (0: all).
int dw_block_sizes(const BlockParts *block, int64_t T, int64_t picks, int64_t *sizes) {
    return guarded([&] {
        const Sizes of(T, picks);
        Room kept(nullptr), forward(nullptr), backward(nullptr);
        Kept(*block, of, kept), Work(*block, of, false, forward), Work(*block, of, true, backward);
        sizes[0] = kept.most, sizes[1] = forward.most, sizes[2] = backward.most;
    });
}

// in (T, hidden); segments (4, count), see Segments; picked (picks), ascending, the rows whose outputs are asked for, or
// null for all; cosine, sine (T, turned) in fp32; out (picks or T, hidden).
int dw_block(const BlockParts *block, int64_t T, void *in, const int64_t *segments, int64_t count, const int64_t *picked, int64_t picks,
             const float *cosine, const float *sine, void *kept_memory, void *scratch_memory, void *out) {
    return guarded([&] {
        const Call call(*block, T, picked, picks, segments, count, cosine, sine);
        Room kept_room(kept_memory), scratch_room(scratch_memory);
        const Kept kept(*block, call, kept_room);
        const Work work(*block, call, false, scratch_room);
        forward(call, call.hidden(in), kept, work, call.hidden(out));
    });
}

// grad (picks or T, hidden); dx (T, hidden), or null where nobody wants it. factors: where ∂L/∂A and ∂L/∂B of query, key,
// value, output, gate, up and down go, null for a layer that wants none.
int dw_block_backward(const BlockParts *block, int64_t T, void *in, const int64_t *segments, int64_t count, const int64_t *picked, int64_t picks,
                      const float *cosine, const float *sine, void *kept_memory, void *scratch_memory, void *grad_memory, void *dx_memory,
                      float *const *factors) {
    return guarded([&] {
        const Call call(*block, T, picked, picks, segments, count, cosine, sine);
        Room kept_room(kept_memory), scratch_room(scratch_memory);
        const Kept kept(*block, call, kept_room);
        const Work work(*block, call, true, scratch_room);
        const Rows x = call.hidden(in), grad = call.hidden(grad_memory), dx = call.hidden(dx_memory);
        const Rows of_stream = second_half_backward(call, x, kept, work, grad, dx_memory != nullptr, factors + 8);
        first_half_backward(call, x, kept, work, block->parallel ? of_stream : work.d_x1, dx_memory ? &dx : nullptr, factors);
    });
}
