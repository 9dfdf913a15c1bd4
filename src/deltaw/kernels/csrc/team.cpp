#include "team.h"

#ifdef DW_OWN_THREADS
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>

#ifndef _WIN32
#include <pthread.h>
#endif

namespace {

// A thread looks so often whether there is something to do before it sleeps: some microseconds, about what waking it takes.
const int LOOKS = 256;

inline void pause_briefly() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

// Whether it holds soon.
template <class Condition>
bool soon(Condition &&holds) {
    for (int look = 0; look < LOOKS; look++) {
        if (holds()) return true;
        pause_briefly();
    }
    return false;
}

thread_local bool in_a_team = false;

class Team {
  public:
    Team *next = nullptr;  // of those that are idle

    // part(data, i) for each i below count, of which the caller does the first, and those that no thread can be had for.
    void run(void (*part)(void *, int), void *data, int count) {
        while (threads < count - 1 && start()) {}
        const int helped = std::min(threads, count - 1);
        {
            const std::lock_guard<std::mutex> lock(mutex);
            call = {part, data, helped};
            left.store(helped, std::memory_order_relaxed);
            round.fetch_add(1, std::memory_order_release);
        }
        if (helped) begun.notify_all();
        in_a_team = true;
        part(data, 0);
        for (int i = helped + 1; i < count; i++) part(data, i);
        in_a_team = false;
        auto ended = [&] { return left.load(std::memory_order_acquire) == 0; };
        if (soon(ended)) return;
        std::unique_lock<std::mutex> lock(mutex);
        done.wait(lock, ended);
    }

  private:
    struct Call {
        void (*part)(void *, int);
        void *data;
        int helped;  // threads 1 … helped have a part
    } call{};
    int threads = 0;
    std::atomic<uint64_t> round{0};  // calls so far
    std::atomic<int> left{0};        // threads that have not done their part of this one
    std::mutex mutex;
    std::condition_variable begun, done;

    bool start() {
        try {
            std::thread(&Team::work, this, threads + 1, round.load()).detach();
        } catch (const std::system_error &) {
            return false;
        }
        threads++;
        return true;
    }

    void work(int which, uint64_t seen) {
        in_a_team = true;
        for (;;) {
            auto called = [&] { return round.load(std::memory_order_acquire) != seen; };
            soon(called);
            Call now;
            {
                std::unique_lock<std::mutex> lock(mutex);
                begun.wait(lock, called);
                seen = round.load(std::memory_order_relaxed), now = call;
            }
            if (which > now.helped) continue;
            now.part(now.data, which);
            if (left.fetch_sub(1, std::memory_order_acq_rel) > 1) continue;
            { const std::lock_guard<std::mutex> lock(mutex); }  // the caller is not between looking and falling asleep
            done.notify_one();
        }
    }
};

// Teams that no call uses, the last one first. Never destroyed: their threads live as long as the process.
class Teams {
  public:
    Team *take() {
        const std::lock_guard<std::mutex> lock(mutex);
        if (!idle) return new Team;
        return std::exchange(idle, idle->next);
    }
    void give_back(Team *team) {
        const std::lock_guard<std::mutex> lock(mutex);
        team->next = std::exchange(idle, team);
    }

  private:
    std::mutex mutex;
    Team *idle = nullptr;
};

std::atomic<Teams *> all_teams{nullptr};

// Made at the first call, in a child process again: of the parent's there are only what their locks were just then.
void make_teams() {
    all_teams = new Teams;
    in_a_team = false;
}

Teams &teams() {
    static const bool made = [] {
        make_teams();
#ifndef _WIN32
        pthread_atfork(nullptr, nullptr, make_teams);
#endif
        return true;
    }();
    (void)made;
    return *all_teams;
}

}  // namespace

void deltaw::run_own_team(void (*part)(void *, int), void *data, int count) {
    if (in_a_team || count <= 1) {
        for (int i = 0; i < count; i++) part(data, i);
        return;
    }
    Team *const team = teams().take();
    team->run(part, data, count);
    teams().give_back(team);
}
#endif
