// Forward pass of attention over a prefix tree of segments, without a mask, without padding, and with a bounded number
// of scores in memory.
#include "attention_tiles.h"
#include "kernels.h"

using namespace deltaw;

namespace {

template <class Op>
class Forward : Tiles<Op> {
    typedef Tiles<Op> Tile;
    typedef typename Tile::Number Number;
    static constexpr int PER = Op::PER_GROUP;

    const Segments &f;
    const AttentionSizes z;
    const HeadRows q, k, v;
    const OutRows out;
    float *const logs;
    const int64_t group = z.group(), padded = padded_length(f.length);

  public:
    Forward(const Segments &f, const AttentionSizes &z, const HeadRows &q, const HeadRows &k, const HeadRows &v, const OutRows &out, float *logs)
        : f(f), z(z), q(q), k(k), v(v), out(out), logs(logs) {}

    void run() {
        const std::vector<Block> blocks = make_blocks(f, group);
        const std::vector<int64_t> part_starts = divide_blocks(blocks, z.key_heads, thread_count());
        Scratch scratch;
        Number *const transposed = scratch.take<Number>(z.key_heads * z.dv * padded);  // transposed values: (key heads, dv, padded tokens)
        Tile::transpose_heads(v, z.key_heads, z.dv, f.length, transposed);
        const LeftOperand<Op> keys(k, z.key_heads, z.d, f.length, scratch.take<Number>(LeftOperand<Op>::numbers(z.key_heads, z.d, f.length)));
        in_parallel([&](int thread, int) {
            std::vector<Range> ranges;
            const ProductScope<Op> product_scope;
            for (int64_t i = part_starts[thread]; i < part_starts[thread + 1]; i++) {
                const int64_t h = i / (int64_t)blocks.size();
                run_block(blocks[i % blocks.size()], h, keys, transposed + h * z.dv * padded, ranges);
            }
        });
    }

    // Peak bytes that run() takes from the threads' arenas.
    static int64_t scratch_bytes(const AttentionSizes &z, int64_t length) {
        const int64_t shared = z.key_heads * (z.dv * padded_length(length)) + LeftOperand<Op>::numbers(z.key_heads, z.d, length);
        const int64_t each = z.d / PER * 128 + KEY_TILE * COLUMNS * 4 + KEY_TILE * 128 + z.dv * COLUMNS * 4;
        return shared * sizeof(Number) + thread_count() * each;
    }

  private:
    // Running state of a block's columns: maximum score, sum of weights, sums of weighted values.
    struct State {
        F16 top[2], total[2];
        float *sums;  // (dv, COLUMNS)
    };

    void run_block(const Block &b, int64_t key_head, const LeftOperand<Op> &keys, const Number *transposed, std::vector<Range> &ranges) const {
        const QueryColumns c(f, b, key_head, group);
        Scratch scratch;
        char *const queries = scratch.take(z.d / PER * 128);
        float *const scores = scratch.take<float>(KEY_TILE * COLUMNS);
        char *const weights = scratch.take(KEY_TILE * 128);
        State state{{}, {}, scratch.take<float>(z.dv * COLUMNS)};
        Tile::pack_across(q, c, b, z.d, queries);
        memset(state.sums, 0, z.dv * COLUMNS * 4);
        for (int l = 0; l < 2; l++) state.top[l] = set_f(-1e30f), state.total[l] = zero_f();
        find_ranges(f, b, group, ranges);
        for (const Range &r : ranges)
            for (int64_t k0 = r.begin; k0 < r.end; k0 += KEY_TILE) {
                const int64_t n = std::min<int64_t>(KEY_TILE, r.end - k0);
                products<Op>(n, c.vecs, keys.at(k0, key_head), keys.stride(), queries, z.d / PER, scores, COLUMNS);
                compute_weights(c, r, k0, n, scores, weights, state);
                products_onto<Op>(z.dv, c.vecs, (const char *)(transposed + k0), padded * sizeof(Number), weights, (n + PER - 1) / PER, state.sums,
                                  COLUMNS,
                                  state.sums, COLUMNS);
            }
        F16 by[2];
        for (int l = 0; l < 2; l++) by[l] = set_f(1.0f) / state.total[l];
        Tile::write_columns(state.sums, out, c, b, z.dv, by);
        alignas(64) float lanes[COLUMNS], tops[COLUMNS];
        for (int l = 0; l < 2; l++) store16(lanes + 16 * l, state.total[l]), store16(tops + 16 * l, state.top[l]);
        for (int64_t x = 0; x < b.count; x++) logs[c.head[x] * f.queries + c.token[x]] = tops[x] + __builtin_log2f(lanes[x]);
    }

    // Compute the weights of n keys from k0 from their scores. Rescales the sums so far if the maximum increases.
    void compute_weights(const QueryColumns &c, const Range &r, int64_t k0, int64_t n, float *scores, char *weights, State &state) const {
        const F16 scale = z.scale(), cap = set_f(z.cap * LOG2E), minus = set_f(-INFINITY);
        F16 maxima[2] = {state.top[0], state.top[1]};
        const bool clear = c.is_fully_visible(r, k0, n);
        for (int64_t i = 0; i < n; i++)
            for (int l = 0; l < c.vecs; l++) {
                float *const index = scores + i * COLUMNS + 16 * l;
                F16 s = load16(index) * scale;
                if (z.cap > 0) s = cap * tanh_16(s);
                if (!clear) s = select(c.hidden(l, r, k0 + i), minus, s);
                store16(index, s);
                maxima[l] = max(maxima[l], s);
            }
        for (int l = 0; l < c.vecs; l++) {
            if (any(maxima[l] > state.top[l])) {
                const F16 by = exp2_16(state.top[l] - maxima[l]);
                state.total[l] = state.total[l] * by;
                for (int64_t i = 0; i < z.dv; i++) {
                    float *const index = state.sums + i * COLUMNS + 16 * l;
                    store16(index, load16(index) * by);
                }
                state.top[l] = maxima[l];
            }
            const F16 top = state.top[l];
            F16 total = state.total[l];
            for (int64_t i = 0; i < n; i += PER) {
                F16 one = Tile::exponentiate(load16(scores + i * COLUMNS + 16 * l) - top), two = zero_f();
                if (PER == 2 && i + 1 < n) two = Tile::exponentiate(load16(scores + (i + 1) * COLUMNS + 16 * l) - top);
                total = total + (one + two);
                Tile::store_pair(weights + i / PER * 128 + 64 * l, one, two);
            }
            state.total[l] = total;
        }
    }
};

}  // namespace

// Attention. q (queries, heads, d), k (length, key_heads, d), v (length, key_heads, dv), out (queries, heads, dv).
// strides: by token and by head, in numbers, of q, k, v and out. segments: (4, count), see Segments. window: 0 if
// unlimited. query_positions (num_positions): ascending positions of the queries among the keys, or null if every token is a
// query. logs: (heads, queries) log-sum-exp in fp32.
int dw_attention(int type, const int64_t *segments, int64_t count, int64_t length, int64_t window, int causal, int64_t heads, int64_t key_heads,
                 int64_t d, int64_t dv, float scaling, float cap, const int64_t *query_positions, int64_t num_positions, const void *q,
                     const void *k, const void *v,
                 void *out, const int64_t *strides, float *logs) {
    return guarded([&] {
        const Segments f(segments, count, length, window, causal, query_positions, num_positions);
        const AttentionSizes z{heads, key_heads, d, dv, scaling, cap};
        const HeadRows strides_q(q, strides), strides_k(k, strides + 2), strides_v(v, strides + 4);
        const OutRows to(out, strides + 6);
        with_op(type, [&](auto op) { Forward<decltype(op)>(f, z, strides_q, strides_k, strides_v, to, logs).run(); });
    });
}

// Peak bytes that dw_attention takes from the threads' arenas.
int64_t dw_attention_scratch_size(int type, int64_t length, int64_t heads, int64_t key_heads, int64_t d, int64_t dv) {
    int64_t bytes = 0;
    with_op(type, [&](auto op) { bytes = Forward<decltype(op)>::scratch_bytes(AttentionSizes{heads, key_heads, d, dv, 1.0f, 0.0f}, length); });
    return bytes;
}
