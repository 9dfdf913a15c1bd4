// Tests of work distribution: each unit is processed once, faster threads get more rows, and results are bit-identical.
#include "threads.h"

#include <algorithm>

#include "check.h"
#include "kernels.h"
#include "tests.h"

using namespace deltaw;

namespace {

// Threads claim units in the order of `turns` until all are claimed.
void test_claims(int threads, int64_t units, int64_t least, int64_t most, const std::vector<int> &turns) {
    const std::string what = "claims of " + std::to_string(units) + " units by " + std::to_string(threads);
    std::vector<StealableRanges::Part> parts(threads);
    StealableRanges claims(parts.data(), threads, units);
    std::vector<int> taken(units);
    std::vector<bool> began(threads);
    int64_t done = 0;
    bool within = true, own_first = true;
    for (size_t turn = 0; done < units; turn++) {
        const int thread = turns[turn % turns.size()];
        int64_t from = -1, to = -1, own, own_end;
        expect(claims.take(thread, least, most, from, to), what + ": some are left");
        if (from < 0 || to > units || from >= to) return expect(false, what + ": a range of units");
        split_range(units, thread, threads, own, own_end);
        if (!began[thread] && turn < (size_t)threads && units >= threads) own_first = own_first && from == own;
        began[thread] = true;
        within = within && to - from <= std::max(least, most);
        for (int64_t i = from; i < to; i++) taken[i]++;
        done += to - from;
    }
    int64_t from, to;
    for (int thread = 0; thread < threads; thread++) expect(!claims.take(thread, least, most, from, to), what + ": none is left");
    expect(std::all_of(taken.begin(), taken.end(), [](int times) { return times == 1; }), what + ": each once");
    expect(within, what + ": not more than is asked for");
    expect(own_first, what + ": one's own part first");
}

// The same with concurrent threads.
void test_claims_of_a_team() {
    const int64_t units = 5000;
    std::vector<StealableRanges::Part> parts(thread_count());
    std::vector<std::atomic<int>> taken(units);
    for (auto &times : taken) times = 0;
    StealableRanges claims(parts.data(), thread_count(), units);
    in_parallel([&](int thread, int) {
        for (int64_t from, to; claims.take(thread, 1, 3, from, to);)
            for (int64_t i = from; i < to; i++) taken[i]++;
    });
    expect(std::all_of(taken.begin(), taken.end(), [](const std::atomic<int> &times) { return times == 1; }), "a team takes each unit once");
}

// Partition the rows once and report `each` seconds per row for each thread.
std::vector<int64_t> shared_out(int64_t rows, const std::vector<double> &each) {
    const int threads = (int)each.size();
    RowPartition shares(rows, threads);
    std::vector<int64_t> found;
    int64_t covered = 0;
    for (int i = 0; i < threads; i++) {
        int64_t begin, end;
        shares.rows_of(i, begin, end);
        expect(begin == covered && end > begin && (begin % ROW_ALIGNMENT == 0), "rows are shared out in order, some to each thread");
        covered = end;
        found.push_back(end - begin);
        shares.set_time(i, each[i] * (end - begin));
    }
    expect(covered == rows, "all rows are shared out");
    shares.update_speeds();
    return found;
}

void settle(int64_t rows, const std::vector<double> &each) {
    for (int i = 0; i < 40; i++) shared_out(rows, each);
}

void test_row_shares() {
    const double ms = 1e-3;
    std::vector<int64_t> found = shared_out(3000, {ms, ms, ms, ms, ms});  // no other test uses this number of threads
    for (int64_t rows : found) expect(std::abs(rows - 600) <= ROW_ALIGNMENT, "at first all have as many rows");
    settle(3000, {ms, ms, ms, ms, 3 * ms});
    found = shared_out(3000, {ms, ms, ms, ms, 3 * ms});
    expect(std::abs(found[4] - 3000 / 13) <= ROW_ALIGNMENT && std::abs(found[0] - 3 * 3000 / 13) <= ROW_ALIGNMENT, "a slow thread has fewer rows");
    settle(3000, {ms, ms, ms, ms, 1000 * ms});
    expect(shared_out(3000, {ms, ms, ms, ms, ms})[4] >= 3000 / 32, "one that hardly goes on still has some");
    settle(3000, {ms, 1000 * ms, 1000 * ms, 1000 * ms, 1000 * ms});
    found = shared_out(3000, {ms, ms, ms, ms, ms});
    expect(found[0] >= 600 * 1.4 && found[0] <= 600 * MAX_SHARE + ROW_ALIGNMENT, "one that is far faster has some rows more");
    settle(3000, {ms, ms, ms, ms, ms});
    for (int64_t rows : shared_out(3000, {ms, ms, ms, ms, ms})) expect(std::abs(rows - 600) <= ROW_ALIGNMENT, "one that goes on again has as many");
    settle(3000, {1e-9, 1e-8, 1e-9, 1e-9, 1e-9});
    for (int64_t rows : shared_out(3000, {ms, ms, ms, ms, ms})) expect(std::abs(rows - 600) <= ROW_ALIGNMENT, "short work says nothing");
}

// A linear layer with a low-rank update in bf16 or int8, with input scales per row or per block.
enum Form { IN_BF16, IN_INT8, IN_BLOCKS };

struct Linear {
    const int64_t M, in, out, rank = 8;
    Buffer<bf16> x, w, y, h;
    Buffer<float> A, B, scale, x_scales;
    Buffer<int8_t> q;
    Buffer<uint8_t> x_int8;

    Linear(int64_t M, int64_t in, int64_t out)
        : M(M), in(in), out(out), x(M * in), w(out * in), y(M * out), h(M * rank), A(in * rank), B(rank * out), scale(out),
          x_scales(M * ((in + 127) / 128)), q(out * in), x_int8(M * in) {
        seed = 11;
        x.fill(), w.fill(), A.fill(), B.fill();
        for (int64_t i = 0; i < out * in; i++) q[i] = (int8_t)(random_number() * 40);
        for (int64_t i = 0; i < out; i++) scale[i] = 0.01f + (float)i / out;
    }
    Numbers computed(Form form) {
        const bool int8 = form != IN_BF16;
        expect(dw_linear(1, M, out, in, x.data(), int8 ? 2 : 1, int8 ? (const void *)q.data() : w.data(), 1, int8 ? scale.data() : nullptr,
                         nullptr, nullptr,
                         0, A.data(), B.data(), rank, 0.5f, nullptr, x_int8.data(), x_scales.data(), form == IN_BLOCKS, 1, y.data(),
                         h.data()) == 0, "a linear layer");
        return y.numbers();
    }
};

// Panels, or rows if there are enough, are split among threads. The result is bit-identical to that of one thread.
void test_same_bits(int64_t M, int64_t in, int64_t out) {
    const int threads = threads_in_use();
    Linear linear(M, in, out);
    for (Form form : {IN_BF16, IN_INT8, IN_BLOCKS}) {
        const std::string what = "the bits of one thread, " + std::to_string(M) + "x" + std::to_string(in) + "x" + std::to_string(out);
        use_threads(1);
        const Numbers expected = linear.computed(form);
        use_threads(threads);
        for (int time = 0; time < 6; time++) {
            if (M >= MIN_ROWS_PER_THREAD * threads && threads > 1) {
                std::vector<double> each(threads, 1e-4);
                each[time % threads] = 5e-4;
                settle(M, each);
            }
            expect(linear.computed(form) == expected, what);
        }
    }
}

// The arena size does not depend on which thread is slow.
void test_same_room(int64_t in, int64_t out) {
    const int threads = threads_in_use();
    Linear linear(3 * MIN_ROWS_PER_THREAD * threads / 2, in, out);
    for (Form form : {IN_BF16, IN_INT8, IN_BLOCKS}) {
        int64_t first = 0;
        for (int time = 0; time <= threads; time++) {
            std::vector<double> each(threads, 1e-4);
            if (time) each[time - 1] = 1;
            settle(linear.M, each);
            if (time == 0) {
                dw_release();
                for (int again = 0; again < 2; again++) linear.computed(form), dw_scratch_bytes(1);
            }
            linear.computed(form);
            const int64_t held = dw_scratch_bytes(1);
            if (time == 0) first = held;
            expect(held == first && held > 0, "the bytes that are held, " + std::to_string(in) + "x" + std::to_string(out));
        }
    }
}

}  // namespace

void test_threads() {
    if (thread_count() == 1) {
        for (int64_t units : {1, 2, 7, 40, 1000})
            for (int threads : {1, 2, 3, 8}) {
                std::vector<int> in_turn, slow_first;
                for (int i = 0; i < threads; i++) in_turn.push_back(i), slow_first.insert(slow_first.end(), i == 0 ? 1 : 5, i);
                test_claims(threads, units, 1, 8, in_turn), test_claims(threads, units, 4, 8, slow_first), test_claims(threads, units, 1, 1,
                    {threads - 1});
            }
        test_row_shares();
    }
    test_claims_of_a_team();
    for (int64_t in : {64, 1300}) test_same_bits(70, in, 900), test_same_bits(1200, in, 80);
    for (int64_t in : {576, 1536, 4100}) test_same_room(in, 200);
}
