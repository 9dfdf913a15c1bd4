// Layout of the memory of a block's call: tensors saved for the backward, and scratch tensors.
#pragma once
#include <algorithm>

#include "block.h"
#include "quantize.h"

namespace deltaw {

// Rows in memory with a constant stride.
struct Rows {
    char *data = nullptr;
    int64_t stride = 0;  // in bytes

    void *operator[](int64_t row) const { return data + row * stride; }
    operator void *() const { return data; }
    // The same rows, starting at a byte offset within each row.
    Rows at_byte(int64_t byte) const { return Rows{data + byte, stride}; }
};

// Assigns consecutive parts of a buffer. Without a buffer it only counts bytes.
struct BufferAllocator {
    char *base;
    int64_t used = 0, peak = 0;

    explicit BufferAllocator(void *base) : base((char *)base) {}
    Rows take(int64_t rows, int64_t stride) {
        char *const at = base ? base + used : nullptr;
        used += (rows * stride + 63) / 64 * 64;
        peak = std::max(peak, used);
        return Rows{at, stride};
    }
};

// Row counts of a call: T rows, P of which have outputs.
struct RowCounts {
    const int64_t T, P;
    const bool has_output_rows;

    RowCounts(int64_t T, int64_t output_count) : T(T), P(output_count ? output_count : T), has_output_rows(output_count > 0) {}
    // True if queries, keys and values are read in place from the output of their joint layer.
    bool uses_views(const BlockParts &b) const { return b.split == STACKED && !b.head_norms() && !has_output_rows; }
};

// Tensors at the end of a half that a norm needs: the output layer's result and its sum with the residual stream.
struct HalfEndTensors {
    Rows branch, total, stats_after, stats_post;

    HalfEndTensors() {}
    HalfEndTensors(const HalfNorms &norms, int64_t rows, int64_t width, BufferAllocator &allocator) {
        if (norms.after.used) branch = allocator.take(rows, width), stats_after = allocator.take(rows, 8);
        if (norms.post.used) total = allocator.take(rows, width), stats_post = allocator.take(rows, 8);
    }
};

// Tensors that the forward saves for the backward.
struct SavedTensors {
    Rows stats, stats1, stats_q, stats_k, logs;
    Rows joint, raw_q, raw_k, q, k, v, out, x1, gate, up;  // raw: before norms over each head
    HalfEndTensors end, second_end;
    Rows h_query, h_key, h_value, h_output, h_gate, h_up, h_down;

    SavedTensors(const BlockParts &b, const RowCounts &counts, BufferAllocator &allocator) {
        const int64_t T = counts.T, P = counts.P, n = b.number();
        if (b.first.before.used) stats = allocator.take(T, 8);
        if (b.second.before.used) stats1 = allocator.take(P, 8);
        logs = allocator.take(P, b.heads * 4);
        if (counts.uses_views(b)) {
            joint = allocator.take(T, b.query.out * n);
            q = joint, k = joint.at_byte(b.query_size() * n), v = joint.at_byte((b.query_size() + b.key_size()) * n);
        } else q = allocator.take(P, b.query_size() * n), k = allocator.take(T, b.key_size() * n), v = allocator.take(T, b.key_size() * n);
        raw_q = q, raw_k = k;
        if (b.query_norm.used) raw_q = allocator.take(P, b.query_size() * n), stats_q = allocator.take(P, b.heads * 8);
        if (b.key_norm.used) raw_k = allocator.take(T, b.key_size() * n), stats_k = allocator.take(T, b.key_heads * 8);
        out = allocator.take(P, b.query_size() * n);
        if (!b.parallel) x1 = allocator.take(P, b.hidden() * n);
        gate = allocator.take(P, b.inner() * n);
        if (b.gated) up = allocator.take(P, b.inner() * n);
        end = HalfEndTensors(b.first, P, b.hidden() * n, allocator), second_end = HalfEndTensors(b.second, P, b.hidden() * n, allocator);
        const int64_t num_queries = b.split == SEPARATE ? P : T;
        h_query = allocator.take(num_queries, b.query.rank * n), h_key = allocator.take(T, b.key.rank * n), h_value = allocator.take(T,
            b.value.rank * n);
        h_output = allocator.take(P, b.output.rank * n), h_gate = allocator.take(P, b.gate.rank * n), h_up = allocator.take(P, b.up.rank * n);
        h_down = allocator.take(P, b.down.rank * n);
    }
};

// Scratch tensors of one call.
struct ScratchTensors {
    Rows n, int8, scales, joint, gate_joint;
    Rows x_p, n_p, cosine, sine;  // of output rows
    Rows inner;
    // Scratch of the backward. Tensors that only one half uses share memory with those of the other half.
    Rows d_n_p, d_x1, d_sum, d_branch, above, d_gate, d_up, d_out, d_q, d_k, d_v;
    Rows g_query, g_key, g_value, g_output, g_gate, g_up, g_down;

    ScratchTensors(const BlockParts &b, const RowCounts &counts, bool backward, BufferAllocator &allocator) {
        const int64_t T = counts.T, P = counts.P, number = b.number(), hidden = b.hidden() * number, inside = b.inner() * number;
        if (b.first.before.used || b.second.before.used) n = allocator.take(T, hidden);
        if (counts.has_output_rows) {
            x_p = allocator.take(P, hidden), n_p = allocator.take(P, hidden);
            cosine = allocator.take(P, b.rotary_dims * 4), sine = allocator.take(P, b.rotary_dims * 4);
        }
        take_int8(b, T, backward, allocator);
        const bool copies_heads = b.split != SEPARATE && !counts.uses_views(b);
        if (!backward) {
            const int64_t position = allocator.used;
            if (copies_heads) joint = allocator.take(T, b.query.out * number);
            allocator.used = position;
            inner = allocator.take(P, inside);
            if (b.gate_has_up()) gate_joint = allocator.take(P, 2 * inside);
            return;
        }
        d_x1 = allocator.take(P, hidden);
        if (counts.has_output_rows) d_n_p = allocator.take(P, hidden), above = allocator.take(T, hidden);
        if (b.first.post.used || b.second.post.used) d_sum = allocator.take(P, hidden);
        if (b.first.after.used || b.second.after.used) d_branch = allocator.take(P, hidden);
        g_query = allocator.take(b.split == SEPARATE ? P : T, b.query.rank * number), g_key = allocator.take(T, b.key.rank * number);
        g_value = allocator.take(T, b.value.rank * number), g_output = allocator.take(P, b.output.rank * number);
        g_gate = allocator.take(P, b.gate.rank * number), g_up = allocator.take(P, b.up.rank * number), g_down = allocator.take(P,
            b.down.rank * number);
        const int64_t position = allocator.used;
        d_gate = allocator.take(P, inside), inner = allocator.take(P, inside);
        if (b.gated) d_up = allocator.take(P, inside);
        if (b.gate_has_up()) gate_joint = allocator.take(P, 2 * inside);
        allocator.used = position;
        take_heads(b, counts, allocator);
    }

  private:
    void take_int8(const BlockParts &b, int64_t T, bool backward, BufferAllocator &allocator) {
        int64_t widest = 0;
        bool any = false;
        for (const Layer *l : {&b.query, &b.key, &b.value, &b.output, &b.gate, &b.up, &b.down}) {
            any |= backward ? b.has_int8_gradient(*l) : l->scale != nullptr;
            widest = std::max({widest, l->in, l->out});
        }
        int8 = allocator.take(any ? T : 0, widest), scales = allocator.take(any ? T : 0, int8_blocks(widest) * 4);
    }
    void take_heads(const BlockParts &b, const RowCounts &counts, BufferAllocator &allocator) {
        const int64_t wide = b.query_size() * b.number(), narrow = b.key_size() * b.number();
        if (b.split != SEPARATE) joint = allocator.take(counts.T, b.query.out * b.number());
        // Head gradients are copied into `joint` when d_out is no longer used.
        const bool copies_heads = b.split != SEPARATE && !counts.uses_views(b);
        d_out = copies_heads ? Rows{joint.data, wide} : allocator.take(counts.P, wide);
        if (counts.uses_views(b)) d_q = joint, d_k = joint.at_byte(wide), d_v = joint.at_byte(wide + narrow);
        else d_q = allocator.take(counts.P, wide), d_k = allocator.take(counts.T, narrow), d_v = allocator.take(counts.T, narrow);
    }
};

}  // namespace deltaw
