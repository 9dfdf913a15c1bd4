// Attention over a prefix tree of segments, backward: weights are computed again from the logarithms of their sums.
#include "attention_tiles.h"
#include "kernels.h"

using namespace deltaw;

namespace {

struct Inputs {
    const HeadRows q, k, v, out, grad;
    const float *logs;
};
struct Gradients {
    const OutRows q, k, v;
};

// Where each thread sums the gradients of keys and values: one (length, wide) of fp32 for each key head that it meets,
// keys' numbers before values'. They are added in the threads' order, so that results do not depend on who is first.
struct Sums {
    const int64_t length, wide_d, wide_dv, size;
    std::vector<int64_t> low, high, place;  // by thread: the key heads low … high - 1, and the first of its rooms
    int64_t rooms = 0;
    float *at = nullptr;

    Sums(int64_t length, int64_t d, int64_t dv, const std::vector<int64_t> &begins, int64_t blocks)
        : length(length), wide_d((d + 31) / 32 * 32), wide_dv((dv + 31) / 32 * 32), size(length * (wide_d + wide_dv)) {
        for (size_t t = 0; t + 1 < begins.size(); t++) {
            const bool some = begins[t + 1] > begins[t];
            low.push_back(some ? begins[t] / blocks : 0);
            high.push_back(some ? (begins[t + 1] - 1) / blocks + 1 : 0);
            place.push_back(rooms);
            rooms += high[t] - low[t];
        }
    }
    void clear(int thread) const { memset(at + place[thread] * size, 0, (high[thread] - low[thread]) * size * sizeof(float)); }
    float *of_keys(int thread, int64_t head) const { return at + (place[thread] + head - low[thread]) * size; }
    float *of_values(int thread, int64_t head) const { return of_keys(thread, head) + length * wide_d; }
    bool met(int thread, int64_t head) const { return head >= low[thread] && head < high[thread]; }
    int threads() const { return (int)low.size(); }
};

template <class Op>
class Backward : Tiles<Op> {
    typedef Tiles<Op> Tile;
    typedef typename Op::Left T;
    typedef typename Tile::Number Number;
    static constexpr int PER = Op::PER_GROUP;

    const Segments &f;
    const Sizes z;
    const Inputs in;
    const Gradients to;
    const int64_t group = z.group(), padded = padded_length(f.length), panel = COLUMNS / PER * 128;

  public:
    Backward(const Segments &f, const Sizes &z, const Inputs &in, const Gradients &to) : f(f), z(z), in(in), to(to) {}

    void run() {
        const std::vector<Block> blocks = blocks_of(f, group);
        const int64_t count = (int64_t)blocks.size();
        const std::vector<int64_t> begins = shares_of(blocks, z.key_heads, thread_count());
        Sums sums(f.length, z.d, z.dv, begins, count);
        Scratch scratch;
        Number *const turned = scratch.take<Number>(z.key_heads * z.d * padded);  // the keys of a number of a head, side by side
        sums.at = scratch.take<float>(sums.rooms * sums.size);
        Tile::transpose_heads(in.k, z.key_heads, z.d, f.length, turned);
        const LeftRows<Op> keys(in.k, z.key_heads, z.d, f.length, scratch.take<Number>(LeftRows<Op>::numbers(z.key_heads, z.d, f.length)));
        const LeftRows<Op> values(in.v, z.key_heads, z.dv, f.length, scratch.take<Number>(LeftRows<Op>::numbers(z.key_heads, z.dv, f.length)));
        in_parallel([&](int thread, int) {
            std::vector<Range> ranges;
            const Ready<Op> ready;
            if (begins[thread] < begins[thread + 1]) sums.clear(thread);
            for (int64_t i = begins[thread]; i < begins[thread + 1]; i++) {
                const int64_t h = i / count;
                run_block(blocks[i % count], h, keys, values, turned + h * z.d * padded, sums, thread, ranges);
            }
        });
        add_up(sums);
    }

    // Bytes of the threads' arenas that run() takes at its peak. Each thread sums the gradients of keys and values for each key
    // head that it meets: where one thread ends within a head, the next begins there.
    static int64_t room(const Sizes &z, int64_t length) {
        const int64_t threads = thread_count(), wide = (z.d + 31) / 32 * 32 + (z.dv + 31) / 32 * 32;
        const int64_t sums = (z.key_heads + threads - 1) * length * wide * 4;
        const int64_t shared = z.key_heads * z.d * padded_length(length) + LeftRows<Op>::numbers(z.key_heads, z.d + z.dv, length);
        const int64_t each = (z.d + z.dv) / PER * 128 + wide / 32 * (COLUMNS / PER * 128) + KEYS * COLUMNS * (12 + 2 * sizeof(Number)) +
                             z.d * COLUMNS * 4;
        return sums + shared * sizeof(Number) + threads * each;
    }

  private:
    // A block's columns in the forms that the products read, and what is computed of some keys at a time.
    struct Room {
        char *queries, *grads, *queries_along, *grads_along;
        float *scores, *slopes;  // (KEYS, COLUMNS)
        char *pairs;             // the scores' gradients in groups
        Number *weights, *changes;    // (KEYS, COLUMNS)
        float *sums;             // (d, COLUMNS), of the queries' gradients
        alignas(64) float log[COLUMNS], delta[COLUMNS];

        Room(Scratch &scratch, const Sizes &z, int64_t panel)
            : queries(scratch.take(z.d / PER * 128)), grads(scratch.take(z.dv / PER * 128)),
              queries_along(scratch.take((z.d + 31) / 32 * panel)), grads_along(scratch.take((z.dv + 31) / 32 * panel)),
              scores(scratch.take<float>(KEYS * COLUMNS)), slopes(scratch.take<float>(KEYS * COLUMNS)), pairs(scratch.take(KEYS * COLUMNS * 4)),
              weights(scratch.take<Number>(KEYS * COLUMNS)), changes(scratch.take<Number>(KEYS * COLUMNS)), sums(scratch.take<float>(z.d * COLUMNS)) {}
    };

    void run_block(const Block &b, int64_t key_head, const LeftRows<Op> &keys, const LeftRows<Op> &values, const Number *turned, const Sums &sums,
                   int thread, std::vector<Range> &ranges) const {
        const Columns c(f, b, key_head, group);
        const int64_t groups = (c.vecs * 16) / PER, wide_d = sums.wide_d, wide_dv = sums.wide_dv;
        float *const dk = sums.of_keys(thread, key_head), *const dv = sums.of_values(thread, key_head);
        Scratch scratch;
        Room room(scratch, z, panel);
        prepare(c, b, room);
        ranges_of(f, b, group, ranges);
        for (const Range &r : ranges)
            for (int64_t k0 = r.begin; k0 < r.end; k0 += KEYS) {
                const int64_t n = std::min<int64_t>(KEYS, r.end - k0);
                products<Op>(n, c.vecs, keys.at(k0, key_head), keys.stride(), room.queries, z.d / PER, room.scores, COLUMNS);
                products<Op>(n, c.vecs, values.at(k0, key_head), values.stride(), room.grads, z.dv / PER, room.slopes, COLUMNS);
                weigh(c, r, k0, n, room);
                for (int64_t d0 = 0; d0 < z.dv; d0 += 32)
                    products_onto<Op>(n, z.dv - d0 > 16 ? 2 : 1, (const char *)room.weights, COLUMNS * sizeof(Number), room.grads_along + d0 / 32 * panel,
                                      groups, dv + k0 * wide_dv + d0, wide_dv, dv + k0 * wide_dv + d0, wide_dv);
                for (int64_t d0 = 0; d0 < z.d; d0 += 32)
                    products_onto<Op>(n, z.d - d0 > 16 ? 2 : 1, (const char *)room.changes, COLUMNS * sizeof(Number), room.queries_along + d0 / 32 * panel,
                                      groups, dk + k0 * wide_d + d0, wide_d, dk + k0 * wide_d + d0, wide_d);
                products_onto<Op>(z.d, c.vecs, (const char *)(turned + k0), padded * sizeof(Number), room.pairs, (n + PER - 1) / PER, room.sums, COLUMNS,
                                  room.sums, COLUMNS);
            }
        const F16 by[2] = {set_f(z.scaling), set_f(z.scaling)};
        Tile::write_columns(room.sums, to.q, c, b, z.d, by);
    }

    void prepare(const Columns &c, const Block &b, Room &room) const {
        Tile::pack_across(in.q, c, b, z.d, room.queries);
        Tile::pack_across(in.grad, c, b, z.dv, room.grads);
        Tile::pack_along(in.q, c, b, z.d, room.queries_along);
        Tile::pack_along(in.grad, c, b, z.dv, room.grads_along);
        memset(room.sums, 0, z.d * COLUMNS * 4);
        for (int64_t x = 0; x < COLUMNS; x++) {
            room.log[x] = INFINITY, room.delta[x] = 0;
            if (x >= b.count) continue;
            room.log[x] = in.logs[c.head[x] * f.queries + c.token[x]];
            const T *const out = Tile::at(in.out, c.token[x], c.head[x]), *const grad = Tile::at(in.grad, c.token[x], c.head[x]);
            F16 dot = zero_f();
            for (int64_t i = 0; i < z.dv; i += 16) {
                const First m = first(z.dv - i);
                dot = fma(load16(out + i, m), load16(grad + i, m), dot);
            }
            room.delta[x] = sum_of(dot);
        }
    }

    // The weights of n keys from k0 on and the gradients of their scores, as rows and (the latter) as groups.
    void weigh(const Columns &c, const Range &r, int64_t k0, int64_t n, const Room &room) const {
        const F16 scale = z.scale(), cap = set_f(z.cap * LOG2E), one = set_f(1.0f), zero = zero_f();
        const bool clear = c.clear(r, k0, n);
        for (int l = 0; l < c.vecs; l++) {
            const F16 by = load16(room.log + 16 * l), less = load16(room.delta + 16 * l);
            auto of_key = [&](int64_t i, F16 &p, F16 &change) {
                const int64_t place = i * COLUMNS + 16 * l;
                F16 s = load16(room.scores + place) * scale, bend = one;
                if (z.cap > 0) {
                    const F16 t = tanh_16(s);
                    bend = fnma(t, t, one);
                    s = cap * t;
                }
                p = Tile::raise(s - by);
                if (!clear) p = select(c.hidden(l, r, k0 + i), zero, p);
                change = p * (load16(room.slopes + place) - less);
                if (z.cap > 0) change = change * bend;
            };
            for (int64_t i = 0; i < n; i += PER) {
                F16 p, change, next_p = zero, next_change = zero;
                of_key(i, p, change);
                if (PER == 2 && i + 1 < n) of_key(i + 1, next_p, next_change);
                const int64_t place = i * COLUMNS + 16 * l;
                Tile::store_rows_and_pair(room.changes + place, COLUMNS, room.pairs + i / PER * 128 + 64 * l, change, next_change);
                Tile::store_two(room.weights + place, COLUMNS, p, next_p);
            }
        }
    }

    // The threads' sums of each key and value, rounded once.
    void add_up(const Sums &sums) const {
        rows_in_parallel(z.key_heads * f.length, [&](int64_t i) {
            const int64_t h = i / f.length, t = i % f.length;
            for (int values = 0; values < 2; values++) {
                const int64_t d = values ? z.dv : z.d, line = values ? sums.wide_dv : sums.wide_d;
                const F16 by = set_f(values ? 1.0f : z.scaling);
                T *const out = Tile::at(values ? to.v : to.k, t, h);
                for (int64_t j = 0; j < d; j += 16) {
                    F16 s = zero_f();
                    for (int o = 0; o < sums.threads(); o++)
                        if (sums.met(o, h)) s = s + load16((values ? sums.of_values(o, h) : sums.of_keys(o, h)) + t * line + j);
                    store16(out + j, s * by, first(d - j));
                }
            }
        });
    }
};

}  // namespace

// As dw_attention; grad (queries, heads, dv) is that of out, dq, dk and dv_out are like q, k and v. strides: of q, k, v, out,
// grad, dq, dk and dv_out.
int dw_attention_backward(int type, const int64_t *segments, int64_t count, int64_t length, int64_t window, int causal, int64_t heads,
                          int64_t key_heads, int64_t d, int64_t dv, float scaling, float cap, const int64_t *picked, int64_t picks, const void *q,
                          const void *k, const void *v, const void *out, const void *grad, void *dq, void *dk, void *dv_out, const int64_t *strides,
                          const float *logs) {
    return guarded([&] {
        const Segments f(segments, count, length, window, causal, picked, picks);
        const Sizes z{heads, key_heads, d, dv, scaling, cap};
        const int64_t *const s = strides;
        const Inputs in{{q, s}, {k, s + 2}, {v, s + 4}, {out, s + 6}, {grad, s + 8}, logs};
        const Gradients to{{dq, s + 10}, {dk, s + 12}, {dv_out, s + 14}};
        with_op(type, [&](auto op) { Backward<decltype(op)>(f, z, in, to).run(); });
    });
}

// Bytes of the threads' arenas that dw_attention_backward takes at its peak.
int64_t dw_attention_backward_room(int type, int64_t length, int64_t heads, int64_t key_heads, int64_t d, int64_t dv) {
    int64_t bytes = 0;
    with_op(type, [&](auto op) { bytes = Backward<decltype(op)>::room(Sizes{heads, key_heads, d, dv, 1.0f, 0.0f}, length); });
    return bytes;
}
