// Visibility in a row of packed segments that form a prefix tree, and the partition of queries into blocks.
//
// A token sees its segment (up to its position if `causal`) and all ancestors of the segment. Segments are contiguous,
// and parents precede their children.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "status.h"

namespace deltaw {

const int COLUMNS = 32;  // (query, head) pairs per block

class Segments {
  public:
    const int64_t count, length;
    const int64_t *const starts, *const stops, *const parents, *const offsets;  // offset: position of the segment's first token
    const int64_t window;  // 0 if unlimited
    const int causal;
    // Ascending positions of the queries in the row, or null if every token is a query.
    const int64_t *const query_positions;
    const int64_t queries;

    // table (4, count): starts, stops, parents (-1 for a root) and offsets.
    Segments(const int64_t *table, int64_t count, int64_t length, int64_t window, int causal, const int64_t *query_positions, int64_t num_positions)
        : count(count), length(length), starts(table), stops(table + count), parents(table + 2 * count), offsets(table + 3 * count), window(window),
          causal(causal), query_positions(query_positions), queries(query_positions ? num_positions : length) {
        check_bounds();
        if (!query_positions) return;
        from.reserve(count + 1);
        for (int64_t s = 0; s < count; s++)
            from.push_back(std::lower_bound(query_positions, query_positions + num_positions, starts[s]) - query_positions);
        from.push_back(num_positions);
    }

    // Number of queries of a segment; and the index of its i-th query among the queries and among the keys.
    int64_t num_queries(int64_t s) const {
        return query_positions
                   ? std::lower_bound(query_positions + from[s], query_positions + from.back(), stops[s]) - query_positions - from[s]
                   : stops[s] - starts[s];
    }
    int64_t row(int64_t s, int64_t i) const { return (query_positions ? from[s] : starts[s]) + i; }
    int64_t key_index(int64_t s, int64_t i) const { return query_positions ? query_positions[from[s] + i] : starts[s] + i; }

  private:
    std::vector<int64_t> from;  // segment s has the queries from[s] … from[s] + num_queries(s) - 1

    void check_bounds() const {
        require_in_bounds(count > 0 && length >= 0 && starts[0] == 0 && stops[count - 1] == length);
        for (int64_t s = 0; s < count; s++) {
            require_in_bounds(starts[s] <= stops[s] && (s + 1 == count || stops[s] == starts[s + 1]));
            const int64_t p = parents[s];
            require_in_bounds(p >= -1 && p < s && offsets[s] == (p < 0 ? 0 : offsets[p] + stops[p] - starts[p]));
        }
        for (int64_t i = 0; query_positions && i < queries; i++)
            require_in_bounds(query_positions[i] >= 0 && query_positions[i] < length && (i == 0 || query_positions[i - 1] < query_positions[i]));
    }
};

// Columns first … first + count - 1 of a segment. Column x is query x / group and head x % group of the heads that
// share keys.
struct Block {
    int64_t segment, first, count, cost;
};

inline std::vector<Block> make_blocks(const Segments &f, int64_t group) {
    std::vector<Block> blocks;
    for (int64_t s = 0; s < f.count; s++) {
        const int64_t size = f.num_queries(s);
        for (int64_t x = 0; x < size * group; x += COLUMNS) {
            const int64_t n = std::min<int64_t>(COLUMNS, size * group - x);
            int64_t keys = f.causal ? f.key_index(s, (x + n - 1) / group) - f.starts[s] + 1 : f.stops[s] - f.starts[s];
            keys += f.offsets[s];
            if (f.window) keys = std::min(keys, f.window + COLUMNS);
            blocks.push_back({s, x, n, keys + 24});
        }
    }
    return blocks;
}

// Start of each part if (key head, block) pairs are divided by cost into `parts`.
inline std::vector<int64_t> divide_blocks(const std::vector<Block> &blocks, int64_t key_heads, int parts) {
    double total = 0;
    for (const Block &b : blocks) total += b.cost;
    total *= key_heads;
    std::vector<int64_t> part_starts(parts + 1, (int64_t)blocks.size() * key_heads);
    part_starts[0] = 0;
    double sum = 0;
    int next = 1;
    for (int64_t i = 0; i < (int64_t)blocks.size() * key_heads && next < parts; i++) {
        sum += blocks[i % blocks.size()].cost;
        while (next < parts && sum >= total * next / parts) part_starts[next++] = i + 1;
    }
    return part_starts;
}

struct Range {
    int64_t begin, end, position;  // keys in the row, and the position of the first
    bool is_query_segment;  // True for the segment of the queries
};

// Ranges of keys that a block's columns see, the root's first.
inline void find_ranges(const Segments &f, const Block &b, int64_t group, std::vector<Range> &ranges) {
    ranges.clear();
    const int64_t s = b.segment, low = f.key_index(s, b.first / group), high = f.key_index(s, (b.first + b.count - 1) / group);
    const int64_t earliest = f.window ? f.offsets[s] + low - f.starts[s] - f.window + 1 : 0;
    for (int64_t ancestor = s; ancestor >= 0; ancestor = f.parents[ancestor]) {
        const int64_t end = ancestor != s ? f.stops[ancestor] : f.causal ? high + 1 : f.stops[s];
        const int64_t begin = f.starts[ancestor] + std::max<int64_t>(0, earliest - f.offsets[ancestor]);
        if (begin < end) ranges.push_back({begin, end, f.offsets[ancestor] + begin - f.starts[ancestor], ancestor == s});
    }
    std::reverse(ranges.begin(), ranges.end());
}

}  // namespace deltaw
