#include "threads.h"

#include <sched.h>

#include "kernels.h"

namespace {

// GOMP_parallel, which LLVM's and Intel's OpenMP export as well as GNU's, and three functions of the standard.
typedef void (*ParallelFunction)(void (*)(void *), void *, unsigned, unsigned);
typedef int (*CountFunction)();

struct Team {
    ParallelFunction parallel = nullptr;
    CountFunction thread_number = nullptr, size = nullptr, most_threads = nullptr;
} team;

thread_local bool working_alone = false;

}  // namespace

namespace deltaw {

int thread_count() {
    if (working_alone || !team.parallel) return 1;
    return team.most_threads();
}

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

void Crew::wait(const Phase &phase, int64_t count) {
    const int SPINS = 1000;  // about as long as a unit takes; then another thread may need the processor
    for (int spins = 0; phase.done.load(std::memory_order_acquire) < count; spins++) {
        if (spins >= SPINS) sched_yield();
#if defined(__x86_64__) || defined(__i386__)
        else __builtin_ia32_pause();
#elif defined(__aarch64__)
        else __asm__ volatile("yield");
#endif
    }
}

Alone::Alone() : before(working_alone) { working_alone = true; }
Alone::~Alone() { working_alone = before; }

}  // namespace deltaw

int dw_threads(void *parallel, void *thread_number, void *team_size, void *most_threads) {
    if (parallel && !(thread_number && team_size && most_threads)) return deltaw::FAILED;
    team = Team{(ParallelFunction)parallel, (CountFunction)thread_number, (CountFunction)team_size, (CountFunction)most_threads};
    return deltaw::OK;
}
