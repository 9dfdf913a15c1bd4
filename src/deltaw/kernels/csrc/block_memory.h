// What a block's call keeps for its backward, what it needs beside, and where in one piece of memory each lies.
#pragma once
#include <algorithm>

#include "block.h"
#include "quantize.h"

namespace deltaw {

// Rows in memory, all as far apart.
struct Rows {
    char *data = nullptr;
    int64_t stride = 0;  // bytes

    void *operator[](int64_t row) const { return data + row * stride; }
    operator void *() const { return data; }
    // The same rows from a byte of theirs on.
    Rows from(int64_t byte) const { return Rows{data + byte, stride}; }
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

// The rows of a call: all T, and the P of them whose outputs are asked for.
struct Sizes {
    const int64_t T, P;
    const bool picked;

    Sizes(int64_t T, int64_t picks) : T(T), P(picks ? picks : T), picked(picks > 0) {}
    // Whether queries, keys and values stay where one layer wrote them.
    bool views(const BlockParts &b) const { return b.split == STACKED && !b.head_norms() && !picked; }
};

// The end of a half: the output layer's own outputs, and their sum with the stream, where a norm follows on them.
struct End {
    Rows branch, total, stats_after, stats_post;

    End() {}
    End(const HalfNorms &norms, int64_t rows, int64_t width, Room &from) {
        if (norms.after.used) branch = from.take(rows, width), stats_after = from.take(rows, 8);
        if (norms.post.used) total = from.take(rows, width), stats_post = from.take(rows, 8);
    }
};

// What the backward is given of the forward.
struct Kept {
    Rows stats, stats1, stats_q, stats_k, logs;
    Rows joint, raw_q, raw_k, q, k, v, out, x1, gate, up;  // raw: before norms over each head
    End end, end1;
    Rows h_query, h_key, h_value, h_output, h_gate, h_up, h_down;

    Kept(const BlockParts &b, const Sizes &of, Room &from) {
        const int64_t T = of.T, P = of.P, n = b.number();
        if (b.first.before.used) stats = from.take(T, 8);
        if (b.second.before.used) stats1 = from.take(P, 8);
        logs = from.take(P, b.heads * 4);
        if (of.views(b)) {
            joint = from.take(T, b.query.out * n);
            q = joint, k = joint.from(b.wide() * n), v = joint.from((b.wide() + b.narrow()) * n);
        } else q = from.take(P, b.wide() * n), k = from.take(T, b.narrow() * n), v = from.take(T, b.narrow() * n);
        raw_q = q, raw_k = k;
        if (b.of_query.used) raw_q = from.take(P, b.wide() * n), stats_q = from.take(P, b.heads * 8);
        if (b.of_key.used) raw_k = from.take(T, b.narrow() * n), stats_k = from.take(T, b.key_heads * 8);
        out = from.take(P, b.wide() * n);
        if (!b.parallel) x1 = from.take(P, b.hidden() * n);
        gate = from.take(P, b.inner() * n);
        if (b.gated) up = from.take(P, b.inner() * n);
        end = End(b.first, P, b.hidden() * n, from), end1 = End(b.second, P, b.hidden() * n, from);
        const int64_t asking = b.split == APART ? P : T;
        h_query = from.take(asking, b.query.rank * n), h_key = from.take(T, b.key.rank * n), h_value = from.take(T, b.value.rank * n);
        h_output = from.take(P, b.output.rank * n), h_gate = from.take(P, b.gate.rank * n), h_up = from.take(P, b.up.rank * n);
        h_down = from.take(P, b.down.rank * n);
    }
};

// What one call needs beside.
struct Work {
    Rows n, int8, scales, joint, gate_joint;
    Rows x_p, n_p, cosine, sine;  // of picked rows
    Rows inner;
    // Of the backward, where what one half alone needs lies in the same place.
    Rows d_n_p, d_x1, d_sum, d_branch, above, d_gate, d_up, d_out, d_q, d_k, d_v;
    Rows g_query, g_key, g_value, g_output, g_gate, g_up, g_down;

    Work(const BlockParts &b, const Sizes &of, bool backward, Room &from) {
        const int64_t T = of.T, P = of.P, number = b.number(), hidden = b.hidden() * number, inside = b.inner() * number;
        if (b.first.before.used || b.second.before.used) n = from.take(T, hidden);
        if (of.picked) {
            x_p = from.take(P, hidden), n_p = from.take(P, hidden);
            cosine = from.take(P, b.turned * 4), sine = from.take(P, b.turned * 4);
        }
        take_int8(b, T, backward, from);
        const bool copied = b.split != APART && !of.views(b);
        if (!backward) {
            const int64_t here = from.used;
            if (copied) joint = from.take(T, b.query.out * number);
            from.used = here;
            inner = from.take(P, inside);
            if (b.gate_gives_up()) gate_joint = from.take(P, 2 * inside);
            return;
        }
        d_x1 = from.take(P, hidden);
        if (of.picked) d_n_p = from.take(P, hidden), above = from.take(T, hidden);
        if (b.first.post.used || b.second.post.used) d_sum = from.take(P, hidden);
        if (b.first.after.used || b.second.after.used) d_branch = from.take(P, hidden);
        g_query = from.take(b.split == APART ? P : T, b.query.rank * number), g_key = from.take(T, b.key.rank * number);
        g_value = from.take(T, b.value.rank * number), g_output = from.take(P, b.output.rank * number);
        g_gate = from.take(P, b.gate.rank * number), g_up = from.take(P, b.up.rank * number), g_down = from.take(P, b.down.rank * number);
        const int64_t here = from.used;
        d_gate = from.take(P, inside), inner = from.take(P, inside);
        if (b.gated) d_up = from.take(P, inside);
        if (b.gate_gives_up()) gate_joint = from.take(P, 2 * inside);
        from.used = here;
        take_heads(b, of, from);
    }

  private:
    void take_int8(const BlockParts &b, int64_t T, bool backward, Room &from) {
        int64_t widest = 0;
        bool any = false;
        for (const Layer *l : {&b.query, &b.key, &b.value, &b.output, &b.gate, &b.up, &b.down}) {
            any |= backward ? b.rounds_gradient(*l) : l->scale != nullptr;
            widest = std::max({widest, l->in, l->out});
        }
        int8 = from.take(any ? T : 0, widest), scales = from.take(any ? T : 0, int8_blocks(widest) * 4);
    }
    void take_heads(const BlockParts &b, const Sizes &of, Room &from) {
        const int64_t wide = b.wide() * b.number(), narrow = b.narrow() * b.number();
        if (b.split != APART) joint = from.take(of.T, b.query.out * b.number());
        // Heads are copied into `joint` when nobody needs d_out any more.
        const bool copied = b.split != APART && !of.views(b);
        d_out = copied ? Rows{joint.data, wide} : from.take(of.P, wide);
        if (of.views(b)) d_q = joint, d_k = joint.from(wide), d_v = joint.from(wide + narrow);
        else d_q = from.take(of.P, wide), d_k = from.take(of.T, narrow), d_v = from.take(of.T, narrow);
    }
};

}  // namespace deltaw
