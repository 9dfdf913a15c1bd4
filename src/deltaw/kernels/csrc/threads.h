// Sharing work out among the threads of the OpenMP library that torch uses. The library has no threads of its own:
// a second pool would fight the first one for the same cores. Only where torch's library is not GNU's, and so cannot be
// called without its compiler, are there some (team.h).
#pragma once
#include <atomic>
#include <cstdint>
#include <vector>

#include "status.h"

namespace deltaw {

// How many parts work is cut into: the threads of a team, or 1 where this thread works alone.
int thread_count();

// What this thread's share of rows would be if all had the same: `rows`, or where it works alone on so many, their average.
int64_t even_share(int64_t rows);
// The most that it may be.
int64_t most_share(int64_t rows);

// Calls part(data, i) once for each i below count, on the threads of a team.
void run_team(void (*part)(void *, int), void *data, int count);

// Work of one step that threads take in units, until all of it is done. A thread that the system lets run late finds it
// done and goes on: nobody waits for a thread that does nothing.
struct Phase {
    alignas(64) std::atomic<int64_t> next{0};
    alignas(64) std::atomic<int64_t> done{0};
};

// A thread among those that work through the same phases in the same order. What one phase wrote, all see in the next.
class Crew {
  public:
    const int threads;

    Crew(Phase *phases, int threads) : threads(threads), phases(phases) {}

    // body(unit) for each of `count` units, by whoever takes it; returns when all are done.
    template <class Body>
    void share(int64_t count, Body &&body) {
        if (threads == 1) {
            for (int64_t i = 0; i < count; i++) body(i);
            return;
        }
        Phase &phase = *phases++;
        for (int64_t i; (i = phase.next.fetch_add(1, std::memory_order_relaxed)) < count;) {
            body(i);
            phase.done.fetch_add(1, std::memory_order_release);
        }
        wait(phase, count);
    }

  private:
    Phase *phases;
    static void wait(const Phase &phase, int64_t count);
};

// Units of work in a row, of which each thread begins with its own part, from the front. One that is done with it takes
// from the back of the part of which most is left: nobody waits long for a thread that another program slows down, and
// on threads of the same speed each works on its own part alone.
class Claims {
  public:
    struct alignas(64) Part {
        std::atomic<uint64_t> range;  // [low half, high half) is left
    };
    // `parts`: room for one of each thread. Before the threads begin.
    Claims(Part *parts, int threads, int64_t units);

    // The next units [from, to) of `thread`, between `least` and `most` unless fewer are left; false when all are taken.
    bool take(int thread, int64_t least, int64_t most, int64_t &from, int64_t &to);

  private:
    Part *parts;
    int threads;
    bool take_of(int part, bool from_the_back, int64_t least, int64_t most, int64_t &from, int64_t &to);
};

// While one lives, this thread works through kernels by itself, on `own` rows, where all have `even` rows on the average.
class Alone {
  public:
    Alone(int64_t own, int64_t even);
    ~Alone();
    Alone(const Alone &) = delete;
    Alone &operator=(const Alone &) = delete;

  private:
    const bool before;
};

// body(i, count) for each of count parts. The first failure of a part is thrown again here, after all parts ended.
template <class Body>
inline void in_parallel(Body &&body) {
    const int count = thread_count();
    if (count <= 1) {
        body(0, 1);
        return;
    }
    struct Job {
        Body *body;
        int count;
        std::atomic<int> status;
    } job{&body, count, {OK}};
    run_team([](void *data, int part) {
        Job *job = static_cast<Job *>(data);
        try {
            (*job->body)(part, job->count);
        } catch (...) {
            int expected = OK;
            job->status.compare_exchange_strong(expected, current_status());
        }
    }, &job, count);
    check(job.status.load());
}

// [begin, end) of part `which` of `parts` of n things.
inline void part_of(int64_t n, int which, int parts, int64_t &begin, int64_t &end) {
    begin = n * which / parts;
    end = n * (which + 1) / parts;
}

// body(m) for each of `rows` rows.
template <class Body>
inline void rows_in_parallel(int64_t rows, Body &&body) {
    in_parallel([&](int thread, int threads) {
        int64_t begin, end;
        part_of(rows, thread, threads, begin, end);
        for (int64_t m = begin; m < end; m++) body(m);
    });
}

const int64_t ROWS_FOR_EACH = 384;  // with so many rows for each thread, rows are shared out, not a product's columns
const int64_t ROWS_TOGETHER = 32;   // of which shares are made: the most that any product takes at once
const double MOST_SHARE = 1.5;      // of rows, of an even one

// Many rows shared out by how fast each thread of this one's team went through its rows lately: cores differ, and other
// programs slow some of them down. What is computed of a row doesn't depend on who computes it, nor does the memory.
class RowShares {
  public:
    RowShares(int64_t rows, int threads);
    // Rows [begin, end) of a thread, a multiple of ROWS_TOGETHER but for the last.
    void of(int thread, int64_t &begin, int64_t &end) const { begin = ends[thread], end = ends[thread + 1]; }
    void took(int thread, double seconds) { times[thread] = seconds; }
    // Once all have said what they took.
    void remember() const;

  private:
    std::vector<int64_t> ends;
    std::vector<double> times;
};

double seconds_now();

// Whether the threads of a team share out so many rows, not the columns of each product.
inline bool shares_rows(int64_t rows, int team) { return team > 1 && rows >= ROWS_FOR_EACH * team; }

// body(first row, number of rows) of kernels that treat each row by itself. Many rows are shared out among the
// threads, each of which runs all kernels on its own rows; of few rows, the kernels share out their columns.
template <class Body>
inline void rows_apart(int64_t rows, Body &&body) {
    const int count = thread_count();
    if (!shares_rows(rows, count)) {
        body(0, rows);
        return;
    }
    RowShares shares(rows, count);
    in_parallel([&](int thread, int) {
        int64_t begin, end;
        shares.of(thread, begin, end);
        const Alone alone(end - begin, (rows + count - 1) / count);
        const double start = seconds_now();
        body(begin, end - begin);
        shares.took(thread, seconds_now() - start);
    });
    shares.remember();
}

}  // namespace deltaw
