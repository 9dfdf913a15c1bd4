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
    int64_t most_rank() const { return std::max({query.rank, key.rank, value.rank, output.rank, gate.rank, up.rank, down.rank}); }
};

// Memory given out piece by piece; from null it only counts.
struct Piece {
    char *base;
    int64_t used = 0, most = 0;

    void *take(int64_t bytes) {
        char *at = base + used;
        used += (bytes + 63) / 64 * 64;
        most = std::max(most, used);
        return at;
    }
};

// What the backward is given of the forward, for T tokens.
struct Kept {
    float *stats, *stats1, *logs;
    void *q, *k, *v, *out, *x1, *gate, *up;
    void *h_query, *h_key, *h_value, *h_output, *h_gate, *h_up, *h_down;

    Kept(const BlockParts &b, int64_t T, Piece &from) {
        const int64_t n = b.number();
        auto rows = [&](int64_t width) { return from.take(T * width * n); };
        stats = (float *)from.take(T * 8), stats1 = (float *)from.take(T * 8);
        logs = (float *)from.take(T * b.heads * 4);
        q = rows(b.wide()), k = rows(b.narrow()), v = rows(b.value.out), out = rows(b.wide());
        x1 = rows(b.hidden()), gate = rows(b.inner()), up = rows(b.inner());
        h_query = rows(b.query.rank), h_key = rows(b.key.rank), h_value = rows(b.value.rank), h_output = rows(b.output.rank);
        h_gate = rows(b.gate.rank), h_up = rows(b.up.rank), h_down = rows(b.down.rank);
    }
};

// Rows as bytes, made once for all layers that take the same rows so.
struct Steps {
    uint8_t *bytes = nullptr;
    float *scales = nullptr;
    const void *of = nullptr;
    const float *columns = nullptr;

    Steps(const BlockParts &b, int64_t T, Piece &from) {
        bool any = false;
        int64_t most = 0;
        for (const Layer *l : {&b.query, &b.key, &b.value, &b.output, &b.gate, &b.up, &b.down}) {
            any |= l->scale != nullptr;
            most = std::max({most, l->in, l->out});
        }
        if (!any) return;
        bytes = (uint8_t *)from.take(T * most);
        scales = (float *)from.take(T * 4);
    }
    bool made_of(const void *x, const float *by) {
        const bool there = of == x && columns == by;
        of = x, columns = by;
        return there;
    }
};

struct ForwardScratch {
    Steps steps;
    void *n, *inner;
    ForwardScratch(const BlockParts &b, int64_t T, Piece &from)
        : steps(b, T, from), n(from.take(T * b.hidden() * b.number())), inner(from.take(T * b.inner() * b.number())) {}
};

struct BackwardScratch {
    Steps steps;
    void *n, *d_n, *d_x1, *narrow;
    void *d_gate, *d_up, *inner;       // of the second half
    void *d_out, *d_q, *d_k, *d_v;     // of the first, in the same place
    BackwardScratch(const BlockParts &b, int64_t T, Piece &from) : steps(b, T, from) {
        auto rows = [&](int64_t width) { return from.take(T * width * b.number()); };
        n = rows(b.hidden()), d_n = rows(b.hidden()), d_x1 = rows(b.hidden()), narrow = rows(b.most_rank());
        const int64_t here = from.used;
        d_gate = rows(b.inner()), d_up = rows(b.inner()), inner = rows(b.inner());
        from.used = here;
        d_out = rows(b.wide()), d_q = rows(b.wide()), d_k = rows(b.narrow()), d_v = rows(b.value.out);
    }
};

static void norm(const BlockParts &b, const RowNorm &norm, int64_t T, const void *x, void *y, float *stats) {
    dw_norm(b.type, T, b.hidden(), x, b.hidden(), norm.weight, norm.bias, norm.offset, norm.eps, norm.centred, y, stats);
}
static void norm_backward(const BlockParts &b, const RowNorm &norm, int64_t T, const void *dy, const void *x, const float *stats, const void *added,
                          void *dx) {
    dw_norm_backward(b.type, T, b.hidden(), dy, x, b.hidden(), norm.weight, norm.offset, norm.centred, stats, added, dx);
}

static void linear(const BlockParts &b, const Layer &l, int64_t T, const void *x, Steps &steps, const void *added, void *y, void *h) {
    const bool make = l.scale && !steps.made_of(x, l.columns);
    dw_linear(b.type, T, l.out, l.in, x, l.weight_type, l.weight, 1, l.scale, l.columns, l.bias, l.bias_f32, l.A, l.B, l.rank, l.scaling, added,
              steps.bytes, steps.scales, make, y, h);
}
// dx = the gradient of the input + added, where dx is wanted, and what the factors' own gradients need.
static void linear_backward(const BlockParts &b, const Layer &l, int64_t T, const void *grad, Steps &steps, const void *added, void *dx, void *narrow) {
    dw_linear_backward(b.type, T, l.out, l.in, grad, l.weight, 1, l.scale, l.columns, l.A, l.B, l.rank, l.scaling, added, steps.bytes, steps.scales, dx,
                       narrow);
}
static void factors_backward(const BlockParts &b, const Layer &l, int64_t T, const void *x, const void *h, const void *grad, const void *narrow,
                             float *const *of) {
    if (of[0]) dw_factors_backward(b.type, T, l.in, l.out, l.rank, x, h, grad, narrow, l.scaling, of[0], of[1]);
}

static void rotate(const BlockParts &b, int64_t T, int64_t heads, void *x, const float *cosine, const float *sine, int backward) {
    const int64_t width = heads * b.head_size;
    if (b.turned) dw_rotate(b.type, T, heads, b.head_size, b.turned, x, width, cosine, sine, backward, x, width);
}

// Bytes of `kept`, of the forward's scratch and of the backward's.
extern "C" void dw_block_sizes(const BlockParts *block, int64_t T, int64_t *sizes) {
    Piece kept{nullptr}, forward{nullptr}, backward{nullptr};
    Kept(*block, T, kept), ForwardScratch(*block, T, forward), BackwardScratch(*block, T, backward);
    sizes[0] = kept.most, sizes[1] = forward.most, sizes[2] = backward.most;
}

// x, y (T, hidden); forest (4, segments); cosine, sine (T, turned) in fp32.
extern "C" void dw_block(const BlockParts *block, int64_t T, void *x, const int64_t *forest, int64_t segments, const float *cosine, const float *sine,
                         void *kept_memory, void *scratch_memory, void *y) {
    const BlockParts &b = *block;
    Piece kept_piece{(char *)kept_memory}, scratch_piece{(char *)scratch_memory};
    const Kept kept(b, T, kept_piece);
    ForwardScratch room(b, T, scratch_piece);
    const int64_t d = b.head_size, strides[8] = {b.wide(), d, b.narrow(), d, b.value.out, d, b.wide(), d};

    norm(b, b.first, T, x, room.n, kept.stats);
    linear(b, b.key, T, room.n, room.steps, nullptr, kept.k, kept.h_key);
    linear(b, b.value, T, room.n, room.steps, nullptr, kept.v, kept.h_value);
    linear(b, b.query, T, room.n, room.steps, nullptr, kept.q, kept.h_query);
    rotate(b, T, b.heads, kept.q, cosine, sine, 0);
    rotate(b, T, b.key_heads, kept.k, cosine, sine, 0);
    dw_attention(b.type, forest, segments, T, b.window, 1, b.heads, b.key_heads, d, d, b.scaling, b.softcap, nullptr, T, kept.q, kept.k, kept.v,
                 kept.out, strides, kept.logs);
    linear(b, b.output, T, kept.out, room.steps, x, kept.x1, kept.h_output);

    norm(b, b.second, T, kept.x1, room.n, kept.stats1);
    room.steps.of = nullptr;  // other rows in the same place
    linear(b, b.gate, T, room.n, room.steps, nullptr, kept.gate, kept.h_gate);
    linear(b, b.up, T, room.n, room.steps, nullptr, kept.up, kept.h_up);
    dw_activation(b.type, b.activation, T, b.inner(), kept.gate, kept.up, room.inner);
    linear(b, b.down, T, room.inner, room.steps, kept.x1, y, kept.h_down);
}

// dx (T, hidden), or null where nobody wants it. factors: where ∂L/∂A and ∂L/∂B of query, key, value, output, gate, up
// and down go, null for a layer that wants none.
extern "C" void dw_block_backward(const BlockParts *block, int64_t T, void *x, const int64_t *forest, int64_t segments, const float *cosine,
                                  const float *sine, void *kept_memory, void *scratch_memory, void *grad, void *dx, float *const *factors) {
    const BlockParts &b = *block;
    Piece kept_piece{(char *)kept_memory}, scratch_piece{(char *)scratch_memory};
    const Kept kept(b, T, kept_piece);
    BackwardScratch room(b, T, scratch_piece);
    Steps &steps = room.steps;
    float *const *const of_query = factors, *const *const of_key = factors + 2, *const *const of_value = factors + 4;
    float *const *const of_output = factors + 6, *const *const of_gate = factors + 8, *const *const of_up = factors + 10;
    float *const *const of_down = factors + 12;

    linear_backward(b, b.down, T, grad, steps, nullptr, room.d_gate, room.narrow);
    dw_activation_backward(b.type, b.activation, T, b.inner(), room.d_gate, kept.gate, kept.up, room.d_gate, room.d_up, room.inner);
    factors_backward(b, b.down, T, room.inner, kept.h_down, grad, room.narrow, of_down);
    if (of_gate[0] || of_up[0]) norm(b, b.second, T, kept.x1, room.n, kept.stats1);
    linear_backward(b, b.gate, T, room.d_gate, steps, nullptr, room.d_n, room.narrow);
    factors_backward(b, b.gate, T, room.n, kept.h_gate, room.d_gate, room.narrow, of_gate);
    linear_backward(b, b.up, T, room.d_up, steps, room.d_n, room.d_n, room.narrow);
    factors_backward(b, b.up, T, room.n, kept.h_up, room.d_up, room.narrow, of_up);
    norm_backward(b, b.second, T, room.d_n, kept.x1, kept.stats1, grad, room.d_x1);

    const int64_t d = b.head_size, wide = b.wide(), narrow = b.narrow(), values = b.value.out;
    const int64_t strides[16] = {wide, d, narrow, d, values, d, wide, d, wide, d, wide, d, narrow, d, values, d};
    linear_backward(b, b.output, T, room.d_x1, steps, nullptr, room.d_out, room.narrow);
    factors_backward(b, b.output, T, kept.out, kept.h_output, room.d_x1, room.narrow, of_output);
    dw_attention_backward(b.type, forest, segments, T, b.window, 1, b.heads, b.key_heads, d, d, b.scaling, b.softcap, nullptr, T, kept.q, kept.k,
                          kept.v, kept.out, room.d_out, room.d_q, room.d_k, room.d_v, strides, kept.logs);
    rotate(b, T, b.heads, room.d_q, cosine, sine, 1);
    rotate(b, T, b.key_heads, room.d_k, cosine, sine, 1);
    if (of_query[0] || of_key[0] || of_value[0]) norm(b, b.first, T, x, room.n, kept.stats);
    void *d_n = dx ? room.d_n : nullptr;
    linear_backward(b, b.query, T, room.d_q, steps, nullptr, d_n, room.narrow);
    factors_backward(b, b.query, T, room.n, kept.h_query, room.d_q, room.narrow, of_query);
    linear_backward(b, b.key, T, room.d_k, steps, d_n, d_n, room.narrow);
    factors_backward(b, b.key, T, room.n, kept.h_key, room.d_k, room.narrow, of_key);
    linear_backward(b, b.value, T, room.d_v, steps, d_n, d_n, room.narrow);
    factors_backward(b, b.value, T, room.n, kept.h_value, room.d_v, room.narrow, of_value);
    if (dx) norm_backward(b, b.first, T, d_n, x, kept.stats, room.d_x1, dx);
}
