#include "threads.h"

#include <algorithm>
#include <chrono>
#include <new>
#include <thread>

#include "kernels.h"
#include "team.h"

namespace {

// GOMP_parallel of GNU's OpenMP, and three functions of the standard. A team of the library's own needs the last alone.
typedef void (*ParallelFunction)(void (*)(void *), void *, unsigned, unsigned);
typedef int (*CountFunction)();

struct Team {
    ParallelFunction parallel = nullptr;
    CountFunction thread_number = nullptr, size = nullptr, most_threads = nullptr;
} team;

thread_local bool working_alone = false;
thread_local int64_t own_rows = 0, even_rows = 0;

}  // namespace

namespace deltaw {

int thread_count() {
    if (working_alone || !team.most_threads) return 1;
    return team.most_threads();
}

#ifdef DW_OWN_THREADS
void run_team(void (*part)(void *, int), void *data, int count) { run_own_team(part, data, count); }
#else
void run_team(void (*part)(void *, int), void *data, int count) {
    struct Call {
        void (*part)(void *, int);
        void *data;
        int count;
    } call{part, data, count};
    team.parallel([](void *at) {
        const Call *call = static_cast<const Call *>(at);
        // A team may come out smaller than asked for; every part is worked on all the same.
        for (int i = team.thread_number(); i < call->count; i += team.size()) call->part(call->data, i);
    }, &call, (unsigned)count, 0);
}
#endif

void Crew::wait(const Phase &phase, int64_t count) {
    const int SPINS = 1000;  // about as long as a unit takes; then another thread may need the processor
    for (int spins = 0; phase.done.load(std::memory_order_acquire) < count; spins++) {
        if (spins >= SPINS) std::this_thread::yield();
#if defined(__x86_64__) || defined(__i386__)
        else __builtin_ia32_pause();
#elif defined(__aarch64__)
        else __asm__ volatile("yield");
#endif
    }
}

// Halves of a range that other threads see in one piece.
static uint64_t joined(int64_t from, int64_t to) { return (uint64_t)to << 32 | (uint64_t)from; }
static int64_t from_of(uint64_t range) { return (int64_t)(range & 0xffffffff); }
static int64_t to_of(uint64_t range) { return (int64_t)(range >> 32); }

Claims::Claims(Part *parts, int threads, int64_t units) : parts(parts), threads(threads) {
    for (int i = 0; i < threads; i++) {
        int64_t from, to;
        part_of(units, i, threads, from, to);
        new (&parts[i]) Part{{joined(from, to)}};
    }
}

bool Claims::take(int thread, int64_t least, int64_t most, int64_t &from, int64_t &to) {
    if (take_of(thread, false, least, most, from, to)) return true;
    for (;;) {
        int longest = -1;
        int64_t left = 0;
        for (int i = 0; i < threads; i++) {
            const uint64_t range = parts[i].range.load(std::memory_order_relaxed);
            if (to_of(range) - from_of(range) > left) longest = i, left = to_of(range) - from_of(range);
        }
        if (longest < 0) return false;
        if (take_of(longest, true, least, most, from, to)) return true;
    }
}

// Half of what is left of a part, so that what is taken last is little; but a thread leaves no less than `least` of its own.
bool Claims::take_of(int part, bool from_the_back, int64_t least, int64_t most, int64_t &from, int64_t &to) {
    uint64_t range = parts[part].range.load(std::memory_order_relaxed);
    for (;;) {
        const int64_t first = from_of(range), end = to_of(range), left = end - first;
        if (left <= 0) return false;
        int64_t count = std::min(left, std::max(least, std::min(most, left / 2)));
        if (!from_the_back && left - count < least && left <= most) count = left;
        from = from_the_back ? end - count : first, to = from + count;
        const uint64_t rest = from_the_back ? joined(first, from) : joined(to, end);
        if (parts[part].range.compare_exchange_weak(range, rest, std::memory_order_relaxed)) return true;
    }
}

// Of the threads of this thread's team: rows a second, relative to their mean.
static thread_local std::vector<double> paces;

RowShares::RowShares(int64_t rows, int threads) : ends(threads + 1), times(threads) {
    if ((int)paces.size() != threads) paces.assign(threads, 1.0);
    double mean = 0, fastest = 0, before = 0;
    for (double pace : paces) mean += pace / threads, fastest = std::max(fastest, pace);
    const double leveled = std::min(1.0, (MOST_SHARE - 1) / std::max(fastest / mean - 1, 1e-9));
    for (int i = 0; i < threads; i++) {
        ends[i] = std::min(rows, (int64_t)(rows * before / threads / ROWS_TOGETHER + 0.5) * ROWS_TOGETHER);
        before += 1 + leveled * (paces[i] / mean - 1);
    }
    ends[threads] = rows;
}

void RowShares::remember() const {
    const double WORTH_NOTING = 100e-6, WEIGHT = 0.3, LEAST = 0.25;  // seconds; of the newest; of the mean
    auto rate = [&](size_t i) { return (ends[i + 1] - ends[i]) / times[i]; };
    double mean = 0;
    for (size_t i = 0; i < times.size(); i++) {
        if (times[i] < WORTH_NOTING) return;
        mean += rate(i) / times.size();
    }
    for (size_t i = 0; i < times.size(); i++) paces[i] += WEIGHT * (std::max(LEAST, rate(i) / mean) - paces[i]);
}

double seconds_now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

Alone::Alone(int64_t own, int64_t even) : before(working_alone) { working_alone = true, own_rows = own, even_rows = even; }
Alone::~Alone() { working_alone = before, own_rows = even_rows = 0; }

int64_t even_share(int64_t rows) { return rows == own_rows ? even_rows : rows; }
int64_t most_share(int64_t rows) { return rows == own_rows ? (int64_t)(even_rows * MOST_SHARE) + ROWS_TOGETHER : rows; }

}  // namespace deltaw

int dw_threads(void *parallel, void *thread_number, void *team_size, void *most_threads) {
#ifndef DW_OWN_THREADS
    if ((parallel || most_threads) && !(parallel && thread_number && team_size && most_threads)) return deltaw::FAILED;
#endif
    team = Team{(ParallelFunction)parallel, (CountFunction)thread_number, (CountFunction)team_size, (CountFunction)most_threads};
    return deltaw::OK;
}
