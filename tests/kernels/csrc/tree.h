// A prefix tree of segments.
#pragma once
#include <cstdint>
#include <vector>

struct Tree {
    std::vector<int64_t> lengths, parents;

    int64_t count() const { return (int64_t)lengths.size(); }
    int64_t length() const {
        int64_t sum = 0;
        for (int64_t n : lengths) sum += n;
        return sum;
    }
    // starts, stops, parents, offsets
    std::vector<int64_t> table() const {
        const int64_t S = count();
        std::vector<int64_t> t(4 * S);
        for (int64_t s = 0, at = 0; s < S; at += lengths[s], s++) {
            t[s] = at, t[S + s] = at + lengths[s], t[2 * S + s] = parents[s];
            t[3 * S + s] = parents[s] < 0 ? 0 : t[3 * S + parents[s]] + lengths[parents[s]];
        }
        return t;
    }
};
