#include "threads.h"

#include <algorithm>
#include <chrono>
#include <mutex>
#include <new>
#include <set>
#include <thread>

#include "kernels.h"
#include "thread_pool.h"

namespace {

// GOMP_parallel of GNU's OpenMP library, and three standard OpenMP functions. The separate thread pool uses only the
// last.
typedef void (*ParallelFunction)(void (*)(void *), void *, unsigned, unsigned);
typedef int (*CountFunction)();

struct OpenMPFunctions {
    ParallelFunction parallel = nullptr;
    CountFunction thread_number = nullptr, size = nullptr, max_threads = nullptr;
} openmp;

thread_local bool is_single_threaded = false;
thread_local int64_t scope_rows = 0, scope_average = 0;

}  // namespace

namespace deltaw {

int thread_count() {
    if (is_single_threaded || !openmp.max_threads) return 1;
    return openmp.max_threads();
}

#ifdef DW_OWN_THREADS
void run_on_threads(void (*part)(void *, int), void *data, int count) { run_on_pool(part, data, count); }
#else
void run_on_threads(void (*part)(void *, int), void *data, int count) {
    struct Call {
        void (*part)(void *, int);
        void *data;
        int count;
    } call{part, data, count};
    openmp.parallel([](void *at) {
        const Call *call = static_cast<const Call *>(at);
        // OpenMP can start fewer threads than requested, so each thread processes every size()-th part.
        for (int i = openmp.thread_number(); i < call->count; i += openmp.size()) call->part(call->data, i);
    }, &call, (unsigned)count, 0);
}
#endif

void Worker::wait(const ParallelLoop &loop, int64_t count) {
    const int SPINS = 1000;  // about the duration of a unit; then yields to other threads
    for (int spins = 0; loop.done.load(std::memory_order_acquire) < count; spins++) {
        if (spins >= SPINS) std::this_thread::yield();
#if defined(__x86_64__) || defined(__i386__)
        else __builtin_ia32_pause();
#elif defined(__aarch64__)
        else __asm__ volatile("yield");
#endif
    }
}

// A range packed into one word, so that other threads read it atomically.
static uint64_t pack_range(int64_t from, int64_t to) { return (uint64_t)to << 32 | (uint64_t)from; }
static int64_t range_start(uint64_t range) { return (int64_t)(range & 0xffffffff); }
static int64_t range_end(uint64_t range) { return (int64_t)(range >> 32); }

StealableRanges::StealableRanges(Part *parts, int threads, int64_t units) : parts(parts), threads(threads) {
    for (int i = 0; i < threads; i++) {
        int64_t from, to;
        split_range(units, i, threads, from, to);
        new (&parts[i]) Part{{pack_range(from, to)}};
    }
}

bool StealableRanges::take(int thread, int64_t min_units, int64_t max_units, int64_t &from, int64_t &to) {
    if (take_from(thread, false, min_units, max_units, from, to)) return true;
    for (;;) {
        int longest = -1;
        int64_t left = 0;
        for (int i = 0; i < threads; i++) {
            const uint64_t range = parts[i].range.load(std::memory_order_relaxed);
            if (range_end(range) - range_start(range) > left) longest = i, left = range_end(range) - range_start(range);
        }
        if (longest < 0) return false;
        if (take_from(longest, true, min_units, max_units, from, to)) return true;
    }
}

// Take half of the remaining units, so that the last claims are small. The owner of a range never leaves less than
// `min_units`.
bool StealableRanges::take_from(int part, bool from_back, int64_t min_units, int64_t max_units, int64_t &from, int64_t &to) {
    uint64_t range = parts[part].range.load(std::memory_order_relaxed);
    for (;;) {
        const int64_t first = range_start(range), end = range_end(range), left = end - first;
        if (left <= 0) return false;
        int64_t count = std::min(left, std::max(min_units, std::min(max_units, left / 2)));
        if (!from_back && left - count < min_units && left <= max_units) count = left;
        from = from_back ? end - count : first, to = from + count;
        const uint64_t remaining = from_back ? pack_range(first, from) : pack_range(to, end);
        if (parts[part].range.compare_exchange_weak(range, remaining, std::memory_order_relaxed)) return true;
    }
}

// Speed of each thread (rows per second), relative to their mean. Per calling thread.
static thread_local std::vector<double> thread_speeds;

RowPartition::RowPartition(int64_t rows, int threads) : ends(threads + 1), times(threads) {
    if ((int)thread_speeds.size() != threads) thread_speeds.assign(threads, 1.0);
    double mean = 0, fastest = 0, before = 0;
    for (double speed : thread_speeds) mean += speed / threads, fastest = std::max(fastest, speed);
    const double damping = std::min(1.0, (MAX_SHARE - 1) / std::max(fastest / mean - 1, 1e-9));
    for (int i = 0; i < threads; i++) {
        ends[i] = std::min(rows, (int64_t)(rows * before / threads / ROW_ALIGNMENT + 0.5) * ROW_ALIGNMENT);
        before += 1 + damping * (thread_speeds[i] / mean - 1);
    }
    ends[threads] = rows;
}

void RowPartition::update_speeds() const {
    const double MIN_SECONDS = 100e-6, NEW_WEIGHT = 0.3, MIN_SPEED = 0.25;  // seconds; weight of the latest measurement; minimum relative to the mean
    auto rate = [&](size_t i) { return (ends[i + 1] - ends[i]) / times[i]; };
    double mean = 0;
    for (size_t i = 0; i < times.size(); i++) {
        if (times[i] < MIN_SECONDS) return;
        mean += rate(i) / times.size();
    }
    for (size_t i = 0; i < times.size(); i++) thread_speeds[i] += NEW_WEIGHT * (std::max(MIN_SPEED, rate(i) / mean) - thread_speeds[i]);
}

double seconds_now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

SingleThreadScope::SingleThreadScope(int64_t num_rows, int64_t average) : was_single_threaded(is_single_threaded) {
    is_single_threaded = true, scope_rows = num_rows, scope_average = average;
}
SingleThreadScope::~SingleThreadScope() { is_single_threaded = was_single_threaded, scope_rows = scope_average = 0; }

int64_t average_rows(int64_t rows) { return rows == scope_rows ? scope_average : rows; }
int64_t max_rows(int64_t rows) { return rows == scope_rows ? (int64_t)(scope_average * MAX_SHARE) + ROW_ALIGNMENT : rows; }

}  // namespace deltaw

int64_t dw_count_threads() {
    const double TIMEOUT = 1;  // seconds
    std::mutex mutex;
    std::set<std::thread::id> arrived;
    deltaw::in_parallel([&](int, int parts) {
        const double start = deltaw::seconds_now();
        for (bool is_first = true;; is_first = false) {
            {
                std::lock_guard<std::mutex> lock(mutex);
                if (is_first) arrived.insert(std::this_thread::get_id());
                if ((int)arrived.size() == parts) return;
            }
            // A thread that runs several parts would wait for itself.
            if (deltaw::seconds_now() - start > TIMEOUT) return;
            std::this_thread::yield();
        }
    });
    return (int64_t)arrived.size();
}

int dw_threads(void *parallel, void *thread_number, void *num_threads, void *max_threads) {
#ifndef DW_OWN_THREADS
    if ((parallel || max_threads) && !(parallel && thread_number && num_threads && max_threads)) return deltaw::FAILED;
#endif
    openmp = OpenMPFunctions{(ParallelFunction)parallel, (CountFunction)thread_number, (CountFunction)num_threads, (CountFunction)max_threads};
    return deltaw::OK;
}
