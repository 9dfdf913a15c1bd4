// A transformer block in one call forward and one backward, composed of the other exported kernels.
//
//  x1 = x + output(attention(rotate(queries, keys), values))     all of norm(x)
//  y  = x1 + down(f(gate) · up), or down(f(gate))                 of norm(x1), or of norm(x) if halves are parallel
//
// Optional norms: before a half, after its last layer, over the sum (HalfNorms), and over heads.
//
// The operations and their order equal those of the Python composition of the individual kernels, and results are
// bitwise equal. For short rows, about thirty calls per block and direction, each with its tensors, would take as long
// as the kernels. The caller provides `saved` for tensors that the backward needs, and `scratch` for temporary ones.
//
// With output rows, only these rows are computed for queries, attention outputs and everything after. Keys and values
// are computed for all rows.
#include "block.h"

#include <algorithm>
#include <cstring>

#include "block_memory.h"
#include "factors.h"
#include "kernels.h"
#include "threads.h"

using namespace deltaw;

namespace {

// Arguments of both directions in addition to the block.
struct BlockCall : RowCounts {
    const BlockParts &b;
    const int64_t *const output_positions;  // (P) positions of output rows, null for all rows
    const int64_t *const segments, count;
    const float *const cosine, *const sine;

    BlockCall(const BlockParts &b, int64_t T, const int64_t *output_positions, int64_t output_count, const int64_t *segments, int64_t count,
              const float *cosine,
         const float *sine)
        : RowCounts(T, output_positions ? output_count : 0), b(b), output_positions(output_positions), segments(segments), count(count),
          cosine(cosine), sine(sine) {
        for (int64_t p = 0; output_positions && p < output_count; p++)
            require_in_bounds(output_positions[p] >= 0 && output_positions[p] < T && (p == 0 || output_positions[p - 1] < output_positions[p]));
    }
    Rows hidden(void *data) const { return Rows{(char *)data, b.hidden() * b.number()}; }
};

// Offset, in numbers, of a head's queries (part 0), keys (1) or values (2) in a joint row.
int64_t joint_offset(const BlockParts &b, int part, int64_t head) {
    const int64_t group = b.heads / b.key_heads;
    if (b.split == GROUPED) return (part == 0 ? head / group * (group + 2) + head % group : head * (group + 2) + group + part - 1) * b.head_size;
    return ((part > 0 ? b.heads : 0) + (part > 1 ? b.key_heads : 0) + head) * b.head_size;
}

enum CopyDirection { OUT, IN };

// Copy one token's queries, keys or values from the joint row or into it. If `separate` is null, zeros are written.
void copy_heads(const BlockParts &b, int part, void *joint, void *separate, CopyDirection direction) {
    const int64_t size = b.head_size * b.number();
    for (int64_t head = 0; head < (part == 0 ? b.heads : b.key_heads); head++) {
        char *const in_joint = (char *)joint + joint_offset(b, part, head) * b.number(), *const separate_head = (char *)separate + head * size;
        if (direction == OUT) memcpy(separate_head, in_joint, size);
        else if (separate) memcpy(in_joint, separate_head, size);
        else memset(in_joint, 0, size);
    }
}

// Runs the kernels of a block on a subset of its rows. A failure of a kernel aborts the block's call.
struct RowKernels {
    const BlockCall &call;
    const BlockParts &b;
    const int64_t first, rows;
    uint8_t *const int8;
    float *const scales;
    const void *int8_source = nullptr;  // cache key of `int8`: rows, SmoothQuant scales, and whether scales are per block
    const float *int8_smooth = nullptr;
    int int8_in_blocks = 0;

    RowKernels(const BlockCall &call, const ScratchTensors &work, int64_t first, int64_t rows)
        : call(call), b(call.b), first(first), rows(rows), int8((uint8_t *)work.int8[first]), scales((float *)work.scales[first]) {}

    int type() const { return (int)b.type; }
    void invalidate(const Rows &y) {
        if (int8_source == y.data) int8_source = nullptr;
    }

    void norm(const RowNorm &norm, const Rows &x, const Rows &y, const Rows &stats) { norm_parts(norm, 1, b.hidden(), x, y, stats); }
    void norm_backward(const RowNorm &norm, const Rows &dy, const Rows &x, const Rows &stats, const Rows *addend, const Rows &dx) {
        norm_parts_backward(norm, 1, b.hidden(), dy, x, stats, addend, dx);
    }
    // Apply the norm to each of `parts` parts of a row.
    void norm_parts(const RowNorm &norm, int64_t parts, int64_t D, const Rows &x, const Rows &y, const Rows &stats) {
        check(dw_norm(type(), rows * parts, D, x[first], D, norm.weight, norm.bias, norm.offset, norm.eps, (int)norm.centered, y[first],
                      (float *)stats[first]));
        invalidate(y);
    }
    void norm_parts_backward(const RowNorm &norm, int64_t parts, int64_t D, const Rows &dy, const Rows &x, const Rows &stats, const Rows *addend,
                             const Rows &dx) {
        check(dw_norm_backward(type(), rows * parts, D, dy[first], x[first], D, norm.weight, norm.offset, (int)norm.centered, (float *)stats[first],
                               addend ? (*addend)[first] : nullptr, dx[first]));
    }
    // Rows that are the int8 input of several layers are quantized once.
    void linear(const Layer &l, const Rows &x, const Rows *addend, const Rows &y, const Rows &h) {
        const int in_blocks = (int)l.in_blocks;
        const bool quantize = l.scale && !(int8_source == x.data && int8_smooth == l.smooth && int8_in_blocks == in_blocks);
        if (quantize) int8_source = x.data, int8_smooth = l.smooth, int8_in_blocks = in_blocks;
        check(dw_linear(type(), rows, l.out, l.in, x[first], (int)l.weight_type, l.weight, (int)l.by_column, l.scale, l.smooth, l.bias,
                        (int)l.bias_f32, l.A, l.B, l.rank, l.scaling, addend ? (*addend)[first] : nullptr, int8, scales, in_blocks, quantize,
                            y[first],
                        h[first]));
        invalidate(y);
    }
    // dx = gradient of the input + addend, if dx is not null, and g for the gradients of the factors.
    void linear_backward(const Layer &l, const Rows &grad, const Rows *addend, const Rows *dx, const Rows &g) {
        check(dw_linear_backward(type(), rows, l.out, l.in, grad[first], (int)l.weight_type, l.weight, (int)l.by_column, l.scale, l.smooth, l.A, l.B,
                                 l.rank, l.scaling, addend ? (*addend)[first] : nullptr, b.has_int8_gradient(l) ? int8 : nullptr, scales,
                                 dx ? (*dx)[first] : nullptr, g[first]));
        int8_source = nullptr;
    }
    void rotate(int64_t heads, const Rows &x, const Rows &cosine, const Rows &sine, int backward) {
        if (!b.rotary_dims) return;
        const int64_t ld = x.stride / b.number();
        check(dw_rotate(type(), rows, heads, b.head_size, b.rotary_dims, x[first], ld, (const float *)cosine[first], (const float *)sine[first],
                        backward,
                        x[first], ld));
    }
    void activation(const Rows &gate, const Rows &up, const Rows &y) {
        check(dw_activation(type(), (int)b.activation, rows, b.inner(), gate[first], b.gated ? up[first] : nullptr, y[first]));
        invalidate(y);
    }
    void activation_backward(const Rows &dy, const Rows &gate, const Rows &up, const Rows &d_gate, const Rows &d_up, const Rows &y) {
        check(dw_activation_backward(type(), (int)b.activation, rows, b.inner(), dy[first], gate[first], b.gated ? up[first] : nullptr, d_gate[first],
                                     b.gated ? d_up[first] : nullptr, y[first]));
    }
    void add(const Rows &a, const Rows &c, const Rows &y) {
        check(dw_add(type(), rows * b.hidden(), a[first], c[first], y[first]));
        invalidate(y);
    }

    // y = sum of the residual stream and the half's last layer, with the half's norms.
    void end(const Layer &l, const Rows &x, const Rows &h, const Rows &stream, const HalfNorms &norms, const HalfEndTensors &end, const Rows &y) {
        const Rows &total = norms.post.used ? end.total : y;
        if (norms.after.used) {
            linear(l, x, nullptr, end.branch, h);
            norm(norms.after, end.branch, total, end.stats_after);
            add(stream, total, total);
        } else linear(l, x, &stream, total, h);
        if (norms.post.used) norm(norms.post, total, y, end.stats_post);
    }
    // Split grad into stream_grad and layer_grad, which equal grad if there is no norm.
    void end_backward(const Rows &grad, const HalfNorms &norms, const HalfEndTensors &end, const Rows &stream_grad, const Rows &layer_grad) {
        if (norms.post.used) norm_backward(norms.post, grad, end.total, end.stats_post, nullptr, stream_grad);
        if (norms.after.used) norm_backward(norms.after, stream_grad, end.branch, end.stats_after, nullptr, layer_grad);
    }

    // Gather output rows: `width` bytes each.
    void gather(const Rows &from, const Rows &to, int64_t width) {
        for (int64_t p = first; p < first + rows; p++) memcpy(to[p], from[call.output_positions[p]], width);
        invalidate(to);
    }
    // Call body(row, index among the output rows or -1) for each of all rows.
    template <class Body>
    void for_each_row(Body &&body) {
        if (!call.has_output_rows) {
            for (int64_t t = first; t < first + rows; t++) body(t, t);
            return;
        }
        const int64_t *const stop = call.output_positions + call.P, *next = std::lower_bound(call.output_positions, stop, first);
        for (int64_t t = first; t < first + rows; t++) {
            const bool is_output = next < stop && *next == t;
            body(t, is_output ? next - call.output_positions : -1);
            next += is_output;
        }
    }
    // Scatter output rows to their positions, zeros elsewhere.
    void scatter(const Rows &from, const Rows &to) {
        const int64_t width = b.hidden() * b.number();
        for_each_row([&](int64_t t, int64_t p) { p < 0 ? memset(to[t], 0, width) : memcpy(to[t], from[p], width); });
    }
};

// Collects layers whose factors need gradients, to compute them together.
struct FactorGradients {
    const BlockParts &b;
    FactorsBackward layers[7];
    int count = 0;

    explicit FactorGradients(const BlockParts &b) : b(b) {}

    void add(int64_t rows, const Layer &l, const Rows &x, const Rows &h, const Rows &grad, const Rows &g, float *const *into) {
        if (into[0]) layers[count++] = FactorsBackward{rows, l.in, l.out, l.rank, x, h, grad, g, l.scaling, into[0], into[1]};
    }
    void compute() {
        factors_backward((int)b.type, layers, count);
        count = 0;
    }
};

// Tables of rotary positions for all rows and for the output rows.
struct RotaryTables {
    Rows cosine, sine, cosine_p, sine_p;

    RotaryTables(const BlockCall &call, const ScratchTensors &work)
        : cosine{(char *)call.cosine, call.b.rotary_dims * 4}, sine{(char *)call.sine, call.b.rotary_dims * 4},
          cosine_p(call.has_output_rows ? work.cosine : cosine), sine_p(call.has_output_rows ? work.sine : sine) {}
    void gather(const BlockCall &call, RowKernels &kernels) const {
        if (call.b.rotary_dims) kernels.gather(cosine, cosine_p, cosine.stride), kernels.gather(sine, sine_p, sine.stride);
    }
};

int64_t ld(const BlockParts &b, const Rows &rows) { return rows.stride / b.number(); }

// Compute queries of the output rows, and keys and values of all rows.
void heads_forward(const BlockCall &call, const Rows &x, const SavedTensors &saved, const ScratchTensors &work) {
    const BlockParts &b = call.b;
    const bool normed = b.first.before.used;
    const Rows &n = normed ? work.n : x, &joint = call.uses_views(b) ? saved.joint : work.joint;
    const RotaryTables rotary(call, work);
    auto finish_queries = [&](RowKernels &kernels) {
        if (b.query_norm.used) kernels.norm_parts(b.query_norm, b.heads, b.head_size, saved.raw_q, saved.q, saved.stats_q);
        kernels.rotate(b.heads, saved.q, rotary.cosine_p, rotary.sine_p, 0);
    };
    for_each_row_range(call.T, [&](int64_t first, int64_t rows) {
        RowKernels kernels(call, work, first, rows);
        if (normed) kernels.norm(b.first.before, x, work.n, saved.stats);
        if (b.split == SEPARATE) {
            kernels.linear(b.key, n, nullptr, saved.raw_k, saved.h_key);
            kernels.linear(b.value, n, nullptr, saved.v, saved.h_value);
            if (!call.has_output_rows) kernels.linear(b.query, n, nullptr, saved.raw_q, saved.h_query);
        } else {
            kernels.linear(b.query, n, nullptr, joint, saved.h_query);
            if (!call.uses_views(b))
                kernels.for_each_row([&](int64_t t, int64_t p) {
                    if (p >= 0) copy_heads(b, 0, joint[t], saved.raw_q[p], OUT);
                    copy_heads(b, 1, joint[t], saved.raw_k[t], OUT), copy_heads(b, 2, joint[t], saved.v[t], OUT);
                });
        }
        if (b.key_norm.used) kernels.norm_parts(b.key_norm, b.key_heads, b.head_size, saved.raw_k, saved.k, saved.stats_k);
        kernels.rotate(b.key_heads, saved.k, rotary.cosine, rotary.sine, 0);
        if (!call.has_output_rows) finish_queries(kernels);
    });
    if (!call.has_output_rows) return;
    for_each_row_range(call.P, [&](int64_t first, int64_t rows) {
        RowKernels kernels(call, work, first, rows);
        rotary.gather(call, kernels);
        if (b.split == SEPARATE) {
            kernels.gather(n, work.n_p, n.stride);
            kernels.linear(b.query, work.n_p, nullptr, saved.raw_q, saved.h_query);
        }
        finish_queries(kernels);
    });
}

void forward(const BlockCall &call, const Rows &x, const SavedTensors &saved, const ScratchTensors &work, const Rows &y) {
    const BlockParts &b = call.b;
    heads_forward(call, x, saved, work);
    const int64_t d = b.head_size, strides[8] = {ld(b, saved.q), d, ld(b, saved.k), d, ld(b, saved.v), d, ld(b, saved.out), d};
    check(dw_attention((int)b.type, call.segments, call.count, call.T, b.window, (int)b.causal, b.heads, b.key_heads, d, d, b.scaling, b.softcap,
                       call.output_positions, call.P, saved.q, saved.k, saved.v, saved.out, strides, (float *)saved.logs[0]));
    const Rows &stream = call.has_output_rows ? work.x_p : x, &x1 = b.parallel ? y : saved.x1, &read = b.parallel ? stream : x1;
    const Rows &n = b.second.before.used ? work.n : read;
    for_each_row_range(call.P, [&](int64_t first, int64_t rows) {
        RowKernels kernels(call, work, first, rows);
        if (call.has_output_rows) kernels.gather(x, work.x_p, x.stride);
        kernels.end(b.output, saved.out, saved.h_output, stream, b.first, saved.end, x1);
        if (b.second.before.used) kernels.norm(b.second.before, read, work.n, saved.stats1);
        kernels.linear(b.gate, n, nullptr, b.gate_has_up() ? work.gate_joint : saved.gate, saved.h_gate);
        if (b.gate_has_up())
            for (int64_t t = first; t < first + rows; t++) {
                memcpy(saved.gate[t], work.gate_joint[t], saved.gate.stride);
                memcpy(saved.up[t], (char *)work.gate_joint[t] + saved.gate.stride, saved.up.stride);
            }
        else if (b.gated) kernels.linear(b.up, n, nullptr, saved.up, saved.h_up);
        kernels.activation(saved.gate, saved.up, work.inner);
        kernels.end(b.down, work.inner, saved.h_down, x1, b.second, saved.second_end, y);
    });
}

// Compute work.d_x1 from grad: the gradient of the half's input, including that of the residual stream unless halves
// are parallel. It is skipped if halves are parallel and dx is not required. Returns the gradient of the residual
// stream. factors: of gate, up and down.
Rows second_half_backward(const BlockCall &call, const Rows &x, const SavedTensors &saved, const ScratchTensors &work, const Rows &grad,
                          bool need_x, float *const *factors) {
    const BlockParts &b = call.b;
    float *const *const gate_grads = factors, *const *const up_grads = factors + 2, *const *const down_grads = factors + 4;
    const bool normed = b.second.before.used, need_input_grad = need_x || !b.parallel, joint = b.gate_has_up();
    const Rows &read = !b.parallel ? saved.x1 : call.has_output_rows ? work.x_p : x, &n = normed ? work.n : read;
    const Rows stream_grad = b.second.post.used ? work.d_sum : grad, down_output_grad = b.second.after.used ? work.d_branch : stream_grad;
    const Rows *const addend = b.parallel ? nullptr : &stream_grad, *const initial_addend = normed ? nullptr : addend;
    const Rows *const d_n = need_input_grad ? &work.d_x1 : nullptr;  // gradient before the norm, shares memory with the gradient after it
    const Rows &d_gate = joint ? work.gate_joint : work.d_gate;
    for_each_row_range(call.P, [&](int64_t first, int64_t rows) {
        RowKernels kernels(call, work, first, rows);
        kernels.end_backward(grad, b.second, saved.second_end, stream_grad, down_output_grad);
        kernels.linear_backward(b.down, down_output_grad, nullptr, &work.d_gate, work.g_down);
        kernels.activation_backward(work.d_gate, saved.gate, saved.up, work.d_gate, work.d_up, work.inner);
        if (b.parallel && call.has_output_rows) kernels.gather(x, work.x_p, x.stride);
        if (normed && (gate_grads[0] || up_grads[0])) kernels.norm(b.second.before, read, work.n, saved.stats1);
        for (int64_t t = first; joint && t < first + rows; t++) {
            memcpy(work.gate_joint[t], work.d_gate[t], work.d_gate.stride);
            memcpy((char *)work.gate_joint[t] + work.d_gate.stride, work.d_up[t], work.d_up.stride);
        }
        kernels.linear_backward(b.gate, d_gate, initial_addend, d_n, work.g_gate);
        if (b.gated && !joint) kernels.linear_backward(b.up, work.d_up, d_n, d_n, work.g_up);
        if (normed && need_input_grad) kernels.norm_backward(b.second.before, work.d_x1, read, saved.stats1, addend, work.d_x1);
    });
    FactorGradients gradients(b);
    gradients.add(call.P, b.down, work.inner, saved.h_down, down_output_grad, work.g_down, down_grads);
    gradients.add(call.P, b.gate, n, saved.h_gate, d_gate, work.g_gate, gate_grads);
    if (b.gated && !joint) gradients.add(call.P, b.up, n, saved.h_up, work.d_up, work.g_up, up_grads);
    gradients.compute();
    return stream_grad;
}

// Compute the gradients of rotated queries and keys and of values from work.d_out, the gradient of attention's outputs.
void attention_backward(const BlockCall &call, const SavedTensors &saved, const ScratchTensors &work) {
    const BlockParts &b = call.b;
    const int64_t d = b.head_size;
    const int64_t strides[16] = {ld(b, saved.q),     d, ld(b, saved.k),   d, ld(b, saved.v),   d, ld(b, saved.out), d,
                                 ld(b, work.d_out), d, ld(b, work.d_q), d, ld(b, work.d_k), d, ld(b, work.d_v), d};
    check(dw_attention_backward((int)b.type, call.segments, call.count, call.T, b.window, (int)b.causal, b.heads, b.key_heads, d, d, b.scaling,
                                b.softcap, call.output_positions, call.P, saved.q, saved.k, saved.v, saved.out, work.d_out, work.d_q, work.d_k,
                                    work.d_v, strides,
                                (float *)saved.logs[0]));
}

// Compute dx from grad, the gradient of the half's outputs. If dx is null, only the gradients of the factors of query,
// key, value and output are computed.
void first_half_backward(const BlockCall &call, const Rows &x, const SavedTensors &saved, const ScratchTensors &work, const Rows &grad,
                         const Rows *dx, float *const *factors) {
    const BlockParts &b = call.b;
    float *const *const query_grads = factors, *const *const key_grads = factors + 2, *const *const value_grads = factors + 4,
        *const *const output_grads = factors + 6;
    const bool normed = b.first.before.used, is_separate = b.split == SEPARATE;
    const Rows &n = normed ? work.n : x;
    const Rows stream_grad = b.first.post.used ? work.d_sum : grad, output_layer_grad = b.first.after.used ? work.d_branch : stream_grad;
    const Rows &residual_grad = call.has_output_rows ? work.above : stream_grad;  // contribution of the residual stream to dx
    const Rows *const initial_addend = dx && !normed ? &residual_grad : nullptr;
    const RotaryTables rotary(call, work);
    for_each_row_range(call.P, [&](int64_t first, int64_t rows) {
        RowKernels kernels(call, work, first, rows);
        kernels.end_backward(grad, b.first, saved.end, stream_grad, output_layer_grad);
        kernels.linear_backward(b.output, output_layer_grad, nullptr, &work.d_out, work.g_output);
    });
    attention_backward(call, saved, work);
    auto queries = [&](RowKernels &kernels) {
        kernels.rotate(b.heads, work.d_q, rotary.cosine_p, rotary.sine_p, 1);
        if (b.query_norm.used) kernels.norm_parts_backward(b.query_norm, b.heads, b.head_size, work.d_q, saved.raw_q, saved.stats_q, nullptr,
                                                           work.d_q);
    };
    if (call.has_output_rows)
        for_each_row_range(call.P, [&](int64_t first, int64_t rows) {
            RowKernels kernels(call, work, first, rows);
            rotary.gather(call, kernels);
            queries(kernels);
            if (is_separate) kernels.linear_backward(b.query, work.d_q, nullptr, dx ? &work.d_n_p : nullptr, work.g_query);
        });
    for_each_row_range(call.T, [&](int64_t first, int64_t rows) {
        RowKernels kernels(call, work, first, rows);
        if (!call.has_output_rows) queries(kernels);
        kernels.rotate(b.key_heads, work.d_k, rotary.cosine, rotary.sine, 1);
        if (b.key_norm.used) kernels.norm_parts_backward(b.key_norm, b.key_heads, b.head_size, work.d_k, saved.raw_k, saved.stats_k, nullptr,
                                                         work.d_k);
        if (normed && (query_grads[0] || key_grads[0] || value_grads[0])) kernels.norm(b.first.before, x, work.n, saved.stats);
        if (dx && call.has_output_rows) kernels.scatter(stream_grad, work.above);
        if (is_separate) {
            if (!call.has_output_rows) kernels.linear_backward(b.query, work.d_q, initial_addend, dx, work.g_query);
            else if (dx) {
                kernels.scatter(work.d_n_p, *dx);
                if (initial_addend) kernels.add(*dx, *initial_addend, *dx);
            }
            kernels.linear_backward(b.key, work.d_k, dx, dx, work.g_key);
            kernels.linear_backward(b.value, work.d_v, dx, dx, work.g_value);
        } else {
            if (!call.uses_views(b))
                kernels.for_each_row([&](int64_t t, int64_t p) {
                    copy_heads(b, 0, work.joint[t], p < 0 ? nullptr : work.d_q[p], IN);
                    copy_heads(b, 1, work.joint[t], work.d_k[t], IN), copy_heads(b, 2, work.joint[t], work.d_v[t], IN);
                });
            kernels.linear_backward(b.query, work.joint, initial_addend, dx, work.g_query);
        }
        if (!dx) return;
        if (normed) kernels.norm_backward(b.first.before, *dx, x, saved.stats, &residual_grad, *dx);
        if (!b.parallel) return;
        if (call.has_output_rows) kernels.scatter(work.d_x1, work.above);
        kernels.add(*dx, call.has_output_rows ? work.above : work.d_x1, *dx);
    });
    if (call.has_output_rows && is_separate && query_grads[0])
        for_each_row_range(call.P, [&](int64_t first, int64_t rows) { RowKernels(call, work, first, rows).gather(n, work.n_p, n.stride); });
    FactorGradients gradients(b);
    const bool gathered = call.has_output_rows && is_separate;
    gradients.add(gathered ? call.P : call.T, b.query, gathered ? work.n_p : n, saved.h_query, is_separate ? work.d_q : work.joint, work.g_query,
                  query_grads);
    if (is_separate) gradients.add(call.T, b.key, n, saved.h_key, work.d_k, work.g_key, key_grads);
    if (is_separate) gradients.add(call.T, b.value, n, saved.h_value, work.d_v, work.g_value, value_grads);
    gradients.add(call.P, b.output, saved.out, saved.h_output, output_layer_grad, work.g_output, output_grads);
    gradients.compute();
}

}  // namespace

// Write the sizes in bytes of `saved`, the forward's scratch and the backward's scratch, for T tokens with
// `output_count` output rows (0: all).
int dw_block_sizes(const BlockParts *block, int64_t T, int64_t output_count, int64_t *sizes) {
    return guarded([&] {
        const RowCounts counts(T, output_count);
        BufferAllocator saved(nullptr), forward(nullptr), backward(nullptr);
        SavedTensors(*block, counts, saved), ScratchTensors(*block, counts, false, forward), ScratchTensors(*block, counts, true, backward);
        sizes[0] = saved.peak, sizes[1] = forward.peak, sizes[2] = backward.peak;
    });
}

// in (T, hidden); segments (4, count), see Segments; output_rows (output_count), ascending, or null for all; cosine,
// sine (T, rotary_dims) in fp32; out (output_count or T, hidden).
int dw_block(const BlockParts *block, int64_t T, void *in, const int64_t *segments, int64_t count, const int64_t *output_rows, int64_t output_count,
             const float *cosine, const float *sine, void *saved_memory, void *scratch_memory, void *out) {
    return guarded([&] {
        const BlockCall call(*block, T, output_rows, output_count, segments, count, cosine, sine);
        BufferAllocator saved_allocator(saved_memory), scratch_allocator(scratch_memory);
        const SavedTensors saved(*block, call, saved_allocator);
        const ScratchTensors work(*block, call, false, scratch_allocator);
        forward(call, call.hidden(in), saved, work, call.hidden(out));
    });
}

// grad (output_count or T, hidden); dx (T, hidden), or null to skip it. factors: destinations of ∂L/∂A and ∂L/∂B of
// query, key, value, output, gate, up and down, null to skip a layer.
int dw_block_backward(const BlockParts *block, int64_t T, void *in, const int64_t *segments, int64_t count, const int64_t *output_rows,
                      int64_t output_count,
                      const float *cosine, const float *sine, void *saved_memory, void *scratch_memory, void *grad_memory, void *dx_memory,
                      float *const *factors) {
    return guarded([&] {
        const BlockCall call(*block, T, output_rows, output_count, segments, count, cosine, sine);
        BufferAllocator saved_allocator(saved_memory), scratch_allocator(scratch_memory);
        const SavedTensors saved(*block, call, saved_allocator);
        const ScratchTensors work(*block, call, true, scratch_allocator);
        const Rows x = call.hidden(in), grad = call.hidden(grad_memory), dx = call.hidden(dx_memory);
        const Rows stream_grad = second_half_backward(call, x, saved, work, grad, dx_memory != nullptr, factors + 8);
        first_half_backward(call, x, saved, work, block->parallel ? stream_grad : work.d_x1, dx_memory ? &dx : nullptr, factors);
    });
}
