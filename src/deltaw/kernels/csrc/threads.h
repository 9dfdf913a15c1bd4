// Division of work among the threads of torch's OpenMP library. The kernels use these threads because a second thread
// pool would compete for the cores. Only if torch's library is not GNU's, and so cannot be called without its compiler,
// there is a separate pool (thread_pool.h).
#pragma once
#include <atomic>
#include <cstdint>
#include <vector>

#include "status.h"

namespace deltaw {

// Number of parts to divide work into: the number of threads, or 1 within a SingleThreadScope.
int thread_count();

// Average number of rows per thread: `rows`, or within a SingleThreadScope with this number of rows the average of all
// threads.
int64_t average_rows(int64_t rows);
// Upper bound of the rows per thread.
int64_t max_rows(int64_t rows);

// Call part(data, i) once for each i below count on the OpenMP threads.
void run_on_threads(void (*part)(void *, int), void *data, int count);

// A parallel loop whose iterations are claimed dynamically. A thread that starts late finds no iterations left and
// proceeds, so the barrier never waits for an idle thread.
struct ParallelLoop {
    alignas(64) std::atomic<int64_t> next{0};
    alignas(64) std::atomic<int64_t> done{0};
};

// Handle of one worker thread. All workers run the same loops in the same order. Writes of a loop are visible in the
// next.
class Worker {
  public:
    const int threads;

    Worker(ParallelLoop *loops, int threads) : threads(threads), loops(loops) {}

    // Run body(i) for i below count, divided among the workers. Returns when all iterations are done.
    template <class Body>
    void run_loop(int64_t count, Body &&body) {
        if (threads == 1) {
            for (int64_t i = 0; i < count; i++) body(i);
            return;
        }
        ParallelLoop &loop = *loops++;
        for (int64_t i; (i = loop.next.fetch_add(1, std::memory_order_relaxed)) < count;) {
            body(i);
            loop.done.fetch_add(1, std::memory_order_release);
        }
        wait(loop, count);
    }

  private:
    ParallelLoop *loops;
    static void wait(const ParallelLoop &loop, int64_t count);
};

// Work stealing over consecutive units. Each thread starts with its part, from the front. When it is done, it takes
// units from the back of the part with the most units left. Threads of equal speed process only their parts, and no
// thread waits long for one that is slowed down by another program.
class StealableRanges {
  public:
    struct alignas(64) Part {
        std::atomic<uint64_t> range;  // [low half, high half) is not claimed yet
    };
    // `parts`: array with one element per thread. Must be constructed before the threads start.
    StealableRanges(Part *parts, int threads, int64_t units);

    // Claim units [from, to) for `thread`, between `min_units` and `max_units` unless fewer remain. Returns false when
    // all are claimed.
    bool take(int thread, int64_t min_units, int64_t max_units, int64_t &from, int64_t &to);

  private:
    Part *parts;
    int threads;
    bool take_from(int part, bool from_back, int64_t min_units, int64_t max_units, int64_t &from, int64_t &to);
};

// Within its lifetime, this thread runs kernels on its share of the rows by itself: `num_rows`, with an average of
// `average` per thread.
class SingleThreadScope {
  public:
    SingleThreadScope(int64_t num_rows, int64_t average);
    ~SingleThreadScope();
    SingleThreadScope(const SingleThreadScope &) = delete;
    SingleThreadScope &operator=(const SingleThreadScope &) = delete;

  private:
    const bool was_single_threaded;
};

// Run body(i, count) for each of count parts. Rethrows the first failure after all parts have finished.
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
    run_on_threads([](void *data, int part) {
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

// Compute the range [begin, end) of part `index` if n items are divided into `parts`.
inline void split_range(int64_t n, int index, int parts, int64_t &begin, int64_t &end) {
    begin = n * index / parts;
    end = n * (index + 1) / parts;
}

// Run body(m) for each row.
template <class Body>
inline void rows_in_parallel(int64_t rows, Body &&body) {
    in_parallel([&](int thread, int threads) {
        int64_t begin, end;
        split_range(rows, thread, threads, begin, end);
        for (int64_t m = begin; m < end; m++) body(m);
    });
}

const int64_t MIN_ROWS_PER_THREAD = 384;  // from this number of rows per thread, rows are divided instead of a product's columns
const int64_t ROW_ALIGNMENT = 32;  // alignment of shares: the maximum number of rows that a product processes at a time
const double MAX_SHARE = 1.5;  // maximum share of a thread relative to the average

// Partition of rows by the measured speeds of the threads, because cores differ and other programs slow some of them
// down. Neither results nor memory depend on the partition.
class RowPartition {
  public:
    RowPartition(int64_t rows, int threads);
    // The rows [begin, end) of a thread, a multiple of ROW_ALIGNMENT except for the last thread.
    void rows_of(int thread, int64_t &begin, int64_t &end) const { begin = ends[thread], end = ends[thread + 1]; }
    void set_time(int thread, double seconds) { times[thread] = seconds; }
    // Update the measured speeds. Call after all threads have set their times.
    void update_speeds() const;

  private:
    std::vector<int64_t> ends;
    std::vector<double> times;
};

double seconds_now();

// True if threads divide this number of rows instead of the columns of each product.
inline bool partitions_rows(int64_t rows, int num_threads) { return num_threads > 1 && rows >= MIN_ROWS_PER_THREAD * num_threads; }

// Run body(first row, number of rows) of kernels that process rows independently. A large number of rows is divided
// among the threads, and each thread runs all kernels on its rows. Otherwise each kernel divides its columns.
template <class Body>
inline void for_each_row_range(int64_t rows, Body &&body) {
    const int count = thread_count();
    if (!partitions_rows(rows, count)) {
        body(0, rows);
        return;
    }
    RowPartition partition(rows, count);
    in_parallel([&](int thread, int) {
        int64_t begin, end;
        partition.rows_of(thread, begin, end);
        const SingleThreadScope scope(end - begin, (rows + count - 1) / count);
        const double start = seconds_now();
        body(begin, end - begin);
        partition.set_time(thread, seconds_now() - start);
    });
    partition.update_speeds();
}

}  // namespace deltaw
