// Backward pass of attention over a prefix tree of segments. Weights are recomputed from the saved log-sum-exp.
#include "attention_tiles.h"
#include "kernels.h"

using namespace deltaw;

namespace {

struct BackwardInputs {
    const HeadRows q, k, v, out, grad;
    const float *logs;
};
struct Gradients {
    const OutRows q, k, v;
};

// Buffers in which each thread sums the gradients of keys and values: one (length, width) in fp32 per key head that the
// thread processes, with keys before values. They are added in the order of the threads, so results are deterministic.
struct KeyValueSums {
    const int64_t length, padded_d, padded_dv, size;
    std::vector<int64_t> low, high, buffer_index;  // by thread: key heads low … high - 1, and the index of its first buffer
    int64_t num_buffers = 0;
    float *at = nullptr;

    KeyValueSums(int64_t length, int64_t d, int64_t dv, const std::vector<int64_t> &part_starts, int64_t blocks)
        : length(length), padded_d((d + 31) / 32 * 32), padded_dv((dv + 31) / 32 * 32), size(length * (padded_d + padded_dv)) {
        for (size_t t = 0; t + 1 < part_starts.size(); t++) {
            const bool some = part_starts[t + 1] > part_starts[t];
            low.push_back(some ? part_starts[t] / blocks : 0);
            high.push_back(some ? (part_starts[t + 1] - 1) / blocks + 1 : 0);
            buffer_index.push_back(num_buffers);
            num_buffers += high[t] - low[t];
        }
    }
    void clear(int thread) const { memset(at + buffer_index[thread] * size, 0, (high[thread] - low[thread]) * size * sizeof(float)); }
    float *key_sums(int thread, int64_t head) const { return at + (buffer_index[thread] + head - low[thread]) * size; }
    float *value_sums(int thread, int64_t head) const { return key_sums(thread, head) + length * padded_d; }
    bool contains(int thread, int64_t head) const { return head >= low[thread] && head < high[thread]; }
    int threads() const { return (int)low.size(); }
};

template <class Op>
class Backward : Tiles<Op> {
    typedef Tiles<Op> Tile;
    typedef typename Op::Left T;
    typedef typename Tile::Number Number;
    static constexpr int PER = Op::PER_GROUP;

    const Segments &f;
    const AttentionSizes z;
    const BackwardInputs in;
    const Gradients to;
    const int64_t group = z.group(), padded = padded_length(f.length), panel = COLUMNS / PER * 128;

  public:
    Backward(const Segments &f, const AttentionSizes &z, const BackwardInputs &in, const Gradients &to) : f(f), z(z), in(in), to(to) {}

    void run() {
        const std::vector<Block> blocks = make_blocks(f, group);
        const int64_t count = (int64_t)blocks.size();
        const std::vector<int64_t> part_starts = divide_blocks(blocks, z.key_heads, thread_count());
        KeyValueSums sums(f.length, z.d, z.dv, part_starts, count);
        Scratch scratch;
        Number *const transposed = scratch.take<Number>(z.key_heads * z.d * padded);  // transposed keys: (key heads, d, padded tokens)
        sums.at = scratch.take<float>(sums.num_buffers * sums.size);
        Tile::transpose_heads(in.k, z.key_heads, z.d, f.length, transposed);
        const LeftOperand<Op> keys(in.k, z.key_heads, z.d, f.length, scratch.take<Number>(LeftOperand<Op>::numbers(z.key_heads, z.d, f.length)));
        const LeftOperand<Op> values(in.v, z.key_heads, z.dv, f.length, scratch.take<Number>(LeftOperand<Op>::numbers(z.key_heads, z.dv, f.length)));
        in_parallel([&](int thread, int) {
            std::vector<Range> ranges;
            const ProductScope<Op> product_scope;
            if (part_starts[thread] < part_starts[thread + 1]) sums.clear(thread);
            for (int64_t i = part_starts[thread]; i < part_starts[thread + 1]; i++) {
                const int64_t h = i / count;
                run_block(blocks[i % count], h, keys, values, transposed + h * z.d * padded, sums, thread, ranges);
            }
        });
        sum_threads(sums);
    }

    // Peak bytes that run() takes from the threads' arenas. Each thread sums gradients of keys and values per key head.
    // If a thread ends within a head, the next one starts there.
    static int64_t scratch_bytes(const AttentionSizes &z, int64_t length) {
        const int64_t threads = thread_count(), wide = (z.d + 31) / 32 * 32 + (z.dv + 31) / 32 * 32;
        const int64_t sums = (z.key_heads + threads - 1) * length * wide * 4;
        const int64_t shared = z.key_heads * z.d * padded_length(length) + LeftOperand<Op>::numbers(z.key_heads, z.d + z.dv, length);
        const int64_t each = (z.d + z.dv) / PER * 128 + wide / 32 * (COLUMNS / PER * 128) + KEY_TILE * COLUMNS * (12 + 2 * sizeof(Number)) +
                             z.d * COLUMNS * 4;
        return sums + shared * sizeof(Number) + threads * each;
    }

  private:
    // Packed columns of a block, and intermediate results for a range of keys.
    struct BlockBuffers {
        char *queries, *grads, *queries_along, *grads_along;
        float *scores, *slopes;  // (KEY_TILE, COLUMNS)
        char *pairs;  // gradients of the scores, in groups
        Number *weights, *score_grads;  // (KEY_TILE, COLUMNS)
        float *sums;  // (d, COLUMNS) gradients of the queries
        alignas(64) float log[COLUMNS], delta[COLUMNS];

        BlockBuffers(Scratch &scratch, const AttentionSizes &z, int64_t panel)
            : queries(scratch.take(z.d / PER * 128)), grads(scratch.take(z.dv / PER * 128)),
              queries_along(scratch.take((z.d + 31) / 32 * panel)), grads_along(scratch.take((z.dv + 31) / 32 * panel)),
              scores(scratch.take<float>(KEY_TILE * COLUMNS)), slopes(scratch.take<float>(KEY_TILE * COLUMNS)),
                  pairs(scratch.take(KEY_TILE * COLUMNS * 4)),
              weights(scratch.take<Number>(KEY_TILE * COLUMNS)), score_grads(scratch.take<Number>(KEY_TILE * COLUMNS)),
                  sums(scratch.take<float>(z.d * COLUMNS)) {}
    };

    void run_block(const Block &b, int64_t key_head, const LeftOperand<Op> &keys, const LeftOperand<Op> &values, const Number *transposed,
                   const KeyValueSums &sums,
                   int thread, std::vector<Range> &ranges) const {
        const QueryColumns c(f, b, key_head, group);
        const int64_t groups = (c.vecs * 16) / PER, padded_d = sums.padded_d, padded_dv = sums.padded_dv;
        float *const dk = sums.key_sums(thread, key_head), *const dv = sums.value_sums(thread, key_head);
        Scratch scratch;
        BlockBuffers buffers(scratch, z, panel);
        prepare(c, b, buffers);
        find_ranges(f, b, group, ranges);
        for (const Range &r : ranges)
            for (int64_t k0 = r.begin; k0 < r.end; k0 += KEY_TILE) {
                const int64_t n = std::min<int64_t>(KEY_TILE, r.end - k0);
                products<Op>(n, c.vecs, keys.at(k0, key_head), keys.stride(), buffers.queries, z.d / PER, buffers.scores, COLUMNS);
                products<Op>(n, c.vecs, values.at(k0, key_head), values.stride(), buffers.grads, z.dv / PER, buffers.slopes, COLUMNS);
                compute_weights(c, r, k0, n, buffers);
                for (int64_t d0 = 0; d0 < z.dv; d0 += 32)
                    products_onto<Op>(n, z.dv - d0 > 16 ? 2 : 1, (const char *)buffers.weights, COLUMNS * sizeof(Number),
                                      buffers.grads_along + d0 / 32 * panel,
                                      groups, dv + k0 * padded_dv + d0, padded_dv, dv + k0 * padded_dv + d0, padded_dv);
                for (int64_t d0 = 0; d0 < z.d; d0 += 32)
                    products_onto<Op>(n, z.d - d0 > 16 ? 2 : 1, (const char *)buffers.score_grads, COLUMNS * sizeof(Number),
                                      buffers.queries_along + d0 / 32 * panel,
                                      groups, dk + k0 * padded_d + d0, padded_d, dk + k0 * padded_d + d0, padded_d);
                products_onto<Op>(z.d, c.vecs, (const char *)(transposed + k0), padded * sizeof(Number), buffers.pairs, (n + PER - 1) / PER,
                                  buffers.sums, COLUMNS,
                                  buffers.sums, COLUMNS);
            }
        const F16 by[2] = {set_f(z.scaling), set_f(z.scaling)};
        Tile::write_columns(buffers.sums, to.q, c, b, z.d, by);
    }

    void prepare(const QueryColumns &c, const Block &b, BlockBuffers &buffers) const {
        Tile::pack_across(in.q, c, b, z.d, buffers.queries);
        Tile::pack_across(in.grad, c, b, z.dv, buffers.grads);
        Tile::pack_along(in.q, c, b, z.d, buffers.queries_along);
        Tile::pack_along(in.grad, c, b, z.dv, buffers.grads_along);
        memset(buffers.sums, 0, z.d * COLUMNS * 4);
        for (int64_t x = 0; x < COLUMNS; x++) {
            buffers.log[x] = INFINITY, buffers.delta[x] = 0;
            if (x >= b.count) continue;
            buffers.log[x] = in.logs[c.head[x] * f.queries + c.token[x]];
            const T *const out = Tile::at(in.out, c.token[x], c.head[x]), *const grad = Tile::at(in.grad, c.token[x], c.head[x]);
            F16 dot = zero_f();
            for (int64_t i = 0; i < z.dv; i += 16) {
                const First m = first(z.dv - i);
                dot = fma(load16(out + i, m), load16(grad + i, m), dot);
            }
            buffers.delta[x] = sum_lanes(dot);
        }
    }

    // Compute the weights of n keys from k0 and the gradients of their scores, as rows, and the latter also as groups.
    void compute_weights(const QueryColumns &c, const Range &r, int64_t k0, int64_t n, const BlockBuffers &buffers) const {
        const F16 scale = z.scale(), cap = set_f(z.cap * LOG2E), one = set_f(1.0f), zero = zero_f();
        const bool clear = c.is_fully_visible(r, k0, n);
        for (int l = 0; l < c.vecs; l++) {
            const F16 by = load16(buffers.log + 16 * l), row_delta = load16(buffers.delta + 16 * l);
            auto compute_key = [&](int64_t i, F16 &p, F16 &score_grad) {
                const int64_t index = i * COLUMNS + 16 * l;
                F16 s = load16(buffers.scores + index) * scale, cap_slope = one;
                if (z.cap > 0) {
                    const F16 t = tanh_16(s);
                    cap_slope = fnma(t, t, one);
                    s = cap * t;
                }
                p = Tile::exponentiate(s - by);
                if (!clear) p = select(c.hidden(l, r, k0 + i), zero, p);
                score_grad = p * (load16(buffers.slopes + index) - row_delta);
                if (z.cap > 0) score_grad = score_grad * cap_slope;
            };
            for (int64_t i = 0; i < n; i += PER) {
                F16 p, score_grad, next_p = zero, next_score_grad = zero;
                compute_key(i, p, score_grad);
                if (PER == 2 && i + 1 < n) compute_key(i + 1, next_p, next_score_grad);
                const int64_t index = i * COLUMNS + 16 * l;
                Tile::store_rows_and_pair(buffers.score_grads + index, COLUMNS, buffers.pairs + i / PER * 128 + 64 * l, score_grad, next_score_grad);
                Tile::store_two(buffers.weights + index, COLUMNS, p, next_p);
            }
        }
    }

    // Add the threads' sums of each key and value, and round once.
    void sum_threads(const KeyValueSums &sums) const {
        rows_in_parallel(z.key_heads * f.length, [&](int64_t i) {
            const int64_t h = i / f.length, t = i % f.length;
            for (int values = 0; values < 2; values++) {
                const int64_t d = values ? z.dv : z.d, line = values ? sums.padded_dv : sums.padded_d;
                const F16 by = set_f(values ? 1.0f : z.scaling);
                T *const out = Tile::at(values ? to.v : to.k, t, h);
                for (int64_t j = 0; j < d; j += 16) {
                    F16 s = zero_f();
                    for (int o = 0; o < sums.threads(); o++)
                        if (sums.contains(o, h)) s = s + load16((values ? sums.value_sums(o, h) : sums.key_sums(o, h)) + t * line + j);
                    store16(out + j, s * by, first(d - j));
                }
            }
        });
    }
};

}  // namespace

// Like dw_attention. grad (queries, heads, dv) is the gradient of out. dq, dk and dv_out have the shapes of q, k and v.
// strides: of q, k, v, out, grad, dq, dk and dv_out.
int dw_attention_backward(int type, const int64_t *segments, int64_t count, int64_t length, int64_t window, int causal, int64_t heads,
                          int64_t key_heads, int64_t d, int64_t dv, float scaling, float cap, const int64_t *query_positions,
                              int64_t num_positions, const void *q,
                          const void *k, const void *v, const void *out, const void *grad, void *dq, void *dk, void *dv_out, const int64_t *strides,
                          const float *logs) {
    return guarded([&] {
        const Segments f(segments, count, length, window, causal, query_positions, num_positions);
        const AttentionSizes z{heads, key_heads, d, dv, scaling, cap};
        const int64_t *const s = strides;
        const BackwardInputs in{{q, s}, {k, s + 2}, {v, s + 4}, {out, s + 6}, {grad, s + 8}, logs};
        const Gradients to{{dq, s + 10}, {dk, s + 12}, {dv_out, s + 14}};
        with_op(type, [&](auto op) { Backward<decltype(op)>(f, z, in, to).run(); });
    });
}

// Peak bytes that dw_attention_backward takes from the threads' arenas.
int64_t dw_attention_backward_scratch_size(int type, int64_t length, int64_t heads, int64_t key_heads, int64_t d, int64_t dv) {
    int64_t bytes = 0;
    with_op(type, [&](auto op) { bytes = Backward<decltype(op)>::scratch_bytes(AttentionSizes{heads, key_heads, d, dv, 1.0f, 0.0f}, length); });
    return bytes;
}
