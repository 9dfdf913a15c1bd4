// Which keys a query sees in a row of packed segments that form a prefix tree, and how queries are cut into blocks.
//
// A token sees its own segment (up to itself where `causal`) and all of the segment's ancestors. Segments follow one
// another in the row, parents before their children.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "status.h"

namespace deltaw {

const int COLUMNS = 32;  // (query, head) pairs of a block

class Segments {
  public:
    const int64_t count, length;
    const int64_t *const starts, *const stops, *const parents, *const offsets;  // offset: the position of the first token
    const int64_t window;  // 0: none
    const int causal;
    // Where in the row the queries stand, ascending; null where each token asks.
    const int64_t *const picked;
    const int64_t queries;

    // table (4, count): starts, stops, parents (-1: none) and offsets.
    Segments(const int64_t *table, int64_t count, int64_t length, int64_t window, int causal, const int64_t *picked, int64_t picks)
        : count(count), length(length), starts(table), stops(table + count), parents(table + 2 * count), offsets(table + 3 * count), window(window),
          causal(causal), picked(picked), queries(picked ? picks : length) {
        check_bounds();
        if (!picked) return;
        from.reserve(count + 1);
        for (int64_t s = 0; s < count; s++) from.push_back(std::lower_bound(picked, picked + picks, starts[s]) - picked);
        from.push_back(picks);
    }

    // Queries of a segment, and where its i-th query stands among the queries and among the keys.
    int64_t asking(int64_t s) const {
        return picked ? std::lower_bound(picked + from[s], picked + from.back(), stops[s]) - picked - from[s] : stops[s] - starts[s];
    }
    int64_t row(int64_t s, int64_t i) const { return (picked ? from[s] : starts[s]) + i; }
    int64_t place(int64_t s, int64_t i) const { return picked ? picked[from[s] + i] : starts[s] + i; }

  private:
    std::vector<int64_t> from;  // of segment s, the queries from[s] … from[s] + asking(s) - 1

    void check_bounds() const {
        require_in_bounds(count > 0 && length >= 0 && starts[0] == 0 && stops[count - 1] == length);
        for (int64_t s = 0; s < count; s++) {
            require_in_bounds(starts[s] <= stops[s] && (s + 1 == count || stops[s] == starts[s + 1]));
            const int64_t p = parents[s];
            require_in_bounds(p >= -1 && p < s && offsets[s] == (p < 0 ? 0 : offsets[p] + stops[p] - starts[p]));
        }
        for (int64_t i = 0; picked && i < queries; i++)
            require_in_bounds(picked[i] >= 0 && picked[i] < length && (i == 0 || picked[i - 1] < picked[i]));
    }
};

// Columns first … first + count - 1 of a segment: column x is query x / group and head x % group of those that share keys.
struct Block {
    int64_t segment, first, count, cost;
};

inline std::vector<Block> blocks_of(const Segments &f, int64_t group) {
    std::vector<Block> blocks;
    for (int64_t s = 0; s < f.count; s++) {
        const int64_t size = f.asking(s);
        for (int64_t x = 0; x < size * group; x += COLUMNS) {
            const int64_t n = std::min<int64_t>(COLUMNS, size * group - x);
            int64_t keys = f.causal ? f.place(s, (x + n - 1) / group) - f.starts[s] + 1 : f.stops[s] - f.starts[s];
            keys += f.offsets[s];
            if (f.window) keys = std::min(keys, f.window + COLUMNS);
            blocks.push_back({s, x, n, keys + 24});
        }
    }
    return blocks;
}

// Where the share of each of `parts` of the (key head, block) pairs begins, by cost.
inline std::vector<int64_t> shares_of(const std::vector<Block> &blocks, int64_t key_heads, int parts) {
    double total = 0;
    for (const Block &b : blocks) total += b.cost;
    total *= key_heads;
    std::vector<int64_t> begins(parts + 1, (int64_t)blocks.size() * key_heads);
    begins[0] = 0;
    double sum = 0;
    int next = 1;
    for (int64_t i = 0; i < (int64_t)blocks.size() * key_heads && next < parts; i++) {
        sum += blocks[i % blocks.size()].cost;
        while (next < parts && sum >= total * next / parts) begins[next++] = i + 1;
    }
    return begins;
}

struct Range {
    int64_t begin, end, position;  // of keys in the row, and the position of the first
    bool own;                      // of the queries' own segment
};

// The keys that a block's columns see, the root's first.
inline void ranges_of(const Segments &f, const Block &b, int64_t group, std::vector<Range> &ranges) {
    ranges.clear();
    const int64_t s = b.segment, low = f.place(s, b.first / group), high = f.place(s, (b.first + b.count - 1) / group);
    const int64_t earliest = f.window ? f.offsets[s] + low - f.starts[s] - f.window + 1 : 0;
    for (int64_t at = s; at >= 0; at = f.parents[at]) {
        const int64_t end = at != s ? f.stops[at] : f.causal ? high + 1 : f.stops[s];
        const int64_t begin = f.starts[at] + std::max<int64_t>(0, earliest - f.offsets[at]);
        if (begin < end) ranges.push_back({begin, end, f.offsets[at] + begin - f.starts[at], at == s});
    }
    std::reverse(ranges.begin(), ranges.end());
}

}  // namespace deltaw
